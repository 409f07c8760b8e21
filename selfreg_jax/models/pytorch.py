"""PyTorch weights to Flax variables and back: a table of names and layouts per network, applied strictly."""

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax.errors import UserError
from selfreg_jax.models import swin_unet, weight_files
from selfreg_jax.models.swin_unet import SwinUNet
from selfreg_jax.models.unet import UNet

Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]

# Buffers that follow from the architecture: not needed to load, and made anew by `to_pytorch`.
_BUFFERS = ("num_batches_tracked", "relative_position_index", "attn_mask")
_PREFIXES = ("module.", "swin_unet.")


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one PyTorch tensor goes.

  Attributes:
    path: path in the Flax variables, such as ("params", "stem", "conv1", "kernel").
    axes: permutation that brings the PyTorch layout to Flax's.
    fit: function of (array in Flax's layout, wanted shape) that resizes an array of another shape, or returns None
      where that makes no sense; None: never resized.
  """

  path: tuple[str, ...]
  axes: tuple[int, ...]
  fit: Transform | None = None


_CONVOLUTION = (2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
_TRANSPOSED_CONVOLUTION = (2, 3, 1, 0)  # (in, out, h, w) -> (h, w, out, in), as transpose_kernel=True wants it
_LINEAR = (1, 0)  # (out, in) -> (in, out)
_TABLE = (0, 1)
_VECTOR = (0,)


def average_input_channels(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """A first convolution for images with another number of channels: the mean over its own, scaled by their ratio.

  An image that repeats one channel is then answered as before, whatever the number of its channels.

  Args:
    kernel: (h, w, in, out).
    shape: (h, w, wanted in, out).

  Returns:
    The kernel of the wanted shape; None where more than the input channels differ.
  """
  channels, wanted = kernel.shape[2], shape[2]
  if kernel.shape != (*shape[:2], channels, shape[3]):
    return None
  return np.broadcast_to(kernel.mean(axis=2, keepdims=True) * (channels / wanted), shape)


def resize_bias_table(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """A table of relative-position biases for another window, by PyTorch's bicubic interpolation.

  Args:
    table: ((2w - 1)^2, heads).
    shape: ((2v - 1)^2, heads).

  Returns:
    The table of the wanted shape; None where the heads differ or a side is no whole number.
  """
  side, wanted = (round(length**0.5) for length in (table.shape[0], shape[0]))
  if table.shape[1] != shape[1] or side**2 != table.shape[0] or wanted**2 != shape[0]:
    return None
  matrix = bicubic_matrix(side, wanted)
  resized = np.einsum("ir,jc,rch->ijh", matrix, matrix, table.reshape(side, side, -1).astype(np.float64))
  return resized.reshape(shape).astype(table.dtype)


def bicubic_matrix(size: int, resized: int) -> np.ndarray:
  """The matrix of `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` along one axis.

  Keys' cubic convolution with a = -0.75, half-pixel centres, edges repeated, no smoothing when it shrinks.
  (`jax.image.resize` has a = -0.5.)

  Args:
    size: samples of the input.
    resized: samples of the output.

  Returns:
    (resized, size) float64.
  """
  a = -0.75
  centers = (np.arange(resized) + 0.5) * size / resized - 0.5
  first = np.floor(centers).astype(int) - 1
  matrix = np.zeros((resized, size))
  for tap in range(4):
    distance = np.abs(centers - (first + tap))
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    np.add.at(matrix, (np.arange(resized), np.clip(first + tap, 0, size - 1)), np.where(distance <= 1, near, far))
  return matrix


def unet_entries(model: UNet) -> dict[str, Entry]:
  """PyTorch name -> entry for every tensor of the authors' `UNet`."""
  entries = _conv_block("inc", ("stem",), average_input_channels)
  for i in range(1, len(model.widths)):
    entries |= _conv_block(f"down{i}.maxpool_conv.1", (f"down{i}",))
    entries |= _conv_block(f"up{i}.conv", (f"up{i}", "block"))
    if model.upsample == "transpose":
      entries[f"up{i}.up.weight"] = Entry(("params", f"up{i}", "conv_transpose", "kernel"), _TRANSPOSED_CONVOLUTION)
      entries[f"up{i}.up.bias"] = Entry(("params", f"up{i}", "conv_transpose", "bias"), _VECTOR)
  entries["outc.conv.weight"] = Entry(("params", "head", "kernel"), _CONVOLUTION)
  entries["outc.conv.bias"] = Entry(("params", "head", "bias"), _VECTOR)
  return entries


def _conv_block(torch_name: str, path: tuple[str, ...], fit_first: Transform | None = None) -> dict[str, Entry]:
  entries = {}
  for number in (1, 2):
    conv, norm = f"{torch_name}.double_conv.{3 * number - 3}", f"{torch_name}.double_conv.{3 * number - 2}"
    fit = fit_first if number == 1 else None
    entries[f"{conv}.weight"] = Entry(("params", *path, f"conv{number}", "kernel"), _CONVOLUTION, fit)
    entries |= _norm(norm, (*path, f"norm{number}"))
    entries[f"{norm}.running_mean"] = Entry(("batch_stats", *path, f"norm{number}", "mean"), _VECTOR)
    entries[f"{norm}.running_var"] = Entry(("batch_stats", *path, f"norm{number}", "var"), _VECTOR)
  return entries


def swin_unet_entries(model: SwinUNet) -> dict[str, Entry]:
  """PyTorch name -> entry for every tensor of the authors' Swin-Unet, without the prefix `swin_unet.`."""
  stages = len(model.depths)
  entries = {
    "patch_embed.proj.weight": Entry(("params", "patch_embed", "kernel"), _CONVOLUTION, average_input_channels),
    "patch_embed.proj.bias": Entry(("params", "patch_embed", "bias"), _VECTOR),
    **_norm("patch_embed.norm", ("patch_norm",)),
    **_norm("norm", ("norm",)),
    **_norm("norm_up", ("norm_up",)),
    **_expanding("up", "expand_final"),
    "output.weight": Entry(("params", "head", "kernel"), _CONVOLUTION),
  }
  for i, depth in enumerate(model.depths):
    for j in range(depth):
      entries |= _swin_block(f"layers.{i}.blocks.{j}", f"encoder{i + 1}_block{j + 1}")
    if i < stages - 1:
      entries |= _norm(f"layers.{i}.downsample.norm", (f"merge{i + 1}", "norm"))
      entries |= _linear(f"layers.{i}.downsample.reduction", (f"merge{i + 1}", "reduction"), bias=False)
  # Expansion d leads into decoder stage d; PyTorch keeps it with the stage before, and layers_up.0 is nothing else.
  entries |= _expanding("layers_up.0", "expand1")
  for d in range(1, stages):
    entries |= _linear(f"concat_back_dim.{d}", (f"concat{d}",))
    for j in range(model.depths[stages - 1 - d]):
      entries |= _swin_block(f"layers_up.{d}.blocks.{j}", f"decoder{d}_block{j + 1}")
    if d < stages - 1:
      entries |= _expanding(f"layers_up.{d}.upsample", f"expand{d + 1}")
  return entries


def _swin_block(torch_name: str, name: str) -> dict[str, Entry]:
  table = Entry(("params", name, "attention", "relative_position_bias_table"), _TABLE, resize_bias_table)
  return {
    **_norm(f"{torch_name}.norm1", (name, "norm1")),
    f"{torch_name}.attn.relative_position_bias_table": table,
    **_linear(f"{torch_name}.attn.qkv", (name, "attention", "qkv")),
    **_linear(f"{torch_name}.attn.proj", (name, "attention", "proj")),
    **_norm(f"{torch_name}.norm2", (name, "norm2")),
    **_linear(f"{torch_name}.mlp.fc1", (name, "mlp1")),
    **_linear(f"{torch_name}.mlp.fc2", (name, "mlp2")),
  }


def _expanding(torch_name: str, name: str) -> dict[str, Entry]:
  return _linear(f"{torch_name}.expand", (name, "expand"), bias=False) | _norm(f"{torch_name}.norm", (name, "norm"))


def _linear(torch_name: str, path: tuple[str, ...], *, bias: bool = True) -> dict[str, Entry]:
  weight = {f"{torch_name}.weight": Entry(("params", *path, "kernel"), _LINEAR)}
  return weight | ({f"{torch_name}.bias": Entry(("params", *path, "bias"), _VECTOR)} if bias else {})


def _norm(torch_name: str, path: tuple[str, ...]) -> dict[str, Entry]:
  return {
    f"{torch_name}.weight": Entry(("params", *path, "scale"), _VECTOR),
    f"{torch_name}.bias": Entry(("params", *path, "bias"), _VECTOR),
  }


_ENTRIES: dict[type, Callable[[Any], dict[str, Entry]]] = {UNet: unet_entries, SwinUNet: swin_unet_entries}
_INPUT_KERNELS: dict[type, str] = {UNet: "inc.double_conv.0.weight", SwinUNet: "patch_embed.proj.weight"}
HEADS: dict[type, str] = {UNet: "outc.conv.weight", SwinUNet: "output.weight"}


@dataclasses.dataclass(frozen=True)
class Conversion:
  """Flax variables made from PyTorch weights, as far as they fit, and what did not simply go over.

  Attributes:
    filled: the variables that the weights gave, by path, in the model's parameter dtype.
    initialize: function of a PRNG key that gives all variables of the model.
    missing: names that the model wants and the weights lack; they keep initial values.
    unused: name and shape of the weights that the model has no place for.
    misfits: name and both shapes of weights that do not fit; the model keeps initial values there.
    resized: name and both shapes of weights that were resized to fit.
    mirrored: number of decoder tensors that were filled from the encoder of an ImageNet checkpoint; None where the
      weights are of a whole network.
  """

  filled: dict[tuple[str, ...], jax.Array]
  initialize: Callable[[jax.Array], dict[str, Any]]
  missing: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  misfits: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()
  mirrored: int | None = None

  def variables(self, key: jax.Array | None = None) -> dict[str, Any]:
    """{"params": ..., "batch_stats": ...}; where weights are missing, initial values from the key, or from seed 0."""
    filled = self.filled
    if self.missing or self.misfits:
      initial = jax.jit(self.initialize)(jax.random.key(0) if key is None else key)
      filled = flax.traverse_util.flatten_dict(initial) | filled
    return {"params": {}, "batch_stats": {}} | flax.traverse_util.unflatten_dict(filled)

  def lines(self) -> list[str]:
    """What is worth saying, a line each; nothing where every weight went over as it was."""
    head = f"{len(self.filled)} tensors taken"
    if self.mirrored is not None:
      head += f"; an ImageNet encoder: {self.mirrored} of them mirrored into the decoder"
    details = [
      *(f"resized: {text}" for text in self.resized),
      *(f"does not fit, initial values kept: {text}" for text in self.misfits),
      *(f"not in the weights, initial values kept: {text}" for text in self.missing),
      *(f"not used: {text}" for text in self.unused),
    ]
    return [head, *details] if details else []


def convert(
  weights: Mapping[str, Any] | str | os.PathLike,
  model: nn.Module,
  *,
  image_size: int = 224,
  channels: int | None = None,
) -> Conversion:
  """Fills a network's variables with PyTorch weights as far as they fit, and says what did not.

  Args:
    weights: see `from_pytorch`.
    model: see `from_pytorch`.
    image_size: see `from_pytorch`.
    channels: see `from_pytorch`.

  Returns:
    The variables and the report.

  Raises:
    UserError: the weights cannot be read, are of another kind of network, or hold NaN or infinite values.
  """
  if type(model) not in _ENTRIES:
    raise UserError(f"no PyTorch names are known for {type(model).__name__}")
  where = "the weights" if isinstance(weights, Mapping) else os.fspath(weights)
  content = weights if isinstance(weights, Mapping) else weight_files.read_weights(weights)
  tensors, _ = weight_files.find_tensors(content, where)
  tensors = {name: array for name, array in _without_prefixes(tensors).items() if not name.endswith(_BUFFERS)}
  entries = _ENTRIES[type(model)](model)
  input_kernel = _INPUT_KERNELS[type(model)]
  if np.ndim(tensors.get(input_kernel)) != 4:
    found = ", ".join(sorted(tensors)[:5]) or "nothing"
    raise UserError(
      f"{where}: not weights of the authors' {type(model).__name__}: no four-dimensional {input_kernel} among them "
      f"(found {found}, ...)"
    )
  bad = [name for name, array in tensors.items() if array.dtype.kind not in "iub" and not np.isfinite(array).all()]
  if bad:
    raise UserError(f"{where}: NaN or infinite values in {', '.join(bad[:5])}")

  encoder_only = _is_encoder_only(tensors, model)
  copies = _mirrored_encoder(tensors, entries) if encoder_only else {}
  unused = [f"{name} {array.shape}" for name, array in tensors.items() if name not in entries]
  tensors |= copies
  initialize = functools.partial(
    model.init, images=jnp.zeros((1, image_size, image_size, channels or tensors[input_kernel].shape[1])), train=False
  )
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(initialize, jax.random.key(0)))
  filled, misfits, resized = {}, [], []
  for name, entry in entries.items():
    if name not in tensors:
      continue
    array, wanted = tensors[name], shapes[entry.path]
    fitted = array.transpose(entry.axes) if array.ndim == len(entry.axes) else None
    if fitted is not None and fitted.shape != wanted.shape:
      fitted = None if entry.fit is None else entry.fit(fitted, wanted.shape)
      if fitted is not None:
        resized.append(f"{name} {array.shape} to {_torch_shape(wanted.shape, entry)}")
    if fitted is None:
      misfits.append(f"{name} {array.shape}, the model has {_torch_shape(wanted.shape, entry)}")
    else:
      filled[entry.path] = jnp.asarray(fitted, wanted.dtype)
  missing = [name for name in entries if name not in tensors]
  mirrored = sum(entries[name].path in filled for name in copies) if encoder_only else None
  return Conversion(
    filled=filled,
    initialize=initialize,
    missing=tuple(missing),
    unused=tuple(unused),
    misfits=tuple(misfits),
    resized=tuple(resized),
    mirrored=mirrored,
  )


