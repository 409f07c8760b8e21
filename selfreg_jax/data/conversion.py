"""One case, from its raw files to two arrays and a record in the staging folder, and back from an earlier run's record.

A worker process holds one case at a time, and what it returns is small: memory is bounded by the largest case times the
number of workers, however many cases there are.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rich.console
import rich.progress

import selfreg_jax
from selfreg_jax.data import cases, datasets, json_files, manifest, staging
from selfreg_jax.data.datasets import RawCase
from selfreg_jax.data.manifest import Case, Intensity
from selfreg_jax.data.readers import CaseFaultsError, Content, Reading
from selfreg_jax.workers import start_worker

_RECORD_VERSION = 1  # to be raised when cases are converted or described in another way
_SECONDS_BETWEEN_LINES = 5.0
_ONE_SIDED = 0.99  # share of voxels at one end of the range from which the window or the units look wrong


@dataclasses.dataclass(frozen=True)
class Job:
  """One case to convert, with all that a worker process needs.

  Attributes:
    case: the case's files.
    source: folder to which file names in messages and in the manifest are relative.
    staging: folder for the arrays and the record.
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


_NOT_DONE = Outcome(faults=("not prepared yet",))


def _record_path(job: Job) -> pathlib.Path:
  """Where the record lies that says that a case is finished."""
  return job.staging / (job.case.id + staging.RECORD_ENDING)


def take_over_case(job: Job) -> Outcome:
  """What an earlier run has left of a case, if this run would make the same of it.

  Args:
    job: the case.

  Returns:
    The case as it goes into the manifest, its arrays read to their end and found to be whole; else, as the fault, why
    it must be converted.
  """
  try:
    record = json.loads(_record_path(job).read_text())
    key = record["key"]
    case = json_files.as_type(record["case"], Case, "case")
    outcome = Outcome(case, warnings=tuple(record["warnings"]))
  except FileNotFoundError:
    return _NOT_DONE
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return Outcome(faults=(f"its record cannot be used ({error})",))
  if key != _key(job):
    return Outcome(faults=("prepared with other options, or its files have changed since",))
  for kind, path in staging.case_files(job.staging, job.case.id).items():
    try:
      whole = manifest.checksum(path) == case.checksums[kind]
    except OSError as error:
      return Outcome(faults=(f"{path.name}: {error.strerror}",))
    if not whole:
      return Outcome(faults=(f"{path.name}: has been damaged since it was prepared",))
  return outcome


