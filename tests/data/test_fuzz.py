"""A few damaged files of each kind through `prepare`; hundreds, and bombs, are in tests/faults/test_fuzz.py."""

import pytest

from tests.faults import fuzz_inputs, fuzz_runs


@pytest.mark.parametrize("kind", fuzz_inputs.KINDS)
def test_damaged_files_end_in_success_or_in_one_error_that_names_them(tmp_path, kind):
  for number, one in enumerate(fuzz_inputs.mutated(kind, 5, seed=7)):
    code, said = fuzz_runs.run_prepare(one, tmp_path / str(number))
    assert fuzz_runs.judge(code, said, one.named) in ("success", "refused"), f"{one.what}: {said}"
