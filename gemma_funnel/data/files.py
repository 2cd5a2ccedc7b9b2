"""Files of documents, read by index: text, JSON lines, Parquet, array_record.

Paths are local, or of a bucket ("gs://..") that etils.epath can open. A file is
opened for every read: none is held open, and a reader can be pickled.
"""

from array import array
import codecs
from collections.abc import Iterator
import contextlib
import functools
import glob
import json
import os
from typing import Any

from etils import epath
import numpy as np

from gemma_funnel import cli, inputs
from gemma_funnel.buckets import is_remote, naming
from gemma_funnel.checks import require, require_choice
from gemma_funnel.data import tfds
from gemma_funnel.data.documents import Document, LazyDocuments

# A big text file becomes documents of about this size, for it to have both
# splits.
TEXT_DOCUMENT_BYTES = 16 << 10
RECORD_ENDS = (".array_record", ".arrayrecord")
ON_BAD = ("skip", "error")
# Of rows that cannot be read: how many may be, at least and by share, how many
# are told, and how many first ones are tried before anything is.
_FEW_BAD, _MOST_BAD, _TOLD_BAD, _FIRST_ROWS = 100, 0.1, 10, 100
# What files begin with that are no text, and what they are called.
_MAGIC = {
  b"PAR1": "Parquet",
  b"\x1f\x8b": "compressed by gzip",
  b"BZh": "compressed by bzip2",
  b"\xfd7zXZ": "compressed by xz",
  b"\x28\xb5\x2f\xfd": "compressed by zstd",
  b"PK\x03\x04": "a zip archive",
  b"%PDF": "a PDF",
  b"ARROW1": "an Arrow file",
  b"\x89HDF": "an HDF5 file",
}
_NO_TEXT = {
  ".csv": "a table (CSV)",
  ".tsv": "a table (TSV)",
  ".xlsx": "a spreadsheet",
  ".arrow": "an Arrow file",
  ".feather": "an Arrow file",
  ".tfrecord": "a TFRecord file",
  ".tar": "an archive",
  ".gz": "compressed by gzip",
  ".bz2": "compressed by bzip2",
  ".xz": "compressed by xz",
  ".zst": "compressed by zstd",
  ".zip": "a zip archive",
  ".npy": "an array",
  ".npz": "arrays",
  ".pkl": "a pickle",
}
# Decoded row groups of Parquet files that are kept in memory.
_KEPT_ROW_GROUPS = 4
_BLOCK_BYTES = 1 << 20


class BadRowError(ValueError):
  """A row has no text, or is damaged; the file is as it should be."""


def _require_row(ok: bool, message: str) -> None:
  if not ok:
    raise BadRowError(message)


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
  with naming(path), inputs.open_file(path) as f:
    yield f


def matches(pattern: str) -> list[str]:
  """The files and folders that a glob matches."""
  if os.path.exists(pattern):
    return [pattern]  # Whatever it has of "[" or "*".
  if not is_remote(pattern):
    return glob.glob(os.path.expanduser(pattern), recursive=True)
  require(
    "**" not in pattern,
    f"source {pattern!r}: '**' would list a whole bucket; expected '*'",
  )
  scheme, _, rest = pattern.partition("://")
  bucket, _, within = rest.partition("/")
  with naming(pattern):
    found = epath.Path(f"{scheme}://{bucket}").glob(within)
    return [os.fspath(path) for path in found]


def is_file(path: str) -> bool:
  """Whether it is there and no folder."""
  with naming(path):
    at = epath.Path(path)
    return not at.is_dir() and at.exists()


def read_bytes(path: str) -> bytes:
  """A file's content; a ValueError that names it if it cannot be read."""
  with _open(path) as f:
    return f.read()


class File(LazyDocuments):
  """Documents of one file; the keys are "<file name>:<index>"."""

  def __init__(self, path: str, text_key: str = "text"):
    self.path, self.text_key = path, text_key
    # The name alone, not the folder: the split is the same elsewhere.
    self.name = os.path.basename(path)

  def key(self, i: int) -> str:
    return f"{self.name}:{i}"

  def _part(self, start: int, size: int) -> bytes:
    with _open(self.path) as f:
      f.seek(start)
      part = f.read(size)
    if len(part) != size:
      raise ValueError(
        f"{self.path}: found {len(part)} bytes at {start}, expected {size}: "
        "the file is not what it was when it was first read"
      )
    return part


def _decode(content: bytes, place: str, expected: str = "UTF-8 text") -> str:
  try:
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
  except UnicodeDecodeError as e:
    raise BadRowError(f"{place}: not UTF-8: {e}; expected {expected}") from e


