"""Packs in circulation: slices in .npz, volumes in .npz or .h5, image and label under one roof, already in [0, 1].

Nothing in a file is run (no pickles), nothing outside it is read, and nothing is unpacked before what the file declares
was found small enough. Every fault of a file is a `CaseError`, as in `cases`.
"""

import contextlib
import math
import pathlib
import struct
import tokenize
import types
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from selfreg_jax.data.cases import CaseError, check_finite, check_regular, check_size, one_line

# Rounding by which a mapped image may leave [0, 1].
_TOLERANCE = 1e-4

# How members of an .npz file may be packed. `numpy.savez` knows no other way; bzip2 and LZMA unpack a few bytes to many
# megabytes at a time, which zipfile does not bound.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# HDF5's numbers of the filters that chunks may pass through. Each unpacks to what the chunk declares, or by a small
# factor more, but for deflate (1), which is checked for it; others may be plugins, code from outside.
_DEFLATE = 1
_FILTERS = {_DEFLATE: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_PIECE = 1 << 16  # bytes that are inflated at a time; they become 1032 times as many at most


def read_arrays(path: pathlib.Path, image_key: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads image and label of a file.

  Args:
    path: an .npz file, or an .h5 file.
    image_key: the image's name in the file; the label's is "label".
    rank: 2 for a slice (rows, columns), 3 for a volume (slices, rows, columns).

  Returns:
    The image, float32 in [0, 1], and the label's values, not yet checked, of one shape.

  Raises:
    CaseError: the file cannot be read, is damaged, or holds something else.
  """
  check_regular(path)
  image, label = _read_h5(path, image_key) if path.suffix == ".h5" else _read_npz(path, image_key)
  for name, array in ((image_key, image), ("label", label)):
    if array.dtype.kind not in "biuf":
      raise CaseError(f"{name!r} holds {array.dtype}; numbers are needed")
    if array.ndim != rank or not array.size:
      raise CaseError(f"{name!r} has shape {array.shape}; {'a slice' if rank == 2 else 'a volume'} is needed")
  if image.shape != label.shape:
    raise CaseError(f"image has shape {image.shape}, label {label.shape}")
  with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which is refused as such
    image = image.astype(np.float32, copy=False)
  check_finite(image)
  low, high = image.min(), image.max()
  if low < -_TOLERANCE or high > 1 + _TOLERANCE:
    raise CaseError(f"holds image values from {low:g} to {high:g}; those of the pack lie in [0, 1]")
  return np.clip(image, 0, 1, out=image), label.astype(np.uint8) if label.dtype == bool else label


def peek_shape(path: pathlib.Path, image_key: str) -> tuple[int, ...] | None:
  """The shape that a file promises for its image; None if it cannot be had, or if the file will be refused for it."""
  try:
    check_regular(path)
    return _peek_h5(path, image_key) if path.suffix == ".h5" else _peek_npz(path, image_key)
  except CaseError:
    return None


def _peek_npz(path: pathlib.Path, image_key: str) -> tuple[int, ...]:
  with _npz(path) as archive:
    return _npy_member(archive, image_key)[1]


def _peek_h5(path: pathlib.Path, image_key: str) -> tuple[int, ...]:
  with _h5(path) as (h5py, file):
    return _plain_dataset(h5py, file, image_key).shape


def _read_npz(path: pathlib.Path, image_key: str) -> tuple[np.ndarray, np.ndarray]:
  with _npz(path) as archive:
    _check_present({name.removesuffix(".npy") for name in archive.namelist()}, image_key)
    return _npy(archive, image_key), _npy(archive, "label")


@contextlib.contextmanager
def _npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
  """The zip archive that an .npz file is; what goes wrong in the body is a CaseError."""
  try:
    with zipfile.ZipFile(path) as archive:
      yield archive
  # RuntimeError: a member that wants a password. The others are what damaged directories of archives lead zipfile to.
  except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, struct.error, UnicodeError) as error:
    raise CaseError(f"damaged or not an .npz file ({one_line(error)})") from error
  except ValueError as error:  # an object array, or a header that is none
    raise CaseError(f"holds no plain arrays ({one_line(error)})") from error
  except OSError as error:
    raise CaseError(f"cannot be read ({error.strerror or one_line(error)})") from error


def _npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  with archive.open(_npy_member(archive, name)[0]) as member:
    array = np.lib.format.read_array(member, allow_pickle=False)
    member.read(1)  # the end, where the checksum is compared
  return array


def _npy_member(archive: zipfile.ZipFile, name: str) -> tuple[zipfile.ZipInfo, tuple[int, ...]]:
  """The archive's entry of an array and its shape, which agree on a size that is not too large."""
  info = archive.getinfo(f"{name}.npy")
  if info.compress_type not in _ZIP_METHODS:
    raise CaseError(f"{name!r} is packed in a way that numpy.savez does not know; write the file with it")
  with archive.open(info) as member:
    shape, dtype = _npy_header(member)
    declared = member.tell() + math.prod(shape) * dtype.itemsize
  if declared != info.file_size:
    raise CaseError(f"damaged: {name!r} declares {declared} bytes, the archive says {info.file_size}")
  return info, shape


def _npy_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and type that an array declares, not too large."""
  version = np.lib.format.read_magic(member)
  read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  try:
    shape, _, dtype = read_header(member)
  except (MemoryError, tokenize.TokenError) as error:  # the text is given to Python's own parser
    raise ValueError("a header that is no dictionary") from error
  if dtype.hasobject:
    raise ValueError("Python objects")
  check_size(shape, dtype)
  return shape, dtype


def _read_h5(path: pathlib.Path, image_key: str) -> tuple[np.ndarray, np.ndarray]:
  with _h5(path) as (h5py, file):
    _check_present(set(file), image_key)
    datasets = [_plain_dataset(h5py, file, name) for name in (image_key, "label")]
    for dataset in datasets:
      _check_chunks(dataset)
    image, label = (dataset[()] for dataset in datasets)
    return image, label


@contextlib.contextmanager
def _h5(path: pathlib.Path) -> Iterator[tuple[types.ModuleType, Any]]:
  """(h5py, the open file); what goes wrong in the body is a CaseError."""
  import h5py  # here, so that only those who read such a pack wait for it

  try:
    with h5py.File(path, "r") as file:
      yield h5py, file
  # Whatever HDF5 runs into comes as one of these, by the place where it does.
  except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
    raise CaseError(f"damaged or not an HDF5 file ({one_line(error)})") from error


def _plain_dataset(h5py, file, name: str):
  """A dataset whose values lie in the file itself: HDF5 can point to others, which a pack has no reason to."""
  dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
  if not isinstance(dataset, h5py.Dataset) or dataset.external is not None or dataset.is_virtual:
    raise CaseError(f"{name!r} is not an array in this file")
  check_size(dataset.shape or (), dataset.dtype)
  check_size(dataset.chunks or (), dataset.dtype)
  return dataset


def _check_chunks(dataset) -> None:
  """Raises CaseError where a chunk unpacks to more than the dataset declares, which HDF5 would follow to its end."""
  if dataset.chunks is None:
    return
  properties = dataset.id.get_create_plist()
  filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
  if not {*filters} <= {*_FILTERS} or len({*filters}) < len(filters):
    raise CaseError(
      f"is packed with the filters {filters} of HDF5; {', '.join(_FILTERS.values())} are known, once each"
    )
  if _DEFLATE not in filters:
    return
  size = math.prod(dataset.chunks) * dataset.dtype.itemsize
  for index in range(dataset.id.get_num_chunks()):
    skipped, content = dataset.id.read_direct_chunk(dataset.id.get_chunk_info(index).chunk_offset)
    if not skipped >> filters.index(_DEFLATE) & 1 and _inflates_beyond(content, size):
      raise CaseError("damaged: a chunk unpacks to more than it declares")


def _inflates_beyond(content: bytes, size: int) -> bool:
  inflater, found = zlib.decompressobj(), 0
  for start in range(0, len(content), _PIECE):
    found += len(inflater.decompress(content[start : start + _PIECE]))
    if found > size:
      return True
  return False


def _check_present(names: set[str], image_key: str) -> None:
  if missing := sorted({image_key, "label"} - names):
    raise CaseError(f"holds no {' and no '.join(map(repr, missing))}, but {', '.join(sorted(names)) or 'nothing'}")
