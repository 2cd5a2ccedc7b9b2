"""Files of torch.save: the same values as torch sees, and no code run."""

import builtins
import collections
import concurrent.futures
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import damage

from gemma_funnel.convert import torch_file
from gemma_funnel.convert.tensor_io import BFLOAT16, Header
from gemma_funnel.convert.torch_file import (
  TorchFile,
  TorchWriter,
  is_torch_file,
)

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8]


def values(shape, dtype=np.float32, seed=0):
  drawn = np.random.default_rng(seed).normal(size=shape) * 50
  return np.asarray(drawn).astype(dtype)


def write(path, tensors, wrap=None):
  pytest.importorskip("torch")
  headers = {n: Header(a.shape, a.dtype) for n, a in tensors.items()}
  with TorchWriter(path, headers, wrap) as writer:
    for name, array in tensors.items():
      writer.write(name, (), array)
  return path


def same(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape
  # Bytes, so that a NaN equals itself and bfloat16 is compared exactly.
  assert a.tobytes() == b.tobytes()


def read_all(path):
  file = TorchFile(path)
  return {name: file.read(name) for name in file.tensors}


def to_numpy(tensor):
  import torch

  tensor = tensor.detach().contiguous()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(BFLOAT16)
  return tensor.numpy()


def same_as_torch(path, state_dict):
  found = read_all(path)
  assert list(found) == list(state_dict)
  for name, tensor in state_dict.items():
    same(found[name], to_numpy(tensor))


def refused(path, *words):
  """Both that it is, and that the error names the file and says why."""
  with pytest.raises(ValueError) as error:
    TorchFile(path)
  assert str(path) in str(error.value)
  for word in words:
    assert word in str(error.value)


# Pickles by hand, for what no writer writes.


def text(string):
  return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def number(value):
  size = (value.bit_length() + 8) // 8
  return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(items):
  return b"(" + b"".join(map(number, items)) + b"t"


def storage(numel=12, key="0", kind="torch\nFloatStorage"):
  named = b"c" + kind.encode() + b"\n"
  items = text("storage") + named + text(key) + text("cpu") + number(numel)
  return b"(" + items + b"tQ"


def tensor(
  shape=(3, 4), strides=(4, 1), offset=0, stored=None, more=b"", **keywords
):
  stored = storage(**keywords) if stored is None else stored
  arguments = (
    stored
    + number(offset)
    + numbers(shape)
    + numbers(strides)
    + b"\x89ccollections\nOrderedDict\n)R"
    + more
  )
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(value, name="w"):
  return b"\x80\x02}" + text(name) + value + b"s."


def archive(path, code, members=None, compress=(), top="archive"):
  """A zip with `code` as its data.pkl and a storage of 12 float32."""
  stored = {"data/0": np.arange(12, dtype=np.float32).tobytes()}
  stored |= members or {}
  with zipfile.ZipFile(path, "w") as file:
    for name, data in {"data.pkl": code, **stored}.items():
      how = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
      file.writestr(f"{top}/{name}", data, how)
  return path


# Round trips.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [None, "model_state_dict"])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_and_we_read_what_is_written(tmp_path, dtype, wrap, mmap):
  torch = pytest.importorskip("torch")
  stored = {
    "a.weight": values((5, 7), dtype),
    "empty": values((2, 0, 3), dtype),
    "scalar": values((), dtype),
    "ünder.ϕ": values((3, 1), dtype),
  }
  path = write(tmp_path / "a.ckpt", stored, wrap)
  found = read_all(path)
  loaded = torch.load(path, weights_only=True, mmap=mmap)
  if wrap is not None:
    assert list(loaded) == [wrap]
    loaded = loaded[wrap]
  assert list(found) == list(loaded) == list(stored)
  for name, array in stored.items():
    tensor = loaded[name]
    assert tensor.is_contiguous() and not tensor.requires_grad
    same(to_numpy(tensor), array)
    same(found[name], array)
  # Writable, and not over each other.
  loaded["a.weight"].zero_()
  same(to_numpy(loaded["scalar"]), stored["scalar"])


def test_a_file_is_a_sound_zip_and_the_same_each_time(tmp_path):
  stored = {f"{i}": values((i, 3)) for i in range(20)}
  for name in "xy":
    (tmp_path / name).mkdir()
  one, two = (write(tmp_path / name / "a.bin", stored) for name in "xy")
  assert one.read_bytes() == two.read_bytes()
  with zipfile.ZipFile(one) as file:
    assert file.testzip() is None
  assert sorted(tmp_path.rglob("*.*")) == [one, two]


@pytest.mark.parity
def test_modules(tmp_path):
  torch = pytest.importorskip("torch")
  nn = torch.nn
  model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(2, 3))
  model[2].weight = model[0].weight
  model.to(torch.bfloat16)
  model.register_buffer("freqs", torch.polar(torch.ones(3), torch.ones(3)))
  state = model.state_dict()
  parameters = dict(model.named_parameters())
  parameters["0.weight"].note = "a parameter with a state"
  optimizer = torch.optim.AdamW(model.parameters())
  model[:2](torch.ones(4, 2, dtype=torch.bfloat16)).sum().backward()
  optimizer.step()
  beside = {
    "optimizer": optimizer.state_dict(),
    "epoch": 3,
    "args": {"lr": 1e-3, "dtype": torch.bfloat16, "steps": 2**40, "on": None},
    "shape": torch.Size([2, 3]),
    "device": torch.device("cpu"),
  }
  path = tmp_path / "a.ckpt"
  for saved, expected in [
    (state, state),
    (dict(state), state),
    (parameters, parameters),
    ({"model_state_dict": state, **beside}, state),
    ({**beside, "state_dict": dict(state)}, state),
    (collections.OrderedDict(model_state_dict=state), state),
    ({}, {}),
  ]:
    for protocol in (2, 4, 5):
      torch.save(saved, path, pickle_protocol=protocol)
      assert is_torch_file(path)
      same_as_torch(path, expected)
  torch.save(state, path)
  header = TorchFile(path).tensors["freqs"]
  assert header == Header((3,), np.dtype(np.complex64))


