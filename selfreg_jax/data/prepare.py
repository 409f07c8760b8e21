"""Turns raw medical images into a prepared dataset, once, checking everything that can be wrong with them.

    python -m selfreg_jax.data.prepare --dataset=synapse --source=RawData --output=data/synapse
    python -m selfreg_jax.data.prepare --dataset=msd --source=Task09_Spleen --output=data/spleen --window -125 275
    python -m selfreg_jax.data.prepare --dataset=phantom --output=data/phantom
    python -m selfreg_jax.data.prepare --check --output=data/spleen
    python -m selfreg_jax.data.prepare --check --dataset=msd --source=Task09_Spleen --window -125 275

What lies in --source (or in a folder below it; docs/datasets.md shows the trees in full):

    synapse   img/img0001.nii.gz, label/label0001.nii.gz; or train_npz/case0005_slice000.npz and
              test_vol_h5/case0001.npy.h5
    acdc      patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz; or folders train, valid,
              test of case_001_sliceED_0.npz or case_002_volume_ED.npz
    glas      train_1.bmp, train_1_anno.bmp, testA_1.bmp, ..., Grade.csv; or Train_Folder/img, Train_Folder/labelcol
    monuseg   Tissue Images/*.tif, Annotations/*.xml; or Train_Folder/img, Train_Folder/labelcol
    msd       dataset.json, imagesTr, labelsTr; or whatever --image_glob and --label_glob say (NIfTI, PNG, BMP, TIFF)
    phantom   nothing: made-up CT volumes

The arrays are written into a staging folder inside the output folder; when all cases have passed, it is renamed and the
manifest is written last. Until then an older dataset in the same place stays as it is, and whatever stops the command
leaves nothing that could be taken for a prepared dataset. No worker pays for JAX, and only packs in HDF5 pay for h5py.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import io
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import rich.console
import rich.progress

from selfreg_jax.data import acdc, cases, check, check_page, datasets, histology, manifest, splits, synapse
from selfreg_jax.data.datasets import RawCase, RawDataset
from selfreg_jax.data.manifest import Case, Intensity, Manifest
from selfreg_jax.data.published import PUBLISHED
from selfreg_jax.data.readers import CaseFaultsError, Content, Reading
from selfreg_jax.errors import EXIT_FAULT, UserError, run_command

CT_WINDOW = (-125.0, 275.0)  # HU; the authors' for Synapse
DEFAULT_PAGE = "dataset_check.html"
NORMALIZATIONS = ("minmax", "zscore", "byte")

_ARRAYS = "cases"
_STAGING = "cases.partial"
_RAW_PHANTOMS = "raw"
_ARRAY_ENDINGS = (".image.npy", ".label.npy")
_ONE_SIDED = 0.99  # share of voxels at one end of the range from which the window or the units look wrong
_SECONDS_BETWEEN_LINES = 5.0


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
  """What the command was asked for; the fields are its flags.

  Attributes:
    dataset: one of `datasets.DATASETS`.
    output: folder of the prepared dataset.
    source: folder of the raw files; for "phantom" where to write them (None: `output`/raw).
    image_glob: pattern of the images relative to `source`, several (channels) separated by commas; None: the layout of
      the Medical Segmentation Decathlon.
    label_glob: pattern of the labels; goes with `image_glob`.
    num_classes: number of classes, background included.
    class_names: names of the foreground classes.
    labels: organs in the label files of "synapse", 13 or 8; None: 13, and files that look like 8 are refused.
    val_cases: ids or shell patterns of the validation cases; None: drawn.
    test_cases: ids or shell patterns of test cases.
    val_fraction: share of the training cases (of their groups, see `Case.group`) drawn for validation; None: the
      dataset's, mostly 0.2.
    test_fraction: share of the cases, likewise, drawn for testing; None: the dataset's, mostly 0.
    splits: JSON file {"train": [ids], "val": [ids], "test": [ids]}, instead of the four above.
    folds: folds of a cross-validation over all cases that are not for testing, instead of a validation split.
    window: (low, high) in the file's units, mapped to [0, 1].
    normalize: "minmax", "zscore" or "byte" instead of a window.
    orientation: "ras" or "stored"; None: the published one, "ras" for volumes of one's own.
    axis: axis, after orientation, along which slices are cut.
    seed: of the drawn splits, of the folds and of the phantoms.
    workers: processes; None: one for each CPU that this process may use.
    overwrite: replace the dataset that `output` holds.
    phantom_train_cases: made-up cases to train on; None: 18.
    phantom_test_cases: made-up test cases; None: 6.
  """

  dataset: str
  output: str | os.PathLike
  source: str | os.PathLike | None = None
  image_glob: str | None = None
  label_glob: str | None = None
  num_classes: int | None = None
  class_names: Sequence[str] | None = None
  labels: int | None = None
  val_cases: Sequence[str] | None = None
  test_cases: Sequence[str] | None = None
  val_fraction: float | None = None
  test_fraction: float | None = None
  splits: str | os.PathLike | None = None
  folds: int | None = None
  window: tuple[float, float] | None = None
  normalize: str | None = None
  orientation: str | None = None
  axis: int = 2
  seed: int = 0
  workers: int | None = None
  overwrite: bool = False
  phantom_train_cases: int | None = None
  phantom_test_cases: int | None = None


@dataclasses.dataclass(frozen=True)
class Job:
  """One case to convert, with all that a worker process needs.

  Attributes:
    case: the case's files.
    source: folder to which file names in messages and in the manifest are relative.
    staging: folder for the two arrays.
    reading: how the files are to be read.
    intensity: how raw values become network inputs.
    channels: that the image must have; None: any number.
  """

  case: RawCase
  source: pathlib.Path
  staging: pathlib.Path
  reading: Reading
  intensity: Intensity
  channels: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a case: the case or its faults (a line each), and what is odd without being a fault."""

  case: Case | None = None
  faults: tuple[str, ...] = ()
  warnings: tuple[str, ...] = ()


