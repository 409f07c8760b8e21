"""Turns raw medical images into a prepared dataset, once, checking everything that can be wrong with them.

    python -m selfreg_jax.data.prepare --dataset=synapse --source=RawData --output=data/synapse
    python -m selfreg_jax.data.prepare --dataset=msd --source=Task09_Spleen --output=data/spleen --window -125 275
    python -m selfreg_jax.data.prepare --dataset=phantom --output=data/phantom
    python -m selfreg_jax.data.prepare --check --output=data/spleen
    python -m selfreg_jax.data.prepare --check --dataset=msd --source=Task09_Spleen --window -125 275

The same command again goes on where it was stopped. Many machines that share a disk prepare a part of the cases each,
at the same time, and one puts them together:

    python -m selfreg_jax.data.prepare --dataset=... --shard=0/3    (1/3 and 2/3 elsewhere)
    python -m selfreg_jax.data.prepare --dataset=... --merge

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
leaves nothing that could be taken for a prepared dataset; what it has finished is taken over by the next run
(`staging`). Memory is bounded by the largest case times the number of workers (`conversion`). No worker pays for JAX,
and only packs in HDF5 pay for h5py.
"""

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn

import numpy as np

from selfreg_jax.data import (
  acdc,
  cases,
  check,
  check_page,
  conversion,
  datasets,
  histology,
  manifest,
  splits,
  staging,
  synapse,
)
from selfreg_jax.data.conversion import Job, Outcome
from selfreg_jax.data.datasets import RawCase, RawDataset
from selfreg_jax.data.manifest import Case, Intensity, Manifest
from selfreg_jax.data.published import PUBLISHED
from selfreg_jax.data.readers import Reading
from selfreg_jax.data.staging import Shard
from selfreg_jax.errors import EXIT_FAULT, UserError, run_command

CT_WINDOW = (-125.0, 275.0)  # HU; the authors' for Synapse
DEFAULT_PAGE = "dataset_check.html"
NORMALIZATIONS = ("minmax", "zscore", "byte")

