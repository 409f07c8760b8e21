"""Reading single files, orientation there and back, intensities, labels."""

import gzip
import itertools
import os

import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.data import cases
from selfreg_jax.data.cases import CaseError, Geometry
from selfreg_jax.data.manifest import Intensity

SHAPE = (5, 4, 3)
AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.9, 0, 20], [0, 0, 5, -300], [0, 0, 0, 1.0]])


def volume(dtype=np.int16, shape=SHAPE):
  return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write(path, array, affine=AFFINE, **header):
  """Writes a NIfTI file; `header` sets fields as they are, past nibabel's checks."""
  image = nib.Nifti1Image(array, affine, dtype=array.dtype)
  image.set_qform(affine, 1)
  image.set_sform(affine, 1)
  content = bytearray(image.to_bytes())
  if header:
    raw = nib.Nifti1Header(bytes(content[:348]), check=False)
    for field, value in header.items():
      raw[field] = value
    content[:348] = raw.binaryblock
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  return path


def raw_volume(path, array, affine=AFFINE, **header):
  return cases.read_nifti(write(path, array, affine, **header))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.float32, np.float64, ">i2", ">f4"])
def test_a_volume_is_read_as_it_was_written(tmp_path, name, dtype):
  raw = raw_volume(tmp_path / name, volume(np.dtype(dtype)))
  np.testing.assert_array_equal(raw.array, volume())
  np.testing.assert_allclose(raw.affine, AFFINE, rtol=1e-6)
  dtype = np.dtype(dtype)
  assert raw.array.dtype == (dtype.newbyteorder("=") if dtype.kind in "iu" else np.float32)


def test_nifti_2_is_read(tmp_path):
  nib.Nifti2Image(volume(), AFFINE).to_filename(tmp_path / "a.nii.gz")
  np.testing.assert_array_equal(cases.read_nifti(tmp_path / "a.nii.gz").array, volume())


def test_scaling_is_applied_as_nibabel_does(tmp_path):
  path = write(tmp_path / "a.nii.gz", volume(), scl_slope=0.5, scl_inter=-1024)
  raw = cases.read_nifti(path)
  assert raw.array.dtype == np.float32
  np.testing.assert_allclose(raw.array, nib.load(path).get_fdata(), rtol=1e-6)


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
  image = nib.Nifti1Image(volume()[..., None, None], AFFINE)
  image.to_filename(tmp_path / "a.nii.gz")
  assert nib.load(tmp_path / "a.nii.gz").shape == (*SHAPE, 1, 1)
  np.testing.assert_array_equal(cases.read_nifti(tmp_path / "a.nii.gz").array, volume())


def test_peek_shape_reads_the_header_only(tmp_path):
  path = write(tmp_path / "a.nii.gz", volume())
  assert cases.peek_shape(path) == SHAPE
  write(tmp_path / "b.nii", volume())
  (tmp_path / "b.nii").write_bytes((tmp_path / "b.nii").read_bytes()[:400])
  assert cases.peek_shape(tmp_path / "b.nii") == SHAPE
  assert cases.peek_shape(tmp_path / "missing.nii.gz") is None


def cut(path, keep):
  path.write_bytes(path.read_bytes()[:keep])


def flip_crc(path):
  content = bytearray(path.read_bytes())
  content[-8] ^= 1  # a gzip member ends with CRC-32 and length, four bytes each
  path.write_bytes(content)


