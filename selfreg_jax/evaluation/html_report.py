"""`report.html`: an evaluation as one page that needs no network.

The page is `html_report.html` with `html_report.css`, `html_report.js` and the data put into it. Pictures travel as one
small WebP file a slice; truth and prediction as the red and the green channel of a second, lossless one, so that the
page can draw, hide and compare them by itself.
"""

import base64
import html
import importlib.resources
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from selfreg_jax.data import published
from selfreg_jax.data.manifest import Case, Manifest
from selfreg_jax.evaluation import metrics, protocols, report

LIMIT_BYTES = 30_000_000

_MAX_SIDE = 512  # pixels of a picture's longer side
_WEBP = {"format": "WEBP", "quality": 70, "method": 2}  # method 2 takes half of the default's time for 10 % more bytes
_FULL_CASES = 3  # the worst ones are shown with every slice, on half of the room if it takes that much
_MIN_SLICES = 3  # as few as a case may be thinned to; where there is no room for them, cases are left out
_SAMPLE = 5  # slices that a case's size is estimated from
_NOTE_BYTES = 2_000  # kept free for the remark on what was left out
_SCRIPT_BYTES = 100  # of the element around a case's JSON
_CASE_BYTES = 400  # of that JSON without its slices
_BEGIN, _END = "<!-- further sections -->", "<!-- end of further sections -->"  # in the page
_SLICE_BYTES = 40  # of a slice's numbers in it

_METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "assd": "ASSD", "nsd": "NSD"}
_OFF = (None, False, "labels")  # values of test-time options that change nothing
_DISTANCES = ("hd95", "assd")
_COUNTS = ("n", *protocols.FLAGS)
_CAPTIONS = {
  ("sound", "volume"): "A missed or invented class scores Dice 0 and the diagonal of the volume; a class in neither "
  "truth nor prediction is not scored. The numbers to trust.",
  ("sound", "image"): "At native size. A missed or invented class scores Dice 0 and the diagonal of the image; a class "
  "in neither truth nor prediction is not scored. The numbers to trust.",
  (
    "paper",
    "volume",
  ): "To compare with published tables only: a missed class scores distance 0, an invented one Dice 1.",
  ("paper", "image"): "To compare with published tables only.",
}

Scores = Mapping[str, Mapping[str, protocols.ClassTable]]
LoadCase = Callable[[str], tuple[np.ndarray, np.ndarray, np.ndarray]]


def write_report(
  path: str | os.PathLike,
  *,
  summary: Mapping[str, Any],
  scores: Scores,
  manifest: Manifest,
  case_ids: Sequence[str],
  load_case: LoadCase,
  sections: Iterable[tuple[str, str]] = (),
  limit: int = LIMIT_BYTES,
) -> None:
  """Writes an evaluation as one self-contained page; the file exists whole or not at all.

  Cases come worst first, by their mean Dice in the sound protocol. They are loaded and encoded one by one. The worst
  are shown with every slice; of the others, where room is short, only slices with foreground, or every k-th of them;
  where it is shorter still, cases have no pictures. The page says what was left out.

  Args:
    path: the HTML file.
    summary: what `summary.json` holds: "protocols", "cases", "data" ("directory", "split", "fingerprint"), "config",
      "checkpoint" and "versions"; "options" (name -> value) where there are any.
    scores: protocol -> case id -> what `protocols.evaluate_case` gave; "sound" among them.
    manifest: of the dataset.
    case_ids: the cases that were scored.
    load_case: case id -> image (S, R, C, channels) as stored, truth (S, R, C) and prediction (S, R, C) class ids.
    sections: titles (plain text) and contents (trusted HTML) of further sections.
    limit: bytes that the page may not exceed as long as it fits without pictures.

  Raises:
    KeyError: a case has no scores, or is not in the manifest.
  """
  order = worst_first(case_ids, scores["sound"])
  parts = {
    "title": html.escape(f"{manifest.dataset}, {summary['data']['split']}"),
    "style": _resource("html_report.css"),
    "script": _resource("html_report.js"),
    "header": _header(summary, manifest),
    "summary": _summary_section(summary, manifest),
    "sections": _cards(sections),
    "details": _details(summary),
    "data": embed_json(_page_data(summary, scores, manifest, order)),
  }
  room = limit - len(_fill(**parts, note="", pictures="").encode()) - _NOTE_BYTES
  pictures = _pictures(order, load_case, manifest, room)
  scripts = "\n".join(
    f'<script type="application/json" class="pictures" data-case="{number}">{content}</script>'
    for number, content in enumerate(content for content, _ in pictures)
  )
  note = _note([kind for _, kind in pictures], len(order), manifest.kind, limit)
  page = _fill(**parts, note=html.escape(note), pictures=scripts)
  report.write_whole(path, page.encode())


