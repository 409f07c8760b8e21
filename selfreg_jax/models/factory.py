"""From the section `model` of a config to a network."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from selfreg_jax.models.swin_unet import SwinUNet
from selfreg_jax.models.unet import UNet


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
  """The network that a run's config describes.

  Args:
    config: the section `model` of a run's config.
    num_classes: classes, background included.

  Returns:
    The Linen module.
  """
  builders = {"unet": _build_unet, "swin_unet": _build_swin_unet}
  return builders[config.name](config)(num_classes=num_classes, dtype=jnp.dtype(config.dtype))


def _build_unet(config: ml_collections.ConfigDict) -> functools.partial:
  return functools.partial(
    UNet,
    widths=tuple(config.widths),
    upsample=config.upsample,
    remat=config.remat,
    deep_supervision=_deep_supervision(config),
  )


def _build_swin_unet(config: ml_collections.ConfigDict) -> functools.partial:
  return functools.partial(
    SwinUNet,
    embed_dim=config.embed_dim,
    depths=tuple(config.depths),
    heads=tuple(config.heads),
    window=config.window,
    drop_path=config.drop_path,
    remat=config.remat,
    deep_supervision=_deep_supervision(config),
  )


def _deep_supervision(config: ml_collections.ConfigDict) -> bool:
  return config.get("deep_supervision", False)  # a checkpoint may be older than the field


def initial_variables(model: nn.Module, key: jax.Array, image_size: int, channels: int) -> dict[str, Any]:
  """Random variables of a network, {"params": ..., "batch_stats": ...}, the latter empty where it keeps none."""
  images = jnp.zeros((1, image_size, image_size, channels))
  return {"batch_stats": {}} | model.init(key, images, train=False)


def abstract_variables(model: nn.Module, image_size: int, channels: int) -> dict[str, Any]:
  """Shapes and dtypes of a network's variables."""
  return jax.eval_shape(lambda: initial_variables(model, jax.random.key(0), image_size, channels))
