"""The contract on disk: what is saved comes back, and nothing damaged or unfinished is taken for a dataset."""

import base64
import dataclasses
import json

import numpy as np
import pytest

from selfreg_jax.data import manifest
from selfreg_jax.errors import UserError


@pytest.fixture
def dataset(tmp_path):
  """A prepared dataset of one case, written by hand."""
  (tmp_path / "cases").mkdir()
  image = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4, 1)
  label = (image[..., 0] > 20).astype(np.uint8)
  np.save(tmp_path / "cases/a.image.npy", image)
  np.save(tmp_path / "cases/a.label.npy", label)
  case = manifest.Case(
    id="a",
    image="cases/a.image.npy",
    label="cases/a.label.npy",
    shape=(2, 3, 4, 1),
    spacing=(5.0, 0.1, 1 / 3),
    axcodes=("S", "R", "A"),
    affine=tuple(tuple(row) for row in np.eye(4).tolist()),
    file_shape=(3, 4, 2),
    header=base64.b64encode(bytes(348)).decode(),
    group="a",
    sources={"image": "a.nii.gz", "label": "a_seg.nii.gz"},
    checksums={kind: manifest.checksum(tmp_path / f"cases/a.{kind}.npy") for kind in ("image", "label")},
    class_voxels=(21, 3),
    foreground_slices=(1,),
  )
  made = manifest.Manifest(
    dataset="msd",
    kind="volume",
    unit="mm",
    classes=("background", "liver"),
    channels=1,
    intensity=manifest.Intensity("window", -125.0, 275.0),
    dtype="uint16",
    scale=1 / 65535,
    orientation="ras",
    axis=2,
    splits={"train": ("a",), "val": (), "test": ()},
    folds=(),
    cases={"a": case},
    source="/somewhere",
  )
  manifest.save(made, tmp_path)
  return tmp_path, made


def test_what_is_saved_comes_back_equal(dataset):
  directory, made = dataset
  loaded = manifest.load(directory, verify=True)
  assert loaded == made
  assert loaded.fingerprint() == made.fingerprint()
  assert loaded.num_classes == 2
  assert loaded.split("train") == [made.cases["a"]]
  assert loaded.split("test") == []
  assert not list(directory.glob("*.partial"))


def test_fingerprint_is_of_the_data_and_not_of_where_they_came_from(dataset):
  _, made = dataset
  elsewhere = dataclasses.replace(made, source="/elsewhere")
  assert elsewhere.fingerprint() == made.fingerprint()
  for change in (
    {"axis": 1},
    {"classes": ("background", "lever")},
    {"splits": {"train": (), "val": ("a",), "test": ()}},
  ):
    assert dataclasses.replace(made, **change).fingerprint() != made.fingerprint()


def test_checksum_is_that_of_the_whole_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  path.write_bytes(b"123456789")
  assert manifest.checksum(path) == "cbf43926"  # the check value of CRC-32
  monkeypatch.setattr(manifest, "_CHUNK_BYTES", 2)
  assert manifest.checksum(path) == "cbf43926"


def test_a_folder_without_manifest_is_no_dataset(dataset, tmp_path_factory):
  directory, _ = dataset
  (directory / "manifest.json").unlink()
  with pytest.raises(UserError, match="never completed"):
    manifest.load(directory)
  (directory / "cases").rename(directory / "cases.partial")
  with pytest.raises(UserError, match="never completed"):
    manifest.load(directory)
  with pytest.raises(UserError, match="prepare it first"):
    manifest.load(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
  "content",
  [
    "",
    "{",
    "[]",
    "3",
    "{}",
    '{"format": "selfreg_jax prepared dataset", "version": 2}',
    '{"format": "selfreg_jax prepared dataset", "version": 2, "classes": [], "splits": [], "cases": []}',
  ],
)
def test_other_json_is_not_a_manifest(dataset, content):
  directory, _ = dataset
  (directory / "manifest.json").write_text(content)
  with pytest.raises(UserError, match="not a manifest"):
    manifest.load(directory)


def test_another_version_is_refused(dataset):
  directory, made = dataset
  (directory / "manifest.json").write_text(json.dumps({**made.to_json(), "version": 3}))
  with pytest.raises(UserError, match="version 3"):
    manifest.load(directory)


def test_all_damaged_arrays_are_named(dataset):
  directory, _ = dataset
  image = directory / "cases/a.image.npy"
  image.write_bytes(image.read_bytes()[:-1])
  (directory / "cases/a.label.npy").unlink()
  with pytest.raises(UserError, match="2 damaged") as caught:
    manifest.load(directory)
  assert "a.image.npy" in str(caught.value)
  assert "a.label.npy: missing" in str(caught.value)


def test_arrays_of_another_shape_or_type_are_refused(dataset):
  directory, _ = dataset
  np.save(directory / "cases/a.label.npy", np.zeros((2, 4, 3), np.uint8))
  np.save(directory / "cases/a.image.npy", np.zeros((2, 3, 4, 1), np.float32))
  with pytest.raises(UserError, match=r"uint8\(2, 4, 3\)") as caught:
    manifest.load(directory)
  assert "float32" in str(caught.value)


def test_changed_bytes_are_found_when_verifying(dataset):
  directory, _ = dataset
  image = directory / "cases/a.image.npy"
  content = bytearray(image.read_bytes())
  content[-1] ^= 1
  image.write_bytes(content)
  manifest.load(directory)
  with pytest.raises(UserError, match="checksum differs"):
    manifest.load(directory, verify=True)