def from_pytorch(
  weights: Mapping[str, Any] | str | os.PathLike,
  model: nn.Module,
  *,
  image_size: int = 224,
  channels: int | None = None,
  strict: bool = True,
) -> dict[str, Any]:
  """Flax variables from PyTorch weights with the authors' names.

  The prefixes "module." (DataParallel) and "swin_unet." are dropped, and a checkpoint's state dict is found under
  "model" or "state_dict". Relative-position bias tables are resized to the model's window, and the first convolution is
  averaged over its input channels where `channels` differ; a warning says so.

  Weights of an ImageNet Swin classifier (encoder stages only) fill the encoder, and encoder stage i is also copied into
  decoder stage 3 - i; what else the decoder has keeps initial values (seed 0). Such weights are taken as far as they
  fit, strict or not, and a warning lists what was dropped and what is missing.

  Args:
    weights: PyTorch name -> array (anything `numpy.asarray` takes, or tensors), or the path of a `.pth`, `.safetensors`
      or `.npz` file. A `.pth` file is read without PyTorch, tensors only.
    model: the network to fill, a `UNet` or `SwinUNet`; its fields must fit the weights.
    image_size: rows and columns of the images that the network will see (it only serves to find the variables' shapes).
    channels: of these images; None takes those of the weights.
    strict: refuse weights that lack an entry, hold another one, or one of the wrong shape; False keeps initial values
      (seed 0) there, and a warning names every one.

  Returns:
    {"params": ..., "batch_stats": ...} in the model's parameter dtype; no "batch_stats" where the network has none.

  Raises:
    UserError: the file cannot be read, or the weights do not fit the model; every missing, unused and mis-shaped entry
      is named.
  """
  conversion = convert(weights, model, image_size=image_size, channels=channels)
  if strict:
    check_complete(conversion, model)
  if lines := conversion.lines():
    warnings.warn("PyTorch weights:\n  " + "\n  ".join(lines), stacklevel=2)
  return {name: tree for name, tree in conversion.variables().items() if tree}


