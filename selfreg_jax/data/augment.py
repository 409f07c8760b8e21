"""Augmentation and resize in jit, on the device: the recipe of TransUNet and of the authors, for mixed native sizes.

A batch holds slices padded to the dataset's largest size. The cubic resize is linear and separable, so it is two matrix
products with a table of matrices, one pair per native size, whose entries in the padding are zero. Quarter turns and
flips commute with the resize to a square and therefore come after it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import ndimage

Array = jax.Array


@functools.lru_cache
def spline_matrix(size: int, resized: int) -> np.ndarray:
  """The matrix of `scipy.ndimage.zoom(order=3)` along one axis: its columns are the zooms of the unit vectors.

  Built with mode="mirror", which differs from scipy's default only where rounding puts the last sample outside the
  input and the default then writes a zero.

  Args:
    size: samples of the input.
    resized: samples of the output.

  Returns:
    (resized, size) float64.
  """
  zoomed = [ndimage.zoom(unit, resized / size, order=3, mode="mirror") for unit in np.eye(size)]
  return np.stack(zoomed, axis=1)


@functools.lru_cache
def nearest_indices(size: int, resized: int) -> np.ndarray:
  """The input index that `scipy.ndimage.zoom(order=0)` takes for each output sample; the edge is repeated.

  Args:
    size: samples of the input.
    resized: samples of the output.

  Returns:
    (resized,) int32.
  """
  return ndimage.zoom(np.arange(size, dtype=np.int32), resized / size, order=0, mode="nearest")


@struct.dataclass
class ResizeTables:
  """What the resize of every native size of a dataset needs, indexed by the place of the size in the dataset's list.

  Attributes:
    rows: (sizes, image_size, max_rows) float32, left factors of the cubic resize.
    columns: (sizes, image_size, max_columns) float32, right factors.
    nearest_rows: (sizes, image_size) int32, rows that the nearest resize of labels takes.
    nearest_columns: (sizes, image_size) int32, likewise.
    shapes: (sizes, 2) int32 native (rows, columns).
  """

  rows: Array
  columns: Array
  nearest_rows: Array
  nearest_columns: Array
  shapes: Array

  @classmethod
  def build(cls, shapes: Sequence[tuple[int, int]], image_size: int) -> "ResizeTables":
    """Tables for native (rows, columns) sizes, to be resized to (image_size, image_size)."""

    def padded(size: int, largest: int) -> np.ndarray:
      return np.pad(spline_matrix(size, image_size), [(0, 0), (0, largest - size)])

    max_rows, max_columns = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    return cls(
      rows=np.stack([padded(rows, max_rows) for rows, _ in shapes]).astype(np.float32),
      columns=np.stack([padded(columns, max_columns) for _, columns in shapes]).astype(np.float32),
      nearest_rows=np.stack([nearest_indices(rows, image_size) for rows, _ in shapes]),
      nearest_columns=np.stack([nearest_indices(columns, image_size) for _, columns in shapes]),
      shapes=np.asarray(shapes, np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Probabilities and ranges of the recipe.

  Attributes:
    turn_flip_probability: of a turn by k * 90 degrees, k in 0..3, followed by a flip along a random axis.
    rotate_probability: of a rotation by a small angle, among the slices that were not turned.
    max_angle: the angle is a whole number of degrees in [-max_angle, max_angle).
  """

  turn_flip_probability: float = 0.5
  rotate_probability: float = 0.5
  max_angle: int = 20


@struct.dataclass
class Draws:
  """What was drawn for each slice of a batch; all (B,).

  Attributes:
    angle: degrees; 0 for slices that are not rotated.
    quarter_turns: k of numpy.rot90.
    flip_rows: whether axis 0 is flipped after the turn.
    flip_columns: whether axis 1 is.
  """

  angle: Array
  quarter_turns: Array
  flip_rows: Array
  flip_columns: Array


