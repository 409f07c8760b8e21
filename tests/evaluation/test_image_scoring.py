import csv
import dataclasses
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import ndimage

import selfreg_jax as sr
from selfreg_jax.data import manifest as manifests
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import case_scores, class_maps, prediction, scoring
from selfreg_jax.evaluation.options import Options
from selfreg_jax.predictor import load_trained
from tests.evaluation.made_datasets import write_image_dataset, write_pack_dataset, write_run


def quiet():
  return Console(width=100, record=True, file=open("/dev/null", "w"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / "tissue"
  write_image_dataset(folder)
  return folder


@pytest.fixture(scope="module")
def workdir(images, tmp_path_factory):
  return write_run(images, tmp_path_factory.mktemp("runs") / "tissue")


def threshold_predictor(workdir, level=0.47):
  """The workdir's predictor with a network whose answer is known: class 1 where red is bright."""
  predictor = sr.load(workdir)
  predictor.predict_fn = lambda images: (
    images[..., :1] * np.array([0, 1], np.float32) - np.array([0, level], np.float32)
  )
  return predictor


@pytest.fixture(scope="module")
def scored(workdir, images, tmp_path_factory):
  output, console = tmp_path_factory.mktemp("eval"), quiet()
  summary = scoring.score_dataset(threshold_predictor(workdir), None, split="test", output=output, console=console)
  return output, summary, console.export_text()


def rows_of(output, protocol):
  with (output / "cases.csv").open() as file:
    return {row["case"]: row for row in csv.DictReader(file) if row["protocol"] == protocol}


def test_images_are_scored_as_images_at_their_own_size(scored, images):
  output, summary, printed = scored
  manifest, rows = manifests.load(images), rows_of(output, "sound")
  assert (summary["unit"], summary["volume_unit"], summary["kind"]) == ("pixel", "pixels", "image")
  assert summary["protocols"]["sound"]["mean"]["dice"] > 0.9
  assert "HD95 pixels" in printed
  for case in manifest.split("test"):
    with Image.open(output / "predictions" / f"{case.id}.png") as picture:
      classes = np.asarray(picture)
    assert classes.shape == case.shape[1:3]
    assert set(np.unique(classes)) <= {0, 255}
    truth = np.load(images / case.label, allow_pickle=False)[0]
    expected = sr.evaluate_case((classes > 0).astype(np.uint8), truth, num_classes=2, spacing=(1, 1))[1]
    for metric in ("dice", "hd95", "assd", "nsd", "volume_difference"):
      assert float(rows[case.id][metric]) == pytest.approx(expected[metric], rel=1e-9)
    excess = np.count_nonzero(classes) - np.count_nonzero(truth)
    assert float(rows[case.id]["volume_difference"]) == excess
  assert sorted(path.name for path in (output / "overlays").iterdir()) == ["tissue_4.png", "tissue_5.png"]


def test_the_paper_protocol_counts_at_the_networks_size(scored, images, workdir):
  output, summary, _ = scored
  manifest, rows, predictor = manifests.load(images), rows_of(output, "paper"), threshold_predictor(workdir)
  dice = []
  for case in manifest.split("test"):
    label, image = np.load(images / case.label, allow_pickle=False)[0], np.load(images / case.image, allow_pickle=False)
    small = ndimage.zoom(label, (32 / label.shape[0], 32 / label.shape[1]), order=0)
    _, (classes,) = predictor.slices.classes_of_both_sizes(predictor.predict_fn, image, scale=manifest.scale)
    both = np.count_nonzero(classes & small)
    dice.append(2 * both / (classes.sum() + small.sum() + 1e-5))
    assert float(rows[case.id]["dice"]) == pytest.approx(dice[-1], rel=1e-9)
    assert float(rows[case.id]["jaccard"]) == pytest.approx(both / np.count_nonzero(classes | small), rel=1e-9)
  assert summary["protocols"]["paper"]["mean"]["dice"] == pytest.approx(np.mean(dice))


def test_worker_processes_change_nothing(scored, workdir, tmp_path):
  output, _, printed = scored
  console = quiet()
  predictor = threshold_predictor(workdir)
  scoring.score_dataset(predictor, None, split="test", output=tmp_path, console=console, workers=2)
  names = ["cases.csv", *(f"{folder}/tissue_{n}.png" for folder in ("predictions", "overlays") for n in (4, 5))]
  for name in names:
    assert (tmp_path / name).read_bytes() == (output / name).read_bytes()
  lines = [
    [line.split(",")[0] for line in text.splitlines() if "tissue_" in line] for text in (printed, console.export_text())
  ]
  assert lines[0] == lines[1]


def test_a_dead_worker_is_a_clear_error():
  with pytest.raises(UserError, match=r"a process that scores cases died.*--workers=2"):
    list(case_scores.score_all(os._exit, [9, 9, 9], workers=2))


def test_workers_do_not_import_jax():
  code = "import sys, selfreg_jax.evaluation.case_scores; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_few_predictions_wait_for_the_scorers():
  made = []

  def predictions():
    for number in range(12):
      made.append(number)
      yield number

  seen = []
  for outcome in case_scores.score_all(abs, predictions(), workers=2):
    seen.append(outcome)
    assert len(made) - len(seen) <= 2
  assert seen == list(range(12))


def test_options_are_reported_and_change_the_result(workdir, tmp_path):
  predictor = scoring.Predictor(load_trained(workdir), options=Options(tta=True, resize="logits", postprocess=True))
  predictor.predict_fn = threshold_predictor(workdir, level=0.3).predict_fn  # speckled
  console = quiet()
  summary = scoring.score_dataset(predictor, None, split="test", output=tmp_path, console=console)
  assert summary["options"] == {"tta": True, "resize": "logits", "postprocess": True}
  assert "tta, resize=logits, postprocess" in console.export_text()
  assert summary["postprocess_removed_voxels"] > 0
  for path in (tmp_path / "predictions").iterdir():
    with Image.open(path) as picture:
      assert ndimage.label(np.asarray(picture), np.ones((3, 3)))[1] <= 1


def test_current_results_are_taken_and_outdated_ones_are_not(workdir, monkeypatch):
  request = scoring.Request()
  first = scoring.evaluate_workdir(workdir, request, console=quiet(), reuse=True)
  monkeypatch.setattr(scoring, "load_trained", lambda *_, **__: pytest.fail("the network was loaded"))
  again = scoring.evaluate_workdir(workdir, request, console=quiet(), reuse=True)
  np.testing.assert_equal(again.scores, first.scores)
  assert again.summary == json.loads(json.dumps(first.summary))
  for change in ({"split": "val"}, {"options": Options(tta=True)}):
    assert scoring.current(workdir, first.output, dataclasses.replace(request, **change)) is None
  summary = json.loads((first.output / "summary.json").read_text())
  summary["checkpoint"]["step"] += 1
  (first.output / "summary.json").write_text(json.dumps(summary))
  assert scoring.current(workdir, first.output, request) is None


def test_a_folder_of_images_becomes_a_folder_of_masks(workdir, images, tmp_path):
  (tmp_path / "in").mkdir()
  array = np.load(images / "cases/tissue_4.image.npy", allow_pickle=False)[0]
  Image.fromarray(array).save(tmp_path / "in" / "a.png")
  Image.fromarray(array).save(tmp_path / "in" / "b.TIF", format="TIFF")
  Image.fromarray(array[..., 0]).save(tmp_path / "in" / "grey.bmp")
  (tmp_path / "in" / "bad.png").write_text("no image")
  predictor = sr.load(workdir)
  with pytest.raises(UserError, match=r"1 of 4 files(.|\n)*bad.png: "):
    prediction.predict_folder(predictor, tmp_path / "in", tmp_path / "out", probabilities=True, console=quiet())
  expected, probabilities = predictor(array, probabilities=True)
  assert expected.shape == array.shape[:2]
  for name in ("a", "b"):
    with Image.open(tmp_path / "out" / f"{name}.png") as picture:
      np.testing.assert_array_equal(np.asarray(picture), 255 * expected)
    np.testing.assert_array_equal(
      np.load(tmp_path / "out" / f"{name}_probabilities.npy", allow_pickle=False), probabilities
    )
  with Image.open(tmp_path / "out" / "grey.png") as picture:
    np.testing.assert_array_equal(np.asarray(picture), 255 * predictor(array[..., 0]))


@pytest.mark.parametrize("shape", [(4,), (8, 8, 2), (2, 8, 8, 3)])
def test_arrays_that_are_no_such_image_are_refused(workdir, shape):
  with pytest.raises(ValueError, match=r"expected an image|3 channel"):
    sr.load(workdir)(np.random.default_rng(0).uniform(0, 1, shape))


def test_class_maps_of_more_than_two_classes_hold_ids(tmp_path):
  classes = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
  class_maps.write_png(tmp_path / "x.png", classes, num_classes=3)
  with Image.open(tmp_path / "x.png") as picture:
    np.testing.assert_array_equal(np.asarray(picture), classes)


def test_volumes_without_a_grid_are_written_on_their_own_axes(prepared, tmp_path):
  manifest = write_pack_dataset(tmp_path / "pack", prepared)
  case = dataclasses.replace(manifest.split("test")[0], spacing=(3.0, 0.5, 0.75))
  classes = np.random.default_rng(0).integers(0, 3, case.shape[:3]).astype(np.uint8)
  path = tmp_path / "x.nii.gz"
  class_maps.write_case(path, classes, case, manifest)
  saved = nib.load(path)
  np.testing.assert_array_equal(np.asarray(saved.dataobj), np.moveaxis(classes, 0, -1))
  np.testing.assert_array_equal(saved.affine, np.diag([0.5, 0.75, 3.0, 1.0]))
  np.testing.assert_array_equal(class_maps.read_case(path, case, manifest), classes)


def test_volumes_of_several_channels_are_predicted(workdir):
  predictor = sr.load(workdir)
  predictor.dataset = dataclasses.replace(
    predictor.dataset, kind="volume", channels=2, intensity=manifests.Intensity("minmax")
  )
  seen = []

  def second_is_brighter(images):
    seen.append(images.shape[-1])
    return images[..., 1:] * np.array([0.0, 1.0], np.float32) + images[..., :1] * np.array([1.0, 0.0], np.float32)

  predictor.predict_fn = second_is_brighter
  volume = np.zeros((32, 32, 3, 2), np.float32)
  volume[:16, :, :, 0], volume[16:, :, :, 1] = 7, 900
  classes = predictor(volume, affine=np.eye(4))
  assert set(seen) == {2}
  np.testing.assert_array_equal(classes, np.broadcast_to(np.arange(32)[:, None, None] >= 16, (32, 32, 3)))


def test_files_of_channels_belong_together(tmp_path):
  for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b.nii", "c_0001.nii.gz", "note.txt"):
    (tmp_path / name).touch()
  found = prediction.find_inputs(tmp_path, tmp_path / "out", channels=2)
  assert {name: [path.name for path in paths] for name, paths in found.items()} == {
    "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
    "b": ["b.nii"],
    "c_0001": ["c_0001.nii.gz"],
  }
  # Without exactly the channels that the network takes, numbers are part of the name: files are cases of their own.
  assert list(prediction.find_inputs(tmp_path, tmp_path / "out", channels=3)) == ["a_0000", "a_0001", "b", "c_0001"]


def test_numbered_images_are_cases_of_their_own(tmp_path):
  names = [f"tile_{number:04d}" for number in (1, 2, 3)]
  for name in names:
    (tmp_path / f"{name}.png").touch()
  assert list(prediction.find_inputs(tmp_path, tmp_path / "out", kind="image", channels=3)) == names
  assert list(prediction.find_inputs(tmp_path, tmp_path / "out", kind="image", channels=1)) == names
