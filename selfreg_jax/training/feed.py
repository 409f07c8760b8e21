"""From the stream of stored batches to batches on the devices, ahead of the step and never hanging in silence."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from selfreg_jax.errors import FaultError

_BATCHES_ON_DEVICE = 2
_SECONDS_TO_END = 10
_SECONDS_OF_A_WAIT = 0.5


class Feed:
  """Takes batches from an iterator in a thread of its own and puts them on the devices while earlier ones are used.

  Attributes:
    waited: seconds that `next` has waited since `restart_clock`.
  """

  def __init__(
    self,
    batches: Iterator[Any],
    place: Callable[[Any], Any],
    *,
    start_step: int,
    timeout: float,
    describe: Callable[[int], str],
  ):
    """Starts reading.

    Args:
      batches: the stored batches from `start_step` on, without end.
      place: puts one on the devices.
      start_step: of the first batch.
      timeout: seconds after which reading is taken to hang.
      describe: names the cases of a step's batch, for errors; must not read them.
    """
    self._timeout = timeout
    self._describe = describe
    self._step = start_step
    self._queue: queue.Queue = queue.Queue(_BATCHES_ON_DEVICE)
    self._closed = threading.Event()
    self._hangs = False
    self.waited = 0.0
    # A daemon: one that hangs in a read must not keep the process from ending.
    self._thread = threading.Thread(target=self._read, args=(batches, place), name="feed", daemon=True)
    self._thread.start()

  def _read(self, batches: Iterator[Any], place: Callable[[Any], Any]) -> None:
    try:
      for batch in batches:
        self._put(place(batch))
        if self._closed.is_set():
          return
      raise EOFError("the stream of batches ended")
    except BaseException as error:  # whatever it is belongs to the thread that trains
      self._put(error)

  def _put(self, item: Any) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(item, timeout=0.2)
      except queue.Full:
        continue

  def _wait(self) -> Any:
    """The next item; raises queue.Empty after the timeout.

    Waits are short and each counts as no more than was waited for: time in which the whole process was suspended (by
    Ctrl-Z, by a cluster that makes room for another job) is not reading that hangs.
    """
    left = self._timeout
    while True:
      seconds = min(left, _SECONDS_OF_A_WAIT)
      try:
        return self._queue.get(timeout=seconds)
      except queue.Empty:
        left -= seconds
        if left <= 0:
          raise

  def next(self) -> Any:
    """The next batch on the devices.

    Raises:
      FaultError: it could not be read, or not in time; the message names its cases.
    """
    start = time.monotonic()
    try:
      item = self._wait()
    except queue.Empty:
      self._hangs = True
      raise FaultError(
        f"reading the batch of step {self._step} has taken more than {self._timeout:g} s (config.data.timeout) and is "
        f"taken to hang; its cases: {self._describe(self._step)}. The same command continues from the last checkpoint"
      ) from None
    finally:
      self.waited += time.monotonic() - start
    if isinstance(item, BaseException):
      raise FaultError(
        f"the batch of step {self._step} could not be read ({type(item).__name__}: {item}); its cases: "
        f"{self._describe(self._step)}. The same command continues from the last checkpoint"
      ) from item
    self._step += 1
    return item

  def restart_clock(self) -> None:
    """Counts waiting from now on."""
    self.waited = 0.0

  def __enter__(self) -> "Feed":
    return self

  def __exit__(self, *exception) -> None:
    self._closed.set()
    # An interpreter that ends while a thread is inside JAX's C++ code aborts the process.
    if not self._hangs:
      self._thread.join(_SECONDS_TO_END)
