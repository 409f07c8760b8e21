"""A training step of the paper's networks against PyTorch: time, share of what the device can do, memory.

  python -m benchmarks.train_step [--network=both|unet|swin_unet] [--short] [--json] [--batch_size=4] [--rounds=9]

Forward pass, 0.4 CE + 0.6 Dice, without ("baseline") and with SCR and IFD ("selfreg"), backward pass and a step of SGD,
at 224x224 with 9 classes. Equality is checked before anything is timed. PyTorch runs in channels_last, eager and
through torch.compile, and the faster of the two counts; on a GPU both sides compute in bfloat16 (PyTorch by autocast).
Peak memory: on a CPU the growth of a fresh process a side, what was imported left out; on a GPU the allocators' peaks.
"""

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import measuring
from benchmarks.measuring import NotComparableError, Row, Timing
from benchmarks.steps import (
  Ours,
  Setting,
  Theirs,
  parse_flags,
  require_compiled_equals_eager,
  require_equal_steps,
  settings,
)

# Largest ratios ours / PyTorch that are aimed at.
TIME_TARGETS = {"cpu": {"unet": 1.25, "swin_unet": 1.0}, "gpu": {"unet": 0.75, "swin_unet": 0.75}}
MEMORY_TARGETS = {"cpu": 1.0, "gpu": 0.8}
VARIANTS = ("baseline", "selfreg")
_SIDES = {"ours": Ours, "PyTorch": Theirs}
_MEMORY_STEPS = 3


def main() -> None:
  """Measures and prints."""
  flags = _flags()
  if flags.memory_of:
    (network,) = flags.networks
    print(json.dumps(_memory_here(flags.memory_of, *settings(flags, network, ("selfreg",)))))
    return
  jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is one of the rows
  memory_rows = [_memory_row(flags, network) for network in flags.networks]  # first: it may fail, and is done soon
  rows, notes = [], []
  variants = VARIANTS if flags.variant == "both" else (flags.variant,)
  for setting in (setting for network in flags.networks for setting in settings(flags, network, variants)):
    sides, facts = _sides(setting, compiled=flags.compiled, notes=notes)
    sides["matmul"], operations = _matmul(setting)
    timings = measuring.alternate(sides, rounds=flags.rounds, warmup=2, budget=flags.budget)
    rate = operations / timings.pop("matmul").median
    rows += _time_rows(setting, timings, facts, rate)
    sides.clear()
    gc.collect()
  notes.append("PyTorch: the faster of eager and torch.compile" if flags.compiled else "PyTorch: eager")
  measuring.present(
    f"Training step, {setting}",
    rows + memory_rows,
    as_json=flags.json,
    short=flags.short,
    device=measuring.device_kind(),
    other="PyTorch",
    notes=notes,
  )


def _flags() -> argparse.Namespace:
  parser = measuring.parser(__doc__)
  parser.add_argument("--variant", choices=("both", *VARIANTS), default="both")
  parser.add_argument(
    "--compiled", action=argparse.BooleanOptionalAction, help="PyTorch also through torch.compile; off with --short"
  )
  parser.add_argument("--memory_of", choices=tuple(_SIDES), help=argparse.SUPPRESS)  # the child process of a side
  flags = parse_flags(parser)
  flags.compiled = not flags.short if flags.compiled is None else flags.compiled
  return flags


def _platform() -> str:
  return jax.default_backend()


def _sides(setting: Setting, *, compiled: bool, notes: list[str]) -> tuple[dict[str, Callable[[], None]], dict]:
  """The functions to time, which are known to compute the same, and facts of our program."""
  ours, eager = Ours(setting), Theirs(setting)
  draws = require_equal_steps(ours, eager)
  sides: dict[str, Callable[[], None]] = {"ours": ours, "eager": eager}
  if compiled:
    try:
      faster = Theirs(setting, compiled=True)
      require_compiled_equals_eager(faster, Theirs(setting), draws)
    except NotComparableError:
      raise
    except Exception as error:
      notes.append(measuring.without_compiler(f"{setting.network} {setting.variant}", error))
    else:
      sides["compiled"] = faster
  return sides, {"compile_seconds": ours.compile_seconds, "operations": ours.operations}


def _matmul(setting: Setting) -> tuple[Callable[[], None], float]:
  """A product of large square matrices in XLA, and its operations: what the device does when nothing is in the way."""
  side = 8192 if _platform() == "gpu" else 512 if setting.short else 2048
  matrix = jax.random.normal(jax.random.key(0), (side, side), setting.dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(matrix, matrix).block_until_ready(), 2.0 * side**3


def _time_rows(setting: Setting, timings: dict[str, Timing], facts: dict[str, float], rate: float) -> list[Row]:
  name = f"{setting.network} {setting.variant}"
  ours = timings.pop("ours")
  which, other = min(timings.items(), key=lambda item: item[1].median)
  target = None if setting.short else TIME_TARGETS.get(_platform(), {}).get(setting.network)
  details = {"pytorch": which, "all_pytorch": {side: timing.to_json() for side, timing in timings.items()}}
  achieved = facts["operations"] / ours.median
  return [
    measuring.timed_row(f"{name}: step ({which})", ours, other, target=target, **details),
    Row(
      f"{name}: throughput",
      setting.batch_size / ours.median,
      setting.batch_size / other.median,
      unit="slices/s",
      higher_is_better=True,
    ),
    Row(
      f"{name}: arithmetic",
      achieved / 1e9,
      unit="GFLOP/s",
      spread=f"{achieved / rate:.0%} of XLA's large matmul: {rate / 1e9:.4g}",
      details={"operations_of_a_step": facts["operations"], "matmul_rate": rate},
    ),
    Row(f"{name}: compilation", facts["compile_seconds"]),
  ]


def _memory_row(flags: argparse.Namespace, network: str) -> Row:
  """Peak memory of the whole method's step, each side in a process of its own."""
  peaks = {}
  for side in _SIDES:
    command = [sys.executable, "-m", "benchmarks.train_step", f"--memory_of={side}", f"--network={network}"]
    command += [f"--batch_size={flags.batch_size}", *(["--short"] if flags.short else [])]
    try:
      output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    except subprocess.CalledProcessError as error:
      raise NotComparableError(f"memory of {side}: the process ended with {error.returncode}") from error
    peaks[side] = json.loads(output.splitlines()[-1])
  ours, other = (peaks[side]["peak"] for side in ("ours", "PyTorch"))
  target = None if flags.short else MEMORY_TARGETS.get(_platform())
  return Row(f"{network} selfreg: peak memory (eager)", ours, other, unit="MiB", target=target, details=peaks)


def _memory_here(side: str, setting: Setting) -> dict[str, float]:
  """Peak memory of a few steps of one side in this process, in MiB."""
  if side == "PyTorch":
    import torch._dynamo  # the optimizers import it when they are first made

    import benchmarks.torch_losses  # noqa: F401
  before, found = measuring.resident(), {}

  def train() -> None:
    step = _SIDES[side](setting)
    if side == "ours":
      step.start()
      step.compile()
      found["after_compilation"] = measuring.resident() - before
    for _ in range(_MEMORY_STEPS):
      step()

  found["peak"] = measuring.peak_growth(train)
  if _platform() == "gpu":
    import torch

    ours = side == "ours"
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] if ours else torch.cuda.max_memory_allocated()
    found["peak"] = peak / 2**20
  return found


if __name__ == "__main__":
  warnings.filterwarnings("ignore", module="torch")
  measuring.run(main)
