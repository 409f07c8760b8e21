import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import selfreg_jax as sr
from selfreg_jax import mesh as meshes
from selfreg_jax.config import base_config
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.step import (
  NO_STEP,
  create_state,
  make_loss,
  make_train_step,
  moving_average,
  stack_metrics,
)
from tests.conftest import integers, normal, random_variables, unet_state_dict

NAMES = {f"enc{i}": f"encoder_{i}" for i in (1, 2, 3, 4)} | {f"dec{i}": f"decoder_{i}" for i in (1, 2, 3)}
# PyTorch name -> path in our variables, and the permutation back to PyTorch's layout.
FIRST_GRADIENTS = {
  "inc.double_conv.0.weight": (("stem", "conv1", "kernel"), (3, 2, 0, 1)),
  "down4.maxpool_conv.1.double_conv.1.weight": (("down4", "norm1", "scale"), (0,)),
  "up4.conv.double_conv.4.bias": (("up4", "block", "norm2", "bias"), (0,)),
  "outc.conv.weight": (("head", "kernel"), (3, 2, 0, 1)),
}


def leaf(tree, path):
  for name in path:
    tree = tree[name]
  return np.asarray(tree)


def golden_batch(arrays, step):
  return {
    "image": jnp.asarray(np.moveaxis(arrays["images"][step], 1, -1), jnp.float64),
    "label": jnp.asarray(arrays["labels"][step]),
    "channels": {
      new: (arrays[f"step{step}/{old}/student_channels"], arrays[f"step{step}/{old}/target_channels"])
      for old, new in NAMES.items()
    },
  }


def test_six_steps_equal_the_authors_in_float64(golden):
  arrays = golden("train_steps")
  weight, history = float(arrays["lambda"]), arrays["history_ce_dice_selfreg_total_lr"]
  gradients_seen = []

  def keep_gradients():
    """An optimizer that changes nothing, at the head of the chain: what it is given are the step's gradients."""

    def update(updates, state, params=None):
      del params
      jax.debug.callback(lambda tree: gradients_seen.append(jax.tree.map(np.asarray, tree)), updates)
      return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

  def loss_fn(logits, features, batch, key):
    del key
    ce, dice = sr.cross_entropy(logits, batch["label"]), sr.soft_dice(logits, batch["label"])
    selfreg, _ = sr.self_regularization(
      features, None, channels=batch["channels"], scr_weight=weight, ifd_weight=weight
    )
    return 0.4 * ce + 0.6 * dice + selfreg, {"ce": ce, "dice": dice, "selfreg": selfreg}

  with jax.enable_x64(True):
    model = sr.UNet(num_classes=9, dtype=jnp.float64, param_dtype=jnp.float64)
    variables = sr.from_pytorch(unet_state_dict(9), model, image_size=32)
    config = base_config().optimizer
    config.learning_rate, config.weight_decay = float(arrays["base_lr"]), 1e-4
    schedule = optimizers.make_schedule(config, int(arrays["max_steps"]), steps_per_epoch=10)
    optimizer = optimizers.make_optimizer(config, schedule)
    step = jax.jit(make_train_step(model, loss_fn, optax.chain(keep_gradients(), optimizer)))
    state = create_state(variables, optax.chain(keep_gradients(), optimizer), jax.random.key(0))
    for i in range(6):
      np.testing.assert_allclose(schedule(i), history[i, 4], rtol=1e-12)
      state, metrics = step(state, golden_batch(arrays, i))
      measured = [metrics[name] for name in ("ce", "dice", "selfreg", "total")]
      np.testing.assert_allclose(measured, history[i, :4], rtol=1e-12 if i == 0 else 1e-7)
      if i == 0:
        np.testing.assert_allclose(metrics["grad_norm"], arrays["grad0_global_norm"], rtol=1e-12)
    jax.effects_barrier()

  for name, (path, axes) in FIRST_GRADIENTS.items():
    expected = arrays[f"grad0/{name}"]
    ours = leaf(gradients_seen[0], path).transpose(axes)
    np.testing.assert_allclose(ours, expected, atol=1e-12 * np.abs(expected).max())
  after = {
    "outc.conv.weight": leaf(state.params, ("head", "kernel")).transpose(3, 2, 0, 1),
    "outc.conv.bias": leaf(state.params, ("head", "bias")),
    "inc.double_conv.0.weight": leaf(state.params, ("stem", "conv1", "kernel")).transpose(3, 2, 0, 1),
  }
  for name, ours in after.items():
    expected = arrays[f"after/{name}"]
    np.testing.assert_allclose(ours, expected, atol=1e-7 * np.abs(expected).max())
  # PyTorch keeps the unbiased variance; with 4 x 32 x 32 pixels the two differ by 1 / 4095 of the update.
  running = leaf(state.batch_stats, ("stem", "norm1", "var"))
  np.testing.assert_allclose(running, arrays["after/inc.double_conv.1.running_var"], rtol=3e-4)


