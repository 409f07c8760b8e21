"""Runs an ablation: trains and scores every run that is not finished yet, then writes what came out."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import time
from collections.abc import Sequence

import jax
from rich.console import Console

from selfreg_jax import config as configs
from selfreg_jax import workdir as workdirs
from selfreg_jax.analysis.ablation import figures, records, results
from selfreg_jax.analysis.ablation.design import Design, Run
from selfreg_jax.analysis.ablation.group_training import train_group
from selfreg_jax.analysis.ablation.grouping import group_runs
from selfreg_jax.data.datasets import listed
from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.evaluation import scoring
from selfreg_jax.training import checkpoints
from selfreg_jax.training.checkpoints import DamagedError
from selfreg_jax.training.loop import TrainingDivergedError, train_and_evaluate
from selfreg_jax.training.plan import Plan, make_plan
from selfreg_jax.training.signals import TrainingInterruptedError
from selfreg_jax.training.start import check_same_run

MODES = ("auto", "sequential", "vmap", "devices")
_RUNS_FOLDER = "runs"
_LOCK_FILE = ".results.lock"


@dataclasses.dataclass(frozen=True)
class Options:
  """How an ablation is run; the numbers that come out do not depend on it, but for rounding.

  Attributes:
    mode: "sequential" (one run after another, on all local devices), "vmap" (runs that differ in numbers only side by
      side in one program, on one device), "devices" (these side by side on all local devices) or "auto" (sequential on
      CPU, where vmapped convolutions are slow; else vmap).
    share: (number of this process, number of processes) that share the runs.
    memory_limit: bytes on each device that a program may take; None takes what is free.
    workers: processes that score.
  """

  mode: str = "auto"
  share: tuple[int, int] = (0, 1)
  memory_limit: int | None = None
  workers: int = 1


def run_ablation(design: Design, workdir: str | os.PathLike, options: Options, *, console: Console) -> dict:
  """Trains and scores what is not finished, and writes tables and figures into the folder.

  Each run is an ordinary workdir in DIR/runs/VARIANT/seed_S, which `train.py` continues and `eval.py` scores. Of
  several processes each takes its share of the runs; whoever is the last to finish writes the whole table.

  Args:
    design: what is compared.
    workdir: DIR, shared by all processes.
    options: how.
    console: where to print.

  Returns:
    What was written to `summary.json`.

  Raises:
    UserError: a config, the data or a workdir cannot be used.
    TrainingInterruptedError: SIGTERM, SIGINT or SIGHUP came; the same command continues.
    FaultError: runs diverged (the tables are written without them), or data could not be read or saved.
  """
  folder = pathlib.Path(workdir)
  mode = resolve_mode(options.mode)
  devices = jax.local_devices() if mode != "vmap" else jax.local_devices()[:1]
  number, count = options.share
  own = design.runs[number::count]
  check_runs(design, own, folder, devices if mode == "sequential" else devices[:1])
  with workdirs.must_be_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
  folder_of = functools.partial(run_folder, folder)
  where = f", of which process {number} of {count} takes {len(own)}" if count > 1 else ""
  console.print(f"ablation    {len(design.variants)} variants x {len(design.seeds)} seeds{where}; mode {mode}")
  open_runs = [run for run in own if not records.read(folder_of(run), run.config).is_settled]
  if len(open_runs) < len(own):
    console.print(f"            {len(own) - len(open_runs)} run(s) are finished already")
  request = scoring.Request(split=design.split, workers=options.workers)

  if mode == "sequential":
    for run in own:
      if run in open_runs:
        train_alone(run, folder_of(run), console)
      _score(run, folder_of(run), request, console)
  else:
    for group in group_runs(open_runs):
      train_group(group, folder_of, devices=devices, memory_limit=options.memory_limit, console=console)
    for run in own:
      _score(run, folder_of(run), request, console)
  summary = write_results(design, folder)
  console.print(results.table_text(summary), markup=False, highlight=False)
  console.print(f"results     {folder}/table.md, results.csv, summary.json, ablation.png, curves.png", highlight=False)
  if summary["diverged"]:
    raise FaultError(f"not counted, their loss was no longer finite: {', '.join(summary['diverged'])}")
  return summary


def resolve_mode(mode: str) -> str:
  """What "auto" means on this machine; any other mode as it is."""
  if mode != "auto":
    return mode
  return "sequential" if jax.default_backend() == "cpu" else "vmap"


def run_folder(folder: pathlib.Path, run: Run) -> pathlib.Path:
  """The workdir of a run."""
  return folder / _RUNS_FOLDER / run.variant / f"seed_{run.seed}"


def run_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """The workdirs of all runs that an ablation's folder holds; none where it is no such folder."""
  return sorted(folder.glob(f"{_RUNS_FOLDER}/*/seed_*"))


