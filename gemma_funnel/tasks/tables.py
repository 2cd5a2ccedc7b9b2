"""Rows of .tsv, .csv and .jsonl files, and tasks of any format's rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import dataclasses
import io
import json
import os
from typing import Any, TypeVar

from gemma_funnel import cli
from gemma_funnel.checks import require, require_choice
from gemma_funnel.data import files
from gemma_funnel.tasks.task import SPLITS, Example, Task

EXTENSIONS = (".tsv", ".csv", ".jsonl")

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


class RowErrors:
  """Raises what is wrong with a row, or counts the row as left out.

  Attributes:
    skipped: rows left out, by split.
  """

  def __init__(self, on_bad: str):
    require_choice("on_bad", on_bad, ("error", "skip"))
    self._skip = on_bad == "skip"
    self.skipped: dict[str, int] = {}

  def keep(
    self, rows: Iterable[Any], parse: Callable[[Any], T], split: str
  ) -> list[T]:
    """Parses rows that have a `place` and a `fault`.

    A row is malformed if it has a fault or `parse` raises ValueError.

    Raises:
      ValueError: of the first malformed row, with its place, unless such rows
        are skipped.
    """
    kept, first = [], None
    for row in rows:
      try:
        require(not row.fault, row.fault)
        kept.append(parse(row))
      except ValueError as error:
        if not self._skip:
          raise ValueError(f"{row.place}: {error}") from error
        first = first or f"{row.place}: {error}"
        self.skipped[split] = self.skipped.get(split, 0) + 1
    if first:
      count = self.skipped[split]
      cli.say(f"{split}: {count} malformed rows skipped; the first: {first}")
    return kept


def make_task(
  config: Any,
  kind: str,
  labels: tuple[str, ...],
  metrics: tuple[str, ...],
  rows: Mapping[str, Iterable[Any]],
  parse: Callable[[Any], Example],
) -> Task:
  """A task of rows by split, which `parse` makes examples of.

  Raises:
    ValueError: a malformed row, unless `config.on_bad` is "skip".
  """
  errors = RowErrors(config.on_bad)
  splits = {split: errors.keep(rows[split], parse, split) for split in rows}
  return Task(config.name or "", kind, labels, metrics, splits, errors.skipped)


def read_splits(
  config: Any, read: Callable[[str], Sequence[T]]
) -> dict[str, list[T]]:
  """The rows that `read` finds in the files of each split that is named.

  A split is one file, or several joined by commas.

  Raises:
    ValueError: a split without a row.
  """
  splits = {}
  for split in SPLITS:
    value = config[split]
    if not value:
      continue
    paths = [value]
    if not os.path.exists(os.path.expanduser(value)):
      # Otherwise a comma is part of its name.
      paths = [part.strip() for part in value.split(",") if part.strip()]
    splits[split] = [row for path in paths or [value] for row in read(path)]
    require(
      bool(splits[split]), f"{value}: no rows; expected at least one in {split}"
    )
  return splits


def read_text(path: str) -> str:
  """A file's text; line ends are kept, a byte order mark is not.

  Raises:
    ValueError: the file cannot be read, or is not UTF-8.
  """
  try:
    return files.read_bytes(os.path.expanduser(path)).decode("utf-8-sig")
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
  columns, text = tuple(columns), read_text(path)
  extension = os.path.splitext(path)[1]
  require_choice(f"{path}: extension", extension, EXTENSIONS)
  if extension == ".jsonl":
    lines = ((n, line) for n, line in lines_of(text) if line.strip())
    return [_json_row(f"{path}, line {n}", line, columns) for n, line in lines]
  if extension == ".tsv":
    lines = [(n, line.split("\t")) for n, line in lines_of(text) if line]
  else:
    lines = list(_csv_lines(path, text))
  return _table_rows(path, lines, columns, header) if lines else []


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


def _table_rows(path: str, lines, columns, header: bool) -> list[Row]:
  width = len(lines[0][1])
  names = lines[0][1] if header else [str(i) for i in range(width)]
  for column in columns:
    found = "twice the" if column in names else "no"
    hint = "" if header else " (header=False: columns are numbers from 0)"
    require(
      names.count(column) == 1,
      f"{path}: {found} column {column!r}; found {names}{hint}",
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
  missing = [column for column in columns if column not in record]
  if missing:
    fault = f"no key {missing[0]!r}; found the keys {sorted(record)}"
    return Row(place, {}, fault)
  return Row(place, record)


def read_labels(path: str) -> tuple[str, ...]:
  """The names in a file of labels, one a line.

  Raises:
    ValueError: the file cannot be read, is empty, or has a name twice.
  """
  names = [line.strip() for _, line in lines_of(read_text(path))]
  names = [name for name in names if name]
  require(bool(names), f"{path}: no label; expected a label a line")
  for name in names:
    once = names.count(name) == 1
    require(once, f"{path}: the label {name!r} occurs more than once")
  return tuple(names)


def sorted_labels(values: Iterable[str]) -> tuple[str, ...]:
  """Distinct labels, sorted; as numbers where all of them are integers."""
  names = set(values)
  if all(name.isascii() and name.isdigit() for name in names):
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  return tuple(sorted(names))
