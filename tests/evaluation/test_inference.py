import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

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


def test_an_image_is_not_computed_for_its_padding():
  volume = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
  sizes = []

  def watching(images):
    sizes.append(len(images))
    return threshold_fn(images)

  predictor = inference.SlicePredictor(16, 6, meshes.make_mesh(jax.devices()[:1]))
  image = predictor.classes(watching, volume[:1])
  np.testing.assert_array_equal(image, predictor.classes(watching, volume)[:1])
  assert sizes == [1, 6]


def sliding_fn(images):
  """A network without symmetry: class 1 where the pixel is brighter than its left neighbour, in graded logits."""
  step = images[..., 0] - jnp.roll(images[..., 0], 1, axis=2)
  return jnp.stack([-step, step], axis=-1)


def test_mirroring_averages_the_probabilities_of_the_mirrored_images():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8, 1)), jnp.float32)
  averaged = jax.nn.softmax(inference.average_mirrored(sliding_fn)(images))

  def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

  x = np.asarray(images)
  expected = [
    softmax(np.asarray(sliding_fn(x))),
    softmax(np.asarray(sliding_fn(x[:, ::-1])))[:, ::-1],
    softmax(np.asarray(sliding_fn(x[:, :, ::-1])))[:, :, ::-1],
    softmax(np.asarray(sliding_fn(x[:, ::-1, ::-1])))[:, ::-1, ::-1],
  ]
  np.testing.assert_allclose(averaged, np.mean(expected, axis=0), atol=1e-6)
  # The average does not know left from right.
  mirrored = jax.nn.softmax(inference.average_mirrored(sliding_fn)(images[:, :, ::-1]))
  np.testing.assert_allclose(mirrored[:, :, ::-1], averaged, atol=1e-6)


def test_an_ensemble_averages_probabilities_and_survives_certainty():
  first, second = jnp.array([[[[1000.0, 0.0]]]]), jnp.array([[[[0.0, 1.0]]]])
  together = inference.average_ensemble([lambda images: first, lambda images: second])(None)
  sure = 1 / (1 + np.e)
  np.testing.assert_allclose(jax.nn.softmax(together)[0, 0, 0], [(1 + sure) / 2, (1 - sure) / 2], rtol=1e-6)
  alone = inference.average_ensemble([lambda images: first])(None)
  assert np.isfinite(alone).all()


@pytest.mark.parametrize("sizes", [(8, 21), (13, 5), (16, 16), (224, 512)])
def test_linear_resize_is_scipys(sizes):
  size, resized = sizes
  line = np.random.default_rng(0).normal(size=size)
  matrix = inference.linear_matrix(size, resized)
  expected = np.interp(np.linspace(0, size - 1, resized), np.arange(size), line)
  np.testing.assert_allclose(matrix @ line, expected, atol=1e-9)


def test_logits_are_brought_to_the_native_grid_before_the_classes_are_decided():
  volume = np.random.default_rng(0).normal(size=(3, 20, 30, 1)).astype(np.float32)
  seen = []

  def watching(images):
    seen.append(np.asarray(threshold_fn(images)))
    return threshold_fn(images)

  predictor = inference.SlicePredictor(12, 2, meshes.make_mesh(jax.devices()[:1]), resize="logits")
  classes, probabilities = predictor.probabilities(watching, volume)
  logits = np.concatenate(seen)[:3]
  native = ndimage.zoom(logits, (1, 20 / 12, 30 / 12, 1), order=1, mode="nearest")
  np.testing.assert_array_equal(classes, native.argmax(-1))
  np.testing.assert_allclose(probabilities, np.asarray(jax.nn.softmax(native)), atol=1e-5)
  native_classes, network_classes = predictor.classes_of_both_sizes(threshold_fn, volume)
  np.testing.assert_array_equal(native_classes, classes)
  np.testing.assert_array_equal(network_classes, logits.argmax(-1))
