"""Prepared slices to batches with Grain: shuffled from a seed, sharded by process, bytes only.

The stream is a function of (dataset, seed, position): the batch of any step can be rebuilt at random access, so the
position of a run in its data is nothing but its step.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator

import grain
import numpy as np

from selfreg_jax.data.manifest import Case, CaseArrays, Manifest
from selfreg_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Length of the "endless" stream: Grain's own endless repetition overflows when it is cut into small batches.
_POSITIONS = 1 << 40


class SliceDataset:
  """The slices of one split as records, numbered case by case.

  Attributes:
    manifest: of the prepared dataset.
    shapes: the distinct native (rows, columns) of the split, sorted; a record carries its place in this list.
  """

  def __init__(self, directory: str | os.PathLike, manifest: Manifest, split: str = "train"):
    cases = manifest.split(split)
    if not cases:
      raise UserError(f"{directory}: the {split} split is empty; prepare the dataset with cases in it")
    self.manifest = manifest
    self.shapes = sorted({case.shape[1:3] for case in cases})
    self._arrays = CaseArrays(directory)
    self._cases = cases
    self._first = np.cumsum([0, *(case.shape[0] for case in cases)])
    self._padded = tuple(max(shape[axis] for shape in self.shapes) for axis in (0, 1))

  def __len__(self) -> int:
    return int(self._first[-1])

  def locate(self, record: int) -> tuple[Case, int]:
    """The case and the slice index behind a record number."""
    index = int(np.searchsorted(self._first, record, side="right")) - 1
    return self._cases[index], int(record - self._first[index])

  def foreground_records(self) -> np.ndarray:
    """Numbers of the records that hold any class besides the background."""
    return np.concatenate(
      [first + np.asarray(case.foreground_slices, int) for first, case in zip(self._first, self._cases, strict=False)]
    )

  def read(self, position: int, record: int) -> Batch:
    """One slice, padded with zeros to the split's largest size.

    Args:
      position: place in the endless stream of the run, the seed of the slice's augmentation.
      record: number of the record.

    Returns:
      image (max_rows, max_columns, channels) stored dtype, label (max_rows, max_columns) uint8, size_index, position
      and record as scalars.
    """
    case, slice_index = self.locate(record)
    rows, columns = case.shape[1:3]
    return {
      "image": self._pad(np.asarray(self._arrays.image(case)[slice_index])),
      "label": self._pad(np.asarray(self._arrays.label(case)[slice_index])),
      "size_index": np.int32(self.shapes.index((rows, columns))),
      "position": np.uint32(position % 2**32),
      "record": np.int32(record),
    }

  def _pad(self, array: np.ndarray) -> np.ndarray:
    """Zeros after the rows and columns of a slice; one that needs none stays what the map holds, not copied here."""
    rows, columns = array.shape[:2]
    if (rows, columns) == self._padded:
      return array
    padded = np.zeros((*self._padded, *array.shape[2:]), array.dtype)
    padded[:rows, :columns] = array
    return padded


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the endless stream of training slices is drawn.

  Attributes:
    batch_size: slices of a global batch.
    seed: of the shuffles.
    foreground_fraction: share of positions that draw among slices with foreground only; 0 draws every slice once an
      epoch.
  """

  batch_size: int
  seed: int
  foreground_fraction: float = 0.0


def records(dataset: SliceDataset, sampling: Sampling) -> grain.MapDataset:
  """The endless, random-access sequence of record numbers that a run's positions draw; no slice is read.

  Args:
    dataset: slices to draw from.
    sampling: how to draw.

  Returns:
    A `grain.MapDataset` of integers.

  Raises:
    UserError: foreground sampling without foreground.
  """
  every = _endless(grain.MapDataset.range(len(dataset)), sampling.seed)
  if sampling.foreground_fraction == 0:
    return every
  foreground = dataset.foreground_records()
  if not len(foreground):
    raise UserError("data.foreground_fraction > 0, but no training slice holds any class besides the background")
  foreground_stream = _endless(grain.MapDataset.source(foreground), sampling.seed + 1)
  streams = [(every, 1 - sampling.foreground_fraction), (foreground_stream, sampling.foreground_fraction)]
  kept = [(stream, weight) for stream, weight in streams if weight > 0]
  return grain.MapDataset.mix([stream for stream, _ in kept], [weight for _, weight in kept])


def batches(
  dataset: SliceDataset, sampling: Sampling, *, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
  """The endless, random-access sequence of this process's part of every global batch.

  Args:
    dataset: slices to draw from.
    sampling: how to draw.
    process_index: this process.
    process_count: processes that share each global batch; must divide the batch size.

  Returns:
    A `grain.MapDataset` whose element i is the local part of step i's batch: the stacked fields of `SliceDataset.read`.

  Raises:
    UserError: a batch size that the processes do not divide, or foreground sampling without foreground.
  """
  if sampling.batch_size % process_count:
    raise UserError(
      f"data.batch_size = {sampling.batch_size} cannot be divided among {process_count} processes; use a multiple"
    )
  slices = records(dataset, sampling).map_with_index(functools.partial(_read, dataset))
  if process_count > 1:
    slices = grain.MapDataset.source(_ProcessPart(slices, sampling.batch_size, process_index, process_count))
  return slices.batch(sampling.batch_size // process_count)


class _ProcessPart:
  """One process's share of a stream: a contiguous block of every global batch.

  Contiguous, because the global array is the processes' parts one after another: every slice then has the place in the
  batch that it has with one process, and whatever is drawn by place (dropout, drop path) is the same too.
  """

  def __init__(self, slices: grain.MapDataset, batch_size: int, process_index: int, process_count: int):
    self._slices = slices
    self._batch_size = batch_size
    self._size = batch_size // process_count
    self._first = process_index * self._size
    self._process_count = process_count

  def __len__(self) -> int:
    return len(self._slices) // self._batch_size * self._size

  def __getitem__(self, place: int) -> Batch:
    step, offset = divmod(place, self._size)
    return self._slices[step * self._batch_size + self._first + offset]


def _endless(records: grain.MapDataset, seed: int) -> grain.MapDataset:
  """Epoch after epoch, each shuffled anew."""
  return records.seed(seed).shuffle().repeat(_POSITIONS // len(records))


def _read(dataset: SliceDataset, position: int, record: int) -> Batch:
  return dataset.read(position, int(record))


def iterate(stream: grain.MapDataset, start_step: int, *, threads: int, prefetch: int) -> Iterator[Batch]:
  """Reads a stream of batches ahead in threads, from a step on.

  Args:
    stream: from `batches`.
    start_step: the first batch to give; that of a fresh run is 0.
    threads: reading threads (NumPy releases the GIL while it copies from the maps); 0 reads in the caller's thread.
    prefetch: batches to hold ready.

  Returns:
    An iterator over batches.
  """
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
  return iter(stream[start_step:].to_iter_dataset(options))
