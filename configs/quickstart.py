"""A small network with SCR and IFD on made-up CT volumes, for two CPU cores: a narrow UNet, or a Swin-Unet.

python -m selfreg_jax.data.prepare --dataset=phantom --output=data/phantom
python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python eval.py --workdir=runs/quickstart

python train.py --config=configs/quickstart.py:swin --workdir=runs/quickstart_swin

Expected: 85 to 92 % mean Dice on the six test cases for the UNet in 4 minutes, about 85 % for the Swin-Unet in 8.
"""

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError


def get_config(network: str = "unet"):
  """The quickstart's config for "unet" or "swin"."""
  if network not in ("unet", "swin"):
    raise UserError(f"configs/quickstart.py:{network}: it takes :unet (the default) or :swin")
  config = configs.base_config("swin_unet" if network == "swin" else "unet")
  config.data.dir = "data/phantom"
  config.data.batch_size = 8
  config.data.image_size = 96
  config.optimizer.name = "adamw"
  config.train.validate_every = 100
  config.train.log_every = 25
  if network == "swin":
    config.model.embed_dim = 48
    config.model.depths = (2, 2, 2)
    config.model.heads = (3, 6, 12)
    config.model.window = 6
    config.model.drop_path = 0.1
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 900
  else:
    config.model.widths = (16, 32, 64, 128, 128)
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 700
  return config
