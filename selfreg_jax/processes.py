"""Several processes as one program: starting them, agreeing on mistakes and on when to stop, gathering what each found.

The engine is JAX's multi-controller runtime: every process runs the same command and the same steps on its own devices.
What is done once (locks, logs, checkpoints) is done by process 0. With one process nothing here communicates.
"""

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from selfreg_jax import errors
from selfreg_jax.errors import FaultError, UserError

# A process that has not been heard of for so long is given up, and the others end with it.
_HEARTBEAT_SECONDS = 60
_SECONDS_TO_MEET = 300
_VOTES_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Cluster:
  """How a process finds the others.

  Attributes:
    distributed: "auto" (several processes where the environment says so: srun, mpirun, a TPU slice on GKE), "on" (JAX
      asks the environment, and on TPU VMs the machine's metadata, for the rest) or "off".
    coordinator: HOST:PORT of process 0, where the environment does not say it.
    num_processes: number of processes, likewise.
    process_id: this one's number, from 0, likewise.
  """

  distributed: str = "auto"
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def define_flags() -> None:
  """Defines the flags of a command that can run in several processes; `from_flags` reads them."""
  choices = ["auto", "on", "off"]
  flags.DEFINE_enum("distributed", "auto", choices, "One of several processes? auto: as SLURM, mpirun or a TPU says.")
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the environment does not say it.")
  flags.DEFINE_integer("num_processes", None, "Number of processes, likewise.")
  flags.DEFINE_integer("process_id", None, "Number of this process, from 0, likewise.")


def from_flags() -> Cluster:
  """The cluster that the flags of `define_flags` describe."""
  return Cluster(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Cluster)})


def detected(environment: Mapping[str, str]) -> str | None:
  """What in the environment says that this is one of several processes; None where nothing does.

  A batch script that merely runs inside an allocation of several tasks is one process: it was not started by srun.
  """
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if environment.get(name, "").isdigit() and int(environment[name]) > 1:
      return f"{name}={environment[name]}"
  return "TPU_WORKER_HOSTNAMES" if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else None


# What tells a process its number among how many, by launcher.
_NUMBERS = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))


def share_without_joining(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
  """Which share of a list of independent tasks is this process's; no process is joined or waited for.

  Args:
    cluster: what the flags say: --num_processes and --process_id go together and need no --coordinator; with
      --distributed=off the process is alone.
    environment: of the process, asked where the flags say nothing (srun, mpirun).

  Returns:
    (number of this process, from 0; number of processes).

  Raises:
    UserError: the flags are incomplete or contradictory.
  """
  count, number = cluster.num_processes, cluster.process_id
  if cluster.coordinator is not None:
    raise UserError("--coordinator: these processes work each for itself and need none; leave it out")
  if (count is None) != (number is None):
    raise UserError("--num_processes and --process_id go together")
  if cluster.distributed == "off" and count is not None:
    raise UserError("--distributed=off and --num_processes contradict each other")
  if cluster.distributed == "off":
    return 0, 1
  if count is None:
    found = [pair for pair in _NUMBERS if all(environment.get(name, "").isdigit() for name in pair)]
    number, count = (int(environment[name]) for name in found[0]) if found else (0, 1)
  if not 0 <= number < count:
    raise UserError(f"--process_id={number}: 0 to {count - 1}")
  return number, count


def start(cluster: Cluster) -> None:
  """Joins the other processes, if there are any. Must come before anything that asks JAX for its devices.

  Args:
    cluster: how to find them.

  Raises:
    UserError: the description is incomplete or contradictory, or the others could not be reached.
  """
  given = {
    f"--{name}": value
    for name in ("coordinator", "num_processes", "process_id")
    if (value := getattr(cluster, name)) is not None
  }
  _check(cluster, given)
  reason = "--coordinator was given" if given else "--distributed=on was given"
  if not given and cluster.distributed == "auto":
    found = detected(os.environ)
    reason = found and f"the environment says so ({found})"
  if cluster.distributed == "off" or not reason:
    return
  import jax

  # JAX ends a process whose companions never come, without a word of ours: so this one comes first.
  who = (
    f"process {cluster.process_id} of {cluster.num_processes} at {cluster.coordinator}" if given else "one of several"
  )
  wait = f"waiting up to {_SECONDS_TO_MEET // 60} minutes until all have started"
  print(f"starting as {who}, because {reason}: {wait}", file=sys.stderr, flush=True)
  # Signals are ours (`StopVote`): the service would catch SIGTERM before Python sees it, and knows no Ctrl-C.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      initialization_timeout=_SECONDS_TO_MEET,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"this was to be one of several processes, because {reason}, but they cannot be joined "
      f"({str(error).splitlines()[0]}); start the same command once for each process, with --coordinator=HOST:PORT, "
      "--num_processes and --process_id where the environment does not say them, or give --distributed=off to run alone"
    ) from error
  meet()


def _check(cluster: Cluster, given: Mapping[str, object]) -> None:
  if given and cluster.distributed == "off":
    raise UserError(f"--distributed=off and {', '.join(given)} contradict each other")
  if given and len(given) < 3:
    raise UserError(f"{', '.join(given)}: --coordinator, --num_processes and --process_id go together")
  if not given:
    return
  host, _, port = cluster.coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UserError(f"--coordinator={cluster.coordinator}: HOST:PORT of process 0 is needed, such as node0:12345")
  if cluster.num_processes < 1:
    raise UserError(f"--num_processes={cluster.num_processes}: at least 1")
  if not 0 <= cluster.process_id < cluster.num_processes:
    raise UserError(f"--process_id={cluster.process_id}: 0 to {cluster.num_processes - 1}")


