import csv
import json

import jax
import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

import selfreg_jax as sr
from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.prepare import PrepareOptions, prepare
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import class_maps, prediction, scoring
from selfreg_jax.training.loop import train_and_evaluate
from tests.conftest import make_small_config
from tests.evaluation.test_inference import threshold_fn


@pytest.fixture(scope="module")
def workdir(prepared, tmp_path_factory):
  """A workdir that has learned `prepared` well enough to tell its classes."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  config = make_small_config(prepared)
  config.optimizer.learning_rate = 3e-2
  config.train.steps, config.train.validate_every, config.train.log_every = 120, 60, 40
  train_and_evaluate(config, folder, devices=jax.devices()[:1])
  return folder


def quiet():
  return Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))


@pytest.fixture(scope="module")
def scored(workdir, prepared, tmp_path_factory):
  output = tmp_path_factory.mktemp("eval")
  console = quiet()
  summary = scoring.score_dataset(sr.load(workdir), prepared, split="test", output=output, console=console)
  return output, summary, console.export_text()


def test_a_trained_network_scores_well_and_the_summary_says_how(scored):
  output, summary, _ = scored
  assert json.loads((output / "summary.json").read_text()) == json.loads(json.dumps(summary))
  assert set(summary) >= {"protocols", "cases", "config", "checkpoint", "versions"}
  assert summary["cases"] == 2
  sound = summary["protocols"]["sound"]
  assert sound["mean"]["dice"] > 0.7
  assert set(sound["classes"]) == {"disc", "square"}
  assert sound["classes"]["disc"]["n"] == 2
  assert summary["checkpoint"]["step"] in (60, 120)
  assert summary["peak_memory_gib"] > 0


def test_scores_are_those_of_the_saved_predictions(scored, prepared):
  output, _, _ = scored
  manifest = manifests.load(prepared)
  rows = list(csv.DictReader((output / "cases.csv").open()))
  for case in manifest.split("test"):
    saved = nib.load(output / "predictions" / f"{case.id}.nii.gz")
    source = nib.load(f"{manifest.source}/{case.sources['label']}")
    np.testing.assert_array_equal(saved.affine, source.affine)
    table = sr.evaluate_case(
      np.asarray(saved.dataobj), np.asarray(source.dataobj), num_classes=3, spacing=saved.header.get_zooms()
    )
    for row in rows:
      if row["case"] == case.id and row["protocol"] == "sound":
        for metric in ("dice", "hd95", "assd"):
          np.testing.assert_allclose(float(row[metric]), table[int(row["class_id"])][metric], rtol=1e-9)


def test_tables_and_pictures_are_made(scored):
  output, _, printed = scored
  assert "sound protocol" in printed
  assert "paper protocol" in printed
  assert "disc" in printed
  assert sorted(path.name for path in (output / "overlays").iterdir()) == ["6.png", "7.png"]


def test_scoring_refuses_what_does_not_fit(workdir, prepared, tmp_path, monkeypatch):
  manifest = manifests.load(prepared)
  object.__setattr__(manifest, "classes", ("background", "square", "disc"))
  object.__setattr__(manifest, "intensity", manifests.Intensity("minmax"))
  monkeypatch.setattr(manifests, "load", lambda directory, verify: manifest)
  with pytest.raises(UserError) as error:
    scoring.score_dataset(sr.load(workdir), prepared, split="test", output=tmp_path, console=quiet())
  assert "classes: trained with ('background', 'disc', 'square')" in str(error.value)
  assert "intensity" in str(error.value)


def test_the_predictor_gives_what_evaluation_gives(workdir, prepared, scored):
  output, _, _ = scored
  manifest = manifests.load(prepared)
  predictor = sr.load(workdir)
  for case in manifest.split("test"):
    raw = nib.load(f"{manifest.source}/{case.sources['image']}")
    classes = predictor(np.asarray(raw.dataobj), affine=raw.affine)
    saved = np.asarray(nib.load(output / "predictions" / f"{case.id}.nii.gz").dataobj)
    # Stored images are rounded to 16 bits, which may turn a tie.
    assert np.mean(classes != saved) < 1e-3


def test_best_and_latest_checkpoints_can_be_chosen(workdir):
  assert sr.load(workdir, checkpoint="latest").step == 120
  assert sr.load(workdir).step in (60, 120)


AFFINES = {
  "LPS": np.diag([-2.0, -1.5, 4.0, 1.0]),
  "permuted": np.array([[0, 0, 2.0, -30], [-1.5, 0, 0, 10], [0, 4.0, 0, 5], [0, 0, 0, 1.0]]),
  "oblique": np.array([[1.96, 0.26, 0.3, 3], [-0.35, 1.45, -0.2, -7], [-0.1, 0.1, 3.98, 11], [0, 0, 0, 1.0]]),
}


def threshold_predictor(workdir):
  """The workdir's predictor with a network whose answer is known: class 1 where the raw value is above 100."""
  predictor = sr.load(workdir)
  predictor.predict_fn = lambda images: threshold_fn(4 * images - 2.5)  # (-200, 200) is mapped to (0, 1)
  return predictor


