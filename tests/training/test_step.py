import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import selfreg_jax as sr
from selfreg_jax import mesh as meshes
from selfreg_jax.config import base_config
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.step import NO_STEP, create_state, make_loss, make_train_step
from tests.conftest import unet_state_dict

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
  images = jax.random.normal(jax.random.key(0), (8, 16, 16, 1))
  labels = jax.random.randint(jax.random.key(1), (8, 16, 16), 0, 3)
  variables = model.init(jax.random.key(2), images, train=False)
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


def test_the_loss_follows_every_field_of_its_config(small):
  _, state, batch = small
  model = sr.UNet(num_classes=3, widths=(4, 6, 8))
  changes = {
    "ce_weight": 2.0,
    "dice_weight": 2.0,
    "scr_weight": 2.0,
    "ifd_weight": 2.0,
    "ifd_order": "index",
    "ifd_p": 1.0,
  }
  base = jax.jit(make_train_step(model, make_loss(base_config().loss), optax.sgd(0.1)))(state, batch)[1]["total"]
  for name, value in changes.items():
    config = base_config().loss
    config[name] = value
    changed = jax.jit(make_train_step(model, make_loss(config), optax.sgd(0.1)))(state, batch)[1]["total"]
    assert abs(float(changed) - float(base)) > 1e-6, name


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
