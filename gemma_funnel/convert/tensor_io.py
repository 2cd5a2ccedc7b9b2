"""The interface of every weight file: headers, and values by slices.

A reader knows the header of each tensor by name without reading values; a
writer is given all headers first, then blocks. Neither holds more than a block.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import math
import os
import pathlib
import threading
from typing import Any, Protocol

from etils import epath
import ml_dtypes
import numpy as np

from gemma_funnel import buckets, inputs, paths
from gemma_funnel.checks import require

# A call that writes more asks the system for larger pages, which take it twice
# as long to come by.
_WRITE_BYTES = 64 << 10

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# An index into the leading axes of a tensor, or into all of them.
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Header:
  """The shape and the numpy dtype of a tensor; bfloat16 is ml_dtypes'."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class TensorReader(Protocol):
  """Weight files that are open for reading.

  Attributes:
    where: what errors call them, such as a file's path.
    tensors: by name.
  """

  where: str
  tensors: Mapping[str, Header]

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """The values of `tensors[name]` at `index`, a new or read-only array.

    May be called by several threads at once.

    Raises:
      ValueError: the file cannot be read, or is damaged; it is named.
    """
    ...


class TensorWriter(Protocol):
  """Weight files that are being written; a context manager that closes."""

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    """Writes a C-contiguous block of the tensor's dtype at `index`.

    Blocks come in any order, from several threads at once.

    Raises:
      OSError: it cannot be written.
    """
    ...


def require_ranks(
  tensors: Mapping[str, Header], ranks: Mapping[str, int]
) -> None:
  """Raises a ValueError for a tensor that is not there, or of other axes."""
  for name, rank in ranks.items():
    found = tensors[name].shape if name in tensors else "no such tensor"
    require(
      name in tensors and len(found) == rank,
      f"{name}: expected {rank} axes, found {found}",
    )


class Renamed:
  """Tensors of other readers, under names of their own; a `TensorReader`."""

  def __init__(
    self, where: str, origins: Mapping[str, tuple[TensorReader, str]]
  ):
    """Takes the reader of each tensor, and its name there."""
    self.where = where
    self._origins = origins
    self.tensors = {
      name: reader.tensors[old] for name, (reader, old) in origins.items()
    }

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    reader, old = self._origins[name]
    return reader.read(old, index)


def rename(reader: TensorReader, names: Mapping[str, str]) -> Renamed:
  """Some tensors of a reader; `names` has the old name of each new one."""
  origins = {new: (reader, old) for new, old in names.items()}
  return Renamed(reader.where, origins)


def merge(where: str, readers: Sequence[TensorReader]) -> Renamed:
  """Several readers as one.

  Raises:
    ValueError: tensors that are in two of them, all named.
  """
  origins, twice = {}, []
  for reader in readers:
    twice += [name for name in reader.tensors if name in origins]
    origins |= {name: (reader, name) for name in reader.tensors}
  if twice:
    raise ValueError(f"{where}: in two files: {twice}")
  return Renamed(where, origins)


def open_indexed(
  index: pathlib.Path, open_one: Callable[[pathlib.Path], TensorReader]
) -> Renamed:
  """The shards that an index file of Hugging Face's kind names.

  Raises:
    ValueError: the index or a shard cannot be read, a file that it names is
      not there, or a tensor is not where it says.
  """
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} has no weight_map of tensors to files")
  names = sorted({str(name) for name in weight_map.values()})
  # A name with a folder in it would lead out of the checkpoint.
  outside = [name for name in names if pathlib.PurePath(name).name != name]
  if outside:
    raise ValueError(f"{index}: expected names of files beside it: {outside}")
  missing = [n for n in names if not _is_file(index.parent / n)]
  if missing:
    raise ValueError(f"{index} names files that are not there: {missing}")
  readers = {name: open_one(index.parent / name) for name in names}
  # A tied head and buffers may be named and not stored: who needs them asks.
  wrong = [
    tensor
    for tensor, name in weight_map.items()
    if tensor not in readers[str(name)].tensors
    and not tensor.endswith(("lm_head.weight", "inv_freq"))
  ]
  if wrong:
    raise ValueError(f"{index}: not in the files that it names: {wrong}")
  # Of a tensor in several files the one that the index names counts.
  for name, reader in readers.items():
    for tensor in reader.tensors:
      first = readers.get(str(weight_map.get(tensor)), reader)
      if first is not reader and not np.array_equal(
        first.read(tensor), reader.read(tensor)
      ):
        raise ValueError(
          f"{index}: in two files, with other values: {tensor}, in {name} too"
        )
  origins = {
    tensor: (reader, tensor)
    for name, reader in readers.items()
    for tensor in reader.tensors
    if weight_map.get(tensor, name) == name
  }
  return Renamed(str(index), origins)