@pytest.mark.parametrize("name", list(AFFINES))
def test_saved_predictions_overlay_their_input_voxel_by_voxel(workdir, tmp_path, name):
  rng = np.random.default_rng(0)
  shape = (40, 9, 33) if name == "permuted" else (33, 40, 9)
  array = np.full(shape, -20, np.int16)
  corner = rng.integers(4, 8, 3) // (np.array(shape) < 10).astype(int).clip(1) % np.array(shape)
  block = tuple(slice(int(c), int(c) + max(n // 3, 2)) for c, n in zip(corner, shape, strict=True))
  array[block] = 190
  image = nib.Nifti1Image(array, AFFINES[name])
  image.set_sform(AFFINES[name], code=4)
  image.set_qform(AFFINES[name], code=2)
  image.header.set_xyzt_units("mm")
  image.header["descrip"] = b"a scanner's remark"
  (tmp_path / "in").mkdir()
  nib.save(image, tmp_path / "in" / "case_0000.nii.gz")
  predictor = threshold_predictor(workdir)
  predictor.slices.image_size = 120  # a multiple: edges stay where they are
  folders = tmp_path / "in", tmp_path / "out"
  (target,) = prediction.predict_folder(predictor, *folders, probabilities=True, console=quiet())
  assert target.name == "case.nii.gz"
  saved = nib.load(target)
  assert saved.shape == image.shape
  np.testing.assert_array_equal(saved.affine, image.affine)
  for field in ("qform_code", "sform_code", "xyzt_units", "descrip", "quatern_b", "pixdim", "srow_x"):
    np.testing.assert_array_equal(saved.header[field], nib.load(tmp_path / "in" / "case_0000.nii.gz").header[field])
  assert saved.get_data_dtype() == np.uint8
  truth = array > 100
  classes = np.asarray(saved.dataobj)
  overlap = 2 * np.sum(truth & (classes == 1)) / (truth.sum() + (classes == 1).sum())
  assert overlap > 0.95
  probabilities = nib.load(tmp_path / "out" / "case_probabilities.nii.gz")
  assert probabilities.shape == (*image.shape, 3)
  np.testing.assert_array_equal(np.asarray(probabilities.dataobj).argmax(-1), classes)


def test_prepared_cases_return_to_the_grid_of_their_files(tmp_path, workdir):
  """The truth, written as if it were the prediction, equals the label file voxel by voxel."""
  source = tmp_path / "raw"
  source.mkdir()
  rng = np.random.default_rng(1)
  for name, affine in AFFINES.items():
    shape = (12, 5, 14) if name == "permuted" else (12, 14, 5)
    nib.save(nib.Nifti1Image(rng.integers(-300, 300, shape).astype(np.int16), affine), source / f"{name}_img.nii.gz")
    nib.save(nib.Nifti1Image(rng.integers(0, 3, shape).astype(np.uint8), affine), source / f"{name}_seg.nii.gz")
  manifest = prepare(
    PrepareOptions(
      dataset="msd", source=source, output=tmp_path / "out", image_glob="*_img.nii.gz", label_glob="*_seg.nii.gz",
      num_classes=3, window=(-200.0, 200.0), workers=1, val_fraction=0.0,
    )
  )  # fmt: skip
  arrays = manifests.CaseArrays(tmp_path / "out")
  for case in manifest.cases.values():
    class_maps.write_case(tmp_path / "back.nii.gz", np.asarray(arrays.label(case)), case, manifest)
    saved, label = nib.load(tmp_path / "back.nii.gz"), nib.load(source / f"{case.id}_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(label.dataobj))
    np.testing.assert_array_equal(saved.affine, label.affine)


def test_bad_files_stop_no_other_and_are_all_named(workdir, tmp_path):
  (tmp_path / "in").mkdir()
  nib.save(
    nib.Nifti1Image(np.random.default_rng(0).normal(size=(9, 9, 3)).astype(np.float32), np.eye(4)),
    tmp_path / "in/good.nii.gz",
  )
  (tmp_path / "in/text.nii.gz").write_text("no image")
  (tmp_path / "in/empty.nii").write_bytes(b"")
  with pytest.raises(UserError) as error:
    prediction.predict_folder(sr.load(workdir), tmp_path / "in", tmp_path / "out", probabilities=False, console=quiet())
  assert "2 of 3 files" in str(error.value)
  assert "text.nii.gz: " in str(error.value)
  assert "empty.nii: is empty" in str(error.value)
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


@pytest.mark.parametrize(
  ("names", "output", "message"),
  [
    ([], "out", "holds no .nii"),
    (["a.nii", "a.nii.gz"], "out", "are the same case"),
    (["a.nii.gz", "a_0000.nii.gz"], "out", "are the same case"),
    (["a.nii.gz"], "in", "would overwrite"),
  ],
)
def test_inputs_that_cannot_be_told_apart_are_refused(tmp_path, names, output, message):
  (tmp_path / "in").mkdir()
  for name in names:
    (tmp_path / "in" / name).touch()
  with pytest.raises(UserError, match=message):
    prediction.find_inputs(tmp_path / "in", tmp_path / output)


def test_what_is_no_workdir_is_refused(tmp_path):
  with pytest.raises(UserError, match="not the workdir of a training run"):
    sr.load(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no checkpoint yet"):
    sr.load(tmp_path)


@pytest.mark.parametrize(
  "volume",
  [
    np.zeros((4, 4)),
    np.full((4, 4, 4), np.nan),
    np.zeros((4, 4, 4)),
    np.zeros((4, 4, 4), complex),
  ],
)
def test_volumes_that_cannot_be_predicted_are_refused(workdir, volume):
  with pytest.raises(ValueError, match=r"\(x, y, z\)|NaN|constant|real"):
    sr.load(workdir)(volume)
