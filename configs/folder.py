"""The paper's UNet on a folder of one's own, prepared with `python -m selfreg_jax.data.prepare --dataset=msd ...`.

  python train.py --config=configs/folder.py --config.data.dir=DATA --workdir=RUN

With `--config=configs/folder.py:swin` it is the Swin-Unet. --config.init_from=swin_tiny_patch4_window7_224.pth starts
that one from ImageNet weights, --config.init_from=WORKDIR either network from one trained before.

Full width at 224 pixels wants a GPU (17 M parameters). On a laptop shrink it, for example
  --config.data.image_size=128 --config.data.batch_size=8 --config.model.widths='(16, 32, 64, 128, 128)'
"""

from selfreg_jax import config as configs
from selfreg_jax.errors import UserError


def get_config(network: str = "unet"):
  """AdamW with a decaying rate: it needs no tuning to a dataset's size, unlike the paper's SGD."""
  if network not in ("unet", "swin"):
    raise UserError(f"configs/folder.py:{network}: it takes :unet (the default) or :swin")
  config = configs.base_config("swin_unet" if network == "swin" else "unet")
  config.data.batch_size = 12
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.train.epochs = 150
  config.train.validate_every = 500
  config.train.log_every = 25
  config.eval.batch_size = 12
  return config
