"""The intermediate feature maps ("taps") that the self-regularization losses look at, as one pytree.

Two ways lead to a `Features`: a module of this package sows its maps into the collection "features"
(`Features.from_sown`), and any other Linen module is tapped from outside by module path (`Taps`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct

Array = jax.Array
Stage = tuple[Array, ...]

COLLECTION = "features"


@struct.dataclass
class Features:
  """Feature maps of one forward pass of a UNet-shaped network.

  Attributes:
    encoder: stages from shallow to deep; each is the tuple of its blocks' maps, (B, h, w, c) in order of computation.
    decoder: stages from deep to shallow, likewise.
    final: (B, H, W, C) map just before the classification head; it supervises all the others.
    auxiliary: (B, h, w, num_classes) logits of the heads of deep supervision, one for each decoder stage; empty where
      a network has no such heads.
  """

  encoder: tuple[Stage, ...]
  decoder: tuple[Stage, ...]
  final: Array
  auxiliary: tuple[Array, ...] = ()

  @classmethod
  def from_sown(cls, collection: Mapping[str, Any]) -> "Features":
    """Orders what a module sowed into the collection "features".

    Args:
      collection: `updated["features"]` of `module.apply(..., mutable=["features"])`: the names `encoder_1`,
        `encoder_2`, ..., `decoder_1`, ... and `final`, each with the tuple of what was sown under it; `auxiliary_1`,
        ... where there are heads of deep supervision. A module that sits inside another one is found as long as it is
        the only one that sows.

    Returns:
      The features.

    Raises:
      ValueError: no or several final maps (as when old features were passed in with the variables, to which Flax
        appends), or a gap in the numbering of the stages.
    """
    while "final" not in collection and len(collection) == 1:
      (inner,) = collection.values()
      if not isinstance(inner, Mapping):
        break
      collection = inner
    final = collection.get("final", ())
    if len(final) != 1:
      raise ValueError(
        f"expected one final map among the sown features, found {len(final)}; names: {sorted(collection)}. Apply the "
        "module with mutable=['features', ...] on variables that hold no 'features' collection, and call it once."
      )
    return cls(
      encoder=_sown_stages(collection, "encoder"),
      decoder=_sown_stages(collection, "decoder"),
      final=final[0],
      auxiliary=tuple(logits for (logits,) in _sown_stages(collection, "auxiliary")),
    )

  def blocks(self) -> list[dict[str, Array]]:
    """The maps that the losses use: for each block position, name -> map.

    Per stage its first and its last block, at the positions "first" and "last". Where every stage has one block there
    is one position. In a network of both kinds, a stage with one block counts once, among the first, under its bare
    name `encoder_1`, ...

    Returns:
      One dict per position, ordered encoder_1, ..., decoder_1, ...
    """
    stages = {f"encoder_{i}": stage for i, stage in enumerate(self.encoder, 1)}
    stages |= {f"decoder_{i}": stage for i, stage in enumerate(self.decoder, 1)}
    first = {(name if len(stage) == 1 else f"{name}/first"): stage[0] for name, stage in stages.items()}
    last = {f"{name}/last": stage[-1] for name, stage in stages.items() if len(stage) > 1}
    return [first, last] if last else [first]


def _sown_stages(collection: Mapping[str, Any], side: str) -> tuple[Stage, ...]:
  numbers = sorted(int(name.removeprefix(f"{side}_")) for name in collection if name.startswith(f"{side}_"))
  if numbers != list(range(1, len(numbers) + 1)):
    raise ValueError(f"the sown {side} stages are numbered {numbers}; expected 1, 2, ... without gaps")
  return tuple(tuple(collection[f"{side}_{number}"]) for number in numbers)


@struct.dataclass
class Taps:
  """Taps any Linen module by module paths, without touching it, in its ordinary forward pass.

  Example:
    >>> taps = Taps(encoder=["down1", "down2"], decoder=["up1"], final="up2")
    >>> logits, updated = model.apply(
    ...   variables, images, mutable=["batch_stats", "intermediates"], capture_intermediates=taps.filter)
    >>> features = taps.features(updated["intermediates"])

  Attributes:
    encoder: per stage, from shallow to deep, the path of the module whose output is tapped, such as "encoder/block1",
      or a sequence of paths for a stage with several blocks. A module that is called several times in one pass counts
      as that many blocks.
    decoder: likewise, from deep to shallow.
    final: path of the module whose output is the final map.
  """

  encoder: Sequence[str | Sequence[str]] = struct.field(pytree_node=False)
  decoder: Sequence[str | Sequence[str]] = struct.field(pytree_node=False)
  final: str = struct.field(pytree_node=False)

  def paths(self) -> set[str]:
    """All tapped module paths."""
    return {path for stage in (*self.encoder, *self.decoder) for path in _paths(stage)} | {self.final}

  def filter(self, module: nn.Module, method_name: str) -> bool:
    """For `capture_intermediates`: keeps the outputs of the tapped modules' `__call__` only."""
    return method_name == "__call__" and "/".join(module.path) in self.paths()

  def features(self, intermediates: Mapping[str, Any]) -> Features:
    """Collects the captured outputs.

    Args:
      intermediates: `updated["intermediates"]` of `apply` with `capture_intermediates=taps.filter`.

    Returns:
      The features.

    Raises:
      ValueError: a path that captured nothing, an output that is not one array, or several final maps.
    """

    def stage(paths: str | Sequence[str]) -> Stage:
      return tuple(output for path in _paths(paths) for output in _captured(intermediates, path))

    final = _captured(intermediates, self.final)
    if len(final) != 1:
      raise ValueError(f"module {self.final!r} was called {len(final)} times; the final map must be one output")
    return Features(
      encoder=tuple(stage(paths) for paths in self.encoder),
      decoder=tuple(stage(paths) for paths in self.decoder),
      final=final[0],
    )


def _paths(stage: str | Sequence[str]) -> tuple[str, ...]:
  return (stage,) if isinstance(stage, str) else tuple(stage)


def _captured(intermediates: Mapping[str, Any], path: str) -> Stage:
  node: Any = intermediates
  for part in (*path.split("/"), "__call__"):
    if not isinstance(node, Mapping) or part not in node:
      raise ValueError(
        f"no output was captured for module path {path!r}: no submodule of that path was called. "
        "`flax.linen.tabulate` lists a model's module paths."
      )
    node = node[part]
  for output in node:
    if not hasattr(output, "ndim"):
      raise ValueError(
        f"the output of module {path!r} is a {type(output).__name__}; a tapped module must give one array"
      )
  return tuple(node)
