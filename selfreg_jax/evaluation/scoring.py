"""What `eval.py` does: scores the cases of a prepared dataset, or predicts a folder of unlabelled NIfTI files."""

import importlib.metadata
import os
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from selfreg_jax import config as configs
from selfreg_jax.data import cases
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, DatasetInfo, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import protocols, report
from selfreg_jax.predictor import Predictor

_VERSIONED = ("selfreg-jax", "jax", "flax", "numpy", "scipy", "nibabel")
_CHANNEL_SUFFIX = "_0000"  # nnU-Net names the first channel of a case so


def score_dataset(
  predictor: Predictor, directory: str | os.PathLike, *, split: str, output: str | os.PathLike, console: Console
) -> dict[str, Any]:
  """Predicts and scores all cases of a split under both protocols.

  Writes, into the output folder: `cases.csv`, `summary.json`, `overlays/<id>.png` and `predictions/<id>.nii.gz` (on the
  grid, and under the header, of the case's own image file); prints a table for each protocol.

  Args:
    predictor: of a trained workdir.
    directory: a prepared dataset with the classes that the network was trained on.
    split: "train", "val" or "test".
    output: folder for the results.
    console: where to print.

  Returns:
    What was written to `summary.json`.

  Raises:
    UserError: the dataset does not fit the network, or the split is empty.
  """
  manifest = manifests.load(directory, verify=predictor.config.data.verify)
  check_fits(predictor.dataset, manifest, directory)
  split_cases = manifest.split(split)
  if not split_cases:
    raise UserError(f"{directory}: the {split} split is empty; prepare the dataset with {split} cases, or give --split")
  output = pathlib.Path(output)
  arrays = manifests.CaseArrays(directory)
  for folder, ending in (("overlays", "*.png"), ("predictions", "*.nii.gz")):
    make_folder(output / folder)
    for stale in (output / folder).glob(ending):  # of an earlier evaluation, perhaps of other cases
      stale.unlink()

  scores: dict[str, dict[str, protocols.ClassTable]] = {protocol: {} for protocol in protocols.PROTOCOLS}
  for number, case in enumerate(split_cases, 1):
    start = time.monotonic()
    image, truth = arrays.image(case), arrays.label(case)
    prediction = predictor.slices.classes(predictor.predict_fn, image, scale=manifest.scale)
    tables = protocols.evaluate_protocols(
      prediction, truth, num_classes=manifest.num_classes, spacing=case.spacing, protocols=protocols.PROTOCOLS
    )
    for protocol, table in tables.items():
      scores[protocol][case.id] = table
    dice = np.array([row["dice"] for row in tables["sound"].values()])
    shown = "nothing to score" if np.isnan(dice).all() else f"Dice {100 * np.nanmean(dice):.2f} %"
    write_prediction(output / "predictions" / f"{case.id}.nii.gz", prediction, case, manifest)
    report.overlay_case(
      output / "overlays" / f"{case.id}.png",
      image,
      truth,
      prediction,
      class_names=manifest.classes,
      axcodes=case.axcodes,
      spacing=case.spacing,
      scale=manifest.scale,
      title=f"{case.id}, {shown}",
    )
    seconds = time.monotonic() - start
    console.print(f"{number}/{len(split_cases)} {case.id}: {shown}, {seconds:.1f} s", markup=False, highlight=False)

  blocks = {name: protocols.summarize(table, manifest.classes, protocol=name) for name, table in scores.items()}
  summary = {
    "protocols": blocks,
    "cases": len(split_cases),
    "data": {"directory": str(directory), "split": split, "fingerprint": manifest.fingerprint()},
    "config": configs.to_json(predictor.config),
    "checkpoint": {"step": predictor.step, "val_dice": predictor.val_dice},
    "versions": versions(),
    "peak_memory_gib": peak_memory_gib(),
  }
  report.write_cases_csv(output / "cases.csv", scores, manifest.classes)
  report.write_summary(output / "summary.json", summary)
  for protocol, block in blocks.items():
    report.print_table(block, console, protocol=protocol)
  console.print(f"checkpoint  step {predictor.step} of {predictor.config.data.dir}", markup=False, highlight=False)
  console.print(f"results     {output}/summary.json, cases.csv, overlays/, predictions/", markup=False, highlight=False)
  return summary


