import io
import json
import math

import numpy as np
import pytest
from rich import console
from scipy import stats

from selfreg_jax import errors
from selfreg_jax.evaluation import comparison, protocols

NAMES = ("background", "[b]liver", "spleen")
NAN = math.nan


def scores(dice, protocol="sound"):
  """A row whose every metric is its own multiple of the Dice, so that a mixed-up metric shows."""
  row = {name: factor * dice for factor, name in enumerate(protocols.METRICS[protocol], start=1)}
  return row | {"missed": 0.0, "invented": 0.0}


def run(dice, protocol="sound"):
  """A run from an array-like of Dice (cases, classes); the case ids look like numbers."""
  return {
    f"{n:04d}": {class_id: scores(value, protocol) for class_id, value in enumerate(row, start=1)}
    for n, row in enumerate(dice)
  }


def random_dice(seed, cases=20):
  return np.random.default_rng(seed).uniform(0.2, 1, (cases, 2))


def test_a_small_comparison_by_hand():
  block = comparison.compare(run([(0.5, 0.75), (0.25, 1.0)]), run([(0.25, 0.75), (0.25, 0.5)]), NAMES)
  dice = block["mean"]["dice"]
  assert (dice["ours"], dice["other"], dice["difference"]) == (0.625, 0.4375, 0.1875)
  assert dice["interval"] == [0.125, 0.25]  # a quarter of the resamples each holds one of the two cases alone
  assert (dice["p"], dice["n"], dice["differing"]) == (None, 2, 2)
  liver, spleen = (block["classes"][name]["dice"] for name in NAMES[1:])
  assert (liver["difference"], liver["differing"], spleen["difference"], spleen["differing"]) == (0.125, 1, 0.25, 1)
  assert block["mean"]["hd95"]["difference"] == 3 * 0.1875
  assert block["cases"] == 2


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_p_and_interval_agree_with_scipy(protocol):
  ours, other = random_dice(1), random_dice(2)
  block = comparison.compare(run(ours, protocol), run(other, protocol), NAMES, protocol=protocol)
  pairs = {"mean": (ours.mean(axis=1), other.mean(axis=1)), "[b]liver": (ours[:, 0], other[:, 0])}
  for name, (first, second) in pairs.items():
    rows = block["mean"] if name == "mean" else block["classes"][name]
    assert set(rows) == set(protocols.METRICS[protocol])
    for factor, metric in enumerate(protocols.METRICS[protocol], start=1):
      row = rows[metric]
      assert row["difference"] == pytest.approx(factor * (first - second).mean(), abs=1e-11)
      assert row["p"] == pytest.approx(stats.wilcoxon(first, second).pvalue, rel=1e-9)
      expected = stats.bootstrap((factor * (first - second),), np.mean, method="percentile", rng=7)
      spread = expected.standard_error
      assert row["interval"] == pytest.approx(list(expected.confidence_interval), abs=0.1 * spread)
      assert row["n"] == row["differing"] == 20


def test_zero_differences_do_not_enter_the_rank_test():
  gains = np.array([0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.07, 0, 0])
  other = np.full((9, 2), 0.5)
  row = comparison.compare(run(other + gains[:, None]), run(other), NAMES)["mean"]["dice"]
  assert (row["n"], row["differing"]) == (9, 7)
  # Of the 2^7 signs of the ranks 1..7, rank sums of the negative ones up to 3: {}, {1}, {2}, {3}, {1, 2}.
  assert row["p"] == pytest.approx(2 * 5 / 2**7)


def test_differences_equal_but_for_rounding_errors_tie():
  other = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
  gains = 0.1 * np.array([1, 1, 1, 1, 1, 1, 1, -1])
  row = comparison.compare(run(np.c_[other + gains, other]), run(np.c_[other, other]), NAMES)["classes"]["[b]liver"]
  exactly = stats.wilcoxon([1, 1, 1, 1, 1, 1, 1, -1]).pvalue
  assert row["dice"]["p"] == pytest.approx(exactly)
  assert row["dice"]["p"] == pytest.approx(2 * 9 / 2**8)  # all ranks equal: the sign test


