"""kill -9 at any moment: the run goes on from its newest checkpoint, and ends as if nothing had happened."""

import random
import time

import pytest

from tests.faults import harness

KILLS = 20
STEPS = 120
FIELDS = {"train__steps": STEPS, "train__validate_every": 12}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  harness.train_whole(prepared, folder / "run", folder / "log.txt", **FIELDS)
  return folder / "run"


def test_twenty_kills_leave_no_trace(prepared, whole, tmp_path, record_property):
  kills = harness.kill_and_go_on(prepared, tmp_path, random.Random(0), KILLS, **FIELDS)
  record_property("kills", str(kills))
  print(f"\nkills: {[kill.moment for kill in kills]}")
  print(f"while a checkpoint was being written: {sum(kill.writing for kill in kills)}, deleted: {sum(kill.deleting for kill in kills)}")
  harness.assert_same_run(tmp_path / "run", whole)
