"""The method's losses in plain PyTorch, written for these comparisons, with the same economies as ours.

The final map is pooled once for each size, only the side that has channels to spare is gathered, and nothing is
computed whose weight is 0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812, as in PyTorch's own documentation
from torch import Tensor

from benchmarks.torch_models import Taps


def soft_dice(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
  """Mean over classes of 1 - (2 sum(p y) + smooth) / (sum(p^2) + sum(y^2) + smooth), sums over batch and pixels.

  Args:
    logits: (B, classes, H, W).
    labels: (B, H, W) int64.
    smooth: added to numerator and denominator.

  Returns:
    Scalar.
  """
  probabilities = logits.softmax(dim=1)
  truth = F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2).to(probabilities.dtype)
  intersection = (probabilities * truth).sum(dim=(0, 2, 3))
  squares = probabilities.square().sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
  return (1 - (2 * intersection + smooth) / (squares + smooth)).mean()


def internal_feature_distillation(x: Tensor) -> Tensor:
  """Mean squared difference of the higher- and the lower-scored half of the channels of (B, C, h, w)."""
  x = x.float()
  with torch.no_grad():
    norms = torch.linalg.vector_norm(x, dim=(2, 3)).clamp_min(1e-12)
    order = (x.mean(dim=(2, 3)) / norms).mean(dim=0).argsort(descending=True)
  half = x.shape[1] // 2
  return F.mse_loss(x.index_select(1, order[:half]), x.index_select(1, order[half : 2 * half]))


def random_pairs(student: int, target: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
  """Random channel pairs, as many as the smaller side has; None leaves a side as it is."""
  count = min(student, target)
  drawn = torch.randperm(max(student, target), device=device)[:count]
  return (drawn, None) if target <= student else (None, drawn)


def semantic_consistency(x: Tensor, target: Tensor, pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
  """Mean squared difference of paired channels of a map and a target of the same size."""
  student_index, target_index = pairs
  x = x.float()
  x = x if student_index is None else x.index_select(1, student_index)
  target = target if target_index is None else target.index_select(1, target_index)
  return F.mse_loss(x, target)


def self_regularization(
  taps: Taps,
  scr_weight: float,
  ifd_weight: float,
  pairs: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
  """SCR and IFD, each over all positions and stages.

  Args:
    taps: maps of one forward pass; no map is larger than the final one.
    scr_weight: of SCR; where it is 0 the term is left out.
    ifd_weight: of IFD, likewise.
    pairs: channel pairs for each map, position by position; None draws them.

  Returns:
    The terms "scr" and "ifd" without their weights, scalars.
  """
  found = {}
  final, targets, place = taps.final.detach().float(), {}, 0
  for encoder, decoder in taps.positions():
    maps = encoder + decoder
    if scr_weight:
      terms = []
      for x in maps:
        size = tuple(x.shape[2:])
        if size not in targets:
          targets[size] = F.adaptive_avg_pool2d(final, size)
        drawn = random_pairs(x.shape[1], final.shape[1], x.device) if pairs is None else pairs[place]
        terms.append(semantic_consistency(x, targets[size], drawn))
        place += 1
      found["scr"] = found.get("scr", 0) + torch.stack(terms).mean()
    if ifd_weight:
      for side in (encoder, decoder):
        found["ifd"] = found.get("ifd", 0) + torch.stack([internal_feature_distillation(x) for x in side]).mean()
  return found
