import dataclasses
import json
import math
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import selfreg_jax as sr
from selfreg_jax import workdir as workdirs
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data import pipeline
from selfreg_jax.errors import UserError
from selfreg_jax.training import checkpoints, loop
from selfreg_jax.training.plan import make_plan
from selfreg_jax.training.signals import TrainingInterruptedError
from tests.conftest import make_small_config


def train(config, workdir, **options):
  return loop.train_and_evaluate(config, workdir, devices=jax.devices()[:1], **options)


def steps_saved(workdir):
  """Steps of the checkpoints; nothing else may lie beside them."""
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return sorted(map(int, names))


def trees_equal(ours, theirs):
  return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), ours, theirs))


def variables_of(state):
  return jax.tree.map(np.asarray, (state.params, state.batch_stats, state.opt_state, state.step))


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
  """An uninterrupted run of the small config, shared by the tests that only look at it."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  config = make_small_config(prepared)
  return config, workdir, variables_of(train(config, workdir))


def metric_lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(whole_run, tmp_path, monkeypatch):
  config, workdir, expected = whole_run

  class Killed(BaseException):
    pass

  def killing(self, step):
    if step == 5:
      raise Killed

  # Dies in step 5, after the checkpoint of step 3 and a record of step 4.
  with monkeypatch.context() as patch:
    patch.setattr(loop.RunLogger, "advance", killing)
    with pytest.raises(Killed):
      train(config, tmp_path)
  assert steps_saved(tmp_path) == [3]
  state = train(config, tmp_path)
  assert trees_equal(variables_of(state), expected)
  for ours, theirs in zip(metric_lines(tmp_path), metric_lines(workdir), strict=True):
    pace = {"train/slices_per_second", "train/waiting_for_data"}
    assert {k: v for k, v in ours.items() if k not in pace} == {k: v for k, v in theirs.items() if k not in pace}
  assert "resumed  from the checkpoint of step 3" in (tmp_path / "train.log").read_text()


def test_a_finished_run_stays_as_it_is(whole_run):
  config, workdir, expected = whole_run
  assert trees_equal(variables_of(train(config, workdir)), expected)


def test_a_run_leaves_what_people_want_to_see(whole_run):
  _, workdir, _ = whole_run
  lines = metric_lines(workdir)
  assert [line["step"] for line in lines if "train/total" in line] == [2, 3, 4, 6]
  assert [line["step"] for line in lines if "val/dice" in line] == [3, 6]
  terms = {"ce", "dice", "scr", "ifd", "total", "grad_norm", "learning_rate", "slices_per_second", "scr/decoder_1"}
  assert {f"train/{term}" for term in terms} <= set(lines[0])
  assert {"val/dice/disc", "val/dice/square"} <= set(lines[-1])
  assert sorted(path.name for path in (workdir / "panels").iterdir()) == ["step_0000003.png", "step_0000006.png"]
  assert (workdir / "curves.png").stat().st_size > 10_000
  log = (workdir / "train.log").read_text()
  assert "stem/conv1/kernel" in log
  assert "validation Dice" in log
  events = [event for path in (workdir / "tensorboard").iterdir() for event in read_events(path)]
  tags = {value.tag for event in events for value in event.summary.value}
  assert {"train/total", "val/dice", "validation"} <= tags


def read_events(path):
  """Events of a TensorBoard file: length (8 bytes), its CRC (4), the event, its CRC (4)."""
  content, place = path.read_bytes(), 0
  while place < len(content):
    length = int.from_bytes(content[place : place + 8], "little")
    yield Event.FromString(content[place + 12 : place + 12 + length])
    place += length + 16


def test_latest_and_best_checkpoints_are_kept(small_config, tmp_path, monkeypatch):
  small_config.train.validate_every = 1
  scores = iter([0.3, 0.9, 0.5, 0.4, 0.6, 0.2])
  monkeypatch.setattr(loop.Validation, "run", lambda *arguments, **options: next(scores))
  train(small_config, tmp_path)
  assert steps_saved(tmp_path) == [2, 5, 6]
  best = checkpoints.best_of(checkpoints.find(tmp_path))
  assert (best.step, best.val_dice) == (2, 0.9)


def test_a_changed_config_is_refused_on_resume(whole_run):
  config, workdir, _ = whole_run
  changed = config.copy_and_resolve_references()
  changed.loss.scr_weight = 0.5
  changed.data.threads = 0  # harmless
  with pytest.raises(UserError) as error:
    train(changed, workdir)
  assert "config.loss.scr_weight: 0.015 -> 0.5" in str(error.value)
  assert "threads" not in str(error.value)
  assert "--override" in str(error.value)


def test_changed_data_are_refused_on_resume(whole_run, monkeypatch):
  config, workdir, _ = whole_run
  monkeypatch.setattr(manifests.Manifest, "fingerprint", lambda self: "00000000")
  with pytest.raises(UserError, match="not the one trained on"):
    train(config, workdir)


def test_override_continues_with_the_new_settings(small_config, tmp_path):
  small_config.train.steps = 3
  train(small_config, tmp_path)
  small_config.train.steps = 6
  with pytest.raises(UserError, match=re.escape("config.train.steps: 3 -> 6")):
    train(small_config, tmp_path)
  state = train(small_config, tmp_path, override=True)
  assert int(state.step) == 6


def test_each_checkpoint_is_used_with_its_own_settings(small_config, tmp_path, monkeypatch):
  scores = iter([0.9, 0.1])
  monkeypatch.setattr(loop.Validation, "run", lambda *arguments, **options: next(scores))
  small_config.train.steps = 3
  train(small_config, tmp_path)
  small_config.train.steps, small_config.data.image_size = 6, 48
  train(small_config, tmp_path, override=True)
  best, latest = sr.load(tmp_path), sr.load(tmp_path, checkpoint="latest")
  assert (best.step, best.slices.image_size) == (3, 32)
  assert (latest.step, latest.slices.image_size) == (6, 48)


def test_an_override_that_cannot_work_leaves_the_workdir_as_it_was(whole_run):
  config, workdir, _ = whole_run
  changed = config.copy_and_resolve_references()
  changed.model.widths = (8, 8, 8)
  before = (workdir / "config.json").read_text()
  with pytest.raises(UserError, match=r"config.model.widths: \[4, 6, 8\] -> \[8, 8, 8\]"):
    train(changed, workdir, override=True)
  assert (workdir / "config.json").read_text() == before
  assert sr.load(workdir).step in (3, 6)


def test_other_classes_are_refused_even_with_override(whole_run, monkeypatch):
  config, workdir, _ = whole_run
  manifest = manifests.load(config.data.dir)
  object.__setattr__(manifest, "classes", ("background", "square", "disc"))
  monkeypatch.setattr(manifests, "load", lambda directory, verify: manifest)
  with pytest.raises(UserError, match="'square', 'disc'"):
    train(config, workdir, override=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_continues_exactly(whole_run, tmp_path, monkeypatch, number):
  config, _, expected = whole_run
  advance = loop.RunLogger.advance

  def interrupting(self, step):
    advance(self, step)
    if step == 5:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(loop.RunLogger, "advance", interrupting)
    with pytest.raises(TrainingInterruptedError, match="step 5"):
      train(config, tmp_path)
  assert steps_saved(tmp_path)[-1] == 5
  assert trees_equal(variables_of(train(config, tmp_path)), expected)


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_cases(small_config, tmp_path):
  small_config.optimizer.name = "sgd"
  small_config.optimizer.learning_rate = 1e30
  with pytest.raises(loop.TrainingDivergedError) as error:
    train(small_config, tmp_path)
  message = str(error.value)
  assert re.search(r"not finite at step [123]: .*total", message)
  assert re.search(r"cases of the batch: \d slice \d", message)
  assert steps_saved(tmp_path) in ([], [3])


def test_processes_must_agree_on_all_but_how_each_reads_its_data(small_config, tmp_path):
  facts = make_plan(small_config, tmp_path, jax.devices()[:1]).facts()
  for name in ("seed", "train.on_nonfinite", "train.most_skips", "train.checkpoint_every", "train.log_every"):
    assert f"config.{name}" in facts
  assert not {"config.data.dir", "config.data.threads"} & set(facts)


def test_a_workdir_serves_one_run_at_a_time(small_config, tmp_path):
  with workdirs.hold(tmp_path), pytest.raises(UserError, match="another run is using"):
    train(small_config, tmp_path)


def test_a_batch_that_the_devices_do_not_divide_is_refused(small_config, tmp_path):
  small_config.data.batch_size = 12
  with pytest.raises(UserError, match="8 devices; use 8 or 16"):
    loop.train_and_evaluate(small_config, tmp_path)


def test_training_without_validation_cases_keeps_the_latest(prepared, small_config, tmp_path, monkeypatch):
  manifest = manifests.load(prepared)
  manifest.splits["val"] = ()
  monkeypatch.setattr(manifests, "load", lambda directory, verify=False: manifest)
  train(small_config, tmp_path)
  assert "the validation split is empty" in (tmp_path / "train.log").read_text()
  assert checkpoints.best_of(checkpoints.find(tmp_path)).step == 6


def test_eight_devices_train_like_one(small_config, tmp_path):
  small_config.data.batch_size = 8
  # Adam's first steps have the sign of a gradient, which rounding decides where it is near zero.
  small_config.optimizer.name = "sgd"
  small_config.train.steps = 3
  one = train(small_config, tmp_path / "one")
  eight = loop.train_and_evaluate(small_config, tmp_path / "eight")
  for ours, theirs in zip(jax.tree.leaves(eight.params), jax.tree.leaves(one.params), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
  losses = [
    [line["train/total"] for line in metric_lines(tmp_path / name) if "train/total" in line]
    for name in ("one", "eight")
  ]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def damage_arrays(workdir, step):
  """Flips a bit in every file that may hold arrays: some are left over from merging, and nothing is read from them."""
  for path in (workdir / "checkpoints" / str(step)).rglob("d/*"):
    flip(path)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(whole_run, tmp_path):
  config, workdir, expected = whole_run
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  damage_arrays(copy, 6)
  state = train(config, copy)
  assert trees_equal(variables_of(state), expected)
  log = (copy / "train.log").read_text()
  assert re.search(r"checkpoints/6/\w+: .*damaged", log)
  assert "going on from step 3" in log
  assert (copy / "damaged_checkpoints" / "6" / "config").exists()
  assert steps_saved(copy) == [3, 6]


def test_a_checkpoint_that_was_being_replaced_is_put_back(whole_run, tmp_path):
  config, workdir, expected = whole_run
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  superseded = copy / "checkpoints" / "superseded"
  shutil.copytree(copy / "checkpoints" / "3", superseded / "2")  # made room for newer ones
  (copy / "checkpoints" / "6").rename(superseded / "6")
  assert trees_equal(variables_of(train(config, copy)), expected)
  assert "resumed  from the checkpoint of step 6" in (copy / "train.log").read_text()
  assert steps_saved(copy) == [3, 6]


def test_without_a_whole_checkpoint_nothing_is_touched(whole_run, tmp_path):
  config, workdir, _ = whole_run
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  for step in (3, 6):
    damage_arrays(copy, step)
  for _ in range(2):
    with pytest.raises(UserError, match="none of the 2 checkpoint"):
      train(config, copy)
  assert steps_saved(copy) == [3, 6]


def test_prediction_refuses_a_damaged_checkpoint_and_names_the_others(whole_run, tmp_path):
  _, workdir, _ = whole_run
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  (copy / "checkpoints" / "6" / "variables" / "manifest.ocdbt").write_bytes(b"")
  with pytest.raises(UserError, match=r"checkpoints/6/variables: .*damaged.*step 3"):
    sr.load(copy, checkpoint="latest")


def early_stopping_config(prepared):
  config = make_small_config(prepared)
  # 17 training slices in batches of 4 are epochs of 5 steps; validations at 5, 10, ...
  config.train.steps, config.train.validate_every, config.train.patience = 60, 0, 2
  return config


def scripted_validation(monkeypatch, scores):
  def run(self, logger, state, step, **options):
    return scores.get(step, 0.0)

  monkeypatch.setattr(loop.Validation, "run", run)


def test_training_stops_when_validation_has_not_got_better(prepared, tmp_path, monkeypatch):
  config = early_stopping_config(prepared)
  slices = len(pipeline.SliceDataset(prepared, manifests.load(prepared)))
  epoch = math.ceil(slices / config.data.batch_size)
  scripted_validation(monkeypatch, {epoch: 0.5, 2 * epoch: 0.6, 3 * epoch: 0.6, 4 * epoch: 0.1})
  state = train(config, tmp_path)
  assert int(state.step) == 4 * epoch  # the equal Dice at 3 epochs is no better one
  assert "no better validation Dice for 2 epochs" in (tmp_path / "train.log").read_text()
  assert sr.load(tmp_path).step in (2 * epoch, 3 * epoch)
  assert int(train(config, tmp_path).step) == 4 * epoch  # a run that is over stays so


def test_an_interrupted_run_stops_early_where_it_would_have(prepared, tmp_path, monkeypatch):
  config = early_stopping_config(prepared)
  slices = len(pipeline.SliceDataset(prepared, manifests.load(prepared)))
  epoch = math.ceil(slices / config.data.batch_size)
  scripted_validation(monkeypatch, {epoch: 0.5})
  advance = loop.RunLogger.advance

  def interrupting(self, step):
    advance(self, step)
    if step == 2 * epoch + 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop.RunLogger, "advance", interrupting)
    with pytest.raises(TrainingInterruptedError):
      train(config, tmp_path)
  assert int(train(config, tmp_path).step) == 3 * epoch


def test_stopping_early_needs_validation_cases(prepared, small_config, tmp_path, monkeypatch):
  manifest = manifests.load(prepared)
  manifest.splits["val"] = ()
  monkeypatch.setattr(manifests, "load", lambda directory, verify=False: manifest)
  small_config.train.patience = 3
  with pytest.raises(UserError, match=r"config.train.patience"):
    train(small_config, tmp_path)


def test_a_fold_trains_on_the_other_folds(prepared, small_config, tmp_path, monkeypatch):
  manifest = manifests.load(prepared)
  pool = (*manifest.splits["train"], *manifest.splits["val"])
  splits = manifest.splits | {"train": pool, "val": ()}
  folded = dataclasses.replace(manifest, splits=splits, folds=(pool[:2], pool[2:]))
  monkeypatch.setattr(manifests, "load", lambda directory, verify=False: folded)
  with pytest.raises(UserError, match="has 2 folds"):
    train(small_config, tmp_path)
  small_config.data.fold = 1
  train(small_config, tmp_path)
  assert "2 training cases" in (tmp_path / "train.log").read_text()
  small_config.data.fold = 0
  with pytest.raises(UserError, match=r"config.data.fold: 1 -> 0"):
    train(small_config, tmp_path)


def test_the_order_of_slices_follows_its_own_seed_where_there_is_one(small_config, tmp_path):
  def records_of(seed, order_seed):
    small_config.seed, small_config.data.order_seed = seed, order_seed
    return make_plan(small_config, tmp_path, jax.devices()[:1]).stream()[0]["record"].tolist()

  assert records_of(1, 5) == records_of(2, 5) == records_of(5, -1)
  assert records_of(1, -1) != records_of(2, -1)


def test_checkpoints_after_a_step_can_be_forgotten(whole_run, tmp_path):
  config, workdir, expected = whole_run
  shutil.copytree(workdir, tmp_path / "run")
  checkpoints.forget_after(tmp_path / "run", 3)
  assert steps_saved(tmp_path / "run") == [3]
  assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in workdir.iterdir()}
  assert trees_equal(variables_of(train(config, tmp_path / "run")), expected)
  checkpoints.forget_after(tmp_path / "run", 0)
  assert steps_saved(tmp_path / "run") == []
