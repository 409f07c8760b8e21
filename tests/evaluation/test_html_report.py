import base64
import dataclasses
import html.parser
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from selfreg_jax.data import published
from selfreg_jax.data.manifest import Intensity
from selfreg_jax.evaluation import html_report, protocols
from tests.evaluation import made_up

VOID = {"meta", "link", "input", "br", "img"}


class Page(html.parser.HTMLParser):
  """A page's elements, scripts and visible text; unbalanced elements fail."""

  def __init__(self, text):
    super().__init__()
    self.open, self.scripts, self.words, self.attributes = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag == "script":
      self.scripts.append((dict(attrs), ""))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      attributes, text = self.scripts[-1]
      self.scripts[-1] = (attributes, text + data)
    elif "style" not in self.open:
      self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())

  @property
  def data(self):
    (content,) = (json.loads(text) for attributes, text in self.scripts if attributes.get("id") == "data")
    return content

  @property
  def pictures(self):
    return [json.loads(text) for attributes, text in self.scripts if attributes.get("class") == "pictures"]


def write(tmp_path, arguments, **options):
  html_report.write_report(tmp_path / "report.html", **arguments, **options)
  assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
  return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def decode(content):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_page_holds_tables_scores_and_settings_and_asks_no_network(tmp_path):
  arguments = made_up.volumes_dataset(options={"tta": True, "resize": "logits", "postprocess": False})
  page = write(tmp_path, arguments)
  assert "For research, not for clinical use." in page.text
  assert "test, 3 cases" in page.text
  assert "step 900 (validation Dice 83.12 %)" in page.text
  assert "tta, resize = logits" in page.text
  assert '"learning_rate": 0.05' in page.text
  assert '"jax": "0.10.2"' in page.text
  mean = arguments["summary"]["protocols"]["sound"]["mean"]
  assert f"mean {100 * mean['dice']:.2f}" in page.text
  for tag, name, value in page.attributes:
    assert name not in ("src", "action", "data", "srcset"), (tag, name)
    assert name != "href" or value == "data:,"
  text = (tmp_path / "report.html").read_text()
  assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
  assert "https://" not in text
  assert "{{" not in text


def test_cases_come_worst_first_with_the_scores_of_every_class(tmp_path):
  arguments = made_up.volumes_dataset()
  data = write(tmp_path, arguments).data
  assert data["cases"] == ["case_2", "case_1", "case_0"]
  dice = data["protocols"]["sound"][0]
  assert (dice["name"], dice["title"], dice["factor"]) == ("dice", "Dice %", 100)
  expected = [[arguments["scores"]["sound"][case][c]["dice"] for c in (1, 2)] for case in data["cases"]]
  assert dice["values"] == expected
  assert [metric["title"] for metric in data["protocols"]["paper"]][2:] == ["HD95 voxel", "ASSD voxel"]


def test_pictures_are_in_the_radiological_view_and_hold_both_class_maps(tmp_path):
  arguments = made_up.volumes_dataset(1, shape=(9, 40, 30), axcodes=("S", "R", "A"), spacing=(5.0, 1.0, 2.0))
  image, truth, prediction = arguments["load_case"]("case_0")
  truth[4, 2, 3] = 2  # near the patient's left and the back
  (pictures,) = write(tmp_path, arguments).pictures
  assert (pictures["left"], pictures["top"]) == ("R", "A")
  assert pictures["size"] == [40, 30]
  assert pictures["aspect"] == pytest.approx(40 * 1.0 / (30 * 2.0))
  assert pictures["indices"] == list(range(9))
  labels = decode(pictures["labels"][4])
  np.testing.assert_array_equal(labels[..., 0], truth[4].T[::-1, ::-1])
  np.testing.assert_array_equal(labels[..., 1], prediction[4].T[::-1, ::-1])
  assert labels[30 - 1 - 3, 40 - 1 - 2, 0] == 2
  shown = decode(pictures["images"][4])[..., 0].astype(float)
  stored = image[4, ..., 0].T[::-1, ::-1]
  assert np.corrcoef(shown.ravel(), stored.ravel())[0, 1] > 0.8
  confusion = [np.sum((truth[4] == 1) & (prediction[4] == 1)), np.sum(truth[4] == 1), np.sum(prediction[4] == 1)]
  disc = 2 * confusion[0] / (confusion[1] + confusion[2])
  ring = 2 * np.sum((truth[4] == 2) & (prediction[4] == 2)) / (np.sum(truth[4] == 2) + np.sum(prediction[4] == 2))
  assert pictures["dice"][4] == pytest.approx((disc + ring) / 2, abs=1e-4)
  assert pictures["dice"][0] is None


