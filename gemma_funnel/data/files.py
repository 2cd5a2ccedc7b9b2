"""Files of documents, read by index: text, JSON lines, Parquet, array_record.

Paths are local, or of a bucket ("gs://..") that etils.epath can open. A file is
opened for every read: none is held open, and a reader can be pickled.
"""

from array import array
from collections.abc import Iterator
import contextlib
import functools
import glob
import json
import os
from typing import Any

from etils import epath
import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.data import tfds
from gemma_funnel.data.documents import Document, LazyDocuments

# A big text file becomes documents of about this size, for it to have both
# splits.
TEXT_DOCUMENT_BYTES = 16 << 10
# Decoded row groups of Parquet files that are kept in memory.
_KEPT_ROW_GROUPS = 4
_BLOCK_BYTES = 1 << 20


def is_remote(path: str) -> bool:
  """Whether a path is of a bucket and not of this machine."""
  return "://" in path


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns an error of reading `path` into a ValueError that names it."""
  try:
    yield
  except ValueError:
    raise
  except OSError as e:
    raise ValueError(f"{path}: cannot be read: {e.strerror or e}") from e
  except Exception as e:  # Clients of buckets raise of every kind.
    if not is_remote(path):
      raise
    text = " ".join(f"{type(e).__name__}: {e}".split())
    raise ValueError(f"{path}: cannot be read: {text}") from e


def matches(pattern: str) -> list[str]:
  """The files and folders that a glob matches."""
  if not is_remote(pattern):
    return glob.glob(os.path.expanduser(pattern), recursive=True)
  if "**" in pattern:
    raise ValueError(
      f"source {pattern!r}: '**' would list a whole bucket; expected '*'"
    )
  scheme, _, rest = pattern.partition("://")
  bucket, _, within = rest.partition("/")
  with reading(pattern):
    found = epath.Path(f"{scheme}://{bucket}").glob(within)
    return [os.fspath(path) for path in found]


def is_file(path: str) -> bool:
  """Whether it is there and no folder."""
  with reading(path):
    at = epath.Path(path)
    return not at.is_dir() and at.exists()


def read_bytes(path: str) -> bytes:
  """A file's content.

  Raises:
    ValueError: it cannot be read.
  """
  with reading(path), epath.Path(path).open("rb") as f:
    return f.read()


class File(LazyDocuments):
  """Documents of one file; the keys are "<file name>:<index>"."""

  def __init__(self, path: str, text_key: str = "text"):
    self.path, self.text_key = path, text_key
    # The name alone, not the folder: the split is the same elsewhere.
    self.name = os.path.basename(path)

  def key(self, i: int) -> str:
    return f"{self.name}:{i}"

  @contextlib.contextmanager
  def _open(self) -> Iterator[Any]:
    with reading(self.path), epath.Path(self.path).open("rb") as f:
      yield f

  def _part(self, start: int, size: int) -> bytes:
    with self._open() as f:
      f.seek(start)
      part = f.read(size)
    require(
      len(part) == size,
      f"{self.path}: found {len(part)} bytes at {start}, expected {size}: the "
      "file is not what it was when it was first read",
    )
    return part


def _decode(content: bytes, place: str, expected: str) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as e:
    raise ValueError(f"{place}: not UTF-8: {e}; expected {expected}") from e


class TextFile(File):
  """UTF-8 text, cut at line ends into parts of TEXT_DOCUMENT_BYTES or more."""

  def __init__(self, path: str):
    super().__init__(path)
    ends, size, lines = array("q", [0]), 0, []
    with self._open() as f:
      # Lines of bytes end at "\n" alone, not at form feeds and the like.
      for line in f:
        lines.append(line)
        size += len(line)
        if size - ends[-1] >= TEXT_DOCUMENT_BYTES:
          self._text(lines)
          ends.append(size)
          lines = []
    self._text(lines)
    if size > ends[-1]:
      ends.append(size)
    self._ends = np.asarray(ends)

  def _text(self, lines: list[bytes]) -> str:
    return _decode(b"".join(lines), self.path, "UTF-8 text")

  def __len__(self) -> int:
    return len(self._ends) - 1

  def read(self, i: int) -> Document:
    start, end = map(int, self._ends[i : i + 2])
    return Document(self.key(i), self._text([self._part(start, end - start)]))


def check_text(text: Any, place: str, text_key: str) -> str:
  """A string that UTF-8 can express, else a ValueError that names the place."""
  require(
    isinstance(text, str),
    f"{place}: the value of {text_key!r} is a {type(text).__name__}; expected "
    "a string",
  )
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as e:
    raise ValueError(f"{place}: {text_key!r} is not Unicode text: {e}") from e
  return text


def _json_text(content: bytes, place: str, text_key: str) -> str:
  """The text of one JSON object at `place`, such as a line."""
  try:
    record = json.loads(_decode(content, place, "UTF-8 JSON"))
  except json.JSONDecodeError as e:
    raise ValueError(f"{place}: malformed JSON: {e}") from e
  except RecursionError as e:
    raise ValueError(f"{place}: JSON nested too deeply") from e
  require(
    isinstance(record, dict),
    f"{place}: found a JSON {type(record).__name__}; expected an object with "
    f"the key {text_key!r}",
  )
  found = f"no key {text_key!r}; found the keys {sorted(record)}"
  require(text_key in record, f"{place}: {found}")
  return check_text(record[text_key], place, text_key)


class JsonLines(File):
  """A JSON object a line; blank lines and empty texts are left out.

  One pass finds where lines are. They are parsed when they are read; the first
  is parsed at once too, to find a wrong `text_key`.
  """

  def __init__(self, path: str, text_key: str):
    super().__init__(path, text_key)
    starts, sizes, indices = array("q"), array("q"), array("q")
    at = index = 0
    with self._open() as f:
      for number, line in enumerate(f, start=1):
        at += len(line)
        if not line.strip():
          continue
        # An empty string is written in one way only.
        parsed = index == 0 or b'""' in line
        if not parsed or _json_text(line, f"{path}, line {number}", text_key):
          starts.append(at - len(line))
          sizes.append(len(line))
          indices.append(index)
        index += 1
    self._starts, self._sizes = np.asarray(starts), np.asarray(sizes)
    self._indices = np.asarray(indices)

  def __len__(self) -> int:
    return len(self._starts)

  def key(self, i: int) -> str:
    return f"{self.name}:{self._indices[i]}"

  def read(self, i: int) -> Document:
    line = self._part(int(self._starts[i]), int(self._sizes[i]))
    try:
      text = _json_text(line, self.path, self.text_key)
    except ValueError:
      # Lines are counted only for an error, which names the line.
      place = f"{self.path}, line {self._line_number(int(self._starts[i]))}"
      text = _json_text(line, place, self.text_key)
    return Document(self.key(i), text)

  def _line_number(self, start: int) -> int:
    number = 1
    with self._open() as f:
      while start > 0:
        block = f.read(min(start, _BLOCK_BYTES))
        number += block.count(b"\n")
        start -= len(block) or start
    return number


class RecordFile(File):
  """array_record: records of bytes, which a subclass makes documents of."""

  def __init__(self, path: str, text_key: str = "text"):
    super().__init__(path, text_key)
    try:
      from array_record.python import array_record_data_source
    except ImportError as e:
      raise ValueError(
        f"{path}: array_record files need the package array_record, which "
        "there is for Linux and macOS; expected pip install array_record"
      ) from e
    if not is_remote(path):
      with self._open():
        pass  # The package's own error of a missing file has many lines.
    with self._whole():
      self._records = array_record_data_source.ArrayRecordDataSource([path])

  @contextlib.contextmanager
  def _whole(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      raise ValueError(
        f"{self.path}: not an array_record file, or a damaged one: "
        f"{tfds.one_line(e)}"
      ) from e

  def __len__(self) -> int:
    return len(self._records)

  def record(self, i: int) -> bytes:
    with self._whole():
      return self._records[i]


class JsonRecords(RecordFile):
  """array_record of JSON objects."""

  def __init__(self, path: str, text_key: str):
    super().__init__(path, text_key)
    if len(self):
      self.read(0)

  def read(self, i: int) -> Document:
    place = f"{self.path}, record {i}"
    return Document(
      self.key(i), _json_text(self.record(i), place, self.text_key)
    )


class ParquetFile(File):
  """A column of strings.

  A row is read with its whole row group: cheap in order, dear in a shuffled
  order; `data.tokenize` reads in order.
  """

  def __init__(self, path: str, text_key: str):
    super().__init__(path, text_key)
    with _open_parquet(path) as file:
      found = {field.name: field.type for field in file.schema_arrow}
      require(
        text_key in found,
        f"{path}: no column {text_key!r}; found the columns {sorted(found)}",
      )
      require(
        str(found[text_key]) in ("string", "large_string"),
        f"{path}: the column {text_key!r} is of {found[text_key]}; expected "
        "strings",
      )
      groups = range(file.metadata.num_row_groups)
      rows = [file.metadata.row_group(g).num_rows for g in groups]
    self._ends = np.cumsum(rows, dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def read(self, i: int) -> Document:
    group = int(np.searchsorted(self._ends, i, "right"))
    values = _row_group(self.path, self.text_key, group)
    value = values[i - (int(self._ends[group]) - len(values))].as_py()
    place = f"{self.path}, row {i}"
    return Document(self.key(i), check_text(value, place, self.text_key))


@contextlib.contextmanager
def _open_parquet(path: str):
  try:
    import pyarrow
    from pyarrow import parquet  # An extra: few corpora need it.
  except ImportError as e:
    raise ValueError(
      f"{path}: Parquet files need the package pyarrow; expected pip install "
      "'gemma-funnel[parquet]'"
    ) from e
  try:
    with reading(path), epath.Path(path).open("rb") as f:
      yield parquet.ParquetFile(f)
  except pyarrow.ArrowException as e:
    raise ValueError(
      f"{path}: not a Parquet file, or a damaged one: {tfds.one_line(e)}"
    ) from e


@functools.lru_cache(maxsize=_KEPT_ROW_GROUPS)
def _row_group(path: str, column: str, group: int):
  with _open_parquet(path) as file:
    return file.read_row_group(group, columns=[column]).column(0)


class TfdsSplit(File):
  """A prepared split of TensorFlow Datasets; keys are "<name>/<split>:<i>"."""

  def __init__(self, source: str, text_key: str):
    """Finds the split.

    Args:
      source: "tfds:NAME[:VERSION][:SPLIT]", in $TFDS_DATA_DIR or
        ~/tensorflow_datasets; the split is "train" by default.
      text_key: the column of the text.

    Raises:
      ValueError: it is not prepared, or has no such split or column.
    """
    super().__init__(source, text_key)
    name, *rest = source.removeprefix("tfds:").split(":")
    version = f":{rest.pop(0)}" if rest and rest[0][:1].isdigit() else ""
    split = rest.pop(0) if rest else "train"
    require(
      not rest and name and split,
      f"source {source!r}: expected 'tfds:NAME[:VERSION][:SPLIT]'",
    )
    self.name = f"{name}/{split}"
    self._examples = tfds.open_split(name + version, split, key="source")
    columns = self._examples.dataset_info.features
    require(
      text_key in columns,
      f"text_key={text_key!r}: {source!r} has no such column; found "
      f"{sorted(columns)}",
    )
    if len(self):
      self.read(0)

  def __reduce__(self):
    return TfdsSplit, (self.path, self.text_key)

  def __len__(self) -> int:
    return len(self._examples)

  def read(self, i: int) -> Document:
    value, place = self._examples[i][self.text_key], f"{self.path}, example {i}"
    if isinstance(value, bytes):
      value = _decode(value, place, "UTF-8 text")
    return Document(self.key(i), check_text(value, place, self.text_key))


def open_file(path: str, text_key: str) -> File:
  """The documents of a file of text, of the format that its name tells."""
  if path.startswith("tfds:"):
    return TfdsSplit(path, text_key)
  if path.endswith(".jsonl"):
    return JsonLines(path, text_key)
  if path.endswith(".parquet"):
    return ParquetFile(path, text_key)
  if path.endswith((".array_record", ".arrayrecord")):
    return JsonRecords(path, text_key)
  return TextFile(path)
