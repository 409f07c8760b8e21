"""Two workdirs scored on the same cases and compared."""

import os
import pathlib
from typing import Any

from rich.console import Console

from selfreg_jax import processes
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import comparison, protocols, report, scoring
from selfreg_jax.evaluation.scoring import Request


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
    What was written: {"ours", "other", "data", "options", "protocols": {protocol: what `comparison.compare` gave}}.

  Raises:
    UserError: as `scoring.evaluate_workdir`, or the two have other cases or classes.
  """
  if pathlib.Path(ours).resolve() == pathlib.Path(other).resolve():
    raise UserError(f"--compare={other}: is the same workdir; give another one")
  evaluations = [scoring.evaluate_workdir(folder, request, console=console, reuse=True) for folder in (ours, other)]
  first, second = evaluations
  names = [["background", *evaluation.summary["protocols"]["sound"]["classes"]] for evaluation in evaluations]
  if names[0] != names[1]:
    raise UserError(f"{other}: its classes are {', '.join(names[1][1:])}, those of {ours} {', '.join(names[0][1:])}")
  if first.summary["unit"] != second.summary["unit"]:
    raise UserError(
      f"{other}: its distances are in {second.summary['unit']}, those of {ours} in {first.summary['unit']}; "
      "score both on one dataset with --data=DIR"
    )
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
      name: comparison.compare(first.scores[name], second.scores[name], names[0], protocol=name)
      for name in protocols.PROTOCOLS
    },
  }
  if processes.is_first():
    report.write_summary(first.output / "compare.json", result)
  comparison.print_comparison(
    result["protocols"]["sound"],
    console,
    ours_name=str(ours),
    other_name=str(other),
    protocol="sound",
    unit=scoring.distance_unit("sound", first.summary),
  )
  console.print(f"ours        {ours}\nother       {other}", markup=False, highlight=False)
  console.print(f"results     {first.output / 'compare.json'}", markup=False, highlight=False)
  return result
