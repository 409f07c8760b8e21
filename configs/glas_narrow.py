"""A narrow UNet on GlaS at 112 pixels with the recipe of `glas_unet.py`: for ablations on two CPU cores.

  python train.py --config=configs/glas_narrow.py --workdir=runs/glas_narrow
  python -m selfreg_jax.analysis.ablation --config=configs/ablation_terms.py:glas_narrow --workdir=runs/glas_terms

It is not the paper's network: a sixteenth of its parameters, half its resolution. It validates every 85 steps and stops
when the validation Dice has not risen for 30 epochs (68 images: 17 steps each), after 120 epochs at the latest.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).
"""

from selfreg_jax.analysis.ablation.design import load_run


def get_config(variant: str = "selfreg"):
  """The recipe of `glas_unet.py` for a quarter of the width, half the image size and a few minutes."""
  config = load_run(__file__, f"glas_unet:{variant}")
  config.data.image_size = 112
  config.model.widths = (16, 32, 64, 128, 128)
  config.train.epochs = 120
  config.train.validate_every = 85
  config.train.patience = 30
  return config
