"""Swin-Unet with SCR and IFD on MoNuSeg (nuclei in H&E images), with UCTransNet's settings.

  python -m selfreg_jax.data.prepare --dataset=monuseg --source=ARCHIVE --output=data/monuseg
  python train.py --config=configs/monuseg_swin_unet.py --config.data.dir=data/monuseg --workdir=runs/monuseg_swin_unet
  python eval.py --workdir=runs/monuseg_swin_unet

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default). Cross-validation: prepare
with --folds=5 and train once for each --config.data.fold.

The paper has no number for the Swin-Unet on this dataset; the UNet's stand here for orientation.

Published (paper protocol, 14 test images): UNet 76.45 % Dice (others measured 78.23), with SCR 79.92, with IFD 79.38,
with both 80.18.

Time, estimated from a measured step (batch 8, float32, two CPU cores):
some 150 epochs of 24 images until it stops at 1.1 images a second are 1 hour.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """Adam, cosine warm restarts, batch 4, early stopping on the validation Dice, random start."""
  config = configs.base_config("swin_unet")
  config.data.name = "monuseg"
  config.data.dir = "data/monuseg"
  config.data.batch_size = 4
  config.loss.ce_weight = config.loss.dice_weight = 0.5
  config.loss.scr_weight = config.loss.ifd_weight = 0.015
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.0
  config.optimizer.schedule = "cosine"
  config.optimizer.cosine_period = 10
  config.optimizer.cosine_minimum = 1e-4
  config.train.epochs = 2000
  config.train.validate_every = 0
  config.train.patience = 50
  return configs.select_terms(config, variant)