def prepare(options: PrepareOptions) -> Manifest:
  """Prepares a dataset: finds the cases, checks and converts them all, writes arrays and manifest.

  Warnings and progress go to stderr.

  Args:
    options: what to do.

  Returns:
    The manifest, as it was written.

  Raises:
    UserError: options, source or output are unusable, the disk is full, or there are bad files: all of them are named,
      a line each. The output folder then holds what it held before.
  """
  try:
    intensity = _checked_intensity(options)
    output = pathlib.Path(options.output)
    _check_output(output, options)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
      return _prepare_into(output, intensity, options)
  except OSError as error:
    raise UserError(_environment_fault(error, options)) from error


def _prepare_into(output: pathlib.Path, intensity: Intensity, options: PrepareOptions) -> Manifest:
  source = _write_phantoms(output, options) if options.dataset == "phantom" else pathlib.Path(options.source)
  raw = _find(source, options)
  if not raw.ids and not raw.faults:
    raise UserError(f"{source}: holds no case; docs/datasets.md shows how files must be named")
  _check_fits_files(raw, options)
  reading = Reading(raw.labels, options.orientation or raw.orientation, options.axis)
  dealt = _splits(raw, options)
  folds = ()
  if options.folds is not None:
    folds = splits.choose_folds(dealt["train"], raw.groups, options.folds, options.seed)
  _check_space(output, raw.cases, intensity)
  staging = output / _STAGING
  shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run has left
  staging.mkdir()
  try:
    jobs = [Job(case, source, staging, reading, intensity, raw.channels) for case in raw.cases]
    outcomes = _convert_all(jobs, options.workers)
    faults = [*raw.faults, *(fault for outcome in outcomes for fault in outcome.faults)]
    _raise_faults(source, faults or _channel_faults(outcomes))
    dtype, scale = cases.STORED_FORMATS[intensity.kind]
    made = Manifest(
      dataset=options.dataset,
      kind=raw.kind,
      unit=raw.unit,
      classes=raw.classes,
      channels=outcomes[0].case.shape[3],
      intensity=intensity,
      dtype=dtype,
      scale=scale,
      orientation=reading.orientation,
      axis=options.axis,
      splits=dealt,
      folds=folds,
      cases={outcome.case.id: outcome.case for outcome in sorted(outcomes, key=lambda outcome: outcome.case.id)},
      source=str(source),
    )
    _install(made, output)
  finally:
    shutil.rmtree(staging, ignore_errors=True)
  notes = [*raw.notes, *splits.notes_on_test(dealt, raw.groups), *_notes_on_folds(raw, made)]
  for warning in (*notes, *(line for outcome in outcomes for line in outcome.warnings), *_odd(made)):
    print(f"warning: {warning}", file=sys.stderr, flush=True)
  return made


def _install(made: Manifest, output: pathlib.Path) -> None:
  """Puts the staged arrays in place. Between the first and the last line the folder counts as not prepared."""
  (output / manifest.FILE_NAME).unlink(missing_ok=True)
  if (output / _ARRAYS).exists():
    shutil.rmtree(output / _ARRAYS)
  (output / _STAGING).rename(output / _ARRAYS)
  manifest.save(made, output)


