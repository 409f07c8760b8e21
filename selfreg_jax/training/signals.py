"""SIGTERM and SIGINT during training: finish the step, save, and leave with an exit code that says "resumable"."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from selfreg_jax.errors import EXIT_RESUMABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterruptedError(Exception):
  """Training was stopped by a signal after its checkpoint was saved; the message says how to continue."""


def leave_at_signals() -> None:
  """From now on a signal that comes outside of `stop_requests`, before or after training steps, ends the process."""
  for number in _SIGNALS:
    signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  print(f"stopped by {name} outside of training steps; nothing is lost, the same command continues", file=sys.stderr)
  sys.stderr.flush()
  os._exit(EXIT_RESUMABLE)


class StopRequest:
  """Whether a signal has asked the run to stop."""

  def __init__(self) -> None:
    self.signal_name: str | None = None

  def __bool__(self) -> bool:
    return self.signal_name is not None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request; a second one ends the process at once.

  Yields:
    The request, false until a signal comes. Outside the main thread signals cannot be caught, and it stays false.
  """
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  previous = {number: signal.getsignal(number) for number in _SIGNALS}

  def handle(number: int, frame: object) -> None:
    del frame
    request.signal_name = signal.Signals(number).name
    for both in _SIGNALS:
      signal.signal(both, signal.SIG_DFL)

  for number in _SIGNALS:
    signal.signal(number, handle)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
