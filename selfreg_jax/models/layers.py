"""What both networks are made of: initial weights, normalization, biases and heads.

The modules here have the parameters, the names and the numbers of Flax's. What they do otherwise is how they sum over
pixels, forward and backward. XLA's CPU backend takes a sum over all axes but the last, which is what the gradient of
every bias and scale is, ten times as slowly as the same in two halves, rows of two pixels; `channel_sum` and `spread`
are each other's transposes and keep to the latter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Dtype = Any

_EPSILON = 1e-5  # of normalization, PyTorch's


def torch_kernel_init(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
  """PyTorch's default for convolutions, kaiming_uniform(a = sqrt(5)): uniform in +-1 / sqrt(fan_in)."""
  return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
  """PyTorch's default for biases: uniform in +-1 / sqrt(fan_in)."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def pointwise_convolution(x: Array, kernel: Array, *arguments: Any, **options: Any) -> Array:
  """A 1x1 convolution as a product of matrices, for `nn.Conv(conv_general_dilated=...)`.

  The same numbers, but the gradient of the kernel is a product too, and not a convolution over the whole map for which
  XLA's CPU backend first turns the map around.

  Args:
    x: (B, H, W, C).
    kernel: (1, 1, C, features).
    *arguments: strides, which must be 1, and padding, of which such a kernel wants none.
    **options: of the convolution; its precision counts.

  Returns:
    (B, H, W, features).
  """
  del arguments
  return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))


def channel_sum(x: Array) -> Array:
  """The sum over all axes but the last: (..., C) -> (C,)."""
  channels, halves = x.shape[-1], _halves(x.shape)
  return x.reshape(-1, halves * channels).sum(axis=0).reshape(halves, channels).sum(axis=0)


def spread(values: Array, shape: Sequence[int]) -> Array:
  """Values of the channels everywhere, (C,) -> (..., C); what flows back is summed up by `channel_sum`."""
  halves = _halves(shape)
  row = jnp.broadcast_to(values, (halves, *values.shape)).reshape(-1)
  return jnp.broadcast_to(row, (math.prod(shape) // row.size, row.size)).reshape(shape)


def _halves(shape: Sequence[int]) -> int:
  """Into how many sums those over the pixels are first taken; an odd number of pixels cannot be halved."""
  return 2 if math.prod(shape[:-1]) % 2 == 0 else 1


class BatchNorm(nn.Module):
  """`nn.BatchNorm` as PyTorch's networks use it, (..., C) -> (..., C).

  The running mean and (biased) variance keep 0.9 of what they were, PyTorch's momentum of 0.1. The variance is that of
  the centred values: E[x^2] - E[x]^2 cancels far from zero.

  Attributes:
    use_running_average: normalize by the running statistics, as in evaluation, and leave them alone.
    dtype: of the output; None follows input and parameters. Statistics are float32 at least.
    param_dtype: of the parameters.
    axis_name: mapped axis over which statistics are averaged under pmap or shard_map; under jit they are global.
  """

  use_running_average: bool
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalizes over all axes but the last."""
    shape, channels = x.shape, x.shape[-1:]
    running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(channels, jnp.float32))
    running_var = self.variable("batch_stats", "var", lambda: jnp.ones(channels, jnp.float32))
    scale = self.param("scale", nn.initializers.ones_init(), channels, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros_init(), channels, self.param_dtype)
    dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.use_running_average:
      x -= spread(running_mean.value, shape)
      var = running_var.value
    else:
      mean = self._average(x)
      x -= spread(mean, shape)
      var = self._average(x**2)
      if not self.is_initializing():
        running_mean.value = 0.9 * running_mean.value + 0.1 * mean
        running_var.value = 0.9 * running_var.value + 0.1 * var
    x = x * spread(jax.lax.rsqrt(var + _EPSILON) * scale, shape) + spread(bias, shape)
    return x.astype(dtype)

  def _average(self, x: Array) -> Array:
    average = channel_sum(x) / (x.size // x.shape[-1])
    over_devices = self.axis_name is not None and not self.is_initializing()
    return jax.lax.pmean(average, self.axis_name) if over_devices else average


class LayerNorm(nn.Module):
  """`nn.LayerNorm`, (..., C) -> (..., C), the scale being applied last.

  Flax first makes a whole map of scale / deviation, which XLA's CPU backend writes out and keeps for the backward pass.

  Attributes:
    dtype: of the output; None follows input and parameters. Statistics are float32 at least.
    param_dtype: of the parameters.
  """

  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalizes over the channels; the variance is that of the centred values, as in `BatchNorm`."""
    scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], self.param_dtype)
    dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + _EPSILON)
    return (x * spread(scale, x.shape) + spread(bias, x.shape)).astype(dtype)


class Dense(nn.Module):
  """`nn.Dense`, (..., C) -> (..., features), with weights of variance 0.02^2 as Swin transformers begin with.

  Attributes:
    features: output channels.
    use_bias: add a bias, which begins at zero.
    dtype: of the computation; None follows input and parameters.
    param_dtype: of the parameters.
  """

  features: int
  use_bias: bool = True
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Multiplies and adds."""
    # The reference truncates at +-2, a hundred deviations away.
    kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), self.param_dtype)
    dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
    product = _widening_product if x.shape[-1] < self.features else jnp.matmul
    x = product(x.astype(dtype), kernel.astype(dtype))
    if not self.use_bias:
      return x
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
    return x + spread(bias.astype(dtype), x.shape)


@jax.custom_vjp
def _widening_product(x: Array, kernel: Array) -> Array:
  """The product x @ kernel, (..., C) by (C, F) with F > C, with a gradient that suits XLA's CPU backend.

  That backend copies the transpose of the first factor of a product, and whatever computes the factor is computed once
  more on the way. JAX puts the gradient of the output first when it makes the kernel's gradient; here x comes first,
  which is narrower. The numbers are the same, a step of the Swin-Unet takes a quarter less; forward mode is lost.
  """
  return jnp.matmul(x, kernel)


def _widening_product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = saved
  leading = tuple(range(x.ndim - 1))
  return jnp.matmul(gradient, kernel.T), jax.lax.dot_general(x, gradient, ((leading, leading), ((), ())))


_widening_product.defvjp(lambda x, kernel: (jnp.matmul(x, kernel), (x, kernel)), _widening_product_backward)


def gelu(x: Array) -> Array:
  """Exact GELU, x Phi(x), by the error function as in PyTorch, in float32 at least.

  `nn.gelu` takes the complementary error function, twice the work.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * (0.5 + 0.5 * jax.lax.erf(wide * np.sqrt(0.5).astype(wide.dtype)))).astype(x.dtype)
