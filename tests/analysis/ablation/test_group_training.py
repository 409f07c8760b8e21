import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreg_jax import config as configs
from selfreg_jax.analysis.ablation import group_training, memory, records
from selfreg_jax.analysis.ablation.design import ablation_config, expand
from selfreg_jax.analysis.ablation.group_training import resumable_parts
from selfreg_jax.analysis.ablation.grouping import group_runs, with_numbers
from selfreg_jax.analysis.ablation.program import (
  GroupProgram,
  build_run,
  make_group_step,
  with_raw_key,
)
from selfreg_jax.analysis.ablation.running import Options, run_ablation, run_folder
from selfreg_jax.config import base_config
from selfreg_jax.data import augment
from selfreg_jax.data.manifest import Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.training import checkpoints, loop
from selfreg_jax.training.plan import make_plan
from selfreg_jax.training.signals import TrainingInterruptedError
from selfreg_jax.training.start import state_at_random
from tests.analysis.ablation.trained import SILENT, STEPS, make_design, train
from tests.conftest import make_small_config


def variables(folder, design, *, step=None):
  """What the newest checkpoint, or that of a step, holds."""
  found = checkpoints.find(folder)
  (chosen,) = [one for one in found if one.step == step] if step else found[-1:]
  plan = make_plan(design.runs[0].config, folder, jax.devices()[:1])
  model, optimizer, _ = build_run(plan, plan.config)
  state = chosen.read(jax.eval_shape(lambda: state_at_random(plan, model, optimizer, jax.random.key(0))))
  return state.params, state.batch_stats, state.opt_state, state.step


def assert_close(ours, theirs, tolerance):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_each_run_of_a_group_is_its_own_single_run(together, tmp_path):
  design, _, folders = together
  run = design.runs[3]  # with another seed and other numbers than the first
  loop.train_and_evaluate(run.config, tmp_path, devices=jax.devices()[:1])
  for step in (2, STEPS):
    assert_close(variables(folders[run.name], design, step=step), variables(tmp_path, design, step=step), 1e-5)


def test_runs_differ_where_their_numbers_or_seeds_do(together):
  design, _, folders = together
  kernels = [variables(folders[run.name], design)[0]["stem"]["conv1"]["kernel"] for run in design.runs]
  for i, one in enumerate(kernels):
    for other in kernels[i + 1 :]:
      assert np.abs(one - other).max() > 1e-4


def test_a_run_of_a_group_leaves_an_ordinary_workdir(together):
  design, _, folders = together
  for run in design.runs:
    folder = folders[run.name]
    assert [one.step for one in checkpoints.find(folder)][-2:] == [2, STEPS]
    assert {"config.json", "curves.png", "metrics.jsonl", "panels", "tensorboard", "train.log"} <= {
      path.name for path in folder.iterdir()
    }
    record = records.read(folder, run.config)
    assert (record.steps, record.finished, record.diverged) == (STEPS, True, "")
    # train.py finds it finished, and changes nothing.
    state = loop.train_and_evaluate(run.config, folder, devices=jax.devices()[:1])
    assert int(state.step) == STEPS


def test_devices_train_their_runs_without_communication(together, tmp_path, monkeypatch):
  whole, _, folders = together
  design, programs = dataclasses.replace(whole, runs=whole.runs[1:]), []

  def keep(*arguments):
    programs.append(GroupProgram(*arguments))
    return programs[-1]

  monkeypatch.setattr(group_training, "GroupProgram", keep)
  on_devices = train(design, tmp_path, jax.devices()[:2])
  (program,) = programs
  assert (len(program.layout.devices), program.layout.per_device, program.layout.places) == (2, 2, 4)
  text = program.compiled.as_text()
  for operation in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert operation not in text
  for run in design.runs:
    assert_close(variables(on_devices[run.name], design), variables(folders[run.name], design), 1e-5)


def test_spare_places_are_filled_and_each_run_is_found_again():
  from selfreg_jax.analysis.ablation.program import Layout

  layout = Layout.over(5, jax.devices()[:4])
  assert (len(layout.devices), layout.per_device, layout.places) == (3, 2, 6)
  stacked = layout.stack([{"x": np.full((2,), i, np.float32)} for i in range(5)])
  for i in range(5):
    taken = layout.take(stacked, i)["x"]
    np.testing.assert_array_equal(taken, [i, i])
    assert taken.devices() == {jax.devices()[0]}


