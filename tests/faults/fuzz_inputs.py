"""Damaged and hostile files of every kind that is read: tiny healthy ones, mutations of them, and bombs made by hand.

Everything follows from a seed. An `Input` is one file among healthy ones; `lay_out` puts it there and says with which
arguments `selfreg_jax.data.prepare` is to read the folder.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import pathlib
import re
import struct
import tempfile
import zipfile
import zlib

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

from selfreg_jax.data import prepare

GIB = 1 << 30
KINDS = ("nifti", "npz", "h5", "png", "tiff", "xml", "json")

_SHAPE = (6, 5, 4)
_AFFINE = np.array([[-0.8, 0, 0, 10], [0, 0.9, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
_EDGES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Input:
  """One file.

  Attributes:
    kind: of `KINDS`.
    role: "image" or "label", the place that it takes; "" where the file holds both.
    ending: of its name; of a file of a prepared dataset the whole name.
    what: how it was made, for the report of a failure.
    content: None for a folder in place of the file.
  """

  kind: str
  role: str
  ending: str
  what: str
  content: bytes | None

  @property
  def name(self):
    """The file's name among the healthy ones."""
    if self.kind in ("array", "manifest"):
      return self.ending
    fixed = {"npz": "case0005_slice000.npz", "h5": "case0001.npy.h5", "json": "dataset.json"}
    return fixed.get(self.kind, f"{self.role}_bad{self.ending}")

  @property
  def named(self):
    """What the error may name: the file, or those that a description is at odds with."""
    others = {"json": ("imagesTr/", "labelsTr/"), "manifest": (".npy: ", ": missing")}
    return self.name, *others.get(self.kind, ())


# Healthy files.


def _arrays():
  rng = np.random.default_rng(0)
  return rng.integers(-300, 900, _SHAPE).astype(np.int16), rng.integers(0, 3, _SHAPE).astype(np.uint8)


def _nifti(array, *, kind=nib.Nifti1Image, compressed=True, **header):
  image = kind(array, _AFFINE, dtype=array.dtype)
  image.set_sform(_AFFINE, 1)
  image.set_qform(_AFFINE, 1)
  content = image.to_bytes()
  if header:
    content = _with_header(content, header)
  return gzip.compress(content, mtime=0) if compressed else content


def _with_header(content, fields):
  kind = nib.Nifti1Header if content[:4] == struct.pack("<i", 348) else nib.Nifti2Header
  header = kind(content[: kind.sizeof_hdr], check=False)
  for field, value in fields.items():
    header[field] = value
  return header.binaryblock + content[kind.sizeof_hdr :]


def _npz(image, label, *, compressed=True):
  buffer = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(buffer, image=image, label=label)
  return buffer.getvalue()


def _h5(image, label, **options):
  buffer = io.BytesIO()
  with h5py.File(buffer, "w") as file:
    file.create_dataset("image", data=image, **options)
    file.create_dataset("label", data=label, **options)
  return buffer.getvalue()


def _picture(array, form, **options):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, form, **options)
  return buffer.getvalue()


def _xml(outlines, extra=""):
  regions = "".join(
    f'<Region Id="{number}" NegativeROA="0"><Vertices>'
    + "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
    + "</Vertices></Region>"
    for number, outline in enumerate(outlines, 1)
  )
  return f"<Annotations>{extra}<Annotation><Regions>{regions}</Regions></Annotation></Annotations>".encode()


_OUTLINES = [[(1, 1), (9, 1.5), (9, 7), (2, 8)], [(12, 3), (15, 9), (11, 10)]]


