import jax
import numpy as np
import pytest

import selfreg_jax as sr
from selfreg_jax.errors import UserError
from tests.conftest import unet_state_dict


@pytest.fixture(scope="module")
def state_dict():
  return unet_state_dict(2)


def test_every_misfit_is_named(state_dict):
  broken = dict(state_dict)
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


def test_a_file_gives_the_same_as_a_state_dict(state_dict, tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, **state_dict)
  model = sr.UNet(num_classes=2)
  ours, theirs = sr.from_pytorch(path, model, image_size=32), sr.from_pytorch(state_dict, model, image_size=32)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))


def test_weights_of_something_else_are_refused(tmp_path):
  with pytest.raises(UserError, match="not a UNet of the authors"):
    sr.from_pytorch({"conv1.weight": np.zeros((3, 3))}, sr.UNet(num_classes=2))
  (tmp_path / "weights.npz").write_text("not a zip file")
  with pytest.raises(UserError, match=r"weights.npz: cannot be read"):
    sr.from_pytorch(tmp_path / "weights.npz", sr.UNet(num_classes=2))
  with pytest.raises(UserError, match="must be a state dict"):
    sr.from_pytorch(tmp_path / "weights.ckpt", sr.UNet(num_classes=2))
