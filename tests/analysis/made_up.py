"""Made-up networks and runs for the analysis."""

import jax
import numpy as np

from selfreg_jax.config import base_config
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.checkpoints import CheckpointWriter
from tests.conftest import make_small_config


def random_variables(model, images, **arguments):
  """Variables of a module without the time that its own initialization takes; batch statistics all 1."""
  shapes, rng = jax.eval_shape(lambda: model.init(jax.random.key(0), images, **arguments)), np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes["params"])
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))
  return {"params": params, "batch_stats": ones}


def write_random_run(data, workdir, *, seed=0, network="unet"):
  """A workdir of a narrow network with random weights on a prepared dataset: it need not be good to be analysed."""
  config = make_small_config(data)
  if network == "swin_unet":
    config.model = base_config(network).model
    config.model.embed_dim, config.model.depths, config.model.heads, config.model.window = 4, (2, 2), (1, 2), 4
  info = DatasetInfo.of(manifests.load(data))
  model = build_model(config.model, len(info.classes))
  shapes, rng = abstract_variables(model, config.data.image_size, info.channels), np.random.default_rng(seed)
  variables = {
    "params": jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes["params"]),
    "batch_stats": jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["batch_stats"]),
  }
  workdir.mkdir(parents=True)
  with CheckpointWriter(workdir) as writer:
    writer.save_weights(variables, config, info)
  return workdir