@pytest.fixture(scope="module")
def small():
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))
  images = normal(0, (8, 16, 16, 1))
  labels = integers(1, (8, 16, 16), 3)
  variables = random_variables(model, images, train=False)
  optimizer = optax.sgd(0.1)
  state = create_state(variables, optimizer, jax.random.key(3))
  step = make_train_step(model, make_loss(base_config().loss), optimizer)
  return step, state, {"image": images, "label": labels}


def test_a_step_on_eight_devices_equals_one_on_one_device(small):
  step, state, batch = small
  alone, alone_metrics = jax.jit(step)(state, batch)
  mesh = meshes.make_mesh()
  assert mesh.size == 8
  sharded_state = jax.device_put(state, meshes.replicated(mesh))
  together, metrics = jax.jit(step)(sharded_state, meshes.place_batch(jax.tree.map(np.asarray, batch), mesh))
  for name, value in alone_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5)
  for ours, theirs in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(together.batch_stats), jax.tree.leaves(alone.batch_stats), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_terms_add_up_to_the_total(small):
  step, state, batch = small
  _, metrics = jax.jit(step)(state, batch)
  loss = base_config().loss
  total = loss.ce_weight * metrics["ce"] + loss.dice_weight * metrics["dice"]
  total += loss.scr_weight * metrics["scr"] + loss.ifd_weight * metrics["ifd"]
  np.testing.assert_allclose(metrics["total"], total, rtol=1e-6)
  blocks = {f"{term}/{name}" for term in ("scr", "ifd") for name in ("encoder_1", "encoder_2", "decoder_1")}
  assert blocks <= set(metrics)


@pytest.fixture(scope="module")
def loss_inputs(small):
  """What a loss is given in a training step: logits, features, batch, key."""
  _, state, batch = small
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))

  @jax.jit
  def forward(variables, images):
    return model.apply(variables, images, train=True, mutable=["batch_stats", "features"])

  logits, updated = forward(state.variables, batch["image"])
  return logits, sr.Features.from_sown(updated["features"]), batch, jax.random.key(4)


def loss_config(**changes):
  config = base_config().loss
  with config.ignore_type():
    config.update(changes)
  return config


def test_the_loss_follows_every_field_of_its_config(loss_inputs):
  logits, features, batch, key = loss_inputs
  changes = {
    "ce_weight": 2.0,
    "dice_weight": 2.0,
    "scr_weight": 2.0,
    "ifd_weight": 2.0,
    "ifd_order": "index",
    "ifd_p": 1.0,
    "scr_teacher": "deepest_decoder",
    "scr_pairing": "cosine",
    "scr_pool": f"{__name__}:corner",
  }
  base = make_loss(loss_config())(*loss_inputs)[0]
  for name, value in changes.items():
    changed = make_loss(loss_config(**{name: value}))(*loss_inputs)[0]
    assert abs(float(changed) - float(base)) > 1e-6, name

  def gradient(**changes):
    loss = make_loss(loss_config(ifd_weight=1.0, **changes))
    return jax.grad(lambda features: loss(logits, features, batch, key)[0])(features).encoder[0][0]

  assert np.abs(gradient() - gradient(ifd_stop_gradient="top")).max() > 1e-6


