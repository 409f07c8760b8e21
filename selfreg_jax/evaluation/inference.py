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
def _classes(logits: Array) -> tuple[Array]:
  return (jnp.argmax(logits, axis=-1).astype(jnp.uint8),)


@jax.jit
def _classes_and_probabilities(logits: Array) -> tuple[Array, Array]:
  return *_classes(logits), jax.nn.softmax(logits.astype(jnp.float32))


class SlicePredictor:
  """Predicts volumes slice by slice with the protocol of TransUNet and of the authors.

  Each slice is resized by cubic B-splines to the network's size, the class map is brought back by nearest neighbours.
  The network sees one shape only, whatever the volumes: batches of `batch_size` slices of image_size x image_size. Only
  the resize, which is two matrix products, is compiled for each native size.

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
    for part, (classes,) in self._predict(predict_fn, slices, scale, _classes):
      native[part] = classes
    return native

  def probabilities(
    self, predict_fn: PredictFn, slices: np.ndarray, *, scale: float = 1.0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Class map and softmax probabilities of a volume on its own grid; see `classes`.

    Args:
      predict_fn: see `classes`.
      slices: see `classes`.
      scale: see `classes`.

    Returns:
      (S, rows, columns) uint8 classes, and (S, rows, columns, classes) float32 probabilities, whose argmax they are.
    """
    native = np.empty(slices.shape[:3], np.uint8)
    by_class = None
    for part, (classes, probabilities) in self._predict(predict_fn, slices, scale, _classes_and_probabilities):
      if by_class is None:
        by_class = np.empty((*slices.shape[:3], probabilities.shape[-1]), np.float32)
      native[part], by_class[part] = classes, probabilities
    return native, by_class

  def _predict(
    self, predict_fn: PredictFn, slices: np.ndarray, scale: float, finish: Callable[[Array], tuple[Array, ...]]
  ) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Parts of the volume with what `finish` makes of their logits, on the volume's own grid.

    The next batch is on its way to the device before the results of the last one are fetched.
    """
    shape = slices.shape[1:3]
    tables = jax.device_put(augment.ResizeTables.build([shape], self.image_size), meshes.replicated(self._mesh))
    rows, columns = (augment.nearest_indices(self.image_size, size) for size in shape)

    def fetch(part: slice, results: tuple[Array, ...]) -> tuple[slice, tuple[np.ndarray, ...]]:
      count = part.stop - part.start
      return part, tuple(np.asarray(array)[:count][:, rows[:, None], columns[None, :]] for array in results)

    pending = None
    for start in range(0, len(slices), self.batch_size):
      batch = np.asarray(slices[start : start + self.batch_size])
      part = slice(start, start + len(batch))
      batch = np.pad(batch, [(0, self.batch_size - len(batch))] + [(0, 0)] * 3)
      images = _resize(meshes.place_batch(batch, self._mesh), scale, tables)
      results = finish(predict_fn(images))
      if pending is not None:
        yield fetch(*pending)
      pending = (part, results)
    if pending is not None:
      yield fetch(*pending)
