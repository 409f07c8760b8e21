"""What becomes of one case's prediction: scores, files, a picture. Runs in worker processes and never imports JAX."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from selfreg_jax.data.manifest import Case, CaseArrays, Manifest
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import class_maps, protocols, report
from selfreg_jax.evaluation.postprocess import keep_largest_components
from selfreg_jax.workers import start_worker


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """What a network says of a case.

  Attributes:
    case: the case.
    classes: (slices, rows, columns) uint8, at native size.
    network_classes: (size, size) uint8 of an image as the network gives them; None for volumes.
    network_truth: (size, size) uint8, the label resized to the network's size by nearest neighbours; None for volumes.
  """

  case: Case
  classes: np.ndarray
  network_classes: np.ndarray | None = None
  network_truth: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a case.

  Attributes:
    case_id: its id.
    tables: protocol -> scores by class.
    removed: voxels that postprocessing took away.
    caption: the mean Dice, for people.
  """

  case_id: str
  tables: dict[str, protocols.ClassTable]
  removed: int
  caption: str


@dataclasses.dataclass(frozen=True)
class CaseScorer:
  """Scores cases of one dataset and writes their class maps and overlays.

  Attributes:
    manifest: of the dataset; `for_dataset` leaves out its cases, which are sent to other processes one by one.
    directory: the dataset's folder.
    output: folder whose `predictions` and `overlays` take the files.
    postprocess: whether only the largest component of each class is kept.
  """

  manifest: Manifest
  directory: str
  output: pathlib.Path
  postprocess: bool

  @classmethod
  def for_dataset(
    cls, manifest: Manifest, directory: str | os.PathLike, output: pathlib.Path, *, postprocess: bool
  ) -> "CaseScorer":
    """A scorer that is cheap to send to other processes."""
    return cls(dataclasses.replace(manifest, cases={}, splits={}, folds=()), str(directory), output, postprocess)

  def __call__(self, prediction: Prediction) -> Outcome:
    """Scores a case and writes its files."""
    manifest, case, classes = self.manifest, prediction.case, prediction.classes
    arrays = CaseArrays(self.directory)
    image, truth = arrays.image(case), arrays.label(case)
    network_classes, removed = prediction.network_classes, 0
    if self.postprocess:
      classes, removed = keep_largest_components(classes, num_classes=manifest.num_classes)
      if network_classes is not None:
        network_classes, _ = keep_largest_components(network_classes, num_classes=manifest.num_classes)
    if manifest.kind == "image":
      tables = {
        "sound": protocols.evaluate_case(
          classes[0], truth[0], num_classes=manifest.num_classes, spacing=case.spacing[1:], protocol="sound"
        ),
        "paper": protocols.evaluate_case(
          network_classes, prediction.network_truth, num_classes=manifest.num_classes, protocol="paper"
        ),
      }
    else:
      tables = protocols.evaluate_protocols(
        classes, truth, num_classes=manifest.num_classes, spacing=case.spacing, protocols=protocols.PROTOCOLS
      )
    dice = np.array([row["dice"] for row in tables["sound"].values()])
    caption = "nothing to score" if np.isnan(dice).all() else f"Dice {100 * np.nanmean(dice):.2f} %"
    class_maps.write_case(
      class_maps.path_for(self.output / "predictions", case.id, manifest.kind), classes, case, manifest
    )
    report.overlay_case(
      self.output / "overlays" / f"{case.id}.png",
      _shown(image),
      truth,
      classes,
      class_names=manifest.classes,
      axcodes=case.axcodes,
      spacing=case.spacing,
      scale=manifest.scale,
      title=f"{case.id}, {caption}",
    )
    return Outcome(case.id, tables, removed, caption)


def _shown(image: np.ndarray) -> np.ndarray:
  """The channels that a picture can show: all of grey and RGB images, else the first."""
  return image if image.shape[-1] in (1, 3) else image[..., :1]


def score_all(scorer: CaseScorer, predictions: Iterable[Prediction], *, workers: int) -> Iterator[Outcome]:
  """Scores cases, in worker processes while the next ones are being predicted; the order is that of the predictions.

  No more than `workers` + 1 predictions are held at a time.

  Args:
    scorer: what is done with each.
    predictions: made as they are asked for.
    workers: number of processes; 1 works in this process.

  Yields:
    What came of each case.

  Raises:
    UserError: a worker process died.
  """
  if workers == 1:
    yield from map(scorer, predictions)
    return
  with concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
  ) as executor:
    pending = collections.deque()
    try:
      for prediction in predictions:
        pending.append(executor.submit(scorer, prediction))
        if len(pending) > workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    except BrokenProcessPool as error:
      raise UserError(
        f"a process that scores cases died, probably out of memory; use fewer than --workers={workers}"
      ) from error
    finally:
      executor.shutdown(wait=False, cancel_futures=True)
