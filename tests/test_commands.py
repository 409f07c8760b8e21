"""The scripts as users call them: exit codes, messages, no tracebacks."""

import os
import pathlib
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.models.weight_files import write_weights
from tests.conftest import unet_state_dict

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
    ([], ["--workdir=DIR", "--workdirs"]),
    (["--workdir=a", "--workdirs=b*"], ["one of the two"]),
    (["--workdir=a", "--ensemble"], ["--ensemble goes with --workdirs"]),
    (["--workdir=a", "--workers=0"], ["--workers=0: at least 1"]),
    (["--workdir=a", "--compare=b", "--output=c"], ["--compare", "--output"]),
    (["--workdirs=a*", "--compare=b"], ["--compare", "--workdirs"]),
    (["--workdirs=a*", "--input=x", "--output=y"], ["needs --ensemble"]),
    (["--workdirs=nowhere_*"], ["--workdirs=nowhere_*: matches no folder"]),
    (["--workdir=nowhere", "--resize=nearest"], ["labels"]),
  ],
)
def test_mistakes_in_evaluation_are_told_in_a_message(flags, messages):
  assert_user_mistake(run("eval.py", *flags), *messages)


@pytest.mark.parametrize(
  ("flags", "messages"),
  [
    (["--workdir=nowhere"], ["--workdir=RUN", "--output=DIR"]),
    (["--workdir=nowhere", "--output=x"], ["nowhere: not the workdir"]),
  ],
)
def test_mistakes_in_analysis_are_told_in_a_message(flags, messages):
  assert_user_mistake(run("-m", "selfreg_jax.analysis", *flags), *messages)


@pytest.mark.parametrize(
  ("flags", "messages"),
  [
    (["--config=configs/ablation_terms.py:nothing"], ["ablation_terms.py:nothing", "glas_unet"]),
    (["--config=configs/ablation_terms.py", "--config.run.data.dir=nowhere"], ["variant 'none'", "nowhere", "prepare"]),
    (["--config=configs/ablation_terms.py", "--num_processes=2"], ["--process_id go together"]),
  ],
)
def test_mistakes_in_an_ablation_are_told_in_a_message(tmp_path, flags, messages):
  arguments = ["-m", "selfreg_jax.analysis.ablation", f"--workdir={tmp_path / 'ablation'}", *flags]
  assert_user_mistake(run(*arguments), *messages)
  assert not (tmp_path / "ablation").exists()


def test_weights_of_the_authors_predict_as_their_code_does(golden, tmp_path):
  """PyTorch file -> workdir -> NIfTI in, NIfTI out, through the commands."""
  arrays = golden("volume_protocol")
  weights = unet_state_dict(4) | {name: arrays[name] for name in ("outc.conv.weight", "outc.conv.bias")}
  write_weights(weights, tmp_path / "weights.safetensors")
  (tmp_path / "scans").mkdir()
  volume = np.moveaxis(arrays["volume"], 0, -1)
  nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "scans" / "case.nii.gz")
  result = run(
    "-m", "selfreg_jax.models.pretrained", "--config=configs/acdc_unet.py", "--config.data.image_size=64",
    tmp_path / "weights.safetensors", tmp_path / "run",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert "all of them" in result.stdout
  assert result.stderr == ""
  result = run("eval.py", f"--workdir={tmp_path / 'run'}", f"--input={tmp_path}/scans", f"--output={tmp_path}/maps")
  assert result.returncode == 0, result.stderr
  prediction = np.asarray(nib.load(tmp_path / "maps" / "case.nii.gz").dataobj)
  # A few pixels have logits that tie to within float32's rounding.
  assert np.sum(np.moveaxis(prediction, -1, 0) != arrays["prediction"]) <= 4

  result = run("-m", "selfreg_jax.models.pretrained", f"--export={tmp_path}/back.npz", tmp_path / "run")
  assert result.returncode == 0, result.stderr
  with np.load(tmp_path / "back.npz", allow_pickle=False) as back:
    assert all(np.array_equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
  ("arguments", "messages"),
  [
    (["--config=configs/acdc_unet.py", "weights.pth"], ["INPUT", "WORKDIR"]),
    (["--config=configs/acdc_unet.py", "nowhere.pth", "run"], ["nowhere.pth: no such file"]),
    (["README.md", "run"], ["--config names"]),
    (["--config=configs/acdc_unet.py", "README.md", "run"], ["README.md: unknown ending '.md'"]),
    (["--config=configs/quickstart.py:swan", "README.md", "run"], [":swan", ":swin"]),
    (["--export=weights.pth", "run"], ["weights.pth", ".safetensors"]),
    (["--export=weights.npz", "nowhere"], ["nowhere: not the workdir"]),
    (["--export=weights.npz", "a", "b"], ["one argument"]),
    (["a", "b", "c"], ["unexpected argument 'c'"]),
  ],
)
def test_mistakes_in_conversion_are_told_in_a_message(arguments, messages):
  assert_user_mistake(run("-m", "selfreg_jax.models.pretrained", *arguments), *messages)


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
