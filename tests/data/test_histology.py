"""GlaS and MoNuSeg: the challenges' archives and the tree in circulation give the same images, masks and patients."""

import pathlib

import numpy as np
import pytest

from selfreg_jax.data import manifest
from selfreg_jax.data import prepare as prepare_module
from selfreg_jax.data.prepare import PrepareOptions, prepare
from selfreg_jax.data.published import GLAS, MONUSEG
from selfreg_jax.errors import UserError

from . import archives

REAL = pathlib.Path(__file__).parents[3] / "shared/data"
PATIENTS = ("TCGA-18-5592-01Z-00-DX1", "TCGA-18-5592-01Z-00-DX2", "TCGA-38-6178-01Z-00-DX1", "TCGA-49-4488-01Z-00-DX1")
TEST_PATIENT = "TCGA-2Z-A9J9-01A-01-TS1"


def run(tmp_path, dataset, source, output="out", **changes):
  return prepare(PrepareOptions(dataset=dataset, source=source, output=tmp_path / output, workers=1, **changes))


def refused(tmp_path, dataset, source, match, **changes):
  with pytest.raises(UserError, match=match) as caught:
    run(tmp_path, dataset, source, **changes)
  assert {path.name for path in (tmp_path / "out").glob("*")} <= {"cases.partial"}  # what is done is kept
  return str(caught.value)


def stored(tmp_path, output, case):
  return np.load(tmp_path / output / case.image, allow_pickle=False), np.load(
    tmp_path / output / case.label, allow_pickle=False
  )


def assert_holds_tissue(tmp_path, output, case, number):
  image, mask = archives.tissue(number)
  stored_image, stored_label = stored(tmp_path, output, case)
  np.testing.assert_array_equal(stored_image, image[np.newaxis])
  np.testing.assert_array_equal(stored_label, (mask > 0)[np.newaxis])
  assert case.file_shape == mask.shape
  assert (case.affine, case.axcodes, case.header, case.spacing) == (None, None, None, (1, 1, 1))


def test_the_glas_archive_and_tree_give_the_same_images(tmp_path, capfd):
  names = archives.write_glas(tmp_path / "glas/Warwick QU Dataset")
  archives.write_tree(
    tmp_path / "tree",
    {
      "Train_Folder": {n + 1: n for n in range(4)},
      "Test_Folder": {name: names.index(name) for name in names if "test" in name},
    },
    suffix="_anno",
  )
  raw = run(tmp_path, "glas", tmp_path / "glas", "raw", val_cases=("train_1", "train_2"))
  assert "grouped" not in capfd.readouterr().err
  tree = run(tmp_path, "glas", tmp_path / "tree", "tree_out", val_cases=("train_1", "train_2"))
  assert "7 of 7 images are not grouped by patient: there is no Grade.csv" in capfd.readouterr().err
  assert manifest.DatasetInfo.of(raw) == manifest.DatasetInfo.of(tree) == GLAS
  assert (raw.unit, raw.dtype, raw.scale) == ("pixel", "uint8", 1 / 255)
  assert raw.splits == tree.splits
  assert raw.splits["test"] == ("testA_1", "testA_2", "testB_1")
  for number, name in enumerate(names):
    for output, made in (("raw", raw), ("tree_out", tree)):
      assert_holds_tissue(tmp_path, output, made.cases[name], number)
    assert raw.cases[name].group == f"patient_{number // 2}"
    assert tree.cases[name].group == name
  assert tree.cases["train_1"].sources == {
    "image": "Train_Folder/img/1.png",
    "label": "Train_Folder/labelcol/1_anno.png",
  }


def test_drawn_splits_keep_patients_whole(tmp_path):
  archives.write_glas(tmp_path / "glas", train=12)
  made = run(tmp_path, "glas", tmp_path / "glas", val_fraction=0.3)
  patients = {name: {case.group for case in made.split(name)} for name in ("train", "val")}
  assert not patients["train"] & patients["val"]
  assert len(made.splits["val"]) == 4


def test_the_monuseg_archives_and_tree_give_the_same_images(tmp_path):
  numbers = {name: number for number, name in enumerate(PATIENTS)}
  archives.write_monuseg(tmp_path / "raw", numbers, {TEST_PATIENT: 7})
  parts = {"Train_Folder": {name: numbers[name] for name in PATIENTS[:3]}, "Val_Folder": {PATIENTS[3]: 3}}
  archives.write_tree(tmp_path / "tree", {**parts, "Test_Folder": {TEST_PATIENT: 7}}, scale=255)
  raw = run(tmp_path, "monuseg", tmp_path / "raw", "raw_out", val_cases=(PATIENTS[3],))
  tree = run(tmp_path, "monuseg", tmp_path / "tree", "tree_out")
  assert manifest.DatasetInfo.of(raw) == manifest.DatasetInfo.of(tree) == MONUSEG
  assert raw.splits == tree.splits == {"train": PATIENTS[:3], "val": PATIENTS[3:], "test": (TEST_PATIENT,)}
  for name, number in {**numbers, TEST_PATIENT: 7}.items():
    for output, made in (("raw_out", raw), ("tree_out", tree)):
      assert_holds_tissue(tmp_path, output, made.cases[name], number)
      assert made.cases[name].group == name[:12]
  assert raw.cases[PATIENTS[0]].sources["label"] == f"MoNuSeg 2018 Training Data/Annotations/{PATIENTS[0]}.xml"


