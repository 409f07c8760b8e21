"""The training loop: evaluate, save, take the next batch, step."""

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax import processes
from selfreg_jax import workdir as workdirs
from selfreg_jax.analysis.monitor import Monitor
from selfreg_jax.data import augment, pipeline
from selfreg_jax.data.manifest import Manifest
from selfreg_jax.errors import FaultError
from selfreg_jax.evaluation.inference import make_apply
from selfreg_jax.models.factory import build_model
from selfreg_jax.training import checkpoints
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.checkpoints import CheckpointWriter, SaveError
from selfreg_jax.training.early_stopping import BestSoFar
from selfreg_jax.training.feed import Feed
from selfreg_jax.training.logging import RunLogger, SilentLogger
from selfreg_jax.training.plan import Plan, make_plan
from selfreg_jax.training.signals import TrainingInterruptedError, stop_requests
from selfreg_jax.training.start import begin
from selfreg_jax.training.step import (
  NO_STEP,
  Batch,
  StackedMetrics,
  TrainState,
  make_loss,
  make_train_step,
  named_key,
  stack_metrics,
)
from selfreg_jax.training.validation import Validation, ValidationInterruptedError

_STEPS_IN_FLIGHT = 2
_SHOWN = ("total", "ce", "dice", "scr", "ifd", "grad_norm")


class TrainingDivergedError(FaultError):
  """The loss or its gradient became NaN or infinite; the message says when, where and with which cases.

  Attributes:
    step: the first that was not finite.
  """

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  devices: Sequence[jax.Device] | None = None,
  override: bool = False,
) -> TrainState:
  """Trains as a config says, or continues the run in a workdir.

  With several processes (`selfreg_jax.processes.start`) each calls this with the same arguments, and they share one
  workdir.

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
    TrainingInterruptedError: SIGTERM, SIGINT or SIGHUP came; the last step is finished and saved.
    FaultError: data could not be read, a checkpoint not written, or another process was lost.
  """
  # 1. Everything that can be wrong, before any compute.
  with processes.together():
    plan = make_plan(config, workdir, devices)
  processes.check_agreement(plan.facts() | {"--override": override})
  config, mesh, manifest = plan.config, plan.mesh, plan.manifest

  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(workdir)
    with processes.together():
      if processes.is_first():
        stack.enter_context(workdirs.hold(folder))
    token = processes.gather_texts(workdirs.read_token(folder))[0]
    with processes.together():
      workdirs.check_shared(folder, token)

    # 2. Network, optimizer, state; the state comes from a checkpoint, from given weights, or at random.
    model = build_model(config.model, manifest.num_classes)
    schedule = optimizers.make_schedule(config.optimizer, plan.steps, plan.steps_per_epoch)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule)
    start = begin(folder, plan, model, optimizer, override=override)
    config.init_from = start.init_from
    state, best, start_step = start.state, start.best, start.step
    train_step = build_train_step(config, model, optimizer, mesh, scale=manifest.scale)
    tables = meshes.replicate(augment.ResizeTables.build(plan.dataset.shapes, config.data.image_size), mesh)
    validation = Validation(config, manifest, make_apply(model), mesh)
    monitor = Monitor(config, manifest, model, mesh)
    vote = processes.StopVote(mesh)
    make_logger = RunLogger if processes.is_first() else SilentLogger
    with processes.together(), workdirs.must_be_writable(folder):
      writer = stack.enter_context(CheckpointWriter(folder, manifest.fingerprint()))
      if processes.is_first():
        workdirs.write_config(folder, config)  # only now: a checkpoint that does not fit must leave it as it was
      logger = stack.enter_context(
        make_logger(folder, start_step=start_step, validated=best.validated, steps=plan.steps)
      )

    # 3. The loop.
    introduce(logger, state, plan, start_step)
    for line in start.notes:
      logger.say(line)
    saver = Saver(writer, logger, config, manifest)
    stop = stack.enter_context(stop_requests())
    feed = stack.enter_context(
      Feed(
        pipeline.iterate(plan.stream(), start_step, threads=config.data.threads, prefetch=config.data.prefetch),
        functools.partial(meshes.place_batch, mesh=mesh),
        start_step=start_step,
        timeout=config.data.timeout,
        describe=plan.case_names,
      )
    )
    stack.enter_context(processes.peers())
    accumulator = MetricAccumulator(config.data.batch_size, feed)
    explain = functools.partial(explain_failure, plan)

    def validate(done: int) -> None:
      """Validates and saves; raises ValidationInterruptedError where the run is to stop first."""
      val_dice = validation.run(logger, state, done, stop=lambda: bool(stop))
      best.update(val_dice, done)
      saver.save(state, best, val_dice)

    def leave(done: int, *, saved: bool) -> NoReturn:
      if not saved:
        saver.save(state, best, None)
      saver.finish()
      who = stop.signal_name or "a signal to another process"
      message = f"stopped by {who} after step {done}, which is saved; the same command continues"
      raise TrainingInterruptedError(message)

    try:
      done = start_step
      if start_step and best.validated < start_step and plan.validates_at(start_step):
        validate(start_step)  # which the run was stopped before
      while done < plan.steps:
        # Asked where a validation has been, so that a run stops at the same step whether or not it was interrupted.
        if done % plan.validate_every == 0 and best.is_stale(done, plan.patience):
          logger.say(f"stopped  early: no better validation Dice for {config.train.patience} epochs")
          break
        # The tables are an argument of the step: closed over, they would be constants of megabytes in its program.
        batch = feed.next() | {"tables": tables}
        if done == start_step:
          train_step = compile_step(logger, train_step, state, batch)
          processes.meet()  # some compile faster than others
          accumulator.restart()
        state, metrics = train_step(state, batch)
        accumulator.add(metrics)
        done += 1
        logger.advance(done)
        stopping = vote(bool(stop)) and done < plan.steps  # asked once: a signal that comes later finds the next step
        validates = plan.validates_at(done)
        due = bool(config.train.checkpoint_every) and done % config.train.checkpoint_every == 0
        analyses = bool(config.train.analyze_every) and done % config.train.analyze_every == 0
        if validates or stopping or due or analyses or done % config.train.log_every == 0:
          record_training(logger, *accumulator.read(), state, done, schedule, explain)
        if analyses and not stopping:
          monitor.run(logger, state, done)
        if validates and not stopping:
          validate(done)
        elif due and not stopping:
          saver.save(state, best, None)
        if validates or due or analyses:
          accumulator.restart()
        if stopping:
          leave(done, saved=False)
    except ValidationInterruptedError:
      leave(done, saved=done == start_step)
    saver.finish()
    if processes.is_first():
      conclude(logger, folder, done)
  return state


