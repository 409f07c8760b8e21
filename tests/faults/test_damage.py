"""Damaged bytes: of every file of a checkpoint, of prepared data; what is used is whole, or it is refused by name."""

import itertools
import re
import shutil

import jax
import numpy as np
import pytest

from selfreg_jax.errors import UserError
from selfreg_jax.training import checkpoints, loop
from selfreg_jax.training.plan import make_plan
from selfreg_jax.training.start import resume
from tests.faults import harness

FIELDS = {"train__steps": 6, "train__validate_every": 2, "train__checkpoint_every": 0}
# Files that hold no value and that nothing asks for: their damage changes nothing.
HARMLESS = re.compile(
  r"(.*/)?commit_success\.txt|_CHECKPOINT_METADATA|variables/_METADATA|(training|variables)/ocdbt\.process_0/.*"
)


def train(config, workdir):
  loop.train_and_evaluate(config, workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
  """A config, the workdir of a finished run, and that of the same run killed after step 4, with checkpoints 2 and 4."""
  folder = tmp_path_factory.mktemp("damage")
  config = harness.make_config(prepared, **FIELDS)
  train(config, folder / "whole")

  class Killed(BaseException):
    pass

  def killing(self, step):
    if step == 5:
      raise Killed

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.RunLogger, "advance", killing)
    with pytest.raises(Killed):
      train(config, folder / "killed")
  assert harness.steps_saved(folder / "killed") == [2, 4]
  return config, folder / "whole", folder / "killed"


def files_of(workdir, step):
  """The files of a checkpoint, by their name in it."""
  folder = workdir / "checkpoints" / str(step)
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved_states(runs):
  """Every array of the checkpoints of steps 2 and 4."""
  _, _, killed = runs
  return {checkpoint.step: harness.state_of(checkpoint) for checkpoint in checkpoints.find(killed)}


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_every_file_of_the_latest_checkpoint(runs, saved_states, tmp_path, damage):
  config, _, killed = runs
  plan = make_plan(config, killed, jax.devices()[:1])
  abstract = harness.abstract_state(checkpoints.find(killed)[-1])
  outcomes = {}
  for name in files_of(killed, 4):
    workdir = shutil.copytree(killed, tmp_path / "run")
    if harness.DAMAGES[damage](workdir / "checkpoints" / "4" / name):
      resumed = resume(workdir, plan, abstract, override=False)
      said = list(resumed.notes)
      harness.assert_same_bytes(harness.leaves(resumed.state), saved_states[resumed.step])
      outcomes[name] = check_outcome(workdir, resumed.step, said, name)
    shutil.rmtree(workdir)
  print_outcomes(damage, outcomes)
  unharmed = [name for name, outcome in outcomes.items() if outcome == "not needed"]
  assert [name for name in unharmed if not HARMLESS.fullmatch(name)] == []


def check_outcome(workdir, step, said, name):
  """Whether the checkpoint was set aside, whole but for the damage, or its damage did not matter."""
  if step == 4:
    assert said == []
    assert not (workdir / "damaged_checkpoints").exists()
    return "not needed"
  assert step == 2
  aside = workdir / "damaged_checkpoints" / "4"
  item = name.partition("/")[0]
  item = r"\w+" if item == "checksums" else item  # a checksum that changed speaks against what it is of
  assert re.fullmatch(rf"damaged  .*checkpoints/4/{item}: .*\n +set aside as {aside}; going on from step 2", said[0]), (
    said
  )
  assert aside.is_dir()
  return "set aside"


def print_outcomes(damage, outcomes):
  print(f"\n{damage}:", *(f"  {name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")


def representatives(workdir, step):
  """A file of each item of a checkpoint, of arrays also the tables of contents."""
  return [
    name
    for name in files_of(workdir, step)
    if re.fullmatch(r".*/(metadata|metrics|_METADATA)|(training|variables)/(manifest\.ocdbt|d/\w+)", name)
  ]


def test_the_run_ends_as_it_would_have(runs, tmp_path):
  config, whole, killed = runs
  names = representatives(killed, 4)
  for name, damage in zip(names, itertools.cycle(harness.DAMAGES), strict=False):
    workdir = shutil.copytree(killed, tmp_path / "run")
    harness.DAMAGES[damage](workdir / "checkpoints" / "4" / name)
    train(config, workdir)
    assert harness.resumptions(workdir) == [2]
    assert "going on from step 2" in (workdir / "train.log").read_text()
    harness.assert_same_run(workdir, whole)
    shutil.rmtree(workdir)
  print(f"\n{len(names)} runs")


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_prediction_with_every_file_of_its_checkpoint(runs, tmp_path, damage):
  _, _, killed = runs
  expected = checkpoints.load_trained(killed, checkpoint="latest").variables
  outcomes = {}
  for name in files_of(killed, 4):
    workdir = shutil.copytree(killed, tmp_path / "run")
    if harness.DAMAGES[damage](workdir / "checkpoints" / "4" / name):
      for checkpoint in ("latest", "best"):
        loaded, refusal = load(workdir, checkpoint)
        outcomes[name, checkpoint] = "refused" if refusal else f"step {loaded.step}"
        assert "checkpoints/4" in (refusal or "checkpoints/4")
        if loaded and loaded.step == 4:
          jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
    shutil.rmtree(workdir)
  print_outcomes(damage, outcomes)


def load(workdir, checkpoint):
  """(the network, None) or (None, why it was refused)."""
  try:
    return checkpoints.load_trained(workdir, checkpoint=checkpoint), None
  except UserError as error:
    return None, str(error)


@pytest.mark.parametrize("damage", harness.DAMAGES)
@pytest.mark.parametrize("item", ["metrics", "config", "best", "checksums", "variables"])
def test_an_older_checkpoint(runs, tmp_path, damage, item):
  config, whole, killed = runs
  workdir = shutil.copytree(killed, tmp_path / "run")
  [name] = [name for name in files_of(killed, 2) if re.fullmatch(rf"{item}/(metadata|metrics|_METADATA)", name)]
  harness.DAMAGES[damage](workdir / "checkpoints" / "2" / name)
  train(config, workdir)
  assert harness.resumptions(workdir) == [4]
  harness.assert_same_state(workdir, whole)
  # Arrays, and so what a flipped bit did to the checksum of one, are not looked at until they are needed.
  if item != "variables" and (item, damage) != ("checksums", "flipped"):
    assert (workdir / "damaged_checkpoints" / "2").is_dir()
    assert "checkpoints/2/" in (workdir / "train.log").read_text()


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_when_none_is_whole_nothing_is_touched(runs, tmp_path, damage):
  config, _, killed = runs
  workdir = shutil.copytree(killed, tmp_path / "run")
  for step in (2, 4):
    for name in files_of(killed, step):
      harness.DAMAGES[damage](workdir / "checkpoints" / str(step) / name)
  before = contents(workdir)
  for _ in range(2):
    with pytest.raises(UserError, match="none of the 2 checkpoint"):
      train(config, workdir)
  assert contents(workdir) == before


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", harness.DAMAGES)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_prepared_data(prepared, tmp_path, damage, kind):
  data = shutil.copytree(prepared, tmp_path / "data")
  path = sorted((data / "cases").glob(f"*.{kind}.npy"))[0]
  harness.DAMAGES[damage](path)
  run = harness.start_training(data, tmp_path / "run", tmp_path / "log.txt")
  run.check_clear(2, "1 damaged file", f"cases/{path.name}: ", "prepare the dataset again")
  assert not (tmp_path / "run").exists()
