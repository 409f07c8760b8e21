import math

import numpy as np
import pytest
from scipy import ndimage

from selfreg_jax.evaluation import metrics


def box(shape, start, stop):
  mask = np.zeros(shape, bool)
  mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
  return mask


def points(mask):
  return metrics.border_points(mask, num_classes=2)[0]


def blobs(rng, shape, num_classes):
  noise = rng.standard_normal((num_classes, *shape))
  return np.stack([ndimage.gaussian_filter(layer, 1.2) for layer in noise]).argmax(axis=0).astype(np.uint8)


def brute_force(prediction, truth, spacing, tolerance):
  """hd95, assd and surface Dice of two masks straight from their definitions, by loops and all pairs."""

  def surface(mask):
    voxels = {tuple(voxel) for voxel in np.argwhere(mask)}
    steps = [tuple(step) for step in np.concatenate([np.eye(mask.ndim, dtype=int), -np.eye(mask.ndim, dtype=int)])]
    return [v for v in voxels if any(tuple(np.add(v, step)) not in voxels for step in steps)]

  def directed(sources, targets):
    return [
      min(math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True))) for q in targets)
      for p in sources
    ]

  p, t = surface(prediction), surface(truth)
  distances = sorted(directed(p, t) + directed(t, p))
  rank = 0.95 * (len(distances) - 1)
  low, high = distances[math.floor(rank)], distances[math.ceil(rank)]
  hd95 = low + (high - low) * (rank - math.floor(rank))
  return hd95, sum(distances) / len(distances), sum(d <= tolerance for d in distances) / len(distances)


@pytest.mark.parametrize("class_id", [1, 2, 3])
def test_golden_of_the_reference(golden, class_id):
  reference = golden("metrics")
  prediction, truth = reference["pred"], reference["gt"]
  expected = dict(zip(reference["columns"], reference[f"class{class_id}"], strict=True))
  counts = metrics.counts(metrics.confusion_matrix(prediction, truth, num_classes=4))
  surfaces = [metrics.border_points(classes, num_classes=4)[class_id - 1] for classes in (prediction, truth)]
  voxels = metrics.surface_distances(*surfaces)
  millimetres = metrics.surface_distances(*surfaces, spacing=reference["spacing_zyx_mm"])
  found = {
    "dice": metrics.dice(counts)[class_id],
    "jaccard": metrics.jaccard(counts)[class_id],
    "hd95_voxels": metrics.hd95(voxels),
    "assd_voxels": metrics.assd(voxels),
    "hd95_mm": metrics.hd95(millimetres),
    "assd_mm": metrics.assd(millimetres),
  }
  assert found == pytest.approx(expected, abs=1e-9, rel=0)


@pytest.mark.parametrize("seed", range(12))
def test_distances_agree_with_all_pairs(seed):
  rng = np.random.default_rng(seed)
  shape = tuple(rng.integers(4, 9, size=2 + seed % 2))
  spacing = rng.uniform(0.5, 4, size=len(shape))
  prediction, truth = blobs(rng, shape, 3), blobs(rng, shape, 3)
  surfaces = zip(*(metrics.border_points(classes, num_classes=3) for classes in (prediction, truth)), strict=True)
  compared = 0
  for class_id, (p, t) in enumerate(surfaces, start=1):
    if len(p) and len(t):
      distances = metrics.surface_distances(p, t, spacing=spacing)
      expected = brute_force(prediction == class_id, truth == class_id, spacing, tolerance=1.5)
      found = metrics.hd95(distances), metrics.assd(distances), metrics.surface_dice(distances, tolerance=1.5)
      assert found == pytest.approx(expected, abs=1e-12)
      compared += 1
  assert compared


