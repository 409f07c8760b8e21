"""The paper's two sweeps: the weight of SCR with that of IFD at 0.015, and the other way round.

  python -m selfreg_jax.analysis.ablation --config=configs/ablation_lambda.py --workdir=runs/ablation_lambda

Behind a colon any config file of this folder as the base of all variants: `:quickstart` (the default, on the phantom),
`:glas_narrow`, `:monuseg_narrow`, `:glas_unet`, `:monuseg_unet`, ... In mode vmap all thirteen variants of all seeds
are one program. The paper finds 0.015 best for both, on GlaS and MoNuSeg.
"""

from selfreg_jax.analysis.ablation.design import ablation_config, load_run

WEIGHTS = (0.15, 0.1, 0.05, 0.015, 0.01, 0.005, 0.001)
CENTER = 0.015


def get_config(base: str = "quickstart"):
  """Thirteen variants of a run, three seeds each."""
  sweeps = {
    f"{term}_{weight}": {f"loss.{term}_weight": weight, f"loss.{other}_weight": CENTER}
    for term, other in (("scr", "ifd"), ("ifd", "scr"))
    for weight in WEIGHTS
    if weight != CENTER
  }
  center = {f"both_{CENTER}": {"loss.scr_weight": CENTER, "loss.ifd_weight": CENTER}}
  return ablation_config(load_run(__file__, base), variants=center | sweeps, reference=f"both_{CENTER}")
