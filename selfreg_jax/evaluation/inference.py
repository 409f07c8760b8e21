"""Whole volumes through a network that sees slices: resize, predict in fixed batches, bring the classes back."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from selfreg_jax import mesh as meshes
from selfreg_jax.data import augment

Array = jax.Array
PredictFn = Callable[[Array], Array]


def make_apply(model: nn.Module) -> Callable[[Any, Array], Array]:
  """The jitted (variables, images (B, H, W, channels)) -> logits (B, H, W, classes) of a network in evaluation mode."""
  return jax.jit(lambda variables, images: model.apply(variables, images, train=False))


@jax.jit
def _resize(images: Array, scale: Array, tables: augment.ResizeTables) -> Array:
  size_index = jnp.zeros(images.shape[0], jnp.int32)
  return augment.resize_images(images.astype(jnp.float32) * scale, size_index, tables)


@jax.jit
def _classes(logits: Array) -> Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


class SlicePredictor:
  """Predicts volumes slice by slice with the protocol of TransUNet and of the authors.

  Each slice is resized by cubic B-splines to the network's size, the class map is brought back by nearest neighbours.
  The device sees one shape only, whatever the volumes: batches of `batch_size` slices of image_size x image_size.

  Attributes:
    image_size: pixels a side that the network sees.
    batch_size: slices of a batch, rounded up to a multiple of the mesh's devices.
  """

  def __init__(self, image_size: int, batch_size: int, mesh: Mesh):
    self.image_size = image_size
    self._mesh = mesh
    self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size

  def classes(self, predict_fn: PredictFn, slices: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
    """Class map of a volume on its own grid.

    Args:
      predict_fn: (B, image_size, image_size, channels) float32 -> (B, image_size, image_size, classes) logits.
      slices: (S, rows, columns, channels), any dtype, memory-mapped or not.
      scale: slices * scale = network input.

    Returns:
      (S, rows, columns) uint8.
    """
    native = np.empty(slices.shape[:3], np.uint8)
    rows, columns = self._nearest_back(slices.shape)
    for start, count, logits in self._logits(predict_fn, slices, scale):
      small = np.asarray(_classes(logits))[:count]
      native[start : start + count] = small[:, rows[:, None], columns[None, :]]
    return native

  def probabilities(self, predict_fn: PredictFn, slices: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
    """Softmax probabilities of a volume on its own grid; their argmax is `classes`, which see.

    Args:
      predict_fn: see `classes`.
      slices: see `classes`.
      scale: see `classes`.

    Returns:
      (S, rows, columns, classes) float32.
    """
    rows, columns = self._nearest_back(slices.shape)
    parts = []
    for _, count, logits in self._logits(predict_fn, slices, scale):
      small = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))[:count]
      parts.append(small[:, rows[:, None], columns[None, :]])
    return np.concatenate(parts)

  def _nearest_back(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(augment.nearest_indices(self.image_size, size) for size in shape[1:3])

  def _logits(self, predict_fn: PredictFn, slices: np.ndarray, scale: float) -> Iterator[tuple[int, int, Array]]:
    tables = augment.ResizeTables.build([slices.shape[1:3]], self.image_size)
    for start in range(0, len(slices), self.batch_size):
      batch = np.asarray(slices[start : start + self.batch_size])
      count = len(batch)
      batch = np.pad(batch, [(0, self.batch_size - count)] + [(0, 0)] * 3)
      images = _resize(meshes.place_batch(batch, self._mesh), scale, tables)
      yield start, count, predict_fn(images)
