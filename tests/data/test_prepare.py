"""The command from raw folders to a prepared dataset: layouts, splits, bad files, interruptions."""

import dataclasses
import errno
import fcntl
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from selfreg_jax.data import conversion, datasets, manifest, prepare
from selfreg_jax.data.prepare import PrepareOptions
from selfreg_jax.errors import UserError

SHAPE = (12, 10, 6)
AFFINE = np.diag([-0.8, 0.9, 2.5, 1.0])
LABELS = {"0": "background", "1": "liver", "2": "spleen"}
CT = pathlib.Path(__file__).parents[3] / "shared/data/abdomen_ct"


def write_image(path, seed=0, shape=SHAPE, affine=AFFINE):
  path.parent.mkdir(parents=True, exist_ok=True)
  array = np.random.default_rng(seed).integers(-200, 350, shape).astype(np.int16)
  nib.save(nib.Nifti1Image(array, affine), path)
  return array


def write_label(path, seed=0, shape=SHAPE, affine=AFFINE, top=2):
  path.parent.mkdir(parents=True, exist_ok=True)
  array = np.random.default_rng(seed).integers(0, top + 1, shape).astype(np.uint8)
  array[:, :, 0] = 0
  nib.save(nib.Nifti1Image(array, affine), path)
  return array


def write_msd(folder, train=5, test=0, suffix="", ending=".nii.gz", labels=None, **description):
  """A small dataset in the Decathlon's layout; returns (image, label) arrays by case id."""
  folder.mkdir(parents=True, exist_ok=True)
  content = {"labels": labels or LABELS, "modality": {"0": "CT"}, **description}
  (folder / "dataset.json").write_text(json.dumps(content))
  arrays = {}
  for index in range(train + test):
    part, case_id = ("Tr" if index < train else "Ts"), f"case_{index:02d}"
    image = write_image(folder / f"images{part}/{case_id}{suffix}{ending}", index)
    arrays[case_id] = image, write_label(folder / f"labels{part}/{case_id}{ending}", index)
  return arrays


def options(tmp_path, **changes):
  normal = {
    "dataset": "msd",
    "source": tmp_path / "raw",
    "output": tmp_path / "out",
    "window": (-125, 275),
    "workers": 1,
  }
  return PrepareOptions(**{**normal, **changes})


def refused(tmp_path, match=None, **changes):
  """Prepares, expects a UserError and nothing that counts as prepared; returns the message."""
  with pytest.raises(UserError, match=match) as caught:
    prepare.prepare(options(tmp_path, **changes))
  with pytest.raises(UserError):
    manifest.load(tmp_path / "out")
  return str(caught.value)


def staged(tmp_path):
  """Ids of the cases that are finished, in a folder that holds nothing else."""
  assert os.listdir(tmp_path / "out") == ["cases.partial"]
  return sorted(path.name.removesuffix(".done.json") for path in tmp_path.glob("out/cases.partial/*.done.json"))