def flip_data(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = {
  "gz cut": ("a.nii.gz", lambda path: cut(path, -20), "truncated"),
  "gz without its trailer": ("a.nii.gz", lambda path: cut(path, -4), "truncated"),
  "gz CRC flipped": ("a.nii.gz", flip_crc, "CRC"),
  "gz data flipped": ("a.nii.gz", flip_data, "gzip"),
  "nii cut by a byte": ("a.nii", lambda path: cut(path, -1), "truncated: 471 bytes where the header promises 472"),
  "nii cut in the header": ("a.nii", lambda path: cut(path, 100), "not a NIfTI"),
  "text": ("a.nii.gz", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a gzip"),
  "text in gz": ("a.nii.gz", lambda path: path.write_bytes(gzip.compress(b"hello" * 200)), "not a NIfTI"),
  "empty": ("a.nii.gz", lambda path: path.write_bytes(b""), "is empty"),
  "empty in gz": ("a.nii.gz", lambda path: path.write_bytes(gzip.compress(b"")), "is empty"),
  "empty nii": ("a.nii", lambda path: path.write_bytes(b""), "is empty"),
  "gz named nii": ("a.nii", lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "name it .nii.gz"),
  "missing": ("a.nii.gz", lambda path: path.unlink(), "No such file"),
  "folder": ("a.nii.gz", lambda path: (path.unlink(), path.mkdir()), "is a folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, damage):
  name, harm, message = DAMAGES[damage]
  path = write(tmp_path / name, volume())
  harm(path)
  with pytest.raises(CaseError, match=message) as caught:
    cases.read_nifti(path)
  assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
  path = write(tmp_path / "a.nii.gz", volume())
  path.chmod(0)
  with pytest.raises(CaseError, match="Permission denied"):
    cases.read_nifti(path)


def test_an_error_of_the_disk_is_refused(tmp_path, monkeypatch):
  path = write(tmp_path / "a.nii", volume())

  def fail(self, mode):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(type(path), "open", fail)
  with pytest.raises(CaseError, match="Input/output error"):
    cases.read_nifti(path)


HEADERS = {
  "zero pixdim": ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, r"pixdim.*\(0, 1, 1\)"),
  "negative pixdim": ({"pixdim": [1, 1, -1, 1, 0, 0, 0, 0]}, "pixdim"),
  "pixdim NaN": ({"pixdim": [1, 1, 1, np.nan, 0, 0, 0, 0]}, "pixdim"),
  "singular sform": ({"srow_z": [0, 0, 0, 0]}, "singular"),
  "sform without rank": ({"srow_x": [1, 0, 0, 0], "srow_y": [1, 0, 0, 0]}, "singular"),
  "sform NaN": ({"srow_x": [np.nan, 0, 0, 0]}, "singular or not finite"),
  "bad quaternion": ({"sform_code": 0, "quatern_b": 3}, "affine"),
  "unknown type": ({"datatype": 3}, "data type"),
  "infinite intercept": ({"scl_slope": 2, "scl_inter": np.inf}, "header"),
  "offset in the header": ({"vox_offset": 16}, "byte 16"),
  "offset NaN": ({"vox_offset": np.nan}, "voxels start"),
  "offset beyond the end": ({"vox_offset": 1e30}, "the voxels start at byte"),
  "no dimensions": ({"dim": [0, 1, 1, 1, 1, 1, 1, 1]}, "dimensions"),
  "negative size": ({"dim": [3, 5, -4, 3, 1, 1, 1, 1]}, "shape"),
  "two dimensions": ({"dim": [2, 5, 12, 1, 1, 1, 1, 1]}, "one 3-D volume"),
  "micrometres": ({"xyzt_units": 3}, "micrometres"),
  "header of a pair": ({"magic": b"ni1"}, "pair"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers_are_refused(tmp_path, case):
  fields, message = HEADERS[case]
  with pytest.raises(CaseError, match=message):
    raw_volume(tmp_path / "a.nii.gz", volume(), **fields)


def test_a_zero_qfac_means_one(tmp_path):
  raw = raw_volume(tmp_path / "a.nii.gz", volume(), sform_code=0, pixdim=[0, 0.8, 0.9, 5, 0, 0, 0, 0])
  np.testing.assert_allclose(raw.affine, AFFINE, rtol=1e-6)


def test_other_contents_are_refused(tmp_path):
  with pytest.raises(CaseError, match="one 3-D volume"):
    raw_volume(tmp_path / "a.nii.gz", volume(shape=(*SHAPE, 2)))
  with pytest.raises(CaseError, match="complex"):
    raw_volume(tmp_path / "a.nii.gz", volume(np.complex64))
  with pytest.raises(CaseError, match="RGB"):
    raw_volume(tmp_path / "a.nii.gz", np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "1 NaN"), (np.inf, "1 Inf"), (-np.inf, "1 Inf"), (1e300, "Inf")])
def test_voxels_that_are_not_finite_are_refused(tmp_path, bad, message):
  array = volume(np.float64)
  array[1, 2, 0] = bad
  with pytest.raises(CaseError, match=message):
    raw_volume(tmp_path / "a.nii.gz", array)


def test_whatever_the_bytes_the_only_error_is_a_case_error(tmp_path):
  rng = np.random.default_rng(0)
  good = np.frombuffer(write(tmp_path / "a.nii", volume(np.float32)).read_bytes(), np.uint8)
  path = tmp_path / "b.nii"
  with np.errstate(all="ignore"):
    for _ in range(500):
      content = good.copy()
      places = rng.integers(0, 352, size=rng.integers(1, 6))
      content[places] = rng.integers(0, 256, size=len(places))
      path.write_bytes(content.tobytes())
      try:
        raw = cases.read_nifti(path)
      except CaseError:
        continue
      assert raw.array.ndim == 3
      assert np.isfinite(raw.affine).all()


def orientations():
  return [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
  ]


def affine_of(orientation):
  """An oblique affine whose closest axes are the given (target axis, sign) rows, with spacings 1, 2 and 3."""
  matrix = np.zeros((3, 3))
  for file_axis, (target, sign) in enumerate(orientation):
    matrix[int(target), file_axis] = sign
  turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.15)
  return nib.affines.from_matvec(turn @ matrix @ np.diag([1.0, 2.0, 3.0]), [7, -8, 9])


def test_slices_of_all_48_orientations_are_canonical_and_come_back():
  assert len(orientations()) == 48
  array = volume()
  for orientation in orientations():
    affine = affine_of(orientation)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    sizes = nib.affines.voxel_sizes(canonical.affine)
    for axis in range(3):
      geometry = Geometry(affine, SHAPE, "ras", axis)
      slices = geometry.to_slices(array)
      others = [other for other in range(3) if other != axis]
      np.testing.assert_array_equal(slices, np.moveaxis(np.asarray(canonical.dataobj), axis, 0))
      np.testing.assert_array_equal(geometry.from_slices(slices), array)
      assert geometry.shape == slices.shape
      np.testing.assert_allclose(geometry.spacing, sizes[[axis, *others]])
      assert geometry.axcodes == tuple("RAS"[a] for a in (axis, *others))


def test_stored_slices_are_those_of_the_authors():
  array = volume()
  affine = AFFINE @ np.diag([-1, 1, 1, 1])
  geometry = Geometry(affine, SHAPE, "stored")
  np.testing.assert_array_equal(geometry.to_slices(array), np.transpose(array, (2, 0, 1)))
  np.testing.assert_array_equal(geometry.from_slices(geometry.to_slices(array)), array)
  assert geometry.axcodes == ("S", "L", "A")
  np.testing.assert_allclose(geometry.spacing, (5, 0.8, 0.9))


def test_geometry_takes_nested_tuples_and_further_axes():
  nested = tuple(tuple(row) for row in affine_of(orientations()[17]).tolist())
  geometry = Geometry(nested, SHAPE)
  array = volume(shape=(*SHAPE, 2))
  slices = geometry.to_slices(array)
  assert slices.shape == (*geometry.shape, 2)
  np.testing.assert_array_equal(geometry.from_slices(slices), array)


def test_geometry_refuses_other_shapes():
  geometry = Geometry(AFFINE, SHAPE)
  with pytest.raises(ValueError, match="shape"):
    geometry.to_slices(volume(shape=(3, 4, 5)))
  with pytest.raises(ValueError, match="shape"):
    geometry.from_slices(volume())


def test_constant_images_and_tiny_slices_are_refused(tmp_path):
  raw = raw_volume(tmp_path / "a.nii.gz", np.full(SHAPE, -1024, np.int16))
  with pytest.raises(CaseError, match="every voxel is -1024"):
    cases.check_image(raw, Geometry(raw.affine, SHAPE))
  raw = raw_volume(tmp_path / "a.nii.gz", volume(shape=(5, 1, 3)))
  with pytest.raises(CaseError, match="5 x 1"):
    cases.check_image(raw, Geometry(raw.affine, (5, 1, 3)))
  cases.check_image(raw, Geometry(raw.affine, (5, 1, 3), axis=1))


def test_image_and_label_must_have_one_shape(tmp_path):
  image = raw_volume(tmp_path / "a.nii.gz", volume())
  label = raw_volume(tmp_path / "b.nii.gz", volume(shape=(4, 5, 3)))
  with pytest.raises(CaseError, match=r"\(5, 4, 3\).*\(4, 5, 3\)"):
    cases.check_pair(image, label)


def shifted(voxels):
  return AFFINE @ nib.affines.from_matvec(np.eye(3), voxels)


@pytest.mark.parametrize(
  "affine",
  [
    shifted([0.5, 0, 0]),
    shifted([0, -0.5, 0]),
    shifted([0, 0, 0.5]),
    AFFINE @ np.diag([-1, 1, 1, 1]),
    AFFINE * 1.05,
    AFFINE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0, 0)),
  ],
)
def test_image_and_label_must_lie_in_one_place(tmp_path, affine):
  affine[3] = [0, 0, 0, 1]
  image = raw_volume(tmp_path / "a.nii.gz", volume())
  label = raw_volume(tmp_path / "b.nii.gz", volume(), affine)
  with pytest.raises(CaseError, match="voxels along"):
    cases.check_pair(image, label)


