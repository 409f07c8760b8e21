import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.config import base_config
from selfreg_jax.models import swin_unet
from selfreg_jax.models.factory import build_model
from tests.conftest import integers, nhwc, normal, subsample, swin_state_dict, uniform

SMALL = {"embed_dim": 8, "depths": (2, 3), "heads": (2, 4), "window": 3}  # image sizes are multiples of 24


def far_from_initial(model, images):
  """Random variables: biases and tables start at or near zero, where mistakes in them would not show."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    return jnp.asarray((path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def small_variables():
  return far_from_initial(sr.SwinUNet(num_classes=3, **SMALL), jnp.zeros((1, 24, 24, 1)))


def test_swin_unet_equals_the_authors(golden):
  arrays = golden("swin_unet")
  model = sr.SwinUNet(num_classes=9)
  state_dict = swin_state_dict(9)
  assert len(state_dict) == 218
  variables = sr.from_pytorch(state_dict, model)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 27_168_900
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False, mutable=["features"]))
  logits, updated = apply(variables, nhwc(arrays["image"]))
  features = sr.Features.from_sown(updated["features"])

  np.testing.assert_allclose(subsample(logits, 1, 4), arrays["logits_eval"], atol=5e-5)
  np.testing.assert_allclose(subsample(logits, 1, 1)[:, :, 40:56, 24:40], arrays["logits_crop"], atol=5e-5)
  np.testing.assert_allclose([logits.mean(), logits.std(ddof=1)], arrays["logits_mean_std"], atol=1e-5)
  np.testing.assert_allclose(subsample(features.final, 8, 8), arrays["final"], atol=5e-5)
  np.testing.assert_allclose(subsample(features.final, 8, 1)[:, :, 40:48, 24:32], arrays["final_crop"], atol=5e-5)
  assert [len(stage) for stage in (*features.encoder, *features.decoder)] == [2] * 7
  for side, stages in (("enc", features.encoder), ("dec", features.decoder)):
    for i, stage in enumerate(stages, 1):
      for j, block in enumerate(stage):
        name = f"{side}{i}_block{j}"
        assert np.moveaxis(block, -1, 1).shape == tuple(arrays[f"{name}_shape"])
        np.testing.assert_allclose(subsample(block, 16, 2), arrays[name], atol=5e-5)


def window_attention_in_loops(variables, x, *, heads, window, shift):
  """Attention of each token by itself, after the definition: float64 NumPy, no windows cut out, no mask table."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
  height, width, channels = x.shape
  dim = channels // heads
  qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
  query, key, value = np.moveaxis(qkv.reshape(height, width, 3, heads, dim), 2, 0)
  # A token's window, after the roll; tokens that the roll carried across the edge are apart from their new neighbours.
  rolled = [((axis - shift) % size) for axis, size in zip(np.indices((height, width)), (height, width), strict=True)]
  cell = [axis // window for axis in rolled]
  carried = [axis < shift for axis in np.indices((height, width))]
  result = np.zeros_like(x)
  for r in range(height):
    for c in range(width):
      same = (cell[0] == cell[0][r, c]) & (cell[1] == cell[1][r, c])
      same &= (carried[0] == carried[0][r, c]) & (carried[1] == carried[1][r, c])
      others = np.argwhere(same)
      row_steps = rolled[0][r, c] - rolled[0][same] + window - 1
      column_steps = rolled[1][r, c] - rolled[1][same] + window - 1
      for head in range(heads):
        bias = params["relative_position_bias_table"][row_steps * (2 * window - 1) + column_steps, head]
        logits = np.array([query[r, c, head] @ key[i, j, head] for i, j in others]) / np.sqrt(dim) + bias
        weights = np.exp(logits - logits.max())
        values = np.array([value[i, j, head] for i, j in others])
        result[r, c, head * dim : (head + 1) * dim] = weights @ values / weights.sum()
  return result @ params["proj"]["kernel"] + params["proj"]["bias"]


@pytest.mark.parametrize(("shift", "size"), [(0, (6, 9)), (1, (6, 9)), (2, (8, 4)), (2, (4, 4))])
def test_attention_sees_the_tokens_of_its_window_and_no_others(shift, size):
  window = 3 if size == (6, 9) else 4
  attention = swin_unet.WindowAttention(heads=2, window=window, shift=shift)
  x = normal(0, (2, *size, 6))
  shapes = jax.eval_shape(attention.init, jax.random.key(1), x)
  variables = jax.tree.map(lambda leaf: normal(leaf.size, leaf.shape), shapes)
  result = attention.apply(variables, x)
  for ours, image in zip(result, np.asarray(x, np.float64), strict=True):
    expected = window_attention_in_loops(variables, image, heads=2, window=window, shift=shift)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_windows_shift_in_every_second_block_of_maps_larger_than_a_window():
  assert [swin_unet.block_shift((56, 56), 7, j) for j in range(4)] == [0, 3, 0, 3]
  assert [swin_unet.block_shift((7, 7), 7, j) for j in range(2)] == [0, 0]
  assert [swin_unet.block_shift((7, 14), 7, j) for j in range(2)] == [0, 0]


def test_one_channel_is_three_equal_ones_and_colours_are_taken_as_they_are():
  model, variables = sr.SwinUNet(num_classes=3, **SMALL), small_variables()
  grey = uniform(1, (1, 24, 24, 1))
  colour = uniform(2, (1, 24, 24, 3))
  apply = jax.jit(lambda x: model.apply(variables, x, train=False))
  np.testing.assert_array_equal(apply(grey), apply(jnp.repeat(grey, 3, axis=-1)))
  assert not np.allclose(apply(colour), apply(colour[..., ::-1]), atol=1e-3)


def test_rectangles_and_sizes_other_than_the_trained_one_are_possible():
  model, variables = sr.SwinUNet(num_classes=3, **SMALL), small_variables()
  logits = jax.jit(lambda x: model.apply(variables, x, train=False))(jnp.ones((2, 48, 72, 1)))
  assert logits.shape == (2, 48, 72, 3)


def test_drop_path_drops_whole_branches_of_samples_and_keeps_the_expectation():
  block = swin_unet.SwinBlock(heads=2, window=3, shift=0, drop_path=0.4)
  x = normal(0, (512, 3, 3, 4))
  x = jnp.broadcast_to(x[:1], x.shape)
  variables = far_from_initial(block, x)
  kept = block.apply(variables, x, False)
  np.testing.assert_array_equal(kept[0], kept[-1])
  np.testing.assert_array_equal(block.apply(variables, x, False), kept)  # off in evaluation: no rng is even needed

  dropped = np.asarray(block.apply(variables, x, True, rngs={"dropout": jax.random.key(2)}))
  # Two branches, each dropped or kept: four different outcomes, each the same for all positions of a sample.
  outcomes, counts = np.unique(dropped.round(4).reshape(512, -1), axis=0, return_counts=True)
  assert len(outcomes) == 4
  expected = sorted(512 * p for p in (0.6 * 0.6, 0.6 * 0.4, 0.4 * 0.6, 0.4 * 0.4))
  np.testing.assert_allclose(sorted(counts), expected, atol=45)  # four deviations
  untouched = np.isclose(outcomes, np.asarray(x[0]).reshape(-1), atol=1e-3).all(axis=1)
  assert untouched.sum() == 1

  # With an MLP that gives nothing, what is kept of the attention is scaled by 1 / 0.6, which keeps its expectation.
  params = variables["params"] | {"mlp2": jax.tree.map(jnp.zeros_like, variables["params"]["mlp2"])}
  branch = np.asarray(block.apply({"params": params}, x, False) - x)[0]
  dropped = np.asarray(block.apply({"params": params}, x, True, rngs={"dropout": jax.random.key(3)}) - x)
  kept = np.abs(dropped).max(axis=(1, 2, 3)) > 1e-3
  np.testing.assert_allclose(dropped[kept], np.broadcast_to(branch / 0.6, dropped[kept].shape), atol=1e-4)
  np.testing.assert_allclose(dropped.mean(axis=0), branch, atol=0.15 * np.abs(branch).max())


def test_drop_path_rates_rise_evenly_and_the_decoder_mirrors_them(monkeypatch):
  rates = {}
  real = swin_unet.SwinBlock.__call__

  def recording(self, x, train):
    rates[self.name] = self.drop_path
    return real(self, x, train)

  monkeypatch.setattr(swin_unet.SwinBlock, "__call__", recording)
  model = sr.SwinUNet(num_classes=2, embed_dim=24)
  jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 1)), train=False))
  encoder = [rates[f"encoder{i}_block{j}"] for i in range(1, 5) for j in (1, 2)]
  np.testing.assert_allclose(encoder, np.arange(8) * 0.2 / 7)
  decoder = [rates[f"decoder{d}_block{j}"] for d in range(1, 4) for j in (1, 2)]
  np.testing.assert_allclose(decoder, np.array([4, 5, 2, 3, 0, 1]) * 0.2 / 7)


