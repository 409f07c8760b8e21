"""Several runs of one config: the spread of their scores over seeds or folds, or their networks as one."""

import glob
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box, table, text
from rich.console import Console

from selfreg_jax import config as configs
from selfreg_jax import processes
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import protocols, report, scoring
from selfreg_jax.evaluation.scoring import Request, Scores
from selfreg_jax.predictor import load_ensemble
from selfreg_jax.training.checkpoints import FOLDER

_SHOWN = {
  "dice": ("Dice %", 100.0),
  "hd95": ("HD95 {unit}", 1.0),
  "assd": ("ASSD {unit}", 1.0),
  "nsd": ("NSD %", 100.0),
}


def find_workdirs(pattern: str) -> list[pathlib.Path]:
  """The workdirs of runs that a glob pattern matches, sorted; raises UserError where there are none."""
  found = sorted(pathlib.Path(path) for path in glob.glob(pattern))
  workdirs = [path for path in found if (path / FOLDER).is_dir()]
  if not workdirs:
    what = "matches no folder" if not found else f"matches {len(found)} path(s), none the workdir of a training run"
    raise UserError(f"--workdirs={pattern}: {what}")
  return workdirs


def default_output(workdirs: Sequence[pathlib.Path], name: str) -> pathlib.Path:
  """A folder beside the workdirs, in the deepest one that holds all of them: `name` and what their names begin with."""
  folder = pathlib.Path(os.path.commonpath([path.absolute().parent for path in workdirs]))
  letters = itertools.takewhile(
    lambda column: len({*column}) == 1, zip(*(path.name for path in workdirs), strict=False)
  )
  beginning = "".join(column[0] for column in letters).strip("_-.")
  return folder / (f"{name}_{beginning}" if beginning else name)


def pool_workdirs(
  workdirs: Sequence[pathlib.Path], request: Request, *, output: str | os.PathLike, console: Console
) -> dict[str, Any]:
  """Scores every workdir, each into its own eval folder (results that are up to date are taken), and pools them.

  Runs on several folds of one dataset each score their own held-out cases with the split "val"; the scores of all
  held-out cases together are given too, where no case was scored by two runs.

  Args:
    workdirs: of the runs.
    request: what is to be scored, the same for all.
    output: folder for `pooled.json`.
    console: where to print.

  Returns:
    What was written: {"runs": [...], "split", "options", "unit", "protocols": {protocol: what `pool` gave}, "together":
    {protocol: what `protocols.summarize` gave} or None}.

  Raises:
    UserError: as `scoring.evaluate_workdir`, or the runs have other classes or differ in more than seed and fold.
  """
  evaluations = [scoring.evaluate_workdir(workdir, request, console=console, reuse=True) for workdir in workdirs]
  first = evaluations[0].summary
  names = ["background", *first["protocols"]["sound"]["classes"]]
  for workdir, evaluation in zip(workdirs, evaluations, strict=True):
    theirs = list(evaluation.summary["protocols"]["sound"]["classes"])
    if theirs != names[1:] or evaluation.summary["unit"] != first["unit"]:
      raise UserError(f"{workdir}: its classes ({', '.join(theirs)}) or unit are not those of {workdirs[0]}")
  _check_one_config(workdirs, [evaluation.summary["config"] for evaluation in evaluations])
  scores = [evaluation.scores for evaluation in evaluations]
  together = _together(scores)
  result = {
    "runs": [
      {
        "workdir": str(workdir),
        "data": evaluation.summary["data"],
        "checkpoint": evaluation.summary["checkpoint"],
        "cases": evaluation.summary["cases"],
      }
      for workdir, evaluation in zip(workdirs, evaluations, strict=True)
    ],
    "split": request.split,
    "options": request.options.to_json(),
    "unit": first["unit"],
    "protocols": {
      name: pool([evaluation.summary["protocols"][name] for evaluation in evaluations]) for name in protocols.PROTOCOLS
    },
    "together": None if together is None else _summaries(together, names),
  }
  output = pathlib.Path(output)
  scoring.make_folder(output)
  if processes.is_first():
    report.write_summary(output / "pooled.json", result)
  for name, block in result["protocols"].items():
    print_pooled(block, console, protocol=name, unit=scoring.distance_unit(name, first))
  if result["together"]:
    console.print(f"all {sum(run['cases'] for run in result['runs'])} cases, each scored by one run, together:")
    for name, block in result["together"].items():
      report.print_table(block, console, protocol=name, kind=first["kind"], unit=scoring.distance_unit(name, first))
  console.print(f"results     {output / 'pooled.json'}", markup=False, highlight=False)
  return result


