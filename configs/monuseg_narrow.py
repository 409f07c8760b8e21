"""A narrow UNet on MoNuSeg at 128 pixels: for ablations on two CPU cores, some 100 seconds a run.

  python train.py --config=configs/monuseg_narrow.py --workdir=runs/monuseg_narrow
  python -m selfreg_jax.analysis.ablation --config=configs/ablation_terms.py:monuseg_narrow --workdir=runs/monuseg_terms

It is not the paper's network: a sixteenth of its parameters, little more than half its resolution. The loss, Adam, its
first rate and the batch are those of `monuseg_unet.py`; the rate falls once, along half a cosine, over 80 epochs: the
validation Dice has stopped rising long before. All runs take the same steps: there is no early stopping.

Images that were made smaller beforehand are augmented faster; docs/ablations.md shows how.

Behind a colon: `:baseline` (neither term), `:scr`, `:ifd`, `:selfreg` (both, the default).
"""

from selfreg_jax.analysis.ablation.design import load_run


def get_config(variant: str = "selfreg"):
  """A quarter of the width of `monuseg_unet.py`, little more than half its image size, 80 epochs."""
  config = load_run(__file__, f"monuseg_unet:{variant}")
  config.data.image_size = 128
  config.model.widths = (16, 32, 64, 128, 128)
  config.optimizer.cosine_period = 80
  config.optimizer.cosine_minimum = 1e-5
  config.train.epochs = 80
  config.train.validate_every = 60  # 10 epochs of 24 images
  config.train.patience = 0
  return config
