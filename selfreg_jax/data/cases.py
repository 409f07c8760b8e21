"""One case from a NIfTI file to arrays of slices: reading, checking, orientation there and back, intensities.

Every fault of a file is a `CaseError` with one line that says what is wrong, so that `prepare` can list all bad files
of a dataset at once. This module imports NumPy and nibabel only.
"""

import base64
import collections
import contextlib
import dataclasses
import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from selfreg_jax.data.manifest import Intensity

ORIENTATIONS = ("ras", "stored")

# Voxels by which the corners of image and label may lie apart. sforms in float32 agree to 2e-4 voxels on a
# 512 x 512 x 200 grid and header fields rounded to three decimals to a few hundredths; half a voxel is a real shift.
AFFINE_TOLERANCE = 0.1

# Distance of a label from an integer that still counts as rounding: 255 * float32(1 / 255) is 1.00000006.
LABEL_TOLERANCE = 1e-4

# How network inputs are stored, by kind of intensity: dtype and the factor that brings stored values back.
STORED_FORMATS = {
  "window": ("uint16", 1 / 65535),
  "minmax": ("uint16", 1 / 65535),
  "zscore": ("float32", 1.0),
  "byte": ("uint8", 1 / 255),
}

# Largest array that is read from a file, counted as float32 or as the file's own type, whichever is larger: what a
# network sees is float32 once. A gibibyte is 512 x 512 x 1024 voxels, beyond the longest scans of the body in use, and
# with the copies on the way keeps one case below 4 GiB, however small the file that promises it.
MOST_BYTES = 1 << 30

# Longest side of a slice. Resizing takes time and memory that grow with the square of it; slides are cut into tiles.
MOST_PIXELS_A_SIDE = 1 << 14

_MOST_TRAILING_BYTES = 1 << 20  # what may follow the voxels: some programs pad their files to whole blocks
_MOST_EXTENSION_BYTES = 1 << 26  # what may stand between header and voxels: text of other programs
_PIECE = 1 << 20  # bytes or values that are worked on at a time
_LISTED_VALUES = 8
_DISTINCT_VALUES = 1 << 16  # strange labels that are told apart; with more, it is no label
_GZIP_MAGIC = b"\x1f\x8b"
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's xyzt_units, lowest three bits; 0 is unknown, 2 millimetres


class CaseError(Exception):
  """One fault of one file, or of an image with its label, in one line without the file's name."""


@dataclasses.dataclass(frozen=True)
class LabelRule:
  """How the values of a label file become class ids; any other value is a fault of the file.

  Attributes:
    num_classes: number of classes, background included; without more, valid values are the ids 0 .. num_classes - 1.
    table: the class id of each label value 0 .. len(table) - 1, where label files hold other ids than the classes'.
    instances: values count objects, or mark them with any number (255): all above 0 are class 1.
    must_exceed: a label file none of whose values exceeds this is taken for another label set; None: not checked.
    hint: what may be wrong where values are refused.
  """

  num_classes: int
  table: tuple[int, ...] | None = None
  instances: bool = False
  must_exceed: int | None = None
  hint: str = "the wrong label set, or the wrong --num_classes or --class_names?"


@dataclasses.dataclass(frozen=True, eq=False)
class RawVolume:
  """A volume as its file holds it.

  Attributes:
    array: (x, y, z) or (x, y, z, channels) voxels in the file's scaled units; the file's own integer type where it has
      one and no scaling, else float32.
    affine: (4, 4) voxel -> millimetres, from the sform where there is one, else the qform, else the voxel sizes.
    header: the file's header as it stands, without nibabel's repairs.
  """

  array: np.ndarray
  affine: np.ndarray
  header: nib.Nifti1Header


