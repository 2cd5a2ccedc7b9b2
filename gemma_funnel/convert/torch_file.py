"""Files of torch.save, read and written without torch.

Such a file is a zip of uncompressed members: `<top>/data.pkl`, a pickle that
describes the tensors (see `torch_pickle`), and `<top>/data/<key>`, the bytes of
one storage each. Whatever it says of its members is checked against its size
before anything of that size is made.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import io
import math
import os
import reprlib
import struct
from typing import IO, Any
import zipfile

import numpy as np

from gemma_funnel.convert.store import BFLOAT16, Header, Index, read_range
from gemma_funnel.convert.torch_pickle import (
  View,
  c_strides,
  make_pickle,
  read_pickle,
)

# Far above what models need, far below what would fill a memory.
_MAX_DIRECTORY = 16 * 2**20
_MAX_PICKLE = 64 * 2**20

_LOCAL_HEADER = b"PK\x03\x04"
# Files before torch 1.6 begin with this number, pickled.
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What torch writes: the folder within the zip, and where bytes may begin.
_TOP = "archive"
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class _Member:
  """A member of the zip; `limit` is where the next one begins, or would."""

  header: int
  name: bytes
  size: int
  limit: int


def is_torch_file(path: str | os.PathLike[str]) -> bool:
  """Whether torch.save wrote it, to judge by its content; never raises.

  A legacy file, TorchScript, or a file that was cut off counts: `TorchFile`
  says what is wrong.
  """
  try:
    if not os.path.isfile(path):
      return False
    with open(path, "rb") as file:
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
  """A state dict that torch.save wrote; a `store.Reader`.

  Raises:
    ValueError: a file that cannot be read, is damaged, or holds other things
      than named tensors, such as objects or code; it is named.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.where = str(path)
    with self._naming():
      if not os.path.isfile(path):
        raise ValueError("there is no such file")
      with open(path, "rb") as file:
        if _LEGACY in file.read(32):
          raise ValueError(
            "it was saved in the format before torch 1.6: expected a zip, "
            "which torch.save(torch.load(file), file) makes of it"
          )
      members = _read_directory(path)
      top = _find_top(members)
      _check_sizes(members, top)
    order = members.get(f"{top}/byteorder")
    order = b"little" if order is None else self._read_member(order)
    code = self._read_member(members[f"{top}/data.pkl"])
    lead = f"{top}/data/"
    self._storages = {
      name.removeprefix(lead): member
      for name, member in members.items()
      if name.startswith(lead)
    }
    with self._naming():
      if order != b"little":
        raise ValueError("its byteorder is not 'little', as expected")
      sizes = {key: member.size for key, member in self._storages.items()}
      self._views = read_pickle(code, sizes)
    self.tensors: dict[str, Header] = {
      name: Header(view.shape, view.dtype) for name, view in self._views.items()
    }

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """The values of `tensors[name]` at `index`, a new array.

    Of the file, the bytes from the first to the last of them are read; this
    much is held, and twice the values' size if they do not lie in C order.

    Raises:
      ValueError: the file cannot be read, or is damaged; it is named.
    """
    view = self._views[name].at(index)
    start, stop = view.span()
    size = view.dtype.itemsize
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

  def _read_member(self, member: _Member) -> bytes:
    return read_range(self.where, self._place_of(member), member.size).tobytes()

  def _place_of(self, member: _Member) -> int:
    """Where a member's bytes begin, which only its local header knows."""
    length = 30 + len(member.name)
    head = read_range(self.where, member.header, length).tobytes()
    with self._naming():
      return _data_offset(head, member)

  @contextlib.contextmanager
  def _naming(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:
      raise ValueError(f"{self.where} cannot be read: {error}") from error


class _Bounded(io.FileIO):
  """zipfile reads a directory of whatever size a file claims it to have."""

  def read(self, size: int = -1) -> bytes:
    left = os.fstat(self.fileno()).st_size - self.tell()
    if min(left, size if size >= 0 else left) > _MAX_DIRECTORY:
      raise ValueError(f"its directory is above {_MAX_DIRECTORY} bytes")
    return super().read(size)


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
  members: dict[str, _Member] = {}
  limits = [info.header_offset for info in infos[1:]] + [end]
  for info, limit in zip(infos, limits, strict=True):
    what = reprlib.repr(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise ValueError(f"its member {what} is compressed or encrypted")
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    name = info.orig_filename.encode(encoding)
    member = _Member(info.header_offset, name, info.file_size, limit)
    _check_place(member, member.header + 30 + len(name))
    if info.compress_size != info.file_size or info.filename in members:
      raise ValueError(f"its member {what} has two sizes, or is there twice")
    members[info.filename] = member
  return members


def _check_place(member: _Member, start: int) -> None:
  if member.header < 0 or start + member.size > member.limit:
    raise ValueError(
      f"its member {reprlib.repr(member.name.decode('latin1'))} of "
      f"{member.size} bytes at {start} reaches beyond {member.limit}, into "
      "the next one or past the end"
    )


def _data_offset(head: bytes, member: _Member) -> int:
  """Where a member's bytes begin, by the header before them."""
  signature, name, extra = struct.unpack_from("<4s22xHH", head)
  if signature != _LOCAL_HEADER or name != len(member.name):
    raise ValueError(f"no header of a member at byte {member.header}")
  if head[30:] != member.name:
    raise ValueError(f"the header of another member at byte {member.header}")
  start = member.header + 30 + name + extra
  _check_place(member, start)
  return start


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
  top = tops[0]
  code = (f"{top}/code/", f"{top}/constants.pkl")
  if any(name.startswith(code) for name in members):
    raise ValueError(
      "it is TorchScript, a program: expected a state dict, which "
      "torch.save(torch.jit.load(file).state_dict(), other) makes of it"
    )
  return top


def _check_sizes(members: Mapping[str, _Member], top: str) -> None:
  """Of the members that are read whole."""
  for name, most in (("byteorder", 16), ("data.pkl", _MAX_PICKLE)):
    member = members.get(f"{top}/{name}")
    if member is not None and member.size > most:
      raise ValueError(
        f"its {name} is of {member.size} bytes: expected at most {most}"
      )


class TorchWriter:
  """Writes a state dict as torch.save would; a `store.Writer`.

  The file has no directory until all is written, and is none without it.

  Attributes:
    where: what errors call it.
  """

  # Of the sums of a zip file's members.
  in_order = True

  def __init__(
    self,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Header],
    wrap: str | None = None,
  ):
    """Sets out to write `tensors`, in this order, or {wrap: tensors}.

    Raises:
      ValueError: a dtype that such a file cannot hold.
      OSError: the file cannot be made.
    """
    self.where = str(path)
    self._tensors = dict(tensors)
    code = make_pickle(self._tensors, wrap)
    self._left = iter(enumerate(self._tensors.items()))
    self._name: str | None = None
    self._view = View("", BFLOAT16, 0, (0,), (1,))
    self._done = 0
    self._file = open(path, "wb")
    self._zip = zipfile.ZipFile(self._file, "w")
    self._member: IO[bytes] | None = None
    first = {"data.pkl": code, "byteorder": b"little", "version": b"3\n"}
    try:
      for name, text in first.items():
        self._member = self._open_member(name)
        self._member.write(text)
    except BaseException:
      self._abandon()
      raise

  def __enter__(self) -> "TorchWriter":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    if kind is not None:
      return self._abandon()
    try:
      while self._start_next():
        pass
      self._member.close()
      self._zip.close()
      self._file.close()
    except BaseException:
      self._abandon()
      raise

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    """Writes the next block: of the tensor begun last, or the first of one.

    Raises:
      ValueError: not the next block, or not as its header says.
      OSError: it cannot be written.
    """
    while name != self._name:
      if not self._start_next():
        raise ValueError(
          f"{self.where}: {name} is not the tensor to write next"
        )
    part = self._view.at(index)
    if block.shape != part.shape or block.dtype != part.dtype:
      raise ValueError(
        f"{self.where}: a block of {name} has shape {block.shape} and dtype "
        f"{block.dtype}: expected {part.shape} and {part.dtype}"
      )
    if not (part.contiguous and block.flags.c_contiguous) or (
      block.size and part.offset != self._done
    ):
      raise ValueError(
        f"{self.where}: the block of {name} at {index} is not the next in C "
        f"order after {self._done} values"
      )
    # A view of bytes: zipfile takes whatever has a buffer, without a copy.
    self._member.write(block.reshape(-1).view(np.uint8))
    self._done += block.size

  def _start_next(self) -> bool:
    """Goes on to the next tensor, if there is one."""
    if self._done != math.prod(self._view.shape):
      raise ValueError(
        f"{self.where}: {self._name} has {self._done} values written of "
        f"shape {self._view.shape}"
      )
    key, (name, header) = next(self._left, (None, (None, None)))
    if header is None:
      return False
    strides = c_strides(header.shape)
    self._view = View(str(key), header.dtype, 0, header.shape, strides)
    self._name, self._done = name, 0
    self._member = self._open_member(f"data/{key}")
    return True

  def _open_member(self, name: str) -> IO[bytes]:
    """A member whose bytes begin at a multiple of `_ALIGNMENT`."""
    if self._member is not None:
      self._member.close()
    info = zipfile.ZipInfo(f"{_TOP}/{name}", (1980, 1, 1, 0, 0, 0))
    # After the name come 20 bytes of sizes, then this field, with 4 of its own.
    start = self._zip.start_dir + 30 + len(info.filename) + 20 + 4
    padding = b"Z" * (-start % _ALIGNMENT)
    info.extra = struct.pack("<2sH", b"FB", len(padding)) + padding
    return self._zip.open(info, "w", force_zip64=True)

  def _abandon(self) -> None:
    """Closes the file without a directory."""
    with contextlib.suppress(OSError):
      if self._member is not None:
        self._member.close()
    # Else zipfile would write it when it is collected.
    self._zip.fp = None
    with contextlib.suppress(OSError):
      self._file.close()
