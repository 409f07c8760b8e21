"""Swin-Unet with SCR and IFD on Synapse (BTCV abdominal CT, 8 organs), as in the authors' command.

  python train.py --config=configs/synapse_swin_unet.py --config.data.dir=data/synapse --workdir=runs/synapse_swin_unet
  python eval.py --workdir=runs/synapse_swin_unet

It starts from the ImageNet weights of Swin-T (`swin_tiny_patch4_window7_224.pth` of the Swin Transformer's authors),
which `config.init_from` names; --config.init_from= starts from random weights.

Published (paper protocol, 12 test cases): Swin-Unet 79.13 % Dice and 21.55 voxels HD95; with SCR and IFD 80.54 % Dice.
Independent re-runs of the plain Swin-Unet gave 76.0 to 78.0.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).

Time, estimated from a measured step (batch 8, float32, two CPU cores):
150 epochs of 2,211 slices at 1.1 slices a second are 3 to 4 days.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """SGD with polynomial decay, batch 32, 150 epochs, ImageNet start."""
  config = configs.base_config("swin_unet")
  config.init_from = "weights/swin_tiny_patch4_window7_224.pth"
  config.data.name = "synapse"
  config.data.dir = "data/synapse"
  config.data.batch_size = 32
  config.loss.ce_weight, config.loss.dice_weight = 0.4, 0.6
  config.loss.scr_weight = config.loss.ifd_weight = 0.010
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.05
  config.optimizer.schedule = "poly"
  config.train.epochs = 150
  return configs.select_terms(config, variant)
