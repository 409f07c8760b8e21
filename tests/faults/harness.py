"""What the fault tests share: runs in processes of their own, and what a workdir holds when they have ended."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from selfreg_jax.models.factory import build_model, initial_variables
from selfreg_jax.training import checkpoints
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.step import create_state
from tests.faults import config as fault_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(fault_config.__file__)
PACE = ("train/slices_per_second", "train/waiting_for_data")
# Far more than anything takes, on a machine that is shared: what is still running then hangs.
PATIENCE = 300
_KNOWN_FILES = re.compile(
  r"\.lock|config\.json|train\.log|metrics\.jsonl|curves\.png|panels/step_\d{7}\.png|tensorboard/events\.out\.[\w.]+"
  r"|(damaged_)?checkpoints/\d+(\.\d+)?/(commit_success\.txt|_CHECKPOINT_METADATA"
  r"|(best|checksums|config|dataset)/(metadata|commit_success\.txt)|metrics/(metrics|commit_success\.txt)"
  r"|(training|variables)/(_METADATA|commit_success\.txt|(ocdbt\.process_0/)?(manifest\.ocdbt|d/[0-9a-f]+)))"
)


class Run:
  """A command of this repository in a process of its own.

  Attributes:
    process: the process.
    log: the file with its standard output and error.
  """

  def __init__(self, program, *flags, log, devices=1, disk=None):
    own = {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "PYTHONUNBUFFERED": "1",
    }
    if jax.config.jax_compilation_cache_dir:
      own |= {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
      }
    command = [sys.executable, str(ROOT / program), *flags]
    if disk:
      command = [*disk.enter, *command]
    self.log = pathlib.Path(log)
    with self.log.open("w") as stream:
      self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=stream, stderr=subprocess.STDOUT)

  def wait(self, seconds=PATIENCE):
    """The exit code (minus the signal's number after a kill); a process that hangs is killed and fails the test."""
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

  def signal(self, number):
    """Sends a signal."""
    self.process.send_signal(number)

  def kill(self):
    """kill -9, and waits for the process to be gone; False where it had ended before."""
    self.signal(signal.SIGKILL)
    return self.wait() == -signal.SIGKILL

  @property
  def running(self):
    """Whether the process is still there."""
    return self.process.poll() is None

  def until(self, condition, seconds=PATIENCE, pause=0.002):
    """Polls until a condition holds; True where it does before the process ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
      if condition():
        return True
      if not self.running:
        return bool(condition())
      time.sleep(pause)
    self.process.kill()
    raise AssertionError(f"did not come to pass within {seconds} s:\n{self.output}")

  @property
  def output(self):
    """What it has printed."""
    return self.log.read_text(errors="replace")

  def check_clear(self, code, *words):
    """It ended with a code and one error that holds the words, and no traceback."""
    assert self.wait() == code, self.output
    output = self.output
    assert "Traceback" not in output, output
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, output
    for word in words:
      assert word in output, output


def train_flags(prepared, workdir, **fields):
  """Flags of train.py: `train__steps=4` becomes --config.train.steps=4."""
  network = fields.pop("network", "unet")
  given = {"data__dir": prepared} | fields
  overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
  return [f"--config={CONFIG}:{network}", f"--workdir={workdir}", *overrides]


def make_config(prepared, **fields):
  """The config that `train_flags` describes."""
  config = fault_config.get_config(fields.pop("network", "unet"))
  given = {"data.dir": str(prepared)} | {name.replace("__", "."): value for name, value in fields.items()}
  config.update_from_flattened_dict(given)
  return config


def start_training(prepared, workdir, log, *, devices=1, disk=None, flags=(), **fields):
  """train.py in a process of its own."""
  return Run("train.py", *train_flags(prepared, workdir, **fields), *flags, log=log, devices=devices, disk=disk)


def whole_run(**fields):
  """A fixture of a module: the workdir of an uninterrupted run with these fields."""

  @pytest.fixture(scope="module")
  def whole(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_whole(prepared, folder / "run", folder / "log.txt", **fields)
    return folder / "run"

  return whole


def train_whole(prepared, workdir, log, **options):
  """train.py to its end."""
  run = start_training(prepared, workdir, log, **options)
  assert run.wait() == 0, run.output
  return run


def start_together(prepared, workdir, folder, name, *, processes=2, devices=2, **fields):
  """train.py in several processes that find each other over loopback."""
  port = free_port()
  return [
    start_training(
      prepared,
      workdir,
      pathlib.Path(folder) / f"{name}_{index}.txt",
      devices=devices,
      flags=cluster_flags(port, processes, index),
      **fields,
    )
    for index in range(processes)
  ]


def cluster_flags(port, processes, index):
  """Flags by which one of several processes finds the others; none where it is alone."""
  if processes == 1:
    return []
  return [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={index}"]


def free_port():
  """A port of the loopback interface that nothing listens on."""
  with socket.socket() as sock:
    sock.bind(("localhost", 0))
    return sock.getsockname()[1]


def steps_saved(workdir):
  """Steps of the checkpoints that are in place, oldest first."""
  return [checkpoint.step for checkpoint in checkpoints.find(workdir)]


def being_written(workdir):
  """Whether a checkpoint is being written."""
  with contextlib.suppress(OSError):
    return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
  return False


def being_deleted(workdir):
  """Whether a superseded checkpoint is on its way out."""
  with contextlib.suppress(OSError):
    folders = [workdir / "checkpoints" / name for name in os.listdir(workdir / "checkpoints")]
    return any(folder.name == checkpoints.SUPERSEDED_FOLDER and any(folder.iterdir()) for folder in folders)
  return False


def last_step(workdir):
  """The last step with a line in metrics.jsonl; 0 where there is none."""
  with contextlib.suppress(OSError):
    found = re.findall(r'^\{"step": (\d+),.*\}$', (workdir / "metrics.jsonl").read_text(), re.MULTILINE)
    return int(found[-1]) if found else 0
  return 0


def state_of(checkpoint):
  """Every array of a checkpoint, by name, as `Checkpoint.read` verifies and restores them."""
  return leaves(checkpoint.read(abstract_state(checkpoint)))


def leaves(tree):
  """NumPy arrays by their names in a tree."""
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract_state(checkpoint):
  """Shapes and dtypes of the state that a checkpoint holds."""
  config, dataset = checkpoint.config, checkpoint.dataset
  model = build_model(config.model, len(dataset.classes))
  optimizer = optimizers.make_optimizer(config.optimizer, optimizers.make_schedule(config.optimizer, 10, 10))

  def initial():
    key = jax.random.key(0)
    variables = initial_variables(model, key, config.data.image_size, dataset.channels)
    return create_state(variables, optimizer, key, ema=config.train.ema_decay > 0)

  return jax.eval_shape(initial)


def assert_same_bytes(ours, theirs):
  """Arrays by name are the same, bit for bit."""
  assert ours.keys() == theirs.keys()
  assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
  assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def assert_same_state(workdir, reference):
  """The newest checkpoints of two workdirs hold the same bytes."""
  assert_same_bytes(*(state_of(checkpoints.find(folder)[-1]) for folder in (workdir, reference)))


def metric_lines(workdir):
  """The lines of metrics.jsonl without what depends on the machine's pace."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in PACE} for line in lines]


def assert_same_run(workdir, reference):
  """State, metrics, best checkpoint and panels of two finished runs are the same, and neither left litter."""
  assert_same_state(workdir, reference)
  assert metric_lines(workdir) == metric_lines(reference)
  ours, theirs = (checkpoints.best_of(checkpoints.find(folder)) for folder in (workdir, reference))
  assert (ours.step, ours.val_dice, ours.best) == (theirs.step, theirs.val_dice, theirs.best)
  assert steps_saved(workdir)[-1] == steps_saved(reference)[-1]  # a signal saves further ones
  for panel in (reference / "panels").iterdir():
    assert (workdir / "panels" / panel.name).read_bytes() == panel.read_bytes()
  assert litter(workdir) == []


def litter(workdir):
  """Files that a workdir should not hold, and folders left empty."""
  found = []
  for path in sorted(workdir.rglob("*")):
    name = path.relative_to(workdir).as_posix()
    if path.is_file() and not _KNOWN_FILES.fullmatch(name):
      found.append(name)
    if path.is_dir() and not any(path.iterdir()):
      found.append(f"{name}/")
  return found


def resumptions(workdir):
  """The steps that a workdir's runs said they went on from, in order."""
  path = workdir / "train.log"
  log = path.read_text() if path.exists() else ""
  return [int(step) for step in re.findall(r"resumed  from the checkpoint of step (\d+)$", log, re.MULTILINE)]


def _truncate(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  return bool(content)


def _flip(path):
  content = bytearray(path.read_bytes())
  if content:
    content[len(content) // 2] ^= 0x10
  path.write_bytes(content)
  return bool(content)


def _empty(path):
  changed = path.stat().st_size > 0
  path.write_bytes(b"")
  return changed


def _remove(path):
  path.unlink()
  return True


# Each damages a file, and says whether there was anything to damage.
DAMAGES = {"truncated": _truncate, "flipped": _flip, "emptied": _empty, "removed": _remove}


class Kill(NamedTuple):
  """One kill -9.

  Attributes:
    moment: what was waited for.
    step: last one with a line in metrics.jsonl.
    newest: step of the newest complete checkpoint; 0 where there was none.
    writing: a checkpoint was half-written.
    deleting: a superseded one was half-deleted.
  """

  moment: str
  step: int
  newest: int
  writing: bool
  deleting: bool


def kill_and_go_on(prepared, folder, rng, moments, **fields):
  """A run under FOLDER/run that is killed again and again, each time at another moment, and then left to its end.

  Args:
    prepared: dataset.
    folder: for the workdir and what the processes print.
    rng: chooses how long to wait at each moment.
    moments: of the kills: "start" (before the first step), "step", "writing" (a checkpoint) or "deleting" (an old one).
    **fields: of the config.

  Returns:
    The kills; each was followed by a run that went on from the newest complete checkpoint.
  """
  workdir, kills, newest = folder / "run", [], 0
  for number, moment in enumerate(moments):
    run = start_training(prepared, workdir, folder / f"{number}.txt", **fields)
    begun, said = newest, len(resumptions(workdir))
    if moment == "start":  # before the first step: while importing, resuming, compiling
      text = rng.choice(["", "steps  ", "compiling"])
      run.until(lambda run=run, text=text: text in run.output)
      time.sleep(rng.uniform(0, 0.5))
    else:
      target = begun + rng.randint(1, 4)  # steps beyond the checkpoint are forgotten at the start
      run.until(lambda run=run: "compiling" in run.output)  # what the last kill left is cleared away by then
      run.until(lambda target=target: last_step(workdir) >= target)
      if moment != "step":
        happens = being_written if moment == "writing" else being_deleted
        run.until(lambda happens=happens: happens(workdir), pause=0)
      time.sleep(rng.uniform(0, 0.05) if moment == "writing" else 0)
    assert run.kill(), run.output
    _check_goes_on(workdir, said, newest)
    newest = max(steps_saved(workdir), default=0)
    kills.append(Kill(moment, last_step(workdir), newest, being_written(workdir), being_deleted(workdir)))
  said = len(resumptions(workdir))
  train_whole(prepared, workdir, folder / "last.txt", **fields)
  assert resumptions(workdir)[said:] == ([newest] if newest else [])
  return kills


def _check_goes_on(workdir, said, newest):
  """A run that came as far as to say so went on from the newest checkpoint that was complete when it began."""
  new = resumptions(workdir)[said:]
  assert new in ([], [newest] if newest else []), (new, newest)


class Disk:
  """A small file system in memory, in a mount namespace of its own, which lives as long as this object is entered.

  Attributes:
    folder: where processes that `Run(disk=...)` starts see it.
    outside: where this process sees it.
    enter: the command that runs another one with it.
  """

  def __init__(self, folder, size):
    self.folder = folder
    script = f"mount -t tmpfs -o size={size} none '{folder}' && echo mounted && exec sleep 3600"
    self._holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE)
    assert self._holder.stdout.readline() == b"mounted\n"
    self.outside = pathlib.Path(f"/proc/{self._holder.pid}/root{folder}")
    self.enter = ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials"]

  def fill(self, *, leaving=0):
    """Fills it up but for so many bytes."""
    room = os.statvfs(self.outside)
    filler = self.outside / "filler"
    with filler.open("wb") as stream:
      stream.write(bytes(max(room.f_bavail * room.f_bsize - leaving, 0)))

  def make_room(self):
    """Undoes `fill`."""
    (self.outside / "filler").unlink()

  def make_read_only(self):
    """Mounts it anew, read-only."""
    subprocess.run([*self.enter, "mount", "-o", "remount,ro", str(self.folder)], check=True)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._holder.kill()
    self._holder.wait()
    self._holder.stdout.close()


@functools.cache
def can_mount():
  """Whether this machine lets a process mount a file system in namespaces of its own."""
  unshare = shutil.which("unshare")
  command = "mount -t tmpfs -o size=1M none /mnt"
  return bool(unshare) and subprocess.run([unshare, "-rm", "sh", "-c", command], capture_output=True).returncode == 0
