import json

import pytest

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError


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


def test_differences_leave_out_what_changes_no_number():
  ours, theirs = usable(), usable()
  ours.train.log_every, ours.data.dir = 7, "moved"
  ours.seed = 3
  assert configs.differences(ours, theirs) == ["config.seed: 0 -> 3"]


def test_every_field_has_a_rule_or_is_free():
  free = {"data.verify"}
  assert set(configs.flatten(configs.base_config())) == set(configs._RULES) | free