def read_nifti(path: str | os.PathLike, *, channels: bool = False) -> RawVolume:
  """Reads a whole .nii or .nii.gz file and checks all that one file can be checked for.

  A gzip stream is read to its end, so that truncation and a wrong CRC are noticed; memory is taken for what the header
  declares, once that was found small enough, and for nothing beyond. Axes of length 1 after the third are dropped:
  several tools write a volume as (x, y, z, 1), or its channels as (x, y, z, 1, channels).

  Args:
    path: the file.
    channels: whether a fourth axis is allowed, which then holds channels.

  Returns:
    The volume, every voxel finite.

  Raises:
    CaseError: the file cannot be read, is damaged, too large or no NIfTI file, or holds something other than one
      finite, real-valued volume with positive voxel sizes in millimetres and an invertible affine.
  """
  path = pathlib.Path(path)
  with _opened(path) as stream:
    try:
      header = _parse_header(stream.read(nib.Nifti2Header.sizeof_hdr))
      shape = _array_shape(header, channels)
      affine = _checked_affine(header)
      voxels = _stored_voxels(stream, header, shape)
      if not _ends_within(stream, _MOST_TRAILING_BYTES):
        raise CaseError(f"holds more than its header declares ({shape} {voxels.dtype} voxels); the header is wrong")
    except CaseError:
      _ends_within(stream, MOST_BYTES)  # a damaged stream makes damaged headers: then that is what to say
      raise
  array = _scaled(voxels, header)
  del voxels
  check_finite(array)
  return RawVolume(array, affine, header)


def pack_header(header: nib.Nifti1Header) -> str:
  """A header's bytes as text; the reverse is `unpack_header`."""
  return base64.b64encode(header.binaryblock).decode()


def unpack_header(packed: str) -> nib.Nifti1Header:
  """The header that `pack_header` packed, unrepaired."""
  return _parse_header(base64.b64decode(packed))


def write_like(path: str | os.PathLike, array: np.ndarray, header: nib.Nifti1Header) -> None:
  """Writes an array on the grid of another file: its affines, their codes, units and remaining fields stay.

  The file exists whole or not at all.

  Args:
    path: a .nii or .nii.gz file.
    array: (x, y, z) or (x, y, z, channels), uint8 or float32, on the grid of the file that the header comes from.
    header: of that file.
  """
  path = pathlib.Path(path)
  header = header.copy()
  header.set_data_dtype(array.dtype)
  header["sizeof_hdr"] = header.sizeof_hdr  # some programs leave it 0, which nibabel would mend, and print that it did
  header["cal_min"] = header["cal_max"] = 0  # the display range of the image means nothing for classes
  kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
  # nibabel compresses by the file's ending, slice by slice: no second copy of the volume in memory.
  temporary = path.with_name(f"partial.{path.name}")
  kind(array, None, header).to_filename(temporary)
  temporary.replace(path)


def peek_shape(path: str | os.PathLike) -> tuple[int, ...] | None:
  """The (x, y, z[, channels]) that a file's header promises, read from its first bytes.

  None if it cannot be had, or if the file will be refused for it.
  """
  try:
    with _opened(pathlib.Path(path)) as stream:
      header = _parse_header(stream.read(nib.Nifti2Header.sizeof_hdr))
      shape = _array_shape(header, channels=True)
      check_size(shape, _stored_dtype(header))
      return shape
  except CaseError:
    return None


def check_size(shape: tuple[int, ...], dtype: np.dtype) -> None:
  """Raises CaseError where an array that a file declares is larger than `MOST_BYTES`; to be asked before reading it."""
  size = math.prod(shape) * max(dtype.itemsize, np.dtype(np.float32).itemsize)
  if size > MOST_BYTES:
    raise CaseError(
      f"declares an array of {shape} {dtype}, {size / (1 << 30):.3g} GiB where at most {MOST_BYTES >> 30} GiB is read; "
      "if it holds that, cut it into parts, or store it with fewer bytes a value"
    )