def check_complete(conversion: Conversion, model: nn.Module, *, but_head: bool = False) -> None:
  """Raises UserError unless the weights gave the whole network, or are those of an ImageNet encoder that fits.

  Args:
    conversion: what became of the weights.
    model: the network that they should fill.
    but_head: a head for another number of classes does not matter.
  """
  if conversion.mirrored is not None:
    if len(conversion.filled) < len(conversion.misfits):
      raise UserError(
        f"an ImageNet checkpoint whose blocks do not fit this {type(model).__name__} ({len(conversion.misfits)} "
        "entries), among them:\n  " + "\n  ".join(conversion.misfits[:8])
      )
    return
  misfits = [text for text in conversion.misfits if not (but_head and is_head(text, model))]
  problems = [
    *(f"missing: {text}" for text in conversion.missing),
    *(f"unused: {text}" for text in conversion.unused),
    *(f"shape of {text}" for text in misfits),
  ]
  if problems:
    raise UserError(
      f"the weights do not fit this {type(model).__name__} ({len(problems)} entries):\n  " + "\n  ".join(problems)
    )


def is_head(text: str, model: nn.Module) -> bool:
  """Whether a line of a report begins with the name of a tensor of the classification head."""
  return text.startswith(HEADS[type(model)].removesuffix("weight"))


