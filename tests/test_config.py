import json
import pathlib
import runpy

import pytest

from selfreg_jax import config as configs
from selfreg_jax import loss_parts
from selfreg_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def usable():
  config = configs.base_config()
  config.data.dir = "somewhere"
  return config


def test_the_defaults_need_a_dataset_only():
  configs.validate(usable())
  with pytest.raises(UserError, match=r"config.data.dir = ''"):
    configs.validate(configs.base_config())


def test_an_unknown_field_is_refused_with_the_nearest_name():
  config = usable()
  config.loss.scr_wieght = 0.1
  with pytest.raises(UserError, match=r"config.loss.scr_wieght is not a field.*scr_weight"):
    configs.validate(config)


def test_a_missing_field_is_named():
  config = usable()
  del config.train.steps
  with pytest.raises(UserError, match=r"config.train.steps is missing"):
    configs.validate(config)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("data.batch_size", 2.5, "must be a int"),
    ("data.verify", 1, "must be a bool"),
    ("optimizer.learning_rate", "fast", "must be a float"),
    ("model.widths", (8, 16), "at least three even"),
    ("model.widths", (8, 15, 16), "at least three even"),
    ("model.name", "unett", "one of 'unet'"),
    ("loss.scr_weight", -0.1, "at least 0"),
    ("augment.rotate_probability", 1.5, "between 0 and 1"),
    ("data.image_size", 8, "too small"),
    ("seed", -1, "between 0 and"),
    ("optimizer.learning_rate", float("inf"), "finite"),
  ],
)
def test_wrong_types_and_ranges_are_refused(name, value, message):
  config = usable()
  with config.ignore_type():
    config.update_from_flattened_dict({name: value})
  with pytest.raises(UserError, match=message) as error:
    configs.validate(config)
  assert f"config.{name}" in str(error.value)


def test_everything_wrong_is_told_at_once():
  config = usable()
  config.data.batch_size, config.train.log_every = 0, 0
  with pytest.raises(UserError) as error:
    configs.validate(config)
  assert "config.data.batch_size = 0" in str(error.value)
  assert "config.train.log_every = 0" in str(error.value)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("scr_pairing", "best", "one of random, index, cosine, or your own as package.module:function"),
    ("scr_teacher", "no_such_module:f", "ModuleNotFoundError"),
    ("scr_teacher", "selfreg_jax.losses:no_such_map", "AttributeError"),
    ("scr_pool", "selfreg_jax.losses:STOP_GRADIENTS", "is a tuple, not a function"),
  ],
)
def test_parts_of_the_loss_that_do_not_exist_are_refused(field, value, message):
  config = usable()
  config.loss[field] = value
  with pytest.raises(UserError, match=message) as error:
    configs.validate(config)
  assert f"config.loss.{field} = {value!r}" in str(error.value)


def test_parts_of_the_loss_are_found_by_name_and_in_modules_of_ones_own(tmp_path, monkeypatch):
  from selfreg_jax import losses

  (tmp_path / "my_parts.py").write_text("def mean_teacher(features):\n  return features.encoder[0][0]\n")
  monkeypatch.syspath_prepend(tmp_path)
  config = usable()
  config.loss.scr_teacher = "my_parts:mean_teacher"
  configs.validate(config)
  assert loss_parts.resolve("scr_teacher", "my_parts:mean_teacher").__name__ == "mean_teacher"
  for field, shipped in loss_parts.SHIPPED.items():
    for name, function in shipped.items():
      assert loss_parts.resolve(field, name) is getattr(losses, function)


def test_heads_of_deep_supervision_and_their_weight_go_together():
  config = usable()
  config.model.deep_supervision = True
  with pytest.raises(UserError, match=r"config.model.deep_supervision = True does not go with"):
    configs.validate(config)
  config.loss.deep_supervision_weight = 0.5
  configs.validate(config)
  config.model.deep_supervision = False
  with pytest.raises(UserError, match="the weight needs the heads"):
    configs.validate(config)


def test_a_loss_without_any_supervision_is_refused():
  config = usable()
  config.loss.ce_weight = config.loss.dice_weight = 0.0
  with pytest.raises(UserError, match="nothing would supervise"):
    configs.validate(config)


def test_whole_numbers_pass_as_floats():
  config = usable()
  config.loss.scr_weight = 1
  configs.validate(config)


def test_a_config_survives_json():
  config = usable()
  restored = configs.from_json(json.loads(json.dumps(configs.to_json(config))))
  configs.validate(restored)
  assert configs.differences(restored, config) == []


def test_a_config_from_before_a_field_existed_counts_as_its_default():
  ours, theirs = usable(), usable()
  del theirs.init_from
  del theirs.data.fold
  assert configs.differences(ours, theirs) == []


def test_differences_leave_out_what_changes_no_number():
  ours, theirs = usable(), usable()
  ours.train.log_every, ours.data.dir = 7, "moved"
  ours.seed = 3
  assert configs.differences(ours, theirs) == ["config.seed: 0 -> 3"]


