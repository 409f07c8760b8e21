"""What all benchmarks share: alternating timed runs, the check that both sides compute the same, tables and JSON."""

import argparse
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box, table
from rich.console import Console

from selfreg_jax.data import conversion

_busy_before: float | None = None  # what `parser` saw of the machine
_SECONDS_OF_LOOKING = 0.25
_MOST_BUSY = 0.25  # share of the cores
_VERSIONED = ("selfreg-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "torch", "medpy")


class NotComparableError(Exception):
  """The two sides do not compute the same thing: no ratio of their times would mean anything."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """Repeated measurements of one thing.

  Attributes:
    seconds: of each run.
  """

  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    """Middle of the runs."""
    return float(np.median(self.seconds))

  @property
  def quartiles(self) -> tuple[float, float]:
    """Between which half of the runs lie."""
    low, high = np.quantile(self.seconds, [0.25, 0.75])
    return float(low), float(high)

  def to_json(self) -> dict[str, Any]:
    """Median, quartiles and all runs."""
    return {"median": self.median, "quartiles": self.quartiles, "seconds": self.seconds}


def alternate(
  sides: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1, budget: float | None = None
) -> dict[str, Timing]:
  """Times functions in turns, so that whatever else the machine does meets all of them alike.

  Args:
    sides: functions by name; each returns only when its work is done (`jax.block_until_ready`).
    rounds: timed runs of each.
    warmup: runs of each before, which are not timed.
    budget: seconds after which no further round is begun, at least three having been made.

  Returns:
    The timings by name.
  """
  for function in sides.values():
    for _ in range(warmup):
      function()
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  begin = time.perf_counter()
  for done in range(rounds):
    if budget is not None and done >= 3 and time.perf_counter() - begin > budget:
      break
    order = list(sides) if done % 2 == 0 else list(reversed(sides))
    for name in order:
      gc.collect()
      start = time.perf_counter()
      sides[name]()
      seconds[name].append(time.perf_counter() - start)
  return {name: Timing(tuple(values)) for name, values in seconds.items()}


def require_equal(what: str, ours: Any, theirs: Any, *, rtol: float, atol: float = 0.0) -> None:
  """Raises NotComparableError unless two arrays agree: |ours - theirs| <= atol + rtol * largest |theirs|."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    raise NotComparableError(f"{what}: shapes {ours.shape} and {theirs.shape}")
  difference = float(np.abs(ours - theirs).max(initial=0.0))
  allowed = atol + rtol * float(np.abs(theirs).max(initial=0.0))
  if not difference <= allowed:
    raise NotComparableError(f"{what}: the two sides differ by {difference:.3g}, {allowed:.3g} is allowed")


def resident(name: str = "VmRSS") -> float:
  """Resident memory of this process in MiB: "VmRSS", what it is now, or "VmHWM", its highest."""
  found = re.search(rf"^{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
  return int(found[1]) / 1024


def peak_growth(function: Callable[[], Any]) -> float:
  """By how much the resident memory at its highest during a call exceeds what it was before, in MiB."""
  # Not getrusage's maximum: a process inherits that of the one it was forked from, and it cannot be set back.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = resident()
  function()
  return resident("VmHWM") - before


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table.

  Attributes:
    name: what was measured.
    ours: this package's value, in `unit`.
    other: the other side's; None where there is none.
    unit: of both.
    spread: e.g. the quartiles of both sides, for people.
    target: largest ratio ours / other that is aimed at, or the smallest where higher is better; None without one.
    target_of_ours: the target is for `ours` itself, not for the ratio.
    higher_is_better: of the values, and so of the ratio.
    compared: give the ratio of both sides; not where it says nothing, as of two shares near 0.
    ratios: ours / other of each round, where both sides were timed in turns.
    details: further numbers for the JSON.
  """

  name: str
  ours: float
  other: float | None = None
  unit: str = "s"
  spread: str = ""
  target: float | None = None
  target_of_ours: bool = False
  higher_is_better: bool = False
  compared: bool = True
  ratios: Sequence[float] = ()
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def ratio(self) -> float | None:
    """Ours / other, the median of the rounds where there are any; None without another side or a comparison."""
    if self.other is None or not self.compared:
      return None
    return float(np.median(self.ratios)) if self.ratios else self.ours / self.other


def without_compiler(what: str, error: Exception) -> str:
  """A note that torch.compile does not work here: it wants a C++ compiler or Triton, and fails in many ways."""
  return f"{what}: torch.compile failed here: {str(error).splitlines()[0]}"


def timed_row(name: str, ours: Timing, other: Timing, *, target: float | None = None, **details: Any) -> Row:
  """A row of two timings taken in turns: medians of both, median of the rounds' ratios, quartiles of all three.

  Of what the machine does beside, a round's ratio holds less than each of its times.
  """
  ratios = Timing(tuple(a / b for a, b in zip(ours.seconds, other.seconds, strict=True)))
  spread = "; ".join(f"{low:.3g}..{high:.3g}" for low, high in (ours.quartiles, other.quartiles, ratios.quartiles))
  runs = {"ours": ours.to_json(), "other": other.to_json(), "ratio_quartiles": ratios.quartiles}
  return Row(
    name, ours.median, other.median, spread=spread, target=target, ratios=ratios.seconds, details=runs | details
  )


def parser(description: str | None) -> argparse.ArgumentParser:
  """A parser with the flags of every benchmark: --json and --short; looks what else the machine does."""
  global _busy_before
  _busy_before = busy_share()
  made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
  made.add_argument("--short", action="store_true", help="small sizes: seconds instead of minutes, no claim")
  return made


def busy_share() -> float | None:
  """Which share of all processors' time is used at present, by a short look; None where /proc is missing."""

  def read() -> tuple[int, int]:
    times = list(map(int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]))
    return sum(times), times[3] + times[4]  # idle, and waiting for disks

  try:
    total, idle = read()
    time.sleep(_SECONDS_OF_LOOKING)
    later_total, later_idle = read()
  except OSError:
    return None
  return 1 - (later_idle - idle) / max(later_total - total, 1)


def positive(text: str) -> int:
  """A whole number of at least 1, for argparse."""
  try:
    number = int(text)
  except ValueError:
    number = 0
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
  return number


def require(*packages: str) -> None:
  """Ends with exit code 2 unless the other side's packages are installed; asked before anything is computed."""
  missing = [package for package in packages if importlib.util.find_spec(package) is None]
  if missing:
    print(
      f"error: {' and '.join(missing)} not installed: pip install -r benchmarks/requirements.txt (or `make bench`)",
      file=sys.stderr,
    )
    sys.exit(2)


def device_kind() -> str:
  """What JAX computes on: "cpu", or the name of the first accelerator."""
  import jax  # not by benchmarks that do without it

  device = jax.devices()[0]
  return "cpu" if device.platform == "cpu" else device.device_kind


def machine(device: str | None = None) -> dict[str, Any]:
  """What the numbers hold for: versions, processor, cores, what they did before, device."""
  versions = {}
  for name in _VERSIONED:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "python": platform.python_version(),
    "versions": versions,
    "processor": _processor(),
    "cores": conversion.cpus(),
    "torch_threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    "busy_before": _busy_before if _busy_before is None else round(_busy_before, 2),
    "device": device or "cpu",
    "date": time.strftime("%Y-%m-%d"),
  }


