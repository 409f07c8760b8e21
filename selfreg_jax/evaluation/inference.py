"""Whole volumes through a network that sees slices: resize, predict in fixed batches, bring the classes back."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import ndimage

from selfreg_jax import mesh as meshes
from selfreg_jax.data import augment
from selfreg_jax.evaluation.options import RESIZES

Array = jax.Array
PredictFn = Callable[[Array], Array]
Finish = Callable[[Array], tuple[Array, ...]]


def make_apply(model: nn.Module) -> Callable[[Any, Array], Array]:
  """The jitted (variables, images (B, H, W, channels)) -> logits (B, H, W, classes) of a network in evaluation mode."""
  return meshes.jit(lambda variables, images: model.apply(variables, images, train=False))


def average_mirrored(predict_fn: PredictFn) -> PredictFn:
  """Test-time augmentation: softmax averaged over the four mirrorings of rows and columns.

  Args:
    predict_fn: (B, H, W, channels) -> (B, H, W, classes) logits.

  Returns:
    A function like it; its logits are the logarithm of the averaged probabilities.
  """

  def averaged(images: Array) -> Array:
    total = 0
    for axes in ((), (1,), (2,), (1, 2)):
      total += jnp.flip(_probabilities(predict_fn(jnp.flip(images, axes))), axes)
    return _log(total / 4)

  return averaged


def average_ensemble(predict_fns: Sequence[PredictFn]) -> PredictFn:
  """Several networks as one: softmax averaged over them.

  Args:
    predict_fns: each (B, H, W, channels) -> (B, H, W, classes) logits, for images of one size.

  Returns:
    A function like them; its logits are the logarithm of the averaged probabilities.
  """

  def averaged(images: Array) -> Array:
    total = sum(_probabilities(predict_fn(images)) for predict_fn in predict_fns)
    return _log(total / len(predict_fns))

  return averaged


def _log(probabilities: Array) -> Array:
  return jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny))


@functools.lru_cache
def linear_matrix(size: int, resized: int) -> np.ndarray:
  """The matrix of `scipy.ndimage.zoom(order=1)` along one axis: its columns are the zooms of the unit vectors.

  Args:
    size: samples of the input.
    resized: samples of the output.

  Returns:
    (resized, size) float64; rows sum to 1, the edge being repeated.
  """
  zoomed = [ndimage.zoom(unit, resized / size, order=1, mode="nearest") for unit in np.eye(size)]
  return np.stack(zoomed, axis=1)


@meshes.jit
def _resize(images: Array, scale: Array, tables: augment.ResizeTables) -> Array:
  size_index = jnp.zeros(images.shape[0], jnp.int32)
  return augment.resize_images(images.astype(jnp.float32) * scale, size_index, tables)


@meshes.jit
def _enlarge(logits: Array, rows: Array, columns: Array) -> Array:
  """Logits (B, n, n, classes) on the native grid, (B, rows, columns, classes)."""
  highest = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("ih,bhwc->biwc", rows, logits.astype(jnp.float32), precision=highest)
  return jnp.einsum("jw,biwc->bijc", columns, logits, precision=highest)


@meshes.jit
def _classes(logits: Array) -> Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


@meshes.jit
def _probabilities(logits: Array) -> Array:
  return jax.nn.softmax(logits.astype(jnp.float32))


class SlicePredictor:
  """Predicts volumes slice by slice with the protocol of TransUNet and of the authors.

  Each slice is resized by cubic B-splines to the network's size, the class map is brought back by nearest neighbours.
  The network sees one shape only, whatever the volumes: batches of `batch_size` slices of image_size x image_size. An
  image, a case of one slice, goes alone: a batch of it would be computed for its padding. Only the resize, which is two
  matrix products, is compiled for each native size.

  Attributes:
    image_size: pixels a side that the network sees.
    batch_size: slices of a batch, rounded up to a multiple of the mesh's devices.
    resize: what is brought back to the native grid: "labels" (nearest neighbours, the protocol) or "logits" (linear
      interpolation, the classes being decided on the native grid).
  """

  def __init__(self, image_size: int, batch_size: int, mesh: Mesh, *, resize: str = "labels"):
    if resize not in RESIZES:
      raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
    self.image_size = image_size
    self.resize = resize
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
    enlarge, to_native = self._ways_back(slices.shape[1:3])
    native = np.empty(slices.shape[:3], np.uint8)
    for part, (classes,) in self._predict(predict_fn, slices, scale, lambda logits: (_classes(enlarge(logits)),)):
      native[part] = to_native(classes)
    return native

  def classes_of_both_sizes(
    self, predict_fn: PredictFn, slices: np.ndarray, *, scale: float = 1.0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Class map of a volume on its own grid, and as the network gives it; see `classes`.

    Args:
      predict_fn: see `classes`.
      slices: see `classes`.
      scale: see `classes`.

    Returns:
      (S, rows, columns) and (S, image_size, image_size), uint8.
    """
    enlarge, to_native = self._ways_back(slices.shape[1:3])
    native = np.empty(slices.shape[:3], np.uint8)
    small = np.empty((len(slices), self.image_size, self.image_size), np.uint8)

    def finish(logits: Array) -> tuple[Array, Array]:
      return _classes(enlarge(logits)), _classes(logits)

    for part, (classes, network_classes) in self._predict(predict_fn, slices, scale, finish):
      native[part], small[part] = to_native(classes), network_classes
    return native, small

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
    enlarge, to_native = self._ways_back(slices.shape[1:3])
    native = np.empty(slices.shape[:3], np.uint8)
    by_class = None

    def finish(logits: Array) -> tuple[Array, Array]:
      logits = enlarge(logits)
      return _classes(logits), _probabilities(logits)

    for part, (classes, probabilities) in self._predict(predict_fn, slices, scale, finish):
      if by_class is None:
        by_class = np.empty((*slices.shape[:3], probabilities.shape[-1]), np.float32)
      native[part], by_class[part] = to_native(classes), to_native(probabilities)
    return native, by_class

  def _ways_back(self, shape: tuple[int, int]) -> tuple[Callable[[Array], Array], Callable[[np.ndarray], np.ndarray]]:
    """From the network's grid to the native one: what is done to logits on the device, and to results on the host."""
    if self.resize == "logits":
      tables = [linear_matrix(self.image_size, size).astype(np.float32) for size in shape]
      tables = jax.device_put(tables, meshes.replicated(self._mesh))
      return lambda logits: _enlarge(logits, *tables), lambda array: array
    rows, columns = (augment.nearest_indices(self.image_size, size) for size in shape)
    return lambda logits: logits, lambda array: array[:, rows[:, None], columns[None, :]]

  def _predict(
    self, predict_fn: PredictFn, slices: np.ndarray, scale: float, finish: Finish
  ) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Parts of the volume with what `finish` makes of their logits.

    The next batch is on its way to the device before the results of the last one are fetched.
    """
    tables = augment.ResizeTables.build([slices.shape[1:3]], self.image_size)
    tables = jax.device_put(tables, meshes.replicated(self._mesh))

    def fetch(part: slice, results: tuple[Array, ...]) -> tuple[slice, tuple[np.ndarray, ...]]:
      return part, tuple(np.asarray(array)[: part.stop - part.start] for array in results)

    pending = None
    batch_size = self.batch_size if len(slices) > 1 else self._mesh.size
    for start in range(0, len(slices), batch_size):
      batch = np.asarray(slices[start : start + batch_size])
      part = slice(start, start + len(batch))
      batch = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * 3)
      images = _resize(meshes.place_batch(batch, self._mesh), scale, tables)
      results = finish(predict_fn(images))
      if pending is not None:
        yield fetch(*pending)
      pending = (part, results)
    if pending is not None:
      yield fetch(*pending)