def test_every_field_has_a_rule_or_is_free():
  free = {"data.verify", "init_from", "model.remat", "model.deep_supervision"}
  free |= {f"loss.{field}" for field in loss_parts.SHIPPED}  # which are checked by importing what they name
  fields = set().union(*(configs.flatten(configs.base_config(network)) for network in configs.NETWORKS))
  assert fields == set(configs._RULES) | free


def test_a_network_has_its_own_fields_only():
  config = configs.base_config("swin_unet")
  config.data.dir = "somewhere"
  configs.validate(config)
  config.model.widths = (8, 16, 32)
  with pytest.raises(UserError, match=r"config.model.widths is not a field of a swin_unet"):
    configs.validate(config)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("data.image_size", 256, r"multiple of 224 with windows of 7 and 4 stages; use 224 or 448"),
    ("data.image_size", 128, r"use 224, or another"),
    ("model.window", 8, r"multiple of 256"),
    ("model.heads", (3, 6), r"one number for each"),
    ("model.embed_dim", 27, r"must be even"),
    ("model.heads", (3, 6, 12, 25), r"25 heads must divide the 768 channels of stage 4"),
    ("model.depths", (2,), r"two or more stages"),
    ("model.drop_path", 1.0, r"below 1"),
  ],
)
def test_a_swin_unet_that_cannot_be_is_refused(name, value, message):
  config = configs.base_config("swin_unet")
  config.data.dir = "somewhere"
  config.update_from_flattened_dict({name: value})
  with pytest.raises(UserError, match=message) as error:
    configs.validate(config)
  assert f"config.{name.partition('.')[0]}" in str(error.value)


def load_config(path):
  namespace = runpy.run_path(str(CONFIGS / path.partition(":")[0]))
  return namespace["get_config"](*path.split(":")[1:])


@pytest.mark.parametrize(
  "path",
  [
    *sorted(p.name for p in CONFIGS.glob("*.py") if not p.name.startswith("ablation_")),
    "quickstart.py:swin",
    "folder.py:swin",
  ],
)
def test_every_config_file_is_usable(path):
  config = load_config(path)
  config.data.dir = config.data.dir or "somewhere"
  configs.validate(config)


@pytest.mark.parametrize(
  ("path", "expected"),
  [  # of the paper: optimizer, rate, schedule, batch, epochs, both lambdas, weights of CE and Dice
    ("synapse_unet.py", ("sgd", 0.01, "poly", 24, 150, 0.015, 0.4, 0.6)),
    ("synapse_swin_unet.py", ("sgd", 0.05, "poly", 32, 150, 0.010, 0.4, 0.6)),
    ("acdc_unet.py", ("adamw", 1e-4, "constant", 12, 400, 0.1, 0.3, 0.7)),
    ("acdc_swin_unet.py", ("adamw", 1e-4, "constant", 12, 400, 0.1, 0.3, 0.7)),
    ("glas_unet.py", ("adam", 1e-3, "cosine", 4, 2000, 0.015, 0.5, 0.5)),
    ("glas_swin_unet.py", ("adam", 1e-3, "cosine", 4, 2000, 0.015, 0.5, 0.5)),
    ("monuseg_unet.py", ("adam", 1e-3, "cosine", 4, 2000, 0.015, 0.5, 0.5)),
    ("monuseg_swin_unet.py", ("adam", 1e-3, "cosine", 4, 2000, 0.015, 0.5, 0.5)),
  ],
)
def test_recipes_are_the_papers(path, expected):
  config = load_config(path)
  optimizer, loss = config.optimizer, config.loss
  assert loss.scr_weight == loss.ifd_weight
  assert expected == (
    optimizer.name, optimizer.learning_rate, optimizer.schedule, config.data.batch_size, config.train.epochs,
    loss.scr_weight, loss.ce_weight, loss.dice_weight,
  )  # fmt: skip
  histology = path.startswith(("glas", "monuseg"))
  assert (config.data.image_size, optimizer.momentum) == (224, 0.9)
  assert optimizer.weight_decay == (0 if histology else 1e-4)
  assert config.train.patience == (50 if histology else 0)
  assert bool(config.init_from) == (config.model.name == "swin_unet" and not histology)


@pytest.mark.parametrize("path", ["synapse_unet.py", "acdc_swin_unet.py", "glas_unet.py", "monuseg_swin_unet.py"])
def test_variants_of_a_recipe_switch_terms_off(path):
  whole = load_config(path).loss
  weights = {variant: load_config(f"{path}:{variant}").loss for variant in ("baseline", "scr", "ifd", "selfreg")}
  assert {name: (loss.scr_weight > 0, loss.ifd_weight > 0) for name, loss in weights.items()} == {
    "baseline": (False, False),
    "scr": (True, False),
    "ifd": (False, True),
    "selfreg": (True, True),
  }
  assert weights["scr"].scr_weight == whole.scr_weight
  with pytest.raises(UserError, match="baseline, scr, ifd, selfreg"):
    load_config(f"{path}:both")