def command(tmp_path, *arguments):
  program = [sys.executable, "-m", "selfreg_jax.data.prepare", "--dataset=msd", "--window", "-125", "275"]
  folders = [f"--source={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}"]
  return subprocess.Popen([*program, *folders, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# The arrays.


@pytest.mark.parametrize("orientation", ["ras", "stored"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_prepared_arrays_are_the_raw_ones(tmp_path, orientation, axis):
  arrays = write_msd(tmp_path / "raw", train=2)
  made = prepare.prepare(options(tmp_path, orientation=orientation, axis=axis))
  assert manifest.load(tmp_path / "out", verify=True) == made
  assert (made.orientation, made.axis, made.dtype, made.channels) == (orientation, axis, "uint16", 1)
  for case_id, (image, label) in arrays.items():
    case = made.cases[case_id]
    if orientation == "ras":
      image, label = image[::-1], label[::-1]
    image, label = np.moveaxis(image, axis, 0), np.moveaxis(label, axis, 0)
    stored = np.load(tmp_path / "out" / case.image)
    assert stored.shape == case.shape == (*image.shape, 1)
    expected = (np.clip(image, -125, 275) + 125) / 400
    np.testing.assert_allclose(stored[..., 0] * made.scale, expected, atol=1e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / case.label), label)
    assert case.class_voxels == tuple(np.bincount(label.ravel(), minlength=3))
    assert case.foreground_slices == tuple(np.flatnonzero(label.any(axis=(1, 2))))
    assert case.sources == {"image": f"imagesTr/{case_id}.nii.gz", "label": f"labelsTr/{case_id}.nii.gz"}
    assert case.file_shape == SHAPE
    np.testing.assert_allclose(case.affine, AFFINE, rtol=1e-6)


def test_zscore_is_stored_as_float32(tmp_path):
  arrays = write_msd(tmp_path / "raw", train=2)
  made = prepare.prepare(options(tmp_path, window=None, normalize="zscore", orientation="stored"))
  assert (made.dtype, made.scale, made.intensity.kind) == ("float32", 1.0, "zscore")
  image = arrays["case_00"][0].transpose(2, 0, 1)
  stored = np.load(tmp_path / "out" / made.cases["case_00"].image)[..., 0]
  np.testing.assert_allclose(stored, (image - image.mean()) / image.std(), atol=1e-5)


def test_processes_give_what_one_process_gives(tmp_path):
  write_msd(tmp_path / "raw", train=4, test=2)
  one = prepare.prepare(options(tmp_path))
  several = prepare.prepare(options(tmp_path, output=tmp_path / "several", workers=2))
  assert several == one


def test_preparing_does_not_import_jax():
  script = "import sys, selfreg_jax.data.prepare; sys.exit('jax' in sys.modules or 'scipy.ndimage' in sys.modules)"
  subprocess.run([sys.executable, "-c", script], check=True)


# Layouts.


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_msd_and_nnunet_names(tmp_path, ending, suffix):
  nnunet = {"background": 0, "liver": 1, "spleen": 2}
  write_msd(tmp_path / "raw", train=3, test=2, ending=ending, suffix=suffix, labels=nnunet if suffix else None)
  (tmp_path / "raw/imagesTr/._case_00.nii.gz").write_bytes(b"made by macOS")
  (tmp_path / "raw/labelsTr/.DS_Store").write_bytes(b"")
  made = prepare.prepare(options(tmp_path))
  assert made.classes == ("background", "liver", "spleen")
  assert made.splits["test"] == ("case_03", "case_04")
  assert len(made.splits["train"]) == 2
  assert len(made.splits["val"]) == 1


def test_names_that_look_like_channels_are_no_channels(tmp_path):
  names = {"scan", "scan_0000", "scan_0001"}
  for name in names:
    write_image(tmp_path / f"raw/imagesTr/{name}.nii.gz")
    write_label(tmp_path / f"raw/labelsTr/{name}.nii.gz")
  (tmp_path / "raw/dataset.json").write_text(json.dumps({"labels": LABELS}))
  assert set(prepare.prepare(options(tmp_path)).cases) == names


def test_unlabelled_test_images_are_left_out_and_said(tmp_path, capfd):
  write_msd(tmp_path / "raw", train=2)
  write_image(tmp_path / "raw/imagesTs/blind.nii.gz")
  assert set(prepare.prepare(options(tmp_path)).cases) == {"case_00", "case_01"}
  assert "imagesTs: 1 image(s) are left out" in capfd.readouterr().err
  write_image(tmp_path / "raw/imagesTs/seen.nii.gz")
  write_label(tmp_path / "raw/labelsTs/seen.nii.gz")
  made = prepare.prepare(options(tmp_path, overwrite=True))
  assert made.splits["test"] == ("seen",)
  assert "imagesTs: 1 image(s) without a label" in capfd.readouterr().err


def test_globs_pair_by_what_the_stars_match(tmp_path):
  for name in ("train/A", "train/B", "test/A"):
    write_image(tmp_path / f"raw/{name}/image_1.nii.gz")
    write_label(tmp_path / f"raw/{name}/label_1.nii.gz")
  made = prepare.prepare(
    options(
      tmp_path,
      image_glob="**/image_*.nii.gz",
      label_glob="**/label_*.nii.gz",
      class_names=("liver", "spleen"),
      test_cases=("test_*",),
      val_cases=("train_B_1",),
    )
  )
  assert made.splits == {"train": ("train_A_1",), "val": ("train_B_1",), "test": ("test_A_1",)}
  assert made.classes == ("background", "liver", "spleen")


def test_a_label_pattern_may_be_a_special_case_of_the_image_pattern(tmp_path):
  for case_id in "ab":
    write_image(tmp_path / f"raw/{case_id}.nii.gz")
    write_label(tmp_path / f"raw/{case_id}_seg.nii.gz")
  made = prepare.prepare(options(tmp_path, image_glob="*.nii.gz", label_glob="*_seg.nii.gz", num_classes=3))
  assert made.classes == ("background", "class_1", "class_2")
  assert made.cases["a"].sources == {"image": "a.nii.gz", "label": "a_seg.nii.gz"}


# 2-D images.


def write_png(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


def pictures(tmp_path, **changes):
  normal = {
    "window": None,
    "image_glob": "*.png",
    "label_glob": "*_mask.png",
    "class_names": ("cell",),
    "val_cases": (),
  }
  return options(tmp_path, **normal | changes)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
def test_colour_images_are_stored_as_bytes(tmp_path, ending):
  rng = np.random.default_rng(0)
  arrays = {name: (rng.integers(0, 256, shape, np.uint8), rng.integers(0, 2, shape[:2], np.uint8))
            for name, shape in (("a", (9, 7, 3)), ("b", (5, 8, 3)))}  # fmt: skip
  for name, (image, mask) in arrays.items():
    write_png(tmp_path / f"raw/{name}.{ending}", image)
    write_png(tmp_path / f"raw/{name}_mask.{ending}", mask)
  made = prepare.prepare(pictures(tmp_path, image_glob=f"*.{ending}", label_glob=f"*_mask.{ending}"))
  assert (made.kind, made.unit, made.orientation, made.channels) == ("image", "pixel", "stored", 3)
  assert (made.intensity, made.dtype, made.scale) == (manifest.Intensity("byte"), "uint8", 1 / 255)
  for name, (image, mask) in arrays.items():
    case = made.cases[name]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / case.image), image[np.newaxis])
    np.testing.assert_array_equal(np.load(tmp_path / "out" / case.label), mask[np.newaxis])
    assert (case.shape, case.file_shape, case.group) == ((1, *image.shape), mask.shape, name)
  text = prepare.summary(made, tmp_path / "out")
  assert "8-bit values / 255, stored as uint8" in text
  assert "spacing in pixel" in text
  assert "run towards" not in text


def test_grey_images_of_several_files_are_channels(tmp_path):
  rng = np.random.default_rng(0)
  stains = {name: rng.integers(0, 60000, (6, 7)).astype(np.uint16) for name in ("dapi", "gfp")}
  for name, image in stains.items():
    write_png(tmp_path / f"raw/a_{name}.png", image)
  write_png(tmp_path / "raw/a_mask.png", rng.integers(0, 2, (6, 7), np.uint8))
  changes = {"image_glob": "*_dapi.png,*_gfp.png"}
  refused(
    tmp_path, "not the integers 0 to 255 of 8-bit colours; .*--normalize=minmax", **vars(pictures(tmp_path, **changes))
  )
  made = prepare.prepare(pictures(tmp_path, normalize="minmax", **changes))
  stored = np.load(tmp_path / "out" / made.cases["a"].image)[0] * made.scale
  for channel, image in enumerate(stains.values()):
    expected = (image - float(image.min())) / (float(image.max()) - image.min())
    np.testing.assert_allclose(stored[..., channel], expected, atol=1e-5)
  (tmp_path / "out/manifest.json").unlink()
  refused(tmp_path, "volumes or images, not both", **vars(pictures(tmp_path, image_glob="*_a.png,*_b.nii.gz")))


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"image_glob": "i_*.nii.gz", "label_glob": "none_*.nii.gz"}, "no file matches --label_glob"),
    ({"image_glob": "i_a.nii.gz", "label_glob": "l_*.nii.gz"}, r"--image_glob=i_a.nii.gz: .* \*"),
    ({"image_glob": "/i_*.nii.gz", "label_glob": "l_*.nii.gz"}, "relative"),
    ({"image_glob": "i_*.nii.gz"}, "go together"),
    ({"image_glob": "i_*.nii.gz", "label_glob": "l_*.nii.gz", "num_classes": None}, "--class_names"),
    ({"image_glob": "i*.nii.gz", "label_glob": "l_*.nii.gz"}, "without"),
  ],
)
def test_unusable_patterns_are_explained(tmp_path, changes, match):
  write_image(tmp_path / "raw/i_a.nii.gz")
  write_label(tmp_path / "raw/l_a.nii.gz")
  refused(tmp_path, match, **{"num_classes": 3, **changes})


