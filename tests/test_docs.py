import pathlib
import re

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def blocks(name):
  return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def plugged_in():
  """What the blocks of docs/plug_in.md leave behind, by name, after each of them."""
  namespace, after = {}, []
  for number, block in enumerate(blocks("plug_in.md"), 1):
    exec(compile(block, f"plug_in.md, block {number}", "exec"), namespace)
    after.append(dict(namespace))
  return after


def test_the_page_for_ones_own_code_runs(plugged_in):
  _, sown, tapped, nnx = plugged_in
  assert {"scr", "ifd"} <= set(sown["terms"])
  for namespace in (sown, tapped, nnx):
    assert np.isfinite(namespace["loss"])


def test_sown_and_captured_maps_give_the_same_regularization(plugged_in):
  namespace = plugged_in[-1]
  sr, model, variables = namespace["sr"], namespace["model"], {"params": namespace["params"]}
  images, taps = namespace["images"], namespace["taps"]
  _, updated = model.apply(variables, images, mutable=["features", "intermediates"], capture_intermediates=taps.filter)
  sown, captured = sr.Features.from_sown(updated["features"]), taps.features(updated["intermediates"])
  ours, theirs = (sr.self_regularization(features, namespace["key"])[1] for features in (sown, captured))
  assert ours["scr"] > 0
  assert ours["ifd"] > 0
  np.testing.assert_allclose([ours["scr"], ours["ifd"]], [theirs["scr"], theirs["ifd"]])
