"""Safetensors files, read by ranges of bytes and written as a stream.

The library reads and checks the header. Values are read from their place in
the file: its own slices are copied twice and keep pages of the file in memory,
and its writer needs a whole file's tensors at once.
"""

from collections.abc import Mapping
import contextlib
import json
import math
import os
import threading

import ml_dtypes
import numpy as np

from gemma_funnel.convert.store import (
  BFLOAT16,
  Header,
  Index,
  leading_range,
  read_range,
  write_range,
)

_DTYPES = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": BFLOAT16,
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype("<i8"),
  "I32": np.dtype("<i4"),
  "I16": np.dtype("<i2"),
  "I8": np.dtype("i1"),
  "U8": np.dtype("u1"),
  "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


class SafetensorsFile:
  """One file; see `store.Reader`."""

  def __init__(self, path: str | os.PathLike):
    """Reads the header.

    Raises:
      ValueError: it cannot be read, is damaged, or holds unknown dtypes.
    """
    self.where = os.fspath(path)
    self.tensors: dict[str, Header] = {}
    with self._open() as file:
      for name in file.keys():
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
          raise ValueError(
            f"{self.where}: {name} is of {part.get_dtype()}: expected one of "
            f"{sorted(_DTYPES)}"
          )
        self.tensors[name] = Header(
          tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        )
      # The library does not tell where values are, but has checked what the
      # header says of it.
      with open(path, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        entries = json.loads(raw.read(size))
    self._offsets = {
      name: 8 + size + entries[name]["data_offsets"][0] for name in self.tensors
    }

  @contextlib.contextmanager
  def _open(self):
    import safetensors

    try:
      with safetensors.safe_open(self.where, framework="numpy") as file:
        yield file
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(
        f"{self.where} cannot be read, it may be damaged or cut off: {error}"
      ) from error

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    header = self.tensors[name]
    start, shape, rest = leading_range(header.shape, index)
    values = read_range(
      self.where,
      self._offsets[name] + start * header.dtype.itemsize,
      math.prod(shape) * header.dtype.itemsize,
    )
    return values.view(header.dtype).reshape(shape)[rest]


class SafetensorsWriter:
  """Writes one file; see `store.Writer`."""

  in_order = False

  def __init__(self, path: str | os.PathLike, tensors: Mapping[str, Header]):
    entries, end = {}, 0
    for name, header in tensors.items():
      entries[name] = dict(
        dtype=_NAMES[header.dtype],
        shape=list(header.shape),
        data_offsets=[end, end + header.nbytes],
      )
      end += header.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    self._where = os.fspath(path)
    self._headers, self._entries = dict(tensors), entries
    self._start, self._missing = 8 + len(text), end
    self._lock = threading.Lock()
    header = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    self._file = open(path, "wb", buffering=0)
    try:
      write_range(self._file.fileno(), 0, header)
    except OSError:
      self._file.close()
      raise

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    header = self._headers[name]
    offset, shape, _ = leading_range(header.shape, index)
    if block.dtype != header.dtype or block.size != math.prod(shape):
      raise RuntimeError(f"{name}{list(index)} is no block of {self._where}")
    at = self._entries[name]["data_offsets"][0] + offset * header.dtype.itemsize
    # Writers of one file wait for each other within the system, spinning.
    with self._lock:
      write_range(self._file.fileno(), self._start + at, block)
      self._missing -= block.nbytes

  def __enter__(self) -> "SafetensorsWriter":
    return self

  def __exit__(self, kind, *_) -> None:
    self._file.close()
    if kind is None and self._missing:
      raise RuntimeError(f"{self._missing} bytes of {self._where} are missing")