def test_rounding_of_affines_is_no_fault(tmp_path):
  shape = (300, 300, 2)
  array = np.zeros(shape, np.uint8)
  rng = np.random.default_rng(1)
  for trial in range(20):
    turn = nib.eulerangles.euler2mat(*rng.uniform(-0.5, 0.5, 3))
    affine = nib.affines.from_matvec(turn @ np.diag([0.7421875, 0.7421875, 3.3]), rng.uniform(-900, 900, 3))
    both = raw_volume(tmp_path / f"{trial}.nii", array, affine)
    only_sform = raw_volume(tmp_path / "s.nii", array, affine, qform_code=0)
    only_qform = raw_volume(tmp_path / "q.nii", array, affine, sform_code=0)
    rounded = raw_volume(tmp_path / "r.nii", array, np.round(affine, 4))
    cases.check_pair(both, only_sform)
    cases.check_pair(both, only_qform)
    cases.check_pair(only_sform, only_qform)
    cases.check_pair(both, rounded)


def test_qforms_are_compared_with_qforms(tmp_path):
  """The float32 quaternion of a slightly oblique LPS volume is off by more than the tolerance, alike in both files."""
  shape = (512, 512, 2)
  array = np.zeros(shape, np.uint8)
  turn = nib.eulerangles.euler2mat(0.0007, 0.0009, 0.0011) @ np.diag([-1, -1, 1])
  affine = nib.affines.from_matvec(turn @ np.diag([0.7, 0.7, 2.0]), [170, 170, -900])
  both = raw_volume(tmp_path / "a.nii", array, affine)
  only_qform = raw_volume(tmp_path / "b.nii", array, affine, sform_code=0)
  apart = np.linalg.solve(both.affine, only_qform.affine @ [511, 511, 1, 1]) - [511, 511, 1, 1]
  assert np.abs(apart).max() > cases.AFFINE_TOLERANCE
  cases.check_pair(both, only_qform)


