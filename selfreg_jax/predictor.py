"""A trained workdir as a Python function: volume in, class map on the same grid out."""

import functools
import os

import numpy as np

from selfreg_jax.data import cases
from selfreg_jax.evaluation.inference import PredictFn, SlicePredictor, make_apply
from selfreg_jax.training.checkpoints import Trained, load_trained


class Predictor:
  """Predicts class maps of volumes in any orientation with the weights of a workdir.

  Attributes:
    config: of the run.
    dataset: what the network was trained on.
    step: of the checkpoint.
    val_dice: mean foreground Dice of the checkpoint on the validation cases; None where there were none.
  """

  def __init__(self, trained: Trained):
    self.config = trained.config
    self.dataset = trained.dataset
    self.step = trained.step
    self.val_dice = trained.val_dice
    self.slices = SlicePredictor(trained.config.data.image_size, trained.config.eval.batch_size, trained.mesh)
    self.predict_fn: PredictFn = functools.partial(make_apply(trained.model), trained.variables)

  def geometry(self, shape: tuple[int, int, int], affine: np.ndarray | None) -> cases.Geometry:
    """How the slices that the network sees lie in a volume's grid; see `__call__`."""
    return cases.Geometry(
      affine=np.eye(4) if affine is None else np.asarray(affine, float),
      file_shape=shape,
      orientation="stored" if affine is None else self.dataset.orientation,
      axis=self.dataset.axis,
    )

  def __call__(
    self, volume: np.ndarray, *, affine: np.ndarray | None = None, probabilities: bool = False
  ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Predicts one volume.

    Args:
      volume: (x, y, z) raw intensities in the units of the training files (HU for CT), any size and orientation.
      affine: (4, 4) voxel -> millimetres (RAS+), which tells the orientation; None takes the axes to be as in the
        prepared training data.
      probabilities: also return the softmax probabilities.

    Returns:
      (x, y, z) uint8 class ids on the volume's own grid; with `probabilities` also (x, y, z, classes) float32.

    Raises:
      ValueError: a volume that is not three-dimensional, not real, not finite, or constant; an affine that is none.
    """
    volume = np.asarray(volume)
    if volume.ndim != 3:
      raise ValueError(f"expected a volume (x, y, z), got shape {volume.shape}")
    if volume.dtype.kind not in "biuf":
      raise ValueError(f"expected real numbers, got a volume of {volume.dtype}")
    if not np.isfinite(volume).all():
      raise ValueError("the volume holds NaN or infinite voxels")
    if affine is not None:
      affine = np.asarray(affine, float)
      if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError(f"the affine must be an invertible (4, 4) matrix, got {affine.tolist()}")
    if volume.min() == volume.max():
      raise ValueError(f"the volume is constant: every voxel is {volume.min()}")
    geometry = self.geometry(volume.shape, affine)
    slices = geometry.to_slices(cases.apply_intensity(volume, self.dataset.intensity))[..., None]
    if not probabilities:
      return geometry.from_slices(self.slices.classes(self.predict_fn, slices))
    classes, by_class = self.slices.probabilities(self.predict_fn, slices)
    return geometry.from_slices(classes), geometry.from_slices(by_class)


def load(workdir: str | os.PathLike, *, checkpoint: str = "best") -> Predictor:
  """Loads a trained workdir for prediction.

  Example:
    >>> predictor = load("runs/quickstart")
    >>> image = nibabel.load("case.nii.gz")
    >>> classes = predictor(image.get_fdata(), affine=image.affine)

  Args:
    workdir: of `train.py` or of `selfreg_jax.models.pretrained`.
    checkpoint: "best" (by validation Dice; the newest where none was validated) or "latest".

  Returns:
    The predictor.

  Raises:
    UserError: no workdir of a run, or no checkpoint in it yet, or a damaged one.
  """
  return Predictor(load_trained(workdir, checkpoint=checkpoint))
