"""What a training step communicates, read from its compiled program, and what that should cost on paper.

  python -m benchmarks.scaling           # both networks of the paper, 1 to 8 devices: 3 minutes of CPU time
  python -m benchmarks.scaling --short   # narrow networks: 1 minute
  python -m benchmarks.scaling --network=unet --devices=8 --machine=v5e --json

Nothing is run and nothing is timed: the step of `selfreg_jax/training/loop.py` (loss, optimizer, augmentation and
resize included) is compiled for virtual CPU devices, and the collective operations are read from the text of the
optimized program.

How bytes are counted: see benchmarks/collectives.py.

On paper, for n devices that hold as many slices each as the one does (weak scaling):

  gradients, rest    2 (n - 1) / n * bytes / bandwidth: a ring, at the pace of its slowest link
  latency            collectives * hops(n) * latency of a hop
  efficiency         step / (step + gradients + rest + latency)
  overlapped         the same, but the gradients hide behind the backward pass, two thirds of the step, as far as they
                     fit; the rest and every latency stay

The step of one device is an assumption as well: its floating-point operations at `--tflops`, or `--step_ms`.

What the program of a CPU does not show: XLA joins small all-reduces by other rules on GPU and TPU, and may reduce in
bfloat16 there what the CPU reduces in float32. So the bytes of float32 training carry over, and the count is a guide.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from benchmarks import measuring
from benchmarks.collectives import Traffic, measure_traffic
from configs import synapse_swin_unet, synapse_unet
from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax.data import augment
from selfreg_jax.data.published import PUBLISHED
from selfreg_jax.errors import run_command
from selfreg_jax.models.factory import build_model, initial_variables
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.loop import build_train_step
from selfreg_jax.training.step import create_state

_RECIPES = {"unet": synapse_unet, "swin_unet": synapse_swin_unet}
_NATIVE_SIZE = (512, 512)  # rows and columns of Synapse's slices
_BACKWARD_SHARE = 2 / 3  # of a step's operations


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled training step.

  Attributes:
    text: of the optimized program of one device.
    parameters: shapes of the parameters.
    flops: floating-point operations of the global batch, as XLA counts them before it optimizes.
  """

  text: str
  parameters: Any
  flops: float


def compile_step(config: ml_collections.ConfigDict, mesh: Mesh) -> Step:
  """Compiles the training step of a config as `training.loop.train_and_evaluate` does; nothing is run or allocated.

  Args:
    config: of a run on Synapse.
    mesh: the devices.

  Returns:
    The step.

  Raises:
    UserError: the config makes no sense, or its batch cannot be split over the devices.
  """
  configs.validate(config, needs_data=False)
  meshes.check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
  model = build_model(config.model, len(PUBLISHED["synapse"].classes))
  schedule = optimizers.make_schedule(config.optimizer, steps=1000, steps_per_epoch=100)
  optimizer = optimizers.make_optimizer(config.optimizer, schedule)

  def initial_state():
    key = jax.random.key(config.seed)
    variables = initial_variables(model, key, config.data.image_size, channels=1)
    return create_state(variables, optimizer, key, ema=config.train.ema_decay > 0)

  def slices(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype, sharding=meshes.split_batch(mesh))

  state = meshes.replicated_like(jax.eval_shape(initial_state), mesh)
  tables = augment.ResizeTables.build([_NATIVE_SIZE], config.data.image_size)
  batch = {
    "image": slices(jnp.uint16, *_NATIVE_SIZE, 1),
    "label": slices(jnp.uint8, *_NATIVE_SIZE),
    "size_index": slices(jnp.int32),
    "position": slices(jnp.uint32),
    "record": slices(jnp.int32),
    "tables": meshes.replicated_like(tables, mesh),
  }
  jitted = build_train_step(config, model, optimizer, mesh, scale=1 / 65535)
  lowered = jitted.lower(state, batch)
  flops = lowered.cost_analysis()["flops"] * config.train.accumulate  # XLA counts one round of a loop
  # Machine code that nobody runs need not be fast; the program above it is the same.
  compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
  return Step(compiled.as_text(), state.params, flops)


@dataclasses.dataclass(frozen=True)
class Machine:
  """Assumed numbers of a machine; none is measured.

  Attributes:
    within: devices that the fast links join.
    fast: bytes a second that a device sends in a ring among these.
    slow: likewise in a ring that leaves them.
    hop: seconds of latency of a hop.
    hops: shape of the network that small all-reduces cross: "tree", "ring" or "torus".
    flops: operations a second that a device sustains in these networks.
  """

  within: int
  fast: float
  slow: float
  hop: float
  hops: str
  flops: float


