"""Made-up networks for the analysis."""

import jax
import numpy as np


def random_variables(model, images, **arguments):
  """Variables of a module without the time that its own initialization takes; batch statistics all 1."""
  shapes, rng = jax.eval_shape(lambda: model.init(jax.random.key(0), images, **arguments)), np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes["params"])
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))
  return {"params": params, "batch_stats": ones}
