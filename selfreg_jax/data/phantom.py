"""Made-up CT volumes of the abdomen, for tests, for the quickstart and for trying a configuration without real data.

A case is arranged like a patient (liver on the right, spleen and stomach on the left, kidneys behind, aorta before the
spine) and stored like the files of a clinic: anisotropic voxels, axes that are flipped, permuted or oblique. Organs
share their intensities with each other and with muscle and bowel, so that a network has to learn where they are and
what their outlines look like; a table from intensity to class does badly (tests/data/test_phantom.py measures it).

Anatomy is written down once, in millimetres of a reference patient with x to the right, y to the front and z to the
head (RAS+), the origin in the middle of the body. Everything random about a case comes from `(seed, index)`; what has
to occur in every small set, missing organs and unusual storage, goes round in fixed cycles instead.
"""

import dataclasses
import gzip
import json
import math
import os
import pathlib

import nibabel as nib
import numpy as np
from scipy import ndimage

from selfreg_jax.errors import UserError

CLASS_NAMES: tuple[str, ...] = (
  "background",
  "aorta",
  "gallbladder",
  "left kidney",
  "right kidney",
  "liver",
  "pancreas",
  "spleen",
  "stomach",
)


@dataclasses.dataclass(frozen=True)
class PhantomCase:
  """One made-up CT volume.

  Attributes:
    image: (x, y, z) int16 Hounsfield units, in the order in which the file stores them.
    label: (x, y, z) uint8 ids into `CLASS_NAMES`, on the same grid.
    affine: (4, 4) float64 voxel indices -> RAS+ millimetres, exact in the single precision of a NIfTI header.
  """

  image: np.ndarray
  label: np.ndarray
  affine: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Ellipsoid:
  """An ellipsoid in reference millimetres, turned in the axial plane by `angle` degrees (from x towards y)."""

  centre: tuple[float, float, float]
  radii: tuple[float, float, float]
  angle: float = 0.0


_COLUMN = 1000.0  # a radius along z that makes an ellipsoid a cylinder through the whole volume

# Each organ is a smooth union of ellipsoids. Where organs meet, the later one in this table takes the space.
_ORGANS: dict[str, tuple[_Ellipsoid, ...]] = {
  "liver": (_Ellipsoid((60, 5, 6), (50, 58, 66)), _Ellipsoid((20, 38, 28), (44, 26, 30))),
  "spleen": (_Ellipsoid((-82, -16, 20), (20, 37, 40), 12),),
  "stomach": (_Ellipsoid((-48, 38, 22), (34, 27, 34), -10), _Ellipsoid((-16, 42, 2), (30, 17, 20), 10)),
  "pancreas": (
    _Ellipsoid((29, 12, -18), (16, 16, 27)),
    _Ellipsoid((2, 18, -8), (23, 14, 23), 5),
    _Ellipsoid((-26, 13, 2), (22, 14, 23), 20),
    _Ellipsoid((-51, 0, 9), (18, 14, 22), 35),
  ),
  "gallbladder": (_Ellipsoid((43, 45, -30), (18, 22, 28), 20),),
  "left kidney": (_Ellipsoid((-58, -38, -8), (21, 25, 42), -20),),
  "right kidney": (_Ellipsoid((58, -38, -16), (21, 25, 42), 20),),
  "aorta": (_Ellipsoid((-9, -9, 0), (12.5, 12.5, _COLUMN)),),
}
# Millimetres of fat between an organ and those before it; the gallbladder lies in the liver's own bed.
_FAT_AROUND = {"liver": 2.0, "gallbladder": 0.5, "stomach": 4.0, "left kidney": 4.0, "right kidney": 4.0}
_DEFAULT_FAT_AROUND = 2.5

_BODY = (135.0, 98.0)  # half axes of the skin's ellipse along x and y
_VENA_CAVA = _Ellipsoid((21, -11, 0), (13, 9, _COLUMN))  # much like the aorta, but on the right and flatter
_SPINE = (_Ellipsoid((0, -43, 0), (21, 18, _COLUMN)), _Ellipsoid((0, -70, 0), (5, 14, _COLUMN)))
_BACK_MUSCLES = tuple(
  _Ellipsoid(centre, radii)
  for side in (-1, 1)
  for centre, radii in (((side * 27, -66, 0), (25, 15, _COLUMN)), ((side * 28, -42, -70), (14, 14, 70)))
)

