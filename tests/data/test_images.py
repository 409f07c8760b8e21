"""2-D images and masks: what comes back, and damaged files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from selfreg_jax.data import images
from selfreg_jax.data.cases import CaseError

RGB = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
GREY = np.arange(35, dtype=np.uint8).reshape(7, 5)


def save(path, array, mode=None, **options):
  picture = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
  picture.save(path, **options)
  return path


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff"])
def test_colours_and_grey_come_back_as_they_are(tmp_path, ending):
  np.testing.assert_array_equal(images.read_image(save(tmp_path / f"rgb.{ending}", RGB)), RGB)
  grey = save(tmp_path / f"grey.{ending}", GREY)
  np.testing.assert_array_equal(images.read_image(grey), GREY[..., np.newaxis])
  np.testing.assert_array_equal(images.read_mask(grey), GREY)
  assert images.peek_shape(grey) == (7, 5, 1)
  assert images.peek_shape(tmp_path / f"rgb.{ending}") == (7, 5, 3)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_grey_are_kept(tmp_path, ending):
  deep = GREY.astype(np.uint16) * 1000
  path = save(tmp_path / f"deep.{ending}", deep)
  assert images.read_image(path).dtype == np.uint16
  np.testing.assert_array_equal(images.read_image(path)[..., 0], deep)
  np.testing.assert_array_equal(images.read_mask(path), deep)


def test_the_indices_of_a_palette_are_the_labels_and_its_colours_the_image(tmp_path):
  picture = Image.fromarray(GREY % 3, "P")
  picture.putpalette([10, 20, 30, 0, 255, 0, 200, 0, 0])
  picture.save(tmp_path / "palette.png")
  np.testing.assert_array_equal(images.read_mask(tmp_path / "palette.png"), GREY % 3)
  colours = np.array([[10, 20, 30], [0, 255, 0], [200, 0, 0]], np.uint8)
  np.testing.assert_array_equal(images.read_image(tmp_path / "palette.png"), colours[GREY % 3])


def test_masks_of_one_bit_and_of_three_equal_colours(tmp_path):
  black_and_white = save(tmp_path / "bits.png", (GREY % 2 == 1))
  np.testing.assert_array_equal(images.read_mask(black_and_white), GREY % 2)
  equal = save(tmp_path / "equal.png", np.stack([GREY] * 3, axis=-1))
  np.testing.assert_array_equal(images.read_mask(equal), GREY)
  with pytest.raises(CaseError, match="colour picture, not a mask"):
    images.read_mask(save(tmp_path / "colours.png", RGB))


def test_an_alpha_channel_is_dropped_only_if_it_hides_nothing(tmp_path):
  opaque = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
  np.testing.assert_array_equal(images.read_image(save(tmp_path / "opaque.png", opaque)), RGB)
  with pytest.raises(CaseError, match="transparent"):
    images.read_image(save(tmp_path / "transparent.png", np.dstack([RGB, GREY])))


def png(color_type, depth, samples):
  def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

  header = struct.pack(">IIBBBBB", 2, 2, depth, color_type, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(samples)) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_are_not_cut_to_eight(tmp_path):
  (tmp_path / "deep.png").write_bytes(png(2, 16, b"\0" + bytes(range(12)) + b"\0" + bytes(range(12))))
  with pytest.raises(CaseError, match="16 bits"):
    images.read_image(tmp_path / "deep.png")


def test_damaged_files_are_refused(tmp_path):
  for ending in ("png", "bmp", "tif"):
    path = save(tmp_path / f"whole.{ending}", np.tile(RGB, (9, 9, 1)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CaseError, match="damaged"):
      images.read_image(path)
    path.write_bytes(b"")
    with pytest.raises(CaseError, match="is empty"):
      images.read_image(path)
    path.write_text("no image at all")
    with pytest.raises(CaseError, match="is not a PNG, BMP or TIFF"):
      images.read_image(path)
  content = bytearray(png(0, 8, b"\0\1\2\0\3\4"))
  content[-20] ^= 1  # in the checksum of the pixels
  (tmp_path / "flipped.png").write_bytes(content)
  with pytest.raises(CaseError, match="damaged"):
    images.read_image(tmp_path / "flipped.png")
  with pytest.raises(CaseError, match="cannot be read"):
    images.read_image(tmp_path / "none.png")


def test_other_formats_modes_and_pages_are_refused(tmp_path):
  save(tmp_path / "lossy.jpg", RGB)
  (tmp_path / "lossy.jpg").rename(tmp_path / "lossy.png")
  with pytest.raises(CaseError, match="is not a PNG"):
    images.read_image(tmp_path / "lossy.png")
  with pytest.raises(CaseError, match="CMYK"):
    images.read_image(save(tmp_path / "print.tif", RGB, mode="CMYK"))
  pages = [Image.fromarray(GREY), Image.fromarray(GREY)]
  pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
  with pytest.raises(CaseError, match="several pages"):
    images.read_image(tmp_path / "pages.tif")


@pytest.mark.parametrize("factor", [0.9, 0.4])
def test_decompression_bombs_are_not_unpacked(tmp_path, monkeypatch, factor):
  path = save(tmp_path / "large.png", GREY)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(GREY.size * factor))  # Pillow warns at once, raises at twice that
  with pytest.raises(CaseError, match="cut it into tiles"):
    images.read_image(path)


def test_what_libtiff_prints_becomes_the_reason(tmp_path, capfd):
  path = save(tmp_path / "a.tif", np.tile(RGB, (9, 9, 1)), compression="tiff_adobe_deflate")
  content = bytearray(path.read_bytes())
  with Image.open(path) as picture:
    (start, *_) = picture.tag_v2[273]  # of the first strip
  content[start : start + 20] = bytes(20)
  path.write_bytes(content)
  with pytest.raises(CaseError, match="ZIPDecode: Decoding error"):
    images.read_image(path)
  assert capfd.readouterr().err == ""


def test_a_png_of_endless_chunks_is_refused(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  path.write_bytes(png(0, 8, b"\0\1\2\0\3\4"))
  assert images.read_image(path).shape == (2, 2, 1)
  monkeypatch.setattr(images, "_MOST_CHUNKS", 2)
  with pytest.raises(CaseError, match="more than 2 chunks"):
    images.read_image(path)


def test_files_beyond_any_image_are_not_read(tmp_path, monkeypatch):
  path = save(tmp_path / "a.png", GREY)
  monkeypatch.setattr(images, "_MOST_BYTES", path.stat().st_size - 1)
  with pytest.raises(CaseError, match="holds more than"):
    images.read_image(path)