_RAW_PHANTOMS = "raw"
_KEPT = " (the cases that are done are kept for the next run)"


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
    merge: convert nothing; complete the dataset whose cases `prepare_shard` has prepared.
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
  merge: bool = False
  phantom_train_cases: int | None = None
  phantom_test_cases: int | None = None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What a request comes to, once its source has been looked through.

  Attributes:
    output: folder of the prepared dataset.
    source: folder of the raw files.
    raw: what the source holds.
    reading: how files are to be read.
    intensity: how raw values become network inputs.
    splits: case ids by split.
    folds: validation ids of each fold.
    jobs: the cases to convert.
    workers: processes to use at most.
    kept: what to add to messages that no dataset was written.
  """

  output: pathlib.Path
  source: pathlib.Path
  raw: RawDataset
  reading: Reading
  intensity: Intensity
  splits: dict[str, tuple[str, ...]]
  folds: tuple[tuple[str, ...], ...]
  jobs: tuple[Job, ...]
  workers: int
  kept: str


def prepare(options: PrepareOptions) -> Manifest:
  """Prepares a dataset: finds the cases, checks and converts them all, writes arrays and manifest.

  Cases that an interrupted run or shards have finished, from the same files with the same options, are taken over.
  Warnings and progress go to stderr.

  Args:
    options: what to do.

  Returns:
    The manifest, as it was written.

  Raises:
    UserError: options, source or output are unusable, the disk is full, there are bad files, or cases that are to be
      merged are not done: all of them are named, a line each. A dataset in the output folder is then what it was.
  """
  return _prepare(options, _KEPT)


def prepare_shard(options: PrepareOptions, shard: str) -> str:
  """Prepares a part of the cases for `prepare` to complete; other parts may be prepared elsewhere at the same time.

  Args:
    options: what to do.
    shard: "i/n": every n-th case in the order of ids, beginning with the i-th, from 0.

  Returns:
    What was done, for reading.

  Raises:
    UserError: what `prepare` raises; the bad files that are named are those of this part, and files that make no case.
  """
  part = Shard.parse(shard)
  if options.merge:
    raise UserError(f"--shard={part} and --merge exclude each other: merge when all shards are done")
  with _planned(options, _KEPT, part) as plan:
    ids = part.part(plan.raw.ids)
    outcomes = _converted(plan, [job for job in plan.jobs if job.case.id in ids])
    _raise_faults(plan, outcomes)
  _warn(line for outcome in outcomes for line in outcome.warnings)
  return (
    f"shard {part}: {len(outcomes)} of {len(plan.jobs)} case(s) are done in {plan.output}\n"
    "next: the same command with --merge instead of --shard, when all shards are done"
  )


def _prepare(options: PrepareOptions, kept: str) -> Manifest:
  with _planned(options, kept) as plan:
    outcomes = _merged(plan) if options.merge else _all_converted(plan)
    _raise_faults(plan, outcomes)
    if faults := _channel_faults(outcomes):
      _refuse(plan, faults)
    dtype, scale = cases.STORED_FORMATS[plan.intensity.kind]
    made = Manifest(
      dataset=options.dataset,
      kind=plan.raw.kind,
      unit=plan.raw.unit,
      classes=plan.raw.classes,
      channels=outcomes[0].case.shape[3],
      intensity=plan.intensity,
      dtype=dtype,
      scale=scale,
      orientation=plan.reading.orientation,
      axis=options.axis,
      splits=plan.splits,
      folds=plan.folds,
      cases={outcome.case.id: outcome.case for outcome in sorted(outcomes, key=lambda outcome: outcome.case.id)},
      source=str(plan.source),
    )
    staging.install(made, plan.output)
  _warn([*plan.raw.notes, *splits.notes_on_test(plan.splits, plan.raw.groups), *_notes_on_folds(plan.raw, made)])
  _warn([*(line for outcome in outcomes for line in outcome.warnings), *_odd(made)])
  return made


def _warn(lines: Iterable[str]) -> None:
  for line in lines:
    print(f"warning: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _planned(options: PrepareOptions, kept: str, shard: Shard | None = None) -> Iterator[_Plan]:
  """Checks the request, keeps others out of the output folder and plans the work that is then done in the body."""
  try:
    intensity = _checked_intensity(options)
    if options.dataset == "phantom" and (shard or options.merge):
      raise UserError("--shard, --merge cannot be used with --dataset=phantom: made-up cases are made in one go")
    output = pathlib.Path(options.output)
    _check_output(output, options)
    output.mkdir(parents=True, exist_ok=True)
    with staging.locked(output, shard):
      _check_output(output, options)  # a preparation that was faster may have completed it
      yield _plan(output, intensity, options, kept)
  except OSError as error:
    raise UserError(_environment_fault(error, options, kept)) from error
  except KeyboardInterrupt as interrupt:
    raise KeyboardInterrupt(f"no dataset was written{kept}") from interrupt


def _plan(output: pathlib.Path, intensity: Intensity, options: PrepareOptions, kept: str) -> _Plan:
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
  folder = staging.begin(output)
  jobs = tuple(Job(case, source, folder, reading, intensity, raw.channels) for case in raw.cases)
  return _Plan(output, source, raw, reading, intensity, dealt, folds, jobs, options.workers or conversion.cpus(), kept)


def _all_converted(plan: _Plan) -> list[Outcome]:
  staging.clear_others(plan.output / staging.STAGING, [job.case.id for job in plan.jobs])
  return _converted(plan, plan.jobs)


def _converted(plan: _Plan, jobs: Sequence[Job]) -> list[Outcome]:
  """Converts those of the cases that are not done yet; the outcomes of all are in no particular order."""
  earlier = conversion.take_over(jobs, plan.workers)
  done = [outcome for outcome in earlier.values() if outcome.case is not None]
  left = [job for job in jobs if earlier[job.case.id].case is None]
  if done:
    print(f"{len(done)} of {len(jobs)} cases were done already", file=sys.stderr, flush=True)
  staging.clear(plan.output / staging.STAGING, [job.case.id for job in left])
  _check_space(plan.output, [job.case for job in left], plan.intensity)
  try:
    return done + conversion.convert_all(left, plan.workers)
  except (BrokenProcessPool, MemoryError) as error:
    raise UserError(
      f"a worker process died, probably out of memory; no dataset was written{plan.kept}. Use fewer than "
      f"--workers={min(plan.workers, len(left))}"
    ) from error


def _merged(plan: _Plan) -> list[Outcome]:
  """The outcomes of cases that are all done; UserError where one is not, or is not what this request would make."""
  outcomes = conversion.take_over(plan.jobs, plan.workers)
  missing = {case_id: outcome.faults[0] for case_id, outcome in outcomes.items() if outcome.case is None}
  if missing:
    shards = _known_shards(plan)
    again = sorted({shards[case_id] for case_id in missing if shards}, key=dataclasses.astuple)
    named = datasets.listed(f"--shard={shard}" for shard in again) or "their shards"
    lines = [f"{case_id}{f' (shard {shards[case_id]})' if shards else ''}: {why}" for case_id, why in missing.items()]
    raise UserError(
      f"{plan.output}: {len(missing)} of {len(plan.jobs)} cases are not done, no dataset was written; prepare them "
      f"with {named}, or leave --merge out:\n  " + "\n  ".join(sorted([*lines, *plan.raw.faults]))
    )
  staging.clear_others(plan.output / staging.STAGING, outcomes)
  return [*outcomes.values()]


def _known_shards(plan: _Plan) -> dict[str, Shard]:
  """The shard of each case, as far as the shards that were begun tell how many there are."""
  counts = {shard.count for shard in staging.shard_locks(plan.output)}
  if len(counts) != 1:
    return {}
  (count,) = counts
  shards = [Shard(index, count) for index in range(count)]
  return {case_id: shard for shard in shards for case_id in shard.part(plan.raw.ids)}


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
  # `_write_phantoms` looks into the folder of made-up cases.
  own = (_RAW_PHANTOMS,) if options.dataset == "phantom" and options.source is None else ()
  if foreign := staging.foreign_files(output, own):
    raise UserError(f"{output}: holds other files ({datasets.listed(foreign)}); give an empty or a new folder")
  if (output / manifest.FILE_NAME).exists() and not options.overwrite:
    raise UserError(f"{output}: holds a prepared dataset; --overwrite replaces it")


def _environment_fault(error: OSError, options: PrepareOptions, kept: str) -> str:
  """What to say of a failing disk or of missing rights; single raw files have been dealt with in `cases`."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return f"{options.output}: the disk is full; no dataset was written{kept}. Make room and run the same command again"
  return f"{error.filename or options.output}: {error.strerror or error}; no dataset was written{kept}"


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


