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
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from optax import assignment

from selfreg_jax.features import Features

Array = jax.Array
AxisName = str | tuple[str, ...] | None
Channels = tuple[Array, Array]
ChannelScore = Callable[[Array, AxisName], Array]
Teacher = Callable[[Features], Array]
Pairing = Callable[[Array | None, Array, Array, AxisName], Channels]
Pool = Callable[[Array, tuple[int, int]], Array]

_NORM_EPSILON = 1e-12
STOP_GRADIENTS = ("none", "top")


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
  p: float | Array = 2,
  stop_gradient: str = "none",
  axis_name: AxisName = None,
) -> Array:
  """Internal feature distillation (IFD): draws the lower-scored half of the channels to the higher-scored half.

  The channels are sorted by descending score; the first floor(C / 2) are the top, the next floor(C / 2) the bottom, and
  IFD = mean(|top - bottom|^p) pairs them in that order. Gradients flow through both halves, as in the authors' code, or
  through the bottom alone, as the paper's text has it; never through the order. For an odd C the channel with the
  lowest score has no partner and is left out. Two channels whose scores differ by rounding only may swap places and
  move the value by about 1e-3 relative.

  Args:
    feature_map: (B, h, w, C) floating-point map, C >= 2.
    order: "response" (`channel_response`, the authors' code), "index" (the paper's text), or a function of
      (feature_map, axis_name) that gives (C,) scores.
    p: exponent; the paper and the code use 2.
    stop_gradient: the half that gets no gradient: "none" (the authors' code) or "top", the teacher (the paper's text).
    axis_name: mapped axis over which the batch is split, if any.

  Returns:
    Scalar.
  """
  _check_map(feature_map, "feature_map")
  channels = feature_map.shape[-1]
  if channels < 2:
    raise ValueError(f"internal feature distillation compares two halves of the channels; the map has C = {channels}")
  if _is_number(p) and p <= 0:
    raise ValueError(f"p must be positive, got {p}")
  if stop_gradient not in STOP_GRADIENTS:
    raise ValueError(f"unknown stop_gradient {stop_gradient!r}; expected one of {STOP_GRADIENTS}")
  if isinstance(order, str):
    if order not in _CHANNEL_SCORES:
      raise ValueError(f"unknown order {order!r}; expected one of {sorted(_CHANNEL_SCORES)} or a function")
    order = _CHANNEL_SCORES[order]
  feature_map = _at_least_float32(feature_map)
  scores = order(jax.lax.stop_gradient(feature_map), axis_name)
  ranking = jnp.argsort(-scores, stable=True)
  half = channels // 2
  top, bottom = ranking[:half], ranking[half : 2 * half]
  if stop_gradient == "top":
    difference = _channels(jax.lax.stop_gradient(feature_map), top) - _channels(feature_map, bottom)
  else:
    difference = _channel_difference(feature_map, top, bottom)
  powered = difference**2 if _is_number(p) and p == 2 else jnp.abs(difference) ** p
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


def final_map(features: Features) -> Array:
  """The method's teacher in SCR: the map just before the head, (B, H, W, C)."""
  return features.final


def deepest_decoder_map(features: Features) -> Array:
  """Another teacher for SCR: the last map of the decoder's deepest stage, (B, h, w, C)."""
  return features.decoder[0][-1]


def random_pairing(key: Array | None, student: Array, target: Array, axis_name: AxisName = None) -> Channels:
  """Draws min(C_s, C_t) channels of each map without replacement and pairs them at random.

  Only the pairing matters to a mean, so the map with fewer channels keeps its own order and an ordered subset is drawn
  from the other one: the same distribution as two independent draws, with one gather less.

  Args:
    key: PRNG key.
    student: (B, h, w, C_s), of which only the number of channels counts.
    target: (B, h, w, C_t), likewise.
    axis_name: unused; equal keys draw equal pairs on all devices.

  Returns:
    (indices into the student, indices into the target), each (min(C_s, C_t),).
  """
  del axis_name
  if key is None:
    raise ValueError("semantic consistency draws its channel pairs at random: give a key, or channels")
  student_channels, target_channels = student.shape[-1], target.shape[-1]
  count = min(student_channels, target_channels)
  drawn = jax.random.permutation(key, max(student_channels, target_channels))[:count]
  own_order = np.arange(count)  # of numpy, by which the loss sees that there is nothing to reorder
  return (drawn, own_order) if target_channels <= student_channels else (own_order, drawn)


