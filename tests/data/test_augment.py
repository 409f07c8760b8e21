import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from selfreg_jax.data import augment


def tables_for(*shapes, size):
  return augment.ResizeTables.build(list(shapes), size)


def resized(image, label, size):
  """One slice through both resizes, in a batch of one."""
  tables = tables_for(image.shape, size=size)
  index = jnp.zeros(1, jnp.int32)
  images = augment.resize_images(jnp.asarray(image, jnp.float32)[None, ..., None], index, tables)
  labels = augment.resize_labels(jnp.asarray(label)[None], index, tables)
  return np.asarray(images)[0, ..., 0], np.asarray(labels)[0]


@pytest.mark.parametrize("size", [224, 96])
def test_resize_equals_the_authors(golden, size):
  arrays = golden("augment")
  image, label = resized(arrays["image"], arrays["label"], size)
  np.testing.assert_allclose(image, arrays[f"zoom{size}_image_order3"], atol=1e-5)
  np.testing.assert_array_equal(label, arrays[f"zoom{size}_label_order0"])


@pytest.mark.parametrize(("k", "axis"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_turns_and_flips_equal_the_authors(golden, k, axis):
  arrays = golden("augment")
  expected = arrays[f"rotflip_k{k}_axis{axis}"]
  # On a square canvas whose content touches the corner that is turned to, the turned slice is found at its edge.
  side = 170
  canvas = np.zeros((1, side, side), np.float32)
  canvas[0, : arrays["image"].shape[0], : arrays["image"].shape[1]] = arrays["image"]
  draws = augment.Draws(
    angle=jnp.zeros(1, jnp.int32),
    quarter_turns=jnp.array([k]),
    flip_rows=jnp.array([axis == 0]),
    flip_columns=jnp.array([axis == 1]),
  )
  turned = np.asarray(augment.turn_and_flip(jnp.asarray(canvas), draws))[0]
  rows, columns = expected.shape
  found = [turned[r : r + rows, c : c + columns] for r in {0, side - rows} for c in {0, side - columns}]
  assert any(np.array_equal(part, expected) for part in found)


def test_every_turn_and_flip_is_numpys():
  canvases = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype(np.float32)
  moves = [(k, axis) for k in range(4) for axis in range(2)]
  draws = augment.Draws(
    angle=jnp.zeros(8, jnp.int32),
    quarter_turns=jnp.array([k for k, _ in moves]),
    flip_rows=jnp.array([axis == 0 for _, axis in moves]),
    flip_columns=jnp.array([axis == 1 for _, axis in moves]),
  )
  turned = augment.turn_and_flip(jnp.asarray(canvases), draws)
  for result, canvas, (k, axis) in zip(turned, canvases, moves, strict=True):
    np.testing.assert_array_equal(result, np.flip(np.rot90(canvas, k), axis))


@pytest.mark.parametrize("angle", [-20, -13, 7, 19])
def test_rotations_equal_the_authors_but_for_ties(golden, angle):
  arrays = golden("augment")
  for name in ("image", "label"):
    padded = np.pad(arrays[name], [(0, 22), (0, 30)], constant_values=99)  # padding must never be looked at
    shape = jnp.asarray(arrays[name].shape)
    rotated = np.asarray(augment.rotate(jnp.asarray(padded), jnp.asarray(angle), shape))
    rotated = rotated[: arrays[name].shape[0], : arrays[name].shape[1]]
    assert np.mean(rotated != arrays[f"rotate_{angle}_{name}"]) <= 1e-3


def test_no_rotation_changes_nothing(golden):
  image = golden("augment")["image"]
  np.testing.assert_array_equal(augment.rotate(jnp.asarray(image), jnp.asarray(0), jnp.asarray(image.shape)), image)


@pytest.mark.parametrize(("size", "lost"), [(170, False), (75, False), (300, False), (512, True)])
def test_matrices_equal_scipy_everywhere_but_on_the_line_it_loses(size, lost):
  image = np.random.default_rng(0).standard_normal((size, 3))
  expected = ndimage.zoom(image[:, 0], 224 / size, order=3)
  ours = augment.spline_matrix(size, 224) @ image[:, 0]
  assert (expected[-1] == 0) == lost
  np.testing.assert_allclose(ours[:-1], expected[:-1], atol=1e-12)
  np.testing.assert_allclose(ours[-1], image[-1, 0], atol=1e-12)  # the last sample is the input's last


def test_nearest_indices_equal_scipy_everywhere_but_on_the_line_it_loses():
  lost = 0
  for size in range(60, 800, 7):
    values = np.arange(1, 225)
    expected = ndimage.zoom(values, size / 224, order=0)
    ours = values[augment.nearest_indices(224, size)]
    kept = expected != 0
    lost += size - kept.sum()
    np.testing.assert_array_equal(ours[kept], expected[kept])
    assert ours[-1] == 224
  assert lost > 0


def test_mixed_sizes_in_one_batch_equal_each_slice_alone():
  rng = np.random.default_rng(0)
  shapes = [(30, 41), (52, 37), (52, 60)]
  tables = tables_for(*shapes, size=48)
  images = np.full((3, 52, 60, 2), 7.0, np.float32)  # padding that is not zero must not leak either
  labels = np.full((3, 52, 60), 9, np.uint8)
  for i, (rows, columns) in enumerate(shapes):
    images[i, :rows, :columns] = rng.standard_normal((rows, columns, 2))
    labels[i, :rows, :columns] = rng.integers(0, 4, (rows, columns))
  order = jnp.array([2, 0, 1])
  images_out = augment.resize_images(jnp.asarray(images)[order], order, tables)
  labels_out = augment.resize_labels(jnp.asarray(labels)[order], order, tables)
  for place, i in enumerate([2, 0, 1]):
    rows, columns = shapes[i]
    for channel in range(2):
      image, label = resized(images[i, :rows, :columns, channel], labels[i, :rows, :columns], 48)
      np.testing.assert_allclose(images_out[place, ..., channel], image, atol=1e-6)
    np.testing.assert_array_equal(labels_out[place], label)


def test_draws_follow_the_recipe():
  count = 20_000
  draws = augment.draw(jax.random.split(jax.random.key(0), count), augment.Augmentation())
  flipped = np.asarray(draws.flip_rows | draws.flip_columns)
  rotated = np.asarray(draws.angle) != 0
  assert abs(flipped.mean() - 0.5) < 0.02
  assert abs(rotated.mean() - 0.25 * 39 / 40) < 0.02  # one of the forty angles is zero
  assert not np.any(flipped & rotated)
  assert not np.any(np.asarray(draws.flip_rows) & np.asarray(draws.flip_columns))
  angles = np.unique(np.asarray(draws.angle))
  np.testing.assert_array_equal(angles, np.arange(-20, 20))
  turns = np.bincount(np.asarray(draws.quarter_turns)[flipped], minlength=4) / flipped.sum()
  np.testing.assert_allclose(turns, 0.25, atol=0.02)


def test_image_and_label_move_together():
  label = np.zeros((4, 40, 40), np.uint8)
  label[:, 5:18, 8:30] = 1
  keys = jax.random.split(jax.random.key(3), 4)
  images, labels = augment.augment(
    keys,
    jnp.asarray(label[..., None] * 100, jnp.uint16),
    jnp.asarray(label),
    jnp.zeros(4, jnp.int32),
    tables_for((40, 40), size=40),
    scale=0.01,
    augmentation=augment.Augmentation(),
  )
  assert images.shape == (4, 40, 40, 1)
  np.testing.assert_allclose(images[..., 0], labels, atol=1e-4)  # equal sizes: the resize is the identity
  assert any(not np.array_equal(moved, label[0]) for moved in np.asarray(labels))


def test_without_a_recipe_slices_are_only_resized():
  image = np.random.default_rng(0).integers(0, 65535, (1, 20, 30, 1)).astype(np.uint16)
  images, _ = augment.augment(
    jax.random.split(jax.random.key(0), 1),
    jnp.asarray(image),
    jnp.zeros((1, 20, 30), jnp.uint8),
    jnp.zeros(1, jnp.int32),
    tables_for((20, 30), size=32),
    scale=1 / 65535,
    augmentation=None,
  )
  expected = ndimage.zoom(image[0, ..., 0] / 65535, (32 / 20, 32 / 30), order=3)
  np.testing.assert_allclose(images[0, ..., 0], expected, atol=1e-5)


def test_channels_are_augmented_alike_and_each_on_its_own():
  rng = np.random.default_rng(3)
  colours = rng.integers(0, 256, (16, 21, 26, 3), np.uint8)
  labels = rng.integers(0, 2, (16, 21, 26), np.uint8)
  keys, index = jax.random.split(jax.random.key(1), 16), np.zeros(16, np.int32)
  tables = tables_for((21, 26), size=24)

  def run(images):
    return np.asarray(
      augment.augment(keys, images, labels, index, tables, scale=1 / 255, augmentation=augment.Augmentation())[0]
    )

  together = run(colours)
  assert together.shape == (16, 24, 24, 3)
  for channel in range(3):
    np.testing.assert_allclose(together[..., channel], run(colours[..., channel : channel + 1])[..., 0], atol=1e-6)


def test_labels_moved_at_once_equal_labels_moved_step_by_step():
  rng = np.random.default_rng(5)
  shapes = [(40, 52), (47, 33)]
  tables, index = tables_for(*shapes, size=24), np.arange(16, dtype=np.int32) % 2
  labels = rng.integers(0, 200, (16, 47, 52)).astype(np.uint8)
  draws = augment.draw(jax.random.split(jax.random.key(2), 16), augment.Augmentation(turn_flip_probability=0.7))
  draws = draws.replace(angle=jnp.asarray(rng.integers(-20, 20, 16)))  # turned and rotated, which the recipe never does
  rotated = jax.vmap(augment.rotate)(labels, draws.angle, np.asarray(shapes)[index])
  expected = augment.turn_and_flip(augment.resize_labels(rotated, index, tables), draws)
  np.testing.assert_array_equal(augment.augment_labels(labels, draws, index, tables), expected)
