"""How many runs fit into a device's memory side by side, from what the compiler says of their program."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

_SHARE_OF_HOST = 0.9  # of the memory that is free on a CPU machine: data and evaluation need some as well
_MEMINFO = pathlib.Path("/proc/meminfo")


def needed_bytes(compiled: Any) -> int | None:
  """Memory that a compiled program takes on each device, its arguments included; None where nobody knows.

  Args:
    compiled: of `jax.jit(...).lower(...).compile()`.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes  # arguments that are given away and hold outputs afterwards
    + analysis.temp_size_in_bytes
    + analysis.generated_code_size_in_bytes
  )


def available_bytes(devices: Sequence[jax.Device]) -> int | None:
  """Memory that is free on each device; on CPU each one's part of what the machine has; None where nobody knows."""
  stats = devices[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  if devices[0].platform != "cpu" or not _MEMINFO.exists():
    return None
  (kibibytes,) = (line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
  return int(_SHARE_OF_HOST * 1024 * int(kibibytes)) // len(devices)


def largest_fitting(most: int, limit: int, need: Callable[[int], int]) -> int:
  """The largest number of runs on a device whose program fits, by few compilations.

  What is needed grows with the runs nearly as a line: the line through one run and all of them gives a first guess,
  from which it goes down until the program fits.

  Args:
    most: runs that are wanted on a device, at least 1.
    limit: bytes that are free there.
    need: of a number of runs -> bytes; compiles.

  Returns:
    The number, 0 where not even one fits.
  """
  whole = need(most)
  if whole <= limit:
    return most
  one = whole if most == 1 else need(1)
  if one > limit:
    return 0
  number = min(most - 1, int(1 + (limit - one) * (most - 1) / max(whole - one, 1)))
  while number > 1 and need(number) > limit:
    number -= 1
  return number
