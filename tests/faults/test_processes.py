"""Two processes over loopback: what becomes of the other when one is killed or asked to stop, and of the run."""

import signal
import time

import pytest

from tests.faults import harness

STEPS = 40
FIELDS = {"train__steps": STEPS, "train__validate_every": 10, "train__checkpoint_every": 4}
# The second process is 45 s behind the first when its first step is compiled.
SLOW_TO_COMPILE = """
import runpy, sys, time
from selfreg_jax.training import loop
compile_step = loop.compile_step
def slow(*arguments):
  time.sleep(45 if "--process_id=1" in sys.argv else 0)
  return compile_step(*arguments)
loop.compile_step = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SECONDS_TO_END = 120  # heartbeats are missed for 60 s before a process is given up


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  for run in harness.start_together(prepared, folder / "run", folder, "whole", **FIELDS):
    assert run.wait() == 0, run.output
  return folder / "run"


def finish(prepared, tmp_path):
  """Starts both again and waits for the end."""
  for run in harness.start_together(prepared, tmp_path / "run", tmp_path, "again", **FIELDS):
    assert run.wait() == 0, run.output


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(prepared, whole, tmp_path, victim):
  runs = harness.start_together(prepared, tmp_path / "run", tmp_path, "killed", **FIELDS)
  runs[victim].until(lambda: harness.last_step(tmp_path / "run") >= 9)
  assert runs[victim].kill()
  start = time.monotonic()
  other = runs[1 - victim]
  code = other.wait(SECONDS_TO_END)
  print(f"\nprocess {victim} killed: the other one ended with {code} after {time.monotonic() - start:.0f} s")
  print(other.output[-600:])
  assert code != 0
  newest = harness.steps_saved(tmp_path / "run")[-1]
  assert newest >= 4
  finish(prepared, tmp_path)
  assert harness.resumptions(tmp_path / "run") == [newest]
  harness.assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("asked", [0, 1])
def test_one_is_asked_to_stop(prepared, whole, tmp_path, asked):
  runs = harness.start_together(prepared, tmp_path / "run", tmp_path, "stopped", **FIELDS)
  runs[asked].until(lambda: harness.last_step(tmp_path / "run") >= 9)
  runs[asked].signal(signal.SIGTERM)
  assert [run.wait() for run in runs] == [75, 75], [run.output for run in runs]
  newest = harness.steps_saved(tmp_path / "run")[-1]
  for run in runs:
    assert f"after step {newest}, which is saved" in run.output
  finish(prepared, tmp_path)
  assert harness.resumptions(tmp_path / "run") == [newest]
  harness.assert_same_run(tmp_path / "run", whole)


def test_one_may_take_long_to_compile(prepared, whole, tmp_path):
  program = tmp_path / "slow.py"
  program.write_text(SLOW_TO_COMPILE)
  port = harness.free_port()
  runs = [
    harness.Run(
      program,
      str(harness.ROOT / "train.py"),
      *harness.train_flags(prepared, tmp_path / "run", **FIELDS),
      *harness.cluster_flags(port, 2, index),
      log=tmp_path / f"{index}.txt",
      devices=2,
    )
    for index in range(2)
  ]
  for run in runs:
    assert run.wait() == 0, run.output
  harness.assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
  ("difference", "words"),
  [
    ({"seed": 3}, "process 1: config.seed is 3, in process 0 0"),
    ({"train__steps": STEPS + 1}, "process 1: config.train.steps is 41, in process 0 40"),
    ({"workdir": "elsewhere"}, "is not the workdir that process 0 sees"),
    ({"data__dir": "nowhere"}, "nowhere: no manifest.json"),
  ],
)
def test_a_mistake_in_one_process_ends_both_with_its_message(prepared, tmp_path, difference, words):
  port = harness.free_port()
  runs = []
  for index in range(2):
    own = dict(difference) if index else {}
    workdir = tmp_path / own.pop("workdir", "run")
    flags = harness.cluster_flags(port, 2, index)
    log = tmp_path / f"{index}.txt"
    runs.append(harness.start_training(prepared, workdir, log, devices=2, flags=flags, **(FIELDS | own)))
  for run in runs:
    run.check_clear(2, words)