def _checked_intensity(options: PrepareOptions) -> Intensity:
  """Checks the options that need no look at the disk; returns the intensity mapping that they ask for."""
  if options.dataset not in datasets.DATASETS:
    raise UserError(f"--dataset={options.dataset}: known are {', '.join(datasets.DATASETS)}")
  phantom = options.dataset == "phantom"
  only_for = {
    "image_glob": ("msd",),
    "label_glob": ("msd",),
    "num_classes": ("msd",),
    "class_names": ("msd",),
    "labels": ("synapse",),
    "phantom_train_cases": ("phantom",),
    "phantom_test_cases": ("phantom",),
  }
  strange = [name for name, owners in only_for.items() if options.dataset not in owners]
  if given := [f"--{name}" for name in strange if getattr(options, name) is not None]:
    raise UserError(f"{', '.join(given)} cannot be used with --dataset={options.dataset}")
  known = PUBLISHED.get(options.dataset)
  if known and known.kind == "image" and (options.window is not None or options.normalize not in (None, "byte")):
    raise UserError(
      f"--window, --normalize: the colours of {options.dataset} are bytes and are kept so; leave them out"
    )
  if options.source is None and not phantom:
    raise UserError(f"--dataset={options.dataset} needs --source, the folder of the raw files")
  if (options.image_glob is None) != (options.label_glob is None):
    raise UserError("--image_glob and --label_glob go together; give both or none")
  if options.labels not in (None, 8, 13):
    raise UserError(f"--labels={options.labels}: label files hold the 13 organs of BTCV or the pack's 8")
  if options.orientation not in (None, *cases.ORIENTATIONS) or options.axis not in range(3):
    raise UserError(f"--orientation={options.orientation} --axis={options.axis}: it is ras or stored, and 0, 1 or 2")
  if options.seed < 0:
    raise UserError(f"--seed={options.seed}: seeds are not negative")
  if options.workers is not None and options.workers < 1:
    raise UserError(f"--workers={options.workers}: at least one is needed")
  _check_split_options(options)
  return _intensity(options.window, options.normalize, _default_intensity(options))


def _default_intensity(options: PrepareOptions) -> Intensity | None:
  """How intensities are mapped where the request does not say; None where there is no good guess."""
  if options.dataset in PUBLISHED:
    return PUBLISHED[options.dataset].intensity
  if options.dataset == "phantom":
    return Intensity("window", *CT_WINDOW)
  if options.image_glob is not None and datasets.names_images(options.image_glob):
    return Intensity("byte")
  return None


def _check_split_options(options: PrepareOptions) -> None:
  names = ("val_cases", "test_cases", "val_fraction", "test_fraction")
  given = [f"--{name}" for name in names if getattr(options, name) is not None]
  if options.splits is not None and given:
    raise UserError(f"--splits={options.splits} says it all; leave {', '.join(given)} out")
  if options.folds is not None:
    if options.folds < 2:
      raise UserError(f"--folds={options.folds}: a cross-validation needs at least 2")
    names = ("val_cases", "val_fraction", "splits")
    if excluded := [f"--{name}" for name in names if getattr(options, name) is not None]:
      raise UserError(f"--folds={options.folds}: every fold is a validation split; leave {', '.join(excluded)} out")
  for split in ("val", "test"):
    if {f"--{split}_cases", f"--{split}_fraction"} <= {*given}:
      raise UserError(f"--{split}_cases and --{split}_fraction exclude each other")
  for name in ("val_fraction", "test_fraction"):
    if not 0 <= (getattr(options, name) or 0) < 1:
      raise UserError(f"--{name}={getattr(options, name)}: a share from 0 to below 1 is needed")


def _intensity(window: tuple[float, float] | None, normalize: str | None, default: Intensity | None) -> Intensity:
  if window is not None and normalize is not None:
    raise UserError("--window and --normalize exclude each other")
  if normalize is not None:
    if normalize not in NORMALIZATIONS:
      raise UserError(f"--normalize={normalize}: it is {', '.join(NORMALIZATIONS[:-1])} or {NORMALIZATIONS[-1]}")
    return Intensity(normalize)
  if window is None and default is not None:
    return default
  if window is None:
    raise UserError(
      "how are intensities to be mapped? CT (HU): --window -125 275 for the abdomen; MR and other arbitrary units: "
      "--normalize=zscore; --normalize=minmax keeps the whole range of each volume, outliers included"
    )
  low, high = float(window[0]), float(window[1])
  # Compared as the float32 that the mapping computes in: two ends that round to one would divide by zero.
  if not (math.isfinite(low) and math.isfinite(high) and np.float32(low) < np.float32(high)):
    raise UserError(f"--window {low:g} {high:g}: two finite numbers are needed, the lower one first")
  return Intensity("window", low, high)


