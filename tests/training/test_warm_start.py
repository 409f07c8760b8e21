import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.config import base_config
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.errors import UserError
from selfreg_jax.models.factory import build_model
from selfreg_jax.models.weight_files import read_weights, write_weights
from selfreg_jax.training import interchange, warm_start
from selfreg_jax.training.checkpoints import load_trained
from tests.conftest import make_small_config, random_variables, uniform
from tests.training.test_loop import train


def make_swin_config(prepared):
  config = make_small_config(prepared)
  config.model = base_config("swin_unet").model
  config.model.embed_dim, config.model.depths, config.model.heads, config.model.window = 8, (1, 1), (2, 4), 4
  return config


def random_weights(config, num_classes, seed=5):
  model = build_model(config.model, num_classes)
  size = config.data.image_size
  return model, random_variables(model, jnp.zeros((1, size, size, 1)), seed=seed, train=False)


@pytest.fixture(scope="module")
def dataset(prepared):
  return DatasetInfo.of(manifests.load(prepared))


@pytest.fixture(scope="module")
def source_run(prepared, tmp_path_factory):
  """A short run of a small Swin-Unet."""
  workdir = tmp_path_factory.mktemp("runs") / "source"
  config = make_swin_config(prepared)
  config.train.steps, config.train.validate_every = 2, 2
  return config, workdir, train(config, workdir)


def test_a_run_starts_from_a_workdir(source_run, prepared, tmp_path):
  config, workdir, trained = source_run
  config = config.copy_and_resolve_references()
  config.init_from = str(workdir)
  config.train.steps, config.train.validate_every, config.seed = 1, 1, 9
  config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e-12
  state = train(config, tmp_path / "tuned")
  for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(trained.params), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-7)
  assert f"weights  {workdir}: 59 tensors taken, all of them" in (tmp_path / "tuned" / "train.log").read_text()


def test_resuming_does_not_look_at_the_weights_again(source_run, tmp_path):
  config, workdir, _ = source_run
  copy = tmp_path / "weights.npz"
  interchange.export(workdir, copy)
  config = config.copy_and_resolve_references()
  config.init_from = str(copy)
  train(config, tmp_path / "run")
  config.train.steps = 4
  copy.unlink()
  config.init_from = str(tmp_path / "moved.npz")  # has no effect any more, and is no reason to refuse
  state = train(config, tmp_path / "run", override=True)
  assert int(state.step) == 4
  assert sr.load(tmp_path / "run", checkpoint="latest").config.init_from == str(copy)


def test_another_number_of_classes_gets_a_new_head_and_it_is_said(source_run, dataset):
  _, workdir, trained = source_run
  config = json.loads((workdir / "config.json").read_text())
  classes = (*dataset.classes, "ring")
  model = build_model(make_swin_config(config["data"]["dir"]).model, 4)
  variables, lines = warm_start.load(
    workdir, model, dataclasses.replace(dataset, classes=classes), 32, jax.random.key(1)
  )
  assert variables["params"]["head"]["kernel"].shape == (1, 1, 8, 4)
  others = [{k: v for k, v in tree.items() if k != "head"} for tree in (variables["params"], trained.params)]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *others))
  assert any("initial values kept: output.weight (3, 8, 1, 1)" in line for line in lines)
  assert any("classes of the weights" in line and "ring" in line for line in lines)


def test_weights_of_another_network_are_refused(source_run, dataset):
  _, workdir, _ = source_run
  narrow = sr.SwinUNet(num_classes=3, embed_dim=16, depths=(2, 2), heads=(2, 4), window=4)
  with pytest.raises(UserError, match=r"(?s)config.init_from = .*source.*patch_embed.proj.weight"):
    warm_start.load(workdir, narrow, dataset, 32, jax.random.key(0))
  with pytest.raises(UserError, match=r"config.init_from = .*weights of a SwinUNet, not of a UNet"):
    warm_start.load(workdir, sr.UNet(num_classes=3), dataset, 32, jax.random.key(0))
  with pytest.raises(UserError, match="embed_dim = 8, this one has 16"):
    warm_start.load(workdir, narrow, dataset, 32, jax.random.key(0))


