"""Files of torch.save: read without torch and without running any code.

Such a file is a zip of uncompressed members: `<top>/data.pkl`, a pickle that
describes the tensors, and `<top>/data/<key>`, the bytes of one storage each.
All sizes that a file claims are checked before anything of that size is made.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import io
import math
import mmap
import os
import pathlib
import pickle
import reprlib
import struct
from typing import Any
import zipfile

import numpy as np

from gemma_funnel import buckets
from gemma_funnel.convert.tensor_io import (
  BFLOAT16,
  Header,
  Index,
  RangeWriter,
  read_range,
  to_path,
)

# Far above what models need, far below what fills a memory or takes for ever.
_MAX_DIRECTORY = 16 * 2**20
_MAX_PICKLE = 64 * 2**20
_MAX_OPCODES = 2**20
_MAX_AXES = 32

_LOCAL_HEADER = b"PK\x03\x04"
# Files before torch 1.6 begin with this number, pickled.
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_WRAPS = ("model_state_dict", "state_dict")


@dataclasses.dataclass(frozen=True)
class View:
  """Elements of a storage by strides.

  Attributes:
    key: of the storage.
    dtype: of the elements.
    offset: of the first one, in elements.
    shape: its axes.
    strides: of each axis, in elements.
  """

  key: str
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def span(self) -> tuple[int, int]:
    """The elements of the storage from the first to past the last of ours."""
    if not math.prod(self.shape):
      return self.offset, self.offset
    ends = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
    first = self.offset + sum(min(end, 0) for end in ends)
    return first, self.offset + sum(max(end, 0) for end in ends) + 1

  def at(self, index: Index) -> "View":
    """The view's view at `index`: it is strided too."""
    offset, shape, strides = self.offset, [], []
    if len(index) > len(self.shape):
      raise IndexError(f"{index} has more axes than {self.shape}")
    for size, stride, item in zip(
      self.shape, self.strides, index, strict=False
    ):
      chosen = range(size)[item]
      if isinstance(chosen, range):
        offset += chosen.start * stride if chosen else 0
        shape.append(len(chosen))
        strides.append(chosen.step * stride)
      else:
        offset += chosen * stride
    shape = (*shape, *self.shape[len(index) :])
    strides = (*strides, *self.strides[len(index) :])
    return View(self.key, self.dtype, offset, shape, strides)


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  size: int


def _make_view(
  storage, offset, shape, strides, requires_grad, hooks, flags=None
) -> View:
  """Stands for torch._utils._rebuild_tensor_v2.

  Raises:
    ValueError: not all of the tensor lies within its storage.
  """
  del requires_grad, hooks
  if not isinstance(storage, _Storage):
    raise ValueError("it has a tensor of what is no storage")
  if flags:
    raise ValueError("it has a tensor stored as a conjugate or a negative")
  numbers_fit = (
    type(shape) is type(strides) is tuple
    and len(shape) == len(strides) <= _MAX_AXES
    and all(
      type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides)
    )
    and math.prod(max(n, 1) for n in shape) < 2**59
  )
  if not numbers_fit:
    raise ValueError("it has a tensor of impossible offset, sizes or strides")
  view = View(storage.key, storage.dtype, offset, shape, strides)
  # The second: strides of 0 would let a small file ask for any memory.
  if max(view.span()[1], math.prod(shape)) > storage.size:
    raise ValueError(
      f"it has a tensor of shape {shape} and strides {strides} from "
      f"{offset}: expected one within the {storage.size} of its storage"
    )
  return view


_STORAGES = {
  "Float": np.float32,
  "Double": np.float64,
  "Half": np.float16,
  "BFloat16": BFLOAT16,
  "Char": np.int8,
  "Byte": np.uint8,
  "Short": np.int16,
  "Int": np.int32,
  "Long": np.int64,
  "Bool": np.bool_,
  "ComplexFloat": np.complex64,
  "ComplexDouble": np.complex128,
}
# All that a pickle may name, and what stands for it here. The callables are
# all that a pickle can call.
_ALLOWED = {
  **{f"torch.{kind}Storage": np.dtype(d) for kind, d in _STORAGES.items()},
  "collections.OrderedDict": lambda: {},
  "torch._utils._rebuild_tensor_v2": _make_view,
  "torch._utils._rebuild_parameter": lambda view, *_: view,
  "torch._utils._rebuild_parameter_with_state": lambda view, *_: view,
  # Of configurations that lie beside a state dict.
  "torch.Size": lambda sizes: sizes,
  "torch.device": lambda *_: None,
  "torch.bfloat16": None,
  "torch.float16": None,
  "torch.float32": None,
  "torch.float64": None,
}
# What torch emits for tensors in protocols 2 to 5.
_OPCODES = {
  getattr(pickle, name)[0]
  for name in """
  PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT
  LONG1 BINUNICODE SHORT_BINUNICODE BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
  EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT
  SETITEM SETITEMS BUILD GLOBAL STACK_GLOBAL REDUCE BINPERSID
  """.split()
}