def _check_output(output: pathlib.Path, options: PrepareOptions) -> None:
  """Raises UserError if the output folder holds a complete dataset or anything that this command did not write."""
  if not output.exists():
    return
  if not output.is_dir():
    raise UserError(f"{output}: is a file; --output is a folder")
  own = {manifest.FILE_NAME, manifest.FILE_NAME + ".partial", _ARRAYS, _STAGING}
  if options.dataset == "phantom" and options.source is None:
    own.add(_RAW_PHANTOMS)  # `_write_phantoms` looks into it
  foreign = [path.name for path in output.iterdir() if path.name not in own and not path.name.startswith(".")]
  for folder in (output / _ARRAYS, output / _STAGING):
    entries = folder.iterdir() if folder.is_dir() else ()
    foreign += [f"{folder.name}/{path.name}" for path in entries if not path.name.endswith(_ARRAY_ENDINGS)]
  if foreign:
    raise UserError(f"{output}: holds other files ({datasets.listed(sorted(foreign))}); give an empty or a new folder")
  if (output / manifest.FILE_NAME).exists() and not options.overwrite:
    raise UserError(f"{output}: holds a prepared dataset; --overwrite replaces it")


@contextlib.contextmanager
def _locked(output: pathlib.Path) -> Iterator[None]:
  """Keeps a second preparation out of the folder. The lock dies with the process, however that ends."""
  descriptor = os.open(output, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"{output}: another preparation is writing there") from error
    except OSError:
      pass  # some network file systems cannot lock folders; the lock only guards against haste
    yield
  finally:
    os.close(descriptor)


def _environment_fault(error: OSError, options: PrepareOptions) -> str:
  """What to say of a failing disk or of missing rights; single raw files have been dealt with in `cases`."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return f"{options.output}: the disk is full; nothing was prepared. Make room and run the same command again"
  return f"{error.filename or options.output}: {error.strerror or error}; nothing was prepared"


def _write_phantoms(output: pathlib.Path, options: PrepareOptions) -> pathlib.Path:
  """Writes the raw files of made-up cases; returns their folder."""
  from selfreg_jax.data import phantom  # imports SciPy, which workers do without

  train_cases = 18 if options.phantom_train_cases is None else options.phantom_train_cases
  test_cases = 6 if options.phantom_test_cases is None else options.phantom_test_cases
  phantom.check_request(train_cases, test_cases, options.seed)  # before an older set is removed
  folder = pathlib.Path(options.source) if options.source is not None else output / _RAW_PHANTOMS
  if folder.exists():
    _remove_phantoms(folder)
  print(f"writing made-up cases to {folder}", file=sys.stderr, flush=True)
  phantom.write_msd(folder, train_cases=train_cases, test_cases=test_cases, seed=options.seed)
  return folder


def _remove_phantoms(folder: pathlib.Path) -> None:
  """Removes an earlier run's made-up cases, whole or half-written, and refuses to touch anything else."""
  files = [path for path in folder.rglob("*") if not path.is_dir()]
  foreign = [
    str(path) for path in files if not path.name.startswith("phantom_") and not path.name.startswith("dataset.json")
  ]
  description = folder / "dataset.json"
  if description.is_file() and datasets.read_json(description).get("name") != "Phantom":
    foreign.append(str(description))
  if foreign:
    raise UserError(f"{folder}: made-up cases are written there, and it holds other files ({datasets.listed(foreign)})")
  shutil.rmtree(folder)


def _find(source: pathlib.Path, options: PrepareOptions) -> RawDataset:
  if not source.is_dir():
    raise UserError(f"--source={source}: no such folder")
  if options.dataset == "synapse":
    return synapse.find(source, organs=options.labels)
  published = {"acdc": acdc.find, "glas": histology.find_glas, "monuseg": histology.find_monuseg}
  if options.dataset in published:
    return published[options.dataset](source)
  classes = datasets.requested_classes(options.class_names, options.num_classes)
  if options.image_glob is not None:
    return datasets.find_by_globs(source, options.image_glob, options.label_glob, classes)
  return datasets.find_msd(source, classes)


def _check_fits_files(raw: RawDataset, options: PrepareOptions) -> None:
  """Raises UserError where the request asks for what the files that were found cannot give."""
  what = "images" if raw.kind == "image" else "a pack" if raw.packed else None
  if what and (options.orientation == "ras" or options.axis != 2):
    raise UserError(f"--orientation={options.orientation} --axis={options.axis}: {what} can only be taken as stored")
  if raw.packed and (options.window is not None or options.normalize is not None):
    raise UserError("--window, --normalize: the intensities of a pack were mapped by whoever made it; leave them out")


