"""Files of PyTorch-named weights: reads .pth (without PyTorch), .safetensors and .npz; writes .safetensors and .npz.

A .pth file is a zip archive of raw storages and one pickle, and a pickle is a program. The one here is run by a machine
that knows the few instructions `torch.save` writes and builds plain dictionaries, lists, numbers, strings and arrays:
it imports nothing, calls nothing and sets no attribute that a file names. (`pickle.Unpickler` is no such machine, even
with a strict `find_class`: ten bytes make it take gigabytes, and the hash of a deeply nested tuple ends the process.)

Only NumPy, ml_dtypes and safetensors are imported.
"""

import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import pickletools
import shlex
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors.numpy

from selfreg_jax.errors import UserError

_PYTORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPER_KEYS = ("model", "state_dict", "model_state_dict")

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORAGE_TYPES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": _BFLOAT16,
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}
_FUNCTIONS = (
  "collections.OrderedDict",
  "torch.Size",
  "torch._utils._rebuild_tensor_v2",
  "torch._utils._rebuild_parameter",
)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

# A thousand tensors take 0.2 MB of pickle; a hostile pickle becomes objects of some 70 times its size.
_MAX_PICKLE_BYTES = 1 << 22
_MAX_NPZ_BYTES = 1 << 32  # of all arrays together, uncompressed
_MAX_DIMENSIONS = 64  # NumPy's own limit
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 512
_LISTED = 8

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # the number as a pickle's LONG1 spells it
_KINDS = {
  "zip": "is a zip archive",
  "legacy": "is in PyTorch's format from before version 1.6 (one stream of pickles, no zip archive)",
  "tar": "is in PyTorch's oldest format (a tar archive)",
  "pickle": "is a pickle that torch.save did not write; load it with what wrote it and save the weights as .npz",
  "safetensors": "is a safetensors file; name it .safetensors",
  "npy": "is one NumPy array (.npy); an .npz file, as numpy.savez writes it, is needed",
  "hdf5": "is an HDF5 file, not PyTorch's; save its weights as .npz",
  "page": "is a web page, not weights; download the file itself",
  "lfs": "is a Git LFS pointer, not weights; fetch the file itself with git lfs pull",
}

_RESAVE = (
  "import sys, torch; d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
  f"d = next((d[k] for k in {_WRAPPER_KEYS} if isinstance(d, dict) and k in d), d); "
  "d = getattr(d, 'state_dict', lambda: d)(); "
  "torch.save({k: v.detach().clone() for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])"
)


class _RefusedError(Exception):
  """Content that PyTorch reads and this module does not.

  Attributes:
    advice: what to do; None where saving the weights alone helps.
  """

  def __init__(self, message: str, advice: str | None = None):
    super().__init__(message)
    self.advice = advice


