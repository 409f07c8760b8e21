"""Files of weights: PyTorch's without PyTorch, .safetensors, .npz; what is damaged, hostile or of another kind."""

import collections
import io
import json
import os
import pathlib
import pickle
import random
import shlex
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from selfreg_jax.errors import UserError
from selfreg_jax.models import weight_files
from selfreg_jax.models.weight_files import find_tensors, read_weights, write_weights

FILES = pathlib.Path(__file__).parent / "weights"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def ramp(*shape, dtype=np.float32):
  return (np.arange(np.prod(shape, dtype=int)) / 8).reshape(shape).astype(dtype)


def assert_same(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    assert found[name].shape == array.shape, name
    assert np.array_equal(found[name], array), name


def refused(path, match):
  with pytest.raises(UserError, match=match) as caught:
    read_weights(path)
  assert str(caught.value).startswith(f"{path}: ")
  return str(caught.value)


# Files of PyTorch's.


def test_a_state_dict_of_pytorch_is_read():
  content = read_weights(FILES / "state_dict.pth")
  expected = {
    "conv.weight": ramp(2, 3),
    "conv.half": ramp(3, dtype=np.float16),
    "conv.brain": ramp(3, dtype=BFLOAT16),
    "norm.num_batches_tracked": np.array(7),
    "head.transposed": ramp(2, 3).T,
    "tied.a": ramp(12),
    "tied.b": ramp(12)[4:10].reshape(2, 3),
    "empty": np.empty((0, 4), np.float32),
    "mask": np.array([True, False, True]),
  }
  assert_same(content, expected)
  assert np.shares_memory(content["tied.a"], content["tied.b"])
  assert all(array.flags.writeable for array in content.values())
  tensors, key = find_tensors(content, "x")
  assert key is None
  assert_same(tensors, expected)


@pytest.mark.parametrize("ending", ["pt", "bin", "ckpt", "PTH"])
def test_other_endings_of_pytorch_files_are_read(tmp_path, ending):
  path = tmp_path / f"weights.{ending}"
  path.write_bytes((FILES / "checkpoint.pth").read_bytes())
  assert read_weights(str(path))["epoch"] == 3


def test_a_checkpoint_of_pytorch_is_read_as_it_was_saved():
  content = read_weights(FILES / "checkpoint.pth")
  model = content.pop("model")
  assert_same(model, {"weight": ramp(2, 3), "bias": ramp(2)})
  assert content == {
    "epoch": 3, "lr": 0.1, "note": "x", "shape": (1, 2), "milestones": [1, (2, None)], "amp": True,
  }  # fmt: skip
  tensors, key = find_tensors({"model": model, **content}, "x")
  assert key == "model"
  assert_same(tensors, model)


REFUSED = {
  "namespace": r"holds argparse\.Namespace beside weights",
  "runs_code": r"holds (posix|nt)\.system beside weights",
  "module": r"holds a whole torch\.nn\.modules\.linear\.Linear instead of a dictionary",
  "legacy": r"from before version 1\.6",
  "torchscript": "is a TorchScript archive",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_pytorch_reads_is_refused_with_the_way_out(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where the code in runs_code.pth would leave its trace
  path = FILES / f"{name}.pth"
  message = refused(path, REFUSED[name])
  assert "If you trust the file (this runs the code in it)" in message
  command = message.splitlines()[-1].strip()
  assert command.startswith('python -c "import sys, torch; d = torch.load(sys.argv[1]')
  assert shlex.split(command)[-2:] == [str(path), str(FILES / f"{name}.weights.pth")]
  assert not any(tmp_path.iterdir())


def test_the_command_quotes_the_file_name(tmp_path):
  path = tmp_path / "my $(weights).pth"
  path.write_bytes((FILES / "legacy.pth").read_bytes())
  command = refused(path, r"before version 1\.6").splitlines()[-1]
  assert shlex.split(command)[-2:] == [str(path), str(tmp_path / "my $(weights).weights.pth")]


# PyTorch files made here: `Pickle` writes the instructions, `archive` the zip.


class Pickle(io.BytesIO):
  """Writes a pickle instruction by instruction."""

  def __init__(self):
    super().__init__(b"")
    self.write(b"\x80\x02")

  def op(self, *instructions):
    for instruction in instructions:
      self.write(instruction)
    return self

  def call(self, name):
    return self.op(b"c", name.rsplit(".", 1)[0].encode(), b"\n", name.rsplit(".", 1)[1].encode(), b"\n")

  def value(self, value):
    """A tuple, number or string as Python's own pickler writes it."""
    return self.op(pickle.dumps(value, 2)[2:-1])

  def tensor(
    self, key="0", *, numel=6, offset=0, size=(2, 3), stride=(3, 1), storage="torch.FloatStorage", location="cpu"
  ):
    self.call("torch._utils._rebuild_tensor_v2").op(b"((").value("storage").call(storage)
    self.value(key).value(location).value(numel).op(b"tQ").value(offset).value(size).value(stride)
    return self.op(b"\x89}tR")

  def weight(self, name="w", **tensor):
    """{name: tensor}."""
    return self.op(b"}").value(name).tensor(**tensor).op(b"s.")


def archive(path, program, storages=None, *, extra=None, compress=zipfile.ZIP_STORED):
  """A file as torch.save makes it."""
  storages = {"0": ramp(2, 3).tobytes()} if storages is None else storages
  records = {"data.pkl": program.getvalue(), **{f"data/{key}": data for key, data in storages.items()}, **(extra or {})}
  with zipfile.ZipFile(path, "w", compress) as file:
    for name, data in records.items():
      file.writestr(f"archive/{name}", data)
  return path


def test_the_files_made_here_are_read(tmp_path):
  path = archive(tmp_path / "a.pth", Pickle().weight(), extra={"byteorder": b"little"})
  assert_same(read_weights(path), {"w": ramp(2, 3)})


TYPES = {
  "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Long": "i8", "Int": "i4", "Short": "i2",
  "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_in_both_byte_orders(tmp_path, kind, order):
  array = np.array([0, 1, 0, 1, 1, 0], TYPES[kind]) if kind == "Bool" else np.arange(6).astype(TYPES[kind])
  data = array.view(f"u{array.itemsize}").astype(f"{'<' if order == 'little' else '>'}u{array.itemsize}").tobytes()
  program = Pickle().weight(storage=f"torch.{kind}Storage", location="cuda:0")
  path = archive(tmp_path / "a.pth", program, {"0": data}, extra={"byteorder": order.encode()})
  assert_same(read_weights(path), {"w": array.reshape(2, 3)})


VIEWS = {
  "a part": ({"offset": 1, "size": (2, 2), "stride": (3, 1)}, lambda base: base[:, 1:]),
  "steps": ({"size": (3,), "stride": (2,)}, lambda base: base.ravel()[::2]),
  "an axis of length 1 with any stride": ({"size": (1, 6), "stride": (1 << 70, 1)}, lambda base: base.reshape(1, 6)),
  "a scalar": ({"offset": 5, "size": (), "stride": ()}, lambda base: base[1, 2]),
  "empty at the end": ({"offset": 6, "size": (0, 3), "stride": (3, 1)}, lambda base: base[:0]),
  "overlapping": ({"size": (2, 3), "stride": (1, 1)}, lambda base: np.stack([base.ravel()[:3], base.ravel()[1:4]])),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_storage_are_read(tmp_path, view):
  layout, expected = VIEWS[view]
  content = read_weights(archive(tmp_path / "a.pth", Pickle().weight(**layout)))
  assert_same(content, {"w": np.asarray(expected(ramp(2, 3)))})


def test_a_large_storage_is_read_in_pieces(tmp_path):
  array = np.arange(700_000, dtype=np.float32)  # more than two pieces
  program = Pickle().weight(numel=array.size, size=(array.size,), stride=(1,))
  assert_same(read_weights(archive(tmp_path / "a.pth", program, {"0": array.tobytes()})), {"w": array})


BAD_TENSORS = {
  "expanded": ({"numel": 1, "size": (1 << 40,), "stride": (0,)}, ramp(1), "expanded tensor, 1099511627776 elements"),
  "offset beyond": ({"offset": 1}, ramp(6), "reaches to element 6 of a storage of 6"),
  "stride beyond": ({"stride": (4, 1)}, ramp(6), "reaches to element 6"),
  "stride far beyond": ({"stride": (1 << 62, 1)}, ramp(6), "reaches to element"),
  "empty far beyond": ({"offset": 7, "size": (0,), "stride": (1,)}, ramp(6), "reaches to element 6"),
  "negative offset": ({"offset": -1}, ramp(6), "not whole numbers"),
  "negative size": ({"size": (-2, -3)}, ramp(6), "not whole numbers"),
  "negative stride": ({"offset": 5, "stride": (-3, -1)}, ramp(6), "not whole numbers"),
  "size of float": ({"size": (2.0, 3)}, ramp(6), "not whole numbers"),
  "size of bool": ({"size": (True, 3)}, ramp(6), "not whole numbers"),
  "sizes without strides": ({"stride": (1,)}, ramp(6), "2 dimensions has 1 strides"),
  "too many axes": ({"size": (1,) * 65, "stride": (1,) * 65}, ramp(6), "65 dimensions"),
  "empty but huge": ({"size": (0, 1 << 62, 1 << 62), "stride": (1, 1, 1)}, ramp(6), "damaged"),
  "storage too small": ({}, ramp(5), "20 bytes, not 6 values of type float32"),
  "storage too large": ({}, ramp(7), "28 bytes, not 6 values"),
  "negative numel": ({"numel": -6}, ramp(6), "24 bytes, not -6 values"),
  "huge numel": ({"numel": 1 << 60}, ramp(6), "24 bytes, not 1152921504606846976 values"),
  "numel of float": ({"numel": 6.0}, ramp(6), "something other than a storage"),
  "missing storage": ({"key": "1"}, ramp(6), "the archive has no data/1"),
  "storage outside": ({"key": "../data.pkl"}, ramp(6), r"the archive has no data/\.\./data\.pkl"),
  "complex": ({"storage": "torch.ComplexFloatStorage"}, ramp(6), r"of an unusual type.*ComplexFloatStorage"),
  "not a storage type": ({"storage": "torch.Size"}, ramp(6), "something other than a storage"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, case):
  layout, storage, message = BAD_TENSORS[case]
  refused(archive(tmp_path / "a.pth", Pickle().weight(**layout), {"0": storage.tobytes()}), message)


def test_a_storage_of_two_types_is_refused(tmp_path):
  program = Pickle().op(b"}").value("a").tensor().op(b"s").value("b").tensor(storage="torch.IntStorage").op(b"s.")
  refused(archive(tmp_path / "a.pth", program), "storage 0 is of two types, float32 and int32")


NAMES = {
  "builtins.eval": (b"cbuiltins\neval\n", r"holds a whole builtins\.eval"),
  "os.system": (b"}X\x01\x00\x00\x00acos\nsystem\ns.", r"holds os\.system beside weights"),
  "a dotted name": (b"}X\x01\x00\x00\x00accollections\nOrderedDict.fromkeys\ns.", r"OrderedDict\.fromkeys beside"),
  "a dotted module": (b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_parameter.__globals__\ns.", "__globals__ beside"),
  "quantized": (b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_qtensor\ns.", r"not dense.*_rebuild_qtensor.*dequantize"),
  "unprintable": (b"}X\x01\x00\x00\x00aca\\x1b[31m\n" + b"b" * 200 + b"\ns.", r"holds a\?\[31m\.b{93}\.\.\. beside"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_beside_the_known_ones_are_refused(tmp_path, name):
  program, message = NAMES[name]
  refused(archive(tmp_path / "a.pth", Pickle().op(program)), message)


def with_call(name, arguments):
  return Pickle().op(b"}").value("a").call(name).op(arguments, b"Rs.")


PROGRAMS = {
  "eval by INST": (Pickle().op(b"(").value("1+1").op(b"ibuiltins\neval\n."), "instruction INST"),
  "eval by OBJ": (Pickle().op(b"(cbuiltins\neval\n").value("1+1").op(b"o."), r"holds builtins\.eval"),
  "OBJ of a known name": (Pickle().op(b"(ccollections\nOrderedDict\no."), "instruction OBJ"),
  "NEWOBJ of a known name": (Pickle().op(b"ccollections\nOrderedDict\n)\x81."), "instruction NEWOBJ"),
  "extension registry": (Pickle().op(b"\x82\x01)R."), "instruction EXT1"),
  "wide extension registry": (Pickle().op(b"\x84\x01\x00\x00\x00)R."), "instruction EXT4"),
  "STACK_GLOBAL": (Pickle().value("os").value("system").op(b"\x93."), "instruction STACK_GLOBAL"),
  "text opcodes": (Pickle().op(b"I1\n."), "instruction INT"),
  "unknown opcode": (Pickle().op(b"\xff."), r"opcode b'\\xff' unknown"),
  "protocol 4": (Pickle().op(b"\x80\x04}."), "protocol 4, where only"),
  "no end": (Pickle().op(b"}"), "pickle exhausted"),
  "nothing": (Pickle().op(b"."), "takes more than it put down"),
  "no mark": (Pickle().op(b"}u."), "takes more than it put down"),
  "nothing in the memo": (Pickle().op(b"h\x05."), "refers to what it never had"),
  "state of a list": (Pickle().op(b"]}b."), "gives a state to what has none"),
  "state of a function": (Pickle().call("torch.Size").op(b"}b."), "gives a state"),
  "slots of a function": (Pickle().call("torch.Size").op(b"N}\x86b."), "gives a state"),
  "state of a tensor": (Pickle().tensor().op(b"}b."), "gives a state"),
  "entry of a function": (Pickle().call("torch.Size").value("a").value("b").op(b"s."), "what is no dictionary"),
  "half an entry": (Pickle().op(b"}(").value("a").op(b"u."), "what is no dictionary"),
  "item of a tuple": (Pickle().op(b")NaN."), "what is no list"),
  "call of a string": (Pickle().value("a").op(b")R."), "calls what is no function"),
  "call of a storage type": (with_call("torch.FloatStorage", b")"), r"torch\.FloatStorage with strange arguments"),
  "OrderedDict of items": (with_call("collections.OrderedDict", b"]\x85"), "OrderedDict with strange arguments"),
  "tensor of nothing": (with_call("torch._utils._rebuild_tensor_v2", b")"), "_rebuild_tensor_v2 with strange"),
  "parameter of a number": (with_call("torch._utils._rebuild_parameter", b"K\x01\x88}\x87"), "_rebuild_parameter with"),
  "a function as a value": (Pickle().op(b"}").value("a").call("torch.Size").op(b"s."), r"holds torch\.Size beside"),
  "a function in a list": (Pickle().op(b"](").call("torch.Size").op(b"e."), r"holds torch\.Size beside"),
  "a function at the top": (Pickle().call("torch.Size").op(b"."), r"holds torch\.Size beside"),
  "a persistent name": (Pickle().value("storage").op(b"Q."), "something other than a storage"),
  "a tuple as a key": (Pickle().op(b"})Ns."), "keys of type tuple"),
  "a huge number as a key": (Pickle().op(b"}").value(1 << 70).op(b"Ns."), "keys of type int"),
  "a list at the top": (Pickle().op(b"]."), "its top is a list, no dictionary"),
  "a tensor at the top": (Pickle().tensor().op(b"."), "its top is a ndarray"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_hostile_pickles_are_refused(tmp_path, case):
  program, message = PROGRAMS[case]
  refused(archive(tmp_path / "a.pth", program), message)


def test_the_state_of_a_dictionary_is_dropped(tmp_path):
  state = Pickle().call("collections.OrderedDict").op(b")R}").value("items").op(b"Nsb").value("w").tensor().op(b"s.")
  content = read_weights(archive(tmp_path / "a.pth", state))
  assert type(content) is dict
  assert_same(content, {"w": ramp(2, 3)})


def test_depth_ends_in_content_or_refusal(tmp_path):
  deep = 200_000  # pickle.Unpickler ends the process when it hashes such a tuple
  refused(archive(tmp_path / "a.pth", Pickle().op(b"})", b"\x85" * deep, b"Ns.")), "keys of type tuple")
  lists = Pickle().op(b"}").value("a").op(b"]" * deep, b"a" * (deep - 1), b"s.")
  content = read_weights(archive(tmp_path / "b.pth", lists))
  with pytest.raises(UserError, match=r"no weights found.*the top holds 'a'"):
    find_tensors(content, "b.pth")


def test_a_dictionary_in_itself_ends_in_refusal(tmp_path):
  content = read_weights(archive(tmp_path / "a.pth", Pickle().op(b"}q\x00").value("model").op(b"h\x00s.")))
  with pytest.raises(UserError, match="no weights found"):
    find_tensors(content, "a.pth")


def test_a_memo_index_of_any_size_costs_nothing(tmp_path):
  program = Pickle().op(b"}r\xff\xff\xff\x7f.")  # pickle.Unpickler reserves 32 GB for it
  assert read_weights(archive(tmp_path / "a.pth", program)) == {}


def patched_directory(path, name, **fields):
  """Changes fields of one entry in a zip file's directory: the file's promise, not its content."""
  content = bytearray(path.read_bytes())
  entry = content.rindex(name.encode()) - 46  # the directory's entry: 46 bytes, then the name
  assert content[entry : entry + 4] == b"PK\x01\x02"
  for offset, value in fields.values():
    struct.pack_into("<I", content, entry + offset, value)
  path.write_bytes(content)
  return path


def test_promises_of_the_directory_are_not_believed(tmp_path):
  huge = {"compressed": (20, 3 << 30), "size": (24, 3 << 30)}
  for name in ("archive/data.pkl", "archive/data/0"):
    path = patched_directory(archive(tmp_path / "a.pth", Pickle().weight()), name, **huge)
    refused(path, "the records of the archive are larger than the file")
  path = patched_directory(archive(tmp_path / "a.pth", Pickle().weight()), "archive/data.pkl", size=(24, 3 << 30))
  refused(path, r"data\.pkl is compressed")
  path = patched_directory(archive(tmp_path / "a.pth", Pickle().weight()), "archive/data/0", offset=(42, 0))
  refused(path, "damaged.*differ")


def test_a_pickle_beyond_the_limit_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(weight_files, "_MAX_PICKLE_BYTES", 20)
  refused(archive(tmp_path / "a.pth", Pickle().weight()), r"data\.pkl has \d+ bytes, more than the 20 that are read")


@pytest.mark.parametrize("compress", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(tmp_path, compress):
  refused(archive(tmp_path / "a.pth", Pickle().weight(), compress=compress), r"data\.pkl is compressed")


def test_records_of_one_name_are_refused(tmp_path):
  path = archive(tmp_path / "a.pth", Pickle().weight())
  with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
    file.writestr("archive/data/0", ramp(6))
  refused(path, "two records of the archive have the same name")


def test_an_unknown_byte_order_is_refused(tmp_path):
  refused(archive(tmp_path / "a.pth", Pickle().weight(), extra={"byteorder": b"middle"}), "byte order middle")


def test_truncated_files_are_refused(tmp_path):
  path = tmp_path / "a.pth"
  whole = (FILES / "state_dict.pth").read_bytes()
  for keep in (5, 600, len(whole) // 2, len(whole) - 22):
    path.write_bytes(whole[:keep])
    refused(path, "truncated|damaged")
  path.write_bytes(whole[: len(whole) // 2])
  refused(path, "truncated.*copy or download it again")


def test_a_flipped_bit_in_a_storage_is_noticed(tmp_path):
  path = archive(tmp_path / "a.pth", Pickle().weight())
  content = bytearray(path.read_bytes())
  content[content.index(ramp(6).tobytes()) + 9] ^= 4
  path.write_bytes(content)
  refused(path, "damaged.*CRC")


def test_mutated_files_end_in_content_or_refusal(tmp_path):
  rng = random.Random(0)
  sources = [(FILES / f"{name}.pth").read_bytes() for name in ("state_dict", "checkpoint", "module")]
  path, outcomes = tmp_path / "a.pth", collections.Counter()
  for _ in range(600):
    mutate = mutated_pickle if rng.random() < 0.6 else mutated
    path.write_bytes(mutate(rng, rng.choice(sources)))
    try:
      read_weights(path)
      outcomes["read"] += 1
    except UserError:
      outcomes["refused"] += 1
  assert min(outcomes.values()) > 20


def mutated(rng, content):
  content = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    place, other = rng.randrange(len(content)), rng.randrange(len(content))
    match rng.randrange(4):
      case 0:
        content[place] ^= 1 << rng.randrange(8)
      case 1:
        content[place] = rng.randrange(256)
      case 2:
        del content[place : place + rng.randint(1, 20)]
      case _:
        content[place:place] = content[other : other + 8]
  return bytes(content)


def mutated_pickle(rng, content):
  """Only the pickle changes, its checksum fits."""
  output = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w") as new:
    for name in old.namelist():
      new.writestr(name, mutated(rng, old.read(name)) if name.endswith("data.pkl") else old.read(name))
  return output.getvalue()


# Files of other kinds.


OTHERS = {
  "empty": ("a.pth", b"", "is empty"),
  "empty npz": ("a.npz", b"", "is empty"),
  "tar": ("a.pth", b"sys_info".ljust(257, b"\0") + b"ustar  \0".ljust(300, b"\0"), r"(?s)oldest format.*\n  python -c"),
  "plain pickle": ("a.pth", pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
  "text": ("a.pth", b"hello", "is not a PyTorch file"),
  "web page": ("a.pth", b"\n<!DOCTYPE html><title>Google Drive</title>", "is a web page"),
  "lfs": ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
  "HDF5": ("a.pth", b"\x89HDF\r\n\x1a\n", "HDF5"),
  "cut zip": ("a.pth", b"PK\x03\x04", "truncated"),
  "other zip": ("a.pth", {"model.txt": b""}, r"without data\.pkl"),
  "npz named pth": ("a.pth", {"w.npy": b""}, r"name it \.npz"),
  "safetensors named pth": ("a.pth", safetensors.numpy.save({"w": ramp(2)}), r"name it \.safetensors"),
  "safetensors named npz": ("a.npz", safetensors.numpy.save({"w": ramp(2)}), r"name it \.safetensors"),
  "pth named npz": ("a.npz", {"a/data.pkl": b""}, r"name it \.pth"),
  "pth named safetensors": ("a.safetensors", {"a/data.pkl": b""}, "not a safetensors file: it is a zip archive"),
  "npy named npz": ("a.npz", b"\x93NUMPY", r"is one NumPy array \(\.npy\)"),
  "text named npz": ("a.npz", b"not a zip file", r"not an \.npz file"),
  "cut npz": ("a.npz", b"PK\x03\x04", "truncated"),
  "no array in npz": ("a.npz", {"w.npy": b"text"}, "w is no NumPy array"),
  "text named safetensors": ("a.safetensors", b"text", "damaged.*header"),
  "unknown ending": ("a.h5", b"\x89HDF\r\n\x1a\n", r"unknown ending '.h5'; weights are read from files named .*\.npz"),
  "no ending": ("weights", b"", "unknown ending ''"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_told_apart(tmp_path, case):
  name, content, message = OTHERS[case]
  path = tmp_path / name
  if isinstance(content, dict):
    with zipfile.ZipFile(path, "w") as file:
      for entry, data in content.items():
        file.writestr(entry, data)
  else:
    path.write_bytes(content)
  refused(path, message)


@pytest.mark.parametrize("ending", ["pth", "safetensors", "npz"])
def test_files_that_cannot_be_opened_are_refused(tmp_path, ending, monkeypatch):
  path = tmp_path / f"a.{ending}"
  refused(path, "no such file")
  path.mkdir()
  refused(path, "is a folder")
  path.rmdir()
  path.write_bytes(b"x")

  def fail(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "open", fail)
  refused(path, "cannot be read .Permission denied.")


# .safetensors and .npz


WEIGHTS = {
  "conv.weight": ramp(2, 3),
  "half": ramp(3, dtype=np.float16),
  "brain": ramp(2, 2, dtype=BFLOAT16),
  "count": np.array(7),
  "transposed": ramp(2, 3).T,
  "steps": ramp(6)[::2],
  "empty": np.empty((0, 4), np.float32),
  "mask": np.array([True, False]),
  "file": ramp(1),
}


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_what_is_written_is_read(tmp_path, ending):
  path = tmp_path / f"weights.{ending}"
  write_weights(WEIGHTS, path)
  content = read_weights(path)
  assert_same(dict(sorted(content.items())), dict(sorted(WEIGHTS.items())))
  assert all(array.flags.writeable for array in content.values())
  assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
  write_weights({"w": ramp(2)}, path)  # over the old file
  assert_same(read_weights(path), {"w": ramp(2)})


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_big_endian_arrays_come_back_native(tmp_path, ending):
  path = tmp_path / f"weights.{ending}"
  write_weights({"w": ramp(3).astype(">f4")}, path)
  assert_same(read_weights(path), {"w": ramp(3)})
  assert read_weights(path)["w"].dtype.isnative


def test_files_of_numpy_are_read(tmp_path):
  np.savez(tmp_path / "a.npz", w=ramp(2, 3).T, b=ramp(3, dtype=BFLOAT16), big=ramp(2).astype(">f4"))
  assert_same(read_weights(tmp_path / "a.npz"), {"w": ramp(2, 3).T, "b": ramp(3, dtype=BFLOAT16), "big": ramp(2)})
  np.savez_compressed(tmp_path / "a.npz", w=ramp(2, 3))
  assert_same(read_weights(tmp_path / "a.npz"), {"w": ramp(2, 3)})


def test_a_safetensors_file_says_that_it_is_pytorchs(tmp_path):
  write_weights({"w": ramp(2)}, tmp_path / "a.safetensors")
  content = (tmp_path / "a.safetensors").read_bytes()
  header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
  assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.zeros(1, "M8[s]"), np.zeros(1, "V1")])
def test_arrays_that_are_no_numbers_are_refused(tmp_path, array):
  np.savez(tmp_path / "a.npz", w=array)
  refused(tmp_path / "a.npz", "w (is of type|holds Python objects).*; weights are numbers")
  for ending in ("npz", "safetensors"):
    with pytest.raises(UserError, match=r"b\.\w+: w is of type .*; weights are numbers"):
      write_weights({"w": array}, tmp_path / f"b.{ending}")


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_damage_is_noticed(tmp_path, ending):
  path = tmp_path / f"a.{ending}"
  write_weights(WEIGHTS, path)
  whole = path.read_bytes()
  for keep in (4, 9, 100, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:keep])
    refused(path, "truncated|damaged")


def test_a_promise_beyond_the_memory_is_refused(tmp_path):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w") as file, file.open("w.npy", "w") as record:
    np.lib.format.write_array_header_1_0(record, {"descr": "<f8", "fortran_order": False, "shape": (1 << 55,)})
  refused(path, "damaged, or too large for the memory")


def test_types_without_an_equivalent_are_refused(tmp_path):
  header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
  path = tmp_path / "a.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  refused(path, "unusual type.*float8_e8m0")


def test_other_endings_are_not_written(tmp_path):
  with pytest.raises(UserError, match=r"a\.pth: weights are written as \.safetensors or \.npz"):
    write_weights({"w": ramp(2)}, tmp_path / "a.pth")


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, ending):
  with pytest.raises(UserError, match=r"cannot be written.*No such file"):
    write_weights({"w": ramp(2)}, tmp_path / "missing" / f"a.{ending}")
  (tmp_path / f"a.{ending}").mkdir()
  with pytest.raises(UserError, match="cannot be written"):
    write_weights({"w": ramp(2)}, tmp_path / f"a.{ending}")
  assert [entry.name for entry in tmp_path.iterdir()] == [f"a.{ending}"]
  with pytest.raises(UserError, match="cannot be written"):
    write_weights({"\ud800": ramp(2)}, tmp_path / f"b.{ending}")
  assert not (tmp_path / f"partial.b.{ending}").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(b"x")
  path.chmod(0)
  refused(path, "Permission denied")


# Finding the state dict.


class Tensor:
  """What NumPy sees of a PyTorch tensor."""

  def __init__(self, array, known=True):
    self.array, self.known = array, known

  def __array__(self, *_args, **_kwargs):
    raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

  def detach(self):
    return self

  def cpu(self):
    return self

  def float(self):
    return Tensor(self.array.astype(np.float32))

  def numpy(self):
    if not self.known:
      raise TypeError("Got unsupported ScalarType BFloat16")
    return self.array


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_state_dict_is_found_under_its_key(key):
  tensors, found = find_tensors({"epoch": 3, "optimizer": {"w": ramp(2)}, key: {"w": ramp(2)}}, "x")
  assert found == key
  assert_same(tensors, {"w": ramp(2)})


def test_a_name_of_the_model_is_no_state_dict():
  tensors, found = find_tensors({"model": "unet", "state_dict": {"w": ramp(2)}}, "x")
  assert found == "state_dict"
  assert_same(tensors, {"w": ramp(2)})


def test_tensors_of_a_users_mapping_are_taken():
  content = {
    "a": Tensor(ramp(2)), "b": Tensor(ramp(3, dtype=BFLOAT16), known=False), "c": np.float32(2), "d": np.array(1),
  }  # fmt: skip
  tensors, key = find_tensors(collections.OrderedDict(content), "x")
  assert key is None
  assert_same(tensors, {"a": ramp(2), "b": ramp(3), "c": np.array(2, np.float32), "d": np.array(1)})


def test_content_without_weights_is_refused_with_its_keys():
  with pytest.raises(UserError, match=r"^x\.pth: no weights found; .*'model', .*; the top holds 'epoch', 'net'$"):
    find_tensors({"epoch": 3, "net": {"w": ramp(2)}}, "x.pth")
  with pytest.raises(UserError, match="the top holds nothing"):
    find_tensors({}, "x.pth")
  with pytest.raises(UserError, match=r"the top holds 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
    find_tensors(dict.fromkeys(range(100), ramp(2)), "x.pth")
  with pytest.raises(UserError, match=r"under 'model', no tensors: '_extra_state'"):
    find_tensors({"model": {"w": ramp(2), "_extra_state": {}}}, "x.pth")


def test_entries_that_cannot_be_arrays_are_refused():
  with pytest.raises(UserError, match=r"x: w cannot be taken as an array \(Got unsupported"):
    find_tensors({"w": type("Sparse", (Tensor,), {"float": Tensor.detach})(ramp(2), known=False)}, "x")
  with pytest.raises(UserError, match="x: w is of type object; weights are numbers"):
    find_tensors({"w": np.array([{}])}, "x")


def test_stand_ins_do_not_leave_the_reader_in_tuples(tmp_path):
  # {"a": (collections.OrderedDict,)} and the same one tuple deeper
  for depth in (1, 2):
    program = io.BytesIO(b"\x80\x02}X\x01\x00\x00\x00accollections\nOrderedDict\n" + depth * b"\x85" + b"s.")
    with pytest.raises(UserError, match="OrderedDict"):
      read_weights(archive(tmp_path / f"{depth}.pth", program))


def test_exported_weights_can_be_read_by_others(tmp_path):
  for name in ("w.npz", "w.safetensors"):
    write_weights({"a": np.ones(3, np.float32)}, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_a_pth_may_be_called_tar(tmp_path):
  path = tmp_path / "model.pth.tar"
  path.write_bytes((pathlib.Path(__file__).parent / "weights" / "checkpoint.pth").read_bytes())
  assert "model" in read_weights(path)


def test_an_npz_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(weight_files, "_MAX_NPZ_BYTES", 10_000)
  np.savez_compressed(tmp_path / "w.npz", a=np.zeros(10_000))
  with pytest.raises(UserError, match="too much for weights"):
    read_weights(tmp_path / "w.npz")
