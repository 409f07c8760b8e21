"""ACDC: the challenge's archive and the pack in circulation give the same slices; patients stay whole."""

import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.data import manifest
from selfreg_jax.data.prepare import PrepareOptions, prepare
from selfreg_jax.data.published import ACDC
from selfreg_jax.errors import UserError

from . import archives

PHASE_OF_FRAME = {"frame01": "ED", "frame12": "ES"}


def run(tmp_path, source, output="out", **changes):
  return prepare(PrepareOptions(dataset="acdc", source=source, output=tmp_path / output, workers=1, **changes))


def refused(tmp_path, source, match, **changes):
  with pytest.raises(UserError, match=match) as caught:
    run(tmp_path, source, **changes)
  assert {path.name for path in (tmp_path / "out").glob("*")} <= {"cases.partial"}  # what is done is kept
  return str(caught.value)


def test_archive_and_pack_give_the_same_slices(tmp_path):
  archives.write_acdc(tmp_path / "acdc/training", (1, 2, 19))
  archives.write_acdc_pack(tmp_path / "pack/ACDC", train=(1,), valid=(19,), test=(2,))
  raw, packed = run(tmp_path, tmp_path / "acdc", "raw"), run(tmp_path, tmp_path / "pack", "packed")
  assert manifest.DatasetInfo.of(raw) == manifest.DatasetInfo.of(packed) == ACDC
  assert len(raw.cases) == len(packed.cases) == 6
  for case_id, case in raw.cases.items():
    patient, frame = case_id.split("_")
    twin = packed.cases[f"{patient}_{PHASE_OF_FRAME[frame]}"]
    assert case.group == twin.group == patient
    image, label = archives.mr_case(int(patient[-3:]), int(frame[-2:]))
    for made, folder, one in ((raw, "raw", case), (packed, "packed", twin)):
      stored = np.load(tmp_path / folder / one.image, allow_pickle=False)
      expected = (image - image.min()) / (image.max() - image.min())
      np.testing.assert_allclose(stored[..., 0] * made.scale, expected.transpose(2, 0, 1), atol=1e-5)
      np.testing.assert_array_equal(
        np.load(tmp_path / folder / one.label, allow_pickle=False), label.transpose(2, 0, 1)
      )
    assert case.file_shape == twin.file_shape == image.shape
    assert case.spacing == pytest.approx((10.0, 1.5, 1.4))  # in-plane spacing is kept, and slices with it
  assert (raw.unit, packed.unit) == ("mm", "voxel")
  assert packed.splits == {
    "train": ("patient001_ED", "patient001_ES"),
    "val": ("patient019_ED", "patient019_ES"),
    "test": ("patient002_ED", "patient002_ES"),
  }
  assert packed.cases["patient002_ES"].sources["image"] == "ACDC/test/case_002_volume_ES.npz"
  assert raw.cases["patient002_frame12"].sources["label"] == "training/patient002/patient002_frame12_gt.nii.gz"


def test_patients_are_drawn_70_10_20(tmp_path, capfd):
  archives.write_acdc(tmp_path / "acdc/database/training", range(1, 11))
  archives.write_acdc(tmp_path / "acdc/database/testing", (101,))
  made = run(tmp_path, tmp_path / "acdc")
  errors = capfd.readouterr().err
  assert "database/testing: left out" in errors
  assert "drawn with --seed" in errors
  patients = {name: {case.group for case in made.split(name)} for name in manifest.SPLITS}
  assert [len(made.splits[name]) for name in manifest.SPLITS] == [14, 2, 4]
  assert [len(patients[name]) for name in manifest.SPLITS] == [7, 1, 2]
  assert run(tmp_path, tmp_path / "acdc", overwrite=True).splits == made.splits
  others = [run(tmp_path, tmp_path / "acdc", overwrite=True, seed=seed).splits for seed in (1, 2, 3)]
  assert any(other != made.splits for other in others)
  listed = run(
    tmp_path, tmp_path / "acdc", overwrite=True, val_cases=("patient001_*",), test_cases=("patient00[234]_*",)
  )
  assert [len(listed.splits[name]) for name in manifest.SPLITS] == [12, 2, 6]
  assert {case.group for case in listed.split("val")} == {"patient001"}


def test_unpacked_files_are_taken_too(tmp_path):
  archives.write_acdc(tmp_path / "acdc", (1,))
  for path in list((tmp_path / "acdc/patient001").glob("*_frame*.nii.gz")):
    nib.save(nib.load(path), path.with_suffix(""))
    path.unlink()
  assert set(run(tmp_path, tmp_path / "acdc").cases) == {"patient001_frame01", "patient001_frame12"}