def check_fits(trained: DatasetInfo, manifest: Manifest, directory: str | os.PathLike) -> None:
  """Raises UserError where a prepared dataset is not what the network was trained on; all differences are named."""
  problems = [
    f"{name}: trained with {before}, the dataset has {now}"
    for name, before, now in trained.differences(DatasetInfo.of(manifest))
  ]
  if problems:
    raise UserError(
      f"{directory}: does not fit the network; prepare it as the training data were:\n  " + "\n  ".join(problems)
    )


def write_prediction(path: pathlib.Path, prediction: np.ndarray, case: Case, manifest: Manifest) -> None:
  """Writes a prepared case's class map (slices, rows, columns) on the grid and under the header of its image file."""
  geometry = cases.Geometry(case.affine, case.file_shape, manifest.orientation, manifest.axis)
  cases.write_like(path, geometry.from_slices(prediction), cases.unpack_header(case.header))


def predict_folder(
  predictor: Predictor,
  folder: str | os.PathLike,
  output: str | os.PathLike,
  *,
  probabilities: bool,
  console: Console,
) -> list[pathlib.Path]:
  """Predicts every NIfTI file of a folder, of any size and orientation.

  A file that cannot be used stops none of the others; all such files are named at the end.

  Args:
    predictor: of a trained workdir.
    folder: holds the .nii and .nii.gz files, with or without nnU-Net's suffix _0000.
    output: folder for the class maps <case>.nii.gz, and with `probabilities` also for <case>_probabilities.nii.gz
      (x, y, z, classes).
    probabilities: also write the softmax probabilities.
    console: where to print.

  Returns:
    The class maps' files.

  Raises:
    UserError: no files, clashing names, or files that cannot be used.
  """
  files = find_inputs(pathlib.Path(folder), pathlib.Path(output))
  make_folder(pathlib.Path(output))
  written, faults = [], []
  for number, (name, path) in enumerate(files.items(), 1):
    start = time.monotonic()
    try:
      volume = cases.read_nifti(path)
      cases.check_image(volume, predictor.geometry(volume.array.shape, volume.affine))
    except cases.CaseError as error:
      faults.append(f"{path.name}: {error}")
      console.print(f"{number}/{len(files)} {path.name}: skipped, {error}", markup=False, highlight=False)
      continue
    result = predictor(volume.array, affine=volume.affine, probabilities=probabilities)
    classes, by_class = result if probabilities else (result, None)
    target = pathlib.Path(output) / f"{name}.nii.gz"
    if by_class is not None:
      cases.write_like(target.with_name(f"{name}_probabilities.nii.gz"), by_class, volume.header)
    cases.write_like(target, classes, volume.header)
    written.append(target)
    seconds = time.monotonic() - start
    console.print(f"{number}/{len(files)} {path.name} -> {target} in {seconds:.1f} s", markup=False, highlight=False)
  if faults:
    raise UserError(f"{folder}: {len(faults)} of {len(files)} files could not be predicted:\n  " + "\n  ".join(faults))
  return written


def make_folder(path: pathlib.Path) -> None:
  """Creates a folder for results; raises UserError where that cannot be."""
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{path}: cannot be made a folder for results ({error.strerror}); see --output") from error


def find_inputs(folder: pathlib.Path, output: pathlib.Path) -> dict[str, pathlib.Path]:
  """The NIfTI files of a folder by case name; raises UserError where there are none or names clash."""
  if not folder.is_dir():
    raise UserError(f"{folder}: is {'a file, not a folder' if folder.exists() else 'no folder'}; see --input")
  if output.resolve() == folder.resolve():
    raise UserError(f"{output}: --output must be another folder than --input, whose files it would overwrite")
  files: dict[str, pathlib.Path] = {}
  for path in sorted(folder.iterdir()):
    if path.name.startswith(".") or not path.name.endswith((".nii", ".nii.gz")):
      continue
    name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(_CHANNEL_SUFFIX)
    if name in files:
      raise UserError(f"{folder}: {files[name].name} and {path.name} are the same case; keep one of them")
    files[name] = path
  if not files:
    raise UserError(f"{folder}: holds no .nii or .nii.gz files")
  return files


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on, and the device."""
  found = {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind}
  for name in _VERSIONED:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
      found[name] = "not installed"
  return found


def peak_memory_gib() -> float:
  """Largest resident memory of this process so far, in GiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)