def test_a_fold_holds_its_cases_out_and_must_be_chosen(dataset):
  _, made = dataset
  cases = {name: dataclasses.replace(made.cases["a"], id=name) for name in "abcd"}
  splits = {"train": ("a", "b", "c"), "val": (), "test": ("d",)}
  folded = dataclasses.replace(made, cases=cases, splits=splits, folds=(("a", "c"), ("b",)))
  second = folded.with_fold(1)
  assert second.splits == {"train": ("a", "c"), "val": ("b",), "test": ("d",)}
  assert manifest.Manifest.from_json(json.loads(json.dumps(folded.to_json()))) == folded
  for fold in (-1, 2):
    with pytest.raises(UserError, match="has 2 folds: give 0 to 1"):
      folded.with_fold(fold)
  assert made.with_fold(-1) is made
  with pytest.raises(UserError, match="has no folds: give -1"):
    made.with_fold(0)


def rewrite(directory, made, way, value):
  """Writes the manifest with another value in one place, past all checks."""
  content = made.to_json()
  node = content
  for key in way[:-1]:
    node = node[key]
  node[way[-1]] = value
  (directory / "manifest.json").write_text(json.dumps(content))


OUTSIDE = ["/etc/passwd", "../a.npy", "cases/../../a.npy", "..\\a.npy", "C:\\a.npy", "", ".", "a\0b", "a" * 5000]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_manifest_cannot_name_files_outside_its_folder(dataset, kind, name):
  directory, made = dataset
  rewrite(directory, made, ("cases", "a", kind), name)
  with pytest.raises(UserError, match=r"case 'a': the file .* does not lie in the dataset's folder"):
    manifest.load(directory)


def test_links_out_of_the_folder_are_not_followed(dataset, tmp_path_factory):
  directory, _ = dataset
  elsewhere = tmp_path_factory.mktemp("elsewhere") / "cases"
  (directory / "cases").rename(elsewhere)
  (directory / "cases").symlink_to(elsewhere)
  with pytest.raises(UserError, match="does not lie in the dataset's folder"):
    manifest.load(directory)
  (directory / "cases").unlink()
  elsewhere.rename(directory / "others")
  (directory / "cases").symlink_to("others")
  link = tmp_path_factory.mktemp("link") / "dataset"
  link.symlink_to(directory)
  manifest.load(link)


@pytest.mark.parametrize(
  ("way", "value", "message"),
  [
    (("cases", "a", "shape"), [2, 3, -4, 1], "the shape"),
    (("cases", "a", "shape"), [2, 3, 4, 2], "the shape"),
    (("cases", "a", "shape"), [2, 3, 4], "is a list of 3"),
    (("cases", "a", "file_shape"), [3, 4, 5], "not that of a file"),
    (("cases", "a", "spacing"), [0, 1, 1], "spacing"),
    (("cases", "a", "affine"), [[1, 0], [0, 1]], "affine"),
    (("cases", "a", "affine"), [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "affine"),
    (("cases", "a", "axcodes"), ["S", "S", "A"], "three directions"),
    (("cases", "a", "header"), "*", "base64"),
    (("cases", "a", "header"), "", "base64"),
    (("cases", "a", "class_voxels"), [24], "there are 2 classes and 24 voxels"),
    (("cases", "a", "class_voxels"), [20, 3], "there are 2 classes and 24 voxels"),
    (("cases", "a", "foreground_slices"), [2], "slices of the foreground"),
    (("cases", "a", "checksums"), {}, "checksums"),
    (("cases", "a", "id"), "b", "its id 'b' is another"),
    (("splits", "val"), ["a"], "is in 2 splits"),
    (("splits", "val"), ["b"], "'b' of a split is not among the cases"),
    (("splits",), {"train": ["a"]}, "the splits are train"),
    (("folds",), [["a"], ["a"]], "the folds do not hold"),
    (("kind",), "film", "kind is 'film'"),
    (("axis",), 3, "axis is 3"),
    (("dtype",), "object", "dtype is 'object'"),
    (("channels",), 0, "0 channels"),
    (("classes",), ["background", "background"], "2 classes"),
    (("intensity", "kind"), "log", "intensity is 'log'"),
    (("intensity", "low"), None, "the window runs from None"),
    (("scale",), float("inf"), "Infinity, not float"),
    (("cases",), [], "manifest.cases is a list of 0"),
  ],
)
def test_a_manifest_that_contradicts_itself_is_refused(dataset, way, value, message):
  directory, made = dataset
  rewrite(directory, made, way, value)
  with pytest.raises(UserError, match=message) as caught:
    manifest.load(directory)
  assert "manifest.json" in str(caught.value)


def test_ids_that_are_no_file_names_are_refused(dataset):
  directory, made = dataset
  case = dataclasses.replace(made.cases["a"], id="../a")
  splits = {"train": ("../a",), "val": (), "test": ()}
  manifest.save(dataclasses.replace(made, cases={"../a": case}, splits=splits), directory)
  with pytest.raises(UserError, match="cannot be a file's name"):
    manifest.load(directory)


def test_a_manifest_too_large_to_be_loaded_is_not_saved(dataset, monkeypatch):
  directory, made = dataset
  monkeypatch.setattr(manifest, "_MOST_BYTES", 100)
  with pytest.raises(UserError, match="1 cases are too many"):
    manifest.save(made, directory)
  with pytest.raises(UserError, match="holds more than"):
    manifest.load(directory)


@pytest.mark.parametrize(
  "content", [b"", b"\x93NUMPY", b"PK\5\6" + bytes(18), b"\x80\4]", b"\x93NUMPY\1\0\xb8\x0b" + b"(" * 3000]
)
def test_other_content_in_place_of_an_array_is_named(dataset, content):
  directory, _ = dataset
  (directory / "cases/a.image.npy").write_bytes(content)
  with pytest.raises(UserError, match="1 damaged") as caught:
    manifest.load(directory)
  assert "a.image.npy: " in str(caught.value)