def _is_file(path: pathlib.Path | epath.Path) -> bool:
  try:
    return path.is_file()
  except OSError:  # A name that no file can have.
    return False


def leading_range(
  shape: tuple[int, ...], index: Index
) -> tuple[int, tuple[int, ...], Index]:
  """The consecutive elements that hold `tensor[index]`.

  Returns:
    (offset, shape, rest): `tensor[index]` is the elements from `offset` on, in
    that shape, indexed by `rest`.
  """
  offset, stride = 0, math.prod(shape)
  for axis, item in enumerate(index):
    size = shape[axis]
    stride //= max(size, 1)
    if isinstance(item, slice):
      start, stop, step = item.indices(size)
      assert step == 1, item
      kept = (max(stop - start, 0), *shape[axis + 1 :])
      rest = (slice(None), *index[axis + 1 :])
      return offset + start * stride, kept, rest
    offset += item * stride
  return offset, shape[len(index) :], ()


def read_range(path: str, offset: int, nbytes: int) -> np.ndarray:
  """Bytes of a file, here or on a bucket, as uint8.

  Raises:
    ValueError: it cannot be read, or ends before.
  """
  if buckets.is_remote(path):
    data = buckets.read_range(path, offset, offset + nbytes)
    require(
      len(data) == nbytes,
      f"{path} ends at byte {offset + len(data)}: expected {offset + nbytes}",
    )
    return np.frombuffer(data, np.uint8)
  values = np.empty(nbytes, np.uint8)
  try:
    with open(path, "rb", buffering=0) as file:
      done = 0
      # One call reads 2 GiB at most.
      while done < nbytes:
        some = os.preadv(file.fileno(), [values.data[done:]], offset + done)
        if not some:
          raise ValueError(
            f"{path} ends at byte {offset + done}: expected {offset + nbytes}"
          )
        done += some
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  return values


def write_range(file: int, offset: int, block: np.ndarray) -> None:
  """Writes a C-contiguous block to an open file, from `offset` on."""
  values = block.reshape(-1).view(np.uint8).data
  done = 0
  while done < len(values):
    some = values[done : done + _WRITE_BYTES]
    done += os.pwrite(file, some, offset + done)


class RangeWriter:
  """Writes tensors one after the other in one file; a `TensorWriter`.

  Attributes:
    where: the file.
    tensors: by name.
    starts: the byte at which each begins.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    tensors: Mapping[str, Header],
    lead: bytes = b"",
  ):
    """Makes the file, which begins with `lead`."""
    self.where = os.fspath(path)
    self.tensors = dict(tensors)
    sizes = (header.nbytes for header in tensors.values())
    *starts, end = itertools.accumulate(sizes, initial=len(lead))
    self.starts = dict(zip(tensors, starts, strict=True))
    self._missing = end - len(lead)
    self._lock = threading.Lock()
    self._file = open(path, "wb", buffering=0)
    try:
      write_range(self._file.fileno(), 0, np.frombuffer(lead, np.uint8))
    except OSError:
      self._file.close()
      raise

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    header = self.tensors[name]
    offset, shape, _ = leading_range(header.shape, index)
    if block.dtype != header.dtype or block.size != math.prod(shape):
      raise RuntimeError(f"{name}{list(index)} is no block of {self.where}")
    at = self.starts[name] + offset * header.dtype.itemsize
    # Writers of one file wait for each other within the system, spinning.
    with self._lock:
      write_range(self._file.fileno(), at, block)
      self._missing -= block.nbytes

  def __enter__(self) -> "RangeWriter":
    return self

  def __exit__(self, kind, *_) -> None:
    self._file.close()
    if kind is None and self._missing:
      raise RuntimeError(f"{self._missing} bytes of {self.where} are missing")


def to_path(path: str | os.PathLike) -> pathlib.Path | epath.Path:
  """A path here, or on a bucket such as gs://..."""
  text = paths.check(path)
  return epath.Path(text) if buckets.is_remote(text) else pathlib.Path(text)


def read_json(file: pathlib.Path | epath.Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: it cannot be read, or holds no object.
  """
  data = inputs.read_bytes(file, inputs.MAX_JSON)
  try:
    values = json.loads(data.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} cannot be read: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(
      f"{file} holds a {type(values).__name__}: expected an object"
    )
  return values


def peek_json(file: pathlib.Path | epath.Path) -> dict[str, Any]:
  """What a JSON file holds; {} if it is none, or holds no object."""
  try:
    return read_json(file)
  except ValueError:
    return {}
