"""Predicts a folder of unlabelled files: NIfTI volumes, or images where the network was trained on images."""

import os
import pathlib
import time

import numpy as np
from rich.console import Console

from selfreg_jax.data import cases, images
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import class_maps
from selfreg_jax.evaluation.scoring import make_folder
from selfreg_jax.predictor import Predictor

_CHANNEL_SUFFIX = "_0000"  # nnU-Net names the first channel of a case so
_EXTENSIONS = {"volume": (".nii", ".nii.gz"), "image": images.EXTENSIONS}


def predict_folder(
  predictor: Predictor,
  folder: str | os.PathLike,
  output: str | os.PathLike,
  *,
  probabilities: bool,
  console: Console,
) -> list[pathlib.Path]:
  """Predicts every file of a folder, of any size and orientation.

  A file that cannot be used stops none of the others; all such files are named at the end.

  Args:
    predictor: of a trained workdir.
    folder: holds .nii and .nii.gz files, with or without nnU-Net's suffix _0000, whose fourth axis, if there is one,
      are channels; of networks trained on images, .png, .bmp, .tif and .tiff files.
    output: folder for the class maps, <case>.nii.gz or <case>.png (class ids; 0 and 255 where there are two classes),
      and with `probabilities` also for <case>_probabilities.nii.gz (x, y, z, classes) or <case>_probabilities.npy
      (rows, columns, classes).
    probabilities: also write the softmax probabilities.
    console: where to print.

  Returns:
    The class maps' files.

  Raises:
    UserError: no files, clashing names, or files that cannot be used.
  """
  kind = predictor.dataset.kind
  files = find_inputs(pathlib.Path(folder), pathlib.Path(output), kind=kind)
  make_folder(pathlib.Path(output))
  console.print(f"predicting  {len(files)} files; options: {predictor.options}", markup=False, highlight=False)
  predict = _predict_volume if kind == "volume" else _predict_image
  written, faults = [], []
  for number, (name, path) in enumerate(files.items(), 1):
    start = time.monotonic()
    target = class_maps.path_for(pathlib.Path(output), name, kind)
    try:
      predict(predictor, path, target, probabilities=probabilities)
    except cases.CaseError as error:
      faults.append(f"{path.name}: {error}")
      console.print(f"{number}/{len(files)} {path.name}: skipped, {error}", markup=False, highlight=False)
      continue
    written.append(target)
    seconds = time.monotonic() - start
    console.print(f"{number}/{len(files)} {path.name} -> {target} in {seconds:.1f} s", markup=False, highlight=False)
  if faults:
    raise UserError(f"{folder}: {len(faults)} of {len(files)} files could not be predicted:\n  " + "\n  ".join(faults))
  return written


def _predict_volume(predictor: Predictor, path: pathlib.Path, target: pathlib.Path, *, probabilities: bool) -> None:
  volume = cases.read_nifti(path, channels=True)
  cases.check_image(volume, predictor.geometry(volume.array.shape[:3], volume.affine))
  _check_channels(volume.array.shape[3:], predictor)
  result = predictor(volume.array, affine=volume.affine, probabilities=probabilities)
  classes, by_class = result if probabilities else (result, None)
  name = target.name.removesuffix(class_maps.ENDINGS["volume"])
  if by_class is not None:
    cases.write_like(target.with_name(f"{name}_probabilities.nii.gz"), by_class, volume.header)
  cases.write_like(target, classes, volume.header)


def _predict_image(predictor: Predictor, path: pathlib.Path, target: pathlib.Path, *, probabilities: bool) -> None:
  image = images.read_image(path)
  cases.check_finite(image)
  cases.check_slices(image[None])
  if not (image.shape[2] == 1 and predictor.dataset.channels == 3):  # grey is taken for three equal colours
    _check_channels(image.shape[2:], predictor)
  result = predictor(image, probabilities=probabilities)
  classes, by_class = result if probabilities else (result, None)
  if by_class is not None:
    _write_array(target.with_name(f"{target.stem}_probabilities.npy"), by_class)
  class_maps.write_png(target, classes, num_classes=len(predictor.dataset.classes))


def _check_channels(found: tuple[int, ...], predictor: Predictor) -> None:
  number = found[0] if found else 1
  if number != predictor.dataset.channels:
    raise cases.CaseError(f"has {number} channel(s), the network was trained with {predictor.dataset.channels}")


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
  temporary = path.with_name(f"partial.{path.name}")
  np.save(temporary, array)
  temporary.replace(path)


def find_inputs(folder: pathlib.Path, output: pathlib.Path, *, kind: str = "volume") -> dict[str, pathlib.Path]:
  """The files of a folder by case name; raises UserError where there are none or names clash.

  Args:
    folder: where to look.
    output: folder for the results, which must be another.
    kind: "volume" (NIfTI) or "image" (PNG, BMP, TIFF).
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: is {'a file, not a folder' if folder.exists() else 'no folder'}; see --input")
  if output.resolve() == folder.resolve():
    raise UserError(f"{output}: --output must be another folder than --input, whose files it would overwrite")
  files: dict[str, pathlib.Path] = {}
  for path in sorted(folder.iterdir()):
    if path.name.startswith(".") or not path.name.lower().endswith(_EXTENSIONS[kind]):
      continue
    name = path.stem
    if kind == "volume":
      name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(_CHANNEL_SUFFIX)
    if name in files:
      raise UserError(f"{folder}: {files[name].name} and {path.name} are the same case; keep one of them")
    files[name] = path
  if not files:
    raise UserError(f"{folder}: holds no {', '.join(_EXTENSIONS[kind])} files, which this network was trained on")
  return files
