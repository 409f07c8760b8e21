"""What `check` has found, for reading: as text, and as a page of HTML with a picture of every case."""

import base64
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from selfreg_jax.data import check
from selfreg_jax.data.datasets import listed
from selfreg_jax.data.manifest import Case, CaseArrays, Intensity, Manifest
from selfreg_jax.errors import UserError

_THUMBNAIL = 256  # pixels of the longer side
_CONTOUR = 2  # pixels; WebP halves the resolution of colours
_WEBP_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Table:
  """A table for reading; the first column holds names, the others numbers or facts."""

  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def tables(checkup: check.Checkup) -> tuple[Table, ...]:
  """The facts about a dataset: what it is, its parts, sizes, intensities and classes."""
  return tuple(make(checkup) for make in (_about, _table_of_parts, _table_of_sizes, _intensities, _classes))


def _about(checkup: check.Checkup) -> Table:
  made = checkup.made
  rows = {
    "dataset": f"{made.dataset}, {len(made.cases)} {made.kind}(s), {checkup.size / 1e6:.3g} MB",
    "source": made.source,
    "channels": str(made.channels),
    "intensities": f"{_describe(made.intensity)}, stored as {made.dtype}",
  }
  if made.kind == "volume":
    axcodes = sorted({",".join(case.axcodes) for case in made.cases.values() if case.axcodes})
    rows["orientation"] = f"{made.orientation}, slices along axis {made.axis}"
    rows["slices, rows, columns run towards"] = " or ".join(axcodes) or "not known"
  if made.unit != "mm":
    rows["spacing"] = "not known"
  rows["fingerprint"] = made.fingerprint()
  return Table(("fact", "value"), tuple(rows.items()))


def _describe(intensity: Intensity) -> str:
  if intensity.kind == "window":
    return f"window [{intensity.low:g}, {intensity.high:g}] -> [0, 1]"
  return "bytes / 255" if intensity.kind == "byte" else f"{intensity.kind} of each case"


def _table_of_parts(checkup: check.Checkup) -> Table:
  made = checkup.made
  rows = []
  for part, ids in check.parts_of(made).items():
    cases = [made.cases[case_id] for case_id in ids]
    numbers = (len(ids), len({case.group for case in cases}), sum(case.shape[0] for case in cases))
    rows.append((part, *map(str, numbers)))
  return Table(("split", "cases", "groups (patients)", "slices"), tuple(rows))


def _table_of_sizes(checkup: check.Checkup) -> Table:
  made = checkup.made
  all_cases = list(made.cases.values())
  axes = {name: axis for axis, name in enumerate(("slices", "rows", "columns")) if made.kind == "volume" or axis}
  columns = {name: [case.shape[axis] for case in all_cases] for name, axis in axes.items()}
  if made.unit == "mm":
    columns |= {f"spacing of {name}, mm": [case.spacing[axis] for case in all_cases] for name, axis in axes.items()}
  rows = ((name, *map(_number, (min(column), np.median(column), max(column)))) for name, column in columns.items())
  return Table(("size", "smallest", "median", "largest"), tuple(rows))


def _intensities(checkup: check.Checkup) -> Table:
  intensity = checkup.made.intensity
  rows = []
  for index, channel in enumerate(checkup.channels):
    ends = tuple(f"{end:.2%}" for end in channel.ends)
    values = np.array([*channel.percentiles, channel.mean])
    rows.append((f"channel {index}", *_fixed(values), f"{channel.deviation:.3f}", *ends))
    if intensity.kind == "window":
      width = intensity.high - intensity.low
      units = [f"{value:.1f}" for value in (*(values * width + intensity.low), channel.deviation * width)]
      rows.append(("in the file's units", *units, "", ""))
  names = (
    *(f"{percent:g} %" for percent in check.PERCENTILES),
    "mean",
    "deviation",
    "at smallest value",
    "at largest value",
  )
  return Table(("intensities as networks see them", *names), tuple(rows))


def _classes(checkup: check.Checkup) -> Table:
  made = checkup.made
  voxels = np.sum([case.class_voxels for case in made.cases.values()], axis=0)
  parts = check.parts_of(made)
  counts = [check.cases_with_classes(made, ids) for ids in parts.values()]
  rows = []
  for class_id, name in enumerate(made.classes):
    cases = (str(of_part[class_id]) for of_part in counts)
    rows.append((f"{class_id} {name}", f"{voxels[class_id] / voxels.sum():.3%}", *cases))
  return Table(("class, and the cases that hold it", "voxels", *parts), tuple(rows))


