"""What a GGUF file (llama.cpp's) has before its tensors' values.

Numbers are little-endian. All of it is checked against the size of the file
before anything of that size is made.
"""

from collections.abc import Iterator
import dataclasses
import functools
import os
import struct
from typing import Any

import numpy as np

from gemma_funnel import buckets, inputs
from gemma_funnel.checks import require

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Of metadata, by the number of the type.
_SCALARS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  7: "?",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}
# All that comes before the values: metadata, and what tensors there are.
_MAX_HEAD = 1 << 30
_MAX_AXES = 4
# Of a bucket's file, what is read of it first.
_FIRST_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor, undequantised.

  Attributes:
    name, shape: last axis last, as numpy has it.
    kind: the number of its type.
    offset: of its first byte, from where values begin.
  """

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int


@dataclasses.dataclass(frozen=True)
class Head:
  """What a file says of itself.

  Attributes:
    where: the file.
    metadata: by key; an array is a numpy array, or a list of bytes.
    entries: its tensors.
    start: the byte at which values begin.
    alignment: of each tensor's first byte, from there.
    size: bytes of the file.
  """

  where: str
  metadata: dict[str, Any]
  entries: tuple[Entry, ...]
  start: int
  alignment: int
  size: int

  def damaged(self, what: str) -> ValueError:
    return ValueError(f"{self.where} is damaged or cut off: {what}")


def read(path: str | os.PathLike[str]) -> Head:
  """Reads it.

  Raises:
    ValueError: it cannot be read, is damaged or cut off, or of another version
      or byte order.
  """
  where = os.fspath(path)
  if buckets.is_remote(path):
    return _read_remote(where, inputs.fingerprint(path))
  with inputs.open_file(path) as file:
    size = file.seek(0, os.SEEK_END)
    data = np.memmap(file, np.uint8, "r") if size else b""
    return _read(memoryview(data)[: min(size, _MAX_HEAD)], where, size)


@functools.lru_cache(maxsize=1)  # It is asked for the tokenizer, too.
def _read_remote(where: str, fingerprint: str) -> Head:
  """Of a file of a bucket; more and more of it is read until it is enough."""
  size = buckets.size_of(where)
  most, some = min(size, _MAX_HEAD), _FIRST_BYTES
  while True:
    data = buckets.read_range(where, 0, min(some, most))
    try:
      return _read(memoryview(data), where, size)
    except ValueError:
      if some >= most:
        raise
    some *= 4


def _read(data: memoryview, where: str, size: int) -> Head:
  cursor = _Cursor(data, where)
  try:
    return _read_from(cursor, where, size)
  except (UnicodeDecodeError, OverflowError) as error:
    raise cursor.damaged(str(error)) from error


def _read_from(cursor: "_Cursor", where: str, size: int) -> Head:
  require(cursor.take(4) == _MAGIC, f"{where} is no GGUF file: no {_MAGIC!r}")
  version = cursor.number("<u4")
  require(
    version in _VERSIONS,
    f"{where} is of GGUF version {version}: expected one of "
    f"{list(_VERSIONS)}, little-endian",
  )
  # Of a tensor and of an entry, the fewest bytes there can be.
  num_tensors, num_entries = cursor.count(24), cursor.count(13)
  metadata: dict[str, Any] = {}
  for _ in range(num_entries):
    key = cursor.string().decode()
    if key in metadata:
      raise cursor.damaged(f"it has {key!r} twice")
    metadata[key] = cursor.value(cursor.number("<u4"))
  entries = tuple(_entry(cursor) for _ in range(num_tensors))
  alignment = metadata.get("general.alignment", 32)
  if type(alignment) is not int or not 0 < alignment <= 1 << 20:
    raise cursor.damaged(f"general.alignment={alignment!r}")
  start = -(-cursor.at // alignment) * alignment
  return Head(where, metadata, entries, start, alignment, size)


def _entry(cursor: "_Cursor") -> Entry:
  """The next one; its axes are stored last to first."""
  name = cursor.string().decode()
  axes = cursor.number("<u4")
  if not 0 < axes <= _MAX_AXES:
    raise cursor.damaged(f"{name!r} has {axes} axes")
  shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
  return Entry(name, shape, cursor.number("<u4"), cursor.number("<u8"))


class _Cursor:
  """Reads values one after the other; what is beyond the end is damage."""

  def __init__(self, data: memoryview, where: str):
    self._data, self._where, self.at = data, where, 0

  def damaged(self, what: str) -> ValueError:
    return ValueError(f"{self._where} is damaged or cut off: {what}")

  def take(self, nbytes: int) -> bytes:
    return bytes(self._view(nbytes))

  def _view(self, nbytes: int) -> memoryview:
    if nbytes > len(self._data) - self.at:
      raise self.damaged(
        f"{nbytes} bytes at {self.at}, of {len(self._data)} at most"
      )
    self.at += nbytes
    return self._data[self.at - nbytes : self.at]

  def number(self, dtype: str) -> Any:
    dtype = np.dtype(dtype)
    return np.frombuffer(self._view(dtype.itemsize), dtype)[0].item()

  def count(self, nbytes: int) -> int:
    """A number of items of at least `nbytes` each, that are still to come."""
    count = self.number("<u8")
    if count * nbytes > len(self._data) - self.at:
      raise self.damaged(f"a count of {count:,} at {self.at}")
    return count

  def string(self) -> bytes:
    return self.take(self.count(1))

  def value(self, kind: int) -> Any:
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind == _STRING:
      return self.string().decode()
    if kind != _ARRAY:
      raise self.damaged(f"a value of type {kind} at {self.at}")
    kind = self.number("<u4")
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      count = self.count(dtype.itemsize)
      return np.frombuffer(self.take(count * dtype.itemsize), dtype)
    if kind != _STRING:
      raise self.damaged(f"an array of type {kind} at {self.at}")
    return list(self._strings(self.count(8)))

  def _strings(self, count: int) -> Iterator[bytes]:
    data, unpack = self._data, struct.Struct("<Q").unpack_from
    for _ in range(count):
      if self.at + 8 > len(data):
        raise self.damaged(f"a string at {self.at}")
      (size,) = unpack(data, self.at)
      self.at += 8
      yield bytes(self._view(size))