@pytest.mark.parity
def test_views(tmp_path):
  torch = pytest.importorskip("torch")
  base = torch.randn(6, 5, 4)
  tied = torch.randn(3, 4).to(torch.bfloat16)
  stored = {
    "base": base,
    "transposed": base.permute(2, 0, 1),
    "offset": base[2:4],
    "column": base[:, 1],
    "strided": base[1::2, ::3, 1:3].transpose(0, 2),
    "scalar": base[3, 2, 1],
    "empty": base[:0],
    "empty column": base[:, 5:],
    "one": base[:1].transpose(0, 1),
    "tied": tied,
    "tied too": tied,
    "tied transposed": tied.T,
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(5)[1:],
  }
  path = tmp_path / "a.bin"
  torch.save(stored, path)
  same_as_torch(path, stored)
  file = TorchFile(path)
  for name in ("base", "transposed", "strided"):
    whole = to_numpy(stored[name])
    for index in [(0,), (slice(1, 2),), (slice(0, 2), 1), (-1, slice(1, 3))]:
      same(file.read(name, index), np.ascontiguousarray(whole[index]))


@pytest.mark.parity
def test_what_is_not_plain_is_refused(tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "a.bin"
  conjugate = torch.ones(2, dtype=torch.complex64).conj()
  for value, word in [
    (conjugate, "conjugate"),
    (conjugate.imag, "negative"),
    (torch.ones(1, 2).expand(9, 2), "storage"),
    (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
    (torch.zeros(2, dtype=torch.uint16), "_rebuild_tensor_v3"),
    (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
    (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (np.float32(1), "numpy"),
    (3, "'w', a int"),
    ({"v": torch.ones(2)}, "'w', a dict"),
    (None, "NoneType"),
  ]:
    torch.save({"w": value}, path)
    refused(path, word)
  torch.save([torch.ones(2)], path)
  refused(path, "holds a list")
  torch.save({1: torch.ones(2)}, path)
  refused(path, "1, a tensor")


# Reading parts.

INDICES = [
  (),
  (0,),
  (-1,),
  (slice(2, 5),),
  (slice(None), 3),
  (slice(1, 9, 3),),
  (slice(4, 4),),
  (2, slice(1, 3)),
  (slice(None, None, -2), slice(0, 2)),
  (slice(0, 3), slice(None), slice(1, 2)),
  (1, 2, 3),
  (np.int64(1),),
]


@pytest.mark.parametrize("index", INDICES)
def test_a_part_equals_the_whole_indexed(tmp_path, index):
  array = values((7, 5, 6), ml_dtypes.bfloat16)
  file = TorchFile(write(tmp_path / "a.bin", {"x": values(9), "w": array}))
  part = file.read("w", index)
  same(part, np.ascontiguousarray(array[index]).reshape(array[index].shape))
  assert part.flags.c_contiguous


def test_a_part_reads_only_its_bytes(tmp_path, monkeypatch):
  count = []
  read_range = torch_file.read_range

  def counting(path, offset, nbytes):
    count.append(nbytes)
    return read_range(path, offset, nbytes)

  write(tmp_path / "a.bin", {"w": values((1000, 100)), "v": values((9, 9))})
  monkeypatch.setattr(torch_file, "read_range", counting)
  file = TorchFile(tmp_path / "a.bin")
  # Opening: the directory by zipfile, and here the pickle and a few words.
  assert sum(count) < 2000
  overhead = 64
  for index, elements in [
    ((3,), 100),
    ((slice(5, 9),), 400),
    ((0, 7), 1),
    ((0, slice(3, 9)), 6),
    ((slice(0, 0),), 0),
    ((slice(0, 20, 10),), 1100),
    ((), 100_000),
    ((slice(0, 3), 1), 201),
  ]:
    count.clear()
    file.read("w", index)
    assert elements * 4 <= sum(count) <= elements * 4 + overhead


def test_threads_do_not_disturb_each_other(tmp_path):
  array = values((64, 1000))
  file = TorchFile(write(tmp_path / "a.bin", {"w": array}))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for i, row in enumerate(
      pool.map(lambda i: file.read("w", (i,)), range(64))
    ):
      same(row, array[i])


def test_a_bad_index_is_the_callers_fault(tmp_path):
  file = TorchFile(write(tmp_path / "a.bin", {"w": values((3, 4))}))
  for index in [(3,), (0, 0, 0), (-4,)]:
    with pytest.raises(IndexError):
      file.read("w", index)
  with pytest.raises(KeyError):
    file.read("v")


# Writing.


def test_blocks_are_written_in_any_order(tmp_path):
  pytest.importorskip("torch")
  a, b = values((6, 5, 2)), values((3,), np.int8)
  headers = {"z": Header((0,), a.dtype), "a": Header(a.shape, a.dtype)}
  headers |= {"y": Header((2, 0), a.dtype), "b": Header(b.shape, b.dtype)}
  with TorchWriter(tmp_path / "a.bin", headers) as writer:
    writer.write("b", (), b)
    writer.write("a", (slice(4, 6), slice(None)), a[4:])
    writer.write("a", (3, slice(0, 4)), a[3, :4])
    writer.write("a", (3, 4), a[3, 4])
    writer.write("a", (2,), a[2])
    writer.write("a", (slice(0, 2),), a[:2])
    writer.write("y", (), np.zeros((2, 0), np.float32))
  found = read_all(tmp_path / "a.bin")
  assert list(found) == list(headers)
  same(found["a"], a)
  same(found["b"], b)


@pytest.mark.parametrize(
  "error, block",
  [
    (RuntimeError, values((2, 3))),
    (RuntimeError, values((3, 4), np.float16)),
    (RuntimeError, values((3, 4)).astype(">f4")),
    (RuntimeError, None),
    (KeyError, "an error within"),
  ],
)
def test_a_wrong_or_missing_block_leaves_no_file(tmp_path, error, block):
  pytest.importorskip("torch")
  with pytest.raises(error):
    headers = {"a": Header((3, 4), np.dtype("f4"))}
    with TorchWriter(tmp_path / "x.bin", headers) as writer:
      if isinstance(block, str):
        raise KeyError
      if block is not None:
        writer.write("a", (), block)
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_first(tmp_path, monkeypatch):
  pytest.importorskip("torch")
  with pytest.raises(ValueError, match="a is of uint32"):
    TorchWriter(tmp_path / "y.bin", {"a": Header((3,), np.dtype(np.uint32))})
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match=r"gemma-funnel\[torch\]"):
    TorchWriter(tmp_path / "y.bin", {})
  assert not list(tmp_path.iterdir())


def test_sizes_beyond_32_bits_are_described():
  # Only the pickle: 3 * 2**31 elements, and a stride of 2**32.
  shape, strides = (3, 2, 2**31), (2**32, 2**31, 1)
  size = 3 * 2**32
  kind = "torch\nCharStorage"
  code = state_dict(tensor(shape, strides, numel=size, kind=kind))
  view = torch_file.read_pickle(code, {"0": size})["w"]
  assert (view.shape, view.strides) == (shape, strides)
  assert view.span() == (0, size)


# Other files.


def test_is_torch_file_goes_by_content(tmp_path):
  path = write(tmp_path / "odd.name", {"a": values(3)})
  assert is_torch_file(path) and is_torch_file(str(path))
  other = archive(tmp_path / "b", b"", {})
  assert is_torch_file(other)
  with zipfile.ZipFile(tmp_path / "c", "w") as file:
    file.writestr("data.pkl", b"")
    file.writestr("a/other.pkl", b"")
  contents = [
    b"",
    b"PK",
    b"PK\x03\x04",
    b"{}",
    b"\x80\x02}.",
    b"PK\x03\x04" * 99,
  ]
  for i, content in enumerate(contents):
    (tmp_path / f"{i}").write_bytes(content)
  names = ["c", "absent", ".", "a\0b", *map(str, range(len(contents)))]
  for name in names:
    assert not is_torch_file(f"{tmp_path}/{name}")
    refused(f"{tmp_path}/{name}")


@pytest.mark.parity
def test_legacy_and_torchscript_are_named(tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "a.bin"
  for protocol in (2, 3, 4):
    torch.save(
      {"w": torch.ones(2)},
      path,
      pickle_protocol=protocol,
      _use_new_zipfile_serialization=False,
    )
    assert is_torch_file(path)
    refused(path, "before torch 1.6")


def test_torchscript_is_named(tmp_path):
  code = state_dict(tensor())
  for name in ("constants.pkl", "code/__torch__/a.py"):
    path = archive(tmp_path / "a.pt", code, {name: b"pass"})
    assert is_torch_file(path)
    refused(path, "TorchScript")


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_compression_is_named(tmp_path, name):
  path = archive(tmp_path / "a.bin", state_dict(tensor()), {}, {name})
  refused(path, f"archive/{name}", "compressed")


def test_byteorder(tmp_path):
  code = state_dict(tensor())
  for order in (b"big", b"", b"little" * 9):
    path = archive(tmp_path / "a.bin", code, {"byteorder": order})
    refused(path, "byteorder")
  path = archive(tmp_path / "a.bin", code, {"byteorder": b"little"}, top="ü")
  expected = np.arange(12, dtype=np.float32).reshape(3, 4)
  same(read_all(path)["w"], expected)


def test_a_file_cut_off_is_refused_at_any_length(tmp_path):
  path = write(tmp_path / "a.bin", {"a": values((9,)), "b": values((2, 3))})
  data = path.read_bytes()
  for length in range(len(data)):
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match="a.bin"):
      TorchFile(path)


def test_a_file_cut_off_after_it_was_opened(tmp_path):
  path = write(tmp_path / "a.bin", {"a": values((99,))})
  file = TorchFile(path)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match="a.bin ends at byte"):
    file.read("a")
  path.unlink()
  with pytest.raises(ValueError, match="a.bin"):
    file.read("a")


def test_members_that_trade_places_are_refused(tmp_path):
  members = {"data/1": b"1" * 48}
  path = archive(tmp_path / "a.bin", state_dict(tensor()), members)
  data = path.read_bytes()
  directory = data.index(b"PK\x01\x02")
  swapped = data[directory:].replace(b"data/0", b"data/2")
  swapped = swapped.replace(b"data/1", b"data/0").replace(b"data/2", b"data/1")
  path.write_bytes(data[:directory] + swapped)
  # Known by the header beside the bytes, which opening does not look at.
  file = TorchFile(path)
  with pytest.raises(ValueError, match="a.bin.*header of another member"):
    file.read("w")


def test_overlapping_members_are_refused(tmp_path):
  path = archive(
    tmp_path / "a.bin", state_dict(tensor()), {"data/1": b"1" * 48}
  )
  data = bytearray(path.read_bytes())
  # In the directory, the second storage takes the place of the first.
  entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
  assert len(entries) == 3
  data[entries[2] + 42 : entries[2] + 46] = data[
    entries[1] + 42 : entries[1] + 46
  ]
  path.write_bytes(data)
  refused(path, "data/", "reaches beyond")


# Hostile pickles.


class Call:
  """Pickled as a call of a function, which unpickling makes."""

  def __init__(self, function, *arguments):
    self.pair = (function, arguments)

  def __reduce__(self):
    return self.pair


def test_no_code_is_run(tmp_path):
  ran = tmp_path / "ran"
  touch = f"__import__('pathlib').Path({str(ran)!r}).touch()"
  calls = {
    f"{os.system.__module__}.system": Call(os.system, f"touch {ran}"),
    ".eval": Call(builtins.eval, touch),
    ".exec": Call(builtins.exec, touch),
  }
  for name, call in calls.items():
    for protocol in range(6):
      code = pickle.dumps({"w": call}, protocol)
      # The program works: else nothing would be shown.
      pickle.loads(code)
      assert ran.exists()
      ran.unlink()
      path = archive(tmp_path / "a.bin", code)
      assert is_torch_file(path)
      # Protocols 0 and 1 have other instructions, which torch never writes.
      refused(path, name if protocol > 1 else "data.pkl")
      assert not ran.exists()


@pytest.mark.parametrize(
  "code, word",
  [
    # What a name can be built from, or reached through.
    (b"\x80\x04" + text("os") + text("system") + b"\x93.", "os.system"),
    (b"\x80\x04" + text("torch._utils") + text("a.b.c") + b"\x93.", "a.b.c"),
    (b"\x80\x04" + text("torch") + number(3) + b"\x93.", "damaged"),
    (b"\x80\x04" + text("torch") + b"]\x93.", "damaged"),
    (b"ctorch\nload\n.", "torch.load"),
    # A name is told of, and writes nothing on a terminal.
    (
      b"\x80\x04" + text("x\nerror: \x1b[2J") + text("y") + b"\x93.",
      r"x\nerror: \x1b[2J.y",
    ),
    (b"ctorch.nn.modules.module\nModule\n)\x81.", "module.Module"),
    (b"ctorch._utils\n_rebuild_tensor\n)R.", "_utils._rebuild_tensor':"),
    (b"ccollections\nOrderedDict\n]\x85R.", "damaged"),
    (b"ccollections\nOrderedDict\n}b.", "no dict"),
    (b"ctorch\nFloatStorage\n)R.", "damaged"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
    (b"ctorch._utils\n_rebuild_parameter\n)R.", "damaged"),
    (b"(ios\nsystem\n.", "instruction b'i'"),
    (b"(cos\nsystem\no.", "os.system"),
    (b"\x82\x01.", "instruction"),
    (b")R.", "damaged"),
    (b"))R.", "damaged"),
    (text("x") + b")R.", "damaged"),
    # Bombs and hangs.
    (b"}r\xff\xff\xff\xff.", "OK"),
    (b"\x8b\xff\xff\xff\x7f.", "instruction"),
    (b"\x8e" + b"\xff" * 7 + b"\x7f.", "instruction"),
    (b"\x96" + b"\xff" * 7 + b"\x7f.", "instruction"),
    (b"\x8d" + b"\xff" * 7 + b"\x7f.", "instruction"),
    (b"X\xff\xff\xff\xff.", "ends early"),
    (b"X\x02\x00\x00\x00\xff\xff.", "decode"),
    (b"\x95" + b"\xff" * 8 + b"}.", "frame size"),
    (b"L" + b"9" * 99999 + b"L\n.", "instruction"),
    (b"}" + b")" + b"q\x00\x86" * 1 + b".", "holds a tuple"),
    (b"}" + b")" + b"q\x00h\x00\x86" * 99 + b"Ns.", "no names"),
    (b")" + b"q\x00h\x00\x86" * 99 + b".", "holds a tuple"),
    (b"}" + b"Vx\n" + b")" + b"q\x00h\x00\x86" * 99 + b"s.", "instruction"),
    (b"}" + text("w") + b")" + b"q\x00h\x00\x86" * 99 + b"s.", "'w', a tuple"),
    (b"(" * 100_000 + b".", "damaged"),
    (b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    (b")" + b"\x85" * 300_000 + b".", "holds a tuple"),
    (b"}q\x00h\x00b.", "OK"),
    (b"]q\x00h\x00a.", "holds a list"),
    (b"}q\x00" + text("w") + b"h\x00s.", "'w', a dict"),
    (b"N" * 2**20 + b".", "steps"),
    # Containers that are none.
    (b"NNNs.", "no dict"),
    (b"NNa.", "no list"),
    (b"}(Nu.", "no names"),
    (b"}(]Nu.", "no names"),
    (b"N(NNu.", "no dict"),
    (b"", "early"),
    (b".", "damaged"),
    (b"t.", "damaged"),
    (b"h\x05.", "damaged"),
    (b"q\x05.", "damaged"),
    (b"NQ.", "no storage"),
    (b"ctorch\nFloatStorage", "data.pkl"),
  ],
)
def test_a_hostile_pickle(tmp_path, code, word):
  path = archive(tmp_path / "a.bin", code)
  tracemalloc.start()
  begin = time.perf_counter()
  try:
    if word == "OK":
      assert read_all(path) == {}
    else:
      refused(path, word)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
  finally:
    tracemalloc.stop()
  assert time.perf_counter() - begin < 20


HUGE = 2**62 - 1


@pytest.mark.parametrize(
  "value, word",
  [
    (tensor((3, 5), (5, 1)), "within the 12"),
    (tensor((3, 4), (4, 1), 1), "within the 12"),
    (tensor((3, 4), (4, 1), HUGE), "within the 12"),
    (tensor((3, 4), (5, 1)), "within the 12"),
    (tensor((2, 2), (11, 1)), "within the 12"),
    (tensor((2**40,), (0,)), "within the 12"),
    (tensor((13,), (0,)), "within the 12"),
    (tensor((HUGE,), (HUGE,)), "impossible"),
    (tensor((2**40, 2**40), (1, 1)), "impossible"),
    (tensor((2**40, 0, 2**40), (1, 1, 1)), "impossible"),
    (tensor((0, 3), (3, 1), 13), "within the 12"),
    (tensor((3, 4), (-4, 1), 8), "impossible"),
    (tensor((-3, 4), (4, 1)), "impossible"),
    (tensor((3, 4), (4, 1), -1), "impossible"),
    (tensor((3,), (4, 1)), "impossible"),
    (tensor((1,) * 33, (1,) * 33), "impossible"),
    (tensor((2**900,), (1,)), "impossible"),
    (tensor((3, 4), (2**900, 1)), "impossible"),
    (tensor((3, 4), (4, 1), more=b"}" + text("conj") + b"\x88s"), "conjugate"),
    (tensor((3, 4), (4, 1), stored=b"N"), "no storage"),
    (tensor((13,), (1,), numel=13), "is of 48 bytes"),
    (tensor((3, 4), (4, 1), numel=-12), "is of 48 bytes"),
    (tensor((3, 4), (4, 1), numel=2**900), "is of 48 bytes"),
    (tensor((7,), (1,), numel=7, kind="torch\nLongStorage"), "is of 48 bytes"),
    (tensor((3, 4), (4, 1), key="1"), "no storage of key '1'"),
    (tensor((3, 4), (4, 1), key="../data.pkl"), "of key"),
    (tensor((3, 4), (4, 1), kind="torch\nfloat32"), "no storage"),
    (tensor((3, 4), (4, 1), kind="os\nsystem"), "os.system"),
  ],
)
def test_a_tensor_lies_within_its_storage(tmp_path, value, word):
  refused(archive(tmp_path / "a.bin", state_dict(value)), word)


@pytest.mark.parametrize(
  "shape, strides, offset",
  [
    ((1, 4), (HUGE, 1), 8),
    ((0, 3), (HUGE, HUGE), 12),
    ((4, 0), (0, 0), 0),
    ((), (), 11),
    ((3, 4), (4, 1), 0),
    ((4, 3), (1, 4), 0),
    ((1,), (0,), 11),
  ],
)
def test_strides(tmp_path, shape, strides, offset):
  path = archive(tmp_path / "a.bin", state_dict(tensor(shape, strides, offset)))
  base = np.arange(12, dtype=np.float32)
  positions = np.full(shape, offset, np.int64)
  for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
    steps = [i * stride for i in range(n)]
    along = [n if i == axis else 1 for i in range(len(shape))]
    positions = positions + np.array(steps, np.int64).reshape(along)
  found = read_all(path)["w"]
  same(found, base[positions])
  assert found.flags.c_contiguous and found.flags.writeable


def test_the_state_dict_may_be_wrapped(tmp_path):
  inner = b"}" + text("w") + tensor() + b"s"
  other = b"}" + text("v") + tensor() + b"s"
  wrapped = lambda key, value: text(key) + value + b"s"
  path = tmp_path / "a.bin"
  for code, names in [
    (inner, ["w"]),
    (b"}" + wrapped("state_dict", inner), ["w"]),
    (b"}" + wrapped("model_state_dict", inner), ["w"]),
    (
      b"}"
      + wrapped("optimizer", b"]")
      + wrapped("state_dict", other)
      + wrapped("model_state_dict", inner),
      ["w"],
    ),
    (b"}" + wrapped("state_dict", tensor()), ["state_dict"]),
  ]:
    assert list(TorchFile(archive(path, code + b".")).tensors) == names
  refused(archive(path, b"}" + wrapped("model", inner) + b"."), "'model', a")


def test_a_large_pickle_is_refused(tmp_path, monkeypatch):
  path = archive(tmp_path / "a.bin", state_dict(tensor()))
  monkeypatch.setattr(torch_file, "_MAX_PICKLE", 100)
  refused(path, "data.pkl is of", "at most 100")
  monkeypatch.setattr(torch_file, "_MAX_DIRECTORY", 100)
  refused(path, "directory is above 100 bytes")


# Damage.


def try_to_read(path, counts):
  begin = time.perf_counter()
  is_torch_file(path)
  try:
    for array in read_all(path).values():
      assert isinstance(array, np.ndarray)
    counts["read"] += 1
  except ValueError as error:
    assert str(path) in str(error), error
    counts["refused"] += 1
  assert time.perf_counter() - begin < 2


def test_a_damaged_file_is_read_or_refused(tmp_path):
  """Nothing else: no other exception, no hang, no large allocation."""
  stored = {"a": values((3, 4)), "b": values((2, 5), np.float16)}
  path = write(tmp_path / "a.bin", stored)
  whole = path.read_bytes()
  with zipfile.ZipFile(path) as file:
    code = file.read("a/data.pkl")
  directory = whole.index(b"PK\x01\x02")
  headers = [i for i in range(directory) if whole[i : i + 4] == b"PK\x03\x04"]
  rng = np.random.default_rng(1)
  counts = collections.Counter()
  tracemalloc.start()
  try:
    for case in range(1200):
      for _ in range(int(rng.integers(1, 3))):
        if case % 3 == 0:
          # The pickle, in a zip that is sound.
          storages = {
            f"data/{i}": a.tobytes() for i, a in enumerate(stored.values())
          }
          archive(path, damage(rng, code), storages)
        elif case % 3 == 1:
          path.write_bytes(whole[:directory] + damage(rng, whole[directory:]))
        else:
          at = int(rng.choice(headers))
          piece = damage(rng, whole[at : at + 60])
          path.write_bytes(whole[:at] + piece + whole[at + 60 :])
      try_to_read(path, counts)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
  finally:
    tracemalloc.stop()
  # Both happen often, or the damage would show nothing.
  assert min(counts["read"], counts["refused"]) > 100


def test_a_zip_that_torch_would_not_read(tmp_path):
  import torch

  path = tmp_path / "x.bin"
  torch.save({"a": torch.ones(3)}, path)
  data = path.read_bytes()
  path.write_bytes(b"x" * 100 + data)
  with pytest.raises(ValueError, match="does not begin where the file does"):
    TorchFile(path)
  at = data.index(b"PK\x01\x02") + 34  # The number of its disk.
  path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
  with pytest.raises(ValueError, match="is on another disk"):
    TorchFile(path)