def _raise_faults(plan: _Plan, outcomes: Sequence[Outcome]) -> None:
  """Raises UserError where files make no case or cases have faults."""
  if faults := [*plan.raw.faults, *(fault for outcome in outcomes for fault in outcome.faults)]:
    _refuse(plan, faults)


def _refuse(plan: _Plan, faults: Sequence[str]) -> NoReturn:
  raise UserError(
    f"{plan.source}: {len(faults)} fault(s); no dataset was written{plan.kept}:\n  " + "\n  ".join(sorted(faults))
  )


def _channel_faults(outcomes: Sequence[Outcome]) -> list[str]:
  """A fault for each case that has another number of channels than most."""
  counts = [outcome.case.shape[3] for outcome in outcomes]
  usual = max(sorted({*counts}), key=counts.count, default=None)
  return [
    f"{outcome.case.sources['image']}: has {count} channel(s), most cases have {usual}"
    for outcome, count in zip(outcomes, counts, strict=True)
    if count != usual
  ]


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
      made = _prepare(dataclasses.replace(options, output=folder), kept="")
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
  add("--overwrite", action="store_true", help="replace the dataset in --output, when the new one is complete")
  add(
    "--shard",
    metavar="I/N",
    help="prepare only part I (from 0) of N, on any machine that shares the disk; then --merge",
  )
  add("--merge", action="store_true", help="convert nothing: complete the dataset that all shards have prepared")
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
  checking, page, shard = given.pop("check"), given.pop("html"), given.pop("shard")
  if not checking:
    if missing := [f"--{name}" for name in ("dataset", "output") if given[name] is None]:
      parser.error(f"the following arguments are required: {', '.join(missing)}")
    if page is not None:
      parser.error("--html goes with --check")
    options = PrepareOptions(**given)
    if shard is not None:
      return lambda: prepare_shard(options, shard)
    return lambda: summary(prepare(options), options.output)
  if shard is not None or given["merge"]:
    parser.error("--shard and --merge prepare, --check does not; leave them out")
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
  except KeyboardInterrupt as interrupt:
    what = str(interrupt) or "nothing was written"
    print(f"interrupted: {what}; run the same command again", file=sys.stderr, flush=True)
    return EXIT_FAULT


if __name__ == "__main__":
  sys.exit(main())
