"""Devices, shardings and compiler options: one program for a laptop, several GPUs and many hosts.

Data parallel under jit: batches are split over the mesh's only axis, everything else is replicated, and so every sum
over the batch (losses, batch statistics) is global whatever the number of devices.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from selfreg_jax.errors import UserError

BATCH_AXIS = "data"

# By default XLA hands parts of a program to the YNNPACK library on a CPU. In the jaxlib of today some of them come out
# wrong without a word (rows of a product that are summed up, github.com/jax-ml/jax/issues/39103), and the weight
# gradient of a convolution takes a slow path. So nothing is handed over.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
# What is computed once is not worth all of LLVM's time: with this the initial weights of the UNet take a third of it to
# compile, those of Swin-Unet two thirds, and they are the same to the last bit.
_CPU_OPTIONS_ONCE = {"xla_backend_optimization_level": 1}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-dimensional mesh over the given devices, or over all of them in all processes."""
  devices = list(jax.devices() if devices is None else devices)
  # Explicit axes, the default of jax.make_mesh, would ask ordinary array code for sharding annotations.
  return Mesh(np.asarray(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of everything but batches: a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of batches: the first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def replicated_like(abstract: Any, mesh: Mesh) -> Any:
  """Shapes and dtypes of a pytree with the sharding of a copy on every device, as Orbax wants them for restoring."""
  sharding = replicated(mesh)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Raises UserError unless the global batch can be split; names the nearest sizes that can.

  Args:
    batch_size: slices of a global batch.
    mesh: whose devices must divide it.
    accumulate: micro-batches that it is taken in, each of which the devices must divide.
  """
  parts = mesh.size * accumulate
  if batch_size % parts:
    lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
    nearest = f"{lower} or {upper}" if lower else f"{upper}"
    over = f"{mesh.size} devices" if mesh.size > 1 else "1 device"
    if accumulate > 1:
      over += f", each taking it in {accumulate} micro-batches (config.train.accumulate)"
      fitting = [str(n) for n in range(1, accumulate) if batch_size % (mesh.size * n) == 0]
      nearest += f"; or config.train.accumulate = {', '.join(fitting)}" if fitting else ""
    raise UserError(f"config.data.batch_size = {batch_size} cannot be split over {over}; use {nearest}")


def local_mesh(mesh: Mesh) -> Mesh:
  """The mesh over this process's devices only: the same mesh where there is one process."""
  return mesh if jax.process_count() == 1 else make_mesh(list(mesh.local_mesh.devices.flat))


def local_copy(tree: Any, local: Mesh) -> Any:
  """Replicated global arrays as arrays of this process alone, without a copy; the same arrays in one process.

  Args:
    tree: arrays with a copy on every device of all processes.
    local: `local_mesh` of their mesh.

  Returns:
    The tree with a copy on every device of this process.
  """
  if jax.process_count() == 1:
    return tree

  def localized(array: jax.Array) -> jax.Array:
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, replicated(local), shards)

  return jax.tree.map(localized, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Host arrays that every process has, as global arrays with a copy on every device; nothing is communicated."""
  sharding = replicated(mesh)
  return jax.tree.map(
    lambda array: jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index]), tree
  )


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's part of a global batch on its devices: a pytree of global arrays."""
  sharding = split_batch(mesh)
  return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)


@functools.cache
def compiler_options(platform: str, *, once: bool = False) -> dict[str, Any]:
  """Options for `jax.jit` on this platform, as far as its compiler knows them.

  Args:
    platform: of the devices.
    once: the program will run once, and compiling takes longer than running.

  Returns:
    Names and values.
  """
  if platform != "cpu":
    return {}
  return _known(_CPU_OPTIONS) | (_known(_CPU_OPTIONS_ONCE) if once else {})


def _known(options: dict[str, Any]) -> dict[str, Any]:
  """The options if the CPU's compiler knows them, else none."""
  try:
    jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
  except Exception:  # the error's type for an unknown option differs between versions of jaxlib
    return {}
  return dict(options)


def jit_for(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
  """`jax.jit` with the compiler options that suit the mesh's devices."""
  return jax.jit(function, compiler_options=compiler_options(mesh.devices.flat[0].platform), **options)


def jit_once_for(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
  """`jit_for` for what runs once, and takes longer to compile than to run."""
  return jax.jit(function, compiler_options=compiler_options(mesh.devices.flat[0].platform, once=True), **options)


def jit(function: Callable[..., Any], *, once: bool = False) -> Callable[..., Any]:
  """`jax.jit` with the compiler options that suit JAX's default devices, which are asked for at the first call.

  Args:
    function: to be compiled.
    once: it will run once, and compiling takes longer than running.

  Returns:
    The function, compiled when it is called.
  """

  @functools.cache
  def jitted() -> Callable[..., Any]:
    return jax.jit(function, compiler_options=compiler_options(jax.default_backend(), once=once))

  @functools.wraps(function)
  def call(*arguments: Any, **named: Any) -> Any:
    return jitted()(*arguments, **named)

  return call


def compile_ahead(jitted: Any, *arguments: Any) -> Any:
  """Compiles a jitted function for these arguments, before its first call and before that call's memory is taken.

  Args:
    jitted: what `jit_for` made.
    *arguments: of the call, or their shapes.

  Returns:
    The program, to be called with such arguments.
  """
  compiled = jitted.lower(*arguments).compile()
  # glibc keeps what the compiler freed, hundreds of megabytes for a training step, which the step would come on top of.
  if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    libc.malloc_trim(0)
  return compiled
