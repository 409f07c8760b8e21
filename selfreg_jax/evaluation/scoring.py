"""Scores the cases of a prepared dataset with a predictor, and finds out whether that has been done already."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from selfreg_jax import config as configs
from selfreg_jax import processes
from selfreg_jax import workdir as workdirs
from selfreg_jax.data import augment
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, CaseArrays, DatasetInfo, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import case_scores, class_maps, html_report, protocols, report, sections
from selfreg_jax.evaluation.case_scores import CaseScorer, Outcome, Prediction
from selfreg_jax.evaluation.options import Options
from selfreg_jax.predictor import Predictor
from selfreg_jax.training.checkpoints import choose, load_trained

Scores = dict[str, dict[str, protocols.ClassTable]]

_RESULTS = ("overlays", "predictions", "cases.csv", "report.html", "summary.json")
_VERSIONED = ("selfreg-jax", "jax", "flax", "numpy", "scipy", "nibabel")


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be scored, and how.

  Attributes:
    split: "train", "val" or "test".
    data: a prepared dataset; None for the one that was trained on.
    checkpoint: "best" or "latest".
    options: test-time options.
    workers: processes that score.
  """

  split: str = "test"
  data: str | None = None
  checkpoint: str = "best"
  options: Options = dataclasses.field(default_factory=Options)
  workers: int = 1


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A workdir's scores.

  Attributes:
    output: the folder that they are in.
    summary: what `summary.json` holds.
    scores: protocol -> case id -> scores by class.
  """

  output: pathlib.Path
  summary: dict[str, Any]
  scores: Scores


def evaluate_workdir(
  workdir: str | os.PathLike,
  request: Request,
  *,
  console: Console,
  output: str | os.PathLike | None = None,
  reuse: bool = False,
) -> Evaluation:
  """Scores a workdir's network.

  Args:
    workdir: of `train.py` or of `selfreg_jax.models.pretrained`.
    request: what is to be scored.
    console: where to print.
    output: folder for the results; None for WORKDIR/eval/SPLIT (or, of another dataset, WORKDIR/eval/NAME_SPLIT).
    reuse: take results that are there, if they are of the same checkpoint, config, data, split and options.

  Returns:
    The evaluation.

  Raises:
    UserError: as `selfreg_jax.predictor.load` and `score_dataset`.
  """
  output = pathlib.Path(output or default_output(workdir, request.split, request.data))
  if reuse and (found := _reused(workdir, output, request)):
    console.print(f"{output}: up to date, taken as it is", markup=False, highlight=False)
    return found
  predictor = Predictor(load_trained(workdir, checkpoint=request.checkpoint), options=request.options)
  summary = score_dataset(
    predictor, request.data, split=request.split, output=output, console=console, workers=request.workers
  )
  return Evaluation(output, summary, report.read_cases_csv(output / "cases.csv"))


def default_output(workdir: str | os.PathLike, split: str, data: str | None) -> pathlib.Path:
  """Where a workdir's evaluation goes unless told otherwise: WORKDIR/eval/SPLIT, of other data /eval/NAME_SPLIT."""
  name = split if data is None else f"{pathlib.Path(data).resolve().name}_{split}"
  return pathlib.Path(workdir) / "eval" / name


def _reused(workdir: str | os.PathLike, output: pathlib.Path, request: Request) -> Evaluation | None:
  """The evaluation in a folder, if the first process finds it to be what the request would give."""
  found = None
  with processes.together():
    if processes.is_first():
      found = current(workdir, output, request)
  if not processes.gather_texts("current" if found else "")[0]:
    return None
  with processes.together():
    return found or _read(output)


def _read(output: pathlib.Path) -> Evaluation:
  summary = json.loads((output / "summary.json").read_text())
  return Evaluation(output, summary, report.read_cases_csv(output / "cases.csv"))


