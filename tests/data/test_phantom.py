import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.data import phantom
from selfreg_jax.errors import UserError

TRAIN, TEST, SEED = 20, 10, 0
NAMES = phantom.CLASS_NAMES
BIN_EDGES = np.arange(-1024, 3080, 8)


@pytest.fixture(scope="module")
def cases():
  return [phantom.make_case(SEED, index) for index in range(TRAIN + TEST)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("phantom")
  phantom.write_msd(directory, train_cases=3, test_cases=2, seed=SEED)
  return directory


def present(case):
  return {NAMES[class_id] for class_id in np.unique(case.label)}


def centroids(case):
  """Millimetres (right, front, head) of each organ that is there."""
  places = {}
  for name in present(case):
    voxels = np.argwhere(case.label == NAMES.index(name))
    places[name] = nib.affines.apply_affine(case.affine, voxels.mean(axis=0))
  return places


def contents(directory):
  return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_classes_are_synapses_in_synapses_order():
  assert NAMES == (
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
  )


def test_a_case_depends_on_its_seed_and_index_alone(cases):
  again = phantom.make_case(SEED, 3)
  np.testing.assert_array_equal(again.image, cases[3].image)
  np.testing.assert_array_equal(again.label, cases[3].label)
  np.testing.assert_array_equal(again.affine, cases[3].affine)
  other = phantom.make_case(SEED + 1, 3)
  assert other.image.shape != again.image.shape or (other.image != again.image).mean() > 0.5


def test_the_same_seed_writes_the_same_bytes(written, tmp_path):
  phantom.write_msd(tmp_path / "same", train_cases=3, test_cases=2, seed=SEED)
  phantom.write_msd(tmp_path / "other", train_cases=1, test_cases=0, seed=SEED + 1)
  assert contents(tmp_path / "same") == contents(written)
  other = contents(tmp_path / "other")
  assert other.keys() < contents(written).keys()
  assert all(contents(written)[path] != content for path, content in other.items())


def test_volumes_look_like_ct(cases):
  for case in cases:
    assert case.image.dtype == np.int16
    assert case.label.dtype == np.uint8
    assert case.image.shape == case.label.shape
    assert 20 <= min(case.image.shape) <= 28
    assert sorted(case.image.shape)[1] >= 88
    assert sorted(case.image.shape)[2] <= 104
    assert np.median(case.image[0, 0]) < -900  # air around the patient
    assert np.percentile(case.image, 99.5) > 150  # bone
    assert 60 < case.image[case.label == NAMES.index("liver")].mean() < 140


def test_spacing_is_anisotropic_and_varies(cases):
  spacings = np.sort([nib.affines.voxel_sizes(case.affine) for case in cases], axis=1)
  assert (spacings[:, 2] > 1.1 * spacings[:, 1]).all()
  np.testing.assert_allclose(spacings[:, 0], spacings[:, 1], rtol=1e-5)
  assert len(np.unique(spacings[:, 0].round(2))) > TRAIN // 2
  assert len({case.image.shape for case in cases}) > TRAIN // 2


def test_grids_are_flipped_permuted_and_oblique(cases):
  axcodes = {nib.aff2axcodes(case.affine) for case in cases}
  assert {("R", "A", "S"), ("L", "P", "S"), ("L", "A", "S"), ("S", "R", "A")} <= axcodes
  angles = np.rad2deg([nib.affines.obliquity(case.affine).max() for case in cases])
  assert 4 < angles.max() < 13
  assert (angles < 0.01).sum() > TRAIN // 2


def test_organs_lie_where_they_belong_in_the_world(cases):
  for case in cases:
    at = centroids(case)
    right, front, head = range(3)
    assert at["liver"][right] > at["aorta"][right] + 20
    assert at["stomach"][right] < at["aorta"][right]
    assert at["aorta"][front] < at["pancreas"][front] < at["stomach"][front]
    assert at["aorta"][front] < at["liver"][front]
    assert at["stomach"][right] < at["pancreas"][right] < at["liver"][right]
    if "spleen" in at:
      assert at["spleen"][right] < at["stomach"][right]
      assert at["spleen"][front] < at["stomach"][front]
    if "gallbladder" in at:
      assert at["gallbladder"][head] < at["liver"][head]
      assert at["gallbladder"][right] > at["pancreas"][right]
      assert at["gallbladder"][front] > at["liver"][front]
    for kidney, side in (("left kidney", -1), ("right kidney", 1)):
      if kidney in at:
        assert side * (at[kidney][right] - at["aorta"][right]) > 20
        assert at[kidney][front] < at["aorta"][front]
        assert at[kidney][front] < at["pancreas"][front]


def test_few_organs_are_missing_in_every_split(cases):
  missing = [set(NAMES) - present(case) for case in cases]
  assert set().union(*missing) <= {"gallbladder", "left kidney", "right kidney", "spleen"}
  assert max(map(len, missing)) == 1
  for split in (missing[:TRAIN], missing[TRAIN:]):
    assert 0 < sum(map(len, split)) <= len(split) / 3
  for name in NAMES:
    assert sum(name in present(case) for case in cases[:TRAIN]) > 0.8 * TRAIN


def test_one_in_five_cases_lacks_an_organ_whatever_the_seed():
  assert sum(len(present(phantom.make_case(7, index))) < len(NAMES) for index in range(3, 8)) == 1


def test_no_organ_is_a_scrap(cases):
  for case in cases:
    sizes = np.bincount(case.label.ravel(), minlength=len(NAMES))
    assert sizes[sizes > 0].min() > 100


def class_counts(case):
  """(intensity bins, classes) voxels."""
  bins = np.digitize(case.image.ravel(), BIN_EDGES)
  joint = np.bincount(bins * len(NAMES) + case.label.ravel(), minlength=(len(BIN_EDGES) + 1) * len(NAMES))
  return joint.reshape(-1, len(NAMES))


def mean_dice(chosen, counts):
  """Mean over cases and the organs they have; `chosen` (bins, classes) says which intensities are called what."""
  scores = []
  for joint in counts:
    hits = (joint * chosen).sum(axis=0)
    called = (joint.sum(axis=1, keepdims=True) * chosen).sum(axis=0)
    truth = joint.sum(axis=0)
    scores += [2 * hits[c] / (called[c] + truth[c]) for c in range(1, len(NAMES)) if truth[c]]
  return np.mean(scores)


def test_intensity_alone_does_not_solve_it(cases):
  counts = [class_counts(case) for case in cases]
  train, test = np.sum(counts[:TRAIN], axis=0), counts[TRAIN:]
  classes = np.arange(len(NAMES))
  most_likely = train.argmax(axis=1)[:, None] == classes
  balanced = (train / train.sum(axis=0)).argmax(axis=1)[:, None] == classes
  # The best set of intensities for each class on its own, classes overlapping as they like: for a given number of
  # chosen voxels Dice grows with the hits, so the best set takes the purest bins first.
  best = np.zeros_like(most_likely)
  for c in classes[1:]:
    order = np.argsort(-train[:, c] / np.maximum(train.sum(axis=1), 1), kind="stable")
    called = train.sum(axis=1)[order].cumsum()
    dice = 2 * train[order, c].cumsum() / (called + train[:, c].sum())
    best[order[: dice.argmax() + 1], c] = True
  assert mean_dice(most_likely, test) < 0.4
  assert mean_dice(balanced, test) < 0.4
  assert mean_dice(best, test) < 0.4
  assert mean_dice(best, test) > max(mean_dice(most_likely, test), mean_dice(balanced, test))


def test_written_files_are_what_the_description_lists(written):
  content = json.loads((written / "dataset.json").read_text())
  assert content["labels"] == {str(c): name for c, name in enumerate(NAMES)}
  assert content["modality"] == {"0": "CT"}
  assert content["file_ending"] == ".nii.gz"
  assert (content["numTraining"], content["numTest"]) == (3, 2)
  pairs = [(entry["image"], entry["label"]) for entry in content["training"]]
  pairs += [(image, image.replace("imagesTs", "labelsTs")) for image in content["test"]]
  assert [image for image, _ in pairs] == [
    *(f"./imagesTr/phantom_{index:03d}.nii.gz" for index in range(3)),
    *(f"./imagesTs/phantom_{index:03d}.nii.gz" for index in range(3, 5)),
  ]
  listed = {(written / name).resolve() for pair in pairs for name in pair}
  assert listed == {path.resolve() for path in written.rglob("*.nii.gz")}
  assert not list(written.rglob("*.partial"))


def test_written_files_hold_the_cases(written, cases):
  for index in range(5):
    part = "Tr" if index < 3 else "Ts"
    for kind, array in (("images", cases[index].image), ("labels", cases[index].label)):
      path = written / f"{kind}{part}" / f"phantom_{index:03d}.nii.gz"
      file = nib.load(path)
      assert file.get_data_dtype() == array.dtype
      np.testing.assert_array_equal(np.asarray(file.dataobj), array)
      np.testing.assert_array_equal(file.affine, cases[index].affine)
      np.testing.assert_allclose(file.get_qform(), cases[index].affine, atol=1e-3)
      assert (int(file.header["qform_code"]), int(file.header["sform_code"])) == (1, 1)
      assert file.header.get_xyzt_units()[0] == "mm"
      assert path.read_bytes()[4:8] == bytes(4)  # gzip's time of writing
      assert len(gzip.decompress(path.read_bytes())) == 352 + array.nbytes


def test_a_smaller_set_replaces_the_description_of_a_larger(tmp_path):
  phantom.write_msd(tmp_path, train_cases=1, test_cases=1, seed=0)
  phantom.write_msd(tmp_path, train_cases=1, test_cases=0, seed=0)
  assert json.loads((tmp_path / "dataset.json").read_text())["test"] == []


@pytest.mark.parametrize(
  "wrong", [{"train_cases": -1}, {"test_cases": -1}, {"seed": -1}, {"train_cases": 0, "test_cases": 0}]
)
def test_impossible_requests_are_refused(tmp_path, wrong):
  with pytest.raises(UserError, match="phantom: "):
    phantom.write_msd(tmp_path / "set", **{"train_cases": 1, "test_cases": 1, "seed": 0, **wrong})
  assert not (tmp_path / "set").exists()
