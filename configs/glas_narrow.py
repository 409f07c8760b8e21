"""A narrow UNet on GlaS at 96 pixels: for ablations on two CPU cores, some 100 seconds a run.

  python train.py --config=configs/glas_narrow.py --workdir=runs/glas_narrow
  python -m selfreg_jax.analysis.ablation --config=configs/ablation_terms.py:glas_narrow --workdir=runs/glas_terms

It is not the paper's network: a sixteenth of its parameters, less than half its resolution. The loss, Adam, its first
rate and the batch are those of `glas_unet.py`; the rate falls once, along half a cosine, over 50 epochs, after which
the validation Dice has stopped rising. All runs take the same steps: there is no early stopping.

Images that were made smaller beforehand are augmented faster; docs/ablations.md shows how.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).
"""

from selfreg_jax.analysis.ablation.design import load_run


def get_config(variant: str = "selfreg"):
  """A quarter of the width of `glas_unet.py`, less than half its image size, 50 epochs."""
  config = load_run(__file__, f"glas_unet:{variant}")
  config.data.image_size = 96
  config.model.widths = (16, 32, 64, 128, 128)
  config.optimizer.cosine_period = 50
  config.optimizer.cosine_minimum = 1e-5
  config.train.epochs = 50
  config.train.validate_every = 85  # 5 epochs of 68 images
  config.train.patience = 0
  return config
