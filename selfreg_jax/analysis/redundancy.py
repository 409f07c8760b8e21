"""How much the channels of a map repeat each other, from moments that batches add to.

A `Moments` takes memory for one channel-by-channel matrix, however many positions went into it. Batches are summed in
float32 about their own mean on the device, and merged in float64 on the host.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array

_RESOLUTION = 4 * np.finfo(np.float32).eps  # relative deviations below it are rounding errors of a constant


@struct.dataclass
class Moments:
  """Number, mean and centred cross moments of vectors.

  Attributes:
    count: of the vectors.
    mean: (C,).
    cross: (C, C), the sum over the vectors of (x - mean)(x - mean)^T.
    remainder: (C,), to be added to the mean in float64: what float32 could not hold of the mean of data far from zero.
  """

  count: Array | np.ndarray | float
  mean: Array | np.ndarray
  cross: Array | np.ndarray
  remainder: Array | np.ndarray | float = 0.0

  @classmethod
  def zero(cls, channels: int) -> "Moments":
    """Of no vectors."""
    return cls(0.0, np.zeros(channels), np.zeros((channels, channels)))

  def merge(self, other: "Moments") -> "Moments":
    """The moments of both sets of vectors together, in float64 (Chan, Golub and LeVeque 1979).

    Args:
      other: of as many channels.

    Returns:
      NumPy arrays.
    """
    ours, theirs = (
      (
        float(moments.count),
        np.asarray(moments.mean, np.float64) + np.asarray(moments.remainder, np.float64),
        np.asarray(moments.cross, np.float64),
      )
      for moments in (self, other)
    )
    count = ours[0] + theirs[0]
    if not count:
      return Moments(0.0, ours[1], ours[2])
    difference = theirs[1] - ours[1]
    share = theirs[0] / count
    cross = ours[2] + theirs[2] + ours[0] * share * np.outer(difference, difference)
    return Moments(count, ours[1] + share * difference, cross)

  def select(self, channels: slice) -> "Moments":
    """The moments of some of the channels."""
    whole = Moments.zero(len(self.mean)).merge(self)
    return Moments(whole.count, whole.mean[channels], whole.cross[channels, channels])


def batch_moments(vectors: Array, weights: Array | None = None) -> Moments:
  """Moments of a batch; may be jitted.

  Args:
    vectors: (..., C).
    weights: (...), 1 for the vectors that count and 0 for others, such as those of padding; None counts all.

  Returns:
    Float32 moments. The sums run about the mean as float32 holds it, and the remainder corrects them, so that data far
    from zero lose nothing.
  """
  vectors = vectors.reshape(-1, vectors.shape[-1]).astype(jnp.float32)
  weights = jnp.ones(len(vectors)) if weights is None else weights.reshape(-1).astype(jnp.float32)
  count = weights.sum()
  divisor = jnp.maximum(count, 1)
  highest = jax.lax.Precision.HIGHEST
  mean = jnp.einsum("n,nc->c", weights, vectors, precision=highest) / divisor
  centred = vectors - mean
  remainder = jnp.einsum("n,nc->c", weights, centred, precision=highest) / divisor
  # Over many positions the remainder is large enough to make a constant channel look as if it varied.
  centred = (centred - remainder) * weights[:, None]
  rest = centred.sum(axis=0) / divisor
  cross = jnp.einsum("nc,nd->cd", centred, centred, precision=highest) - count * jnp.outer(rest, rest)
  return Moments(count, mean, cross, remainder + rest)


def correlation(moments: Moments) -> np.ndarray:
  """Pearson correlation of every pair of channels.

  Args:
    moments: of the channels over positions.

  Returns:
    (C, C) float64; nan in the rows and columns of channels that are constant, whose correlation is undefined.
  """
  cross = np.asarray(moments.cross, np.float64)
  deviation = np.sqrt(np.where(varies(moments), np.diag(cross), np.nan))
  return np.clip(cross / np.outer(deviation, deviation), -1, 1)


def varies(moments: Moments) -> np.ndarray:
  """Which channels, (C,), deviate from their mean by more than rounding errors."""
  variance = np.diag(np.asarray(moments.cross, np.float64)) / max(float(moments.count), 1)
  return variance > (_RESOLUTION * np.abs(np.asarray(moments.mean, np.float64))) ** 2


@dataclasses.dataclass(frozen=True)
class Redundancy:
  """How much channels repeat each other.

  Attributes:
    mean_abs_correlation: mean of |r| over pairs of different channels that are not constant; nan for fewer than two.
    effective_rank: (sum of the covariance's eigenvalues)^2 / sum of their squares, the participation ratio: 1 where all
      channels move together, C where they move independently and equally far; nan where none moves.
    channels: C.
    constant: channels that are constant: they have no correlation, and add nothing to the rank.
  """

  mean_abs_correlation: float
  effective_rank: float
  channels: int
  constant: int


def redundancy(moments: Moments) -> Redundancy:
  """Redundancy of channels whose moments are known.

  The sum of the covariance's eigenvalues is its trace and the sum of their squares its squared Frobenius norm, so that
  none has to be computed.

  Args:
    moments: of the channels over positions.

  Returns:
    The numbers.
  """
  alive = varies(moments)
  number = int(alive.sum())
  matrix = np.abs(correlation(moments)[np.ix_(alive, alive)])
  cross = np.asarray(moments.cross, np.float64)[np.ix_(alive, alive)]
  pairs = number * (number - 1)
  return Redundancy(
    mean_abs_correlation=float((matrix.sum() - np.trace(matrix)) / pairs) if pairs else float("nan"),
    effective_rank=float(np.trace(cross) ** 2 / np.sum(cross**2)) if number else float("nan"),
    channels=len(alive),
    constant=len(alive) - number,
  )
