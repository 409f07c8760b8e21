"""Damaged bytes: of every file of a checkpoint, of prepared data; what is used is whole, or it is refused by name."""

import re
import shutil

import jax
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.errors import UserError
from selfreg_jax.training import loop
from tests.faults import harness

FIELDS = {"train__steps": 6, "train__validate_every": 2, "train__checkpoint_every": 0}
# Files that hold no value and that nothing asks for: their damage changes nothing.
HARMLESS = re.compile(r"(.*/)?commit_success\.txt|_CHECKPOINT_METADATA|(training|variables)/ocdbt\.process_0/.*")


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


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_every_file_of_the_latest_checkpoint(runs, tmp_path, damage):
  config, whole, killed = runs
  outcomes = {}
  for name in files_of(killed, 4):
    workdir = shutil.copytree(killed, tmp_path / "run")
    if not harness.DAMAGES[damage](workdir / "checkpoints" / "4" / name):
      outcomes[name] = "nothing to damage"
    else:
      train(config, workdir)
      outcomes[name] = check_outcome(workdir, whole, name)
    shutil.rmtree(workdir)
  print(f"\n{damage}: " + "".join(f"\n  {name}: {outcome}" for name, outcome in outcomes.items()))
  unharmed = [name for name, outcome in outcomes.items() if outcome == "not needed"]
  assert [name for name in unharmed if not HARMLESS.fullmatch(name)] == []


def check_outcome(workdir, whole, name):
  """Whether the checkpoint was set aside or its damage did not matter; the run ended as it should, either way."""
  begun = harness.resumptions(workdir)[-1]
  log = (workdir / "train.log").read_text()
  harness.assert_same_run(workdir, whole)
  if begun == 4:
    assert not (workdir / "damaged_checkpoints").exists()
    assert "damaged" not in log
    return "not needed"
  assert begun == 2
  assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == ["4"]
  item = name.partition("/")[0]
  assert re.search(rf"damaged  .*checkpoints/4(/{item})?: ", log), log
  assert "going on from step 2" in log
  return "set aside"


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_prediction_with_every_file_of_its_checkpoint(runs, tmp_path, damage):
  _, _, killed = runs
  expected = jax.tree.map(np.asarray, sr.load(killed, checkpoint="latest").variables)
  outcomes = {}
  for name in files_of(killed, 4):
    workdir = shutil.copytree(killed, tmp_path / "run")
    if harness.DAMAGES[damage](workdir / "checkpoints" / "4" / name):
      for checkpoint in ("latest", "best"):
        try:
          loaded = sr.load(workdir, checkpoint=checkpoint)
          if loaded.step == 4:
            jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
          outcomes[name, checkpoint] = f"step {loaded.step}"
        except UserError as error:
          assert "checkpoints/4" in str(error)
          outcomes[name, checkpoint] = "refused"
    shutil.rmtree(workdir)
  print(f"\n{damage}: " + "".join(f"\n  {name}: {outcome}" for name, outcome in outcomes.items()))


@pytest.mark.parametrize("damage", harness.DAMAGES)
def test_every_file_of_an_older_checkpoint_is_of_no_concern(runs, tmp_path, damage):
  config, whole, killed = runs
  for name in files_of(killed, 2):
    workdir = shutil.copytree(killed, tmp_path / "run")
    harness.DAMAGES[damage](workdir / "checkpoints" / "2" / name)
    train(config, workdir)
    assert harness.resumptions(workdir)[-1] == 4
    harness.assert_same_state(workdir, whole)
    shutil.rmtree(workdir)


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
