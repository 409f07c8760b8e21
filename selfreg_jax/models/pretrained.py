"""PyTorch weights to Flax variables: a table of names and layouts per network, applied strictly."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax.errors import UserError
from selfreg_jax.models.unet import UNet

_IGNORED_SUFFIXES = ("num_batches_tracked",)
_PREFIXES = ("module.",)


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one PyTorch tensor goes.

  Attributes:
    path: path in the Flax variables, such as ("params", "stem", "conv1", "kernel").
    axes: permutation that brings the PyTorch layout to Flax's.
  """

  path: tuple[str, ...]
  axes: tuple[int, ...]


_CONVOLUTION = (2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
_TRANSPOSED_CONVOLUTION = (2, 3, 1, 0)  # (in, out, h, w) -> (h, w, out, in), as transpose_kernel=True wants it
_VECTOR = (0,)


def _conv_block(torch_name: str, path: tuple[str, ...]) -> dict[str, Entry]:
  entries = {}
  for number in (1, 2):
    conv, norm = f"{torch_name}.double_conv.{3 * number - 3}", f"{torch_name}.double_conv.{3 * number - 2}"
    entries[f"{conv}.weight"] = Entry(("params", *path, f"conv{number}", "kernel"), _CONVOLUTION)
    entries[f"{norm}.weight"] = Entry(("params", *path, f"norm{number}", "scale"), _VECTOR)
    entries[f"{norm}.bias"] = Entry(("params", *path, f"norm{number}", "bias"), _VECTOR)
    entries[f"{norm}.running_mean"] = Entry(("batch_stats", *path, f"norm{number}", "mean"), _VECTOR)
    entries[f"{norm}.running_var"] = Entry(("batch_stats", *path, f"norm{number}", "var"), _VECTOR)
  return entries


def unet_entries(model: UNet) -> dict[str, Entry]:
  """PyTorch name -> entry for every tensor of the authors' `UNet`."""
  entries = _conv_block("inc", ("stem",))
  for i in range(1, len(model.widths)):
    entries |= _conv_block(f"down{i}.maxpool_conv.1", (f"down{i}",))
    entries |= _conv_block(f"up{i}.conv", (f"up{i}", "block"))
    if model.upsample == "transpose":
      entries[f"up{i}.up.weight"] = Entry(("params", f"up{i}", "conv_transpose", "kernel"), _TRANSPOSED_CONVOLUTION)
      entries[f"up{i}.up.bias"] = Entry(("params", f"up{i}", "conv_transpose", "bias"), _VECTOR)
  entries["outc.conv.weight"] = Entry(("params", "head", "kernel"), _CONVOLUTION)
  entries["outc.conv.bias"] = Entry(("params", "head", "bias"), _VECTOR)
  return entries


_ENTRIES: dict[type, Callable[[Any], dict[str, Entry]]] = {UNet: unet_entries}


def from_pytorch(
  weights: Mapping[str, Any] | str | os.PathLike, model: UNet, *, image_size: int = 224
) -> dict[str, Any]:
  """Flax variables from a PyTorch state dict with the authors' names.

  Args:
    weights: PyTorch name -> array (anything `numpy.asarray` takes), or the path of an `.npz` file that holds it. The
      prefix "module." of DataParallel is dropped; `num_batches_tracked` is not needed.
    model: the network to fill; its fields must fit the weights.
    image_size: rows and columns of the images that the network will see (it only serves to find the variables' shapes).

  Returns:
    {"params": ..., "batch_stats": ...} in the model's parameter dtype.

  Raises:
    UserError: the weights do not fit the model; every missing, unused and mis-shaped entry is named.
  """
  if type(model) not in _ENTRIES:
    raise UserError(f"no PyTorch names are known for {type(model).__name__}")
  tensors = _without_prefix(_read(weights))
  entries = _ENTRIES[type(model)](model)
  channels = _input_channels(tensors)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, channels)), train=False)
  )
  shapes = flax.traverse_util.flatten_dict(shapes)

  problems = [f"missing: {name}" for name in entries if name not in tensors]
  problems += [f"unused: {name} {np.shape(tensors[name])}" for name in tensors if name not in entries]
  variables = {}
  for name, entry in entries.items():
    if name not in tensors:
      continue
    array = np.asarray(tensors[name])
    expected = shapes[entry.path]
    if array.ndim == len(entry.axes) and array.transpose(entry.axes).shape == expected.shape:
      variables[entry.path] = jnp.asarray(array.transpose(entry.axes), expected.dtype)
    else:
      problems.append(f"shape of {name}: {array.shape}, the model has {expected.shape} at {'/'.join(entry.path)}")
  if problems:
    raise UserError(
      f"the weights do not fit this {type(model).__name__} ({len(problems)} entries):\n  " + "\n  ".join(problems)
    )
  return flax.traverse_util.unflatten_dict(variables)


def _read(weights: Mapping[str, Any] | str | os.PathLike) -> Mapping[str, Any]:
  if isinstance(weights, Mapping):
    return weights
  if not os.fspath(weights).endswith(".npz"):
    raise UserError(f"{weights}: weights must be a state dict or an .npz file")
  try:
    with np.load(weights) as arrays:
      return dict(arrays)
  except (OSError, ValueError) as error:
    raise UserError(f"{weights}: cannot be read as .npz ({error})") from error


def _without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
  for prefix in _PREFIXES:
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return {name: tensor for name, tensor in tensors.items() if not name.endswith(_IGNORED_SUFFIXES)}


def _input_channels(tensors: Mapping[str, Any]) -> int:
  stem = "inc.double_conv.0.weight"
  if stem not in tensors or np.ndim(tensors[stem]) != 4:
    found = ", ".join(sorted(tensors)[:5]) or "nothing"
    raise UserError(f"not a UNet of the authors': no four-dimensional {stem} among the weights (found {found}, ...)")
  return np.shape(tensors[stem])[1]
