"""Looking a dataset over: what is counted, what is suspected, what is refused, and what the page shows."""

import base64
import dataclasses
import html.parser
import io
import os
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from selfreg_jax.data import check, check_page, manifest, prepare
from selfreg_jax.errors import UserError
from selfreg_jax.evaluation import report

SHAPE = (6, 12, 10)
CLASSES = ("background", "liver", "spleen")


def volume(seed, shape=SHAPE, channels=1, high=65536):
  return np.random.default_rng(seed).integers(0, high, (*shape, channels)).astype(np.uint16 if high > 256 else np.uint8)


def label_of(seed, shape=SHAPE):
  """Both classes in a corner of the middle slices."""
  label = np.zeros(shape, np.uint8)
  label[len(label) // 3 : -1 if len(label) > 1 else None, 2:5, 2:6] = 1
  label[len(label) // 3, 6:8, 2 : 4 + seed % 5] = 2
  label[len(label) // 3, 0, seed % shape[2]] = 1
  return label


def write(folder, arrays, *, split=None, folds=(), spacing=None, groups=None, **fields):
  """Writes a prepared dataset of (image, label) arrays by id; train unless `split` says otherwise."""
  (folder / "cases").mkdir(parents=True)
  split, spacing, groups = split or {}, spacing or {}, groups or {}
  made_cases = {}
  for case_id, (image, label) in arrays.items():
    paths = {kind: folder / f"cases/{case_id}.{kind}.npy" for kind in ("image", "label")}
    np.save(paths["image"], image)
    np.save(paths["label"], label)
    made_cases[case_id] = manifest.Case(
      id=case_id,
      image=f"cases/{case_id}.image.npy",
      label=f"cases/{case_id}.label.npy",
      shape=image.shape,
      spacing=spacing.get(case_id, (5.0, 0.8, 0.8)),
      axcodes=("S", "R", "A"),
      affine=None,
      file_shape=image.shape[:3],
      header=None,
      group=groups.get(case_id, case_id),
      sources={"image": "i", "label": "l"},
      checksums={kind: manifest.checksum(path) for kind, path in paths.items()},
      class_voxels=tuple(int((label == class_id).sum()) for class_id in range(3)),
      foreground_slices=tuple(np.flatnonzero(label.any(axis=(1, 2))).tolist()),
    )
  splits = {
    name: tuple(sorted(case_id for case_id in arrays if split.get(case_id, "train") == name))
    for name in manifest.SPLITS
  }
  dtype = next(iter(arrays.values()))[0].dtype.name
  normal = {
    "dataset": "msd",
    "kind": "volume",
    "unit": "mm",
    "classes": CLASSES,
    "channels": next(iter(arrays.values()))[0].shape[3],
    "intensity": manifest.Intensity("window", -100.0, 300.0),
    "dtype": dtype,
    "scale": {"uint16": 1 / 65535, "uint8": 1 / 255, "float32": 1.0}[dtype],
    "orientation": "ras",
    "axis": 2,
    "source": "/raw",
  }
  made = manifest.Manifest(splits=splits, folds=folds, cases=made_cases, **(normal | fields))
  manifest.save(made, folder)
  return made


def four_cases():
  return {name: (volume(seed), label_of(seed)) for seed, name in enumerate("abcd")}


def examine(folder):
  return check.examine(manifest.load(folder, verify=True), folder, where="here")


def suspected(tmp_path, arrays, **fields):
  """The suspicions about a dataset as lines."""
  write(tmp_path / "data", arrays, **fields)
  return [str(suspicion) for suspicion in examine(tmp_path / "data").suspicions]


class Page(html.parser.HTMLParser):
  """What a browser would make of a page: texts by tag, attributes of images, tags that were never closed."""

  def __init__(self, content):
    super().__init__()
    self.open, self.images, self.texts, self.tags = [], [], [], set()
    self.feed(content)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    if tag == "img":
      self.images.append(dict(attrs))
    elif tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if data.strip() and self.open[-1] != "style":
      self.texts.append((self.open[-1], data.strip()))

  def pictures(self):
    assert all(image["src"].startswith("data:image/webp;base64,") for image in self.images)
    contents = [base64.b64decode(image["src"].split(",")[1]) for image in self.images]
    return {image["alt"]: Image.open(io.BytesIO(content)) for image, content in zip(self.images, contents, strict=True)}


# What is counted.


def test_an_ordinary_dataset_raises_no_suspicion(tmp_path):
  assert suspected(tmp_path, four_cases(), split={"c": "val", "d": "test"}) == []
  assert "nothing is suspected" in check_page.as_text(examine(tmp_path / "data"))


@pytest.mark.parametrize("block", [10, 1 << 22])
def test_intensities_are_those_of_all_voxels(tmp_path, monkeypatch, block):
  monkeypatch.setattr(check, "_BLOCK", block)  # one row at a time gives the same
  arrays = {name: (volume(seed, channels=2), label) for seed, (name, (_, label)) in enumerate(four_cases().items())}
  write(tmp_path / "data", arrays)
  checkup = examine(tmp_path / "data")
  for channel, facts in enumerate(checkup.channels):
    values = np.concatenate([image[..., channel].ravel() for image, _ in arrays.values()]) / 65535
    expected = np.percentile(values, check.PERCENTILES, method="inverted_cdf")
    np.testing.assert_allclose(facts.percentiles, expected, rtol=1e-6)
    np.testing.assert_allclose((facts.mean, facts.deviation), (values.mean(), values.std()), rtol=1e-9)
    assert facts.ends == pytest.approx((np.mean(values == values.min()), np.mean(values == values.max())))
  of_case = checkup.cases["b"].channels[1]
  assert of_case.mean == pytest.approx(arrays["b"][0][..., 1].mean() / 65535)


def test_intensities_that_are_no_integers_are_binned_finely(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    name: (rng.normal(0, 1, (*SHAPE, 1)).astype(np.float32), label) for name, (_, label) in four_cases().items()
  }
  write(tmp_path / "data", arrays, intensity=manifest.Intensity("zscore"))
  (facts,) = examine(tmp_path / "data").channels
  values = np.concatenate([image.ravel() for image, _ in arrays.values()])
  np.testing.assert_allclose(facts.percentiles, np.percentile(values, check.PERCENTILES), atol=0.03)
  np.testing.assert_allclose((facts.mean, facts.deviation), (values.mean(), values.std()), atol=1e-4)


def test_the_text_gives_the_counts(tmp_path):
  made = write(
    tmp_path / "data", four_cases(), split={"d": "test"}, folds=(("a", "b"), ("c",)), groups={"a": "p", "b": "p"}
  )
  text = check_page.as_text(examine(tmp_path / "data"))
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert "checked here: 4 case(s), none damaged" in lines
  assert f"fingerprint {made.fingerprint()}" in lines
  assert "intensities window [-100, 300] -> [0, 1], stored as uint16" in lines
  assert "slices, rows, columns run towards S,R,A" in lines
  assert "train 3 2 18" in lines  # cases, groups, slices
  assert "fold 0 2 1 12" in lines
  assert "rows 12 12 12" in lines
  assert "spacing of slices, mm 5 5 5" in lines
  voxels = sum(case.class_voxels[1] for case in made.cases.values()) / (4 * np.prod(SHAPE))
  assert f"1 liver {voxels:.3%} 3 1 2 1" in lines
  in_units = next(line for line in lines if line.startswith("in the file's units"))
  assert float(in_units.split()[-2]) == pytest.approx(100, abs=5)  # the mean of uniform values in [-100, 300]


# What is suspected.


def test_one_image_in_two_cases(tmp_path):
  arrays = four_cases()
  arrays["d"] = (arrays["a"][0], arrays["d"][1])
  assert suspected(tmp_path, arrays, split={"d": "test"}) == ["one image is in several cases: a (train), d (test)"]


def test_equal_checksums_of_different_images_are_no_duplicates(tmp_path):
  made = write(tmp_path / "data", four_cases())
  same = {name: dataclasses.replace(case, checksums=made.cases["a"].checksums) for name, case in made.cases.items()}
  forged = dataclasses.replace(made, cases=same)
  assert check.examine(forged, tmp_path / "data", where="here").suspicions == ()


def test_one_label_for_two_images(tmp_path):
  arrays = four_cases()
  arrays["d"] = (arrays["d"][0], arrays["a"][1])
  assert suspected(tmp_path, arrays) == ["one label belongs to several images: a (train), d (train)"]


def test_labels_that_are_empty_or_cover_everything(tmp_path):
  arrays = four_cases()
  arrays["a"][1][...] = 0
  arrays["b"][1][...] = 2
  arrays["b"][1][0, 0, 0] = 0
  assert suspected(tmp_path, arrays) == ["the label is empty: a", "the label covers more than 95%: b (99.9%)"]


@pytest.mark.parametrize(("value", "which"), [(0, "smallest"), (65535, "largest")])
def test_intensities_at_one_end(tmp_path, value, which):
  arrays = four_cases()
  arrays["c"][0][:, :, :, 0].flat[: int(0.97 * np.prod(SHAPE))] = value
  (line,) = suspected(tmp_path, arrays)
  assert line.startswith("the intensities lie mostly at one end")
  assert line.endswith(f": c (96.9% at the {which} value)")


def test_a_constant_channel(tmp_path):
  arrays = {name: (volume(seed, channels=3), label) for seed, (name, (_, label)) in enumerate(four_cases().items())}
  arrays["b"][0][..., 2] = 7
  assert suspected(tmp_path, arrays) == ["a channel is constant: b (channel 2)"]


def test_slices_that_repeat_the_one_before(tmp_path):
  arrays = four_cases()
  arrays["a"][0][3] = arrays["a"][0][2]
  arrays["b"][0][2:4] = 0  # an empty margin is none
  assert suspected(tmp_path, arrays) == ["slices repeat the one before them: a (slice 3)"]


def test_spacings_far_from_the_others(tmp_path):
  lines = suspected(tmp_path, four_cases(), spacing={"a": (5.0, 8.0, 8.0), "b": (5.0, 1.2, 1.2), "c": (1.0, 1.0, 1.0)})
  assert lines == ["the spacing is unusual (median 5 x 1.1 x 1.1 mm): a (5 x 8 x 8), c (1 x 1 x 1)"]


def test_a_missing_spacing_is_odd_only_where_the_others_have_one(tmp_path):
  spacing = dict.fromkeys("abd", (2.0, 0.8, 0.8))
  assert suspected(tmp_path / "1", four_cases(), spacing=spacing | {"c": (1.0, 1.0, 1.0)})
  assert not suspected(tmp_path / "2", four_cases(), spacing=dict.fromkeys("abcd", (1.0, 1.0, 1.0)), unit="voxel")


def test_sizes_far_from_the_others(tmp_path):
  arrays = four_cases()
  arrays["a"] = (volume(7, (6, 30, 30)), label_of(7, (6, 30, 30)))
  arrays["b"] = (volume(8, (20, 12, 10)), label_of(8, (20, 12, 10)))  # a longer scan is none
  assert suspected(tmp_path, arrays) == ["the size is unusual (median 6 x 12 x 10): a (6 x 30 x 30)"]


def test_missing_classes(tmp_path):
  arrays = four_cases()
  for name in "abc":
    arrays[name][1][arrays[name][1] == 2] = 0
  lines = suspected(tmp_path, arrays, split={"b": "val", "c": "test"})
  assert lines == ["no case of val holds spleen", "no case of test holds spleen"]
  arrays["d"][1][arrays["d"][1] == 2] = 0
  lines = suspected(tmp_path / "2", arrays, folds=(("a", "b"), ("c", "d")))
  assert lines == ["no case holds class 2, spleen"]


def test_a_class_missing_in_a_fold(tmp_path):
  arrays = four_cases()
  for name in "ab":
    arrays[name][1][arrays[name][1] == 2] = 0
  assert suspected(tmp_path, arrays, folds=(("a", "b"), ("c", "d"))) == ["no case of fold 0 holds spleen"]


def test_patients_in_training_and_test(tmp_path):
  (line,) = suspected(tmp_path, four_cases(), split={"d": "test"}, groups={"a": "p7", "d": "p7"})
  assert line.startswith("1 of 1 test case(s) share a group")
  assert "p7" in line


# What is damaged.


def test_contradictions_of_the_manifest_are_faults(tmp_path):
  made = write(tmp_path / "data", four_cases())
  folder = tmp_path / "data"
  b = dataclasses.replace(made.cases["b"], class_voxels=(1, 2, 3))
  c = dataclasses.replace(made.cases["c"], foreground_slices=(0,))
  damaged = dataclasses.replace(made, cases=made.cases | {"b": b, "c": c})
  with pytest.raises(UserError, match="2 fault") as caught:
    check.examine(damaged, folder, where="here")
  assert "cases/b.label.npy" in str(caught.value)
  assert "cases/c.label.npy" in str(caught.value)
  with pytest.raises(UserError, match="the splits do not hold each case once"):
    check.examine(dataclasses.replace(made, splits=made.splits | {"val": ("a",)}), folder, where="here")
  with pytest.raises(UserError, match="the folds do not hold each case once"):
    check.examine(dataclasses.replace(made, folds=(("a", "b"), ("c",))), folder, where="here")
  empty = dict.fromkeys(manifest.SPLITS, ())
  with pytest.raises(UserError, match="names no case"):
    check.examine(dataclasses.replace(made, cases={}, splits=empty), folder, where="here")
  cases = {name: dataclasses.replace(case, class_voxels=(1, 1)) for name, case in made.cases.items()}
  fewer = dataclasses.replace(made, classes=CLASSES[:2], cases=cases)
  with pytest.raises(UserError, match=r"b.label.npy: class ids 2 of 2 classes"):
    check.examine(fewer, folder, where="here")


# The page.


def test_the_page_holds_the_tables_and_a_picture_of_every_case(tmp_path):
  arrays = four_cases()
  arrays["c"][1][...] = 0
  made = write(
    tmp_path / "data",
    arrays,
    folds=(("a", "b"), ("c", "d")),
    groups={"a": "patient 3", "b": "patient 3"},
    spacing={"c": (5.0, 9.0, 9.0)},
  )
  checkup = examine(tmp_path / "data")
  content = check_page.as_page(checkup, tmp_path / "data")
  page = Page(content)
  assert [image["alt"] for image in page.images] == ["c", "a", "b", "d"]  # the suspected case first
  cells = [text for tag, text in page.texts if tag in ("td", "th")]
  for table in check_page.tables(checkup):
    assert {cell for row in table.rows for cell in row if cell} <= {*cells}
  assert made.fingerprint() in cells
  assert ("li", "the label is empty: c") in page.texts
  assert ("b", "the label is empty") in page.texts
  assert ("b", "the spacing is unusual (median 5 x 0.8 x 0.8 mm): 5 x 9 x 9") in page.texts
  assert any("a of patient 3" in text for _, text in page.texts)
  values = arrays["b"][0] / 65535
  quantiles = [f"{value:.3f}" for value in np.percentile(values, (0.5, 50, 99.5), method="inverted_cdf")]
  foreground = f"{np.mean(arrays['b'][1] > 0):.2%}"
  row = cells.index("b")
  expected = ["b", "fold 0", "patient 3", "6 x 12 x 10", "5 x 0.8 x 0.8", foreground, "none", *quantiles]
  assert cells[row : row + len(expected)] == expected
  assert "liver, spleen" in cells  # what c lacks
  assert any(text.startswith("fold 1, 6 x 12 x 10, slice") for _, text in page.texts)
  assert "prefers-color-scheme: dark" in content
  assert "script" not in page.tags
  assert "link" not in page.tags
  assert not re.search(r"(src|href)=\"(?!data:)|https?://|url\(", content)


def test_names_are_escaped(tmp_path):
  name = '<img src=x onerror="x">&amp;'
  odd = '"><script>alert(1)<script>'
  made = write(tmp_path / "data", four_cases(), classes=("background", name, "b"), source=odd)
  cases = {odd if case.id == "a" else case.id: case for case in made.cases.values()}
  cases[odd] = dataclasses.replace(cases[odd], id=odd, group="<i>", spacing=(50.0, 0.8, 0.8))
  made = dataclasses.replace(made, cases=cases, splits=made.splits | {"train": tuple(cases)})
  checkup = check.examine(made, tmp_path / "data", where="<b>here</b>")
  page = Page(check_page.as_page(checkup, tmp_path / "data"))
  assert [image["alt"] for image in page.images] == [odd, "b", "c", "d"]
  assert ("td", f"1 {name}") in page.texts
  assert ("td", odd) in page.texts
  assert ("h1", "Check of <b>here</b>: 4 case(s), none damaged") in page.texts
  assert ("li", f"the spacing is unusual (median 5 x 0.8 x 0.8 mm): {odd} (50 x 0.8 x 0.8)") in page.texts
  assert ("figcaption", f"{odd} of <i>") in page.texts
  assert "script" not in page.tags


def near(color, expected):
  return np.abs(np.asarray(color, int) - expected).max() < 60  # WebP is lossy


def test_pictures_of_volumes_are_turned_and_have_the_proportions_of_the_body(tmp_path):
  image, label = np.full((3, 40, 20, 1), 30000, np.uint16), np.zeros((3, 40, 20), np.uint8)
  image[1, :20, :] = 0  # rows run to the right: the dark half is the patient's left
  image[0, 0, 0] = 65535
  label[1, 4:36, 2:6] = 1  # columns run to the front: the label lies at the back
  arrays = {"a": (image, label)}
  made = write(tmp_path / "data", arrays, spacing={"a": (5.0, 1.0, 3.0)})
  pictures = {}
  for axcodes in (("S", "R", "A"), ("S", "L", "P"), None):
    case = dataclasses.replace(made.cases["a"], axcodes=axcodes)
    content = check_page.thumbnail(made, case, tmp_path / "data")
    assert len(content) < 4000
    pictures[axcodes] = np.asarray(Image.open(io.BytesIO(content)))
  height, width = pictures["S", "R", "A"].shape[:2]
  assert height / width == pytest.approx(60 / 40, rel=0.02)
  upright = pictures["S", "R", "A"]
  # Radiological: the patient's left is on the right and the front on top.
  assert upright[height // 4, width // 4].mean() > 80
  assert upright[height // 4, -width // 4].mean() < 20
  column = np.abs(upright[:, width // 4].astype(int) - report.class_colors(3)[1]).max(axis=1)
  assert column.argmin() > height / 2
  assert column.min() < 60
  np.testing.assert_allclose(pictures["S", "L", "P"], upright[::-1, ::-1], atol=80)
  assert pictures[None].shape[:2] == (width, height)


def test_pictures_of_photographs_are_as_they_are(tmp_path):
  image, label = np.zeros((1, 50, 100, 3), np.uint8), np.zeros((1, 50, 100), np.uint8)
  image[..., :50, 0], image[..., 50:, 1] = 200, 200
  label[0, 10:40, 60:90] = 2
  made = write(
    tmp_path / "data",
    {"a": (image, label)},
    kind="image",
    unit="pixel",
    intensity=manifest.Intensity("byte"),
    spacing={"a": (1.0, 1.0, 1.0)},
  )
  case = dataclasses.replace(made.cases["a"], axcodes=None)
  picture = np.asarray(Image.open(io.BytesIO(check_page.thumbnail(made, case, tmp_path / "data"))))
  assert picture.shape[0] * 2 == picture.shape[1] <= 256
  scale = picture.shape[1] / 100
  assert near(picture[5, 20], (200, 0, 0))
  assert near(picture[5, -5], (0, 200, 0))
  assert near(picture[int(25 * scale), int(75 * scale)], (0, 200, 0))  # inside the contour
  assert near(picture[int(25 * scale), int(60 * scale) + 1], report.class_colors(3)[2])
  text = check_page.as_text(
    check.examine(dataclasses.replace(made, cases={"a": case}), tmp_path / "data", where="here")
  )
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert "spacing not known" in lines
  assert "columns 100 100 100" in lines
  assert not any(line.startswith(("slices", "spacing of", "orientation")) for line in lines)


def test_a_case_without_foreground_shows_its_middle_slice(tmp_path):
  image = np.zeros((5, 8, 8, 1), np.float32)
  image[2], image[2, :4] = 4.0, -4.0
  made = write(tmp_path / "data", {"a": (image, np.zeros((5, 8, 8), np.uint8))})
  picture = np.asarray(Image.open(io.BytesIO(check_page.thumbnail(made, made.cases["a"], tmp_path / "data"))))
  assert picture.max() > 240  # stretched from its own range
  assert picture.min() < 15


# The command.


def raw(folder, count=4):
  folder.mkdir()
  for index in range(count):
    image = np.random.default_rng(index).integers(-200, 350, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(image, np.diag([0.8, 0.8, 5, 1])), folder / f"i_{index}.nii.gz")
    nib.save(nib.Nifti1Image(label_of(index), np.diag([0.8, 0.8, 5, 1])), folder / f"l_{index}.nii.gz")
  return [
    "--dataset=msd",
    f"--source={folder}",
    "--image_glob=i_*.nii.gz",
    "--label_glob=l_*.nii.gz",
    "--num_classes=3",
  ]


def test_a_prepared_dataset_is_verified(tmp_path, capfd, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = write(tmp_path / "data", four_cases())
  assert prepare.main(["--check", "--output=data"]) == 0
  output = capfd.readouterr().out
  assert made.fingerprint() in output
  assert "pictures: dataset_check.html" in output
  assert sorted(Page((tmp_path / "dataset_check.html").read_text()).pictures()) == list("abcd")
  for name in "bc":
    path = tmp_path / f"data/cases/{name}.image.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
  (tmp_path / "dataset_check.html").unlink()
  assert prepare.main(["--check", "--output=data"]) == 2
  errors = capfd.readouterr().err
  assert "2 damaged file(s)" in errors
  assert "cases/b.image.npy: checksum" in errors
  assert "cases/c.image.npy: checksum" in errors
  assert sorted(os.listdir(tmp_path)) == ["data"]


def test_raw_files_are_validated_and_nothing_is_installed(tmp_path, capfd, monkeypatch):
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
  arguments = [*raw(tmp_path / "raw"), "--window", "-125", "275", "--workers=1"]
  page = tmp_path / "page.html"
  before = sorted(tmp_path.rglob("*"))
  assert prepare.main(["--check", *arguments, f"--html={page}"]) == 0
  output = capfd.readouterr().out
  assert sorted(tmp_path.rglob("*")) == sorted([*before, page])
  assert len(Page(page.read_text()).pictures()) == 4
  assert prepare.main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
  assert manifest.load(tmp_path / "out").fingerprint() in output  # as if it had been prepared

  page.unlink()
  (tmp_path / "raw/i_1.nii.gz").write_bytes(b"")
  (tmp_path / "raw/l_2.nii.gz").unlink()
  assert prepare.main(["--check", *arguments, f"--html={page}"]) == 2
  errors = capfd.readouterr().err
  assert "i_1.nii.gz: is empty" in errors
  assert "i_2.nii.gz: image without a label" in errors
  assert os.listdir(tmp_path / "temporary") == []
  assert not page.exists()


def test_a_temporary_folder_that_cannot_be_made_is_explained(tmp_path, capfd, monkeypatch):
  arguments = ["--check", *raw(tmp_path / "raw"), "--normalize=minmax", f"--html={tmp_path / 'page.html'}"]
  with monkeypatch.context() as patch:  # pytest itself needs temporary files
    patch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert prepare.main(arguments) == 2
  errors = capfd.readouterr().err
  assert "none/selfreg_jax_check" in errors
  assert "Traceback" not in errors


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--check"], "--check needs --output, or --dataset and --source"),
    (["--check", "--dataset=msd", "--source=raw", "--overwrite"], "no --overwrite"),
    (["--check", "--dataset=msd", "--source=raw", "--output=data"], "leave --dataset, --source out"),
    (["--check", "--output=data", "--folds=3"], "leave --folds out"),
    (["--check", "--output=data", "--html=none/page.html"], "--html=none/page.html: give a file"),
    (["--check", "--output=none"], "none: no manifest.json"),
    (["--check", "--dataset=msd"], "needs --source"),
    (["--check", "--dataset=phantom"], "no archive to check"),
    (["--dataset=msd", "--output=data", "--html=page.html"], "--html goes with --check"),
    (["--dataset=msd"], "required: --output"),
    (["--output=data"], "required: --dataset"),
  ],
)
def test_requests_that_make_no_sense_are_refused(tmp_path, capfd, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  try:
    code = prepare.main(arguments)
  except SystemExit as error:
    code = error.code
  assert code == 2
  assert message in " ".join(capfd.readouterr().err.split())
  assert os.listdir(tmp_path) == []
