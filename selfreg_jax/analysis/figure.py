"""The figure of an analysis: what every block looks at, how its channels correlate, and curves over the blocks.

Columns are the stages of the network, rows the runs; a stage with several blocks shows its first above its last one.
"""

import dataclasses
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import figure, patheffects
from matplotlib.axes import Axes

from selfreg_jax.analysis.measuring import ALL, MEAN
from selfreg_jax.analysis.statistics import find
from selfreg_jax.evaluation import report

if TYPE_CHECKING:
  from selfreg_jax.analysis.driver import Plan, RunAnalysis

_PANEL, _GAP = 1.18, 0.07  # inches: the longer side of a picture, and between pictures
_RIGHT, _TOP = 0.75, 0.95
_LEFTS = {1: 0.45, 2: 1.0}  # by the rows of a run, which are named where there are two
_CAPTION = 0.36  # below a matrix
_BETWEEN = 0.62  # between the parts of the figure; holds a heading
_CURVES = 2.3
_NARROWEST = 9.5  # inches that the curves' titles need
_LETTER, _SMALLEST = 0.0083, 6.5  # width of a bold letter in inches for each point of its size; points
_DPI = 150
_TEXT, _FAINT = "#16191d", "#5c656f"
_RUN_COLORS = ("#0072B2", "#D55E00")
_TRUTH, _PREDICTION = "#00E5FF", "#FFD400"
_HEAT, _MATRIX = "inferno", "viridis"
_POSITIONS = ("first", "last")


@dataclasses.dataclass(frozen=True)
class _Cell:
  """Where a block's pictures go."""

  column: int
  row: int  # 0 or 1, of its run


def draw(runs: Sequence["RunAnalysis"], summary: Mapping[str, Any], plan: "Plan") -> figure.Figure:
  """Draws the figure.

  Args:
    runs: one or two, of the same blocks.
    summary: what `analysis.json` holds.
    plan: that they followed.

  Returns:
    The figure; everything is placed in inches, so that its size follows from the number of blocks.
  """
  names = [block.name for block in runs[0].blocks]
  stages = list(dict.fromkeys(name.partition("/")[0] for name in names))
  rows = 2 if any("/" in name for name in names) else 1
  leading = 1 if rows == 2 else 2  # columns with the image: truth and prediction one below the other, or side by side
  cells = {name: _cell(name, stages, leading, rows) for name in names}
  case = plan.manifest.cases[plan.example[0]]
  aspect = _aspect(case)
  width, height = _PANEL * min(1, 1 / aspect), _PANEL * min(1, aspect)
  lines = rows * len(runs)
  left = _LEFTS[rows]
  page = _Page(
    width=max(left + (leading + len(stages)) * (width + _GAP) - _GAP + _RIGHT, _NARROWEST),
    height=_TOP + lines * (height + width + 2 * _GAP + _CAPTION) + 2 * _BETWEEN + _CURVES + (0.9 if rows > 1 else 0.5),
    left=left,
  )
  page.title(plan)
  for column, stage in enumerate(stages):
    x = left + (leading + column) * (width + _GAP) + width / 2
    bottleneck = stage == [name for name in stages if name.startswith("encoder")][-1]
    page.text(x, _TOP - 0.12, stage.replace("_", " ") + ("\n(bottleneck)" if bottleneck else ""))
  y = _TOP
  labels = run_names([run["workdir"] for run in summary["runs"]])
  page.fit_row_labels(labels, min(rows * (height + _GAP), rows * (width + _CAPTION + _GAP)) - _GAP)
  for index, run in enumerate(runs):
    page.row_labels(y, height, rows, labels[index], _RUN_COLORS[index] if len(runs) > 1 else _TEXT)
    _draw_images(page, run, case, (width, height), y, rows)
    for name, cell in cells.items():
      axes = page.axes(left + cell.column * (width + _GAP), y + cell.row * (height + _GAP), width, height)
      _draw_heatmap(axes, run, name, case, plan.manifest.num_classes)
    y += rows * (height + _GAP)
  page.colorbar(_HEAT, "Grad-CAM", _TOP, y - _GAP - _TOP)
  y += _BETWEEN - 0.12
  start = y
  page.text(left + leading * (width + _GAP), y - 0.1, "correlation |r| of pairs of channels, over all cases", ha="left")
  for index, run in enumerate(runs):
    color = _RUN_COLORS[index] if len(runs) > 1 else _TEXT
    page.row_labels(y, width + _CAPTION, rows, labels[index], color)
    for name, cell in cells.items():
      axes = page.axes(left + cell.column * (width + _GAP), y + cell.row * (width + _CAPTION + _GAP), width, width)
      _draw_matrix(axes, run.correlations[name], run.pooled, name)
    y += rows * (width + _CAPTION + _GAP)
  page.colorbar(_MATRIX, "|r|", start, y - _GAP - _CAPTION - start)
  _draw_curves(page, y + _BETWEEN - 0.1, names, labels, summary)
  return page.drawing