class TextFile(File):
  """UTF-8 text, cut at line ends into parts of TEXT_DOCUMENT_BYTES or more."""

  def __init__(self, path: str):
    super().__init__(path)
    ends, size, lines = array("q", [0]), 0, []
    with _open(path) as f:
      # Lines of bytes end at "\n" alone, not at form feeds and the like.
      for line in f:
        lines.append(line)
        size += len(line)
        if size - ends[-1] >= TEXT_DOCUMENT_BYTES:
          _decode(b"".join(lines), path)
          ends.append(size)
          lines = []
    _decode(b"".join(lines), path)
    if lines:
      ends.append(size)
    self._ends = np.asarray(ends)

  def __len__(self) -> int:
    return len(self._ends) - 1

  def read(self, i: int) -> Document:
    start, end = map(int, self._ends[i : i + 2])
    text = _decode(self._part(start, end - start), self.path)
    return Document(self.key(i), text)


def check_text(text: Any, place: str, text_key: str) -> str:
  """A string that UTF-8 can express, else a ValueError that names the place."""
  _require_row(
    isinstance(text, str),
    f"{place}: the value of {text_key!r} is a {type(text).__name__}; expected "
    "a string",
  )
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as e:
    raise BadRowError(f"{place}: {text_key!r} is not Unicode text: {e}") from e
  return text


def _json_text(content: bytes, place: str, text_key: str) -> str:
  """The text of one JSON object at `place`, such as a line."""
  try:
    record = json.loads(_decode(content, place, "UTF-8 JSON"))
  except json.JSONDecodeError as e:
    raise BadRowError(f"{place}: malformed JSON: {e}") from e
  except RecursionError as e:
    raise BadRowError(f"{place}: JSON nested too deeply") from e
  _require_row(
    isinstance(record, dict),
    f"{place}: found a JSON {type(record).__name__}; expected an object with "
    f"the key {text_key!r}",
  )
  found = f"no key {text_key!r}; found the keys {sorted(record)}"
  # A key within another is written with a dot.
  *outer, last = [text_key] if text_key in record else text_key.split(".")
  for key in outer:
    record = record.get(key) if isinstance(record, dict) else None
  there = isinstance(record, dict) and last in record
  _require_row(there, f"{place}: {found}")
  return check_text(record[last], place, text_key)


def _is_empty(line: bytes, place: str, text_key: str) -> bool:
  try:
    return not _json_text(line, place, text_key)
  except ValueError:
    return False  # Whoever reads it is told.


class JsonLines(File):
  """A JSON object a line; blank lines and empty texts are left out.

  One pass finds where lines are. They are parsed when they are read, or if
  `strict` at once.
  """

  def __init__(self, path: str, text_key: str, strict: bool = False):
    super().__init__(path, text_key)
    found = array("q")
    at = index = 0
    with _open(path) as f:
      for number, line in enumerate(f, start=1):
        at += len(line)
        if not line.strip():
          continue
        place = f"{path}, line {number}"
        if strict:
          kept = _json_text(line, place, text_key)
        else:
          # An empty string is written in one way only.
          kept = b'""' not in line or not _is_empty(line, place, text_key)
        if kept:
          found.extend((at - len(line), len(line), index))
        index += 1
    self._lines = np.asarray(found).reshape(-1, 3)  # Starts, sizes, indices.

  def __len__(self) -> int:
    return len(self._lines)

  def key(self, i: int) -> str:
    return f"{self.name}:{self._lines[i, 2]}"

  def read(self, i: int) -> Document:
    start, size, _ = map(int, self._lines[i])
    line = self._part(start, size)
    try:
      text = _json_text(line, self.path, self.text_key)
    except ValueError:
      # Lines are counted only for an error, which names the line.
      number = 1
      with _open(self.path) as f:
        while block := f.read(min(start, _BLOCK_BYTES)):
          number += block.count(b"\n")
          start -= len(block)
      text = _json_text(line, f"{self.path}, line {number}", self.text_key)
    return Document(self.key(i), text)


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
      with _open(path):
        pass  # The package's own error of a missing file has many lines.
    with self._naming_damage():
      self._records = array_record_data_source.ArrayRecordDataSource([path])

  @contextlib.contextmanager
  def _naming_damage(self) -> Iterator[None]:
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
    with self._naming_damage():
      return self._records[i]


class JsonRecords(RecordFile):
  """array_record of JSON objects."""

  def read(self, i: int) -> Document:
    place = f"{self.path}, record {i}"
    text = _json_text(self.record(i), place, self.text_key)
    return Document(self.key(i), text)


