import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreg_jax.analysis.alignment import fit_probe
from selfreg_jax.analysis.redundancy import Moments, batch_moments, correlation, redundancy


def stream(parts):
  total = Moments.zero(parts[0].shape[-1])
  for part in parts:
    total = total.merge(jax.jit(batch_moments)(part))
  return total


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_are_those_of_the_data_at_once(offset):
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(6, 5))
  # Batches of different means and sizes, as slices of different organs are.
  parts = [(rng.normal(size=(n, 3, 4, 6)) @ mixing + rng.normal(size=5) + offset).astype(np.float32) for n in (1, 7, 2)]
  everything = np.concatenate([part.reshape(-1, 5) for part in parts]).astype(np.float64)
  found = stream(parts)
  assert found.count == len(everything)
  np.testing.assert_allclose(found.mean, everything.mean(axis=0), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found.cross / found.count, np.cov(everything.T, bias=True), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(correlation(found), np.corrcoef(everything.T), atol=1e-5)


def test_vectors_of_no_weight_do_not_count():
  rng = np.random.default_rng(1)
  data = rng.normal(size=(4, 2, 2, 3)).astype(np.float32)
  weights = np.broadcast_to(np.array([1, 0, 1, 0], np.float32)[:, None, None], (4, 2, 2))
  found = batch_moments(jnp.asarray(data), jnp.asarray(weights))
  expected = batch_moments(jnp.asarray(data[[0, 2]]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
  nothing = batch_moments(jnp.asarray(data), jnp.zeros((4, 2, 2)))
  merged = Moments.zero(3).merge(nothing).merge(expected)
  np.testing.assert_allclose(merged.mean, expected.mean, atol=1e-6)
  assert merged.count == 8


def test_the_rank_is_the_participation_ratio_of_the_eigenvalues():
  rng = np.random.default_rng(2)
  data = (rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8))).astype(np.float32)
  eigenvalues = np.linalg.eigvalsh(np.cov(data.T.astype(np.float64)))
  found = redundancy(stream([data[:100], data[100:]]))
  assert found.effective_rank == pytest.approx(eigenvalues.sum() ** 2 / np.sum(eigenvalues**2), rel=1e-5)
  r = np.abs(np.corrcoef(data.T))
  assert found.mean_abs_correlation == pytest.approx(r[~np.eye(8, dtype=bool)].mean(), rel=1e-5)


def test_channels_that_repeat_one_another_have_rank_one_and_independent_ones_all_of_it():
  rng = np.random.default_rng(3)
  one = rng.normal(size=(1000, 1)).astype(np.float32)
  same = redundancy(batch_moments(jnp.asarray(one * np.array([1, -1, 2, 3], np.float32))))
  assert same.mean_abs_correlation == pytest.approx(1, abs=1e-5)
  assert same.effective_rank == pytest.approx(1, abs=1e-5)
  orthogonal = np.linalg.qr(rng.normal(size=(1000, 6)) - 0.0)[0]
  orthogonal -= orthogonal.mean(axis=0)
  free = redundancy(batch_moments(jnp.asarray(np.linalg.qr(orthogonal)[0])))
  assert free.mean_abs_correlation == pytest.approx(0, abs=1e-5)
  assert free.effective_rank == pytest.approx(6, abs=1e-4)


def test_constant_channels_are_left_out_and_counted():
  rng = np.random.default_rng(4)
  data = rng.normal(size=(300, 4)).astype(np.float32)
  data[:, 1], data[:, 3] = 0.1, 0  # a tenth has no exact float32: its deviation is a rounding error
  found = stream([data[:70], data[70:]])
  result = redundancy(found)
  assert (result.channels, result.constant) == (4, 2)
  assert result.mean_abs_correlation == pytest.approx(abs(np.corrcoef(data[:, 0], data[:, 2])[0, 1]), abs=1e-5)
  matrix = correlation(found)
  assert np.isnan(matrix[[1, 3]]).all()
  assert np.isnan(matrix[:, [1, 3]]).all()
  assert fit_probe(found, 1).weights[1] == 0  # of channels 0 to 2 for channel 3
  dead = redundancy(stream([np.ones((5, 2), np.float32)]))
  assert dead.constant == 2
  assert np.isnan([dead.mean_abs_correlation, dead.effective_rank]).all()


def test_constants_are_seen_as_such_over_as_many_positions_as_real_maps_have():
  values = np.float32([0.1, 0.3, 0.7, 1.1, 2.3])
  parts = [np.broadcast_to(values, (8, 224, 224, 5))] * 3
  assert redundancy(stream(parts)).constant == 5
