"""The training state and one training step, built from parts that users can replace."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from selfreg_jax import loss_parts, losses
from selfreg_jax.features import COLLECTION, Features

Array = jax.Array
Batch = dict[str, Array]
LossFn = Callable[[Array, Features, Batch, Array], tuple[Array, dict[str, Array]]]
InputFn = Callable[[Array, Batch], Batch]
NO_STEP = -1
SHARED_BY_SLICES = ("tables",)  # entries of a batch that belong to all of its slices


@struct.dataclass
class TrainState:
  """All that a step changes, and the key that it does not.

  Attributes:
    step: () int32, steps taken.
    updates: () int32, steps whose update was not skipped.
    params: parameters.
    batch_stats: running statistics.
    opt_state: of the optimizer.
    ema: moving average of {"params", "batch_stats"} over the steps; {} where none is kept.
    key: typed PRNG key of the run; a step uses `fold_in(key, step)`.
    skips: () int32, steps in a row up to this one whose update was skipped because it was not finite.
    nonfinite_step: () int32, the step that stopped the run because its loss or gradient was not finite, or -1. From
      that step on the state is frozen as it was before it.
  """

  step: Array
  updates: Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  key: Array
  skips: Array
  nonfinite_step: Array

  @property
  def variables(self) -> dict[str, Any]:
    """Parameters and running statistics."""
    return {"params": self.params, "batch_stats": self.batch_stats}

  @property
  def evaluated(self) -> dict[str, Any]:
    """The variables that are validated and used for prediction: the moving average where one is kept."""
    return self.ema or self.variables


def create_state(
  variables: dict[str, Any], optimizer: optax.GradientTransformation, key: Array, *, ema: bool = False
) -> TrainState:
  """The state before the first step.

  Args:
    variables: {"params", "batch_stats"} from `model.init` or `from_pytorch`.
    optimizer: whose state is initialized.
    key: typed PRNG key of the run.
    ema: keep a moving average of the variables.

  Returns:
    The state.
  """
  params, batch_stats = variables["params"], variables.get("batch_stats", {})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    updates=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    # A copy: the same buffer cannot be donated twice.
    ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema else {},
    key=key,
    skips=jnp.zeros((), jnp.int32),
    nonfinite_step=jnp.full((), NO_STEP, jnp.int32),
  )


def moving_average(average: Any, new: Any, count: Array, decay: float) -> Any:
  """One step of an exponential moving average without bias towards what it began with.

  After n steps it is (1 - decay) * sum_i decay^(n - i) x_i / (1 - decay^n): a weighted mean of what it was given, the
  initial value having no weight. (Adam's correction of the bias, Kingma and Ba 2015, section 3.)

  Args:
    average: tree after count - 1 steps.
    new: tree of the same structure.
    count: n, from 1.
    decay: between 0 and 1.

  Returns:
    The tree after n steps.
  """
  count = jnp.asarray(count, jnp.float32)
  # (1 - decay) / (1 - decay^n), without the cancellation of 1 - decay^n.
  rate = (1 - decay) / -jnp.expm1(count * math.log(decay))
  return jax.tree.map(lambda old, x: old + rate.astype(old.dtype) * (x - old), average, new)


def named_key(key: Array, name: str) -> Array:
  """An independent key for a named use, the same on every device and after every resume."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def make_loss(config: ml_collections.ConfigDict) -> LossFn:
  """The loss of `config.loss`: ce_weight * CE + dice_weight * Dice + self-regularization + deep supervision.

  Args:
    config: the section `loss` of a run's config. Weights and `ifd_p` may be traced arrays; a weight that is the Python
      number 0 skips its term, a traced 0 computes and multiplies it.

  Returns:
    Function of (logits (B, H, W, classes), features, batch with "label" (B, H, W), key) that gives the loss and its
    terms: "ce", "dice", those of `self_regularization`, and where there is deep supervision "deep_supervision" and each
    head's "deep_supervision/decoder_1", ...
  """
  parts = {field.removeprefix("scr_"): loss_parts.resolve(field, config[field]) for field in loss_parts.SHIPPED}

  def base_loss(logits: Array, labels: Array) -> Array:
    return config.ce_weight * losses.cross_entropy(logits, labels) + config.dice_weight * losses.soft_dice(
      logits, labels
    )

  def loss_fn(logits: Array, features: Features, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    terms = {
      "ce": losses.cross_entropy(logits, batch["label"]),
      "dice": losses.soft_dice(logits, batch["label"]),
    }
    regularization, regularization_terms = losses.self_regularization(
      features,
      key,
      scr_weight=config.scr_weight,
      ifd_weight=config.ifd_weight,
      order=config.ifd_order,
      p=config.ifd_p,
      stop_gradient=config.ifd_stop_gradient,
      **parts,
    )
    total = config.ce_weight * terms["ce"] + config.dice_weight * terms["dice"] + regularization
    if features.auxiliary:
      mean, heads = losses.deep_supervision(features.auxiliary, batch["label"], base_loss)
      terms |= {"deep_supervision": mean} | {f"deep_supervision/{name}": term for name, term in heads.items()}
      total += config.deep_supervision_weight * mean
    return total, terms | regularization_terms

  return loss_fn


def make_train_step(
  model: nn.Module,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  input_fn: InputFn | None = None,
  accumulate: int = 1,
  ema_decay: float = 0.0,
  most_skips: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """Builds one training step, to be jitted with the state donated.

  Args:
    model: network that sows its features, called as `model(images, train=True)`.
    loss_fn: of (logits, features, batch, key) -> (loss, terms).
    optimizer: of the parameters.
    input_fn: of (key, batch) -> batch, run on the device first: augmentation and resize. Its key is that of the run,
      the same at every step: it folds in what makes a slice of the stream unique.
    accumulate: micro-batches that a batch is taken in; must divide its slices. Micro-batch j holds the slices j, j +
      accumulate, ... (so that each device keeps its own). Gradients and metrics are means over micro-batches; all of
      them share the draws of the loss's key, batch statistics are updated by one after another. So terms that are
      means over slices (CE, SCR) equal those of the whole batch where the network treats slices one by one; Dice and
      IFD are means of what each micro-batch gives.
    ema_decay: of the moving average of the variables (`moving_average`); 0 keeps none.
    most_skips: updates in a row that may be left out because loss or gradient are not finite; the step after that
      stops the run. 0 stops at the first.

  Returns:
    Function of (state, batch) that gives the next state and scalar metrics: the loss's terms, "total", "grad_norm" and,
    where updates may be skipped, "skipped" (0 or 1). A batch holds "image" (B, H, W, channels) and what `loss_fn`
    wants, after `input_fn`; in a tree of the key "tables" nothing is split into micro-batches.
  """

  def gradients_of(state: TrainState, batch_stats: Any, batch: Batch, dropout_key: Array, loss_key: Array) -> tuple:
    if input_fn is not None:
      batch = input_fn(named_key(state.key, "input"), batch)

    def forward(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
      logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        batch["image"],
        train=True,
        mutable=["batch_stats", COLLECTION],
        rngs={"dropout": dropout_key},
      )
      features = Features.from_sown(updated[COLLECTION])
      loss, terms = loss_fn(logits, features, batch, loss_key)
      return loss, (terms | {"total": loss}, updated.get("batch_stats", {}))

    (_, (terms, new_stats)), gradients = jax.value_and_grad(forward, has_aux=True)(state.params)
    return gradients, terms, new_stats

  def accumulated(state: TrainState, batch: Batch, key: Array) -> tuple:
    dropout_key, loss_key = named_key(key, "dropout"), named_key(key, "loss")
    if accumulate == 1:
      return gradients_of(state, state.batch_stats, batch, dropout_key, loss_key)
    whole = {name: value for name, value in batch.items() if name in SHARED_BY_SLICES}
    split = {name: _micro_batches(value, accumulate) for name, value in batch.items() if name not in whole}

    def add(carry: tuple, part: tuple[Array, Batch]) -> tuple[tuple, None]:
      index, micro_batch = part
      batch_stats, total = carry
      gradients, terms, batch_stats = gradients_of(
        state, batch_stats, micro_batch | whole, jax.random.fold_in(dropout_key, index), loss_key
      )
      return (batch_stats, jax.tree.map(jnp.add, total, (gradients, terms))), None

    first = {name: value[0] for name, value in split.items()} | whole
    shapes = jax.eval_shape(gradients_of, state, state.batch_stats, first, dropout_key, loss_key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])
    (batch_stats, total), _ = jax.lax.scan(add, (state.batch_stats, zeros), (jnp.arange(accumulate), split))
    gradients, terms = jax.tree.map(lambda leaf: leaf / accumulate, total)
    return gradients, terms, batch_stats

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    gradients, metrics, batch_stats = accumulated(state, batch, jax.random.fold_in(state.key, state.step))
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
      ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, state.updates + 1, ema_decay)
    updated = state.replace(
      updates=state.updates + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )

    failed = ~(jnp.isfinite(metrics["total"]) & jnp.isfinite(grad_norm))
    skips = jnp.where(failed, state.skips + 1, 0)
    frozen = state.nonfinite_step != NO_STEP
    stops = ~frozen & (skips > most_skips)
    # Nothing is read back in the loop, so steps go on after a failure: they must not touch what will be looked at.
    keep = failed | frozen
    new_state = jax.tree.map(lambda new, old: jnp.where(keep, old, new), updated, state)
    halted = frozen | stops
    new_state = new_state.replace(
      step=jnp.where(halted, state.step, state.step + 1),
      skips=jnp.where(halted, state.skips, skips),
      nonfinite_step=jnp.where(stops, state.step, state.nonfinite_step),
    )
    if most_skips:
      metrics = metrics | {"skipped": failed.astype(jnp.float32)}
    return new_state, metrics | {"grad_norm": grad_norm}

  return step


@struct.dataclass
class StackedMetrics:
  """A step's scalar metrics in one array: reading them from a device costs a transfer each, however small.

  Attributes:
    values: (metrics,) float32.
    names: of the values, sorted.
  """

  values: Array
  names: tuple[str, ...] = struct.field(pytree_node=False)

  def named(self) -> dict[str, float]:
    """The metrics by name; reads them back."""
    return dict(zip(self.names, np.asarray(self.values).tolist(), strict=True))


def stack_metrics(
  step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]],
) -> Callable[[TrainState, Batch], tuple[TrainState, StackedMetrics]]:
  """A training step whose metrics come in one array.

  Args:
    step: from `make_train_step`.

  Returns:
    The same with `StackedMetrics`; to be jitted as a whole.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StackedMetrics]:
    state, metrics = step(state, batch)
    names = tuple(sorted(metrics))
    return state, StackedMetrics(jnp.stack([jnp.asarray(metrics[name], jnp.float32) for name in names]), names)

  return train_step


def _micro_batches(tree: Any, count: int) -> Any:
  """(B, ...) arrays to (count, B / count, ...): part j holds the rows j, j + count, ..., so that no row moves between
  the devices that the rows are split over.
  """
  return jax.tree.map(
    lambda array: jnp.moveaxis(array.reshape(array.shape[0] // count, count, *array.shape[1:]), 1, 0), tree
  )
