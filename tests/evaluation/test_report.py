import csv
import io
import json
import math

import numpy as np
import pytest
from matplotlib import image as mpl_image
from rich import console

from selfreg_jax.evaluation import protocols, report

NAMES = ("background", "a rather long class name", "[b]spleen", "aorta")


def scores(dice, **change):
  row = {"dice": dice, "jaccard": dice / 2, "hd95": 12.346, "assd": 1.5, "nsd": 0.25}
  row |= {"volume_difference": -2.5, "missed": 0.0, "invented": 0.0}
  return row | change


def not_scored():
  return dict.fromkeys(protocols.METRICS["sound"], math.nan) | {"missed": 0.0, "invented": 0.0}


CASES = {
  "0001": {1: scores(0.5), 2: not_scored(), 3: scores(0.0, hd95=100.0, missed=1.0)},
  "0002": {1: scores(0.75), 2: not_scored(), 3: scores(1.0)},
}


def printed(protocol, cases=CASES, **options):
  block = protocols.summarize(cases, NAMES, protocol=protocol, resamples=200)
  stream = io.StringIO()
  report.print_table(block, console.Console(file=stream, width=100, no_color=True), protocol=protocol, **options)
  return stream.getvalue()


def test_table_of_the_sound_protocol():
  text = printed("sound")
  lines = text.splitlines()
  assert all(len(line) <= 100 for line in lines)
  assert "…" not in text
  assert "HD95 mm" in text
  (row,) = [line for line in lines if "62.50 [50.00, 75.00]" in line]
  assert row.split()[-6:] == ["12.35", "1.50", "25.00", "2", "0", "0"]
  (row,) = [line for line in lines if "[b]spleen" in line]
  assert row.split() == ["[b]spleen", "-", "-", "-", "-", "0", "0", "0"]
  (row,) = [line for line in lines if "aorta" in line]
  assert row.split() == ["aorta", "50.00", "[0.00,", "100.00]", "56.17", "1.50", "25.00", "2", "1", "0"]
  (row,) = [line for line in lines if line.strip().startswith("mean")]
  assert row.split()[1] == "56.25"
  assert row.split()[-3:] == ["2", "1", "0"]


def test_table_of_the_paper_protocol_and_other_units():
  text = printed("paper")
  assert "HD95 voxels" in text
  assert "NSD" not in text
  assert "HD95 pixels" in printed("sound", unit="pixels")


def test_widest_table_fits():
  worst = {case: {c: scores(1.0, hd95=1234.5, assd=1234.5, nsd=1.0) for c in (1, 2, 3)} for case in ("a", "b")}
  for protocol in protocols.PROTOCOLS:
    text = printed(protocol, worst)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("100.00 [100.00, 100.00]") == 4
    assert "1234.50" in text