def render(drawing: figure.Figure, ending: str) -> bytes:
  """The figure as a file of this format ("png" or "pdf")."""
  content = io.BytesIO()
  # PDF files would hold the time otherwise, and two of the same analysis differ.
  metadata = {"CreationDate": None} if ending == "pdf" else None
  drawing.savefig(content, format=ending, metadata=metadata)
  return content.getvalue()


def _cell(name: str, stages: Sequence[str], leading: int, rows: int) -> _Cell:
  stage, _, position = name.partition("/")
  row = _POSITIONS.index(position) if position else (rows - 1 if stage == "final" else 0)
  return _Cell(leading + stages.index(stage), row)


def _aspect(case: Any) -> float:
  """Height / width in millimetres of a slice that `report.radiological` has turned."""
  rows, columns = (length * spacing for length, spacing in zip(case.shape[1:3], case.spacing[1:], strict=True))
  turned = report.radiological(np.empty((1, 2)), case.axcodes).shape == (2, 1)
  return columns / rows if turned else rows / columns


class _Page:
  """A figure whose parts are placed in inches from the upper left corner."""

  def __init__(self, width: float, height: float, left: float):
    self.width, self.height, self.left = width, height, left
    self.drawing = figure.Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

  def axes(self, x: float, y: float, width: float, height: float) -> Axes:
    box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
    return self.drawing.add_axes(box)

  def text(self, x: float, y: float, text: str, **style: Any) -> None:
    style = {"ha": "center", "va": "bottom", "fontsize": 9.5, "color": _TEXT} | style
    written = self.drawing.text(x / self.width, 1 - y / self.height, text, **style)
    written.set_parse_math(False)  # a name is no formula

  def title(self, plan: "Plan") -> None:
    case_id, index = plan.example
    shown = "all foreground classes" if plan.show == ALL else plan.show
    text = f"{plan.manifest.dataset}, case {case_id}, slice {index}: Grad-CAM of {shown}"
    self.text(0.12, 0.32, text, ha="left", fontsize=12, fontweight="bold")

  def fit_row_labels(self, names: Sequence[str], room: float) -> None:
    """One size for the names of all rows, as this length of a row allows; cut where that would be too small."""
    letters = int(room / (_LETTER * _SMALLEST))
    self._label_lines = {
      name: [
        line if len(line) <= letters else line[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"
        for line in re.findall(r"[^/]+/?", name)
      ]
      for name in names
    }
    longest = max(len(line) for lines in self._label_lines.values() for line in lines)
    self._label_size = min(9, room / (_LETTER * longest))

  def row_labels(self, y: float, height: float, rows: int, name: str, color: str) -> None:
    room = rows * (height + _GAP) - _GAP
    style = {"ha": "right", "va": "center"}
    style_of_name = style | {"rotation": 90, "fontsize": self._label_size, "fontweight": "bold", "color": color}
    self.text(0.22, y + room / 2, "\n".join(self._label_lines[name]), **style_of_name | {"ha": "center"})
    for row in range(rows if rows > 1 else 0):
      text = f"{_POSITIONS[row]}\nblock"
      self.text(self.left - 0.12, y + row * (height + _GAP) + height / 2, text, color=_FAINT, fontsize=9, **style)

  def colorbar(self, name: str, label: str, y: float, height: float) -> None:
    axes = self.axes(self.width - _RIGHT + 0.14, y, 0.12, height)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=name, aspect="auto", extent=(0, 1, 0, 1))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.set_yticks([0, 1])
    axes.tick_params(labelsize=8, length=2)
    axes.text(2.2, 0.5, label, rotation=90, va="center", fontsize=8.5, transform=axes.transAxes)


def _displayed(run: "RunAnalysis", case: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  image = run.example.image
  image = image if image.shape[-1] in (1, 3) else image[..., :1]
  grey = report.displayable(image[None])[0]
  turned = [report.radiological(array, case.axcodes) for array in (grey, run.example.truth, run.example.prediction)]
  return turned[0], turned[1], turned[2]


def _draw_images(page: _Page, run: "RunAnalysis", case: Any, size: tuple[float, float], y: float, rows: int) -> None:
  image, truth, prediction = _displayed(run, case)
  for index, (title, classes, color) in enumerate((("truth", truth, _TRUTH), ("prediction", prediction, _PREDICTION))):
    column, row = (0, index) if rows == 2 else (index, 0)
    axes = page.axes(page.left + column * (size[0] + _GAP), y + row * (size[1] + _GAP), *size)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect="auto")
    _outline(axes, classes, int(max(truth.max(), prediction.max())) + 1, color)
    style = {"fontsize": 8.5, "fontweight": "bold", "va": "top", "transform": axes.transAxes}
    style["path_effects"] = [patheffects.withStroke(linewidth=2, foreground="black")]  # over bright images too
    axes.text(0.03, 0.97, title, color=color, **style)


