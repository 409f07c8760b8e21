"""What may be done to a class map after prediction, on request."""

import numpy as np
from scipy import ndimage

from selfreg_jax.evaluation import metrics


def keep_largest_components(classes: np.ndarray, *, num_classes: int) -> tuple[np.ndarray, int]:
  """Keeps the largest connected component of every foreground class; what else there is becomes background.

  Voxels are connected that share a face, an edge or a corner. Of equally large components the first in memory order
  stays.

  Args:
    classes: class ids in [0, num_classes), (row, column) or (slice, row, column).
    num_classes: number of classes, background included.

  Returns:
    (the class map, a new array; number of voxels that became background).
  """
  kept = classes.copy()
  structure = np.ones((3,) * classes.ndim)
  for class_id, box in enumerate(metrics.class_boxes(classes, num_classes=num_classes), start=1):
    if box is None:
      continue
    components, number = ndimage.label(classes[box] == class_id, structure)
    if number > 1:
      largest = 1 + np.argmax(np.bincount(components.ravel())[1:])
      kept[box][(components > 0) & (components != largest)] = 0
  return kept, int(np.count_nonzero(kept != classes))
