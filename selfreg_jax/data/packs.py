"""Packs in circulation: slices in .npz, volumes in .npz or .h5, image and label under one roof, already in [0, 1].

Nothing in a file is run (no pickles) and nothing outside it is read. Every fault of a file is a `CaseError`, as in
`cases`.
"""

import math
import pathlib
import zipfile
import zlib

import numpy as np

from selfreg_jax.data.cases import CaseError, check_finite

# Rounding by which a mapped image may leave [0, 1].
_TOLERANCE = 1e-4
_MOST_BYTES = 1 << 33  # of one array; a volume of 512 x 512 x 1000 doubles has 2 GiB


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
  if path.is_dir():
    raise CaseError("is a folder, not a file")
  image, label = _read_h5(path, image_key) if path.suffix == ".h5" else _read_npz(path, image_key)
  for name, array in ((image_key, image), ("label", label)):
    if array.dtype.kind not in "biuf":
      raise CaseError(f"{name!r} holds {array.dtype}; numbers are needed")
    if array.ndim != rank or not array.size:
      raise CaseError(f"{name!r} has shape {array.shape}; {'a slice' if rank == 2 else 'a volume'} is needed")
  if image.shape != label.shape:
    raise CaseError(f"image has shape {image.shape}, label {label.shape}")
  with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which is refused as such
    image = image.astype(np.float32)
  check_finite(image)
  low, high = image.min(), image.max()
  if low < -_TOLERANCE or high > 1 + _TOLERANCE:
    raise CaseError(f"holds image values from {low:g} to {high:g}; those of the pack lie in [0, 1]")
  return np.clip(image, 0, 1), label.astype(np.uint8) if label.dtype == bool else label


def peek_shape(path: pathlib.Path, image_key: str) -> tuple[int, ...] | None:
  """The shape that a file promises for its image; None if it cannot be had."""
  try:
    if path.suffix == ".h5":
      import h5py

      with h5py.File(path) as file:
        return file[image_key].shape
    with zipfile.ZipFile(path) as archive, archive.open(f"{image_key}.npy") as member:
      return _npy_shape(member)
  except (OSError, ValueError, KeyError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
    return None


def _npy_shape(member) -> tuple[int, ...]:
  version = np.lib.format.read_magic(member)
  read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  return read_header(member)[0]


def _read_npz(path: pathlib.Path, image_key: str) -> tuple[np.ndarray, np.ndarray]:
  try:
    with zipfile.ZipFile(path) as archive:
      sizes = {member.filename: member.file_size for member in archive.infolist()}
    _check_present({name.removesuffix(".npy") for name in sizes}, image_key)
    if max(sizes.values()) > _MOST_BYTES:
      raise CaseError(f"would unpack to more than {_MOST_BYTES >> 30} GiB")
    with np.load(path, allow_pickle=False) as arrays:
      return arrays[image_key], arrays["label"]
  except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
    raise CaseError(f"damaged or not an .npz file ({_one_line(error)})") from error
  except ValueError as error:  # an object array, or a header that is none
    raise CaseError(f"holds no plain arrays ({_one_line(error)})") from error
  except OSError as error:
    raise CaseError(f"cannot be read ({error.strerror or _one_line(error)})") from error


def _read_h5(path: pathlib.Path, image_key: str) -> tuple[np.ndarray, np.ndarray]:
  import h5py  # here, so that only those who read such a pack wait for it

  try:
    with h5py.File(path) as file:
      _check_present(set(file), image_key)
      image, label = (_plain_dataset(h5py, file, name) for name in (image_key, "label"))
      return image[()], label[()]
  except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
    raise CaseError(f"damaged or not an HDF5 file ({_one_line(error)})") from error


def _plain_dataset(h5py, file, name: str):
  """A dataset whose values lie in the file itself: HDF5 can point to others, which a pack has no reason to."""
  dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
  if not isinstance(dataset, h5py.Dataset) or dataset.external is not None or dataset.is_virtual:
    raise CaseError(f"{name!r} is not an array in this file")
  if math.prod(dataset.shape) * dataset.dtype.itemsize > _MOST_BYTES:
    raise CaseError(f"{name!r} would unpack to more than {_MOST_BYTES >> 30} GiB")
  return dataset


def _check_present(names: set[str], image_key: str) -> None:
  if missing := sorted({image_key, "label"} - names):
    raise CaseError(f"holds no {' and no '.join(map(repr, missing))}, but {', '.join(sorted(names)) or 'nothing'}")


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())