def draw(keys: Array, augmentation: Augmentation) -> Draws:
  """Draws the recipe's choices, for each slice from its own key.

  Args:
    keys: (B,) PRNG keys.
    augmentation: probabilities and ranges.

  Returns:
    The choices.
  """

  def draw_one(key: Array) -> Draws:
    turn_key, rotate_key, k_key, axis_key, angle_key = jax.random.split(key, 5)
    turned = jax.random.bernoulli(turn_key, augmentation.turn_flip_probability)
    rotated = ~turned & jax.random.bernoulli(rotate_key, augmentation.rotate_probability)
    axis = jax.random.randint(axis_key, (), 0, 2)
    largest = max(augmentation.max_angle, 1)  # an empty range is no range; with max_angle 0 nothing is rotated
    angle = jax.random.randint(angle_key, (), -largest, largest)
    return Draws(
      angle=jnp.where(rotated & (augmentation.max_angle > 0), angle, 0),
      quarter_turns=jnp.where(turned, jax.random.randint(k_key, (), 0, 4), 0),
      flip_rows=turned & (axis == 0),
      flip_columns=turned & (axis == 1),
    )

  return jax.vmap(draw_one)(keys)


def rotate(image: Array, angle: Array, shape: Array) -> Array:
  """`scipy.ndimage.rotate(order=0, reshape=False)` of one padded slice: nearest neighbour, zeros from outside.

  Coordinates are float32 (scipy's are double), which puts about 3 of 10,000 pixels, those on the edge between two
  source pixels, on the other side.

  Args:
    image: (H, W, ...) slice, padded after its native rows and columns.
    angle: scalar, whole degrees counter-clockwise in (row, column).
    shape: (2,) native (rows, columns).

  Returns:
    (H, W, ...), meaningful in the native part.
  """
  height, width = image.shape[:2]
  return _look_up(image, jnp.arange(height)[:, None], jnp.arange(width)[None, :], angle, shape)


def _look_up(image: Array, rows: Array, columns: Array, angle: Array, shape: Array) -> Array:
  """What a rotated slice (see `rotate`) holds at places, (n, m, ...): rows and columns are broadcast to (n, m)."""
  # Sines of whole degrees come from double precision; a right angle of zero moves no pixel at all.
  radians = np.deg2rad(np.arange(-180, 181))
  cosine = jnp.asarray(np.cos(radians), jnp.float32)[angle + 180]
  sine = jnp.asarray(np.sin(radians), jnp.float32)[angle + 180]
  center = (shape.astype(jnp.float32) - 1) / 2
  rows = rows.astype(jnp.float32) - center[0]
  columns = columns.astype(jnp.float32) - center[1]
  source_rows = center[0] + cosine * rows + sine * columns
  source_columns = center[1] - sine * rows + cosine * columns
  inside = (source_rows >= 0) & (source_rows <= shape[0] - 1) & (source_columns >= 0) & (source_columns <= shape[1] - 1)
  # Clamped before the cast: an index outside would be undefined, and is masked anyway.
  height, width = image.shape[:2]
  index_rows = jnp.clip(jnp.floor(source_rows + 0.5), 0, height - 1).astype(jnp.int32)
  index_columns = jnp.clip(jnp.floor(source_columns + 0.5), 0, width - 1).astype(jnp.int32)
  taken = image[index_rows, index_columns]
  return jnp.where(inside.reshape(inside.shape + (1,) * (image.ndim - 2)), taken, jnp.zeros((), image.dtype))


def resize_images(images: Array, size_index: Array, tables: ResizeTables) -> Array:
  """Cubic B-spline resize of padded slices, as `scipy.ndimage.zoom(order=3)`.

  Args:
    images: (B, max_rows, max_columns, channels) float.
    size_index: (B,) place of each slice's native size in the tables.
    tables: for the sizes of the dataset.

  Returns:
    (B, image_size, image_size, channels).
  """
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # TF32 would cost three digits
  batch, height, width, channels = images.shape
  size = tables.rows.shape[1]
  # Products of a matrix for each slice: with one for all of them, einsum's forms take twice the time on a CPU.
  resized = product(jnp.asarray(tables.rows)[size_index], images.reshape(batch, height, width * channels))
  resized = jnp.moveaxis(resized.reshape(batch, size, width, channels), 3, 1)
  columns = jnp.swapaxes(jnp.asarray(tables.columns), 1, 2)[size_index]  # (B, max_columns, image_size)
  return jnp.moveaxis(product(resized, columns[:, None]), 1, 3)


