"""Runs and cases in, numbers, figure and report section out."""

import csv
import dataclasses
import io
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from selfreg_jax import config as configs
from selfreg_jax.analysis import figure, measuring, section, statistics
from selfreg_jax.analysis.ablation.running import run_folders
from selfreg_jax.analysis.measuring import Block, Example, Key, Measurer
from selfreg_jax.analysis.redundancy import correlation
from selfreg_jax.analysis.taps import block_names, model_taps
from selfreg_jax.data.datasets import listed
from selfreg_jax.data.manifest import Case, CaseArrays, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import report, scoring
from selfreg_jax.models.factory import build_model
from selfreg_jax.training.checkpoints import FOLDER, choose, load_trained

# The last one is written last: where it is, the rest belongs to it.
RESULTS = ("analysis.csv", "correlations.npz", "analysis.png", "analysis.pdf", "analysis.html", "analysis.json")

_POSITIONS_A_CHANNEL = 10  # fewer, and a probe learns its training positions by heart

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be analysed, and how.

  Attributes:
    split: "val" or "test".
    data: a prepared dataset; None for the one that was trained on.
    cases: ids of the split's cases; empty for all.
    slices: most slices of a case, evenly spaced among those with foreground.
    probe_cases: most training cases that probes are fitted to, evenly spaced.
    masks: where the logits of a class are summed for Grad-CAM: "truth" or "prediction".
    checkpoint: "best" or "latest".
    example: the slice that is shown, as CASE:SLICE; None for the one with the largest foreground.
    show: class whose Grad-CAM is shown; None for all foreground classes as one.
  """

  split: str = "test"
  data: str | None = None
  cases: tuple[str, ...] = ()
  slices: int = 8
  probe_cases: int = 64
  masks: str = "truth"
  checkpoint: str = "best"
  example: str | None = None
  show: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """A request that was found to make sense.

  Attributes:
    workdirs: of the runs, the first one's data being those of all.
    manifest: of the dataset.
    directory: its folder.
    cases: to be analysed.
    slices: case id -> slices to be analysed.
    probe_slices: the same of the training cases that probes are fitted to.
    example: (case id, slice) that is shown.
    show: name of the class whose Grad-CAM is shown, or `measuring.ALL`.
  """

  workdirs: tuple[pathlib.Path, ...]
  manifest: Manifest
  directory: pathlib.Path
  cases: list[Case]
  slices: dict[str, list[int]]
  probe_slices: dict[str, list[int]]
  example: tuple[str, int]
  show: str


@dataclasses.dataclass(frozen=True)
class RunAnalysis:
  """What was found in one run.

  Attributes:
    workdir: of the run.
    checkpoint: {"step", "val_dice"}.
    config: of the run, as JSON.
    blocks: of its network.
    values: case id -> (block, quantity, class) -> value.
    pooled: the same over all cases, of what needs no mean over cases: redundancy and the probe's R^2.
    correlations: block -> (C, C), over all cases.
    example: the slice that is shown.
  """

  workdir: pathlib.Path
  checkpoint: dict[str, Any]
  config: dict[str, Any]
  blocks: list[Block]
  values: dict[str, dict[Key, float]]
  pooled: dict[Key, float]
  correlations: dict[str, np.ndarray]
  example: Example


def analyze_workdirs(
  workdirs: Sequence[str | os.PathLike], request: Request, *, output: str | os.PathLike, say: Say = lambda line: None
) -> dict[str, Any]:
  """Analyses the networks of one run or of two, which are then compared.

  Writes, into the output folder: `analysis.json`, `analysis.csv`, `correlations.npz`, `analysis.png`, `analysis.pdf`
  and `analysis.html`; and adds a section to the report of the first run's evaluation on the same split, now if there is
  one and whenever it is evaluated.

  Args:
    workdirs: of `train.py`: of the run, and of the one that it is compared with.
    request: what is to be analysed.
    output: folder for the results.
    say: takes lines of progress.

  Returns:
    What was written to `analysis.json`.

  Raises:
    UserError: a workdir, the data or the output folder cannot be used, or the request does not fit them.
  """
  output = pathlib.Path(output)
  plan = make_plan(workdirs, request)
  with scoring.replacing(output, RESULTS, what="analysis") as staging:
    runs = [_analyze(workdir, plan, request, say) for workdir in plan.workdirs]
    summary = summarize(runs, plan, request)
    drawing = figure.draw(runs, summary, plan)
    pictures = {ending: figure.render(drawing, ending) for ending in ("png", "pdf")}
    for ending, content in pictures.items():
      (staging / f"analysis.{ending}").write_bytes(content)
    (staging / "analysis.csv").write_text(_csv(runs), encoding="utf-8")
    np.savez_compressed(staging / "correlations.npz", **_matrices(runs))
    content = section.render(summary, pictures["png"])
    section.write_page(staging / "analysis.html", content, summary)
    report.write_summary(staging / "analysis.json", summary)
  say(section.register(plan.workdirs[0], content, summary))
  return summary


def make_plan(workdirs: Sequence[str | os.PathLike], request: Request) -> Plan:
  """Finds everything that can be wrong with a request before any compute; raises UserError."""
  folders = tuple(map(pathlib.Path, workdirs))
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise UserError(f"--compare={folders[-1]}: is the same workdir; give another one")
  for flag, value in (("slices", request.slices), ("probe_cases", request.probe_cases)):
    if value < 1:
      raise UserError(f"--{flag}={value}: at least 1")
  for folder in folders:
    if not (folder / FOLDER).is_dir() and (runs := run_folders(folder)):
      raise UserError(f"{folder}: is the folder of an ablation; give one of its runs: {listed(map(str, runs))}")
  chosen = [choose(folder, request.checkpoint) for folder in folders]
  manifest, directory = scoring.load_data(chosen[0].config, request.data)
  for checkpoint in chosen:
    scoring.check_fits(checkpoint.dataset, manifest, directory)
  for folder, checkpoint in zip(folders[1:], chosen[1:], strict=True):
    other, _ = scoring.load_data(checkpoint.config, request.data)
    if other.fingerprint() != manifest.fingerprint():
      raise UserError(
        f"{folder}: was trained on other data, or another fold of them, than {folders[0]}; give a dataset without "
        "folds that is to be analysed in both with --data=DIR"
      )
  names = [block_names(model_taps(build_model(one.config.model, manifest.num_classes))) for one in chosen]
  for folder, theirs in zip(folders[1:], names[1:], strict=True):
    if theirs != names[0]:
      raise UserError(f"--compare={folder}: its network has other blocks than that of {folders[0]}; analyse them apart")
  cases = _choose_cases(manifest, directory, request)
  training = manifest.split("train")
  if not training:
    raise UserError(f"{directory}: the training split is empty; the probes of the blocks are fitted to training cases")
  places = np.linspace(0, len(training) - 1, min(request.probe_cases, len(training))).round().astype(int)
  show = request.show or measuring.ALL
  if show not in (measuring.ALL, *manifest.classes[1:]):
    raise UserError(f"--show={show}: is no class of {directory}; these are {', '.join(manifest.classes[1:])}")
  return Plan(
    workdirs=folders,
    manifest=manifest,
    directory=directory,
    cases=cases,
    slices={case.id: choose_slices(case, request.slices) for case in cases},
    probe_slices={training[place].id: choose_slices(training[place], request.slices) for place in places},
    example=_choose_example(cases, CaseArrays(directory), request),
    show=show,
  )


def _choose_cases(manifest: Manifest, directory: pathlib.Path, request: Request) -> list[Case]:
  cases = manifest.split(request.split)
  if not cases:
    raise UserError(
      f"{directory}: the {request.split} split is empty; prepare the dataset with {request.split} cases, or give "
      "--split"
    )
  ids = [case.id for case in cases]
  unknown = [case_id for case_id in request.cases if case_id not in ids]
  if unknown:
    raise UserError(f"--cases: {listed(unknown)} is not among the {request.split} cases of {directory}: {listed(ids)}")
  return [case for case in cases if not request.cases or case.id in request.cases]


def choose_slices(case: Case, most: int) -> list[int]:
  """Slices of a case, evenly spaced among those with foreground; among all where none has any.

  Args:
    case: its entry in the manifest.
    most: number of slices, if there are as many.

  Returns:
    Rising indices.
  """
  candidates = case.foreground_slices or range(case.shape[0])
  if most >= len(candidates):
    return list(candidates)
  return [candidates[(2 * place + 1) * len(candidates) // (2 * most)] for place in range(most)]


def _choose_example(cases: Sequence[Case], arrays: CaseArrays, request: Request) -> tuple[str, int]:
  if request.example is None:
    sizes = {
      (case.id, index): np.count_nonzero(arrays.label(case)[index])
      for case in cases
      for index in choose_slices(case, request.slices)
    }
    return max(sizes, key=sizes.__getitem__)
  case_id, _, text = request.example.rpartition(":")
  found = {case.id: case for case in cases}.get(case_id)
  if found is None:
    ids = listed(case.id for case in cases)
    raise UserError(f"--example={request.example}: CASE:SLICE is needed, of an analysed case: {ids}")
  if not (text.isascii() and text.isdigit() and int(text) < found.shape[0]):
    raise UserError(f"--example={request.example}: {case_id} has the slices 0 to {found.shape[0] - 1}")
  return case_id, int(text)


def _analyze(workdir: pathlib.Path, plan: Plan, request: Request, say: Say) -> RunAnalysis:
  """Fits probes to training cases, then measures the chosen cases."""
  trained = load_trained(workdir, checkpoint=request.checkpoint)
  manifest, arrays = plan.manifest, CaseArrays(plan.directory)
  most = max(len(slices) for slices in (*plan.slices.values(), *plan.probe_slices.values()))
  measurer = Measurer(trained, batch_size=min(most, trained.config.eval.batch_size), masks=request.masks)
  say(f"run         {workdir}, step {trained.step}: {len(measurer.blocks)} blocks")
  seen = scoring.seen_in_training(trained.config, manifest, plan.directory, plan.cases)
  if seen:
    say(f"warning     {len(seen)} of these cases were trained on: {listed(seen)}")

  def load(case_id: str) -> tuple[np.ndarray, np.ndarray]:
    case = manifest.cases[case_id]
    return arrays.image(case), arrays.label(case)

  clock = _Clock(say)
  total = measurer.no_moments()
  for number, (case_id, slices) in enumerate(plan.probe_slices.items(), 1):
    total = measuring.merged([total, measurer.moments(*load(case_id), slices, scale=manifest.scale)])
    clock.tell(f"probe {number}/{len(plan.probe_slices)} {case_id}: {len(slices)} slices")
  probes = measuring.fit_probes(measurer.blocks, total, manifest.num_classes)
  for line in few_positions(measurer.blocks, total):
    say(f"warning     {line}")

  values, total = {}, measurer.no_moments()
  for number, (case_id, slices) in enumerate(plan.slices.items(), 1):
    found = measurer.measure(*load(case_id), slices, probes, scale=manifest.scale)
    values[case_id] = found.values
    total = measuring.merged([total, found.moments])
    clock.tell(f"{number}/{len(plan.slices)} {case_id}: {len(slices)} slices, {_caption(found.values)}")
  case_id, index = plan.example
  example = measurer.explain(*load(case_id), index, probes, plan.show, scale=manifest.scale)
  pooled: dict[Key, float] = {}
  correlations = {}
  for block in measurer.blocks:
    moments = total[block.name]
    pooled |= measuring.block_values(block, moments, probes[block.name], manifest.classes)
    correlations[block.name] = correlation(moments.select(slice(0, block.channels)))
  return RunAnalysis(
    workdir=workdir,
    checkpoint={"step": trained.step, "val_dice": trained.val_dice},
    config=configs.to_json(trained.config),
    blocks=measurer.blocks,
    values=values,
    pooled=pooled,
    correlations=correlations,
    example=example,
  )


def few_positions(blocks: Sequence[Block], moments: measuring.BlockMoments) -> list[str]:
  """What to say of probes that were fitted to so few positions that they learn them by heart.

  Args:
    blocks: of the network.
    moments: what their probes were fitted to.

  Returns:
    A line for each such block.
  """
  counts = {block.name: int(moments[block.name].count) for block in blocks}
  return [
    f"the probe of {block.name} reads {block.channels} channels after {counts[block.name]} positions of training cases "
    "and may do worse than it could; more --probe_cases or --slices help"
    for block in blocks
    if counts[block.name] < _POSITIONS_A_CHANNEL * block.channels
  ]


class _Clock:
  """Says lines with the seconds since the last one."""

  def __init__(self, say: Say):
    self._say = say
    self._last = time.monotonic()

  def tell(self, line: str) -> None:
    now = time.monotonic()
    self._say(f"{line}, {now - self._last:.1f} s")
    self._last = now


def _caption(values: Mapping[Key, float]) -> str:
  share = values["final", "cam_inside", measuring.ALL]
  return f"Grad-CAM of the final block {100 * share:.0f} % inside"


def summarize(runs: Sequence[RunAnalysis], plan: Plan, request: Request) -> dict[str, Any]:
  """What `analysis.json` holds.

  Args:
    runs: one or two, of the same cases.
    plan: that they followed.
    request: as it was asked for.

  Returns:
    {"runs": [{"workdir", "checkpoint", "config", "blocks": [{"name", "size", "channels"}], "values": rows}],
    "comparison": rows or None, "cases", "cases_of_split", "data", "slices", "example", "request",
    "versions"}. Rows are {"block", "quantity", "class", ...} with what `statistics.means` and `statistics.differences`
    give; "pooled" is the value over all cases together, where there is one.
  """
  entries = [
    {
      "workdir": str(run.workdir),
      "checkpoint": run.checkpoint,
      "config": run.config,
      "blocks": [dataclasses.asdict(block) for block in run.blocks],
      "values": statistics.means(run.values, run.pooled),
    }
    for run in runs
  ]
  return {
    "runs": entries,
    "comparison": statistics.differences(runs[0].values, runs[1].values) if len(runs) > 1 else None,
    "cases": len(plan.cases),
    "cases_of_split": len(plan.manifest.split(request.split)),
    "data": {
      "directory": str(plan.directory),
      "dataset": plan.manifest.dataset,
      "split": request.split,
      "fingerprint": plan.manifest.fingerprint(),
      "classes": list(plan.manifest.classes),
    },
    "slices": plan.slices,
    "probe_slices": plan.probe_slices,
    "example": {"case": plan.example[0], "slice": plan.example[1], "class": plan.show},
    "request": dataclasses.asdict(request),
    "versions": scoring.versions(),
  }


def _csv(runs: Sequence[RunAnalysis]) -> str:
  """A row a value; the case is empty for values over all cases together, and the value where it is undefined."""
  content = io.StringIO()
  writer = csv.writer(content, lineterminator="\n")
  writer.writerow(("run", "case", "block", "quantity", "class", "value"))
  for run in runs:
    for case_id, values in (*run.values.items(), ("", run.pooled)):
      for key, value in values.items():
        writer.writerow((run.workdir, case_id, *key, "" if np.isnan(value) else repr(value)))
  return content.getvalue()


def _matrices(runs: Sequence[RunAnalysis]) -> dict[str, np.ndarray]:
  return {
    f"{number}/{name}": matrix.astype(np.float32)
    for number, run in enumerate(runs)
    for name, matrix in run.correlations.items()
  }
