"""How well the blocks of a network agree with the truth: where their evidence lies, and what can be read off them.

The probe is a ridge regression from a block's channels to the classes in closed form. Fitting and scoring need only the
joint moments of channels and classes (`redundancy.Moments`), so that memory does not grow with the number of cases.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from selfreg_jax.analysis import grad_cam
from selfreg_jax.analysis.redundancy import Moments, varies
from selfreg_jax.losses import adaptive_average_pool

Array = jax.Array


def energy_inside(evidence: Array, mask: Array) -> tuple[Array, Array]:
  """Share of Grad-CAM's energy, the sum of the heat map, that lies inside a mask.

  The energy-based pointing game of Wang et al., CVPR workshops 2020 (Score-CAM), arXiv 1910.01279, for masks.

  Args:
    evidence: (..., h, w) of `grad_cam`.
    mask: (..., H, W) at the size of the image, 1 inside.

  Returns:
    (share in [0, 1], whether there is any energy), each (...); the share is 0 where there is none.
  """
  heat = grad_cam.resized(evidence, mask.shape[-2:])
  total = heat.sum(axis=(-2, -1))
  inside = (heat * mask).sum(axis=(-2, -1))
  return inside / jnp.where(total > 0, total, 1), total > 0


def class_fractions(labels: Array, num_classes: int, size: tuple[int, int]) -> Array:
  """The share of each class in the cell of the image that a position of a map stands for.

  Args:
    labels: (B, H, W) class ids.
    num_classes: classes, background included.
    size: (h, w) of the map, not larger than the image.

  Returns:
    (B, h, w, classes) float32, summing to 1.
  """
  return adaptive_average_pool(jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), size)


@struct.dataclass
class Probe:
  """A linear map from a block's channels to the classes' shares: (x - mean) @ weights + intercept.

  Attributes:
    mean: (C,) of the channels in training.
    weights: (C, classes), for channels that are not standardized.
    intercept: (classes,), the mean shares in training.
  """

  mean: Array | np.ndarray
  weights: Array | np.ndarray
  intercept: Array | np.ndarray

  def __call__(self, feature_map: Array) -> Array:
    """Shares of the classes, (..., classes), as read off a map (..., C)."""
    centred = feature_map.astype(jnp.float32) - self.mean
    return jnp.einsum("...c,ck->...k", centred, self.weights, precision=jax.lax.Precision.HIGHEST) + self.intercept


def fit_probe(moments: Moments, num_classes: int, *, ridge: float = 1e-3) -> Probe:
  """Ridge regression on standardized channels, without a penalty on the intercept.

  Minimizes mean |y - b - W^T z|^2 + ridge |W|^2 over the vectors, z = (x - mean) / deviation.

  Args:
    moments: of the joint vectors [channels, classes' shares].
    num_classes: how many of them are classes.
    ridge: weight of the penalty, > 0.

  Returns:
    The probe, float64. Constant channels get no weight.
  """
  channels = len(moments.mean) - num_classes
  covariance = np.asarray(moments.cross, np.float64) / float(moments.count)
  mean = np.asarray(moments.mean, np.float64)
  deviation = np.sqrt(np.maximum(np.diag(covariance)[:channels], 0))
  inverse = np.divide(1, deviation, out=np.zeros(channels), where=varies(moments)[:channels])
  system = covariance[:channels, :channels] * np.outer(inverse, inverse) + ridge * np.eye(channels)
  weights = np.linalg.solve(system, inverse[:, None] * covariance[:channels, channels:])
  return Probe(mean[:channels], inverse[:, None] * weights, mean[channels:])


def explained_variance(probe: Probe, moments: Moments) -> np.ndarray:
  """R^2 of every class: 1 - (sum of squared residuals) / (sum of squares about the mean).

  Args:
    probe: fitted elsewhere.
    moments: of the joint vectors [channels, classes' shares] that are scored.

  Returns:
    (classes,); nan for a class whose share is the same everywhere. It is negative where the mean is the better guess.
  """
  channels = len(probe.mean)
  mean, cross = np.asarray(moments.mean, np.float64), np.asarray(moments.cross, np.float64)
  weights = np.asarray(probe.weights, np.float64)
  # The residual y - b - W^T (x - m) is linear in the joint vector.
  coefficients = np.concatenate([-weights, np.eye(weights.shape[1])])
  bias = mean[channels:] - probe.intercept - weights.T @ (mean[:channels] - probe.mean)
  residual = np.einsum("ck,cd,dk->k", coefficients, cross, coefficients, optimize=True) + float(moments.count) * bias**2
  total = np.diag(cross)[channels:]
  return 1 - np.divide(residual, total, out=np.full(len(total), np.nan), where=total > 0)


def overlap_counts(probe: Probe, feature_map: Array, fractions: Array, weights: Array) -> Array:
  """Positions that the probe and the truth give to each class, at the resolution of the map.

  Args:
    probe: of the block.
    feature_map: (B, h, w, C).
    fractions: (B, h, w, classes) of `class_fractions`; a position belongs to its most frequent class.
    weights: (B,), 1 for the slices that count.

  Returns:
    (3, classes): in both, in the probe's answer, in the truth.
  """
  num_classes = fractions.shape[-1]
  answer, truth = (
    jax.nn.one_hot(jnp.argmax(scores, axis=-1), num_classes) * weights[:, None, None, None]
    for scores in (probe(feature_map), fractions)
  )
  return jnp.stack([(answer * truth).sum(axis=(0, 1, 2)), answer.sum(axis=(0, 1, 2)), truth.sum(axis=(0, 1, 2))])


def dice_of_counts(counts: np.ndarray) -> np.ndarray:
  """Dice from `overlap_counts`, (3, classes) -> (classes,); nan for a class in neither."""
  both, answer, truth = np.asarray(counts, np.float64)
  total = answer + truth
  return np.divide(2 * both, total, out=np.full(len(total), np.nan), where=total > 0)
