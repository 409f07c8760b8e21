import csv
import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from scipy import stats

from selfreg_jax.analysis.ablation import figures, records, results, running
from selfreg_jax.analysis.ablation.design import ablation_config, expand
from selfreg_jax.analysis.ablation.results import Outcome, spread, summarize
from selfreg_jax.analysis.ablation.running import Options, run_ablation
from selfreg_jax.config import base_config
from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.training.loop import TrainingDivergedError
from selfreg_jax.training.signals import TrainingInterruptedError
from tests.analysis.ablation.trained import SILENT, make_design
from tests.conftest import make_prepared, make_small_config


def made_up(variants, seeds, reference, dice_of):
  """A design whose runs were scored as `dice_of` (variant, seed) says; None: not finished, a text: diverged."""
  run = base_config()
  run.data.dir = "somewhere"
  design = expand(ablation_config(run, variants=variants, seeds=seeds, reference=reference))
  outcomes = []
  for one in design.runs:
    dice = dice_of(one.variant, one.seed)
    record = records.Record("", steps=10, seconds=2.5, finished=isinstance(dice, float))
    summary = None
    if isinstance(dice, str):
      record = records.Record("", diverged=dice)
    elif dice is not None:
      metrics = {"jaccard": dice / 2, "hd95": 3.0, "assd": None}
      blocks = {
        "mean": {"dice": dice, **metrics},
        "classes": {"organ": {"dice": dice + 0.1, **metrics}, "other": {"dice": dice - 0.1, **metrics}},
      }
      summary = {"protocols": {"sound": blocks, "paper": blocks}, "unit": "mm"}
      summary["checkpoint"] = {"step": 7, "val_dice": 0.5}
    lines = [{"step": step, "val/dice": 0.1 * step, "train/ce": 1 / step, "train/dice": 0.2} for step in (1, 2, 3)]
    outcomes.append(Outcome(one, record, summary, lines))
  return design, outcomes


TERMS = {"none": {"loss.scr_weight": 0.0}, "both": {}, "ifd": {"loss.scr_weight": 0.1}}


def test_spread_is_the_t_interval_of_scipy():
  values = [0.81, 0.84, 0.79, 0.9]
  made = spread(values)
  expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
  np.testing.assert_allclose([made["mean"], made["deviation"]], [np.mean(values), np.std(values, ddof=1)])
  np.testing.assert_allclose(made["interval"], expected)
  assert spread([0.5]) == {"mean": 0.5, "deviation": None, "interval": None, "n": 1}
  assert spread([])["mean"] is None


def test_differences_are_paired_by_seed():
  dice = {("none", 0): 0.5, ("none", 1): 0.7, ("none", 2): 0.6, ("both", 0): 0.52, ("both", 1): 0.73, ("both", 2): None}
  dice |= {("ifd", 0): "not finite", ("ifd", 1): 0.1, ("ifd", 2): 0.2}
  design, outcomes = made_up(TERMS, (0, 1, 2), "none", lambda *run: dice[run])
  summary = summarize(design, outcomes)
  both = summary["variants"]["both"]
  difference = both["difference"]["sound"]["mean"]["dice"]
  np.testing.assert_allclose(difference["mean"], np.mean([0.02, 0.03]))
  np.testing.assert_allclose(difference["deviation"], np.std([0.02, 0.03], ddof=1))
  assert both["seeds"] == [0, 1]
  assert both["protocols"]["sound"]["classes"]["organ"]["dice"]["mean"] == pytest.approx(np.mean([0.62, 0.83]))
  assert both["protocols"]["sound"]["mean"]["assd"]["mean"] is None
  assert summary["variants"]["none"]["difference"] is None
  assert summary["unfinished"] == ["both/seed_2"]
  assert summary["diverged"] == ["ifd/seed_0"]
  text = results.table_text(summary)
  assert "| both | 2 | 62.50 ± 14.85" in text
  assert "+2.50 ± 0.71" in text
  assert "Not finished: both/seed_2." in text
  assert "no longer finite: ifd/seed_0." in text


def test_tables_and_pictures_are_written(tmp_path):
  design, outcomes = made_up(TERMS, (0, 1), "none", lambda variant, seed: len(variant) / 10 + seed / 100)
  summary = results.write(design, outcomes, tmp_path)
  figures.write(design, outcomes, summary, tmp_path)
  with (tmp_path / "results.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(row["variant"], row["seed"], row["state"], row["best_step"]) for row in rows] == [
    (run.variant, str(run.seed), "scored", "7") for run in design.runs
  ]
  assert float(rows[0]["sound/dice/mean"]) == 0.4
  assert float(rows[0]["paper/dice/organ"]) == pytest.approx(0.5)
  assert rows[0]["sound/assd/mean"] == ""
  assert json.loads((tmp_path / "summary.json").read_text())["variants"].keys() == TERMS.keys()
  names = {"results.csv", "summary.json", "table.md", "ablation.png", "ablation.pdf", "curves.png"}
  assert {path.name for path in tmp_path.iterdir()} == names


def test_curves_show_the_loss_that_all_variants_have_and_its_mean_over_seeds():
  _, outcomes = made_up(TERMS, (0, 1), "none", lambda variant, seed: 0.5)
  training, validation = figures.draw_curves(outcomes).axes
  weights = outcomes[0].run.config.loss
  expected = weights.ce_weight / np.array([1, 2, 3]) + weights.dice_weight * 0.2
  assert len(training.get_lines()) == 3 * (2 + 1)
  for line in training.get_lines():
    np.testing.assert_allclose(line.get_ydata(), expected)
  np.testing.assert_allclose(validation.get_lines()[0].get_ydata(), [0.1, 0.2, 0.3])


