"""The analysis on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box, table, text
from rich.console import Console

from selfreg_jax.analysis.section import COLUMNS
from selfreg_jax.analysis.statistics import find


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
  """Prints a table for each run, and one of their paired differences where there are two.

  Args:
    summary: what `analysis.json` holds.
    console: where to print; 100 columns are enough.
  """
  runs = summary["runs"]
  for run in runs:
    title = f"{run['workdir']}, step {run['checkpoint']['step']}: means over {summary['cases']} cases"
    console.print(_table(title, run["blocks"], run["values"], "mean", signed=False))
  if summary["comparison"] is not None:
    title = f"{runs[0]['workdir']} less {runs[1]['workdir']}: paired difference [95 % CI]"
    console.print(_table(title, runs[0]["blocks"], summary["comparison"], "difference", signed=True))


def _table(title: str, blocks: list[Mapping[str, Any]], rows: list[dict[str, Any]], name: str, *, signed: bool) -> Any:
  result = table.Table(title=text.Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  result.add_column("block", no_wrap=True)
  for _, _, heading, _ in COLUMNS:
    result.add_column(heading, justify="right", no_wrap=True)
  for block in blocks:
    found = [(find(rows, block["name"], quantity, class_name), factor) for quantity, class_name, _, factor in COLUMNS]
    result.add_row(block["name"], *(_cell(row, name, factor, signed) for row, factor in found))
  return result


def _cell(row: Mapping[str, Any], name: str, factor: float, signed: bool) -> str:
  value = row[name]
  if value is None:
    return "-"
  digits = 1 if factor == 100 else 2
  if not signed:
    return f"{factor * value:.{digits}f}"
  spread = row["interval"]
  interval = "" if spread is None else f"\n[{', '.join(f'{factor * bound:+.{digits}f}' for bound in spread)}]"
  return f"{factor * value:+.{digits}f}{interval}"