def read_bytes(path: pathlib.Path, most: int) -> bytes:
  """A file's content, unpacked if its name ends in .gz.

  Args:
    path: the file.
    most: bytes that there may be.

  Returns:
    The content, at least one byte.

  Raises:
    CaseError: there is none to be had, or too much.
  """
  with _opened(path) as stream:
    content = stream.read(most + 1)
  if not content:
    raise CaseError("is empty")
  if len(content) > most:
    raise CaseError(f"holds more than {most >> 20} MiB, which no usable file of its kind does")
  return content


def check_regular(path: pathlib.Path) -> None:
  """Raises CaseError for folders, and for devices, which may have no end."""
  if path.is_dir():
    raise CaseError("is a folder, not a file")
  if path.is_char_device() or path.is_block_device():
    raise CaseError("is a device, not a file")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file's content as a stream, unpacked if its name ends in .gz; whatever goes wrong in the body is a CaseError."""
  try:
    check_regular(path)
    if path.stat().st_size == 0 and path.is_file():
      raise CaseError("is empty")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
      yield stream
  except EOFError as error:
    raise CaseError("truncated: the gzip stream stops before its end") from error
  except (gzip.BadGzipFile, zlib.error) as error:
    raise CaseError(f"damaged or not a gzip file ({one_line(error)})") from error
  except OSError as error:
    raise CaseError(f"cannot be read ({error.strerror or one_line(error)})") from error


def _ends_within(stream: BinaryIO, most: int) -> bool:
  """Whether a stream ends after no more than so many bytes, which are passed over."""
  while most >= 0 and (piece := stream.read(_PIECE)):
    most -= len(piece)
  return most >= 0


def one_line(error: Exception) -> str:
  """An error's message without line breaks."""
  return " ".join(str(error).split())


def _parse_header(content: bytes) -> nib.Nifti1Header:
  """The header of a single-file NIfTI-1 or NIfTI-2, unrepaired: nibabel's own loading mends bad fields silently."""
  if not content:
    raise CaseError("is empty")
  if content.startswith(_GZIP_MAGIC):
    raise CaseError("is compressed by gzip; name it .nii.gz")
  for kind in (nib.Nifti1Header, nib.Nifti2Header):
    if len(content) < kind.sizeof_hdr or not kind.may_contain_header(content[: kind.sizeof_hdr]):
      continue
    header = kind(content[: kind.sizeof_hdr], check=False)
    if header["magic"].item() == kind.pair_magic:
      raise CaseError("is the header of a .hdr/.img pair; convert it to a single .nii file")
    if header["magic"].item() == kind.single_magic.rstrip(b"\x00"):
      return header
  raise CaseError("is not a NIfTI file (no NIfTI header)")


def _array_shape(header: nib.Nifti1Header, channels: bool) -> tuple[int, ...]:
  dimensions = int(header["dim"][0])
  if not 1 <= dimensions <= 7:
    raise CaseError(f"damaged header: {dimensions} dimensions")
  shape = tuple(int(size) for size in header["dim"][1 : dimensions + 1])
  if min(shape) < 1:
    raise CaseError(f"damaged header: shape {shape}")
  further = tuple(size for size in shape[3:] if size > 1)
  if len(shape) < 3 or len(further) > channels:
    or_channels = ", or one with channels (x, y, z, channels)," if channels else ""
    raise CaseError(f"has shape {shape}; one 3-D volume (x, y, z){or_channels} is needed")
  return (*shape[:3], *further)


