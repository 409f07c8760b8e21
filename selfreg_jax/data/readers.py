"""Kinds of raw cases, each a dataclass of files that knows how to read them: all end as the same `Content`.

A reader finds everything that is wrong with a case's files before it gives up, and names the files (`CaseFaultsError`).
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import nibabel as nib
import numpy as np

from selfreg_jax.data import cases, images, packs, polygons
from selfreg_jax.data.cases import CaseError, LabelRule

_PIXELS = (1.0, 1.0, 1.0)  # spacing where the source gives none


class CaseFaultsError(Exception):
  """What is wrong with a case's files.

  Attributes:
    faults: (files, one line about them) for each fault.
  """

  def __init__(self, faults: Sequence[tuple[tuple[pathlib.Path, ...], str]]):
    super().__init__("; ".join(f"{', '.join(map(str, paths))}: {line}" for paths, line in faults))
    self.faults = tuple(faults)


@dataclasses.dataclass(frozen=True)
class Reading:
  """How cases are to be read.

  Attributes:
    labels: which label values there may be and what they mean.
    orientation: "ras" or "stored"; of NIfTI files only.
    axis: axis, after orientation, along which slices are cut; of NIfTI files only.
  """

  labels: LabelRule
  orientation: str = "stored"
  axis: int = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Content:
  """A case as it was read.

  Attributes:
    image: (slices, rows, columns, channels), raw values, or network inputs in [0, 1] where `mapped`.
    classes: (slices, rows, columns) uint8 class ids.
    spacing: between voxel centres along (slice, row, column); 1 where the source gives none.
    file_shape: of the image file as stored, without channels.
    axcodes: where the indices along (slice, row, column) grow to; None where the source does not say.
    affine: (4, 4) voxel (x, y, z) of the file as stored -> millimetres; None likewise.
    header: of the image file; None where that is no NIfTI file.
    mapped: whether the intensities were mapped by whoever made the files.
  """

  image: np.ndarray
  classes: np.ndarray
  spacing: tuple[float, float, float]
  file_shape: tuple[int, ...]
  axcodes: tuple[str, str, str] | None = None
  affine: np.ndarray | None = None
  header: nib.Nifti1Header | None = None
  mapped: bool = False


class Reader(Protocol):
  """The files of one case."""

  @property
  def image_files(self) -> tuple[pathlib.Path, ...]:
    """The files that the image is in."""

  @property
  def label_files(self) -> tuple[pathlib.Path, ...]:
    """The files that the label is in; may be the same."""

  def peek_size(self) -> tuple[int, int]:
    """(voxels, channels) of the image as the files' headers promise them; (0, 1) where they cannot be read."""

  def read(self, reading: Reading) -> Content:
    """Reads and checks the case.

    Raises:
      CaseFaultsError: files are damaged, do not fit each other, or hold something that is not expected.
    """


class _Faults:
  """Collects the faults of several files, so that one bad file does not hide the next."""

  def __init__(self):
    self._found: list[tuple[tuple[pathlib.Path, ...], str]] = []

  @contextlib.contextmanager
  def of(self, *paths: pathlib.Path) -> Iterator[None]:
    """Takes a CaseError in the body as a fault of these files."""
    try:
      yield
    except CaseError as error:
      self._found.append((paths, str(error)))

  def raise_any(self) -> None:
    if self._found:
      raise CaseFaultsError(self._found)


@dataclasses.dataclass(frozen=True)
class NiftiCase:
  """A volume and its label in NIfTI files on one grid; several image files, or a fourth axis, are channels."""

  image_files: tuple[pathlib.Path, ...]
  label: pathlib.Path

  @property
  def label_files(self) -> tuple[pathlib.Path, ...]:
    """The one label file."""
    return (self.label,)

  def peek_size(self) -> tuple[int, int]:
    """See `Reader`."""
    return _total_size([cases.peek_shape(path) for path in self.image_files], spatial=3)

  def read(self, reading: Reading) -> Content:
    """See `Reader`."""
    faults, volumes, label = _Faults(), [], None
    for path in self.image_files:
      with faults.of(path):
        volumes.append(cases.read_nifti(path, channels=True))
        cases.check_image(volumes[-1], self._geometry(volumes[-1], reading))
    with faults.of(self.label):
      label = cases.read_nifti(self.label)
      label = dataclasses.replace(label, array=cases.checked_labels(label.array, reading.labels))
    faults.raise_any()
    for path, volume in zip(self.image_files, volumes, strict=True):
      with faults.of(path, self.label):
        cases.check_pair(volume, label)
    faults.raise_any()
    geometry = self._geometry(volumes[0], reading)
    return Content(
      image=_channels([geometry.to_slices(volume.array) for volume in volumes]),
      classes=np.ascontiguousarray(geometry.to_slices(label.array)),
      spacing=geometry.spacing,
      file_shape=geometry.file_shape,
      axcodes=geometry.axcodes,
      affine=volumes[0].affine,
      header=volumes[0].header,
    )

  def _geometry(self, volume: cases.RawVolume, reading: Reading) -> cases.Geometry:
    return cases.Geometry(volume.affine, volume.array.shape[:3], reading.orientation, reading.axis)