MACHINES = {
  # NVLink 4: 450 GB/s each way. InfiniBand NDR, a card for each GPU: 50 GB/s. A tenth of the dense bfloat16 peak.
  "h100": Machine(within=8, fast=450e9, slow=50e9, hop=3e-6, hops="tree", flops=100e12),
  # Four ICI links of 50 GB/s each way, of which a ring through the mesh uses two. A slice has up to 256 chips; beyond
  # lies the data center's network, 25 Gbit/s a chip. A fifth of the bfloat16 peak.
  "v5e": Machine(within=256, fast=100e9, slow=3.125e9, hop=1e-6, hops="torus", flops=40e12),
}


def hops(shape: str, devices: int) -> float:
  """Hops that a small all-reduce over so many devices takes, to the last one and back.

  Args:
    shape: "tree" (2 ceil(log2 n)), "ring" (2 (n - 1)) or "torus" (two dimensions, half of each side: 2 sqrt(n)).
    devices: n.
  """
  if devices == 1:
    return 0
  return {"tree": 2 * math.ceil(math.log2(devices)), "ring": 2 * (devices - 1), "torus": 2 * math.sqrt(devices)}[shape]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A step on so many devices, on paper; times in seconds.

  Attributes:
    devices: that each hold the slices of the one.
    gradients: of the all-reduce of the gradients.
    rest: of that of everything else.
    latency: of all collectives.
    efficiency: step of one device over this step, when communication waits for computation.
    overlapped: likewise when gradients are reduced during the backward pass.
  """

  devices: int
  gradients: float
  rest: float
  latency: float
  efficiency: float
  overlapped: float


def estimate(machine: Machine, traffic: Traffic, step: float, devices: int) -> Estimate:
  """The model of this file's head.

  Args:
    machine: its links.
    traffic: of a step on several devices.
    step: seconds of a step of one device.
    devices: n.

  Returns:
    What n devices should do.
  """
  bandwidth = machine.fast if devices <= machine.within else machine.slow
  ring = 2 * (devices - 1) / devices / bandwidth
  gradients, rest = ring * traffic.gradient_bytes, ring * traffic.rest_bytes
  latency = sum(traffic.counts.values()) * hops(machine.hops, devices) * machine.hop
  hidden = min(gradients, _BACKWARD_SHARE * step)
  total = step + gradients + rest + latency
  return Estimate(devices, gradients, rest, latency, step / total, step / (total - hidden))


def make_config(network: str, arguments: argparse.Namespace) -> ml_collections.ConfigDict:
  """The recipe of a network on Synapse, as the flags change it."""
  config = _RECIPES[network].get_config()
  if arguments.short:
    config.data.image_size, config.data.batch_size = 32, 8
    if network == "unet":
      config.model.widths = (4, 6, 8)
    else:
      config.model.embed_dim, config.model.window = 8, 4
      config.model.depths, config.model.heads = (1, 1), (1, 2)
  if arguments.widths and network == "unet":
    config.model.widths = arguments.widths
  config.data.image_size = arguments.image_size or config.data.image_size
  config.data.batch_size = arguments.batch_size or config.data.batch_size
  config.train.accumulate = arguments.accumulate
  return config


def report(network: str, arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
  """Everything about one network, as it goes to JSON."""
  config = make_config(network, arguments)
  traffics: dict[int, Traffic] = {}
  for devices in arguments.devices:
    step = compile_step(config, meshes.make_mesh(jax.devices()[:devices]))
    traffics[devices] = measure_traffic(step.text, step.parameters)
  most = max(traffics)
  slices = arguments.slices_per_device
  flops = step.flops / config.data.batch_size
  seconds = arguments.step_ms / 1e3 if arguments.step_ms else flops * slices / machine.flops
  return {
    "network": network,
    "image_size": config.data.image_size,
    "batch_size": config.data.batch_size,
    "accumulate": config.train.accumulate,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(step.parameters)),
    "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.parameters)),
    "flops_per_slice": flops,
    "traffic": {devices: dataclasses.asdict(traffic) for devices, traffic in traffics.items()},
    "on_paper": {
      "traffic_of_devices": most,
      "slices_per_device": slices,
      "step_seconds": seconds,
      "estimates": [dataclasses.asdict(estimate(machine, traffics[most], seconds, n)) for n in arguments.chips],
    },
  }


def print_report(found: dict[str, Any], machine: Machine) -> None:
  """The report as two small tables."""
  micro = f", in {found['accumulate']} micro-batches" if found["accumulate"] > 1 else ""
  print(
    f"\n{found['network']}: {found['parameters']:,} parameters, {found['parameter_bytes'] / 1e6:.2f} MB; "
    f"{found['image_size']} pixels, global batch {found['batch_size']}{micro}; "
    f"{found['flops_per_slice'] / 1e9:.3g} GFLOP a slice and step"
  )
  print(f"{'devices':>8}  {'collective':<20} {'a step':>7} {'MB':>9}   {'gradients MB':>12} {'rest MB':>9}")
  for devices, traffic in found["traffic"].items():
    split = f"{traffic['gradient_bytes'] / 1e6:>12.3f} {traffic['rest_bytes'] / 1e6:>9.3f}"
    if traffic["unmatched"] and traffic["counts"]:
      split += f"   ({traffic['unmatched']} parameters have no all-reduce of their size)"
    for row, kind in enumerate(traffic["counts"] or ["none"]):
      count, size = traffic["counts"].get(kind, 0), traffic["bytes"].get(kind, 0)
      first = f"{devices:>8}" if row == 0 else " " * 8
      print(f"{first}  {kind:<20} {count:>7} {size / 1e6:>9.3f}   {split if row == 0 else ''}".rstrip())
  paper = found["on_paper"]
  print(
    f"on paper, {paper['slices_per_device']} slices a device, a step of {1e3 * paper['step_seconds']:.1f} ms "
    f"(assumed), {describe(machine)}:"
  )
  print(f"{'devices':>8}  {'gradients ms':>12} {'rest ms':>9} {'latency ms':>11} {'efficiency':>11} {'overlapped':>11}")
  for row in paper["estimates"]:
    times = f"{1e3 * row['gradients']:>12.2f} {1e3 * row['rest']:>9.3f} {1e3 * row['latency']:>11.2f}"
    print(f"{row['devices']:>8}  {times} {row['efficiency']:>11.1%} {row['overlapped']:>11.1%}")


def describe(machine: Machine) -> str:
  """The assumed numbers in words."""
  return (
    f"{machine.fast / 1e9:g} GB/s within {machine.within} devices and {machine.slow / 1e9:g} beyond, "
    f"{1e6 * machine.hop:g} us a hop ({machine.hops})"
  )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The flags; argparse exits with 2 where they are wrong."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--network", type=_names, default=tuple(_RECIPES), help="unet, swin_unet or both")
  parser.add_argument("--devices", type=_counts, default=(1, 2, 4, 8), help="virtual devices to compile for")
  parser.add_argument("--widths", type=_counts, help="channels of the UNet's stages")
  parser.add_argument("--image_size", type=int, help="pixels a side; the recipe's by default")
  parser.add_argument("--batch_size", type=int, help="slices of a global batch; the recipe's by default")
  parser.add_argument("--accumulate", type=int, default=1, help="micro-batches that a batch is taken in")
  parser.add_argument("--chips", type=_counts, default=(1, 8, 16, 64, 256), help="devices to estimate")
  parser.add_argument("--slices_per_device", type=int, default=24, help="of the estimate")
  parser.add_argument("--step_ms", type=float, help="of one device, for the estimate; by default from --tflops")
  parser.add_argument("--machine", choices=MACHINES, default="h100", help="whose assumed numbers to take")
  parser.add_argument("--tflops", type=float, help="that a device sustains")
  parser.add_argument("--fast_gbs", type=float, help="GB/s of a device among the devices that fast links join")
  parser.add_argument("--slow_gbs", type=float, help="GB/s of a device beyond them")
  parser.add_argument("--within", type=int, help="devices that fast links join")
  parser.add_argument("--hop_us", type=float, help="microseconds of latency of a hop")
  parser.add_argument("--hops", choices=["tree", "ring", "torus"], help="how small all-reduces travel")
  arguments = parser.parse_args(argv)
  if max(arguments.devices) == 1:
    parser.error("--devices=1: one device communicates nothing, and the estimate would have nothing to go by")
  return arguments


def _names(text: str) -> tuple[str, ...]:
  names = tuple(_RECIPES) if text == "both" else tuple(text.split(","))
  if unknown := set(names) - set(_RECIPES):
    raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: the networks are {', '.join(_RECIPES)}")
  return names


def _counts(text: str) -> tuple[int, ...]:
  return tuple(map(measuring.positive, text.split(",")))


def assumed_machine(arguments: argparse.Namespace) -> Machine:
  """The machine of the flags."""
  given = {
    "flops": (arguments.tflops, 1e12),
    "fast": (arguments.fast_gbs, 1e9),
    "slow": (arguments.slow_gbs, 1e9),
    "within": (arguments.within, 1),
    "hop": (arguments.hop_us, 1e-6),
  }
  changes = {name: value * unit for name, (value, unit) in given.items() if value is not None}
  if arguments.hops:
    changes["hops"] = arguments.hops
  return dataclasses.replace(MACHINES[arguments.machine], **changes)


def main(arguments: argparse.Namespace) -> None:
  """Compiles, reads, estimates, prints."""
  # Read when JAX first asks for its devices, which nothing has done yet; of two such flags the last one counts.
  count = f"--xla_force_host_platform_device_count={max(arguments.devices)}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
  jax.config.update("jax_platforms", "cpu")
  machine = assumed_machine(arguments)
  found = []
  for network in arguments.network:
    found.append(report(network, arguments, machine))
    if not arguments.json:
      print_report(found[-1], machine)
  if arguments.json:
    facts = {"assumed": dataclasses.asdict(machine), "compiled_on": measuring.machine()}
    print(json.dumps({"networks": found} | facts))


if __name__ == "__main__":
  parsed = parse_arguments()
  sys.exit(run_command(lambda: main(parsed)))