def _checked_affine(header: nib.Nifti1Header) -> np.ndarray:
  sizes = header["pixdim"][1:4]
  if not (np.isfinite(sizes) & (sizes > 0)).all():
    raise CaseError(f"voxel sizes (pixdim) {_numbers(sizes)} in the header are not all positive")
  if unit := _LENGTH_UNITS.get(int(header["xyzt_units"]) & 7):
    raise CaseError(f"voxel sizes are in {unit}; convert the header to millimetres")
  for field in ("qform_code", "sform_code"):
    if int(header[field]) not in nib.nifti1.xform_codes.value_set():  # writing a class map would change it
      raise CaseError(f"damaged header: {field} {int(header[field])} is not known")
  if header["pixdim"][0] == 0:
    header["pixdim"][0] = 1  # NIfTI-1: "if pixdim[0] is 0, then use qfac = 1"
  try:
    affine = np.asarray(header.get_best_affine(), np.float64)
  except (HeaderDataError, ValueError) as error:
    raise CaseError(f"damaged affine ({one_line(error)})") from error
  if not is_invertible(affine):
    raise CaseError("affine is singular or not finite: " + "; ".join(_numbers(row) for row in affine[:3]))
  return affine


def is_invertible(affine: np.ndarray) -> bool:
  """Whether an affine (4, 4) is finite and its axes point in three directions, however small the voxels are."""
  with np.errstate(all="ignore"):  # of damaged headers
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not np.isfinite(lengths).all() or not lengths.all():
      return False
    return abs(np.linalg.det(affine[:3, :3] / lengths)) >= 1e-3


def _numbers(values: np.ndarray) -> str:
  return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _stored_dtype(header: nib.Nifti1Header) -> np.dtype:
  try:
    dtype = header.get_data_dtype()
  except (HeaderDataError, KeyError) as error:
    raise CaseError(f"unknown data type code {int(header['datatype'])}") from error
  if dtype.kind not in "iuf":
    what = {"c": "complex numbers", "V": "RGB colours"}.get(dtype.kind, str(dtype))
    raise CaseError(f"holds {what}; one real number a voxel is needed")
  return dtype


def _stored_voxels(stream: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, ...]) -> np.ndarray:
  """The voxels (x, y, z[, channels]) before scaling."""
  dtype = _stored_dtype(header)
  check_size(shape, dtype)
  offset = float(header["vox_offset"]) or header.single_vox_offset
  if not 0 <= offset - header.single_vox_offset <= _MOST_EXTENSION_BYTES:
    raise CaseError(f"damaged header: the voxels start at byte {offset:g}")
  voxels = np.empty(math.prod(shape), dtype)
  start, buffer, filled = stream.seek(int(offset)), voxels.view(np.uint8).data, 0
  while filled < len(buffer) and (count := stream.readinto(buffer[filled : filled + _PIECE])):
    filled += count
  if filled < len(buffer):
    found = stream.seek(0, os.SEEK_END) if filled == 0 else start + filled
    raise CaseError(f"truncated: {found} bytes where the header promises {int(offset) + len(buffer)}")
  return voxels.reshape(shape, order="F")


