import csv
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from selfreg_jax.analysis import driver, grad_cam, tables
from selfreg_jax.analysis.measuring import ALL, MEAN, Block
from selfreg_jax.analysis.redundancy import Moments
from selfreg_jax.analysis.statistics import find
from selfreg_jax.analysis.taps import TappedNetwork
from selfreg_jax.data import augment
from selfreg_jax.data import manifest as manifests
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import sections
from selfreg_jax.training.checkpoints import load_trained

SLICES = 3


@pytest.fixture(scope="session")
def analysed(runs, tmp_path_factory):
  output = tmp_path_factory.mktemp("output")
  lines = []
  request = driver.Request(slices=SLICES, probe_cases=2, show="disc", example="6:1")
  summary = driver.analyze_workdirs([runs / "one", runs / "two"], request, output=output, say=lines.append)
  return output, summary, lines


def rows_of(output, run, case):
  with (output / "analysis.csv").open(newline="") as file:
    return {
      (row["block"], row["quantity"], row["class"]): float(row["value"] or "nan")
      for row in csv.DictReader(file)
      if row["run"] == str(run) and row["case"] == case
    }


def as_the_network_sees_it(prepared, case_id, indices, size=32):
  manifest = manifests.load(prepared)
  case, arrays = manifest.cases[case_id], manifests.CaseArrays(prepared)
  tables = augment.ResizeTables.build([case.shape[1:3]], size)
  index = np.zeros(len(indices), int)
  image = augment.resize_images(arrays.image(case)[indices].astype(np.float32) * manifest.scale, index, tables)
  return image, np.asarray(augment.resize_labels(jnp.asarray(arrays.label(case)[indices], jnp.int32), index, tables))


def test_all_files_are_there_and_say_the_same(analysed, runs):
  output, summary, lines = analysed
  assert sorted(path.name for path in output.iterdir() if path.name != ".lock") == sorted(driver.RESULTS)
  assert json.loads((output / "analysis.json").read_text()) == json.loads(json.dumps(summary))
  assert [block["name"] for block in summary["runs"][0]["blocks"]] == ["encoder_1", "encoder_2", "decoder_1", "final"]
  for index, name in enumerate(("one", "two")):
    by_case = [rows_of(output, runs / name, case) for case in ("6", "7")]
    for row in summary["runs"][index]["values"]:
      values = np.array([rows[row["block"], row["quantity"], row["class"]] for rows in by_case])
      assert row["n"] == np.sum(~np.isnan(values))
      if row["n"]:
        assert row["mean"] == pytest.approx(np.nanmean(values))
  with np.load(output / "correlations.npz") as matrices:
    assert matrices["1/encoder_2"].shape == (8, 8)
  assert any(line.startswith("2/2 7: 3 slices") for line in lines)


def test_runs_are_compared_case_by_case(analysed, runs):
  output, summary, _ = analysed
  key = ("encoder_2", "mean_abs_correlation", "")
  row = find(summary["comparison"], *key)
  ours, other = (np.array([rows_of(output, runs / name, case)[key] for case in ("6", "7")]) for name in ("one", "two"))
  assert row["difference"] == pytest.approx(np.mean(ours - other))
  assert row["interval"] == pytest.approx(sorted(ours - other))  # of two cases, the extremes are what is drawn
  assert row["n"] == 2


def test_values_of_a_case_are_those_of_its_own_slices(analysed, runs, prepared):
  output, summary, _ = analysed
  found = rows_of(output, runs / "two", "7")
  images, labels = as_the_network_sees_it(prepared, "7", summary["slices"]["7"])
  assert len(images) == SLICES
  trained = load_trained(runs / "two")
  network = TappedNetwork.of(trained.model)
  masks = jax.nn.one_hot(labels, 3)
  explained = jax.jit(lambda v, x, m: grad_cam.grad_cam(network, v, x, m))(trained.variables, images, masks)
  for block in ("encoder_2", "final"):
    channels = np.asarray(explained.maps[block], float).reshape(-1, explained.maps[block].shape[-1])
    r = np.abs(np.corrcoef(channels.T))
    assert found[block, "mean_abs_correlation", ""] == pytest.approx(r[~np.eye(len(r), dtype=bool)].mean(), rel=1e-3)
    eigenvalues = np.linalg.eigvalsh(np.cov(channels.T))
    assert found[block, "effective_rank", ""] == pytest.approx(
      eigenvalues.sum() ** 2 / np.sum(eigenvalues**2), rel=1e-3
    )
    for class_name, evidence, inside in (
      (ALL, explained.evidence[block].sum(axis=0), labels > 0),
      ("square", explained.evidence[block][1], labels == 2),
    ):
      heat = np.asarray(grad_cam.resized(evidence, (32, 32)))
      present = inside.any(axis=(1, 2))
      lit = present & (heat.sum(axis=(1, 2)) > 0)
      shares = (heat * inside).sum(axis=(1, 2))[lit] / heat.sum(axis=(1, 2))[lit]
      share = shares.mean() if lit.any() else np.nan
      assert found[block, "cam_inside", class_name] == pytest.approx(share, abs=1e-3, nan_ok=True)
      assert found[block, "cam_empty", class_name] == pytest.approx(1 - lit.sum() / present.sum())
  assert found["", "class_area", "square"] == pytest.approx((labels == 2).mean())


