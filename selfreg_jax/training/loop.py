"""The training loop: evaluate, save, take the next batch, step."""

import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax import workdir as workdirs
from selfreg_jax.data import augment, pipeline, published
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, DatasetInfo, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import metrics as volume_metrics
from selfreg_jax.evaluation import protocols, report
from selfreg_jax.evaluation.inference import SlicePredictor, make_apply
from selfreg_jax.models.factory import build_model, initial_variables
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training import warm_start
from selfreg_jax.training.checkpoints import FOLDER, Checkpoints
from selfreg_jax.training.early_stopping import BestSoFar
from selfreg_jax.training.logging import RunLogger
from selfreg_jax.training.signals import TrainingInterruptedError, stop_requests
from selfreg_jax.training.step import NO_STEP, Batch, TrainState, create_state, make_loss, make_train_step, named_key

_PANEL_SLICES = 4
_PANEL_WIDTH = 900  # pixels that small slices are enlarged to
_FIXED_BY_CHECKPOINT = (*(f"config.model.{name}:" for name in configs.WEIGHT_SHAPING), "config.optimizer.name:")
_STEPS_IN_FLIGHT = 2


class TrainingDivergedError(Exception):
  """The loss or its gradient became NaN or infinite; the message says when, where and with which cases."""


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  devices: Sequence[jax.Device] | None = None,
  override: bool = False,
) -> TrainState:
  """Trains as a config says, or continues the run in a workdir.

  Args:
    config: see `selfreg_jax.config.base_config`.
    workdir: where checkpoints, logs, curves and panels go; created if need be. One that holds a checkpoint is
      continued, bit for bit as if it had never stopped (on CPU).
    devices: to train on; None takes all.
    override: continue although the config differs from the one the checkpoint was trained with.

  Returns:
    The state after the last step.

  Raises:
    UserError: the config, the data or the workdir cannot be used.
    TrainingDivergedError: the loss became NaN or infinite.
    TrainingInterruptedError: SIGTERM or SIGINT came; the last step is finished and saved.
  """
  # 1. Everything that can be wrong, before any compute.
  configs.validate(config)
  config = configs.with_absolute_paths(config)
  if not pathlib.Path(workdir, FOLDER).exists():  # a run that is continued needs these weights no more
    warm_start.check_exists(config.init_from)
  if jax.process_count() > 1:
    raise UserError(
      f"training in several processes ({jax.process_count()}) is not supported yet; use one, all its devices"
    )
  mesh = meshes.make_mesh(devices)
  meshes.check_batch_size(config.data.batch_size, mesh)
  manifest = manifests.load(config.data.dir, verify=config.data.verify).with_fold(config.data.fold)
  if config.train.patience and not manifest.splits["val"]:
    raise UserError("config.train.patience stops by the validation Dice, but the validation split is empty; give 0")
  check_published_classes(config, manifest)
  dataset = pipeline.SliceDataset(config.data.dir, manifest)
  sampling = pipeline.Sampling(config.data.batch_size, config.seed, config.data.foreground_fraction)
  stream = pipeline.batches(dataset, sampling, process_index=jax.process_index(), process_count=jax.process_count())
  steps_per_epoch = math.ceil(len(dataset) / config.data.batch_size)
  steps = config.train.steps or config.train.epochs * steps_per_epoch
  validate_every = config.train.validate_every or steps_per_epoch
  patience = config.train.patience * steps_per_epoch

  with workdirs.hold(workdir) as folder, Checkpoints(folder) as checkpoints:
    start_step = checkpoints.latest_step() or 0
    if checkpoints.latest_step() is not None and not checkpoints.can_continue(start_step):
      raise UserError(
        f"{folder}: holds converted weights, not a run; give another --workdir and --config.init_from={folder}"
      )
    if start_step:
      # Where the run began, wherever these weights are now.
      config.init_from = checkpoints.config(start_step).get("init_from", "")
      check_same_run(checkpoints, start_step, config, manifest, override=override)

    # 2. Network, optimizer, state: initialized under jit, where they will live.
    model = build_model(config.model, manifest.num_classes)
    schedule = optimizers.make_schedule(config.optimizer, steps, steps_per_epoch)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule)
    key = jax.random.key(config.seed)

    def initial_state(key: jax.Array) -> TrainState:
      variables = initial_variables(model, named_key(key, "init"), config.data.image_size, manifest.channels)
      return create_state(variables, optimizer, key)

    # 3. A checkpoint, if there is one; else given weights, if there are any; else random ones.
    origin, best = [], BestSoFar()
    if start_step:
      abstract = meshes.replicated_like(jax.eval_shape(initial_state, key), mesh)
      state, best = checkpoints.restore(start_step, abstract), checkpoints.best_so_far(start_step)
    elif config.init_from:
      variables, origin = warm_start.load(
        config.init_from, model, DatasetInfo.of(manifest), config.data.image_size, named_key(key, "init")
      )
      state = jax.jit(create_state, static_argnums=1, out_shardings=meshes.replicated(mesh))(variables, optimizer, key)
    else:
      state = jax.jit(initial_state, out_shardings=meshes.replicated(mesh))(key)

    tables = jax.device_put(augment.ResizeTables.build(dataset.shapes, config.data.image_size), meshes.replicated(mesh))
    train_step = meshes.jit_for(
      mesh,
      make_train_step(model, make_loss(config.loss), optimizer, input_fn=make_input_fn(config, manifest)),
      donate_argnums=0,
      out_shardings=meshes.replicated(mesh),
    )
    validation = Validation(config, manifest, make_apply(model), mesh)

    workdirs.write_config(folder, config)  # only now: a checkpoint that does not fit must leave the workdir as it was

    # 4. The loop.
    with RunLogger(folder, start_step=start_step, steps=steps) as logger, stop_requests() as stop:
      introduce(logger, state, config, manifest, mesh, steps, start_step)
      for line in origin:
        logger.say(line)
      batches = pipeline.iterate(stream, start_step, threads=config.data.threads, prefetch=config.data.prefetch)
      accumulator = MetricAccumulator(config.data.batch_size)
      for step in range(start_step, steps):
        # Asked where a validation has been, so that a run stops at the same step whether or not it was interrupted.
        if step % validate_every == 0 and best.is_stale(step, patience):
          logger.say(f"stopped  early: no better validation Dice for {config.train.patience} epochs")
          steps = step
          break
        # The tables are an argument of the step: closed over, they would be constants of megabytes in its program.
        batch = meshes.place_batch(next(batches), mesh) | {"tables": tables}
        if step == start_step:
          train_step = compile_step(logger, train_step, state, batch)
          accumulator.restart()
        state, metrics = train_step(state, batch)
        accumulator.add(metrics)
        done = step + 1
        logger.advance(done)
        validated = done % validate_every == 0 or done == steps
        stopping = bool(stop) and done < steps  # asked once: a signal that comes later finds the next step
        if validated or stopping or done % config.train.log_every == 0:
          record_training(logger, accumulator, state, done, schedule, functools.partial(_case_names, dataset, stream))
        if validated:
          val_dice = validation.run(logger, state, done)
          best.update(val_dice, done)
          checkpoints.save(state, config, manifest, val_dice=val_dice, best=best)
          accumulator.restart()
        if stopping:
          if not validated:
            checkpoints.save(state, config, manifest, best=best)
          checkpoints.wait()
          message = f"stopped by {stop.signal_name} after step {done}, which is saved; the same command continues"
          logger.note(message)
          raise TrainingInterruptedError(message)
      checkpoints.wait()
      conclude(logger, checkpoints, max(start_step, steps), folder)
  return state


