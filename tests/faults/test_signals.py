"""SIGTERM and SIGINT: the step is finished and saved, a second signal ends the process at once, validation is left."""

import signal
import time

import pytest

from selfreg_jax.training import checkpoints
from tests.conftest import make_prepared
from tests.faults import harness

STEPS = 40
FIELDS = {"train__steps": STEPS, "train__validate_every": 20, "train__checkpoint_every": 0}
SLOW_FIELDS = {"train__steps": 4, "train__validate_every": 2, "train__checkpoint_every": 0, "eval__batch_size": 1}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  folder = tmp_path_factory.mktemp("signals")
  harness.train_whole(prepared, folder / "run", folder / "log.txt", **FIELDS)
  return folder / "run"


@pytest.fixture(scope="module")
def slow_to_validate(tmp_path_factory):
  """A prepared dataset whose validation takes many times as long as a step: 1,440 slices."""
  return make_prepared(tmp_path_factory.mktemp("slow"), val="abc", test="z", depths=(480, 480), training=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_saved_and_the_run_goes_on(prepared, whole, tmp_path, number):
  run = harness.start_training(prepared, tmp_path / "run", tmp_path / "log.txt", **FIELDS)
  run.until(lambda: harness.last_step(tmp_path / "run") >= 5)
  run.signal(number)
  assert run.wait() == 75, run.output
  newest = harness.steps_saved(tmp_path / "run")[-1]
  assert f"stopped by {number.name} after step {newest}, which is saved" in run.output
  assert harness.last_step(tmp_path / "run") == newest
  harness.train_whole(prepared, tmp_path / "run", tmp_path / "again.txt", **FIELDS)
  assert harness.resumptions(tmp_path / "run") == [newest]
  harness.assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(slow_to_validate, tmp_path, number):
  run = harness.start_training(slow_to_validate, tmp_path / "run", tmp_path / "log.txt", **SLOW_FIELDS)
  run.until(lambda: harness.last_step(tmp_path / "run") >= 2)
  time.sleep(1)  # until its long validation case has begun: before that it would be gone at the first signal
  run.signal(number)
  time.sleep(0.3)  # two signals that are pending at the same time are one
  assert run.running, run.output
  run.signal(number)
  start = time.monotonic()
  assert run.wait() == -number, run.output
  assert "Traceback" not in run.output
  print(f"\nsecond {number.name}: gone after {time.monotonic() - start:.2f} s")


def test_a_validation_is_left_and_made_up_for(slow_to_validate, tmp_path):
  harness.train_whole(slow_to_validate, tmp_path / "whole", tmp_path / "whole.txt", **SLOW_FIELDS)
  run = harness.start_training(slow_to_validate, tmp_path / "run", tmp_path / "log.txt", **SLOW_FIELDS)
  run.until(lambda: harness.last_step(tmp_path / "run") >= 2)
  run.signal(signal.SIGTERM)
  assert run.wait() == 75, run.output
  assert "after step 2, which is saved" in run.output
  assert "validation Dice" not in (tmp_path / "run" / "train.log").read_text()
  assert harness.steps_saved(tmp_path / "run") == [2]
  assert checkpoints.find(tmp_path / "run")[0].val_dice is None
  harness.train_whole(slow_to_validate, tmp_path / "run", tmp_path / "again.txt", **SLOW_FIELDS)
  log = (tmp_path / "run" / "train.log").read_text()
  assert log.index("resumed  from the checkpoint of step 2") < log.index("step 2  validation Dice")
  harness.assert_same_run(tmp_path / "run", tmp_path / "whole")
