import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.models.unet import max_pool, upsample_bilinear
from tests.conftest import nhwc, normal, random_variables, subsample, unet_state_dict


def test_bilinear_unet_equals_the_authors(golden):
  arrays = golden("unet_bilinear")
  model = sr.UNet(num_classes=9)
  variables = sr.from_pytorch(unet_state_dict(9), model, image_size=64)
  images = nhwc(arrays["image"])
  logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(logits, nhwc(arrays["logits_eval"]), atol=1e-5)

  @jax.jit
  def train_pass(variables, images):
    return model.apply(variables, images, train=True, mutable=["batch_stats", "features"])

  logits, updated = train_pass(variables, images)
  np.testing.assert_allclose(logits, nhwc(arrays["logits_train"]), atol=2e-4)
  features = sr.Features.from_sown(updated["features"])
  for side, stages in (("enc", features.encoder), ("dec", features.decoder)):
    for i, (stage,) in enumerate(stages, 1):
      batch, height, width, channels = stage.shape
      assert (batch, channels, height, width) == tuple(arrays[f"{side}{i}_shape"])
      np.testing.assert_allclose(subsample(stage, 16, 2), arrays[f"{side}{i}"], atol=2e-4)
  assert len(features.encoder) == 4
  assert len(features.decoder) == 3
  np.testing.assert_allclose(subsample(features.final, 8, 4), arrays["final"], atol=2e-4)

  before, after = variables["batch_stats"], updated["batch_stats"]
  np.testing.assert_allclose(after["stem"]["norm1"]["mean"], arrays["after/inc.double_conv.1.running_mean"], atol=1e-6)
  np.testing.assert_allclose(
    after["up4"]["block"]["norm1"]["mean"], arrays["after/up4.conv.double_conv.1.running_mean"], atol=1e-5
  )
  for path, name, pixels in (
    (("stem", "norm1"), "inc.double_conv.1", 2 * 64 * 64),
    (("down4", "norm2"), "down4.maxpool_conv.1.double_conv.4", 2 * 4 * 4),
  ):
    old, new = (tree[path[0]][path[1]]["var"] for tree in (before, after))
    unbiased = old * 0.9 + (new - 0.9 * old) * pixels / (pixels - 1)  # PyTorch's running variance
    np.testing.assert_allclose(unbiased, arrays[f"after/{name}.running_var"], rtol=1e-5)


def test_transposed_unet_equals_the_authors_at_odd_sizes(golden):
  arrays = golden("unet_transpose")
  model = sr.UNet(num_classes=4, upsample="transpose")
  variables = sr.from_pytorch(unet_state_dict(4, upsample="transpose", prefix="module."), model, image_size=64)
  logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, nhwc(arrays["image"]))
  np.testing.assert_allclose(logits, nhwc(arrays["logits_eval"]), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 4)])
def test_bilinear_upsampling_interpolates_with_aligned_corners(size):
  x = np.random.default_rng(0).standard_normal((2, *size, 3))
  expected = x
  for axis in (1, 2):
    n = expected.shape[axis]
    positions = np.linspace(0, n - 1, 2 * n)
    expected = np.apply_along_axis(lambda line, p=positions: np.interp(p, np.arange(len(line)), line), axis, expected)
  np.testing.assert_allclose(upsample_bilinear(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 9), (96, 96), (224, 224)])  # at the last two, a reshaped maximum is wrong