@functools.cache
def healthy():
  """(kind, role, ending) -> the contents of healthy files."""
  image, label = _arrays()
  slice_image = np.linspace(0, 1, 120, dtype=np.float32).reshape(12, 10)
  slice_label = (np.arange(120).reshape(12, 10) % 9).astype(np.float32)
  volume = np.stack([slice_image, slice_image[::-1]]), np.stack([slice_label, slice_label[::-1]])
  rng = np.random.default_rng(1)
  colours, grey = rng.integers(0, 256, (14, 18, 3), np.uint8), rng.integers(0, 256, (14, 18), np.uint8)
  mask = rng.integers(0, 3, (14, 18), np.uint8)
  tiffs = [{}, {"compression": "tiff_adobe_deflate"}, {"compression": "tiff_lzw"}, {"compression": "packbits"}]
  return {
    ("nifti", "image", ".nii.gz"): [_nifti(image), _nifti(image, kind=nib.Nifti2Image), _nifti(image.astype(">f4"))],
    ("nifti", "image", ".nii"): [
      _nifti(image, compressed=False, scl_slope=0.5, scl_inter=-3),
      _nifti(image.astype(np.float64), compressed=False),
    ],
    ("nifti", "label", ".nii.gz"): [_nifti(label), _nifti(label.astype(np.float32))],
    ("npz", "", ".npz"): [_npz(slice_image, slice_label), _npz(slice_image, slice_label, compressed=False)],
    ("h5", "", ".h5"): [
      _h5(*volume),
      _h5(*volume, compression="gzip", chunks=(1, 12, 5)),
      _h5(*volume, compression="gzip", shuffle=True, fletcher32=True, chunks=(2, 12, 10)),
      _h5(*volume, compression="lzf", chunks=(2, 12, 10)),
    ],
    ("png", "image", ".png"): [_picture(array, "PNG") for array in (colours, grey, np.dstack([colours, grey | 255]))],
    ("png", "label", ".png"): [_picture(mask, "PNG"), _palette(mask)],
    ("tiff", "image", ".tif"): [_picture(colours, "TIFF", **options) for options in (*tiffs, {"compression": "jpeg"})],
    ("tiff", "label", ".tif"): [_picture(mask, "TIFF", **options) for options in tiffs],
    ("xml", "label", ".xml"): [_xml(_OUTLINES)],
    ("json", "", ".json"): [b'{"labels": {"background": 0, "a": 1, "b": 2}, "channel_names": {"0": "CT"}}'],
  }


def _palette(mask):
  picture = Image.fromarray(mask, "P")
  picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
  buffer = io.BytesIO()
  picture.save(buffer, "PNG")
  return buffer.getvalue()


# Mutations of any bytes.


def _flip_bits(content, rng):
  changed = bytearray(content)
  for _ in range(rng.choice([1, 1, 2, 8])):
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
  return bytes(changed)


def _set_bytes(content, rng):
  changed = bytearray(content)
  at, length = rng.integers(len(changed)), rng.choice([1, 2, 4, 8])
  changed[at : at + length] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * len(changed[at : at + length])
  return bytes(changed)


def _insert(content, rng):
  at = rng.integers(len(content) + 1)
  return content[:at] + rng.bytes(rng.choice([1, 3, 64, 4096])) + content[at:]


def _delete(content, rng):
  at = rng.integers(len(content))
  return content[:at] + content[at + rng.choice([1, 2, 16, 100]) :]


def _truncate(content, rng):
  return content[: rng.integers(len(content))]


def _duplicate(content, rng):
  at = rng.integers(len(content))
  return content + content if rng.random() < 0.3 else content[:at] + content[at // 2 :]


def _foreign(content, rng):
  """The content of another kind of file under this name; wrong endings among them."""
  others = [other for contents in healthy().values() for other in contents if other != content]
  others += [b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>404</html>"]
  others += [gzip.compress(content), content * 1000]
  return others[rng.integers(len(others))]


def _folder(content, rng):
  del content, rng


_ANY = (_flip_bits, _flip_bits, _set_bytes, _insert, _delete, _truncate, _duplicate, _foreign)


# Mutations that know the format.


def _edit_nifti(content, rng):
  packed = content[:2] == b"\x1f\x8b"
  raw = bytearray(gzip.decompress(content) if packed else content)
  kind = nib.Nifti1Header if raw[:4] == struct.pack("<i", 348) else nib.Nifti2Header
  header = kind(bytes(raw[: kind.sizeof_hdr]), check=False)
  floats = [0, -1, np.nan, np.inf, 1e-30, 1e30, 1e-5, -3e38, 352.5]
  codes = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, 9999]
  values = {
    "dim": [0, -1, 1, 2, 3, 7, 8, 100, 32767],
    "datatype": codes,
    "bitpix": [0, 8, 64],
    "vox_offset": [0, -1, 4, 353, 400, 10**6, 10**9],
    "qform_code": [0, 1, -1, 99],
    "sform_code": [0, 1, -1, 99],
    "xyzt_units": [0, 1, 3, 255],
    "magic": [b"ni1", b"n+1", b"n+2", b"", b"abc"],
    "sizeof_hdr": [0, 348, 540, 1543569408],
    "srow_x": floats,
  } | dict.fromkeys(("pixdim", "scl_slope", "scl_inter", "srow_z", "quatern_b", "qoffset_x"), floats)
  for field in rng.choice([*values], rng.choice([1, 1, 2])):
    value = values[field][rng.integers(len(values[field]))]
    if header[field].ndim:
      header[field][rng.integers(min(header[field].size, 5))] = value
    else:
      header[field] = value
  raw[: kind.sizeof_hdr] = header.binaryblock
  return gzip.compress(bytes(raw), mtime=0) if packed else bytes(raw)


def png_chunks(content):
  """[(name, data), ...] of a healthy PNG."""
  chunks, at = [], 8
  while at < len(content):
    (length,) = struct.unpack(">I", content[at : at + 4])
    chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
    at += 12 + length
  return chunks


def join_png(chunks):
  """A PNG with right checksums."""
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
  )


