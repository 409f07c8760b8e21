"""Preparation that is interrupted, goes on, and is shared by several processes."""

import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.data import conversion, manifest, prepare, staging
from selfreg_jax.data.prepare import PrepareOptions
from selfreg_jax.data.staging import Shard
from selfreg_jax.errors import UserError

CASES = 7
SHAPE = (6, 5, 4)


def write_case(folder, case_id, seed=0, channels=()):
  rng = np.random.default_rng(seed)
  image = rng.integers(-200, 350, (*SHAPE, *channels)).astype(np.int16)
  nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{case_id}_image.nii")
  nib.save(nib.Nifti1Image(rng.integers(0, 3, SHAPE).astype(np.uint8), np.eye(4)), folder / f"{case_id}_label.nii")


@pytest.fixture
def raw(tmp_path):
  folder = tmp_path / "raw"
  folder.mkdir()
  for index in range(CASES):
    write_case(folder, f"c{index}", index)
  return folder


def options(raw, output="out", **changes):
  normal = {
    "dataset": "msd",
    "source": raw,
    "output": raw.parent / output,
    "image_glob": "*_image.nii",
    "label_glob": "*_label.nii",
    "class_names": ("liver", "spleen"),
    "window": (-125, 275),
    "workers": 1,
  }
  return PrepareOptions(**normal | changes)


def start(raw, *arguments, output="out"):
  program = [sys.executable, "-m", "selfreg_jax.data.prepare", "--dataset=msd", "--class_names=liver,spleen"]
  files = ["--image_glob=*_image.nii", "--label_glob=*_label.nii", "--window", "-125", "275"]
  folders = [f"--source={raw}", f"--output={raw.parent / output}"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([*program, *files, *folders, "--workers=1", *arguments], **pipes)


def wait_for(path, process):
  deadline = time.monotonic() + 30
  while not path.exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.02)


def content(folder):
  """All files of a folder, hidden ones too."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uninterrupted(raw, **changes):
  """What a run makes that nobody disturbs: the manifest and arrays, and nothing else."""
  made = prepare.prepare(options(raw, "whole", **changes))
  files = content(raw.parent / "whole")
  arrays = (name for case in made.cases.values() for name in (case.image, case.label))
  assert {*files} == {"manifest.json", *arrays}
  return files


def inodes(raw):
  """Inode and time of writing of each array, staged or in place."""
  stats = {path.name: path.stat() for path in raw.parent.glob("out/cases*/*.npy")}
  return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def break_case(raw, case_id):
  """Makes a case's label unreadable; returns what mends it, to the nanosecond of the time of writing."""
  path = raw / f"{case_id}_label.nii"
  before, stat = path.read_bytes(), path.stat()
  path.write_bytes(before[:-5])

  def mend():
    path.write_bytes(before)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

  return mend


@pytest.fixture
def begun(raw):
  """A preparation that stopped at a bad file and kept the others; the file is whole again."""
  mend = break_case(raw, "c3")
  with pytest.raises(UserError, match=r"1 fault.*no dataset was written \(the cases that are done are kept"):
    prepare.prepare(options(raw))
  mend()
  return raw


def redone(raw, capfd, **changes):
  """Prepares on, checks the result; returns the ids of the cases that were converted now."""
  before = inodes(raw)
  capfd.readouterr()
  prepare.prepare(options(raw, **changes))
  done = sorted({name.split(".")[0] for name, stat in inodes(raw).items() if before.get(name) != stat})
  errors = capfd.readouterr().err
  total = len(inodes(raw)) // 2
  left = total - len(done)
  assert (f"{left} of {total} cases were done already\n" in errors) if left else "done already" not in errors
  assert content(raw.parent / "out") == uninterrupted(raw, **changes)
  manifest.load(raw.parent / "out", verify=True)
  return done


# Going on.


def test_only_what_is_missing_is_converted(begun, capfd):
  assert redone(begun, capfd) == ["c3"]