def test_a_stopped_group_goes_on_from_the_newest_step_that_all_have(together, prepared, tmp_path, monkeypatch):
  design, _, expected = together
  real = group_training.record_training

  def stopping(logger, steps, pace, state, step, schedule, explain):
    real(logger, steps, pace, state, step, schedule, explain)
    if step == 2 and logger.workdir == run_folder(tmp_path, design.runs[0]):
      os.kill(os.getpid(), signal.SIGTERM)  # before the validation at this step, which then is not made

  monkeypatch.setattr(group_training, "record_training", stopping)
  with pytest.raises(TrainingInterruptedError, match="the same command continues"):
    train(design, tmp_path)
  monkeypatch.undo()
  folders = {run.name: run_folder(tmp_path, run) for run in design.runs}
  stopped_at = {name: [one.step for one in checkpoints.find(folder)][-1] for name, folder in folders.items()}
  assert set(stopped_at.values()) == {2}
  assert not records.read(folders["both/seed_0"], design.runs[1].config).is_settled
  # One run is continued by train.py, and so ahead of the others: its last steps are made again.
  loop.train_and_evaluate(design.runs[1].config, folders["both/seed_0"], devices=jax.devices()[:1])
  train(design, tmp_path)
  for run in design.runs:
    ours, theirs = variables(folders[run.name], design), variables(expected[run.name], design)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    lines = [line.split('"step": ')[1].split(",")[0] for line in (folders[run.name] / "metrics.jsonl").open()]
    assert lines == [line.split('"step": ')[1].split(",")[0] for line in (expected[run.name] / "metrics.jsonl").open()]


def test_the_runs_of_another_ablation_or_dataset_are_refused_and_stay_as_they_are(
  together, prepared, tmp_path, monkeypatch
):
  design, root, _ = together
  shutil.copytree(root / "runs", tmp_path / "runs")
  folders = [run_folder(tmp_path, run) for run in design.runs]
  checkpoints.forget_after(folders[0], 2)  # as if it were behind the others
  other = make_design(prepared, rate=0.03)
  with pytest.raises(UserError, match=r"(?s)none/seed_0: .*learning_rate: 0.02 -> 0.03.*remove .*none/seed_0"):
    run_ablation(other, tmp_path, Options("vmap"), console=SILENT)
  fewer = dataclasses.replace(design, variants={"both": {}}, reference="both", runs=design.runs[1::2])
  with pytest.raises(UserError, match=r"holds runs of another ablation, of the variants none; give another --workdir"):
    run_ablation(fewer, tmp_path, Options("vmap"), console=SILENT)
  monkeypatch.setattr(Manifest, "fingerprint", lambda self: "00000000")
  with pytest.raises(UserError, match=r"(?s)none/seed_0: .*the dataset in .* is not the one trained on"):
    run_ablation(design, tmp_path, Options("vmap"), console=SILENT)
  assert [checkpoints.find(folder)[-1].step for folder in folders] == [2, STEPS, STEPS, STEPS]


def test_runs_end_one_by_one_and_the_others_go_on(prepared, tmp_path, monkeypatch):
  design = make_design(prepared, rate=1e38, steps=12, patience=1, analyze_every=6)  # an epoch is five steps
  analysed = []

  class Recorder:
    def __init__(self, *arguments):
      pass

    def run(self, logger, state, step):
      analysed.append((logger.workdir.parent.name, logger.workdir.name, step))

  def scores(self, logger, state, step, stop):
    return 0.5 if logger.workdir.name == "seed_0" else step / 100  # stale from the second validation on

  monkeypatch.setattr(group_training.Validation, "run", scores)
  monkeypatch.setattr(group_training, "Monitor", Recorder)
  folders = train(design, tmp_path)
  assert analysed == [("both", "seed_0", 6), ("both", "seed_1", 6), ("both", "seed_1", 12)]
  outcome = {run.name: records.read(folders[run.name], run.config) for run in design.runs}
  for seed in (0, 1):
    assert "not finite at step 1" in outcome[f"none/seed_{seed}"].diverged
    assert not outcome[f"none/seed_{seed}"].finished
  assert (outcome["both/seed_0"].finished, outcome["both/seed_0"].steps) == (True, 8)
  assert (outcome["both/seed_1"].finished, outcome["both/seed_1"].steps) == (True, 12)
  assert checkpoints.find(folders["both/seed_0"])[-1].step == 8
  assert "stopped  early" in (folders["both/seed_0"] / "train.log").read_text()


