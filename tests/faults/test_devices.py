"""The same run on any division of devices among processes, and continued under another one."""

import signal

import numpy as np
import pytest

from tests.conftest import make_prepared
from tests.faults import harness

STEPS = 20
DIVISIONS = [(1, 1), (1, 8), (2, 4), (4, 2)]  # processes x devices of each
FIELDS = {
  "train__steps": STEPS,
  "train__validate_every": 20,
  "train__checkpoint_every": 0,
  "optimizer__name": "sgd",
  "optimizer__learning_rate": 1e-3,
}
NETWORKS = {"unet": {}, "swin_unet": {"model__drop_path": 0.2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Three validation and five test cases, which 2 and 4 processes do not divide."""
  return make_prepared(tmp_path_factory.mktemp("odd"), val="abc", test="vwxyz")


def train(data, folder, processes, devices, **fields):
  for run in harness.start_together(
    data, folder / "run", folder, "log", processes=processes, devices=devices, **fields
  ):
    assert run.wait() == 0, run.output
  return harness.metric_lines(folder / "run")


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, data, tmp_path_factory):
  """(fields, metrics of one process with one device, its folder) of a network."""
  folder = tmp_path_factory.mktemp(request.param)
  fields = FIELDS | NETWORKS[request.param] | {"network": request.param}
  return fields, train(data, folder, 1, 1, **fields), folder


@pytest.mark.parametrize(("processes", "devices"), DIVISIONS[1:])
def test_losses_are_those_of_one_device(data, network, tmp_path, processes, devices):
  fields, expected, _ = network
  ours = train(data, tmp_path, processes, devices, **fields)
  compare(ours, expected, f"{fields['network']} {processes} x {devices}")


def compare(ours, expected, what):
  """Losses agree to 1e-5; the validation Dice, of argmaxima, to a few voxels."""
  assert [line["step"] for line in ours] == [line["step"] for line in expected]
  largest = {
    name: max(abs(a[name] / b[name] - 1) for a, b in zip(ours, expected, strict=True) if name in b)
    for name in ("train/total", "train/ce", "train/dice", "train/scr", "train/ifd", "train/grad_norm")
  }
  print(f"\n{what}: largest relative differences", *(f"{name} {value:.1e}" for name, value in largest.items()))
  # Where two channels, pixels or activations are equal but for rounding the gradient takes one side or the other.
  del largest["train/grad_norm"]
  assert max(largest.values()) < 1e-5
  np.testing.assert_allclose(ours[-1]["val/dice"], expected[-1]["val/dice"], atol=2e-3)


@pytest.mark.parametrize("network", ["unet"], indirect=True)
def test_another_number_of_devices_continues(data, network, tmp_path):
  fields, expected, _ = network
  run = harness.start_training(data, tmp_path / "run", tmp_path / "one.txt", **fields)
  run.until(lambda: harness.last_step(tmp_path / "run") >= 5)
  run.signal(signal.SIGTERM)
  assert run.wait() == 75, run.output
  ours = train(data, tmp_path, 1, 8, **fields)
  compare(ours, expected, f"{fields['network']} 1 device, then 8")


@pytest.mark.parametrize("network", ["unet"], indirect=True)
@pytest.mark.parametrize("threads", [0, 4])
def test_another_number_of_reading_threads_continues_exactly(data, network, tmp_path, threads):
  fields, _, whole = network
  run = harness.start_training(data, tmp_path / "run", tmp_path / "one.txt", **fields)
  run.until(lambda: harness.last_step(tmp_path / "run") >= 5)
  run.signal(signal.SIGTERM)
  assert run.wait() == 75, run.output
  train(data, tmp_path, 1, 1, **fields | {"data__threads": threads})
  harness.assert_same_run(tmp_path / "run", whole / "run")


@pytest.mark.parametrize("network", ["unet"], indirect=True)
@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_in_several_processes(network, tmp_path, processes):
  _, _, whole = network
  flags = [f"--workdir={whole / 'run'}", "--split=test", "--workers=1"]
  assert harness.Run("eval.py", *flags, f"--output={tmp_path / 'one'}", log=tmp_path / "one.txt").wait() == 0
  port = harness.free_port()
  runs = [
    harness.Run(
      "eval.py",
      *flags,
      f"--output={tmp_path / 'many'}",
      *harness.cluster_flags(port, processes, index),
      log=tmp_path / f"{index}.txt",
    )
    for index in range(processes)
  ]
  for run in runs:
    assert run.wait() == 0, run.output
  assert (tmp_path / "many" / "cases.csv").read_bytes() == (tmp_path / "one" / "cases.csv").read_bytes()
