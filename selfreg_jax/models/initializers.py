"""PyTorch's default initial weights, which the authors' networks start from."""

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