def test_names_of_the_pack_are_read_tolerantly(tmp_path, capfd):
  archives.write_acdc_pack(tmp_path / "pack", train=(1,), valid=(), test=())
  (tmp_path / "pack/valid").rmdir()
  for path in list((tmp_path / "pack/train").glob("*sliceES*")):
    path.rename(path.with_name(path.name.replace("case_001_sliceES", "patient001_slice_ES")))
  for path in (tmp_path / "pack/train").glob("*ED*"):
    (tmp_path / "pack/val").mkdir(exist_ok=True)
    path.rename(tmp_path / "pack/val" / path.name)
  made = run(tmp_path, tmp_path / "pack")
  assert made.splits == {"train": ("patient001_ES",), "val": ("patient001_ED",), "test": ()}
  assert "patient001: one phase in train, one in val" in capfd.readouterr().err


def test_the_layout_must_be_clear(tmp_path):
  (tmp_path / "empty").mkdir()
  refused(tmp_path, tmp_path / "empty", "neither the archive .* nor the pack")
  archives.write_acdc(tmp_path / "both/acdc", (1,))
  archives.write_acdc_pack(tmp_path / "both/pack", train=(1,), valid=(), test=())
  refused(tmp_path, tmp_path / "both", r"more than once \(acdc, pack\)")
  refused(tmp_path, tmp_path / "both/pack", "--window, --normalize: .*pack", normalize="zscore")


def test_bad_files_of_the_archive_are_named(tmp_path):
  archives.write_acdc(tmp_path / "acdc", (1, 2, 3, 4, 5))
  folders = {number: tmp_path / f"acdc/patient{number:03d}" for number in range(1, 6)}
  cut = folders[1] / "patient001_frame01.nii.gz"
  cut.write_bytes(cut.read_bytes()[:-20])
  (folders[2] / "patient002_frame12_gt.nii.gz").unlink()
  (folders[3] / "Info.cfg").unlink()
  (folders[4] / "Info.cfg").write_text("ED: 1\nES: end\n")
  nib.save(
    nib.Nifti1Image(np.full((9, 7, 4), 4, np.uint8), archives.MR_AFFINE), folders[5] / "patient005_frame01_gt.nii.gz"
  )
  message = refused(tmp_path, tmp_path / "acdc", "5 fault")
  for name, fault in [
    ("patient001/patient001_frame01.nii.gz", "truncated"),
    ("patient002/patient002_frame12_gt.nii.gz", "is missing (Info.cfg names the frame)"),
    ("patient003/Info.cfg", "is missing"),
    ("patient004/Info.cfg", "'ED: 1' and 'ES: 12'"),
    ("patient005/patient005_frame01_gt.nii.gz", "outside the 4 classes 0..3: 4 (252 voxels); 1 right ventricle"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)


def test_bad_files_of_the_pack_are_named(tmp_path):
  archives.write_acdc_pack(tmp_path / "pack", train=(1, 3), valid=(5,), test=(2, 4))
  train, test = tmp_path / "pack/train", tmp_path / "pack/test"
  (train / "case_001_sliceED_0.npz").write_bytes(b"PK nothing")
  np.savez(train / "case_003_sliceED_1.npz", img=np.full((9, 7), np.nan), label=np.zeros((9, 7)))
  np.savez(train / "case_003_sliceES_1.npz", img=np.eye(9, 7), label=np.full((9, 7), 0.5))
  np.savez(test / "case_002_volume_ED.npz", img=np.eye(9, 7), label=np.zeros((9, 7)))
  np.savez(test / "case_004_volume_ED.npz", img=np.ones((2, 9, 7)), label=np.zeros((2, 9, 7)))
  np.savez(test / "case_005_volume_ED.npz", img=np.ones((2, 9, 7)), label=np.zeros((2, 9, 7)))
  message = refused(tmp_path, tmp_path / "pack", "fault")
  for name, fault in [
    ("train/case_001_sliceED_0.npz", "not an .npz file"),
    ("train/case_003_sliceED_1.npz", "63 NaN"),
    ("train/case_003_sliceES_1.npz", "not integers: 0.5 (63 voxels)"),
    ("test/case_002_volume_ED.npz", "'img' has shape (9, 7); a volume is needed"),
    ("test/case_004_volume_ED.npz", "is constant"),
    ("valid/case_005_sliceED_0.npz, test/case_005_volume_ED.npz", "ED of patient005 twice"),
  ]:
    assert any(f"{name}: " in line and fault in line for line in message.splitlines()), (name, message)