def replace_sections(path: str | os.PathLike, sections: Iterable[tuple[str, str]]) -> bool:
  """Puts further sections into a page that is there, in place of those that it has; the rest stays as it is.

  Args:
    path: of a page that `write_report` wrote.
    sections: as in `write_report`; all of them.

  Returns:
    Whether it is such a page.

  Raises:
    OSError: it cannot be read or written.
  """
  page = pathlib.Path(path).read_text(encoding="utf-8")
  before, begin, rest = page.partition(_BEGIN)
  _, end, after = rest.rpartition(_END)
  if not begin or not end:
    return False
  report.write_whole(path, "".join((before, begin, _cards(sections), end, after)).encode())
  return True


def write_page(path: str | os.PathLike, *, title: str, sections: Iterable[tuple[str, str]]) -> None:
  """Writes sections as a page of their own, in the style of the report; the file exists whole or not at all.

  Args:
    path: the HTML file.
    title: plain text.
    sections: as in `write_report`.
  """
  head, _, _ = _resource("html_report.html").partition("<body>")
  head = head.replace("{{title}}", html.escape(title)).replace("{{style}}", _resource("html_report.css"))
  body = f'<header><h1>{html.escape(title)}</h1><p class="disclaimer">For research, not for clinical use.</p></header>'
  page = f"{head}<body>{body}<main>{_cards(sections)}</main></body></html>\n"
  report.write_whole(path, page.encode())


def _cards(sections: Iterable[tuple[str, str]]) -> str:
  return "".join(
    f'<section class="card"><h2>{html.escape(title)}</h2>{content}</section>' for title, content in sections
  )


def worst_first(case_ids: Iterable[str], table: Mapping[str, protocols.ClassTable]) -> list[str]:
  """Case ids by rising mean Dice over classes; those without a scored class last, equals by name.

  Args:
    case_ids: the cases.
    table: case id -> what `protocols.evaluate_case` gave for it.
  """

  def key(case_id: str) -> tuple[float, str]:
    dice = _mean_dice(table[case_id])
    return math.inf if math.isnan(dice) else dice, case_id

  return sorted(case_ids, key=key)


def _mean_dice(table: protocols.ClassTable) -> float:
  return protocols.mean_foreground_dice([np.array([row["dice"] for row in table.values()])])


def embed_json(content: Any) -> str:
  """JSON that may stand inside a <script> element: nothing in it can end the element or begin a comment.

  Args:
    content: what JSON knows; nan and infinities become null.
  """
  text = json.dumps(_finite(content), allow_nan=False, separators=(",", ":"))
  return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return value


def _resource(name: str) -> str:
  return (importlib.resources.files("selfreg_jax.evaluation") / name).read_text(encoding="utf-8")


def _fill(**parts: str) -> str:
  """The page with every {{name}} replaced in one pass: what is put in is not searched again."""
  return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _resource("html_report.html"))


def _header(summary: Mapping[str, Any], manifest: Manifest) -> str:
  data, checkpoint = summary["data"], summary["checkpoint"]
  step = f"step {checkpoint['step']}"
  if checkpoint.get("val_dice") is not None:
    step += f" (validation Dice {100 * checkpoint['val_dice']:.2f} %)"
  options = {name: value for name, value in (summary.get("options") or {}).items() if value not in _OFF}
  facts = {
    "dataset": f"{manifest.dataset} ({data['fingerprint']})",
    "split": f"{data['split']}, {_plural(summary['cases'], 'case')}",
    "checkpoint": step,
    "options": ", ".join(name if value is True else f"{name} = {value}" for name, value in options.items()) or "none",
  }
  items = "".join(
    f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts.items()
  )
  return f'<h1>{html.escape(manifest.dataset)} <span>evaluation</span></h1><dl class="facts">{items}</dl>'