def make_input_fn(config: ml_collections.ConfigDict, manifest: Manifest) -> Callable[[jax.Array, Batch], Batch]:
  """Augmentation and resize of a batch on the device, each slice keyed by its place in the run's stream.

  Args:
    config: of the run.
    manifest: of the dataset.

  Returns:
    Function of (key of the run, stored batch with "tables") -> "image" and "label" as the network sees them.
  """
  recipe = augment.Augmentation(**config.augment)

  def input_fn(key: jax.Array, batch: Batch) -> Batch:
    # A position is unique over the whole run, and does not depend on batch size, devices or processes.
    keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])
    image, label = augment.augment(
      keys,
      batch["image"],
      batch["label"],
      batch["size_index"],
      batch["tables"],
      scale=manifest.scale,
      augmentation=recipe,
    )
    return {"image": image, "label": label}

  return input_fn


def check_published_classes(config: ml_collections.ConfigDict, manifest: Manifest) -> None:
  """Raises UserError where the recipe is for a published dataset and the prepared one has other classes."""
  if config.data.name and manifest.classes != published.PUBLISHED[config.data.name].classes:
    raise UserError(
      f"{config.data.dir}: holds the classes {', '.join(manifest.classes)}, but config.data.name = "
      f"{config.data.name!r} has {', '.join(published.PUBLISHED[config.data.name].classes)}; prepare the dataset with "
      "these, or train on your own classes with --config.data.name=''"
    )


