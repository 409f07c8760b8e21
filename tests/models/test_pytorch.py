import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.errors import UserError
from selfreg_jax.models import pytorch, weight_files
from tests.conftest import swin_state_dict, unet_state_dict

SMALL = {"embed_dim": 8, "depths": (2, 2), "heads": (2, 4), "window": 3}


@pytest.fixture(scope="module")
def unet_weights():
  return unet_state_dict(2)


@pytest.fixture(scope="module")
def swin_weights():
  return swin_state_dict(3, **SMALL)


def trees_equal(ours, theirs):
  same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), ours, theirs)
  return jax.tree.all(same)


def test_every_misfit_is_named(unet_weights):
  broken = dict(unet_weights)
  del broken["up2.conv.double_conv.0.weight"]
  broken["down1.extra.weight"] = np.zeros(3)
  broken["outc.conv.bias"] = np.zeros(5)
  with pytest.raises(UserError) as error:
    sr.from_pytorch(broken, sr.UNet(num_classes=2), image_size=32)
  message = str(error.value)
  assert "missing: up2.conv.double_conv.0.weight" in message
  assert "unused: down1.extra.weight (3,)" in message
  assert "shape of outc.conv.bias (5,), the model has (2,)" in message
  assert "3 entries" in message


def test_without_strictness_the_rest_is_taken_and_every_misfit_reported(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  broken = dict(swin_weights)
  del broken["layers.0.blocks.1.mlp.fc1.bias"]
  broken["extra.weight"] = np.zeros(3)
  broken["output.weight"] = np.zeros((7, 8, 1, 1))
  with pytest.warns(UserWarning, match="PyTorch weights") as caught:
    variables = sr.from_pytorch(broken, model, image_size=24, strict=False)
  (warning,) = caught
  for name in ("layers.0.blocks.1.mlp.fc1.bias", "extra.weight (3,)", "output.weight (7, 8, 1, 1)"):
    assert name in str(warning.message)
  initial = model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)), train=False)["params"]
  complete = sr.from_pytorch(swin_weights, model, image_size=24)["params"]
  params = variables["params"]
  np.testing.assert_allclose(params["head"]["kernel"], initial["head"]["kernel"], rtol=1e-5)
  np.testing.assert_array_equal(params["encoder1_block2"]["mlp1"]["bias"], 0)
  assert trees_equal(params["decoder1_block1"], complete["decoder1_block1"])


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_file_gives_the_same_as_a_state_dict(unet_weights, tmp_path, ending):
  path = tmp_path / f"weights.{ending}"
  weight_files.write_weights(unet_weights, path)
  model = sr.UNet(num_classes=2)
  ours, theirs = sr.from_pytorch(path, model, image_size=32), sr.from_pytorch(unet_weights, model, image_size=32)
  assert trees_equal(ours, theirs)


def test_the_prefixes_of_wrappers_are_dropped(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  plain = sr.from_pytorch(swin_weights, model, image_size=24)
  for prefix in ("swin_unet.", "module.", "module.swin_unet."):
    named = {prefix + name: tensor for name, tensor in swin_weights.items()}
    assert trees_equal(sr.from_pytorch(named, model, image_size=24), plain)
  assert trees_equal(sr.from_pytorch({"model": swin_weights, "epoch": 3}, model, image_size=24), plain)


def test_buffers_of_the_authors_are_neither_needed_nor_in_the_way(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  whole = sr.to_pytorch(sr.from_pytorch(swin_weights, model, image_size=24), model, image_size=24)
  assert set(whole) > set(swin_weights)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    again = sr.from_pytorch(whole, model, image_size=24)
  assert trees_equal(again, sr.from_pytorch(swin_weights, model, image_size=24))


@pytest.mark.parametrize("upsample", ["bilinear", "transpose"])
def test_the_way_to_the_unet_and_back_is_exact(upsample):
  state_dict = unet_state_dict(3, upsample=upsample)
  model = sr.UNet(num_classes=3, upsample=upsample)
  back = sr.to_pytorch(sr.from_pytorch(state_dict, model, image_size=32), model)
  assert set(back) == set(state_dict)
  for name, tensor in state_dict.items():
    assert back[name].shape == tensor.shape
    if not name.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(back[name], tensor)


def test_the_way_to_the_swin_unet_and_back_is_exact(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  back = sr.to_pytorch(sr.from_pytorch(swin_weights, model, image_size=24), model, image_size=24, prefix="swin_unet.")
  for name, tensor in swin_weights.items():
    np.testing.assert_array_equal(back["swin_unet." + name], tensor)
  buffers = {name.removeprefix("swin_unet.") for name in back} - set(swin_weights)
  # A mask where windows are shifted (every second block, not on the lowest map of 3x3), an index everywhere.
  assert {name for name in buffers if name.endswith("attn_mask")} == {
    "layers.0.blocks.1.attn_mask",
    "layers_up.1.blocks.1.attn_mask",
  }
  assert sum(name.endswith("relative_position_index") for name in buffers) == 6
  assert back["swin_unet.layers.0.blocks.1.attn_mask"].shape == (4, 9, 9)


def imagenet_checkpoint(depths=(2, 3)):
  """What the authors of Swin publish: an encoder, deeper than the Swin-Unet's, a classifier head, under "model"."""
  whole = swin_state_dict(3, **SMALL | {"depths": depths})
  encoder = {
    name: tensor
    for name, tensor in whole.items()
    if name.startswith(("patch_embed.", "layers.", "norm.")) and not name.startswith("layers_up.")
  }
  return {"model": encoder | {"head.weight": np.ones((10, 16)), "head.bias": np.ones(10)}}


def test_an_imagenet_encoder_is_mirrored_into_the_decoder_and_the_rest_is_listed():
  model = sr.SwinUNet(num_classes=3, **SMALL)
  checkpoint = imagenet_checkpoint()
  with pytest.warns(UserWarning, match="mirrored into the decoder") as caught:
    params = sr.from_pytorch(checkpoint, model, image_size=24)["params"]
  assert trees_equal(params["decoder1_block1"], params["encoder1_block1"])
  assert trees_equal(params["decoder1_block2"], params["encoder1_block2"])
  kernel = checkpoint["model"]["layers.1.blocks.1.mlp.fc1.weight"]
  np.testing.assert_array_equal(params["encoder2_block2"]["mlp1"]["kernel"], kernel.T)
  initial = model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)), train=False)["params"]
  np.testing.assert_allclose(params["concat1"]["kernel"], initial["concat1"]["kernel"], rtol=1e-5)
  message = str(caught[0].message)
  for dropped in ("not used: head.weight (10, 16)", "not used: layers.1.blocks.2.norm1.weight"):
    assert dropped in message
  for missing in ("concat_back_dim.1.weight", "layers_up.0.expand.weight", "up.norm.bias", "output.weight"):
    assert f"initial values kept: {missing}" in message


