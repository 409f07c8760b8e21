"""2-D images and masks through Pillow: PNG, BMP and TIFF, with nothing lost and nothing guessed.

Every fault of a file is a `CaseError`, as in `cases`.
"""

import contextlib
import io
import logging
import os
import pathlib
import struct
import tempfile
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from selfreg_jax.data.cases import CaseError, check_regular, one_line, read_bytes

EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")

_FORMATS = ("PNG", "BMP", "TIFF")
_ONE_VALUE_A_PIXEL = ("1", "L", "I", "I;16", "I;16B", "F")
_BITS_PER_SAMPLE = 258  # tag of TIFF
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 1 << 17  # of a PNG; as many as the largest image has in the usual pieces of 8 KiB
_MOST_BYTES = 1 << 30  # of a file; Pillow's limit of pixels, with four values of two bytes each, is 0.7 GiB
# What Pillow raises on damaged files, apart from OSError.
_DAMAGE = (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)

# Pillow logs what it raises an error for, too.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
_BOMB = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def read_image(path: pathlib.Path) -> np.ndarray:
  """Reads the pixels of an image.

  Args:
    path: a PNG, BMP or TIFF file.

  Returns:
    (rows, columns, channels): one channel for grey images (uint8, or the file's wider type), three for colours (uint8).
    An alpha channel that hides nothing is left out.

  Raises:
    CaseError: the file cannot be read, is damaged, too large, of another format, holds several pages, or colours that
      eight bits cannot hold.
  """
  picture = _read(path)
  if picture.mode in ("P", "PA"):
    picture = picture.convert("RGBA" if "transparency" in picture.info or picture.mode == "PA" else "RGB")
  picture = _without_alpha(picture)
  if picture.mode not in (*_ONE_VALUE_A_PIXEL, "RGB"):
    raise CaseError(f"holds {picture.mode} pixels; grey and RGB images can be used")
  pixels = _pixels(picture)
  return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def read_mask(path: pathlib.Path) -> np.ndarray:
  """Reads the label values of a mask.

  Args:
    path: a PNG, BMP or TIFF file of one value a pixel; a palette's indices are the values, not its colours. Colour
      files are accepted where the three colours are equal.

  Returns:
    (rows, columns) values, not yet checked.

  Raises:
    CaseError: as for `read_image`, or a file of different colours.
  """
  picture = _read(path)
  if picture.mode == "P":
    return np.asarray(picture)
  picture = _without_alpha(picture)
  if picture.mode not in (*_ONE_VALUE_A_PIXEL, "RGB"):
    raise CaseError(f"holds {picture.mode} pixels; a mask has one value a pixel")
  pixels = _pixels(picture)
  if pixels.ndim == 2:
    return pixels
  if (pixels != pixels[..., :1]).any():
    raise CaseError("is a colour picture, not a mask of one value a pixel; save the ids of the classes, not colours")
  return pixels[..., 0]


def peek_shape(path: pathlib.Path) -> tuple[int, int, int] | None:
  """(rows, columns, channels) that a file's header promises; None if they cannot be had, or will be refused."""
  try:
    check_regular(path)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(path, formats=_FORMATS) as picture:
        return picture.height, picture.width, 1 if picture.mode in (*_ONE_VALUE_A_PIXEL, "LA") else 3
  except (CaseError, OSError, *_BOMB, *_DAMAGE):
    return None


def _read(path: pathlib.Path) -> Image.Image:
  content = read_bytes(path, _MOST_BYTES)
  if not content.startswith((b"II", b"MM")):
    return _decoded(content)
  with _caught_messages() as messages:
    try:
      return _decoded(content)
    except CaseError as error:
      messages.seek(0)
      if reason := messages.read().decode(errors="replace").splitlines()[-1:]:
        raise CaseError(f"damaged or truncated ({reason[0].strip()})") from error
      raise


@contextlib.contextmanager
def _caught_messages() -> Iterator[BinaryIO]:
  """Catches what libtiff writes to the process's own stderr, where Pillow then knows no more than a number."""
  with tempfile.TemporaryFile() as messages:
    stderr = os.dup(2)
    os.dup2(messages.fileno(), 2)
    try:
      yield messages
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


def _decoded(content: bytes) -> Image.Image:
  if content.startswith(_PNG_MAGIC):
    _check_chunks(content)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what Pillow warns of on the way to an error
      # Of what may be a decompression bomb Pillow only warns, up to twice this many pixels.
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      Image.open(io.BytesIO(content), formats=_FORMATS).verify()  # the checksums of a PNG, which loading skips
      picture = Image.open(io.BytesIO(content), formats=_FORMATS)
      _check_single(picture)
      _check_depth(picture, content)
      picture.load()
  except _BOMB as error:
    raise CaseError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels; cut it into tiles") from error
  except UnidentifiedImageError as error:
    raise CaseError("is not a PNG, BMP or TIFF file, or its first bytes are damaged") from error
  except (OSError, *_DAMAGE) as error:
    raise CaseError(f"damaged or truncated ({one_line(error) or type(error).__name__})") from error
  return picture


def _check_chunks(content: bytes) -> None:
  """Raises CaseError for a PNG of more chunks than an image can need: Pillow takes its time for each of them."""
  place = len(_PNG_MAGIC)
  for _ in range(_MOST_CHUNKS):
    if place >= len(content):
      return
    place += 12 + int.from_bytes(content[place : place + 4], "big")  # length, name and checksum have four bytes each
  raise CaseError(f"damaged: more than {_MOST_CHUNKS} chunks")


def _check_single(picture: Image.Image) -> None:
  try:
    picture.seek(1)  # counting all pages would take as long as there are many
  except EOFError:
    return
  raise CaseError("holds several pages; one image a file is needed")


def _check_depth(picture: Image.Image, content: bytes) -> None:
  """Pillow reads colours of 16 bits as 8 without a word."""
  bits = 8
  if picture.format == "PNG":
    bits = content[24]  # IHDR: 8 bytes signature, 8 bytes length and name, width, height, then the bit depth
  elif picture.format == "TIFF":
    bits = max(picture.tag_v2.get(_BITS_PER_SAMPLE, (8,)))
  if bits > 8 and picture.mode not in _ONE_VALUE_A_PIXEL:
    raise CaseError(f"holds colours of {bits} bits; save them with 8")


def _without_alpha(picture: Image.Image) -> Image.Image:
  if picture.mode not in ("LA", "RGBA"):
    return picture
  if np.asarray(picture.getchannel("A")).min() < 255:
    raise CaseError("is partly transparent; save it without an alpha channel")
  return picture.convert(picture.mode[:-1])


def _pixels(picture: Image.Image) -> np.ndarray:
  pixels = np.asarray(picture)
  return pixels.astype(np.uint8) if pixels.dtype == bool else pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
