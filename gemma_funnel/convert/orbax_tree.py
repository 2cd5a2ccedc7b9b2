"""Trees of arrays in Orbax's format, read by slices and written as a stream.

An Orbax tree is a folder of Zarr arrays, each under the names of its keys
joined by dots, in files or in a key-value store (OCDBT), and `_METADATA`, which
says the keys. Orbax itself restores whole arrays or shards of them, and saves
whole trees. Here TensorStore, which it is built on, reads; what is written are
plain files of raw chunks, which need no encoding.
"""

from collections.abc import Mapping, Sequence
import itertools
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from gemma_funnel import buckets
from gemma_funnel.convert.tensor_io import (
  Header,
  Index,
  read_json,
  to_path,
  write_range,
)

_METADATA = "_METADATA"
_MANIFEST = "manifest.ocdbt"
# In `_METADATA`: whether chunks of zeros are stored too. Old trees lack them.
_ALL_STORED = "store_array_data_equal_to_fill_value"
_ARRAYS = {".zarray": "zarr", "zarr.json": "zarr3"}
# What a damaged or foreign array can have for a dtype: not numpy's.
_FOREIGN = np.dtype("V1")


def is_orbax_tree(folder: pathlib.Path) -> bool:
  """Whether `folder` itself is a tree of arrays, complete or not."""
  return (folder / _METADATA).is_file() or (folder / _MANIFEST).is_file()


class OrbaxTree:
  """A tree; a `TensorReader`. Names are keys joined by dots."""

  def __init__(self, folder: str | os.PathLike):
    """Reads the metadata of all arrays.

    Raises:
      ValueError: it cannot be read, or is damaged.
    """
    import tensorstore as ts

    self.where = os.fspath(folder)
    path = to_path(folder)
    if buckets.is_remote(self.where):
      base = ts.KvStore.Spec(f"{self.where.rstrip('/')}/").to_json()
    else:
      base = {"driver": "file", "path": f"{path.absolute()}/"}
      for file in path.rglob("*"):  # TensorStore would wait for a FIFO.
        if not (file.is_file() or file.is_dir()):
          raise ValueError(f"{file}: expected a file")
    if (path / _MANIFEST).exists():
      base = {"driver": "ocdbt", "base": base}
    self._base = base
    # Else a chunk that got lost would be read as zeros.
    metadata = path / _METADATA
    stored = read_json(metadata).get(_ALL_STORED) if metadata.exists() else None
    self._zeros_if_missing = stored is not True
    try:
      self._drivers = self._list(ts)
      arrays = self._open(0)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
      raise _damaged(self.where, error) from error
    self.tensors = {
      name: Header(tuple(array.shape), _dtype_of(array))
      for name, array in arrays.items()
    }
    largest = 0
    for name, array in arrays.items():
      # A damaged chunk shape would be allocated whole.
      chunk = array.chunk_layout.read_chunk.shape or ()
      if any(c > max(s, 1) for c, s in zip(chunk, array.shape, strict=True)):
        raise ValueError(
          f"{self.where}: {name} has chunks of {tuple(chunk)}: expected at "
          f"most its shape, {tuple(array.shape)}"
        )
      largest = max(
        largest, math.prod(chunk) * self.tensors[name].dtype.itemsize
      )
    # Slices of one large chunk follow each other: it is decoded once.
    self._arrays = self._open(largest)

  def _open(self, cache_bytes: int) -> dict[str, Any]:
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    opened = {
      name: ts.open(
        self._spec(name, driver), open=True, read=True, context=context
      )
      for name, driver in self._drivers.items()
    }
    return {name: array.result() for name, array in opened.items()}

  def _list(self, ts) -> dict[str, str]:
    """The arrays, and the driver of each."""
    store = ts.KvStore.open(self._base).result()
    names = {}
    for key in store.list().result():
      name, _, last = key.decode("utf-8").rpartition("/")
      if last in _ARRAYS and not name.startswith("ocdbt.process_"):
        names[name] = _ARRAYS[last]
    return names

  def _spec(self, name: str, driver: str) -> dict[str, Any]:
    kvstore = dict(self._base)
    kvstore["path"] = f"{kvstore.get('path', '')}{name}/"
    return {
      "driver": driver,
      "kvstore": kvstore,
      "fill_missing_data_reads": self._zeros_if_missing,
    }

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    try:
      return self._arrays[name][index].read().result()
    except (ValueError, OSError, RuntimeError, IndexError) as error:
      raise _damaged(f"{self.where}: {name}", error) from error