class _Unpickler(pickle._Unpickler):
  """The standard unpickler without what can run code or fill a memory.

  In Python, as pickle has it: the one in C takes no other instructions, and
  its memo is an array as long as the largest number that a pickle names.
  Each instruction makes at most as much as it reads, so that bounds of the
  bytes and of the instructions bound the memory.
  """

  def __init__(self, code: bytes, storages: Mapping[str, int]):
    super().__init__(io.BytesIO(code))
    self._storages = storages
    self._opcodes_left = _MAX_OPCODES
    self.dispatch = self  # `load` looks each opcode up in it.

  def __getitem__(self, opcode: int) -> Any:
    self._opcodes_left -= 1
    if self._opcodes_left < 0:
      raise ValueError(f"its data.pkl has more than {_MAX_OPCODES} steps")
    if opcode not in _OPCODES:
      raise ValueError(
        f"its data.pkl has the instruction {bytes([opcode])!r}, which torch "
        "does not write for tensors"
      )
    return _DISPATCH[opcode]

  def find_class(self, module: str, name: str) -> Any:
    found = f"{module}.{name}"
    if found not in _ALLOWED:
      raise ValueError(
        f"its data.pkl asks for {found[:200]!a}: expected tensors and nothing "
        "else, so that no code of a stranger is run"
      )
    return _ALLOWED[found]

  def persistent_load(self, pid: Any) -> _Storage:
    match pid:
      case ("storage", np.dtype() as dtype, str(key), str(), int(size)):
        pass
      case _:
        raise ValueError("its data.pkl refers to what is no storage")
    nbytes = self._storages.get(key)
    if nbytes is None:
      raise ValueError(f"it has no storage of key {reprlib.repr(key)}")
    if not 0 <= size <= nbytes // dtype.itemsize:
      raise ValueError(
        f"its storage {key} is of {nbytes} bytes: expected "
        f"{reprlib.repr(size)} of {dtype}"
      )
    return _Storage(key, dtype, size)

  def load_append(self) -> None:
    self._extend([self.stack.pop()])

  def load_appends(self) -> None:
    self._extend(self.pop_mark())

  def load_setitem(self) -> None:
    value = self.stack.pop()
    self._update([self.stack.pop(), value])

  def load_setitems(self) -> None:
    self._update(self.pop_mark())

  def load_build(self) -> None:
    # The state of a dict is the `_metadata` of modules, of no use here; pickle
    # would call a __setstate__, or set attributes.
    self.stack.pop()
    self._update([])

  def _extend(self, items: list) -> None:
    if type(self.stack[-1]) is not list:
      raise ValueError("its data.pkl appends to what is no list")
    self.stack[-1].extend(items)

  def _update(self, items: list) -> None:
    if type(self.stack[-1]) is not dict:
      raise ValueError("its data.pkl sets items or state of what is no dict")
    # The hash of a tuple can take for ever: of one that holds another twice,
    # and so on. torch has strings, and numbers of an optimizer's parameters.
    names = (str, int, float, bool, type(None))
    if len(items) % 2 or not all(type(key) in names for key in items[::2]):
      raise ValueError("its data.pkl has a dict with keys that are no names")
    self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


_DISPATCH = {
  **pickle._Unpickler.dispatch,
  pickle.APPEND[0]: _Unpickler.load_append,
  pickle.APPENDS[0]: _Unpickler.load_appends,
  pickle.SETITEM[0]: _Unpickler.load_setitem,
  pickle.SETITEMS[0]: _Unpickler.load_setitems,
  pickle.BUILD[0]: _Unpickler.load_build,
}


def read_pickle(code: bytes, storages: Mapping[str, int]) -> dict[str, View]:
  """The tensors of a state dict, by name.

  Args:
    code: the pickle.
    storages: the bytes of each, by key.

  Raises:
    ValueError: it is damaged, holds other things than named tensors, or one
      that does not lie within its storage.
  """
  try:
    root = _Unpickler(code, storages).load()
  except ValueError:
    raise
  # pickle's documentation promises no kind of exception for damage.
  except Exception as error:
    raise ValueError(
      f"its data.pkl is damaged or ends early: {reprlib.repr(str(error))}"
    ) from error
  if type(root) is dict:
    inner = (root[key] for key in _WRAPS if type(root.get(key)) is dict)
    root = next(inner, root)
  if type(root) is not dict:
    raise ValueError(f"it holds a {_kind(root)}: expected a state dict")
  others = [
    f"{reprlib.repr(name)}, a {_kind(value)}"
    for name, value in root.items()
    if not (type(name) is str and isinstance(value, View))
  ]
  if others:
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    raise ValueError(
      f"its state dict holds {'; '.join(others[:5])}{more}: expected named "
      "tensors"
    )
  for name in root:
    name.encode()  # pickle reads half a surrogate too, which no one can print.
  return root