def _key(job: Job) -> str:
  """Digest of all that decides what becomes of a case; only equal ones may be taken over."""
  reader = job.case.reader
  files = sorted({*reader.image_files, *reader.label_files})
  content = {
    "versions": [_RECORD_VERSION, manifest.FORMAT_VERSION, selfreg_jax.__version__],
    "source": str(job.source.absolute()),
    "files": [(datasets.relative(path, job.source), _stamp(path)) for path in files],
    "reader": [type(reader).__name__, dataclasses.asdict(reader)],
    "group": job.case.group,
    "reading": dataclasses.asdict(job.reading),
    "intensity": dataclasses.asdict(job.intensity),
    "channels": job.channels,
  }
  text = json.dumps(content, sort_keys=True, default=lambda path: datasets.relative(path, job.source))
  return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
  try:
    status = path.stat()
  except OSError:
    return None  # reading it will say why
  return status.st_size, status.st_mtime_ns


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
  key = _key(job)  # before reading: the next run must notice a file that changes from now on
  try:
    content = reader.read(job.reading)
    stored = _stored(job, content)
  except CaseFaultsError as error:
    return Outcome(faults=tuple(f"{_names(paths, job.source)}: {line}" for paths, line in error.faults))
  except cases.CaseError as error:
    return Outcome(faults=(f"{_names(reader.image_files, job.source)}: {error}",))
  outcome = _write_case(job, content, stored)
  _write_record(job, outcome, key)
  return outcome


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
  paths = staging.case_files(job.staging, case_id)
  _write_array(paths["image"], stored)
  _write_array(paths["label"], content.classes)
  num_classes = job.reading.labels.num_classes
  counts = sum(np.bincount(labels.ravel(), minlength=num_classes) for labels in content.classes)
  case = Case(
    id=case_id,
    image=f"{staging.ARRAYS}/{paths['image'].name}",
    label=f"{staging.ARRAYS}/{paths['label'].name}",
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


def _write_record(job: Job, outcome: Outcome, key: str) -> None:
  content = {"key": key, "case": dataclasses.asdict(outcome.case), "warnings": outcome.warnings}
  path = _record_path(job)
  temporary = path.with_name(path.name + staging.UNFINISHED)
  temporary.write_text(json.dumps(content))
  temporary.replace(path)


def _file_or_files(paths: Sequence[pathlib.Path], source: pathlib.Path) -> str | list[str]:
  names = [datasets.relative(path, source) for path in paths]
  return names[0] if len(names) == 1 else names


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


def take_over(jobs: Sequence[Job], workers: int) -> dict[str, Outcome]:
  """What earlier runs have left of all cases.

  Args:
    jobs: the cases.
    workers: cases to look at, at a time.

  Returns:
    By id, what `take_over_case` returns.
  """
  outcomes = {job.case.id: _NOT_DONE for job in jobs}
  begun = [job for job in jobs if _record_path(job).exists()]
  executor = concurrent.futures.ThreadPoolExecutor(workers)  # reading and summing up let other threads run
  try:
    with _progress(len(begun), "checking", "checked") as advance:
      for job, outcome in zip(begun, executor.map(take_over_case, begun), strict=True):
        outcomes[job.case.id] = outcome
        advance()
  finally:
    executor.shutdown(cancel_futures=True)
  return outcomes


def convert_all(jobs: Sequence[Job], workers: int) -> list[Outcome]:
  """Converts cases, in this process (one worker) or in several.

  Args:
    jobs: the cases.
    workers: processes to use at most.

  Returns:
    What `convert_case` returns for each, in no particular order.

  Raises:
    BrokenProcessPool: a worker died.
    MemoryError: this process, the only one, has too little memory.
    OSError: arrays cannot be written.
  """
  workers = min(workers, len(jobs))
  with _progress(len(jobs), "preparing", "prepared") as advance:
    if workers > 1:
      return _convert_in_processes(jobs, workers, advance)
    outcomes = []
    for job in jobs:
      outcomes.append(convert_case(job))
      advance()
    return outcomes


def _convert_in_processes(jobs: Sequence[Job], workers: int, advance: Callable[[], None]) -> list[Outcome]:
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
  )
  with _interrupted_once():
    try:
      outcomes = []
      for future in concurrent.futures.as_completed([executor.submit(convert_case, job) for job in jobs]):
        outcomes.append(future.result())
        advance()
      return outcomes
    finally:
      executor.shutdown(wait=True, cancel_futures=True)  # what is under way is finished, and kept


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
  """Heeds the first Ctrl-C in the body only.

  Another one while the workers finish, which many programs that start commands send along with the first, would leave
  the executor in a state in which the interpreter waits for ever for its workers to exit.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # signals are not for this thread
    return
  interrupted = False

  def interrupt(number: int, frame: types.FrameType | None) -> None:
    nonlocal interrupted
    if not interrupted:
      interrupted = True
      raise KeyboardInterrupt

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _progress(total: int, doing: str, did: str) -> Iterator[Callable[[], None]]:
  """A bar on a terminal, else a line every few seconds, of what is to be done; yields what to call after each case."""
  if not total:
    yield lambda: None
    return
  console = rich.console.Console(stderr=True)
  if console.is_terminal:
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task(doing, total=total)
      yield lambda: bar.advance(task)
    return
  done, last_line = 0, time.monotonic()

  def advance() -> None:
    nonlocal done, last_line
    done += 1
    if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
      last_line = time.monotonic()
      print(f"{did} {done} of {total} cases", file=sys.stderr, flush=True)

  yield advance


def cpus() -> int:
  """How many CPUs this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
