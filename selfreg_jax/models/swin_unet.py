"""Swin-Unet as the authors of SelfReg-UNet use it, channels last, with the features of every block sown."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax.features import COLLECTION
from selfreg_jax.models.layers import (
  Dense,
  LayerNorm,
  gelu,
  pointwise_convolution,
  torch_bias_init,
  torch_kernel_init,
)

Array = jax.Array
Dtype = Any

PATCH = 4  # pixels a side of what becomes one token
_MLP_RATIO = 4
_OTHER_REGION = -100.0  # added to the logit of two tokens that the roll brought together

_table_init = nn.initializers.normal(0.02)  # the reference truncates at +-2, a hundred deviations away


def size_multiple(depths: Sequence[int], window: int) -> int:
  """What the rows and columns of an image must be a multiple of, so that whole windows cover the map of every stage.

  Args:
    depths: blocks of each stage.
    window: tokens a side of an attention window.

  Returns:
    Pixels; 224 for the paper's network.
  """
  return PATCH * 2 ** (len(depths) - 1) * window


def architecture_problem(embed_dim: int, depths: Sequence[int], heads: Sequence[int]) -> str | None:
  """What is wrong with the fields of a `SwinUNet`, in words; None if they fit together."""
  if len(depths) < 2 or len(depths) != len(heads) or min(depths) < 1:
    return f"depths {list(depths)} and heads {list(heads)} must have one number for each of two or more stages"
  for stage, number in enumerate(heads):
    if embed_dim * 2**stage % number:
      return f"heads {list(heads)}: {number} heads must divide the {embed_dim * 2**stage} channels of stage {stage + 1}"
  return None


def nearest_sizes(size: int, multiple: int) -> str:
  """The valid sizes next to one that is not, for messages: "224 or 448", or only the larger one."""
  lower = size // multiple * multiple
  return f"{lower} or {lower + multiple}" if lower else f"{multiple}"


def block_shift(map_size: tuple[int, int], window: int, index: int) -> int:
  """Tokens by which a block shifts its windows: every second block by half a window, on maps larger than a window.

  Args:
    map_size: rows and columns of the stage's map.
    window: tokens a side of a window.
    index: place of the block in its stage, from 0.

  Returns:
    The shift, 0 for none.
  """
  return window // 2 if index % 2 and min(map_size) > window else 0


@functools.lru_cache
def relative_position_index(window: int) -> np.ndarray:
  """Row of the bias table for each pair of tokens of a window, which are numbered row by row.

  The logit of the query at (r, c) against the key at (r', c') gets row (r - r' + w - 1) (2w - 1) + (c - c' + w - 1).

  Args:
    window: tokens a side, w.

  Returns:
    (w^2, w^2) int32, [query, key].
  """
  rows, columns = (axis.reshape(-1) for axis in np.indices((window, window)))
  row_steps = rows[:, None] - rows[None, :] + window - 1
  column_steps = columns[:, None] - columns[None, :] + window - 1
  return _read_only((row_steps * (2 * window - 1) + column_steps).astype(np.int32))


@functools.lru_cache
def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
  """What keeps tokens apart that only the roll of the shifted windows made neighbours.

  On the rolled map, rows and columns are each cut into [0, n - window), [n - window, n - shift) and [n - shift, n);
  pairs of a window from different ones of the nine regions get -100.

  Args:
    height: rows of the map, a multiple of `window`.
    width: columns, likewise.
    window: tokens a side of a window.
    shift: tokens by which the map was rolled, below `window`.

  Returns:
    (windows, window^2, window^2) float32, to be added to the logits; windows are numbered row by row.
  """
  row_region, column_region = (np.digitize(np.arange(size), (size - window, size - shift)) for size in (height, width))
  regions = 3 * row_region[:, None] + column_region[None, :]
  tokens = regions.reshape(height // window, window, width // window, window).swapaxes(1, 2).reshape(-1, window**2)
  return _read_only(np.where(tokens[:, :, None] == tokens[:, None, :], 0, _OTHER_REGION).astype(np.float32))


def _read_only(array: np.ndarray) -> np.ndarray:
  array.setflags(write=False)  # the tables are cached and shared
  return array


class WindowAttention(nn.Module):
  """Multi-head attention inside windows of a map, with a learned bias for each relative position.

  Attributes:
    heads: attention heads; must divide the channels.
    window: tokens a side of a window.
    shift: tokens by which the windows are shifted up and left; 0 for none.
    dtype: of the computation; None follows input and parameters. The softmax runs in float32 at least.
    param_dtype: of the parameters.
  """

  heads: int
  window: int
  shift: int
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Attends within the windows of a map (B, H, W, C), H and W multiples of the window: -> (B, H, W, C)."""
    batch, height, width, channels = x.shape
    window, tokens = self.window, self.window**2
    grid = (height // window, width // window)
    dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    table = self.param(
      "relative_position_bias_table", _table_init, ((2 * window - 1) ** 2, self.heads), self.param_dtype
    )
    bias = table[relative_position_index(window)].transpose(2, 0, 1)[None]  # (1, heads, query, key)
    if self.shift:
      x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
      bias = bias + shift_mask(height, width, window, self.shift)[:, None]  # (windows, heads, query, key)

    x = x.reshape(batch, grid[0], window, grid[1], window, channels).swapaxes(2, 3)
    x = x.reshape(batch, -1, tokens, channels)  # (B, windows, tokens, C)
    qkv = dense(3 * channels, name="qkv")(x)
    qkv = qkv.reshape(*qkv.shape[:-1], 3, self.heads, channels // self.heads)
    query, key, value = (qkv[..., i, :, :] for i in range(3))  # (B, windows, tokens, heads, head_dim)
    query = query * (channels // self.heads) ** -0.5
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=accumulate) + bias
    weights = nn.softmax(logits).astype(value.dtype)
    x = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value).reshape(batch, -1, tokens, channels)
    x = dense(channels, name="proj")(x)

    x = x.reshape(batch, *grid, window, window, channels).swapaxes(2, 3).reshape(batch, height, width, channels)
    return jnp.roll(x, (self.shift, self.shift), axis=(1, 2)) if self.shift else x


class DropPath(nn.Module):
  """Sets whole samples to zero at random and scales the others to the same expectation (rng "dropout").

  Attributes:
    rate: probability that a sample is dropped, below 1. An array, known only when the program runs, gives the numbers
      of the same rate as a Python number.
  """

  rate: float | Array

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Drops samples of (B, ...) where `train`."""
    if not train or (isinstance(self.rate, int | float) and self.rate == 0):
      return x
    kept = jnp.asarray(1 - self.rate, jnp.float32)
    mask = jax.random.bernoulli(self.make_rng("dropout"), kept, (x.shape[0], *[1] * (x.ndim - 1)))
    return jnp.where(mask, x / kept.astype(x.dtype), jnp.zeros_like(x))


class SwinBlock(nn.Module):
  """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)), each branch dropped at random per sample in training.

  Attributes:
    heads: see `WindowAttention`.
    window: see `WindowAttention`.
    shift: see `WindowAttention`.
    drop_path: probability that a branch of a sample is dropped; what is kept is scaled to the same expectation.
    dtype: see `WindowAttention`.
    param_dtype: see `WindowAttention`.
  """

  heads: int
  window: int
  shift: int
  drop_path: float | Array = 0.0
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Applies the block to a map (B, H, W, C); `train` drops paths, and then wants the rng "dropout"."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    # Draws depend on the name: that of the `nn.Dropout` which this once was.
    drop_path = functools.partial(DropPath(self.drop_path, name="Dropout_0"), train=train)
    attention = WindowAttention(self.heads, self.window, self.shift, **types, name="attention")
    x = x + drop_path(attention(LayerNorm(**types, name="norm1")(x)))
    channels = x.shape[-1]
    y = LayerNorm(**types, name="norm2")(x)
    y = Dense(_MLP_RATIO * channels, **types, name="mlp1")(y)
    y = gelu(y)
    y = Dense(channels, **types, name="mlp2")(y)
    return x + drop_path(y)


class PatchMerging(nn.Module):
  """Halves rows and columns and doubles the channels: (B, H, W, C) -> (B, H/2, W/2, 2C)."""

  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Joins the pixels of each 2x2 cell, (row, column) in the order (0, 0), (1, 0), (0, 1), (1, 1); H, W are even."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    batch, height, width, channels = x.shape
    cells = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
    cells = cells.reshape(batch, height // 2, width // 2, 4 * channels)
    cells = LayerNorm(**types, name="norm")(cells)
    return Dense(2 * channels, use_bias=False, **types, name="reduction")(cells)


class PatchExpanding(nn.Module):
  """Makes a cell of scale x scale pixels from each one: (B, H, W, C) -> (B, scale H, scale W, features).

  Attributes:
    features: output channels.
    scale: pixels a side of a cell.
    dtype: of the computation; None follows input and parameters.
    param_dtype: of the parameters.
  """

  features: int
  scale: int
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Expands; the linear layer's outputs are read as (row in the cell, column in the cell, channel)."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    batch, height, width, _ = x.shape
    scale, features = self.scale, self.features
    x = Dense(scale**2 * features, use_bias=False, **types, name="expand")(x)
    x = x.reshape(batch, height, width, scale, scale, features).swapaxes(2, 3)
    x = x.reshape(batch, scale * height, scale * width, features)
    return LayerNorm(**types, name="norm")(x)


class SwinUNet(nn.Module):
  """Swin-Unet (Cao et al., arXiv 2105.05537), tiny, as the authors of SelfReg-UNet use it.

  Patches of 4x4 pixels; an encoder of shifted-window transformer stages joined by patch merging; a decoder of patch
  expanding, skips (the INPUT of the encoder stage of the same resolution) and stages of as many blocks; a fourfold
  expansion back to pixels. Sows into the collection "features" the output of EVERY block of a stage, as a tuple:
  `encoder_1` .. and `decoder_1` .. (the decoder's lowest resolution, which has no blocks, is not tapped), and `final`
  (after the last expansion, before the head).

  Attributes:
    num_classes: classes, background included.
    embed_dim: channels of the first stage; each further one has twice as many.
    depths: blocks of each encoder stage; the decoder stage of the same resolution has as many. The second, fourth, ...
      block of a stage shifts its windows by half their size, except where the map is no larger than a window.
    heads: attention heads of each stage.
    window: tokens a side of an attention window. Rows and columns of an image must be a multiple of
      4 * 2 ** (stages - 1) * window (224 by default).
    drop_path: highest drop-path rate; the encoder's blocks have rates from 0 to it in even steps, the decoder's those
      of the encoder stage of the same resolution. May be a traced array.
    remat: recompute the insides of each block in the backward pass instead of keeping them: less memory, more time.
    deep_supervision: in training, also sow the logits of a 1x1 head on the last map of each decoder stage
      (`auxiliary_1` ..).
    dtype: of the computation, e.g. jnp.bfloat16; None follows input and parameters. Logits are at least float32.
    param_dtype: of the parameters.
  """

  num_classes: int
  embed_dim: int = 96
  depths: Sequence[int] = (2, 2, 2, 2)
  heads: Sequence[int] = (3, 6, 12, 24)
  window: int = 7
  drop_path: float | Array = 0.2
  remat: bool = False
  deep_supervision: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> Array:
    """Segments images.

    Args:
      images: (B, H, W, channels); H and W multiples of 4 * 2 ** (stages - 1) * window. One channel is repeated to
        three.
      train: drop paths at random (rng "dropout").

    Returns:
      (B, H, W, num_classes) logits, float32 or wider.

    Raises:
      ValueError: wrong rank, an image size that whole windows do not cover (the nearest valid ones are named), or
        attributes that do not fit together.
    """
    self._check(images)
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = functools.partial(LayerNorm, **types)
    stages = len(self.depths)
    rates = self._drop_path_rates()

    if images.shape[-1] == 1:
      images = jnp.repeat(images, 3, axis=-1)
    embed = nn.Conv(
      self.embed_dim,
      kernel_size=(PATCH, PATCH),
      strides=(PATCH, PATCH),
      padding="VALID",
      kernel_init=torch_kernel_init,
      bias_init=torch_bias_init(PATCH**2 * images.shape[-1]),
      **types,
      name="patch_embed",
    )
    x = norm(name="patch_norm")(embed(images))
    skips = []
    for i in range(stages):
      skips.append(x)
      x = self._stage(f"encoder{i + 1}", f"encoder_{i + 1}", x, i, rates[i], train)
      if i < stages - 1:
        x = PatchMerging(**types, name=f"merge{i + 1}")(x)
    x = norm(name="norm")(x)
    for d in range(1, stages):
      i = stages - 1 - d  # the encoder stage of the same resolution
      x = PatchExpanding(x.shape[-1] // 2, 2, **types, name=f"expand{d}")(x)
      x = jnp.concatenate([x, skips[i]], axis=-1)
      x = Dense(self.embed_dim * 2**i, **types, name=f"concat{d}")(x)
      x = self._stage(f"decoder{d}", f"decoder_{d}", x, i, rates[i], train)
      if self.deep_supervision and (train or self.is_initializing()):
        self._sow(f"auxiliary_{d}", self._head(x, f"auxiliary{d}"))
    x = norm(name="norm_up")(x)
    x = PatchExpanding(self.embed_dim, PATCH, **types, name="expand_final")(x)
    self._sow("final", x)
    return self._head(x, "head")

  def _head(self, x: Array, name: str) -> Array:
    head = nn.Conv(
      self.num_classes,
      kernel_size=(1, 1),
      use_bias=False,
      kernel_init=torch_kernel_init,
      conv_general_dilated=pointwise_convolution,
      dtype=jnp.promote_types(x.dtype, jnp.float32),
      param_dtype=self.param_dtype,
      name=name,
    )
    return head(x)

  def _drop_path_rates(self) -> list[list[float | Array]]:
    """The rate of each block of each encoder stage."""
    blocks = sum(self.depths)
    if isinstance(self.drop_path, int | float):
      rates = np.linspace(0, self.drop_path, blocks).tolist()
    else:
      rates = [share * self.drop_path for share in np.linspace(0, 1, blocks).tolist()]
    ends = np.cumsum(self.depths)
    return [rates[end - depth : end] for end, depth in zip(ends, self.depths, strict=True)]

  def _stage(self, prefix: str, tap: str, x: Array, level: int, rates: Sequence[float | Array], train: bool) -> Array:
    """The blocks of a stage at one resolution level, (B, h, w, C) -> (B, h, w, C)."""
    block_class = nn.remat(SwinBlock, static_argnums=(2,)) if self.remat else SwinBlock
    for j, rate in enumerate(rates):
      block = block_class(
        self.heads[level],
        self.window,
        block_shift(x.shape[1:3], self.window, j),
        rate,
        self.dtype,
        self.param_dtype,
        name=f"{prefix}_block{j + 1}",
      )
      x = block(x, train)
      self._sow(tap, x)
    return x

  def _sow(self, name: str, x: Array) -> None:
    # What `init` returns must hold no features: Flax would append to them in every later `apply`.
    if not self.is_initializing():
      self.sow(COLLECTION, name, x)

  def _check(self, images: Array) -> None:
    if images.ndim != 4:
      raise ValueError(f"images must be (B, H, W, channels), got shape {images.shape}")
    if problem := architecture_problem(self.embed_dim, self.depths, self.heads):
      raise ValueError(problem)
    multiple = size_multiple(self.depths, self.window)
    for axis, size in zip(("rows", "columns"), images.shape[1:3], strict=True):
      if size % multiple or not size:
        raise ValueError(
          f"images of {images.shape[1]}x{images.shape[2]}: with windows of {self.window} and {len(self.depths)} stages "
          f"the {axis} must be a multiple of {multiple}; use {nearest_sizes(size, multiple)}"
        )
