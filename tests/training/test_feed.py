import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from selfreg_jax.errors import FaultError
from selfreg_jax.training.feed import Feed


def make_feed(batches, *, timeout=10.0, place=lambda batch: batch):
  return Feed(iter(batches), place, start_step=7, timeout=timeout, describe=lambda step: f"cases of {step}")


def test_batches_come_in_order_and_are_placed_ahead():
  placed = []

  def place(batch):
    placed.append(batch)
    return -batch

  with make_feed(itertools.count(1), place=place) as feed:
    assert [feed.next() for _ in range(3)] == [-1, -2, -3]
    for _ in range(200):
      if len(placed) > 3:
        break
      time.sleep(0.01)
  assert len(placed) > 3


def test_an_error_of_the_reading_thread_names_step_and_cases():
  def batches():
    yield 1
    raise OSError("stale file handle")

  with make_feed(batches()) as feed:
    assert feed.next() == 1
    with pytest.raises(FaultError, match=r"step 8 .*OSError: stale file handle.*cases of 8"):
      feed.next()


def test_reading_that_hangs_is_told_in_time():
  hang = threading.Event()

  def batches():
    hang.wait()
    yield 1

  start = time.monotonic()
  with make_feed(batches(), timeout=0.2) as feed, pytest.raises(FaultError, match="step 7 has taken more than"):
    feed.next()
  hang.set()
  assert time.monotonic() - start < 5


# Reading goes on for 0.8 s of the process's own time, of which it is suspended between.
SLOW_READER = """
import time
from selfreg_jax.training.feed import Feed

def batches():
  print("reading", flush=True)
  for _ in range(8):
    time.sleep(0.1)
  yield "a batch"

with Feed(batches(), lambda batch: batch, start_step=0, timeout=3.0, describe=str) as feed:
  print(feed.next())
"""


def test_a_suspended_process_is_not_taken_to_hang():
  command = [sys.executable, "-c", SLOW_READER]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.kill(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
  assert output == "a batch\n", errors


def test_nothing_is_placed_once_it_is_closed():
  placing, placed = threading.Event(), []

  def place(batch):
    placing.set()
    time.sleep(0.3)
    placed.append(batch)
    return batch

  with make_feed(itertools.count(), place=place):
    placing.wait()
  assert placed == [0]
  time.sleep(0.5)
  assert placed == [0]


def test_waiting_is_counted():
  def batches():
    time.sleep(0.2)
    yield 1
    yield 2

  with make_feed(batches()) as feed:
    feed.next()
    assert feed.waited > 0.1
    feed.restart_clock()
    assert feed.waited == 0


def test_a_stream_that_ends_is_an_error():
  with make_feed([]) as feed, pytest.raises(FaultError, match="ended"):
    feed.next()