def _dtype_of(array) -> np.dtype:
  try:
    return np.dtype(array.dtype.numpy_dtype)
  except (TypeError, AttributeError):
    return _FOREIGN


def _damaged(what: str, error: Exception) -> ValueError:
  lines = str(error).splitlines() or [type(error).__name__]
  return ValueError(f"{what} cannot be read, it may be damaged: {lines[0]}")


class OrbaxWriter:
  """Writes a tree; a `TensorWriter`. Each block is a chunk."""

  def __init__(
    self,
    folder: str | os.PathLike,
    tensors: Mapping[str, Header],
    keys: Mapping[str, Sequence[str]],
    chunks: Mapping[str, tuple[int, ...]],
  ):
    """Arrays are uncompressed.

    Args:
      folder: to be made.
      tensors: by name, which is the keys joined by dots.
      keys: that lead to each in the tree.
      chunks: the shape of the blocks that each is written in.
    """
    self._folder = pathlib.Path(folder)
    self._tensors, self._keys, self._chunks = tensors, keys, chunks
    for name, header in tensors.items():
      array = self._folder / name
      array.mkdir(parents=True)
      (array / ".zarray").write_text(json.dumps(_zarray(header, chunks[name])))

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    chunk = self._chunks[name]
    places = [
      part if isinstance(part, int) else (part.start or 0) // size
      for part, size in itertools.zip_longest(
        index, chunk, fillvalue=slice(None)
      )
    ]
    block = block.reshape((1,) * (len(chunk) - block.ndim) + block.shape)
    if block.shape != chunk:
      # The last along an axis that chunks do not divide is stored whole.
      whole = np.zeros(chunk, block.dtype)
      whole[tuple(map(slice, block.shape))] = block
      block = whole
    file = self._folder / name / ".".join(map(str, places))
    with open(file, "xb", buffering=0) as opened:
      write_range(opened.fileno(), 0, block)

  def __enter__(self) -> "OrbaxWriter":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      # Last: without it there is no tree.
      metadata = _metadata_of(self._keys)
      (self._folder / _METADATA).write_text(json.dumps(metadata))


def _zarray(header: Header, chunks: tuple[int, ...]) -> dict[str, Any]:
  """The metadata of an array of Zarr, version 2, of raw chunks."""
  name = header.dtype.name
  return dict(
    zarr_format=2,
    shape=header.shape,
    chunks=chunks,
    # Not of the specification, but what TensorStore calls it.
    dtype=name if name == "bfloat16" else header.dtype.newbyteorder("<").str,
    order="C",
    compressor=None,
    filters=None,
    fill_value=None,
    dimension_separator=".",
  )


def _metadata_of(keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
  """What Orbax expects to know of a tree of dictionaries."""
  dictionary_key = 2
  return {
    "tree_metadata": {
      str(tuple(path)): {
        "key_metadata": [
          {"key": key, "key_type": dictionary_key} for key in path
        ],
        "value_metadata": {
          # Restored without a word about where, it is an array of the host;
          # a jax.Array would need its sharding to be known.
          "value_type": "np.ndarray",
          "skip_deserialize": False,
        },
      }
      for path in keys.values()
    },
    "use_ocdbt": False,
    "use_zarr3": False,
    _ALL_STORED: True,
    "custom_metadata": None,
  }
