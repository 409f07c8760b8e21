import contextlib
import os
import signal
import subprocess
import sys

COMMAND = """
import multiprocessing
import time
from selfreg_jax.evaluation.case_scores import score_all

def predictions():
  yield from (1, 2, 3)
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  time.sleep(600)

list(score_all(abs, predictions(), workers=2))
"""


def test_workers_end_with_a_command_that_is_killed():
  with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True) as command:
    workers = [int(number) for number in command.stdout.readline().split()]
    assert len(workers) == 2
    command.kill()
    try:
      command.communicate(timeout=20)  # ends when nobody holds the pipe any more, and workers inherit it
    except subprocess.TimeoutExpired:
      for worker in workers:
        with contextlib.suppress(ProcessLookupError):
          os.kill(worker, signal.SIGKILL)
      raise