@pytest.mark.parametrize("older", [False, True])
def test_kill_9_costs_only_what_was_under_way(raw, capfd, older):
  if older:
    prepare.prepare(options(raw, normalize="minmax", window=None))
  before = content(raw.parent / "out") if older else {}
  label = raw / "c4_label.nii"
  held, stat = label.read_bytes(), label.stat()
  label.unlink()
  os.mkfifo(label)  # reading it waits for ever
  process = start(raw, "--overwrite")
  wait_for(raw.parent / "out/cases.partial/c3.done.json", process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  label.unlink()
  label.write_bytes(held)
  os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  now = content(raw.parent / "out")
  assert {name: now[name] for name in before} == before
  if older:
    manifest.load(raw.parent / "out", verify=True)
  else:
    with pytest.raises(UserError, match="never completed"):
      manifest.load(raw.parent / "out")
  stopped = {path.name: path.stat().st_ino for path in raw.parent.glob("out/cases.partial/*.npy")}
  capfd.readouterr()
  prepare.prepare(options(raw, overwrite=True))
  assert "4 of 7 cases were done already" in capfd.readouterr().err
  made = {path.name: path.stat().st_ino for path in raw.parent.glob("out/cases/*.npy")}
  assert all(
    made[f"c{index}.{kind}.npy"] == stopped[f"c{index}.{kind}.npy"] for index in range(4) for kind in staging.KINDS
  )
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_ctrl_c_ends_all_processes_however_often_it_is_pressed(raw):
  files = {kind: (raw / f"c0_{kind}.nii").read_bytes() for kind in staging.KINDS}
  for index in range(200):
    for kind, array in files.items():
      (raw / f"d{index:03d}_{kind}.nii").write_bytes(array)
  process = start(raw, "--workers=2")
  wait_for(raw.parent / "out/cases.partial/c3.done.json", process)
  for _ in range(3):
    process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == 1
  assert errors.startswith(
    "interrupted: no dataset was written (the cases that are done are kept for the next run); run"
  )
  assert errors.count("\n") == 1
  assert 4 <= len(list(raw.parent.glob("out/cases.partial/*.done.json"))) < CASES + 200


def test_only_the_first_ctrl_c_is_heeded_while_workers_finish():
  before, finished = signal.getsignal(signal.SIGINT), []

  def work():
    try:
      signal.raise_signal(signal.SIGINT)
    finally:
      signal.raise_signal(signal.SIGINT)
      finished.append(True)

  with pytest.raises(KeyboardInterrupt), conversion._interrupted_once():
    work()
  assert finished
  assert signal.getsignal(signal.SIGINT) == before


def test_threads_may_prepare_though_they_get_no_signals(raw):
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    made = executor.submit(prepare.prepare, options(raw, workers=2)).result()
  assert len(made.cases) == CASES


def test_a_changed_file_is_converted_again(begun, capfd):
  write_case(begun, "c1", seed=99)
  assert redone(begun, capfd) == ["c1", "c3"]


def test_a_file_of_another_time_or_size_is_converted_again(begun, capfd):
  os.utime(begun / "c2_label.nii", ns=(1, 1))
  longer = begun / "c4_label.nii"
  stat = longer.stat()
  longer.write_bytes(longer.read_bytes() + b"\0")
  os.utime(longer, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert redone(begun, capfd) == ["c2", "c3", "c4"]


@pytest.mark.parametrize("changes", [{"window": (-100, 200)}, {"axis": 0}, {"class_names": ("a", "b", "c")}])
def test_with_other_options_everything_is_converted_again(begun, capfd, changes):
  assert len(redone(begun, capfd, **changes)) == CASES


def test_options_that_leave_the_arrays_alone_cost_nothing(begun, capfd):
  assert redone(begun, capfd, seed=5, folds=3, class_names=("other", "names")) == ["c3"]


@pytest.mark.parametrize("kind", staging.KINDS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_arrays_are_converted_again(begun, capfd, kind, damage):
  path = begun.parent / f"out/cases.partial/c5.{kind}.npy"
  array = path.read_bytes()
  path.unlink()
  if damage != "missing":
    path.write_bytes(array[:-1] if damage == "truncated" else array[:-1] + bytes([array[-1] ^ 1]))
  assert redone(begun, capfd) == ["c3", "c5"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1, "case": {"id": 1}, "warnings": []}'])
def test_records_that_are_none_are_ignored(begun, capfd, text):
  (begun.parent / "out/cases.partial/c5.done.json").write_text(text)
  assert redone(begun, capfd) == ["c3", "c5"]


def test_cases_that_are_no_longer_asked_for_are_removed(begun, capfd):
  for path in begun.glob("c6_*"):
    path.unlink()
  (begun.parent / "out/cases.partial/c9.image.npy").write_bytes(b"half")
  (begun.parent / "out/cases.partial/c9.done.json.partial").write_text("{")
  assert redone(begun, capfd) == ["c3"]


def test_records_of_another_source_do_not_count(begun, capfd):
  begun.rename(begun.with_name("moved"))
  assert len(redone(begun.with_name("moved"), capfd)) == CASES


@pytest.mark.parametrize("line", ["rename", "save", "unlink"])
def test_stopping_while_the_dataset_is_put_in_place_costs_nothing(begun, monkeypatch, capfd, line):
  where = {"rename": (pathlib.Path, "rename"), "save": (manifest, "save"), "unlink": (staging, "shard_locks")}

  def stop(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(*where[line], stop)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(options(begun))
  monkeypatch.undo()
  if line == "unlink":
    assert len(manifest.load(begun.parent / "out", verify=True).cases) == CASES
    prepare.prepare(options(begun, overwrite=True))
    assert content(begun.parent / "out") == uninterrupted(begun)
  else:
    assert redone(begun, capfd) == []


def test_what_passes_between_processes_is_small(raw, monkeypatch):
  """Memory must not grow with the number of cases times their size."""
  sizes = []
  convert = conversion.convert_case

  def measured(job):
    outcome = convert(job)
    sizes.append(len(pickle.dumps((job, outcome))))
    return outcome

  monkeypatch.setattr(conversion, "convert_case", measured)
  write_case(raw, "big", channels=(40,))
  for index in range(CASES):
    write_case(raw, f"c{index}", channels=(40,))
  prepare.prepare(options(raw))
  assert len(sizes) == CASES + 1
  assert max(sizes) < 5000 < np.prod(SHAPE) * 40 * 2


# Shards.


def prepare_shard(raw, index, count=3, **changes):
  return prepare.prepare_shard(options(raw, **changes), f"{index}/{count}")


def test_shards_make_what_one_process_makes(raw, capfd):
  write_case(raw, "odd", seed=3)
  nib.save(nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(SHAPE) + 1000, np.eye(4)), raw / "odd_image.nii")
  said = [prepare_shard(raw, index) for index in (2, 0, 1)]
  assert "shard 2/3: 2 of 8 case(s) are done" in said[0]
  assert "--merge" in said[0]
  with pytest.raises(UserError, match="never completed"):
    manifest.load(raw.parent / "out")
  before = inodes(raw)
  capfd.readouterr()
  made = prepare.prepare(options(raw, merge=True))
  assert "odd_image.nii: 100.0% of the voxels lie at or beyond the upper end" in capfd.readouterr().err
  assert manifest.load(raw.parent / "out", verify=True) == made
  assert inodes(raw) == before  # nothing was converted
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_shards_at_the_same_time(raw):
  processes = [start(raw, f"--shard={index}/3") for index in range(3)]
  for process in processes:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "next: the same command with --merge" in output
  process = start(raw, "--merge")
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert f"prepared {CASES} case(s)" in output
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_the_parts_do_not_depend_on_the_order_of_files():
  ids = [f"c{index:02d}" for index in range(11)]
  parts = [Shard(index, 3).part(ids) for index in range(3)]
  assert parts == [Shard(index, 3).part(ids[::-1]) for index in range(3)]
  assert [len(part) for part in parts] == [4, 4, 3]
  assert frozenset().union(*parts) == {*ids}
  assert parts[0] == {"c00", "c03", "c06", "c09"}


def test_a_merge_before_all_shards_are_done_names_what_is_missing(raw):
  with pytest.raises(
    UserError, match=r"7 of 7 cases are not done.* with their shards, or leave --merge out:\n  c0: not"
  ):
    prepare.prepare(options(raw, merge=True))
  prepare_shard(raw, 0)
  prepare_shard(raw, 1)
  before = inodes(raw)
  with pytest.raises(UserError, match=r"2 of 7 cases are not done.* with --shard=2/3, or leave --merge out") as caught:
    prepare.prepare(options(raw, merge=True))
  assert str(caught.value).splitlines()[1:] == [f"  {name} (shard 2/3): not prepared yet" for name in ("c2", "c5")]
  assert inodes(raw) == before
  with pytest.raises(UserError):
    manifest.load(raw.parent / "out")
  prepare_shard(raw, 2)
  prepare.prepare(options(raw, merge=True))
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_a_merge_refuses_what_it_would_not_have_made(raw):
  for index in range(3):
    prepare_shard(raw, index, **({"window": (0, 100)} if index == 1 else {}))
  write_case(raw, "c2", seed=99)
  (raw.parent / "out/cases.partial/c3.label.npy").write_bytes(b"")
  with pytest.raises(UserError, match=r"4 of 7 cases are not done.*--shard=0/3, --shard=1/3, --shard=2/3") as caught:
    prepare.prepare(options(raw, merge=True))
  assert str(caught.value).splitlines()[1:] == [
    "  c1 (shard 1/3): prepared with other options, or its files have changed since",
    "  c2 (shard 2/3): prepared with other options, or its files have changed since",
    "  c3 (shard 0/3): c3.label.npy: has been damaged since it was prepared",
    "  c4 (shard 1/3): prepared with other options, or its files have changed since",
  ]


def test_a_bad_file_is_reported_by_its_shard_and_by_the_merge(raw):
  break_case(raw, "c4")
  prepare_shard(raw, 0)
  prepare_shard(raw, 2)
  with pytest.raises(UserError, match=r"1 fault.*kept.*\n  c4_label\.nii: "):
    prepare_shard(raw, 1)
  with pytest.raises(UserError, match=r"--shard=1/3.*\n  c4 \(shard 1/3\): not prepared yet$"):
    prepare.prepare(options(raw, merge=True))
  (raw / "c5_label.nii").unlink()
  for shard in range(3):
    with pytest.raises(UserError, match=r"c5_image\.nii: image without a label"):
      prepare_shard(raw, shard)
  for path in raw.glob("c4_*"):
    path.unlink()
  with pytest.raises(UserError, match=r"raw: 1 fault\(s\); no dataset.*\n  c5_image\.nii: image without a label"):
    prepare.prepare(options(raw, merge=True))


def test_channels_are_compared_when_shards_are_merged(raw):
  write_case(raw, "c4", channels=(2,))
  for index in range(3):
    prepare_shard(raw, index)
  with pytest.raises(UserError, match=r"c4_image\.nii: has 2 channel\(s\), most cases have 1"):
    prepare.prepare(options(raw, merge=True))


def test_a_merge_leaves_out_cases_that_are_no_longer_asked_for(raw):
  for index in range(3):
    prepare_shard(raw, index)
  for path in raw.glob("c0_*"):
    path.unlink()
  prepare.prepare(options(raw, merge=True))
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_a_whole_run_takes_over_what_shards_have_done(raw, capfd):
  prepare_shard(raw, 0)
  assert redone(raw, capfd) == ["c1", "c2", "c4", "c5"]


def test_a_shard_goes_on_where_it_was_stopped(raw, capfd):
  mend = break_case(raw, "c3")
  with pytest.raises(UserError, match="c3_label"):
    prepare_shard(raw, 0)
  mend()
  prepare_shard(raw, 0)
  assert "2 of 3 cases were done already" in capfd.readouterr().err


def test_there_may_be_more_shards_than_cases(raw):
  assert "shard 9/10: 0 of 7" in prepare_shard(raw, 9, 10)
  for index in range(9):
    prepare_shard(raw, index, 10)
  prepare.prepare(options(raw, merge=True))
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_an_older_dataset_stays_until_the_merge(raw):
  prepare.prepare(options(raw, window=(0, 100)))
  before = content(raw.parent / "out")
  with pytest.raises(UserError, match="holds a prepared dataset; --overwrite"):
    prepare_shard(raw, 0)
  for index in range(3):
    prepare_shard(raw, index, overwrite=True)
    assert before.items() <= content(raw.parent / "out").items()
  with pytest.raises(UserError, match="holds a prepared dataset; --overwrite"):
    prepare.prepare(options(raw, merge=True))
  prepare.prepare(options(raw, merge=True, overwrite=True))
  assert content(raw.parent / "out") == uninterrupted(raw)


@pytest.mark.parametrize("shard", ["3/3", "0/0", "x", "1", "-1/3", "1/3/5", "", "1.0/3"])
def test_shards_that_are_none_are_one_clear_error(raw, capfd, shard):
  arguments = ["--dataset=msd", f"--source={raw}", f"--output={raw.parent / 'out'}", "--window", "0", "1"]
  assert prepare.main([*arguments, f"--shard={shard}"]) == 2
  assert capfd.readouterr().err == (
    f"error: --shard={shard}: i/n is needed, with i from 0 to n - 1; three shards are 0/3, 1/3 and 2/3\n"
  )
  assert not (raw.parent / "out").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--dataset=msd", "--source=raw", "--output=out", "--shard=0/3", "--merge"], "exclude each other"),
    (["--dataset=phantom", "--output=out", "--shard=0/3"], "--dataset=phantom: made-up cases are made in one go"),
    (["--dataset=phantom", "--output=out", "--merge"], "--dataset=phantom: made-up cases are made in one go"),
    (["--check", "--output=out", "--shard=0/3"], "--check does not"),
    (["--check", "--output=out", "--merge"], "--check does not"),
    (["--check", "--dataset=msd", "--source=raw", "--merge"], "--check does not"),
  ],
)
def test_flags_that_do_not_go_together(raw, monkeypatch, capfd, arguments, message):
  monkeypatch.chdir(raw.parent)
  try:
    code = prepare.main(arguments)
  except SystemExit as error:
    code = error.code
  assert code == 2
  assert message in capfd.readouterr().err
  assert not pathlib.Path("out").exists()


# Locks.


@contextlib.contextmanager
def held(output, shard=None):
  """The folder as while another process prepares there."""
  output.mkdir(exist_ok=True)
  with staging.locked(output, shard):
    yield


def test_shards_share_the_folder_with_each_other_only(raw):
  with held(raw.parent / "out", Shard(0, 3)):
    prepare_shard(raw, 1)
    with pytest.raises(UserError, match="another process is preparing --shard=0/3"):
      prepare_shard(raw, 0)
    with pytest.raises(UserError, match="--shard=0/3 is being prepared there, and its cases are others"):
      prepare_shard(raw, 0, 4)
    for merge in (False, True):
      with pytest.raises(UserError, match="shard 0/3 of a preparation is writing there; wait"):
        prepare.prepare(options(raw, merge=merge))
  with held(raw.parent / "out"), pytest.raises(UserError, match="another preparation is writing there"):
    prepare_shard(raw, 0)
  prepare_shard(raw, 0, 4)  # nobody prepares thirds any more
  assert [*staging.shard_locks(raw.parent / "out")] == [Shard(0, 4)]
  prepare.prepare(options(raw))
  assert sorted(os.listdir(raw.parent / "out")) == ["cases", "manifest.json"]


def test_a_dataset_that_is_completed_while_one_waits_for_the_lock_is_not_replaced(raw, monkeypatch):
  locked = staging.locked

  def late(output, shard):
    monkeypatch.undo()
    prepare.prepare(options(raw, window=(0, 100)))
    return locked(output, shard)

  monkeypatch.setattr(staging, "locked", late)
  with pytest.raises(UserError, match="holds a prepared dataset; --overwrite"):
    prepare.prepare(options(raw))
  assert manifest.load(raw.parent / "out", verify=True).intensity.high == 100


def test_file_systems_without_locks_are_no_obstacle(raw, monkeypatch):
  def unsupported(*arguments):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  for index in range(3):
    prepare_shard(raw, index)
  prepare.prepare(options(raw, merge=True))
  monkeypatch.undo()
  assert content(raw.parent / "out") == uninterrupted(raw)


def test_a_lock_file_that_its_holder_removes_is_locked_anew(tmp_path, monkeypatch):
  flock, path = fcntl.flock, tmp_path / "lock"
  calls = []

  def removed_meanwhile(descriptor, mode):
    calls.append(mode)
    if len(calls) == 1:
      path.unlink()
    flock(descriptor, mode)

  monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
  with contextlib.ExitStack() as stack:
    assert staging._lock(stack, path, fcntl.LOCK_EX)
    assert len(calls) == 2
    assert staging._is_held(path)