def to_pytorch(
  variables: Mapping[str, Any], model: nn.Module, *, image_size: int = 224, prefix: str = ""
) -> dict[str, np.ndarray]:
  """The reverse of `from_pytorch`: a state dict that the authors' code loads, its buffers included.

  Args:
    variables: {"params": ..., "batch_stats": ...} of the model.
    model: the network they belong to, a `UNet` or `SwinUNet`.
    image_size: rows and columns of the images; the attention masks among a Swin-Unet's buffers depend on it.
    prefix: put before every name; the authors' own Swin-Unet checkpoints have "swin_unet.".

  Returns:
    PyTorch name -> array in PyTorch's layout. `num_batches_tracked` is 0, which matters only to averages that PyTorch
    makes without a momentum.

  Raises:
    UserError: no PyTorch names are known for the network.
    KeyError: the variables are not of this network.
  """
  if type(model) not in _ENTRIES:
    raise UserError(f"no PyTorch names are known for {type(model).__name__}")
  flat = flax.traverse_util.flatten_dict(dict(variables))
  tensors = {
    name: np.ascontiguousarray(np.asarray(flat[entry.path]).transpose(np.argsort(entry.axes)))
    for name, entry in _ENTRIES[type(model)](model).items()
  }
  buffers = _swin_buffers(model, image_size) if isinstance(model, SwinUNet) else _batch_counts(tensors)
  return {prefix + name: tensor for name, tensor in (tensors | buffers).items()}