def _edit_png(content, rng):
  chunks = png_chunks(content)
  how, at = rng.integers(7), rng.integers(len(chunks))
  name, data = chunks[at]
  if how == 0:  # a field of the header
    header = bytearray(chunks[0][1])
    place = rng.integers(13)
    header[place] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
    chunks[0] = (b"IHDR", bytes(header))
  elif how == 1:
    del chunks[at]
  elif how == 2:
    chunks.insert(rng.integers(len(chunks)), chunks[at])
  elif how == 3:
    chunks[at] = (name, data[: len(data) // 2])
  elif how == 4:  # pixels too few or too many
    pixels = dict(chunks)[b"IDAT"]
    others = zlib.compress(zlib.decompress(pixels)[: rng.choice([3, 100])] * rng.choice([1, 50]))
    chunks = [(each, others if each == b"IDAT" else kept) for each, kept in chunks]
  elif how == 5:
    extra = rng.choice(
      [b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"abCD", b"ABCD"]
    )
    chunks.insert(1, (bytes(extra), rng.bytes(rng.choice([0, 1, 4, 8, 26, 768]))))
  else:  # a length without its data
    whole = bytearray(join_png(chunks))
    place = whole.index(chunks[at][0]) - 4
    whole[place : place + 4] = struct.pack(">I", int(rng.choice(_EDGES)))
    return bytes(whole)
  return join_png(chunks)


def _edit_tiff(content, rng):
  changed = bytearray(content)
  (directory,) = struct.unpack("<I", content[4:8])
  (count,) = struct.unpack("<H", content[directory : directory + 2])
  for _ in range(rng.choice([1, 1, 2])):
    entry = directory + 2 + 12 * rng.integers(count)
    field, size = [(0, "<H"), (2, "<H"), (4, "<I"), (8, "<I"), (8, "<H")][rng.integers(5)]
    limit = 0xFFFF if size == "<H" else 0xFFFFFFFF
    tags = [256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330, 339, 347, 34675]
    value = int(rng.choice(tags if field == 0 else [*_EDGES, 5, 8, 16, 32773, 50000, directory]))
    struct.pack_into(size, changed, entry + field, min(value, limit))
  if rng.random() < 0.1:  # the next directory: this one again, or anywhere
    struct.pack_into(
      "<I", changed, directory + 2 + 12 * count, int(rng.choice([directory, 8, len(content) - 1, 2**31]))
    )
  return bytes(changed)


def _edit_zip(content, rng):
  if rng.random() < 0.4:
    return _edit_npy(content, rng)
  changed = bytearray(content)
  records = [(match.start(), 30 if match[0] == b"PK\3\4" else 46) for match in re.finditer(b"PK(\1\2|\3\4)", content)]
  records.append((content.rindex(b"PK\5\6"), 22))
  start, length = records[rng.integers(len(records))]
  size = int(rng.choice([2, 4]))
  value = int(rng.choice([*_EDGES, 8, 9, 12, 14, 95, 99])) & (256**size - 1)
  at = start + 4 + 2 * rng.integers((length - 4 - size) // 2 + 1)
  changed[at : at + size] = value.to_bytes(size, "little")
  return bytes(changed)


def _edit_npy(content, rng):
  """The archive anew, with another header of one of its arrays."""
  texts = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 10), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-12, -10), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 1000), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (12, 10), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (12, 10), }",
    "{'descr': '<c8', 'fortran_order': False, 'shape': (12, 10), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (12, 10), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (12, 5), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (12, 10), }",
    "{'descr': '|S0', 'fortran_order': False, 'shape': (12, 10), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 10.5), }",
    "{'descr': 7, 'fortran_order': 'no', 'shape': None, }",
    "{'descr': '<f4', 'shape': (12, 10), }",
    "(" * 3000 + ")" * 3000,
    "{'descr': '''",
    "-" * 9000 + "1",
    "__import__('os').system('false')",
    "\x00\xff" * 50,
  ]
  header = texts[rng.integers(len(texts))].encode("latin1") + b"\n"
  version = bytes([rng.choice([1, 1, 1, 2, 3, 9]), 0])
  length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
  return _rewritten_zip(content, "image.npy", lambda data: b"\x93NUMPY" + version + length + header + data[128:])


def _rewritten_zip(content, name, change, method=zipfile.ZIP_DEFLATED):
  buffer = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
    for info in old.infolist():
      data = old.read(info)
      new.writestr(info.filename, change(data) if info.filename == name else data)
  return buffer.getvalue()


