"""A narrow UNet with SCR and IFD on made-up CT volumes, for two CPU cores.

python -m selfreg_jax.data.prepare --dataset=phantom --output=data/phantom
python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python eval.py --workdir=runs/quickstart
"""

from selfreg_jax import config as configs


def get_config():
  """The quickstart's config."""
  config = configs.base_config()
  config.data.dir = "data/phantom"
  config.data.batch_size = 8
  config.data.image_size = 96
  config.model.widths = (16, 32, 64, 128, 128)
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-3
  config.train.steps = 700
  config.train.validate_every = 100
  config.train.log_every = 25
  return config