def _batch_counts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
  return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


def _swin_buffers(model: SwinUNet, image_size: int) -> dict[str, np.ndarray]:
  index = swin_unet.relative_position_index(model.window).astype(np.int64)
  buffers = {}
  stages = len(model.depths)
  for i, depth in enumerate(model.depths):
    side = image_size // swin_unet.PATCH // 2**i
    stage_names = [f"layers.{i}"] + ([f"layers_up.{stages - 1 - i}"] if i < stages - 1 else [])
    for stage in stage_names:
      for j in range(depth):
        buffers[f"{stage}.blocks.{j}.attn.relative_position_index"] = index
        if shift := swin_unet.block_shift((side, side), model.window, j):
          mask = swin_unet.shift_mask(side, side, model.window, shift)
          buffers[f"{stage}.blocks.{j}.attn_mask"] = mask
  return buffers


def _without_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  for prefix in _PREFIXES:  # DataParallel's goes around the whole network, and so stands first
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return dict(tensors)


def _is_encoder_only(tensors: Mapping[str, np.ndarray], model: nn.Module) -> bool:
  return isinstance(model, SwinUNet) and not any(
    name.startswith(("layers_up.", "concat_back_dim.")) for name in tensors
  )


def _mirrored_encoder(tensors: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
  """Each encoder block under the name of the decoder block of the same resolution: layers.i -> layers_up.(last - i)."""
  last = max((int(name.split(".")[1]) for name in entries if name.startswith("layers.")), default=0)
  copies = {}
  for name, tensor in tensors.items():
    if match := re.fullmatch(r"layers\.(\d+)\.(blocks\..*)", name):
      mirrored = f"layers_up.{last - int(match[1])}.{match[2]}"
      if mirrored in entries:
        copies[mirrored] = tensor
  return copies


def _torch_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in np.argsort(entry.axes))
