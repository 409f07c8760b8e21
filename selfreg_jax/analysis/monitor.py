"""Redundancy and attention of every block during training, on the same few validation slices every time."""

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
from selfreg_jax.analysis import grad_cam
from selfreg_jax.analysis.alignment import energy_inside
from selfreg_jax.analysis.redundancy import Moments, batch_moments, redundancy
from selfreg_jax.analysis.taps import TappedNetwork, in_order
from selfreg_jax.data import augment
from selfreg_jax.data.manifest import CaseArrays, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.training.logging import RunLogger
from selfreg_jax.training.step import TrainState

_SLICES = 16


class Monitor:
  """Writes mean |correlation|, effective rank and the share of Grad-CAM energy inside the foreground of every block.

  Done by the first process, on its own devices.

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
    self._measure = meshes.jit_for(self._mesh, self._measures)

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
    moments, inside = jax.device_get(self._measure(variables, *self._batch))
    found = {name: redundancy(moments[name]) for name in in_order(moments)}
    scalars = {f"analysis/mean_abs_correlation/{name}": one.mean_abs_correlation for name, one in found.items()}
    scalars |= {f"analysis/effective_rank/{name}": one.effective_rank for name, one in found.items()}
    scalars |= {f"analysis/cam_inside/{name}": float(inside[name]) for name in found}
    line = "  ".join(f"{name} {one.mean_abs_correlation:.2f} {inside[name]:.2f}" for name, one in found.items())
    seconds = time.monotonic() - start
    logger.scalars(step, scalars, f"step {step}  mean |r|, Grad-CAM inside  {line}  in {seconds:.1f} s")

  @functools.cached_property
  def _batch(self) -> Any:
    """Slices with foreground, spread over the validation cases: images, labels (both of its size), which count."""
    arrays, size = CaseArrays(self._config.data.dir), self._config.data.image_size
    cases = self._manifest.split("val")
    slices = [(case, index) for case in cases for index in (case.foreground_slices or range(case.shape[0]))]
    chosen = [slices[place] for place in np.linspace(0, len(slices) - 1, min(_SLICES, len(slices))).round().astype(int)]
    images, labels = [], []
    for case, index in chosen:
      rows, columns = (augment.spline_matrix(length, size) for length in case.shape[1:3])
      values = np.asarray(arrays.image(case)[index], np.float64) * self._manifest.scale
      images.append(np.einsum("ih,hwc,jw->ijc", rows, values, columns, optimize=True).astype(np.float32))
      places = (augment.nearest_indices(length, size) for length in case.shape[1:3])
      labels.append(arrays.label(case)[index][np.ix_(*places)])
    missing = -len(images) % self._mesh.size
    batch = np.pad(np.stack(images), [(0, missing)] + [(0, 0)] * 3)
    truth = np.pad(np.stack(labels), [(0, missing)] + [(0, 0)] * 2)
    weights = (np.arange(len(batch)) < len(images)).astype(np.float32)
    return meshes.place_batch((batch, truth, weights), self._mesh)

  def _measures(
    self, variables: Any, images: jax.Array, labels: jax.Array, weights: jax.Array
  ) -> tuple[dict[str, Moments], dict[str, jax.Array]]:
    """Moments of every block, and the mean share of its evidence for the foreground that lies inside it."""
    masks = jax.nn.one_hot(labels, self._manifest.num_classes)
    found = grad_cam.grad_cam(self._network, variables, images, masks)
    foreground = labels > 0
    moments, inside = {}, {}
    for name, feature_map in found.maps.items():
      shape = (len(weights), *feature_map.shape[1:3])
      moments[name] = batch_moments(feature_map, jnp.broadcast_to(weights[:, None, None], shape))
      shares, lit = energy_inside(found.evidence[name].sum(axis=0), foreground)
      counted = weights * lit * foreground.any(axis=(1, 2))
      inside[name] = (shares * counted).sum() / counted.sum()  # nan where no slice has any evidence
    return moments, inside
