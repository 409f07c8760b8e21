"""A narrow UNet on MoNuSeg at 112 pixels with the recipe of `monuseg_unet.py`: for ablations on two CPU cores.

  python train.py --config=configs/monuseg_narrow.py --workdir=runs/monuseg_narrow
  python -m selfreg_jax.analysis.ablation --config=configs/ablation_terms.py:monuseg_narrow --workdir=runs/monuseg_terms

It is not the paper's network: a sixteenth of its parameters, half its resolution. It validates every 60 steps and stops
when the validation Dice has not risen for 80 epochs (24 images: 6 steps each), after 300 epochs at the latest.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).
"""

from selfreg_jax.analysis.ablation.design import load_run


def get_config(variant: str = "selfreg"):
  """The recipe of `monuseg_unet.py` for a quarter of the width, half the image size and a few minutes."""
  config = load_run(__file__, f"monuseg_unet:{variant}")
  config.data.image_size = 112
  config.model.widths = (16, 32, 64, 128, 128)
  config.train.epochs = 300
  config.train.validate_every = 60
  config.train.patience = 80
  return config