@pytest.mark.parametrize(
  ("labels", "match"),
  [
    ({"background": 0, "whole": [1, 2], "core": 2}, "region"),
    ({"background": 0, "liver": 1, "ignore": 2}, "ignore"),
    ({"0": "background", "2": "liver"}, "without gaps"),
    ({"1": "liver", "2": "spleen"}, "without gaps"),
    ({"background": 0, "liver": "1.5"}, "neither"),
    ({"0": "background"}, "1 classes"),
    ({"0": "background", "1": "liver", "2": "liver"}, "different"),
    ([], 'no "labels"'),
  ],
)
def test_labels_of_other_kinds_are_refused(tmp_path, labels, match):
  write_msd(tmp_path / "raw", train=1)
  (tmp_path / "raw/dataset.json").write_text(json.dumps({"labels": labels}))
  refused(tmp_path, match)


@pytest.mark.parametrize("layout", ["nnunet", "msd", "globs"])
def test_several_channels_are_mapped_each_on_its_own(tmp_path, layout):
  raw = tmp_path / "raw"
  first = {case_id: image for case_id, (image, _) in write_msd(raw, train=2, suffix="_0000", modality={}).items()}
  description = {"labels": LABELS, "channel_names": {"0": "T2", "1": "ADC"}}
  (raw / "dataset.json").write_text(json.dumps(description))
  second = {case_id: 7 * write_image(raw / f"imagesTr/{case_id}_0001.nii.gz", seed=9) for case_id in first}
  for case_id, image in second.items():
    nib.save(nib.Nifti1Image(image, AFFINE), raw / f"imagesTr/{case_id}_0001.nii.gz")
  changes = {}
  if layout == "msd":
    for case_id in first:
      both = np.stack([first[case_id], second[case_id]], axis=-1)
      nib.save(nib.Nifti1Image(both, AFFINE), raw / f"imagesTr/{case_id}.nii.gz")
      for channel in (0, 1):
        (raw / f"imagesTr/{case_id}_000{channel}.nii.gz").unlink()
  elif layout == "globs":
    changes = {"image_glob": "imagesTr/*_0000.nii.gz, imagesTr/*_0001.nii.gz", "label_glob": "labelsTr/*.nii.gz"}
  made = prepare.prepare(options(tmp_path, window=None, normalize="minmax", **changes))
  assert made.channels == 2
  for case_id, case in made.cases.items():
    stored = np.load(tmp_path / "out" / case.image) * made.scale
    assert case.shape == (6, 12, 10, 2)
    for channel, image in enumerate((first[case_id], second[case_id])):
      turned = image[::-1].transpose(2, 0, 1)
      expected = (turned - turned.min()) / (turned.max() - turned.min())
      np.testing.assert_allclose(stored[..., channel], expected, atol=1e-5)
  assert case.file_shape == SHAPE
  if layout != "msd":
    assert case.sources["image"] == [f"imagesTr/{case_id}_0000.nii.gz", f"imagesTr/{case_id}_0001.nii.gz"]