def build_train_step(
  config: ml_collections.ConfigDict,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  scale: float,
) -> Any:
  """The training step of a run, jitted for its devices, as it is compiled and called by the loop.

  Args:
    config: of the run.
    model: network.
    optimizer: of its parameters.
    mesh: the devices.
    scale: stored values * scale = network input.

  Returns:
    The jitted function of (state, which is given away; batch of stored slices with "tables") that gives the next state
    and `StackedMetrics`.
  """
  step = make_run_step(config, model, optimizer, scale=scale)
  return meshes.jit_for(mesh, step, donate_argnums=0, out_shardings=meshes.replicated(mesh))


def make_run_step(
  config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation, *, scale: float
) -> Callable[[TrainState, Batch], tuple[TrainState, StackedMetrics]]:
  """The training step of a run as a pure function.

  Args:
    config: of the run; the numbers of its section `loss` may be traced arrays.
    model: network.
    optimizer: of its parameters.
    scale: stored values * scale = network input.

  Returns:
    Function of (state, batch of stored slices with "tables") that gives the next state and `StackedMetrics`.
  """
  step = make_train_step(
    model,
    make_loss(config.loss),
    optimizer,
    input_fn=make_input_fn(config, scale),
    accumulate=config.train.accumulate,
    ema_decay=config.train.ema_decay,
    most_skips=config.train.most_skips if config.train.on_nonfinite == "skip" else 0,
  )
  return stack_metrics(step)