def test_weights_that_are_not_there_are_missed_before_anything_else(small_config, tmp_path):
  small_config.init_from = "nowhere.pth"
  with pytest.raises(UserError, match=r"nowhere.pth'?: no such workdir or file.*--config.init_from= to start"):
    train(small_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_new_head_follows_the_seed_and_input_channels_the_dataset(source_run, dataset, tmp_path):
  _, workdir, _ = source_run
  model = build_model(make_swin_config("unused").model, 4)
  heads = [
    warm_start.load(workdir, model, dataset, 32, jax.random.key(seed))[0]["params"]["head"]["kernel"] for seed in (0, 1)
  ]
  assert not np.allclose(*heads)
  unet = sr.UNet(num_classes=3, widths=(4, 6, 8))
  rgb = random_variables(unet, jnp.zeros((1, 32, 32, 3)), train=False)
  write_weights(sr.to_pytorch(rgb, unet), tmp_path / "rgb.npz")
  variables, lines = warm_start.load(tmp_path / "rgb.npz", unet, dataset, 32, jax.random.key(0))
  assert variables["params"]["stem"]["conv1"]["kernel"].shape == (3, 3, 1, 4)
  assert any("resized: inc.double_conv.0.weight" in line for line in lines)


def test_an_encoder_alone_starts_a_training_but_is_no_predictor(source_run, dataset, tmp_path):
  config, workdir, _ = source_run
  whole = interchange.state_dict(load_trained(workdir))
  encoder = {k: v for k, v in whole.items() if k.startswith(("patch_embed.", "layers.", "norm."))}
  write_weights(encoder, tmp_path / "encoder.npz")
  with pytest.raises(UserError, match="cannot predict; start a training from them"):
    interchange.write_workdir(tmp_path / "encoder.npz", tmp_path / "w", config)
  model = build_model(config.model, 3)
  _, lines = warm_start.load(tmp_path / "encoder.npz", model, dataset, 32, jax.random.key(0))
  assert "an ImageNet encoder: 13 of them mirrored" in lines[0]
  del encoder["layers.0.downsample.reduction.weight"]
  write_weights(encoder, tmp_path / "torn.npz")
  with pytest.raises(UserError, match=r"missing: layers.0.downsample.reduction.weight"):
    warm_start.load(tmp_path / "torn.npz", model, dataset, 32, jax.random.key(0))


def test_converted_weights_predict_and_start_but_do_not_continue(prepared, tmp_path):
  config = make_small_config(prepared)
  model, variables = random_weights(config, 3)
  file, workdir = tmp_path / "weights.safetensors", tmp_path / "converted"
  write_weights(sr.to_pytorch(variables, model), file)
  lines = interchange.write_workdir(file, workdir, config)
  assert any("all of them" in line for line in lines)
  assert any("background, disc, square" in line for line in lines)
  assert any("intensities window -200 to 200, orientation ras" in line for line in lines)

  predictor = sr.load(workdir)
  assert (predictor.step, predictor.val_dice) == (0, None)
  images = uniform(0, (2, 32, 32, 1))
  expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(predictor.predict_fn(images), expected, rtol=1e-5, atol=1e-6)

  with pytest.raises(UserError, match=r"converted weights, not a run.*--config\.init_from"):
    train(config, workdir)
  with pytest.raises(UserError, match="holds checkpoints already"):
    interchange.write_workdir(file, workdir, config)
  config.init_from = str(workdir)
  config.train.steps = 1
  assert int(train(config, tmp_path / "run").step) == 1


def test_export_and_conversion_are_each_others_reverse(source_run, tmp_path):
  config, workdir, trained = source_run
  lines = interchange.export(workdir, tmp_path / "weights.safetensors")
  assert "of step 2" in lines[0]
  tensors = read_weights(tmp_path / "weights.safetensors")
  assert all(name.startswith("swin_unet.") for name in tensors)
  interchange.write_workdir(tmp_path / "weights.safetensors", tmp_path / "again", config)
  again = sr.load(tmp_path / "again", checkpoint="latest")
  images = jnp.ones((1, 32, 32, 1))
  np.testing.assert_array_equal(again.predict_fn(images), sr.load(workdir).predict_fn(images))
  assert jax.tree.leaves(trained.params)


def test_what_conversion_needs_to_know_is_asked_for(prepared, tmp_path):
  config = make_small_config(prepared)
  model, variables = random_weights(config, 4)
  file = tmp_path / "weights.npz"
  write_weights(sr.to_pytorch(variables, model), file)
  with pytest.raises(UserError, match=r"for 4 classes with the background, .* has 3: .*disc, square"):
    interchange.write_workdir(file, tmp_path / "w", config)
  config.data.name = "acdc"
  with pytest.raises(UserError, match=r"(?s)not prepared as config.data.name = 'acdc'.*classes: .*orientation: stored"):
    interchange.write_workdir(file, tmp_path / "w", config)
  config.data.name, config.data.dir = "", str(tmp_path / "unprepared")
  with pytest.raises(UserError, match="what were the weights trained on"):
    interchange.write_workdir(file, tmp_path / "w", config)
  config.data.name = "acdc"
  lines = interchange.write_workdir(file, tmp_path / "w", config)
  assert any("right ventricle" in line for line in lines)
  assert any("minmax, orientation stored" in line and "unprepared is no prepared dataset" in line for line in lines)


def test_a_recipe_for_a_published_dataset_refuses_other_classes(prepared, tmp_path):
  config = make_small_config(prepared)
  config.data.name = "acdc"
  with pytest.raises(UserError, match=r"disc, square, but config.data.name = 'acdc' has .*myocardium"):
    train(config, tmp_path)
