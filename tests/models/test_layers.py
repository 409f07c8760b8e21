import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from selfreg_jax.models import layers
from tests.conftest import normal

SHAPE = (2, 6, 5, 16)


def far_from_zero(dtype=jnp.float32):
  return (100 + normal(0, SHAPE)).astype(dtype)


def parameters(*names, size=16):
  return {name: normal(i, (size,)) for i, name in enumerate(names, 1)}


def require_equal_with_gradients(ours, flax, variables, x, *, rtol=1e-4):
  """Outputs, updated collections, and gradients with respect to parameters and input of two modules."""
  weights = normal(9, SHAPE[:-1])[..., None]

  def run(module):
    def loss(params, x):
      y, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
      return jnp.sum(weights * jnp.sin(y.astype(jnp.float32))), (y, updated)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)

  (_, (y, updated)), gradients = run(ours)
  (_, (expected, expected_updated)), expected_gradients = run(flax)
  assert y.dtype == expected.dtype
  compared = (y, updated, gradients), (expected, expected_updated, expected_gradients)
  as_double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compared)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()), *as_double)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_batch_norm_equals_that_of_flax(use_running_average, dtype):
  variables = {
    "params": parameters("scale", "bias"),
    "batch_stats": {"mean": 100 + parameters("mean")["mean"], "var": jnp.linspace(0.5, 2, 16)},
  }
  options = {"use_running_average": use_running_average, "dtype": dtype}
  flax = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_fast_variance=False, **options)
  rtol = 1e-4 if dtype == jnp.float32 else 2e-2
  require_equal_with_gradients(layers.BatchNorm(**options), flax, variables, far_from_zero(dtype), rtol=rtol)


def test_a_new_batch_norm_begins_as_that_of_flax_does():
  for module in (layers.BatchNorm(use_running_average=False), nn.BatchNorm(use_running_average=False)):
    variables = module.init(jax.random.key(0), far_from_zero())
    assert jax.tree.map(float, jax.tree.map(jnp.mean, variables)) == {
      "params": {"scale": 1, "bias": 0},
      "batch_stats": {"mean": 0, "var": 1},
    }


def test_batch_norm_under_pmap_takes_the_statistics_of_the_whole_batch():
  x = far_from_zero()
  variables = {"params": parameters("scale", "bias"), "batch_stats": {"mean": jnp.zeros(16), "var": jnp.ones(16)}}
  whole = layers.BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
  module = layers.BatchNorm(use_running_average=False, axis_name="batch")
  parts = jax.vmap(lambda part: module.apply(variables, part, mutable=["batch_stats"]), axis_name="batch")(x[:, None])
  np.testing.assert_allclose(parts[0][:, 0], whole[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(parts[1]["batch_stats"]["var"][0], whole[1]["batch_stats"]["var"], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_equals_that_of_flax(dtype):
  flax = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype)
  variables, rtol = {"params": parameters("scale", "bias")}, 1e-4 if dtype == jnp.float32 else 2e-2
  require_equal_with_gradients(layers.LayerNorm(dtype=dtype), flax, variables, far_from_zero(dtype), rtol=rtol)


@pytest.mark.parametrize("features", [8, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_equals_that_of_flax(features, dtype):
  kernel = normal(0, (16, features)) / 4
  variables = {"params": {"kernel": kernel, **parameters("bias", size=features)}}
  x = normal(1, SHAPE).astype(dtype)
  rtol = 1e-4 if dtype == jnp.float32 else 2e-2
  require_equal_with_gradients(
    layers.Dense(features, dtype=dtype), nn.Dense(features, dtype=dtype), variables, x, rtol=rtol
  )


def test_gelu_is_exact_in_double_precision():
  x = np.linspace(-6, 6, 97)
  with jax.enable_x64(True):
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), x * scipy.stats.norm.cdf(x), rtol=1e-9, atol=1e-15)


def test_gelu_in_bfloat16_is_the_exact_one_rounded_once():
  x = np.linspace(-4, 4, 97).astype(jnp.bfloat16)
  wide = x.astype(np.float64)
  np.testing.assert_allclose(
    np.asarray(layers.gelu(jnp.asarray(x)), np.float64), wide * scipy.stats.norm.cdf(wide), rtol=2**-8, atol=1e-6
  )


def test_spread_and_channel_sum_are_each_others_transposes():
  values = normal(0, (16,))
  everywhere, transpose = jax.vjp(lambda values: layers.spread(values, SHAPE), values)
  np.testing.assert_array_equal(everywhere, np.broadcast_to(values, SHAPE))
  x = normal(1, SHAPE)
  np.testing.assert_allclose(transpose(x)[0], x.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(layers.channel_sum(x), x.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


def test_a_pointwise_convolution_is_a_convolution():
  variables = {"params": {"kernel": normal(0, (1, 1, 16, 3)), "bias": jnp.arange(3.0)}}
  x = normal(1, SHAPE)
  ours = nn.Conv(3, (1, 1), conv_general_dilated=layers.pointwise_convolution).apply(variables, x)
  np.testing.assert_allclose(ours, nn.Conv(3, (1, 1)).apply(variables, x), rtol=1e-4, atol=1e-5)
