"""Rows of .tsv, .csv and .jsonl files, and tasks of any format's rows."""

import collections
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
  """A row and where it is from."""

  place: str  # "<file>, line <number>", for messages.
  values: Mapping[str, Any]  # By column; strings, or what JSON holds.
  fault: str = ""  # What is wrong with the row as a whole.


def make_task(
  config: Any,
  kind: str,
  labels: tuple[str, ...],
  metrics: tuple[str, ...],
  rows: Mapping[str, Iterable[Any]],
  parse: Callable[[Any], Example],
) -> Task:
  """A task of rows by split, which `parse` makes examples of.

  Rows have a `place` and a `fault`. One that has a fault, or that `parse`
  raises ValueError of, is malformed: it is skipped and counted, or raised with
  its place, as `config.on_bad` says.
  """
  require_choice("on_bad", config.on_bad, ("error", "skip"))
  splits, skipped = {}, {}
  for split in rows:
    kept, faults = [], []
    for row in rows[split]:
      try:
        require(not row.fault, row.fault)
        kept.append(parse(row))
      except ValueError as error:
        faults.append(f"{row.place}: {error}")
        if config.on_bad == "error":
          raise ValueError(faults[0]) from error
    splits[split] = kept
    if faults:
      skipped[split] = len(faults)
      cli.say(
        f"{split}: {len(faults)} malformed rows skipped; the first: {faults[0]}"
      )
  return Task(config.name or "", kind, labels, metrics, splits, skipped)


def read_splits(
  config: Any, read: Callable[[str], Sequence[T]]
) -> dict[str, list[T]]:
  """The rows that `read` finds in the files of each split, one at least.

  A split is one file, or several joined by commas.
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
  """A UTF-8 file's text; line ends are kept, a byte order mark is not."""
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
    columns: names, or numbers from 0 (as strings) where there is no header.
    header: whether the first row of a .tsv or .csv names the columns.

  Returns:
    Rows with these columns, or with a fault: a number of columns that is not
    the header's, or most rows', or no JSON object with these keys.
  """
  columns, extension = tuple(columns), os.path.splitext(path)[1]
  require_choice(f"{path}: extension", extension, EXTENSIONS)
  if extension == ".jsonl":
    return json_rows(path, columns)
  text = read_text(path)
  if extension == ".tsv":
    lines = [(n, line.split("\t")) for n, line in lines_of(text) if line]
  else:
    lines = list(_csv_lines(path, text))
  names, lines = (lines[0][1], lines[1:]) if header and lines else ([], lines)
  if not lines:
    return []
  widths = collections.Counter(len(cells) for _, cells in lines)
  width = widths.most_common(1)[0][0]
  if header:
    require(
      len(names) in widths,
      f"{path}, line 1: found {len(names)} names; expected {width}, the columns "
      "of the rows below",
    )
    width = len(names)
  else:
    names = [str(i) for i in range(width)]
  for column in columns:
    found = "twice the" if column in names else "no"
    hint = "" if header else " (header=False: columns are numbers from 0)"
    require(
      names.count(column) == 1,
      f"{path}: {found} column {column!r}; found {names}{hint}",
    )
  rows = []
  for number, cells in lines:
    fits = len(cells) == width
    fault = "" if fits else f"found {len(cells)} columns; expected {width}"
    values = dict(zip(names, cells, strict=False))
    rows.append(Row(f"{path}, line {number}", values, fault))
  return rows


def _csv_lines(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
  # A text may be longer than the module's limit, of 131,072 characters.
  csv.field_size_limit(max(len(text), csv.field_size_limit()))
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


def json_rows(
  path: str, columns: Iterable[str], text: str | None = None
) -> list[Row]:
  """The objects of a .jsonl file, one a line; see `read_rows`.

  `text` is what it holds, if that has been read.
  """
  rows = []
  for number, line in lines_of(read_text(path) if text is None else text):
    fault, record = "", {}
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
      fault = f"malformed JSON: {e}"
    if not isinstance(record, dict):
      fault = f"found a JSON {type(record).__name__}; expected an object"
    elif not fault and (missing := [c for c in columns if c not in record]):
      fault = f"no key {missing[0]!r}; found the keys {sorted(record)}"
    values = {} if fault else record
    rows.append(Row(f"{path}, line {number}", values, fault))
  return rows


def read_labels(path: str) -> tuple[str, ...]:
  """The names in a file of labels, one a line, each once."""
  names = [line.strip() for _, line in lines_of(read_text(path))]
  names = [name for name in names if name]
  require(bool(names), f"{path}: no label; expected a label a line")
  for name in names:
    require(names.count(name) == 1, f"{path}: the label {name!r} occurs twice")
  return tuple(names)


def sorted_labels(values: Iterable[str]) -> tuple[str, ...]:
  """Distinct labels, sorted; as numbers where all of them are integers."""
  names = set(values)
  if all(name.isascii() and name.isdigit() for name in names):
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  return tuple(sorted(names))
