"""Made-up prepared datasets and volumes: smooth shapes and noise, in the sizes of real scans and images."""

import os
import pathlib

import numpy as np

from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, Intensity, Manifest

CLASSES = ("background", *(f"organ {number}" for number in range(1, 9)))
_LEVELS = {"uint8": 255, "uint16": 65535}


def slices(count: int, shape: tuple[int, int], channels: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Slices as `prepare` stores them, and their class maps.

  Args:
    count: slices.
    shape: (rows, columns).
    channels: of the images.
    dtype: "uint8" or "uint16".
    seed: of the shapes and the noise.

  Returns:
    images (count, rows, columns, channels) of `dtype`, and labels (count, rows, columns) uint8.
  """
  rng = np.random.default_rng(seed)
  rows, columns = (np.linspace(-1, 1, size, dtype=np.float32) for size in shape)
  label = np.zeros((count, *shape), np.uint8)
  along = np.linspace(-1, 1, count, dtype=np.float32)[:, None, None]
  for class_id in range(1, len(CLASSES)):
    center, radius = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.1, 0.35, 3)
    axes = (along, rows[:, None], columns[None, :])
    distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, center, radius, strict=True))
    label[distance < 1] = class_id
  body = (rows[:, None] ** 2 / 0.7 + columns[None, :] ** 2 < 0.9).astype(np.float32)
  noise = rng.normal(0, 0.05, (count, *shape, channels)).astype(np.float32)
  image = np.clip((0.3 * body + label / 16)[..., None] + noise * body[..., None], 0, 1)
  return np.rint(image * _LEVELS[dtype]).astype(dtype), label


def write_dataset(
  directory: str | os.PathLike, *, cases: int, count: int, shape: tuple[int, int], channels: int = 1
) -> Manifest:
  """Writes a prepared dataset; its last case is for validation, the others are for training.

  Args:
    directory: a folder that exists.
    cases: how many.
    count: slices of each.
    shape: (rows, columns) of the slices.
    channels: 1 (stored as a CT's uint16) or 3 (stored as uint8).

  Returns:
    Its manifest.
  """
  directory = pathlib.Path(directory)
  (directory / "cases").mkdir()
  dtype = "uint16" if channels == 1 else "uint8"
  made = {}
  for number in range(cases):
    name = f"{number:03d}"
    image, label = slices(count, shape, channels, dtype, number)
    files = {kind: f"cases/{name}.{kind}.npy" for kind in ("image", "label")}
    for kind, array in (("image", image), ("label", label)):
      np.save(directory / files[kind], array)
    made[name] = Case(
      id=name,
      **files,
      shape=image.shape,
      spacing=(1.0, 1.0, 1.0),
      axcodes=None,
      affine=None,
      file_shape=(*shape, count),
      header=None,
      group=name,
      sources={"image": "", "label": ""},
      checksums={kind: manifests.checksum(directory / file) for kind, file in files.items()},
      class_voxels=tuple(np.bincount(label.reshape(-1), minlength=len(CLASSES)).tolist()),
      foreground_slices=tuple(np.flatnonzero(label.any(axis=(1, 2))).tolist()),
    )
  names = tuple(made)
  manifest = Manifest(
    dataset="phantom",
    kind="volume",
    unit="voxel",
    classes=CLASSES,
    channels=channels,
    intensity=Intensity("window", -125.0, 275.0) if channels == 1 else Intensity("byte"),
    dtype=dtype,
    scale=1 / _LEVELS[dtype],
    orientation="stored",
    axis=2,
    splits={"train": names[:-1], "val": names[-1:], "test": ()},
    folds=(),
    cases=made,
    source="",
  )
  manifests.save(manifest, directory)
  return manifest
