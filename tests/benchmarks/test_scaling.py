import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.collectives import Traffic
from selfreg_jax import mesh as meshes
from selfreg_jax.errors import UserError


def test_the_training_step_moves_its_gradients_and_little_else():
  arguments = scaling.parse_arguments(["--short", "--devices=2", "--chips=1,8", "--step_ms=2"])
  found = scaling.report("unet", arguments, scaling.assumed_machine(arguments))
  json.dumps(found)
  traffic = found["traffic"][2]
  assert set(traffic["counts"]) == {"all-reduce"}
  assert traffic["unmatched"] == 0
  assert traffic["gradient_bytes"] == found["parameter_bytes"] == 4 * found["parameters"]
  assert 0 < traffic["rest_bytes"] < 4096
  assert [row["devices"] for row in found["on_paper"]["estimates"]] == [1, 8]
  scaling.print_report(found, scaling.assumed_machine(arguments))


def test_a_batch_that_the_devices_do_not_divide_is_the_users_mistake():
  arguments = scaling.parse_arguments(["--short", "--batch_size=6"])
  with pytest.raises(UserError, match="batch_size = 6"):
    scaling.compile_step(scaling.make_config("unet", arguments), meshes.make_mesh(jax.devices()[:4]))


def test_the_estimate_is_that_of_a_ring():
  machine = scaling.Machine(within=8, fast=100e9, slow=10e9, hop=1e-6, hops="tree", flops=1e12)
  traffic = Traffic({"all-reduce": 10}, {"all-reduce": 80_000_000}, 79_000_000, 1_000_000, 0)
  one, eight, sixteen = (scaling.estimate(machine, traffic, 0.1, devices) for devices in (1, 8, 16))
  assert dataclasses.astuple(one) == (1, 0, 0, 0, 1, 1)
  np.testing.assert_allclose(eight.gradients, 2 * 7 / 8 * 79e6 / 100e9)
  np.testing.assert_allclose(eight.latency, 10 * 6 * 1e-6)
  np.testing.assert_allclose(eight.efficiency, 0.1 / (0.1 + eight.gradients + eight.rest + eight.latency))
  np.testing.assert_allclose(eight.overlapped, 0.1 / (0.1 + eight.rest + eight.latency))
  np.testing.assert_allclose(sixteen.gradients, 2 * 15 / 16 * 79e6 / 10e9)
  # A short backward pass hides no more than its own time.
  brief = scaling.estimate(machine, traffic, 0.003, 16)
  np.testing.assert_allclose(brief.overlapped, 0.003 / (0.001 + brief.gradients + brief.rest + brief.latency))


def test_hops():
  assert [scaling.hops(shape, 1) for shape in ("tree", "ring", "torus")] == [0, 0, 0]
  assert [scaling.hops(shape, 256) for shape in ("tree", "ring", "torus")] == [16, 510, 32]


def test_flags_change_the_assumed_machine():
  arguments = scaling.parse_arguments(["--machine=v5e", "--fast_gbs=45", "--hop_us=2", "--within=16", "--hops=ring"])
  machine = scaling.assumed_machine(arguments)
  assert (machine.fast, machine.hop, machine.within, machine.hops) == (45e9, 2e-6, 16, "ring")
  assert machine.slow == scaling.MACHINES["v5e"].slow


@pytest.mark.parametrize("flags", [["--network=resnet"], ["--devices=0"], ["--devices=1"], ["--machine=abacus"]])
def test_wrong_flags_exit_with_2(flags, capsys):
  with pytest.raises(SystemExit) as stop:
    scaling.parse_arguments(flags)
  assert stop.value.code == 2
  assert flags[0].partition("=")[2] in capsys.readouterr().err
