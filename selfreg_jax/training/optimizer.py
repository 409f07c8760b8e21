"""Optimizers and learning rates of the paper's recipes, numerically those of PyTorch."""

import jax.numpy as jnp
import ml_collections
import optax


def poly_rate(base: float, steps: int, power: float = 0.9) -> optax.Schedule:
  """The authors' polynomial decay, which is written after each step and so lags one behind.

  Step 0 uses base, step i >= 1 uses base * (1 - (i - 1) / steps) ** power: steps 0 and 1 have the same rate.

  Args:
    base: first rate.
    steps: of the whole run.
    power: exponent.

  Returns:
    Function of the step.
  """

  def schedule(step):
    done = jnp.maximum(jnp.asarray(step) - 1, 0) / steps
    return base * jnp.maximum(1 - done, 0) ** power

  return schedule


def cosine_restarts(base: float, minimum: float, period: int, steps_per_epoch: int) -> optax.Schedule:
  """Cosine annealing with warm restarts that moves once an epoch (UCTransNet's settings for GlaS and MoNuSeg).

  Args:
    base: rate at each restart.
    minimum: rate that the cosine would reach at the end of a period.
    period: epochs between restarts.
    steps_per_epoch: steps of an epoch.

  Returns:
    Function of the step.
  """

  def schedule(step):
    epoch = jnp.asarray(step) // steps_per_epoch
    return minimum + (base - minimum) * (1 + jnp.cos(jnp.pi * (epoch % period) / period)) / 2

  return schedule


def make_schedule(config: ml_collections.ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate of `config.optimizer` as a function of the step.

  Args:
    config: the section `optimizer` of a run's config.
    steps: of the whole run.
    steps_per_epoch: ceil(slices / batch size).

  Returns:
    Function of the step.
  """
  if config.schedule == "poly":
    return poly_rate(config.learning_rate, steps, config.poly_power)
  if config.schedule == "cosine":
    return cosine_restarts(config.learning_rate, config.cosine_minimum, config.cosine_period, steps_per_epoch)
  return optax.constant_schedule(config.learning_rate)


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`.

  SGD and Adam couple the weight decay as PyTorch does: it is added to the gradient of ALL parameters, before momentum.
  AdamW decouples it. Epsilon and betas are PyTorch's defaults, which are optax's. Clipping by the global norm comes
  first, as `clip_grad_norm_` does.

  Args:
    config: the section `optimizer` of a run's config.
    schedule: learning rate by step.

  Returns:
    The gradient transformation.
  """
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  if config.name == "adamw":
    return optax.chain(clip, optax.adamw(schedule, weight_decay=config.weight_decay))
  direction = optax.trace(decay=config.momentum) if config.name == "sgd" else optax.scale_by_adam()
  return optax.chain(
    clip, optax.add_decayed_weights(config.weight_decay), direction, optax.scale_by_learning_rate(schedule)
  )
