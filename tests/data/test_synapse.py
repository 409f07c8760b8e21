"""Synapse: the challenge's archive and TransUNet's pack give the same slices, organs and split."""

import pathlib

import h5py
import numpy as np
import pytest

from selfreg_jax.data import manifest, synapse
from selfreg_jax.data.prepare import PrepareOptions, prepare, summary
from selfreg_jax.data.published import SYNAPSE
from selfreg_jax.errors import UserError

from . import archives

TRAIN, TEST = (5, 6, 40), (1, 38)
CT = pathlib.Path(__file__).parents[3] / "shared/data/abdomen_ct/whole"


def run(tmp_path, source, output="out", **changes):
  options = PrepareOptions(dataset="synapse", source=source, output=tmp_path / output, workers=1, **changes)
  return prepare(options)


def refused(tmp_path, source, match, **changes):
  with pytest.raises(UserError, match=match) as caught:
    run(tmp_path, source, **changes)
  assert {path.name for path in (tmp_path / "out").glob("*")} <= {"cases.partial"}  # what is done is kept
  return str(caught.value)


@pytest.fixture
def btcv(tmp_path):
  archives.write_btcv(tmp_path / "btcv/Abdomen/RawData/Training", (*TRAIN, *TEST))
  return tmp_path / "btcv"


@pytest.fixture
def pack(tmp_path):
  archives.write_transunet_pack(tmp_path / "pack/Synapse", TRAIN, TEST)
  return tmp_path / "pack"


def test_archive_and_pack_give_the_same_dataset(tmp_path, btcv, pack):
  raw, packed = run(tmp_path, btcv, "raw"), run(tmp_path, pack, "packed")
  assert manifest.DatasetInfo.of(raw) == manifest.DatasetInfo.of(packed) == SYNAPSE
  assert raw.splits == packed.splits
  assert raw.splits["test"] == ("0001", "0038")
  assert {*raw.splits["train"], *raw.splits["val"]} == {"0005", "0006", "0040"}
  for number in (*TRAIN, *TEST):
    cases = [made.cases[f"{number:04d}"] for made in (raw, packed)]
    images, labels = (
      [
        np.load(tmp_path / folder / getattr(case, kind), allow_pickle=False)
        for folder, case in zip(("raw", "packed"), cases, strict=True)
      ]
      for kind in ("image", "label")
    )
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(labels[0], labels[1])
    # METHOD.md's slice: array[x, y] as stored, at fixed z.
    image, label = archives.ct_case(number)
    for z in range(archives.CT_SHAPE[2]):
      np.testing.assert_allclose(
        images[0][z, :, :, 0] * raw.scale, np.clip((image[:, :, z] + 125.0) / 400, 0, 1), atol=1e-5
      )
      np.testing.assert_array_equal(labels[0][z], archives.eight_organs(label)[:, :, z])
    assert cases[0].class_voxels == cases[1].class_voxels
    assert cases[0].file_shape == cases[1].file_shape == archives.CT_SHAPE


def test_what_only_the_archive_knows(tmp_path, btcv, pack):
  raw, packed = run(tmp_path, btcv, "raw"), run(tmp_path, pack, "packed")
  case = raw.cases["0005"]
  assert (raw.unit, packed.unit) == ("mm", "voxel")
  np.testing.assert_allclose(case.spacing, (3.0, 0.8, 0.9), rtol=1e-6)
  np.testing.assert_allclose(case.affine, archives.CT_AFFINE, rtol=1e-6)
  assert case.axcodes == ("A", "L", "S")
  assert case.sources["label"] == "Abdomen/RawData/Training/label/label0005.nii.gz"
  case = packed.cases["0005"]
  assert (case.spacing, case.affine, case.axcodes, case.header) == ((1, 1, 1), None, None, None)
  assert case.sources["image"][4] == "Synapse/train_npz/case0005_slice004.npz"
  assert packed.cases["0001"].sources["image"] == "Synapse/test_vol_h5/case0001.npy.h5"


