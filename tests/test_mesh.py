import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfreg_jax import mesh as meshes


def summed_products(x):
  return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)


@pytest.mark.parametrize("compile_with", ["jit_for", "jit"])
@pytest.mark.parametrize("rows", [32769, 40000])
def test_products_that_are_summed_up_are_right_in_every_row(compile_with, rows):
  # By default the CPU compiler of jaxlib 0.10.2 gets one of 32,769 rows wrong, and 7,232 of 40,000.
  first = np.linspace(0, 1, rows, dtype=np.float32)
  x = np.stack([first, 0 * first, 0 * first], axis=1)
  jitted = meshes.jit(summed_products) if compile_with == "jit" else meshes.jit_for(meshes.make_mesh(), summed_products)
  np.testing.assert_allclose(jitted(x), first**2, rtol=1e-5)


def test_the_pinned_compiler_knows_its_options():
  if jax.__version__ != "0.10.2":
    pytest.skip("another version than requirements.txt pins may have renamed them")
  assert meshes.compiler_options("cpu")
  assert len(meshes.compiler_options("cpu", once=True)) > len(meshes.compiler_options("cpu"))
  assert not meshes.compiler_options("gpu", once=True)
