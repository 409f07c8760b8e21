"""The pictures of an ablation: Dice over lambda or bars with intervals, and curves of training."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from selfreg_jax import config as configs
from selfreg_jax.analysis.ablation.design import Design
from selfreg_jax.analysis.ablation.results import Outcome
from selfreg_jax.evaluation import report

_DPI = 150
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LAMBDAS = {"loss.scr_weight": "$\\lambda_1$ (SCR)", "loss.ifd_weight": "$\\lambda_2$ (IFD)"}
_FEWEST_WEIGHTS = 3  # positive ones, that make a curve


def write(design: Design, outcomes: Sequence[Outcome], summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes `ablation.png`, `ablation.pdf` and `curves.png`; where no run is scored yet, the curves only.

  Args:
    design: what was compared.
    outcomes: of its runs.
    summary: what `results.summarize` gave.
    folder: for the files.
  """
  if any(variant["seeds"] for variant in summary["variants"].values()):
    weights = lambda_sweeps(design)
    drawing = draw_lambdas(weights, summary) if weights else draw_bars(summary)
    _save(drawing, folder / "ablation.png")
    _save(drawing, folder / "ablation.pdf")
  _save(draw_curves(outcomes), folder / "curves.png")


def _save(drawing: Figure, path: pathlib.Path) -> None:
  content = io.BytesIO()
  drawing.savefig(content, format=path.suffix[1:], dpi=_DPI)
  report.write_whole(path, content.getvalue())


def lambda_sweeps(design: Design) -> dict[str, dict[str, float]]:
  """The sweeps over one of the two weights, the other one being that of the reference.

  Args:
    design: what is compared.

  Returns:
    Field -> variant name -> weight, by weight; empty unless the variants change nothing but the two weights and one of
    them has at least three positive values.
  """
  if not all(set(changes) <= set(_LAMBDAS) for changes in design.variants.values()):
    return {}
  weights = {run.variant: {field: configs.flatten(run.config)[field] for field in _LAMBDAS} for run in design.runs}
  sweeps = {}
  for field in _LAMBDAS:
    (other,) = set(_LAMBDAS) - {field}
    points = {
      name: own[field]
      for name, own in weights.items()
      if own[other] == weights[design.reference][other] and own[field] > 0
    }
    if len(points) >= _FEWEST_WEIGHTS:
      sweeps[field] = dict(sorted(points.items(), key=lambda item: item[1]))
  return sweeps