def current(workdir: str | os.PathLike, output: pathlib.Path, request: Request) -> Evaluation | None:
  """The evaluation in a folder, if it is what the request would give; neither network nor cases are read.

  Args:
    workdir: of the run.
    output: the folder.
    request: what would be scored.

  Returns:
    The evaluation; None where there is none, or one of another checkpoint, config, dataset, split or other options.

  Raises:
    UserError: the workdir or the dataset cannot be used.
  """
  try:
    found = _read(output)
  except (OSError, ValueError, KeyError):
    return None
  checkpoint = choose(workdir, request.checkpoint)
  config = checkpoint.config
  unread = config.copy_and_resolve_references()
  unread.data.verify = False  # the fingerprint tells one dataset from another
  manifest, _ = load_data(unread, request.data)
  wanted = {
    "checkpoint": {"step": checkpoint.step, "val_dice": checkpoint.val_dice},
    "config": json.loads(json.dumps(configs.to_json(config))),
    "options": request.options.to_json(),
  }
  data = found.summary.get("data", {})
  same = all(found.summary.get(name) == value for name, value in wanted.items())
  same &= data.get("fingerprint") == manifest.fingerprint() and data.get("split") == request.split
  return found if same else None


def load_data(config: Any, directory: str | os.PathLike | None) -> tuple[Manifest, pathlib.Path]:
  """The dataset to score: of a run on a fold of a cross-validation, as that fold sees it.

  Args:
    config: of the run.
    directory: a prepared dataset; None for the one that was trained on.

  Returns:
    (manifest, the dataset's folder).

  Raises:
    UserError: there is no such dataset, or it lacks the fold.
  """
  folder = pathlib.Path(directory or config.data.dir)
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; if the dataset has moved, give its new place with --data=DIR")
  manifest = manifests.load(folder, verify=config.data.verify)
  fold = config.data.get("fold", -1)
  if fold >= 0 and (directory is None or manifest.folds):
    manifest = manifest.with_fold(fold)
  return manifest, folder


def score_dataset(
  predictor: Predictor,
  directory: str | os.PathLike | None,
  *,
  split: str,
  output: str | os.PathLike,
  console: Console,
  workers: int = 1,
  members: Sequence[str] = (),
) -> dict[str, Any]:
  """Predicts and scores all cases of a split under both protocols.

  Writes, into the output folder: `cases.csv`, `summary.json`, `report.html` (with the sections that other commands have
  left there, see `selfreg_jax.evaluation.sections`), `overlays/<id>.png` and the class maps
  `predictions/<id>.nii.gz` (on the grid, and under the header, of the case's own image file) or, of images,
  `predictions/<id>.png`; prints a table for each protocol. Images are scored as such: in the sound protocol at their
  own size, in the paper protocol at the network's.

  Args:
    predictor: of a trained workdir, or of several.
    directory: a prepared dataset with the classes that the network was trained on; None for the one trained on.
    split: "train", "val" or "test".
    output: folder for the results.
    console: where to print.
    workers: processes that score while the next cases are predicted; 1 works in this process. Results do not depend
      on it, nor on the number of processes of JAX, which share the cases.
    members: the workdirs of an ensemble, to be named in the summary.

  Returns:
    What was written to `summary.json`.

  Raises:
    UserError: the dataset does not fit the network, or the split is empty.
  """
  output = pathlib.Path(output)
  with processes.together():
    manifest, directory = load_data(predictor.config, directory)
    check_fits(predictor.dataset, manifest, directory)
    sections.read(output)  # one that cannot be read is told before the work, not after it
    split_cases = manifest.split(split)
    if not split_cases:
      raise UserError(
        f"{directory}: the {split} split is empty; prepare the dataset with {split} cases, or give --split"
      )
  say = functools.partial(console.print, markup=False, highlight=False)
  say(f"scoring     {len(split_cases)} {split} cases of {directory}")
  say(f"options     {predictor.options}")
  with processes.together():
    seen = seen_in_training(predictor.config, manifest, directory, split_cases) if split != "train" else []
  if seen:
    say(f"warning     {len(seen)} of these cases were trained on; scores on them flatter: {', '.join(seen[:8])}")
  with replacing(output, _RESULTS, folders=("overlays", "predictions")) as staging:
    with processes.together():
      own = _score_cases(staging, predictor, manifest, directory, processes.share_of(split_cases), workers, say)
    scores, removed = _gathered(own)
    blocks = {name: protocols.summarize(table, manifest.classes, protocol=name) for name, table in scores.items()}
    summary = {
      "protocols": blocks,
      "cases": len(split_cases),
      "data": {"directory": str(directory), "split": split, "fingerprint": manifest.fingerprint()},
      "kind": manifest.kind,
      "unit": manifest.unit,
      "volume_unit": report.VOLUME_UNITS[manifest.unit],
      "seen_in_training": seen,
      "options": predictor.options.to_json(),
      "config": configs.to_json(predictor.config),
      "checkpoint": {"step": predictor.step, "val_dice": predictor.val_dice},
      "versions": versions(),
      "peak_memory_gib": peak_memory_gib(),
    }
    if members:
      summary["ensemble"] = list(members)
    if predictor.options.postprocess:
      summary["postprocess_removed_voxels"] = removed
    with processes.together():
      if processes.is_first():
        report.write_cases_csv(staging / "cases.csv", scores, manifest.classes)
        html_report.write_report(
          staging / "report.html",
          summary=summary,
          scores=scores,
          manifest=manifest,
          case_ids=[case.id for case in split_cases],
          load_case=functools.partial(
            _load_case, manifest=manifest, arrays=CaseArrays(directory), folder=staging / "predictions"
          ),
          sections=[section.shown(summary) for section in sections.read(output)],
        )
        report.write_summary(staging / "summary.json", summary)
  for protocol, block in blocks.items():
    report.print_table(block, console, protocol=protocol, kind=manifest.kind, unit=distance_unit(protocol, summary))
  if predictor.options.postprocess:
    say(f"postprocess {removed} voxels removed")
  say(f"checkpoint  step {predictor.step} of {predictor.config.data.dir}")
  say(f"results     {output}/summary.json, report.html, cases.csv, overlays/, predictions/")
  return summary