def index_pairing(key: Array | None, student: Array, target: Array, axis_name: AxisName = None) -> Channels:
  """Pairs channel i with channel i, the same at every step: the first min(C_s, C_t) of each map in their own order.

  Args:
    key: unused.
    student: (B, h, w, C_s), of which only the number of channels counts.
    target: (B, h, w, C_t), likewise.
    axis_name: unused.

  Returns:
    (indices into the student, indices into the target), each (min(C_s, C_t),).
  """
  del key, axis_name
  own_order = np.arange(min(student.shape[-1], target.shape[-1]))
  return own_order, own_order


def cosine_pairing(key: Array | None, student: Array, target: Array, axis_name: AxisName = None) -> Channels:
  """Pairs min(C_s, C_t) channels so that the sum of their cosine similarities is the largest possible (assignment).

  A channel's vector is its map over all positions of the batch. Costs O(C_s C_t) memory and, in the worst case, cubic
  time in the number of channels, one step after another: the GPU has nothing to do in parallel there.

  Args:
    key: unused.
    student: (B, h, w, C_s), as large as the target; no gradient flows through the pairing.
    target: (B, h, w, C_t).
    axis_name: mapped axis over which the batch is split, if any: similarities are then over the global batch.

  Returns:
    (indices into the student, indices into the target), each (min(C_s, C_t),).
  """
  del key
  student, target = (_at_least_float32(jax.lax.stop_gradient(x)) for x in (student, target))
  highest = jax.lax.Precision.HIGHEST
  products = _sum_over_devices(jnp.einsum("bhws,bhwt->st", student, target, precision=highest), axis_name)
  squares = [_sum_over_devices(jnp.sum(x**2, axis=(0, 1, 2)), axis_name) for x in (student, target)]
  norms = [jnp.maximum(jnp.sqrt(square), _NORM_EPSILON) for square in squares]
  return assignment.hungarian_algorithm(-products / (norms[0][:, None] * norms[1]))


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
  paired channels, which the method pairs at random. No gradient flows to `final`.

  Args:
    feature_map: (B, h, w, C_s) floating-point map of any block.
    final: (B, H, W, C_t) map just before the head.
    key: PRNG key for the pairing; not needed when `channels` is given, or by a pairing without chance.
    channels: fixed pairs (indices into C_s, indices into C_t), equally long.
    pairing: function of (key, student, target, axis_name), the two maps at their common size and without gradients,
      that gives such pairs.
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
  p: float | Array = 2,
  stop_gradient: str = "none",
  teacher: Teacher = final_map,
  pairing: Pairing = random_pairing,
  pool: Pool = adaptive_average_pool,
  axis_name: AxisName = None,
) -> tuple[Array, dict[str, Array]]:
  """The method's two losses over all stages of a network.

  For each block position (one where every stage has one block; else the first and the last block of each stage):
  IFD_p = mean over encoder stages + mean over decoder stages, SCR_p = mean over all stages; the loss is
  scr_weight * sum SCR_p + ifd_weight * sum IFD_p. The teacher's map is pooled once per resolution.

  Args:
    features: maps of one forward pass.
    key: PRNG key of this step; every map draws its pairs from its own fold. May be None when `channels` is given, the
      pairing is not random, or `scr_weight` is 0.
    scr_weight: weight of SCR; the Python number 0 skips its computation and its terms.
    ifd_weight: weight of IFD, likewise.
    channels: fixed pairs for each map by name, such as {"encoder_1": (indices, indices), ...}.
    order: see `internal_feature_distillation`.
    p: see `internal_feature_distillation`.
    stop_gradient: see `internal_feature_distillation`.
    teacher: function of the features that gives the map (B, H, W, C) which supervises in SCR. A map never supervises
      itself: where the teacher is one of the encoder's or decoder's maps (the very array), it is left out of SCR and
      its means. The final map is never a student.
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
  target = teacher(features)
  students = {name: feature_map for name, feature_map in maps.items() if feature_map is not target}
  if channels is not None and set(channels) != set(students):
    raise ValueError(f"channels are given for {sorted(channels)}, but the maps are {sorted(students)}")
  terms: dict[str, Array] = {}
  loss = jnp.zeros((), jnp.promote_types(features.final.dtype, jnp.float32))

  if not _is_zero(scr_weight):
    sizes = {name: _common_size(feature_map, target) for name, feature_map in students.items()}
    targets = {size: _target(target, size, pool) for size in set(sizes.values())}
    for name, feature_map in students.items():
      pairs = None if channels is None else channels[name]
      map_key = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
      terms[f"scr/{name}"] = _consistency(feature_map, targets[sizes[name]], map_key, pairs, pairing, pool, axis_name)
    taught = [[name for name in position if name in students] for position in positions]
    terms["scr"] = sum(_mean([terms[f"scr/{name}"] for name in names]) for names in taught if names)
    loss += scr_weight * terms["scr"]

  if not _is_zero(ifd_weight):
    for name, feature_map in maps.items():
      terms[f"ifd/{name}"] = internal_feature_distillation(
        feature_map, order, p=p, stop_gradient=stop_gradient, axis_name=axis_name
      )
    sides = [[n for n in position if n.startswith(side)] for position in positions for side in ("encoder", "decoder")]
    terms["ifd"] = sum(_mean([terms[f"ifd/{name}"] for name in names]) for names in sides if names)
    loss += ifd_weight * terms["ifd"]
  return loss, terms


def deep_supervision(
  auxiliary: Sequence[Array], labels: Array, loss: Callable[[Array, Array], Array]
) -> tuple[Array, dict[str, Array]]:
  """Plain deep supervision: the base loss of a 1x1 head on each decoder stage, against smaller labels.

  Labels are brought to a head's size by nearest neighbours (pixel i of n takes pixel floor((i + 1/2) N / n) of N). As
  in nnU-Net (Isensee et al. 2021) a head's weight halves with each stage that it lies deeper: from the shallowest
  head, at half the image's size in a UNet, 1/2, 1/4, 1/8, ..., divided by their sum, so that the weights add up to 1.
  Unlike there the network's own head is not among them (its loss keeps the weight 1 and this one comes on top), and no
  head is left out.

  Args:
    auxiliary: logits (B, h, w, num_classes) of the heads from deep to shallow, as `Features.auxiliary`.
    labels: (B, H, W) integer class ids.
    loss: of (logits, labels at their size) -> scalar.

  Returns:
    (weighted mean, each head's own loss by the name of its stage: "decoder_1" is the deepest).

  Raises:
    ValueError: there are no heads.
  """
  if not auxiliary:
    raise ValueError("deep supervision needs heads on the decoder's stages: build the network with deep_supervision")
  terms = {}
  for stage, logits in enumerate(auxiliary, 1):
    rows, columns = (
      np.floor((np.arange(small) + 0.5) * large / small).astype(int)
      for small, large in zip(logits.shape[1:3], labels.shape[1:3], strict=True)
    )
    terms[f"decoder_{stage}"] = loss(logits, labels[:, rows[:, None], columns[None, :]])
  weights = 0.5 ** np.arange(len(auxiliary), 0, -1)
  weights /= weights.sum()
  return sum(float(weight) * term for weight, term in zip(weights, terms.values(), strict=True)), terms


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
    channels = pairing(key, jax.lax.stop_gradient(student), target, axis_name)
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
  return _is_number(weight) and weight == 0


def _is_number(value: float | Array) -> bool:
  """Whether it is known when the program is traced."""
  return isinstance(value, int | float)


def _mean(scalars: list[Array]) -> Array:
  return sum(scalars) / len(scalars)


def _sum_over_devices(value: Array, axis_name: AxisName) -> Array:
  return value if axis_name is None else jax.lax.psum(value, axis_name)


def _mean_over_devices(value: Array, axis_name: AxisName) -> Array:
  return value if axis_name is None else jax.lax.pmean(value, axis_name)
