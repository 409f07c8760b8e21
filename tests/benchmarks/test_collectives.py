import itertools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import collectives
from selfreg_jax import mesh as meshes

HLO = """HloModule step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%round (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %a = f32[8]{0} get-tuple-element(%carry), index=1
  %part = f32[4]{0} reduce-scatter(%a), channel_id=7, dimensions={0}, to_apply=%add
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %a)
}

%more (carry.1: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%inner (p: bf16[16]) -> bf16[16] {
  %p = bf16[16]{0} parameter(0)
  ROOT %shuffled = bf16[16]{0} all-to-all(%p), channel_id=9, dimensions={0}
}

ENTRY %main (param: f32[4]) -> f32[4] {
  %param = f32[4]{0} parameter(0), metadata={op_name="all-reduce(of a name)"}
  %kernel = f32[3,3,2,4]{3,2,1,0} broadcast(%param), dimensions={3}
  %scale = f32[]{:T(128)} constant(1)
  %flags = pred[5]{0} constant({1, 1, 1, 1, 1})
  %both = (f32[3,3,2,4]{3,2,1,0:T(8,128)}, f32[], /*index=2*/f32[4]{0}) all-reduce(%kernel, %scale, \
/*index=2*/%param), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %begun = f32[4]{0} all-reduce-start(%param), channel_id=2, to_apply=%add
  %done = f32[4]{0} all-reduce-done(%begun)
  %gathering = (pred[5]{0}, pred[10]{0}) all-gather-start(%flags), channel_id=3, dimensions={0}
  %gathered = pred[10]{0} all-gather-done(%gathering)
  %initial = (s32[], f32[8]{0}) tuple(%scale, %param)
  %loop = (s32[], f32[8]{0}) while(%initial), condition=%more, body=%round, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %half = bf16[16]{0} constant({...})
  %started = ((bf16[16]{0}), bf16[16]{0}) async-start(%half), calls=%inner
  %finished = bf16[16]{0} async-done(%started)
  ROOT %copy = f32[4]{0} copy(%done)
}
"""
KINDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 3, "all-to-all": 1}


def test_collectives_are_counted_once_in_pairs_and_as_often_as_loops_run():
  found = collectives.find_collectives(HLO)
  sizes = {"all-reduce": 4 * (72 + 1 + 4) + 16, "all-gather": 5, "reduce-scatter": 3 * 32, "all-to-all": 32}
  for kind, count in KINDS.items():
    assert sum(one.times for one in found if one.kind == kind) == count, kind
    assert sum(one.bytes for one in found if one.kind == kind) == sizes[kind], kind
  assert set(KINDS) == {one.kind for one in found}


def test_a_collective_in_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match=r"reduce-scatter in round, a loop of unknown length"):
    collectives.find_collectives(HLO.replace("known_trip_count", "other"))


def test_gradients_are_told_from_the_rest_by_their_sizes():
  parameters = {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4), "table": jnp.zeros(7)}
  traffic = collectives.measure_traffic(HLO, parameters)
  assert traffic.counts == KINDS
  assert traffic.gradient_bytes == 4 * (72 + 4)
  assert traffic.rest_bytes == sum(traffic.bytes.values()) - traffic.gradient_bytes
  assert traffic.unmatched == 1  # the table


@pytest.mark.parametrize("widths", [(3,), (5, 2), (4, 4, 4)])
def test_a_step_on_two_devices_reduces_each_parameter_once(widths):
  mesh = meshes.make_mesh(jax.devices()[:2])
  sizes = [6, *widths]
  parameters = [
    {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}
    for inputs, outputs in itertools.pairwise(sizes)
  ]

  def step(parameters, x):
    def loss(parameters):
      y = x
      for layer in parameters:
        y = jnp.tanh(y @ layer["kernel"] + layer["bias"])
      return jnp.mean(y)

    return jax.tree.map(jnp.subtract, parameters, jax.grad(loss)(parameters))

  shapes = meshes.replicated_like(jax.eval_shape(lambda: parameters), mesh)
  x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=meshes.split_batch(mesh))
  compiled = jax.jit(step, out_shardings=meshes.replicated(mesh)).lower(shapes, x).compile()
  traffic = collectives.measure_traffic(compiled.as_text(), parameters)
  assert traffic.gradient_bytes == 4 * sum(a * b + b for a, b in itertools.pairwise(sizes))
  assert (traffic.rest_bytes, traffic.unmatched) == (0, 0)
  assert set(traffic.counts) == {"all-reduce"}