def _splits(raw: RawDataset, options: PrepareOptions) -> dict[str, tuple[str, ...]]:
  if options.splits is not None:
    return splits.read_splits(pathlib.Path(options.splits), raw.ids, raw.groups, folder_test_ids=raw.test_ids)
  val_fraction = raw.val_fraction if options.val_fraction is None else options.val_fraction
  return splits.choose_splits(
    raw.ids,
    raw.groups,
    # With folds, or a share to draw, the archive's own validation cases are among the others.
    folder_val_ids=raw.val_ids if options.folds is None and options.val_fraction is None else (),
    folder_test_ids=raw.test_ids,
    val_cases=options.val_cases,
    test_cases=options.test_cases,
    val_fraction=val_fraction if options.folds is None else 0.0,
    test_fraction=raw.test_fraction if options.test_fraction is None else options.test_fraction,
    seed=options.seed,
  )


def _notes_on_folds(raw: RawDataset, made: Manifest) -> list[str]:
  unknown = sum(case.group is None for case in raw.cases)
  if not made.folds or not unknown:
    return []
  which = made.dataset if unknown == len(raw.cases) else f"{unknown} of {len(raw.cases)} cases"
  return [f"no patient is known for {which}: splits are per {made.kind if made.kind == 'image' else 'case'}"]


def _check_space(output: pathlib.Path, raw_cases: Sequence[RawCase], intensity: Intensity) -> None:
  itemsize = np.dtype(cases.STORED_FORMATS[intensity.kind][0]).itemsize
  sizes = [case.reader.peek_size() for case in raw_cases]
  needed = sum(voxels * (channels * itemsize + 1) for voxels, channels in sizes)
  free = shutil.disk_usage(output).free
  if needed > free:
    raise UserError(f"{output}: {_bytes(needed)} are needed and {_bytes(free)} are free on that disk")


def _raise_faults(source: pathlib.Path, faults: Sequence[str]) -> None:
  if faults:
    raise UserError(f"{source}: {len(faults)} fault(s); nothing was prepared:\n  " + "\n  ".join(sorted(faults)))


def convert_case(job: Job) -> Outcome:
  """Reads, checks and writes one case; the work of one process.

  Args:
    job: the case.

  Returns:
    The case as it goes into the manifest, or its faults, an image's and a label's alike.

  Raises:
    OSError: the arrays cannot be written.
  """
  reader = job.case.reader
  try:
    content = reader.read(job.reading)
    stored = _stored(job, content)
  except CaseFaultsError as error:
    return Outcome(faults=tuple(f"{_names(paths, job.source)}: {line}" for paths, line in error.faults))
  except cases.CaseError as error:
    return Outcome(faults=(f"{_names(reader.image_files, job.source)}: {error}",))
  return _write_case(job, content, stored)


def _names(paths: Sequence[pathlib.Path], source: pathlib.Path) -> str:
  return datasets.listed((datasets.relative(path, source) for path in paths), limit=4)


def _stored(job: Job, content: Content) -> np.ndarray:
  """(slices, rows, columns, channels) as they are written to disk; each channel is mapped on its own."""
  channels = content.image.shape[3]
  if job.channels not in (None, channels):
    raise cases.CaseError(f"has {channels} channel(s), the dataset has {job.channels}")
  stored = []
  for channel in np.moveaxis(content.image, 3, 0):
    network_input = channel if content.mapped else cases.apply_intensity(channel, job.intensity)
    stored.append(cases.encode(network_input, job.intensity.kind)[0])
    del network_input  # twice the size of what is stored
  return stored[0][..., np.newaxis] if channels == 1 else np.stack(stored, axis=-1)


def _write_case(job: Job, content: Content, stored: np.ndarray) -> Outcome:
  case_id, reader = job.case.id, job.case.reader
  paths = {kind: job.staging / f"{case_id}.{kind}.npy" for kind in ("image", "label")}
  _write_array(paths["image"], stored)
  _write_array(paths["label"], content.classes)
  num_classes = job.reading.labels.num_classes
  counts = sum(np.bincount(labels.ravel(), minlength=num_classes) for labels in content.classes)
  case = Case(
    id=case_id,
    image=f"{_ARRAYS}/{paths['image'].name}",
    label=f"{_ARRAYS}/{paths['label'].name}",
    shape=stored.shape,
    spacing=content.spacing,
    axcodes=content.axcodes,
    affine=None if content.affine is None else tuple(tuple(row) for row in content.affine.tolist()),
    file_shape=content.file_shape,
    header=None if content.header is None else cases.pack_header(content.header),
    group=job.case.group or case_id,
    sources={
      "image": _file_or_files(reader.image_files, job.source),
      "label": _file_or_files(reader.label_files, job.source),
    },
    checksums={kind: manifest.checksum(path) for kind, path in paths.items()},
    class_voxels=tuple(counts.tolist()),
    foreground_slices=tuple(np.flatnonzero(content.classes.any(axis=(1, 2))).tolist()),
  )
  return Outcome(case, warnings=_one_sided(stored, _names(reader.image_files, job.source)))


