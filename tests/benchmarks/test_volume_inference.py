import numpy as np
import pytest

from benchmarks import made_data, volume_inference
from benchmarks.measuring import NotComparableError


def test_class_maps_may_differ_in_ties_only():
  maps = np.zeros((10, 100, 100), np.uint8)
  maps[:, :50] = 1
  other = maps.copy()
  other[0, 0, :5] = 2
  assert volume_inference.require_equal_maps(maps, other) == pytest.approx(5e-5)
  other[0, 0, :50] = 2
  with pytest.raises(NotComparableError, match="differs"):
    volume_inference.require_equal_maps(maps, other)


def test_maps_of_one_class_show_nothing():
  maps = np.zeros((2, 4, 4), np.uint8)
  with pytest.raises(NotComparableError, match="one class"):
    volume_inference.require_equal_maps(maps, maps)


def test_both_sides_predict_the_same_classes():
  pytest.importorskip("torch")
  widths, size = (4, 6, 6), 32
  network = volume_inference.make_network(widths)
  slices, _ = made_data.slices(3, (48, 61), 1, "uint16", 0)
  sides = volume_inference.Ours(network, widths, size), volume_inference.Theirs(network, size)
  volume_inference.require_equal_maps(*(side(slices) for side in sides))
