"""GGUF files, llama.cpp's: metadata, and values dequantised by slices.

Numbers are little-endian. Values of quantised types are blocks along a tensor's
last axis; llama.cpp's own library dequantises them, a few rows at a time.
"""

from collections.abc import Iterator
import math
import os
import struct
from typing import Any

import numpy as np

from gemma_funnel import inputs
from gemma_funnel.checks import require
from gemma_funnel.convert.tensor_io import (
  BFLOAT16,
  Header,
  Index,
  leading_range,
  read_range,
)

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
# Of tensors that need no library, by the number of the type.
_PLAIN = {
  0: np.dtype("<f4"),
  1: np.dtype("<f2"),
  24: np.dtype("i1"),
  25: np.dtype("<i2"),
  26: np.dtype("<i4"),
  27: np.dtype("<i8"),
  28: np.dtype("<f8"),
  30: BFLOAT16,
}
# All that comes before the values: metadata, and what tensors there are.
_MAX_HEAD = 1 << 30
_MAX_AXES = 4


class GGUFFile:
  """One file; a `tensor_io.TensorReader`.

  Attributes:
    where: the file.
    tensors: by name; quantised ones are float32.
    metadata: by key; an array is a numpy array, or a list of bytes.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads metadata and headers.

    Raises:
      ValueError: it cannot be read, is damaged or cut off, of another version
        or byte order, or has tensors of a type that cannot be dequantised.
    """
    self.where = os.fspath(path)
    with inputs.open_file(path) as file:
      size = file.seek(0, os.SEEK_END)
      head = np.memmap(file, np.uint8, "r") if size else b""
      cursor = _Cursor(memoryview(head)[: min(size, _MAX_HEAD)], self.where)
      try:
        self._read_head(cursor, size)
      except (UnicodeDecodeError, OverflowError) as error:
        raise cursor.damaged(str(error)) from error

  def _read_head(self, cursor: "_Cursor", size: int) -> None:
    require(
      cursor.take(4) == _MAGIC, f"{self.where} is no GGUF file: no {_MAGIC!r}"
    )
    version = cursor.number("<u4")
    require(
      version in _VERSIONS,
      f"{self.where} is of GGUF version {version}: expected one of "
      f"{list(_VERSIONS)}, little-endian",
    )
    # Of a tensor and of an entry, the fewest bytes there can be.
    num_tensors, num_entries = cursor.count(24), cursor.count(13)
    self.metadata: dict[str, Any] = {}
    for _ in range(num_entries):
      key = cursor.string().decode()
      if key in self.metadata:
        raise cursor.damaged(f"it has {key!r} twice")
      self.metadata[key] = cursor.value(cursor.number("<u4"))
    found = [_entry(cursor) for _ in range(num_tensors)]
    alignment = self.metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
      raise cursor.damaged(f"general.alignment={alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    self.tensors: dict[str, Header] = {}
    self._places: dict[str, tuple[int, int]] = {}
    for name, shape, kind, offset in found:
      if name in self.tensors:
        raise cursor.damaged(f"it has tensor {name!r} twice")
      if offset % alignment:
        raise cursor.damaged(f"{name!r} begins at {offset}, unaligned")
      dtype, nbytes = _size_of(self.where, name, shape, kind)
      if start + offset + nbytes > size:
        raise cursor.damaged(
          f"{name!r} ends at byte {start + offset + nbytes}, the file at {size}"
        )
      self.tensors[name] = Header(shape, dtype)
      self._places[name] = start + offset, kind
    self._check_apart(cursor, found)

  def _check_apart(self, cursor: "_Cursor", found) -> None:
    """Two tensors over the same bytes would make a small file a large model."""
    ends = sorted(
      (offset, offset + _size_of(self.where, name, shape, kind)[1], name)
      for name, shape, kind, offset in found
    )
    for (_, end, name), (start, _, other) in zip(ends, ends[1:], strict=False):
      if start < end:
        raise cursor.damaged(f"{name!r} and {other!r} overlap")

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    header, (place, kind) = self.tensors[name], self._places[name]
    if kind in _PLAIN:
      offset, shape, rest = leading_range(header.shape, index)
      values = read_range(
        self.where,
        place + offset * header.dtype.itemsize,
        math.prod(shape) * header.dtype.itemsize,
      )
      return values.view(header.dtype).reshape(shape)[rest]
    # Whole rows: blocks lie within one.
    *outer, columns = header.shape
    offset, shape, rest = leading_range(tuple(outer), index[: len(outer)])
    row = _row_bytes(kind, columns)
    raw = read_range(self.where, place + offset * row, math.prod(shape) * row)
    values = _quants().dequantize(
      raw.reshape(-1, row), _library().GGMLQuantizationType(kind)
    )
    values = values.reshape(*shape, columns)[rest]
    return values[(..., *index[len(outer) :])]


def _entry(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
  """(name, shape, type, offset) of a tensor; its axes are last to first."""
  name = cursor.string().decode()
  axes = cursor.number("<u4")
  if not 0 < axes <= _MAX_AXES:
    raise cursor.damaged(f"{name!r} has {axes} axes")
  shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
  return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _size_of(
  where: str, name: str, shape: tuple[int, ...], kind: int
) -> tuple[np.dtype, int]:
  """The dtype of a tensor's values, and the bytes that they take there."""
  if kind in _PLAIN:
    return _PLAIN[kind], math.prod(shape) * _PLAIN[kind].itemsize
  known = {int(k): k.name for k in _quants()._type_traits}
  require(
    kind in known,
    f"{where}: {name!r} is of type {kind}: expected F32, F16, BF16 or one of "
    f"{sorted(known.values())}",
  )
  block = _library().GGML_QUANT_SIZES[kind][0]
  require(
    shape[-1] % block == 0,
    f"{where}: {name!r} of {known[kind]} has rows of {shape[-1]}: expected a "
    f"multiple of {block}",
  )
  return np.dtype(np.float32), math.prod(shape[:-1]) * _row_bytes(
    kind, shape[-1]
  )


def _row_bytes(kind: int, columns: int) -> int:
  block, nbytes = _library().GGML_QUANT_SIZES[kind]
  return columns // block * nbytes


def _library():
  try:
    import gguf  # An extra: files of plain floats need it not.
  except ImportError as error:
    raise ValueError(
      "quantised GGUF files need the package gguf; expected pip install "
      "'gemma-funnel[gguf]'"
    ) from error
  return gguf


def _quants():
  return _library().quants


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