class Saver:
  """Saves checkpoints, and does what `config.on_save_error` says when that fails."""

  def __init__(
    self, writer: CheckpointWriter, logger: RunLogger, config: ml_collections.ConfigDict, manifest: Manifest
  ):
    self._writer = writer
    self._logger = logger
    self._config = config
    self._manifest = manifest
    self._stops = config.on_save_error == "stop"
    self._failed: SaveError | None = None

  def save(self, state: TrainState, best: BestSoFar, val_dice: float | None) -> None:
    """Saves in the background, once what was being saved is on disk."""
    self._attempt(self._writer.settle)
    self._attempt(
      functools.partial(self._writer.save, state, self._config, self._manifest, val_dice=val_dice, best=best)
    )

  def finish(self) -> None:
    """Waits until the last checkpoint is on disk; that it is cannot be done without, whatever the config says."""
    with processes.together():
      if self._failed:
        raise self._failed
      self._writer.settle()

  def _attempt(self, action: Callable[[], None]) -> None:
    with processes.together():
      try:
        action()
        self._failed = None
      except SaveError as error:
        self._failed = error
        if self._stops:
          raise SaveError(
            f"{error}. Make room and run the same command again; --config.on_save_error=continue goes on without it"
          ) from error
        self._logger.say(f"warning  {error}; training goes on and tries again at the next one")


