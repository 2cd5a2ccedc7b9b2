"""Rows of .tsv, .csv and .jsonl files, and what becomes of malformed ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import csv
import dataclasses
import io
import json
import os
from typing import Any, TypeVar

from gemma_funnel import cli

EXTENSIONS = (".tsv", ".csv", ".jsonl")
ON_BAD = ("error", "skip")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
  """A row and where it is from.

  Attributes:
    place: "<file>, line <number>", for messages.
    values: by column; strings, or what JSON holds.
    fault: what is wrong with the row as a whole; "" where nothing is.
  """

  place: str
  values: Mapping[str, Any]
  fault: str = ""


class Bad:
  """Raises what is wrong with a row, or counts the row as left out.

  Attributes:
    skipped: rows left out, by split.
  """

  def __init__(self, on_bad: str):
    if on_bad not in ON_BAD:
      raise ValueError(f"on_bad={on_bad!r}: expected one of {list(ON_BAD)}")
    self._skip = on_bad == "skip"
    self.skipped: dict[str, int] = {}

  def keep(
    self, items: Iterable[Any], parse: Callable[[Any], T], split: str
  ) -> list[T]:
    """Parses each item; one whose `parse` raises ValueError is a bad row.

    Raises:
      ValueError: the first bad row's, unless bad rows are skipped.
    """
    kept, first = [], None
    for item in items:
      try:
        kept.append(parse(item))
      except ValueError as error:
        if not self._skip:
          raise
        first = first or error
        self.skipped[split] = self.skipped.get(split, 0) + 1
    if first:
      count = self.skipped[split]
      cli.say(f"{split}: {count} malformed rows skipped; the first: {first}")
    return kept


def paths_of(value: str) -> list[str]:
  """The files of a split: one, or several joined by commas."""
  if os.path.exists(os.path.expanduser(value)):
    return [value]  # A comma may be part of its name.
  return [part.strip() for part in value.split(",") if part.strip()] or [value]


def read_text(path: str) -> str:
  """A file's text; line ends are kept, a byte order mark is not.

  Raises:
    ValueError: the file cannot be read, or is not UTF-8.
  """
  try:
    with open(os.path.expanduser(path), "rb") as f:
      return f.read().decode("utf-8-sig")
  except OSError as e:
    raise ValueError(f"{path}: cannot be read: {e.strerror}") from e
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: not UTF-8: {e}; expected UTF-8 text") from e


def lines_of(text: str) -> Iterator[tuple[int, str]]:
  """Numbers from 1 and lines, cut at "\\n" or "\\r\\n" and nowhere else.

  str.splitlines would also cut at U+0085 and the like, which texts hold.
  """
  for number, line in enumerate(text.split("\n"), start=1):
    yield number, line.removesuffix("\r")


def read_rows(path: str, columns: Iterable[str], header: bool) -> list[Row]:
  """Reads a table.

  Args:
    path: ends in .tsv (tabs, no quoting at all), .csv (RFC 4180 quoting) or
      .jsonl (an object a line). Empty lines are no rows.
    columns: those wanted: names, or numbers from 0 (as strings) where a .tsv or
      .csv has no header; a .jsonl has names.
    header: whether the first row of a .tsv or .csv names the columns.

  Returns:
    Rows with at least the wanted columns, unless they have a fault: a number
    of columns that differs from the first row's, or a line that is no JSON
    object with the wanted keys.

  Raises:
    ValueError: the file cannot be read, is of another kind, lacks a wanted
      column or has broken quotes.
  """
  columns = tuple(columns)
  text = read_text(path)
  match os.path.splitext(path)[1]:
    case ".jsonl":
      lines = ((n, line) for n, line in lines_of(text) if line.strip())
      return [_json_row(f"{path}, line {n}", ln, columns) for n, ln in lines]
    case ".tsv":
      lines = ((n, line.split("\t")) for n, line in lines_of(text) if line)
    case ".csv":
      lines = _csv_lines(path, text)
    case other:
      raise ValueError(
        f"{path}: found the extension {other!r}; expected one of "
        f"{list(EXTENSIONS)}"
      )
  return _table_rows(path, list(lines), columns, header)


def _csv_lines(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
  # newline="": a line break within quotes is kept as it is.
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  start = 1
  try:
    for cells in reader:
      if cells:
        yield start, cells
      start = reader.line_num + 1
  except csv.Error as e:
    raise ValueError(f"{path}, line {start}: malformed CSV: {e}") from e


def _table_rows(
  path: str,
  lines: list[tuple[int, list[str]]],
  columns: tuple[str, ...],
  header: bool,
) -> list[Row]:
  if not lines:
    return []
  width = len(lines[0][1])
  names = lines[0][1] if header else [str(i) for i in range(width)]
  for column in columns:
    if names.count(column) != 1:
      found = "twice the" if column in names else "no"
      hint = "" if header else " (header=False: columns are numbers from 0)"
      raise ValueError(
        f"{path}: {found} column {column!r}; found {names}{hint}"
      )
  rows = []
  for number, cells in lines[1 if header else 0 :]:
    fault = ""
    if len(cells) != width:
      fault = f"found {len(cells)} columns; expected {width}"
    values = dict(zip(names, cells, strict=False))
    rows.append(Row(f"{path}, line {number}", values, fault))
  return rows


def _json_row(place: str, line: str, columns: tuple[str, ...]) -> Row:
  try:
    record = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    return Row(place, {}, f"malformed JSON: {e}")
  if not isinstance(record, dict):
    found = type(record).__name__
    return Row(place, {}, f"found a JSON {found}; expected an object")
  for column in columns:
    if column not in record:
      return Row(
        place, {}, f"no key {column!r}; found the keys {sorted(record)}"
      )
  return Row(place, record)


def read_labels(path: str) -> tuple[str, ...]:
  """The names in a file of labels, one a line.

  Raises:
    ValueError: the file cannot be read, is empty, or has a name twice.
  """
  names = [line.strip() for _, line in lines_of(read_text(path))]
  names = [name for name in names if name]
  if not names:
    raise ValueError(f"{path}: no label; expected a label a line")
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{path}: the label {name!r} occurs more than once")
  return tuple(names)


def sorted_labels(values: Iterable[str]) -> tuple[str, ...]:
  """Distinct labels, sorted; as numbers where all of them are integers."""
  names = set(values)
  if all(name.isascii() and name.isdigit() for name in names):
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  return tuple(sorted(names))