def _scaled(voxels: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
  try:
    slope, intercept = header.get_slope_inter()
  except HeaderDataError as error:
    raise CaseError(f"damaged header: {one_line(error)}") from error
  with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 becomes Inf or NaN, which is refused as such
    if slope is None or (slope, intercept) == (1.0, 0.0):
      native = voxels.dtype.newbyteorder("=") if voxels.dtype.kind in "iu" else np.float32
      return voxels.astype(native, copy=False)
    scaled = voxels.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(intercept)
  return scaled


def check_finite(array: np.ndarray) -> None:
  """Raises CaseError where an array holds NaN or infinite values."""
  if array.dtype.kind != "f" or np.isfinite(array).all():
    return
  counts = {"NaN": np.isnan(array).sum(), "Inf": np.isinf(array).sum()}
  raise CaseError("holds " + " and ".join(f"{count} {name}" for name, count in counts.items() if count) + " voxel(s)")


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
  """How the slices of a case lie in the grid of its file, and the way back.

  Slices are array[x, y] at fixed z after orientation: rows run along the first axis that is left, columns along the
  second (the authors' preparation, and the packs in circulation).

  Attributes:
    affine: (4, 4) voxel (x, y, z) of the file as stored -> millimetres; an array or nested sequences.
    file_shape: (x, y, z) voxels of the file as stored.
    orientation: "ras" (axes permuted and flipped to nibabel's closest canonical) or "stored".
    axis: the axis, after orientation, along which slices are cut.
  """

  affine: np.ndarray
  file_shape: tuple[int, int, int]
  orientation: str = "ras"
  axis: int = 2

  def _file_axes(self) -> tuple[tuple[int, bool], ...]:
    """For (slice, row, column): the file's axis and whether it runs backwards."""
    oriented = [(axis, False) for axis in range(3)]
    if self.orientation == "ras":
      target_and_sign = nib.io_orientation(np.asarray(self.affine))  # a row for each axis of the file
      oriented = [(int(axis), target_and_sign[axis, 1] < 0) for axis in np.argsort(target_and_sign[:, 0])]
    return (oriented[self.axis], *(oriented[axis] for axis in range(3) if axis != self.axis))

  def _flips(self) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if backwards else 1) for _, backwards in self._file_axes())

  @property
  def shape(self) -> tuple[int, int, int]:
    """(slices, rows, columns)."""
    return tuple(int(self.file_shape[axis]) for axis, _ in self._file_axes())

  @property
  def spacing(self) -> tuple[float, float, float]:
    """Millimetres between voxel centres along (slice, row, column)."""
    sizes = nib.affines.voxel_sizes(np.asarray(self.affine))
    return tuple(float(sizes[axis]) for axis, _ in self._file_axes())

  @property
  def axcodes(self) -> tuple[str, str, str]:
    """Where the indices along (slice, row, column) grow to, e.g. ("S", "R", "A")."""
    affine = np.asarray(self.affine)
    grows, shrinks = nib.aff2axcodes(affine), nib.aff2axcodes(affine @ np.diag([-1, -1, -1, 1]))
    return tuple((shrinks if backwards else grows)[axis] for axis, backwards in self._file_axes())

  def to_slices(self, array: np.ndarray) -> np.ndarray:
    """(x, y, z, ...) in the file's grid -> (slices, rows, columns, ...), a view."""
    self._check_shape(array, tuple(self.file_shape), "the file's grid")
    order = [axis for axis, _ in self._file_axes()]
    return array.transpose(*order, *range(3, array.ndim))[self._flips()]

  def from_slices(self, slices: np.ndarray) -> np.ndarray:
    """(slices, rows, columns, ...) -> (x, y, z, ...) in the file's own grid, a view; the reverse of `to_slices`."""
    self._check_shape(slices, self.shape, "(slices, rows, columns)")
    order = [axis for axis, _ in self._file_axes()]
    return slices[self._flips()].transpose(*np.argsort(order), *range(3, slices.ndim))

  def _check_shape(self, array: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if array.shape[:3] != shape:
      raise ValueError(f"array of shape {array.shape}; {what} is {shape}")


def check_image(volume: RawVolume, geometry: Geometry) -> None:
  """`check_slices` of a volume (x, y, z[, channels])."""
  slices = geometry.to_slices(volume.array)
  check_slices(slices if slices.ndim == 4 else slices[..., np.newaxis])


def check_slices(image: np.ndarray) -> None:
  """Checks an image as networks will see it.

  Args:
    image: (slices, rows, columns, channels), raw.

  Raises:
    CaseError: a channel has one (float32) value everywhere or a range that float32 cannot hold, or the slices are less
      than two voxels wide, or larger than can be resized.
  """
  slices, rows, columns, channels = image.shape
  for channel in range(channels):
    low, high = np.float32(image[..., channel].min()), np.float32(image[..., channel].max())
    where = f"in channel {channel} " if channels > 1 else ""
    if low == high:
      raise CaseError(f"is constant: {where}every voxel is {low:g}")
    with np.errstate(over="ignore"):
      if not np.isfinite(high - low):
        raise CaseError(f"{where}values from {low:g} to {high:g} are too far apart to be mapped in float32")
  if min(rows, columns) < 2:
    raise CaseError(f"slices of {rows} x {columns} voxels ({slices} of them) are too small: two a side are needed")
  if max(rows, columns) > MOST_PIXELS_A_SIDE:
    raise CaseError(
      f"slices of {rows} x {columns} voxels are too large: {MOST_PIXELS_A_SIDE} a side; cut it into tiles"
    )


def check_pair(image: RawVolume, label: RawVolume) -> None:
  """Raises CaseError unless image and label lie on one grid: equal shapes, corners within `AFFINE_TOLERANCE` voxels.

  Whole affines are compared, and like with like: the sforms if both files carry one, else the qforms if both do. A
  qform's float32 quaternion may place the corners of a slightly oblique volume a voxel away from the exact affine, the
  same way in both files.
  """
  if image.array.shape[:3] != label.array.shape:
    raise CaseError(f"image has shape {image.array.shape}, label {label.array.shape}")
  image_affine, label_affine = _comparable_affines(image, label)
  corners = np.stack(np.meshgrid(*([0, size - 1] for size in label.array.shape), [1], indexing="ij")).reshape(4, 8)
  apart = np.abs(np.linalg.solve(image_affine, label_affine @ corners) - corners)[:3].max(axis=1)
  if not apart.max() <= AFFINE_TOLERANCE:  # what overflows is apart, too
    raise CaseError(f"image and label lie apart: their affines differ by {_numbers(apart)} voxels along (x, y, z)")


def _comparable_affines(image: RawVolume, label: RawVolume) -> tuple[np.ndarray, np.ndarray]:
  sforms = [volume.header.get_sform(coded=True)[0] for volume in (image, label)]
  qform_codes = [int(volume.header["qform_code"]) for volume in (image, label)]
  if any(sform is None for sform in sforms) and all(code > 0 for code in qform_codes):
    try:
      return image.header.get_qform(), label.header.get_qform()
    except (HeaderDataError, ValueError):
      pass  # a damaged qform beside a good sform: compare what each file is used with
  return image.affine, label.affine


def checked_labels(array: np.ndarray, rule: LabelRule) -> np.ndarray:
  """Checks a label array and turns its values into class ids.

  Args:
    array: label values, of any shape and real type; floats that hold integers are accepted.
    rule: which values there may be and what they mean.

  Returns:
    uint8 of the same shape.

  Raises:
    CaseError: values that are no integers or that the rule does not know; they are named with their numbers of voxels.
  """
  check_finite(array)
  if not (array.flags.c_contiguous or array.flags.f_contiguous):
    array = np.ascontiguousarray(array)
  known = math.inf if rule.instances else len(rule.table or range(rule.num_classes))
  classes, strange, highest = np.empty_like(array, np.uint8), collections.Counter(), -math.inf
  flat, flat_classes = array.ravel(order="K"), classes.ravel(order="K")  # views
  for start in range(0, array.size, _PIECE):  # in pieces: copies of a whole float volume would fill the memory
    values = _integers(flat[start : start + _PIECE])
    outside = (values < 0) | (values >= known)
    if outside.any():
      strange.update(_counted(values[outside]))
      if len(strange) > _DISTINCT_VALUES:
        break
    elif not strange:
      highest = max(highest, values.max())
      flat_classes[start : start + _PIECE] = _class_ids(values, rule)
  if strange:
    what = "negative labels" if rule.instances else f"labels outside the {known} classes 0..{known - 1}"
    raise CaseError(f"{what}: {_value_counts(strange)}; {rule.hint}")
  if rule.must_exceed is not None and highest <= rule.must_exceed:
    raise CaseError(f"no label is above {rule.must_exceed}; {rule.hint}")
  return classes


def _integers(values: np.ndarray) -> np.ndarray:
  if values.dtype.kind != "f":
    return values
  rounded = np.rint(values)
  fractional = np.abs(values - rounded) > LABEL_TOLERANCE
  if fractional.any():
    counts = _value_counts(_counted(values[fractional]))
    raise CaseError(f"labels are not integers: {counts}; an image or probabilities?")
  return rounded


def _class_ids(values: np.ndarray, rule: LabelRule) -> np.ndarray:
  if rule.instances:
    return values > 0
  return values if rule.table is None else np.asarray(rule.table, np.uint8)[values.astype(np.uint8)]


def _counted(values: np.ndarray) -> dict[float, int]:
  unique, counts = np.unique(values, return_counts=True)
  return dict(zip(unique.tolist(), counts.tolist(), strict=True))


def _value_counts(counts: Mapping[float, int]) -> str:
  listed = sorted(counts)[:_LISTED_VALUES]
  text = ", ".join(f"{value:.10g} ({counts[value]} voxels)" for value in listed)
  return text + (f" and {len(counts) - _LISTED_VALUES} more values" if len(counts) > _LISTED_VALUES else "")


def apply_intensity(array: np.ndarray, intensity: Intensity) -> np.ndarray:
  """Maps raw intensities to network inputs.

  Args:
    array: raw values of one channel of a whole case, any shape and real type; not constant.
    intensity: "window": clip to [low, high], then (x - low) / (high - low); "minmax": the same with the array's own
      extremes; "zscore": (x - mean) / deviation of the array; "byte": x / 255.

  Returns:
    A new float32 array of the same shape, C-contiguous.

  Raises:
    CaseError: "byte" for values that are not 8-bit, "zscore" for a deviation that float32 takes for none.
  """
  if intensity.kind == "byte":
    return _bytes_to_unit(array)
  output = array.astype(np.float32, order="C")
  if intensity.kind == "zscore":
    mean = float(array.mean(dtype=np.float64))
    # Slice by slice: NumPy's own deviation takes two float64 copies of the volume.
    variance = sum(float(np.square(np.subtract(part, mean, dtype=np.float64)).sum()) for part in array) / array.size
    if not (deviation := np.float32(math.sqrt(variance))):
      raise CaseError(f"is as good as constant: values deviate by {math.sqrt(variance):g} from their mean {mean:g}")
    output -= np.float32(mean)
    output /= deviation
    return output
  if intensity.kind == "window":
    low, high = np.float32(intensity.low), np.float32(intensity.high)
    np.clip(output, low, high, out=output)
  elif intensity.kind == "minmax":
    low, high = output.min(), output.max()
  else:
    raise ValueError(f"unknown kind of intensity {intensity.kind!r}; known: {', '.join(STORED_FORMATS)}")
  output -= low
  output /= high - low
  return output


def _bytes_to_unit(array: np.ndarray) -> np.ndarray:
  if array.dtype != np.uint8:
    low, high = array.min(), array.max()
    if low < 0 or high > 255 or (array.dtype.kind == "f" and (array != np.rint(array)).any()):
      raise CaseError(
        f"holds values from {low:g} to {high:g}, not the integers 0 to 255 of 8-bit colours; "
        "say how to map them: --normalize=minmax, --normalize=zscore or --window LO HI"
      )
  return array.astype(np.float32, order="C") / np.float32(255)


def encode(network_input: np.ndarray, kind: str) -> tuple[np.ndarray, str, float]:
  """Packs network inputs for storage.

  Args:
    network_input: float32, first axis slices; in [0, 1] for all kinds but "zscore".
    kind: the kind of intensity.

  Returns:
    (stored array of the same shape, its dtype's name, scale): stored * scale is the network input, to 1e-5 for "window"
    and "minmax", to 1e-7 for "byte" and exactly for "zscore".
  """
  dtype, scale = STORED_FORMATS[kind]
  if dtype == "float32":
    return np.ascontiguousarray(network_input, np.float32), dtype, scale
  stored = np.empty(network_input.shape, dtype)
  for target, values in zip(stored, network_input, strict=True):  # by slices: no second float32 copy of the volume
    target[...] = np.rint(values / np.float32(scale))
  return stored, dtype, scale
