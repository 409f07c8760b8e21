"""What a compiled program communicates, read from the text of its HLO module.

How bytes are counted: what a device puts into a collective, summed over the shapes of its operands. An asynchronous
one counts where it starts; one in a loop counts as often as the loop runs. An operand of an all-reduce is a gradient
where it is as large as a parameter that has none yet. The rest are batch statistics and their gradients, losses and
scores, and gradients that are summed over the devices before they are folded into their parameter.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a compiled program.

  Attributes:
    kind: "all-reduce", "all-gather", ...
    operands: (elements, bytes) of each operand, on one device.
    times: how often a step runs it.
  """

  kind: str
  operands: tuple[tuple[int, int], ...]
  times: int

  @property
  def bytes(self) -> int:
    """What a device puts into it in a step."""
    return self.times * sum(size for _, size in self.operands)


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)')


def find_collectives(text: str) -> list[Collective]:
  """The collective operations of a compiled program.

  Args:
    text: of the optimized HLO module (`compiled.as_text()`).

  Returns:
    One entry for each operation in the text.

  Raises:
    ValueError: one is in a loop whose number of rounds the program does not say.
  """
  found: list[tuple[str, str, tuple]] = []
  calls: dict[str, list[tuple[str, int | None]]] = {}
  shapes: dict[str, str] = {}
  entry = current = ""
  for line in text.splitlines():
    line = re.sub(r"/\*.*?\*/", "", line)
    if header := _COMPUTATION.match(line):
      current, shapes = header[2], {}
      calls[current] = []
      entry = current if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      name, shape, opcode, rest = instruction.groups()
      shapes[name] = shape
      rounds = _TRIP_COUNT.search(rest)
      times = (int(rounds[1]) if rounds else None) if opcode == "while" else 1
      called = _CALLED.findall(rest) + re.findall(r"[\w.-]+", " ".join(_CALLED_LIST.findall(rest)))
      calls[current] += [(other, times) for other in called]
      kind = opcode.removesuffix("-start")
      if kind in _KINDS:  # of an asynchronous pair the start alone: "-done" is no kind
        names = re.findall(r"%([\w.-]+)", _up_to_closing(rest))
        found.append((current, kind, tuple(size for other in names for size in _sizes(shapes[other]))))
  counts = _executions(calls, entry)
  for computation, kind, _ in found:
    if counts[computation] is None:
      raise ValueError(f"{kind} in {computation}, a loop of unknown length")
  return [Collective(kind, operands, counts[computation]) for computation, kind, operands in found]


def _executions(calls: dict[str, list[tuple[str, int | None]]], entry: str) -> dict[str, int | None]:
  """How often each computation runs when the entry runs once; None: unknown.

  Args:
    calls: by computation, those that it calls and how often; a computation stands after those that it calls, as HLO
      text has them.
    entry: the outermost one.
  """
  counts: dict[str, int | None] = dict.fromkeys(calls, 0) | {entry: 1}
  for caller in reversed(calls):
    for called, times in calls[caller]:
      if counts.get(called) is not None and counts[caller] != 0:
        known = counts[caller] is not None and times is not None
        counts[called] = counts[called] + counts[caller] * times if known else None
  return counts


def _up_to_closing(text: str) -> str:
  """The text up to the bracket that closes the one before it."""
  depth = 1
  for place, sign in enumerate(text):
    depth += (sign == "(") - (sign == ")")
    if depth == 0:
      return text[:place]
  return text


def _sizes(shape: str) -> list[tuple[int, int]]:
  """(elements, bytes) of every array of a shape, a tuple's one after another."""
  sizes = []
  for dtype, dimensions in _SHAPE.findall(shape):
    elements = math.prod(int(size) for size in dimensions.split(",") if size)
    sizes.append((elements, math.ceil(elements * _bits(dtype) / 8)))
  return sizes


def _bits(dtype: str) -> int:
  """Bits of an element: of "f32", "bf16", "pred", "s8", "c64", "f8e4m3fn", ..."""
  return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a step communicates, of one device.

  Attributes:
    counts: operations a step, by kind.
    bytes: by kind.
    gradient_bytes: of operands that are gradients.
    rest_bytes: of all others.
    unmatched: parameters whose gradient was not found in an all-reduce: 0 where there are several devices.
  """

  counts: dict[str, int]
  bytes: dict[str, int]
  gradient_bytes: int
  rest_bytes: int
  unmatched: int


def measure_traffic(text: str, parameters: Any) -> Traffic:
  """Counts the collectives of a compiled training step.

  Args:
    text: of the optimized program.
    parameters: the pytree whose gradients it reduces.

  Returns:
    The traffic of a step.
  """
  found = find_collectives(text)
  counts, sizes = collections.Counter(), collections.Counter()
  reduced = collections.defaultdict(list)  # elements of an operand -> bytes of each such operand
  for collective in found:
    counts[collective.kind] += collective.times
    sizes[collective.kind] += collective.bytes
    if collective.kind == "all-reduce":
      for elements, size in collective.operands:
        reduced[elements].append(collective.times * size)
  gradient_bytes, unmatched = 0, 0
  for leaf in sorted(jax.tree.leaves(parameters), key=lambda leaf: leaf.ndim == 1):  # vectors may be mistaken: last
    # The gradient of a bias or scale comes in two halves, which are added up afterwards (models/layers.py).
    forms = (2, 1) if leaf.ndim == 1 else (1,)
    parts = next((parts for parts in forms if reduced[parts * leaf.size]), None)
    if parts is None:
      unmatched += 1
    else:
      gradient_bytes += reduced[parts * leaf.size].pop() // parts
  return Traffic(dict(counts), dict(sizes), gradient_bytes, sizes.total() - gradient_bytes, unmatched)
