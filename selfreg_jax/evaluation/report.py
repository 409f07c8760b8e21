"""What an evaluation leaves behind: tables on the terminal, a CSV of cases, `summary.json` and pictures.

Pictures of volumes are turned to the radiological view; the colour of a class depends on its id alone and is the same
in every picture.
"""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, patches
from rich import box, console, table, text
from scipy import ndimage

from selfreg_jax.evaluation import metrics, protocols

# Of the volume difference, by the unit of the spacing.
VOLUME_UNITS = {"mm": "ml", "voxel": "1000 voxels", "pixel": "pixels"}

# Classes 1, 2, ...: Okabe and Ito's seven colours, then always the one farthest from all before by the worst of normal,
# deuteranopic and protanopic sight. Their distances in OKLab are at least 0.138, 0.076 and 0.096.
_PALETTE = (
  "D55E00 009E73 F0E442 E69F00 0072B2 CC79A7 56B4E9 780F4B FFD2FF 6900FF 00E1A5 694B00 3C2D96 8778FF B42D78 C3FFD2"
)
_FILL = 0.45  # opacity of a class's inside; its contour is opaque

UNITS = {"sound": "mm", "paper": "voxels"}
_CAPTIONS = {
  ("sound", "volume"): "sound protocol: a missed or invented class scores Dice 0 and the volume's diagonal",
  ("paper", "volume"): (
    "paper protocol, to compare with published tables: a missed class scores distance 0, an invented one Dice 1"
  ),
  ("sound", "image"): "sound protocol, at the images' own size: a missed or invented class scores Dice 0",
  ("paper", "image"): "paper protocol, to compare with published tables: at the network's image size",
}

_BACKGROUND, _TEXT, _FAINT = "#101214", "#f2f2f2", "#9aa0a6"
ERROR_COLORS = {"missed": (255, 255, 255), "extra": (255, 45, 149), "wrong class": (255, 212, 0)}
_DIMMED = 0.45  # brightness of the image under the errors
_PANEL_INCHES, _DPI = 2.6, 200  # the longer side of a picture; pixels an inch
_PANEL_PIXELS = 512  # slices are enlarged to at least this before contours are drawn, so that these stay thin
_CONTOUR_PIXELS = 2

_AXIS = {code: axis for axis in ("RL", "AP", "SI") for code in axis}
# The two directions in which a radiological picture's rows and columns grow, by the axis that it is cut along.
_VIEWS = {"SI": ("P", "L"), "AP": ("I", "L"), "RL": ("I", "P")}


def print_table(
  block: Mapping[str, Any],
  output: console.Console,
  *,
  protocol: str,
  unit: str | None = None,
  kind: str = "volume",
) -> None:
  """Prints one protocol's results: a row a class, the mean over classes last.

  Args:
    block: what `protocols.summarize` gave.
    output: where to print; 100 columns are enough.
    protocol: "sound" or "paper".
    unit: of the distances; None: mm in the sound and voxels in the paper protocol.
    kind: "volume" or "image": of the cases.
  """
  unit = unit or UNITS[protocol]
  names = protocols.METRICS[protocol]
  result = table.Table(title=_CAPTIONS[protocol, kind], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  result.add_column("class", overflow="fold", max_width=20)
  result.add_column("Dice % [95 % CI]", justify="right", no_wrap=True)
  result.add_column(f"HD95 {unit}", justify="right", no_wrap=True)
  result.add_column(f"ASSD {unit}", justify="right", no_wrap=True)
  if "nsd" in names:
    result.add_column("NSD %", justify="right", no_wrap=True)
  for title in ("n", "missed", "invented"):
    result.add_column(title, justify="right", no_wrap=True)

  def cells(row: Mapping[str, Any], interval: list[float] | None) -> list[str]:
    spread = "" if interval is None else f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
    distances = [fixed(row["hd95"], 1), fixed(row["assd"], 1)]
    shares = [fixed(row["nsd"], 100)] if "nsd" in names else []
    return [fixed(row["dice"], 100) + spread, *distances, *shares]

  classes = block["classes"]
  for name, row in classes.items():
    numbers = (row["n"], row["missed"], row["invented"])
    result.add_row(text.Text(name), *cells(row, row["interval"]["dice"]), *map(str, numbers))
  result.add_section()
  numbers = (block["cases"], *(sum(row[flag] for row in classes.values()) for flag in protocols.FLAGS))
  result.add_row("mean", *cells(block["mean"], block["interval"]["dice"]), *map(str, numbers))
  output.print(result)


def fixed(value: float | None, factor: float) -> str:
  """A number of a table: the value times the factor with two decimals, or "-" where it is undefined."""
  return "-" if value is None else f"{factor * value:.2f}"


def write_cases_csv(
  path: str | os.PathLike,
  cases_by_protocol: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]],
  class_names: Sequence[str],
) -> None:
  """Writes every score, one row a protocol, case and class; an empty field was not scored.

  Distances are in the dataset's unit in the sound and in voxels, or pixels, in the paper protocol; volume differences
  are as `protocols.evaluate_case` gives them. The file exists whole or not at all.

  Args:
    path: the CSV file.
    cases_by_protocol: protocol -> case id -> what `protocols.evaluate_case` gave.
    class_names: names by class id, the background's first.
  """
  columns = (*protocols.METRICS["sound"], *protocols.FLAGS)
  content = io.StringIO()
  writer = csv.writer(content, lineterminator="\n")
  writer.writerow(("protocol", "case", "class_id", "class", *columns))
  for protocol, cases in cases_by_protocol.items():
    for case_id, scores in cases.items():
      for class_id, row in scores.items():
        values = [_csv_field(name, row.get(name, math.nan)) for name in columns]
        writer.writerow((protocol, case_id, class_id, class_names[class_id], *values))
  write_whole(path, content.getvalue().encode())