def test_the_viewer_opens_at_the_slice_with_most_errors(tmp_path):
  arguments = made_up.volumes_dataset(1)
  _, truth, prediction = arguments["load_case"]("case_0")
  prediction[6] = 1 - (truth[6] == 1)
  (pictures,) = write(tmp_path, arguments).pictures
  assert pictures["opening"] == 6


def test_colour_images_are_shown_as_they_are_and_large_ones_made_smaller(tmp_path):
  arguments = made_up.images_dataset(1, shape=(300, 1200))
  image, truth, _ = arguments["load_case"]("image_0")
  (pictures,) = write(tmp_path, arguments).pictures
  assert pictures["size"] == [512, 128]
  assert pictures["aspect"] == pytest.approx(4)
  assert (pictures["left"], pictures["top"]) == ("", "")
  assert "of 1200" in pictures["note"]
  reduced = np.asarray(Image.fromarray(image[0]).resize((512, 128), Image.Resampling.BOX)).astype(float)
  assert np.abs(decode(pictures["images"][0]) - reduced).mean() < 10
  labels = decode(pictures["labels"][0])
  assert set(np.unique(labels[..., 0])) == {0, 1}
  assert labels[..., 0].mean() == pytest.approx(truth.mean(), abs=0.005)


def test_z_scores_are_stretched_and_of_odd_numbers_of_channels_the_first_is_shown(tmp_path):
  truth = np.zeros((3, 20, 20), np.uint8)
  image = np.zeros((3, 20, 20, 4), np.float32)
  image[..., 0] = np.linspace(-3, 3, 20)
  manifest = made_up.make_manifest(
    [made_up.make_case("a", image.shape)], intensity=Intensity("zscore"), dtype="float32", scale=1.0, channels=4
  )
  page = write(tmp_path, made_up.evaluation(manifest, lambda case_id: (image, truth, truth)))
  (pictures,) = page.pictures
  assert "the first of 4 channels" in pictures["note"]
  shown = decode(pictures["images"][1])[10, :, 0].astype(int)
  assert shown[0] < 20
  assert shown[-1] > 235
  assert pictures["opening"] == 1  # nothing is foreground: the middle


def test_nothing_scored_and_no_orientation_are_no_obstacle(tmp_path):
  empty = np.zeros((4, 8, 8), np.uint8)
  image = np.zeros((4, 8, 8, 1), np.uint16)
  manifest = made_up.make_manifest([made_up.make_case(name, image.shape) for name in ("b", "a")])
  page = write(tmp_path, made_up.evaluation(manifest, lambda case_id: (image, empty, empty)))
  data = page.data
  assert data["cases"] == ["a", "b"]
  assert data["protocols"]["sound"][0]["values"] == [[None, None]] * 2
  assert data["protocols"]["sound"][0]["classes"] == [None, None]
  assert page.pictures[0]["dice"] == [None] * 4
  assert "NaN" not in (tmp_path / "report.html").read_text()


def test_unscored_cases_come_after_the_best():
  def table(dice):
    return {1: {"dice": dice}, 2: {"dice": math.nan}}

  scores = {"none": table(math.nan), "good": table(0.9), "bad": table(0.1), "also bad": table(0.1)}
  assert html_report.worst_first(scores, scores) == ["also bad", "bad", "good", "none"]


EVIL = "</script><script>alert(1)</script><!--\"&'<img src=x onerror=alert(2)>{{data}}\u2028"


def test_names_cannot_break_out_of_the_page(tmp_path):
  arrays = made_up.volumes_dataset(1)["load_case"]("case_0")
  manifest = made_up.make_manifest(
    [made_up.make_case(EVIL, arrays[0].shape)], classes=("background", EVIL, "<b>"), dataset=EVIL
  )
  arguments = made_up.evaluation(manifest, lambda case_id: arrays, options={EVIL: EVIL}, config={EVIL: EVIL})
  page = write(tmp_path, arguments, sections=[(EVIL, "<p>fine</p>")])
  assert len(page.scripts) == 3  # data, pictures, the page's own
  assert not [attribute for attribute in page.attributes if attribute[1] in ("src", "onerror")]
  assert page.data["cases"] == [EVIL]
  assert page.data["classes"][1]["name"] == EVIL
  assert "{{data}}" in page.text
  assert "<p>fine</p>" in (tmp_path / "report.html").read_text()


def test_json_in_a_script_element_reads_back_equal_and_holds_no_markup():
  content = {"a": [EVIL, math.inf, np.float64(0.5), (1, None)], "b": {1: True}}
  text = html_report.embed_json(content)
  assert not set(text) & set("<>&")
  assert json.loads(text) == {"a": [EVIL, None, 0.5, [1, None]], "b": {"1": True}}


