"""All measures of a trained network's blocks on the slices of a case, in one program for every batch."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from selfreg_jax import mesh as meshes
from selfreg_jax.analysis import alignment, grad_cam
from selfreg_jax.analysis.alignment import Probe
from selfreg_jax.analysis.redundancy import Moments, batch_moments, redundancy
from selfreg_jax.analysis.taps import TappedNetwork, in_order
from selfreg_jax.data import augment
from selfreg_jax.evaluation import protocols
from selfreg_jax.training.checkpoints import Trained

Array = jax.Array
Key = tuple[str, str, str]  # block, quantity, class
BlockMoments = dict[str, Moments]

ALL = "(all)"  # foreground classes as one
MEAN = "(mean)"  # over foreground classes
MASKS = ("truth", "prediction")


@dataclasses.dataclass(frozen=True)
class Block:
  """A tapped block.

  Attributes:
    name: as of `selfreg_jax.analysis.taps.named_maps`.
    size: (h, w) of its map.
    channels: of its map.
  """

  name: str
  size: tuple[int, int]
  channels: int


@struct.dataclass
class _BatchMeasures:
  """What the program gives for a batch; `B` slices, `K` = all foreground classes as one, then each.

  Attributes:
    moments: block -> joint moments of channels and classes' shares.
    inside: block -> (K, B), share of Grad-CAM's energy inside the class.
    lit: block -> (K, B), whether there is any energy.
    area: (K, B), share of the image that the class takes.
    overlap: block -> (3, classes) of the probe's answer.
    evidence: block -> (foreground classes, B, h, w).
    logits: (B, H, W, classes).
  """

  moments: BlockMoments
  inside: dict[str, Array]
  lit: dict[str, Array]
  area: Array
  overlap: dict[str, Array]
  evidence: dict[str, Array]
  logits: Array


@dataclasses.dataclass(frozen=True)
class CaseMeasures:
  """What was measured on a case.

  Attributes:
    values: (block, quantity, class) -> value, nan where it is undefined; see docs/analysis.md.
    moments: block -> joint moments of channels and classes' shares over the case.
  """

  values: dict[Key, float]
  moments: BlockMoments


@dataclasses.dataclass(frozen=True)
class Example:
  """A slice as the network sees it, and what its blocks look at.

  Attributes:
    image: (n, n, channels).
    truth: (n, n) class ids.
    prediction: (n, n) class ids.
    heatmaps: block -> (n, n) in [0, 1], Grad-CAM of the class that is shown.
  """

  image: np.ndarray
  truth: np.ndarray
  prediction: np.ndarray
  heatmaps: dict[str, np.ndarray]


class Measurer:
  """Measures a trained network, batch by batch, in programs of one shape.

  Attributes:
    blocks: of the network, in its order.
  """

  def __init__(self, trained: Trained, *, batch_size: int, masks: str = "truth"):
    """Prepares a network.

    Args:
      trained: as a checkpoint holds it.
      batch_size: slices of a batch; rounded up to a multiple of the devices.
      masks: where the logits of a class are summed for Grad-CAM: "truth" or "prediction".
    """
    if masks not in MASKS:
      raise ValueError(f"masks must be one of {', '.join(MASKS)}, got {masks!r}")
    self._trained = trained
    self._size = trained.config.data.image_size
    self._classes = trained.dataset.classes
    self._masks = masks
    self._mesh = trained.mesh
    self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
    self._network = TappedNetwork.of(trained.model)
    self.blocks = self._find_blocks()
    self._resize = meshes.jit_for(self._mesh, _resize)
    self._moments = meshes.jit_for(self._mesh, self._measure_moments)
    self._everything = meshes.jit_for(self._mesh, self._measure_everything)
    self._heatmaps = meshes.jit_for(self._mesh, lambda evidence: grad_cam.heatmap(evidence, (self._size, self._size)))

  def _find_blocks(self) -> list[Block]:
    images = jax.ShapeDtypeStruct((1, self._size, self._size, self._trained.dataset.channels), jnp.float32)
    _, outputs = jax.eval_shape(self._network, self._trained.variables, images)
    maps = self._network.maps(outputs)
    return [Block(name, maps[name].shape[1:3], maps[name].shape[3]) for name in in_order(maps)]

  def no_moments(self) -> BlockMoments:
    """Those of no slices, to which others are added."""
    return {block.name: Moments.zero(block.channels + len(self._classes)) for block in self.blocks}

  def moments(self, image: np.ndarray, labels: np.ndarray, slices: Sequence[int], *, scale: float) -> BlockMoments:
    """Joint moments of channels and classes' shares over slices of a case, to fit probes to.

    Args:
      image: (S, rows, columns, channels) as stored.
      labels: (S, rows, columns) class ids.
      slices: indices of those that count.
      scale: stored values * scale = network input.

    Returns:
      Block -> moments.
    """
    parts = [
      jax.device_get(self._moments(self._trained.variables, *batch))
      for batch in self._batches(image, labels, slices, scale)
    ]
    return merged(parts)

  def measure(
    self, image: np.ndarray, labels: np.ndarray, slices: Sequence[int], probes: Mapping[str, Probe], *, scale: float
  ) -> CaseMeasures:
    """Measures slices of a case.

    Args:
      image: see `moments`, as for the next two.
      labels: class ids.
      slices: at least one.
      probes: block -> probe, fitted to other cases.
      scale: see `moments`.

    Returns:
      The measures.
    """
    on_device = _single_precision(probes)
    parts, valid = [], []
    for batch in self._batches(image, labels, slices, scale):
      result = self._everything(self._trained.variables, *batch, on_device)
      parts.append(jax.device_get(dataclasses.replace(result, evidence={}, logits=None)))
      valid.append(np.asarray(batch[2]) > 0)
    return self._of_case(parts, valid, probes)

  def explain(
    self, image: np.ndarray, labels: np.ndarray, index: int, probes: Mapping[str, Probe], show: str, *, scale: float
  ) -> Example:
    """Grad-CAM of one slice, to be looked at.

    Args:
      image: see `moments`, as for the next one.
      labels: class ids.
      index: of the slice.
      probes: as in `measure`, whose program this is.
      show: name of a class, or `ALL`.
      scale: see `moments`.

    Returns:
      The slice and its heat maps.
    """
    ((images, truth, valid),) = self._batches(image, labels, [index], scale)
    result = self._everything(self._trained.variables, images, truth, valid, _single_precision(probes))
    heatmaps = {}
    for name, evidence in result.evidence.items():
      of_classes = evidence[:, 0]
      chosen = of_classes.sum(axis=0) if show == ALL else of_classes[self._classes.index(show) - 1]
      heatmaps[name] = np.asarray(self._heatmaps(chosen))
    prediction = np.asarray(jnp.argmax(result.logits[0], axis=-1))
    return Example(np.asarray(images[0]), np.asarray(truth[0]), prediction, heatmaps)

  def _batches(
    self, image: np.ndarray, labels: np.ndarray, slices: Sequence[int], scale: float
  ) -> Iterator[tuple[Array, Array, Array]]:
    """Batches of one shape as the network sees them: images, class ids, and (B,) 1 for slices and 0 for padding."""
    tables = augment.ResizeTables.build([image.shape[1:3]], self._size)
    tables = jax.device_put(tables, meshes.replicated(self._mesh))
    for start in range(0, len(slices), self._batch_size):
      chosen = list(slices[start : start + self._batch_size])
      missing = self._batch_size - len(chosen)
      batch = {
        "image": np.pad(image[chosen], [(0, missing)] + [(0, 0)] * 3),
        "label": np.pad(labels[chosen], [(0, missing)] + [(0, 0)] * 2),
        "valid": np.arange(self._batch_size) < len(chosen),
      }
      yield self._resize(meshes.place_batch(batch, self._mesh), scale, tables)

  def _measure_moments(self, variables: Any, images: Array, labels: Array, valid: Array) -> BlockMoments:
    _, outputs = self._network(variables, images)
    maps = self._network.maps(outputs)
    return {name: self._joint_moments(maps[name], labels, valid) for name in maps}

  def _joint_moments(self, feature_map: Array, labels: Array, valid: Array) -> Moments:
    size = feature_map.shape[1:3]
    fractions = alignment.class_fractions(labels, len(self._classes), size)
    weights = jnp.broadcast_to(valid[:, None, None], (len(valid), *size))
    return batch_moments(jnp.concatenate([feature_map.astype(jnp.float32), fractions], axis=-1), weights)

  def _measure_everything(
    self, variables: Any, images: Array, labels: Array, valid: Array, probes: dict[str, Probe]
  ) -> _BatchMeasures:
    num_classes = len(self._classes)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    found = grad_cam.grad_cam(self._network, variables, images, one_hot if self._masks == "truth" else None)
    foreground = (labels > 0)[..., None].astype(jnp.float32)
    regions = jnp.moveaxis(jnp.concatenate([foreground, one_hot[..., 1:]], axis=-1), -1, 0)  # (K, B, n, n)
    inside, lit, overlap, moments = {}, {}, {}, {}
    for name, feature_map in found.maps.items():
      evidence = found.evidence[name]
      evidence = jnp.concatenate([evidence.sum(axis=0, keepdims=True), evidence])
      # One class after another: heat maps have the size of the image.
      inside[name], lit[name] = jax.lax.map(lambda pair: alignment.energy_inside(*pair), (evidence, regions))
      fractions = alignment.class_fractions(labels, num_classes, feature_map.shape[1:3])
      overlap[name] = alignment.overlap_counts(probes[name], feature_map, fractions, valid)
      moments[name] = self._joint_moments(feature_map, labels, valid)
    area = regions.mean(axis=(-2, -1))
    return _BatchMeasures(moments, inside, lit, area, overlap, found.evidence, found.logits)

  def _of_case(
    self, parts: Sequence[_BatchMeasures], valid: Sequence[np.ndarray], probes: Mapping[str, Probe]
  ) -> CaseMeasures:
    def slices(arrays: Sequence[np.ndarray]) -> np.ndarray:
      """(K, slices) of (K, B) of each batch, without padding."""
      return np.concatenate([array[:, keep] for array, keep in zip(arrays, valid, strict=True)], axis=1)

    values: dict[Key, float] = {}
    moments = merged([part.moments for part in parts])
    area = slices([part.area for part in parts])
    present = area > 0
    names = (ALL, *self._classes[1:])
    for name, share in zip(names, _mean_where(area, present), strict=True):
      values["", "class_area", name] = float(share)
    for block in self.blocks:
      values |= block_values(block, moments[block.name], probes[block.name], self._classes)
      inside, lit = (slices([getattr(part, field)[block.name] for part in parts]) for field in ("inside", "lit"))
      shares, dark = _mean_where(inside, present & lit), _mean_where(~lit, present)
      counts = np.sum([part.overlap[block.name] for part in parts], axis=0)
      dice = alignment.dice_of_counts(counts)
      for index, name in enumerate(names):
        values[block.name, "cam_inside", name] = float(shares[index])
        values[block.name, "cam_empty", name] = float(dark[index])
      for name, value in _with_mean(dice, self._classes).items():
        values[block.name, "probe_dice", name] = value
    return CaseMeasures(values, moments)


def block_values(block: Block, moments: Moments, probe: Probe, classes: Sequence[str]) -> dict[Key, float]:
  """What a block's joint moments say: redundancy of its channels, and the probe's explained variance."""
  found = redundancy(moments.select(slice(0, block.channels)))
  explained = alignment.explained_variance(probe, moments)
  return {
    (block.name, "mean_abs_correlation", ""): found.mean_abs_correlation,
    (block.name, "effective_rank", ""): found.effective_rank,
    (block.name, "constant_channels", ""): float(found.constant),
  } | {(block.name, "probe_r2", name): value for name, value in _with_mean(explained, classes).items()}


def fit_probes(blocks: Sequence[Block], moments: BlockMoments, num_classes: int) -> dict[str, Probe]:
  """Probes of all blocks from their joint moments over training cases."""
  return {block.name: alignment.fit_probe(moments[block.name], num_classes) for block in blocks}


def merged(parts: Sequence[BlockMoments]) -> BlockMoments:
  """Moments of several batches or cases together, block by block."""
  return {
    name: functools.reduce(Moments.merge, (part[name] for part in parts), Moments.zero(len(first.mean)))
    for name, first in parts[0].items()
  }


def _single_precision(probes: Mapping[str, Probe]) -> dict[str, Probe]:
  return jax.tree.map(np.float32, dict(probes))


def _resize(batch: dict[str, Array], scale: Array, tables: augment.ResizeTables) -> tuple[Array, Array, Array]:
  size_index = jnp.zeros(len(batch["valid"]), jnp.int32)
  images = augment.resize_images(batch["image"].astype(jnp.float32) * scale, size_index, tables)
  labels = augment.resize_labels(batch["label"].astype(jnp.int32), size_index, tables)
  return images, labels, batch["valid"].astype(jnp.float32)


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
  """Means over the last axis of what counts; nan where nothing does."""
  return protocols.mean_scored(np.where(where, values, np.nan), axis=-1)


def _with_mean(values: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
  """Values by class, and their mean over the foreground classes that have one."""
  mean = protocols.mean_scored(values[1:], axis=0)
  return {MEAN: float(mean)} | dict(zip(classes, map(float, values), strict=True))
