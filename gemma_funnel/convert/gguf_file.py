"""GGUF files, llama.cpp's: metadata, and values dequantised by slices.

Numbers are little-endian. Values of quantised types are blocks along a tensor's
last axis; llama.cpp's own library dequantises them, a few rows at a time.
"""

import math
import os

import numpy as np

from gemma_funnel import gguf_head
from gemma_funnel.checks import require
from gemma_funnel.convert.tensor_io import (
  BFLOAT16,
  Header,
  Index,
  leading_range,
  read_range,
)

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


class GGUFFile:
  """One file; a `tensor_io.TensorReader`.

  Attributes:
    where: the file.
    tensors: by name; quantised ones are float32.
    metadata: as of `gguf_head.Head`.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads metadata and headers.

    Raises:
      ValueError: see `gguf_head.read`; or it has tensors of a type that cannot
        be dequantised, or that are not where a file has them.
    """
    head = gguf_head.read(path)
    self.where, self.metadata = head.where, head.metadata
    self.tensors: dict[str, Header] = {}
    self._places: dict[str, tuple[int, int]] = {}
    ends = []
    for entry in head.entries:
      name = entry.name
      if name in self.tensors:
        raise head.damaged(f"it has tensor {name!r} twice")
      if entry.offset % head.alignment:
        raise head.damaged(f"{name!r} begins at {entry.offset}, unaligned")
      dtype, nbytes = _size_of(self.where, name, entry.shape, entry.kind)
      start = head.start + entry.offset
      if start + nbytes > head.size:
        raise head.damaged(
          f"{name!r} ends at byte {start + nbytes}, the file at {head.size}"
        )
      self.tensors[name] = Header(entry.shape, dtype)
      self._places[name] = start, entry.kind
      ends.append((start, start + nbytes, name))
    # Two over the same bytes would make a small file a large model.
    ends.sort()
    for (_, end, name), (start, _, other) in zip(ends, ends[1:], strict=False):
      if start < end:
        raise head.damaged(f"{name!r} and {other!r} overlap")

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