def test_missing_and_surplus_channels_are_faults(tmp_path):
  write_msd(tmp_path / "raw", train=2, suffix="_0000")
  write_image(tmp_path / "raw/imagesTr/case_00_0001.nii.gz")
  message = refused(tmp_path)
  assert "imagesTr/case_01_0000.nii.gz: channel(s) 1 of case 'case_01' are missing" in message
  assert "case_00_0001.nii.gz: has 2 channel(s), the dataset has 1" in message
  write_image(tmp_path / "raw/imagesTr/case_01_0001.nii.gz", shape=(12, 10, 5))
  assert "imagesTr/case_01_0001.nii.gz, labelsTr/case_01.nii.gz: image has shape (12, 10, 5)" in refused(tmp_path)
  write_image(tmp_path / "raw/a.nii.gz", shape=(*SHAPE, 2))
  for case_id in "bcd":
    write_image(tmp_path / f"raw/{case_id}.nii.gz")
  for case_id in "abcd":
    write_label(tmp_path / f"raw/label_{case_id}.nii.gz")
  message = refused(tmp_path, image_glob="*.nii.gz", label_glob="label_*.nii.gz", num_classes=3)
  assert message.endswith("a.nii.gz: has 2 channel(s), most cases have 1")


def test_folders_that_hold_nothing_are_explained(tmp_path):
  refused(tmp_path, "no such folder")
  (tmp_path / "raw").mkdir()
  refused(tmp_path, r"no dataset\.json.*--image_glob")
  (tmp_path / "raw/dataset.json").write_text(json.dumps({"labels": LABELS}))
  refused(tmp_path, "no .nii")
  (tmp_path / "raw/imagesTr").mkdir()
  refused(tmp_path, "no .nii")
  (tmp_path / "raw/dataset.json").write_text("{")
  refused(tmp_path, "JSON")