def check_same_run(
  checkpoints: Checkpoints, step: int, config: ml_collections.ConfigDict, manifest: Manifest, *, override: bool
) -> None:
  """Refuses to continue a run with another config or other data, unless told to.

  What the weights or the optimizer's state hang on (the network, the classes, what the images are) cannot be changed at
  all: the checkpoint would not fit, or would be taken for something else than it is.
  """
  problems = configs.differences(config, checkpoints.config(step))
  info, fingerprint = checkpoints.dataset(step)
  fixed = [problem for problem in problems if problem.startswith(_FIXED_BY_CHECKPOINT)]
  differing = info.differences(DatasetInfo.of(manifest))
  fixed += [f"the dataset's {name}: {before} -> {now}" for name, before, now in differing]
  if fixed:
    raise UserError(
      f"the workdir holds a run at step {step} whose checkpoint cannot be continued so (then -> now):\n  "
      + "\n  ".join(fixed)
      + "\nGive another --workdir."
    )
  if fingerprint != manifest.fingerprint():
    problems.append(f"the dataset in {config.data.dir} is not the one trained on so far (its fingerprint differs)")
  if problems and not override:
    raise UserError(
      f"the workdir holds a run at step {step} that differs from this one (then -> now):\n  "
      + "\n  ".join(problems)
      + "\nGive another --workdir, or --override to continue it with the new settings."
    )


def introduce(
  logger: RunLogger,
  state: TrainState,
  config: ml_collections.ConfigDict,
  manifest: Manifest,
  mesh: Mesh,
  steps: int,
  start_step: int,
) -> None:
  """Says what is about to be trained, on what."""
  logger.hparams(configs.flatten(config))
  train, val = manifest.split("train"), manifest.split("val")
  slices = sum(case.shape[0] for case in train)
  kind = mesh.devices.flat[0].device_kind
  logger.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
  logger.say(f"data     {config.data.dir}: {len(train)} training cases ({slices} slices), {len(val)} validation cases")
  logger.say(f"devices  {mesh.size} x {kind}, computing in {config.model.dtype}")
  todo = f"{start_step} to {steps} in batches of {config.data.batch_size}" if start_step < steps else "none left to do"
  logger.say(f"steps    {todo}")
  if not val:
    logger.say("warning  the validation split is empty: no best checkpoint can be chosen, the latest one will count")
  if start_step:
    logger.say(f"resumed  from the checkpoint of step {start_step}")


def compile_step(logger: RunLogger, train_step: Any, state: TrainState, batch: Batch) -> Any:
  """Compiles the step ahead of its first call, and says how long it takes: nothing else moves meanwhile."""
  logger.say("compiling the training step ...")
  start = time.monotonic()
  compiled = train_step.lower(state, batch).compile()
  logger.say(f"compiled in {time.monotonic() - start:.0f} s")
  return compiled


class MetricAccumulator:
  """Collects the metrics of steps on the device, and their pace, without reading anything back."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.restart()

  def restart(self) -> None:
    """Forgets what was collected, and starts the clock."""
    self._pending: list[dict[str, jax.Array]] = []
    self._start = time.monotonic()

  def add(self, metrics: dict[str, jax.Array]) -> None:
    """Collects a step's metrics; waits (reading nothing) for an earlier step, so that the host cannot run away."""
    self._pending.append(metrics)
    if len(self._pending) > _STEPS_IN_FLIGHT:
      jax.block_until_ready(self._pending[-1 - _STEPS_IN_FLIGHT])

  def read(self) -> tuple[list[dict[str, float]], float]:
    """Metrics of each step since the last reading, and slices per second; starts anew."""
    steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._pending)]
    pace = self._batch_size * len(steps) / (time.monotonic() - self._start)
    self.restart()
    return steps, pace


