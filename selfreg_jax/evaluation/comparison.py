"""Is one run better than another? Paired differences over the same cases, with their uncertainty.

A difference is that of two checkpoints on these cases. How much of it another seed of the same method would show is a
question for several runs (`pooling`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box, console, table, text
from scipy import stats

from selfreg_jax.data.datasets import listed
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import protocols, report

_LEVEL = 0.05
_FEWEST = 6  # differing cases; with five the smallest two-sided p is 2 / 2**5 = 0.0625, above the level whatever comes
_ENUMERATED = 13  # tied differences whose 2^n signs are all tried, as SciPy does
_DECIMALS = 12  # differences equal but for rounding errors must tie in the signed-rank test
_LISTED = 5  # case ids named in a message

_TITLES = {"dice": "Dice %", "hd95": "HD95 {unit}", "assd": "ASSD {unit}", "nsd": "NSD %"}
_PERCENT = ("dice", "nsd")


def compare(
  ours: Mapping[str, protocols.ClassTable],
  other: Mapping[str, protocols.ClassTable],
  class_names: Sequence[str],
  *,
  protocol: str = "sound",
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Paired differences, ours less other, of every metric, per class and for the mean over classes.

  Only what both runs scored is compared: a class of a case that is nan in either is left out of both sides and counted.
  In the sound protocol such a class is one that the truth lacks and one run invented; those who compare must look at
  these counts too. The mean over classes is taken case by case, over the classes of the case that both scored, since
  pairs are what the test ranks; where classes are left out it can differ from the mean of `protocols.summarize`, which
  is over cases first.

  The interval is the 2.5th and 97.5th percentile of the mean difference over resamples of the cases, None with fewer
  than two cases. p is of the two-sided Wilcoxon signed-rank test of the differences that are not zero (Wilcoxon 1945,
  `zero_method="wilcox"`), exact for up to 50 of them without ties and up to 13 with, by the normal approximation
  beyond; None with fewer than six such differences, with which no outcome reaches 0.05, hence also where all are zero.
  It is not corrected for the number of classes and metrics. Both take the cases to be independent.

  Args:
    ours: case id -> what `protocols.evaluate_case` gave for it under this protocol.
    other: the same of the other run; the same case ids, in any order.
    class_names: names by class id, the background's first.
    protocol: "sound" or "paper".
    resamples: number of bootstrap resamples.
    seed: of the resampling.

  Returns:
    {"mean": {metric: row}, "classes": {name: {metric: row}}, "cases": count}, each row {"ours": mean, "other": mean,
    "difference": mean, "interval": [low, high], "p": value, "n": cases compared, "differing": those with a difference
    that is not zero, "only_ours": scores without a partner, "only_other": the same}, in the units of the metrics and
    fit for strict JSON: None stands for what is undefined.

  Raises:
    UserError: the runs were scored on different cases.
    ValueError: there are no cases, or a case does not hold the classes that are named.
  """
  _check_same_cases(ours, other)
  case_ids = sorted(ours)
  first, second = (
    protocols.scores_array({case_id: run[case_id] for case_id in case_ids}, class_names, protocol=protocol)
    for run in (ours, other)
  )
  paired = ~np.isnan(first) & ~np.isnan(second)  # (cases, classes, metrics)
  alone = [(~np.isnan(values) & ~paired).sum(axis=0) for values in (first, second)]  # (classes, metrics) each
  first, second = (_with_mean(np.where(paired, values, np.nan)) for values in (first, second))
  only_ours, only_other = (np.concatenate([count.sum(axis=0, keepdims=True), count]) for count in alone)
  differences = np.round(first - second, _DECIMALS)  # (cases, 1 + classes, metrics)
  samples = protocols.bootstrap_means(differences, resamples=resamples, seed=seed)
  means = [protocols.mean_scored(values, axis=0) for values in (first, second, differences)]

  def row(index: int, metric: int) -> dict[str, Any]:
    compared = differences[:, index, metric]
    compared = compared[~np.isnan(compared)]
    names = ("ours", "other", "difference")
    return {
      **{name: protocols.json_number(mean[index, metric]) for name, mean in zip(names, means, strict=True)},
      "interval": protocols.interval(samples[:, index, metric], len(compared)),
      "p": _signed_rank_p(compared),
      "n": len(compared),
      "differing": int(np.count_nonzero(compared)),
      "only_ours": int(only_ours[index, metric]),
      "only_other": int(only_other[index, metric]),
    }

  rows = [
    {name: row(index, metric) for metric, name in enumerate(protocols.METRICS[protocol])}
    for index in range(len(class_names))
  ]
  return {"mean": rows[0], "classes": dict(zip(class_names[1:], rows[1:], strict=True)), "cases": len(case_ids)}


def _check_same_cases(ours: Mapping[str, Any], other: Mapping[str, Any]) -> None:
  lonely = {"this run": sorted(set(ours) - set(other)), "the other": sorted(set(other) - set(ours))}
  if any(lonely.values()):
    parts = [f"only in {name}: {listed(ids, _LISTED)}" for name, ids in lonely.items() if ids]
    raise UserError(
      f"--compare: the runs were scored on different cases, {'; '.join(parts)}; score both on the same data and split"
    )


