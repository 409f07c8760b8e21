"""A network that trains in seconds, for the processes that fault tests start; fields are overridden by flags."""

from selfreg_jax import config as configs


def get_config(network: str = "unet"):
  """The config for "unet" or "swin_unet"."""
  config = configs.base_config(network)
  config.data.batch_size = 8
  config.data.image_size = 32
  config.data.threads = 1
  config.eval.batch_size = 4
  config.optimizer.learning_rate = 1e-2 if network == "unet" else 1e-3
  config.train.steps = 20
  config.train.validate_every = 10
  config.train.checkpoint_every = 2
  config.train.log_every = 1
  if network == "unet":
    config.model.widths = (4, 6, 8)
    config.optimizer.name = "adamw"
  else:
    config.model.embed_dim = 12
    config.model.depths = (1, 1)
    config.model.heads = (2, 4)
    config.model.window = 4
  return config