def test_csv_of_cases(tmp_path):
  paper = {"0001": {1: {"dice": 0.1, "jaccard": 1 / 3, "hd95": 2.0, "assd": 1.0, "missed": 0.0, "invented": 1.0}}}
  report.write_cases_csv(tmp_path / "cases.csv", {"sound": CASES, "paper": paper}, NAMES)
  with open(tmp_path / "cases.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 7
  assert rows[0] == {
    "protocol": "sound",
    "case": "0001",
    "class_id": "1",
    "class": NAMES[1],
    "dice": "0.5",
    "jaccard": "0.25",
    "hd95": "12.346",
    "assd": "1.5",
    "nsd": "0.25",
    "volume_difference": "-2.5",
    "missed": "0",
    "invented": "0",
  }
  assert rows[1]["dice"] == rows[1]["nsd"] == ""
  assert rows[2]["missed"] == "1"
  assert float(rows[6]["jaccard"]) == 1 / 3
  assert (rows[6]["protocol"], rows[6]["nsd"], rows[6]["invented"]) == ("paper", "", "1")
  assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_summary_is_strict_json(tmp_path):
  path = tmp_path / "summary.json"
  path.write_text("old")
  summary = {
    "protocols": {"sound": protocols.summarize(CASES, NAMES, protocol="sound", resamples=10)},
    "cases": np.int64(2),
    "config": {"rate": float("nan"), "limit": np.float32(np.inf), "widths": (64, 128), "array": np.arange(2)},
    "checkpoint": {"step": 7},
    "versions": {},
  }
  report.write_summary(path, summary)

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  read = json.loads(path.read_text(), parse_constant=refuse)
  assert read["config"] == {"rate": None, "limit": None, "widths": [64, 128], "array": [0, 1]}
  assert read["protocols"] == summary["protocols"]
  assert read["protocols"]["sound"]["classes"]["[b]spleen"]["dice"] is None
  with pytest.raises(TypeError):
    report.write_summary(path, {"config": object()})
  assert json.loads(path.read_text()) == read
  assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_colors_are_fixed_by_class():
  colors = report.class_colors(17)
  assert colors.shape == (17, 3)
  assert colors[1].tolist() == [0xD5, 0x5E, 0x00]
  np.testing.assert_array_equal(report.class_colors(4), colors[:4])
  np.testing.assert_array_equal(report.class_colors(18)[17], colors[1])


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
@pytest.mark.parametrize(
  ("sight", "least"),
  [
    (np.eye(3), 0.13),
    ([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]], 0.07),
    ([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]], 0.09),
  ],
  ids=["normal", "deuteranopic", "protanopic"],
)
def test_colors_differ_for_every_sight(sight, least):
  share = report.class_colors(17)[1:] / 255
  linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
  to_lms = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.629979]]
  to_lab = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.9779985, -2.4285922, 0.4505937],
    [0.0259040, 0.7827718, -0.808676],
  ]
  oklab = np.cbrt(np.clip(linear @ np.transpose(sight), 0, 1) @ np.transpose(to_lms)) @ np.transpose(to_lab)
  distances = np.linalg.norm(oklab[:, None] - oklab, axis=-1)
  assert distances[~np.eye(16, dtype=bool)].min() > least


# For each view: what the picture's top and left must show.
@pytest.mark.parametrize(
  ("slice_axis", "top", "left"), [("S", "A", "R"), ("I", "A", "R"), ("A", "S", "R"), ("P", "S", "R"), ("R", "S", "A")]
)
@pytest.mark.parametrize("flip_top", [False, True])
@pytest.mark.parametrize("flip_left", [False, True])
@pytest.mark.parametrize("top_is_rows", [False, True])
def test_radiological_view(slice_axis, top, left, flip_top, flip_left, top_is_rows):
  opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
  codes = [opposite[top] if flip_top else top, opposite[left] if flip_left else left]
  # An index that grows to the side in question has its corner at the end, one that grows away from it at 0.
  corner = [0 if flip_top else -1, 0 if flip_left else -1]
  if not top_is_rows:
    codes, corner = codes[::-1], corner[::-1]
  for channels in ((), (3,)):
    array = np.zeros((4, 6, *channels))
    array[tuple(corner)] = 1
    turned = report.radiological(array, (slice_axis, *codes))
    assert turned.shape == ((4, 6) if top_is_rows else (6, 4)) + channels
    assert np.all(turned[0, 0] == 1)
    assert turned.sum() == array.sum()


def test_radiological_view_of_a_prepared_axial_slice():
  array = np.arange(6).reshape(2, 3)  # rows grow to the right, columns to the front
  np.testing.assert_array_equal(report.radiological(array, ("S", "R", "A")), [[5, 2], [4, 1], [3, 0]])


@pytest.mark.parametrize("codes", [("S", "R", "L"), ("S", "R", None), ("X", "R", "A"), ("S", "R")])
def test_radiological_view_refuses_what_is_no_frame(codes):
  with pytest.raises(ValueError, match="axcodes"):
    report.radiological(np.zeros((2, 2)), codes)


