"""What each term of the method is worth: none, SCR, IFD, both, and plain deep supervision as the usual alternative.

  python -m selfreg_jax.analysis.ablation --config=configs/ablation_terms.py --workdir=runs/ablation_terms

Behind a colon any config file of this folder as the base of all variants: `:quickstart` (the default, on the phantom),
`:glas_narrow` and `:monuseg_narrow` (about half an hour each on two CPU cores), `:glas_unet`, `:monuseg_unet`, ...
"""

from selfreg_jax.analysis.ablation.design import ablation_config, load_run


def get_config(base: str = "quickstart"):
  """Five variants of a run, three seeds each."""
  neither = {"loss.scr_weight": 0.0, "loss.ifd_weight": 0.0}
  return ablation_config(
    load_run(__file__, base),
    variants={
      "none": neither,
      "scr": {"loss.ifd_weight": 0.0},
      "ifd": {"loss.scr_weight": 0.0},
      "selfreg": {},
      "deep_supervision": neither | {"model.deep_supervision": True, "loss.deep_supervision_weight": 1.0},
    },
    reference="none",
  )
