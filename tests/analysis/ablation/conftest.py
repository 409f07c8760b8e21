import pytest

from tests.analysis.ablation.trained import make_design, train


@pytest.fixture(scope="session")
def together(prepared, tmp_path_factory):
  """The design, the ablation's folder, and the folders of its runs; shared by tests that only look."""
  design, root = make_design(prepared), tmp_path_factory.mktemp("ablation")
  return design, root, train(design, root)