def test_traced_drop_path_rates_drop_what_the_same_numbers_do():
  x, rngs = normal(0, (64, 2, 2, 3)), {"dropout": jax.random.key(1)}

  def dropped(rate):
    return swin_unet.DropPath(rate).apply({}, x, train=True, rngs=rngs)

  rates = 0.5, 0.2, 0.0
  for ours, rate in zip(jax.jit(jax.vmap(dropped))(jnp.asarray(rates)), rates, strict=True):
    np.testing.assert_allclose(ours, dropped(rate), rtol=1e-6)


def test_drop_path_draws_as_the_dropout_of_flax_does():
  x = normal(0, (64, 2, 2, 3))
  rngs = {"dropout": jax.random.key(1)}

  dropped = swin_unet.DropPath(0.3).apply({}, x, train=True, rngs=rngs)
  expected = nn.Dropout(0.3, broadcast_dims=(1, 2, 3), deterministic=False).apply({}, x, rngs=rngs)
  np.testing.assert_array_equal(dropped, expected)


def test_heads_of_deep_supervision_are_there_in_training_only():
  model = sr.SwinUNet(num_classes=3, **SMALL, deep_supervision=True)
  images = normal(0, (1, 24, 24, 1))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
  params = small_variables()["params"]
  names = [f"auxiliary{i}" for i in range(1, len(SMALL["depths"]))]
  assert set(shapes) - set(params) == set(names)
  heads = {name: {"kernel": normal(2, shapes[name]["kernel"].shape)} for name in names}

  def features(params, train):
    rngs = {"dropout": jax.random.key(1)}
    _, updated = model.apply({"params": params}, images, train=train, mutable=["features"], rngs=rngs)
    return sr.Features.from_sown(updated["features"])

  found = jax.jit(lambda params: features(params, train=True))(params | heads)
  for name, stage, logits in zip(names, found.decoder, found.auxiliary, strict=True):
    np.testing.assert_allclose(logits, stage[-1] @ heads[name]["kernel"][0, 0], atol=1e-5)
  assert jax.eval_shape(lambda params: features(params, train=False), params | heads).auxiliary == ()


