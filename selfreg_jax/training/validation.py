"""Validation during training: whole cases through the network, spread over the processes, and a panel to look at."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from selfreg_jax import mesh as meshes
from selfreg_jax import processes
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, Manifest
from selfreg_jax.evaluation import metrics as volume_metrics
from selfreg_jax.evaluation import protocols, report
from selfreg_jax.evaluation.inference import PredictFn, SlicePredictor
from selfreg_jax.training.logging import RunLogger
from selfreg_jax.training.step import TrainState

_PANEL_SLICES = 4
_PANEL_WIDTH = 900  # pixels that small slices are enlarged to


class ValidationInterruptedError(Exception):
  """The run is to stop, in this process or another one; what was validated so far does not count."""


class Validation:
  """Whole validation cases through the network: sound-protocol Dice, curves, and a panel of slices.

  Each process predicts its share of the cases on its own devices; the panel shows cases of the first process.
  """

  def __init__(self, config: ml_collections.ConfigDict, manifest: Manifest, apply: Any, mesh: Mesh):
    self._manifest = manifest
    self._cases = manifest.split("val")
    self._own = processes.share_of(self._cases)
    self._arrays = manifests.CaseArrays(config.data.dir)
    self._apply = apply
    self._mesh = meshes.local_mesh(mesh)
    self._predictor = SlicePredictor(config.data.image_size, config.eval.batch_size, self._mesh)

  def run(
    self, logger: RunLogger, state: TrainState, step: int, *, stop: Callable[[], bool] = lambda: False
  ) -> float | None:
    """Validates and records.

    Args:
      logger: where the scores, a panel and the curves go.
      state: whose network is validated.
      step: of the state.
      stop: asked between cases whether the run is to stop: grace times are shorter than validations can be.

    Returns:
      The mean foreground Dice, or None where nothing can be scored.

    Raises:
      ValidationInterruptedError: it was to stop; raised in all processes.
    """
    if not self._cases:
      logger.curves()
      return None
    start = time.monotonic()
    predict_fn = functools.partial(self._apply, meshes.local_copy(state.evaluated, self._mesh))
    with processes.together():
      own_dice, pictures = self._predict_own(logger, predict_fn, stop)
    complete = len(own_dice) == len(self._own)
    shares = [json.loads(text) for text in processes.gather_texts(json.dumps(own_dice if complete else None))]
    if None in shares:
      raise ValidationInterruptedError
    per_case = processes.merge_shares(shares)
    mean = protocols.mean_foreground_dice([np.array(dice) for dice in per_case])
    scalars = {"val/dice": mean}
    for name, values in zip(self._manifest.classes[1:], np.transpose(per_case), strict=True):
      scored = values[~np.isnan(values)]
      if len(scored):
        scalars[f"val/dice/{name}"] = float(scored.mean())
    line = f"step {step}  validation Dice {mean:.4f} on {len(per_case)} cases in {time.monotonic() - start:.1f} s"
    logger.scalars(step, scalars, line)
    if pictures and processes.is_first():
      panel = report.overlay_panel(*zip(*pictures, strict=True), class_names=self._manifest.classes)
      enlarge = max(_PANEL_WIDTH // panel.shape[1], 1)
      logger.panel(step, panel.repeat(enlarge, axis=0).repeat(enlarge, axis=1))
    logger.curves()
    return None if np.isnan(mean) else mean

  def _predict_own(
    self, logger: RunLogger, predict_fn: PredictFn, stop: Callable[[], bool]
  ) -> tuple[list[list[float]], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Dice of each of this process's cases by class, as far as it came before it was to stop; slices for the panel."""
    own_dice, pictures = [], []
    for index, case in enumerate(self._own):
      if stop():
        break
      logger.alive(f"validating case {index + 1}/{len(self._own)}")
      image, truth = self._arrays.image(case), self._arrays.label(case)
      prediction = self._predictor.classes(predict_fn, image, scale=self._manifest.scale)
      confusion = volume_metrics.confusion_matrix(prediction, truth, num_classes=self._manifest.num_classes)
      own_dice.append(list(protocols.dice_per_class(confusion)))
      pictures += list(self._choose(index, case, image, truth, prediction))
    return own_dice, pictures

  def _choose(
    self, index: int, case: Case, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Slices of a case for the panel: evenly spaced among those with foreground, the same at every validation."""
    shares = [len(part) for part in np.array_split(range(_PANEL_SLICES), len(self._own))]
    candidates = case.foreground_slices or range(case.shape[0])
    places = np.linspace(0, len(candidates) - 1, shares[index] + 2)[1:-1]
    for slice_index in (candidates[round(place)] for place in places):
      arrays = (image[slice_index] * np.float32(self._manifest.scale), truth[slice_index], prediction[slice_index])
      yield tuple(report.radiological(array, case.axcodes) for array in arrays)
