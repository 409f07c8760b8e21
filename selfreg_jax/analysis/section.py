"""The analysis as a section of an evaluation's report, and as a page of its own."""

import base64
import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from selfreg_jax import workdir as workdirs
from selfreg_jax.analysis.measuring import ALL, MEAN
from selfreg_jax.analysis.statistics import find
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import html_report, scoring, sections

_NAME = "analysis"
_TITLE = "What the blocks look at and hold"
_EXPLANATION = (
  "Grad-CAM: where what a block says for a class lies; its energy inside the foreground is better than chance where it "
  "is above the share of the image that the foreground takes. |r|: mean absolute correlation of pairs of channels. "
  "Effective rank: how many channels' worth of independent variation a map has. Probe: how well a linear read-out of "
  "the block's channels, fitted to training cases, explains the classes at the map's resolution. A dash: no slice has "
  "any evidence, or the channels are constant."
)

# (quantity, class, title, factor) of the columns.
COLUMNS = (
  ("mean_abs_correlation", "", "mean |r|", 1.0),
  ("effective_rank", "", "effective rank", 1.0),
  ("cam_inside", ALL, "Grad-CAM inside %", 100.0),
  ("probe_r2", MEAN, "probe R²", 1.0),
  ("probe_dice", MEAN, "probe Dice %", 100.0),
)


def render(summary: Mapping[str, Any], picture: bytes) -> str:
  """The section's HTML.

  Args:
    summary: what `analysis.json` holds.
    picture: the figure as PNG.
  """
  encoded = base64.b64encode(picture).decode()
  parts = [
    f'<p class="remark">{html.escape(_made_of(summary))} {html.escape(_EXPLANATION)}</p>',
    f'<img src="data:image/png;base64,{encoded}" style="max-width:100%;height:auto" alt="Grad-CAM, correlations and '
    f'curves over the blocks; the numbers are in the tables">',
  ]
  tables = [
    (f"{run['workdir']}, step {run['checkpoint']['step']}", _table(run["blocks"], run["values"], "mean", signed=False))
    for run in summary["runs"]
  ]
  if summary["comparison"] is not None:
    ours, other = (run["workdir"] for run in summary["runs"])
    differences = _table(summary["runs"][0]["blocks"], summary["comparison"], "difference", signed=True)
    tables.append((f"Paired difference: {ours} less {other}", differences))
  parts.append('<div class="tables">')
  parts += [f"<div><h3>{html.escape(title)}</h3>{table}</div>" for title, table in tables]
  parts.append("</div>")
  return "".join(parts)


def _made_of(summary: Mapping[str, Any]) -> str:
  """On what the numbers stand, in a sentence."""
  slices, probe_slices = (sum(map(len, summary[name].values())) for name in ("slices", "probe_slices"))
  masks = {"truth": "the true masks", "prediction": "the predicted masks"}[summary["request"]["masks"]]
  return (
    f"Means over {summary['cases']} of {summary['cases_of_split']} {summary['data']['split']} cases ({slices} slices) "
    f"with 95 % bootstrap intervals; Grad-CAM of {masks}; probes fitted to {len(summary['probe_slices'])} training "
    f"cases ({probe_slices} slices)."
  )


def _table(blocks: Sequence[Mapping[str, Any]], rows: list[dict[str, Any]], name: str, *, signed: bool) -> str:
  heads = "".join(f'<th scope="col">{html.escape(title)}</th>' for _, _, title, _ in COLUMNS)
  body = []
  for block in blocks:
    size = f"{block['channels']} @ {block['size'][0]}\N{MULTIPLICATION SIGN}{block['size'][1]}"
    cells = "".join(
      f"<td>{_cell(find(rows, block['name'], quantity, class_name), name, factor, signed)}</td>"
      for quantity, class_name, _, factor in COLUMNS
    )
    body.append(f'<tr><th scope="row">{html.escape(block["name"])}<br><small>{size}</small></th>{cells}</tr>')
  return (
    f'<div class="scroll" tabindex="0"><table class="numbers"><thead><tr><th scope="col">block</th>{heads}</tr></thead>'
    f"<tbody>{''.join(body)}</tbody></table></div>"
  )


def _cell(row: Mapping[str, Any], name: str, factor: float, signed: bool) -> str:
  if row[name] is None:
    return "\N{EN DASH}"
  digits = 1 if factor == 100 else 3
  sign = "+" if signed else ""
  text = f"{factor * row[name]:{sign}.{digits}f}"
  if row["interval"] is None:
    return text
  low, high = (f"{factor * bound:{sign}.{digits}f}" for bound in row["interval"])
  return f"{text}<small>{low} to {high}</small>"


def write_page(path: str | os.PathLike, content: str, summary: Mapping[str, Any]) -> None:
  """Writes the section as a page of its own, with what it was made of."""
  data = summary["data"]
  facts = {name: summary[name] for name in ("request", "example", "slices", "probe_slices", "versions")}
  details = f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"
  title = f"{data['dataset']}, {data['split']}: analysis"
  html_report.write_page(path, title=title, sections=[(_TITLE, content), ("Request and versions", details)])


def register(workdir: pathlib.Path, content: str, summary: Mapping[str, Any]) -> str:
  """Adds the section to the report of a run's evaluation on the same split, now and whenever it is made anew.

  Args:
    workdir: of the run.
    content: what `render` gave.
    summary: what `analysis.json` holds.

  Returns:
    A line that says what was done.
  """
  data = summary["data"]
  made_of = {
    "checkpoint": {"step": summary["runs"][0]["checkpoint"]["step"]},
    "data": {"fingerprint": data["fingerprint"], "split": data["split"]},
  }
  folder = scoring.default_output(workdir, data["split"], summary["request"]["data"])
  page = folder / "report.html"
  try:
    sections.write(folder, _NAME, sections.Section(_TITLE, content, made_of))
    if not page.is_file():
      return f"report      {page} will have a section of this when eval.py writes it"
    with workdirs.hold(folder, what="evaluation", flag="--output"):
      evaluation = json.loads((folder / "summary.json").read_text())
      shown = [section.shown(evaluation) for section in sections.read(folder)]
      if not html_report.replace_sections(page, shown):
        return f"report      {page} is of an older version; eval.py writes it anew, with a section of this"
  except (OSError, ValueError, UserError) as error:
    return f"warning     no section was added to {page}: {error}"
  return f"report      {page} has a section of this"