def test_labels_become_uint8(tmp_path):
  array = volume() % 4
  for dtype in (np.uint8, np.int16, np.int64, np.float32):
    checked = cases.checked_labels(array.astype(dtype), cases.LabelRule(4))
    assert checked.dtype == np.uint8
    np.testing.assert_array_equal(checked, array)
  scaled = raw_volume(tmp_path / "a.nii.gz", (array * 51).astype(np.uint8), scl_slope=1 / 51, scl_inter=0)
  np.testing.assert_array_equal(cases.checked_labels(scaled.array, cases.LabelRule(4)), array)
  assert cases.checked_labels(np.full(SHAPE, 255), cases.LabelRule(256)).max() == 255


def test_labels_outside_the_classes_are_named_with_their_counts():
  array = np.zeros(SHAPE, np.int16)
  array[0, 0] = 3
  array[1, 1, 1] = -1
  with pytest.raises(CaseError, match=r"0\.\.2: -1 \(1 voxels\), 3 \(3 voxels\); the wrong label set"):
    cases.checked_labels(array, cases.LabelRule(3))
  with pytest.raises(CaseError, match=r"10 \(1 voxels\) and 49 more values"):
    cases.checked_labels(volume(), cases.LabelRule(3))


def test_labels_must_be_integers():
  with pytest.raises(CaseError, match=r"not integers: 0\.5 \(2 voxels\)"):
    cases.checked_labels(np.array([0, 0.5, 1, 0.5], np.float32), cases.LabelRule(2))