def _plural(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _unit(protocol: str, manifest: Manifest) -> str:
  if protocol == "sound":
    return manifest.unit
  return "voxel" if manifest.kind == "volume" else "pixel"


def _metric_title(metric: str, unit: str) -> str:
  name = _METRICS.get(metric, metric.replace("_", " "))
  if metric in _DISTANCES:
    return f"{name} {unit}"
  if metric == "volume_difference":
    return f"{name}, {report.VOLUME_UNITS.get(unit, unit)}"
  return f"{name} %" if metric in _METRICS else name


def _number(value: float | None, factor: float = 1.0) -> str:
  return "\N{EN DASH}" if value is None else f"{factor * value:.2f}"


def _factor(metric: str) -> float:
  return 100.0 if metric in _METRICS and metric not in _DISTANCES else 1.0


def _summary_section(summary: Mapping[str, Any], manifest: Manifest) -> str:
  articles = []
  for protocol, block in summary["protocols"].items():
    published_scores = _published_table(protocol, block, summary, manifest)
    caption = _CAPTIONS.get((protocol, manifest.kind), "")
    articles.append(
      f'<article class="protocol"><h3>{html.escape(protocol.capitalize())} protocol</h3>'
      f"<p>{html.escape(caption)}</p>"
      f'<div class="tables">{_summary_table(block, _unit(protocol, manifest))}{published_scores}</div></article>'
    )
  return "".join(articles)


def _summary_table(block: Mapping[str, Any], unit: str) -> str:
  names = list(block["mean"])

  def row(title: str, values: Mapping[str, Any], interval: Mapping[str, Any], numbers: Iterable[int]) -> str:
    cells = [
      f"<td>{_number(values.get(name), _factor(name))}{_interval(interval.get(name), _factor(name))}</td>"
      for name in names
    ]
    counts = [f'<td class="{"" if number else "none"}">{number}</td>' for number in numbers]
    return f'<tr><th scope="row">{title}</th>{"".join(cells)}{"".join(counts)}</tr>'

  classes = block["classes"]
  colors = report.class_colors(len(classes) + 1)[1:]
  rows = [
    row(
      f"{_swatch(color)}{html.escape(name)}",
      values,
      values.get("interval", {}),
      (values.get(key, 0) for key in _COUNTS),
    )
    for color, (name, values) in zip(colors, classes.items(), strict=True)
  ]
  totals = (block["cases"], *(sum(values.get(flag, 0) for values in classes.values()) for flag in protocols.FLAGS))
  mean = row("mean", block["mean"], block["interval"], totals)
  heads = "".join(
    f'<th scope="col">{html.escape(title)}</th>' for title in (*(_metric_title(name, unit) for name in names), *_COUNTS)
  )
  return (
    f'<div class="scroll" tabindex="0"><table class="numbers"><thead><tr><th scope="col">class</th>{heads}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody><tfoot>{mean}</tfoot></table></div>"
  )


def _interval(interval: Sequence[float] | None, factor: float) -> str:
  if interval is None:
    return ""
  low, high = (factor * bound for bound in interval)
  return f"<small>{low:.2f} to {high:.2f}</small>"


def _swatch(color: np.ndarray) -> str:
  return f'<i class="swatch" style="background:{_hex(color)}"></i>'


def _hex(color: Iterable[int]) -> str:
  return "#" + bytes(int(part) for part in color).hex()


def _published_table(protocol: str, block: Mapping[str, Any], summary: Mapping[str, Any], manifest: Manifest) -> str:
  """Published numbers, with this evaluation's among them; empty where they do not measure the same thing."""
  if protocol != "paper" or summary["data"]["split"] != "test" or manifest.dataset not in published.PUBLISHED_SCORES:
    return ""
  if manifest.num_classes != len(published.PUBLISHED[manifest.dataset].classes):
    return ""
  if summary.get("ensemble") or any(value not in _OFF for value in (summary.get("options") or {}).values()):
    return ""
  ours = published.PublishedScore(
    "this evaluation",
    math.nan if block["mean"]["dice"] is None else 100 * block["mean"]["dice"],
    block["mean"].get("hd95"),
  )
  entries = sorted(
    (ours, *published.PUBLISHED_SCORES[manifest.dataset]), key=lambda entry: (not math.isnan(entry.dice), entry.dice)
  )
  with_distance = any(entry.hd95 is not None for entry in entries if entry is not ours)
  rows = []
  for entry in entries:
    note = f"<small>{html.escape(entry.note)}</small>" if entry.note else ""
    distance = f"<td>{_number(entry.hd95)}</td>" if with_distance else ""
    dice = None if math.isnan(entry.dice) else entry.dice
    rows.append(
      f"<tr{' class=ours' if entry is ours else ''}>"
      f'<th scope="row">{html.escape(entry.method)}{note}</th><td>{_number(dice)}</td>{distance}</tr>'
    )
  distance = '<th scope="col">HD95 voxel</th>' if with_distance else ""
  return (
    f'<div class="scroll published" tabindex="0"><table class="numbers"><thead><tr><th scope="col">published</th>'
    f'<th scope="col">Dice %</th>{distance}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    f"<p>Source: {html.escape(published.SCORES_SOURCE)}. Single runs differ by a point and more, and these compare "
    f"only if the split is the paper's.</p></div>"
  )


def _details(summary: Mapping[str, Any]) -> str:
  blocks = {name: summary[name] for name in ("config", "checkpoint", "data", "options", "versions") if name in summary}
  return "".join(
    f"<details><summary>{name}</summary>"
    f"<pre>{html.escape(json.dumps(content, indent=2, default=str, ensure_ascii=False))}</pre></details>"
    for name, content in blocks.items()
  )


def _page_data(summary: Mapping[str, Any], scores: Scores, manifest: Manifest, order: Sequence[str]) -> dict[str, Any]:
  """What the page's script draws tables and plots from; the cases in the order in which they are shown."""
  colors = report.class_colors(manifest.num_classes)
  class_ids = range(1, manifest.num_classes)
  blocks = {}
  for protocol, block in summary["protocols"].items():
    names, unit = list(block["mean"]), _unit(protocol, manifest)
    blocks[protocol] = [
      {
        "name": name,
        "title": _metric_title(name, unit),
        "factor": _factor(name),
        "share": _factor(name) == 100,
        "classes": [row.get(name) for row in block["classes"].values()],
        "intervals": [row.get("interval", {}).get(name) for row in block["classes"].values()],
        "values": [[scores[protocol][case_id][c].get(name, math.nan) for c in class_ids] for case_id in order],
      }
      for name in names
    ]
  flags = {
    flag: [[int(scores["sound"][case_id][c][flag]) for c in class_ids] for case_id in order] for flag in protocols.FLAGS
  }
  return {
    "kind": manifest.kind,
    "classes": [{"name": name, "color": _hex(color)} for name, color in zip(manifest.classes, colors, strict=True)],
    "errors": {name: _hex(color) for name, color in report.ERROR_COLORS.items()},
    "protocols": blocks,
    "flags": flags,
    "cases": list(order),
  }


def _pictures(order: Sequence[str], load_case: LoadCase, manifest: Manifest, room: int) -> list[tuple[str, str]]:
  """The pictures of the first cases, as many as fit.

  Args:
    order: case ids, the most important first.
    load_case: as in `write_report`.
    manifest: of the dataset.
    room: bytes for all of them.

  Returns:
    For each case that fits: its JSON, and "full", "foreground" or "thinned".
  """
  result = []
  half = room / 2
  for number, case_id in enumerate(order):
    share = room / (len(order) - number)
    if number < _FULL_CASES:
      share = max(share, half / _FULL_CASES)
    image, truth, prediction = load_case(case_id)
    slices = _CaseSlices(image, truth, prediction, manifest.cases[case_id], manifest)
    chosen = slices.choose(share=share, room=room, in_full=number < _FULL_CASES)
    if chosen is None:
      break
    content, kind = slices.to_json(*chosen), chosen[1]
    result.append((content, kind))
    room -= len(content) + _SCRIPT_BYTES
  return result


class _CaseSlices:
  """A case's slices as small pictures, encoded when asked for.

  Args:
    image: (S, R, C, channels) stored values.
    truth: (S, R, C) class ids.
    prediction: (S, R, C) class ids.
    case: its entry in the manifest.
    manifest: of the dataset.
  """

  def __init__(self, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, case: Case, manifest: Manifest):
    self._image, self._truth, self._prediction = image, truth, prediction
    self._axcodes = case.axcodes
    height, width = self._turn(truth[0]).shape
    shrink = min(1.0, _MAX_SIDE / max(height, width))
    self._native = (width, height)
    self._size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    self._stride = max(1, max(height, width) // (4 * _MAX_SIDE))  # of huge images not every pixel is read
    rows, columns = case.spacing[1:]
    if self._turn(np.empty((1, 2))).shape == (2, 1):
      rows, columns = columns, rows
    self._aspect = width * columns / (height * rows)
    self._low, self._high = _value_range(image, manifest)
    self._scores = [_slice_scores(t, p, manifest.num_classes) for t, p in zip(truth, prediction, strict=True)]
    wrong = [score["wrong"] for score in self._scores]
    foreground = [score["foreground"] for score in self._scores]
    self._opening = int(np.argmax(wrong if any(wrong) else foreground)) if any(foreground) else len(truth) // 2
    self._encoded: dict[int, tuple[str, str]] = {}

  def choose(self, *, share: float, room: float, in_full: bool) -> tuple[list[int], str] | None:
    """Which slices to show in a share of the bytes.

    Args:
      share: bytes that the case may take.
      room: bytes that it may take if its share would leave it less than the fewest slices.
      in_full: whether to prefer every k-th of all slices over every k-th of those with foreground.

    Returns:
      Slice indices and "full", "foreground" (all slices from the first to the last with foreground) or "thinned"; None
      where there is no room for the case.
    """
    everything = range(len(self._truth))
    filled = [index for index, score in enumerate(self._scores) if score["foreground"]]
    between = range(filled[0], filled[-1] + 1) if filled else everything
    sample = {self._opening, *(everything[len(everything) * n // _SAMPLE] for n in range(_SAMPLE))}
    mean = sum(self._bytes(index) for index in sample) / len(sample)
    share = min(room, max(share, _CASE_BYTES + 1.2 * mean * min(_MIN_SLICES, len(everything)))) - _CASE_BYTES
    candidates = everything if in_full or mean * len(everything) <= share else between
    step = max(1, math.ceil(0.9 * mean * len(candidates) / max(share, 1)))
    while True:
      first = candidates[0] + (self._opening - candidates[0]) % step
      chosen = list(range(first, candidates[-1] + 1, step))
      total = sum(self._bytes(index) for index in chosen)
      if total <= share:
        break
      if len(chosen) == 1:
        return None
      step = max(step + 1, int(step * total / max(share, 1)))
    if len(chosen) == len(everything):
      return chosen, "full"
    return chosen, "foreground" if step == 1 else "thinned"

  def to_json(self, indices: Sequence[int], kind: str) -> str:
    """The chosen slices as the page's script reads them."""
    left, top = ("", "") if self._axcodes is None else report.body_sides(self._axcodes)
    encoded = [self._encode(index) for index in indices]
    return embed_json(
      {
        "size": self._size,
        "aspect": self._aspect,
        "left": left,
        "top": top,
        "note": self._note(indices, kind),
        "slices": len(self._truth),
        "indices": list(indices),
        "opening": list(indices).index(self._opening),
        "dice": [round(self._scores[index]["dice"], 4) for index in indices],
        "images": [image for image, _ in encoded],
        "labels": [labels for _, labels in encoded],
      }
    )

  def _note(self, indices: Sequence[int], kind: str) -> str:
    remarks = []
    if self._size != self._native:
      shown, native = ("\N{MULTIPLICATION SIGN}".join(map(str, size)) for size in (self._size, self._native))
      remarks.append(f"shown at {shown} of {native} pixels")
    if self._image.shape[3] not in (1, 3):
      remarks.append(f"the first of {self._image.shape[3]} channels is shown")
    total, shown = len(self._truth), len(indices)
    if kind == "foreground":
      remarks.append(
        f"slices {indices[0]} to {indices[-1]}, which hold all foreground; the other {total - shown} of {total} are "
        f"left out"
      )
    if kind == "thinned":
      step = indices[1] - indices[0] if shown > 1 else total
      remarks.append(
        f"one slice in {step} from {indices[0]} to {indices[-1]}; the other {total - shown} of {total} are left out"
      )
    return "; ".join(remarks)

  def _bytes(self, index: int) -> int:
    return sum(map(len, self._encode(index))) + _SLICE_BYTES

  def _turn(self, array: np.ndarray) -> np.ndarray:
    return array if self._axcodes is None else report.radiological(array, self._axcodes)

  def _encode(self, index: int) -> tuple[str, str]:
    """A slice's picture and its (truth, prediction) class ids, both WebP in base64."""
    if index not in self._encoded:
      self._encoded[index] = self._encode_slice(index)
    return self._encoded[index]

  def _encode_slice(self, index: int) -> tuple[str, str]:
    values = np.asarray(self._image[index, :: self._stride, :: self._stride], np.float32)
    values = values if values.shape[-1] == 3 else values[..., 0]
    values = np.clip((values - self._low) / max(self._high - self._low, np.finfo(np.float32).tiny), 0, 1)
    picture = Image.fromarray(np.ascontiguousarray(self._turn(np.round(255 * values).astype(np.uint8))))
    picture = picture.resize(self._size, Image.Resampling.LANCZOS)
    truth, prediction = (self._turn(np.asarray(array[index], np.uint8)) for array in (self._truth, self._prediction))
    labels = Image.fromarray(np.stack([truth, prediction, np.zeros_like(truth)], axis=-1))
    labels = labels.resize(self._size, Image.Resampling.NEAREST)
    return _base64(picture, **_WEBP), _base64(labels, format="WEBP", lossless=True, method=2)


def _value_range(image: np.ndarray, manifest: Manifest) -> tuple[float, float]:
  """The stored values that are shown as black and as white."""
  if manifest.intensity.kind != "zscore":
    return 0.0, 1.0 / manifest.scale
  sample = image[:: max(1, len(image) // 16), :: max(1, image.shape[1] // 256), :: max(1, image.shape[2] // 256)]
  low, high = np.percentile(np.asarray(sample, np.float32), (0.5, 99.5))
  return float(low), float(high)


def _slice_scores(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> dict[str, float]:
  """Pixels of foreground (in either map), pixels that differ, and the mean Dice over the slice's classes."""
  confusion = metrics.confusion_matrix(np.asarray(prediction), np.asarray(truth), num_classes=num_classes)
  return {
    "foreground": int(confusion.sum() - confusion[0, 0]),
    "wrong": int(confusion.sum() - np.trace(confusion)),
    "dice": protocols.mean_foreground_dice([protocols.dice_per_class(confusion)]),
  }


def _base64(picture: Image.Image, **options: Any) -> str:
  content = io.BytesIO()
  picture.save(content, **options)
  return base64.b64encode(content.getvalue()).decode()


def _note(kinds: Sequence[str], num_cases: int, kind: str, limit: int) -> str:
  """What the pictures show and what was left out to keep the page small."""
  size = f"to keep this page under {limit / 1e6:.3g} MB"
  remarks = []
  if kind == "volume":
    foreground, thinned = kinds.count("foreground"), kinds.count("thinned")
    if foreground:
      remarks.append(f"of {_plural(foreground, 'case')} only the slices from first to last foreground are shown")
    if thinned:
      remarks.append(f"of {_plural(thinned, 'case')} only every k-th slice is shown")
  if len(kinds) < num_cases:
    remarks.append(f"{num_cases - len(kinds)} of {_plural(num_cases, 'case')} have no pictures")
  if not remarks:
    return "All cases are shown" + (" with every slice." if kind == "volume" else ".")
  return f"{size[0].upper()}{size[1:]}: {'; '.join(remarks)}. The worst cases come first."
