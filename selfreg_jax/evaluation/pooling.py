"""Several runs of one config, with other seeds or on other folds, as one result with its spread."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box, console, table, text

from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import protocols, report


def pool_runs(
  runs: Mapping[str, Mapping[str, protocols.ClassTable]],
  class_names: Sequence[str],
  *,
  protocol: str,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Mean and deviation over runs, of the means over cases and classes that `protocols.summarize` gives for each run.

  Runs with different seeds are scored on the same cases: the deviation is that of the seed. Folds of a cross-validation
  are scored on cases of their own: the deviation then holds the difference between the folds' cases too, and the
  held-out cases of all folds are also summarized as one set, in which each case counts the same.

  Args:
    runs: name -> case id -> what `protocols.evaluate_case` gave for it under this protocol.
    class_names: names by class id, the background's first.
    protocol: "sound" or "paper".
    resamples: number of bootstrap resamples of the held-out cases together.
    seed: of the resampling.

  Returns:
    {"mean": {metric: row}, "classes": {name: {metric: row}}, "runs": names, "case_sets": "same" or "disjoint",
    "cases": different cases in all, "all_cases": what `protocols.summarize` gives for the cases of disjoint runs
    together, else None}, each row {"mean": over runs, "deviation": with n - 1 in the denominator, "n": runs that scored
    it, "values": {name: the run's mean}}, fit for strict JSON: None stands for what is undefined.

  Raises:
    UserError: the runs' cases are neither the same in all nor different in all.
    ValueError: there are no runs, a run has no cases, or a case does not hold the classes that are named.
  """
  if not runs:
    raise ValueError("there are no runs to pool")
  case_sets = _relation({name: set(cases) for name, cases in runs.items()})
  values = {name: protocols.scores_array(cases, class_names, protocol=protocol) for name, cases in runs.items()}
  class_means = {name: protocols.mean_scored(array, axis=0) for name, array in values.items()}  # (classes, metrics)
  means = {name: protocols.mean_scored(array, axis=0) for name, array in class_means.items()}  # (metrics,)
  metrics = protocols.METRICS[protocol]
  together = {case_id: scores for cases in runs.values() for case_id, scores in cases.items()}
  all_cases = None
  if case_sets == "disjoint":
    all_cases = protocols.summarize(together, class_names, protocol=protocol, resamples=resamples, seed=seed)
  return {
    "mean": {metric: _row({name: array[m] for name, array in means.items()}) for m, metric in enumerate(metrics)},
    "classes": {
      class_name: {
        metric: _row({name: array[c, m] for name, array in class_means.items()}) for m, metric in enumerate(metrics)
      }
      for c, class_name in enumerate(class_names[1:])
    },
    "runs": list(runs),
    "case_sets": case_sets,
    "cases": len(together),
    "all_cases": all_cases,
  }


def _relation(case_ids: Mapping[str, set[str]]) -> str:
  """Whether runs share all of their cases or none; one run alone shares them."""
  pairs = list(itertools.combinations(case_ids, 2))
  if all(case_ids[first] == case_ids[second] for first, second in pairs):
    return "same"
  if all(case_ids[first].isdisjoint(case_ids[second]) for first, second in pairs):
    return "disjoint"
  for first, second in pairs:
    shared = len(case_ids[first] & case_ids[second])
    if shared and case_ids[first] != case_ids[second]:
      counts = f"{shared} of the {len(case_ids[first])} cases of {first} and the {len(case_ids[second])} of {second}"
      raise UserError(f"--workdirs: only {counts} are the same; pool runs of one split, or the folds of one dataset")
  raise UserError(
    "--workdirs: some runs were scored on the same cases and others on different ones; pool the seeds of one fold, or "
    "one run of each fold"
  )


def _row(values: Mapping[str, float]) -> dict[str, Any]:
  scored = np.array([value for value in values.values() if not np.isnan(value)])
  return {
    "mean": float(scored.mean()) if len(scored) else None,
    "deviation": float(scored.std(ddof=1)) if len(scored) > 1 else None,
    "n": len(scored),
    "values": {name: protocols.json_number(value) for name, value in values.items()},
  }


def print_pool(block: Mapping[str, Any], output: console.Console, *, protocol: str, unit: str | None = None) -> None:
  """Prints a pool of runs: a row a class, their mean, then each run's own mean over classes.

  For folds a second table follows, of all held-out cases together.

  Args:
    block: what `pool_runs` gave.
    output: where to print; 100 columns are enough.
    protocol: "sound" or "paper".
    unit: of the distances; None: mm in the sound and voxels in the paper protocol.
  """
  unit = unit or report.UNITS[protocol]
  kind = {"same": "the same cases", "disjoint": "different cases"}[block["case_sets"]]
  title = f"{protocol} protocol, mean ± standard deviation over {len(block['runs'])} runs on {kind}"
  output.print(text.Text(title, style="italic"), soft_wrap=True)
  result = table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  columns = {"dice": ("Dice %", 100), "hd95": (f"HD95 {unit}", 1), "assd": (f"ASSD {unit}", 1), "nsd": ("NSD %", 100)}
  columns = {metric: column for metric, column in columns.items() if metric in protocols.METRICS[protocol]}
  result.add_column("class", overflow="fold", max_width=24)
  for heading, _ in columns.values():
    result.add_column(heading, justify="right", no_wrap=True)
  result.add_column("runs", justify="right", no_wrap=True)

  def add_row(name: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    cells = [_mean_and_deviation(rows[metric], factor) for metric, (_, factor) in columns.items()]
    result.add_row(text.Text(name), *cells, str(rows["dice"]["n"]))

  for name, rows in block["classes"].items():
    add_row(name, rows)
  result.add_section()
  add_row("mean", block["mean"])
  result.add_section()
  for name in block["runs"]:
    cells = [report.fixed(block["mean"][metric]["values"][name], factor) for metric, (_, factor) in columns.items()]
    result.add_row(text.Text(name), *cells, "")
  output.print(result)
  if block["all_cases"] is not None:
    output.print(f"All {block['cases']} held-out cases together:", highlight=False)
    report.print_table(block["all_cases"], output, protocol=protocol, unit=unit)


def _mean_and_deviation(row: Mapping[str, Any], factor: float) -> str:
  spread = "" if row["deviation"] is None else f" ± {factor * row['deviation']:.2f}"
  return report.fixed(row["mean"], factor) + spread
