"""Looks into the network of a run, or of two, block by block.

python -m selfreg_jax.analysis --workdir=RUN --output=DIR [--split=test|val] [--cases=a,b] [--slices=N]
python -m selfreg_jax.analysis --workdir=RUN --compare=OTHER --output=DIR

Grad-CAM at every block, redundancy of its channels, and how well it agrees with the truth: docs/analysis.md.
"""

import sys

from absl import app, flags

from selfreg_jax import compilation_cache
from selfreg_jax.errors import UserError, parse_flags, run_command

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py.")
_COMPARE = flags.DEFINE_string("compare", None, "Another workdir, of a network with as many blocks, on the same data.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "val"], "Split whose cases are analysed.")
_DATA = flags.DEFINE_string("data", None, "Another prepared dataset; default: the one trained on.")
_CASES = flags.DEFINE_list("cases", [], "Ids of the split's cases; default: all.")
_SLICES = flags.DEFINE_integer("slices", 8, "Most slices of a case, evenly spaced among those with foreground.")
_PROBE_CASES = flags.DEFINE_integer("probe_cases", 64, "Most training cases that the probes are fitted to.")
_MASKS = flags.DEFINE_enum("masks", "truth", ["truth", "prediction"], "Where a class's logits are summed for Grad-CAM.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Best by validation Dice, or the newest.")
_EXAMPLE = flags.DEFINE_string("example", None, "Slice to show, as CASE:SLICE; default: the largest foreground.")
_SHOW = flags.DEFINE_string("show", None, "Class whose Grad-CAM is shown; default: all foreground classes as one.")
compilation_cache.define_flags()


def main(argv: list[str]) -> int:
  """Analyses as the parsed flags say; returns the exit code."""
  del argv
  return run_command(analyze)


def analyze() -> None:
  """Analyses one run, or two."""
  if not _WORKDIR.value or not _OUTPUT.value:
    raise UserError("give --workdir=RUN and --output=DIR, the folder for the results")
  compilation_cache.from_flags()
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from rich.console import Console

  from selfreg_jax.analysis import driver, tables

  progress = Console(stderr=True, width=None if sys.stderr.isatty() else 100, soft_wrap=True)
  request = driver.Request(
    split=_SPLIT.value,
    data=_DATA.value,
    cases=tuple(_CASES.value),
    slices=_SLICES.value,
    probe_cases=_PROBE_CASES.value,
    masks=_MASKS.value,
    checkpoint=_CHECKPOINT.value,
    example=_EXAMPLE.value,
    show=_SHOW.value,
  )
  workdirs = [_WORKDIR.value] + ([_COMPARE.value] if _COMPARE.value else [])
  summary = driver.analyze_workdirs(
    workdirs,
    request,
    output=_OUTPUT.value,
    say=lambda line: progress.print(line, markup=False, highlight=False),
  )
  tables.print_summary(summary, Console(width=None if sys.stdout.isatty() else 100))
  print(f"results     {_OUTPUT.value}/analysis.png, analysis.pdf, analysis.html, analysis.json, analysis.csv")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
