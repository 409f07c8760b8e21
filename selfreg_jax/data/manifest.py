"""The manifest: the only thing that training and evaluation read about a prepared dataset.

A prepared dataset is a folder:

    manifest.json            written last, so that a folder without it was never completed
    cases/<id>.image.npy     (slices, rows, columns, channels), stored values; times `scale` they are what networks see
    cases/<id>.label.npy     (slices, rows, columns) uint8 class ids; an image is a case of one slice

The arrays are slices of whole cases at native resolution, in the orientation named by the manifest, and are read
through memory maps. A manifest may come from somebody else: all of it is checked when it is loaded, and it can name no
file outside its own folder. This module imports NumPy only.
"""

import base64
import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from selfreg_jax.data import json_files
from selfreg_jax.errors import UserError

FILE_NAME = "manifest.json"
FORMAT = "selfreg_jax prepared dataset"
FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
_CHUNK_BYTES = 1 << 24  # what `checksum` holds in memory at a time
_MOST_BYTES = 1 << 27  # of a manifest; a case takes one to three kilobytes
_HEADER_BYTES = (348, 540)  # of NIfTI-1 and NIfTI-2
_LISTED_MISTAKES = 20
_LONGEST_NAME = 255  # of a file or folder, in characters
_KNOWN = {
  "kind": ("volume", "image"),
  "unit": ("mm", "voxel", "pixel"),
  "dtype": ("uint16", "uint8", "float32"),
  "orientation": ("ras", "stored"),
  "axis": (0, 1, 2),
}
_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "I": "S", "S": "I"}
_INTENSITIES = ("window", "minmax", "zscore", "byte")


