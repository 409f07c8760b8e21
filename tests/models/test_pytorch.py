import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.errors import UserError
from selfreg_jax.models import pytorch, weight_files
from tests.conftest import random_variables, swin_state_dict, unet_state_dict, uniform

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
  assert "shape of outc.conv.bias: (5,), the model has (2,)" in message
  assert "3 entries" in message


def test_without_strictness_the_rest_is_taken_and_every_misfit_reported(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  broken = dict(swin_weights)
  del broken["layers.0.blocks.1.mlp.fc1.bias"]
  broken["extra.weight"] = np.zeros(3)
  broken["output.weight"] = np.zeros((7, 8, 1, 1))
  with pytest.warns(UserWarning, match="PyTorch weights") as caught:
    variables = sr.from_pytorch(broken, model, image_size=24, strict=False)
  (warning,) = (each for each in caught if "PyTorch weights" in str(each.message))
  for name in ("layers.0.blocks.1.mlp.fc1.bias", "not used: extra.weight", "output.weight (7, 8, 1, 1)"):
    assert name in str(warning.message)
  kernel = jax.jit(lambda key: model.init(key, jnp.zeros((1, 24, 24, 3)), train=False)["params"]["head"]["kernel"])
  complete = sr.from_pytorch(swin_weights, model, image_size=24)["params"]
  params = variables["params"]
  np.testing.assert_allclose(params["head"]["kernel"], kernel(jax.random.key(0)), rtol=1e-5)
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


FOUR = {"embed_dim": 8, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8), "window": 2}  # image sizes are multiples of 64


def imagenet_checkpoint(**fields):
  """What the authors of Swin publish: an encoder, deeper than the Swin-Unet's, a classifier head, under "model"."""
  whole = swin_state_dict(3, **FOUR | {"depths": (2, 2, 6, 2)} | fields)
  encoder = {name: tensor for name, tensor in whole.items() if name.startswith(("patch_embed.", "layers.", "norm."))}
  return {"model": encoder | {"head.weight": np.ones((10, 64)), "head.bias": np.ones(10)}}


def test_an_imagenet_encoder_is_mirrored_into_the_decoder_and_the_rest_is_listed():
  model = sr.SwinUNet(num_classes=3, **FOUR)
  checkpoint = imagenet_checkpoint()
  with pytest.warns(UserWarning, match="78 of them mirrored into the decoder") as caught:
    params = sr.from_pytorch(checkpoint, model)["params"]
  for stage in (1, 2, 3):
    for block in (1, 2):
      ours, theirs = params[f"decoder{stage}_block{block}"], params[f"encoder{4 - stage}_block{block}"]
      assert trees_equal(ours, theirs)
  kernel = checkpoint["model"]["layers.1.blocks.1.mlp.fc1.weight"]
  np.testing.assert_array_equal(params["encoder2_block2"]["mlp1"]["kernel"], kernel.T)
  initial = jax.jit(lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False)["params"]["concat1"]["kernel"])
  np.testing.assert_allclose(params["concat1"]["kernel"], initial(jax.random.key(0)), rtol=1e-5)
  (message,) = (str(each.message) for each in caught if "PyTorch weights" in str(each.message))
  for dropped in ("not used: head.weight", "not used: layers.2.blocks.5.* (13 tensors)"):
    assert dropped in message
  for missing in ("concat_back_dim.1.weight", "layers_up.0.expand.weight", "up.norm.bias", "output.weight"):
    assert f"initial values kept: {missing}" in message


def without(tensors, prefix):
  return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    (imagenet_checkpoint(embed_dim=16), "embed_dim = 16, this one has 8"),
    (without(imagenet_checkpoint()["model"], "layers.0."), r"missing: layers.0.blocks.0.norm1.weight"),
    (without(imagenet_checkpoint()["model"], "layers."), r"missing: layers.3.blocks.1.mlp.fc2.bias"),
    (without(imagenet_checkpoint()["model"], "layers.1.downsample"), r"\(3 entries\)"),
  ],
)
def test_an_encoder_that_is_not_whole_or_does_not_fit_is_refused(weights, message):
  model = sr.SwinUNet(num_classes=3, **FOUR)
  with pytest.raises(UserError, match=f"(?s){message}"):
    sr.from_pytorch(weights, model)
  assert any("initial values kept" in line for line in pytorch.convert(weights, model).lines())


def test_weights_of_the_other_kind_of_upsampling_are_recognized():
  transposed = unet_state_dict(2, upsample="transpose")
  with pytest.raises(UserError, match='of a UNet with upsample = "transpose"'):
    sr.from_pytorch(transposed, sr.UNet(num_classes=2))


@pytest.mark.parametrize("name", ["swin_data_parallel.pth", "swin_imagenet.pth"])
def test_files_of_pytorch_give_what_they_hold(name):
  """Made with PyTorch from rule weights: see weights/README.md."""
  fields = {"embed_dim": 4, "depths": (1, 1), "heads": (1, 2), "window": 2}
  expected = swin_state_dict(2, **fields)
  model = sr.SwinUNet(num_classes=2, **fields)
  path = pathlib.Path(__file__).parent / "weights" / name
  if name == "swin_data_parallel.pth":
    assert trees_equal(sr.from_pytorch(path, model), sr.from_pytorch(expected, model))
    return
  with pytest.warns(UserWarning, match="an ImageNet encoder: 13 of them mirrored"):
    params = sr.from_pytorch(path, model)["params"]
  np.testing.assert_array_equal(params["encoder2_block1"]["mlp2"]["bias"], expected["layers.1.blocks.0.mlp.fc2.bias"])
  assert trees_equal(params["decoder1_block1"], params["encoder1_block1"])


