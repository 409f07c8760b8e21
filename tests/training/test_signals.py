import os
import signal
import subprocess
import sys

import pytest

from selfreg_jax.training.signals import stop_requests

# A process that has a terminal of its own, which then is closed; it goes on writing.
IN_A_TERMINAL = """
import os, pty, sys

process, terminal = pty.fork()
if not process:
  os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], sys.argv[2]])
while b"ready" not in os.read(terminal, 1000):
  pass
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""
WRITING = """
import pathlib, signal, sys, time
from selfreg_jax.training.signals import stop_requests

signal.signal(signal.SIGHUP, signal.SIG_DFL)
with stop_requests() as stop:
  print("ready", flush=True)
  while not stop:
    time.sleep(0.01)
  print("a line", flush=True)
  print("a line", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1]).write_text(stop.signal_name)
"""


@pytest.fixture
def hangups():
  """Sets what SIGHUP does; pytest may have been started by nohup."""
  before = signal.getsignal(signal.SIGHUP)
  yield lambda handler: signal.signal(signal.SIGHUP, handler)
  signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_stops_a_run_whose_lines_go_nowhere_from_then_on(tmp_path):
  command = [sys.executable, "-c", IN_A_TERMINAL, WRITING, str(tmp_path / "signal")]
  assert subprocess.run(command, timeout=60, check=False).returncode == 0
  assert (tmp_path / "signal").read_text() == "SIGHUP"


def test_the_hangups_that_follow_the_first_do_not_end_the_process(hangups):
  hangups(signal.SIG_DFL)
  with stop_requests() as stop:
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal_name == "SIGHUP"
  assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_hangups_that_the_process_was_started_to_ignore_are_ignored(hangups):
  hangups(signal.SIG_IGN)
  with stop_requests() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop
