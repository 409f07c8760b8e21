"""Where the paper's text and the authors' code differ, and other choices that the method could have made.

  python -m selfreg_jax.analysis.ablation --config=configs/ablation_design.py --workdir=runs/ablation_design

Behind a colon any config file of this folder as the base of all variants: `:quickstart` (the default, on the phantom),
`:glas_narrow`, `:monuseg_narrow`, `:glas_unet`, ... Most variants are programs of their own, also in mode vmap; there
only their seeds run side by side.
"""

from selfreg_jax.analysis.ablation.design import ablation_config, load_run


def get_config(base: str = "quickstart"):
  """Eight variants of a run with both terms, three seeds each."""
  return ablation_config(
    load_run(__file__, base),
    variants={
      "code": {},  # the authors' code: channels ordered by response, gradients through both halves
      "paper": {"loss.ifd_order": "index", "loss.ifd_stop_gradient": "top"},  # the paper's text
      "order_index": {"loss.ifd_order": "index"},
      "stop_gradient_top": {"loss.ifd_stop_gradient": "top"},
      "p_1": {"loss.ifd_p": 1.0},
      "teacher_deepest": {"loss.scr_teacher": "deepest_decoder"},
      "pairing_index": {"loss.scr_pairing": "index"},
      "pairing_cosine": {"loss.scr_pairing": "cosine"},
    },
    reference="code",
  )