@dataclasses.dataclass(frozen=True)
class ImageCase:
  """A 2-D image, grey or RGB, and its mask or ImageScope outlines (.xml); several image files are channels."""

  image_files: tuple[pathlib.Path, ...]
  label: pathlib.Path

  @property
  def label_files(self) -> tuple[pathlib.Path, ...]:
    """The one label file."""
    return (self.label,)

  def peek_size(self) -> tuple[int, int]:
    """See `Reader`."""
    return _total_size([images.peek_shape(path) for path in self.image_files], spatial=2)

  def read(self, reading: Reading) -> Content:
    """See `Reader`."""
    faults, channels, outlines, classes = _Faults(), [], None, None
    for path in self.image_files:
      with faults.of(path):
        channels.append(images.read_image(path)[np.newaxis])
        cases.check_finite(channels[-1])
        cases.check_slices(channels[-1])
    with faults.of(self.label):
      if self.label.suffix.lower() == ".xml":
        outlines = polygons.read_polygons(self.label)
      else:
        classes = cases.checked_labels(images.read_mask(self.label), reading.labels)
    faults.raise_any()
    shape = channels[0].shape[1:3]
    with faults.of(self.label):
      if outlines is not None:
        classes = polygons.rasterize(outlines, shape).astype(np.uint8)
    faults.raise_any()
    for path, pixels in zip(self.image_files, channels, strict=True):
      with faults.of(path, self.label):
        if pixels.shape[1:3] != classes.shape:
          (rows, columns), (label_rows, label_columns) = pixels.shape[1:3], classes.shape
          raise CaseError(f"image has {columns} x {rows} pixels, label {label_columns} x {label_rows}")
    faults.raise_any()
    return Content(image=_channels(channels), classes=classes[np.newaxis], spacing=_PIXELS, file_shape=shape)


@dataclasses.dataclass(frozen=True)
class SlicePack:
  """A case whose slices are .npz files of image and label each, in order."""

  files: tuple[pathlib.Path, ...]
  image_key: str

  @property
  def image_files(self) -> tuple[pathlib.Path, ...]:
    """The slices."""
    return self.files

  @property
  def label_files(self) -> tuple[pathlib.Path, ...]:
    """The slices."""
    return self.files

  def peek_size(self) -> tuple[int, int]:
    """See `Reader`; the first slice speaks for all."""
    voxels, channels = _total_size([packs.peek_shape(self.files[0], self.image_key)], spatial=2)
    return len(self.files) * voxels, channels

  def read(self, reading: Reading) -> Content:
    """See `Reader`."""
    faults, slices, classes = _Faults(), [], []
    for path in self.files:
      with faults.of(path):
        image, label = packs.read_arrays(path, self.image_key, rank=2)
        classes.append(cases.checked_labels(label, reading.labels))
        slices.append(image)
        if image.shape != slices[0].shape:
          raise CaseError(f"has shape {image.shape}, the case's first slice {slices[0].shape}")
    faults.raise_any()
    with faults.of(*self.files[:1]):
      content = _packed(np.stack(slices), np.stack(classes))
    faults.raise_any()
    return content


@dataclasses.dataclass(frozen=True)
class VolumePack:
  """A case in one .npz or .h5 file: image and label (slices, rows, columns)."""

  file: pathlib.Path
  image_key: str

  @property
  def image_files(self) -> tuple[pathlib.Path, ...]:
    """The one file."""
    return (self.file,)

  @property
  def label_files(self) -> tuple[pathlib.Path, ...]:
    """The one file."""
    return (self.file,)

  def peek_size(self) -> tuple[int, int]:
    """See `Reader`."""
    return _total_size([packs.peek_shape(self.file, self.image_key)], spatial=3)

  def read(self, reading: Reading) -> Content:
    """See `Reader`."""
    faults = _Faults()
    with faults.of(self.file):
      image, label = packs.read_arrays(self.file, self.image_key, rank=3)
      content = _packed(image, cases.checked_labels(label, reading.labels))
    faults.raise_any()
    return content


def _packed(image: np.ndarray, classes: np.ndarray) -> Content:
  """The content of a pack: mapped by whoever made it, and of unknown spacing."""
  cases.check_slices(image[..., np.newaxis])
  slices, rows, columns = image.shape
  return Content(image[..., np.newaxis], classes, _PIXELS, file_shape=(rows, columns, slices), mapped=True)


def _channels(arrays: Sequence[np.ndarray]) -> np.ndarray:
  """(slices, rows, columns[, channels]) arrays -> one of all channels; a view where there is one array."""
  arrays = [array if array.ndim == 4 else array[..., np.newaxis] for array in arrays]
  return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def _total_size(shapes: Sequence[tuple[int, ...] | None], spatial: int) -> tuple[int, int]:
  """(voxels, channels) of the arrays together, whose shapes begin with `spatial` sizes and may end with channels."""
  if any(shape is None for shape in shapes):
    return 0, 1
  return math.prod(shapes[0][:spatial]), sum(math.prod(shape[spatial:]) for shape in shapes)
