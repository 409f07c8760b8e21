"""The convolutional UNet of the paper (the authors' `UNet`), channels last, with its inner features sown."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax.features import COLLECTION
from selfreg_jax.models.layers import BatchNorm, pointwise_convolution, torch_bias_init, torch_kernel_init

Array = jax.Array
Dtype = Any

UPSAMPLINGS = ("bilinear", "transpose")


def upsample_bilinear(x: Array) -> Array:
  """Doubles rows and columns by linear interpolation with aligned corners (PyTorch's align_corners=True).

  Output row i lies at i (h - 1) / (2h - 1) of the input. So row 2j is row j moved by the share j / (2h - 1) towards
  row j - 1, and row 2j + 1 is row j moved by (h - 1 - j) / (2h - 1) towards row j + 1: two shifted copies and a blend,
  which XLA fuses, in full precision on every device.

  Args:
    x: (B, h, w, C).

  Returns:
    (B, 2h, 2w, C).
  """
  dtype = x.dtype
  x = x.astype(jnp.promote_types(dtype, jnp.float32))
  for axis in (1, 2):
    size = x.shape[axis]
    j = np.arange(size).reshape([-1 if a == axis else 1 for a in range(4)])
    to_previous = jnp.asarray(j / (2 * size - 1), x.dtype)
    to_next = jnp.asarray((size - 1 - j) / (2 * size - 1), x.dtype)
    first, last = jax.lax.slice_in_dim(x, 0, 1, axis=axis), jax.lax.slice_in_dim(x, size - 1, size, axis=axis)
    previous = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
    following = jnp.concatenate([jax.lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
    even = x + to_previous * (previous - x)
    odd = x + to_next * (following - x)
    shape = [*x.shape[:axis], 2 * size, *x.shape[axis + 1 :]]
    x = jnp.stack([even, odd], axis + 1).reshape(shape)
  return x.astype(dtype)


def max_pool(x: Array) -> Array:
  """Largest value of every 2x2 cell, and of an odd last row or column nothing, as `nn.max_pool` gives it.

  The gradient goes to the first of several largest values, row by row, as there and in PyTorch. But it is made of
  comparisons, which XLA fuses into one loop; the gradient of `nn.max_pool` is a scatter, for which XLA's CPU backend
  writes out the coordinates of every number.

  Args:
    x: (B, H, W, C).

  Returns:
    (B, H // 2, W // 2, C).
  """
  height, width = (size // 2 * 2 for size in x.shape[1:3])
  largest = x[:, 0:height:2, 0:width:2]
  for row, column in ((0, 1), (1, 0), (1, 1)):
    other = x[:, row:height:2, column:width:2]
    largest = jnp.where((largest < other) | jnp.isnan(other), other, largest)
  return largest


class ConvBlock(nn.Module):
  """(3x3 convolution without bias, BatchNorm, ReLU) twice: (B, H, W, in) -> (B, H, W, features).

  Attributes:
    features: output channels.
    middle: channels between the two convolutions; None takes `features`.
    dtype: of the computation; None follows input and parameters.
    param_dtype: of the parameters.
    axis_name: mapped axis over which batch statistics are averaged under pmap or shard_map; under jit they are global.
  """

  features: int
  middle: int | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Applies the block; `train` uses and updates batch statistics."""
    conv = functools.partial(
      nn.Conv,
      kernel_size=(3, 3),
      padding=1,
      use_bias=False,
      kernel_init=torch_kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    norm = functools.partial(
      BatchNorm,
      use_running_average=not train,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      axis_name=self.axis_name,
    )
    x = nn.relu(norm(name="norm1")(conv(self.middle or self.features, name="conv1")(x)))
    return nn.relu(norm(name="norm2")(conv(self.features, name="conv2")(x)))


class Up(nn.Module):
  """Upsamples the deeper map, pads it to the skip's size, joins [skip, upsampled] and applies a `ConvBlock`.

  Attributes:
    features: output channels.
    upsample: "bilinear" (aligned corners) or "transpose" (2x2, stride 2, with bias, halving the channels).
    dtype: see `ConvBlock`.
    param_dtype: see `ConvBlock`.
    axis_name: see `ConvBlock`.
    remat: see `UNet`.
  """

  features: int
  upsample: str
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  axis_name: str | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, deeper: Array, skip: Array, *, train: bool) -> Array:
    """Joins deeper (B, h, w, c) and skip (B, H, W, C), with H in {2h, 2h + 1}: -> (B, H, W, features)."""
    if self.upsample == "bilinear":
      middle = (deeper.shape[-1] + skip.shape[-1]) // 2
      deeper = upsample_bilinear(deeper)
    else:
      channels = deeper.shape[-1]
      middle = None
      deeper = nn.ConvTranspose(
        channels // 2,
        kernel_size=(2, 2),
        strides=(2, 2),
        transpose_kernel=True,  # PyTorch's convention: out[2i + a, 2j + b] takes kernel[a, b]
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(4 * channels // 2),  # PyTorch counts the fan-in of a transposed kernel so
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name="conv_transpose",
      )(deeper)
    missing = [skip.shape[axis] - deeper.shape[axis] for axis in (1, 2)]
    padding = [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)]
    x = jnp.concatenate([skip, jnp.pad(deeper, padding)], axis=-1)
    block_class = _block_class(self.remat)
    return block_class(self.features, middle, self.dtype, self.param_dtype, self.axis_name, name="block")(x, train)


def _block_class(remat: bool) -> type[nn.Module]:
  return nn.remat(ConvBlock, static_argnums=(2,)) if remat else ConvBlock


class UNet(nn.Module):
  """UNet of Ronneberger et al. as the authors of SelfReg-UNet use it: 64-128-256-512-512, bilinear.

  Sows into the collection "features": `encoder_1` .. (outputs of down1 ..; the full-resolution stem is not tapped),
  `decoder_1` .. (outputs of up1 .. but the last) and `final` (output of the last up, before the head).

  Attributes:
    num_classes: classes, background included.
    widths: channels of the stem and of each down stage. With transposed convolutions the last stage has twice the
      channels named here (512 -> 1024), as in the authors' code.
    upsample: "bilinear" or "transpose".
    dtype: of the computation, e.g. jnp.bfloat16; None follows input and parameters. Logits are at least float32.
    param_dtype: of the parameters.
    axis_name: mapped axis for batch statistics under pmap or shard_map; leave None under jit, where they are global.
    remat: recompute the insides of each block in the backward pass instead of keeping them: less memory, more time.
    deep_supervision: in training, also sow the logits of a 1x1 head on each tapped decoder map (`auxiliary_1` ..).
  """

  num_classes: int
  widths: Sequence[int] = (64, 128, 256, 512, 512)
  upsample: str = "bilinear"
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  axis_name: str | None = None
  remat: bool = False
  deep_supervision: bool = False

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> Array:
    """Segments images.

    Args:
      images: (B, H, W, channels); H and W at least 2 ** (number of down stages), odd sizes are padded inside.
      train: use and update batch statistics.

    Returns:
      (B, H, W, num_classes) logits, float32 or wider.

    Raises:
      ValueError: wrong rank, an image too small for the number of stages, or an unknown `upsample`.
    """
    self._check(images)
    common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "axis_name": self.axis_name}
    bilinear = self.upsample == "bilinear"
    down_widths = [*self.widths[1:-1], self.widths[-1] * (1 if bilinear else 2)]
    up_widths = [*reversed(self.widths[:-2]), self.widths[0]] if bilinear else list(reversed(self.widths[:-1]))

    block_class = _block_class(self.remat)
    x = block_class(self.widths[0], name="stem", **common)(images, train)
    skips = []
    for i, width in enumerate(down_widths, 1):
      skips.append(x)
      x = block_class(width, name=f"down{i}", **common)(max_pool(x), train)
      self._sow(f"encoder_{i}", x)
    for i, width in enumerate(up_widths, 1):
      up = Up(width, self.upsample, remat=self.remat, name=f"up{i}", **common)
      x = up(x, skips.pop(), train=train)
      self._sow(f"decoder_{i}" if skips else "final", x)
      if skips and self.deep_supervision and (train or self.is_initializing()):
        self._sow(f"auxiliary_{i}", self._head(x, f"auxiliary{i}"))
    return self._head(x, "head")

  def _head(self, x: Array, name: str) -> Array:
    head = nn.Conv(
      self.num_classes,
      kernel_size=(1, 1),
      conv_general_dilated=pointwise_convolution,
      kernel_init=torch_kernel_init,
      bias_init=torch_bias_init(x.shape[-1]),
      dtype=jnp.promote_types(x.dtype, jnp.float32),
      param_dtype=self.param_dtype,
      name=name,
    )
    return head(x)

  def _sow(self, name: str, x: Array) -> None:
    # What `init` returns must hold no features: Flax would append to them in every later `apply`.
    if not self.is_initializing():
      self.sow(COLLECTION, name, x)

  def _check(self, images: Array) -> None:
    if images.ndim != 4:
      raise ValueError(f"images must be (B, H, W, channels), got shape {images.shape}")
    if self.upsample not in UPSAMPLINGS:
      raise ValueError(f"unknown upsample {self.upsample!r}; expected one of {UPSAMPLINGS}")
    if len(self.widths) < 3:
      raise ValueError(f"widths {tuple(self.widths)} must name the stem and at least two down stages")
    smallest = 2 ** (len(self.widths) - 1)
    if min(images.shape[1:3]) < smallest:
      raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} are too small: at least {smallest} a side")
