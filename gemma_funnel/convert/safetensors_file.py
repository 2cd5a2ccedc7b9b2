"""Safetensors files, read by ranges of bytes and written as a stream.

The library reads and checks the header. Values are read from their place in
the file: its own slices are copied twice and keep pages of the file in memory,
and its writer needs a whole file's tensors at once.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import tempfile

import ml_dtypes
import numpy as np

from gemma_funnel import buckets, inputs
from gemma_funnel.convert.tensor_io import (
  BFLOAT16,
  Header,
  Index,
  RangeWriter,
  leading_range,
  read_range,
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
# Bytes of a header, as the library has it.
_MAX_HEADER = 100_000_000


class SafetensorsFile:
  """One file; see `tensor_io.Reader`."""

  def __init__(self, path: str | os.PathLike):
    """Reads the header.

    Raises:
      ValueError: it cannot be read, is damaged, or holds unknown dtypes.
    """
    self.where = os.fspath(path)
    self.tensors: dict[str, Header] = {}
    with (
      _local(path) as local,
      inputs.open_file(local) as raw,
      self._open(local) as file,
    ):
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
      size = int.from_bytes(raw.read(8), "little")
      entries = json.loads(raw.read(size))
    self._offsets = {
      name: 8 + size + entries[name]["data_offsets"][0] for name in self.tensors
    }

  @contextlib.contextmanager
  def _open(self, path: str):
    import safetensors

    try:
      with safetensors.safe_open(path, framework="numpy") as file:
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


@contextlib.contextmanager
def _local(path: str | os.PathLike) -> Iterator[str]:
  """The file, or one here of the same header and size, but without values."""
  if not buckets.is_remote(path):
    yield os.fspath(path)
    return
  size = int.from_bytes(buckets.read_range(path, 0, 8), "little")
  with tempfile.NamedTemporaryFile() as file:
    if size <= _MAX_HEADER:  # The library tells of a larger one.
      file.write(buckets.read_range(path, 0, 8 + size))
    file.truncate(buckets.size_of(path))
    file.flush()
    yield file.name


class SafetensorsWriter(RangeWriter):
  """Writes one file; a `TensorWriter`."""

  def __init__(self, path: str | os.PathLike, tensors: Mapping[str, Header]):
    entries, end = {}, 0
    for name, header in tensors.items():
      entries[name] = dict(
        dtype=_NAMES[header.dtype],
        shape=list(header.shape),
        data_offsets=[end, end := end + header.nbytes],
      )
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    super().__init__(path, tensors, len(text).to_bytes(8, "little") + text)
