"""Redundancy of every block during training, on the same few validation slices every time."""

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from selfreg_jax import mesh as meshes
from selfreg_jax import processes
from selfreg_jax.analysis.redundancy import Moments, batch_moments, redundancy
from selfreg_jax.analysis.taps import TappedNetwork, in_order
from selfreg_jax.data import augment
from selfreg_jax.data.manifest import CaseArrays, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.training.logging import RunLogger
from selfreg_jax.training.step import TrainState

_SLICES = 16


class Monitor:
  """Writes mean |correlation| and effective rank of every block; done by the first process, on its own devices.

  Raises:
    UserError: it is wanted and there are no validation cases.
  """

  def __init__(self, config: ml_collections.ConfigDict, manifest: Manifest, model: nn.Module, mesh: Mesh):
    if config.train.analyze_every and not manifest.split("val"):
      raise UserError(
        f"config.train.analyze_every = {config.train.analyze_every}: looks at validation cases, of which "
        f"{config.data.dir} has none; leave it 0, or prepare the dataset with some"
      )
    self._config = config
    self._manifest = manifest
    self._mesh = meshes.local_mesh(mesh)
    self._network = TappedNetwork.of(model)
    self._moments = meshes.jit_for(self._mesh, self._block_moments)

  def run(self, logger: RunLogger, state: TrainState, step: int) -> None:
    """Measures and records.

    Args:
      logger: where the numbers go.
      state: whose network is looked at.
      step: of the state.
    """
    with processes.together():
      if processes.is_first():
        self._record(logger, state, step)

  def _record(self, logger: RunLogger, state: TrainState, step: int) -> None:
    start = time.monotonic()
    variables = meshes.local_copy(state.evaluated, self._mesh)
    images, weights = self._batch
    moments = jax.device_get(self._moments(variables, images, weights))
    found = {name: redundancy(moments[name]) for name in in_order(moments)}
    scalars = {f"analysis/mean_abs_correlation/{name}": one.mean_abs_correlation for name, one in found.items()}
    scalars |= {f"analysis/effective_rank/{name}": one.effective_rank for name, one in found.items()}
    line = "  ".join(f"{name} {one.mean_abs_correlation:.2f}" for name, one in found.items())
    logger.scalars(step, scalars, f"step {step}  mean |r|  {line}  in {time.monotonic() - start:.1f} s")

  @functools.cached_property
  def _batch(self) -> Any:
    """Slices with foreground, spread over the validation cases, as the network sees them, and which of them count."""
    arrays, size = CaseArrays(self._config.data.dir), self._config.data.image_size
    cases = self._manifest.split("val")
    slices = [(case, index) for case in cases for index in (case.foreground_slices or range(case.shape[0]))]
    chosen = [slices[place] for place in np.linspace(0, len(slices) - 1, min(_SLICES, len(slices))).round().astype(int)]
    images = []
    for case, index in chosen:
      rows, columns = (augment.spline_matrix(length, size) for length in case.shape[1:3])
      values = np.asarray(arrays.image(case)[index], np.float64) * self._manifest.scale
      images.append(np.einsum("ih,hwc,jw->ijc", rows, values, columns, optimize=True).astype(np.float32))
    missing = -len(images) % self._mesh.size
    batch = np.pad(np.stack(images), [(0, missing)] + [(0, 0)] * 3)
    weights = (np.arange(len(batch)) < len(images)).astype(np.float32)
    return meshes.place_batch((batch, weights), self._mesh)

  def _block_moments(self, variables: Any, images: jax.Array, weights: jax.Array) -> dict[str, Moments]:
    _, outputs = self._network(variables, images)

    def moments(feature_map: jax.Array) -> Moments:
      shape = (len(weights), *feature_map.shape[1:3])
      return batch_moments(feature_map, jnp.broadcast_to(weights[:, None, None], shape))

    return {name: moments(feature_map) for name, feature_map in self._network.maps(outputs).items()}