def draw_lambdas(sweeps: Mapping[str, Mapping[str, float]], summary: Mapping[str, Any]) -> Figure:
  """Mean Dice with its interval over each weight on a logarithmic axis; the paper's two plots."""
  figure = Figure(figsize=(5 * len(sweeps), 3.8), layout="constrained")
  for axes, (field, points) in zip(
    np.ravel(figure.subplots(1, len(sweeps), sharey=True)), sweeps.items(), strict=False
  ):
    # A little to the left and right of the weight, so that equal scores do not hide each other.
    for protocol, color, aside in (("sound", _COLORS[0], 0.97), ("paper", _COLORS[1], 1.03)):
      entries = [(weight, _dice(summary, name, protocol)) for name, weight in points.items()]
      entries = [(weight, entry) for weight, entry in entries if entry is not None]
      if not entries:
        continue
      x, means = [weight for weight, _ in entries], [100 * entry["mean"] for _, entry in entries]
      style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.4, "capsize": 3}
      reach = _reach([entry for _, entry in entries])
      axes.errorbar(np.multiply(x, aside), means, yerr=reach, label=f"{protocol} protocol", **style)
    axes.set_xscale("log")
    axes.set_xticks(list(points.values()), [f"{weight:g}" for weight in points.values()], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel(_LAMBDAS[field])
    axes.grid(alpha=0.3)
  axes = figure.axes[0]
  axes.set_ylabel("Dice %")
  axes.legend(fontsize=8)
  figure.suptitle(_caption(summary), fontsize=9)
  return figure


def draw_bars(summary: Mapping[str, Any]) -> Figure:
  """Mean Dice of each variant as a bar with its interval; beside it the paired differences to the reference."""
  names = [name for name, variant in summary["variants"].items() if variant["seeds"]]
  figure = Figure(figsize=(11, 1.8 + 0.45 * len(names)), layout="constrained")
  scores, differences = figure.subplots(1, 2, sharey=True)
  places = np.arange(len(names))
  for shift, (protocol, color) in zip((-0.19, 0.19), zip(("sound", "paper"), _COLORS, strict=False), strict=True):
    entries = [_dice(summary, name, protocol) or {"mean": 0.0, "interval": None} for name in names]
    means = [100 * entry["mean"] for entry in entries]
    scores.barh(places + shift, means, 0.36, xerr=_reach(entries), color=color, alpha=0.75, capsize=2.5,
                error_kw={"linewidth": 1}, label=f"{protocol} protocol")  # fmt: skip
    changed = [
      (place, entry)
      for place, name in enumerate(names)
      if (entry := _dice(summary, name, protocol, difference=True)) is not None
    ]
    if changed:
      differences.errorbar(
        [100 * entry["mean"] for _, entry in changed],
        [place + shift for place, _ in changed],
        xerr=_reach([entry for _, entry in changed]),
        color=color, fmt="o", markersize=4, capsize=2.5, linewidth=1.2,
      )  # fmt: skip
  scores.set_yticks(places, names, fontsize=9)
  scores.invert_yaxis()
  scores.set_xlabel("Dice %")
  # A bar's length is what it says; small differences are for the plot beside it. Intervals may pass the possible.
  scores.set_xlim(0, min(scores.get_xlim()[1], 100))
  figure.legend(*scores.get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside lower center")
  differences.axvline(0, color="black", linewidth=0.8)
  differences.set_xlabel(f"difference to {summary['reference']}, Dice points (paired by seed)")
  for axes in (scores, differences):
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
  figure.suptitle(_caption(summary), fontsize=9)
  return figure


def draw_curves(outcomes: Sequence[Outcome]) -> Figure:
  """Training and validation over the step: a colour a variant, a thin line a seed, a thick one their mean.

  The training loss is the part that all variants have: with the terms in which they differ it could not be compared.
  """
  figure = Figure(figsize=(11, 4), layout="constrained")
  variants = list(dict.fromkeys(outcome.run.variant for outcome in outcomes))
  plots = {"weighted CE + Dice loss in training": _base_losses, "validation Dice": _validations}
  for axes, (title, points_of) in zip(figure.subplots(1, 2), plots.items(), strict=True):
    for number, variant in enumerate(variants):
      # Beyond the seven colours they repeat with other lines.
      style = {"color": _COLORS[number % len(_COLORS)], "linestyle": ("-", "--", ":")[number // len(_COLORS) % 3]}
      by_step: dict[int, list[float]] = {}
      members = [outcome for outcome in outcomes if outcome.run.variant == variant]
      for outcome in members:
        points = points_of(outcome)
        axes.plot(*zip(*points, strict=True), linewidth=0.6, alpha=0.45, **style) if points else None
        for step, value in points:
          by_step.setdefault(step, []).append(value)
      whole = sorted((step, np.mean(values)) for step, values in by_step.items() if len(values) == len(members))
      if whole:
        axes.plot(*zip(*whole, strict=True), linewidth=1.8, label=variant, **style)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7)
  return figure


def _base_losses(outcome: Outcome) -> list[tuple[int, float]]:
  """(step, loss without regularization and deep supervision) of each record of a run."""
  weights, parts = outcome.run.config.loss, ("train/ce", "train/dice")
  return [
    (line["step"], weights.ce_weight * line["train/ce"] + weights.dice_weight * line["train/dice"])
    for line in outcome.lines
    if all(line.get(part) is not None for part in parts)
  ]


def _validations(outcome: Outcome) -> list[tuple[int, float]]:
  return [(line["step"], line["val/dice"]) for line in outcome.lines if line.get("val/dice") is not None]


def _dice(summary: Mapping[str, Any], name: str, protocol: str, *, difference: bool = False) -> dict[str, Any] | None:
  """A variant's Dice, or its difference to the reference; None where there is none."""
  blocks = summary["variants"][name]["difference" if difference else "protocols"]
  entry = None if blocks is None else blocks[protocol]["mean"].get("dice")
  return None if entry is None or entry["mean"] is None else entry


def _reach(entries: Sequence[Mapping[str, Any]]) -> list[float]:
  """Half the width of each interval in percent; nan, which is not drawn, where there is none."""
  return [100 * (entry["interval"][1] - entry["mean"]) if entry["interval"] else np.nan for entry in entries]


def _caption(summary: Mapping[str, Any]) -> str:
  seeds = len(summary["seeds"])
  if seeds == 1:
    return f"{summary['split']} split, one seed: no interval"
  return f"{summary['split']} split, mean over {seeds} seeds with 95 % interval (t distribution)"
