import json
import math
import subprocess
import sys

import numpy as np
import pytest

from selfreg_jax.evaluation import metrics, protocols

NAMES = ("background", "liver", "spleen", "aorta")
SPACING = (5.0, 1.5, 1.25)


def volume(*boxes, shape=(6, 8, 10)):
  """Class map with box n (z0, z1, y0, y1, x0, x1) filled with class n + 1; None leaves a class out."""
  classes = np.zeros(shape, np.uint8)
  for class_id, extent in enumerate(boxes, start=1):
    if extent is not None:
      z0, z1, y0, y1, x0, x1 = extent
      classes[z0:z1, y0:y1, x0:x1] = class_id
  return classes


HERE, THERE = (1, 4, 1, 5, 1, 4), (1, 4, 2, 6, 5, 9)


def test_golden_of_both_protocols(golden):
  reference = golden("metrics")
  tables = protocols.evaluate_protocols(
    reference["pred"], reference["gt"], num_classes=4, spacing=reference["spacing_zyx_mm"], tolerance=2.0
  )
  for class_id in (1, 2, 3):
    values = dict(zip(reference["columns"], reference[f"class{class_id}"], strict=True))
    paper, sound = tables["paper"][class_id], tables["sound"][class_id]
    percase = reference[f"class{class_id}_reference_percase"]
    assert [paper[name] for name in ("dice", "hd95", "jaccard", "assd")] == pytest.approx(percase, abs=1e-9)
    assert paper["hd95"] == pytest.approx(values["hd95_voxels"], abs=1e-9)
    assert [sound[name] for name in ("dice", "jaccard", "hd95", "assd")] == pytest.approx(
      [values[name] for name in ("dice", "jaccard", "hd95_mm", "assd_mm")], abs=1e-9
    )
    assert 0 < sound["nsd"] < 1
    assert sound["missed"] == sound["invented"] == 0
  assert protocols.evaluate_case(reference["pred"], reference["gt"], num_classes=4, protocol="paper") == tables["paper"]


def test_golden_of_a_whole_volume(golden):
  reference = golden("volume_protocol")
  table = protocols.evaluate_case(reference["prediction"], reference["label"], num_classes=4, protocol="paper")
  found = [[table[class_id][name] for name in ("dice", "hd95", "jaccard", "assd")] for class_id in (1, 2, 3)]
  np.testing.assert_allclose(found, reference["metrics_dice_hd95_jaccard_assd_per_class"], atol=1e-9)


@pytest.mark.parametrize(
  ("prediction", "truth", "key"),
  [(HERE, None, "pred_only"), (None, HERE, "gt_only"), (None, None, "both_empty")],
)
def test_paper_protocol_of_empty_classes(golden, prediction, truth, key):
  expected = golden("metrics")[f"reference_percase_{key}"]
  table = protocols.evaluate_case(volume(prediction), volume(truth), num_classes=2, protocol="paper")
  assert [table[1][name] for name in ("dice", "hd95", "jaccard", "assd")] == expected.tolist()
  assert table[1]["missed"] == (key == "gt_only")
  assert table[1]["invented"] == (key == "pred_only")


def test_sound_protocol_of_missed_invented_and_absent_classes():
  table = protocols.evaluate_case(volume(None, HERE), volume(HERE, None), num_classes=4, spacing=SPACING)
  diagonal = math.sqrt((6 * 5) ** 2 + (8 * 1.5) ** 2 + (10 * 1.25) ** 2)
  worst = {"dice": 0, "jaccard": 0, "hd95": diagonal, "assd": diagonal, "nsd": 0}
  voxels = 3 * 4 * 3 * 5 * 1.5 * 1.25 / 1000  # of the box, in millilitres
  assert table[1] == pytest.approx({**worst, "volume_difference": -voxels, "missed": 1, "invented": 0})
  assert table[2] == pytest.approx({**worst, "volume_difference": voxels, "missed": 0, "invented": 1})
  assert table[3].pop("missed") == table[3].pop("invented") == 0
  assert list(table[3]) == ["dice", "jaccard", "hd95", "assd", "nsd", "volume_difference"]
  assert all(math.isnan(value) for value in table[3].values())


def test_sound_protocol_measures_in_millimetres():
  moved = (HERE[0] + 1, HERE[1] + 1, *HERE[2:])
  sound = protocols.evaluate_case(volume(moved), volume(HERE), num_classes=2, spacing=SPACING, tolerance=4.9)[1]
  assert sound["hd95"] == 5.0
  assert sound["dice"] == pytest.approx(2 / 3)
  assert sound["nsd"] < 1
  lenient = protocols.evaluate_case(volume(moved), volume(HERE), num_classes=2, spacing=SPACING, tolerance=5.0)[1]
  assert lenient["nsd"] == 1
  paper = protocols.evaluate_case(volume(moved), volume(HERE), num_classes=2, spacing=SPACING, protocol="paper")[1]
  assert paper["hd95"] == 1.0