def test_an_imagenet_encoder_of_another_width_is_refused():
  with pytest.raises(UserError, match="blocks do not fit"):
    sr.from_pytorch(imagenet_checkpoint(), sr.SwinUNet(num_classes=3, **SMALL | {"embed_dim": 16}), image_size=24)


def test_position_biases_are_resized_as_pytorch_does(golden):
  arrays = golden("bias_table")
  for window in (6, 8, 12):
    resized = pytorch.resize_bias_table(arrays["table"], ((2 * window - 1) ** 2, 3))
    np.testing.assert_allclose(resized, arrays[f"window{window}"], atol=1e-6)
  assert pytorch.resize_bias_table(arrays["table"], (225, 4)) is None
  np.testing.assert_allclose(pytorch.bicubic_matrix(13, 13), np.eye(13), atol=1e-15)
  np.testing.assert_allclose(pytorch.bicubic_matrix(13, 15).sum(axis=1), 1, atol=1e-12)


def test_weights_of_another_window_are_taken_and_it_is_said(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL | {"window": 4})
  with pytest.warns(UserWarning, match=r"resized: .*relative_position_bias_table \(25, 2\) to \(49, 2\)"):
    params = sr.from_pytorch(swin_weights, model, image_size=32)["params"]
  table = swin_weights["layers.0.blocks.0.attn.relative_position_bias_table"]
  np.testing.assert_allclose(
    params["encoder1_block1"]["attention"]["relative_position_bias_table"],
    pytorch.resize_bias_table(table, (49, 2)),
  )


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_input_channels_answer_equal_channels_as_before(unet_weights, channels):
  model = sr.UNet(num_classes=2)
  rgb = dict(unet_weights)
  kernel = rgb["inc.double_conv.0.weight"]
  rgb["inc.double_conv.0.weight"] = np.concatenate([kernel, 2 * kernel, -kernel], axis=1)
  with pytest.warns(UserWarning, match=r"resized: inc.double_conv.0.weight \(64, 3, 3, 3\)"):
    variables = sr.from_pytorch(rgb, model, image_size=32, channels=channels)
  grey = jax.random.uniform(jax.random.key(0), (1, 32, 32, 1))
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
  before = apply(sr.from_pytorch(rgb, model, image_size=32), jnp.repeat(grey, 3, axis=-1))
  after = apply(variables, jnp.repeat(grey, channels, axis=-1))
  np.testing.assert_allclose(after, before, atol=1e-3)


def test_weights_of_something_else_are_refused(swin_weights, unet_weights):
  with pytest.raises(UserError, match="not weights of the authors' UNet"):
    sr.from_pytorch({"conv1.weight": np.zeros((3, 3))}, sr.UNet(num_classes=2))
  with pytest.raises(UserError, match="not weights of the authors' SwinUNet"):
    sr.from_pytorch(unet_weights, sr.SwinUNet(num_classes=3, **SMALL), image_size=24)
  broken = swin_weights | {"norm.bias": np.full(16, np.nan)}
  with pytest.raises(UserError, match=r"NaN or infinite values in norm\.bias"):
    sr.from_pytorch(broken, sr.SwinUNet(num_classes=3, **SMALL), image_size=24)