def _edit_h5(content, rng):
  """Superblock, object headers and trees stand before and between the values; most of such a small file is these."""
  changed = bytearray(content)
  for _ in range(rng.choice([1, 2, 4, 20])):
    size = int(rng.choice([1, 2, 4, 8]))
    at = rng.integers(len(changed) - size)
    value = [*_EDGES, 2**63, 2**64 - 1, int(at)][rng.integers(len(_EDGES) + 3)] & (256**size - 1)
    changed[at : at + size] = value.to_bytes(size, "little")
  return bytes(changed)


def _edit_xml(content, rng):
  text = content.decode()
  tags = list(re.finditer(r"<[^>]+>", text))
  tag, other = (tags[index] for index in rng.integers(len(tags), size=2))
  values = ["", "nan", "inf", "1e308", "-1e9", "1e400", "0x10", "७", "1_0", "&lt;", "&#0;", "&#x1F600;", "9" * 5000]
  numbers = list(re.finditer(r'"[^"]*"', text))
  number = numbers[rng.integers(len(numbers))]
  return [
    lambda: text[: tag.start()] + text[tag.end() :],
    lambda: text[: tag.start()] + tag[0] * 50 + text[tag.end() :],
    lambda: text[: tag.start()] + other[0] + text[tag.end() :],
    lambda: text[: number.start()] + f'"{values[rng.integers(len(values))]}"' + text[number.end() :],
    lambda: text[: number.start()] + f'"{values[rng.integers(len(values))]}"' + text[number.end() :],
    lambda: '<!DOCTYPE a [<!ENTITY b "c">]>' + text,
    lambda: (
      f'<?xml version="{rng.choice(["1.0", "1.1", "9"])}" encoding="{rng.choice(["utf-16", "ascii", "x"])}"?>' + text
    ),
    lambda: text[: tag.start()] + "<![CDATA[" + text[tag.start() :],
    lambda: text[: tag.end()] + "<a>" * 2000 + "</a>" * 2000 + text[tag.end() :],
    lambda: text.replace("Annotations", "annotations"),
    lambda: text + text,
  ][rng.integers(11)]().encode()


def _edit_json(content, rng):
  """Another value for one of the entries."""
  odd = [None, True, 0, -1, 1.5, "", "x", [], [1], {}, {"a": {}}, {"0": 1}, {"0": "a", "2": "b"}, {"a": [1]}, 10**40]
  description = json.loads(content)
  key = rng.choice([*description])
  if rng.random() < 0.2:
    del description[key]
  else:
    description[key] = odd[rng.integers(len(odd))]
  return json.dumps(description).encode()


_BY_KIND = {
  "nifti": _edit_nifti,
  "npz": _edit_zip,
  "h5": _edit_h5,
  "png": _edit_png,
  "tiff": _edit_tiff,
  "xml": _edit_xml,
  "json": _edit_json,
}


def mutated(kind, count, seed=0):
  """So many inputs of a kind: half of them from mutations that know the format, one a folder."""
  rng = np.random.default_rng([seed, KINDS.index(kind)])
  seeds = [(*place[1:], content) for place, contents in healthy().items() if place[0] == kind for content in contents]
  made = []
  for number in range(count):
    role, ending, content = seeds[rng.integers(len(seeds))]
    mutate = _folder if number == count - 1 else _ANY[rng.integers(len(_ANY))] if number % 2 else _BY_KIND[kind]
    what = f"{kind} {role} {mutate.__name__.strip('_')} #{number} of seed {seed}"
    made.append(Input(kind, role, ending, what, mutate(content, rng)))
  return made


# Prepared datasets.


@functools.cache
def prepared():
  """The files of a small prepared dataset by their names relative to its folder."""
  with tempfile.TemporaryDirectory() as base:
    folder = pathlib.Path(base)
    arguments = lay_out(Input("nifti", "image", ".nii.gz", "", healthy()["nifti", "image", ".nii.gz"][0]), folder)
    with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
      assert prepare.main([*arguments, f"--output={folder / 'out'}", "--workers=1", "--folds=2"]) == 0
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    return {path.relative_to(folder / "out").as_posix(): path.read_bytes() for path in files}


def mutated_arrays(count, seed=0):
  """Inputs in place of array files of a prepared dataset: cut, flipped, or something else."""
  rng, made = np.random.default_rng([seed, 100]), []
  names = sorted(name for name in prepared() if name.endswith(".npy"))
  while len(made) < count:
    name, mutate = names[rng.integers(len(names))], (*_ANY, _folder)[rng.integers(len(_ANY) + 1)]
    content = mutate(prepared()[name], rng)
    if content != prepared()[name]:
      what = f"array {mutate.__name__.strip('_')} #{len(made)} of seed {seed}"
      made.append(Input("array", "", name, what, content))
  return made


