"""PyTorch weights to Flax variables and back: a table of names and layouts per network, applied strictly."""

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax import mesh as meshes
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


@dataclasses.dataclass(frozen=True)
class _Table:
  """What is known of a network's PyTorch names: all entries, the first convolution, the beginning of the head's."""

  entries: Callable[[Any], dict[str, Entry]]
  input_kernel: str
  head: str


_TABLES: dict[type, _Table] = {
  UNet: _Table(unet_entries, "inc.double_conv.0.weight", "outc.conv."),
  SwinUNet: _Table(swin_unet_entries, "patch_embed.proj.weight", "output."),
}
_ENCODER = ("patch_embed.", "layers.", "norm.")  # what an ImageNet Swin classifier shares with the Swin-Unet
_DECODER = ("layers_up.", "concat_back_dim.")
_BLOCK = re.compile(r"layers(_up)?\.\d+\.(blocks\.\d+|downsample|upsample)\.|(down|up)\d+\.")


def _table(model: nn.Module) -> _Table:
  if type(model) not in _TABLES:
    raise UserError(f"no PyTorch names are known for {type(model).__name__}; known are UNet and SwinUNet")
  return _TABLES[type(model)]


class Reshaped(NamedTuple):
  """A tensor whose shape in the weights is not the model's; both in PyTorch's layout."""

  name: str
  found: tuple[int, ...]
  wanted: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Conversion:
  """Flax variables made from PyTorch weights, as far as they fit, and what did not simply go over.

  Attributes:
    source: where the weights come from, for messages.
    filled: the variables that the weights gave, by path, in the model's parameter dtype.
    initialize: function of a PRNG key that gives all variables of the model.
    absent: paths of the variables that the weights did not give.
    missing: names that the model wants and the weights lack; they keep initial values.
    unused: name -> shape of the weights that the model has no place for.
    misfits: weights that do not fit; the model keeps initial values there.
    resized: weights that were resized to fit.
    mirrored: names of the decoder tensors that an ImageNet checkpoint's encoder filled; None where the weights are of a
      whole network.
  """

  source: str
  filled: dict[tuple[str, ...], jax.Array]
  initialize: Callable[[jax.Array], dict[str, Any]]
  absent: tuple[tuple[str, ...], ...]
  missing: tuple[str, ...]
  unused: dict[str, tuple[int, ...]]
  misfits: tuple[Reshaped, ...]
  resized: tuple[Reshaped, ...]
  mirrored: tuple[str, ...] | None

  def variables(self, key: jax.Array | None = None) -> dict[str, Any]:
    """{"params": ..., "batch_stats": ...}; where weights are missing, initial values from the key, or from seed 0."""
    filled = self.filled
    if self.absent:
      key = jax.random.key(0) if key is None else key
      # Under jit XLA leaves out what is not asked for.
      filled = filled | meshes.jit(self._initial_values, once=True)(key)
    return {"params": {}, "batch_stats": {}} | flax.traverse_util.unflatten_dict(filled)

  def _initial_values(self, key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    initial = flax.traverse_util.flatten_dict(self.initialize(key))
    return {path: initial[path] for path in self.absent}

  def lines(self) -> list[str]:
    """What became of the weights, a line each; the tensors of a block share one."""
    head = f"{len(self.filled)} tensors taken"
    if self.mirrored is not None:
      head += f"; an ImageNet encoder: {len(self.mirrored)} of them mirrored into the decoder"
    details = self.details()
    return [head, *details] if details else [f"{head}, all of them"]

  def details(self) -> list[str]:
    """What did not simply go over, a line each; nothing where every weight went over as it was."""
    kept = "initial values kept"
    return [
      *(f"resized: {name} {found} to {wanted}" for name, found, wanted in self.resized),
      *(f"does not fit, {kept}: {name} {found}, the model has {wanted}" for name, found, wanted in self.misfits),
      *(f"not in the weights, {kept}: {text}" for text in _by_block(self.missing)),
      *(f"not used: {text}" for text in _by_block(self.unused)),
    ]


def _by_block(names: Iterable[str]) -> list[str]:
  """The names, those of one transformer block or one convolution block together."""
  blocks: dict[str, list[str]] = {}
  for name in names:
    match = _BLOCK.match(name)
    blocks.setdefault(match[0] if match else name, []).append(name)
  return [names[0] if len(names) == 1 else f"{block}* ({len(names)} tensors)" for block, names in blocks.items()]


def convert(
  weights: Mapping[str, Any] | str | os.PathLike,
  model: nn.Module,
  *,
  image_size: int | None = None,
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
  table = _table(model)
  source = "the weights" if isinstance(weights, Mapping) else os.fspath(weights)
  content = weights if isinstance(weights, Mapping) else weight_files.read_weights(weights)
  tensors, _ = weight_files.find_tensors(content, source)
  tensors = {name: array for name, array in _without_prefixes(tensors).items() if not name.endswith(_BUFFERS)}
  entries = table.entries(model)
  if np.ndim(tensors.get(table.input_kernel)) != 4:
    raise UserError(f"{source}: {_not_of_this_kind(tensors, model)}")
  bad = [name for name, array in tensors.items() if array.dtype.kind not in "iub" and not np.isfinite(array).all()]
  if bad:
    raise UserError(f"{source}: NaN or infinite values in {', '.join(bad[:5])}; these weights cannot be used")

  encoder_only = isinstance(model, SwinUNet) and not any(name.startswith(_DECODER) for name in tensors)
  copies = _mirrored_encoder(tensors, entries) if encoder_only else {}
  unused = {name: array.shape for name, array in tensors.items() if name not in entries}
  tensors |= copies
  images = jnp.zeros((1, *[_side(model, image_size)] * 2, channels or tensors[table.input_kernel].shape[1]))
  initialize = functools.partial(model.init, images=images, train=False)
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(initialize, jax.random.key(0)))
  filled, misfits, resized = {}, [], []
  for name, entry in entries.items():
    if name not in tensors:
      continue
    array, wanted = tensors[name], shapes[entry.path]
    fitted = array.transpose(entry.axes) if array.ndim == len(entry.axes) else None
    change = Reshaped(name, array.shape, _torch_shape(wanted.shape, entry))
    if fitted is not None and fitted.shape != wanted.shape:
      fitted = None if entry.fit is None else entry.fit(fitted, wanted.shape)
      if fitted is not None:
        resized.append(change)
    if fitted is None:
      misfits.append(change)
    else:
      # A copy: JAX would otherwise share the memory of the caller's arrays on CPU, and see what is done to them later.
      filled[entry.path] = jnp.array(fitted, wanted.dtype)
  return Conversion(
    source=source,
    filled=filled,
    initialize=initialize,
    # Among them those that no PyTorch weights have: the heads of deep supervision.
    absent=tuple(path for path in shapes if path not in filled),
    missing=tuple(name for name in entries if name not in tensors),
    unused=unused,
    misfits=tuple(misfits),
    resized=tuple(resized),
    mirrored=tuple(name for name in copies if entries[name].path in filled) if encoder_only else None,
  )


def from_pytorch(
  weights: Mapping[str, Any] | str | os.PathLike,
  model: nn.Module,
  *,
  image_size: int | None = None,
  channels: int | None = None,
  strict: bool = True,
) -> dict[str, Any]:
  """Flax variables from PyTorch weights with the authors' names.

  The prefixes "module." (DataParallel) and "swin_unet." are dropped, and a checkpoint's state dict is found under
  "model" or "state_dict". Relative-position bias tables are resized to the model's window, and the first convolution is
  averaged over its input channels where `channels` differ; a warning says so.

  Weights of an ImageNet Swin classifier (encoder stages only) fill the encoder, and encoder stage i is also copied into
  decoder stage 3 - i; what else the decoder has keeps initial values (seed 0). The encoder must be complete and fit; a
  warning lists what was dropped (the head, deeper stages' further blocks) and what is missing.

  Args:
    weights: PyTorch name -> array (anything `numpy.asarray` takes, or tensors), or the path of a `.pth`, `.safetensors`
      or `.npz` file. A `.pth` file is read without PyTorch, tensors only.
    model: the network to fill, a `UNet` or `SwinUNet`; its fields must fit the weights.
    image_size: rows and columns of the images that the network will see; parameters do not depend on it, so that None
      (any size that the network takes) does as well.
    channels: of these images; None takes those of the weights.
    strict: refuse weights that lack an entry, hold another one, or one of the wrong shape; False keeps initial values
      (seed 0) there, and a warning names them.

  Returns:
    {"params": ..., "batch_stats": ...} in the model's parameter dtype; no "batch_stats" where the network has none.

  Raises:
    UserError: the file cannot be read, or the weights do not fit the model; every missing, unused and mis-shaped entry
      is named.
  """
  conversion = convert(weights, model, image_size=image_size, channels=channels)
  if strict:
    check_complete(conversion, model)
  if conversion.details():
    warnings.warn("PyTorch weights: " + "\n  ".join(conversion.lines()), stacklevel=2)
  return {name: tree for name, tree in conversion.variables().items() if tree}


def check_complete(conversion: Conversion, model: nn.Module, *, but_head: bool = False) -> None:
  """Raises UserError unless the weights gave the whole network, or are those of an ImageNet encoder, whole and fitting.

  Args:
    conversion: what became of the weights.
    model: the network that they should fill.
    but_head: a head for another number of classes does not matter.
  """
  missing, unused, misfits = conversion.missing, conversion.unused, conversion.misfits
  if conversion.mirrored is not None:
    missing = [name for name in missing if name.startswith(_ENCODER)]
    misfits = [change for change in misfits if change.name.startswith(_ENCODER)]
    unused = {}
  misfits = [change for change in misfits if not (but_head and is_head(change, model))]
  problems = [
    *(f"missing: {name}" for name in missing),
    *(f"unused: {name} {shape}" for name, shape in unused.items()),
    *(f"shape of {name}: {found}, the model has {wanted}" for name, found, wanted in misfits),
  ]
  if problems:
    what = "the weights" if conversion.mirrored is None else "the weights, which have no decoder,"
    raise UserError(
      f"{conversion.source}: {what} do not fit this {type(model).__name__} ({len(problems)} entries)"
      + _hint(conversion, model)
      + ":\n  "
      + "\n  ".join(problems)
    )


def is_head(change: Reshaped, model: nn.Module) -> bool:
  """Whether a tensor belongs to the classification head, and only its number of classes differs."""
  return change.name.startswith(_table(model).head) and change.found[1:] == change.wanted[1:]


def _hint(conversion: Conversion, model: nn.Module) -> str:
  """What probably differs, in terms of the model's fields."""
  transposed = [name for name in (*conversion.unused, *conversion.missing) if re.match(r"up\d+\.up\.", name)]
  if transposed:  # only a UNet has such names, and only one of the two kinds
    return f'; they are of a UNet with upsample = "{"transpose" if transposed[0] in conversion.unused else "bilinear"}"'
  kernel = _table(model).input_kernel
  for name, found, wanted in conversion.misfits:
    if name == kernel and found[0] != wanted[0]:
      field = "embed_dim" if isinstance(model, SwinUNet) else "widths[0]"
      return f"; they are of a network with {field} = {found[0]}, this one has {wanted[0]}"
  return ""


def _not_of_this_kind(tensors: Mapping[str, np.ndarray], model: nn.Module) -> str:
  for kind, table in _TABLES.items():
    if kind is not type(model) and np.ndim(tensors.get(table.input_kernel)) == 4:
      return (
        f"weights of a {kind.__name__}, not of a {type(model).__name__}; choose the model (config) that they are of"
      )
  found = ", ".join(sorted(tensors)[:5]) or "nothing"
  return (
    f"not weights of the authors' {type(model).__name__}: no four-dimensional {_table(model).input_kernel} among them "
    f"(found {found}, ...)"
  )


def to_pytorch(
  variables: Mapping[str, Any], model: nn.Module, *, image_size: int | None = None, prefix: str = ""
) -> dict[str, np.ndarray]:
  """The reverse of `from_pytorch`: a state dict for the authors' networks, their buffers included.

  The authors' Swin-Unet stands inside another module: for that one give prefix="swin_unet.".

  Args:
    variables: {"params": ..., "batch_stats": ...} of the model.
    model: the network they belong to, a `UNet` or `SwinUNet`.
    image_size: rows and columns of the images, on which the attention masks among a Swin-Unet's buffers depend; None:
      the smallest that the network takes, 224 for the paper's.
    prefix: put before every name.

  Returns:
    PyTorch name -> array of its own in PyTorch's layout. `num_batches_tracked` is 0, which matters only to averages
    that PyTorch makes without a momentum.

  Raises:
    UserError: no PyTorch names are known for the network, or the variables are not of this network.
  """
  entries = _table(model).entries(model)
  flat = flax.traverse_util.flatten_dict(dict(variables))
  head = entries[_table(model).head + "weight"]
  if lacking := [entry.path for entry in entries.values() if entry.path not in flat]:
    raise UserError(
      f"these are not the variables of this {type(model).__name__}: {len(lacking)} entries are missing, such as "
      f"{'/'.join(lacking[0])}; give the whole {{'params': ..., 'batch_stats': ...}}"
    )
  if flat[head.path].shape[-1] != model.num_classes:
    raise UserError(
      f"the variables are of a network with {flat[head.path].shape[-1]} classes, the model has {model.num_classes}"
    )
  tensors = {
    name: np.array(np.asarray(flat[entry.path]).transpose(np.argsort(entry.axes)), order="C")
    for name, entry in entries.items()
  }
  buffers = _swin_buffers(model, _side(model, image_size)) if isinstance(model, SwinUNet) else _batch_counts(tensors)
  return {prefix + name: tensor for name, tensor in (tensors | buffers).items()}


def _side(model: nn.Module, image_size: int | None) -> int:
  """An image side that the model takes: the one that is given, if it does."""
  if not isinstance(model, SwinUNet):
    return image_size or 224
  multiple = swin_unet.size_multiple(model.depths, model.window)
  if image_size is not None and image_size % multiple:
    nearest = swin_unet.nearest_sizes(image_size, multiple)
    raise UserError(f"image_size = {image_size} must be a multiple of {multiple} for this SwinUNet; use {nearest}")
  return image_size or multiple


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
        buffers[f"{stage}.blocks.{j}.attn.relative_position_index"] = index.copy()
        if shift := swin_unet.block_shift((side, side), model.window, j):
          buffers[f"{stage}.blocks.{j}.attn_mask"] = swin_unet.shift_mask(side, side, model.window, shift).copy()
  return buffers


def _without_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  for prefix in _PREFIXES:  # DataParallel's goes around the whole network, and so stands first
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return dict(tensors)


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
