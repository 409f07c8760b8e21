"""Made-up networks and runs for the analysis."""

from selfreg_jax.config import base_config
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.checkpoints import CheckpointWriter
from tests.conftest import filled, make_small_config


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