def mutated_manifests(count, seed=0):
  """Manifests with another value, or none, in one place: each place in turn."""
  rng, made = np.random.default_rng([seed, 101]), []
  odd = [None, True, 0, -1, 2.5, 10**30, [], [[]], [1], ["x", "x"], {}, {"x": 1}]
  odd += ["", "x", "../x", "/etc/passwd", "\0", "\ud800"]
  places = list(_places(json.loads(prepared()["manifest.json"])))
  for number in range(count):
    content = json.loads(prepared()["manifest.json"])
    *way, last = places[rng.integers(len(places))]
    parent = functools.reduce(lambda node, key: node[key], way, content)
    how = rng.integers(5)
    if how == 0:
      del parent[last]
    elif how == 1 and isinstance(parent, list):
      parent.append(parent[last])
    else:
      parent[last] = odd[rng.integers(len(odd))]
    what = f"manifest {'.'.join(map(str, (*way, last)))} #{number} of seed {seed}"
    made.append(Input("manifest", "", "manifest.json", what, json.dumps(content).encode()))
  return made


def _places(node, way=()):
  """The way to each value of a parsed JSON document."""
  for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
    yield (*way, key)
    yield from _places(node[key], (*way, key))


def lay_out_prepared(one, folder):
  """Writes a prepared dataset with an input in place of one of its files."""
  for name, content in prepared().items():
    write(folder / name, one.content if name == one.ending else content)


# Bombs.


def zeros_deflated(size, *, tail=b"", wbits=-zlib.MAX_WBITS):
  """The deflate stream of so many zero bytes (a multiple of 16 MiB) and a tail, without making them."""
  block = 1 << 24
  packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
  first = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
  again = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
  return first + again * (size // block - 1) + packer.compress(tail) + packer.flush()


def gzip_of_zeros(size, *, head=b"", tail=b""):
  """A gzip file of a head, so many zero bytes and a tail, with the right checksum."""
  crc = zlib.crc32(head)
  for _ in range(size >> 24):
    crc = zlib.crc32(bytes(1 << 24), crc)
  crc = zlib.crc32(tail, crc)
  packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
  start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
  trailer = struct.pack("<II", crc, (len(head) + size + len(tail)) & 0xFFFFFFFF)
  return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + start + zeros_deflated(size, tail=tail) + trailer


def _nifti_head(shape, dtype, kind=nib.Nifti1Image):
  return _nifti(np.zeros((1, 1, 1), dtype), kind=kind, compressed=False, dim=[3, *shape, 1, 1, 1, 1])[
    : -dtype().itemsize
  ]


def largest_nifti(dtype=np.uint8, shape=(1024, 512, 512)):
  """A small file of the largest volume that is read; two of its voxels are not zero."""
  head = _nifti_head(shape, dtype)
  size = int(np.prod(shape)) * dtype().itemsize
  return gzip_of_zeros(size - (1 << 24), head=head, tail=bytes((1 << 24) - 1) + b"\1")


def _nifti_bombs():
  tiny = dict(
    zip(("srow_x", "srow_y", "srow_z"), np.eye(3, 4) * 1e-5, strict=True), pixdim=[1, *[1e-5] * 3, 1, 1, 1, 1]
  )
  yield "voxels of 10 nm, which is no bomb", ".nii.gz", _nifti(_arrays()[0], qform_code=0, **tiny)
  yield "declares 64 TiB", ".nii.gz", _nifti(_arrays()[0], dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
  yield "declares 2**180 voxels", ".nii", _nifti_head([2**60] * 3, np.int16, nib.Nifti2Image)
  yield "declares 1.9 GiB", ".nii.gz", _nifti(_arrays()[0], dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])
  small = _nifti(_arrays()[0], compressed=False)
  yield "unpacks to 3 GiB more than it declares", ".nii.gz", gzip_of_zeros(3 * GIB, head=small)
  yield "3 GiB without a header", ".nii.gz", gzip_of_zeros(3 * GIB)
  yield "gzip in gzip", ".nii.gz", gzip.compress(gzip_of_zeros(3 * GIB))
  yield "100000 empty gzip members", ".nii.gz", gzip.compress(b"") * 100_000 + _nifti(_arrays()[0])
  yield "a gzip name of 5 MB", ".nii.gz", b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 5_000_000
  head = _nifti_head((1024, 512, 512), np.uint8)
  yield "the largest that is read, all zeros", ".nii.gz", gzip_of_zeros(1 << 28, head=head)


def _npz_bombs():
  image, label = np.zeros((12, 10), np.float32), np.zeros((12, 10), np.float32)
  small = _npz(image + np.eye(12, 10, dtype=np.float32), label)
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (GIB, 2)})
  claim = header.getvalue()
  yield "an array of 8 GiB", _zip_of_zeros("image.npy", claim, 8 * GIB, small)
  yield "an array of 8 GiB that says 600 bytes", _zip_of_zeros("image.npy", claim, 8 * GIB, small, said=600)
  yield "a small array in a member of 3 GiB", _zip_of_zeros("image.npy", _npy_bytes(image), 3 * GIB, small)
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    yield f"packed by method {method}", _rewritten_zip(small, "image.npy", lambda data: data + bytes(1 << 28), method)
  with zipfile.ZipFile(buffer := io.BytesIO(small), "a") as archive:
    for number in range(20_000):
      archive.writestr(f"{number}.npy", b"")
  yield "20000 further members", buffer.getvalue()
  yield "zip in zip", _rewritten_zip(small, "image.npy", lambda data: small)
  yield "a pickle", _npz(np.array([{}], object), label)
  yield "wants a password", _flagged(small)
  yield "members that overlap", small.replace(b"label.npy", b"image.npy")


