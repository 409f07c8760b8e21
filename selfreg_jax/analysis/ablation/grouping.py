"""Which runs of an ablation can share one program: those that differ in numbers only."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from selfreg_jax import config as configs
from selfreg_jax.analysis.ablation.design import Run

# Fields that a program may take as arguments instead of having them written into it. A weight of 0 is such an argument
# too: its term is then computed and multiplied by 0, where the run of its own leaves it out. The sums are equal as long
# as the term is finite.
TRACEABLE = (
  "loss.ce_weight",
  "loss.dice_weight",
  "loss.scr_weight",
  "loss.ifd_weight",
  "loss.ifd_p",
  "loss.deep_supervision_weight",
  "optimizer.learning_rate",
  "optimizer.momentum",
  "optimizer.weight_decay",
  "optimizer.poly_power",
  "optimizer.cosine_minimum",
  "model.drop_path",
)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that one program can train.

  Attributes:
    runs: at least one.
    numbers: dotted field -> one value for each run, of the fields in which they differ (besides the seed).
  """

  runs: tuple[Run, ...]
  numbers: dict[str, tuple[float, ...]]

  @classmethod
  def of(cls, runs: Sequence[Run]) -> "Group":
    """The group of runs that differ in numbers only."""
    flat = [configs.flatten(run.config) for run in runs]
    fields = [name for name in TRACEABLE if name in flat[0] and len({one[name] for one in flat}) > 1]
    return cls(tuple(runs), {name: tuple(float(one[name]) for one in flat) for name in fields})

  def part(self, first: int, number: int) -> "Group":
    """Some of the runs, with all numbers in which the whole group differs: a program of the group fits them too."""
    chosen = slice(first, first + number)
    return Group(self.runs[chosen], {name: values[chosen] for name, values in self.numbers.items()})


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Deals runs into groups, as few as possible, each in the order of the runs."""
  by_program: dict[str, list[Run]] = {}
  for run in runs:
    fixed = {name: value for name, value in configs.flatten(run.config).items() if name not in (*TRACEABLE, "seed")}
    by_program.setdefault(json.dumps(fixed, sort_keys=True), []).append(run)
  return [Group.of(members) for members in by_program.values()]


def with_numbers(config: ml_collections.ConfigDict, numbers: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A copy of a config with other values, traced arrays among them, in some of its fields."""
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.update_from_flattened_dict(dict(numbers))
  return config
