"""Scores the best checkpoint of a run, compares or pools runs, or predicts unlabelled files.

python eval.py --workdir=DIR [--split=test|val] [--data=OTHER_PREPARED_DIR] [--tta] [--resize=logits] [--postprocess]
python eval.py --workdir=DIR --compare=OTHER_DIR
python eval.py --workdirs='runs/glas_*' [--ensemble] [--output=FOLDER]
python eval.py --workdir=DIR --input=FOLDER --output=FOLDER [--probabilities]

Several processes share the cases; see train.py for how they are started.
"""

import os
import sys

from absl import app, flags

from selfreg_jax import compilation_cache, processes
from selfreg_jax.errors import UserError, parse_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py.")
_WORKDIRS = flags.DEFINE_string("workdirs", None, "Several workdirs, as a quoted pattern: each is scored, all pooled.")
_ENSEMBLE = flags.DEFINE_bool("ensemble", False, "With --workdirs: average their probabilities and take them as one.")
_COMPARE = flags.DEFINE_string("compare", None, "Another workdir: scores both and tests their paired difference.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Best by validation Dice, or the newest.")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "val", "train"], "Split whose cases are scored.")
_DATA = flags.DEFINE_string("data", None, "Another prepared dataset to score; default: the one trained on.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes that score cases; the results are the same.")
_TTA = flags.DEFINE_bool("tta", False, "Average the softmax over the four mirrorings of rows and columns.")
_RESIZE = flags.DEFINE_enum("resize", "labels", ["labels", "logits"], "What is brought back to the native grid.")
_POSTPROCESS = flags.DEFINE_bool("postprocess", False, "Keep the largest connected component of each class.")
_INPUT = flags.DEFINE_string("input", None, "Folder of NIfTI files, or images, to predict instead of scoring.")
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder for the results; default: WORKDIR/eval/SPLIT, or eval_pooled_NAME/SPLIT or eval_ensemble_NAME/SPLIT.",
)
_PROBABILITIES = flags.DEFINE_bool("probabilities", False, "With --input: also write softmax probabilities.")
processes.define_flags()
compilation_cache.define_flags()


def main(argv: list[str]) -> int:
  """Evaluates as the parsed flags say; returns the exit code."""
  del argv
  return processes.run_command(evaluate)


def check_flags() -> None:
  """Raises UserError where flags do not go together."""
  if bool(_WORKDIR.value) == bool(_WORKDIRS.value):
    raise UserError("give --workdir=DIR, or several with --workdirs='PATTERN' (one of the two)")
  if _ENSEMBLE.value and not _WORKDIRS.value:
    raise UserError("--ensemble goes with --workdirs='PATTERN'")
  if _WORKERS.value < 1:
    raise UserError(f"--workers={_WORKERS.value}: at least 1")
  if _PROBABILITIES.value and not _INPUT.value:
    raise UserError("--probabilities goes with --input")
  if _COMPARE.value and (_WORKDIRS.value or _INPUT.value or _OUTPUT.value):
    raise UserError(
      "--compare scores --workdir and the other one, each into its own eval folder; it does not go with --workdirs, "
      "--input or --output"
    )
  if not _INPUT.value:
    return
  if not _OUTPUT.value:
    raise UserError("--input needs --output, the folder for the predictions")
  if _DATA.value or flags.FLAGS["split"].present or flags.FLAGS["workers"].present:
    raise UserError(
      "--input predicts unlabelled files; --data, --split and --workers score a prepared dataset: give one or the other"
    )
  if _WORKDIRS.value and not _ENSEMBLE.value:
    raise UserError("--input with --workdirs needs --ensemble: one class map a file is written")


def evaluate() -> None:
  """Scores, compares, pools or predicts."""
  check_flags()
  processes.start(processes.from_flags())
  compilation_cache.from_flags()
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from rich.console import Console

  from selfreg_jax.evaluation import compare, pooling, prediction, scoring
  from selfreg_jax.evaluation.options import Options
  from selfreg_jax.predictor import load_ensemble

  console = Console(width=None if sys.stdout.isatty() else 100, quiet=not processes.is_first())
  options = Options(_TTA.value, _RESIZE.value, _POSTPROCESS.value)
  request = scoring.Request(_SPLIT.value, _DATA.value, _CHECKPOINT.value, options, _WORKERS.value)
  with processes.together():
    workdirs = pooling.find_workdirs(_WORKDIRS.value) if _WORKDIRS.value else [_WORKDIR.value]
  if _INPUT.value:
    predictor = load_ensemble(workdirs, checkpoint=_CHECKPOINT.value, options=options)
    prediction.predict_folder(
      predictor, _INPUT.value, _OUTPUT.value, probabilities=_PROBABILITIES.value, console=console
    )
  elif _COMPARE.value:
    compare.compare_workdirs(_WORKDIR.value, _COMPARE.value, request, console=console)
  elif _ENSEMBLE.value:
    output = _OUTPUT.value or pooling.default_output(workdirs, "eval_ensemble") / request.split
    pooling.score_ensemble(workdirs, request, output=output, console=console)
  elif _WORKDIRS.value:
    output = _OUTPUT.value or pooling.default_output(workdirs, "eval_pooled") / request.split
    pooling.pool_workdirs(workdirs, request, output=output, console=console)
  else:
    scoring.evaluate_workdir(_WORKDIR.value, request, output=_OUTPUT.value, console=console)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