def _npy_bytes(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def _zip_of_zeros(name, head, size, rest, said=None):
  """An archive whose member `name` is a head and so many zeros, the other members being those of `rest`."""
  with zipfile.ZipFile(io.BytesIO(rest)) as archive:
    others = {other: archive.read(other) for other in archive.namelist() if other != name}
  with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
    for other, data in others.items():
      archive.writestr(other, data)
  packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
  data = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + zeros_deflated(size)
  whole = min(len(head) + size if said is None else said, 0xFFFFFFFF)
  fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, 0, len(data), whole, len(name), 0)
  content = buffer.getvalue()
  directory = content.index(b"PK\1\2")
  end = content.rindex(b"PK\5\6")
  local = b"PK\3\4" + fields + name.encode() + data
  central = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, directory) + name.encode()
  centrals = content[directory:end] + central
  count = len(others) + 1
  tail = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(centrals), directory + len(local), 0)
  return content[:directory] + local + centrals + tail


def _flagged(content):
  changed = bytearray(content)
  for match in re.finditer(b"PK(\1\2|\3\4)", content):
    changed[match.start() + (8 if match[1] == b"\1\2" else 6)] |= 1
  return bytes(changed)


def _h5_bombs():
  def file_with(**image):
    with h5py.File(buffer := io.BytesIO(), "w") as file:
      file["label"] = np.zeros((2, 12, 10), np.float32)
      dataset = file.create_dataset("image", **{"dtype": "f4", "shape": (2, 12, 10)} | image)
      if chunk := image.pop("chunk", None):
        dataset.id.write_direct_chunk((0, 0, 0), chunk)
    return buffer.getvalue()

  def bomb(size, **options):
    with h5py.File(buffer := io.BytesIO(), "w") as file:
      file["label"] = np.zeros((2, 12, 10), np.float32)
      dataset = file.create_dataset("image", (2, 12, 10), "f4", chunks=(2, 12, 10), compression="gzip", **options)
      dataset.id.write_direct_chunk((0, 0, 0), zeros_deflated(size, wbits=zlib.MAX_WBITS))
    return buffer.getvalue()

  yield "declares 4 TiB", file_with(shape=(1024, 32768, 32768), chunks=(1, 64, 64), compression="gzip")
  yield "declares 1.9 GiB", file_with(shape=(500, 1000, 1000), chunks=(1, 64, 64), compression="gzip")
  yield "chunks of 3 GiB", file_with(maxshape=(None, None, None), chunks=(3, 16384, 16384), compression="gzip")
  yield "a chunk that unpacks to 6 GiB", bomb(6 * GIB)
  yield "a chunk that unpacks to 6 GiB, with a checksum", bomb(6 * GIB, fletcher32=True)
  yield "packed twice", _gzip_twice()
  yield "the largest that is read", file_with(shape=(1024, 512, 512), chunks=(1, 64, 64), compression="gzip")
  yield "a scalar", file_with(shape=())
  yield "text", file_with(dtype=h5py.string_dtype())
  yield "a compound type", file_with(dtype=np.dtype([("a", "f4"), ("b", "f4")]))


def _gzip_twice():
  properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
  properties.set_chunk((2, 12, 10))
  properties.set_deflate(9)
  properties.set_deflate(9)
  with h5py.File(buffer := io.BytesIO(), "w") as file:
    file["label"] = np.zeros((2, 12, 10), np.float32)
    space = h5py.h5s.create_simple((2, 12, 10))
    dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, properties)
    dataset.write_direct_chunk((0, 0, 0), zlib.compress(zeros_deflated(6 * GIB, wbits=zlib.MAX_WBITS)))
  return buffer.getvalue()


