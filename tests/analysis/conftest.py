import pytest

from tests.analysis.made_up import write_random_run


@pytest.fixture(scope="session")
def runs(prepared, tmp_path_factory):
  """Two runs of the same narrow UNet with other weights, and one of a Swin-Unet, none of them trained."""
  folder = tmp_path_factory.mktemp("analysed")
  for name, seed in (("one", 0), ("two", 1)):
    write_random_run(prepared, folder / name, seed=seed)
  write_random_run(prepared, folder / "swin", network="swin_unet")
  return folder
