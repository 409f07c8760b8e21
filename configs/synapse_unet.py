"""The paper's UNet with SCR and IFD on Synapse (BTCV abdominal CT, 8 organs), with the authors' default settings.

  python train.py --config=configs/synapse_unet.py --config.data.dir=data/synapse --workdir=runs/synapse_unet
  python eval.py --workdir=runs/synapse_unet

Published (paper protocol, 12 test cases): plain UNet 76.85 % Dice and 39.70 voxels HD95; with SCR and IFD the paper
reports 3.49 points more Dice, 80.34. One run: expect a point up or down.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).

Time, estimated from a measured step (batch 8, float32, two CPU cores):
150 epochs of 2,211 slices at 0.7 slices a second are 5 to 6 days.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """SGD with polynomial decay, batch 24, 150 epochs, random start; `base_config` holds the rest of the recipe."""
  config = configs.base_config("unet")
  config.data.name = "synapse"
  config.data.dir = "data/synapse"
  config.data.batch_size = 24
  config.loss.ce_weight, config.loss.dice_weight = 0.4, 0.6
  config.loss.scr_weight = config.loss.ifd_weight = 0.015
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.01
  config.optimizer.schedule = "poly"
  config.train.epochs = 150
  return configs.select_terms(config, variant)
