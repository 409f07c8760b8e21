"""Packs of image and label: nothing in them is run, nothing beside them is read."""

import contextlib
import pickle
import zipfile
import zlib

import h5py
import numpy as np
import pytest

from selfreg_jax.data import cases, packs
from selfreg_jax.data.cases import CaseError

IMAGE = np.linspace(0, 1, 24).reshape(2, 3, 4)
LABEL = np.arange(24).reshape(2, 3, 4) % 3


def write(path, image=IMAGE, label=LABEL, key="image"):
  if path.suffix == ".h5":
    with h5py.File(path, "w") as file:
      file[key], file["label"] = image, label
  else:
    np.savez_compressed(path, **{key: image, "label": label})
  return path


@pytest.mark.parametrize("name", ["case.npz", "case.npy.h5"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays_come_back(tmp_path, name, dtype):
  path = write(tmp_path / name, IMAGE.astype(dtype), LABEL.astype("float32"), key="img")
  image, label = packs.read_arrays(path, "img", rank=3)
  assert image.dtype == np.float32
  np.testing.assert_allclose(image, IMAGE, atol=1e-3 if dtype == "float16" else 1e-7)
  np.testing.assert_array_equal(label, LABEL)
  assert packs.peek_shape(path, "img") == IMAGE.shape
  assert packs.peek_shape(path, "image") is None
  assert packs.peek_shape(tmp_path / f"none.{name}", "img") is None


def test_rounding_beyond_the_ends_is_cut_and_more_is_refused(tmp_path):
  image, _ = packs.read_arrays(write(tmp_path / "a.npz", IMAGE * 1.00001 - 1e-6), "image", rank=3)
  assert image.min() == 0
  assert image.max() == 1
  for wrong in (IMAGE * 1.01, IMAGE - 0.01, IMAGE * 400 - 125):
    with pytest.raises(CaseError, match=r"lie in \[0, 1\]"):
      packs.read_arrays(write(tmp_path / "a.npz", wrong), "image", rank=3)


@pytest.mark.parametrize("name", ["case.npz", "case.npy.h5"])
def test_other_contents_are_refused(tmp_path, name):
  path = tmp_path / name
  for image, label, rank, match in [
    (IMAGE, LABEL[0], 3, "'label' has shape"),
    (IMAGE, LABEL[:, :, :3], 3, r"image has shape \(2, 3, 4\), label \(2, 3, 3\)"),
    (IMAGE, LABEL, 2, "a slice is needed"),
    (IMAGE[0], LABEL[0], 3, "a volume is needed"),
    (np.zeros((0, 3, 4)), np.zeros((0, 3, 4)), 3, "a volume is needed"),
    (IMAGE * 1j, LABEL, 3, "complex128; numbers"),
    (np.where(LABEL, IMAGE, np.nan), LABEL, 3, "NaN"),
  ]:
    with pytest.raises(CaseError, match=match):
      packs.read_arrays(write(path, image, label), "image", rank=rank)
  with pytest.raises(CaseError, match="holds no 'img', but image, label"):
    packs.read_arrays(path, "img", rank=3)


@pytest.mark.parametrize("name", ["case.npz", "case.npy.h5"])
def test_damage_anywhere_is_a_case_error_or_harmless(tmp_path, name):
  path = write(tmp_path / name)
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for cut in [0, 1, 30, *rng.integers(0, len(content), 20)]:
    path.write_bytes(content[:cut])
    with pytest.raises(CaseError):
      packs.read_arrays(path, "image", rank=3)
  for _ in range(100):
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(changed)
    with contextlib.suppress(CaseError):  # HDF5 has no checksum of its values: a flipped bit there goes unnoticed
      packs.read_arrays(path, "image", rank=3)
  path.unlink()
  path.mkdir()
  with pytest.raises(CaseError, match="folder"):
    packs.read_arrays(path, "image", rank=3)


def test_nothing_in_a_pack_is_run(tmp_path):
  class Trap:
    def __reduce__(self):
      return (open, (str(tmp_path / "sprung"), "w"))

  with pytest.raises(CaseError, match="no plain arrays"):
    packs.read_arrays(write(tmp_path / "a.npz", np.array([Trap()], object)), "image", rank=3)
  (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
  with pytest.raises(CaseError, match="damaged or not"):
    packs.read_arrays(tmp_path / "b.npz", "image", rank=3)
  assert not (tmp_path / "sprung").exists()


def test_a_pack_does_not_reach_into_other_files(tmp_path):
  (tmp_path / "secret.bin").write_bytes(bytes(24 * 8))
  with h5py.File(write(tmp_path / "source.h5")) as file:
    virtual = h5py.VirtualSource(file["image"])
  for number, add in enumerate(
    [
      lambda file: file.create_dataset("image", (2, 3, 4), "f8", external=[(str(tmp_path / "secret.bin"), 0, 192)]),
      lambda file: file.__setitem__("image", h5py.ExternalLink("source.h5", "image")),
      lambda file: file.__setitem__("image", h5py.SoftLink("/label")),
      lambda file: file.create_virtual_dataset("image", _layout(virtual)),
      lambda file: file.create_group("image"),
    ]
  ):
    path = tmp_path / f"{number}.h5"
    with h5py.File(path, "w") as file:
      file["label"] = LABEL
      add(file)
    with pytest.raises(CaseError, match="'image' is not an array in this file"):
      packs.read_arrays(path, "image", rank=3)


def _layout(source):
  layout = h5py.VirtualLayout((2, 3, 4), "f8")
  layout[:] = source
  return layout


@pytest.mark.parametrize("name", ["case.npz", "case.npy.h5"])
def test_arrays_that_would_fill_the_memory_are_not_unpacked(tmp_path, monkeypatch, name):
  path = write(tmp_path / name)
  monkeypatch.setattr(cases, "MOST_BYTES", 95)
  with pytest.raises(CaseError, match="at most"):
    packs.read_arrays(path, "image", rank=3)


def rewrite(path, change, method=zipfile.ZIP_DEFLATED):
  """Writes the archive anew with another content of its image."""
  with zipfile.ZipFile(path) as archive:
    contents = {name: archive.read(name) for name in archive.namelist()}
  contents["image.npy"] = change(contents["image.npy"])
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, content in contents.items():
      archive.writestr(name, content)
  return path


def test_members_that_are_not_what_they_declare_are_not_unpacked(tmp_path):
  path, quotes = tmp_path / "a.npz", b"'" * 3
  for change, match in [
    (lambda content: content + bytes(100), "declares 320 bytes, the archive says 420"),
    (lambda content: content[:-1], "declares 320 bytes, the archive says 319"),
    (lambda content: content.replace(b"(2, 3, 4), }      ", b"(9999, 9999, 99),}"), "GiB where at most"),
    (lambda content: content.replace(b"'<f8'", quotes + b"  "), "no plain arrays"),
    (lambda content: b"\x93NUMPY\1\0\xb8\x0b" + b"(" * 3000, "no plain arrays"),
  ]:
    with pytest.raises(CaseError, match=match):
      packs.read_arrays(rewrite(write(path), change), "image", rank=3)
    assert packs.peek_shape(path, "image") is None


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_unpack_without_bounds_are_refused(tmp_path, method):
  path = rewrite(write(tmp_path / "a.npz"), lambda content: content, method)
  with pytest.raises(CaseError, match=r"numpy\.savez does not know"):
    packs.read_arrays(path, "image", rank=3)


def test_members_that_want_a_password_are_refused(tmp_path):
  content = bytearray(write(tmp_path / "a.npz").read_bytes())
  content[content.index(b"PK\1\2") + 8] |= 1
  content[6] |= 1
  (tmp_path / "a.npz").write_bytes(content)
  with pytest.raises(CaseError, match="password"):
    packs.read_arrays(tmp_path / "a.npz", "image", rank=3)


def write_chunk(path, content, **options):
  """A file whose image has one chunk, stored as it is given."""
  with h5py.File(path, "w") as file:
    file["label"] = LABEL
    image = file.create_dataset("image", IMAGE.shape, "f8", chunks=IMAGE.shape, **options)
    image.id.write_direct_chunk((0, 0, 0), content)
  return path


def test_a_chunk_may_not_unpack_to_more_than_it_declares(tmp_path):
  packed = zlib.compress(IMAGE.tobytes())
  image, _ = packs.read_arrays(write_chunk(tmp_path / "a.h5", packed, compression="gzip"), "image", rank=3)
  np.testing.assert_allclose(image, IMAGE, atol=1e-7)
  more = zlib.compress(IMAGE.tobytes() + bytes(1 << 20))
  with pytest.raises(CaseError, match="a chunk unpacks to more"):
    packs.read_arrays(write_chunk(tmp_path / "a.h5", more, compression="gzip"), "image", rank=3)
  with pytest.raises(CaseError, match="damaged or not an HDF5"):
    packs.read_arrays(write_chunk(tmp_path / "a.h5", packed[:20] + b"x" * 50, compression="gzip"), "image", rank=3)


@pytest.mark.parametrize(
  "options", [{"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}]
)
def test_usual_filters_are_read_and_others_refused(tmp_path, options):
  path = tmp_path / "a.h5"
  with h5py.File(path, "w") as file:
    file["label"] = LABEL
    file.create_dataset("image", data=IMAGE, chunks=(1, 3, 2), **options)
  np.testing.assert_allclose(packs.read_arrays(path, "image", rank=3)[0], IMAGE, atol=1e-7)
  with h5py.File(path, "w") as file:
    file["label"] = LABEL
    file.create_dataset("image", data=LABEL, chunks=(1, 3, 2), scaleoffset=4)
  with pytest.raises(CaseError, match="filters"):
    packs.read_arrays(path, "image", rank=3)
