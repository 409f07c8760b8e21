"""Where a run begins: with random weights, with given ones, or where it was stopped."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax import processes
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.errors import UserError
from selfreg_jax.models.factory import initial_variables
from selfreg_jax.training import checkpoints, warm_start
from selfreg_jax.training.checkpoints import Checkpoint
from selfreg_jax.training.early_stopping import BestSoFar
from selfreg_jax.training.plan import Plan
from selfreg_jax.training.step import TrainState, create_state, named_key

_FIXED_BY_CHECKPOINT = (
  *(f"config.model.{name}:" for name in configs.WEIGHT_SHAPING),
  "config.optimizer.name:",
  "config.train.ema_decay:",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """Where a run begins, or goes on from.

  Attributes:
    state: parameters, optimizer state and the rest, on all devices (of `resume`: in the host's memory).
    step: steps taken so far.
    best: the best validation so far.
    init_from: what the run began with.
    notes: what is to be said about it, a line each.
  """

  state: TrainState
  step: int = 0
  best: BestSoFar = dataclasses.field(default_factory=BestSoFar)
  init_from: str = ""
  notes: tuple[str, ...] = ()


def begin(
  folder: pathlib.Path, plan: Plan, model: nn.Module, optimizer: optax.GradientTransformation, *, override: bool
) -> Start:
  """The state that a run starts with: of its newest whole checkpoint, of given weights, or random.

  Args:
    folder: the workdir.
    plan: of the run.
    model: its network.
    optimizer: whose state belongs to it.
    override: see `train_and_evaluate`.

  Returns:
    The start, its state initialized or put where it will live: on every device.

  Raises:
    UserError: the checkpoint is of another run, none is whole, or the given weights do not fit.
  """
  config, mesh, manifest = plan.config, plan.mesh, plan.manifest
  everywhere = meshes.replicated(mesh)

  def new_state(variables: Any) -> TrainState:
    return create_state(variables, optimizer, jax.random.key(config.seed), ema=config.train.ema_decay > 0)

  def random_state(key_data: jax.Array) -> TrainState:
    return state_at_random(plan, model, optimizer, jax.random.wrap_key_data(key_data))

  # An argument of the program, so that runs that differ in their seeds find the same one in the compilation cache.
  key_data = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
  resumed = resume(folder, plan, jax.eval_shape(random_state, key_data), override=override)
  if resumed:
    return dataclasses.replace(resumed, state=checkpoints.place(resumed.state, mesh))
  if not config.init_from:
    return Start(meshes.jit_once_for(mesh, random_state, out_shardings=everywhere)(key_data))
  with processes.together():
    variables, origin = warm_start.load(
      config.init_from,
      model,
      DatasetInfo.of(manifest),
      config.data.image_size,
      named_key(jax.random.key(config.seed), "init"),
    )
  given = meshes.replicate(jax.device_get(variables), mesh)
  state = jax.jit(new_state, out_shardings=everywhere)(given)
  return Start(state, init_from=config.init_from, notes=tuple(origin))


def state_at_random(
  plan: Plan, model: nn.Module, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """The state before the first step of a run without given weights; `jax.eval_shape` takes it.

  Args:
    plan: of the run.
    model: its network.
    optimizer: whose state belongs to it.
    key: typed PRNG key of the run.
  """
  config = plan.config
  variables = initial_variables(model, named_key(key, "init"), config.data.image_size, plan.manifest.channels)
  return create_state(variables, optimizer, key, ema=config.train.ema_decay > 0)


def resume(folder: pathlib.Path, plan: Plan, abstract_state: TrainState, *, override: bool) -> Start | None:
  """The newest whole checkpoint of a workdir; None where there is none.

  Args:
    folder: the workdir.
    plan: of the run that wants to go on.
    abstract_state: shapes and dtypes of its state.
    override: see `train_and_evaluate`.

  Returns:
    Where the run goes on from, the same in every process; the state in the host's memory (`checkpoints.place`).

  Raises:
    UserError: the checkpoint is of another run, or none is whole.
  """

  def use(checkpoint: Checkpoint) -> Start:
    if not checkpoint.can_continue:
      raise UserError(
        f"{folder}: holds converted weights, not a run; give another --workdir and --config.init_from={folder}"
      )
    init_from = checkpoint.config.get("init_from", "")  # where the run began, wherever these weights are now
    check_same_run(checkpoint, plan, init_from, override=override)
    # A best Dice on other data is none to be surpassed.
    best = checkpoint.best if checkpoint.fingerprint == plan.manifest.fingerprint() else BestSoFar()
    return Start(checkpoint.read(abstract_state), checkpoint.step, best, init_from)

  resumed, damages = None, []
  with processes.together():
    if processes.is_first():
      resumed = checkpoints.latest_whole(folder, use, damages.append)
  # The first process has chosen; the others read the same.
  chosen = processes.gather_texts(str(resumed.step) if resumed else "")[0]
  with processes.together():
    if chosen and not processes.is_first():
      resumed = use(Checkpoint(folder / checkpoints.FOLDER / chosen))
  return dataclasses.replace(resumed, notes=tuple(damages)) if resumed else None


def check_same_run(
  checkpoint: Checkpoint,
  plan: Plan,
  init_from: str,
  *,
  override: bool,
  remedy: str = "Give another --workdir, or --override to continue it with the new settings.",
) -> None:
  """Refuses to continue a run with another config or other data, unless told to.

  What the weights or the optimizer's state hang on (the network, the classes, what the images are) cannot be changed at
  all: the checkpoint would not fit, or would be taken for something else than it is.

  Args:
    checkpoint: of the run that is there.
    plan: of the run that is wanted.
    init_from: what the run that is there began with.
    override: continue with other settings, where that is possible.
    remedy: what to do, for the message.
  """
  ours = plan.config.copy_and_resolve_references()
  ours.init_from = init_from
  problems, step = configs.differences(ours, checkpoint.config), checkpoint.step
  fixed = [problem for problem in problems if problem.startswith(_FIXED_BY_CHECKPOINT)]
  differing = checkpoint.dataset.differences(DatasetInfo.of(plan.manifest))
  fixed += [f"the dataset's {name}: {before} -> {now}" for name, before, now in differing]
  if fixed:
    raise UserError(
      f"the workdir holds a run at step {step} whose checkpoint cannot be continued so (then -> now):\n  "
      + "\n  ".join(fixed)
      + "\nGive another --workdir."
    )
  if checkpoint.fingerprint != plan.manifest.fingerprint():
    problems.append(f"the dataset in {plan.config.data.dir} is not the one trained on so far (its fingerprint differs)")
  if problems and not override:
    raise UserError(
      f"the workdir holds a run at step {step} that differs from this one (then -> now):\n  "
      + "\n  ".join(problems)
      + f"\n{remedy}"
    )
