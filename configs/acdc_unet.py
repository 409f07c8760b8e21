"""The paper's UNet with SCR and IFD on ACDC (cardiac MR: right ventricle, myocardium, left ventricle).

  python train.py --config=configs/acdc_unet.py --config.data.dir=data/acdc --workdir=runs/acdc_unet
  python eval.py --workdir=runs/acdc_unet

The paper has no number for this network on ACDC; its Swin-Unet reaches 90.00 % Dice without and 91.49 with SCR and IFD,
nnU-Net 91.61.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).

Time, estimated from a measured step (batch 8, float32, two CPU cores):
400 epochs of about 1,300 slices at 0.7 slices a second are 9 days.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """AdamW at a constant rate, batch 12, 400 epochs, random start."""
  config = configs.base_config("unet")
  config.data.name = "acdc"
  config.data.dir = "data/acdc"
  config.data.batch_size = 12
  config.loss.ce_weight, config.loss.dice_weight = 0.3, 0.7
  config.loss.scr_weight = config.loss.ifd_weight = 0.1
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-4
  config.optimizer.schedule = "constant"
  config.train.epochs = 400
  return configs.select_terms(config, variant)