def _with_mean(values: np.ndarray) -> np.ndarray:
  """Puts each case's mean over classes before its classes: (cases, classes, metrics) -> (cases, 1 + classes, ...)."""
  return np.concatenate([protocols.mean_scored(values, axis=1)[:, None], values], axis=1)


def _signed_rank_p(differences: np.ndarray) -> float | None:
  differences = differences[differences != 0]
  if len(differences) < _FEWEST:
    return None
  ranks = stats.rankdata(np.abs(differences))
  if len(differences) <= _ENUMERATED and len(np.unique(ranks)) < len(ranks):
    # What `stats.wilcoxon` does as well, but a hundred times faster: it ranks anew for each of the 2^n signs.
    signed = (np.sign(differences) * ranks,)
    test = stats.permutation_test(signed, np.sum, permutation_type="samples", vectorized=True, n_resamples=np.inf)
  else:
    test = stats.wilcoxon(differences, zero_method="wilcox", alternative="two-sided")
  return float(test.pvalue)


def conclusion(block: Mapping[str, Any], *, ours_name: str, other_name: str) -> str:
  """What a comparison says of the mean Dice, in one sentence.

  A difference counts as shown where the interval leaves out 0 and p is below 0.05.

  Args:
    block: what `compare` gave.
    ours_name: of the run whose scores came first.
    other_name: of the run that it was compared with.
  """
  row = block["mean"]["dice"]
  if not row["n"]:
    return "Dice: no class of any case was scored in both runs, nothing to compare"
  numbers = f"Dice: difference {_signed(row['difference'], 100)}{_range(row['interval'], 100)} points"
  return f"{numbers}, p {_p_value(row['p'])}, n {row['n']}: {_verdict(row, ours_name, other_name)}"


def _verdict(row: Mapping[str, Any], ours_name: str, other_name: str) -> str:
  if not row["differing"]:
    return "the scores are the same"
  if row["p"] is None:
    return f"too few cases that differ for a test ({row['differing']}), no difference shown"
  apart = not row["interval"][0] <= 0 <= row["interval"][1]
  if apart and row["p"] < _LEVEL:
    better, worse = (ours_name, other_name) if row["difference"] > 0 else (other_name, ours_name)
    return f"{better} is better than {worse} on these cases"
  if apart or row["p"] < _LEVEL:
    return "interval and test disagree, no clear difference"
  return "no difference shown"


def print_comparison(
  block: Mapping[str, Any],
  output: console.Console,
  *,
  ours_name: str,
  other_name: str,
  protocol: str,
  unit: str | None = None,
) -> None:
  """Prints a comparison: Dice per class, the other metrics' means over classes, and the conclusion for Dice.

  Args:
    block: what `compare` gave.
    output: where to print; 100 columns are enough.
    ours_name: of the run whose scores came first.
    other_name: of the run that it was compared with.
    protocol: "sound" or "paper".
    unit: of the distances; None: mm in the sound and voxels in the paper protocol.
  """
  unit = unit or report.UNITS[protocol]
  title = f"{protocol} protocol, paired over {block['cases']} cases; p: Wilcoxon signed-rank, not corrected"
  output.print(text.Text(title, style="italic"), soft_wrap=True)
  result = table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  result.add_column("metric", no_wrap=True)
  result.add_column("class", overflow="fold", max_width=16)
  for name in (ours_name, other_name):
    result.add_column(text.Text(name), justify="right", overflow="fold", max_width=14)
  result.add_column("difference [95 % CI]", justify="right", no_wrap=True)
  result.add_column("p", justify="right", no_wrap=True)
  result.add_column("n", justify="right", no_wrap=True)
  for metric in protocols.METRICS[protocol]:
    if metric not in _TITLES:
      continue
    rows = {"mean": block["mean"][metric]}
    if metric == "dice":
      rows = {name: row[metric] for name, row in block["classes"].items()} | rows
    for name, row in rows.items():
      result.add_row(_TITLES[metric].format(unit=unit), text.Text(name), *_cells(row, metric))
    result.add_section()
  output.print(result)
  output.print(text.Text(conclusion(block, ours_name=ours_name, other_name=other_name)), soft_wrap=True)
  dice = block["mean"]["dice"]
  if dice["only_ours"] or dice["only_other"]:
    why = " (inventions: the truth lacks them)" if protocol == "sound" else ""
    counts = f"{dice['only_ours']} by {ours_name} and {dice['only_other']} by {other_name}"
    output.print(
      text.Text(f"Not compared are classes of cases that one run alone scored{why}: {counts}"), soft_wrap=True
    )


def _cells(row: Mapping[str, Any], metric: str) -> list[str]:
  factor = 100 if metric in _PERCENT else 1
  difference = "-" if row["difference"] is None else _signed(row["difference"], factor)
  means = [report.fixed(row[name], factor) for name in ("ours", "other")]
  return [*means, difference + _range(row["interval"], factor), _p_value(row["p"]), str(row["n"])]


def _signed(value: float, factor: float) -> str:
  return f"{round(factor * value, 2) + 0.0:+.2f}"  # adding 0 turns -0 into 0


def _range(interval: Sequence[float] | None, factor: float) -> str:
  return "" if interval is None else f" [{', '.join(_signed(bound, factor) for bound in interval)}]"


def _p_value(value: float | None) -> str:
  if value is None:
    return "-"
  return "<0.001" if value < 0.001 else f"{value:.3f}"
