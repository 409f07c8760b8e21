"""A small ablation and how its runs are trained side by side, for the tests of this folder."""

import jax
from rich.console import Console

from selfreg_jax.analysis.ablation.design import ablation_config, expand
from selfreg_jax.analysis.ablation.group_training import train_group
from selfreg_jax.analysis.ablation.grouping import group_runs
from selfreg_jax.analysis.ablation.running import run_folder
from tests.conftest import make_small_config

SILENT = Console(quiet=True)
STEPS = 4


def make_design(prepared, rate=0.02, seeds=(0, 1), **train):
  """Two variants of a run of a few steps, which differ in three numbers."""
  run = make_small_config(prepared)
  run.optimizer.name, run.optimizer.learning_rate, run.optimizer.schedule = "sgd", 0.01, "constant"
  run.train.steps, run.train.validate_every, run.train.log_every = STEPS, 2, 1
  run.train.update(train)
  variants = {
    "none": {"loss.scr_weight": 0.0, "loss.ifd_weight": 0.0, "optimizer.learning_rate": rate},
    "both": {"loss.scr_weight": 0.3},
  }
  return expand(ablation_config(run, variants=variants, seeds=seeds, reference="none"))


def train(design, root, devices=None):
  """Trains all runs in one program; returns their folders by name."""
  (group,) = group_runs(design.runs)
  train_group(group, lambda run: run_folder(root, run), devices=devices or jax.devices()[:1], console=SILENT)
  return {run.name: run_folder(root, run) for run in design.runs}