def test_the_layout_must_be_clear(tmp_path):
  (tmp_path / "empty").mkdir()
  refused(tmp_path, "glas", tmp_path / "empty", r"neither the archive \(train_1.bmp.* nor the tree")
  refused(tmp_path, "monuseg", tmp_path / "empty", "neither the archive .*Tissue Images.* nor the tree")
  archives.write_glas(tmp_path / "both/flat")
  archives.write_tree(tmp_path / "both/tree", {"Train_Folder": {1: 1}})
  refused(tmp_path, "glas", tmp_path / "both", r"more than once \(tree, flat\)")
  refused(tmp_path, "glas", tmp_path / "both/tree", "images can only be taken as stored", axis=0)
  (tmp_path / "both/flat/Grade.csv").write_text("image,person\n1,2\n")
  refused(tmp_path, "glas", tmp_path / "both/flat", r"Grade.csv: is no table .*'patient ID'")
  archives.write_glas(tmp_path / "unknown")
  table = (tmp_path / "unknown/Grade.csv").read_text()
  (tmp_path / "unknown/Grade.csv").write_text(table.replace("train_2, 0", "train_2, "))
  refused(tmp_path, "glas", tmp_path / "unknown", "no patient ID for train_2")


def test_an_image_belongs_to_one_folder(tmp_path):
  archives.write_tree(tmp_path / "tree", {"Val_Folder": {"a": 1, "b": 2}, "Test_Folder": {"a": 1}})
  refused(tmp_path, "monuseg", tmp_path / "tree", "a: in two folders")


def test_the_test_archive_alone_is_a_test_split(tmp_path, monkeypatch):
  archives.write_monuseg(tmp_path / "latest", {}, {TEST_PATIENT: 7})
  monkeypatch.chdir(tmp_path / "latest/MoNuSegTestData")
  made = run(tmp_path, "monuseg", ".")
  assert made.splits == {"train": (), "val": (), "test": (TEST_PATIENT,)}


def test_a_tree_without_images_is_no_dataset(tmp_path):
  (tmp_path / "tree/Train_Folder/img").mkdir(parents=True)
  refused(tmp_path, "glas", tmp_path / "tree", "tree: holds no case; docs/datasets.md shows")


def test_too_little_room_is_noticed_before(tmp_path, monkeypatch):
  archives.write_tree(tmp_path / "tree", {"Train_Folder": {"a": 0, "b": 1}})
  pixels = sum(archives.tissue(number)[1].size for number in (0, 1))
  usage = prepare_module.shutil.disk_usage(tmp_path)._replace(free=pixels * (3 + 1) - 1)  # colours and label, in bytes
  monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage)
  refused(tmp_path, "glas", tmp_path / "tree", "are needed")
  monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage._replace(free=usage.free + 1))
  run(tmp_path, "glas", tmp_path / "tree")


def test_bad_files_of_glas_are_named(tmp_path):
  archives.write_glas(tmp_path / "glas", train=6)
  folder = tmp_path / "glas"
  image = folder / "train_1.bmp"
  image.write_bytes(image.read_bytes()[:200])
  (folder / "train_2_anno.bmp").unlink()
  (folder / "train_3.bmp").unlink()
  archives.write_picture(folder / "train_4_anno.bmp", archives.tissue(0)[1][:-1])
  archives.write_picture(folder / "train_5_anno.bmp", archives.tissue(4)[0])
  archives.write_picture(folder / "testA_1.bmp", archives.tissue(6)[1])
  message = refused(tmp_path, "glas", folder, "6 fault")
  for name, fault in [
    ("train_1.bmp", "damaged or truncated"),
    ("train_2.bmp", "without a label"),
    ("train_3_anno.bmp", "without an image"),
    ("train_4.bmp, train_4_anno.bmp", "image has 17 x 12 pixels, label 17 x 11"),
    ("train_5_anno.bmp", "colour picture, not a mask"),
    ("testA_1.bmp", "has 1 channel(s), the dataset has 3"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)


def test_bad_files_of_monuseg_are_named(tmp_path):
  archives.write_monuseg(tmp_path / "raw", {name: number for number, name in enumerate(PATIENTS)}, {TEST_PATIENT: 7})
  training = tmp_path / "raw/MoNuSeg 2018 Training Data"
  outlines = [training / f"Annotations/{name}.xml" for name in PATIENTS]
  outlines[0].write_text(outlines[0].read_text()[:-30])
  outlines[1].write_text("<!DOCTYPE a SYSTEM 'file:///etc/passwd'>" + outlines[1].read_text())
  archives.write_outlines(outlines[2], [[(0, 0), (9000, 0), (9000, 9000)]])
  outlines[3].unlink()
  cut = tmp_path / f"raw/MoNuSegTestData/{TEST_PATIENT}.tif"
  cut.write_bytes(cut.read_bytes()[:100])
  message = refused(tmp_path, "monuseg", tmp_path / "raw", "5 fault")
  for name, fault in [
    (f"Annotations/{PATIENTS[0]}.xml", "no XML"),
    (f"Annotations/{PATIENTS[1]}.xml", "document type"),
    (f"Annotations/{PATIENTS[2]}.xml", "region 1 reaches to (9000"),
    (f"Tissue Images/{PATIENTS[3]}.tif", "without a label"),
    (f"MoNuSegTestData/{TEST_PATIENT}.tif", "damaged"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images beside the repository")
@pytest.mark.parametrize(("dataset", "cases"), [("glas", 85), ("monuseg", 30)])
def test_the_real_trees_are_understood(tmp_path, dataset, cases):
  made = run(tmp_path, dataset, REAL / dataset)
  assert len(made.cases) == cases
  assert all(0.02 < case.class_voxels[1] / sum(case.class_voxels) < 0.98 for case in made.cases.values())
  if dataset == "monuseg":
    assert [len(made.splits[name]) for name in manifest.SPLITS] == [24, 6, 0]
