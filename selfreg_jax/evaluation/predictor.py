"""A trained workdir as a Python function: volume in, class map on the same grid out."""

import functools
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from selfreg_jax import mesh as meshes
from selfreg_jax import workdir as workdirs
from selfreg_jax.data import cases
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation.inference import PredictFn, SlicePredictor, make_apply
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.checkpoints import Checkpoints


class Predictor:
  """Predicts class maps of volumes in any orientation with the weights of a workdir.

  Attributes:
    config: of the run.
    dataset: what the network was trained on.
    step: of the checkpoint.
    val_dice: mean foreground Dice of the checkpoint on the validation cases; None where there were none.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: DatasetInfo,
    variables: dict[str, Any],
    *,
    mesh: Mesh,
    step: int,
    val_dice: float | None,
  ):
    self.config = config
    self.dataset = dataset
    self.step = step
    self.val_dice = val_dice
    self.slices = SlicePredictor(config.data.image_size, config.eval.batch_size, mesh)
    apply = make_apply(build_model(config.model, len(dataset.classes)))
    self.predict_fn: PredictFn = functools.partial(apply, variables)

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
      ValueError: a volume that is not three-dimensional, or not finite.
    """
    if volume.ndim != 3:
      raise ValueError(f"expected a volume (x, y, z), got shape {volume.shape}")
    if not np.isfinite(volume).all():
      raise ValueError("the volume holds NaN or infinite voxels")
    orientation = "stored" if affine is None else self.dataset.orientation
    geometry = cases.Geometry(
      affine=np.eye(4) if affine is None else np.asarray(affine, float),
      file_shape=volume.shape,
      orientation=orientation,
      axis=self.dataset.axis,
    )
    slices = geometry.to_slices(cases.apply_intensity(volume, self.dataset.intensity))[..., None]
    if not probabilities:
      return geometry.from_slices(self.slices.classes(self.predict_fn, slices))
    by_class = self.slices.probabilities(self.predict_fn, slices)
    classes = geometry.from_slices(by_class.argmax(-1).astype(np.uint8))
    return classes, np.stack([geometry.from_slices(by_class[..., c]) for c in range(by_class.shape[-1])], axis=-1)


def load(workdir: str | os.PathLike, *, checkpoint: str = "best") -> Predictor:
  """Loads a trained workdir for prediction.

  Example:
    >>> predictor = load("runs/quickstart")
    >>> image = nibabel.load("case.nii.gz")
    >>> classes = predictor(image.get_fdata(), affine=image.affine)

  Args:
    workdir: of `train.py`.
    checkpoint: "best" (by validation Dice; the newest where none was validated) or "latest".

  Returns:
    The predictor.

  Raises:
    UserError: no workdir of a run, or no checkpoint in it yet, or a damaged one.
  """
  config, dataset = workdirs.read_run(workdir)
  checkpoints = Checkpoints(workdir, read_only=True)
  step = checkpoints.best_step() if checkpoint == "best" else checkpoints.latest_step()
  if step is None:
    raise UserError(f"{workdir}: no checkpoint yet; train.py writes the first one at its first validation")
  model = build_model(config.model, len(dataset.classes))
  mesh = meshes.make_mesh(jax.local_devices())
  abstract = meshes.replicated_like(abstract_variables(model, config.data.image_size, dataset.channels), mesh)
  variables = checkpoints.restore_variables(step, abstract)
  return Predictor(config, dataset, variables, mesh=mesh, step=step, val_dice=checkpoints.metric(step))
