"""Several processes as one program: starting them, agreeing on mistakes and on when to stop, gathering what each found.

The engine is JAX's multi-controller runtime: every process runs the same command and the same steps on its own devices.
What is done once (locks, logs, checkpoints) is done by process 0. With one process nothing here communicates.
"""

import contextlib
import dataclasses
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

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
  counts = {"SLURM_STEP_NUM_TASKS": "SLURM", "OMPI_COMM_WORLD_SIZE": "mpirun"}
  for name, what in counts.items():
    if environment.get(name, "").isdigit() and int(environment[name]) > 1:
      return what
  workers = environment.get("TPU_WORKER_HOSTNAMES", "")
  return "a TPU pod slice" if "," in workers else None


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
  if cluster.distributed == "off" or not (given or cluster.distributed == "on" or detected(os.environ)):
    return
  import jax

  # JAX ends a process whose companions never come, without a word of ours: so this one comes first.
  who = (
    f"process {cluster.process_id} of {cluster.num_processes} at {cluster.coordinator}" if given else "one of several"
  )
  minutes = _SECONDS_TO_MEET // 60
  print(f"starting as {who}: waiting up to {minutes} minutes until all have started", file=sys.stderr, flush=True)
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
    reason = str(error).splitlines()[0]
    raise UserError(
      f"--distributed: the processes did not find each other ({reason}); start the same command once for each "
      "process, with --coordinator=HOST:PORT, --num_processes and --process_id where no SLURM or TPU pod says them"
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


def gather_texts(text: str) -> list[str]:
  """A text of each process, in the order of the processes, on every process.

  Args:
    text: of this process.

  Returns:
    One text for each process.
  """
  import jax

  if jax.process_count() == 1:
    return [text]
  import numpy as np
  from jax.experimental import multihost_utils

  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.asarray(len(content), np.int32)).reshape(-1)
  padded = np.pad(content, (0, max(*lengths, 1) - len(content)))
  gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
  return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths, strict=True)]


def meet() -> None:
  """Waits until all processes are here.

  Where devices of several processes work together for the first time they are given half a minute to find each other
  (Gloo), later as long as it takes: so processes meet before that, however long each took to come so far.
  """
  gather_texts("")


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
  """A body that every process passes, or none: a mistake or fault that one meets is raised in all of them.

  Otherwise the others would wait for ever in their next collective operation.

  Raises:
    UserError: the body raised it, here or elsewhere.
    FaultError: likewise.
  """
  import jax

  problem = None
  try:
    yield
  except (UserError, FaultError) as error:
    problem = error
  if jax.process_count() > 1:
    kind = "" if problem is None else "F" if isinstance(problem, FaultError) else "U"
    for process, found in enumerate(gather_texts(f"{kind}{problem or ''}")):
      if found and problem is None:
        raised = FaultError if found[0] == "F" else UserError
        raise raised(f"process {process}: {found[1:]}")
  if problem is not None:
    raise problem


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