class _DamagedError(Exception):
  """Content that no `torch.save` writes; the message says what is wrong with it."""


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a file of weights by its ending.

  Args:
    path: a file of PyTorch's (.pth, .pt, .bin, .ckpt; the zip format that PyTorch writes since 1.6), .safetensors or
      .npz.

  Returns:
    What the file holds, arrays in the dtypes and shapes of the file, bfloat16 as `ml_dtypes.bfloat16`. PyTorch's files
    give a dictionary as it was saved: nested dictionaries, lists and tuples of arrays, numbers, strings, bools and
    None; the others give name -> array. Nothing is mapped to the file; tensors that share a storage share it here.

  Raises:
    UserError: the file cannot be read, is damaged, of another format, or holds more than weights and plain values; for
      files that PyTorch reads the message gives a command that saves the weights alone.
  """
  path = pathlib.Path(path)
  ending = _ending(path)
  if ending not in (*_PYTORCH_ENDINGS, ".safetensors", ".npz"):
    endings = ", ".join((*_PYTORCH_ENDINGS, ".safetensors"))
    raise UserError(f"{path}: unknown ending {ending!r}; weights are read from files named {endings} or .npz")
  if not path.exists():
    raise UserError(f"{path}: no such file; check the path of the weights")
  if path.is_dir():
    raise UserError(f"{path}: is a folder; name the file of weights in it")
  try:
    with path.open("rb") as file:
      return _read_open(path, file)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or _one_line(error)}); check the file") from error


def find_tensors(content: Mapping[str, Any], path: str | os.PathLike) -> tuple[dict[str, np.ndarray], str | None]:
  """The state dict in a file's content or in a mapping of the user's.

  Args:
    content: name -> array, or a checkpoint with such a mapping under "model", "state_dict" or "model_state_dict"; what
      else a checkpoint holds is passed over. Arrays are all that `numpy.asarray` takes by the array protocol: NumPy's,
      JAX's, PyTorch's tensors.
    path: where the content comes from, for messages.

  Returns:
    (name -> array, the key under which it was found or None). Tensors of PyTorch's come as float32 where NumPy has no
    such type.

  Raises:
    UserError: there is no state dict, or it holds something that is no array of numbers.
  """
  strangers = ""
  for key, candidate in [(None, content), *((key, content.get(key)) for key in _WRAPPER_KEYS)]:
    if not isinstance(candidate, Mapping) or not candidate:
      continue
    others = [name for name, value in candidate.items() if not (isinstance(name, str) and hasattr(value, "__array__"))]
    if not others:
      return {name: _as_array(value, name, path) for name, value in candidate.items()}, key
    if key is not None and len(others) < len(candidate):
      strangers = f"; under {key!r}, no tensors: {_listed(others)}"
  keys = ", ".join(repr(key) for key in _WRAPPER_KEYS)
  raise UserError(
    f"{path}: no weights found; needed is a dictionary of tensors, at the top or under one of {keys}; "
    f"the top holds {_listed(content) or 'nothing'}{strangers}"
  )


def write_weights(tensors: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
  """Writes weights under their PyTorch names; the file exists whole or not at all.

  Args:
    tensors: name -> array of numbers, any layout.
    path: a .safetensors file (also loadable by `safetensors.torch.load_file`) or an .npz file. NumPy has no name for
      bfloat16: .npz files hold it as raw 2-byte values, which `read_weights` knows again.

  Raises:
    UserError: another ending, an array of something else than numbers, or the file cannot be written.
  """
  check_ending_for_writing(path)
  path = pathlib.Path(path)
  writer = _write_npz if path.suffix.lower() == ".npz" else _write_safetensors
  arrays = {name: _contiguous(_as_array(value, name, path)) for name, value in tensors.items()}
  temporary = path.with_name(f"partial.{path.name}")
  try:
    writer(arrays, temporary)
    temporary.replace(path)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    reason = getattr(error, "strerror", None) or _one_line(error)
    raise UserError(f"{path}: cannot be written ({reason}); choose another place or ending") from error


def check_ending_for_writing(path: str | os.PathLike) -> None:
  """Raises UserError unless `write_weights` knows the ending of a file."""
  if pathlib.Path(path).suffix.lower() not in (".safetensors", ".npz"):
    raise UserError(f"{path}: weights are written as .safetensors or .npz; give the file one of these endings")


def _ending(path: pathlib.Path) -> str:
  """A file's ending; of `.pth.tar`, a common name for what is no tar file, the first half."""
  return pathlib.PurePath(path.name.lower().removesuffix(".tar")).suffix


def _read_open(path: pathlib.Path, file: BinaryIO) -> dict[str, Any]:
  head = file.read(_HEAD_BYTES)
  if not head:
    raise UserError(f"{path}: is empty; copy or download it again")
  kind = _kind_of(head)
  file.seek(0)
  ending = _ending(path)
  try:
    if ending == ".npz":
      return _read_npz(path, file, kind)
    if ending == ".safetensors":
      return _read_safetensors(path, kind)
    return _read_pytorch(path, file, kind)
  except UserError:
    raise
  except _RefusedError as error:
    raise UserError(f"{path}: {error}. {error.advice or _resave_advice(path)}") from error
  except MemoryError as error:
    raise UserError(f"{path}: damaged, or too large for the memory; copy it again or use a larger machine") from error
  except Exception as error:  # whatever a damaged or hostile file provokes in zipfile, NumPy or safetensors
    # A damaged archive may send zipfile to a place before the file's start: "invalid argument".
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
      raise
    reason = _one_line(error) or type(error).__name__
    raise UserError(f"{path}: damaged ({reason}); copy or download it again") from error