def test_probes_are_fitted_to_training_cases_and_scored_on_others(analysed, runs, prepared):
  output, summary, _ = analysed
  found = rows_of(output, runs / "two", "7")
  assert set(summary["probe_slices"]) <= set("0123")
  trained = load_trained(runs / "two")
  network = jax.jit(TappedNetwork.of(trained.model))

  def positions(cases):
    """Channels and classes of the final block, whose map has the size of the image."""
    pairs = [as_the_network_sees_it(prepared, case_id, indices) for case_id, indices in cases.items()]
    maps = [np.asarray(network(trained.variables, images)[1]["up2"][0], float) for images, _ in pairs]
    channels = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps])
    return channels, np.eye(3)[np.concatenate([labels.reshape(-1) for _, labels in pairs])]

  x, y = positions(summary["probe_slices"])
  mean, deviation = x.mean(axis=0), x.std(axis=0)
  keep = deviation > 0
  z = (x - mean)[:, keep] / deviation[keep]
  weights = np.linalg.solve(z.T @ z / len(z) + 1e-3 * np.eye(keep.sum()), z.T @ (y - y.mean(axis=0)) / len(z))
  x, truth = positions({"7": summary["slices"]["7"]})
  answer = (x - mean)[:, keep] / deviation[keep] @ weights + y.mean(axis=0)
  explained = 1 - ((truth - answer) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
  for class_id, name in enumerate(("background", "disc", "square")):
    assert found["final", "probe_r2", name] == pytest.approx(explained[class_id], abs=1e-3)
    chosen, true = answer.argmax(axis=1) == class_id, truth[:, class_id] == 1
    dice = 2 * np.sum(chosen & true) / (chosen.sum() + true.sum())
    assert found["final", "probe_dice", name] == pytest.approx(dice, abs=1e-2)
  assert found["final", "probe_r2", MEAN] == pytest.approx(explained[1:].mean(), abs=1e-3)


def test_the_run_is_told_of_its_analysis_and_the_page_stands_alone(analysed, runs):
  output, summary, lines = analysed
  page = (output / "analysis.html").read_text()
  assert "data:image/png;base64," in page
  assert "Paired difference" in page
  assert "{{" not in page
  assert "will have a section" in lines[-1]
  (section,) = sections.read(runs / "one" / "eval" / "test")
  evaluation = {"checkpoint": {"step": 0}, "data": summary["data"]}
  assert section.shown(evaluation) == (section.title, section.content)
  assert "Made of something else" in section.shown(evaluation | {"checkpoint": {"step": 5}})[1]
  assert not (runs / "two" / "eval").exists()


@pytest.mark.parametrize(
  ("workdirs", "change", "message"),
  [
    (["one"], {"cases": ("6", "9")}, r"--cases: 9 is not among the test cases .*: 6, 7"),
    (["one"], {"slices": 0}, r"--slices=0"),
    (["one"], {"example": "5:1"}, r"--example=5:1: CASE:SLICE .*: 6, 7"),
    (["one"], {"example": "7:5"}, r"--example=7:5: 7 has the slices 0 to 4"),
    (["one"], {"show": "liver"}, r"--show=liver: .*disc, square"),
    (["one", "one"], {}, r"--compare=.*same workdir"),
    (["one", "swin"], {}, r"other blocks"),
    (["nowhere"], {}, r"nowhere: not the workdir"),
    (["one"], {"data": "nowhere"}, r"nowhere: no such folder"),
  ],
)
def test_mistakes_are_told_before_anything_is_written(runs, tmp_path, workdirs, change, message):
  with pytest.raises(UserError, match=message):
    driver.analyze_workdirs([runs / name for name in workdirs], driver.Request(**change), output=tmp_path / "output")
  assert not (tmp_path / "output").exists()


def test_the_folder_of_an_ablation_is_told_from_a_run_and_its_runs_are_named(tmp_path):
  (tmp_path / "runs" / "none" / "seed_0").mkdir(parents=True)
  with pytest.raises(UserError, match=r"is the folder of an ablation; give one of its runs: .*runs/none/seed_0"):
    driver.analyze_workdirs([tmp_path], driver.Request(), output=tmp_path / "output")


def test_too_few_positions_for_a_probe_are_said():
  blocks = [Block("encoder_1", (16, 16), 8), Block("encoder_2", (2, 2), 8)]
  moments = {block.name: dataclasses.replace(Moments.zero(11), count=np.prod(block.size) * 6) for block in blocks}
  (line,) = driver.few_positions(blocks, moments)
  assert "the probe of encoder_2 reads 8 channels after 24 positions" in line


def test_slices_are_spread_over_those_with_foreground(prepared):
  case = manifests.load(prepared).cases["7"]
  assert driver.choose_slices(case, 99) == list(case.foreground_slices)
  case = manifests.load(prepared).cases["6"]
  object.__setattr__(case, "foreground_slices", tuple(range(10, 31)))
  assert driver.choose_slices(case, 3) == [13, 20, 27]
  for most in range(1, 21):
    chosen = driver.choose_slices(case, most)
    assert len(set(chosen)) == most
    assert most < 3 or np.ptp(np.diff(chosen)) <= 1
  object.__setattr__(case, "foreground_slices", ())
  assert driver.choose_slices(case, 4) == [0, 1, 2, 3]


def test_tables_fit_a_terminal_of_a_hundred_columns(analysed):
  _, summary, _ = analysed
  console = Console(width=100, record=True, file=io.StringIO())
  tables.print_summary(summary, console)
  text = console.export_text()
  assert "\N{HORIZONTAL ELLIPSIS}" not in text.replace(summary["runs"][0]["workdir"], "")
  row = find(summary["comparison"], "encoder_2", "effective_rank")
  assert f"{row['difference']:+.2f}" in text
  assert f"[{row['interval'][0]:+.2f}, {row['interval'][1]:+.2f}]" in text