def test_window_clips_and_scales():
  output = cases.apply_intensity(np.array([[-2000, -125, 75, 275, 3000]], np.int16), Intensity("window", -125, 275))
  assert output.dtype == np.float32
  np.testing.assert_allclose(output, [[0, 0, 0.5, 1, 1]])


def test_minmax_and_zscore_are_of_the_volume():
  array = np.random.default_rng(0).normal(300, 40, SHAPE).astype(np.float32)
  minmax = cases.apply_intensity(array, Intensity("minmax"))
  np.testing.assert_allclose(minmax, (array - array.min()) / (array.max() - array.min()), atol=1e-6)
  zscore = cases.apply_intensity(array, Intensity("zscore"))
  np.testing.assert_allclose([zscore.mean(), zscore.std()], [0, 1], atol=1e-5)
  with pytest.raises(ValueError, match="median"):
    cases.apply_intensity(array, Intensity("median"))


def test_intensities_leave_the_raw_array_alone():
  array = volume(np.float32)
  cases.apply_intensity(array, Intensity("window", 0, 1))
  np.testing.assert_array_equal(array, volume())


@pytest.mark.parametrize("kind", ["window", "minmax", "zscore"])
def test_stored_values_times_scale_are_the_network_input(kind):
  rng = np.random.default_rng(0)
  network_input = rng.uniform(0, 1, (7, 40, 50)).astype(np.float32)
  network_input[0, 0, :2] = 0, 1
  stored, dtype, scale = cases.encode(network_input, kind)
  assert stored.dtype == dtype
  error = np.abs(stored.astype(np.float32) * np.float32(scale) - network_input).max()
  assert error < (1e-5 if dtype == "uint16" else 1e-12)
  if dtype == "uint16":
    assert stored[0, 0, 0] == 0
    assert stored[0, 0, 1] == 65535


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_a_header_declares_is_compared_with_the_limit_before_it_is_read(tmp_path, monkeypatch, name):
  path = write(tmp_path / name, volume(np.uint8), dim=[3, 30000, 30000, 3, 1, 1, 1, 1])
  with pytest.raises(CaseError, match=r"\(30000, 30000, 3\) uint8, 10.1 GiB where at most 1 GiB"):
    cases.read_nifti(path)
  assert cases.peek_shape(path) is None  # or the disk would be found too small for it
  monkeypatch.setattr(cases, "MOST_BYTES", 4 * 60)  # a byte each, but float32 once it is read
  cases.read_nifti(write(path, volume(np.uint8)))
  with pytest.raises(CaseError, match="at most"):
    cases.read_nifti(write(path, volume(np.float64)))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_file_may_be_padded_but_not_hold_more_than_its_header_declares(tmp_path, name):
  path = write(tmp_path / name, volume())
  content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()

  def pad(size):
    padded = content + bytes(size)
    path.write_bytes(gzip.compress(padded, 1) if path.suffix == ".gz" else padded)

  pad(1 << 20)
  np.testing.assert_array_equal(cases.read_nifti(path).array, volume())
  pad((1 << 20) + 1)
  with pytest.raises(CaseError, match="holds more than its header declares"):
    cases.read_nifti(path)


