"""What may be done at test time beyond the protocol, on request; every choice is reported with the scores."""

import dataclasses
from typing import Any

RESIZES = ("labels", "logits")


@dataclasses.dataclass(frozen=True)
class Options:
  """Test-time options, each off by default.

  Attributes:
    tta: average the softmax over the four mirrorings of rows and columns.
    resize: what is brought back to the native grid: "labels" (nearest neighbours, the protocol) or "logits" (linear
      interpolation, the classes being decided on the native grid).
    postprocess: keep the largest connected component of every foreground class.
  """

  tta: bool = False
  resize: str = "labels"
  postprocess: bool = False

  def __post_init__(self):
    if self.resize not in RESIZES:
      raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")

  def to_json(self) -> dict[str, Any]:
    """The options as plain JSON values."""
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    chosen = ["tta"] * self.tta + [f"resize={self.resize}"] * (self.resize != "labels")
    return ", ".join(chosen + ["postprocess"] * self.postprocess) or "none"