def test_training_drops_at_random_by_the_key_and_evaluation_does_not():
  model, variables = sr.SwinUNet(num_classes=3, drop_path=0.5, **SMALL), small_variables()
  x = normal(0, (2, 24, 24, 1))

  @jax.jit
  def train(key):
    return model.apply(variables, x, train=True, rngs={"dropout": key})

  assert np.array_equal(train(jax.random.key(1)), train(jax.random.key(1)))
  assert not np.allclose(train(jax.random.key(1)), train(jax.random.key(2)), atol=1e-3)


def test_losses_use_the_first_and_last_block_of_each_stage():
  model, variables = sr.SwinUNet(num_classes=3, **SMALL), small_variables()
  _, updated = model.apply(variables, jnp.ones((1, 24, 24, 1)), train=False, mutable=["features"])
  features = sr.Features.from_sown(updated["features"])
  first, last = features.blocks()
  assert list(first) == ["encoder_1/first", "encoder_2/first", "decoder_1/first"]
  assert last["encoder_2/last"] is features.encoder[1][2]
  assert [len(stage) for stage in features.encoder] == [2, 3]
  assert features.final.shape == (1, 24, 24, 8)


def test_recomputing_blocks_changes_neither_parameters_nor_gradients():
  fields = SMALL | {"depths": (1, 2)}
  plain, recomputing = (sr.SwinUNet(num_classes=3, remat=remat, **fields) for remat in (False, True))
  x = normal(0, (2, 24, 24, 1))
  variables = far_from_initial(plain, x)
  labels = integers(1, (2, 24, 24), 3)
  shapes = jax.eval_shape(lambda: recomputing.init(jax.random.key(0), x, train=False))
  assert jax.tree.structure(shapes) == jax.tree.structure(variables)

  def gradient(model):
    def loss(params):
      logits = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
      return sr.cross_entropy(logits, labels)

    return jax.jit(jax.grad(loss))

  for ours, theirs in zip(
    jax.tree.leaves(gradient(recomputing)(variables["params"])),
    jax.tree.leaves(gradient(plain)(variables["params"])),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  text = str(jax.make_jaxpr(gradient(recomputing))(variables["params"]))
  assert "remat" in text or "checkpoint" in text


def test_gradients_equal_float64():
  def gradient(dtype):
    model = sr.SwinUNet(num_classes=3, dtype=dtype, param_dtype=dtype, **SMALL | {"depths": (1, 2)})
    rng = np.random.default_rng(0)
    images, labels = (
      jnp.asarray(rng.standard_normal((2, 48, 48, 1)), dtype),
      jnp.asarray(rng.integers(0, 3, (2, 48, 48))),
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, dtype), shapes)
    loss = jax.jit(
      jax.grad(lambda params: sr.cross_entropy(model.apply({"params": params}, images, train=False), labels))
    )
    return jax.tree.map(np.asarray, loss(params))

  single = gradient(jnp.float32)
  with jax.enable_x64(True):
    double = gradient(jnp.float64)
  norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(double)))
  difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), single, double)
  assert norm > 0
  assert np.sqrt(sum(jax.tree.leaves(difference))) < 1e-3 * norm


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
  variables = small_variables()
  model = sr.SwinUNet(num_classes=3, dtype=jnp.bfloat16, **SMALL)
  x = normal(0, (1, 24, 24, 1))
  logits, updated = jax.jit(lambda v: model.apply(v, x, train=False, mutable=["features"]))(variables)
  assert logits.dtype == jnp.float32
  assert sr.Features.from_sown(updated["features"]).final.dtype == jnp.bfloat16
  exact = jax.jit(lambda v: sr.SwinUNet(num_classes=3, **SMALL).apply(v, x, train=False))(variables)
  np.testing.assert_allclose(logits, exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_initial_weights_are_the_authors():
  model = sr.SwinUNet(num_classes=9, embed_dim=48, depths=(1, 1), heads=(3, 6))
  params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 56, 56, 1)), train=False))(jax.random.key(0))["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name, module = path[-1].key, path[0].key
    if module in ("patch_embed", "head"):  # PyTorch's default for convolutions
      bound = {"patch_embed": 4 * 4 * 3, "head": 48}[module] ** -0.5
      assert float(jnp.abs(leaf).max()) <= bound
      assert float(leaf.std()) > 0.4 * bound
    elif name in ("kernel", "relative_position_bias_table"):
      np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)
    else:
      np.testing.assert_array_equal(leaf, 1 if name == "scale" else 0)