def corner(feature_map, size):
  """A pooling of one's own: the corner of a map."""
  return feature_map[:, : size[0], : size[1]]


def test_a_loss_with_traced_numbers_is_that_of_python_ones(loss_inputs):
  numbers = {"ce_weight": 0.3, "dice_weight": 0.9, "scr_weight": 0.0, "ifd_weight": 0.2, "ifd_p": 2.0}

  def total(numbers):
    return make_loss(loss_config(**numbers))(*loss_inputs)[0]

  np.testing.assert_allclose(jax.jit(total)(numbers), total(numbers), rtol=1e-6)


def test_deep_supervision_adds_the_weighted_loss_of_the_heads(loss_inputs):
  logits, features, batch, key = loss_inputs
  config = loss_config(deep_supervision_weight=0.7)
  heads = dataclasses.replace(features, auxiliary=(normal(5, (8, 8, 8, 3)),))
  without, _ = make_loss(config)(logits, features, batch, key)
  total, terms = make_loss(config)(logits, heads, batch, key)
  np.testing.assert_allclose(total, without + 0.7 * terms["deep_supervision"], rtol=1e-6)
  np.testing.assert_allclose(terms["deep_supervision"], terms["deep_supervision/decoder_1"], rtol=1e-6)
  labels = batch["label"][:, 1::2, 1::2]
  ce, dice = sr.cross_entropy(heads.auxiliary[0], labels), sr.soft_dice(heads.auxiliary[0], labels)
  expected = config.ce_weight * ce + config.dice_weight * dice
  np.testing.assert_allclose(terms["deep_supervision"], expected, rtol=1e-6)


def test_a_step_that_is_not_finite_freezes_the_state(small):
  step, state, batch = small
  step = jax.jit(step)
  state, _ = step(state, batch)
  poisoned = {**batch, "image": batch["image"].at[3, 0, 0, 0].set(jnp.nan)}
  frozen, metrics = step(state, poisoned)
  assert not np.isfinite(metrics["total"])
  assert int(frozen.nonfinite_step) == 1
  again, _ = step(frozen, batch)  # a good batch afterwards changes nothing any more
  assert int(again.nonfinite_step) == 1
  assert int(state.nonfinite_step) == NO_STEP
  for name in ("params", "batch_stats", "opt_state", "step"):
    for ours, theirs in zip(jax.tree.leaves(getattr(again, name)), jax.tree.leaves(getattr(state, name)), strict=True):
      np.testing.assert_array_equal(ours, theirs)


class SliceBySlice(nn.Module):
  """A network without batch statistics that sows what the losses need."""

  @nn.compact
  def __call__(self, images, *, train):
    encoder = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2))(images))
    decoder = nn.relu(nn.Conv(4, (3, 3))(encoder))
    final = nn.relu(nn.Conv(4, (3, 3))(decoder.repeat(2, axis=1).repeat(2, axis=2)))
    if not self.is_initializing():
      for name, value in (("encoder_1", encoder), ("decoder_1", decoder), ("final", final)):
        self.sow("features", name, value)
    return nn.Conv(3, (1, 1))(final)


@pytest.fixture(scope="module")
def slice_by_slice():
  """The network, a state, and a batch of eight."""
  model = SliceBySlice()
  images = normal(0, (8, 16, 16, 1))
  labels = integers(1, (8, 16, 16), 3)
  variables = random_variables(model, images, train=False)
  return model, create_state(variables, optax.sgd(0.1), jax.random.key(3)), {"image": images, "label": labels}


