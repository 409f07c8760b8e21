"""Scores the best checkpoint of a run, or predicts unlabelled files with it.

python eval.py --workdir=DIR [--split=test|val] [--data=OTHER_PREPARED_DIR]
python eval.py --workdir=DIR --input=FOLDER --output=FOLDER [--probabilities]
"""

import pathlib
import sys

from absl import app, flags

from selfreg_jax.errors import UserError, parse_flags, run_command

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Best by validation Dice, or the newest.")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "val", "train"], "Split whose cases are scored.")
_DATA = flags.DEFINE_string("data", None, "Another prepared dataset to score; default: the one trained on.")
_INPUT = flags.DEFINE_string("input", None, "Folder of NIfTI files to predict instead of scoring a dataset.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; default when scoring: WORKDIR/eval/SPLIT.")
_PROBABILITIES = flags.DEFINE_bool("probabilities", False, "With --input: also write softmax probabilities.")
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> int:
  """Evaluates as the parsed flags say; returns the exit code."""
  del argv
  return run_command(evaluate)


def evaluate() -> None:
  """Scores a dataset or predicts a folder."""
  if _INPUT.value and not _OUTPUT.value:
    raise UserError("--input needs --output, the folder for the predictions")
  if _PROBABILITIES.value and not _INPUT.value:
    raise UserError("--probabilities goes with --input")
  if _INPUT.value and (_DATA.value or flags.FLAGS["split"].present):
    raise UserError(
      "--input predicts unlabelled files; --data and --split score a prepared dataset: give one or the other"
    )
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from rich.console import Console

  from selfreg_jax import predictor as predictors
  from selfreg_jax.evaluation import scoring

  console = Console(width=None if sys.stdout.isatty() else 100)
  predictor = predictors.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
  if _INPUT.value:
    scoring.predict_folder(predictor, _INPUT.value, _OUTPUT.value, probabilities=_PROBABILITIES.value, console=console)
    return
  name = _SPLIT.value if _DATA.value is None else f"{pathlib.Path(_DATA.value).resolve().name}_{_SPLIT.value}"
  output = _OUTPUT.value or pathlib.Path(_WORKDIR.value) / "eval" / name
  data = pathlib.Path(_DATA.value or predictor.config.data.dir)
  if not data.is_dir():
    raise UserError(f"{data}: no such folder; if the dataset has moved, give its new place with --data=DIR")
  scoring.score_dataset(predictor, data, split=_SPLIT.value, output=output, console=console)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
