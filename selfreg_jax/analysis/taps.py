"""Reads and perturbs the blocks of a Linen network in its ordinary forward pass, without touching the module."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from selfreg_jax.features import Features, Taps
from selfreg_jax.models.swin_unet import SwinUNet
from selfreg_jax.models.unet import UNet

Array = jax.Array
BlockOutputs = dict[str, tuple[Array, ...]]

_COLLECTION = "intermediates"


def model_taps(model: nn.Module) -> Taps:
  """Module paths of the blocks that a network of this package sows.

  The deepest encoder stage of either network is its bottleneck.

  Args:
    model: a `UNet` or a `SwinUNet`, of any size.

  Returns:
    The taps.

  Raises:
    TypeError: it is another module.
  """
  if isinstance(model, UNet):
    stages = len(model.widths) - 1
    return Taps(
      encoder=tuple(f"down{i}" for i in range(1, stages + 1)),
      decoder=tuple(f"up{i}" for i in range(1, stages)),
      final=f"up{stages}",
    )
  if isinstance(model, SwinUNet):

    def blocks(stage: str, number: int) -> tuple[str, ...]:
      return tuple(f"{stage}_block{j}" for j in range(1, number + 1))

    return Taps(
      encoder=tuple(blocks(f"encoder{i}", number) for i, number in enumerate(model.depths, 1)),
      decoder=tuple(blocks(f"decoder{d}", number) for d, number in enumerate(reversed(model.depths[:-1]), 1)),
      final="expand_final",
    )
  raise TypeError(f"the blocks of a {type(model).__name__} are not known here; name them with selfreg_jax.Taps")


def block_names(taps: Taps) -> list[str]:
  """The names that `named_maps` will give, as long as every module is called once."""

  def names(side: str, stages: Sequence[str | Sequence[str]]) -> list[str]:
    several = [not isinstance(paths, str) and len(paths) > 1 for paths in stages]
    stems = [f"{side}_{i}" for i in range(1, len(stages) + 1)]
    pairs = zip(stems, several, strict=True)
    return [name for stem, two in pairs for name in ([f"{stem}/first", f"{stem}/last"] if two else [stem])]

  return [*names("encoder", taps.encoder), *names("decoder", taps.decoder), "final"]


def named_maps(features: Features) -> dict[str, Array]:
  """The maps that the losses look at and the final one, in the order in which the network computes them.

  Args:
    features: of one forward pass.

  Returns:
    `encoder_1` (or `encoder_1/first` and `encoder_1/last` of a stage with several blocks), ..., `decoder_1`, ..., then
    `final`, each (B, h, w, C).
  """
  maps = {name: feature_map for position in features.blocks() for name, feature_map in position.items()}
  maps["final"] = features.final
  return {name: maps[name] for name in in_order(maps)}


def in_order(names: Iterable[str]) -> list[str]:
  """Names of blocks in the order of the network: what leaves `jax.jit` comes in alphabetical order."""

  def order(name: str) -> tuple[int, int, bool]:
    stage, _, position = name.partition("/")
    side, _, number = stage.partition("_")
    return ("encoder", "decoder", "final").index(side), int(number or 0), position == "last"

  return sorted(names, key=order)


@dataclasses.dataclass(frozen=True, eq=False)
class TappedNetwork:
  """A network whose blocks' outputs can be read, and perturbed, in one forward pass.

  Attributes:
    apply: function of (variables, images, **capture) that calls a module's `apply` in evaluation mode with these
      options (`mutable` and `capture_intermediates`) and gives what that gives: the logits (B, H, W, classes) and the
      updated collections. It must not be jitted by itself: what runs inside is decided at every trace.
    taps: the blocks.
  """

  apply: Callable[..., tuple[Array, Mapping[str, Any]]]
  taps: Taps

  @classmethod
  def of(cls, model: nn.Module, taps: Taps | None = None, **arguments: Any) -> "TappedNetwork":
    """Taps a module.

    Args:
      model: any Linen module that maps images (B, H, W, channels) to logits (B, H, W, classes).
      taps: its blocks; None for those of a network of this package.
      **arguments: of its `apply` besides variables and images, such as `train=False`, which networks of this package
        are given anyway.

    Returns:
      The network.

    Raises:
      TypeError: the taps of another network are not given.
    """
    if isinstance(model, UNet | SwinUNet):
      # In evaluation nothing is gained by recomputing blocks, and a backward pass a class would do it every time.
      model = model.clone(remat=False)
      arguments = {"train": False} | arguments
    return cls(functools.partial(model.apply, **arguments), taps or model_taps(model))

  def __call__(
    self, variables: Any, images: Array, perturbations: BlockOutputs | None = None
  ) -> tuple[Array, BlockOutputs]:
    """Runs the network.

    Args:
      variables: of the module.
      images: (B, H, W, channels).
      perturbations: what is added to the blocks' outputs, shaped like them; None for nothing.

    Returns:
      The logits, and the outputs of the tapped modules, those of every call, by module path.

    Raises:
      ValueError: a path at which no module was called, or whose output is not one array.
    """
    calls: collections.Counter[str] = collections.Counter()

    def perturb(method: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
      output = method(*args, **kwargs)
      if perturbations is None or not self.taps.filter(context.module, context.method_name):
        return output
      path = "/".join(context.module.path)
      calls[path] += 1
      return output + perturbations[path][calls[path] - 1]

    with nn.intercept_methods(perturb):
      logits, updated = self.apply(variables, images, mutable=[_COLLECTION], capture_intermediates=self.taps.filter)
    captured = updated.get(_COLLECTION, {})
    self.taps.features(captured)  # explains what is missing
    flat = traverse_util.flatten_dict(captured, sep="/")
    return logits, {path: flat[f"{path}/__call__"] for path in sorted(self.taps.paths())}

  def maps(self, outputs: BlockOutputs) -> dict[str, Array]:
    """The blocks' outputs, or anything of their shape such as their gradients, by the names of `named_maps`."""
    nested = traverse_util.unflatten_dict({(*path.split("/"), "__call__"): value for path, value in outputs.items()})
    return named_maps(self.taps.features(nested))

  def no_perturbations(self, variables: Any, images: Array) -> BlockOutputs:
    """Zeros that can be added to the blocks' outputs, to differentiate with respect to them."""
    _, outputs = jax.eval_shape(self, variables, images)
    return jax.tree.map(lambda output: jnp.zeros(output.shape, output.dtype), outputs)