@pytest.mark.parametrize("steps", [(1, 1, 2, -2, 3, 3, 4), (1, 2, 2, 3, -3, 4, 5, 5, 6, 7, 7, -8, 9, 9), range(1, 52)])
def test_p_of_ties_and_of_many_cases_agrees_with_scipy(steps):
  other = np.full((len(steps), 2), 0.25)
  row = comparison.compare(run(other + np.array(steps)[:, None] / 100), run(other), NAMES)["mean"]["dice"]
  assert row["p"] == pytest.approx(stats.wilcoxon(steps).pvalue, rel=1e-9)


@pytest.mark.parametrize(("cases", "p"), [(5, None), (6, 2 / 2**6)])
def test_fewer_than_six_differing_cases_are_not_tested(cases, p):
  other = random_dice(3, cases) / 2
  row = comparison.compare(run(other + np.arange(1, cases + 1)[:, None] / 100), run(other), NAMES)["mean"]["dice"]
  assert row["p"] == p
  assert row["interval"][0] > 0


def test_a_run_against_itself_shows_nothing():
  values = random_dice(4)
  values[3, 0] = NAN
  block = comparison.compare(run(values), run(values), NAMES)
  for rows in (block["mean"], *block["classes"].values()):
    for row in rows.values():
      assert row["difference"] == 0
      assert row["interval"] == [0, 0]
      assert row["p"] is None
      assert row["ours"] == row["other"]
      assert row["differing"] == row["only_ours"] == row["only_other"] == 0
  assert comparison.conclusion(block, ours_name="a", other_name="b").endswith("n 20: the scores are the same")


def test_swapped_runs_change_the_sign_only():
  ours, other = random_dice(5), random_dice(6)
  ours[2, 1] = other[4, 0] = NAN
  there = comparison.compare(run(ours), run(other), NAMES)["mean"]
  back = comparison.compare(run(other), run(ours), NAMES)["mean"]
  for metric, row in there.items():
    mirrored = back[metric]
    assert row["difference"] == pytest.approx(-mirrored["difference"])
    assert row["interval"] == pytest.approx([-bound for bound in reversed(mirrored["interval"])])
    assert row["p"] == pytest.approx(mirrored["p"])
    assert (row["ours"], row["only_ours"]) == (mirrored["other"], mirrored["only_other"])
    assert row["only_ours"] == row["only_other"] == 1


def test_the_order_of_the_cases_does_not_matter():
  ours, other = run(random_dice(7)), run(random_dice(8))
  expected = comparison.compare(ours, other, NAMES)
  assert comparison.compare(ours, dict(reversed(other.items())), NAMES) == expected
  assert comparison.compare(dict(reversed(ours.items())), other, NAMES) == expected


def test_only_what_both_scored_is_compared():
  # The other run invented the spleen of the first case: without a partner, its 0 must not lower the other's mean.
  block = comparison.compare(run([(0.5, NAN), (0.5, 0.5)]), run([(0.25, 0.0), (0.75, 0.5)]), NAMES)
  dice, spleen = block["mean"]["dice"], block["classes"]["spleen"]["dice"]
  assert (dice["ours"], dice["other"], dice["difference"], dice["n"]) == (0.5, 0.4375, 0.0625, 2)
  assert (dice["only_ours"], dice["only_other"]) == (0, 1)
  assert (spleen["n"], spleen["interval"], spleen["only_other"]) == (1, None, 1)
  assert "0 by A and 1 by B" in printed(block)


def test_one_case_has_a_difference_but_no_interval():
  block = comparison.compare(run([(0.5, 0.75)]), run([(0.25, 0.5)]), NAMES)
  row = block["mean"]["dice"]
  assert (row["difference"], row["interval"], row["p"], row["n"]) == (0.25, None, None, 1)
  assert comparison.conclusion(block, ours_name="a", other_name="b") == (
    "Dice: difference +25.00 points, p -, n 1: too few cases that differ for a test (1), no difference shown"
  )