def test_sweeps_over_the_weights_are_drawn_over_lambda():
  sweep = {f"{term}_{w}": {f"loss.{term}_weight": w} for term in ("scr", "ifd") for w in (0.001, 0.1)}
  design, outcomes = made_up({"center": {}, **sweep}, (0, 1), "center", lambda variant, seed: 0.5 + seed / 10)
  sweeps = figures.lambda_sweeps(design)
  assert sweeps == {
    "loss.scr_weight": {"scr_0.001": 0.001, "center": 0.015, "scr_0.1": 0.1},
    "loss.ifd_weight": {"ifd_0.001": 0.001, "center": 0.015, "ifd_0.1": 0.1},
  }
  figure = figures.draw_lambdas(sweeps, summarize(design, outcomes))
  assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
  line = figure.axes[0].get_lines()[0]
  np.testing.assert_allclose(np.float64(line.get_xdata()), [0.001, 0.015, 0.1], rtol=0.04)  # beside each other
  np.testing.assert_allclose(np.float64(line.get_ydata()), [55, 55, 55])
  terms, _ = made_up(TERMS, (0,), "none", lambda variant, seed: 0.5)
  assert figures.lambda_sweeps(terms) == {}


def test_an_ablation_is_shared_by_processes_and_the_last_one_writes_the_whole_table(together, tmp_path, monkeypatch):
  one_device = jax.devices()[:1]
  monkeypatch.setattr(jax, "local_devices", lambda: one_device)
  whole, root, _ = together
  design = dataclasses.replace(whole, seeds=(0,), runs=whole.runs[:2])
  shutil.copytree(root / "runs", tmp_path / "runs")
  shutil.rmtree(tmp_path / "runs/none/seed_1")
  first = run_ablation(design, tmp_path, Options("auto", (1, 2)), console=SILENT)
  assert first["unfinished"] == ["none/seed_0"]
  second = run_ablation(design, tmp_path, Options("vmap", (0, 2)), console=SILENT)
  assert second["unfinished"] == []
  assert second["variants"]["both"]["difference"]["sound"]["mean"]["dice"]["n"] == 1
  own = json.loads((tmp_path / "runs/both/seed_0/eval/test/summary.json").read_text())
  ours = second["variants"]["both"]["protocols"]["sound"]["mean"]["dice"]["mean"]
  assert ours == own["protocols"]["sound"]["mean"]["dice"]
  assert (tmp_path / "ablation.pdf").stat().st_size > 1000

  # What is there, but was scored otherwise, does not count.
  path = tmp_path / "runs/both/seed_0/eval/test/summary.json"
  path.write_text(json.dumps(own | {"options": {"tta": "all"}}))
  assert running.write_results(design, tmp_path)["unfinished"] == ["both/seed_0"]
  path.write_text("{")
  assert running.write_results(design, tmp_path)["unfinished"] == ["both/seed_0"]

  config = design.runs[0].config
  diverged = records.Record(records.fingerprint(config), diverged="not finite", on_nonfinite=records.remedy(config))
  records.write(running.run_folder(tmp_path, design.runs[0]), diverged)
  with pytest.raises(FaultError, match="no longer finite: none/seed_0"):
    run_ablation(design, tmp_path, Options("sequential"), console=SILENT)


def test_what_became_of_a_run_of_its_own_is_recorded(prepared, tmp_path, monkeypatch):
  run = make_design(prepared).runs[0]
  folder = tmp_path / "run"
  folder.mkdir()

  def recorded(outcome):
    def train_and_evaluate(config, workdir):
      assert (config, workdir) == (run.config, folder)
      if isinstance(outcome, Exception):
        raise outcome
      return types.SimpleNamespace(step=outcome)

    monkeypatch.setattr(running, "train_and_evaluate", train_and_evaluate)
    try:
      running.train_alone(run, folder, SILENT)
    except TrainingInterruptedError:
      assert isinstance(outcome, TrainingInterruptedError)
    return records.read(folder, run.config)

  stopped = recorded(TrainingInterruptedError("stopped"))
  assert not stopped.is_settled
  finished = recorded(4)
  assert (finished.steps, finished.finished) == (4, True)
  assert finished.seconds > stopped.seconds > 0
  other = run.config.copy_and_resolve_references()
  other.loss.scr_weight = 0.7
  assert not records.read(folder, other).is_settled  # of another config
  diverged = recorded(TrainingDivergedError("not finite at step 3", 3))
  assert (diverged.steps, diverged.diverged) == (3, "not finite at step 3")
  other = run.config.copy_and_resolve_references()
  other.train.on_nonfinite = "skip"  # as the message says
  assert not records.read(folder, other).is_settled


def test_an_ablation_without_cases_to_score_is_refused_first(tmp_path):
  data = make_prepared(tmp_path, val="4", test="")
  run = make_small_config(data)
  emptied = expand(ablation_config(run, variants={"a": {}, "b": {"loss.ifd_p": 1.0}}, seeds=(0,), reference="a"))
  with pytest.raises(UserError, match="the test split, which the ablation scores, is empty"):
    run_ablation(emptied, tmp_path / "new", Options("vmap"), console=SILENT)
  assert not (tmp_path / "new").exists()
