import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from selfreg_jax.analysis import alignment
from selfreg_jax.analysis.grad_cam import resized
from selfreg_jax.analysis.redundancy import Moments, batch_moments
from tests.conftest import normal, uniform


def test_energy_is_shared_between_inside_and_outside():
  evidence = normal(0, (3, 4, 4))
  mask = (uniform(1, (3, 8, 8)) < 0.3).astype(jnp.float32)
  inside, found = alignment.energy_inside(evidence, mask)
  outside, _ = alignment.energy_inside(evidence, 1 - mask)
  assert found.all()
  np.testing.assert_allclose(inside + outside, 1, rtol=1e-6)
  heat = np.asarray(resized(evidence, (8, 8)))
  np.testing.assert_allclose(inside[1], heat[1][np.asarray(mask[1]) == 1].sum() / heat[1].sum(), rtol=1e-5)
  even, _ = alignment.energy_inside(jnp.ones((3, 4, 4)), mask)
  np.testing.assert_allclose(even, mask.mean(axis=(1, 2)), rtol=1e-6)  # no better than chance
  nothing, found = alignment.energy_inside(-jnp.ones((3, 4, 4)), mask)
  assert not found.any()
  np.testing.assert_array_equal(nothing, 0)


@pytest.fixture(scope="module")
def fields():
  """Maps that tell two of three classes partly, and labels, for fitting and for scoring."""
  rng = np.random.default_rng(0)

  def draw(count):
    labels = rng.integers(0, 3, (count, 8, 8))
    fractions = np.asarray(alignment.class_fractions(jnp.asarray(labels), 3, (4, 4)))
    signal = fractions @ rng_mixing + 0.3 * rng.normal(size=(count, 4, 4, 5)) + 40
    signal[..., 4] = 7  # a dead channel
    return signal.astype(np.float32), labels, fractions

  rng_mixing = rng.normal(size=(3, 5))
  return draw(6), draw(3)


def joint_moments(feature_map, fractions):
  total = Moments.zero(feature_map.shape[-1] + fractions.shape[-1])
  for part in np.array_split(np.concatenate([feature_map, fractions], axis=-1), 3):
    total = total.merge(batch_moments(jnp.asarray(part)))
  return total


def test_fractions_are_the_shares_of_classes_in_a_cell(fields):
  _, labels, fractions = fields[0]
  cell = labels[2, 2:4, 6:8]
  np.testing.assert_allclose(fractions[2, 1, 3], [(cell == c).mean() for c in range(3)])


def test_the_probe_is_the_direct_ridge_solution(fields):
  (maps, _, fractions), _ = fields
  ridge = 0.05
  probe = alignment.fit_probe(joint_moments(maps, fractions), 3, ridge=ridge)
  x, y = maps.reshape(-1, 5).astype(float)[:, :4], fractions.reshape(-1, 3).astype(float)
  z = (x - x.mean(axis=0)) / x.std(axis=0)
  # Least squares on rows that hold the penalty: min |y - z w|^2 + n ridge |w|^2.
  stacked = np.concatenate([z, np.sqrt(len(z) * ridge) * np.eye(4)])
  weights, *_ = linalg.lstsq(stacked, np.concatenate([y - y.mean(axis=0), np.zeros((4, 3))]))
  np.testing.assert_allclose(probe.weights[:4], weights / x.std(axis=0)[:, None], rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(probe.weights[4], 0)
  np.testing.assert_allclose(probe(jnp.asarray(maps)).reshape(-1, 3), z @ weights + y.mean(axis=0), atol=1e-4)


def test_explained_variance_from_moments_is_that_of_the_residuals(fields):
  (maps, _, fractions), (other_maps, _, other_fractions) = fields
  probe = alignment.fit_probe(joint_moments(maps, fractions), 3)
  found = alignment.explained_variance(probe, joint_moments(other_maps, other_fractions))
  answer, truth = np.asarray(probe(jnp.asarray(other_maps)), float).reshape(-1, 3), other_fractions.reshape(-1, 3)
  expected = 1 - ((truth - answer) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert (found > 0.3).all()
  absent = other_fractions * np.array([1, 1, 0], np.float32)
  assert np.isnan(alignment.explained_variance(probe, joint_moments(other_maps, absent))[2])


def test_dice_of_the_probe_counts_positions_of_slices_that_count(fields):
  (maps, _, fractions), _ = fields
  probe = alignment.fit_probe(joint_moments(maps, fractions), 3)
  weights = jnp.array([1.0, 1, 0, 1, 0, 0])
  counts = np.asarray(alignment.overlap_counts(probe, jnp.asarray(maps), jnp.asarray(fractions), weights))
  kept = [0, 1, 3]
  answer = np.argmax(probe(jnp.asarray(maps[kept])), axis=-1)
  truth = fractions[kept].argmax(axis=-1)
  for c in range(3):
    expected = 2 * np.sum((answer == c) & (truth == c)) / (np.sum(answer == c) + np.sum(truth == c))
    assert alignment.dice_of_counts(counts)[c] == pytest.approx(expected)
  assert np.isnan(alignment.dice_of_counts(np.zeros((3, 2)))).all()
