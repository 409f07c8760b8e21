"""Class maps as files: NIfTI volumes on the grid of their images, PNG pictures."""

import pathlib

import nibabel as nib
import numpy as np
from PIL import Image

from selfreg_jax.data import cases
from selfreg_jax.data.manifest import Case, Manifest

ENDINGS = {"volume": ".nii.gz", "image": ".png"}


def path_for(folder: pathlib.Path, case_id: str, kind: str) -> pathlib.Path:
  """Where the class map of a case of this kind of dataset goes."""
  return folder / f"{case_id}{ENDINGS[kind]}"


def write_case(path: pathlib.Path, classes: np.ndarray, case: Case, manifest: Manifest) -> None:
  """Writes a prepared case's class map as its image came: on the grid and under the header of its file, or as PNG.

  A volume whose source has no grid (a pack) is written with its own axes and spacing.

  Args:
    path: as `path_for` gives it.
    classes: (slices, rows, columns) uint8 class ids.
    case: the case.
    manifest: of its dataset.
  """
  if manifest.kind == "image":
    write_png(path, classes[0], num_classes=manifest.num_classes)
    return
  header = _plain_header(case, manifest) if case.header is None else cases.unpack_header(case.header)
  cases.write_like(path, _geometry(case, manifest).from_slices(classes), header)


def read_case(path: pathlib.Path, case: Case, manifest: Manifest) -> np.ndarray:
  """The class map (slices, rows, columns), uint8, that `write_case` wrote."""
  if manifest.kind == "image":
    with Image.open(path) as picture:
      return (np.asarray(picture) // _brightness(manifest.num_classes))[None]
  return _geometry(case, manifest).to_slices(np.asarray(nib.load(path).dataobj))


def write_png(path: pathlib.Path, classes: np.ndarray, *, num_classes: int) -> None:
  """Writes the class map of an image as a grey PNG at its own size.

  Pixels are class ids or, where there are two classes, 0 and 255, so that people see something. The file exists whole
  or not at all.

  Args:
    path: the file.
    classes: (rows, columns) uint8 class ids.
    num_classes: number of classes, background included.
  """
  temporary = path.with_name(f"partial.{path.name}")
  Image.fromarray(np.ascontiguousarray(classes * np.uint8(_brightness(num_classes)))).save(temporary)
  temporary.replace(path)


def _brightness(num_classes: int) -> int:
  """What a class id is multiplied with: two classes are meant to be seen."""
  return 255 if num_classes == 2 else 1


def _geometry(case: Case, manifest: Manifest) -> cases.Geometry:
  affine = np.eye(4) if case.affine is None else case.affine
  orientation = "stored" if case.affine is None else manifest.orientation
  return cases.Geometry(affine, case.file_shape, orientation, manifest.axis)


def _plain_header(case: Case, manifest: Manifest) -> nib.Nifti1Header:
  """The header of a volume that had none: axes as stored, the case's spacing, the origin at the first voxel."""
  sizes = list(case.spacing[1:])
  sizes.insert(manifest.axis, case.spacing[0])
  header = nib.Nifti1Header()
  header.set_data_shape(case.file_shape)
  header.set_zooms(sizes)
  header.set_sform(np.diag([*sizes, 1.0]), code="aligned")
  header.set_xyzt_units("mm" if manifest.unit == "mm" else "unknown")
  return header