def _score_cases(
  staging: pathlib.Path,
  predictor: Predictor,
  manifest: Manifest,
  directory: pathlib.Path,
  own_cases: Sequence[Case],
  workers: int,
  say: Callable[[str], None],
) -> list[Outcome]:
  """Scores this process's cases and writes their class maps and overlays."""
  scorer = CaseScorer.for_dataset(manifest, directory, staging, postprocess=predictor.options.postprocess)
  predictions = _predictions(predictor, manifest, own_cases, CaseArrays(directory))
  workers = max(min(workers, len(own_cases)), 1)
  outcomes, start = [], time.monotonic()
  with contextlib.closing(case_scores.score_all(scorer, predictions, workers=workers)) as scored:
    for number, outcome in enumerate(scored, 1):
      outcomes.append(outcome)
      now = time.monotonic()
      say(f"{number}/{len(own_cases)} {outcome.case_id}: {outcome.caption}, {now - start:.1f} s")
      start = now
  return outcomes


def _gathered(own: Sequence[Outcome]) -> tuple[Scores, int]:
  """The scores of all processes' cases, in the order of the cases, and how many voxels were removed in all."""
  texts = processes.gather_texts(json.dumps([dataclasses.asdict(outcome) for outcome in own]))
  outcomes = processes.merge_shares([json.loads(text) for text in texts])
  scores: Scores = {protocol: {} for protocol in protocols.PROTOCOLS}
  for outcome in outcomes:
    for protocol, table in outcome["tables"].items():
      # JSON has no integers as names.
      scores[protocol][outcome["case_id"]] = {int(class_id): row for class_id, row in table.items()}
  return scores, sum(outcome["removed"] for outcome in outcomes)


@contextlib.contextmanager
def replacing(
  output: pathlib.Path, results: Sequence[str], *, folders: Sequence[str] = (), what: str = "evaluation"
) -> Iterator[pathlib.Path]:
  """A folder for results that take the place of earlier ones once they are complete, and not before.

  All processes write into it; the first one makes and replaces folders, and the others wait for that.

  Args:
    output: where the results are to be; held meanwhile.
    results: names of the files and folders that the body writes. The last one is the first to be removed and the last
      to come: where it is, the rest belongs to it.
    folders: those of them that are folders, to be made.
    what: is done here, for messages.

  Yields:
    The folder to write into.

  Raises:
    UserError: the output folder cannot be written, or is in use.
  """
  staging = output / ".partial"
  with contextlib.ExitStack() as stack:
    with processes.together():
      if processes.is_first():
        stack.enter_context(workdirs.hold(output, what=what, flag="--output"))
        shutil.rmtree(staging, ignore_errors=True)  # what an interrupted one has left
        make_folder(staging)
        for folder in folders:
          make_folder(staging / folder)
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
    yield staging
    with processes.together():
      if processes.is_first():
        _install(staging, output, results)