# Tissues besides the organs, whose ids are their class ids.
_AIR, _FAT, _MUSCLE, _BONE, _BOWEL, _GAS, _BLOOD = range(len(CLASS_NAMES), len(CLASS_NAMES) + 7)
# (mean HU, HU that contrast agent adds or takes, HU by which cases differ besides), by tissue id.
_HOUNSFIELD = {
  CLASS_NAMES.index("aorta"): (180, 15, 8),
  CLASS_NAMES.index("gallbladder"): (10, 0, 5),
  CLASS_NAMES.index("left kidney"): (150, 14, 7),
  CLASS_NAMES.index("right kidney"): (150, 14, 7),
  CLASS_NAMES.index("liver"): (100, 9, 7),
  CLASS_NAMES.index("pancreas"): (84, 8, 6),
  CLASS_NAMES.index("spleen"): (122, 11, 7),
  CLASS_NAMES.index("stomach"): (36, 0, 8),
  _AIR: (-1000, 0, 0),
  _FAT: (-100, 0, 6),
  _MUSCLE: (60, 3, 5),
  _BONE: (240, 0, 25),
  _BOWEL: (46, 4, 6),
  _GAS: (-820, 0, 40),
  _BLOOD: (128, 14, 8),
}

# How files are stored, in turn: where each array axis grows to, and whether the grid lies askew to the patient.
_STORAGE = (
  ("RAS", False),
  ("LPS", False),
  ("RAS", True),
  ("LAS", False),
  ("SRA", False),
  ("LPS", True),
  ("PIR", False),
)
# One case in this many lacks an organ; who lacks what goes round, too.
_ABSENCE_PERIOD = 5
_ABSENT = ("gallbladder", "left kidney", "spleen", "gallbladder", "right kidney")


class _Grid:
  """The voxels of a case: where they lie, and smooth random fields over them."""

  def __init__(self, shape: tuple[int, ...], affine: np.ndarray, origin: np.ndarray):
    """Places the voxels.

    Args:
      shape: voxels along the stored axes.
      affine: (4, 4) voxel indices -> millimetres.
      origin: (3,) the body's middle in millimetres.
    """
    self.shape = shape
    self.spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # (3, *shape) millimetres from the body's middle to the right, front and head.
    self.points = np.stack(
      [
        sum(
          (row[axis] * np.arange(size)).reshape([-1 if a == axis else 1 for a in range(3)])
          for axis, size in enumerate(shape)
        )
        + (row[3] - origin[i])
        for i, row in enumerate(affine[:3])
      ]
    ).astype(np.float32)

  def field(self, rng: np.random.Generator, scale: float) -> np.ndarray:
    """A smooth random field of mean 0 and deviation 1 everywhere.

    Random weights on a lattice times Gaussian bumps, one small matrix an axis: much cheaper than filtering noise at
    full resolution, and just as smooth.

    Args:
      rng: source of the weights.
      scale: millimetres over which the field changes.

    Returns:
      (*shape) float32.
    """
    bases = []
    for size, spacing in zip(self.shape, self.spacing, strict=True):
      position = np.arange(size) * spacing
      lattice = np.arange(-scale, position[-1] + 1.5 * scale, scale)
      basis = np.exp(-0.5 * ((position[:, None] - lattice) / (0.7 * scale)) ** 2)
      bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:
      field = np.tensordot(field, basis, axes=(0, 1))  # consumes the first axis and appends its voxels as the last
    return field


