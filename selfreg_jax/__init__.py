"""SelfReg-UNet in JAX and Flax: segmentation networks that supervise and de-duplicate their own features.

The public names are imported on first use, so that commands which need no accelerator (data preparation and its worker
processes) do not pay for importing JAX.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
  "Features": "selfreg_jax.features",
  "Taps": "selfreg_jax.features",
  "UNet": "selfreg_jax.models.unet",
  "SwinUNet": "selfreg_jax.models.swin_unet",
  "from_pytorch": "selfreg_jax.models.pytorch",
  "to_pytorch": "selfreg_jax.models.pytorch",
  "cross_entropy": "selfreg_jax.losses",
  "soft_dice": "selfreg_jax.losses",
  "internal_feature_distillation": "selfreg_jax.losses",
  "semantic_consistency": "selfreg_jax.losses",
  "self_regularization": "selfreg_jax.losses",
  "evaluate_case": "selfreg_jax.evaluation.protocols",
  "load": "selfreg_jax.predictor",
}

__all__ = [
  "Features",
  "SwinUNet",
  "Taps",
  "UNet",
  "cross_entropy",
  "evaluate_case",
  "from_pytorch",
  "internal_feature_distillation",
  "load",
  "self_regularization",
  "semantic_consistency",
  "soft_dice",
  "to_pytorch",
]

if TYPE_CHECKING:
  from selfreg_jax.evaluation.protocols import evaluate_case
  from selfreg_jax.features import Features, Taps
  from selfreg_jax.losses import (
    cross_entropy,
    internal_feature_distillation,
    self_regularization,
    semantic_consistency,
    soft_dice,
  )
  from selfreg_jax.models.pytorch import from_pytorch, to_pytorch
  from selfreg_jax.models.swin_unet import SwinUNet
  from selfreg_jax.models.unet import UNet
  from selfreg_jax.predictor import load


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOME])
