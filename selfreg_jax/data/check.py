"""Looks a prepared dataset over: is it whole, what is in it, and what about it is suspicious.

Damage is a `UserError` that lists every fault. Suspicions are no faults: a dataset may rightly hold a case without any
organ, but somebody should have looked at it. `check_page` turns what is found here into text and HTML.

Arrays are read through memory maps in blocks, so that the largest volume needs no more memory than the smallest.
"""

import collections
import dataclasses
import filecmp
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from selfreg_jax.data import splits
from selfreg_jax.data.datasets import listed
from selfreg_jax.data.manifest import SPLITS, Case, CaseArrays, Manifest
from selfreg_jax.errors import UserError

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)

# From where on a thing is worth a look.
ONE_SIDED = 0.95  # share of voxels at one value that is a case's smallest or largest
FULL_LABEL = 0.95  # share of foreground
SPACING_FACTOR = 3.0  # off the median of the dataset
SIZE_FACTOR = 2.0  # the same for rows and columns
SLICES_FACTOR = 4.0  # volumes cover more or less of the body

_BINS = 1 << 16
_BLOCK = 1 << 22  # pixels that are read at a time


@dataclasses.dataclass(frozen=True)
class ChannelFacts:
  """The intensities of one channel, as networks see them.

  Attributes:
    percentiles: the values at `PERCENTILES`.
    mean: over all voxels.
    deviation: likewise.
    ends: the shares of voxels that have the smallest and the largest value.
  """

  percentiles: tuple[float, ...]
  mean: float
  deviation: float
  ends: tuple[float, float]

  @property
  def constant(self) -> bool:
    """Whether all voxels have one value."""
    return self.ends == (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class CaseFacts:
  """What reading a case brings up.

  Attributes:
    channels: the intensities of each channel.
    repeated_slices: slices that equal the one before them bit by bit and are not constant.
  """

  channels: tuple[ChannelFacts, ...]
  repeated_slices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Suspicion:
  """Something that may be a mistake.

  Attributes:
    what: in one line.
    cases: the cases that it is about, each with a detail or ""; empty if it is about the dataset as a whole.
  """

  what: str
  cases: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    names = [f"{case_id} ({detail})" if detail else case_id for case_id, detail in self.cases.items()]
    return f"{self.what}: {listed(names)}" if names else self.what


@dataclasses.dataclass(frozen=True)
class Checkup:
  """What looking a dataset over has brought up.

  Attributes:
    made: the dataset's manifest.
    where: what was checked, for headings.
    size: bytes of the arrays.
    channels: intensities over all cases, by channel.
    cases: facts by case id.
    suspicions: what may be a mistake.
  """

  made: Manifest
  where: str
  size: int
  channels: tuple[ChannelFacts, ...]
  cases: Mapping[str, CaseFacts]
  suspicions: tuple[Suspicion, ...]


def examine(made: Manifest, directory: str | os.PathLike, *, where: str) -> Checkup:
  """Reads every array of a prepared dataset once.

  Args:
    made: the manifest, as `manifest.load` gave it.
    directory: the dataset's folder.
    where: what the dataset should be called in what is printed.

  Returns:
    What was found.

  Raises:
    UserError: the manifest contradicts itself or the label arrays; every fault is named.
  """
  _raise_faults(where, _inconsistencies(made))
  directory = pathlib.Path(directory)
  scale = _Scale.of(made, directory)
  totals = np.zeros((made.channels, _BINS), np.int64)
  facts, faults = {}, []
  for case in made.cases.values():
    arrays = CaseArrays(directory)
    counts, repeated = _read_image(arrays.image(case), scale)
    totals += counts
    facts[case.id] = CaseFacts(tuple(scale.describe(channel) for channel in counts), repeated)
    faults += _label_faults(made, case, arrays.label(case))
  _raise_faults(where, faults)
  return Checkup(
    made=made,
    where=where,
    size=sum((directory / name).stat().st_size for case in made.cases.values() for name in (case.image, case.label)),
    channels=tuple(scale.describe(channel) for channel in totals),
    cases=facts,
    suspicions=(
      *_duplicates(made, directory),
      *_odd_labels(made),
      *_odd_intensities(facts),
      *_odd_geometry(made),
      *_missing_classes(made),
      *(Suspicion(note) for note in splits.notes_on_test(made.splits, _groups(made))),
    ),
  )


def _raise_faults(where: str, faults: Sequence[str]) -> None:
  if faults:
    raise UserError(f"{where}: {len(faults)} fault(s); prepare the dataset again:\n  " + "\n  ".join(faults))


def _groups(made: Manifest) -> dict[str, str]:
  return {case.id: case.group for case in made.cases.values()}


def _inconsistencies(made: Manifest) -> list[str]:
  """Where the parts of a manifest contradict each other; its checksums cannot tell."""
  faults = [] if made.cases else ["manifest.json: names no case"]
  parts = [("splits", [made.splits.get(name, ()) for name in SPLITS], tuple(made.cases))]
  if made.folds:
    parts.append(("folds", made.folds, made.splits.get("train", ())))
  for what, dealt, ids in parts:
    if sorted(itertools.chain.from_iterable(dealt)) != sorted(ids):
      faults.append(f"manifest.json: the {what} do not hold each case once")
  for case in made.cases.values():
    if len(case.shape) != 4 or case.shape[3] != made.channels or len(case.class_voxels) != made.num_classes:
      faults.append(f"manifest.json: {case.id}: not {made.channels} channel(s) and {made.num_classes} classes")
  return faults


def _label_faults(made: Manifest, case: Case, label: np.ndarray) -> list[str]:
  counts = np.zeros(256, np.int64)
  foreground = []
  for index, blocks in enumerate(_slices(label)):
    of_slice = sum(np.bincount(block.ravel(), minlength=256) for block in blocks)
    counts += of_slice
    if of_slice[1:].any():
      foreground.append(index)
  if counts[made.num_classes :].any():
    strange = np.flatnonzero(counts[made.num_classes :]) + made.num_classes
    return [f"{case.label}: class ids {listed(map(str, strange))} of {made.num_classes} classes"]
  if counts[: made.num_classes].tolist() != list(case.class_voxels) or foreground != list(case.foreground_slices):
    return [f"{case.label}: holds other classes than the manifest says"]
  return []


def _slices(array: np.ndarray) -> Iterator[Iterator[np.ndarray]]:
  """For each slice, its blocks of rows in memory."""
  rows = max(1, _BLOCK // array.shape[2])
  for index in range(array.shape[0]):
    yield (np.array(array[index, start : start + rows], order="C") for start in range(0, array.shape[1], rows))


@dataclasses.dataclass(frozen=True)
class _Scale:
  """How stored values fall into the bins of a histogram, and what a bin means to a network.

  Attributes:
    low: stored value of bin 0.
    step: between bins, in stored values; 1 for integers, whose histograms are exact.
    scale: stored value * scale = network input.
  """

  low: float
  step: float
  scale: float

  @classmethod
  def of(cls, made: Manifest, directory: pathlib.Path) -> "_Scale":
    """Integers have a bin each; floats share them out between the extremes of the dataset."""
    if made.dtype != "float32":
      return cls(0.0, 1.0, made.scale)
    low, high = np.inf, -np.inf
    for case in made.cases.values():
      for block in itertools.chain.from_iterable(_slices(CaseArrays(directory).image(case))):
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return cls(low, (high - low) / (_BINS - 1) or 1.0, made.scale)

  def bins(self, stored: np.ndarray) -> np.ndarray:
    if stored.dtype.kind == "u":
      return stored
    return np.rint((stored.astype(np.float64) - self.low) / self.step).astype(np.uint16)

  def describe(self, counts: np.ndarray) -> ChannelFacts:
    """The facts about a channel from its (bins,) histogram; percentiles are values that occur."""
    filled = np.flatnonzero(counts)
    values = (self.low + self.step * filled) * self.scale
    shares = counts[filled] / counts.sum()
    at = np.searchsorted(np.cumsum(counts[filled]), np.array(PERCENTILES) / 100 * counts.sum())
    mean = float(shares @ values)
    deviation = float(np.sqrt(shares @ (values - mean) ** 2))
    return ChannelFacts(tuple(values[at].tolist()), mean, deviation, (float(shares[0]), float(shares[-1])))


def _read_image(image: np.ndarray, scale: _Scale) -> tuple[np.ndarray, tuple[int, ...]]:
  """(channels, bins) histogram of an image (slices, rows, columns, channels), and the slices that repeat the last."""
  counts = np.zeros((image.shape[3], _BINS), np.int64)
  repeated, before = [], None
  for index, blocks in enumerate(_slices(image)):
    crc, low, high = 0, np.inf, -np.inf
    for block in blocks:
      for channel, of_channel in enumerate(counts):
        found = np.bincount(scale.bins(block[..., channel]).ravel())
        of_channel[: len(found)] += found
      crc, low, high = zlib.crc32(block, crc), min(low, block.min()), max(high, block.max())
    if crc == before and low < high:
      repeated.append(index)
    before = crc
  return counts, tuple(repeated)


def _duplicates(made: Manifest, directory: pathlib.Path) -> Iterator[Suspicion]:
  """Cases with one image, and cases with one label that is not empty although their images differ."""
  homes = {case_id: name for name in SPLITS for case_id in made.splits[name]}
  of_image = {}
  for twins in _equal_files(made, directory, "image"):
    of_image |= dict.fromkeys((case.id for case in twins), twins[0].id)
    yield Suspicion("one image is in several cases", {case.id: homes[case.id] for case in twins})
  for twins in _equal_files(made, directory, "label"):
    if sum(twins[0].class_voxels[1:]) and len({of_image.get(case.id, case.id) for case in twins}) > 1:
      yield Suspicion("one label belongs to several images", {case.id: homes[case.id] for case in twins})


def _equal_files(made: Manifest, directory: pathlib.Path, kind: str) -> Iterator[list[Case]]:
  by_checksum = collections.defaultdict(list)
  for case in made.cases.values():
    by_checksum[case.checksums[kind]].append(case)
  for candidates in by_checksum.values():
    first = directory / getattr(candidates[0], kind)
    # Among thousands of files two checksums may agree by chance.
    twins = [case for case in candidates[1:] if filecmp.cmp(first, directory / getattr(case, kind), shallow=False)]
    if twins:
      yield [candidates[0], *twins]


def _odd_labels(made: Manifest) -> Iterator[Suspicion]:
  shares = {case.id: sum(case.class_voxels[1:]) / sum(case.class_voxels) for case in made.cases.values()}
  if empty := [case_id for case_id, share in shares.items() if share == 0]:
    yield Suspicion("the label is empty", dict.fromkeys(empty, ""))
  if full := {case_id: f"{share:.1%}" for case_id, share in shares.items() if share > FULL_LABEL}:
    yield Suspicion(f"the label covers more than {FULL_LABEL:.0%}", full)


def _odd_intensities(facts: Mapping[str, CaseFacts]) -> Iterator[Suspicion]:
  constant, one_sided, repeated = {}, {}, {}
  for case_id, case in facts.items():
    if channels := [str(index) for index, channel in enumerate(case.channels) if channel.constant]:
      constant[case_id] = f"channel {', '.join(channels)}"
    ends = [end for channel in case.channels if not channel.constant for end in channel.ends]
    if (most := max(ends, default=0)) > ONE_SIDED:
      one_sided[case_id] = f"{most:.1%} at the {('smallest', 'largest')[ends.index(most) % 2]} value"
    if case.repeated_slices:
      repeated[case_id] = f"slice {listed(map(str, case.repeated_slices), limit=4)}"
  if constant:
    yield Suspicion("a channel is constant", constant)
  if one_sided:
    yield Suspicion("the intensities lie mostly at one end (wrong window, wrong units?)", one_sided)
  if repeated:
    yield Suspicion("slices repeat the one before them", repeated)


def _odd_geometry(made: Manifest) -> Iterator[Suspicion]:
  all_cases = list(made.cases.values())
  spacings = {case.id: case.spacing for case in all_cases}
  median = np.median(list(spacings.values()), axis=0)
  odd = _far_off(spacings, median, np.full(3, SPACING_FACTOR))
  odd |= {case_id: by(spacing) for case_id, spacing in spacings.items() if spacing == (1, 1, 1) != tuple(median)}
  if odd:
    yield Suspicion(f"the spacing is unusual (median {by(median)} {made.unit})", odd)
  shapes = {case.id: case.shape[:3] for case in all_cases}
  median = np.median(list(shapes.values()), axis=0)
  if odd := _far_off(shapes, median, np.array([SLICES_FACTOR, SIZE_FACTOR, SIZE_FACTOR])):
    yield Suspicion(f"the size is unusual (median {by(median)})", odd)


def _far_off(triples: Mapping[str, Sequence[float]], median: np.ndarray, factor: np.ndarray) -> dict[str, str]:
  ratios = {case_id: np.divide(triple, median) for case_id, triple in triples.items()}
  return {
    case_id: by(triples[case_id])
    for case_id, ratio in ratios.items()
    if ((ratio > factor) | (ratio < 1 / factor)).any()
  }


def _missing_classes(made: Manifest) -> Iterator[Suspicion]:
  everywhere = cases_with_classes(made, tuple(made.cases))
  for class_id, name in enumerate(made.classes):
    if not everywhere[class_id]:
      yield Suspicion(f"no case holds class {class_id}, {name}")
  for part, ids in parts_of(made).items():
    counts = cases_with_classes(made, ids)
    if absent := [made.classes[index] for index, count in enumerate(counts) if everywhere[index] and not count]:
      yield Suspicion(f"no case of {part} holds {listed(absent)}")


def parts_of(made: Manifest) -> dict[str, tuple[str, ...]]:
  """The splits that are not empty, and the folds."""
  parts = {name: made.splits[name] for name in SPLITS if made.splits[name]}
  return parts | {f"fold {index}": fold for index, fold in enumerate(made.folds)}


def cases_with_classes(made: Manifest, ids: Sequence[str]) -> list[int]:
  """For each class, how many of the cases hold it."""
  return (np.array([made.cases[case_id].class_voxels for case_id in ids]) > 0).sum(axis=0).tolist()


def by(triple: Sequence[float]) -> str:
  """Sizes as they are read: "5 x 0.8 x 0.8"."""
  return " x ".join(f"{value:.4g}" for value in triple)