def _kind(value: Any) -> str:
  """What errors call it: never its repr, which may have no end."""
  return "tensor" if isinstance(value, View) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class _Member:
  """A member of the zip; `limit` is where the next one begins, or would."""

  header: int
  name: bytes
  size: int
  limit: int

  def check_place(self, start: int) -> None:
    if self.header < 0 or start + self.size > self.limit:
      raise ValueError(
        f"its member {reprlib.repr(self.name.decode('latin1'))} of "
        f"{self.size} bytes at {start} reaches beyond {self.limit}, into the "
        "next one or past the end"
      )


def is_torch_file(path: str | os.PathLike[str]) -> bool:
  """Whether torch.save wrote it, to judge by its content; never raises.

  A legacy file, TorchScript, or a file that was cut off counts: `TorchFile`
  says what is wrong.
  """
  try:
    if not to_path(path).is_file():
      return False
    with _Bounded(path) as file:
      head = file.read(512)
    if not head.startswith(_LOCAL_HEADER):
      return _LEGACY in head[:32]
    # torch puts it first, so that mostly the directory need not be read.
    length = int.from_bytes(head[26:28], "little")
    if head[30 : 30 + length].endswith(b"/data.pkl"):
      return True
    return any(name.endswith("/data.pkl") for name in _read_directory(path))
  except (OSError, ValueError):
    return False


class TorchFile:
  """A state dict that torch.save wrote; a `TensorReader`.

  Raises:
    ValueError: a file that cannot be read, is damaged, or holds other things
      than named tensors, such as objects or code; it is named.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.where = str(path)
    with self._naming():
      if not to_path(path).is_file():
        raise ValueError("there is no such file")
      with _Bounded(path) as file:
        if _LEGACY in file.read(32):
          raise ValueError(
            "it was saved in the format before torch 1.6: expected a zip, "
            "which torch.save(torch.load(file), file) makes of it"
          )
      members = _read_directory(path)
      top = _find_top(members)
      order, code = (
        self._read_whole(members.get(f"{top}/{name}"), name, most)
        for name, most in (("byteorder", 16), ("data.pkl", _MAX_PICKLE))
      )
      if order not in (None, b"little"):
        raise ValueError("its byteorder is not 'little', as expected")
      lead = f"{top}/data/"
      self._storages = {
        name.removeprefix(lead): member
        for name, member in members.items()
        if name.startswith(lead)
      }
      sizes = {key: member.size for key, member in self._storages.items()}
      self._views = read_pickle(code, sizes)
    self.tensors: dict[str, Header] = {
      name: Header(view.shape, view.dtype) for name, view in self._views.items()
    }

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """The values of `tensors[name]` at `index`, a new array.

    Reads and holds the bytes of the file from the first to the last of them,
    and twice the values' size if they do not lie in C order.

    Raises:
      ValueError: the file cannot be read, or is damaged; it is named.
    """
    view = self._views[name].at(index)
    start, stop = view.span()
    size = view.dtype.itemsize
    with self._naming():
      place = self._place_of(self._storages[view.key])
    raw = read_range(self.where, place + start * size, (stop - start) * size)
    # Where no step is taken, a stride may be any number, and is not checked.
    strides = [
      size * stride if n > 1 and start < stop else 0
      for n, stride in zip(view.shape, view.strides, strict=True)
    ]
    first = (view.offset - start) * size
    values = np.ndarray(view.shape, view.dtype, raw, first, strides)
    return values if values.flags.c_contiguous else values.copy()

  def _read_whole(
    self, member: _Member | None, name: str, most: int
  ) -> bytes | None:
    if member is None:
      return None
    if member.size > most:
      raise ValueError(
        f"its {name} is of {member.size} bytes: expected at most {most}"
      )
    start = self._place_of(member)
    return read_range(self.where, start, member.size).tobytes()

  def _place_of(self, member: _Member) -> int:
    """Where a member's bytes begin, which only its local header knows."""
    length = 30 + len(member.name)
    head = read_range(self.where, member.header, length).tobytes()
    signature, name, extra = struct.unpack_from("<4s22xHH", head)
    if signature != _LOCAL_HEADER or name != len(member.name):
      raise ValueError(f"no header of a member at byte {member.header}")
    if head[30:] != member.name:
      raise ValueError(f"the header of another member at byte {member.header}")
    member.check_place(member.header + length + extra)
    return member.header + length + extra

  @contextlib.contextmanager
  def _naming(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:
      raise ValueError(f"{self.where} cannot be read: {error}") from error


class _Bounded(io.RawIOBase):
  """A file, here or on a bucket, of which no more than a directory is read.

  zipfile reads one of whatever size a file claims it to have.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path, self._at = os.fspath(path), 0
    self._size = buckets.size_of(path)

  def seekable(self) -> bool:
    return True

  def readable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = (0, self._at, self._size)[whence]
    if start + offset < 0:
      raise ValueError("a place before its first byte")
    self._at = start + offset
    return self._at

  def read(self, size: int = -1) -> bytes:
    left = max(0, self._size - self._at)
    size = left if size < 0 else min(left, size)
    if size > _MAX_DIRECTORY:
      raise ValueError(f"its directory is above {_MAX_DIRECTORY} bytes")
    data = read_range(self._path, self._at, size).tobytes()
    self._at += size
    return data


def _read_directory(path: str | os.PathLike[str]) -> dict[str, _Member]:
  """The members of a zip, which are stored, and lie one after the other."""
  try:
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
      infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
      end = archive.start_dir
  except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
    raise ValueError(
      f"no zip file, or one damaged or cut off: {error}"
    ) from error
  if infos and infos[0].header_offset:
    raise ValueError("its zip does not begin where the file does")
  members: dict[str, _Member] = {}
  limits = [info.header_offset for info in infos[1:]] + [end]
  for info, limit in zip(infos, limits, strict=True):
    what = reprlib.repr(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise ValueError(f"its member {what} is compressed or encrypted")
    if info.volume:
      raise ValueError(f"its member {what} is on another disk")
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    name = info.orig_filename.encode(encoding)
    member = _Member(info.header_offset, name, info.file_size, limit)
    member.check_place(member.header + 30 + len(name))
    if info.compress_size != info.file_size or info.filename in members:
      raise ValueError(f"its member {what} has two sizes, or is there twice")
    members[info.filename] = member
  return members


def _find_top(members: Mapping[str, _Member]) -> str:
  """The folder within the zip that all members are in."""
  tops = [
    name.removesuffix("/data.pkl")
    for name in members
    if name.endswith("/data.pkl") and name.count("/") == 1
  ]
  if len(tops) != 1:
    raise ValueError(
      f"its zip has {len(tops)} members */data.pkl: expected the one that "
      "torch.save writes"
    )
  code = (f"{tops[0]}/code/", f"{tops[0]}/constants.pkl")
  if any(name.startswith(code) for name in members):
    raise ValueError(
      "it is TorchScript, a program: expected a state dict, which "
      "torch.save(torch.jit.load(file).state_dict(), other) makes of it"
    )
  return tops[0]


def import_torch() -> Any:
  """torch, which writing needs and reading does not.

  Raises:
    ValueError: it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      "writing a file of torch.save needs torch: pip install "
      "'gemma-funnel[torch]'"
    ) from error
  return torch


