"""The losses: pure functions of arrays and a key, usable under jit, grad, vmap, pmap and shard_map.

Layout is channels last, (B, H, W, C). Reductions run in float32 whatever the inputs' precision (in float64 for float64
inputs). Under pmap or shard_map, `axis_name` names the mapped batch axis, and every loss is then the value over the
GLOBAL batch, equal on all devices; keys must be the same on all devices. A gradient that is taken inside the mapped
function, with respect to replicated parameters, is averaged over the devices (`jax.lax.pmean`) as in any pmap loop.

Numerically these are the losses of the authors' code (SelfReg-UNet, MICCAI 2024, doi 10.1007/978-3-031-72111-3_56);
where the paper's text differs, the docstring says so.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from selfreg_jax.features import Features

Array = jax.Array
AxisName = str | tuple[str, ...] | None
Channels = tuple[Array, Array]
ChannelScore = Callable[[Array, AxisName], Array]
Pairing = Callable[[Array, int, int], Channels]
Pool = Callable[[Array, tuple[int, int]], Array]

_NORM_EPSILON = 1e-12


def cross_entropy(
  logits: Array, labels: Array, *, ignore_label: int | None = None, axis_name: AxisName = None
) -> Array:
  """Softmax cross-entropy, averaged over the pixels.

  Args:
    logits: (..., num_classes) unnormalized scores.
    labels: (...) integer class ids.
    ignore_label: pixels with this label do not count; None counts all.
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    Scalar. Zero if every pixel is ignored.
  """
  logits, labels, counted = _check_segmentation(logits, labels, ignore_label)
  log_probabilities = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]  # (...)
  total = _sum_over_devices(-jnp.sum(chosen * counted), axis_name)
  count = _sum_over_devices(jnp.sum(counted), axis_name)
  return total / jnp.maximum(count, 1)


def soft_dice(
  logits: Array,
  labels: Array,
  *,
  ignore_label: int | None = None,
  smooth: float = 1e-5,
  axis_name: AxisName = None,
) -> Array:
  """Soft Dice loss with squared denominators, averaged over all classes, the background among them.

  Per class, with p the softmax probability and y the one-hot label:
  1 - (2 sum(p y) + smooth) / (sum(p^2) + sum(y^2) + smooth), the sums over the whole batch and all pixels. This is
  the `DiceLoss` of TransUNet and of the authors' code, not the formula of most libraries.

  Args:
    logits: (..., num_classes) unnormalized scores.
    labels: (...) integer class ids.
    ignore_label: pixels with this label count in none of the sums; None counts all.
    smooth: added to numerator and denominator.
    axis_name: mapped axis over which the batch is split, if any: the sums then run over the global batch.

  Returns:
    Scalar in [0, 1].
  """
  logits, labels, counted = _check_segmentation(logits, labels, ignore_label)
  probabilities = jax.nn.softmax(logits, axis=-1) * counted[..., None]
  truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) * counted[..., None]
  pixels = tuple(range(labels.ndim))
  intersection = _sum_over_devices(jnp.sum(probabilities * truth, axis=pixels), axis_name)  # (num_classes,)
  squares = _sum_over_devices(jnp.sum(probabilities**2 + truth, axis=pixels), axis_name)  # truth is 0 or 1: y^2 = y
  return jnp.mean(1 - (2 * intersection + smooth) / (squares + smooth))


def channel_response(feature_map: Array, axis_name: AxisName = None) -> Array:
  """Score by which IFD orders the channels: the mean of the map after each channel is scaled to unit L2 norm.

  s_c = mean over b, h, w of F[b, :, :, c] / max(||F[b, :, :, c]||_2, 1e-12), the norm over the pixels.

  Args:
    feature_map: (B, h, w, C).
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    (C,) scores.
  """
  _, height, width, _ = feature_map.shape
  total = jnp.sum(feature_map, axis=(1, 2))  # (B, C)
  norm = jnp.sqrt(jnp.sum(feature_map**2, axis=(1, 2)))
  return _mean_over_devices(jnp.mean(total / jnp.maximum(norm, _NORM_EPSILON), axis=0), axis_name) / (height * width)


def channel_index(feature_map: Array, axis_name: AxisName = None) -> Array:
  """Score that keeps the channels in their own order, as the paper's text and figure split them.

  Args:
    feature_map: (B, h, w, C).
    axis_name: unused; an index is the same on all devices.

  Returns:
    (C,) descending scores.
  """
  del axis_name
  return -jnp.arange(feature_map.shape[-1], dtype=feature_map.dtype)


_CHANNEL_SCORES: dict[str, ChannelScore] = {"response": channel_response, "index": channel_index}


def internal_feature_distillation(
  feature_map: Array,
  order: str | ChannelScore = "response",
  *,
  p: float = 2,
  axis_name: AxisName = None,
) -> Array:
  """Internal feature distillation (IFD): draws the lower-scored half of the channels to the higher-scored half.

  The channels are sorted by descending score; the first floor(C / 2) are the top, the next floor(C / 2) the bottom, and
  IFD = mean(|top - bottom|^p) pairs them in that order. Gradients flow through both halves and not through the order.
  For an odd C the channel with the lowest score has no partner and is left out. Two channels whose scores differ by
  rounding only may swap places and move the value by about 1e-3 relative.

  Args:
    feature_map: (B, h, w, C) floating-point map, C >= 2.
    order: "response" (`channel_response`, the authors' code), "index" (the paper's text), or a function of
      (feature_map, axis_name) that gives (C,) scores.
    p: exponent; the paper and the code use 2.
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    Scalar.
  """
  _check_map(feature_map, "feature_map")
  channels = feature_map.shape[-1]
  if channels < 2:
    raise ValueError(f"internal feature distillation compares two halves of the channels; the map has C = {channels}")
  if p <= 0:
    raise ValueError(f"p must be positive, got {p}")
  if isinstance(order, str):
    if order not in _CHANNEL_SCORES:
      raise ValueError(f"unknown order {order!r}; expected one of {sorted(_CHANNEL_SCORES)} or a function")
    order = _CHANNEL_SCORES[order]
  feature_map = _at_least_float32(feature_map)
  scores = order(jax.lax.stop_gradient(feature_map), axis_name)
  ranking = jnp.argsort(-scores, stable=True)
  half = channels // 2
  difference = _channel_difference(feature_map, ranking[:half], ranking[half : 2 * half])
  powered = difference**2 if p == 2 else jnp.abs(difference) ** p
  return _mean_over_devices(_mean_of_map(powered), axis_name)


def adaptive_average_pool(feature_map: Array, size: tuple[int, int]) -> Array:
  """Averages a map down to a size, in the sense of PyTorch's AdaptiveAvgPool2d.

  Output row i averages the input rows from floor(i H / h) to ceil((i + 1) H / h), columns likewise: plain average
  pooling where the sizes divide, overlapping windows of unequal size elsewhere.

  Args:
    feature_map: (B, H, W, C).
    size: (h, w), neither larger than the map's.

  Returns:
    (B, h, w, C).
  """
  batch, height, width, channels = feature_map.shape
  if (height, width) == size:
    return feature_map
  if height % size[0] == 0 and width % size[1] == 0:
    blocks = feature_map.reshape(batch, size[0], height // size[0], size[1], width // size[1], channels)
    return blocks.mean(axis=(2, 4))
  rows = jnp.asarray(_pooling_matrix(height, size[0]), feature_map.dtype)
  columns = jnp.asarray(_pooling_matrix(width, size[1]), feature_map.dtype)
  highest = jax.lax.Precision.HIGHEST
  pooled = jnp.einsum("ih,bhwc->biwc", rows, feature_map, precision=highest)
  return jnp.einsum("jw,biwc->bijc", columns, pooled, precision=highest)


def random_pairing(key: Array, student_channels: int, target_channels: int) -> Channels:
  """Draws min(C_s, C_t) channels of each map without replacement and pairs them at random.

  Only the pairing matters to a mean, so the map with fewer channels keeps its own order and an ordered subset is drawn
  from the other one: the same distribution as two independent draws, with one gather less.

  Args:
    key: PRNG key.
    student_channels: C_s.
    target_channels: C_t.

  Returns:
    (indices into the student, indices into the target), each (min(C_s, C_t),).
  """
  count = min(student_channels, target_channels)
  drawn = jax.random.permutation(key, max(student_channels, target_channels))[:count]
  own_order = np.arange(count)  # of numpy, by which the loss sees that there is nothing to reorder
  return (drawn, own_order) if target_channels <= student_channels else (own_order, drawn)


def semantic_consistency(
  feature_map: Array,
  final: Array,
  key: Array | None = None,
  *,
  channels: Channels | None = None,
  pairing: Pairing = random_pairing,
  pool: Pool = adaptive_average_pool,
  axis_name: AxisName = None,
) -> Array:
  """Semantic consistency regularization (SCR): the final map supervises another one, channel by channel.

  The larger of the two maps is average-pooled to the size of the smaller one; SCR is the mean squared difference of
  randomly paired channels. No gradient flows to `final`.

  Args:
    feature_map: (B, h, w, C_s) floating-point map of any block.
    final: (B, H, W, C_t) map just before the head.
    key: PRNG key for the pairing; not needed when `channels` is given.
    channels: fixed pairs (indices into C_s, indices into C_t), equally long.
    pairing: function of (key, C_s, C_t) that gives such pairs.
    pool: function of (map, (h, w)) that shrinks a map.
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    Scalar.
  """
  size = _common_size(feature_map, final)
  return _consistency(feature_map, _target(final, size, pool), key, channels, pairing, pool, axis_name)


def self_regularization(
  features: Features,
  key: Array | None,
  *,
  scr_weight: float | Array = 0.015,
  ifd_weight: float | Array = 0.015,
  channels: Mapping[str, Channels] | None = None,
  order: str | ChannelScore = "response",
  p: float = 2,
  pairing: Pairing = random_pairing,
  pool: Pool = adaptive_average_pool,
  axis_name: AxisName = None,
) -> tuple[Array, dict[str, Array]]:
  """The method's two losses over all stages of a network.

  For each block position (one where every stage has one block; else the first and the last block of each stage):
  IFD_p = mean over encoder stages + mean over decoder stages, SCR_p = mean over all stages; the loss is
  scr_weight * sum SCR_p + ifd_weight * sum IFD_p. The final map is pooled once per resolution.

  Args:
    features: maps of one forward pass. To supervise with another map than the last one, replace it:
      `features.replace(final=teacher)`.
    key: PRNG key of this step; every map draws its pairs from its own fold. May be None when `channels` is given or
      `scr_weight` is 0.
    scr_weight: weight of SCR; the Python number 0 skips its computation and its terms.
    ifd_weight: weight of IFD, likewise.
    channels: fixed pairs for each map by name, such as {"encoder_1": (indices, indices), ...}.
    order: see `internal_feature_distillation`.
    p: see `internal_feature_distillation`.
    pairing: see `semantic_consistency`.
    pool: see `semantic_consistency`.
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    (loss, terms): `terms` holds unweighted scalars, "scr" and "ifd" (sums over positions) and each map's own as
    "scr/encoder_1", "ifd/decoder_2/last", ...

  Raises:
    ValueError: empty stages, maps of wrong rank, or names in `channels` that do not match the maps.
    TypeError: maps that are not floating point.
  """
  if not features.encoder or not features.decoder or not all((*features.encoder, *features.decoder)):
    raise ValueError("the features need at least one encoder and one decoder stage, each with at least one block")
  positions = features.blocks()
  maps = {name: feature_map for position in positions for name, feature_map in position.items()}
  for name, feature_map in maps.items():
    _check_map(feature_map, name)
  if channels is not None and set(channels) != set(maps):
    raise ValueError(f"channels are given for {sorted(channels)}, but the maps are {sorted(maps)}")
  terms: dict[str, Array] = {}
  loss = jnp.zeros((), jnp.promote_types(features.final.dtype, jnp.float32))

  if not _is_zero(scr_weight):
    sizes = {name: _common_size(feature_map, features.final) for name, feature_map in maps.items()}
    targets = {size: _target(features.final, size, pool) for size in set(sizes.values())}
    for name, feature_map in maps.items():
      pairs = None if channels is None else channels[name]
      map_key = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
      terms[f"scr/{name}"] = _consistency(feature_map, targets[sizes[name]], map_key, pairs, pairing, pool, axis_name)
    terms["scr"] = sum(_mean([terms[f"scr/{name}"] for name in position]) for position in positions)
    loss += scr_weight * terms["scr"]

  if not _is_zero(ifd_weight):
    for name, feature_map in maps.items():
      terms[f"ifd/{name}"] = internal_feature_distillation(feature_map, order, p=p, axis_name=axis_name)
    sides = [[n for n in position if n.startswith(side)] for position in positions for side in ("encoder", "decoder")]
    terms["ifd"] = sum(_mean([terms[f"ifd/{name}"] for name in names]) for names in sides if names)
    loss += ifd_weight * terms["ifd"]
  return loss, terms


def _consistency(
  student: Array,
  target: Array,
  key: Array | None,
  channels: Channels | None,
  pairing: Pairing,
  pool: Pool,
  axis_name: AxisName,
) -> Array:
  """SCR against a target that already has the common size and no gradient."""
  student = pool(_at_least_float32(student), target.shape[1:3])
  if channels is None:
    if key is None:
      raise ValueError("semantic consistency draws its channel pairs at random: give a key, or channels")
    student_index, target_index = pairing(key, student.shape[-1], target.shape[-1])
  else:
    student_index, target_index = channels
    if np.shape(student_index) != np.shape(target_index) or np.ndim(student_index) != 1:
      raise ValueError(
        f"channels must be two index vectors of one length, got {np.shape(student_index)} and {np.shape(target_index)}"
      )
  difference = _channels(student, student_index) - _channels(target, target_index)
  return _mean_over_devices(_mean_of_map(difference**2), axis_name)


def _channels(x: Array, index: Array | np.ndarray) -> Array:
  """x[..., index], by the way that suits the device."""
  if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(x.shape[-1])):
    return x
  return jax.lax.platform_dependent(
    x,
    jnp.asarray(index),
    # A processor gathers channels one number at a time, and scatters their gradients so; a product with zeros and ones
    # gives the very same numbers several times faster.
    cpu=lambda x, index: _product(x, _selection(index, x)),
    default=lambda x, index: jnp.take(x, index, axis=-1),
  )


def _channel_difference(x: Array, first: Array, second: Array) -> Array:
  """x[..., first] - x[..., second] for indices that name no channel twice, by the way that suits the device."""
  return jax.lax.platform_dependent(
    x,
    first,
    second,
    cpu=lambda x, first, second: _product(x, _selection(first, x) - _selection(second, x)),
    # That no channel is named twice spares the gradients the additions.
    default=lambda x, first, second: (
      x.at[..., first].get(unique_indices=True) - x.at[..., second].get(unique_indices=True)
    ),
  )


def _selection(index: Array, x: Array) -> Array:
  """(C, len(index)) zeros and ones, one in each column; NaN in the column of an index that does not exist."""
  channels = x.shape[-1]
  index = jnp.where(index < 0, index + channels, index)
  exists = (index >= 0) & (index < channels)
  return jnp.where(exists, index == jnp.arange(channels)[:, None], jnp.nan).astype(x.dtype)


def _product(x: Array, matrix: Array) -> Array:
  return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def _target(final: Array, size: tuple[int, int], pool: Pool) -> Array:
  return pool(_at_least_float32(jax.lax.stop_gradient(final)), size)


def _common_size(feature_map: Array, final: Array) -> tuple[int, int]:
  _check_map(feature_map, "feature_map")
  _check_map(final, "final")
  if feature_map.shape[0] != final.shape[0]:
    raise ValueError(f"batch sizes differ: feature map {feature_map.shape}, final map {final.shape}")
  return (min(feature_map.shape[1], final.shape[1]), min(feature_map.shape[2], final.shape[2]))


@functools.lru_cache
def _pooling_matrix(size: int, pooled: int) -> np.ndarray:
  matrix = np.zeros((pooled, size))
  for i in range(pooled):
    start, stop = i * size // pooled, math.ceil((i + 1) * size / pooled)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


def _check_segmentation(logits: Array, labels: Array, ignore_label: int | None) -> tuple[Array, Array, Array]:
  """Float32 logits, labels that are safe to index with, and a weight of 1 for every pixel that counts."""
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f"logits must be floating point, got {logits.dtype}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f"labels must be integer class ids, got {labels.dtype}")
  if labels.shape != logits.shape[:-1] or labels.ndim < 1:
    raise ValueError(f"labels {labels.shape} must have the shape of the logits {logits.shape} without the last axis")
  logits = _at_least_float32(logits)
  labels = jnp.asarray(labels, jnp.int32)
  if ignore_label is None:
    return logits, labels, jnp.ones(labels.shape, logits.dtype)
  counted = labels != ignore_label
  return logits, jnp.where(counted, labels, 0), counted.astype(logits.dtype)


def _check_map(feature_map: Array, name: str) -> None:
  if feature_map.ndim != 4:
    raise ValueError(f"{name} must be (B, h, w, C), got shape {feature_map.shape}")
  if not jnp.issubdtype(feature_map.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating point, got {feature_map.dtype}")
  if 0 in feature_map.shape:
    raise ValueError(f"{name} is empty: shape {feature_map.shape}")


def _at_least_float32(array: Array) -> Array:
  return jnp.asarray(array, jnp.promote_types(array.dtype, jnp.float32))


def _mean_of_map(values: Array) -> Array:
  # In two stages: XLA's CPU backend adds up one long float32 sum term by term, which costs ten times the precision.
  return jnp.mean(jnp.mean(values, axis=(1, 2)))


def _is_zero(weight: float | Array) -> bool:
  return isinstance(weight, int | float) and weight == 0


def _mean(scalars: list[Array]) -> Array:
  return sum(scalars) / len(scalars)


def _sum_over_devices(value: Array, axis_name: AxisName) -> Array:
  return value if axis_name is None else jax.lax.psum(value, axis_name)


def _mean_over_devices(value: Array, axis_name: AxisName) -> Array:
  return value if axis_name is None else jax.lax.pmean(value, axis_name)