def test_overlay_paints_contours_and_insides():
  image, classes = np.full((9, 9), 0.5), np.zeros((9, 9), np.uint8)
  classes[2:7, 2:7] = 2
  picture = report.overlay(image, classes, num_classes=3)
  color = report.class_colors(3)[2]
  assert picture.dtype == np.uint8
  assert set(picture[0, 0].tolist()) == {128}
  np.testing.assert_array_equal(picture[2, 4], color)
  inside = picture[4, 4].astype(int)
  assert np.all((inside - 127.5) * (color.astype(int) - 127.5) > 0)  # drawn towards the class's colour
  assert np.any(inside != color)
  large = report.overlay(image, classes, num_classes=3, enlarge=4, contour=2)
  assert large.shape == (36, 36, 3)
  edge = np.all(large == color, axis=-1)
  assert edge[8:10, 8:28].all()
  assert not edge[10, 10:26].any()


def test_panel():
  rng = np.random.default_rng(0)
  images = [rng.random((8, 10)), rng.random((6, 10, 3)), rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)]
  truths = [np.zeros(image.shape[:2], np.uint8) for image in images]
  predictions = [np.zeros(image.shape[:2], np.uint8) for image in images]
  truths[0][:, :] = 1
  predictions[1][2, 3] = 2
  panel = report.overlay_panel(images, truths, predictions, NAMES)
  assert panel.shape == (3 * 8 + 4, 3 * 10 + 4, 3)
  assert panel.dtype == np.uint8
  np.testing.assert_array_equal(
    panel[:8, :10], np.round(images[0] * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
  )
  assert np.any(panel[:8, 12:22] != panel[:8, :10])
  np.testing.assert_array_equal(panel[:8, 24:], panel[:8, :10])
  np.testing.assert_array_equal(
    panel[10 + 1 + 2, 24 + 3], report.class_colors(3)[2]
  )  # a row lower: 6 rows in a tile of 8
  np.testing.assert_array_equal(panel[20:, 1:9], images[2].repeat(3, axis=-1))
  with pytest.raises(ValueError, match="prediction holds ids"):
    report.overlay_panel(images[:1], truths[:1], [truths[0] + 5], NAMES)
  with pytest.raises(ValueError, match="truth has the shape"):
    report.overlay_panel(images[:1], truths[1:2], predictions[:1], NAMES)
  with pytest.raises(ValueError, match="0 images"):
    report.overlay_panel([], [], [], NAMES)


@pytest.fixture
def drawn(monkeypatch):
  """What `overlay_case` hands to the drawing, beside the picture itself."""
  calls = []
  draw = report._draw_grid

  def record(columns, captions, **options):
    calls.append({"columns": columns, "captions": captions, **options})
    return draw(columns, captions, **options)

  monkeypatch.setattr(report, "_draw_grid", record)
  return calls


def made_up_case():
  truth = np.zeros((7, 20, 30), np.uint8)
  truth[1:6, 4:14, 5:15] = 1
  prediction = truth.copy()
  prediction[2, 4:6] = 0  # Dice 0.889
  prediction[3, 4:8] = 0  # Dice 0.75
  prediction[4, 4:9] = 0  # Dice 0.667
  prediction[5] = 0  # Dice 0
  prediction[6, 0, 0] = 3  # Dice 0 also, but smaller
  image = np.linspace(0, 1, truth.size, dtype=np.float32).reshape(truth.shape)
  return image, truth, prediction


def test_overlay_of_a_case(tmp_path, drawn):
  image, truth, prediction = made_up_case()
  report.overlay_case(
    tmp_path / "case.png",
    image,
    truth,
    prediction,
    class_names=NAMES,
    axcodes=("S", "R", "A"),
    spacing=(5, 1, 2),
    title="case_1 costs $5 and $6",
  )
  assert [path.name for path in tmp_path.iterdir()] == ["case.png"]
  picture = mpl_image.imread(tmp_path / "case.png")
  (call,) = drawn
  assert list(call["columns"]) == ["image", "truth", "prediction", "errors"]
  assert call["captions"] == ["best\nslice 1\nDice 1.000", "median\nslice 3\nDice 0.750", "worst\nslice 5\nDice 0.000"]
  assert call["aspect"] == pytest.approx(30 * 2 / (20 * 1))  # the picture's rows are the array's columns
  assert (call["sides"].left, call["sides"].top) == ("R", "A")
  assert [list(legend) for legend in call["legends"]] == [[NAMES[1]], ["missed"]]
  # Three rows and four columns of pictures three times as high as wide.
  assert 1000 < picture.shape[0] < 2400
  assert 600 < picture.shape[1] < picture.shape[0]
  assert picture[..., :3].std() > 0.1
  shown = call["columns"]["image"][0]
  enlarge = shown.shape[0] // 30
  assert shown.shape == (30 * enlarge, 20 * enlarge, 3)
  assert shown[0, 0, 0] == np.round(255 * image[1, -1, -1])


def test_overlay_without_truth(tmp_path, drawn):
  image, _, prediction = made_up_case()
  rgb = np.repeat(image[..., None], 3, axis=-1)
  options = {"class_names": NAMES, "spacing": (1, 1, 1), "title": "unlabelled"}
  report.overlay_case(tmp_path / "case.png", rgb, None, prediction, axcodes=None, **options)
  (call,) = drawn
  assert list(call["columns"]) == ["image", "prediction"]
  assert call["captions"] == ["largest\nslice 1\n100 px", "median\nslice 3\n60 px", "smallest\nslice 6\n1 px"]
  assert list(call["legends"][0]) == [NAMES[1], NAMES[3]]
  assert call["sides"].left == ""
  assert call["columns"]["image"][0].shape[0] < call["columns"]["image"][0].shape[1]


def test_overlay_of_few_slices(tmp_path, drawn):
  image, truth, prediction = made_up_case()
  options = {"class_names": NAMES, "axcodes": ("A", "S", "R"), "spacing": (1, 1, 1), "title": "few"}
  report.overlay_case(tmp_path / "0.png", image[..., None], 0 * truth, 0 * truth, **options)
  report.overlay_case(tmp_path / "1.png", image[:2], truth[:2], prediction[:2], **options)
  report.overlay_case(tmp_path / "2.png", image[:3] * 900, truth[:3], prediction[:3], **options)
  report.overlay_case(tmp_path / "3.png", image, None, 0 * truth, **options)
  captions = [call["captions"] for call in drawn]
  assert captions[0] == captions[3] == ["slice 3\nno foreground"]
  assert captions[1] == ["slice 1\nDice 1.000"]
  assert captions[2] == ["best\nslice 1\nDice 1.000", "worst\nslice 2\nDice 0.889"]
  assert len(list(tmp_path.glob("*.png"))) == 4


def test_overlay_names_the_kinds_of_error(tmp_path, drawn):
  truth = np.array([[[1, 1, 0, 2]]], np.uint8)
  prediction = np.array([[[1, 0, 1, 3]]], np.uint8)
  options = {"class_names": NAMES, "axcodes": None, "spacing": (1, 1, 1), "title": "errors"}
  report.overlay_case(tmp_path / "case.png", np.zeros((1, 1, 4)), truth, prediction, **options)
  (call,) = drawn
  assert list(call["legends"][1]) == ["missed", "extra", "wrong class"]
  strip = call["columns"]["errors"][0][0, 64::128]
  np.testing.assert_array_equal(strip, [(0, 0, 0), *call["legends"][1].values()])


def test_overlay_refusals(tmp_path):
  image, truth, prediction = made_up_case()
  options = {"class_names": NAMES, "axcodes": ("S", "R", "A"), "spacing": (1, 1, 1), "title": ""}
  for arrays, change, message in [
    ((image[:, :5], truth, prediction), {}, "prediction has the shape"),
    ((image, truth[:5], prediction), {}, "truth has the shape"),
    ((image, truth, prediction), {"class_names": NAMES[:2]}, "prediction holds ids"),
    ((image, truth, prediction), {"spacing": (1, 1)}, "spacing"),
    ((image, truth, prediction), {"axcodes": ("S", "S", "A")}, "axcodes"),
    ((image[0], truth[0], prediction[0]), {}, "slice, row, column"),
    ((np.zeros((*image.shape, 2)), truth, prediction), {}, "grey or RGB"),
  ]:
    with pytest.raises(ValueError, match=message):
      report.overlay_case(tmp_path / "case.png", *arrays, **{**options, **change})
  assert not list(tmp_path.iterdir())