def make_input_fn(config: ml_collections.ConfigDict, scale: float) -> Callable[[jax.Array, Batch], Batch]:
  """Augmentation and resize of a batch on the device, each slice keyed by its place in the run's stream.

  Args:
    config: of the run.
    scale: stored values * scale = network input.

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
      scale=scale,
      augmentation=recipe,
    )
    return {"image": image, "label": label}

  return input_fn


def introduce(logger: RunLogger, state: TrainState, plan: Plan, start_step: int) -> None:
  """Says what is about to be trained, on what."""
  config, manifest, mesh = plan.config, plan.manifest, plan.mesh
  logger.hparams(configs.flatten(config))
  train, val = manifest.split("train"), manifest.split("val")
  slices = sum(case.shape[0] for case in train)
  kind = mesh.devices.flat[0].device_kind
  where = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
  if not start_step:
    logger.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
  logger.say(f"data     {config.data.dir}: {len(train)} training cases ({slices} slices), {len(val)} validation cases")
  logger.say(f"devices  {mesh.size} x {kind}{where}, computing in {config.model.dtype}")
  batches = f"batches of {config.data.batch_size}"
  if config.train.accumulate > 1:
    batches += f", each in {config.train.accumulate} micro-batches"
  logger.say(
    f"steps    {f'{start_step} to {plan.steps} in {batches}' if start_step < plan.steps else 'none left to do'}"
  )
  if not val:
    logger.say("warning  the validation split is empty: no best checkpoint can be chosen, the latest one will count")
  if start_step:
    logger.say(f"resumed  from the checkpoint of step {start_step}")


def compile_step(logger: RunLogger, train_step: Any, state: TrainState, batch: Batch) -> Any:
  """Compiles the step ahead of its first call, and says how long it takes: nothing else moves meanwhile."""
  logger.say("compiling the training step ...")
  start = time.monotonic()
  compiled = meshes.compile_ahead(train_step, state, batch)
  logger.say(f"compiled in {time.monotonic() - start:.0f} s")
  return compiled


class MetricAccumulator:
  """Collects the metrics of steps on the device, and their pace, without reading anything back."""

  def __init__(self, batch_size: int, feed: Feed):
    self._batch_size = batch_size
    self._feed = feed
    self.restart()

  def restart(self) -> None:
    """Forgets what was collected, and starts the clocks."""
    self._pending: list[StackedMetrics] = []
    self._start = time.monotonic()
    self._feed.restart_clock()

  def add(self, metrics: StackedMetrics) -> None:
    """Collects a step's metrics; waits (reading nothing) for an earlier step, so that the host cannot run away."""
    self._pending.append(metrics)
    if len(self._pending) > _STEPS_IN_FLIGHT:
      jax.block_until_ready(self._pending[-1 - _STEPS_IN_FLIGHT])

  def read(self) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Metrics of each step since the last reading, and the pace: slices a second, share of time without a batch."""
    collected, pace = self.take()
    return [metrics.named() for metrics in collected], pace

  def take(self) -> tuple[list[StackedMetrics], dict[str, float]]:
    """What `read` gives, the metrics as they came from the steps, in NumPy arrays."""
    collected = jax.device_get(self._pending)  # all are on their way before one is awaited
    seconds = time.monotonic() - self._start
    pace = {
      "slices_per_second": self._batch_size * len(collected) / seconds,
      "waiting_for_data": self._feed.waited / seconds,
    }
    self.restart()
    return collected, pace


def record_training(
  logger: RunLogger,
  steps: Sequence[dict[str, float]],
  pace: dict[str, float],
  state: TrainState,
  step: int,
  schedule: optax.Schedule,
  explain: Callable[[RunLogger, TrainState, int, str], str],
) -> None:
  """Writes the mean metrics since the last record, or stops the run if one of these steps was not finite.

  Args:
    logger: takes them.
    steps: metrics of each step since the last record.
    pace: of these steps, see `MetricAccumulator.read`.
    state: after them.
    step: how many were taken in all.
    schedule: of the learning rate.
    explain: of a step that was not finite, see `explain_failure`.

  Raises:
    TrainingDivergedError: one of the steps was not finite.
  """
  failed = int(state.nonfinite_step)
  if failed != NO_STEP:
    terms = steps[failed - (step - len(steps))]
    values = ", ".join(f"{name} {terms[name]:.4g}" for name in _SHOWN if name in terms)
    raise TrainingDivergedError(explain(logger, state, failed, values), failed)
  counted = [metrics for metrics in steps if not metrics.get("skipped")]
  means = {f"train/{name}": float(np.mean([metrics[name] for metrics in counted or steps])) for name in steps[0]}
  # Of updates, not steps: a skipped one leaves the optimizer, and so its schedule, where it was.
  rates = {"learning_rate": float(schedule(max(int(state.updates) - 1, 0)))} | pace
  skipped = len(steps) - len(counted)
  if "skipped" in steps[0]:
    rates["skipped"] = skipped
  means |= {f"train/{name}": value for name, value in rates.items()}
  losses = "  ".join(f"{name} {means[f'train/{name}']:.4f}" for name in _SHOWN if f"train/{name}" in means)
  line = f"step {step}  {losses}  rate {rates['learning_rate']:.2e}  {pace['slices_per_second']:.1f} slices/s"
  if skipped:
    line += f"  {skipped} updates skipped: not finite"
  logger.scalars(step, means, line)


def explain_failure(plan: Plan, logger: RunLogger, state: TrainState, step: int, values: str) -> str:
  """What to say of a step that was not finite; its batch is saved as the network saw it.

  Args:
    plan: of the run.
    logger: takes the batch.
    state: with the run's key.
    step: the one that stopped the run.
    values: its loss and terms, for people.

  Returns:
    The message.
  """
  skips = plan.config.train.on_nonfinite == "skip"
  what = f"the loss or its gradient is not finite at step {step}"
  if skips:
    what += f", the update after {plan.config.train.most_skips} that were skipped in a row (config.train.most_skips)"
  message = f"{what}: {values}; cases of the batch: {plan.case_names(step)}"
  if processes.is_first():
    message += f"; the batch as the network saw it is in {_save_batch(plan, logger, state, step)}"
  hint = "" if skips else ", --config.train.on_nonfinite=skip to leave such updates out"
  return (
    f"{message}. The same command fails again at this step; try a lower rate, --config.optimizer.clip_norm or "
    f"float32{hint} (see --override where a field may not change)"
  )


def _save_batch(plan: Plan, logger: RunLogger, state: TrainState, step: int) -> pathlib.Path:
  # Random access: the batch of any step can be made again, here the whole of it in one process.
  batch = plan.stream(whole=True)[step]
  tables = augment.ResizeTables.build(plan.dataset.shapes, plan.config.data.image_size)
  key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
  input_fn = make_input_fn(plan.config, plan.manifest.scale)
  seen = meshes.jit(input_fn)(named_key(key, "input"), batch | {"tables": tables})
  arrays = {name: np.asarray(value) for name, value in seen.items()}
  return logger.arrays(f"nonfinite_step_{step:07d}.npz", arrays | {n: batch[n] for n in ("record", "position")})


def conclude(logger: RunLogger, folder: pathlib.Path, steps: int) -> None:
  """Says what came out and what to do with it."""
  best = checkpoints.best_of(checkpoints.find(folder))
  score = "not validated" if best.val_dice is None else f"validation Dice {best.val_dice:.4f}"
  logger.say(f"{steps} steps done; best checkpoint: step {best.step}, {score}")
  logger.say(f"curves   {folder / 'curves.png'}")
  logger.say(f"next     python eval.py --workdir={folder}")