@pytest.mark.parametrize(
  ("change", "shown"),
  [
    ({}, True),
    ({"dataset": "monuseg"}, True),
    ({"dataset": "msd"}, False),
    ({"split": "val"}, False),
  ],
)
def test_published_numbers_stand_beside_ours_only_where_they_measure_the_same(tmp_path, change, shown):
  page = write(tmp_path, made_up.images_dataset(2, **change))
  assert ("Source: " in page.text) == shown
  assert ("this evaluation" in page.text) == shown
  if shown:
    assert page.text.count("this evaluation") == 1  # the paper protocol's table only
    for score in published.PUBLISHED_SCORES[change.get("dataset", "glas")]:
      assert f"{score.dice:.2f}" in page.text
    assert published.SCORES_SOURCE in page.text


def test_published_numbers_are_withheld_from_another_set_of_classes(tmp_path):
  arguments = made_up.volumes_dataset(1)
  manifest = dataclasses.replace(arguments["manifest"], dataset="synapse")
  page = write(tmp_path, arguments | {"manifest": manifest})
  assert "TransUNet" not in page.text


def test_published_scores_are_of_known_datasets_and_in_percent():
  assert set(published.PUBLISHED_SCORES) == set(published.PUBLISHED)
  for scores in published.PUBLISHED_SCORES.values():
    assert len({score.method for score in scores}) == len(scores)
    assert all(50 < score.dice < 100 for score in scores)


def test_more_sections_can_be_added(tmp_path):
  page = write(tmp_path, made_up.images_dataset(1), sections=[("Redundancy", "<p>of channels</p>"), ("Maps", "")])
  assert "Redundancy of channels Maps" in page.text


def test_metrics_that_the_page_does_not_know_are_shown_too(tmp_path):
  arguments = made_up.images_dataset(2)
  sound = arguments["summary"]["protocols"]["sound"]
  sound["mean"]["new_metric"] = sound["classes"]["gland"]["new_metric"] = 0.125
  page = write(tmp_path, arguments)
  assert "new metric" in page.text
  assert page.data["protocols"]["sound"][-1]["values"] == [[None], [None]]


def test_a_large_dataset_stays_below_the_limit_and_the_page_says_what_is_missing(tmp_path):
  limit = 300_000
  arguments = made_up.volumes_dataset(20, shape=(30, 48, 48))
  page = write(tmp_path, arguments, limit=limit)
  assert 0.7 * limit < (tmp_path / "report.html").stat().st_size < limit
  pictures = page.pictures
  assert len(pictures) == 20
  shown = [len(case["indices"]) for case in pictures]
  assert min(shown[:3]) > max(shown[3:])  # the worst are shown best
  assert "To keep this page under 0.3 MB" in page.text
  assert "of 20 cases only every k-th slice" in page.text
  for case in pictures:
    assert len(case["images"]) == len(case["labels"]) == len(case["indices"]) == len(case["dice"])
    assert np.unique(np.diff(case["indices"])).size <= 1
    assert f"the other {30 - len(case['indices'])} of 30 are left out" in case["note"]
    assert case["dice"][case["opening"]] is not None


def test_cases_are_left_out_where_thinning_is_not_enough(tmp_path):
  limit = 150_000
  arguments = made_up.volumes_dataset(20, shape=(30, 48, 48))
  loaded = []

  def load_case(case_id):
    loaded.append(case_id)
    return arguments["load_case"](case_id)

  page = write(tmp_path, arguments | {"load_case": load_case}, limit=limit)
  assert (tmp_path / "report.html").stat().st_size < limit
  assert 3 <= len(page.pictures) < 20
  assert f"{20 - len(page.pictures)} of 20 cases have no pictures" in page.text
  assert loaded == page.data["cases"][: len(loaded)]  # worst first, one by one, and no more than are needed
  assert len(loaded) == len(page.pictures) + 1
  assert len(page.data["cases"]) == 20


def test_slices_without_foreground_are_left_out_before_others(tmp_path):
  arguments = made_up.volumes_dataset(8, shape=(24, 48, 48))
  size = len(str(write(tmp_path, arguments, limit=10**7).pictures))
  page = write(tmp_path, arguments, limit=(tmp_path / "report.html").stat().st_size - int(0.04 * size))
  ranged = [case for case in page.pictures if "which hold all foreground" in case["note"]]
  assert ranged
  for case in ranged:
    assert case["indices"] == list(range(case["indices"][0], case["indices"][-1] + 1))
    assert None not in (case["dice"][0], case["dice"][-1])
  assert "from first to last foreground" in page.text


def test_a_limit_below_the_tables_leaves_the_tables(tmp_path):
  page = write(tmp_path, made_up.images_dataset(2), limit=1000)
  assert page.pictures == []
  assert "2 of 2 cases have no pictures" in page.text


def test_the_protocols_are_those_of_the_evaluation():
  assert {protocol for protocol, _ in html_report._CAPTIONS} == set(protocols.PROTOCOLS)