def test_runs_that_scored_nothing_are_undefined_and_strict_json():
  block = comparison.compare(run([(NAN, NAN)] * 3), run([(NAN, NAN)] * 3), NAMES)
  row = block["classes"]["spleen"]["nsd"]
  assert row == dict.fromkeys(("ours", "other", "difference", "interval", "p")) | dict.fromkeys(
    ("n", "differing", "only_ours", "only_other"), 0
  )
  assert json.loads(json.dumps(block, allow_nan=False)) == block
  assert "nothing to compare" in printed(block)


def test_different_cases_are_refused_by_name():
  ours, other = run(random_dice(9, 4)), run(random_dice(9, 12))
  ours["extra"] = ours.pop("0000")
  with pytest.raises(errors.UserError, match="different cases") as caught:
    comparison.compare(ours, other, NAMES)
  message = str(caught.value)
  assert message.startswith("--compare: ")
  assert "only in this run: extra; only in the other: 0000, 0004, 0005, 0006, 0007 and 4 more" in message
  with pytest.raises(ValueError, match="no cases"):
    comparison.compare({}, {}, NAMES)


def printed(block, **names):
  stream = io.StringIO()
  names = {"ours_name": "A", "other_name": "B"} | names
  output = console.Console(file=stream, width=100, no_color=True)
  comparison.print_comparison(block, output, protocol="sound", **names)
  return stream.getvalue()


def test_printed_comparison():
  ours, other = run([(0.5, 0.75), (0.25, 1.0)]), run([(0.25, 0.75), (0.25, 0.5)])
  text = printed(comparison.compare(ours, other, NAMES), ours_name="runs/selfreg_of_a_long_name", other_name="[b]base")
  lines = text.splitlines()
  (row,) = [line for line in lines if "[b]liver" in line]
  assert row.split() == ["Dice", "%", "[b]liver", "37.50", "25.00", "+12.50", "[+0.00,", "+25.00]", "-", "2"]
  (row,) = [line for line in lines if "HD95 mm" in line]
  assert row.split()[2:] == ["mean", "1.88", "1.31", "+0.56", "[+0.38,", "+0.75]", "-", "2"]
  assert "[b]base" in text
  assert "…" not in text
  assert max(len(line) for line in lines[:-1]) <= 100
  assert lines[-1].startswith("Dice: difference +18.75 [+12.50, +25.00] points, p -, n 2: too few cases that differ")


def test_widest_table_fits():
  far = dict.fromkeys(("hd95", "assd"), 1234.5)
  ours = {f"{n}": {c: scores(1.0) | far for c in (1, 2)} for n in range(8)}
  other = {f"{n}": {c: scores(0.0) | dict.fromkeys(far, 0.0) for c in (1, 2)} for n in range(8)}
  text = printed(comparison.compare(ours, other, ("background", "a" * 30, "b c")), ours_name="o" * 30)
  assert "…" not in text
  assert text.count("+1234.50 [+1234.50, +1234.50]") == 2
  assert all(len(line) <= 100 for line in text.splitlines()[:-1])


@pytest.mark.parametrize(
  ("gains", "verdict"),
  [
    (np.full(10, 0.1) + np.arange(10) / 100, "A is better than B on these cases"),
    (-np.full(10, 0.1) - np.arange(10) / 100, "B is better than A on these cases"),
    (np.array([1, -1, 2, -2, 3, -3, 4, -4, 5, -4]) / 100, "no difference shown"),
    # One case falls far: the ranks see nine gains, the mean a loss that may be none.
    (np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, -40]) / 100, "interval and test disagree, no clear difference"),
  ],
)
def test_conclusions(gains, verdict):
  other = np.full((len(gains), 2), 0.45)
  block = comparison.compare(run(other + gains[:, None]), run(other), NAMES)
  sentence = comparison.conclusion(block, ours_name="A", other_name="B")
  assert sentence.endswith(f", n {len(gains)}: {verdict}"), sentence