@dataclasses.dataclass(frozen=True)
class Intensity:
  """How raw intensities become network inputs.

  Attributes:
    kind: "window" (clip to [low, high], then to [0, 1]), "minmax" (of each case and channel, to [0, 1]), "zscore" (of
      each case and channel, to mean 0 and deviation 1) or "byte" (8-bit colours / 255).
    low: lower end of the window in the file's units (HU for CT); None unless kind is "window".
    high: upper end of the window.
  """

  kind: str
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
  """One prepared case.

  Attributes:
    id: name of the case, unique in the dataset and usable as a file name.
    image: the image array's file, relative to the dataset's folder.
    label: the label array's file.
    shape: (slices, rows, columns, channels) of the image array.
    spacing: between voxel centres along (slice, row, column), in the manifest's unit; 1 where the source gives none.
    axcodes: where the indices along (slice, row, column) grow to, e.g. ("S", "R", "A"); None where the source gives no
      orientation (images, packs).
    affine: (4, 4) voxel (x, y, z) of the file as stored -> millimetres, as nested lists; None likewise.
    file_shape: voxels of the file as stored, (x, y, z); (rows, columns) of an image.
    header: the image file's NIfTI header as it stood (base64): class maps are written back under it; None where the
      source is no NIfTI file.
    group: what must not be parted by a split (the patient); the case's own id where nothing is known.
    sources: {"image": file or files, "label": file or files}, relative to the source folder where they lie below it.
    checksums: {"image": crc32, "label": crc32} of the array files, as eight hexadecimal digits.
    class_voxels: voxels of each class id, background included.
    foreground_slices: indices of the slices that hold any class besides background.
  """

  id: str
  image: str
  label: str
  shape: tuple[int, int, int, int]
  spacing: tuple[float, float, float]
  axcodes: tuple[str, str, str] | None
  affine: tuple[tuple[float, ...], ...] | None
  file_shape: tuple[int, ...]
  header: str | None
  group: str
  sources: dict[str, str | list[str]]
  checksums: dict[str, str]
  class_voxels: tuple[int, ...]
  foreground_slices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What is known about a prepared dataset.

  Attributes:
    dataset: the preparation that made it ("msd", "phantom", ...).
    kind: "volume" or "image" (2-D: every case has one slice, scored as an image).
    unit: of the spacings: "mm", or "voxel" or "pixel" where the source gives no physical size.
    classes: class names by id; the first is the background.
    channels: channels of every image.
    intensity: how raw values were mapped.
    dtype: of the image arrays: "uint16", "uint8" or "float32".
    scale: stored value * scale = network input.
    orientation: "ras" (nibabel's closest canonical) or "stored".
    axis: the axis of the (x, y, z) array, after orientation, along which slices are cut.
    splits: case ids by split name ("train", "val", "test"), each sorted. With folds, "train" holds all cases that are
      not for testing and "val" is empty.
    folds: for cross-validation, the validation ids of each fold, sorted; together they are the split "train". Empty
      without cross-validation.
    cases: the cases by id.
    source: where the raw files were read from.
  """

  dataset: str
  kind: str
  unit: str
  classes: tuple[str, ...]
  channels: int
  intensity: Intensity
  dtype: str
  scale: float
  orientation: str
  axis: int
  splits: dict[str, tuple[str, ...]]
  folds: tuple[tuple[str, ...], ...]
  cases: dict[str, Case]
  source: str

  @property
  def num_classes(self) -> int:
    """Number of classes, background included."""
    return len(self.classes)

  def split(self, name: str) -> list[Case]:
    """The cases of a split, in the manifest's order."""
    return [self.cases[case_id] for case_id in self.splits[name]]

  def with_fold(self, fold: int) -> "Manifest":
    """The dataset as one fold of its cross-validation sees it: that fold's cases are "val", the others "train".

    Args:
      fold: 0 .. number of folds - 1; -1 for a dataset that was prepared without folds.

    Returns:
      The manifest with other splits (the same one for -1).

    Raises:
      UserError: the fold does not exist, or one must be chosen.
    """
    if fold == -1 and not self.folds:
      return self
    if not 0 <= fold < len(self.folds):
      what = f"has {len(self.folds)} folds: give 0 to {len(self.folds) - 1}" if self.folds else "has no folds: give -1"
      raise UserError(f"config.data.fold = {fold}: the dataset {what} (prepare makes folds with --folds)")
    held_out = self.folds[fold]
    train = tuple(case_id for case_id in self.splits["train"] if case_id not in held_out)
    return dataclasses.replace(self, splits=self.splits | {"train": train, "val": held_out})

  def to_json(self) -> dict[str, Any]:
    """The manifest as the JSON object that is written to disk."""
    return {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}

  @classmethod
  def from_json(cls, content: dict[str, Any]) -> "Manifest":
    """The reverse of `to_json`; raises ValueError, naming the field, on content of other types."""
    fields = {key: value for key, value in content.items() if key not in ("format", "version")}
    return json_files.as_type(fields, cls, "manifest")

  def fingerprint(self) -> str:
    """CRC-32 over all that decides what is trained on: two preparations with equal fingerprints are interchangeable."""
    content = self.to_json()
    del content["source"]
    for case in content["cases"].values():
      del case["sources"], case["header"]
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


class CaseArrays:
  """Memory maps of a prepared dataset's arrays, opened on first use and kept open.

  Attributes:
    directory: the dataset's folder.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(directory)
    self._maps: dict[str, np.ndarray] = {}

  def __getstate__(self):
    # Worker processes open their own maps: pickling one would send its bytes.
    return {"directory": self.directory, "_maps": {}}

  def image(self, case: Case) -> np.ndarray:
    """(slices, rows, columns, channels) stored values."""
    return self._map(case.image)

  def label(self, case: Case) -> np.ndarray:
    """(slices, rows, columns) uint8 class ids."""
    return self._map(case.label)

  def _map(self, name: str) -> np.ndarray:
    if name not in self._maps:
      self._maps[name] = np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
    return self._maps[name]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What prediction must know of the dataset that a network was trained on; see `Manifest` for the fields."""

  kind: str
  classes: tuple[str, ...]
  channels: int
  intensity: Intensity
  orientation: str
  axis: int

  @classmethod
  def of(cls, manifest: Manifest) -> "DatasetInfo":
    """The information that a manifest holds."""
    return cls(**{field.name: getattr(manifest, field.name) for field in dataclasses.fields(cls)})

  def differences(self, other: "DatasetInfo") -> list[tuple[str, Any, Any]]:
    """(field, value here, value there) of every field that differs."""
    names = [field.name for field in dataclasses.fields(self)]
    pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
    return [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]

  @classmethod
  def from_json(cls, content: dict[str, Any]) -> "DatasetInfo":
    """The reverse of `dataclasses.asdict`; raises KeyError or TypeError on other content."""
    return cls(**content | {"classes": tuple(content["classes"]), "intensity": Intensity(**content["intensity"])})


def checksum(path: str | os.PathLike) -> str:
  """CRC-32 of a file's bytes as eight hexadecimal digits, read in pieces."""
  crc = 0
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      crc = zlib.crc32(chunk, crc)
  return f"{crc:08x}"


def save(manifest: Manifest, directory: str | os.PathLike) -> None:
  """Writes `manifest.json` under a temporary name and renames it: it exists whole or not at all.

  Raises:
    UserError: there are more cases than `load` would read.
  """
  path = pathlib.Path(directory) / FILE_NAME
  temporary = path.with_name(path.name + ".partial")
  text = json.dumps(manifest.to_json(), indent=1) + "\n"
  if len(text) > _MOST_BYTES:
    raise UserError(f"{directory}: {len(manifest.cases)} cases are too many for one dataset; prepare several")
  temporary.write_text(text)
  temporary.replace(path)


def load(directory: str | os.PathLike, *, verify: bool = False) -> Manifest:
  """Reads a prepared dataset's manifest and checks it, and that every array it names is there and whole.

  Args:
    directory: the folder that `python -m selfreg_jax.data.prepare --output` wrote.
    verify: also read every array file once and compare its CRC-32 (about a second per gigabyte).

  Returns:
    The manifest.

  Raises:
    UserError: the folder is no prepared dataset, its manifest contradicts itself or names files outside the folder, or
      files are missing, cut short or changed; all of them are named.
  """
  directory = pathlib.Path(directory)
  path = directory / FILE_NAME
  if not path.is_file():
    begun = any(directory.glob("cases*"))  # prepare stages the arrays in cases.partial
    hint = "its preparation was never completed; run it again" if begun else "prepare it first"
    raise UserError(
      f"{directory}: no {FILE_NAME}; {hint} (python -m selfreg_jax.data.prepare --output={directory} ...)"
    )
  try:
    content = json_files.load_object(path, _MOST_BYTES)
    if not {"format", "version"} <= {*content}:
      raise ValueError("it names no format and version")
    if (content["format"], content["version"]) != (FORMAT, FORMAT_VERSION):
      raise UserError(
        f"{path}: format {content['format']!r} version {content['version']!r} is not what this version reads "
        f"({FORMAT!r} version {FORMAT_VERSION}); prepare the dataset again"
      )
    manifest = Manifest.from_json(content)
  except ValueError as error:
    raise UserError(f"{path}: not a manifest ({error}); prepare the dataset again") from error
  if mistakes := [*itertools.islice(_mistakes(manifest, directory), _LISTED_MISTAKES)]:
    raise UserError(f"{path}: not usable; prepare the dataset again:\n  " + "\n  ".join(mistakes))
  faults = []
  for case in manifest.cases.values():
    faults += _faults(directory, manifest, case, verify)
  if faults:
    raise UserError(f"{directory}: {len(faults)} damaged file(s); prepare the dataset again:\n  " + "\n  ".join(faults))
  return manifest


def _mistakes(manifest: Manifest, directory: pathlib.Path) -> Iterator[str]:
  """What in a manifest cannot be, a line each."""
  for name, known in _KNOWN.items():
    if getattr(manifest, name) not in known:
      yield f"{name} is {getattr(manifest, name)!r}; known are {', '.join(map(str, known))}"
  intensity = manifest.intensity
  if intensity.kind not in _INTENSITIES:
    yield f"intensity is {intensity.kind!r}; known are {', '.join(_INTENSITIES)}"
  if intensity.kind == "window" and (None in (intensity.low, intensity.high) or intensity.low >= intensity.high):
    yield f"the window runs from {intensity.low} to {intensity.high}"
  if manifest.channels < 1 or manifest.scale <= 0:
    yield f"{manifest.channels} channels and the scale {manifest.scale:g}, which must both be above 0"
  if not 2 <= len({*manifest.classes}) == len(manifest.classes) <= 256:
    yield f"{len(manifest.classes)} classes; 2 to 256 different ones are possible"
  yield from _mistakes_of_splits(manifest)
  for key, case in manifest.cases.items():
    if case.id != key or not _usable_as_name(key):
      yield f"case {key!r}: its id {case.id!r} is another, or cannot be a file's name"
    for line in _mistakes_of_case(manifest, case, directory):
      yield f"case {key!r}: {line}"


def _mistakes_of_splits(manifest: Manifest) -> Iterator[str]:
  if {*manifest.splits} != {*SPLITS}:
    yield f"the splits are {', '.join(manifest.splits) or 'none'}, not {', '.join(SPLITS)}"
    return
  times = collections.Counter(itertools.chain.from_iterable(manifest.splits.values()))
  for case_id, count in times.items():
    if case_id not in manifest.cases:
      yield f"case {case_id!r} of a split is not among the cases"
    if count > 1:
      yield f"case {case_id!r} is in {count} splits, or in one of them twice"
  if manifest.folds and sorted(itertools.chain.from_iterable(manifest.folds)) != sorted(manifest.splits["train"]):
    yield "the folds do not hold each case of the train split once"


def _mistakes_of_case(manifest: Manifest, case: Case, directory: pathlib.Path) -> Iterator[str]:
  for name in (case.image, case.label):
    if not _lies_within(directory, name):
      yield f"the file {name[:_LONGEST_NAME]!r} does not lie in the dataset's folder"
  slices, rows, columns, channels = case.shape
  if min(case.shape) < 1 or channels != manifest.channels or (manifest.kind == "image" and slices != 1):
    yield f"the shape {case.shape} is not one of {manifest.kind}s of {manifest.channels} channel(s)"
    return
  stored_as = (rows, columns) if manifest.kind == "image" else (slices, rows, columns)
  if sorted(case.file_shape) != sorted(stored_as):
    yield f"the shape {case.shape} is not that of a file of {case.file_shape}"
  if min(case.spacing) <= 0:
    yield f"the spacing {case.spacing} is not positive"
  if case.affine is not None and not _is_affine(case.affine):
    yield "the affine is no invertible matrix of 4 rows and columns"
  if case.axcodes is not None and {*case.axcodes, *(_OPPOSITE.get(code) for code in case.axcodes)} != {*_OPPOSITE}:
    yield f"the axes run towards {case.axcodes}, which are not three directions"
  if case.header is not None and not _is_header(case.header):
    yield "the header is none of NIfTI's in base64"
  voxels = math.prod(case.shape[:3])
  if len(case.class_voxels) != manifest.num_classes or min(case.class_voxels) < 0 or sum(case.class_voxels) != voxels:
    yield f"{case.class_voxels} voxels of each class; there are {manifest.num_classes} classes and {voxels} voxels"
  if [*case.foreground_slices] != sorted({*case.foreground_slices} & {*range(slices)}):
    yield f"slices of the foreground that are not among the {slices}, or out of order"
  if not {"image", "label"} <= {*case.checksums} & {*case.sources}:
    yield "checksums and sources of image and label are needed"


def _usable_as_name(case_id: str) -> bool:
  return case_id.isprintable() and case_id not in ("", ".", "..") and not {*case_id} & {*"/\\"}


def _lies_within(directory: pathlib.Path, name: str) -> bool:
  """Whether a path leads to a place below a folder, links followed."""
  relative = pathlib.PureWindowsPath(name)  # knows the separators and the drives of all systems
  longest = max(map(len, relative.parts), default=0)
  if relative.anchor or ".." in relative.parts or not 0 < longest <= _LONGEST_NAME:
    return False
  try:
    return (directory / name).resolve().is_relative_to(directory.resolve())
  except (OSError, RuntimeError, ValueError):  # a circle of links, a zero byte
    return False


def _is_affine(affine: tuple[tuple[float, ...], ...]) -> bool:
  if [len(row) for row in affine] != [4] * 4 or affine[3] != (0, 0, 0, 1):
    return False
  lengths = np.linalg.norm(np.array(affine, float)[:3, :3], axis=0)
  return lengths.all() and abs(np.linalg.det(np.array(affine, float)[:3, :3] / lengths)) > 0


def _is_header(text: str) -> bool:
  try:
    return text.isascii() and len(base64.b64decode(text, validate=True)) in _HEADER_BYTES
  except ValueError:
    return False


def _faults(directory: pathlib.Path, manifest: Manifest, case: Case, verify: bool) -> list[str]:
  faults = []
  expected = {"image": (case.image, case.shape, manifest.dtype), "label": (case.label, case.shape[:3], "uint8")}
  for kind, (name, shape, dtype) in expected.items():
    path = directory / name
    try:
      if not path.is_file():
        raise ValueError("is not a file" if path.exists() else "missing")
      # Opening the map checks the file's length against its header.
      array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the headers of damaged files are given to Python's own parser
      faults.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
      continue
    if array.shape != shape or array.dtype != dtype:
      faults.append(f"{name}: holds {array.dtype}{array.shape}, the manifest says {dtype}{shape}")
    elif verify and checksum(path) != case.checksums[kind]:
      faults.append(f"{name}: checksum differs from the manifest's; the file has changed since it was prepared")
  return faults
