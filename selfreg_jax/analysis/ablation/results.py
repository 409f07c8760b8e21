"""From the evaluations of an ablation's runs to its tables: spread over seeds, paired differences to the reference."""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from selfreg_jax.analysis.ablation import records
from selfreg_jax.analysis.ablation.design import Design, Run
from selfreg_jax.analysis.ablation.records import Record
from selfreg_jax.evaluation import protocols, report, scoring
from selfreg_jax.training.logging import METRICS_FILE, read_lines

_LEVEL = 0.95
MEAN = "mean"  # over the classes, beside their names


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is known of a run.

  Attributes:
    run: the run.
    record: what became of its training.
    summary: of its evaluation; None where there is none yet.
    lines: objects of its `metrics.jsonl`.
  """

  run: Run
  record: Record
  summary: Mapping[str, Any] | None
  lines: Sequence[Mapping[str, Any]]

  @property
  def state(self) -> str:
    """In a word: "scored", "diverged" or "unfinished"."""
    if self.record.diverged:
      return "diverged"
    return "scored" if self.summary is not None else "unfinished"

  def scores(self, protocol: str) -> dict[str, dict[str, float | None]]:
    """Class, or "mean" -> metric -> value."""
    block = self.summary["protocols"][protocol]
    names = protocols.METRICS[protocol]
    return {MEAN: dict(block["mean"])} | {
      name: {metric: row[metric] for metric in names if metric in row} for name, row in block["classes"].items()
    }


def collect(design: Design, folder_of: Callable[[Run], pathlib.Path]) -> list[Outcome]:
  """What is known of each run, in the order of the design's runs; an evaluation of anything else does not count."""
  request = scoring.Request(split=design.split)
  outcomes = []
  for run in design.runs:
    folder = folder_of(run)
    record = records.read(folder, run.config)
    output = scoring.default_output(folder, design.split, None)
    found = scoring.current(folder, output, request) if record.finished else None
    metrics = folder / METRICS_FILE
    lines = read_lines(metrics) if metrics.is_file() else []
    outcomes.append(Outcome(run, record, found and found.summary, lines))
  return outcomes


def write(design: Design, outcomes: Sequence[Outcome], folder: pathlib.Path) -> dict[str, Any]:
  """Writes `results.csv`, `summary.json` and `table.md`; returns what `summary.json` holds."""
  summary = summarize(design, outcomes)
  report.write_whole(folder / "results.csv", _csv(outcomes, design.split).encode())
  report.write_whole(folder / "table.md", (table_text(summary) + "\n").encode())
  report.write_summary(folder / "summary.json", summary)
  return summary


def summarize(design: Design, outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Spread of each variant over its seeds, and its paired differences to the reference.

  Args:
    design: what is compared.
    outcomes: of its runs.

  Returns:
    {"reference", "split", "unit" (of the sound distances), "seeds", "variants": {name: {"changes", "seeds" (scored),
    "protocols": {protocol: {"mean": {metric: `spread`}, "classes": {name: {metric: `spread`}}}},
    "difference": the same of value - reference over the seeds that both have, None of the reference}}, "unfinished":
    run names, "diverged": run names}.
  """
  scored: dict[str, dict[int, Outcome]] = {name: {} for name in design.variants}
  for outcome in outcomes:
    if outcome.state == "scored":
      scored[outcome.run.variant][outcome.run.seed] = outcome
  reference = scored[design.reference]
  variants = {}
  for name, by_seed in scored.items():
    shared = [seed for seed in by_seed if seed in reference]
    pairs = [(by_seed[seed], reference[seed]) for seed in shared]
    variants[name] = {
      "changes": design.variants[name],
      "seeds": sorted(by_seed),
      "protocols": {p: _blocks([one.scores(p) for one in by_seed.values()]) for p in protocols.PROTOCOLS},
      "difference": None
      if name == design.reference
      else {p: _blocks([_less(one.scores(p), other.scores(p)) for one, other in pairs]) for p in protocols.PROTOCOLS},
    }
  return {
    "reference": design.reference,
    "split": design.split,
    "unit": next((scoring.distance_unit("sound", one.summary) for one in outcomes if one.state == "scored"), ""),
    "seeds": list(design.seeds),
    "variants": variants,
    "unfinished": [outcome.run.name for outcome in outcomes if outcome.state == "unfinished"],
    "diverged": [outcome.run.name for outcome in outcomes if outcome.state == "diverged"],
  }


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Mean and spread of a score over seeds.

  Args:
    values: one for each seed that has it.

  Returns:
    {"mean", "deviation" (of a sample, n - 1), "interval": 95 % for the mean by the t distribution with n - 1 degrees of
    freedom, "n"}; None where there are too few values. The interval takes seeds as draws from a normal distribution; it
    says nothing of other cases or datasets.
  """
  array = np.asarray(values, np.float64)
  count = len(array)
  mean = float(array.mean()) if count else None
  if count < 2:
    return {"mean": mean, "deviation": None, "interval": None, "n": count}
  deviation = float(array.std(ddof=1))
  reach = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
  return {"mean": mean, "deviation": deviation, "interval": [mean - reach, mean + reach], "n": count}


def _blocks(tables: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, Any]:
  """Spread over runs of each metric, of the mean and of each class."""
  rows = {
    name: {
      metric: spread([table[name][metric] for table in tables if table[name][metric] is not None])
      for metric in tables[0][name]
    }
    for name in (tables[0] if tables else {})
  }
  return {"mean": rows.pop(MEAN, {}), "classes": rows}


def _less(
  ours: Mapping[str, Mapping[str, float | None]], other: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, float | None]]:
  return {
    name: {
      metric: None if value is None or other[name][metric] is None else value - other[name][metric]
      for metric, value in row.items()
    }
    for name, row in ours.items()
  }


