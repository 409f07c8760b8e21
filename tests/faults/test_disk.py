"""Full and read-only disks: small file systems in memory, mounted in namespaces of their own."""

import re
import signal

import pytest

from tests.faults import harness

FIELDS = {"train__steps": 16, "train__validate_every": 8, "train__checkpoint_every": 2}
KIB = 1024

needs_mount = pytest.mark.skipif(not harness.can_mount(), reason="this user may not mount a file system")


whole = harness.whole_run(**FIELDS)


@pytest.fixture
def disk(tmp_path):
  folder = tmp_path / "disk"
  folder.mkdir()
  with harness.Disk(folder, "16M") as disk:
    yield disk


def start(prepared, disk, name, **fields):
  return harness.start_training(
    prepared, disk.folder / "run", disk.folder.parent / f"{name}.txt", disk=disk, **FIELDS | fields
  )


def stop_after_step_5(prepared, disk):
  """A run on the disk that is stopped with a checkpoint; returns its step."""
  run = start(prepared, disk, "stopped")
  run.until(lambda: harness.last_step(disk.outside / "run") >= 5)
  run.signal(signal.SIGTERM)
  assert run.wait() == 75, run.output
  return harness.steps_saved(disk.outside / "run")[-1]


@needs_mount
@pytest.mark.parametrize("room", [0, 32 * KIB, 96 * KIB, 192 * KIB])
@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_disk_full(prepared, whole, disk, room, on_save_error):
  workdir = disk.outside / "run"
  newest = stop_after_step_5(prepared, disk)
  disk.fill(leaving=room)
  run = start(prepared, disk, "full", on_save_error=on_save_error)
  code = run.wait()
  print(f"\n{room // KIB} KiB left, {on_save_error}: exit code {code}\n{run.output[-700:]}")
  # Where nothing at all can be written the run does not begin.
  begun = "steps  " in run.output
  run.check_clear(1 if begun else 2, "No space left on device")
  kept = harness.steps_saved(workdir)[-1]
  assert kept >= newest
  if begun:
    assert f"that of step {kept} is intact" in run.output
  if begun and on_save_error == "continue":
    assert re.search(r"^warning  .*could not be written", run.output, re.MULTILINE)
    assert "step 16  total" in run.output
  disk.make_room()
  again = start(prepared, disk, "again")
  assert again.wait() == 0, again.output
  assert harness.resumptions(workdir)[-1] == kept
  harness.assert_same_run(workdir, whole)


@needs_mount
def test_read_only_workdir(prepared, disk):
  stop_after_step_5(prepared, disk)
  disk.make_read_only()
  run = start(prepared, disk, "read_only")
  run.check_clear(2, str(disk.folder / "run"), "Read-only file system")
  assert "steps  " not in run.output  # nothing was computed


def test_a_workdir_serves_one_run(prepared, whole, tmp_path):
  fields = FIELDS | {"train__steps": 400, "train__checkpoint_every": 100, "train__validate_every": 100}
  first = harness.start_training(prepared, tmp_path / "run", tmp_path / "first.txt", **fields)
  first.until(lambda: "compiling" in first.output)
  second = harness.start_training(prepared, tmp_path / "run", tmp_path / "second.txt", **fields)
  second.check_clear(2, "another run is using this folder")
  assert first.running
  assert first.kill()
  third = harness.start_training(prepared, tmp_path / "run", tmp_path / "third.txt", **FIELDS)
  assert third.wait() == 0, third.output
