import numpy as np
import pytest

from benchmarks import made_data
from selfreg_jax.data import manifest as manifests


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (3, np.uint8)])
def test_a_made_dataset_is_a_whole_prepared_one(tmp_path, channels, dtype):
  made_data.write_dataset(tmp_path, cases=2, count=6, shape=(20, 31), channels=channels)
  manifest = manifests.load(tmp_path, verify=True)
  image = manifests.CaseArrays(tmp_path).image(manifest.split("train")[0])
  assert image.shape == (6, 20, 31, channels)
  assert image.dtype == dtype
  assert 0.2 < image.max() * manifest.scale <= 1
  assert len(manifest.split("val")) == 1
