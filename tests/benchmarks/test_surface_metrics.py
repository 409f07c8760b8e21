import numpy as np
import pytest

from benchmarks import surface_metrics
from benchmarks.measuring import NotComparableError

SHAPE = (20, 40, 40)


def test_organs_are_small_large_and_with_a_false_positive_far_away():
  small, large, far = surface_metrics.organs(SHAPE).values()
  assert small[1].sum() < large[1].sum() / 20
  assert surface_metrics.ours(*far)[0] > 5 * surface_metrics.ours(*small)[0]


def test_distances_that_differ_give_no_ratio():
  masks = surface_metrics.organs(SHAPE)["small organ (gallbladder)"]
  row = surface_metrics.measure("small", masks, surface_metrics.ours, surface_metrics.ours, rounds=1)
  assert row.ratio > 0
  wrong = np.add(surface_metrics.ours(*masks), 1e-6)
  with pytest.raises(NotComparableError, match="small"):
    surface_metrics.measure("small", masks, surface_metrics.ours, lambda prediction, truth: tuple(wrong), rounds=1)


def test_medpy_finds_the_same_distances():
  pytest.importorskip("medpy")
  for masks in surface_metrics.organs(SHAPE).values():
    np.testing.assert_allclose(surface_metrics.ours(*masks), surface_metrics.theirs(*masks), atol=1e-9)
    assert surface_metrics.our_hd95(*masks) == surface_metrics.ours(*masks)[:1]