# Options.


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"window": None}, r"CT.*--window -125 275.*MR.*--normalize=zscore"),
    ({"normalize": "zscore"}, "exclude"),
    ({"window": (275, -125)}, "lower one first"),
    ({"window": (0, float("nan"))}, "finite"),
    ({"window": None, "normalize": "l2"}, "minmax, zscore or byte"),
    ({"dataset": "acme"}, "known are synapse, acdc"),
    ({"source": None}, "needs --source"),
    ({"workers": 0}, "--workers=0"),
    ({"axis": 3}, "--axis=3"),
    ({"orientation": "lps"}, "--orientation=lps"),
    ({"val_fraction": 1.0}, "--val_fraction=1.0"),
    ({"val_fraction": 0.5, "val_cases": ("case_00",)}, "exclude"),
    ({"splits": "splits.json", "val_cases": ("case_00",)}, "leave --val_cases out"),
    ({"folds": 1}, "--folds=1"),
    ({"folds": 3, "val_cases": ("case_00",)}, "leave --val_cases out"),
    ({"folds": 3, "val_fraction": 0.5}, "leave --val_fraction out"),
    ({"folds": 3, "splits": "splits.json"}, "leave --splits out"),
    ({"folds": 3}, r"only 2 group\(s\)"),
    ({"num_classes": 4, "class_names": ("a", "b")}, "disagrees"),
    ({"num_classes": 1}, "at least 2"),
    ({"num_classes": 257}, "257 classes"),
    ({"class_names": ("background", "a")}, "implied"),
    ({"class_names": ("a", "a")}, "different"),
    ({"phantom_train_cases": 3}, "--phantom_train_cases cannot"),
    ({"dataset": "phantom", "num_classes": 3}, "--num_classes cannot"),
  ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, changes, match):
  write_msd(tmp_path / "raw", train=2)
  refused(tmp_path, match, **changes)


# Splits.


def test_a_split_file_decides_everything(tmp_path):
  write_msd(tmp_path / "raw", train=3, test=1)
  path = tmp_path / "splits.json"
  path.write_text(json.dumps({"train": ["case_03"], "val": ["case_02"], "test": ["case_01", "case_00"]}))
  made = prepare.prepare(options(tmp_path, splits=path))
  assert made.splits == {"train": ("case_03",), "val": ("case_02",), "test": ("case_00", "case_01")}


def test_folds_deal_out_all_cases_that_are_not_for_testing(tmp_path, capfd):
  write_msd(tmp_path / "raw", train=5, test=1)
  made = prepare.prepare(options(tmp_path, folds=2, seed=3))
  assert manifest.load(tmp_path / "out") == made
  assert made.splits == {"train": tuple(f"case_{n:02d}" for n in range(5)), "val": (), "test": ("case_05",)}
  assert sorted(len(fold) for fold in made.folds) == [2, 3]
  assert sorted(case_id for fold in made.folds for case_id in fold) == list(made.splits["train"])
  assert made.with_fold(1).splits["val"] == made.folds[1]
  errors = capfd.readouterr().err
  assert "no patient is known for msd: splits are per case" in errors
  assert "val split is empty" not in errors
  text = prepare.summary(made, tmp_path / "out")
  assert "2 folds of the train split, of 3, 2 case(s)" in text
  assert "--config.data.fold=0 --workdir=" in text


def test_cases_of_one_patient_stay_together(tmp_path, monkeypatch, capfd):
  write_msd(tmp_path / "raw", train=6, test=1)
  find = datasets.find_msd

  def find_with_patients(*arguments):
    raw = find(*arguments)
    pairs = (dataclasses.replace(pair, group=f"patient_{n // 2}") for n, pair in enumerate(raw.cases))
    return dataclasses.replace(raw, cases=tuple(pairs))

  monkeypatch.setattr(datasets, "find_msd", find_with_patients)
  made = prepare.prepare(options(tmp_path, folds=3))
  assert {made.cases[case_id].group for case_id in ("case_00", "case_01")} == {"patient_0"}
  assert {*made.folds} == {("case_00", "case_01"), ("case_02", "case_03"), ("case_04", "case_05")}
  assert "no patient is known" not in capfd.readouterr().err
  with pytest.raises(UserError, match=r"--val_cases: .*\n  patient_1: train case_03; val case_02"):
    prepare.prepare(options(tmp_path, output=tmp_path / "new", val_cases=("case_02",)))


# Bad files.


