import io
import json
import math
import statistics

import numpy as np
import pytest
from rich import console

from selfreg_jax import errors
from selfreg_jax.evaluation import pooling, protocols

NAMES = ("background", "liver", "[b]spleen")
NAN = math.nan


def run(dice, *, first=0, protocol="sound"):
  """A run from an array-like of Dice (cases, classes); the case ids look like numbers and count from `first`."""
  metrics = protocols.METRICS[protocol]
  return {
    f"{n:04d}": {
      c: {name: factor * value for factor, name in enumerate(metrics, start=1)} | {"missed": 0.0, "invented": 0.0}
      for c, value in enumerate(row, start=1)
    }
    for n, row in enumerate(dice, start=first)
  }


def test_three_seeds_by_hand():
  runs = {"seed_0": run([(0.5, 1.0)]), "seed_1": run([(0.25, 0.75)]), "seed_2": run([(0.75, 0.0)])}
  block = pooling.pool_runs(runs, NAMES, protocol="sound")
  dice = block["mean"]["dice"]
  assert dice["values"] == {"seed_0": 0.75, "seed_1": 0.5, "seed_2": 0.375}
  assert dice["mean"] == pytest.approx(1.625 / 3)
  assert dice["deviation"] == pytest.approx(statistics.stdev([0.75, 0.5, 0.375]))
  assert dice["n"] == 3
  assert block["classes"]["liver"]["dice"]["deviation"] == pytest.approx(0.25)
  assert block["classes"]["liver"]["hd95"]["mean"] == pytest.approx(1.5)
  assert (block["case_sets"], block["cases"], block["all_cases"]) == ("same", 1, None)
  assert block["runs"] == ["seed_0", "seed_1", "seed_2"]


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_each_runs_value_is_that_of_its_own_summary(protocol):
  rng = np.random.default_rng(0)
  arrays = rng.uniform(size=(3, 5, 2))
  arrays[1, :2, 0] = NAN
  runs = {f"r{n}": run(array, protocol=protocol) for n, array in enumerate(arrays)}
  block = pooling.pool_runs(runs, NAMES, protocol=protocol)
  for name, cases in runs.items():
    summary = protocols.summarize(cases, NAMES, protocol=protocol, resamples=10)
    for metric in protocols.METRICS[protocol]:
      assert block["mean"][metric]["values"][name] == summary["mean"][metric]
      assert block["classes"]["liver"][metric]["values"][name] == summary["classes"]["liver"][metric]


def test_folds_are_also_summarized_together():
  runs = {"fold_0": run([(0.5, 0.5)]), "fold_1": run([(1.0, 1.0), (0.75, 0.5), (0.25, 1.0)], first=1)}
  block = pooling.pool_runs(runs, NAMES, protocol="sound", resamples=50, seed=3)
  assert (block["case_sets"], block["cases"]) == ("disjoint", 4)
  assert block["mean"]["dice"]["mean"] == pytest.approx((0.5 + 0.75) / 2)  # each fold counts the same
  assert block["all_cases"]["mean"]["dice"] == pytest.approx(5.5 / 8)  # each case counts the same
  whole = run([(0.5, 0.5), (1.0, 1.0), (0.75, 0.5), (0.25, 1.0)])
  assert block["all_cases"] == protocols.summarize(whole, NAMES, protocol="sound", resamples=50, seed=3)


def test_the_order_of_a_runs_cases_does_not_matter():
  cases = run([(0.5, 0.5), (1.0, 1.0)])
  block = pooling.pool_runs({"a": cases, "b": dict(reversed(cases.items()))}, NAMES, protocol="sound")
  assert block["case_sets"] == "same"
  assert block["mean"]["dice"]["deviation"] == 0


def test_one_run_has_no_deviation():
  block = pooling.pool_runs({"only": run([(0.5, 0.25), (0.5, 0.75)])}, NAMES, protocol="paper")
  assert block["mean"]["dice"] == {"mean": 0.5, "deviation": None, "n": 1, "values": {"only": 0.5}}
  assert (block["case_sets"], block["all_cases"]) == ("same", None)


def test_what_a_run_did_not_score_is_left_out():
  runs = {"a": run([(0.5, NAN)]), "b": run([(0.75, NAN)])}
  block = pooling.pool_runs(runs | {"c": run([(NAN, NAN)])}, NAMES, protocol="sound")
  liver, spleen = block["classes"]["liver"]["dice"], block["classes"]["[b]spleen"]["dice"]
  assert (liver["mean"], liver["n"], liver["values"]["c"]) == (0.625, 2, None)
  assert spleen == {"mean": None, "deviation": None, "n": 0, "values": {"a": None, "b": None, "c": None}}
  assert json.loads(json.dumps(block, allow_nan=False)) == block
  assert "62.50 ± 17.68" in printed(block)


@pytest.mark.parametrize(
  ("runs", "message"),
  [
    ({"a": run([(1, 1)] * 3), "b": run([(1, 1)] * 3, first=1)}, "2 of the 3 cases of a and the 3 of b"),
    ({"a": run([(1, 1)] * 3), "b": run([(1, 1)] * 2)}, "2 of the 3 cases of a and the 2 of b"),
    ({"a": run([(1, 1)]), "b": run([(1, 1)]), "c": run([(1, 1)], first=1)}, "seeds of one fold"),
  ],
)
def test_runs_on_mixed_cases_are_refused(runs, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    pooling.pool_runs(runs, NAMES, protocol="sound")
  assert str(caught.value).startswith("--workdirs: ")


def test_no_runs_and_empty_runs_are_refused():
  with pytest.raises(ValueError, match="no runs"):
    pooling.pool_runs({}, NAMES, protocol="sound")
  with pytest.raises(ValueError, match="no cases"):
    pooling.pool_runs({"a": {}}, NAMES, protocol="sound")


def printed(block, protocol="sound"):
  stream = io.StringIO()
  pooling.print_pool(block, console.Console(file=stream, width=100, no_color=True), protocol=protocol)
  return stream.getvalue()


def test_printed_pool_of_seeds():
  runs = {"runs/[b]_seed_0": run([(0.5, 1.0)]), "runs/[b]_seed_1": run([(0.25, 0.75)])}
  lines = printed(pooling.pool_runs(runs, NAMES, protocol="sound")).splitlines()
  assert "2 runs on the same cases" in lines[0]
  (row,) = [line for line in lines if line.strip().startswith("[b]spleen")]
  assert row.split()[1:4] == ["87.50", "±", "17.68"]
  assert row.split()[-1] == "2"
  (row,) = [line for line in lines if "[b]_seed_1" in line]
  assert row.split() == ["runs/[b]_seed_1", "50.00", "1.50", "2.00", "250.00"]
  assert max(map(len, lines)) <= 100


def test_printed_pool_of_folds_ends_with_all_cases():
  runs = {f"fold_{n}": run([(0.5, 0.25 * n)] * 2, first=2 * n, protocol="paper") for n in range(3)}
  text = printed(pooling.pool_runs(runs, NAMES, protocol="paper", resamples=20), protocol="paper")
  assert "3 runs on different cases" in text
  assert "NSD" not in text
  assert "HD95 voxels" in text
  assert "All 6 held-out cases together:" in text.split("fold_2")[1]
  assert "…" not in text
