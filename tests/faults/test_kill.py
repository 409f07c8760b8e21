"""kill -9 at any moment: the run goes on from its newest checkpoint, and ends as if nothing had happened."""

import random

from tests.faults import harness

FIELDS = {"train__steps": 120, "train__validate_every": 12}
MOMENTS = 4 * ["writing", "step", "deleting", "writing", "start"]


whole = harness.whole_run(**FIELDS)


def test_twenty_kills_leave_no_trace(prepared, whole, tmp_path):
  rng = random.Random(0)
  kills = harness.kill_and_go_on(prepared, tmp_path, rng, rng.sample(MOMENTS, len(MOMENTS)), **FIELDS)
  writing, deleting = sum(kill.writing for kill in kills), sum(kill.deleting for kill in kills)
  print(f"\n{len(kills)} kills, {writing} while a checkpoint was being written, {deleting} while one was being deleted")
  harness.assert_same_run(tmp_path / "run", whole)
  assert writing >= 2
  assert deleting >= 1