def _check_one_config(workdirs: Sequence[pathlib.Path], contents: Sequence[Mapping[str, Any]]) -> None:
  first = configs.from_json(contents[0])
  for workdir, content in zip(workdirs, contents, strict=True):
    differing = [
      line
      for line in configs.differences(configs.from_json(content), first)
      if not line.startswith(("config.seed:", "config.data.fold:", "config.init_from:"))
    ]
    if differing:
      raise UserError(
        f"{workdir}: was trained with another config than {workdirs[0]}, and a mean over them would mean nothing "
        "(--compare takes two different runs):\n  " + "\n  ".join(differing)
      )


def pool(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Mean and standard deviation over runs of what they scored.

  Args:
    blocks: of each run, what `protocols.summarize` gave under one protocol.

  Returns:
    {"mean": {metric: {"mean", "deviation", "n"}}, "classes": {name: the same}}; the deviation is the sample's
    (n - 1), None for fewer than two runs; runs that did not score a metric do not count.
  """
  return {
    "mean": _spread([block["mean"] for block in blocks]),
    "classes": {name: _spread([block["classes"][name] for block in blocks]) for name in blocks[0]["classes"]},
  }


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  metrics = [name for name in protocols.METRICS["sound"] if name in rows[0]]
  spread = {}
  for metric in metrics:
    values = np.array([row[metric] for row in rows if row[metric] is not None])
    spread[metric] = {
      "mean": float(values.mean()) if len(values) else None,
      "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
      "n": len(values),
    }
  return spread


def _together(scores: Sequence[Scores]) -> Scores | None:
  """All cases of several runs; None where one run says it all, or a case was scored twice."""
  ids = [case_id for one in scores for case_id in one["sound"]]
  if len(scores) == 1 or len(set(ids)) < len(ids):
    return None
  return {name: {key: value for one in scores for key, value in one[name].items()} for name in protocols.PROTOCOLS}


def _summaries(scores: Scores, class_names: Sequence[str]) -> dict[str, Any]:
  return {name: protocols.summarize(table, class_names, protocol=name) for name, table in scores.items()}


def print_pooled(block: Mapping[str, Any], console: Console, *, protocol: str, unit: str) -> None:
  """Prints one protocol's pooled scores: a row a class, the mean over classes last.

  Args:
    block: what `pool` gave.
    console: where to print; 100 columns are enough.
    protocol: "sound" or "paper".
    unit: of the distances.
  """
  result = table.Table(
    title=f"{protocol} protocol: mean and standard deviation over runs", title_justify="left", box=box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )  # fmt: skip
  result.add_column("class", overflow="fold", max_width=20)
  shown = {metric: entry for metric, entry in _SHOWN.items() if metric in block["mean"]}
  for title, _ in shown.values():
    result.add_column(title.format(unit=unit), justify="right", no_wrap=True)
  result.add_column("n", justify="right", no_wrap=True)
  for name, row in (*block["classes"].items(), ("mean", block["mean"])):
    if row is block["mean"]:
      result.add_section()
    cells = [_with_deviation(row[metric], factor) for metric, (_, factor) in shown.items()]
    result.add_row(text.Text(name), *cells, str(row["dice"]["n"]))
  console.print(result)


def _with_deviation(entry: Mapping[str, Any], factor: float) -> str:
  if entry["mean"] is None:
    return "-"
  deviation = "" if entry["deviation"] is None else f" ± {factor * entry['deviation']:.2f}"
  return f"{factor * entry['mean']:.2f}{deviation}"


def score_ensemble(
  workdirs: Sequence[pathlib.Path], request: Request, *, output: str | os.PathLike, console: Console
) -> dict[str, Any]:
  """Scores the networks of several workdirs as one that averages their probabilities.

  Args:
    workdirs: of the runs; their networks were trained on data of one kind at one image size.
    request: what is to be scored.
    output: folder for the results; see `scoring.score_dataset`.
    console: where to print.

  Returns:
    What was written to `summary.json`.

  Raises:
    UserError: the runs do not go together; as `scoring.score_dataset`.
  """
  predictor = load_ensemble(workdirs, checkpoint=request.checkpoint, options=request.options)
  if request.data is None and len({config.data.dir for config in predictor.configs}) > 1:
    raise UserError("--ensemble: these runs were trained on different datasets; say which is scored with --data=DIR")
  if request.split != "test" and len({(c.data.dir, c.data.get("fold", -1)) for c in predictor.configs}) > 1:
    raise UserError(
      f"--ensemble --split={request.split}: these runs were trained on different folds or preparations, each on cases "
      "that others hold out; only --split=test is unseen by all"
    )
  return scoring.score_dataset(
    predictor,
    request.data,
    split=request.split,
    output=output,
    console=console,
    workers=request.workers,
    members=[str(workdir) for workdir in workdirs],
  )
