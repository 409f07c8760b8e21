"""Swin-Unet with SCR and IFD on ACDC (cardiac MR: right ventricle, myocardium, left ventricle).

  python train.py --config=configs/acdc_swin_unet.py --config.data.dir=data/acdc --workdir=runs/acdc_swin_unet
  python eval.py --workdir=runs/acdc_swin_unet

It starts from the ImageNet weights of Swin-T (`swin_tiny_patch4_window7_224.pth` of the Swin Transformer's authors),
which `config.init_from` names; --config.init_from= starts from random weights.

Published (paper protocol, 20 test patients): Swin-Unet 90.00 % Dice, with SCR and IFD 91.49; nnU-Net 91.61.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).

Time, estimated from a measured step (batch 8, float32, two CPU cores):
400 epochs of about 1,300 slices at 1.1 slices a second are 5 to 6 days.
Not measured on a GPU yet.
"""

from selfreg_jax import config as configs


def get_config(variant: str = "selfreg"):
  """AdamW at a constant rate, batch 12, 400 epochs, ImageNet start."""
  config = configs.base_config("swin_unet")
  config.init_from = "weights/swin_tiny_patch4_window7_224.pth"
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
