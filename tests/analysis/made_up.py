"""Made-up networks and runs for the analysis."""

import jax
import numpy as np

from selfreg_jax.config import base_config
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.checkpoints import CheckpointWriter
from tests.conftest import make_small_config


def random_variables(model, images, *, seed=1, **arguments):
  """Variables of a module without the time that its own initialization takes; all of its blocks are alive."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, **arguments))
  return filled({"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}, seed)


def filled(shapes, seed):
  """Random variables of these shapes: He's deviations, norms that do nothing yet."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[0].key == "batch_stats":
      return np.full(leaf.shape, path[-1].key == "var", leaf.dtype)
    if leaf.ndim == 1:
      return np.full(leaf.shape, path[-1].key == "scale", leaf.dtype)
    return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def write_random_run(data, workdir, *, seed=0, network="unet"):
  """A workdir of a narrow network with random weights on a prepared dataset: it need not be good to be analysed."""
  config = make_small_config(data)
  if network == "swin_unet":
    config.model = base_config(network).model
    config.model.embed_dim, config.model.depths, config.model.heads, config.model.window = 4, (2, 2), (1, 2), 4
  info = DatasetInfo.of(manifests.load(data))
  model = build_model(config.model, len(info.classes))
  variables = filled(abstract_variables(model, config.data.image_size, info.channels), seed)
  workdir.mkdir(parents=True)
  with CheckpointWriter(workdir) as writer:
    writer.save_weights(variables, config, info)
  return workdir
