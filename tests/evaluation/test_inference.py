import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax import mesh as meshes
from selfreg_jax.evaluation import inference
from tests.conftest import unet_state_dict


@pytest.fixture(scope="module")
def protocol_volume(golden):
  arrays = golden("volume_protocol")
  state_dict = unet_state_dict(4) | {name: arrays[name] for name in ("outc.conv.weight", "outc.conv.bias")}
  model = sr.UNet(num_classes=4)
  variables = sr.from_pytorch(state_dict, model, image_size=64)
  return arrays, functools.partial(inference.make_apply(model), variables)


@pytest.mark.parametrize("batch_size", [3, 4])  # with and without a padded last batch
def test_a_volume_goes_through_the_protocol_as_through_the_authors(protocol_volume, batch_size):
  arrays, predict_fn = protocol_volume
  seen = []

  def watching(images):
    seen.append(np.asarray(images))
    return predict_fn(images)

  predictor = inference.SlicePredictor(64, batch_size, meshes.make_mesh(jax.devices()[:1]))
  prediction = predictor.classes(watching, arrays["volume"][..., None])
  inputs = np.concatenate(seen)[: len(arrays["volume"])]
  np.testing.assert_allclose(np.moveaxis(inputs, -1, 1), arrays["network_input"], atol=1e-5)
  # A few pixels have logits that tie to within float32's rounding.
  assert np.sum(prediction != arrays["prediction"]) <= 4
  table = sr.evaluate_case(prediction, arrays["label"], num_classes=4, protocol="paper")
  for class_id, expected in enumerate(arrays["metrics_dice_hd95_jaccard_assd_per_class"], 1):
    values = [table[class_id][name] for name in ("dice", "hd95", "jaccard", "assd")]
    np.testing.assert_allclose(values, expected, rtol=2e-3)


def threshold_fn(images):
  """A network that calls class 1 what is bright, class 2 what is dark; it knows nothing of its neighbours."""
  bright = images[..., 0]
  return jnp.stack([jnp.full_like(bright, 0.25), bright - 0.5, -0.5 - bright], axis=-1)


def test_probabilities_agree_with_classes():
  volume = np.random.default_rng(0).normal(size=(3, 20, 30, 1)).astype(np.float32)
  predictor = inference.SlicePredictor(32, 2, meshes.make_mesh(jax.devices()[:1]))
  classes, probabilities = predictor.probabilities(threshold_fn, volume)
  assert probabilities.shape == (3, 20, 30, 3)
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(probabilities.argmax(-1), classes)
  np.testing.assert_array_equal(predictor.classes(threshold_fn, volume), classes)


def test_stored_values_are_scaled():
  stored = np.zeros((1, 16, 16, 1), np.uint16)
  stored[:, :8] = 65535
  predictor = inference.SlicePredictor(16, 1, meshes.make_mesh(jax.devices()[:1]))
  expected = np.zeros((1, 16, 16))
  expected[:, :8] = 1
  np.testing.assert_array_equal(predictor.classes(threshold_fn, stored, scale=1 / 65535), expected)


def test_batches_are_split_over_the_devices_and_equal_one_device():
  volume = np.random.default_rng(0).normal(size=(5, 16, 16, 1)).astype(np.float32)
  eight = inference.SlicePredictor(16, 3, meshes.make_mesh())
  assert eight.batch_size == 8
  one = inference.SlicePredictor(16, 3, meshes.make_mesh(jax.devices()[:1]))
  np.testing.assert_array_equal(eight.classes(threshold_fn, volume), one.classes(threshold_fn, volume))