def test_the_step_of_swin_unets_takes_traced_drop_path_rates(prepared, tmp_path):
  run = base_config("swin_unet")
  small = make_small_config(prepared)
  run.data, run.train, run.optimizer, run.eval = small.data, small.train, small.optimizer, small.eval
  run.model.update({"embed_dim": 12, "depths": (1, 1), "heads": (2, 4), "window": 4})
  variants = {"little": {"model.drop_path": 0.1}, "much": {"model.drop_path": 0.6}}
  (group,) = group_runs(expand(ablation_config(run, variants=variants, seeds=(0,), reference="little")).runs)
  plan = make_plan(group.runs[0].config, tmp_path, jax.devices()[:1])
  batch = plan.stream()[0] | {"tables": augment.ResizeTables.build(plan.dataset.shapes, 32)}
  model, optimizer, _ = build_run(plan, plan.config)

  def step(numbers):
    state = with_raw_key(state_at_random(plan, model, optimizer, jax.random.key(0)))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    return make_group_step(plan)(numbers, stacked, batch)

  # Traced only: what the rates do is tested beside the network.
  _, metrics = jax.eval_shape(step, {name: np.float32(values) for name, values in group.numbers.items()})
  assert set(group.numbers) == {"model.drop_path"}
  assert metrics.values.shape[0] == 2


def test_the_largest_number_that_fits_is_found_with_few_compilations():
  asked = []

  def need(number):
    asked.append(number)
    return 100 + 50 * number

  assert memory.largest_fitting(8, 500, need) == 8
  assert memory.largest_fitting(8, 499, need) == 7
  assert memory.largest_fitting(8, 299, need) == 3
  assert memory.largest_fitting(8, 149, need) == 0
  assert len(asked) < 12


def test_a_group_that_does_not_fit_is_trained_in_turns_or_refused(together, monkeypatch):
  design, _, folders = together

  class Made:
    def __init__(self, group, plan, devices, batch):
      self.group, self.compiled = group, len(group.runs)
      # What the program computes with is what the run says, also where a turn's runs agree and the group does not.
      for place, run in enumerate(group.runs):
        used = with_numbers(plan.config, {name: values[place] for name, values in group.numbers.items()})
        fields = configs.flatten(configs.with_absolute_paths(run.config)) | {"seed": used.seed}
        assert configs.flatten(used) == fields
      self.layout = dataclasses.make_dataclass("Layout", ["devices"])(devices)

  monkeypatch.setattr(group_training, "GroupProgram", Made)
  monkeypatch.setattr(memory, "needed_bytes", lambda compiled: 2**20 * compiled)
  plan = make_plan(design.runs[0].config, folders["both/seed_0"], jax.devices()[:1])

  def sizes(limit, devices=1):
    made = group_training._fitting_programs(design.runs, plan, jax.devices()[:devices], limit, SILENT)
    return [len(program.group.runs) for program in made]

  assert sizes(5 * 2**20) == [4]
  assert sizes(3 * 2**20) == [3, 1]
  assert sizes(2**20) == [1, 1, 1, 1]
  with pytest.raises(UserError, match=r"takes 1 MiB, and --memory_gib allows 0 MiB: the largest number that fits is 0"):
    sizes(2**19)


def test_runs_without_a_step_in_common_are_trained_apart(together, monkeypatch):
  design, _, _ = together
  steps = dict(zip([run.name for run in design.runs], [{2, 4}, {4, 6}, set(), {4}], strict=True))
  monkeypatch.setattr(group_training, "_steps", lambda name: steps[name])
  parts = resumable_parts(design.runs, lambda run: run.name)
  assert [[run.name for run in part] for part in parts] == [
    ["none/seed_0", "both/seed_0", "both/seed_1"],
    ["none/seed_1"],
  ]
  steps["none/seed_0"], steps["both/seed_0"] = {2, 4, 6, 8}, {4, 8}
  # In common all have step 4: the first would lose more than its newest checkpoint.
  parts = resumable_parts(design.runs, lambda run: run.name)
  assert [[run.name for run in part] for part in parts] == [
    ["none/seed_0", "both/seed_0"],
    ["both/seed_1"],
    ["none/seed_1"],
  ]
  steps["none/seed_0"] = {2}
  assert [len(part) for part in resumable_parts(design.runs, lambda run: run.name)] == [1, 1, 1, 1]


def test_the_memory_of_a_program_and_of_the_machine_are_known():
  compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), np.float32)).compile()
  assert memory.needed_bytes(compiled) >= 2 * 64 * 64 * 4
  whole, half = (memory.available_bytes(jax.devices()[:count]) for count in (1, 2))
  assert whole > 2**20
  assert half < 0.7 * whole
