"""Two runs on the same cases: paired differences, with intervals and a signed-rank test."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box, table, text
from rich.console import Console
from scipy import stats

from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import protocols, report, scoring
from selfreg_jax.evaluation.scoring import Request

_RESAMPLES = 10_000
_CONFIDENCE = (2.5, 97.5)  # percentiles of the 95 % interval
_SHOWN = {"dice": ("Dice %", 100.0), "hd95": ("HD95 {unit}", 1.0), "nsd": ("NSD %", 100.0)}


def compare_workdirs(
  ours: str | os.PathLike, other: str | os.PathLike, request: Request, *, console: Console
) -> dict[str, Any]:
  """Scores two workdirs, each into its own eval folder (results that are up to date are taken), and compares them.

  Writes `compare.json` into the eval folder of the first and prints a table of the sound protocol.

  Args:
    ours: a workdir.
    other: another one.
    request: what is to be scored, the same for both.
    console: where to print.

  Returns:
    What was written: {"ours", "other", "data", "options", "protocols": {protocol: what `compare` gave}}.

  Raises:
    UserError: as `scoring.evaluate_workdir`, or the two have other cases or classes.
  """
  evaluations = [scoring.evaluate_workdir(folder, request, console=console, reuse=True) for folder in (ours, other)]
  first, second = evaluations
  names = [["background", *evaluation.summary["protocols"]["sound"]["classes"]] for evaluation in evaluations]
  if names[0] != names[1]:
    raise UserError(f"{other}: its classes are {', '.join(names[1][1:])}, those of {ours} {', '.join(names[0][1:])}")
  differing = set(first.scores["sound"]) ^ set(second.scores["sound"])
  if differing:
    raise UserError(
      f"{other}: was scored on other cases than {ours}, and so cannot be paired; these are in one of them only: "
      + ", ".join(sorted(differing)[:8])
    )
  result = {
    "ours": str(ours),
    "other": str(other),
    "data": first.summary["data"],
    "options": first.summary["options"],
    "unit": first.summary["unit"],
    "protocols": {
      name: compare(first.scores[name], second.scores[name], names[0], protocol=name) for name in protocols.PROTOCOLS
    },
  }
  report.write_summary(first.output / "compare.json", result)
  print_comparison(result["protocols"]["sound"], console, unit=scoring.distance_unit("sound", first.summary))
  console.print(f"ours        {ours}\nother       {other}", markup=False, highlight=False)
  console.print(f"results     {first.output / 'compare.json'}", markup=False, highlight=False)
  return result


def compare(
  ours: Mapping[str, Mapping[int, Mapping[str, float]]],
  other: Mapping[str, Mapping[int, Mapping[str, float]]],
  class_names: Sequence[str],
  *,
  protocol: str,
) -> dict[str, Any]:
  """Paired differences, ours less the other's, of every metric of a protocol.

  A class counts in the cases in which both runs scored it. The row "mean" is made of each case's mean over its classes
  that count.

  Args:
    ours: case id -> what `protocols.evaluate_case` gave.
    other: the same cases.
    class_names: names by class id, the background's first.
    protocol: "sound" or "paper".

  Returns:
    {"mean": {metric: what `paired_difference` gives}, "classes": {name: {metric: the same}}, "cases": count}.

  Raises:
    ValueError: the cases differ.
  """
  if set(ours) != set(other):
    raise ValueError("the two runs were scored on other cases")
  metrics, class_ids = protocols.METRICS[protocol], range(1, len(class_names))
  values = np.array(
    [
      [[[scores[case][class_id][metric] for metric in metrics] for class_id in class_ids] for case in ours]
      for scores in (ours, other)
    ]
  )  # (2, cases, classes, metrics)
  values[:, np.isnan(values).any(axis=0)] = np.nan
  scored = ~np.isnan(values)
  numbers = scored.sum(axis=2)
  means = np.where(numbers > 0, np.where(scored, values, 0).sum(axis=2) / np.maximum(numbers, 1), np.nan)

  def row(pairs: np.ndarray) -> dict[str, Any]:
    return {metric: paired_difference(*pairs[..., index]) for index, metric in enumerate(metrics)}

  return {
    "mean": row(means),
    "classes": {class_names[class_id]: row(values[:, :, class_id - 1]) for class_id in class_ids},
    "cases": len(ours),
  }


def paired_difference(
  ours: np.ndarray, other: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = 0
) -> dict[str, Any]:
  """Mean difference of paired values, its bootstrap interval over pairs, and the Wilcoxon signed-rank test.

  Args:
    ours: (cases,) values; nan where a case was not scored.
    other: (cases,) values of the same cases.
    resamples: number of bootstrap resamples.
    seed: of the resampling.

  Returns:
    {"ours": mean, "other": mean, "difference": mean of ours - other, "interval": [low, high] of 95 %, "p": two-sided
    p-value, "n": pairs, "equal": pairs without a difference, which the test leaves out}; None for what cannot be had:
    means of no pairs, an interval of fewer than two, a test where no pair differs.
  """
  scored = ~(np.isnan(ours) | np.isnan(other))
  ours, other = ours[scored], other[scored]
  differences = ours - other
  count, unequal = len(differences), differences[differences != 0]
  interval = p_value = None
  if count > 1:
    drawn = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    interval = [float(bound) for bound in np.percentile(differences[drawn].mean(axis=1), _CONFIDENCE)]
  if len(unequal):
    p_value = float(stats.wilcoxon(unequal).pvalue)
  return {
    "ours": float(ours.mean()) if count else None,
    "other": float(other.mean()) if count else None,
    "difference": float(differences.mean()) if count else None,
    "interval": interval,
    "p": None if p_value is None or math.isnan(p_value) else p_value,
    "n": count,
    "equal": count - len(unequal),
  }


def print_comparison(block: Mapping[str, Any], console: Console, *, unit: str) -> None:
  """Prints one protocol's comparison: for each class, and the mean, a row a metric.

  Args:
    block: what `compare` gave for the sound protocol.
    console: where to print; 100 columns are enough.
    unit: of the distances.
  """
  result = table.Table(
    title="ours less other, paired by case, sound protocol", title_justify="left", box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )  # fmt: skip
  result.add_column("class", overflow="fold", max_width=20)
  result.add_column("")
  for title in ("ours", "other", "difference [95 % CI]", "Wilcoxon p", "n"):
    result.add_column(title, justify="right", no_wrap=True)
  for name, row in (*block["classes"].items(), ("mean", block["mean"])):
    for index, (metric, (title, factor)) in enumerate(_SHOWN.items()):
      found = row[metric]
      shown = [_fixed(found[key], factor) for key in ("ours", "other", "difference")]
      if found["interval"] is not None:
        shown[2] += " [{}, {}]".format(*(_fixed(bound, factor) for bound in found["interval"]))
      p_value = "-" if found["p"] is None else f"{found['p']:.3g}"
      first = text.Text("" if index else name)
      result.add_row(first, title.format(unit=unit), *shown, p_value, str(found["n"]))
    result.add_section()
  console.print(result)


def _fixed(value: float | None, factor: float) -> str:
  return "-" if value is None else f"{factor * value:.2f}"