def resize_labels(labels: Array, size_index: Array, tables: ResizeTables) -> Array:
  """Nearest resize of padded label slices, as `scipy.ndimage.zoom(order=0)` with the edge repeated.

  Args:
    labels: (B, max_rows, max_columns) integer.
    size_index: (B,) place of each slice's native size in the tables.
    tables: for the sizes of the dataset.

  Returns:
    (B, image_size, image_size).
  """
  rows = jnp.asarray(tables.nearest_rows)[size_index]
  columns = jnp.asarray(tables.nearest_columns)[size_index]
  return jax.vmap(lambda label, r, c: label[r[:, None], c[None, :]])(labels, rows, columns)


def augment_labels(labels: Array, draws: Draws, size_index: Array, tables: ResizeTables) -> Array:
  """Rotation, nearest resize, turns and flips of padded label slices, each output pixel being looked up once.

  The same as one after another: nearest neighbours only choose pixels. Done so, a rotated native slice would hold many
  times the pixels that the resize then takes, and XLA, which fuses look-ups into the choices of the turns, would
  compute each of them once for every choice.

  Args:
    labels: (B, max_rows, max_columns) integer.
    draws: choices for each slice.
    size_index: (B,) place of each slice's native size in the tables.
    tables: for the sizes of the dataset.

  Returns:
    (B, image_size, image_size).
  """
  nearest_rows, nearest_columns, shapes = (
    jnp.asarray(table)[size_index] for table in (tables.nearest_rows, tables.nearest_columns, tables.shapes)
  )
  size = nearest_rows.shape[1]
  places = jnp.broadcast_to(jnp.arange(size * size).reshape(size, size), (len(labels), size, size))
  places = turn_and_flip(places, draws)

  def look_up(label: Array, place: Array, rows: Array, columns: Array, angle: Array, shape: Array) -> Array:
    return _look_up(label, rows[place // size], columns[place % size], angle, shape)

  return jax.vmap(look_up)(labels, places, nearest_rows, nearest_columns, draws.angle, shapes)


def turn_and_flip(x: Array, draws: Draws) -> Array:
  """`numpy.rot90` (counter-clockwise) by each slice's quarter turns, then its flips, on square slices.

  Any such move is at most one transposition, one flip of rows and one flip of columns.

  Args:
    x: (B, S, S, ...).
    draws: choices for each slice.

  Returns:
    (B, S, S, ...).
  """

  def where(condition: Array, yes: Array, no: Array) -> Array:
    return jnp.where(condition.reshape((-1,) + (1,) * (x.ndim - 1)), yes, no)

  k = draws.quarter_turns
  x = where(k % 2 == 1, x.swapaxes(1, 2), x)
  x = where(((k == 1) | (k == 2)) ^ draws.flip_rows, x[:, ::-1], x)
  return where(((k == 2) | (k == 3)) ^ draws.flip_columns, x[:, :, ::-1], x)


def augment(
  keys: Array,
  images: Array,
  labels: Array,
  size_index: Array,
  tables: ResizeTables,
  *,
  scale: float,
  augmentation: Augmentation | None,
) -> tuple[Array, Array]:
  """Turns stored slices into what the network trains on.

  Args:
    keys: (B,) PRNG keys, one a slice.
    images: (B, max_rows, max_columns, channels) stored values, padded.
    labels: (B, max_rows, max_columns) uint8, padded.
    size_index: (B,) place of each slice's native size in the tables.
    tables: for the sizes of the dataset.
    scale: stored value * scale = network input.
    augmentation: the recipe, or None to resize only.

  Returns:
    images (B, image_size, image_size, channels) float32 and labels (B, image_size, image_size) int32.
  """
  size_index = jnp.asarray(size_index)
  if augmentation is None:
    images = resize_images(images.astype(jnp.float32) * scale, size_index, tables)
    return images, resize_labels(labels, size_index, tables).astype(jnp.int32)
  draws = draw(keys, augmentation)
  images = jax.vmap(rotate)(images, draws.angle, jnp.asarray(tables.shapes)[size_index])
  images = turn_and_flip(resize_images(images.astype(jnp.float32) * scale, size_index, tables), draws)
  return images, augment_labels(labels, draws, size_index, tables).astype(jnp.int32)