def _processor() -> str:
  try:
    with open("/proc/cpuinfo") as file:
      names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
  except OSError:
    return platform.processor() or platform.machine()


def present(
  title: str,
  rows: Sequence[Row],
  *,
  as_json: bool,
  short: bool = False,
  device: str | None = None,
  ours: str = "ours",
  other: str = "other",
  notes: Sequence[str] = (),
) -> None:
  """Prints a benchmark's result.

  A short form, or a machine that was busy before, is said below the table.

  Args:
    title: what was measured.
    rows: the lines.
    as_json: print one JSON object instead of a table.
    short: sizes were those of --short; targets are left out.
    device: where it ran; None for the CPU.
    ours: name of this side.
    other: name of the other side.
    notes: lines below the table.
  """
  facts = machine(device)
  notes = list(notes)
  if short:
    rows = [dataclasses.replace(row, target=None) for row in rows]
    notes.append("Short form: it shows that the comparison runs, and claims nothing.")
  busy = facts["busy_before"]
  if busy is not None and busy > _MOST_BUSY:
    notes.append(
      f"The machine was BUSY before this began ({busy:.0%} of its cores): ratios of such a run mean nothing, since "
      "PyTorch's threads wait for one another and lose more by it than XLA's. Repeat it on an idle machine."
    )
  if as_json:
    content = [dataclasses.asdict(row) | {"ratio": row.ratio, "details": dict(row.details)} for row in rows]
    named = {"ours": ours, "other": other}
    print(json.dumps({"title": title, "short": short, "machine": facts} | named | {"rows": content, "notes": notes}))
    return
  console = Console(width=None if sys.stdout.isatty() else 120)
  result = table.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
  for heading in ("", "unit", ours, other, f"{ours} / {other}", "target", "quartiles: ours; other; ratio"):
    result.add_column(heading, justify="left" if heading in ("", "unit") else "right")
  for row in rows:
    result.add_row(
      row.name,
      row.unit,
      f"{row.ours:.4g}",
      "-" if row.other is None else f"{row.other:.4g}",
      "-" if row.ratio is None else f"{row.ratio:.3f}",
      _target(row),
      row.spread,
    )
  console.print(result)
  versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
  threads = "" if facts["torch_threads"] is None else f" ({facts['torch_threads']} threads for PyTorch)"
  console.print(
    f"{facts['device']} of {facts['processor']}, {facts['cores']} cores{threads}; {versions}; {facts['date']}"
  )
  for note in notes:
    console.print(note, markup=False, highlight=False)


def _target(row: Row) -> str:
  if row.target is None:
    return "-"
  return f"{'ours ' if row.target_of_ours else ''}{'>=' if row.higher_is_better else '<='} {row.target:g}"


def run(main: Callable[[], None]) -> None:
  """Runs a benchmark's main; what cannot be compared is told in one line, exit code 1."""
  try:
    main()
  except NotComparableError as error:
    print(f"error: not comparable, so no ratio is given: {error}", file=sys.stderr)
    sys.exit(1)
