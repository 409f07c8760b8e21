import time

import numpy as np
import pytest

from benchmarks import input_pipeline, made_data
from benchmarks.measuring import NotComparableError
from selfreg_jax.data import pipeline


def written(tmp_path, channels):
  for folder in ("data", "slices"):
    (tmp_path / folder).mkdir()
  manifest = made_data.write_dataset(tmp_path / "data", cases=2, count=8, shape=(40, 52), channels=channels)
  return manifest, input_pipeline.write_slices(tmp_path / "data", manifest, str(tmp_path / "slices"))


def test_the_other_side_reads_the_same_training_slices(tmp_path):
  manifest, files = written(tmp_path, 1)
  assert len(files) == 8
  stored = np.load(tmp_path / "data" / manifest.cases["000"].image)
  for number, file in enumerate(files):
    np.testing.assert_allclose(np.load(file)["image"], stored[number, ..., 0] / 65535, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_sides_augment_alike(tmp_path, channels):
  pytest.importorskip("torch")
  _, files = written(tmp_path, channels)
  input_pipeline.require_equal_slices("slices", files, size=24)


def test_slices_that_differ_are_noticed(tmp_path, monkeypatch):
  torch_data = pytest.importorskip("benchmarks.torch_data")
  _, files = written(tmp_path, 1)
  resize = torch_data.resize
  monkeypatch.setattr(torch_data, "resize", lambda image, label, size: resize(image + 0.01, label, size))
  with pytest.raises(NotComparableError, match="slices"):
    input_pipeline.require_equal_slices("slices", files, size=24)


def test_a_reader_that_is_too_slow_is_seen_in_the_share_of_waiting(monkeypatch):
  read = pipeline.SliceDataset.read

  def slow(self, position, record):
    time.sleep(0.1)
    return read(self, position, record)

  monkeypatch.setattr(pipeline.SliceDataset, "read", slow)
  row = input_pipeline.waiting_share(short=True)
  assert row.ours > 5 * row.target
