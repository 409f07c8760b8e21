import json

import numpy as np
import pytest
from rich.console import Console

from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import compare, pooling, protocols, scoring
from selfreg_jax.evaluation.options import Options
from selfreg_jax.predictor import load_ensemble, load_trained
from tests.evaluation.made_datasets import write_image_dataset, write_run

NAMES = ("background", "a", "b")


def quiet():
  return Console(width=100, record=True, file=open("/dev/null", "w"))


def tables(dice):
  """Sound-protocol scores of cases with the given Dice, (cases, 2)."""
  zeros = dict.fromkeys((*protocols.METRICS["sound"], *protocols.FLAGS), 0.0)
  return {
    f"case{n}": {c: {**zeros, "dice": float(value)} for c, value in enumerate(row, 1)} for n, row in enumerate(dice)
  }


def test_the_spread_over_runs():
  def block(dice):
    cases = tables(dice)
    return protocols.summarize(cases, NAMES, protocol="sound", resamples=20)

  found = pooling.pool([block([[0.2, 0.4]]), block([[0.4, np.nan]]), block([[0.9, 0.6]])])
  assert found["classes"]["a"]["dice"] == {
    "mean": pytest.approx(0.5), "deviation": pytest.approx(np.sqrt(0.13)), "n": 3
  }  # fmt: skip
  assert found["classes"]["b"]["dice"] == {
    "mean": pytest.approx(0.5), "deviation": pytest.approx(np.sqrt(0.02)), "n": 2
  }  # fmt: skip
  assert pooling.pool([block([[0.2, 0.4]])])["mean"]["dice"]["deviation"] is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs, on the two folds of a dataset of images."""
  folder = tmp_path_factory.mktemp("folds")
  write_image_dataset(folder / "data", folds=(("tissue_0", "tissue_2"), ("tissue_1", "tissue_3")))
  for fold in (0, 1):
    write_run(folder / "data", folder / f"run_{fold}", seed=fold, fold=fold)
  return folder


def test_two_runs_are_compared_on_the_same_cases(runs):
  console = quiet()
  result = compare.compare_workdirs(runs / "run_0", runs / "run_1", scoring.Request(), console=console)
  output = runs / "run_0" / "eval" / "test"
  assert json.loads((output / "compare.json").read_text()) == result
  entry = result["protocols"]["sound"]["mean"]["dice"]
  summaries = [json.loads((runs / name / "eval/test/summary.json").read_text()) for name in ("run_0", "run_1")]
  ours, other = (summary["protocols"]["sound"]["mean"]["dice"] for summary in summaries)
  assert entry["difference"] == pytest.approx(ours - other)
  assert entry["n"] == 2
  assert "run_0" in console.export_text()
  with pytest.raises(UserError, match="other cases"):
    compare.compare_workdirs(runs / "run_0", runs / "run_1", scoring.Request(split="val"), console=quiet())


def test_folds_score_their_own_cases_and_are_pooled(runs):
  workdirs = pooling.find_workdirs(str(runs / "run_*"))
  assert [path.name for path in workdirs] == ["run_0", "run_1"]
  output = pooling.default_output(workdirs, "eval_pooled")
  assert output == runs / "eval_pooled_run"
  result = pooling.pool_workdirs(workdirs, scoring.Request(split="val"), output=output, console=quiet())
  assert json.loads((output / "pooled.json").read_text()) == result
  assert [run["cases"] for run in result["runs"]] == [2, 2]
  assert result["together"]["sound"]["cases"] == 4
  assert result["protocols"]["sound"]["mean"]["dice"]["n"] == 2
  seeds = pooling.pool_workdirs(workdirs, scoring.Request(), output=output, console=quiet())
  assert seeds["together"] is None  # both scored the same test cases


def test_an_ensemble_averages_probabilities(runs):
  workdirs = [runs / "run_0", runs / "run_1"]
  image = np.load(runs / "data/cases/tissue_4.image.npy", allow_pickle=False)[0]
  members = [scoring.Predictor(load_trained(workdir))(image, probabilities=True)[1] for workdir in workdirs]
  _, both = load_ensemble(workdirs)(image, probabilities=True)
  np.testing.assert_allclose(both, (members[0] + members[1]) / 2, atol=1e-6)
  request = scoring.Request(options=Options(tta=True))
  summary = pooling.score_ensemble(workdirs, request, output=runs / "ensemble", console=quiet())
  assert summary["ensemble"] == [str(workdir) for workdir in workdirs]
  assert summary["cases"] == 2
  with pytest.raises(UserError, match="different folds"):
    pooling.score_ensemble(workdirs, scoring.Request(split="val"), output=runs / "ensemble", console=quiet())


def test_networks_of_other_sizes_cannot_be_averaged(runs, monkeypatch):
  original = load_trained

  def other_size(workdir, **options):
    trained = original(workdir, **options)
    if workdir.name == "run_1":
      trained.config.data.image_size = 64
    return trained

  monkeypatch.setattr("selfreg_jax.predictor.load_trained", other_size)
  with pytest.raises(UserError, match=r"run_1: image_size is 64, in .*run_0 32"):
    load_ensemble([runs / "run_0", runs / "run_1"])


def test_a_pattern_without_runs_is_refused(tmp_path):
  (tmp_path / "x").mkdir()
  with pytest.raises(UserError, match="none the workdir of a training run"):
    pooling.find_workdirs(str(tmp_path / "*"))
