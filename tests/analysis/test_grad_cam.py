import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.analysis import grad_cam
from selfreg_jax.analysis.taps import TappedNetwork, in_order, model_taps
from tests.conftest import integers, normal, random_variables
from tests.test_features import TAPS, Block, ForeignNet

NETWORK = TappedNetwork.of(ForeignNet(), TAPS)
explain = jax.jit(functools.partial(grad_cam.grad_cam, NETWORK))


@pytest.fixture(scope="module")
def case():
  images = normal(0, (2, 8, 8, 1))
  variables = {"params": random_variables(ForeignNet(), images)["params"]}
  labels = integers(2, (2, 8, 8), 3)
  return images, variables, jax.nn.one_hot(labels, 3)


def above(variables):
  """The foreign network from each block's output to its logits, written out: what lies above a map."""
  params = variables["params"]

  def block(width, parameters):
    return lambda x: Block(width).apply({"params": parameters}, x)

  coarse, coarser = (block(6, params["encoder"][name]) for name in ("coarse", "coarser"))
  up1, up2 = block(6, params["up1"]), block(4, params["up2"])
  head = params["head"]["kernel"], params["head"]["bias"]

  def from_up2(x):
    return x @ head[0] + head[1]

  def from_up1(x, skip):
    enlarged = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
    return from_up2(up2(jnp.concatenate([enlarged, skip], -1)))

  def from_coarser(x, skip):
    return from_up1(up1(x), skip)

  def from_fine(x):
    return from_coarser(coarser(coarse(nn.avg_pool(x, (2, 2), (2, 2)))), x)

  return {
    "encoder_1": lambda x, skip: from_fine(x),
    "encoder_2/first": lambda x, skip: from_coarser(coarser(x), skip),
    "encoder_2/last": from_coarser,
    "decoder_1": from_up1,
    "final": lambda x, skip: from_up2(x),
  }


def test_evidence_is_the_derivative_of_what_lies_above_each_map(case):
  images, variables, masks = case
  found = explain(variables, images, masks)
  np.testing.assert_allclose(found.logits, ForeignNet().apply(variables, images), rtol=1e-5)
  skip = found.maps["encoder_1"]
  functions = above(variables)
  assert in_order(found.evidence) == in_order(found.maps) == list(functions)
  for name, function in functions.items():
    feature_map = found.maps[name]
    np.testing.assert_allclose(function(feature_map, skip), found.logits, atol=1e-5)
    for position, class_id in enumerate((1, 2)):
      for b in range(2):

        def score(x, b=b, class_id=class_id, function=function):
          logits = function(x, skip[b : b + 1])[0]
          return jnp.sum(logits[..., class_id] * masks[b, ..., class_id])

        gradient = np.asarray(jax.grad(score)(feature_map[b : b + 1])[0])
        expected = sum(gradient[..., k].mean() * feature_map[b, ..., k] for k in range(gradient.shape[-1]))
        np.testing.assert_allclose(found.evidence[name][position, b], expected, atol=1e-5 * np.abs(expected).max())


def test_the_evidence_of_all_classes_is_that_of_their_summed_scores(case):
  images, variables, masks = case
  found = explain(variables, images, masks)

  def score(perturbation):
    zeros = NETWORK.no_perturbations(variables, images)
    logits, _ = NETWORK(variables, images, zeros | {"up1": (perturbation,)})
    return jnp.sum((logits * masks)[..., 1:])

  feature_map = found.maps["decoder_1"]
  weights = jax.grad(score)(jnp.zeros_like(feature_map)).mean(axis=(1, 2))
  expected = jnp.einsum("bhwc,bc->bhw", feature_map, weights)
  found = found.evidence["decoder_1"].sum(axis=0)
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_without_masks_the_prediction_is_explained(case):
  images, variables, _ = case
  logits = ForeignNet().apply(variables, images)
  masks = jax.nn.one_hot(jnp.argmax(logits, -1), 3)
  given = explain(variables, images, masks)
  own = jax.jit(functools.partial(grad_cam.grad_cam, NETWORK, classes=(2, 0)))(variables, images)
  for name, found in own.evidence.items():
    assert found.shape == given.evidence[name].shape
    np.testing.assert_allclose(found[0], given.evidence[name][1], rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match=r"shape \(2, 8, 8, 3\)"):
    grad_cam.grad_cam(NETWORK, variables, images, masks[..., :2])


def test_a_module_that_is_called_twice_is_two_blocks():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      shared = nn.Dense(4, name="shared")
      x = nn.relu(shared(x))
      x = nn.relu(shared(x))
      x = nn.Dense(4, name="last")(x)
      return nn.Dense(2, name="head")(x)

  network = TappedNetwork.of(Twice(), sr.Taps(encoder=["shared"], decoder=[], final="last"))
  images = normal(0, (1, 4, 4, 4))
  variables = random_variables(Twice(), images)
  masks = jnp.ones((1, 4, 4, 2))
  found = grad_cam.grad_cam(network, variables, images, masks)
  assert in_order(found.evidence) == ["encoder_1/first", "encoder_1/last", "final"]
  params = variables["params"]

  def dense(name, x):
    return x @ params[name]["kernel"] + params[name]["bias"]

  def above_last(x):
    return jnp.sum(dense("head", dense("last", nn.relu(x)))[..., 1])

  for name, function in {
    "encoder_1/first": lambda x: above_last(dense("shared", nn.relu(x))),
    "encoder_1/last": above_last,
  }.items():
    weights = jax.grad(function)(found.maps[name]).mean(axis=(1, 2))
    expected = jnp.einsum("bhwc,bc->bhw", found.maps[name], weights)
    np.testing.assert_allclose(found.evidence[name][0], expected, rtol=1e-4, atol=1e-6)


def test_recomputed_blocks_give_the_same_evidence_and_half_precision_full_numbers():
  plain = sr.UNet(num_classes=3, widths=(2, 4, 6))
  images = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
  variables = random_variables(plain, images, train=False)
  masks = jnp.ones((1, 8, 8, 3))

  def evidence(model):
    # Not `TappedNetwork.of`, which switches the recomputing off.
    network = TappedNetwork(lambda v, x, **capture: model.apply(v, x, train=False, **capture), model_taps(plain))
    return lambda: grad_cam.grad_cam(network, variables, images, masks).evidence

  expected = jax.jit(evidence(plain))()
  for name, found in jax.jit(evidence(plain.clone(remat=True)))().items():
    np.testing.assert_allclose(found, expected[name], atol=1e-4 * np.abs(expected[name]).max())
  half = jax.eval_shape(evidence(plain.clone(dtype=jnp.bfloat16)))
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}


def test_heat_maps_are_scaled_positive_evidence_and_nothing_stays_nothing():
  evidence = jnp.array([[[-1.0, 2.0], [0.0, 4.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
  heat = grad_cam.heatmap(evidence, (4, 4))
  assert heat.shape == (2, 4, 4)
  np.testing.assert_array_equal(heat[1], 0)
  # Between the centres of pixels: the corners of the image repeat those of the map.
  np.testing.assert_allclose(heat[0, [0, 0, 3, 3], [0, 3, 0, 3]], np.array([0, 2, 0, 4]) / 4)
  np.testing.assert_allclose(heat[0, 0], np.array([0, 0.5, 1.5, 2]) / 4)
