"""Runs an ablation.

python -m selfreg_jax.analysis.ablation --config=configs/ablation_NAME.py --workdir=DIR [--config.run.field=value ...]
  [--mode=sequential|vmap|devices]

Several processes, each started with the same command (by srun, mpirun, or with --num_processes=N --process_id=I), share
the runs and need not know of each other; see docs/ablations.md.
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

from selfreg_jax import compilation_cache, processes
from selfreg_jax.errors import EXIT_RESUMABLE, UserError, check_config_file, parse_flags
from selfreg_jax.training.signals import TrainingInterruptedError, leave_at_signals

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of an ablation; override with --config.field=x.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs and the tables; a stopped ablation is continued.")
_MODE = flags.DEFINE_enum(
  "mode",
  "auto",
  ["auto", "sequential", "vmap", "devices"],
  "One run after another; side by side in one program; side by side on all local devices. auto: sequential on CPU, "
  "else vmap.",
)
_MEMORY = flags.DEFINE_float("memory_gib", 0.0, "Memory of each device that a program may take; 0: what is free.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes that score cases; the results are the same.")
flags.mark_flags_as_required(["config", "workdir"])
processes.define_flags()
compilation_cache.define_flags()


def main(argv: list[str]) -> int:
  """Runs the ablation that the parsed flags name; returns the exit code."""
  del argv
  leave_at_signals()
  return processes.run_command(run)


def run() -> None:
  """Runs it; exits with 75 when a signal stopped it."""
  if not _WORKDIR.value:
    raise UserError("--workdir is empty; name a folder")
  if _MEMORY.value < 0:
    raise UserError(f"--memory_gib={_MEMORY.value}: at least 0")
  if _WORKERS.value < 1:
    raise UserError(f"--workers={_WORKERS.value}: at least 1")
  check_config_file(_CONFIG)
  from selfreg_jax.analysis.ablation.design import expand

  design = expand(_CONFIG.value)
  share = processes.share_without_joining(processes.from_flags())
  compilation_cache.from_flags()
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from rich.console import Console

  from selfreg_jax.analysis.ablation.running import Options, run_ablation

  options = Options(_MODE.value, share, int(_MEMORY.value * 2**30) or None, _WORKERS.value)
  try:
    run_ablation(design, _WORKDIR.value, options, console=Console(soft_wrap=True))
  except TrainingInterruptedError as interruption:
    print(interruption, file=sys.stderr)
    sys.exit(EXIT_RESUMABLE)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
