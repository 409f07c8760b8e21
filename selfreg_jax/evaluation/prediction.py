"""Predicts a folder of unlabelled files: NIfTI volumes, or images where the network was trained on images."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from selfreg_jax import processes
from selfreg_jax.data import cases, datasets, images
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import class_maps
from selfreg_jax.evaluation.scoring import make_folder
from selfreg_jax.predictor import Predictor

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

  A file that cannot be used stops none of the others; all such files are named at the end. Several processes of JAX
  share the files.

  Args:
    predictor: of a trained workdir.
    folder: holds .nii and .nii.gz files, with or without nnU-Net's suffix _0000; several channels are a fourth axis, or
      files with the suffixes _0000, _0001, ... For networks trained on images: .png, .bmp, .tif and .tiff files.
    output: folder for the class maps, <case>.nii.gz or <case>.png (class ids; 0 and 255 where there are two classes),
      and with `probabilities` also for <case>_probabilities.nii.gz (x, y, z, classes) or <case>_probabilities.npy
      (rows, columns, classes).
    probabilities: also write the softmax probabilities.
    console: where to print.

  Returns:
    The class maps' files; of this process's share.

  Raises:
    UserError: no files, clashing names, or files that cannot be used.
  """
  kind = predictor.dataset.kind
  with processes.together():
    files = find_inputs(pathlib.Path(folder), pathlib.Path(output), kind=kind, channels=predictor.dataset.channels)
    make_folder(pathlib.Path(output))
  total = len(files)
  files = dict(processes.share_of(list(files.items())))
  console.print(f"options     {predictor.options}", markup=False, highlight=False)
  predict = _predict_volume if kind == "volume" else _predict_image
  written, faults = [], []
  for number, (name, paths) in enumerate(files.items(), 1):
    start, names = time.monotonic(), ", ".join(path.name for path in paths)
    target = class_maps.path_for(pathlib.Path(output), name, kind)
    try:
      predict(predictor, paths, target, probabilities=probabilities)
    except (cases.CaseError, OSError) as error:
      faults.append(f"{names}: {error}")
      console.print(f"{number}/{len(files)} {names}: skipped, {error}", markup=False, highlight=False)
      continue
    written.append(target)
    seconds = time.monotonic() - start
    console.print(f"{number}/{len(files)} {names} -> {target} in {seconds:.1f} s", markup=False, highlight=False)
  faults = [fault for text in processes.gather_texts(json.dumps(faults)) for fault in json.loads(text)]
  if faults:
    raise UserError(f"{folder}: {len(faults)} of {total} files could not be predicted:\n  " + "\n  ".join(faults))
  return written


def _predict_volume(
  predictor: Predictor, paths: Sequence[pathlib.Path], target: pathlib.Path, *, probabilities: bool
) -> None:
  volumes = [cases.read_nifti(path, channels=True) for path in paths]
  for other in volumes[1:]:
    cases.check_pair(volumes[0], other)
  volume = volumes[0]
  if len(volumes) > 1:
    volume = dataclasses.replace(volume, array=np.stack([channel.array for channel in volumes], axis=-1))
  cases.check_image(volume, predictor.geometry(volume.array.shape[:3], volume.affine))
  _check_channels(volume.array.shape[3:], predictor)
  result = predictor(volume.array, affine=volume.affine, probabilities=probabilities)
  classes, by_class = result if probabilities else (result, None)
  name = target.name.removesuffix(class_maps.ENDINGS["volume"])
  if by_class is not None:
    cases.write_like(target.with_name(f"{name}_probabilities.nii.gz"), by_class, volume.header)
  cases.write_like(target, classes, volume.header)


def _predict_image(
  predictor: Predictor, paths: Sequence[pathlib.Path], target: pathlib.Path, *, probabilities: bool
) -> None:
  channels = [images.read_image(path) for path in paths]
  if len({channel.shape[:2] for channel in channels}) > 1:
    raise cases.CaseError("the channels are of different sizes: " + ", ".join(str(c.shape[:2]) for c in channels))
  image = np.concatenate(channels, axis=-1)
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


def find_inputs(
  folder: pathlib.Path, output: pathlib.Path, *, kind: str = "volume", channels: int = 1
) -> dict[str, list[pathlib.Path]]:
  """The files of a folder by case name, those of a case's channels in their order.

  Args:
    folder: where to look.
    output: folder for the results, which must be another.
    kind: "volume" (NIfTI) or "image" (PNG, BMP, TIFF).
    channels: that the network takes.

  Returns:
    Case name -> its one file, or a file for each channel.

  Raises:
    UserError: there are none, or names clash.
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: is {'a file, not a folder' if folder.exists() else 'no folder'}; see --input")
  if output.resolve() == folder.resolve():
    raise UserError(f"{output}: --output must be another folder than --input, whose files it would overwrite")
  stems: dict[str, pathlib.Path] = {}
  for path in sorted(folder.iterdir()):
    if path.name.startswith(".") or not path.name.lower().endswith(_EXTENSIONS[kind]):
      continue
    name = path.stem if kind == "image" else path.name.removesuffix(".gz").removesuffix(".nii")
    if name in stems:
      raise UserError(f"{folder}: {stems[name].name} and {path.name} are the same case; keep one of them")
    stems[name] = path
  if not stems:
    raise UserError(f"{folder}: holds no {', '.join(_EXTENSIONS[kind])} files, which this network was trained on")
  found: dict[str, list[pathlib.Path]] = {}
  for base, numbers in _numbered(stems).items():
    # Channels only where exactly the wanted ones are there: tile_0001, tile_0002, ... may be cases of their own.
    complete = sorted(numbers) == [f"{channel:04d}" for channel in range(channels)]
    if complete and (kind == "volume" or channels > 1):
      found[base] = [stems.pop(f"{base}_{number}") for number in sorted(numbers)]
  for name, path in stems.items():
    if name in found:
      raise UserError(f"{folder}: {found[name][0].name} and {path.name} are the same case; keep one of them")
    found[name] = [path]
  return dict(sorted(found.items()))


def _numbered(stems: Iterable[str]) -> dict[str, list[str]]:
  """The four-digit endings of names, by what stands before them."""
  numbers: dict[str, list[str]] = {}
  for match in filter(None, map(datasets.CHANNEL_SUFFIX.fullmatch, stems)):
    numbers.setdefault(match[1], []).append(match[2])
  return numbers