def _png_bombs():
  chunks = png_chunks(healthy()["png", "image", ".png"][0])

  def sized(width, height, depth=8, colour=2):
    return [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks[1:]]

  text = b"Comment\0\0" + zlib.compress(bytes(1 << 28), 9)
  yield "2**31 pixels a side", join_png(sized(2**31 - 1, 2**31 - 1))
  yield "30000 pixels a side", join_png(sized(30000, 30000))
  yield "89 million pixels, without data", join_png(sized(9459, 9459))
  yield "2 x 40 million pixels", join_png(_pixels_of_zeros(40_000_000, 2))
  yield "89 million pixels", join_png(_pixels_of_zeros(9459, 9459))
  yield "text that unpacks to 256 MiB", join_png([chunks[0], (b"zTXt", text), *chunks[1:]])
  megabyte = (b"zTXt", b"C\0\0" + zlib.compress(bytes(1 << 20), 9))
  yield "100 texts that unpack to 1 MiB", join_png([chunks[0], *[megabyte] * 100, *chunks[1:]])
  yield "a profile that unpacks to 256 MiB", join_png([chunks[0], (b"iCCP", text), *chunks[1:]])
  yield "pixels that unpack to 1 GiB", join_png([chunks[0], (b"IDAT", zeros_deflated(GIB, wbits=15)), chunks[-1]])
  yield "200000 chunks", join_png([chunks[0], *[(b"tEXt", b"a\0b")] * 200_000, *chunks[1:]])
  yield "animated", join_png([chunks[0], (b"acTL", struct.pack(">II", 2**31 - 1, 0)), *chunks[1:]])


def _pixels_of_zeros(width, height):
  rows = zlib.compressobj(9)
  data = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
  return [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]


def tiff(entries, data=b"", *, next_directory=0):
  """A TIFF of one directory from {tag: (type, count, value)}; the data follow at byte 8."""
  packed = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
  directory = 8 + len(data) + len(data) % 2
  header = b"II*\0" + struct.pack("<I", directory)
  body = data + bytes(len(data) % 2)
  return header + body + struct.pack("<H", len(entries)) + packed + struct.pack("<I", next_directory)


def _tiff_bombs():
  def grey(width, height, data, *, compression=8, rows=None, **more):
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1)}
    entries |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, rows or height), 279: (4, 1, len(data))}
    return tiff(entries | more.pop("entries", {}), data, **more)

  zeros = zeros_deflated(3 * GIB, wbits=15)
  yield "2**32 pixels a side", grey(2**32 - 1, 2**32 - 1, zlib.compress(bytes(100)))
  yield "30000 pixels a side", grey(30000, 30000, zlib.compress(bytes(100)))
  yield "a strip that unpacks to 3 GiB", grey(16, 16, zeros)
  yield "a strip of 2**32 rows", grey(16, 16, zeros, rows=2**32 - 1)
  yield "89 million pixels, without data", grey(9459, 9459, zlib.compress(bytes(100)))
  yield "rows of 2**31 bytes", grey(2**31 - 1, 1, zlib.compress(bytes(100)))
  for side in (30000, 65536, 2**31 - 16):
    tile = {322: (4, 1, side), 323: (4, 1, side), 324: (4, 1, 8), 325: (4, 1, len(zeros))}
    yield f"a tile of {side} pixels a side", grey(16, 16, zeros, entries=tile)
    yield f"an unpacked tile of {side} pixels a side", grey(16, 16, bytes(1000), compression=1, entries=tile)
  yield "a directory that leads to itself", grey(16, 16, bytes(256), compression=1, next_directory=8 + 256)
  yield "20000 pages", _many_pages(20_000)
  yield (
    "2**31 strips",
    grey(16, 16, bytes(256), compression=1, entries={273: (4, 2**31 - 1, 8), 279: (4, 2**31 - 1, 8)}),
  )
  yield "300 values a pixel", grey(16, 16, bytes(256), compression=1, entries={277: (3, 1, 300)})


def _many_pages(count):
  entries = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
  page = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries.items())
  size, start = len(page) + 4, 8 + 256
  pages = b"".join(page + struct.pack("<I", start + size * number) for number in range(1, count))
  return b"II*\0" + struct.pack("<I", start) + bytes(256) + pages + page + bytes(4)


