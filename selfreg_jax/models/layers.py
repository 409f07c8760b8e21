"""What both networks are made of: PyTorch's default initial weights, and the product behind their heads."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any


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
    *arguments: strides and padding, without effect on such a kernel.
    **options: of the convolution; its precision counts.

  Returns:
    (B, H, W, features).
  """
  del arguments
  return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))
