"""The paper's UNet with SCR and IFD on GlaS (gland segmentation in H&E images), with UCTransNet's settings.

  python -m selfreg_jax.data.prepare --dataset=glas --source=ARCHIVE --output=data/glas
  python train.py --config=configs/glas_unet.py --config.data.dir=data/glas --workdir=runs/glas_unet
  python eval.py --workdir=runs/glas_unet

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default). Cross-validation: prepare
with --folds=5 and train once for each --config.data.fold.

Published (paper protocol, 80 test images): UNet 85.45 % Dice, UCTransNet 90.18, UNet with SCR and IFD 91.62 in the main
table; its ablation has 90.66 with SCR, 89.38 with IFD, 90.93 with both. An independent re-run got 89.30.

Time, estimated from a measured step (batch 8, float32, two CPU cores):
some 150 epochs of 68 images until it stops at 0.7 images a second are 4 hours.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """Adam, cosine warm restarts, batch 4, early stopping on the validation Dice, random start."""
  config = configs.base_config("unet")
  config.data.name = "glas"
  config.data.dir = "data/glas"
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