class ParquetFile(File):
  """A column of strings.

  A row is read with its whole row group: cheap in order, dear in a shuffled
  order; `data.tokenize` reads in order.
  """

  def __init__(self, path: str, text_key: str):
    super().__init__(path, text_key)
    with _open_parquet(path) as file:
      found = {field.name: str(field.type) for field in file.schema_arrow}
      groups = range(file.metadata.num_row_groups)
      rows = [file.metadata.row_group(g).num_rows for g in groups]
    require(
      text_key in found,
      f"{path}: no column {text_key!r}; found the columns {sorted(found)}",
    )
    require(
      "string" in found[text_key] and "list" not in found[text_key],
      f"{path}: the column {text_key!r} is of {found[text_key]}; expected "
      "strings",
    )
    self._starts = np.cumsum([0, *rows])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def read(self, i: int) -> Document:
    group = int(np.searchsorted(self._starts, i, "right")) - 1
    values = _row_group(self.path, self.text_key, group)
    value = values[i - int(self._starts[group])].as_py()
    text = check_text(value, f"{self.path}, row {i}", self.text_key)
    return Document(self.key(i), text)


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
  try:
    import pyarrow
    from pyarrow import parquet  # An extra: few corpora need it.
  except ImportError as e:
    raise ValueError(
      f"{path}: Parquet files need the package pyarrow; expected pip install "
      "'gemma-funnel[parquet]'"
    ) from e
  try:
    with _open(path) as f:
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
  """A prepared split of TensorFlow Datasets; keys are "<name>/<split>:<i>".

  The source is "tfds:NAME[:VERSION][:SPLIT]", in $TFDS_DATA_DIR or
  ~/tensorflow_datasets; the split is "train" by default.
  """

  def __init__(self, source: str, text_key: str):
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
      value = _decode(value, place)
    return Document(self.key(i), check_text(value, place, self.text_key))


class Checked(LazyDocuments):
  """Documents of a file; rows that cannot be read are without text.

  Such documents are in no batch, and the keys of the others are what they were.
  The first of them are told, and too many are an error.
  """

  def __init__(self, file: File):
    self.parts, self._file, self._bad = (), file, {}

  def __len__(self) -> int:
    return len(self._file)

  def key(self, i: int) -> str:
    return self._file.key(i)

  def read(self, i: int) -> Document:
    try:
      return self._file.read(i)
    except BadRowError as error:
      self._leave_out(i, error)
      return Document(self.key(i), "")

  def _leave_out(self, i: int, error: ValueError) -> None:
    if i in self._bad:
      return
    self._bad[i] = str(error)
    count = len(self._bad)
    require(
      count <= max(_FEW_BAD, len(self) * _MOST_BAD),
      f"{count:,} of the {len(self):,} rows of {self._file.path} cannot be "
      f"read, such as {next(iter(self._bad.values()))}",
    )
    if count <= _TOLD_BAD:
      more = "" if count < _TOLD_BAD else "; further ones are not told"
      cli.say(f"{error}; left out (data.on_bad='skip'){more}")


def open_file(path: str, text_key: str, on_bad: str = "skip") -> File | Checked:
  """The documents of a file of text.

  Its name tells the format, and where that says nothing its content.

  Args:
    path: of the file.
    text_key: the key or the column of the text.
    on_bad: "skip" leaves out rows that cannot be read; "error" raises, of JSON
      lines before any is used.

  Raises:
    ValueError: it cannot be read, is of a format that is no text, or its first
      rows have no text.
  """
  require_choice("data.on_bad", on_bad, ON_BAD)
  if path.startswith("tfds:"):
    return TfdsSplit(path, text_key)
  name = path.lower()
  if name.endswith(RECORD_ENDS):
    file = JsonRecords(path, text_key)
  else:
    file = _by_content(path, text_key, on_bad == "error")
  if isinstance(file, TextFile):
    return file
  _check_first(file)
  return Checked(file) if on_bad == "skip" else file


def _by_content(path: str, text_key: str, strict: bool) -> File:
  with _open(path) as f:
    head = f.read(_BLOCK_BYTES)
  end = os.path.splitext(path)[1].lower()
  kind = next(
    (k for magic, k in _MAGIC.items() if head.startswith(magic)), None
  )
  if end == ".parquet" or kind == "Parquet":
    return ParquetFile(path, text_key)
  require(
    kind is None and end not in _NO_TEXT,
    f"{path} is {kind or _NO_TEXT.get(end)}: expected text, JSON lines, Parquet "
    "or array_record files; unpack it, or write its text as one of them",
  )
  first = head.removeprefix(codecs.BOM_UTF8).lstrip()
  lines = first.split(b"\n", 1)[0]
  if end in (".jsonl", ".ndjson") or _is_object(lines):
    return JsonLines(path, text_key, strict)
  require(
    end != ".json",
    f"{path} is a JSON document: expected JSON lines, an object in each",
  )
  return TextFile(path)


def _is_object(line: bytes) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def _check_first(file: File) -> None:
  """Raises what is wrong with the first rows, if it is so with all of them."""
  errors = []
  for i in range(min(len(file), _FIRST_ROWS)):
    try:
      file.read(i)
      return
    except ValueError as error:
      errors.append(error)
  if errors:
    raise errors[0]