def _kind_of(head: bytes) -> str | None:
  """What a file's first bytes say it is, as a key of `_KINDS`."""
  text = head.lstrip().lower()
  tests = {
    # Before the rest, for its header's length comes first and may begin as anything.
    "safetensors": head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32,
    "zip": head.startswith((b"PK\x03\x04", b"PK\x05\x06")),
    "legacy": _LEGACY_MAGIC in head[:32],
    "tar": head[257:262] == b"ustar",
    "pickle": head.startswith(b"\x80"),
    "npy": head.startswith(b"\x93NUMPY"),
    "hdf5": head.startswith(b"\x89HDF"),
    "page": text.startswith((b"<!doctype", b"<html")),
    "lfs": text.startswith(b"version https://git-lfs"),
  }
  return next((kind for kind, found in tests.items() if found), None)


def _read_pytorch(path: pathlib.Path, file: BinaryIO, kind: str | None) -> dict[str, Any]:
  if kind in ("legacy", "tar"):
    raise _RefusedError(_KINDS[kind])
  if kind != "zip":
    raise UserError(f"{path}: {_KINDS[kind] if kind else 'is not a PyTorch file; save the weights with torch.save'}")
  if not zipfile.is_zipfile(file):
    raise UserError(f"{path}: truncated (no zip directory at its end); copy or download it again")
  with zipfile.ZipFile(file) as archive:
    content = _read_archive(path, archive)
  if not isinstance(content, dict):
    raise UserError(f"{path}: its top is a {type(content).__name__}, no dictionary; save model.state_dict()")
  return content


def _read_archive(path: pathlib.Path, archive: zipfile.ZipFile) -> Any:
  names = archive.namelist()
  prefix = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
  if prefix is None:
    if any(name.endswith(".npy") for name in names):
      raise UserError(f"{path}: is a zip archive of NumPy arrays; name it .npz")
    raise UserError(f"{path}: is a zip archive without data.pkl, not PyTorch's; save the weights with torch.save")
  if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in names):
    raise _RefusedError("is a TorchScript archive (torch.jit.save), a program with its weights")
  records = _Records(archive, prefix)
  content = _PickleMachine(records).run(records.read("data.pkl", _MAX_PICKLE_BYTES))
  # Last, so that whatever is refused is refused before gigabytes are read, and every storage is read once.
  records.fill_storages()
  return content


def _read_safetensors(path: pathlib.Path, kind: str | None) -> dict[str, np.ndarray]:
  if kind not in ("safetensors", None):
    raise UserError(f"{path}: not a safetensors file: it {_KINDS[kind]}")
  try:
    return safetensors.numpy.load_file(path)
  except (AttributeError, TypeError) as error:  # how safetensors reports a type without an equivalent in NumPy
    raise UserError(f"{path}: holds an unusual type ({_one_line(error)}); convert it to float32 first") from error


def _read_npz(path: pathlib.Path, file: BinaryIO, kind: str | None) -> dict[str, np.ndarray]:
  if kind != "zip":
    raise UserError(f"{path}: not an .npz file" + (f": it {_KINDS[kind]}" if kind else "; numpy.savez writes them"))
  if not zipfile.is_zipfile(file):
    raise UserError(f"{path}: truncated (no zip directory at its end); copy or download it again")
  file.seek(0)
  with zipfile.ZipFile(file) as archive:
    unpacked = sum(info.file_size for info in archive.infolist())
  if unpacked > _MAX_NPZ_BYTES:
    raise UserError(f"{path}: unpacks to {unpacked / 2**30:.1f} GiB, too much for weights; check where it comes from")
  file.seek(0)
  with np.load(file, allow_pickle=False) as arrays:
    if any(name.endswith("data.pkl") for name in arrays.files):
      raise UserError(f"{path}: is a zip archive of PyTorch's; name it .pth")
    return {name: _from_npz(arrays, name, path) for name in arrays.files}


