"""The scripts as users call them: exit codes, messages, no tracebacks."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
  environment = os.environ | {"XLA_FLAGS": ""}
  return subprocess.run(
    [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )


def assert_user_mistake(result, *messages):
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr
  for message in messages:
    assert message in result.stderr


@pytest.mark.parametrize(
  ("flags", "messages"),
  [
    (["--config=configs/quickstart.py", "--config.loss.scr_wieght=1"], ["scr_wieght", "scr_weight"]),
    (["--config=configs/quickstart.py", "--config.data.batch_size=many"], ["batch_size"]),
    (["--config=configs/nothing.py"], ["configs/nothing.py"]),
    (["--config=configs/quickstart.py", "--config.data.dir=nowhere"], ["nowhere", "manifest.json", "prepare"]),
    (["--config=configs/quickstart.py", "--config.optimizer.name=rmsprop"], ["'sgd', 'adamw', 'adam'"]),
    (["--config=configs/quickstart.py", "leftover"], ["leftover"]),
    (["--config=configs/quickstart.py", "--config.nothing=1"], ["no such field", "nothing"]),
    (["--config=configs/quickstart.py", "--config.seed=-1"], ["config.seed = -1"]),
    ([], ["--config"]),
  ],
)
def test_mistakes_in_training_are_told_in_a_message(tmp_path, flags, messages):
  assert_user_mistake(run("train.py", f"--workdir={tmp_path / 'run'}", *flags), *messages)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flags", "messages"),
  [
    (["--workdir=nowhere"], ["nowhere: not the workdir"]),
    (["--workdir=nowhere", "--input=x"], ["--input needs --output"]),
    (["--workdir=nowhere", "--probabilities"], ["--probabilities goes with --input"]),
    (["--workdir=nowhere", "--input=x", "--output=y", "--split=val"], ["--split"]),
    (["--workdir=nowhere", "--split=all"], ["test"]),
  ],
)
def test_mistakes_in_evaluation_are_told_in_a_message(flags, messages):
  assert_user_mistake(run("eval.py", *flags), *messages)


def test_from_raw_files_to_scores(tmp_path):
  data, runs = tmp_path / "data", tmp_path / "run"
  result = run(
    "-m", "selfreg_jax.data.prepare", "--dataset=phantom", f"--output={data}",
    "--phantom_train_cases=3", "--phantom_test_cases=1", "--workers=1",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  tiny = [
    "--config.data.image_size=32", "--config.data.batch_size=2", "--config.model.widths=(4,4,4)",
    "--config.train.steps=2", "--config.train.validate_every=1", "--config.train.log_every=1",
  ]  # fmt: skip
  result = run("train.py", "--config=configs/quickstart.py", f"--config.data.dir={data}", f"--workdir={runs}", *tiny)
  assert result.returncode == 0, result.stderr
  assert "validation Dice" in result.stdout
  assert result.stderr == ""
  result = run("eval.py", f"--workdir={runs}")
  assert result.returncode == 0, result.stderr
  assert "sound protocol" in result.stdout
  assert result.stderr == ""
  assert (runs / "eval/test/summary.json").exists()
  result = run("eval.py", f"--workdir={runs}", f"--input={data}/raw/imagesTs", f"--output={tmp_path / 'maps'}")
  assert result.returncode == 0, result.stderr
  assert [path.name for path in (tmp_path / "maps").iterdir()] == ["phantom_003.nii.gz"]