def terms_config(*names):
  config = base_config().loss
  for name in ("ce", "dice", "scr", "ifd"):
    config[f"{name}_weight"] = 0.5 if name in names else 0.0
  return config


def one_step(slice_by_slice, config, **options):
  model, state, batch = slice_by_slice
  return jax.jit(make_train_step(model, make_loss(config), optax.sgd(0.1), **options))(state, batch)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_cross_entropy_and_consistency_are_those_of_the_whole_batch(slice_by_slice, accumulate):
  config = terms_config("ce", "scr")
  whole, metrics = one_step(slice_by_slice, config)
  parts, accumulated = one_step(slice_by_slice, config, accumulate=accumulate)
  for name in ("total", "ce", "scr", "grad_norm"):
    np.testing.assert_allclose(accumulated[name], metrics[name], rtol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_accumulated_dice_and_distillation_are_means_over_micro_batches(slice_by_slice):
  model, state, batch = slice_by_slice
  config = terms_config("dice", "ifd")
  _, accumulated = one_step(slice_by_slice, config, accumulate=2)
  halves = []
  for first in (0, 1):
    half = {name: array[first::2] for name, array in batch.items()}
    halves.append(jax.jit(make_train_step(model, make_loss(config), optax.sgd(0.1)))(state, half)[1])
  for name in ("dice", "ifd", "total"):
    np.testing.assert_allclose(accumulated[name], np.mean([half[name] for half in halves]), rtol=1e-5)


def test_accumulation_updates_batch_statistics_once_a_micro_batch(small):
  _, state, batch = small
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))
  step = make_train_step(model, make_loss(base_config().loss), optax.sgd(0.1), accumulate=2)
  after = jax.jit(step)(state, batch)[0].batch_stats
  expected = state.batch_stats
  for first in (0, 1):
    variables = {"params": state.params, "batch_stats": expected}
    _, updated = model.apply(variables, batch["image"][first::2], train=True, mutable=["batch_stats"])
    expected = updated["batch_stats"]
  for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_on_several_devices_moves_no_slice_between_them(slice_by_slice):
  """Micro-batches hold slices of every device: the only communication is that of sums."""
  model, state, batch = slice_by_slice
  batch = {name: np.concatenate([np.asarray(array)] * 2) for name, array in batch.items()}
  mesh = meshes.make_mesh()
  step = make_train_step(model, make_loss(base_config().loss), optax.sgd(0.1), accumulate=2)
  arguments = meshes.replicate(state.params, mesh), meshes.place_batch(batch, mesh)

  def run(params, batch):
    return step(state.replace(params=params), batch)[1]

  compiled = jax.jit(run).lower(*arguments).compile()
  program = compiled.as_text()
  assert "all-reduce" in program
  for operation in ("all-gather", "all-to-all", "collective-permute"):
    assert f"{operation}(" not in program
  together = compiled(*arguments)
  alone = jax.jit(step)(state, batch)[1]
  np.testing.assert_allclose(together["total"], alone["total"], rtol=2e-5)


def test_the_moving_average_is_its_closed_form():
  rng, decay = np.random.default_rng(0), 0.9
  values = rng.normal(size=(30, 4))
  average = {"w": jnp.asarray(rng.normal(size=4), jnp.float32)}  # what it begins with counts for nothing
  for count, value in enumerate(values, 1):
    average = moving_average(average, {"w": jnp.asarray(value, jnp.float32)}, count, decay)
    weights = (1 - decay) * decay ** np.arange(count - 1, -1, -1) / (1 - decay**count)
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(average["w"], weights @ values[:count], rtol=2e-5, atol=1e-6)


