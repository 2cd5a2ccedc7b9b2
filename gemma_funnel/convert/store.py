"""What every kind of weight file offers: headers, and reading by slices.

A reader has `tensors`, the header of each tensor by name, known without
reading values, and `read(name, index)`. A writer is given all headers first and
then `write(name, index, block)` for each block. Neither holds more than that.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Protocol

import ml_dtypes
import numpy as np

# Of an index or a configuration; those of the largest models have 100 kB.
_MOST_JSON = 64 << 20

# A call that writes more asks the system for larger pages, which take it twice
# as long to come by.
_WRITE_BYTES = 64 << 10

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# An index into the leading axes of a tensor, or into all of them.
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Header:
  """A tensor without its values.

  Attributes:
    shape: its axes.
    dtype: of numpy, with bfloat16 of ml_dtypes.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
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


class Writer(Protocol):
  """Weight files that are being written; a context manager that closes.

  Attributes:
    in_order: whether blocks have to come in the order of the file, from one
      thread. Else they may come in any, from several threads at once.
  """

  in_order: bool

  def write(self, name: str, index: Index, block: np.ndarray) -> None:
    """Writes a C-contiguous block of the tensor's dtype at `index`.

    Raises:
      OSError: it cannot be written.
    """
    ...


def leading_range(
  shape: tuple[int, ...], index: Index
) -> tuple[int, tuple[int, ...], Index]:
  """The consecutive elements that hold `tensor[index]`.

  Returns:
    (offset, shape, rest): `tensor[index]` is the elements from `offset` on, in
    that shape, indexed by `rest`.
  """
  offset, stride = 0, math.prod(shape)
  for axis, part in enumerate(index):
    size = shape[axis]
    stride //= max(size, 1)
    if isinstance(part, slice):
      start, stop, step = part.indices(size)
      assert step == 1, part
      kept = (max(stop - start, 0), *shape[axis + 1 :])
      rest = (slice(None), *index[axis + 1 :])
      return offset + start * stride, kept, rest
    offset += part * stride
  return offset, shape[len(index) :], ()


def read_range(path: str, offset: int, nbytes: int) -> np.ndarray:
  """Bytes of a file, as uint8.

  Raises:
    ValueError: it cannot be read, or ends before.
  """
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


class Shards:
  """Several readers as one; see `Reader`."""

  def __init__(self, where: str, readers: Sequence[Reader]):
    """Merges them.

    Raises:
      ValueError: tensors that are in two of them, all named.
    """
    self.where = where
    self._owner = {}
    twice = []
    for reader in readers:
      twice += [name for name in reader.tensors if name in self._owner]
      self._owner.update(dict.fromkeys(reader.tensors, reader))
    if twice:
      raise ValueError(f"{where}: in two files: {twice}")
    self.tensors = {
      name: reader.tensors[name] for name, reader in self._owner.items()
    }

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self._owner[name].read(name, index)


def open_indexed(
  index: pathlib.Path, open_one: Callable[[pathlib.Path], Reader]
) -> Shards:
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
  missing = [n for n in names if not os.path.isfile(index.parent / n)]
  if missing:
    raise ValueError(f"{index} names files that are not there: {missing}")
  readers = {name: open_one(index.parent / name) for name in names}
  wrong = [
    tensor
    for tensor, name in weight_map.items()
    if tensor not in readers[str(name)].tensors
  ]
  if wrong:
    raise ValueError(f"{index}: not in the files that it names: {wrong}")
  return Shards(str(index), list(readers.values()))


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object that a JSON file holds.

  Raises:
    ValueError: it cannot be read, or holds no object.
  """
  try:
    if file.stat().st_size > _MOST_JSON:
      raise ValueError(f"it has more than {_MOST_JSON} bytes")
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{file} cannot be read: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(
      f"{file} holds a {type(values).__name__}: expected an object"
    )
  return values


def peek_json(file: pathlib.Path) -> dict[str, Any]:
  """What a JSON file holds; {} if it is none, or holds no object."""
  try:
    return read_json(file)
  except ValueError:
    return {}


class Arrays:
  """Tensors that are in memory; see `Reader`."""

  def __init__(self, where: str, arrays: Mapping[str, np.ndarray]):
    """Takes them by name."""
    self.where, self._arrays = where, arrays
    self.tensors = {n: Header(x.shape, x.dtype) for n, x in arrays.items()}

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self._arrays[name][index]


class Renamed:
  """Some tensors of a reader, under other names; see `Reader`."""

  def __init__(self, reader: Reader, names: Mapping[str, str]):
    """Takes the name of each in `reader`, by its new name."""
    self.where = reader.where
    self._reader, self._names = reader, names
    self.tensors = {new: reader.tensors[old] for new, old in names.items()}

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self._reader.read(self._names[name], index)
