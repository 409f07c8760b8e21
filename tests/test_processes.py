import jax
import numpy as np
import pytest

from selfreg_jax import mesh as meshes
from selfreg_jax import processes
from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.processes import Cluster


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, None),
    ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8"),
    ({"SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_NTASKS": "8"}, None),  # in a batch script, not started by srun
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
  ],
)
def test_several_processes_are_detected_from_the_environment(environment, expected):
  assert processes.detected(environment) == expected


@pytest.mark.parametrize(
  ("cluster", "environment", "expected"),
  [
    (Cluster(), {}, (0, 1)),
    (Cluster(num_processes=4, process_id=2), {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, (2, 4)),
    (Cluster(), {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, (1, 8)),
    (Cluster(), {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
    (Cluster(), {"SLURM_PROCID": "0"}, (0, 1)),  # in a batch script, not started by srun
    (Cluster("off"), {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, (0, 1)),
  ],
)
def test_processes_that_do_not_join_know_their_share(cluster, environment, expected):
  assert processes.share_without_joining(cluster, environment) == expected


@pytest.mark.parametrize(
  ("cluster", "message"),
  [
    (Cluster(coordinator="host:1234", num_processes=2, process_id=0), "need none"),
    (Cluster(num_processes=2), "go together"),
    (Cluster(num_processes=2, process_id=2), "--process_id=2: 0 to 1"),
    (Cluster("off", num_processes=2, process_id=0), "contradict"),
  ],
)
def test_a_wrong_share_is_refused(cluster, message):
  with pytest.raises(UserError, match=message):
    processes.share_without_joining(cluster, {})


@pytest.mark.parametrize(
  ("cluster", "message"),
  [
    (Cluster(coordinator="host:1234"), "--coordinator, --num_processes and --process_id go together"),
    (Cluster("off", "host:1234", 2, 0), "--distributed=off and --coordinator"),
    (Cluster("auto", "host", 2, 0), "--coordinator=host: HOST:PORT"),
    (Cluster("auto", "host:99999", 2, 0), "HOST:PORT"),
    (Cluster("auto", "host:1234", 0, 0), "--num_processes=0"),
    (Cluster("auto", "host:1234", 2, 2), "--process_id=2: 0 to 1"),
  ],
)
def test_a_wrong_description_of_the_processes_is_refused(cluster, message):
  with pytest.raises(UserError, match=message):
    processes.start(cluster)


def test_one_process_needs_no_start():
  processes.start(Cluster())
  processes.start(Cluster(distributed="off"))
  assert jax.process_count() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_shares_hold_every_item_once_and_merge_in_order(monkeypatch, items, count):
  shares = []
  for index in range(count):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares.append(processes.share_of(list(range(items))))
  assert processes.merge_shares(shares) == list(range(items))


def test_alone_mistakes_and_faults_pass_through_and_texts_stay():
  for kind in (UserError, FaultError):
    with pytest.raises(kind, match="what happened"), processes.together():
      raise kind("what happened")
  assert processes.gather_texts("mine") == ["mine"]


def test_processes_that_were_started_differently_are_told(monkeypatch):
  processes.check_agreement({"config.seed": 0})
  texts = ['{"config.seed": 0, "jax": "1"}', '{"config.seed": 3, "jax": "1"}', '{"config.seed": 0}']
  monkeypatch.setattr(processes, "gather_texts", lambda text: texts)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(UserError, match=r"process 1: config.seed is 3, in process 0 0\n  process 2: jax is None"):
    processes.check_agreement({"config.seed": 0})


def test_a_failing_collective_means_a_lost_process(monkeypatch):
  with pytest.raises(ValueError, match="mine"), processes.peers(ValueError):
    raise ValueError("mine")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(FaultError, match=r"another process was lost .Gloo AllGather failed"), processes.peers(ValueError):
    raise ValueError("Gloo AllGather failed: reset\nmore")


def test_a_vote_of_one_process_is_counted_at_once():
  vote = processes.StopVote(meshes.make_mesh())
  assert not vote(False)
  assert vote(True)


def test_replicated_arrays_are_on_every_device():
  mesh = meshes.make_mesh()
  tree = meshes.replicate({"a": np.arange(3), "b": np.float32(2.5)}, mesh)
  assert all(leaf.sharding.is_fully_replicated and len(leaf.addressable_shards) == 8 for leaf in tree.values())
  np.testing.assert_array_equal(tree["a"], np.arange(3))
