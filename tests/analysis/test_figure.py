import dataclasses
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from selfreg_jax.analysis import figure, statistics
from selfreg_jax.analysis.driver import Plan, RunAnalysis
from selfreg_jax.analysis.measuring import ALL, MEAN, Block, Example
from tests.evaluation.made_up import make_case, make_manifest

BLOCKS = {
  "unet": ["encoder_1", "encoder_2", "decoder_1", "final"],
  "swin": ["encoder_1/first", "encoder_1/last", "encoder_2", "decoder_1/first", "decoder_1/last", "final"],
}


def made_up(network, number, *, size=16):
  """Runs, summary and plan of a network's analysis, of noise."""
  rng = np.random.default_rng(0)
  names = BLOCKS[network]
  case = make_case("case$1$", (3, 20, 10, 1), spacing=(5.0, 1.0, 1.5), axcodes=("S", "R", "A"))
  plan = Plan((), make_manifest([case]), pathlib.Path(), [case], {}, {}, (case.id, 1), ALL)
  truth = np.zeros((size, size), int)
  truth[4:9, 5:12] = 1
  runs, entries = [], []
  for index in range(number):
    keys = [("", "class_area", ALL)]
    for name in names:
      keys += [(name, "cam_inside", ALL), (name, "probe_r2", MEAN)]
      keys += [(name, quantity, "") for quantity in ("mean_abs_correlation", "effective_rank", "constant_channels")]
    values = {f"c{n}": {key: rng.random() for key in keys} for n in range(3)}
    heatmaps = {name: rng.random((size, size)) for name in names} | {"final": np.zeros((size, size))}
    run = RunAnalysis(
      workdir=pathlib.Path(f"runs/run_{index}"), checkpoint={}, config={}, values=values, pooled=values["c0"],
      blocks=[Block(name, (4, 4), 6) for name in names],
      correlations={name: np.corrcoef(rng.normal(size=(6, 20))) for name in names},
      example=Example(rng.random((size, size, 1)), truth, np.roll(truth, 2, 0), heatmaps),
    )  # fmt: skip
    runs.append(run)
    rows = statistics.means(values, {}, resamples=20)
    entries.append({"workdir": str(run.workdir), "values": rows, "blocks": list(map(dataclasses.asdict, run.blocks))})
  return runs, {"runs": entries}, plan


@pytest.mark.parametrize(
  ("network", "number", "pictures"), [("unet", 1, 2 + 4), ("unet", 2, 2 * 6), ("swin", 2, 2 * 8)]
)
def test_every_block_of_every_run_has_its_picture_and_its_matrix(network, number, pictures):
  runs, summary, plan = made_up(network, number)
  drawing = figure.draw(runs, summary, plan)
  matrices, bars, curves = number * len(BLOCKS[network]), 2, 3
  assert len(drawing.axes) == pictures + matrices + bars + curves
  for axes in drawing.axes:
    box = axes.get_position()
    assert 0 <= box.x0 < box.x1 <= 1
    assert 0 <= box.y0 < box.y1 <= 1
  boxes = [axes.get_position() for axes in drawing.axes]
  overlaps = [a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index]]
  assert not any(overlaps)
  assert sum("no evidence" in [text.get_text() for text in axes.texts] for axes in drawing.axes) == number


def test_pictures_are_in_the_radiological_view_and_files_can_be_read():
  runs, summary, plan = made_up("unet", 1)
  drawing = figure.draw(runs, summary, plan)
  shown = np.asarray(drawing.axes[0].images[0].get_array())
  np.testing.assert_allclose(shown, runs[0].example.image[..., 0].T[::-1, ::-1])
  box = drawing.axes[0].get_window_extent()
  # 20 rows of 1 mm lie along the picture's columns, 10 columns of 1.5 mm along its rows.
  assert box.height / box.width == pytest.approx(15 / 20)
  picture = Image.open(io.BytesIO(figure.render(drawing, "png")))
  assert picture.size == tuple(round(150 * inches) for inches in drawing.get_size_inches())
  document = figure.render(drawing, "pdf")
  assert document.startswith(b"%PDF")
  assert document == figure.render(figure.draw(runs, summary, plan), "pdf")


@pytest.mark.parametrize(
  ("workdirs", "names"),
  [
    (["runs/selfreg/"], ["selfreg"]),
    (["terms/runs/selfreg/seed_0"], ["selfreg/seed_0"]),
    (["runs/selfreg", "runs/baseline"], ["selfreg", "baseline"]),
    (["a/selfreg/seed_0", "b/none/seed_0"], ["selfreg/seed_0", "none/seed_0"]),
    (["run", "old/run"], ["run", "old/run"]),
  ],
)
def test_runs_are_named_so_that_they_can_be_told_apart(workdirs, names):
  assert figure.run_names(workdirs) == names
