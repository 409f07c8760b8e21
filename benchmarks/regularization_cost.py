"""What the self-regularization adds to a training step: SCR, IFD and both, on both backbones, here and in PyTorch.

  python -m benchmarks.regularization_cost [--network=both|unet|swin_unet] [--short] [--json] [--batch_size=4]

All variants of a network take their steps in turns in one run, the rows give the added share of the step without
regularization. Equality of both sides is checked for every variant before anything is timed. PyTorch runs eager, in
channels_last.
"""

import argparse
import gc

import jax

from benchmarks import measuring
from benchmarks.measuring import Row, Timing
from benchmarks.steps import Ours, Theirs, parse_flags, require_equal_steps, settings

# Largest added share of a step, in percent, that is aimed at for the whole method.
TARGETS = {"cpu": {"unet": 3.0, "swin_unet": 5.0}, "gpu": {"unet": 2.0, "swin_unet": 3.0}}
VARIANTS = ("baseline", "scr", "ifd", "selfreg")


def main() -> None:
  """Measures and prints."""
  flags = parse_flags(measuring.parser(__doc__))
  rows = []
  for network in flags.networks:
    rows += _rows(network, flags)
    gc.collect()
  measuring.present(
    f"Added by self-regularization, {settings(flags, flags.networks[0], VARIANTS)[0]}",
    rows,
    as_json=flags.json,
    short=flags.short,
    device=measuring.device_kind(),
    other="PyTorch",
    notes=[
      "added: median over the rounds of (a step with the term / the step without in the same round - 1)",
      "the aim is at our own added share; a spread that holds 0 and the aim decides nothing: more --rounds",
    ],
  )


def _rows(network: str, flags: argparse.Namespace) -> list[Row]:
  steps = {}
  for setting in settings(flags, network, VARIANTS):
    ours, theirs = Ours(setting), Theirs(setting)
    require_equal_steps(ours, theirs)
    steps |= {f"ours {setting.variant}": ours, f"PyTorch {setting.variant}": theirs}
  timings = measuring.alternate(steps, rounds=flags.rounds, warmup=1, budget=flags.budget)

  target = TARGETS.get(jax.default_backend(), {}).get(network)
  baseline = timings["ours baseline"], timings["PyTorch baseline"]
  rows = [measuring.timed_row(f"{network} baseline: step", *baseline)]
  for variant in VARIANTS[1:]:
    added = [added_percent(timings[f"{side} {variant}"], timings[f"{side} baseline"]) for side in ("ours", "PyTorch")]
    rows.append(
      Row(
        f"{network}: {' and '.join(('SCR', 'IFD') if variant == 'selfreg' else (variant.upper(),))}",
        *(shares.median for shares in added),
        unit="% added",
        spread="; ".join(f"{low:.3g}..{high:.3g}" for low, high in (shares.quartiles for shares in added)),
        target=target if variant == "selfreg" and not flags.short else None,
        target_of_ours=True,
        compared=False,
        details={side: timings[f"{side} {variant}"].to_json() for side in ("ours", "PyTorch")},
      )
    )
  return rows


def added_percent(term: Timing, baseline: Timing) -> Timing:
  """By how many percent each run is longer than the baseline's of the same round."""
  pairs = zip(term.seconds, baseline.seconds, strict=True)
  return Timing(tuple(100 * (with_term / without - 1) for with_term, without in pairs))


if __name__ == "__main__":
  measuring.run(main)
