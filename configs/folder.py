"""The paper's UNet on a folder of one's own, prepared with `python -m selfreg_jax.data.prepare --dataset=msd ...`.

  python train.py --config=configs/folder.py --config.data.dir=DATA --workdir=RUN

Full width at 224 pixels wants a GPU (17 M parameters). On a laptop shrink it, for example
  --config.data.image_size=128 --config.data.batch_size=8 --config.model.widths='(16, 32, 64, 128, 128)'
"""

from selfreg_jax import config as configs


def get_config():
  """AdamW with a decaying rate: it needs no tuning to a dataset's size, unlike the paper's SGD."""
  config = configs.base_config()
  config.data.batch_size = 12
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.train.epochs = 150
  config.train.validate_every = 500
  config.train.log_every = 25
  config.eval.batch_size = 12
  return config