def test_the_summary_leads_on_to_the_config_of_the_dataset(tmp_path, pack):
  text = summary(run(tmp_path, pack), tmp_path / "out")
  assert "python train.py --config=configs/synapse_unet.py" in text
  assert "spacing in voxel" in text
  assert "window [-125, 275] -> [0, 1]" in text


def test_processes_read_packs_too(tmp_path, pack):
  options = PrepareOptions(dataset="synapse", source=pack, output=tmp_path / "two", workers=2)
  assert prepare(options) == run(tmp_path, pack)


def test_the_published_split_has_18_and_12_cases():
  assert (len(synapse.TRAIN), len(synapse.TEST), len({*synapse.TRAIN, *synapse.TEST})) == (18, 12, 30)
  assert {"0005", "0010", "0040"} <= {*synapse.TRAIN}
  assert {"0001", "0022", "0038"} <= {*synapse.TEST}


@pytest.mark.parametrize("layout", ["btcv", "pack"])
def test_validation_cases_come_from_the_training_cases(tmp_path, request, layout, capfd):
  source = request.getfixturevalue(layout)
  if layout == "btcv":
    (source / "Abdomen/RawData/Testing/img").mkdir(parents=True)
  made = run(tmp_path, source, val_cases=("0040",))
  assert (made.splits["val"], made.splits["train"]) == (("0040",), ("0005", "0006"))
  errors = capfd.readouterr().err
  assert ("Abdomen/RawData/Testing/img: left out" in errors) == (layout == "btcv")
  assert "15 of the 18 published training cases are missing: 0007" in errors
  assert "10 of the 12 published test cases are missing: 0002" in errors
  refused(tmp_path / "other", source, "two splits, val and test: 0001", val_cases=("0001",))


def test_label_sets_are_told_apart(tmp_path):
  archives.write_btcv(tmp_path / "eight", (5, 1), reduce=archives.eight_organs)
  message = refused(tmp_path, tmp_path / "eight", "2 fault", val_fraction=0.0)
  assert "label/label0005.nii.gz: no label is above 8; " in message
  assert "--labels=8" in message
  made = run(tmp_path, tmp_path / "eight", labels=8)
  stored = np.load(tmp_path / "out" / made.cases["0005"].label, allow_pickle=False)
  np.testing.assert_array_equal(stored, archives.eight_organs(archives.ct_case(5)[1]).transpose(2, 0, 1))
  run(tmp_path, tmp_path / "eight", "trusted", labels=13)  # the user's word, say for a part of the abdomen
  archives.write_btcv(tmp_path / "thirteen", (5,))
  refused(tmp_path / "a", tmp_path / "thirteen", r"outside the 9 classes 0\.\.8: 9 \(.*--labels=8", labels=8)
  archives.write_btcv(tmp_path / "more", (5,), reduce=lambda label: label + 1)
  refused(tmp_path / "a", tmp_path / "more", r"label0005.nii.gz: labels outside the 14 classes 0\.\.13: 14 \(")
  refused(tmp_path / "a", tmp_path / "more", "--labels=7", labels=7)


def test_the_layout_must_be_clear(tmp_path, btcv, pack):
  (tmp_path / "empty").mkdir()
  refused(tmp_path, tmp_path / "empty", "neither the archive .* nor the pack")
  refused(tmp_path, tmp_path, r"more than once \(btcv/Abdomen/RawData/Training, pack/Synapse\)")
  refused(tmp_path, pack, "--window, --normalize: .*pack", window=(0.0, 1.0))
  refused(tmp_path, pack, "a pack can only be taken as stored", orientation="ras")
  refused(tmp_path, pack, "--labels=13: the pack holds 8", labels=13)
  refused(tmp_path, btcv, "--num_classes, --class_names cannot", num_classes=14, class_names=("a",))