def test_maxima_and_their_gradients_are_those_of_flax(size):
  x = jnp.round(4 * normal(0, (2, *size, 3))) / 4  # with many equal values in a cell
  weights = normal(1, (2, size[0] // 2, size[1] // 2, 3))
  results = [
    jax.jit(jax.value_and_grad(lambda x, pool=pool: jnp.sum(pool(x) * weights)))(x)
    for pool in (max_pool, lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
  ]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
  np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_maximum_with_a_nan_is_nan(place):
  x = jnp.ones((1, 2, 2, 1)).at[0, place[0], place[1], 0].set(jnp.nan)
  assert np.isnan(max_pool(x)).all()


@pytest.mark.parametrize(("upsample", "size"), [("bilinear", 96), ("transpose", 64)])
def test_gradients_of_the_whole_network_equal_float64(upsample, size):
  """At 96 pixels XLA's CPU backend gives wrong gradients for some ways to write max pooling."""

  def gradient(dtype):
    # Inputs are drawn in float32 in both runs, so that the two see the same numbers.
    model = sr.UNet(num_classes=3, widths=(4, 6, 8, 8), upsample=upsample, dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((2, size, size, 1)), dtype)
    labels = jnp.asarray(rng.integers(0, 3, (2, size, size)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=True))
    flat = flax.traverse_util.flatten_dict(shapes)
    variables = flax.traverse_util.unflatten_dict(
      {path: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, dtype) for path, leaf in flat.items()}
    )

    @jax.jit
    @jax.grad
    def loss(params):
      logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
      return sr.cross_entropy(logits, labels)

    return jax.tree.map(np.asarray, loss(variables["params"]))

  single = gradient(jnp.float32)
  with jax.enable_x64(True):
    double = gradient(jnp.float64)
  norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(double)))
  difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), single, double)
  assert norm > 0
  assert np.sqrt(sum(jax.tree.leaves(difference))) < 2e-3 * norm


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
  model = sr.UNet(num_classes=2, widths=(4, 4, 4), dtype=jnp.bfloat16)
  images = normal(0, (1, 16, 16, 1))
  variables = random_variables(model, images, train=False)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  logits, updated = jax.jit(lambda v, x: model.apply(v, x, train=False, mutable=["features"]))(variables, images)
  assert logits.dtype == jnp.float32
  assert sr.Features.from_sown(updated["features"]).final.dtype == jnp.bfloat16
  exact = jax.jit(lambda v, x: sr.UNet(num_classes=2, widths=(4, 4, 4)).apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(logits, exact, atol=0.05)


def test_parameters_number_as_the_authors():
  shapes = jax.eval_shape(
    lambda: sr.UNet(num_classes=9).init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
  )
  expected = sum(
    array.size for name, array in unet_state_dict(9).items() if "running" not in name and "tracked" not in name
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


@pytest.mark.parametrize(
  ("model", "shape", "message"),
  [
    (sr.UNet(num_classes=2), (1, 8, 64, 1), "too small"),
    (sr.UNet(num_classes=2), (64, 64, 1), "B, H, W"),
    (sr.UNet(num_classes=2, upsample="nearest"), (1, 64, 64, 1), "bilinear"),
    (sr.UNet(num_classes=2, widths=(4, 4)), (1, 64, 64, 1), "widths"),
  ],
)
def test_bad_arguments_are_refused(model, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


@pytest.mark.parametrize("upsample", ["bilinear", "transpose"])
def test_heads_of_deep_supervision_are_there_in_training_only(upsample):
  fields = {"num_classes": 3, "widths": (4, 6, 8, 8), "upsample": upsample}
  plain, model = sr.UNet(**fields), sr.UNet(**fields, deep_supervision=True)
  images = normal(0, (2, 16, 16, 1))
  variables = random_variables(model, images, train=False)
  without = jax.eval_shape(lambda: plain.init(jax.random.key(1), images, train=False))
  assert set(variables["params"]) - set(without["params"]) == {"auxiliary1", "auxiliary2"}

  @jax.jit
  def passes(variables):
    expected = plain.apply(drop_heads(variables), images, train=False)
    logits, evaluated = model.apply(variables, images, train=False, mutable=["features"])
    _, trained = model.apply(variables, images, train=True, mutable=["batch_stats", "features"])
    return expected, logits, sr.Features.from_sown(evaluated["features"]), sr.Features.from_sown(trained["features"])

  expected, logits, evaluated, trained = passes(variables)
  np.testing.assert_array_equal(logits, expected)
  assert evaluated.auxiliary == ()
  for i, ((decoder_map,), auxiliary) in enumerate(zip(trained.decoder, trained.auxiliary, strict=True), 1):
    head = variables["params"][f"auxiliary{i}"]
    np.testing.assert_allclose(auxiliary, decoder_map @ head["kernel"][0, 0] + head["bias"], atol=1e-5)


def drop_heads(variables):
  params = {name: tree for name, tree in variables["params"].items() if not name.startswith("auxiliary")}
  return {**variables, "params": params}
