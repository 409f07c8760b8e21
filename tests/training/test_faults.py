"""A short form of tests/faults: real processes, killed, stopped and out of space (`make test-faults` has it all)."""

import random
import signal

import pytest

from tests.faults import harness

# Many quick steps: a run must not end by itself before it is killed, however slow the machine.
FIELDS = {"train__steps": 100, "train__validate_every": 50}


whole = harness.whole_run(**FIELDS)


def test_two_kills_leave_no_trace(prepared, whole, tmp_path):
  harness.kill_and_go_on(prepared, tmp_path, random.Random(0), ["step", "writing"], **FIELDS)
  harness.assert_same_run(tmp_path / "run", whole)


@pytest.mark.skipif(not harness.can_mount(), reason="this user may not mount a file system")
def test_a_disk_that_is_full_and_then_has_room(prepared, whole, tmp_path):
  folder = tmp_path / "disk"
  folder.mkdir()
  with harness.Disk(folder, "16M") as disk:
    stopped = harness.start_training(prepared, folder / "run", tmp_path / "stopped.txt", disk=disk, **FIELDS)
    stopped.until(lambda: harness.last_step(disk.outside / "run") >= 3)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output
    newest = harness.steps_saved(disk.outside / "run")[-1]
    disk.fill(leaving=1 << 16)
    full = harness.start_training(prepared, folder / "run", tmp_path / "full.txt", disk=disk, **FIELDS)
    full.check_clear(1, "No space left on device", f"that of step {newest} is intact")
    disk.make_room()
    harness.train_whole(prepared, folder / "run", tmp_path / "again.txt", disk=disk, **FIELDS)
    harness.assert_same_run(disk.outside / "run", whole)