def _file_or_files(paths: Sequence[pathlib.Path], source: pathlib.Path) -> str | list[str]:
  names = [datasets.relative(path, source) for path in paths]
  return names[0] if len(names) == 1 else names


def _channel_faults(outcomes: Sequence[Outcome]) -> list[str]:
  """A fault for each case that has another number of channels than most."""
  counts = [outcome.case.shape[3] for outcome in outcomes]
  usual = max(sorted({*counts}), key=counts.count, default=None)
  return [
    f"{outcome.case.sources['image']}: has {count} channel(s), most cases have {usual}"
    for outcome, count in zip(outcomes, counts, strict=True)
    if count != usual
  ]


def _one_sided(stored: np.ndarray, name: str) -> tuple[str, ...]:
  if stored.dtype != np.uint16:
    return ()
  shares = {"lower": np.mean(stored == 0), "upper": np.mean(stored == np.iinfo(stored.dtype).max)}
  return tuple(
    f"{name}: {share:.1%} of the voxels lie at or beyond the {end} end of the range; wrong window or wrong units?"
    for end, share in shares.items()
    if share > _ONE_SIDED
  )


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes a C-contiguous array as .npy. `numpy.save` would lose the error number of a full disk."""
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
  with path.open("wb") as file:
    file.write(header.getbuffer())
    file.write(array.data)


def _convert_all(jobs: Sequence[Job], workers: int | None) -> list[Outcome]:
  """Converts all cases, in this process (one worker) or in several; the outcomes are in no particular order."""
  workers = min(workers or _cpus(), len(jobs))
  with _progress(len(jobs)) as advance:
    try:
      if workers > 1:
        return _convert_in_processes(jobs, workers, advance)
      outcomes = []
      for job in jobs:
        outcomes.append(convert_case(job))
        advance()
      return outcomes
    except (BrokenProcessPool, MemoryError) as error:
      raise UserError(
        f"a worker process died, probably out of memory; nothing was prepared. Use fewer than --workers={workers}"
      ) from error


def _convert_in_processes(jobs: Sequence[Job], workers: int, advance: Callable[[], None]) -> list[Outcome]:
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
  )
  try:
    outcomes = []
    for future in concurrent.futures.as_completed([executor.submit(convert_case, job) for job in jobs]):
      outcomes.append(future.result())
      advance()
    return outcomes
  finally:
    executor.shutdown(wait=True, cancel_futures=True)  # nobody may still be writing when the staging folder goes


def _start_worker() -> None:
  """Leaves Ctrl-C to the main process, and ends the worker if that is killed: it would wait for work for ever."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(EXIT_FAULT)


def _cpus() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
  """A bar on a terminal, else a line every few seconds; yields what to call after each case."""
  console = rich.console.Console(stderr=True)
  if console.is_terminal:
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task("preparing", total=total)
      yield lambda: bar.advance(task)
    return
  done, last_line = 0, time.monotonic()

  def advance() -> None:
    nonlocal done, last_line
    done += 1
    if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
      last_line = time.monotonic()
      print(f"prepared {done} of {total} cases", file=sys.stderr, flush=True)

  yield advance


def _odd(made: Manifest) -> list[str]:
  """What is odd about the dataset as a whole, and what it will prevent."""
  prevented = {
    "train": "nothing can be trained on this dataset",
    "val": "training cannot choose its best checkpoint and will take the last one",
    "test": "there is nothing to evaluate on with --split=test",
  }
  if made.folds:
    del prevented["val"]  # every fold is one
  odd = [f"the {name} split is empty: {what}" for name, what in prevented.items() if not made.splits[name]]
  training = made.split("train")
  absent = [
    name for name, cases_with in zip(made.classes, _cases_with_classes(made, training), strict=True) if not cases_with
  ]
  if training and absent:
    odd.append(f"no training case holds {', '.join(absent)}: networks will not learn to find that")
  return odd


def _cases_with_classes(made: Manifest, some_cases: Sequence[Case]) -> list[int]:
  return [sum(case.class_voxels[class_id] > 0 for case in some_cases) for class_id in range(made.num_classes)]