def read_cases_csv(path: str | os.PathLike) -> dict[str, dict[str, protocols.ClassTable]]:
  """The scores that `write_cases_csv` wrote, to the last bit.

  Args:
    path: the CSV file.

  Returns:
    protocol -> case id -> class id -> metric or flag -> value.

  Raises:
    OSError: the file cannot be read.
    KeyError: a column is missing.
    ValueError: a value is no number.
  """
  scores: dict[str, dict[str, protocols.ClassTable]] = {}
  with open(path, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
      names = (*protocols.METRICS[row["protocol"]], *protocols.FLAGS)
      table = scores.setdefault(row["protocol"], {}).setdefault(row["case"], {})
      table[int(row["class_id"])] = {name: float(row[name] or "nan") for name in names}
  return scores


def _csv_field(name: str, value: float) -> str:
  if math.isnan(value):
    return ""
  return str(int(value)) if name in protocols.FLAGS else repr(float(value))


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
  """Writes `summary.json` as strict JSON: numbers that JSON does not know (nan, infinities) become null.

  The file exists whole or not at all.

  Args:
    path: the file.
    summary: {"protocols": {name: what `protocols.summarize` gave}, "cases": count, "config": {...}, "checkpoint":
      {"step": ...}, "versions": {...}}; NumPy numbers, arrays and tuples are allowed.

  Raises:
    TypeError: it holds something that has no place in JSON.
  """
  write_whole(path, (json.dumps(_strict(summary), indent=1, allow_nan=False) + "\n").encode())


def _strict(value: Any) -> Any:
  if isinstance(value, (np.generic, np.ndarray)):
    value = value.tolist()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {str(key): _strict(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(item) for item in value]
  return value


def write_whole(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file that exists whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".partial")
  temporary.write_bytes(content)
  temporary.replace(path)


def class_colors(num_classes: int) -> np.ndarray:
  """The colours of classes, fixed by id: (num_classes, 3) uint8, the background black.

  Sixteen foreground colours that colour-blind readers can tell apart; from the seventeenth class on they repeat.
  """
  palette = np.frombuffer(bytes.fromhex(_PALETTE.replace(" ", "")), np.uint8).reshape(-1, 3)
  colors = np.zeros((num_classes, 3), np.uint8)
  colors[1:] = palette[np.arange(num_classes - 1) % len(palette)]
  return colors


def radiological(array: np.ndarray, axcodes: Sequence[str] | None) -> np.ndarray:
  """Turns a slice to the view that radiologists are used to.

  Axial: anterior on top, the patient's right on the picture's left. Coronal: superior on top, right on the left.
  Sagittal: superior on top, anterior on the left.

  Args:
    array: (row, column) or (row, column, channel).
    axcodes: where the indices along (slice, row, column) grow to, e.g. ("S", "R", "A"); None where that is not known:
      the slice stays as it is.

  Returns:
    The turned slice, a view.

  Raises:
    ValueError: the codes do not name three different axes of the body.
  """
  return array if axcodes is None else _turn(axcodes).apply(array)


def body_sides(axcodes: Sequence[str]) -> tuple[str, str]:
  """The sides of the body at the left and at the top edge of a picture that `radiological` turned, e.g. ("R", "A").

  Args:
    axcodes: where the indices along (slice, row, column) grow to, e.g. ("S", "R", "A").

  Raises:
    ValueError: the codes do not name three different axes of the body.
  """
  turn = _turn(axcodes)
  return turn.left, turn.top


@dataclasses.dataclass(frozen=True)
class _Turn:
  """How a stored slice becomes a picture: transpose, then flips; and the sides of the body at the picture's edges."""

  transpose: bool = False
  flip_rows: bool = False
  flip_columns: bool = False
  left: str = ""
  top: str = ""

  def apply(self, array: np.ndarray) -> np.ndarray:
    """The turned (row, column) or (row, column, channel) slice, as a view."""
    array = array.swapaxes(0, 1) if self.transpose else array
    return array[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def _turn(axcodes: Sequence[str]) -> _Turn:
  axes = [_AXIS.get(code) for code in axcodes]
  if len(axes) != 3 or set(axes) != set(_VIEWS):
    raise ValueError(f"axcodes must name the directions of three axes, as in ('S', 'R', 'A'), got {tuple(axcodes)}")
  down, right = _VIEWS[axes[0]]
  transpose = axes[1] == _AXIS[right]
  rows, columns = (axcodes[2], axcodes[1]) if transpose else (axcodes[1], axcodes[2])
  left, top = _AXIS[right].replace(right, ""), _AXIS[down].replace(down, "")
  return _Turn(transpose=transpose, flip_rows=rows != down, flip_columns=columns != right, left=left, top=top)


def overlay(
  image: np.ndarray, classes: np.ndarray, *, num_classes: int, enlarge: int = 1, contour: int = 1
) -> np.ndarray:
  """Paints a class map onto an image: translucent insides, opaque contours.

  Args:
    image: (H, W) grey or (H, W, 3) RGB, float in [0, 1].
    classes: (H, W) class ids in [0, num_classes).
    num_classes: number of classes, background included.
    enlarge: whole factor by which both are enlarged (nearest) first.
    contour: width of the contours in pixels of the enlarged picture.

  Returns:
    (H * enlarge, W * enlarge, 3) uint8.
  """
  return _paint(image, classes, class_colors(num_classes), enlarge=enlarge, contour=contour, fill=_FILL)


def _paint(
  image: np.ndarray, classes: np.ndarray, colors: np.ndarray, *, enlarge: int, contour: int, fill: float
) -> np.ndarray:
  image, classes = (array.repeat(enlarge, axis=0).repeat(enlarge, axis=1) for array in (image, classes))
  base = image[..., None] if image.ndim == 2 else image
  picture = np.array(np.broadcast_to(255 * np.clip(base, 0, 1), (*classes.shape, 3)), np.float32)
  painted = colors[classes.astype(np.intp)]
  inside = classes > 0
  picture[inside] = (1 - fill) * picture[inside] + fill * painted[inside]
  edge = _edges(classes)
  if contour > 1:
    edge = ndimage.binary_dilation(edge, iterations=contour - 1)
  edge &= inside
  picture[edge] = painted[edge]
  return picture.round().astype(np.uint8)


def _edges(classes: np.ndarray) -> np.ndarray:
  """Pixels with a neighbour (of four) of another class."""
  result = np.zeros(classes.shape, bool)
  for axis in (0, 1):
    here, there = np.moveaxis(result, axis, 0), np.moveaxis(classes, axis, 0)
    change = there[1:] != there[:-1]
    here[1:] |= change
    here[:-1] |= change
  return result


def overlay_panel(
  images: Sequence[np.ndarray],
  truths: Sequence[np.ndarray],
  predictions: Sequence[np.ndarray],
  class_names: Sequence[str],
) -> np.ndarray:
  """A picture for TensorBoard: a row a slice, with the columns input, truth and prediction.

  Slices of different sizes are centred in tiles of the largest; they are shown as the network sees them.

  Args:
    images: N slices (H, W), (H, W, 1) or RGB (H, W, 3); floats in [0, 1] or uint8, others are stretched.
    truths: N class maps (H, W).
    predictions: N class maps (H, W).
    class_names: names by class id, the background's first: ids that no name explains are refused.

  Returns:
    (N * tile height + gaps, 3 * tile width + gaps, 3) uint8.

  Raises:
    ValueError: no slices, lengths or shapes differ, or class maps hold other ids.
  """
  if not len(images) == len(truths) == len(predictions) or not len(images):
    raise ValueError(f"got {len(images)} images, {len(truths)} truths and {len(predictions)} predictions")
  num_classes, gap = len(class_names), 2
  height, width = (max(np.shape(image)[axis] for image in images) for axis in (0, 1))
  panel = np.full((len(images) * (height + gap) - gap, 3 * (width + gap) - gap, 3), 40, np.uint8)
  for n, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
    image = displayable(np.asarray(image)[None])[0]
    nothing = np.zeros(image.shape[:2], np.uint8)
    for column, (name, classes) in enumerate((("input", nothing), ("truth", truth), ("prediction", prediction))):
      classes = np.asarray(classes)
      _check_classes(classes, image, num_classes, name=name)
      top = n * (height + gap) + (height - image.shape[0]) // 2
      left = column * (width + gap) + (width - image.shape[1]) // 2
      tile = overlay(image, classes, num_classes=num_classes)
      panel[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
  return panel


def _check_classes(classes: np.ndarray, image: np.ndarray, num_classes: int, *, name: str) -> None:
  if classes.shape != image.shape[: classes.ndim]:
    raise ValueError(f"{name} has the shape {classes.shape}, the image {image.shape}")
  metrics.check_class_ids(classes, num_classes=num_classes, name=name)


def displayable(image: np.ndarray) -> np.ndarray:
  """Image slices as floats in [0, 1]; values beyond are stretched from their 0.5th to their 99.5th percentile.

  Args:
    image: (S, R, C), (S, R, C, 1) or (S, R, C, 3).

  Returns:
    (S, R, C) or (S, R, C, 3).
  """
  if image.ndim not in (3, 4) or image.shape[3:] not in ((), (1,), (3,)):
    raise ValueError(f"image slices must be (row, column), grey or RGB, got shape {image.shape}")
  if image.shape[3:] == (1,):
    image = image[..., 0]
  if image.dtype == np.uint8:
    return image / np.float32(255)
  image = image.astype(np.float32)
  if image.min() >= 0 and image.max() <= 1:
    return image
  low, high = np.percentile(image, (0.5, 99.5))
  return np.clip((image - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)


def overlay_case(
  path: str | os.PathLike,
  image: np.ndarray,
  truth: np.ndarray | None,
  prediction: np.ndarray,
  *,
  class_names: Sequence[str],
  axcodes: Sequence[str] | None,
  spacing: Sequence[float],
  title: str,
  scale: float = 1.0,
) -> None:
  """Draws a case as a PNG: its best, median and worst slice with truth, prediction and errors.

  Slices are ranked by their foreground Dice (mean over the classes in the slice's truth or prediction) among those that
  hold foreground; of equal ones the larger is shown. Without a truth they are the slices with the largest, median and
  smallest predicted foreground. A case with fewer such slices has fewer rows; one with none shows its middle slice.
  The file exists whole or not at all.

  Args:
    path: the PNG file.
    image: (S, R, C), (S, R, C, 1) or RGB (S, R, C, 3); floats in [0, 1] or uint8, others are stretched.
    truth: (S, R, C) class ids; None for a case without labels.
    prediction: (S, R, C) class ids.
    class_names: names by class id, the background's first.
    axcodes: where the indices along (slice, row, column) grow to, e.g. ("S", "R", "A"): pictures are turned to the
      radiological view. None for photographs and the like: shown as stored.
    spacing: (3,) between voxel centres along (slice, row, column), in mm.
    title: of the picture, as a rule the case id.
    scale: image * scale is what is shown; only the slices that are drawn are scaled.

  Raises:
    ValueError: shapes differ, class maps hold ids without a name, axcodes or spacing are not what they should be.
  """
  num_classes = len(class_names)
  image, prediction = np.asarray(image), np.asarray(prediction)
  if prediction.ndim != 3:
    raise ValueError(f"prediction must be (slice, row, column), got shape {prediction.shape}")
  _check_classes(prediction, image, num_classes, name="prediction")
  if truth is None:
    chosen = _choose_by_area(prediction)
  else:
    truth = np.asarray(truth)
    _check_classes(truth, image, num_classes, name="truth")
    chosen = _choose_by_dice(truth, prediction, num_classes)
  _, row_spacing, column_spacing = metrics.check_spacing(spacing, rank=3)
  turn = _Turn() if axcodes is None else _turn(axcodes)
  if turn.transpose:
    row_spacing, column_spacing = column_spacing, row_spacing

  indices = list(chosen)
  chosen_slices = image[indices] if scale == 1 else image[indices] * np.float32(scale)
  images = [turn.apply(array) for array in displayable(chosen_slices)]
  predictions = [turn.apply(prediction[index]) for index in indices]
  truths = None if truth is None else [turn.apply(truth[index]) for index in indices]
  height, width = images[0].shape[:2]
  style = {"enlarge": math.ceil(_PANEL_PIXELS / max(height, width)), "contour": _CONTOUR_PIXELS}

  nothing = np.zeros((height, width), np.uint8)
  columns = {"image": [overlay(array, nothing, num_classes=num_classes, **style) for array in images]}
  if truths is not None:
    pairs = zip(images, truths, strict=True)
    columns["truth"] = [overlay(array, classes, num_classes=num_classes, **style) for array, classes in pairs]
  pairs = zip(images, predictions, strict=True)
  columns["prediction"] = [overlay(array, classes, num_classes=num_classes, **style) for array, classes in pairs]
  present = np.unique(predictions if truths is None else [*truths, *predictions])
  legends = [{class_names[class_id]: class_colors(num_classes)[class_id] for class_id in present if class_id > 0}]
  if truths is not None:
    errors = [_errors(*maps) for maps in zip(truths, predictions, strict=True)]
    colors = np.array([(0, 0, 0), *ERROR_COLORS.values()], np.uint8)
    pairs = zip(images, errors, strict=True)
    columns["errors"] = [_paint(_DIMMED * array, kinds, colors, fill=1, **style) for array, kinds in pairs]
    legends.append(
      {kind: color for n, (kind, color) in enumerate(ERROR_COLORS.items(), start=1) if n in np.unique(errors)}
    )
  drawing = _draw_grid(
    columns,
    list(chosen.values()),
    aspect=height * row_spacing / (width * column_spacing),
    sides=turn,
    legends=legends,
    title=title,
  )
  content = io.BytesIO()
  drawing.savefig(content, format="png", facecolor=_BACKGROUND)
  write_whole(path, content.getvalue())


def _choose_by_dice(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> dict[int, str]:
  """Slice index -> caption of the best, median and worst slice with foreground; among equals, the larger."""
  scores = {}
  for index in range(len(truth)):
    confusion = metrics.confusion_matrix(prediction[index], truth[index], num_classes=num_classes)
    foreground = int(confusion.sum() - confusion[0, 0])
    if foreground:
      scores[index] = (protocols.mean_foreground_dice([protocols.dice_per_class(confusion)]), foreground)
  if not scores:
    return _middle(len(truth))
  order = sorted(scores, key=lambda index: (-scores[index][0], -scores[index][1]))
  best = order.pop(0)
  chosen = {best: "best" if order else ""}
  if order:
    worst = min(order, key=lambda index: (scores[index][0], -scores[index][1]))
    order.remove(worst)
    if order:
      chosen[order[(len(order) - 1) // 2]] = "median"
    chosen[worst] = "worst"
  return {index: f"{rank}\nslice {index}\nDice {scores[index][0]:.3f}".strip() for index, rank in chosen.items()}


def _choose_by_area(prediction: np.ndarray) -> dict[int, str]:
  """Slice index -> caption of the slices with the largest, median and smallest foreground."""
  areas = np.count_nonzero(prediction, axis=(1, 2))
  order = sorted(np.flatnonzero(areas).tolist(), key=lambda index: -areas[index])
  if not order:
    return _middle(len(prediction))
  ranks = {order[0]: "largest", order[-1]: "smallest", order[len(order) // 2]: "median"}
  return {
    index: f"{ranks[index]}\nslice {index}\n{areas[index]} px" for index in sorted(ranks, key=lambda i: -areas[i])
  }


def _middle(num_slices: int) -> dict[int, str]:
  return {num_slices // 2: f"slice {num_slices // 2}\nno foreground"}


def _errors(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Where two class maps differ: the position in `ERROR_COLORS`, from 1, of the kind of error; 0 where they agree."""
  wrong = truth != prediction
  return np.select([wrong & (prediction == 0), wrong & (truth == 0), wrong], [1, 2, 3], 0)


def _draw_grid(
  columns: Mapping[str, Sequence[np.ndarray]],
  captions: Sequence[str],
  *,
  aspect: float,
  sides: _Turn,
  legends: Sequence[Mapping[str, Any]],
  title: str,
) -> figure.Figure:
  """Lays pictures out in a grid with headings, captions of the rows, the body's sides and the legends.

  Args:
    columns: heading -> (H, W, 3) uint8 pictures, one a row.
    captions: of the rows.
    aspect: height / width of a picture in millimetres.
    sides: what to write at the left and the top edge of the first column.
    legends: name -> (3,) colour of 255 parts; one below the other.
    title: of the whole.

  Returns:
    The figure; everything is placed in inches, so that its size follows from the pictures'.
  """
  panel_width, panel_height = _PANEL_INCHES * min(1, 1 / aspect), _PANEL_INCHES * min(1, aspect)
  left, right, top, gap, line = 1.0, 0.12, 0.7, 0.06, 0.24
  width = left + len(columns) * (panel_width + gap) - gap + right
  longest = max((len(name) for legend in legends for name in legend), default=0)
  per_line = max(1, int((width - left) / (0.42 + 0.085 * longest)))
  lines = [math.ceil(len(legend) / per_line) for legend in legends]
  bottom = 0.16 + line * sum(lines)
  height = top + len(captions) * (panel_height + gap) - gap + bottom
  drawing = figure.Figure(figsize=(width, height), dpi=_DPI, facecolor=_BACKGROUND)

  heading = drawing.text(
    left / width, 1 - 0.22 / height, title, color=_TEXT, fontsize=12, fontweight="bold", va="center"
  )
  heading.set_parse_math(False)  # a case id is no formula
  for column, (name, pictures) in enumerate(columns.items()):
    x = left + column * (panel_width + gap)
    drawing.text((x + panel_width / 2) / width, 1 - 0.6 / height, name, color=_TEXT, fontsize=10, ha="center")
    for row, picture in enumerate(pictures):
      y = height - top - (row + 1) * panel_height - row * gap
      axes = drawing.add_axes((x / width, y / height, panel_width / width, panel_height / height))
      axes.imshow(picture, aspect="auto", interpolation="antialiased")
      axes.set_axis_off()
      if column == 0:
        style = {"transform": axes.transAxes, "color": _TEXT, "fontsize": 8, "fontweight": "bold"}
        axes.text(0.02, 0.5, sides.left, ha="left", va="center", **style)
        axes.text(0.5, 0.985, sides.top, ha="center", va="top", **style)
        middle = (y + panel_height / 2) / height
        drawing.text((left - 0.1) / width, middle, captions[row], color=_FAINT, fontsize=8.5, ha="right", va="center")
  for n, legend in enumerate(legends):
    if legend:
      handles = [patches.Patch(color=np.divide(color, 255), label=name) for name, color in legend.items()]
      drawing.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=((left - 0.06) / width, (0.04 + line * sum(lines[n + 1 :])) / height),
        ncols=per_line,
        frameon=False,
        fontsize=8.5,
        labelcolor=_TEXT,
        borderpad=0.2,
        handlelength=1,
        handleheight=1,
      )
  return drawing