def _table_of_cases(checkup: check.Checkup, ids: Sequence[str]) -> Table:
  made, homes = checkup.made, _homes(checkup.made)
  spaced = made.unit == "mm"
  rows = []
  for case_id in ids:
    case, channels = made.cases[case_id], checkup.cases[case_id].channels
    absent = [name for name, voxels in zip(made.classes, case.class_voxels, strict=True) if not voxels]
    foreground = sum(case.class_voxels[1:]) / sum(case.class_voxels)
    facts = [homes[case_id], case.group, _size(made, case), *([check.by(case.spacing)] if spaced else [])]
    ranges = (", ".join(_fixed([channel.percentiles[at] for channel in channels])) for at in (0, 2, -1))
    rows.append((case_id, *facts, f"{foreground:.2%}", listed(absent, limit=3) or "none", *ranges))
  names = ("split", "group", "size", *(["spacing"] if spaced else []), "foreground", "absent classes")
  return Table(("case", *names, *(f"{check.PERCENTILES[at]:g} %" for at in (0, 2, -1))), tuple(rows))


def _homes(made: Manifest) -> dict[str, str]:
  """The part that each case is in: its fold rather than "train"."""
  return {case_id: part for part, ids in check.parts_of(made).items() for case_id in ids}


def _size(made: Manifest, case: Case) -> str:
  return check.by(case.shape[:3] if made.kind == "volume" else case.shape[1:3])


def _fixed(values: Sequence[float]) -> tuple[str, ...]:
  return tuple(f"{value:.3f}" for value in values)


def _number(value: float) -> str:
  return f"{value:.6g}"


def as_text(checkup: check.Checkup) -> str:
  """What was found, for a terminal."""
  lines = [f"checked {checkup.where}: {len(checkup.made.cases)} case(s), none damaged"]
  for table in tables(checkup):
    rows = [table.columns, *table.rows] if table.columns[0] != "fact" else table.rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
      numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
      cells = row[1:] if table.columns[0] == "fact" else numbers
      lines.append("  " + "  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
    lines.append("")
  if not checkup.suspicions:
    return "\n".join([*lines, "nothing is suspected"])
  lines.append(f"{len(checkup.suspicions)} thing(s) to look at:")
  return "\n".join([*lines, *(f"  {suspicion}" for suspicion in checkup.suspicions)])


def thumbnail(made: Manifest, case: Case, directory: str | os.PathLike) -> bytes:
  """A small picture of a case: its middle slice with foreground, with the contours of the label.

  Args:
    made: the dataset.
    case: the case.
    directory: the dataset's folder.

  Returns:
    A WebP file. Volumes are turned to the radiological view where the orientation is known and have the proportions of
    the body; several channels other than RGB show the first one.
  """
  from selfreg_jax.evaluation import report  # imports matplotlib and SciPy, which preparation does without

  arrays = CaseArrays(directory)
  index = _shown_slice(case)
  channels = 3 if made.channels == 3 else 1
  picture = _displayable(np.array(arrays.image(case)[index, ..., :channels]) * np.float32(made.scale))
  label = np.array(arrays.label(case)[index])
  height, width = case.shape[1] * case.spacing[1], case.shape[2] * case.spacing[2]
  size = tuple(max(1, round(_THUMBNAIL * side / max(height, width))) for side in (width, height))
  shown = Image.fromarray(picture[..., 0] if channels == 1 else picture).convert("RGB")
  pixels = np.array(shown.resize(size, Image.Resampling.BICUBIC))
  classes = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
  contours = _contours(classes)
  pixels[contours] = report.class_colors(made.num_classes)[classes[contours]]
  if case.axcodes is not None:
    pixels = np.ascontiguousarray(report.radiological(pixels, case.axcodes))
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "WEBP", quality=_WEBP_QUALITY)
  return content.getvalue()


