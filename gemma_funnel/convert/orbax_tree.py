"""Trees of arrays in Orbax's format, read by slices and written as a stream.

An Orbax tree is a folder of Zarr arrays, each under the names of its keys
joined by dots, in files or in a key-value store (OCDBT), and `_METADATA`, which
says the keys. Orbax itself restores whole arrays or shards of them, and saves
whole trees; TensorStore, which it is built on, does the rest here.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from gemma_funnel.convert.store import Header, Index, read_json

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
  """A tree; see `store.Reader`. Names are keys joined by dots."""

  def __init__(self, folder: str | os.PathLike):
    """Reads the metadata of all arrays.

    Raises:
      ValueError: it cannot be read, or is damaged.
    """
    import tensorstore as ts

    self.where = os.fspath(folder)
    path = pathlib.Path(folder).absolute()
    base: dict[str, Any] = {"driver": "file", "path": f"{path}/"}
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
    if kvstore["driver"] == "file":
      kvstore["path"] += f"{name}/"
    else:
      kvstore["path"] = f"{name}/"
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
  """Writes a tree; see `store.Writer`. A chunk is a block of leading axes."""

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
    import tensorstore as ts

    self._folder = pathlib.Path(folder).absolute()
    self._folder.mkdir(exist_ok=True)
    self._tensors, self._keys, self._chunks = tensors, keys, chunks
    # Waiting for the disk after each chunk would be slower than `cp`, which
    # does not either.
    self._context = ts.Context({"file_io_sync": False})
    self._name = self._array = self._writing = None

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    self._wait()
    if name != self._name:
      self._name, self._array = name, self._create(name)
    place = self._array[index]
    self._writing = place.write(
      block.reshape(place.shape), can_reference_source_data_indefinitely=True
    )

  def _create(self, name: str):
    import tensorstore as ts

    header = self._tensors[name]
    base = {"driver": "file", "path": f"{self._folder}/"}
    spec = {
      "driver": "zarr",
      "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
      "metadata": {
        "shape": list(header.shape),
        "chunks": list(self._chunks[name]),
        "dtype": _zarr_dtype(header.dtype),
        "compressor": None,
        "dimension_separator": ".",
      },
      "create": True,
      "store_data_equal_to_fill_value": True,
    }
    with _os_errors():
      return ts.open(spec, context=self._context).result()

  def _wait(self) -> None:
    if self._writing is not None:
      with _os_errors():
        self._writing.result()
      self._writing = None

  def __enter__(self) -> "OrbaxWriter":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None:
      # Else it would go on in a folder that is being deleted.
      with contextlib.suppress(OSError):
        self._wait()
      return
    self._wait()
    # Last: without it there is no tree.
    metadata = _metadata_of(self._keys)
    (self._folder / _METADATA).write_text(json.dumps(metadata))


@contextlib.contextmanager
def _os_errors():
  """TensorStore's errors of a full disk, and the like, are of other types."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    raise OSError(str(error)) from error


def _zarr_dtype(dtype: np.dtype) -> str:
  return "bfloat16" if dtype.name == "bfloat16" else dtype.str


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
    "use_ocdbt": True,
    "use_zarr3": False,
    _ALL_STORED: True,
    "custom_metadata": None,
  }
