"""SIGTERM, SIGINT and SIGHUP during training: finish the step, save, leave with an exit code that says "resumable".

SIGHUP is what a process gets when its terminal is closed or its connection lost. One that was started to ignore it
(nohup) goes on ignoring it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from selfreg_jax.errors import EXIT_RESUMABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class TrainingInterruptedError(Exception):
  """Training was stopped by a signal after its checkpoint was saved; the message says how to continue."""


def leave_at_signals() -> None:
  """From now on a signal that comes outside of `stop_requests`, before or after training steps, ends the process."""
  terminals = _terminals()

  def leave(number: int, frame: object) -> NoReturn:
    del frame
    _leave(number, terminals)

  for number in _heeded():
    signal.signal(number, leave)


def _heeded() -> list[signal.Signals]:
  ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  return [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]


def _terminals() -> list[int]:
  """Which of standard output and error are terminals; one that was closed can no longer be asked."""
  return [number for number in (1, 2) if os.isatty(number)]


def _replace_closed(terminals: Sequence[int], number: int) -> None:
  """After SIGHUP: a line that is written to the closed terminal would be an error, and end the run unsaved."""
  if number == signal.SIGHUP:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for terminal in terminals:
      os.dup2(nowhere, terminal)
    os.close(nowhere)


def _leave(number: int, terminals: Sequence[int]) -> NoReturn:
  _replace_closed(terminals, number)
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
  """Turns the first signal into a request; a second SIGTERM or SIGINT ends the process at once.

  A second SIGHUP does not: shells send one more when a terminal closes.

  Yields:
    The request, false until a signal comes. Outside the main thread signals cannot be caught, and it stays false.
  """
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  previous = {number: signal.getsignal(number) for number in _heeded()}
  terminals = _terminals()

  def handle(number: int, frame: object) -> None:
    del frame
    _replace_closed(terminals, number)
    request.signal_name = signal.Signals(number).name
    for heeded in previous:
      signal.signal(heeded, signal.SIG_IGN if heeded == signal.SIGHUP else signal.SIG_DFL)

  for number in previous:
    signal.signal(number, handle)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
