import numpy as np

from selfreg_jax.evaluation.postprocess import keep_largest_components


def test_the_largest_part_of_every_class_stays():
  classes = np.zeros((3, 6, 6), np.uint8)
  classes[0, :2, :2] = 1
  classes[2, 5, 5] = 1  # an island of one voxel
  classes[1, 4:, 0] = 2
  kept, removed = keep_largest_components(classes, num_classes=4)
  expected = classes.copy()
  expected[2, 5, 5] = 0
  np.testing.assert_array_equal(kept, expected)
  assert removed == 1
  assert classes[2, 5, 5] == 1  # the argument stays as it was


def test_voxels_that_touch_at_a_corner_are_one_part():
  classes = np.zeros((2, 4, 4), np.uint8)
  classes[0, 0, 0] = classes[1, 1, 1] = classes[0, 2, 2] = 1
  kept, removed = keep_largest_components(classes, num_classes=2)
  np.testing.assert_array_equal(kept, classes)
  assert removed == 0


def test_parts_of_another_class_inside_the_box_stay():
  classes = np.array([[1, 2, 0, 1], [1, 0, 0, 0]], np.uint8)
  kept, removed = keep_largest_components(classes, num_classes=3)
  np.testing.assert_array_equal(kept, [[1, 2, 0, 0], [1, 0, 0, 0]])
  assert removed == 1