def test_parameters_can_be_kept_in_another_type():
  model = sr.SwinUNet(num_classes=3, param_dtype=jnp.float16, **SMALL)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 1)), train=False))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float16")}


def test_a_config_sets_every_field_of_the_network():
  config = base_config("swin_unet").model
  fields = {"embed_dim": 24, "depths": (1, 2), "heads": (2, 4), "window": 5, "drop_path": 0.3, "remat": True}
  config.update(fields | {"dtype": "bfloat16"})
  model = build_model(config, 3)
  assert {name: getattr(model, name) for name in fields} == fields
  assert (model.dtype, model.num_classes) == (jnp.bfloat16, 3)


def test_indices_and_masks_are_no_parameters():
  names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(small_variables())}
  assert names == {"kernel", "bias", "scale", "relative_position_bias_table"}


@pytest.mark.parametrize(
  ("attributes", "shape", "message"),
  [
    ({}, (1, 256, 224, 1), "rows must be a multiple of 224; use 224 or 448"),
    ({}, (1, 224, 100, 1), r"columns must be a multiple of 224; use 224\b(?! or)"),
    ({"window": 8}, (1, 300, 256, 1), "windows of 8 .* use 256 or 512"),
    ({}, (224, 224, 1), "B, H, W"),
    ({"depths": (2, 2, 2)}, (1, 224, 224, 1), "one number for each of two or more stages"),
    ({"embed_dim": 32}, (1, 224, 224, 1), "3 heads must divide the 32 channels of stage 1"),
  ],
)
def test_bad_arguments_are_refused(attributes, shape, message):
  model = sr.SwinUNet(num_classes=2, **attributes)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
