import numpy as np
import pytest

from selfreg_jax.analysis.statistics import differences, find, means


def table(values):
  return {f"case{n}": {("final", "probe_r2", "liver"): value} for n, value in enumerate(values)}


def test_cases_without_a_value_do_not_count():
  (row,) = means(table([1.0, np.nan, 3.0, 5.0]), {("final", "probe_r2", "liver"): 2.5})
  assert (row["mean"], row["n"], row["pooled"]) == (3.0, 3, 2.5)
  low, high = row["interval"]
  assert 1 <= low < 3 < high <= 5
  (row,) = means(table([np.nan, np.nan]), {})
  assert (row["mean"], row["interval"], row["n"]) == (None, None, 0)
  assert "pooled" not in row


def test_differences_are_paired():
  rng = np.random.default_rng(0)
  level = rng.normal(0, 100, 30)  # cases differ far more than the runs do
  difference = rng.normal(1, 0.1, 30)
  rows = differences(table([*(level + difference), np.nan]), table([*level, 7.0]))
  row = find(rows, "final", "probe_r2", "liver")
  assert row["n"] == 30
  assert row["difference"] == pytest.approx(difference.mean())
  assert row["ours"] - row["other"] == pytest.approx(difference.mean())
  spread = 1.96 * difference.std() / np.sqrt(30)
  assert row["interval"] == pytest.approx([difference.mean() - spread, difference.mean() + spread], abs=0.3 * spread)
  with pytest.raises(ValueError, match="same quantities"):
    differences(table([1.0]), {"case0": {("final", "probe_dice", "liver"): 1.0}})
