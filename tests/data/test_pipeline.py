import dataclasses

import numpy as np
import pytest

from selfreg_jax.data import manifest as manifests
from selfreg_jax.data import pipeline
from selfreg_jax.data.prepare import PrepareOptions, prepare
from selfreg_jax.errors import UserError

from . import archives


@pytest.fixture(scope="module")
def dataset(prepared):
  return pipeline.SliceDataset(prepared, manifests.load(prepared))


def stream_of(dataset, seed=0, batch_size=4, **options):
  return pipeline.batches(dataset, pipeline.Sampling(batch_size, seed, **options))


def records(stream, steps):
  return [tuple(stream[step]["record"]) for step in range(steps)]


def test_records_are_the_slices_of_the_prepared_arrays(prepared, dataset):
  manifest = dataset.manifest
  assert len(dataset) == sum(manifest.cases[case_id].shape[0] for case_id in manifest.splits["train"])
  seen = set()
  for record in range(len(dataset)):
    case, index = dataset.locate(record)
    seen.add((case.id, index))
    rows, columns = case.shape[1:3]
    element = dataset.read(0, record)
    image, label = (
      np.load(prepared / case.image, allow_pickle=False),
      np.load(prepared / case.label, allow_pickle=False),
    )
    np.testing.assert_array_equal(element["image"][:rows, :columns], image[index])
    np.testing.assert_array_equal(element["label"][:rows, :columns], label[index])
    assert dataset.shapes[element["size_index"]] == (rows, columns)
    assert not element["image"][rows:].any()
    assert not element["image"][:, columns:].any()
    assert element["image"].shape == (36, 40, 1)
  assert len(seen) == len(dataset)


def test_an_epoch_holds_every_slice_once_in_an_order_of_its_own(dataset):
  stream = stream_of(dataset, batch_size=3)
  count = len(dataset)
  flat = np.concatenate([stream[step]["record"] for step in range(count)])  # three epochs
  epochs = flat.reshape(3, count)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
  assert not np.array_equal(epochs[0], epochs[1])


def test_the_order_follows_the_seed(dataset):
  assert records(stream_of(dataset, seed=1), 6) == records(stream_of(dataset, seed=1), 6)
  assert records(stream_of(dataset, seed=1), 6) != records(stream_of(dataset, seed=2), 6)


@pytest.mark.parametrize(("threads", "batch_size"), [(0, 4), (3, 4), (1, 1)])
def test_reading_from_a_step_on_equals_the_later_part_of_a_whole_run(dataset, threads, batch_size):
  stream = stream_of(dataset, batch_size=batch_size)
  whole = pipeline.iterate(stream, 0, threads=threads, prefetch=2)
  expected = [next(whole) for _ in range(8)][5:]
  resumed = pipeline.iterate(stream_of(dataset, batch_size=batch_size), 5, threads=threads, prefetch=2)
  for batch in expected:
    again = next(resumed)
    assert again.keys() == batch.keys()
    for name in batch:
      np.testing.assert_array_equal(again[name], batch[name])


def test_processes_share_each_global_batch(dataset):
  sampling = pipeline.Sampling(6, 0)
  parts = [pipeline.batches(dataset, sampling, process_index=i, process_count=3) for i in range(3)]
  whole = pipeline.batches(dataset, sampling)
  for step in (0, 4):
    for name in whole[step]:
      # One after another they are the whole batch: a slice's place decides what is drawn for it.
      np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), whole[step][name])
  with pytest.raises(UserError, match="3 processes"):
    pipeline.batches(dataset, pipeline.Sampling(4, 0), process_index=0, process_count=3)


def test_positions_number_the_stream(dataset):
  stream = stream_of(dataset)
  np.testing.assert_array_equal(stream[7]["position"], np.arange(28, 32))


def set_foreground(manifest, slices_of):
  for case_id, case in manifest.cases.items():
    manifest.cases[case_id] = dataclasses.replace(case, foreground_slices=slices_of(case_id))


def test_foreground_can_be_oversampled(prepared):
  manifest = manifests.load(prepared)
  # Only two slices of one case count as foreground here.
  case_id = manifest.splits["train"][1]
  set_foreground(manifest, lambda other: (1, 2) if other == case_id else ())
  dataset = pipeline.SliceDataset(prepared, manifest)
  located = [dataset.locate(record) for record in dataset.foreground_records()]
  assert [(case.id, index) for case, index in located] == [(case_id, 1), (case_id, 2)]

  def share(fraction):
    stream = stream_of(dataset, foreground_fraction=fraction)
    drawn = np.concatenate([stream[step]["record"] for step in range(50)])
    return np.isin(drawn, dataset.foreground_records()).mean()

  base = 2 / len(dataset)
  assert abs(share(0.0) - base) < 0.03
  assert abs(share(0.5) - (0.5 + 0.5 * base)) < 0.05
  assert share(1.0) == 1
  set_foreground(manifest, lambda other: ())
  with pytest.raises(UserError, match="foreground"):
    stream_of(pipeline.SliceDataset(prepared, manifest), foreground_fraction=0.5)


def test_an_empty_split_is_refused(prepared):
  manifest = manifests.load(prepared)
  manifest.splits["train"] = ()
  with pytest.raises(UserError, match="train split is empty"):
    pipeline.SliceDataset(prepared, manifest)


def test_colour_images_of_mixed_sizes_are_records_of_three_channels(tmp_path):
  archives.write_glas(tmp_path / "glas", train=5, test_a=0, test_b=0)
  made = prepare(
    PrepareOptions("glas", tmp_path / "out", tmp_path / "glas", val_cases=("train_1", "train_2"), workers=1)
  )
  dataset = pipeline.SliceDataset(tmp_path / "out", made)
  assert len(dataset) == 3
  assert dataset.shapes == [(12, 17), (13, 17), (14, 17)]
  batch = stream_of(dataset, batch_size=3)[0]
  assert batch["image"].shape == (3, 14, 17, 3)
  assert batch["image"].dtype == np.uint8
  for image, label, record in zip(batch["image"], batch["label"], batch["record"], strict=True):
    raw, mask = archives.tissue(int(dataset.locate(record)[0].id.removeprefix("train_")) - 1)
    np.testing.assert_array_equal(image[: raw.shape[0], : raw.shape[1]], raw)
    np.testing.assert_array_equal(label[: raw.shape[0], : raw.shape[1]], mask > 0)