def summary(made: Manifest, output: str | os.PathLike) -> str:
  """A prepared dataset in a few lines for reading, the next command included."""
  all_cases = list(made.cases.values())
  size = sum((pathlib.Path(output) / name).stat().st_size for case in all_cases for name in (case.image, case.label))
  groups = {case.group for case in all_cases}
  axcodes = sorted({",".join(case.axcodes) for case in all_cases if case.axcodes is not None})
  lines = [f"prepared {len(all_cases)} case(s) in {output} ({_bytes(size)})"]
  for name in manifest.SPLITS:
    split = made.split(name)
    lines.append(f"  {name:<6}{len(split):>5} case(s) {sum(case.shape[0] for case in split):>7} slices")
  if made.folds:
    sizes = ", ".join(str(len(fold)) for fold in made.folds)
    lines.append(f"  {len(made.folds)} folds of the train split, of {sizes} case(s)")
  lines += [
    "  shape (slices, rows, columns)     " + _ranges([case.shape[:3] for case in all_cases]),
    *([f"  channels                          {made.channels}"] if made.channels > 1 else []),
    *([f"  patients                          {len(groups)}"] if len(groups) < len(all_cases) else []),
    f"  {f'spacing in {made.unit}, likewise':<34}" + _ranges([case.spacing for case in all_cases]),
    *([f"  slices, rows, columns run towards {' or '.join(axcodes)}"] if axcodes else []),
    f"  intensities                       {_describe(made.intensity)}, stored as {made.dtype}",
    f"  {'class':<24}{'pixels' if made.kind == 'image' else 'voxels':>10}   cases with it (train, val, test)",
  ]
  voxels = np.sum([case.class_voxels for case in all_cases], axis=0)
  with_classes = [_cases_with_classes(made, made.split(name)) for name in manifest.SPLITS]
  for class_id, name in enumerate(made.classes):
    counts = ", ".join(str(split[class_id]) for split in with_classes)
    lines.append(f"  {class_id:>3} {name:<20}{voxels[class_id] / voxels.sum():>10.3%}   {counts}")
  own = f"{made.dataset}_unet" if made.dataset in PUBLISHED else "folder"
  config = "quickstart" if made.dataset == "phantom" else own
  fold = " --config.data.fold=0" if made.folds else ""
  if made.splits["train"]:
    lines.append(
      f"next: python train.py --config=configs/{config}.py --config.data.dir={output}{fold} --workdir=runs/first"
    )
  return "\n".join(lines)


def _describe(intensity: Intensity) -> str:
  if intensity.kind == "window":
    return f"window [{intensity.low:g}, {intensity.high:g}] -> [0, 1]"
  return "8-bit values / 255" if intensity.kind == "byte" else f"{intensity.kind} of each case and channel"


def _ranges(triples: Sequence[Sequence[float]]) -> str:
  lows, highs = np.min(triples, axis=0), np.max(triples, axis=0)
  return " x ".join(
    f"{low:g}" if low == high else f"{low:.4g}..{high:.4g}" for low, high in zip(lows, highs, strict=True)
  )


