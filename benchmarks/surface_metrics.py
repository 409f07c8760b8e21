"""HD95 and ASSD of one organ: this package against medpy.metric.binary.

Both sides take the same two volumes of voxels and give the two distances in millimetres. Equal: both distances, to
1e-9 of a millimetre. Each organ has a row for HD95 alone and one for both distances, for which ours computes the
distances between the surfaces once, and medpy once for each of its two functions. Ours looks up nearest points on all
cores, medpy's distance transform has one.

python -m benchmarks.surface_metrics [--short] [--json]
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measuring
from selfreg_jax.evaluation import metrics

_SPACING = (3.0, 0.78, 0.85)  # mm along slices, rows, columns
_TARGET = 1 / 40

Measure = Callable[[np.ndarray, np.ndarray], tuple[float, ...]]


def ellipsoid(shape: tuple[int, ...], center: tuple[float, ...], radius: float) -> np.ndarray:
  """A solid ellipsoid of bool voxels.

  Args:
    shape: of the volume.
    center: as shares of its sides.
    radius: likewise, the same along all axes.

  Returns:
    (slices, rows, columns) bool.
  """
  axes = np.ogrid[tuple(slice(0, size) for size in shape)]
  parts = zip(axes, shape, center, strict=True)
  return sum(((x - c * size) / (radius * size)) ** 2 for x, size, c in parts) < 1


def organs(shape: tuple[int, int, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Predictions and truths of typical sizes.

  Args:
    shape: (slices, rows, columns).

  Returns:
    (prediction, truth) by name, both bool.
  """
  small = ellipsoid(shape, (0.5, 0.4, 0.6), 0.04), ellipsoid(shape, (0.51, 0.4, 0.605), 0.045)
  large = ellipsoid(shape, (0.5, 0.5, 0.4), 0.2), ellipsoid(shape, (0.51, 0.49, 0.4), 0.21)
  far = small[0] | ellipsoid(shape, (0.9, 0.9, 0.1), 0.04), small[1]
  return {"small organ (gallbladder)": small, "large organ (liver)": large, "false positive far away": far}


def ours(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
  """HD95 and ASSD in mm."""
  surfaces = (metrics.border_points(mask, num_classes=2)[0] for mask in (prediction, truth))
  distances = metrics.surface_distances(*surfaces, spacing=_SPACING)
  return metrics.hd95(distances), metrics.assd(distances)


def our_hd95(prediction: np.ndarray, truth: np.ndarray) -> tuple[float]:
  """HD95 in mm."""
  surfaces = (metrics.border_points(mask, num_classes=2)[0] for mask in (prediction, truth))
  return (metrics.hd95(metrics.surface_distances(*surfaces, spacing=_SPACING)),)


def their_hd95(prediction: np.ndarray, truth: np.ndarray) -> tuple[float]:
  """The same by medpy."""
  from medpy.metric import binary

  return (float(binary.hd95(prediction, truth, voxelspacing=_SPACING)),)


def theirs(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
  """HD95 and ASSD by medpy."""
  from medpy.metric import binary

  return (
    float(binary.hd95(prediction, truth, voxelspacing=_SPACING)),
    float(binary.assd(prediction, truth, voxelspacing=_SPACING)),
  )


def measure(
  name: str,
  masks: tuple[np.ndarray, np.ndarray],
  this: Measure,
  other: Measure,
  *,
  rounds: int,
  target: float | None = None,
) -> measuring.Row:
  """Checks that both sides find the same distances, and times them.

  Args:
    name: of the row.
    masks: prediction and truth.
    this: our side.
    other: the other side.
    rounds: timed runs of each.
    target: see `measuring.Row`.

  Returns:
    The row.

  Raises:
    NotComparableError: the distances differ.
  """
  found = this(*masks)
  measuring.require_equal(name, found, other(*masks), rtol=0.0, atol=1e-9)
  sides: dict[str, Callable[[], Any]] = {"ours": lambda: this(*masks), "other": lambda: other(*masks)}
  timings = measuring.alternate(sides, rounds=rounds, warmup=0)
  return measuring.timed_row(
    name, timings["ours"], timings["other"], target=target, distances=found, voxels=int(masks[1].sum())
  )


def main() -> None:
  """Measures and prints."""
  options = measuring.parser(__doc__).parse_args()
  measuring.require("medpy")
  shape, rounds = ((40, 128, 128), 3) if options.short else ((150, 512, 512), 3)
  rows = []
  for name, masks in organs(shape).items():
    target = None if options.short else _TARGET
    rows.append(measure(f"{name}: HD95", masks, our_hd95, their_hd95, rounds=rounds, target=target))
    rows.append(measure(f"{name}: HD95 and ASSD", masks, ours, theirs, rounds=rounds))
  measuring.present(
    f"HD95 and ASSD in a volume of {' x '.join(map(str, shape))} voxels of {' x '.join(map(str, _SPACING))} mm",
    rows,
    as_json=options.json,
    short=options.short,
    other="medpy",
    notes=[f"{row.name}: {1 / row.ratio:.0f} times as fast" for row in rows],
  )


if __name__ == "__main__":
  measuring.run(main)
