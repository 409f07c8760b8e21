"""Seconds from the command to the first training step, with compiled programs of an earlier start and without.

Both sides are `train.py` itself, from its start to the line that tells the metrics of step 1, on made-up CT slices:
ours finds its programs in the persistent compilation cache, which an untimed run has filled; the other one is
`--cache=off`. Equal: all metrics of the step, to the last bit.

python -m benchmarks.startup [--short] [--json]
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import made_data, measuring
from benchmarks.measuring import NotComparableError

_ROOT = pathlib.Path(__file__).parent.parent
_PACE = ("train/slices_per_second", "train/waiting_for_data")
_SETTINGS = {
  "UNet": ["--config=configs/synapse_unet.py"],
  "Swin-Unet": ["--config=configs/synapse_swin_unet.py", "--config.init_from="],
}
_SHORT_SETTINGS = {"narrow UNet": ["--config=configs/quickstart.py"]}


@dataclasses.dataclass(frozen=True)
class Start:
  """What is started.

  Attributes:
    flags: of train.py that choose the network.
    data: folder of the prepared dataset.
    batch_size: slices.
  """

  flags: list[str]
  data: str
  batch_size: int

  def __call__(self, cache: str) -> dict[str, Any]:
    """Runs train.py until it tells its first step.

    Args:
      cache: for --cache.

    Returns:
      The metrics of the step.
    """
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, "train.py", *self.flags, f"--workdir={folder}/run", f"--cache={cache}"]
      command += [f"--config.data.dir={self.data}", f"--config.data.batch_size={self.batch_size}"]
      command += ["--config.data.name=", "--config.train.log_every=1", "--config.train.steps=1000"]
      environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
      with (
        open(os.path.join(folder, "errors"), "w+") as errors,
        subprocess.Popen(
          command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
      ):
        try:
          if not any(line.startswith("step 1 ") for line in process.stdout):
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{errors.read()}")
        finally:
          process.kill()  # what it does next is not asked for
      with open(os.path.join(folder, "run", "metrics.jsonl")) as file:
        metrics = json.loads(file.readline())
    return {name: value for name, value in metrics.items() if name not in _PACE}


def measure(name: str, start: Start, *, rounds: int) -> measuring.Row:
  """Times starts with a filled cache and without one, in turns.

  Args:
    name: of the row.
    start: what to start.
    rounds: timed starts of each side.

  Returns:
    The row.

  Raises:
    NotComparableError: the first steps differ.
  """
  with tempfile.TemporaryDirectory() as cache:
    first = start(cache)
    size = sum(path.stat().st_size for path in pathlib.Path(cache).iterdir())
    if not (found := start(cache)) == (compiled := start("off")) == first:
      raise NotComparableError(f"{name}: the first step gives {found} with the cache, {compiled} without")
    sides = {"ours": lambda: start(cache), "other": lambda: start("off")}
    timings = measuring.alternate(sides, rounds=rounds, warmup=0)
  return measuring.timed_row(name, timings["ours"], timings["other"], cache_bytes=size)


def main() -> None:
  """Measures and prints."""
  options = measuring.parser(__doc__).parse_args()
  settings, rounds = (_SHORT_SETTINGS, 1) if options.short else (_SETTINGS, 5)
  with tempfile.TemporaryDirectory() as data:
    made_data.write_dataset(data, cases=2, count=8, shape=(64, 64) if options.short else (512, 512))
    rows = [
      measure(f"{name}: command to first step", Start(flags, data, batch_size=4), rounds=rounds)
      for name, flags in settings.items()
    ]
  sizes = ", ".join(f"{row.details['cache_bytes'] / 2**20:.1f} MiB" for row in rows)
  measuring.present(
    "Start of training",
    rows,
    as_json=options.json,
    short=options.short,
    device=measuring.device_kind(),
    ours="with cache",
    other="without cache",
    notes=[f"Batches of 4; each includes the step itself. Size of the cache: {sizes}."],
  )


if __name__ == "__main__":
  measuring.run(main)