def _xml_bombs():
  laughs = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
  good = _xml(_OUTLINES).decode()
  big = [(-5, -5), (22, -5), (22, 18), (-5, 18)]
  yield "a billion laughs", f"<!DOCTYPE a [{laughs}]>{good.replace('<Annotations>', '<Annotations>&a11;')}".encode()
  yield "a file from outside", f'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>{good}'.encode()
  yield "a million levels", b"<a>" * 1_000_000 + b"</a>" * 1_000_000
  yield "3 million elements with attributes", _xml(_OUTLINES, '<a b=""/>' * 3_000_000)
  yield "more elements than are read", _xml(_OUTLINES, '<a b=""/>' * 4_000_000)
  yield "32 MiB of text", _xml(_OUTLINES, "a" * (1 << 25))
  yield "30 MiB in one attribute", _xml(_OUTLINES, f'<a b="{"a" * (30 << 20)}"/>')
  yield "80000 outlines of the whole image", _xml([big] * 80_000)
  yield "99999 vertices", _xml([big + [(x % 18, x * 7 % 14) for x in range(99_995)]])
  yield "600000 vertices in outlines", _xml([big + [(x % 18, x * 7 % 14) for x in range(60_000)]] * 10)
  yield "the numbers of another image", _xml([[(1e300, 1e300), (-1e300, 0), (0, 1e300)]])


def _json_bombs():
  yield "100000 levels of lists", b'{"labels": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
  yield "100000 levels of objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
  yield "an endless number", b'{"labels": {"background": 0, "a": ' + b"1" * 100_000 + b"}}"
  yield "128 MiB", b'{"labels": "' + b"a" * (1 << 27) + b'"}'
  yield "30 MiB of lists", b'{"labels": [' + b"[]," * (10 << 20) + b"[]]}"
  yield "not a number", b'{"labels": {"background": NaN, "a": Infinity}}'
  yield "a name twice", b'{"labels": {"background": 0, "a": 1, "a": 2}}'
  yield "half a character", b'{"labels": {"background": 0, "\\ud800": 1, "b": 2}}'
  yield "another encoding", '{"labels": {"background": 0}}'.encode("utf-16")


def bombs(kind):
  """The bombs of a kind, one at a time: some have several megabytes."""
  roles = {"npz": ("", ".npz"), "h5": ("", ".h5"), "json": ("", ".json"), "xml": ("label", ".xml")}
  if kind == "nifti":
    for what, ending, content in _nifti_bombs():
      yield Input(kind, "image", ending, f"nifti bomb: {what}", content)
    yield Input(kind, "label", ".nii.gz", "nifti bomb: a label, the largest that is read", largest_nifti())
    return
  role, ending = roles.get(kind, ("image", {"png": ".png", "tiff": ".tif"}.get(kind)))
  made = {"npz": _npz_bombs, "h5": _h5_bombs, "png": _png_bombs, "tiff": _tiff_bombs, "xml": _xml_bombs}
  for what, content in made.get(kind, _json_bombs)():
    yield Input(kind, role, ending, f"{kind} bomb: {what}", content)


# Among healthy files.


def write(path, content):
  """A file, or a folder where there is no content."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content)


def lay_out(one, folder):
  """Writes an input and healthy files beside it.

  Args:
    one: the input.
    folder: does not exist yet.

  Returns:
    The arguments of `selfreg_jax.data.prepare`, without --output.
  """
  files = {place: contents[0] for place, contents in healthy().items()}
  source = folder / "raw"
  if one.kind in ("npz", "h5"):
    for name in ("case0005_slice000.npz", "case0005_slice001.npz", "case0006_slice000.npz"):
      write(source / "train_npz" / name, one.content if name == one.name else files["npz", "", ".npz"])
    write(source / "test_vol_h5/case0001.npy.h5", one.content if one.kind == "h5" else files["h5", "", ".h5"])
    return ["--dataset=synapse", f"--source={source}"]
  if one.kind == "json":
    write(source / one.name, one.content)
    for number in range(2):
      write(source / f"imagesTr/case{number}.nii.gz", files["nifti", "image", ".nii.gz"])
      write(source / f"labelsTr/case{number}.nii.gz", files["nifti", "label", ".nii.gz"])
    return ["--dataset=msd", f"--source={source}", "--normalize=minmax"]
  partner = {"nifti": ".nii.gz", "png": ".png", "tiff": ".tif", "xml": ".tif"}[one.kind]
  endings = {"image": partner, "label": ".xml" if one.kind == "xml" else partner} | {one.role: one.ending}
  kinds = {"image": "tiff" if one.kind == "xml" else one.kind, "label": one.kind}
  for role, ending in endings.items():
    for case in ("bad", "fine", "good"):
      write(
        source / f"{role}_{case}{ending}",
        one.content if (role, case) == (one.role, "bad") else files[kinds[role], role, ending],
      )
  mapping = ["minmax", "zscore"][zlib.crc32(one.what.encode()) % 2]
  return [
    "--dataset=msd",
    f"--source={source}",
    f"--image_glob=image_*{endings['image']}",
    f"--label_glob=label_*{endings['label']}",
    "--num_classes=3",
    f"--normalize={mapping}",
  ]