def _draw_heatmap(axes: Axes, run: "RunAnalysis", name: str, case: Any, num_classes: int) -> None:
  image, truth, _ = _displayed(run, case)
  heat = report.radiological(run.example.heatmaps[name], case.axcodes)[..., None]
  grey = image.mean(axis=-1, keepdims=True) if image.ndim == 3 else image[..., None]
  colors = matplotlib.colormaps[_HEAT](heat[..., 0])[..., :3]
  opacity = 0.25 + 0.6 * heat
  axes.imshow(np.clip((1 - opacity) * grey + opacity * colors, 0, 1), aspect="auto")
  _outline(axes, truth, num_classes, _TRUTH)
  if not heat.any():
    axes.text(0.5, 0.06, "no evidence", color="white", fontsize=8.5, ha="center", transform=axes.transAxes)


def _outline(axes: Axes, classes: np.ndarray, num_classes: int, color: str) -> None:
  for class_id in range(1, num_classes):
    mask = classes == class_id
    if mask.any() and not mask.all():
      axes.contour(mask, levels=[0.5], colors=[color], linewidths=0.8)
  axes.set_axis_off()


def _draw_matrix(axes: Axes, matrix: np.ndarray, pooled: Mapping[Any, float], name: str) -> None:
  colors = matplotlib.colormaps[_MATRIX].with_extremes(bad="#d5d9de")
  axes.imshow(np.abs(matrix), cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
  axes.set_xticks([])
  axes.set_yticks([])
  constant = int(pooled[name, "constant_channels", ""])
  mean, rank = (pooled[name, quantity, ""] for quantity in ("mean_abs_correlation", "effective_rank"))
  text = "constant" if np.isnan(rank) else f"rank {rank:.1f} of {len(matrix) - constant}"
  if constant and not np.isnan(rank):
    text += f", {constant} const."
  if not np.isnan(mean):
    text = f"mean |r| {mean:.2f}\n{text}"
  axes.text(0.5, -0.03, text, fontsize=8, color=_TEXT, ha="center", va="top", transform=axes.transAxes)


def _draw_curves(
  page: _Page, y: float, names: Sequence[str], labels: Sequence[str], summary: Mapping[str, Any]
) -> None:
  plots = (
    ("Grad-CAM inside the foreground, %", "cam_inside", ALL, 100.0),
    ("linear probe: R² of the classes", "probe_r2", MEAN, 1.0),
    ("mean |r| of channels, over cases", "mean_abs_correlation", "", 1.0),
  )
  if len(labels) > 1:
    for index, label in enumerate(labels):
      page.text(0.7 + index * page.width / 3, y - 0.3, f"\N{BLACK CIRCLE} {label}", ha="left", color=_RUN_COLORS[index])
  gap = 0.62
  width = (page.width - 0.7 - 0.25 - gap * (len(plots) - 1)) / len(plots)
  for index, (title, quantity, class_name, factor) in enumerate(plots):
    axes = page.axes(0.7 + index * (width + gap), y, width, _CURVES)
    axes.set_title(title, fontsize=10, color=_TEXT)
    for number, run in enumerate(summary["runs"]):
      rows = [find(run["values"], name, quantity, class_name) for name in names]
      _curve(axes, rows, factor, _RUN_COLORS[number], labels[number], number)
    if quantity == "cam_inside":
      area = find(summary["runs"][0]["values"], "", "class_area", class_name)["mean"]
      if area is not None:
        axes.axhline(100 * area, color=_FAINT, linestyle=":", linewidth=1.2)
        style = {"transform": axes.get_yaxis_transform(), "fontsize": 7.5, "color": _FAINT, "va": "bottom"}
        axes.text(0.01, 100 * area, "even map", **style)
      axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=60 if len(names) > 9 else 30,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
      axes.spines[side].set_visible(False)


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], factor: float, color: str, label: str, number: int) -> None:
  means = np.array([np.nan if row["mean"] is None else factor * row["mean"] for row in rows])
  bounds = np.array([row["interval"] or (np.nan, np.nan) for row in rows]) * factor
  x = np.arange(len(rows)) + 0.08 * number  # so that the intervals of two runs do not hide each other
  axes.plot(x, means, marker="o", markersize=3.5, linewidth=1.5, color=color, label=label)
  axes.vlines(x, bounds[:, 0], bounds[:, 1], color=color, linewidth=1, alpha=0.7)


def run_names(workdirs: Sequence[str]) -> list[str]:
  """Runs by the shortest ends of their paths that tell them apart; a run of an ablation by its variant and seed."""
  parts = [pathlib.PurePath(workdir).parts for workdir in workdirs]
  longest = max(map(len, parts))
  shortest = 2 if any(path[-1].startswith("seed_") for path in parts) else 1
  length = next((n for n in range(shortest, longest) if len({path[-n:] for path in parts}) == len(parts)), longest)
  return [str(pathlib.PurePath(*path[-length:])) for path in parts]


def _short(name: str) -> str:
  return name.replace("encoder_", "enc ").replace("decoder_", "dec ").replace("/", " ")