def _bytes(count: int) -> str:
  for unit in ("bytes", "kB", "MB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.3g} GB"


def check_prepared(directory: str | os.PathLike, page: str | os.PathLike) -> str:
  """Verifies a prepared dataset, files and manifest, and describes it.

  Args:
    directory: the dataset's folder.
    page: the HTML file to write.

  Returns:
    What was found, for reading.

  Raises:
    UserError: the dataset is damaged (every fault is named), or the page cannot be written.
  """
  _check_page_folder(page)
  return _describe_checked(manifest.load(directory, verify=True), directory, str(directory), page)


def check_archive(options: PrepareOptions, page: str | os.PathLike) -> str:
  """Validates raw files by preparing them into a temporary folder, and describes what they make.

  Args:
    options: what would be prepared; `output` is not touched.
    page: the HTML file to write.

  Returns:
    What was found, for reading.

  Raises:
    UserError: what `prepare` raises, or the page cannot be written.
  """
  if options.dataset == "phantom":
    raise UserError("--dataset=phantom is made up, there is no archive to check: prepare it and give --check --output")
  _check_page_folder(page)
  try:
    with tempfile.TemporaryDirectory(prefix="selfreg_jax_check.") as folder:
      made = prepare(dataclasses.replace(options, output=folder))
      return _describe_checked(made, folder, str(options.source), page)
  except OSError as error:
    raise UserError(f"--check: {error.filename or 'temporary folder'}: {error.strerror or error}") from error


def _check_page_folder(page: str | os.PathLike) -> None:
  """Raises UserError where the page could not be written after all the work."""
  if not pathlib.Path(page).parent.is_dir() or pathlib.Path(page).is_dir():
    raise UserError(f"--html={page}: give a file in a folder that exists")


def _describe_checked(made: Manifest, directory: str | os.PathLike, where: str, page: str | os.PathLike) -> str:
  checkup = check.examine(made, directory, where=where)
  check_page.write_page(checkup, directory, page)
  return f"{check_page.as_text(checkup)}\npictures: {page}"


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m selfreg_jax.data.prepare",
    description=__doc__.rpartition("\n\n")[0],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--dataset", choices=datasets.DATASETS)
  add("--source", help="folder of the raw files (phantom: where to write them, default OUTPUT/raw)")
  add("--output", help="folder of the prepared dataset")
  files = "relative to --source; the text that * matches is the case's id, and equal ids pair"
  add("--image_glob", help=f"pattern of the images, several (channels) separated by commas, {files}")
  add("--label_glob", help=f"pattern of the labels, {files}")
  add("--num_classes", type=int, help="number of classes, background included")
  add("--class_names", type=_comma_list, help="a,b,c: names of classes 1, 2, 3; class 0 is the background")
  add("--labels", type=int, choices=(13, 8), help="organs in the raw label files of synapse: BTCV's 13 or the pack's 8")
  add("--val_cases", type=_comma_list, help="ids or shell patterns, separated by commas")
  add("--test_cases", type=_comma_list, help="ids or shell patterns, separated by commas")
  add("--val_fraction", type=float, help="share of the training patients (cases) to draw, default 0.2")
  add("--test_fraction", type=float, help="share of the patients (cases) to draw, default 0; for acdc 0.2")
  add("--splits", help='JSON file {"train": [ids], "val": [ids], "test": [ids]}')
  add("--folds", type=int, help="cross-validation: deal all cases that are not for testing into that many folds")
  add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="clip to [LO, HI] (HU for CT), then to [0, 1]")
  add("--normalize", choices=NORMALIZATIONS, help="of each case and channel; byte: 8-bit values / 255")
  add("--orientation", choices=cases.ORIENTATIONS, help="turn to RAS+ (default of msd, phantom) or leave as stored")
  add("--axis", type=int, choices=range(3), default=2, help="cut slices along this axis, after orientation")
  add("--seed", type=int, default=0, help="of drawn splits, folds and phantoms")
  add("--workers", type=int, help="processes, default one a CPU; memory grows with them")
  add("--overwrite", action="store_true", help="replace the dataset in --output")
  add("--phantom_train_cases", type=int, help="made-up cases to train on, default 18")
  add("--phantom_test_cases", type=int, help="made-up test cases, default 6")
  add(
    "--check",
    action="store_true",
    help="write no dataset: verify and describe the one in --output, or the raw files in --source (they are prepared "
    "into a temporary folder, below $TMPDIR)",
  )
  add("--html", metavar="FILE", help=f"page with tables and pictures that --check writes, default {DEFAULT_PAGE}")
  return parser


def _parse_command(arguments: Sequence[str] | None) -> Callable[[], str]:
  """What the command line asks for, to be called; argparse itself reports wrong flags and exits with code 2."""
  parser = _parser()
  given = vars(parser.parse_args(arguments))
  checking, page = given.pop("check"), given.pop("html")
  if not checking:
    if missing := [f"--{name}" for name in ("dataset", "output") if given[name] is None]:
      parser.error(f"the following arguments are required: {', '.join(missing)}")
    if page is not None:
      parser.error("--html goes with --check")
    options = PrepareOptions(**given)
    return lambda: summary(prepare(options), options.output)
  page = page or DEFAULT_PAGE
  if given["output"] is None:
    if given["dataset"] is None or given["overwrite"]:
      parser.error("--check needs --output, or --dataset and --source (and then no --overwrite)")
    return lambda: check_archive(PrepareOptions(**given | {"output": ""}), page)
  if others := [f"--{name}" for name, value in given.items() if name != "output" and value != parser.get_default(name)]:
    parser.error(
      f"--check --output={given['output']} looks at a prepared dataset; leave {', '.join(others)} out, or --output to "
      "check raw files"
    )
  return lambda: check_prepared(given["output"], page)


def _comma_list(text: str) -> tuple[str, ...]:
  return tuple(item.strip() for item in text.split(",") if item.strip())


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  command = _parse_command(arguments)
  try:
    return run_command(lambda: print(command(), flush=True))
  except KeyboardInterrupt:
    print("interrupted: nothing was prepared; run the same command again", file=sys.stderr, flush=True)
    return EXIT_FAULT


if __name__ == "__main__":
  sys.exit(main())
