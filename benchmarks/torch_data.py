"""The usual input pipeline of this family of networks, for these comparisons: slices as .npz, scipy, DataLoader."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch.utils import data


class Slices(data.Dataset):
  """Slices in one .npz file each, with "image" (rows, columns[, channels]) in [0, 1] and "label" (rows, columns).

  Args:
    files: one a slice.
    size: pixels a side that they are resized to.
  """

  def __init__(self, files: Sequence[str | os.PathLike], size: int):
    self.files = list(files)
    self.size = size

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
    with np.load(self.files[index]) as arrays:
      image, label = arrays["image"], arrays["label"]
    rng = np.random.default_rng()
    if rng.random() < 0.5:
      image, label = turn(image, label, quarter_turns=rng.integers(4), axis=rng.integers(2))
    elif rng.random() < 0.5:
      image, label = rotate(image, label, angle=rng.integers(-20, 20))
    image, label = resize(image, label, self.size)
    return {"image": torch.from_numpy(image.astype(np.float32)), "label": torch.from_numpy(label.astype(np.int64))}


def turn(image: np.ndarray, label: np.ndarray, *, quarter_turns: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """A turn by quarter_turns * 90 degrees, then a flip along an axis."""
  return tuple(np.flip(np.rot90(array, quarter_turns), axis) for array in (image, label))


def rotate(image: np.ndarray, label: np.ndarray, *, angle: int) -> tuple[np.ndarray, np.ndarray]:
  """A rotation by degrees with nearest neighbours; the shape stays."""
  return tuple(ndimage.rotate(array, angle, order=0, reshape=False) for array in (image, label))


def resize(image: np.ndarray, label: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """To (size, size[, channels]): cubic splines for the image, nearest neighbours for the label."""
  factors = tuple(size / side for side in label.shape)
  if image.ndim == 3:
    channels = [ndimage.zoom(image[..., channel], factors, order=3) for channel in range(image.shape[2])]
    return np.stack(channels, axis=-1), ndimage.zoom(label, factors, order=0)
  return ndimage.zoom(image, factors, order=3), ndimage.zoom(label, factors, order=0)


def loader(files: Sequence[str | os.PathLike], *, size: int, batch_size: int, workers: int) -> data.DataLoader:
  """Shuffled batches, made by worker processes that live as long as the loader."""
  return data.DataLoader(
    Slices(files, size),
    batch_size=batch_size,
    shuffle=True,
    num_workers=workers,
    persistent_workers=True,
    multiprocessing_context="spawn",  # forked copies of a process in which JAX's threads run could hang
  )