def check_runs(design: Design, own: Sequence[Run], folder: pathlib.Path, devices: Sequence[jax.Device]) -> None:
  """Finds what can be wrong before anything is trained.

  Args:
    design: what is compared.
    own: the runs of this process, whose workdirs no other process writes into.
    folder: DIR.
    devices: that a run is trained on.

  Raises:
    UserError: a run's config does not go with its data or the devices, its workdir holds another run or one on other
      data, DIR holds variants of another ablation, or there is nothing to score.
  """
  own_names = {run.name for run in own}
  for run in design.runs:
    config = configs.with_absolute_paths(run.config)
    config.data.verify = False  # each run reads its data whole when it begins
    try:
      plan = make_plan(config, run_folder(folder, run), devices)
    except UserError as error:
      raise UserError(f"variant {run.variant!r}: {error}") from error
    if not plan.manifest.split(design.split):
      raise UserError(f"{config.data.dir}: the {design.split} split, which the ablation scores, is empty; see --split")
    if run.name in own_names:
      _check_same_run(run_folder(folder, run), plan)
  others = {path.parent.name for path in run_folders(folder)} - set(design.variants)
  if others:
    raise UserError(
      f"{folder}: holds runs of another ablation, of the variants {listed(sorted(others))}; give another --workdir, or "
      f"remove them from {folder / _RUNS_FOLDER}"
    )


def _check_same_run(folder: pathlib.Path, plan: Plan) -> None:
  for checkpoint in checkpoints.find(folder)[-1:]:
    remedy = f"Give another --workdir, or remove {folder} to train it anew."
    try:
      check_same_run(checkpoint, plan, checkpoint.config.get("init_from", ""), override=False, remedy=remedy)
    except DamagedError:
      continue  # which will be set aside
    except UserError as error:
      raise UserError(f"{folder}: {error}") from error


def train_alone(run: Run, folder: pathlib.Path, console: Console) -> None:
  """Trains, or continues, one run as `train.py` does, and records what became of it."""
  console.print(f"run         {run.name}", markup=False, highlight=False)
  record, start = records.read(folder, run.config), time.monotonic()

  def write(**changes: object) -> None:
    if folder.is_dir():
      seconds = record.seconds + time.monotonic() - start
      records.write(folder, dataclasses.replace(record, seconds=seconds, **changes))

  try:
    state = train_and_evaluate(run.config, folder)
  except TrainingInterruptedError:
    write()
    raise
  except TrainingDivergedError as error:
    console.print(f"{run.name}: {error}", markup=False, highlight=False)
    write(steps=error.step, finished=False, diverged=str(error), on_nonfinite=records.remedy(run.config))
  else:
    write(finished=True, steps=int(state.step))


def _score(run: Run, folder: pathlib.Path, request: scoring.Request, console: Console) -> None:
  if records.read(folder, run.config).finished:
    if scoring.current(folder, scoring.default_output(folder, request.split, None), request) is not None:
      return
    console.print(f"scoring     {run.name}", markup=False, highlight=False)
    quiet = Console(quiet=True)  # a table for each run would hide the one that counts
    scoring.evaluate_workdir(folder, request, console=quiet)


def write_results(design: Design, folder: pathlib.Path) -> dict:
  """Writes tables and figures of all runs that are finished, this process's or not.

  Args:
    design: what is compared.
    folder: DIR.

  Returns:
    What was written to `summary.json`.
  """
  with (folder / _LOCK_FILE).open("w") as lock:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(lock, fcntl.LOCK_EX)  # the last of several processes to come here sees the runs of all
    outcomes = results.collect(design, functools.partial(run_folder, folder))
    summary = results.write(design, outcomes, folder)
    figures.write(design, outcomes, summary, folder)
  return summary