def is_first() -> bool:
  """Whether this process does what is done once."""
  import jax

  return jax.process_index() == 0


@contextlib.contextmanager
def peers(*further: type[Exception]) -> Iterator[None]:
  """Says what it means when a collective operation in the body fails: another process is gone.

  Args:
    *further: types that mean the same in this body, besides JAX's own.

  Raises:
    FaultError: instead of what JAX raised.
  """
  import jax

  try:
    yield
  except (jax.errors.JaxRuntimeError, *further) as error:
    if jax.process_count() == 1:
      raise
    raise FaultError(
      f"another process was lost ({str(error).splitlines()[0]}); start all of them again with the same command: a "
      "training continues from its last checkpoint"
    ) from error


def gather_texts(text: str) -> list[str]:
  """A text of each process, in the order of the processes, on every process.

  Args:
    text: of this process.

  Returns:
    One text for each process.

  Raises:
    FaultError: another process was lost.
  """
  import jax

  if jax.process_count() == 1:
    return [text]
  import numpy as np
  from jax.experimental import multihost_utils

  content = np.frombuffer(text.encode(), np.uint8)
  with peers(ValueError):  # which JAX makes of some failures here
    lengths = multihost_utils.process_allgather(np.asarray(len(content), np.int32)).reshape(-1)
    # To a power of two, so that few programs are compiled for all lengths.
    padded = np.pad(content, (0, (1 << int(max(lengths)).bit_length()) - len(content)))
    gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
  return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths, strict=True)]


def meet() -> None:
  """Waits until all processes are here.

  Where devices of several processes work together for the first time they are given half a minute to find each other
  (Gloo), later as long as it takes: so processes meet before that, however long each took to come so far.
  """
  gather_texts("")


def check_agreement(facts: Mapping[str, Any]) -> None:
  """Raises UserError in all processes unless each has the same facts; they would compute nonsense together.

  Args:
    facts: JSON values by name.
  """
  import jax

  first, *others = (json.loads(text) for text in gather_texts(json.dumps(facts)))
  differing = [
    f"process {number}: {name} is {other.get(name)!r}, in process 0 {first.get(name)!r}"
    for number, other in enumerate(others, 1)
    for name in sorted(first.keys() | other.keys())
    if first.get(name) != other.get(name)
  ]
  if differing and jax.process_count() > 1:
    raise UserError(
      "the processes were not started alike; give all of them the same command, config files, data and versions:\n  "
      + "\n  ".join(differing[:8])
    )


def share_of(items: Sequence[Any]) -> list[Any]:
  """This process's share of a list that all have: every one of its items belongs to exactly one process."""
  import jax

  return list(items[jax.process_index() :: jax.process_count()])


def merge_shares(shares: Sequence[Sequence[Any]]) -> list[Any]:
  """The reverse of `share_of`: what was made of each item, in the order of the list that was shared out.

  Args:
    shares: of the processes in their order; they differ by one item at most.
  """
  merged: list[Any] = [None] * sum(map(len, shares))
  for process, share in enumerate(shares):
    merged[process :: len(shares)] = share
  return merged


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A body that every process passes, or none: what goes wrong in one of them is raised in all.

  Otherwise the others would wait for ever in their next collective operation. Where the body itself gathers, nothing
  may fail before that in one process alone.

  Raises:
    UserError: the body raised it in another process.
    FaultError: it raised something else there; here whatever it raised is raised as it is.
  """
  import jax

  problem = None
  try:
    yield
  except Exception as error:
    problem = error
  if jax.process_count() > 1:
    told = ""
    if problem is not None:
      kind = "U" if isinstance(problem, UserError) else "F"
      told = kind + (str(problem) if isinstance(problem, UserError | FaultError) else repr(problem))
    for process, found in enumerate(gather_texts(told)):
      if found and problem is None:
        raised = UserError if found[0] == "U" else FaultError
        raise raised(f"process {process}: {found[1:]}")
  if problem is not None:
    raise problem


def run_command(command: Callable[[], None]) -> int:
  """`errors.run_command` for commands that can run in several processes; does not return after a fault.

  A process that ends regularly waits for the others, for minutes, and for reading threads that hang. So whatever goes
  wrong in one of several processes, and every fault, ends it at once; the others then notice.

  Args:
    command: see `errors.run_command`.

  Returns:
    The exit code.
  """
  try:
    code = errors.run_command(command)
  except Exception:
    traceback.print_exc()
    code = errors.EXIT_FAULT
  if code == errors.EXIT_FAULT or (code and "jax" in sys.modules and sys.modules["jax"].process_count() > 1):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


class StopVote:
  """Whether any process has been asked to stop: all of them learn it at the same step, and so stop at the same step.

  A vote costs one all-reduce of a number for each device, and is counted two steps later, when it has long arrived: the
  loop never waits for it.
  """

  def __init__(self, mesh):
    import jax
    import jax.numpy as jnp

    from selfreg_jax import mesh as meshes

    self._alone = jax.process_count() == 1
    self._mesh = mesh
    self._any = jax.jit(jnp.any, out_shardings=meshes.replicated(mesh))
    self._pending = deque()

  def __call__(self, wish: bool) -> bool:
    """Takes this process's wish at a step, and says whether to stop now."""
    if self._alone:
      return wish
    import numpy as np

    from selfreg_jax import mesh as meshes

    self._pending.append(self._any(meshes.place_batch(np.full(self._mesh.local_mesh.size, wish), self._mesh)))
    return len(self._pending) > _VOTES_IN_FLIGHT and bool(self._pending.popleft())