def test_a_damaged_stream_is_told_before_the_header_that_it_garbled(tmp_path):
  path = write(tmp_path / "a.nii.gz", volume(), magic=b"abc")
  with pytest.raises(CaseError, match="is not a NIfTI"):
    cases.read_nifti(path)
  flip_crc(path)
  with pytest.raises(CaseError, match="CRC"):
    cases.read_nifti(path)


def test_voxels_behind_an_extension_are_found(tmp_path):
  path = write(tmp_path / "a.nii", volume(), vox_offset=1000)
  content = path.read_bytes()
  path.write_bytes(content[:352] + bytes(648) + content[352:])
  np.testing.assert_array_equal(cases.read_nifti(path).array, volume())
  with pytest.raises(CaseError, match="voxels start at byte 1e"):
    cases.read_nifti(write(path, volume(), vox_offset=1e8))


def test_devices_are_not_read(tmp_path):
  (tmp_path / "a.nii").symlink_to("/dev/zero")
  with pytest.raises(CaseError, match="is a device"):
    cases.read_nifti(tmp_path / "a.nii")


@pytest.mark.parametrize("field", ["qform_code", "sform_code"])
def test_unknown_codes_of_the_affines_are_refused(tmp_path, field):
  with pytest.raises(CaseError, match=f"{field} 99 is not known"):
    cases.read_nifti(write(tmp_path / "a.nii", volume(), **{field: 99}))


def test_a_header_without_its_own_size_is_written_back_in_silence(tmp_path, capfd, caplog):
  raw = raw_volume(tmp_path / "a.nii", volume(), sizeof_hdr=0)
  cases.write_like(tmp_path / "b.nii", volume(np.uint8), raw.header)
  assert (capfd.readouterr().err, caplog.text) == ("", "")
  assert nib.load(tmp_path / "b.nii").header["sizeof_hdr"] == 348


def test_affines_of_the_smallest_voxels_are_invertible():
  assert cases.is_invertible(np.diag([1e-5, 1e-5, 1e-5, 1]))
  for wrong in (np.diag([1, 1, 0, 1.0]), np.full((4, 4), 1.0), np.diag([1, np.nan, 1, 1]), np.diag([1e300, 1, 1, 1])):
    assert not cases.is_invertible(wrong)


def test_ranges_that_float32_cannot_hold_are_refused():
  image = np.zeros((2, 3, 4, 1), np.float32)
  image[0, 0, :2, 0] = -3e38, 3e38
  with pytest.raises(CaseError, match="too far apart"):
    cases.check_slices(image)
  image[...] = 0
  image[0, 0, 0] = 1e-45
  cases.check_slices(image)
  with pytest.raises(CaseError, match="as good as constant"):
    cases.apply_intensity(image[..., 0], Intensity("zscore"))


def test_slices_that_cannot_be_resized_are_refused():
  image = np.zeros((1, 2, cases.MOST_PIXELS_A_SIDE + 1, 1), np.uint8)
  image[0, 0, 0] = 1
  with pytest.raises(CaseError, match="cut it into tiles"):
    cases.check_slices(image)


def test_labels_are_checked_in_pieces(monkeypatch):
  monkeypatch.setattr(cases, "_PIECE", 7)
  for array in (volume() % 4, np.asfortranarray(volume() % 4), (volume() % 4).astype(np.float32)[::-1, :, ::2]):
    np.testing.assert_array_equal(cases.checked_labels(array, cases.LabelRule(4)), array)
    with pytest.raises(CaseError, match=rf"3 \({(array == 3).sum()} voxels\)"):
      cases.checked_labels(array, cases.LabelRule(3))
  with pytest.raises(CaseError, match="no label is above 4"):
    cases.checked_labels(volume() % 5, cases.LabelRule(9, must_exceed=4))
  monkeypatch.setattr(cases, "_DISTINCT_VALUES", 10)
  with pytest.raises(CaseError, match="more values"):
    cases.checked_labels(volume(), cases.LabelRule(3))


def test_labels_that_are_not_finite_are_no_class():
  with pytest.raises(CaseError, match="holds 1 NaN"):
    cases.checked_labels(np.array([0, np.nan, 1], np.float32), cases.LabelRule(2))
