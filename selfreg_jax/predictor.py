"""A trained workdir as a Python function: volume or image in, class map on the same grid out."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from selfreg_jax.data import cases
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import inference
from selfreg_jax.evaluation.inference import PredictFn, SlicePredictor
from selfreg_jax.evaluation.options import Options
from selfreg_jax.evaluation.postprocess import keep_largest_components
from selfreg_jax.training.checkpoints import Trained, load_trained


class Predictor:
  """Predicts class maps of volumes in any orientation, or of images, with the weights of one workdir or several.

  Attributes:
    configs: of the runs.
    config: of the first run.
    dataset: what the network was trained on.
    step: of the checkpoint; of the first of several.
    val_dice: mean foreground Dice of the checkpoint on the validation cases; None where there were none, and for
      several networks.
    options: what is done at test time beyond the protocol.
    slices: brings slices to the network's size and the results back.
    predict_fn: the network, or the average of several, with what `options` ask of it.
  """

  def __init__(self, *trained: Trained, options: Options | None = None):
    """Takes the networks of one or several runs, whose probabilities are then averaged.

    Args:
      *trained: the networks, trained on data of one kind at one image size.
      options: None for none.
    """
    first = trained[0]
    self.configs = tuple(one.config for one in trained)
    self.config = first.config
    self.dataset = first.dataset
    self.step = first.step
    self.val_dice = first.val_dice if len(trained) == 1 else None
    self.options = options or Options()
    self.slices = SlicePredictor(
      first.config.data.image_size, first.config.eval.batch_size, first.mesh, resize=self.options.resize
    )
    members = [functools.partial(inference.make_apply(one.model), one.variables) for one in trained]
    self.predict_fn: PredictFn = members[0] if len(members) == 1 else inference.average_ensemble(members)
    if self.options.tta:
      self.predict_fn = inference.average_mirrored(self.predict_fn)

  def geometry(self, shape: tuple[int, int, int], affine: np.ndarray | None) -> cases.Geometry:
    """How the slices that the network sees lie in a volume's grid; see `__call__`."""
    return cases.Geometry(
      affine=np.eye(4) if affine is None else np.asarray(affine, float),
      file_shape=shape,
      orientation="stored" if affine is None else self.dataset.orientation,
      axis=self.dataset.axis,
    )

  def __call__(
    self,
    array: np.ndarray,
    *,
    affine: np.ndarray | None = None,
    probabilities: bool = False,
  ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Predicts one volume, or one image where the network was trained on images.

    Args:
      array: of a volume (x, y, z) or (x, y, z, channels), of an image (rows, columns) or (rows, columns, channels): raw
        intensities in the units of the training files (HU for CT, 0 to 255 for photographs), any size and orientation.
        A network of three channels takes a grey image as one of three equal colours.
      affine: (4, 4) voxel -> millimetres (RAS+), which tells the orientation; None takes the axes to be as in the
        prepared training data. Images have none.
      probabilities: also return the softmax probabilities, which postprocessing leaves as they are.

    Returns:
      uint8 class ids on the array's own grid, without the channels' axis; with `probabilities` also float32
      probabilities, which have the classes as a further axis.

    Raises:
      ValueError: an array of another shape, not real, not finite, or constant; an affine that is none.
    """
    array = self._with_channels(np.asarray(array))
    _check_values(array)
    if self.dataset.kind == "image":
      if affine is not None:
        raise ValueError("an image has no affine")
      slices, back = array[None], _only_slice
    else:
      if affine is not None:
        affine = np.asarray(affine, float)
        if affine.shape != (4, 4) or not cases.is_invertible(affine):
          raise ValueError(f"the affine must be an invertible (4, 4) matrix, got {affine.tolist()}")
      geometry = self.geometry(array.shape[:3], affine)
      slices, back = geometry.to_slices(array), geometry.from_slices
    slices = np.stack(
      [cases.apply_intensity(channel, self.dataset.intensity) for channel in np.moveaxis(slices, -1, 0)], axis=-1
    )
    by_class = None
    if probabilities:
      classes, by_class = self.slices.probabilities(self.predict_fn, slices)
    else:
      classes = self.slices.classes(self.predict_fn, slices)
    if self.options.postprocess:
      classes, _ = keep_largest_components(classes, num_classes=len(self.dataset.classes))
    return (back(classes), back(by_class)) if probabilities else back(classes)

  def _with_channels(self, array: np.ndarray) -> np.ndarray:
    """The array with its axis of channels, as many as the network takes; raises ValueError where that cannot be."""
    kind, channels = self.dataset.kind, self.dataset.channels
    axes = "(rows, columns)" if kind == "image" else "(x, y, z)"
    rank = 2 if kind == "image" else 3
    if array.ndim not in (rank, rank + 1):
      raise ValueError(f"expected {'an image' if kind == 'image' else 'a volume'} {axes}, got shape {array.shape}")
    array = array if array.ndim == rank + 1 else array[..., None]
    if kind == "image" and channels == 3 and array.shape[-1] == 1:
      array = np.repeat(array, 3, axis=-1)
    if array.shape[-1] != channels:
      raise ValueError(f"the network was trained with {channels} channel(s), got {array.shape[-1]}")
    return array


def _only_slice(slices: np.ndarray) -> np.ndarray:
  return slices[0]


def _check_values(array: np.ndarray) -> None:
  if array.dtype.kind not in "biuf":
    raise ValueError(f"expected real numbers, got an array of {array.dtype}")
  if not np.isfinite(array).all():
    raise ValueError("the array holds NaN or infinite values")
  for channel in range(array.shape[-1]):
    if array[..., channel].min() == array[..., channel].max():
      where = f" in channel {channel}" if array.shape[-1] > 1 else ""
      raise ValueError(f"the array is constant{where}: every value is {array[..., channel].flat[0]}")


def load(
  workdir: str | os.PathLike,
  *,
  checkpoint: str = "best",
  tta: bool = False,
  resize: str = "labels",
  postprocess: bool = False,
) -> Predictor:
  """Loads a trained workdir for prediction.

  Example:
    >>> predictor = load("runs/quickstart")
    >>> image = nibabel.load("case.nii.gz")
    >>> classes = predictor(image.get_fdata(), affine=image.affine)

  Args:
    workdir: of `train.py` or of `selfreg_jax.models.pretrained`.
    checkpoint: "best" (by validation Dice; the newest where none was validated) or "latest".
    tta: see `selfreg_jax.evaluation.options.Options`, as for the next two.
    resize: "labels" or "logits".
    postprocess: keep the largest component of every class.

  Returns:
    The predictor.

  Raises:
    UserError: no workdir of a run, or no checkpoint in it yet, or a damaged one.
  """
  return Predictor(load_trained(workdir, checkpoint=checkpoint), options=Options(tta, resize, postprocess))


def load_ensemble(
  workdirs: Sequence[str | os.PathLike], *, checkpoint: str = "best", options: Options | None = None
) -> Predictor:
  """Loads several workdirs as one predictor that averages their probabilities.

  Args:
    workdirs: trained on data of the same kind, classes and intensities, at one image size.
    checkpoint: as in `load`.
    options: test-time options; None for none.

  Returns:
    The predictor.

  Raises:
    UserError: one of them cannot be loaded, or does not go with the first.
  """
  members = [load_trained(workdir, checkpoint=checkpoint) for workdir in workdirs]
  first = members[0]
  problems = []
  for workdir, member in zip(workdirs, members, strict=True):
    differing = first.dataset.differences(member.dataset)
    sizes = first.config.data.image_size, member.config.data.image_size
    differing += [("image_size", *sizes)] if sizes[0] != sizes[1] else []
    problems += [f"{workdir}: {name} is {theirs}, in {workdirs[0]} {ours}" for name, ours, theirs in differing]
  if problems:
    raise UserError("--ensemble: probabilities cannot be averaged over these runs:\n  " + "\n  ".join(problems))
  return Predictor(*members, options=options)