def _install(staging: pathlib.Path, output: pathlib.Path, results: Sequence[str]) -> None:
  (output / results[-1]).unlink(missing_ok=True)
  for name in results:
    if (output / name).is_dir():
      shutil.rmtree(output / name)
    (staging / name).replace(output / name)


def seen_in_training(
  config: Any, manifest: Manifest, directory: pathlib.Path, split_cases: Sequence[Case]
) -> list[str]:
  """Ids of cases whose images are among those that a run was trained on, as far as its dataset is still there.

  Args:
    config: of the run.
    manifest: of the dataset that is scored.
    directory: its folder; the run's own dataset has been dealt into splits and needs no look.
    split_cases: the cases that are scored.
  """
  own = pathlib.Path(config.data.dir)
  if own.resolve() == pathlib.Path(directory).resolve() or not (own / manifests.FILE_NAME).is_file():
    return []
  trained_on = manifests.load(own)
  if trained_on.folds:
    trained_on = trained_on.with_fold(config.data.get("fold", -1))
  images = {case.checksums["image"] for case in trained_on.split("train")}
  return [case.id for case in split_cases if case.checksums["image"] in images]


def distance_unit(protocol: str, summary: Mapping[str, Any]) -> str:
  """What a protocol's distances are measured in: the paper protocol counts voxels, or pixels, whatever their size."""
  if protocol == "sound" and summary["unit"] == "mm":
    return "mm"
  return "pixels" if summary["unit"] == "pixel" else "voxels"


def _predictions(
  predictor: Predictor, manifest: Manifest, split_cases: Sequence[Case], arrays: CaseArrays
) -> Iterator[Prediction]:
  size = predictor.slices.image_size
  for case in split_cases:
    image = arrays.image(case)
    if manifest.kind == "volume":
      yield Prediction(case, predictor.slices.classes(predictor.predict_fn, image, scale=manifest.scale))
      continue
    native, small = predictor.slices.classes_of_both_sizes(predictor.predict_fn, image, scale=manifest.scale)
    rows, columns = (augment.nearest_indices(length, size) for length in case.shape[1:3])
    truth = np.asarray(arrays.label(case)[0])[rows[:, None], columns[None, :]]
    yield Prediction(case, native, network_classes=small[0], network_truth=truth)


def _load_case(
  case_id: str, *, manifest: Manifest, arrays: CaseArrays, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A scored case's image as stored, truth and prediction, the last from its file."""
  case = manifest.cases[case_id]
  path = class_maps.path_for(folder, case_id, manifest.kind)
  return arrays.image(case), arrays.label(case), class_maps.read_case(path, case, manifest)


def check_fits(trained: DatasetInfo, manifest: Manifest, directory: str | os.PathLike) -> None:
  """Raises UserError where a prepared dataset is not what the network was trained on; all differences are named."""
  problems = [
    f"{name}: trained with {before}, the dataset has {now}"
    for name, before, now in trained.differences(DatasetInfo.of(manifest))
  ]
  if problems:
    raise UserError(
      f"{directory}: does not fit the network; prepare it as the training data were:\n  " + "\n  ".join(problems)
    )


def make_folder(path: pathlib.Path) -> None:
  """Creates a folder for results; raises UserError where that cannot be."""
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{path}: cannot be made a folder for results ({error.strerror}); see --output") from error


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on, and the device."""
  found = {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind}
  for name in _VERSIONED:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
      found[name] = "not installed"
  return found


def peak_memory_gib() -> float:
  """Largest resident memory of this process so far, in GiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)
