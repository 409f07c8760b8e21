"""The two metric protocols: what a case scores, and what a table of cases amounts to.

"sound" is the protocol to trust: distances in millimetres, a missed or invented class scores the worst that the volume
allows and is counted, a class that is in neither array is not scored. "paper" is the one to compare with published
tables: distances in voxels, and the scores that the published evaluation code gives to empty classes, which reward a
miss with distance 0 and an invention with Dice 1. This module imports NumPy and SciPy only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from selfreg_jax.evaluation import metrics

METRICS = {
  "sound": ("dice", "jaccard", "hd95", "assd", "nsd", "volume_difference"),
  "paper": ("dice", "jaccard", "hd95", "assd"),
}
FLAGS = ("missed", "invented")
PROTOCOLS = tuple(METRICS)

_SMOOTHING = 1e-5  # in the denominator of the Dice of images, as UCTransNet's evaluation has it
_PER_MILLILITRE = 1000  # cubic millimetres
_CONFIDENCE = (2.5, 97.5)  # percentiles of the 95 % interval
_BOOTSTRAP_ENTRIES = 1 << 22  # resampling weights held at a time (32 MiB)

ClassTable = dict[int, dict[str, float]]


def evaluate_case(
  prediction: np.ndarray,
  truth: np.ndarray,
  *,
  num_classes: int,
  spacing: Sequence[float] | None = None,
  protocol: str = "sound",
  tolerance: float = 1.0,
) -> ClassTable:
  """Scores the class map of one case against the truth.

  In the sound protocol a class in neither array is nan throughout (not scored); a class missing in one of them scores
  Dice, Jaccard and NSD 0 and as both distances the diagonal of the array. The volume difference, prediction less truth,
  is what it is in all cases but the first.

  In the paper protocol, for volumes, a class missing in the prediction scores 0 throughout, distances included and
  whether or not it is in the truth; a class missing in the truth only scores Dice 1, Jaccard 1, distances 0. For
  images (UCTransNet's evaluation) Dice is 2 tp / (2 tp + fp + fn + 1e-5), Jaccard plain, both 0 where either array
  lacks the class; distances, which it does not define, are in pixels and nan where they do not exist.

  Args:
    prediction: class ids in [0, num_classes): (slice, row, column), or (row, column) for an image. Give an image as
      two dimensions: in a volume of one slice every voxel is border.
    truth: class ids, the same shape.
    num_classes: number of classes, background (0) included.
    spacing: between voxel centres along each axis of the arrays, in mm (1 for images without a physical size); the
      sound protocol needs it, the paper protocol ignores it.
    protocol: "sound" or "paper".
    tolerance: of the normalized surface Dice, in the unit of `spacing`.

  Returns:
    Class id (1 .. num_classes - 1) -> metric -> value: "dice", "jaccard", "hd95", "assd", in the sound protocol also
    "nsd" and "volume_difference" (of a volume in thousands of the spacing's unit cubed, which for mm are millilitres;
    of an image in the spacing's unit squared); and the flags "missed" (in the truth only) and "invented" (in the
    prediction only) as 0.0 or 1.0.

  Raises:
    ValueError: shapes differ, arrays hold anything but class ids, the protocol is unknown or its spacing is missing.
  """
  tables = evaluate_protocols(
    prediction, truth, num_classes=num_classes, spacing=spacing, protocols=(protocol,), tolerance=tolerance
  )
  return tables[protocol]


def evaluate_protocols(
  prediction: np.ndarray,
  truth: np.ndarray,
  *,
  num_classes: int,
  spacing: Sequence[float] | None = None,
  protocols: Sequence[str] = PROTOCOLS,
  tolerance: float = 1.0,
) -> dict[str, ClassTable]:
  """Scores one case under several protocols, counting voxels and finding surfaces once for all of them.

  Args:
    prediction: as in `evaluate_case`.
    truth: as in `evaluate_case`.
    num_classes: number of classes, background included.
    spacing: as in `evaluate_case`.
    protocols: names of the protocols.
    tolerance: as in `evaluate_case`.

  Returns:
    Protocol -> what `evaluate_case` gives for it.

  Raises:
    ValueError: as in `evaluate_case`.
  """
  prediction, truth = np.asarray(prediction), np.asarray(truth)
  for protocol in protocols:
    _check_protocol(protocol)
  if prediction.ndim not in (2, 3) or not prediction.size:
    raise ValueError(
      f"prediction must be (row, column) or (slice, row, column) and not empty, got shape {prediction.shape}"
    )
  if "sound" in protocols:
    if spacing is None:
      raise ValueError("the sound protocol measures in millimetres: give the spacing of the arrays' axes")
    spacing = metrics.check_spacing(spacing, rank=prediction.ndim)
  counts = metrics.counts(metrics.confusion_matrix(prediction, truth, num_classes=num_classes))
  overlaps = {"dice": metrics.dice(counts), "jaccard": metrics.jaccard(counts)}
  predicted_surfaces = metrics.border_points(prediction, num_classes=num_classes)
  true_surfaces = metrics.border_points(truth, num_classes=num_classes)

  tables = {protocol: {} for protocol in protocols}
  for class_id, (predicted, true) in enumerate(zip(predicted_surfaces, true_surfaces, strict=True), start=1):
    overlap = {name: float(values[class_id]) for name, values in overlaps.items()}
    flags = {
      "missed": float(len(true) > 0 and len(predicted) == 0),
      "invented": float(len(predicted) > 0 and len(true) == 0),
    }
    if "sound" in protocols:
      diagonal = metrics.volume_diagonal(truth.shape, spacing=spacing)
      scores = _score_sound(overlap, predicted, true, spacing=spacing, diagonal=diagonal, tolerance=tolerance)
      excess = float(counts.fp[class_id]) - float(counts.fn[class_id])
      size = math.prod(spacing) / (_PER_MILLILITRE if prediction.ndim == 3 else 1)
      scores["volume_difference"] = excess * size if len(predicted) or len(true) else math.nan
      tables["sound"][class_id] = {**scores, **flags}
    if "paper" in protocols:
      if prediction.ndim == 3:
        scores = _score_paper_volume(overlap, predicted, true)
      else:
        scores = _score_paper_image(metrics.Counts(*(count[class_id] for count in counts)), predicted, true)
      tables["paper"][class_id] = {**scores, **flags}
  return tables


def _check_protocol(protocol: str) -> None:
  if protocol not in METRICS:
    raise ValueError(f"unknown protocol {protocol!r}; the protocols are {', '.join(METRICS)}")


def _score_sound(
  overlap: dict[str, float],
  predicted: np.ndarray,
  true: np.ndarray,
  *,
  spacing: np.ndarray,
  diagonal: float,
  tolerance: float,
) -> dict[str, float]:
  """Scores a class by the sound protocol from its overlap and its (points, rank) surfaces."""
  if len(predicted) and len(true):
    distances = metrics.surface_distances(predicted, true, spacing=spacing)
    nsd = metrics.surface_dice(distances, tolerance=tolerance)
    return {**overlap, "hd95": metrics.hd95(distances), "assd": metrics.assd(distances), "nsd": nsd}
  if len(predicted) or len(true):
    return {**overlap, "hd95": diagonal, "assd": diagonal, "nsd": 0.0}
  return dict.fromkeys(METRICS["sound"], math.nan)


def _score_paper_volume(overlap: dict[str, float], predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
  """Scores a class of a volume as the published evaluation code of this family of methods does."""
  if not len(predicted):
    return dict.fromkeys(METRICS["paper"], 0.0)
  if not len(true):
    return {"dice": 1.0, "jaccard": 1.0, "hd95": 0.0, "assd": 0.0}
  distances = metrics.surface_distances(predicted, true)
  return {**overlap, "hd95": metrics.hd95(distances), "assd": metrics.assd(distances)}


def _score_paper_image(counts: metrics.Counts, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
  """Scores a class of an image from its own counts, as UCTransNet's evaluation code does."""
  union = counts.tp + counts.fp + counts.fn
  scores = {
    "dice": float(2 * counts.tp / (counts.tp + union + _SMOOTHING)),
    "jaccard": float(counts.tp / union) if union else 0.0,
    "hd95": math.nan,
    "assd": math.nan,
  }
  if len(predicted) and len(true):
    distances = metrics.surface_distances(predicted, true)
    scores.update(hd95=metrics.hd95(distances), assd=metrics.assd(distances))
  return scores


def dice_per_class(confusion: np.ndarray) -> np.ndarray:
  """Dice of every foreground class of one case by the sound protocol, from counts alone.

  Enough to choose a checkpoint by; it needs no spacing, and the confusion matrix may be summed slice by slice.

  Args:
    confusion: (num_classes, num_classes) voxels of class [in the truth, in the prediction], of the whole case.

  Returns:
    (num_classes - 1,): 0 for a missed or invented class, nan for a class in neither array.
  """
  return metrics.dice(metrics.counts(confusion))[1:]


def mean_foreground_dice(cases: Iterable[np.ndarray]) -> float:
  """Mean Dice over cases, then over classes: the very number that `summarize` reports as the mean.

  Args:
    cases: (num_classes - 1,) for each case, as from `dice_per_class`; nan where a class was not scored.

  Returns:
    The mean; nan if nothing was scored.

  Raises:
    ValueError: there is no case.
  """
  cases = list(cases)
  if not cases:
    raise ValueError("the mean Dice of no cases is undefined")
  return float(mean_scored(mean_scored(np.stack(cases), axis=0), axis=0))


def mean_scored(values: np.ndarray, *, axis: int) -> np.ndarray:
  """Mean over the entries that are not nan; nan where there is none."""
  scored = ~np.isnan(values)
  return _quotient(np.where(scored, values, 0).sum(axis=axis), scored.sum(axis=axis))


def _quotient(sums: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  return np.divide(sums, numbers, out=np.full(np.shape(sums), np.nan), where=numbers > 0)


def summarize(
  cases: Mapping[str, Mapping[int, Mapping[str, float]]],
  class_names: Sequence[str],
  *,
  protocol: str,
  resamples: int = 10_000,
  seed: int = 0,
) -> dict[str, Any]:
  """Means over cases, then over classes, with bootstrap intervals: one protocol's block of `summary.json`.

  Values that were not scored (nan) are left out of the means, and so is a class that no case scored. The interval is
  the 2.5th and 97.5th percentile of the same statistic over resamples of the cases, drawn with replacement, all classes
  of a case together. It is None where fewer than two cases scored: resampling one case says nothing.

  Args:
    cases: case id -> what `evaluate_case` gave for it under this protocol.
    class_names: names by class id, the background's first.
    protocol: "sound" or "paper".
    resamples: number of bootstrap resamples.
    seed: of the resampling.

  Returns:
    {"mean": {metric: value}, "interval": {metric: [low, high]}, "classes": {name: {metric: value, ..., "interval":
    {metric: [low, high]}, "n": cases with a Dice, "missed": count, "invented": count}}, "cases": count}, fit for strict
    JSON: None stands for what is undefined.

  Raises:
    ValueError: there are no cases, a case does not hold the classes that are named, or names repeat.
  """
  values = scores_array(cases, class_names, protocol=protocol)
  names, class_ids = METRICS[protocol], range(1, len(class_names))
  flags = np.array([[[table[c][flag] for flag in FLAGS] for c in class_ids] for table in cases.values()]).sum(axis=0)

  class_means = mean_scored(values, axis=0)  # (classes, metrics)
  means = mean_scored(class_means, axis=0)  # (metrics,)
  class_samples = bootstrap_means(values, resamples=resamples, seed=seed)  # (resamples, classes, metrics)
  samples = mean_scored(class_samples, axis=1)  # (resamples, metrics)
  scored = ~np.isnan(values)
  class_numbers = scored.sum(axis=0)  # (classes, metrics)
  numbers = scored.any(axis=1).sum(axis=0)  # (metrics,)

  classes = {}
  for index, name in enumerate(class_names[1:]):
    classes[name] = {
      **{metric: json_number(class_means[index, m]) for m, metric in enumerate(names)},
      "interval": {
        metric: interval(class_samples[:, index, m], class_numbers[index, m]) for m, metric in enumerate(names)
      },
      "n": int(class_numbers[index, names.index("dice")]),
      **{flag: int(flags[index, f]) for f, flag in enumerate(FLAGS)},
    }
  return {
    "mean": {metric: json_number(means[m]) for m, metric in enumerate(names)},
    "interval": {metric: interval(samples[:, m], numbers[m]) for m, metric in enumerate(names)},
    "classes": classes,
    "cases": len(cases),
  }


def scores_array(
  cases: Mapping[str, Mapping[int, Mapping[str, float]]], class_names: Sequence[str], *, protocol: str
) -> np.ndarray:
  """One protocol's scores as (cases, foreground classes, metrics) float64, in the order of `cases` and `METRICS`.

  Args:
    cases: case id -> what `evaluate_case` gave for it under this protocol.
    class_names: names by class id, the background's first.
    protocol: "sound" or "paper".

  Raises:
    ValueError: there are no cases, a case does not hold the classes that are named, or names repeat.
  """
  _check_protocol(protocol)
  if not cases:
    raise ValueError("there are no cases to summarize")
  if len(set(class_names)) != len(class_names):
    raise ValueError(f"class names must differ, got {list(class_names)}")
  class_ids = range(1, len(class_names))
  for case_id, table in cases.items():
    if set(table) != set(class_ids):
      raise ValueError(f"case {case_id!r} holds classes {sorted(table)}, expected 1..{len(class_ids)}")
  names = METRICS[protocol]
  return np.array([[[table[c][name] for name in names] for c in class_ids] for table in cases.values()], np.float64)


def bootstrap_means(values: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
  """Means over resamples of the cases, drawn with replacement, all values of a case together.

  Args:
    values: (cases, classes, metrics); nan where not scored.
    resamples: number of resamples.
    seed: of the resampling.

  Returns:
    (resamples, classes, metrics), nan where a resample holds no scored case.
  """
  # A resample is a row of weights (how often each case was drawn), so that the means are two matrix products.
  num_cases = len(values)
  flat = values.reshape(num_cases, -1)
  scored = ~np.isnan(flat)
  filled = np.where(scored, flat, 0)
  rng = np.random.default_rng(seed)
  step = max(1, _BOOTSTRAP_ENTRIES // num_cases)
  means = []
  for start in range(0, resamples, step):
    rows = min(step, resamples - start)
    drawn = rng.integers(0, num_cases, size=(rows, num_cases)) + np.arange(rows)[:, None] * num_cases
    weights = np.bincount(drawn.reshape(-1), minlength=rows * num_cases).reshape(rows, num_cases).astype(np.float64)
    means.append(_quotient(weights @ filled, weights @ scored))
  return np.concatenate(means).reshape(resamples, *values.shape[1:])


def interval(samples: np.ndarray, num_scored: int) -> list[float] | None:
  """The 95 % percentile interval of a statistic's resamples; those in which nothing was scored say nothing."""
  if num_scored < 2:
    return None
  return [float(bound) for bound in np.percentile(samples[~np.isnan(samples)], _CONFIDENCE)]


def json_number(value: float) -> float | None:
  """The number, or None for nan, which JSON does not know."""
  return None if math.isnan(value) else float(value)