def test_shifted_cubes():
  # Along the axis of the shift two faces are 2 voxels apart; the overlapping stretch of the sides coincides.
  spacing = (3.0, 1.0, 0.5)
  truth, prediction = box((12, 12, 12), (2, 2, 2), (8, 8, 8)), box((12, 12, 12), (4, 2, 2), (10, 8, 8))
  distances = metrics.surface_distances(points(prediction), points(truth), spacing=spacing)
  assert metrics.hd95(distances) == 6.0
  surface, face, ring = 6**3 - 4**3, 6 * 6, 6**2 - 4**2
  beyond = 3.0 * ring + 6.0 * face  # of the prediction outside the truth: one ring of the sides and the far face
  # The truth's inside knows the prediction's near face; of that face the 4 x 4 core lies inside the truth, 0.5 mm per
  # column, 1 mm per row away from the truth's sides.
  core = sum(min(0.5 * min(c, 5 - c), min(r, 5 - r), 6.0) for r in range(1, 5) for c in range(1, 5))
  assert metrics.assd(distances) == pytest.approx((beyond + core) * 2 / (2 * surface))
  far = ring + face
  close = sum(min(0.5 * min(c, 5 - c), min(r, 5 - r)) <= 0.5 for r in range(1, 5) for c in range(1, 5))
  assert metrics.surface_dice(distances, tolerance=0.5) == pytest.approx((surface - far - (16 - close)) / surface)
  counts = metrics.counts(metrics.confusion_matrix(prediction, truth, num_classes=2))
  assert metrics.dice(counts)[1] == pytest.approx(4 / 6)
  assert metrics.jaccard(counts)[1] == pytest.approx(4 / 8)


def test_single_voxels():
  p, t = box((5, 5, 5), (0, 0, 0), (1, 1, 1)), box((5, 5, 5), (1, 3, 4), (2, 4, 5))
  distances = metrics.surface_distances(points(p), points(t), spacing=(2, 1, 0.5))
  expected = math.sqrt(2**2 + 3**2 + 2**2)
  assert metrics.hd95(distances) == metrics.assd(distances) == pytest.approx(expected, abs=1e-15)
  assert metrics.surface_dice(distances, tolerance=4.1) == 0
  assert metrics.surface_dice(distances, tolerance=4.2) == 1


def test_surface_dice_includes_the_tolerance_in_spite_of_rounding():
  p, t = np.array([[13, 0]]), np.array([[12, 0]])  # 13 * 0.7 - 12 * 0.7 is a little more than 0.7
  distances = metrics.surface_distances(p, t, spacing=(0.7, 1))
  assert distances.to_truth[0] > 0.7
  assert metrics.surface_dice(distances, tolerance=0.7) == 1


def test_assd_weighs_points_and_not_directions():
  one, many = np.array([[0, 0]]), np.array([[0, 0], [0, 4], [0, 8]])
  distances = metrics.surface_distances(one, many)
  assert metrics.assd(distances) == pytest.approx(12 / 4)  # the mean of the two directed means is 2


def test_foreground_on_the_faces_is_border():
  full = np.ones((4, 5, 6), bool)
  expected = full.copy()
  expected[1:-1, 1:-1, 1:-1] = False
  np.testing.assert_array_equal(metrics.border(full), expected)
  assert metrics.border(np.ones((1, 5, 6), bool)).all()
  assert metrics.border(np.ones((5, 6), bool)).sum() == 18


@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 9), (1, 8, 9)])
def test_border_is_one_erosion(shape):
  mask = np.random.default_rng(0).random(shape) < 0.9
  np.testing.assert_array_equal(metrics.border(mask), mask & ~ndimage.binary_erosion(mask))


