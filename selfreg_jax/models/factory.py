"""From the section `model` of a config to a network."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from selfreg_jax.models.unet import UNet


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
  """The network that a run's config describes.

  Args:
    config: the section `model` of a run's config.
    num_classes: classes, background included.

  Returns:
    The Linen module.
  """
  builders = {"unet": functools.partial(UNet, widths=tuple(config.widths), upsample=config.upsample)}
  return builders[config.name](num_classes=num_classes, dtype=jnp.dtype(config.dtype))


def abstract_variables(model: nn.Module, image_size: int, channels: int) -> dict[str, Any]:
  """Shapes and dtypes of a network's variables."""
  images = jnp.zeros((1, image_size, image_size, channels))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