class TorchWriter:
  """Writes a state dict by torch.save; a `TensorWriter`.

  Blocks go to a file beside it, `<name>.raw`, of the size of all tensors, which
  is mapped into memory when torch.save writes them. So the disk holds the
  tensors twice for a moment, and the memory holds none.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Header],
    wrap: str | None = None,
  ):
    """Sets out to write `tensors`, in this order, or {wrap: tensors}.

    Raises:
      ValueError: a dtype that such a file cannot hold; torch is not installed.
      OSError: the file cannot be made.
    """
    self._torch = import_torch()
    for name, header in tensors.items():
      if header.dtype not in map(np.dtype, _STORAGES.values()):
        raise ValueError(f"{name} is of {header.dtype}, unknown to torch")
    self._path, self._wrap = pathlib.Path(path), wrap
    self._raw = RangeWriter(f"{path}.raw", tensors)

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    self._raw.write(name, index, block)

  def __enter__(self) -> "TorchWriter":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
    try:
      self._raw.__exit__(kind, *error)
      if kind is None:
        self._save()
    finally:
      os.unlink(self._raw.where)

  def _save(self) -> None:
    with open(self._raw.where, "r+b") as file:
      size = os.fstat(file.fileno()).st_size
      mapped = size and mmap.mmap(file.fileno(), size)
    state = {}
    for name, header in self._raw.tensors.items():
      dtype = getattr(self._torch, header.dtype.name)
      state[name] = self._torch.empty(header.shape, dtype=dtype)
      if header.nbytes:
        count, start = math.prod(header.shape), self._raw.starts[name]
        state[name] = self._torch.frombuffer(
          mapped, dtype=dtype, count=count, offset=start
        ).reshape(header.shape)
    try:
      self._torch.save({self._wrap: state} if self._wrap else state, self._path)
    except RuntimeError as error:
      raise OSError(str(error).splitlines()[0]) from error
