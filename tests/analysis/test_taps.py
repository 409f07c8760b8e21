import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.analysis.taps import TappedNetwork, model_taps, named_maps
from tests.conftest import random_variables

NETWORKS = {
  "unet": sr.UNet(num_classes=3, widths=(2, 4, 6)),
  "transposed": sr.UNet(num_classes=3, widths=(2, 4, 6, 6), upsample="transpose", remat=True),
  "swin": sr.SwinUNet(num_classes=3, embed_dim=4, depths=(3, 1), heads=(1, 2), window=2),
}


def images_and_variables(model):
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
  return images, random_variables(model, images, train=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_tapped_maps_are_those_that_the_network_sows(name):
  model = NETWORKS[name]
  images, variables = images_and_variables(model)
  network = TappedNetwork.of(model)
  logits, outputs = jax.jit(network)(variables, images)
  expected, updated = jax.jit(lambda v, x: model.apply(v, x, train=False, mutable=["features"]))(variables, images)
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  sown = sr.Features.from_sown(updated["features"])
  maps = network.maps(outputs)
  assert maps.keys() == named_maps(sown).keys()
  for block, feature_map in named_maps(sown).items():
    np.testing.assert_allclose(maps[block], feature_map, atol=1e-5)


def test_blocks_are_named_in_the_order_of_the_network():
  one = jnp.zeros((1, 2, 2, 2))
  features = sr.Features(encoder=((one,), (one, one, one)), decoder=((one, one),), final=one)
  names = ["encoder_1", "encoder_2/first", "encoder_2/last", "decoder_1/first", "decoder_1/last", "final"]
  assert list(named_maps(features)) == names


def test_perturbing_a_block_is_felt_by_what_comes_after_it():
  model = NETWORKS["unet"]
  images, variables = images_and_variables(model)
  network = TappedNetwork.of(model)
  run = jax.jit(network)
  logits, outputs = run(variables, images)
  zeros = network.no_perturbations(variables, images)
  same, _ = run(variables, images, zeros)
  np.testing.assert_allclose(logits, same, atol=1e-6)
  path = model_taps(model).encoder[1]
  changed, moved = run(variables, images, zeros | {path: (jnp.ones_like(zeros[path][0]),)})
  assert not np.allclose(logits, changed)
  np.testing.assert_array_equal(moved["down1"][0], outputs["down1"][0])
  np.testing.assert_allclose(moved[path][0], outputs[path][0] + 1, rtol=1e-6)
  assert not np.allclose(moved["up2"][0], outputs["up2"][0])


def test_taps_of_other_modules_must_be_given():
  with pytest.raises(TypeError, match=r"Dense.*selfreg_jax\.Taps"):
    TappedNetwork.of(nn.Dense(3))
  taps = sr.Taps(encoder=["nowhere"], decoder=[], final="up2")
  model = NETWORKS["unet"]
  images, variables = images_and_variables(model)
  with pytest.raises(ValueError, match="nowhere"):
    jax.eval_shape(TappedNetwork.of(model, taps), variables, images)