def test_variables_share_no_memory_with_the_arrays_they_came_from(swin_weights):
  # JAX takes over memory on CPU where it is aligned to 64 bytes.
  def aligned(array):
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

  model = sr.SwinUNet(num_classes=3, **SMALL)
  weights = {name: aligned(tensor) for name, tensor in swin_weights.items()}
  variables = sr.from_pytorch(weights, model)
  for tensor in weights.values():
    tensor[...] = 7
  assert trees_equal(variables, sr.from_pytorch(swin_weights, model))


def test_what_is_exported_belongs_to_the_caller(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  variables = sr.from_pytorch(swin_weights, model)
  images = jnp.ones((1, 48, 48, 1))
  before = model.apply(variables, images, train=False)
  for tensor in sr.to_pytorch(variables, model, image_size=48).values():
    tensor[...] = 0
  np.testing.assert_array_equal(model.apply(variables, images, train=False), before)


def test_buffers_are_those_of_the_authors():
  """Written down after the reference's definition, for four stages and windows of 2 on a 64-pixel image."""
  model = sr.SwinUNet(num_classes=3, **FOUR)
  exported = sr.to_pytorch(sr.from_pytorch(swin_state_dict(3, **FOUR), model), model)
  shifted = [f"layers.{i}.blocks.1" for i in range(3)] + [f"layers_up.{d}.blocks.1" for d in (1, 2, 3)]
  masks = {name: tensor for name, tensor in exported.items() if name.endswith("attn_mask")}
  assert set(masks) == {f"{block}.attn_mask" for block in shifted}
  windows = {"layers.0": 64, "layers.1": 16, "layers.2": 4, "layers_up.1": 4, "layers_up.2": 16, "layers_up.3": 64}
  for stage, number in windows.items():
    mask = masks[f"{stage}.blocks.1.attn_mask"]
    assert mask.shape == (number, 4, 4)
    # Regions of the rolled map are numbered by row and column; the last window holds four of them, one token each.
    np.testing.assert_array_equal(mask[-1], -100 * (1 - np.eye(4)))
    np.testing.assert_array_equal(mask[0], np.zeros((4, 4)))
  index = exported["layers.0.blocks.0.attn.relative_position_index"]
  np.testing.assert_array_equal(index, [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
  assert index.dtype == np.int64


def test_mistakes_in_exporting_are_told(swin_weights):
  model = sr.SwinUNet(num_classes=3, **SMALL)
  variables = sr.from_pytorch(swin_weights, model)
  with pytest.raises(UserError, match=r"image_size = 100 must be a multiple of 24 .* use 96 or 120"):
    sr.to_pytorch(variables, model, image_size=100)
  with pytest.raises(UserError, match="give the whole"):
    sr.to_pytorch(variables["params"], model)
  with pytest.raises(UserError, match="3 classes, the model has 4"):
    sr.to_pytorch(variables, sr.SwinUNet(num_classes=4, **SMALL))


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
  grey = uniform(0, (1, 32, 32, 1))
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
  before = apply(sr.from_pytorch(rgb, model, image_size=32), jnp.repeat(grey, 3, axis=-1))
  after = apply(variables, jnp.repeat(grey, channels, axis=-1))
  np.testing.assert_allclose(after, before, atol=1e-3)


def test_weights_of_something_else_are_refused(swin_weights, unet_weights):
  with pytest.raises(UserError, match="not weights of the authors' UNet"):
    sr.from_pytorch({"conv1.weight": np.zeros((3, 3))}, sr.UNet(num_classes=2))
  with pytest.raises(UserError, match="weights of a UNet, not of a SwinUNet"):
    sr.from_pytorch(unet_weights, sr.SwinUNet(num_classes=3, **SMALL), image_size=24)
  broken = swin_weights | {"norm.bias": np.full(16, np.nan)}
  with pytest.raises(UserError, match=r"NaN or infinite values in norm\.bias"):
    sr.from_pytorch(broken, sr.SwinUNet(num_classes=3, **SMALL), image_size=24)


def test_heads_of_deep_supervision_keep_initial_values_and_do_not_go_out():
  plain = sr.UNet(num_classes=2, widths=(4, 6, 8))
  model = sr.UNet(num_classes=2, widths=(4, 6, 8), deep_supervision=True)
  weights = sr.to_pytorch(random_variables(plain, jnp.zeros((1, 16, 16, 1)), train=False), plain)
  variables = sr.from_pytorch(weights, model)
  assert variables["params"]["auxiliary1"]["kernel"].shape == (1, 1, 4, 2)
  exported = sr.to_pytorch(variables, model)
  assert exported.keys() == weights.keys()
  for name, array in weights.items():
    np.testing.assert_array_equal(exported[name], array)