def test_a_run_averages_parameters_and_statistics(small):
  _, state, batch = small
  model, decay = sr.UNet(num_classes=3, widths=(4, 6, 8)), 0.5
  state = create_state({"params": state.params, "batch_stats": state.batch_stats}, optax.sgd(0.1), state.key, ema=True)
  step = jax.jit(make_train_step(model, make_loss(base_config().loss), optax.sgd(0.1), ema_decay=decay))
  seen = []
  for _ in range(3):
    state, _ = step(state, batch)
    seen.append(state.variables)
  expected = jax.tree.map(lambda a, b, c: (a + 2 * b + 4 * c) / 7, *seen)
  for ours, theirs in zip(jax.tree.leaves(state.evaluated), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many(small):
  _, state, batch = small
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))
  step = jax.jit(make_train_step(model, make_loss(base_config().loss), optax.sgd(0.1), most_skips=2))
  bad = {**batch, "image": batch["image"].at[3, 0, 0, 0].set(jnp.nan)}

  def same_variables(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one.variables, other.variables))

  for _ in range(2):
    after, metrics = step(state, bad)
    assert int(after.step) == int(state.step) + 1
    assert metrics["skipped"] == 1
    assert same_variables(after, state)
    state = after
  assert (int(state.updates), int(state.skips)) == (0, 2)
  state, metrics = step(state, batch)  # a good one starts the count anew
  assert (int(state.updates), int(state.skips), float(metrics["skipped"])) == (1, 0, 0)
  for expected in (1, 2):
    state, _ = step(state, bad)
    assert int(state.skips) == expected
  halted, _ = step(state, bad)
  assert int(halted.nonfinite_step) == 5
  again, _ = step(halted, batch)
  assert int(again.nonfinite_step) == 5
  assert int(again.step) == 5
  assert same_variables(again, halted)


def test_remat_keeps_less_and_gives_the_same_gradients():
  images, labels = normal(0, (2, 16, 16, 1)), jnp.ones((2, 16, 16), jnp.int32)

  def loss_of(remat):
    model = sr.UNet(num_classes=3, widths=(4, 6, 8), remat=remat)
    variables = random_variables(model, images, train=False)

    def loss(params):
      variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
      logits, _ = model.apply(variables_now, images, train=True, mutable=["batch_stats"])
      return sr.cross_entropy(logits, labels)

    return loss, variables["params"]

  kept, gradients = [], []
  for remat in (True, False):
    loss, params = loss_of(remat)
    # What the backward pass needs of the forward one are the leaves of the function that `vjp` returns.
    needed = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
    kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(needed)))
    gradients.append(jax.jit(jax.grad(loss))(params))
  assert kept[0] < 0.6 * kept[1]
  for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_trains_as_float32_does():
  """Fifty steps; parameters, losses and logits stay float32."""
  images = normal(0, (8, 16, 16, 1))
  labels = (images[..., 0] > 0.5).astype(jnp.int32) + (images[..., 0] > 1.2)
  losses = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    model = sr.UNet(num_classes=3, widths=(4, 6, 8), dtype=dtype)
    state = create_state(random_variables(model, images, train=False), optax.adam(3e-3), jax.random.key(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    step = jax.jit(make_train_step(model, make_loss(base_config().loss), optax.adam(3e-3)))
    history = []
    for _ in range(50):
      state, metrics = step(state, {"image": images, "label": labels})
      history.append(float(metrics["total"]))
    assert metrics["total"].dtype == jnp.float32
    losses[dtype] = history
  assert losses[jnp.float32][-1] < 0.7 * losses[jnp.float32][0]
  np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=0.02)


def test_stacked_metrics_are_the_same_numbers_in_one_array():
  def step(state, batch):
    return state + 1, {"total": batch.sum(), "ce": batch[0], "skipped": (batch[1] > 0).astype(jnp.int32)}

  state, metrics = jax.jit(stack_metrics(step))(1, jnp.asarray([0.1, 2.5]))
  assert state == 2
  assert metrics.values.shape == (3,)
  assert list(metrics.named()) == ["ce", "skipped", "total"]
  np.testing.assert_array_equal(list(metrics.named().values()), np.float32([0.1, 1, np.float32(0.1) + np.float32(2.5)]))