def test_a_perfect_prediction():
  table = protocols.evaluate_case(volume(HERE, THERE), volume(HERE, THERE), num_classes=3, spacing=SPACING)
  expected = {"dice": 1, "jaccard": 1, "hd95": 0, "assd": 0, "nsd": 1, "volume_difference": 0}
  expected |= {"missed": 0, "invented": 0}
  assert table == {1: expected, 2: expected}


def test_images_under_the_paper_protocol():
  truth, prediction = np.zeros((2, 8, 8), np.uint8)
  truth[2:6, 2:6] = 1
  empty = protocols.evaluate_case(prediction, truth, num_classes=2, protocol="paper")[1]
  assert (empty["dice"], empty["jaccard"], empty["missed"]) == (0, 0, 1)
  assert math.isnan(empty["hd95"])
  assert protocols.evaluate_case(truth, prediction, num_classes=2, protocol="paper")[1]["dice"] == 0
  prediction[2:6, 3:7] = 1
  scores = protocols.evaluate_case(prediction, truth, num_classes=2, protocol="paper")[1]
  assert scores["dice"] == 24 / (32 + 1e-5)
  assert scores["jaccard"] == 12 / 20
  assert scores["hd95"] == 1
  sound = protocols.evaluate_case(prediction, truth, num_classes=2, spacing=(1, 1))[1]
  assert sound["dice"] == 0.75
  assert sound["nsd"] == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"spacing": None}, "give the spacing"),
    ({"spacing": (1, 1)}, "3 positive"),
    ({"spacing": (1, 1, -1)}, "positive"),
    ({"protocol": "fair"}, "unknown protocol 'fair'; the protocols are sound, paper"),
    ({"truth": np.zeros((6, 8, 9), np.uint8)}, "one shape"),
    ({"truth": np.full((6, 8, 10), 2)}, "truth holds ids"),
    ({"prediction": np.zeros((6, 8, 10))}, "integer class ids"),
    ({"prediction": np.zeros((2, 6, 8, 10), int)}, "row, column"),
    ({"prediction": np.zeros((0, 8, 10), int)}, "not empty"),
  ],
)
def test_refusals(change, message):
  arguments = {"prediction": volume(HERE), "truth": volume(HERE), "num_classes": 2, "spacing": SPACING, **change}
  with pytest.raises(ValueError, match=message):
    protocols.evaluate_case(arguments.pop("prediction"), arguments.pop("truth"), **arguments)


def test_validation_dice_is_the_sound_protocols():
  rng = np.random.default_rng(0)
  pairs = [rng.integers(0, 3, (2, 4, 6, 5)) for _ in range(3)]
  pairs[1][:, pairs[1].max(axis=0) == 2] = 0  # class 2 is in neither array of this case
  pairs[2][0][pairs[2][0] == 1] = 0  # class 1 is missed
  cases, tables = [], {}
  for number, (prediction, truth) in enumerate(pairs):
    cases.append(protocols.dice_per_class(metrics.confusion_matrix(prediction, truth, num_classes=4)))
    tables[str(number)] = protocols.evaluate_case(prediction, truth, num_classes=4, spacing=(1, 1, 1))
    expected = [tables[str(number)][class_id]["dice"] for class_id in (1, 2, 3)]
    np.testing.assert_array_equal(cases[-1], expected)
  assert math.isnan(cases[1][1])
  assert cases[2][0] == 0
  summary = protocols.summarize(tables, NAMES, protocol="sound", resamples=10)
  assert protocols.mean_foreground_dice(cases) == summary["mean"]["dice"]
  assert math.isnan(protocols.mean_foreground_dice([np.full(3, np.nan)]))


def made_up_cases(values, missed=None):
  """Sound tables in which every metric of case i, class j is values[i, j], nsd half of it."""
  missed = np.zeros(values.shape) if missed is None else missed
  names = protocols.METRICS["sound"]
  return {
    f"case{i}": {
      j + 1: {name: value / 2 if name == "nsd" else value for name in names} | {"missed": missed[i, j], "invented": 0.0}
      for j, value in enumerate(row)
    }
    for i, row in enumerate(values)
  }


def test_means_over_cases_then_classes():
  nan = math.nan
  values = np.array([[1.0, 0.0, nan], [0.5, nan, nan], [0.6, nan, nan]])
  missed = np.array([[0, 1.0, 0], [0, 0, 0], [0, 0, 0]])
  summary = protocols.summarize(made_up_cases(values, missed), NAMES, protocol="sound")
  assert summary["cases"] == 3
  assert summary["mean"]["dice"] == pytest.approx((0.7 + 0.0) / 2)  # the mean over all four scores is 0.525
  assert summary["mean"]["nsd"] == pytest.approx(0.175)
  liver, spleen, aorta = (summary["classes"][name] for name in NAMES[1:])
  assert liver["dice"] == pytest.approx(0.7)
  assert (liver["n"], liver["missed"], liver["invented"]) == (3, 0, 0)
  assert (spleen["n"], spleen["missed"], spleen["dice"]) == (1, 1, 0)
  assert spleen["interval"]["dice"] is None
  assert (aorta["n"], aorta["dice"], aorta["interval"]["dice"]) == (0, None, None)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_bootstrap_is_the_plain_loop():
  rng = np.random.default_rng(1)
  values = rng.random((7, 3))
  values[rng.random((7, 3)) < 0.3] = np.nan
  values[:, 2] = [np.nan] * 5 + [0.2, 0.9]  # in some resamples nobody scores this class
  summary = protocols.summarize(made_up_cases(values), NAMES, protocol="sound", resamples=500, seed=3)
  draws, overall, per_class = np.random.default_rng(3), [], []
  for _ in range(500):
    sample = values[draws.integers(0, 7, size=7)]
    scores = [column[~np.isnan(column)] for column in sample.T]
    per_class.append([column.mean() if len(column) else np.nan for column in scores])
    overall.append(np.mean([column.mean() for column in scores if len(column)]))
  assert np.isnan(per_class).any()
  assert summary["interval"]["dice"] == pytest.approx(np.percentile(overall, (2.5, 97.5)), abs=1e-12)
  for j, name in enumerate(NAMES[1:]):
    expected = np.nanpercentile(np.array(per_class)[:, j], (2.5, 97.5))
    assert summary["classes"][name]["interval"]["dice"] == pytest.approx(expected, abs=1e-12)