def _csv(outcomes: Sequence[Outcome], split: str) -> str:
  """A row a run; columns PROTOCOL/METRIC/CLASS, an empty field was not scored."""
  content = io.StringIO()
  writer = csv.writer(content, lineterminator="\n")
  scored = [outcome for outcome in outcomes if outcome.state == "scored"]
  columns = list(_named_scores(scored[0])) if scored else []
  writer.writerow(("variant", "seed", "split", "state", "steps", "best_step", "seconds", "val_dice", *columns))
  for outcome in outcomes:
    record, checkpoint, named = outcome.record, {}, {}
    if outcome.state == "scored":
      checkpoint, named = outcome.summary["checkpoint"], _named_scores(outcome)
    about = (outcome.run.variant, outcome.run.seed, split, outcome.state, record.steps, checkpoint.get("step"))
    values = (f"{record.seconds:.1f}", checkpoint.get("val_dice"), *(named.get(column) for column in columns))
    writer.writerow("" if value is None else value for value in (*about, *values))
  return content.getvalue()


def _named_scores(outcome: Outcome) -> dict[str, float | None]:
  return {
    f"{protocol}/{metric}/{name}": value
    for protocol in protocols.PROTOCOLS
    for name, row in outcome.scores(protocol).items()
    for metric, value in row.items()
  }


def table_text(summary: Mapping[str, Any]) -> str:
  """The table of an ablation in Markdown: a row a variant, means over classes."""
  lines = [
    f"Scores on the {summary['split']} split, over the seeds {', '.join(map(str, summary['seeds']))}: mean ± standard "
    f"deviation [95 % interval of the mean]; differences to {summary['reference']} are paired by seed.",
    "",
    f"| variant | seeds | Dice % (sound) | difference | Dice % (paper) | difference | HD95 {summary['unit']} (sound) |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, variant in summary["variants"].items():
    lines.append(f"| {name} | {len(variant['seeds'])} | " + " | ".join(_cells(variant)) + " |")
  for what, words in (("unfinished", "Not finished"), ("diverged", "Not counted, their loss was no longer finite")):
    if summary[what]:
      lines += ["", f"{words}: {', '.join(summary[what])}."]
  return "\n".join(lines)


def _cells(variant: Mapping[str, Any]) -> Iterator[str]:
  for protocol in ("sound", "paper"):
    yield _cell(variant["protocols"][protocol]["mean"].get("dice"), 100)
    difference = variant["difference"]
    yield "reference" if difference is None else _cell(difference[protocol]["mean"].get("dice"), 100, sign="+")
  yield _cell(variant["protocols"]["sound"]["mean"].get("hd95"), 1)


def _cell(entry: Mapping[str, Any] | None, factor: float, sign: str = "") -> str:
  if entry is None or entry["mean"] is None:
    return "-"
  text = f"{factor * entry['mean']:{sign}.2f}"
  if entry["interval"] is None:
    return text
  low, high = (f"{factor * bound:{sign}.2f}" for bound in entry["interval"])
  return f"{text} ± {factor * entry['deviation']:.2f} [{low}, {high}]"
