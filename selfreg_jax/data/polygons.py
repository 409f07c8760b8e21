"""Outlines drawn in Aperio ImageScope (XML) to masks.

A file of annotations comes from outside: it is parsed without document type, entities or anything that it could pull
in, and its numbers are checked before they become array sizes. Every fault is a `CaseError`, as in `cases`.
"""

import pathlib
from collections.abc import Sequence
from xml.etree.ElementTree import ParseError

import defusedxml.ElementTree
import numpy as np
from defusedxml.common import DefusedXmlException

from selfreg_jax.data.cases import CaseError, read_bytes

# A file of outlines drawn by hand on one image stays far below; MoNuSeg's largest has a few megabytes. An element
# takes up to fifty times its length in memory.
_MOST_BYTES = 1 << 25
# Outlines are drawn a little over the border. Further out than half an image they belong to another one.
_OUTSIDE = 0.5
_MOST_VERTICES = 20_000  # of one outline; rasterizing takes a few bytes for each of them and each row
# Rasterizing takes time for each outline and for each pixel around which one is drawn.
_MOST_REGIONS = 100_000
_MOST_COVERED = 16  # times the image by the boxes around the outlines; nuclei side by side cover it once


def read_polygons(path: pathlib.Path) -> list[np.ndarray]:
  """Reads the outlines of an ImageScope file: Annotations/Annotation/Regions/Region/Vertices/Vertex.

  Args:
    path: the XML file.

  Returns:
    (vertices, 2) float64 arrays of (x, y) = (column, row), the corner of the first pixel being (0, 0).

  Raises:
    CaseError: the file cannot be read, is too large, no such XML or holds a document type, no region, a region that
      cuts out (NegativeROA), or vertices that are no finite numbers.
  """
  try:
    root = defusedxml.ElementTree.fromstring(read_bytes(path, _MOST_BYTES), forbid_dtd=True)
  except ParseError as error:
    raise CaseError(f"damaged or no XML file ({error})") from error
  except DefusedXmlException as error:
    raise CaseError("holds a document type or entities, which outlines do not need; it is not read") from error
  except (ValueError, LookupError) as error:  # an encoding that is unknown or wrong
    raise CaseError(f"damaged or no XML file ({error})") from error
  regions = root.findall("./Annotation/Regions/Region") if root.tag == "Annotations" else []
  if not regions:
    raise CaseError("holds no Annotations/Annotation/Regions/Region of ImageScope")
  if len(regions) > _MOST_REGIONS:
    raise CaseError(f"holds {len(regions)} regions; more than {_MOST_REGIONS} in one image are not supported")
  if any(region.get("NegativeROA", "0") not in ("0", "") for region in regions):
    raise CaseError("holds a region that cuts out of others (NegativeROA), which is not supported")
  return [_vertices(region.findall("./Vertices/Vertex"), number) for number, region in enumerate(regions, 1)]


def _vertices(vertices: Sequence, number: int) -> np.ndarray:
  if len(vertices) > _MOST_VERTICES:
    raise CaseError(f"region {number} has {len(vertices)} vertices; an outline of a nucleus has fewer than a thousand")
  try:
    polygon = np.array([(float(vertex.attrib["X"]), float(vertex.attrib["Y"])) for vertex in vertices])
  except (KeyError, ValueError) as error:
    raise CaseError(f"region {number}: a vertex without the numbers X and Y ({error})") from error
  if not np.isfinite(polygon).all():
    raise CaseError(f"region {number}: a vertex that is not finite")
  return polygon.reshape(-1, 2)


def rasterize(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """The union of polygons as a mask: the pixels whose centre (column + 0.5, row + 0.5) lies inside any of them.

  Inside is where a line to the left crosses the outline an odd number of times (even-odd rule), which is well defined
  for outlines that cross themselves too.

  Args:
    polygons: (vertices, 2) arrays of (x, y); the last vertex is joined to the first.
    shape: (rows, columns) of the mask.

  Returns:
    (rows, columns) bool.

  Raises:
    CaseError: a polygon reaches out of the image by more than half the image, or they cover it many times over.
  """
  size = np.array(shape[::-1])
  for number, polygon in enumerate(polygons, 1):
    if ((polygon < -_OUTSIDE * size) | (polygon > (1 + _OUTSIDE) * size)).any():
      x, y = polygon[np.abs(polygon - size / 2).max(axis=1).argmax()]
      raise CaseError(f"region {number} reaches to ({x:g}, {y:g}); the image has {size[0]} x {size[1]} pixels")
  mask, covered = np.zeros(shape, bool), 0
  for polygon in polygons:
    if len(polygon) < 3:
      continue  # a click without an outline: no pixel's centre is inside
    # Only the part of the mask that the polygon can cover.
    first, last = np.floor(polygon.min(axis=0)).astype(int), np.ceil(polygon.max(axis=0)).astype(int)
    (left, top), (right, bottom) = np.clip(first, 0, size), np.clip(last, 0, size)
    covered += (right - left) * (bottom - top)
    if covered > _MOST_COVERED * mask.size:
      raise CaseError(f"its regions cover the image more than {_MOST_COVERED} times; single objects are to be outlined")
    inside = _inside(polygon - (left, top), (bottom - top, right - left))
    mask[top:bottom, left:right] |= inside
  return mask


def _inside(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """(rows, columns) bool of one polygon (vertices, 2), by counting the crossings to the left of each pixel's centre."""
  rows, columns = shape
  (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
  centers = np.arange(rows)[:, np.newaxis] + 0.5
  crossed_rows, edges = np.nonzero((y0 <= centers) != (y1 <= centers))
  share = (crossed_rows + 0.5 - y0[edges]) / (y1 - y0)[edges]
  crossings = x0[edges] + share * (x1 - x0)[edges]
  first_right_of = np.clip(np.ceil(crossings - 0.5).astype(int), 0, columns)  # the first pixel whose centre is beyond
  counts = np.zeros((rows, columns + 1), np.int32)
  np.add.at(counts, (crossed_rows, first_right_of), 1)
  return np.cumsum(counts, axis=1, out=counts)[:, :columns] & 1 == 1