def _from_npz(arrays: Mapping[str, Any], name: str, path: pathlib.Path) -> np.ndarray:
  try:
    array = arrays[name]
  except ValueError as error:
    if "allow_pickle" not in str(error):
      raise
    raise UserError(f"{path}: {name} holds Python objects; weights are numbers") from error
  if not isinstance(array, np.ndarray):  # what np.load makes of an entry that does not begin as an array does
    raise UserError(f"{path}: {name} is no NumPy array; write the file with numpy.savez")
  # np.savez names neither bfloat16 nor any other type of two bytes without fields; NumPy reads it as void.
  if array.dtype == np.dtype("V2"):
    array = array.view(_BFLOAT16)
  return _contiguous(_as_array(array, name, path))


def _resave_advice(path: pathlib.Path) -> str:
  new = path.with_name(f"{path.stem}.weights.pth")
  return (
    "If you trust the file (this runs the code in it), save its weights alone with PyTorch, where the code that wrote "
    f'it can be imported:\n  python -c "{_RESAVE}" {shlex.quote(str(path))} {shlex.quote(str(new))}'
  )


@dataclasses.dataclass(frozen=True)
class _Global:
  """Stands for what a pickle names as "module.name"; nothing is imported."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
  """A storage's type and its bytes, which `_Records.fill_storages` fills in."""

  dtype: np.dtype
  content: np.ndarray


class _Records:
  """The records of PyTorch's zip archive: a pickle, storages, the byte order they were written in."""

  def __init__(self, archive: zipfile.ZipFile, prefix: str):
    """Checks that the archive's directory is one that PyTorch can have written.

    Args:
      archive: open.
      prefix: of all records' names, with its slash.
    """
    self._archive = archive
    self._prefix = prefix
    self._infos = {info.filename: info for info in archive.infolist()}
    if len(self._infos) < len(archive.infolist()):
      raise _DamagedError("two records of the archive have the same name")
    archive.fp.seek(0, os.SEEK_END)
    # Records that lie on top of one another would make a small file large in memory.
    if sum(info.compress_size for info in archive.infolist()) > archive.fp.tell():
      raise _DamagedError("the records of the archive are larger than the file")
    self._storages: dict[str, _Storage] = {}

  def read(self, name: str, limit: int) -> bytes:
    """One record's content, of at most `limit` bytes."""
    info = self._info(name)
    if info.file_size > limit:
      raise _DamagedError(f"{name} has {info.file_size} bytes, more than the {limit} that are read")
    return self._archive.read(info)

  def storage(self, dtype: np.dtype, key: str, numel: int) -> _Storage:
    """The storage of a key, its content still to be filled in."""
    info = self._info(f"data/{key}")
    if info.file_size != numel * dtype.itemsize:
      raise _DamagedError(f"storage {_shown(key)} has {info.file_size} bytes, not {numel} values of type {dtype}")
    if key not in self._storages:
      self._storages[key] = _Storage(dtype, np.empty(info.file_size, np.uint8))
    storage = self._storages[key]
    if storage.dtype != dtype:
      raise _DamagedError(f"storage {_shown(key)} is of two types, {storage.dtype} and {dtype}")
    return storage

  def fill_storages(self) -> None:
    """Reads all storages that were asked for, in pieces: no second copy in memory."""
    order = "little"
    if f"{self._prefix}byteorder" in self._infos:
      order = self.read("byteorder", limit=16).decode()
    if order not in ("little", "big"):
      raise _DamagedError(f"byte order {_shown(order)}")
    for key, storage in self._storages.items():
      with self._archive.open(self._info(f"data/{key}")) as record:
        view = memoryview(storage.content)
        while len(view):
          count = record.readinto(view[:_CHUNK_BYTES])
          if not count:
            raise _DamagedError(f"storage {_shown(key)} stops before its end")
          view = view[count:]
      if order != sys.byteorder:
        storage.content.view(f"u{storage.dtype.itemsize}").byteswap(inplace=True)

  def _info(self, name: str) -> zipfile.ZipInfo:
    info = self._infos.get(self._prefix + name)
    if info is None:
      raise _DamagedError(f"the archive has no {_shown(name)}")
    # PyTorch never compresses, and what is not compressed cannot be larger than the file.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
      raise _DamagedError(f"{_shown(name)} is compressed, which torch.save does not do")
    return info


