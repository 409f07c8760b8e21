"""Trains a self-regularizing UNet.

python train.py --config=configs/NAME.py --workdir=DIR [--config.field=value ...] [--override]

In several processes, each started with the same command: found by themselves under srun, mpirun and on TPU pod slices,
else with --coordinator=HOST:PORT --num_processes=N --process_id=I (docs/scaling.md).
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from selfreg_jax import compilation_cache, processes
from selfreg_jax.errors import EXIT_RESUMABLE, UserError, check_config_file, parse_flags
from selfreg_jax.training.signals import TrainingInterruptedError, leave_at_signals

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; override fields with --config.field=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and logs; one with a checkpoint is continued.")
_OVERRIDE = flags.DEFINE_bool("override", False, "Continue a workdir although the config differs from its own.")
flags.mark_flags_as_required(["config", "workdir"])
processes.define_flags()
compilation_cache.define_flags()


def main(argv: list[str]) -> int:
  """Trains as the parsed flags say; returns the exit code."""
  del argv
  leave_at_signals()  # until the training loop, which saves first, takes them
  return processes.run_command(train)


def train() -> None:
  """Trains; exits with 75 when a signal stopped the run."""
  if not _WORKDIR.value:
    raise UserError("--workdir is empty; name a folder")
  check_config_file(_CONFIG)
  processes.start(processes.from_flags())
  compilation_cache.from_flags()
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from selfreg_jax.training.loop import train_and_evaluate

  try:
    train_and_evaluate(_CONFIG.value, _WORKDIR.value, override=_OVERRIDE.value)
  except TrainingInterruptedError as interruption:
    print(interruption, file=sys.stderr)
    sys.exit(EXIT_RESUMABLE)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
