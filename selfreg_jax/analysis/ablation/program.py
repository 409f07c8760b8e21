"""One program that takes a training step of many runs at once, on one or several devices that do not communicate.

The step is that of a single run (`training.loop.make_run_step`) with traced numbers, under `jax.vmap` over the runs of
a device and `jax.shard_map` over the devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from selfreg_jax import mesh as meshes
from selfreg_jax.analysis.ablation.grouping import Group, with_numbers
from selfreg_jax.models.factory import build_model
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.loop import make_run_step
from selfreg_jax.training.plan import Plan
from selfreg_jax.training.start import state_at_random
from selfreg_jax.training.step import Batch, StackedMetrics, TrainState

AXIS = "variant"
_BY_RUN, _SHARED = PartitionSpec(AXIS), PartitionSpec()

Numbers = dict[str, jax.Array]
GroupStep = Callable[[Numbers, TrainState, Batch], tuple[TrainState, StackedMetrics]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the runs of a group live: equally many on each device, the last device's last places may be spare.

  Attributes:
    devices: that are used.
    runs: of the group.
    per_device: runs on a device; spare places are filled with copies of the last run.
  """

  devices: tuple[jax.Device, ...]
  runs: int
  per_device: int

  @classmethod
  def over(cls, runs: int, devices: Sequence[jax.Device]) -> "Layout":
    """As few runs on a device as there are devices for, on no more devices than that takes."""
    per_device = -(-runs // len(devices))
    return cls(tuple(devices[: -(-runs // per_device)]), runs, per_device)

  @property
  def mesh(self) -> Mesh:
    """The devices as a mesh over the axis "variant"."""
    return Mesh(np.asarray(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

  @property
  def places(self) -> int:
    """Of all devices together, spare ones included."""
    return len(self.devices) * self.per_device

  def stack(self, trees: Sequence[Any]) -> Any:
    """One pytree of host arrays for each run -> one pytree of global arrays (places, ...), each run on its device."""
    padded = [*trees, *[trees[-1]] * (self.places - len(trees))]
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *padded), NamedSharding(self.mesh, _BY_RUN))

  def abstract(self, tree: Any) -> Any:
    """Shapes of one run's pytree -> shapes of what `stack` makes of it."""
    sharding = NamedSharding(self.mesh, _BY_RUN)
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((self.places, *leaf.shape), leaf.dtype, sharding=sharding), tree
    )

  def take(self, stacked: Any, run: int) -> Any:
    """One run's part of what `stack` made, on the first device; nothing is communicated between the others."""
    device, place = self.devices[run // self.per_device], run % self.per_device

    def part(array: jax.Array) -> jax.Array:
      (shard,) = (shard.data for shard in array.addressable_shards if shard.device == device)
      return shard

    return jax.device_put(_row(jax.tree.map(part, stacked), place), self.devices[0])


@jax.jit
def _row(tree: Any, place: int) -> Any:
  return jax.tree.map(lambda array: array[place], tree)


def with_raw_key(state: TrainState) -> TrainState:
  """The state with its key as plain numbers, which NumPy and sharded transfers know how to handle."""
  return state.replace(key=jax.random.key_data(state.key))


def with_typed_key(state: TrainState) -> TrainState:
  """The reverse of `with_raw_key`."""
  return state.replace(key=jax.random.wrap_key_data(state.key))


def make_group_step(plan: Plan) -> GroupStep:
  """The step of several runs side by side, to be jitted.

  Args:
    plan: of one of them; its config is that of all but for the numbers and the seed.

  Returns:
    Function of (numbers: dotted field -> (runs,) values, stacked states with raw keys, one batch for all) that gives
    the next states and metrics (runs, ...).
  """

  def step(numbers: Numbers, state: TrainState, batch: Batch) -> tuple[TrainState, StackedMetrics]:
    config = with_numbers(plan.config, numbers)
    model, optimizer, _ = build_run(plan, config)
    single = make_run_step(config, model, optimizer, scale=plan.manifest.scale)
    state, metrics = single(with_typed_key(state), batch)
    return with_raw_key(state), metrics

  return jax.vmap(step, in_axes=(0, 0, None))


def build_run(
  plan: Plan, config: ml_collections.ConfigDict
) -> tuple[Any, optax.GradientTransformation, optax.Schedule]:
  """Network, optimizer and learning rate of a run, whose numbers may be traced."""
  schedule = optimizers.make_schedule(config.optimizer, plan.steps, plan.steps_per_epoch)
  model = build_model(config.model, plan.manifest.num_classes)
  return model, optimizers.make_optimizer(config.optimizer, schedule), schedule


class GroupProgram:
  """The compiled step of a group.

  Attributes:
    group: its runs.
    layout: where they live.
    compiled: the program, to be called with (numbers, states, batch); the states are given away.
  """

  def __init__(self, group: Group, plan: Plan, devices: Sequence[jax.Device], batch: Batch):
    """Compiles.

    Args:
      group: runs to be trained.
      plan: of the first of them.
      devices: that may be used.
      batch: a stored batch with "tables", or its shapes.
    """
    self.group = group
    self.layout = layout = Layout.over(len(group.runs), devices)
    model, optimizer, _ = build_run(plan, plan.config)
    state = jax.eval_shape(lambda: with_raw_key(state_at_random(plan, model, optimizer, jax.random.key(0))))
    numbers = {name: jax.ShapeDtypeStruct((), np.float32) for name in group.numbers}
    over_devices = jax.shard_map(
      make_group_step(plan),
      mesh=layout.mesh,
      in_specs=(_BY_RUN, _BY_RUN, _SHARED),
      out_specs=_BY_RUN,
      check_vma=False,  # nothing is summed over the axis, so there is nothing to be checked
    )
    jitted = meshes.jit_for(layout.mesh, over_devices, donate_argnums=1)
    shared = meshes.replicated_like(batch, layout.mesh)
    self.compiled = meshes.compile_ahead(jitted, layout.abstract(numbers), layout.abstract(state), shared)

  def numbers(self) -> Numbers:
    """The numbers in which the runs differ, on the devices."""
    values = self.group.numbers
    rows = [{name: np.float32(of_runs[i]) for name, of_runs in values.items()} for i in range(len(self.group.runs))]
    return self.layout.stack(rows)
