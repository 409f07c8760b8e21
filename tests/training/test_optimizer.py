import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreg_jax.config import base_config
from selfreg_jax.training import optimizer as optimizers


def test_poly_rate_equals_the_authors(golden):
  arrays = golden("poly_lr")
  base, steps = float(arrays["base_lr"]), int(arrays["max_iterations"])
  used_at = arrays["iteration"] + 1  # the authors write the rate after the step
  np.testing.assert_allclose(optimizers.poly_rate(base, steps)(used_at.astype(np.int32)), arrays["lr_after"], rtol=1e-6)
  with jax.enable_x64(True):
    schedule = optimizers.poly_rate(base, steps)
    np.testing.assert_allclose(schedule(jnp.asarray(used_at)), arrays["lr_after"], rtol=0, atol=1e-15)
  assert schedule(0) == base


def test_cosine_restarts_by_epoch():
  schedule = optimizers.cosine_restarts(1e-3, 1e-4, period=10, steps_per_epoch=7)
  rates = np.array([schedule(step) for step in range(7 * 21)]).reshape(21, 7)
  assert (rates == rates[:, :1]).all()  # constant within an epoch
  by_epoch = rates[:, 0]
  np.testing.assert_allclose(by_epoch[[0, 10, 20]], 1e-3, rtol=1e-6)
  np.testing.assert_allclose(by_epoch[5], (1e-3 + 1e-4) / 2, rtol=1e-6)
  assert by_epoch.min() > 1e-4
  assert (np.diff(by_epoch[:10]) < 0).all()


def run(name, gradients, start, *, rate=0.1, decay=0.01, momentum=0.9):
  config = base_config().optimizer
  config.name, config.weight_decay, config.momentum = name, decay, momentum
  optimizer = optimizers.make_optimizer(config, lambda step: rate)
  params = {"w": jnp.asarray(start)}
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
  return np.asarray(params["w"])


@pytest.fixture
def trajectory():
  rng = np.random.default_rng(0)
  return rng.standard_normal((5, 3)).astype(np.float32), rng.standard_normal(3).astype(np.float32)


def test_sgd_couples_decay_and_momentum_as_pytorch(trajectory):
  gradients, start = trajectory
  w, buffer = start.astype(float), np.zeros(3)
  for gradient in gradients:
    buffer = 0.9 * buffer + gradient + 0.01 * w
    w = w - 0.1 * buffer
  np.testing.assert_allclose(run("sgd", gradients, start), w, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_pytorchs(trajectory, name):
  gradients, start = trajectory
  w, first, second = start.astype(float), np.zeros(3), np.zeros(3)
  for t, gradient in enumerate(gradients.astype(float), 1):
    if name == "adamw":
      w = w * (1 - 0.1 * 0.01)
    else:
      gradient = gradient + 0.01 * w
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    w = w - 0.1 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
  np.testing.assert_allclose(run(name, gradients, start), w, rtol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("poly", 0.2 * (1 - 98 / 100) ** 0.9), ("constant", 0.2)])
def test_the_schedule_follows_the_config(name, last):
  config = base_config().optimizer
  config.schedule, config.learning_rate = name, 0.2
  schedule = optimizers.make_schedule(config, steps=100, steps_per_epoch=10)
  np.testing.assert_allclose(schedule(99), last, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_gradients_are_clipped_by_their_global_norm_before_weight_decay(name):
  config = base_config().optimizer
  config.name, config.weight_decay = name, 0.1
  params = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([3.0])}
  gradients = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}  # of norm 5
  updates = []
  for clip, scale in ((0.5, 1.0), (0.0, 0.1), (0.0, 1.0), (50.0, 1.0)):
    config.clip_norm = clip
    optimizer = optimizers.make_optimizer(config, lambda step: 0.1)
    scaled = jax.tree.map(lambda g, scale=scale: g * scale, gradients)
    updates.append(optimizer.update(scaled, optimizer.init(params), params)[0])
  clipped, scaled, whole, unclipped = updates
  for one, other in ((clipped, scaled), (unclipped, whole)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


@pytest.mark.parametrize(
  ("name", "schedule", "numbers"),
  [
    (
      "sgd",
      "poly",
      {"learning_rate": (0.1, 0.03), "momentum": (0.9, 0.5), "weight_decay": (0, 0.1), "poly_power": (1, 2)},
    ),
    ("adam", "cosine", {"learning_rate": (0.1, 0.03), "weight_decay": (0, 0.1), "cosine_minimum": (0, 0.01)}),
    ("adamw", "constant", {"learning_rate": (0.1, 0.03), "weight_decay": (0, 0.1)}),
  ],
)
def test_traced_numbers_update_as_those_of_a_config_do(name, schedule, numbers):
  """What lets ablations train several runs in one program."""

  def updated(values):
    config = base_config().optimizer.copy_and_resolve_references()
    with config.ignore_type():
      config.update({"name": name, "schedule": schedule, "cosine_period": 2, **values})
    optimizer = optimizers.make_optimizer(config, optimizers.make_schedule(config, 6, 1))
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    state = optimizer.init(params)
    for gradient in ([0.3, -1.0, 2.0], [1.0, 1.0, -1.0], [0.0, 3.0, 0.1], [-1.0, 0.2, 0.4]):
      updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
      params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params["w"]

  together = jax.jit(jax.vmap(updated))({field: jnp.asarray(values, jnp.float32) for field, values in numbers.items()})
  for place in (0, 1):
    alone = updated({field: float(values[place]) for field, values in numbers.items()})
    np.testing.assert_allclose(together[place], alone, rtol=1e-6)