def test_bad_files_of_the_archive_are_named(tmp_path, btcv):
  folder = btcv / "Abdomen/RawData/Training"
  image = folder / "img/img0005.nii.gz"
  image.write_bytes(image.read_bytes()[:-20])
  (folder / "label/label0006.nii.gz").unlink()
  (folder / "label/label0001.nii.gz").write_text("nothing")
  (folder / "img/scan.nii.gz").write_text("")
  message = refused(tmp_path, btcv, "4 fault")
  for name, fault in [
    ("img/img0005.nii.gz", "truncated"),
    ("img/img0006.nii.gz", "without a label"),
    ("label/label0001.nii.gz", "not a gzip"),
    ("img/scan.nii.gz", "is not named img0001.nii.gz"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)


def test_bad_files_of_the_pack_are_named(tmp_path, pack):
  slices, volumes = pack / "Synapse/train_npz", pack / "Synapse/test_vol_h5"
  cut = slices / "case0005_slice001.npz"
  cut.write_bytes(cut.read_bytes()[:-60])
  np.savez(slices / "case0005_slice002.npz", image=np.full((10, 8), 100.0), label=np.zeros((10, 8)))
  np.savez(slices / "case0005_slice003.npz", image=np.eye(8), label=np.zeros((8, 8)))
  np.savez(slices / "case0006_slice001.npz", image=np.eye(10, 8), label=np.full((10, 8), 9))
  np.savez(slices / "case0006_slice002.npz", img=np.eye(10, 8), label=np.zeros((10, 8)))
  np.savez(slices / "case0006_slice003.npz", image=np.array([{"a": 1}]), label=np.zeros((10, 8)))
  (slices / "case0040_slice002.npz").unlink()
  np.savez(slices / "slice.npz", image=np.eye(3))
  broken = volumes / "case0001.npy.h5"
  broken.write_bytes(broken.read_bytes()[:600])
  with h5py.File(volumes / "case0038.npy.h5", "w") as file:
    file["image"] = np.zeros((2, 8, 8))
    file["label"] = h5py.ExternalLink("case0001.npy.h5", "label")
  message = refused(tmp_path, pack, "10 fault")
  for name, fault in [
    ("train_npz/case0005_slice001.npz", "damaged"),
    ("train_npz/case0005_slice002.npz", r"from 100 to 100; those of the pack lie in [0, 1]"),
    ("train_npz/case0005_slice003.npz", "has shape (8, 8), the case's first slice (10, 8)"),
    ("train_npz/case0006_slice001.npz", "outside the 9 classes 0..8: 9 (80 voxels)"),
    ("train_npz/case0006_slice002.npz", "holds no 'image', but img, label"),
    ("train_npz/case0006_slice003.npz", "no plain arrays"),
    ("train_npz: case 0040", "slice(s) 2 of 5 are missing"),
    ("train_npz/slice.npz", "is not named"),
    ("test_vol_h5/case0001.npy.h5", "damaged"),
    ("test_vol_h5/case0038.npy.h5", "'label' is not an array in this file"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)


@pytest.mark.skipif(not CT.is_dir(), reason="no real CT beside the repository")
def test_the_13_organs_of_the_real_ct_reduce_to_its_8(tmp_path):
  for labels in ("label13_A", "label_A", "labelraw_A"):
    for kind, name in (("img", "image_A"), ("label", labels)):
      (tmp_path / labels / kind).mkdir(parents=True)
      (tmp_path / labels / kind / f"{kind}0005.nii.gz").symlink_to(CT / f"{name}.nii.gz")
  reduced = run(tmp_path, tmp_path / "label13_A", "reduced").cases["0005"]
  eight = run(tmp_path, tmp_path / "label_A", "eight", labels=8).cases["0005"]
  assert reduced.checksums == eight.checksums
  assert min(reduced.class_voxels) > 0
  message = refused(tmp_path, tmp_path / "labelraw_A", "1 fault")
  assert "label/label0005.nii.gz: labels outside the 14 classes 0..13: 14 (2590 voxels)" in message
