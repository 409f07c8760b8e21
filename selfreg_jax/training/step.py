"""The training state and one training step, built from parts that users can replace."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct

from selfreg_jax import losses
from selfreg_jax.features import COLLECTION, Features

Array = jax.Array
Batch = dict[str, Array]
LossFn = Callable[[Array, Features, Batch, Array], tuple[Array, dict[str, Array]]]
InputFn = Callable[[Array, Batch], Batch]
NO_STEP = -1


@struct.dataclass
class TrainState:
  """All that a step changes, and the key that it does not.

  Attributes:
    step: () int32, steps taken.
    params: parameters.
    batch_stats: running statistics.
    opt_state: of the optimizer.
    key: typed PRNG key of the run; a step uses `fold_in(key, step)`.
    nonfinite_step: () int32, the first step whose loss or gradient was not finite, or -1. From that step on the state
      is frozen as it was before it.
  """

  step: Array
  params: Any
  batch_stats: Any
  opt_state: Any
  key: Array
  nonfinite_step: Array


def create_state(variables: dict[str, Any], optimizer: optax.GradientTransformation, key: Array) -> TrainState:
  """The state before the first step.

  Args:
    variables: {"params", "batch_stats"} from `model.init` or `from_pytorch`.
    optimizer: whose state is initialized.
    key: typed PRNG key of the run.

  Returns:
    The state.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables.get("batch_stats", {}),
    opt_state=optimizer.init(variables["params"]),
    key=key,
    nonfinite_step=jnp.full((), NO_STEP, jnp.int32),
  )


def named_key(key: Array, name: str) -> Array:
  """An independent key for a named use, the same on every device and after every resume."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def make_loss(config: ml_collections.ConfigDict) -> LossFn:
  """The loss of `config.loss`: ce_weight * CE + dice_weight * Dice + self-regularization.

  Args:
    config: the section `loss` of a run's config.

  Returns:
    Function of (logits (B, H, W, classes), features, batch with "label" (B, H, W), key) that gives the loss and its
    terms: "ce", "dice", and those of `self_regularization`.
  """

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
    )
    base = config.ce_weight * terms["ce"] + config.dice_weight * terms["dice"]
    return base + regularization, terms | regularization_terms

  return loss_fn


def make_train_step(
  model: nn.Module,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  input_fn: InputFn | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """Builds one training step, to be jitted with the state donated.

  Args:
    model: network that sows its features, called as `model(images, train=True)`.
    loss_fn: of (logits, features, batch, key) -> (loss, terms).
    optimizer: of the parameters.
    input_fn: of (key, batch) -> batch, run on the device first: augmentation and resize. Its key is that of the run,
      the same at every step: it folds in what makes a slice of the stream unique.

  Returns:
    Function of (state, batch) that gives the next state and scalar metrics: the loss's terms, "total" and "grad_norm".
    A batch holds "image" (B, H, W, channels) and what `loss_fn` wants, after `input_fn`.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(state.key, state.step)
    if input_fn is not None:
      batch = input_fn(named_key(state.key, "input"), batch)

    def forward(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
      logits, updated = model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        mutable=["batch_stats", COLLECTION],
        rngs={"dropout": named_key(key, "dropout")},
      )
      features = Features.from_sown(updated[COLLECTION])
      loss, terms = loss_fn(logits, features, batch, named_key(key, "loss"))
      return loss, (terms, updated.get("batch_stats", {}))

    (loss, (terms, batch_stats)), gradients = jax.value_and_grad(forward, has_aux=True)(state.params)
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)

    failed = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    first_failure = jnp.where(failed & (state.nonfinite_step == NO_STEP), state.step, state.nonfinite_step)
    advanced = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    # Nothing is read back in the loop, so steps go on after a failure: they must not touch what will be looked at.
    new_state = jax.tree.map(lambda new, old: jnp.where(first_failure == NO_STEP, new, old), advanced, state)
    return new_state.replace(nonfinite_step=first_failure), terms | {"total": loss, "grad_norm": grad_norm}

  return step