def make_case(seed: int, index: int) -> PhantomCase:
  """Makes one case, always the same for the same arguments and independent of all others.

  Args:
    seed: of the set of cases, not negative.
    index: of the case in the set, not negative.

  Returns:
    The volume of about 96 x 96 x 24 voxels of 3.3 x 3.3 x 5 mm, its labels and its affine.
  """
  rng = np.random.default_rng((seed, index))
  turn = seed + index
  absent = _ABSENT[turn // _ABSENCE_PERIOD % len(_ABSENT)] if turn % _ABSENCE_PERIOD == 0 else None
  scale = rng.uniform(0.9, 1.1) * rng.uniform(0.94, 1.06, size=3)
  shape, affine, origin = _storage(rng, scale, *_STORAGE[turn % len(_STORAGE)])
  grid = _Grid(shape, affine, origin)
  warp = np.stack([grid.field(rng, 70.0) for _ in range(3)])
  points = (grid.points + 3.5 * warp) / scale[:, None, None, None].astype(np.float32)

  tissue, cavity = _trunk(rng, grid, points)
  depths = {name: _organ_depth(rng, grid, points, parts) for name, parts in _ORGANS.items()}
  for name, depth in depths.items():
    depth = np.minimum(depth, cavity - 1.5)
    room = (depth > -_FAT_AROUND.get(name, _DEFAULT_FAT_AROUND)) & (cavity > 0)
    if name == absent:  # its neighbours stay whole, and fat has taken its place
      tissue[room & np.isin(tissue, (_BOWEL, _GAS))] = _FAT
    else:
      tissue[room & ~np.isin(tissue, (_BONE, _MUSCLE, _BLOOD))] = _FAT
      tissue[depth > 0] = CLASS_NAMES.index(name)
  label = np.where(tissue < len(CLASS_NAMES), tissue, 0).astype(np.uint8)
  return PhantomCase(image=_scan(rng, grid, points, tissue, depths), label=label, affine=affine)


def _storage(
  rng: np.random.Generator, scale: np.ndarray, axcodes: str, oblique: bool
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
  """Draws the grid of a file: like a scanner's, its field of view is fitted to the patient's width.

  Args:
    rng: source of sizes and places.
    scale: (3,) the patient's size over the reference patient's.
    axcodes: where the stored axes grow to.
    oblique: whether the grid is turned by about 10 degrees against the patient.

  Returns:
    Voxels along the stored axes, the (4, 4) affine, and the (3,) place of the body's middle in millimetres.
  """
  size = np.array([rng.integers(88, 105), rng.integers(88, 105), rng.integers(20, 29)])
  in_plane = 2 * _BODY[0] * scale[0] * rng.uniform(1.1, 1.2) / size[0]
  spacing = np.array([in_plane, in_plane, 124.0 * scale[2] / size[2]])
  order = ["LRPAIS".index(code) // 2 for code in axcodes]
  linear = np.zeros((3, 3))
  linear[order, range(3)] = spacing[order] * [1 if code in "RAS" else -1 for code in axcodes]
  if oblique:
    axis = rng.standard_normal(3)
    linear = _rotation(axis / np.linalg.norm(axis), np.deg2rad(rng.uniform(8, 12))) @ linear
  shape = tuple(int(n) for n in size[order])
  middle = rng.uniform(-60, 60, size=3)
  affine = np.eye(4)
  affine[:3, :3] = linear
  affine[:3, 3] = middle - linear @ ((np.array(shape) - 1) / 2)
  affine = affine.astype(np.float32).astype(np.float64)
  return shape, affine, middle + rng.uniform(-4, 4, size=3)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
  """(3, 3) rotation about a unit vector by `angle` radians (Rodrigues' formula)."""
  cross = np.cross(np.eye(3), axis)
  return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _depth(points: np.ndarray, part: _Ellipsoid) -> np.ndarray:
  """About how deep points lie inside an ellipsoid, in millimetres; negative outside.

  Args:
    points: (3, *shape) reference millimetres.
    part: the ellipsoid.

  Returns:
    (*shape) float32.
  """
  x, y, z = (points[axis] - part.centre[axis] for axis in range(3))
  cos, sin = math.cos(math.radians(part.angle)), math.sin(math.radians(part.angle))
  a, b, c = part.radii
  distance = np.sqrt(((cos * x + sin * y) / a) ** 2 + ((cos * y - sin * x) / b) ** 2 + (z / c) ** 2)
  return (1 - distance) * min(part.radii)


def _organ_depth(
  rng: np.random.Generator, grid: _Grid, points: np.ndarray, parts: tuple[_Ellipsoid, ...]
) -> np.ndarray:
  """Like `_depth` for one patient's organ: moved, resized, turned and dented from the reference's.

  Args:
    rng: source of the variation.
    grid: the voxels.
    points: (3, *shape) their reference millimetres.
    parts: the reference organ.

  Returns:
    (*shape) float32.
  """
  # The great vessels are tied to the spine and stay round; other organs have more room to differ.
  freedom = 0.5 if parts[0].radii[2] == _COLUMN else 1.0
  shift = rng.normal(0, 3.5, size=3) * freedom
  stretch = rng.uniform(1 - 0.1 * freedom, 1 + 0.12 * freedom, size=3)
  turn = rng.normal(0, 8)
  middle = np.mean([part.centre for part in parts], axis=0)
  depth = None
  for part in parts:
    centre = middle + (np.array(part.centre) - middle) * stretch + shift
    radii = np.array(part.radii) * stretch
    # Python's floats leave the voxels in single precision.
    one = _depth(points, _Ellipsoid(tuple(centre.tolist()), tuple(radii.tolist()), part.angle + turn)) / 3
    depth = one if depth is None else np.logaddexp(depth, one)
  return 3 * depth + 1.6 * freedom * grid.field(rng, 22.0)


def _trunk(rng: np.random.Generator, grid: _Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Builds all that is not an organ of interest: skin, fat, muscle, bones, the great vein and loops of bowel.

  Args:
    rng: source of the variation.
    grid: the voxels.
    points: (3, *shape) their reference millimetres.

  Returns:
    (*shape) uint8 tissue ids, and (*shape) how deep in millimetres the voxels lie in the abdominal cavity.
  """
  x, y, z = points
  radius = np.hypot(x / _BODY[0], y / _BODY[1])
  skin = (1 - radius) * (sum(_BODY) / 2)
  wall = skin - rng.uniform(8, 18)
  cavity = wall - rng.uniform(8, 12)
  tissue = np.full(grid.shape, _AIR, np.uint8)
  tissue[skin > 0] = _FAT
  tissue[wall > 0] = _MUSCLE
  ribs = np.cos(9 * np.arctan2(y, np.abs(x)) + z / 7 + rng.uniform(0, 2 * np.pi))
  # The rib cage reaches further down at the front.
  tissue[(ribs > 0.6) & (wall > 3) & (cavity < -2) & (z > -10 - 0.4 * y)] = _BONE
  tissue[cavity > 0] = _FAT
  loops = grid.field(rng, 13.0)
  bowel = (loops > 0.25) & (cavity > 1)
  tissue[bowel] = _BOWEL
  # Gas collects in loops, and at the front: patients lie on their back.
  tissue[bowel & (loops > 0.9) & (grid.field(rng, 18.0) + y / 50 > 1.2)] = _GAS
  for part in _BACK_MUSCLES:
    tissue[(_depth(points, part) > 0) & (wall > 0)] = _MUSCLE
  spine = np.maximum.reduce([_depth(points, part) for part in _SPINE])
  cavity = np.minimum(cavity, -spine)
  vein = _organ_depth(rng, grid, points, (_VENA_CAVA,))
  tissue[(vein > -2.5) & (cavity > 0)] = _FAT
  tissue[(vein > 0) & (cavity > 0)] = _BLOOD
  tissue[spine > 0] = _BONE
  return tissue, cavity


def _scan(
  rng: np.random.Generator, grid: _Grid, points: np.ndarray, tissue: np.ndarray, depths: dict[str, np.ndarray]
) -> np.ndarray:
  """Images the tissues: each patient's own densities and texture, then the scanner's blur, shading and noise.

  Args:
    rng: source of the variation.
    grid: the voxels.
    points: (3, *shape) their reference millimetres.
    tissue: (*shape) tissue ids.
    depths: by organ, (*shape) millimetres inside it.

  Returns:
    (*shape) int16 Hounsfield units.
  """
  contrast = rng.uniform(-1.5, 1.5)  # more or less agent, earlier or later: organs brighten together
  levels = np.zeros(max(_HOUNSFIELD) + 1, np.float32)
  for tissue_id, (mean, enhancement, deviation) in _HOUNSFIELD.items():
    levels[tissue_id] = mean + enhancement * contrast + deviation * rng.normal()
  kidneys = [CLASS_NAMES.index(f"{side} kidney") for side in ("left", "right")]
  levels[kidneys[1]] = levels[kidneys[0]]
  # Fine texture; loops of bowel differ in what they hold, and bone in how dense it is.
  texture = grid.field(rng, 8.0)
  spread = np.full_like(levels, 6.0)
  spread[_BOWEL], spread[_BONE], spread[_AIR] = 12.0, 45.0, 0.0
  image = levels[tissue] + spread[tissue] * texture

  liver, stomach = CLASS_NAMES.index("liver"), CLASS_NAMES.index("stomach")
  image[(tissue == liver) & (texture > 1.4)] += 20  # vessels
  for kidney in kidneys:
    pulp = (tissue == kidney) & (depths[CLASS_NAMES[kidney]] > 8)
    image[pulp] -= 22
  inside = tissue == stomach
  image[inside & (depths["stomach"] < 5)] += 45  # the wall
  image[inside & (depths["stomach"] > 6) & (points[1] > rng.uniform(42, 60))] = levels[_GAS]  # lying on the back

  sharpness = rng.uniform(1.6, 2.4) / grid.spacing
  image = ndimage.gaussian_filter(image, sharpness, truncate=3.0)
  noise = ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), 0.45)
  image += rng.uniform(8, 14) / noise.std() * noise
  image += 6 * grid.field(rng, 90.0)
  return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def check_request(train_cases: int, test_cases: int, seed: int) -> None:
  """Raises UserError for a set that `write_msd` cannot make: a negative number, or no case at all."""
  if min(train_cases, test_cases, seed) < 0 or train_cases + test_cases == 0:
    raise UserError(
      f"phantom: train_cases={train_cases}, test_cases={test_cases}, seed={seed}: none may be negative, and there must "
      "be at least one case"
    )


def write_msd(directory: str | os.PathLike, *, train_cases: int, test_cases: int, seed: int) -> None:
  """Writes a set of cases in the layout of the Medical Segmentation Decathlon.

  `dataset.json` is written last, so that a folder without it was never completed. The Decathlon keeps its test labels
  to itself; here they lie in `labelsTs` under the names of their images. The same arguments give the same bytes.

  Args:
    directory: the folder to write into, made if need be.
    train_cases: cases 0 to train_cases - 1 go to `imagesTr` and `labelsTr`.
    test_cases: the cases after these go to `imagesTs` and `labelsTs`.
    seed: of the set.

  Raises:
    UserError: a number is negative, or there would be no case at all.
  """
  check_request(train_cases, test_cases, seed)
  directory = pathlib.Path(directory)
  for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
    (directory / folder).mkdir(parents=True, exist_ok=True)
  description = directory / "dataset.json"
  description.unlink(missing_ok=True)
  names = [f"phantom_{index:03d}.nii.gz" for index in range(train_cases + test_cases)]
  for index, name in enumerate(names):
    part = "Tr" if index < train_cases else "Ts"
    case = make_case(seed, index)
    _write(directory / f"images{part}" / name, _nifti(case.image, case.affine))
    _write(directory / f"labels{part}" / name, _nifti(case.label, case.affine))
  content = {
    "name": "Phantom",
    "description": f"Made-up CT volumes of the abdomen, seed {seed}",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {str(class_id): name for class_id, name in enumerate(CLASS_NAMES)},
    "file_ending": ".nii.gz",
    "numTraining": train_cases,
    "numTest": test_cases,
    "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names[:train_cases]],
    "test": [f"./imagesTs/{name}" for name in names[train_cases:]],
  }
  _write(description, (json.dumps(content, indent=1) + "\n").encode())


def _nifti(array: np.ndarray, affine: np.ndarray) -> bytes:
  image = nib.Nifti1Image(array, affine, dtype=array.dtype)
  image.set_sform(affine, code=1)
  image.set_qform(affine, code=1)
  image.header.set_xyzt_units("mm")
  return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)  # a time of writing would change the bytes


def _write(path: pathlib.Path, content: bytes) -> None:
  temporary = path.with_name(path.name + ".partial")
  temporary.write_bytes(content)
  temporary.replace(path)
