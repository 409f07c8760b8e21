"""Hundreds of damaged and hostile files through `prepare`, `eval.py --input` and the loading of prepared datasets.

Each ends in success or in one error that names the file, within 30 seconds of the processor and 4 GiB; run by
path, with -s for the table. FUZZ_ROUNDS=10 takes ten times as many.
"""

import itertools
import os

import pytest

from tests.evaluation.made_datasets import write_image_dataset, write_run
from tests.faults import fuzz_inputs, fuzz_runs

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))


@pytest.fixture(scope="module")
def workdirs(prepared, tmp_path_factory):
  """Networks for volumes and for images, with random weights."""
  folder = tmp_path_factory.mktemp("fuzz")
  write_image_dataset(folder / "images")
  return {
    "volume": write_run(prepared, folder / "volume"),
    "image": write_run(folder / "images", folder / "image"),
  }


def tasks():
  for seed in range(ROUNDS):
    for kind in fuzz_inputs.KINDS:
      yield from (("prepare", one) for one in fuzz_inputs.mutated(kind, 40, seed))
    for kind in ("nifti", "png", "tiff"):
      inputs = (one for one in fuzz_inputs.mutated(kind, 80, seed + 1000) if one.role == "image")
      yield from (("predict", one) for one in itertools.islice(inputs, 40))
    yield from (("load", one) for one in fuzz_inputs.mutated_arrays(40, seed))
    yield from (("load", one) for one in fuzz_inputs.mutated_manifests(80, seed))
  for kind in fuzz_inputs.KINDS:
    yield from (("prepare", one) for one in fuzz_inputs.bombs(kind))
  for kind in ("nifti", "png", "tiff"):
    yield from (("predict", one) for one in fuzz_inputs.bombs(kind) if one.role == "image")
  largest = fuzz_inputs.largest_nifti()
  for command in ("prepare", "predict"):
    yield command, fuzz_inputs.Input("nifti", "image", ".nii.gz", "nifti: the largest that is read", largest)


def test_every_input_ends_in_success_or_in_one_error_that_names_it(workdirs):
  outcomes = fuzz_runs.run_all(tasks(), workdirs)
  print("\n" + fuzz_runs.table(outcomes))
  assert len(outcomes) >= 300
  wrong = [outcome for outcome in outcomes if outcome.wrong]
  assert not wrong, "\n\n".join(map(str, wrong))
  damaged = [outcome for outcome in outcomes if (outcome.command, outcome.kind) == ("load", "array")]
  assert all(outcome.verdict == "refused" for outcome in damaged)
  assert all(any(outcome.verdict == verdict for outcome in outcomes) for verdict in ("success", "refused"))