@pytest.mark.parametrize("shape", [(7, 9), (5, 7, 9), (4, 1, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_boxes_are_those_of_find_objects(shape, dtype):
  rng = np.random.default_rng(0)
  for share in (0.0, 0.02, 0.5):
    classes = np.where(rng.random(shape) < share, rng.integers(1, 5, shape), 0).astype(dtype)
    assert metrics.class_boxes(classes, num_classes=6) == ndimage.find_objects(classes, max_label=5)


def test_border_points_index_the_whole_array():
  classes = blobs(np.random.default_rng(1), (9, 10, 11), 4)
  classes[classes == 2] = 0
  found = metrics.border_points(classes, num_classes=5)
  assert [len(p) == 0 for p in found] == [False, True, False, True]
  for class_id in (1, 3):
    np.testing.assert_array_equal(found[class_id - 1], np.argwhere(metrics.border(classes == class_id)))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_class_ids_of_any_integer_type(dtype):
  classes = box((6, 6), (1, 1), (5, 5)).astype(dtype)
  assert len(metrics.border_points(classes, num_classes=2)[0]) == 12
  np.testing.assert_array_equal(metrics.confusion_matrix(classes, classes, num_classes=2), [[20, 0], [0, 16]])


def test_confusion_is_truth_by_prediction_and_adds_up():
  rng = np.random.default_rng(2)
  prediction, truth = rng.integers(0, 3, (2, 150, 120, 70))  # more than one chunk
  confusion = metrics.confusion_matrix(prediction, truth, num_classes=3)
  for t in range(3):
    for p in range(3):
      assert confusion[t, p] == np.count_nonzero((truth == t) & (prediction == p))
  slices = zip(prediction, truth, strict=True)
  np.testing.assert_array_equal(sum(metrics.confusion_matrix(p, t, num_classes=3) for p, t in slices), confusion)
  counts = metrics.counts(confusion)
  assert counts.fp[1] == np.count_nonzero((prediction == 1) & (truth != 1))
  assert counts.fn[1] == np.count_nonzero((prediction != 1) & (truth == 1))
  assert [sum(column) for column in zip(*counts, strict=True)] == [truth.size] * 3


def test_ratios_of_absent_classes_are_nan():
  counts = metrics.counts(np.array([[5, 0, 1], [0, 0, 0], [2, 0, 0]]))
  np.testing.assert_array_equal(metrics.dice(counts), [10 / 13, np.nan, 0])
  np.testing.assert_array_equal(metrics.jaccard(counts), [5 / 8, np.nan, 0])


def test_diagonal():
  assert metrics.volume_diagonal((10, 20, 30), spacing=(2, 1.5, 1)) == pytest.approx(math.sqrt(400 + 900 + 900))
  assert metrics.volume_diagonal((3, 4), spacing=(1, 1)) == 5


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: metrics.confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), num_classes=2), "one shape"),
    (lambda: metrics.confusion_matrix(np.zeros(3), np.zeros(3, int), num_classes=2), "prediction .* float64"),
    (lambda: metrics.confusion_matrix(np.zeros(3, int), np.full(3, 2), num_classes=2), r"truth .* 2\.\.2"),
    (lambda: metrics.confusion_matrix(np.full(3, -1), np.zeros(3, int), num_classes=2), r"prediction .* -1\.\.-1"),
    (lambda: metrics.counts(np.zeros((2, 3), int)), "square"),
    (lambda: metrics.border(np.zeros((2, 3), int)), "bool"),
    (lambda: metrics.border_points(np.zeros(3, int), num_classes=2), "row, column"),
    (lambda: metrics.border_points(np.full((2, 2), 7), num_classes=2), "outside"),
    (lambda: metrics.surface_distances(np.zeros((0, 2), int), np.zeros((1, 2), int)), "empty"),
    (lambda: metrics.surface_distances(np.zeros((1, 3), int), np.zeros((1, 2), int)), "one rank"),
    (lambda: metrics.surface_distances(np.zeros((1, 2), int), np.zeros((1, 2), int), spacing=(1, 1, 1)), "2 positive"),
    (lambda: metrics.surface_distances(np.zeros((1, 2), int), np.zeros((1, 2), int), spacing=(1, 0)), "positive"),
    (lambda: metrics.volume_diagonal((2, 2), spacing=(1, math.nan)), "positive"),
    (lambda: metrics.surface_dice(metrics.SurfaceDistances(np.zeros(1), np.zeros(1)), tolerance=-1), "tolerance"),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()