def test_all_bad_files_are_listed_in_one_go(tmp_path):
  write_msd(tmp_path / "raw", train=12)
  images, labels = tmp_path / "raw/imagesTr", tmp_path / "raw/labelsTr"
  cut = images / "case_00.nii.gz"
  cut.write_bytes(cut.read_bytes()[:-10])
  write_label(labels / "case_00.nii.gz", top=7)  # both files of a case are named
  write_label(labels / "case_01.nii.gz", shape=(12, 10, 5))
  write_label(labels / "case_02.nii.gz", affine=AFFINE @ nib.affines.from_matvec(np.eye(3), [0, 0, 0.5]))
  (labels / "case_03.nii.gz").unlink()
  (images / "case_04.nii.gz").unlink()
  write_image(images / "case_05.nii")
  write_image(images / "case_06_0000.nii.gz")
  (images / "case_07.nii.gz").write_text("text")
  (images / "case_08.nii.gz").write_bytes(b"")
  nan = np.full(SHAPE, np.nan, np.float32)
  nib.save(nib.Nifti1Image(nan, AFFINE), images / "case_09.nii.gz")
  (labels / "case_10.nii.gz").unlink()
  (labels / "case_10.nii.gz").mkdir()
  message = refused(tmp_path, "12 fault")
  lines = message.splitlines()[1:]
  assert len(lines) == 12
  for name, fault in [
    ("imagesTr/case_00.nii.gz", "truncated"),
    ("labelsTr/case_00.nii.gz", "outside the 3 classes"),
    ("labelsTr/case_01.nii.gz", "shape"),
    ("labelsTr/case_02.nii.gz", "lie apart"),
    ("imagesTr/case_03.nii.gz", "without a label"),
    ("labelsTr/case_04.nii.gz", "without an image"),
    ("imagesTr/case_05.nii, imagesTr/case_05.nii.gz", "2 images of one case"),
    ("imagesTr/case_06_0000.nii.gz", "2 images of one case"),
    ("imagesTr/case_07.nii.gz", "not a gzip"),
    ("imagesTr/case_08.nii.gz", "empty"),
    ("imagesTr/case_09.nii.gz", f"{np.prod(SHAPE)} NaN"),
    ("labelsTr/case_10.nii.gz", "folder"),
  ]:
    assert any(name in line and fault in line for line in lines), (name, fault, message)
  assert staged(tmp_path) == ["case_11"]  # the only one without a fault is kept


def test_the_command_exits_with_2_and_without_traceback(tmp_path):
  write_msd(tmp_path / "raw", train=3)
  for name in ("case_00", "case_01"):
    (tmp_path / f"raw/imagesTr/{name}.nii.gz").write_bytes(gzip.compress(b"no image"))
  process = command(tmp_path, "--workers=2")
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 2
  assert "Traceback" not in errors
  assert "case_00.nii.gz: is not a NIfTI" in errors
  assert "case_01.nii.gz: is not a NIfTI" in errors
  assert output == ""