def record_training(
  logger: RunLogger,
  accumulator: MetricAccumulator,
  state: TrainState,
  step: int,
  schedule: optax.Schedule,
  case_names: Callable[[int], str],
) -> None:
  """Writes the mean metrics since the last record, or stops the run if one of these steps was not finite."""
  steps, pace = accumulator.read()
  failed = int(state.nonfinite_step)
  if failed != NO_STEP:
    terms = steps[failed - (step - len(steps))]
    values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    message = (
      f"the loss or its gradient is not finite at step {failed}: {values}; cases of the batch: {case_names(failed)}"
    )
    logger.note(message)
    raise TrainingDivergedError(message)
  means = {f"train/{name}": float(np.mean([metrics[name] for metrics in steps])) for name in steps[0]}
  means |= {"train/learning_rate": float(schedule(step - 1)), "train/slices_per_second": pace}
  shown = ("total", "ce", "dice", "scr", "ifd", "grad_norm")
  losses = "  ".join(f"{name} {means[f'train/{name}']:.4f}" for name in shown if f"train/{name}" in means)
  rate = f"rate {means['train/learning_rate']:.2e}"
  logger.scalars(step, means, f"step {step}  {losses}  {rate}  {pace:.1f} slices/s")


def _case_names(dataset: pipeline.SliceDataset, stream: Any, step: int) -> str:
  """The slices of a step's batch, rebuilt from its place in the stream."""
  located = [dataset.locate(int(record)) for record in stream[step]["record"]]
  return ", ".join(sorted({f"{case.id} slice {index}" for case, index in located}))


class Validation:
  """Whole validation cases through the network: sound-protocol Dice, curves, and a panel of slices."""

  def __init__(self, config: ml_collections.ConfigDict, manifest: Manifest, apply: Any, mesh: Mesh):
    self._manifest = manifest
    self._cases = manifest.split("val")
    self._arrays = manifests.CaseArrays(config.data.dir)
    self._apply = apply
    self._predictor = SlicePredictor(config.data.image_size, config.eval.batch_size, mesh)

  def run(self, logger: RunLogger, state: TrainState, step: int) -> float | None:
    """Validates and records; returns the mean foreground Dice, or None where nothing can be scored."""
    if not self._cases:
      logger.curves()
      return None
    start = time.monotonic()
    predict_fn = functools.partial(self._apply, {"params": state.params, "batch_stats": state.batch_stats})
    per_case, pictures = [], []
    for index, case in enumerate(self._cases):
      logger.alive(f"validating case {index + 1}/{len(self._cases)}")
      image, truth = self._arrays.image(case), self._arrays.label(case)
      prediction = self._predictor.classes(predict_fn, image, scale=self._manifest.scale)
      confusion = volume_metrics.confusion_matrix(prediction, truth, num_classes=self._manifest.num_classes)
      per_case.append(protocols.dice_per_class(confusion))
      pictures += list(self._choose(index, case, image, truth, prediction))
    mean = protocols.mean_foreground_dice(per_case)
    scalars = {"val/dice": mean}
    for name, values in zip(self._manifest.classes[1:], np.transpose(per_case), strict=True):
      scored = values[~np.isnan(values)]
      if len(scored):
        scalars[f"val/dice/{name}"] = float(scored.mean())
    line = f"step {step}  validation Dice {mean:.4f} on {len(per_case)} cases in {time.monotonic() - start:.1f} s"
    logger.scalars(step, scalars, line)
    panel = report.overlay_panel(*zip(*pictures, strict=True), class_names=self._manifest.classes)
    enlarge = max(_PANEL_WIDTH // panel.shape[1], 1)
    logger.panel(step, panel.repeat(enlarge, axis=0).repeat(enlarge, axis=1))
    logger.curves()
    return None if np.isnan(mean) else mean

  def _choose(
    self, index: int, case: Case, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Slices of a case for the panel: evenly spaced among those with foreground, the same at every validation."""
    shares = [len(part) for part in np.array_split(range(_PANEL_SLICES), len(self._cases))]
    candidates = case.foreground_slices or range(case.shape[0])
    places = np.linspace(0, len(candidates) - 1, shares[index] + 2)[1:-1]
    for slice_index in (candidates[round(place)] for place in places):
      arrays = (image[slice_index] * np.float32(self._manifest.scale), truth[slice_index], prediction[slice_index])
      yield tuple(report.radiological(array, case.axcodes) for array in arrays)


def conclude(logger: RunLogger, checkpoints: Checkpoints, steps: int, folder: pathlib.Path) -> None:
  """Says what came out and what to do with it."""
  best = checkpoints.best_step()
  metric = checkpoints.metric(best)
  score = "not validated" if metric is None else f"validation Dice {metric:.4f}"
  logger.say(f"{steps} steps done; best checkpoint: step {best}, {score}")
  logger.say(f"curves   {folder / 'curves.png'}")
  logger.say(f"next     python eval.py --workdir={folder}")
