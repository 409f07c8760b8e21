import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from tests.conftest import normal, random_variables


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(self.width, (3, 3))(x))


class Encoder(nn.Module):
  @nn.compact
  def __call__(self, x):
    skip = Block(4, name="fine")(x)
    x = Block(6, name="coarse")(nn.avg_pool(skip, (2, 2), (2, 2)))
    return Block(6, name="coarser")(x), skip


class ForeignNet(nn.Module):
  """A network that knows nothing of this package."""

  @nn.compact
  def __call__(self, x):
    x, skip = Encoder(name="encoder")(x)
    x = Block(6, name="up1")(x)
    x = jnp.concatenate([jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), skip], -1)
    x = Block(4, name="up2")(x)
    return nn.Dense(3, name="head")(x)


TAPS = sr.Taps(encoder=["encoder/fine", ("encoder/coarse", "encoder/coarser")], decoder=["up1"], final="up2")


def apply_tapped(taps, images, variables):
  logits, updated = ForeignNet().apply(variables, images, mutable=["intermediates"], capture_intermediates=taps.filter)
  return logits, updated["intermediates"]


@pytest.fixture(scope="module")
def foreign():
  images = normal(0, (2, 8, 8, 1))
  return images, random_variables(ForeignNet(), images)


def test_taps_give_the_maps_of_a_foreign_module_in_the_same_pass(foreign):
  images, variables = foreign
  logits, intermediates = jax.jit(lambda v, x: apply_tapped(TAPS, x, v))(variables, images)
  features = TAPS.features(intermediates)
  np.testing.assert_array_equal(logits, ForeignNet().apply(variables, images))

  # The same maps, computed by hand with the module's own parameters.
  params = variables["params"]
  fine = Block(4).apply({"params": params["encoder"]["fine"]}, images)
  coarse = Block(6).apply({"params": params["encoder"]["coarse"]}, nn.avg_pool(fine, (2, 2), (2, 2)))
  np.testing.assert_allclose(features.encoder[0][0], fine, rtol=1e-6)
  np.testing.assert_allclose(features.encoder[1][0], coarse, rtol=1e-6)
  np.testing.assert_allclose(nn.Dense(3).apply({"params": params["head"]}, features.final), logits, rtol=1e-5)
  assert [len(stage) for stage in features.encoder] == [1, 2]
  assert features.decoder[0][0].shape == (2, 4, 4, 6)


def test_the_losses_train_a_foreign_module_through_taps(foreign):
  images, variables = foreign

  @jax.jit
  def gradients(params):
    def loss(params):
      _, intermediates = apply_tapped(TAPS, images, {"params": params})
      return sr.self_regularization(TAPS.features(intermediates), jax.random.key(0))[0]

    return jax.grad(loss)(params)

  result = gradients(variables["params"])
  assert np.any(result["encoder"]["fine"]["Conv_0"]["kernel"])
  # SCR stops at its teacher, and IFD takes no part of it: the last block and the head learn from the base loss alone.
  assert not np.any(result["head"]["kernel"])
  assert not np.any(result["up2"]["Conv_0"]["kernel"])


@pytest.mark.parametrize(
  ("taps", "message"),
  [
    (sr.Taps(encoder=["encoder/missing"], decoder=["up1"], final="up2"), "encoder/missing"),
    (sr.Taps(encoder=["encoder"], decoder=["up1"], final="up2"), "tuple"),
    (sr.Taps(encoder=["encoder/fine"], decoder=["up1"], final="nowhere"), "nowhere"),
  ],
)
def test_wrong_paths_are_named(foreign, taps, message):
  images, variables = foreign
  with pytest.raises(ValueError, match=message):
    taps.features(apply_tapped(taps, images, variables)[1])


def test_names_follow_positions_of_blocks():
  one = jnp.zeros((1, 2, 2, 2))
  assert [list(position) for position in sr.Features(((one,), (one,)), ((one,),), one).blocks()] == [
    ["encoder_1", "encoder_2", "decoder_1"]
  ]
  first, last = sr.Features(((one, one, one),), ((one,),), one).blocks()
  assert list(first) == ["encoder_1/first", "decoder_1"]
  assert list(last) == ["encoder_1/last"]


def test_sown_features_that_do_not_make_sense_are_refused():
  one = jnp.zeros((1, 2, 2, 2))
  with pytest.raises(ValueError, match="found 2"):
    sr.Features.from_sown({"encoder_1": (one,), "decoder_1": (one,), "final": (one, one)})
  with pytest.raises(ValueError, match="without gaps"):
    sr.Features.from_sown({"encoder_1": (one,), "encoder_3": (one,), "final": (one,)})
  with pytest.raises(ValueError, match="found 0"):
    sr.Features.from_sown({})


def test_features_of_a_module_inside_another_one_are_found():
  class Wrapper(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return sr.UNet(num_classes=2, widths=(2, 4, 4))(x, train=train)

  images = jnp.zeros((1, 8, 8, 1))
  shapes = jax.eval_shape(lambda: Wrapper().init(jax.random.key(0), images, train=False))
  assert set(shapes) == {"params", "batch_stats"}
  _, updated = jax.eval_shape(lambda v: Wrapper().apply(v, images, train=False, mutable=["features"]), shapes)
  features = sr.Features.from_sown(updated["features"])
  assert features.final.shape == (1, 8, 8, 2)