def _shown_slice(case: Case) -> int:
  slices = case.foreground_slices or range(case.shape[0])
  return slices[len(slices) // 2]


def _displayable(image: np.ndarray) -> np.ndarray:
  """Network inputs as uint8; values beyond [0, 1] are stretched from their 0.5th to their 99.5th percentile."""
  low, high = (0, 1) if image.min() >= 0 and image.max() <= 1 else np.percentile(image, (0.5, 99.5))
  return np.rint(255 * np.clip((image - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)


def _contours(classes: np.ndarray) -> np.ndarray:
  """Foreground pixels that are no more than `_CONTOUR` along a row or column away from another class."""
  height, width = classes.shape
  padded = np.pad(classes, _CONTOUR, mode="edge")
  near = np.zeros(classes.shape, bool)
  for start in range(2 * _CONTOUR + 1):
    near |= padded[start : start + height, _CONTOUR : _CONTOUR + width] != classes
    near |= padded[_CONTOUR : _CONTOUR + height, start : start + width] != classes
  return near & (classes > 0)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --text: #1d2023; --faint: #5f6670; --line: #d8dce1; --odd: #a33c00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #14171a; --text: #e8eaed; --faint: #9aa0a6; --line: #363b41; --odd: #ffab70; }}
}}
body {{ background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 2em auto;
  max-width: 75em; padding: 0 1em; }}
h1 {{ font-size: 1.4em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1em; margin-top: 2em; }}
.tables {{ display: flex; flex-wrap: wrap; gap: 0 3em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .2em .8em .2em 0; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child, .facts td {{ text-align: left; }}
th {{ color: var(--faint); font-weight: 600; }}
.facts td {{ overflow-wrap: anywhere; white-space: normal; }}
.odd {{ color: var(--odd); }}
.legend span {{ display: inline-block; margin-right: 1.2em; }}
.legend i {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em; }}
.cases {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: 1.2em; }}
figure {{ margin: 0; overflow-wrap: anywhere; font-size: .85em; }}
figure img {{ display: block; margin-bottom: .3em; max-width: 100%; max-height: 15em; }}
figcaption span {{ color: var(--faint); }}
</style>
</head>
<body>
<h1>{title}</h1>
{suspicions}
<div class="tables">
{tables}
</div>
<h2>Cases</h2>
<p class="legend">{legend}</p>
<p>The middle slice with foreground of each case, with the contours of its label{order}.</p>
<div class="cases">
{cases}
</div>
<h2>Table of cases</h2>
{table_of_cases}
</body>
</html>
"""


def as_page(checkup: check.Checkup, directory: str | os.PathLike) -> str:
  """What was found as one HTML page that needs no other file, with a picture of every case, suspected ones first.

  Args:
    checkup: what `examine` gave.
    directory: the dataset's folder.

  Returns:
    The page.
  """
  from selfreg_jax.evaluation import report

  made = checkup.made
  odd = {
    case_id: [suspicion for suspicion in checkup.suspicions if case_id in suspicion.cases] for case_id in made.cases
  }
  order, homes = sorted(made.cases, key=lambda case_id: (not odd[case_id], case_id)), _homes(made)
  figures = [_figure(made, made.cases[case_id], homes[case_id], odd[case_id], directory) for case_id in order]
  colors = (bytes(color).hex() for color in report.class_colors(made.num_classes)[1:])
  return _PAGE.format(
    title=_escape(f"Check of {checkup.where}: {len(made.cases)} case(s), none damaged"),
    suspicions=_suspicions_as_html(checkup.suspicions),
    tables="\n".join(map(_table_as_html, tables(checkup))),
    legend=" ".join(
      f'<span><i style="background:#{color}"></i>{_escape(name)}</span>'
      for color, name in zip(colors, made.classes[1:], strict=True)
    ),
    order=", suspected cases first" if any(odd.values()) else "",
    cases="\n".join(figures),
    table_of_cases=_table_as_html(_table_of_cases(checkup, order)),
  )


def _escape(text: str) -> str:
  return html.escape(text)


def _suspicions_as_html(suspicions: Sequence[check.Suspicion]) -> str:
  if not suspicions:
    return "<p>Nothing is suspected.</p>"
  items = "\n".join(f"<li>{_escape(str(suspicion))}</li>" for suspicion in suspicions)
  return f'<p>{len(suspicions)} thing(s) to look at:</p>\n<ul class="odd">\n{items}\n</ul>'


def _table_as_html(table: Table) -> str:
  def row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

  facts = table.columns[0] == "fact"
  head = "" if facts else f"<thead>{row(table.columns, 'th')}</thead>\n"
  body = "\n".join(row(cells, "td") for cells in table.rows)
  return f'<div class="wide"><table{" class=facts" if facts else ""}>\n{head}<tbody>\n{body}\n</tbody></table></div>'


def _figure(
  made: Manifest, case: Case, part: str, suspicions: Sequence[check.Suspicion], directory: str | os.PathLike
) -> str:
  picture = base64.b64encode(thumbnail(made, case, directory)).decode()
  slices = f", slice {_shown_slice(case)}" if made.kind == "volume" else ""
  reasons = "".join(
    f'<br><b class="odd">{_escape(": ".join(filter(None, (suspicion.what, suspicion.cases[case.id]))))}</b>'
    for suspicion in suspicions
  )
  group = f" of {_escape(case.group)}" if case.group != case.id else ""
  return (
    f'<figure><img alt="{_escape(case.id)}" src="data:image/webp;base64,{picture}">'
    f"<figcaption>{_escape(case.id)}{group}"
    f"<br><span>{part}, {_size(made, case)}{slices}</span>{reasons}</figcaption></figure>"
  )


def write_page(checkup: check.Checkup, directory: str | os.PathLike, path: str | os.PathLike) -> None:
  """Writes `as_page` under a temporary name and renames it: the file exists whole or not at all.

  Raises:
    UserError: it cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".partial")
  content = as_page(checkup, directory)
  try:
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
  except OSError as error:
    raise UserError(f"--html={path}: cannot be written ({error.strerror or error})") from error
