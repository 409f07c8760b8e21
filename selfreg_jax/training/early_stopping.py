"""When to stop because validation has stopped getting better."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class BestSoFar:
  """The best validation of a run; saved with every checkpoint, so that a continued run stops where it would have.

  Attributes:
    dice: mean foreground Dice of the best validation; None before the first one that scored anything.
    step: at which it was reached; 0 before.
    validated: step of the last validation, whatever it gave; 0 before the first one.
  """

  dice: float | None = None
  step: int = 0
  validated: int = 0

  def update(self, dice: float | None, step: int) -> None:
    """Takes note of a validation; only a better Dice counts, not an equal one."""
    self.validated = step
    if dice is not None and (self.dice is None or dice > self.dice):
      self.dice, self.step = dice, step

  def is_stale(self, step: int, patience: int) -> bool:
    """Whether `patience` steps have gone by without a better validation; never, where it is 0."""
    return patience > 0 and step - self.step >= patience

  def to_json(self) -> dict[str, Any]:
    """The fields as plain JSON values."""
    return dataclasses.asdict(self)
