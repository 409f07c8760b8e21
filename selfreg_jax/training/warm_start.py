"""Weights to start a training from instead of random ones: of a workdir of ours, or of a PyTorch file."""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax

from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.errors import UserError
from selfreg_jax.models import pytorch
from selfreg_jax.training import interchange
from selfreg_jax.training.checkpoints import load_trained


def check_exists(source: str) -> None:
  """Raises UserError unless the file or folder of `config.init_from` is there, or the field is empty."""
  if source and not pathlib.Path(source).exists():
    raise UserError(
      f"config.init_from = {source!r}: no such workdir or file; give --config.init_from=PATH to weights that you have, "
      "or --config.init_from= to start from random ones"
    )


def load(
  source: str | os.PathLike, model: nn.Module, dataset: DatasetInfo, image_size: int, key: jax.Array
) -> tuple[dict[str, Any], list[str]]:
  """Variables for a network, from weights that may have been trained for something else.

  A head for another number of classes keeps initial values; the window's position biases and the first convolution's
  input channels are resized as `pytorch.from_pytorch` says; an ImageNet Swin encoder is mirrored into the decoder.
  Everything else must fit.

  Args:
    source: a workdir of `train.py` or of `selfreg_jax.models.pretrained` (its best checkpoint), or a `.pth`,
      `.safetensors` or `.npz` file of PyTorch weights.
    model: the network to fill.
    dataset: what it will be trained on.
    image_size: pixels a side of what the network sees.
    key: PRNG key of the initial values where the weights give none.

  Returns:
    (variables, what is to be said about them, a line each).

  Raises:
    UserError: the source cannot be read, or its weights do not fit.
  """
  notes, weights = [], pathlib.Path(source)
  try:
    if weights.is_dir():
      trained = load_trained(weights)
      # PyTorch's names are the common tongue of all weights: one report and one set of rules serves them all.
      weights = interchange.state_dict(trained)
      differing = trained.dataset.differences(dataset)
      notes = [f"note     {name} of the weights: {before}; now {now}" for name, before, now in differing]
    conversion = pytorch.convert(weights, model, image_size=image_size, channels=dataset.channels)
    pytorch.check_complete(conversion, model, but_head=True)
  except UserError as error:
    raise UserError(f"config.init_from = {str(source)!r}: {error}") from error
  return conversion.variables(key), [*interchange.report_lines(source, conversion), *notes]