def test_a_case_in_both_folders_is_refused(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  write_image(tmp_path / "raw/imagesTs/case_00.nii.gz")
  write_label(tmp_path / "raw/labelsTs/case_00.nii.gz")
  refused(tmp_path, "case_00: in imagesTr and in imagesTs")


def test_labels_of_another_label_set_are_refused_with_a_hint(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  message = refused(tmp_path, class_names=("liver",))
  assert "labels outside the 2 classes 0..1: 2 (" in message
  assert "--num_classes" in message


# The output folder.


def test_a_complete_dataset_is_replaced_only_on_demand(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  first = prepare.prepare(options(tmp_path))
  with pytest.raises(UserError, match="--overwrite"):
    prepare.prepare(options(tmp_path))
  (tmp_path / "raw/imagesTr/case_00.nii.gz").unlink()
  with pytest.raises(UserError, match="without an image"):
    prepare.prepare(options(tmp_path, overwrite=True))
  assert manifest.load(tmp_path / "out", verify=True) == first  # a failed attempt leaves the old dataset alone
  (tmp_path / "raw/labelsTr/case_00.nii.gz").unlink()
  prepare.prepare(options(tmp_path, overwrite=True))
  assert set(manifest.load(tmp_path / "out", verify=True).cases) == {"case_01"}
  assert sorted(os.listdir(tmp_path / "out/cases")) == ["case_01.image.npy", "case_01.label.npy"]


@pytest.mark.parametrize("name", ["thesis.txt", "cases/scan.nii.gz", "raw/scan.nii.gz"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_files_are_never_touched(tmp_path, name, overwrite):
  write_msd(tmp_path / "raw", train=2)
  path = tmp_path / "out" / name
  path.parent.mkdir(parents=True)
  path.write_text("precious")
  refused(tmp_path, "other files", overwrite=overwrite)
  assert path.read_text() == "precious"


def test_the_output_must_be_a_folder_one_can_write_to(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  (tmp_path / "out").write_text("")
  refused(tmp_path, "is a file")
  refused(tmp_path, "Not a directory", output=tmp_path / "out/below")


def test_two_preparations_do_not_share_a_folder(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  (tmp_path / "out").mkdir()
  descriptor = os.open(tmp_path / "out/.prepare.lock", os.O_RDWR | os.O_CREAT)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  refused(tmp_path, "another preparation")
  os.close(descriptor)
  prepare.prepare(options(tmp_path))


# Interruptions.


def test_a_full_disk_leaves_no_dataset(tmp_path, monkeypatch):
  write_msd(tmp_path / "raw", train=3)
  write = conversion._write_array

  def fill(path, array):
    write(path, array)
    if path.name == "case_01.image.npy":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(conversion, "_write_array", fill)
  refused(tmp_path, "disk is full; no dataset was written .*kept.* Make room")
  assert staged(tmp_path) == ["case_00"]
  monkeypatch.undo()
  prepare.prepare(options(tmp_path))
  manifest.load(tmp_path / "out", verify=True)


def test_a_file_system_that_takes_no_more_is_no_crash(tmp_path):
  """A real failing write: /dev/full."""
  if not os.path.exists("/dev/full"):
    pytest.skip("no /dev/full here")
  with pytest.raises(OSError, match="No space") as caught:
    conversion._write_array(pathlib.Path("/dev/full"), np.zeros(100_000, np.uint8))
  assert caught.value.errno == errno.ENOSPC


def test_too_little_room_is_noticed_before(tmp_path, monkeypatch):
  write_msd(tmp_path / "raw", train=3)
  usage = prepare.shutil.disk_usage(tmp_path)
  needed = 3 * np.prod(SHAPE) * 3  # cases, voxels, bytes of uint16 and uint8
  monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
  refused(tmp_path, "are needed")
  monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage._replace(free=needed))
  prepare.prepare(options(tmp_path))


def test_ctrl_c_leaves_no_dataset(tmp_path, monkeypatch, capfd):
  write_msd(tmp_path / "raw", train=3)

  def interrupt(path, array):
    if path.name == "case_01.label.npy":
      raise KeyboardInterrupt

  monkeypatch.setattr(conversion, "_write_array", interrupt)
  arguments = ["--dataset=msd", f"--source={tmp_path / 'raw'}", f"--output={tmp_path / 'out'}", "--normalize=minmax"]
  monkeypatch.setattr(manifest, "checksum", lambda path: "")
  assert prepare.main([*arguments, "--workers=1"]) == 1
  assert "interrupted: no dataset was written (the cases that are done are kept" in capfd.readouterr().err
  with pytest.raises(UserError, match="never completed"):
    manifest.load(tmp_path / "out")
  monkeypatch.undo()
  assert prepare.main([*arguments, "--workers=1"]) == 0


def wait_until(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.02)


def workers_of(process):
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  return [int(pid) for pid in children if "spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture
def stuck(tmp_path):
  """The command with two workers, one of which waits for ever for its label (a named pipe); the other has finished."""
  if not pathlib.Path("/proc/self/task").is_dir():
    pytest.skip("finds the workers in /proc")
  write_msd(tmp_path / "raw", train=2, ending=".nii")
  pipe = tmp_path / "raw/labelsTr/case_01.nii"
  content = pipe.read_bytes()
  pipe.unlink()
  os.mkfifo(pipe)
  process = command(tmp_path, "--workers=2")
  staging = tmp_path / "out/cases.partial"
  wait_until(lambda: (staging / "case_00.label.npy").exists())
  yield process
  process.kill()
  process.wait()  # not communicate: a worker that outlived the command would hold its pipes open
  process.stdout.close()
  process.stderr.close()
  pipe.unlink()
  pipe.write_bytes(content)
  prepare.prepare(options(tmp_path))  # a rerun clears up and succeeds
  manifest.load(tmp_path / "out", verify=True)
  assert sorted(os.listdir(tmp_path / "out")) == ["cases", "manifest.json"]


def is_gone(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
  except OSError:
    return True


def test_kill_9_leaves_neither_a_dataset_nor_workers(tmp_path, stuck):
  workers = workers_of(stuck)
  assert len(workers) == 2
  stuck.send_signal(signal.SIGKILL)
  stuck.wait()
  wait_until(lambda: all(is_gone(pid) for pid in workers), seconds=10)
  with pytest.raises(UserError, match="never completed"):
    manifest.load(tmp_path / "out")


def test_a_worker_that_dies_is_explained(tmp_path, stuck):
  for pid in workers_of(stuck):
    os.kill(pid, signal.SIGKILL)
  _, errors = stuck.communicate(timeout=30)
  assert stuck.returncode == 2
  assert "out of memory" in errors
  assert "--workers=2" in errors
  assert "Traceback" not in errors
  assert os.listdir(tmp_path / "out") == ["cases.partial"]


def test_running_out_of_memory_is_explained(tmp_path, monkeypatch):
  write_msd(tmp_path / "raw", train=2)

  def fail(*arguments):
    raise MemoryError

  monkeypatch.setattr(prepare.cases, "apply_intensity", fail)
  refused(tmp_path, "out of memory")


# What is said.


def test_odd_datasets_are_warned_about(tmp_path, capfd):
  write_msd(tmp_path / "raw", train=3, labels={**LABELS, "3": "unicorn"})
  prepare.prepare(options(tmp_path, window=(1000, 2000), val_cases=(), test_cases=("case_02",)))
  errors = capfd.readouterr().err
  assert "no training case holds unicorn" in errors
  assert "case_00.nii.gz: 100.0% of the voxels lie at or beyond the lower end" in errors
  assert "the val split is empty" in errors
  assert "the test split is empty" not in errors
  prepare.prepare(options(tmp_path, overwrite=True, test_cases=("*",), val_cases=()))
  errors = capfd.readouterr().err
  assert "the train split is empty: nothing can be trained" in errors
  assert "no training case holds" not in errors


def test_the_summary_says_what_there_is_and_what_to_do_next(tmp_path):
  write_msd(tmp_path / "raw", train=5)
  process = command(tmp_path, "--workers=1", "--test_cases=case_04")
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert "prepared 5 case(s)" in output
  assert "train     3 case(s)      18 slices" in output
  assert "6 x 12 x 10" in output
  assert "2.5 x 0.8 x 0.9" in output
  assert "liver" in output
  assert f"python train.py --config=configs/folder.py --config.data.dir={tmp_path / 'out'} --workdir=" in output


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(tmp_path, monkeypatch, capfd, terminal):
  write_msd(tmp_path / "raw", train=3)
  monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
  monkeypatch.setattr(conversion, "_SECONDS_BETWEEN_LINES", 0)
  prepare.prepare(options(tmp_path))
  errors = capfd.readouterr().err
  assert ("preparing" in errors and "3/3" in errors) if terminal else "prepared 2 of 3 cases" in errors


# Made-up and real cases.


def test_phantoms_are_written_and_prepared(tmp_path):
  arguments = ["--dataset=phantom", f"--output={tmp_path / 'out'}", "--phantom_train_cases=2", "--phantom_test_cases=1"]
  assert prepare.main([*arguments, "--workers=1"]) == 0
  made = manifest.load(tmp_path / "out", verify=True)
  assert [len(made.splits[name]) for name in manifest.SPLITS] == [1, 1, 1]
  assert made.dataset == "phantom"
  assert made.intensity == manifest.Intensity("window", -125, 275)
  assert all((tmp_path / "out/raw" / case.sources["image"]).is_file() for case in made.cases.values())
  assert prepare.main([*arguments, "--workers=1"]) == 2
  (tmp_path / "out/raw/dataset.json").unlink()  # as after an interruption
  assert prepare.main([*arguments, "--workers=1", "--overwrite"]) == 0
  assert manifest.load(tmp_path / "out").fingerprint() == made.fingerprint()


def test_phantoms_do_not_overwrite_real_cases(tmp_path):
  write_msd(tmp_path / "raw", train=2)
  before = sorted(tmp_path.glob("raw/**/*"))
  refused(tmp_path, "other files", dataset="phantom")
  for folder in ("images", "labels"):
    for path in tmp_path.glob(f"raw/{folder}Tr/case*"):
      path.rename(path.with_name(path.name.replace("case", "phantom")))
  refused(tmp_path, r"other files.*dataset\.json", dataset="phantom")
  assert len(sorted(tmp_path.glob("raw/**/*"))) == len(before)


@pytest.mark.skipif(not CT.is_dir(), reason="no real CT beside the repository")
def test_real_ct_blocks(tmp_path):
  organs = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
  made = prepare.prepare(
    options(
      tmp_path,
      source=CT / "slab",
      image_glob="*/image_*.nii.gz",
      label_glob="*/label_*.nii.gz",
      class_names=organs,
      test_cases=("test_*",),
      val_cases=("train_A_z080",),
    )
  )
  assert [len(made.splits[name]) for name in manifest.SPLITS] == [4, 1, 4]
  assert sum(case.shape[0] for case in made.split("train")) == 28
  assert made.classes == ("background", *organs)
  case = made.split("val")[0]
  raw = nib.load(CT / "slab/train/image_A_z080.nii.gz")
  network_input = np.load(tmp_path / "out" / case.image)[..., 0] * made.scale
  expected = np.clip((raw.get_fdata().transpose(2, 0, 1) + 125) / 400, 0, 1)
  np.testing.assert_allclose(network_input, expected, atol=1e-5)


@pytest.mark.skipif(not CT.is_dir(), reason="no real CT beside the repository")
def test_the_raw_label_set_of_the_real_ct_is_refused(tmp_path):
  message = refused(
    tmp_path, source=CT / "whole", image_glob="image_*.nii.gz", label_glob="labelraw_*.nii.gz", num_classes=9
  )
  assert "labelraw_A.nii.gz: labels outside the 9 classes 0..8: 9 (210 voxels)" in message
  assert "more values; the wrong label set, or the wrong --num_classes" in message