def test_bootstrap_does_not_depend_on_its_memory(monkeypatch):
  cases = made_up_cases(np.random.default_rng(2).random((9, 3)))
  whole = protocols.summarize(cases, NAMES, protocol="sound", resamples=200)
  monkeypatch.setattr(protocols, "_BOOTSTRAP_ENTRIES", 70)
  assert protocols.summarize(cases, NAMES, protocol="sound", resamples=200) == whole


def test_bootstrap_of_many_cases_is_normal():
  values = np.random.default_rng(4).normal(0.8, 0.1, (200, 3))
  summary = protocols.summarize(made_up_cases(values), NAMES, protocol="sound")
  means = values.mean(axis=1)
  half = 1.96 * means.std() / math.sqrt(200)
  assert summary["interval"]["dice"] == pytest.approx([means.mean() - half, means.mean() + half], abs=0.1 * half)


def test_bootstrap_of_constant_cases_has_no_width():
  summary = protocols.summarize(made_up_cases(np.full((5, 3), 0.25)), NAMES, protocol="sound")
  assert summary["interval"]["dice"] == [0.25, 0.25]


def test_one_case_has_no_interval():
  summary = protocols.summarize(made_up_cases(np.array([[0.5, 0.7, 0.9]])), NAMES, protocol="sound")
  assert summary["mean"]["dice"] == pytest.approx(0.7)
  assert summary["interval"] == dict.fromkeys(protocols.METRICS["sound"])
  assert summary["classes"]["liver"]["interval"] == dict.fromkeys(protocols.METRICS["sound"])


def test_paper_block_has_the_papers_metrics():
  tables = {
    str(n): protocols.evaluate_case(volume(HERE, None, extent), volume(HERE), num_classes=4, protocol="paper")
    for n, extent in enumerate((None, THERE))
  }
  summary = protocols.summarize(tables, NAMES, protocol="paper", resamples=50)
  assert list(summary["mean"]) == ["dice", "jaccard", "hd95", "assd"]
  assert summary["mean"]["dice"] == pytest.approx((1 + 0 + 0.5) / 3)
  assert (summary["classes"]["spleen"]["n"], summary["classes"]["spleen"]["dice"]) == (2, 0)
  assert (summary["classes"]["aorta"]["invented"], summary["classes"]["aorta"]["dice"]) == (1, 0.5)


def test_summary_refusals():
  cases = made_up_cases(np.ones((2, 3)))
  with pytest.raises(ValueError, match="no cases"):
    protocols.summarize({}, NAMES, protocol="sound")
  with pytest.raises(ValueError, match=r"'case0' holds classes \[1, 2, 3\], expected 1..2"):
    protocols.summarize(cases, NAMES[:3], protocol="sound")
  with pytest.raises(ValueError, match="differ"):
    protocols.summarize(cases, ("background", "a", "a", "b"), protocol="sound")
  with pytest.raises(ValueError, match="no cases"):
    protocols.mean_foreground_dice([])


def test_scoring_does_not_import_jax():
  code = "import sys, selfreg_jax.evaluation.protocols; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_volume_difference_is_signed_and_physical():
  truth = np.zeros((4, 5, 6), np.uint8)
  truth[1:3, 1:3, 1:3] = 1  # 8 voxels
  prediction = np.zeros_like(truth)
  prediction[1:3, 1:3, 1:4] = 1  # 12 voxels
  table = protocols.evaluate_case(prediction, truth, num_classes=3, spacing=(2.0, 0.5, 3.0))
  assert table[1]["volume_difference"] == pytest.approx(4 * 3.0 / 1000)  # millilitres
  assert math.isnan(table[2]["volume_difference"])
  missed = protocols.evaluate_case(np.zeros_like(truth), truth, num_classes=2, spacing=(2.0, 0.5, 3.0))
  assert missed[1]["volume_difference"] == pytest.approx(-8 * 3.0 / 1000)
  image = protocols.evaluate_case(prediction[1], truth[1], num_classes=2, spacing=(0.5, 3.0))
  assert image[1]["volume_difference"] == 2 * 1.5