class _PickleMachine:
  """Runs the pickle of a `torch.save` file, protocol 2, with these instructions and no others.

  Its values are dicts, lists, tuples, strings, numbers, bools, None, arrays, and the stand-ins `_Global` and `_Storage`
  on their way into an array. It follows no nesting, so depth costs nothing.
  """

  def __init__(self, records: _Records):
    self._records = records
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # the stacks under the marks
    self._memo: dict[int, Any] = {}

  def run(self, program: bytes) -> Any:
    """The object that a pickle describes."""
    for opcode, argument, _ in pickletools.genops(program):
      self._step(opcode.name, argument)
    content = self._pop()
    _check_plain(content)
    return content

  def _step(self, opcode: str, argument: Any) -> None:
    match opcode:
      case "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self._top()
      case "BINGET" | "LONG_BINGET":
        self._push(self._recall(argument))
      case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
        self._push(argument)
      case "MARK":
        self._below.append(self._stack)
        self._stack = []
      case "TUPLE":
        self._push_tuple(self._pop_to_mark())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        self._push_tuple([self._pop() for _ in range(int(opcode[-1]))][::-1])
      case "EMPTY_LIST":
        self._push([])
      case "EMPTY_DICT":
        self._push({})
      case _ if opcode in _CONSTANTS:
        self._push(_CONSTANTS[opcode])
      case "APPEND":
        self._extend([self._pop()])
      case "APPENDS":
        self._extend(self._pop_to_mark())
      case "SETITEM":
        value, key = self._pop(), self._pop()
        self._update([key, value])
      case "SETITEMS":
        self._update(self._pop_to_mark())
      case "GLOBAL":
        self._push(self._find(".".join(argument.split(" ", 1))))
      case "BINPERSID":
        self._push(self._load_storage(self._pop()))
      case "REDUCE":
        arguments, function = self._pop(), self._pop()
        self._push(_call(function, arguments))
      case "BUILD":
        # state_dict() hangs its modules' versions (`_metadata`) on the dictionary; nothing else has a state here.
        state = self._pop()
        if type(state) is not dict or type(self._top()) is not dict:
          raise _DamagedError("the pickle gives a state to what has none")
      case "PROTO":
        if argument != 2:
          raise _RefusedError(f"is pickled by protocol {argument}, where only torch.save's own protocol 2 is read")
      case "STOP":
        pass
      case _:
        raise _DamagedError(f"the pickle has the instruction {opcode}, which torch.save does not write")

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _top(self) -> Any:
    if not self._stack:
      raise _DamagedError("the pickle takes more than it put down")
    return self._stack[-1]

  def _pop(self) -> Any:
    self._top()
    return self._stack.pop()

  def _pop_to_mark(self) -> list[Any]:
    if not self._below:
      raise _DamagedError("the pickle takes more than it put down")
    items, self._stack = self._stack, self._below.pop()
    return items

  def _push_tuple(self, items: list[Any]) -> None:
    # The arguments of a tensor hold stand-ins, but never a tuple with one in it: looking one level down is enough.
    for item in items:
      if type(item) is tuple:
        _check_plain(item)
    self._push(tuple(items))

  def _recall(self, index: int) -> Any:
    if index not in self._memo:
      raise _DamagedError("the pickle refers to what it never had")
    return self._memo[index]

  def _extend(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) is not list:
      raise _DamagedError("the pickle appends to what is no list")
    for item in items:
      _check_plain(item)
    target.extend(items)

  def _update(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) is not dict or len(items) % 2:
      raise _DamagedError("the pickle sets an entry of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
      # The hash of a deeply nested tuple overflows the C stack; long integers can be made to collide.
      if type(key) is not str and not (type(key) is int and -(2**63) <= key < 2**63):
        raise _RefusedError(f"holds a dictionary with keys of type {type(key).__name__}, not strings or integers")
      _check_plain(value)
      target[key] = value

  def _find(self, name: str) -> _Global:
    if name in _FUNCTIONS or name in _STORAGE_TYPES:
      return _Global(name)
    function = name.rpartition(".")[2]
    if function.endswith("Storage") or (function.startswith("_rebuild_") and "tensor" in function):
      raise _RefusedError(
        f"holds a kind of tensor that is not read, not dense or of an unusual type ({_shown(name)})",
        "Convert such tensors in PyTorch (.to_dense(), .dequantize(), .float()) and save them again",
      )
    if not self._stack and not self._below:
      raise _RefusedError(f"holds a whole {_shown(name)} instead of a dictionary of weights (torch.save(model, ...)?)")
    raise _RefusedError(f"holds {_shown(name)} beside weights and plain values; such objects are not read")

  def _load_storage(self, identity: Any) -> _Storage:
    match identity:
      case ("storage", _Global(name), str(key), str(), int(numel)) if name in _STORAGE_TYPES:
        return self._records.storage(_STORAGE_TYPES[name], key, numel)
    raise _DamagedError("the pickle refers to something other than a storage")


def _check_plain(value: Any) -> None:
  """Refuses a stand-in, and a tuple that holds one."""
  for item in value if type(value) is tuple else (value,):
    if isinstance(item, _Global | _Storage):
      what = _shown(item.name) if isinstance(item, _Global) else "a storage without a tensor"
      raise _RefusedError(f"holds {what} beside weights and plain values; such objects are not read")


def _call(function: Any, arguments: Any) -> Any:
  """What one of `_FUNCTIONS` returns in PyTorch, in NumPy's terms."""
  match function, arguments:
    case _Global("collections.OrderedDict"), ():
      return {}
    case _Global("torch.Size"), (tuple(sizes),):
      return sizes
    case (
      _Global("torch._utils._rebuild_tensor_v2"),
      (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict()),
    ):
      return _tensor(storage, offset, shape, strides)
    case _Global("torch._utils._rebuild_parameter"), (np.ndarray() as array, bool(), dict()):
      return array
  what = f"{function.name} with strange arguments" if isinstance(function, _Global) else "what is no function"
  raise _DamagedError(f"the pickle calls {what}")


def _tensor(storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> np.ndarray:
  """A view of a storage; offset and strides in elements."""
  if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
    raise _DamagedError(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
  if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
    raise _DamagedError("a tensor's offset, sizes and strides are not whole numbers from 0")
  itemsize = storage.dtype.itemsize
  available, count = storage.content.size // itemsize, math.prod(shape)
  if count > available:  # beside the bounds below: strides of 0 make any number of elements of a single one
    raise _RefusedError(f"holds an expanded tensor, {count} elements of a storage of {available}")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else offset - 1
  if last >= available:
    raise _DamagedError(f"a tensor reaches to element {last} of a storage of {available}")
  if not count:
    return np.empty(shape, storage.dtype)
  # The stride of an axis of length 1 means nothing and may be any number.
  steps = [stride * itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
  return np.ndarray(shape, storage.dtype, storage.content, offset * itemsize, steps)


def _as_array(value: Any, name: str, path: str | os.PathLike) -> np.ndarray:
  try:
    if hasattr(value, "detach"):
      tensor = value.detach().cpu()
      try:
        value = tensor.numpy()
      except TypeError:  # PyTorch hands NumPy no bfloat16; float32 holds every such number exactly
        value = tensor.float().numpy()
    array = np.asarray(value)
  except (TypeError, ValueError, RuntimeError) as error:
    raise UserError(f"{path}: {name} cannot be taken as an array ({_one_line(error)}); convert it first") from error
  if array.dtype != _BFLOAT16 and not issubclass(array.dtype.type, np.number | np.bool_):
    raise UserError(f"{path}: {name} is of type {array.dtype}; weights are numbers")
  return array


def _contiguous(array: np.ndarray) -> np.ndarray:
  """The array in C order and the machine's byte order; np.ascontiguousarray would give a scalar an axis."""
  return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _write_safetensors(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
  safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
  mask = os.umask(0)
  os.umask(mask)
  path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read


def _write_npz(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
  # Not np.savez: it takes the names as arguments, next to its own ("file").
  with zipfile.ZipFile(path, "w") as archive:
    for name, array in arrays.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as record:
        np.lib.format.write_array(record, array.view("V2") if array.dtype == _BFLOAT16 else array, allow_pickle=False)


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _shown(name: str) -> str:
  """A name from a file, safe to print."""
  text = "".join(character if character.isprintable() else "?" for character in name)
  return text if len(text) <= 100 else f"{text[:100]}..."


def _listed(names: Any) -> str:
  names = list(names)
  listed = ", ".join(_shown(repr(name)) for name in names[:_LISTED])
  return listed + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
