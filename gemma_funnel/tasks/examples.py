"""Rows become examples: what each kind of task makes of a row."""

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import re
from typing import Any

from gemma_funnel.checks import require, require_choice
from gemma_funnel.data import files
from gemma_funnel.tasks import tables
from gemma_funnel.tasks.tables import Row
from gemma_funnel.tasks.task import (
  ChoiceExample,
  Document,
  GenerationExample,
  Task,
  TextExample,
)


@dataclasses.dataclass(frozen=True)
class KindSpec:
  """The keys of columns that a kind reads and needs, and its metrics."""

  columns: tuple[str, ...]
  needed: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ()


_LABELLED = ("text", "second", "label"), ("text", "label")
# Kinds of tables; tagging reads CoNLL files.
KINDS = {
  "classification": KindSpec(*_LABELLED, ("accuracy", "macro_f1")),
  "regression": KindSpec(*_LABELLED, ("pearson", "spearman")),
  "choice": KindSpec(
    ("prompt", "choices", "answer", "group"), ("choices",), ("accuracy",)
  ),
  "generation": KindSpec(
    ("prompt", "answer"), ("prompt", "answer"), ("exact_match",)
  ),
  "perplexity": KindSpec(("text",)),
}


def load(config: Any) -> Task:
  """Reads the splits that a configuration names; see `tasks.load`.

  Raises:
    ValueError: a file, a row or a column that is not as it should be.
  """
  kind = config.kind
  require_choice("kind", kind, KINDS)
  _check_keys(config, kind)
  rows = tables.read_splits(config, lambda path: _read(path, config))
  labels = ()
  if kind == "classification":
    labels = _labels(config, rows.get("train", []))
  parse = parser(config, kind, labels)
  return tables.make_task(
    config, kind, labels, KINDS[kind].metrics, rows, parse
  )


def _check_keys(config, kind: str) -> None:
  """Raises on a key that is missing, or that the kind would not read."""
  spec = KINDS[kind]
  for key in spec.needed:
    require(
      bool(config[key]), f"{key} is not set; kind={kind!r} needs its column"
    )
  for key in dict.fromkeys(key for s in KINDS.values() for key in s.columns):
    require(
      not config[key] or key in spec.columns,
      f"{key}={config[key]!r}: kind={kind!r} has no such column; it reads "
      f"{list(spec.columns)}",
    )
  for key, owner in (
    ("labels", "classification"),
    ("answer_pattern", "generation"),
  ):
    require(
      not config[key] or kind == owner,
      f"{key}={config[key]!r}: kind={kind!r} does not use it, {owner!r} does",
    )
  require(
    kind != "choice"
    or bool(config.answer)
    or len(_split_names(config.choices)) > 1,
    "answer is not set; choices in one column need an answer column (with two "
    "or more columns the first is right)",
  )
  try:
    re.compile(config.answer_pattern or "")
  except re.error as e:
    raise ValueError(
      f"answer_pattern={config.answer_pattern!r}: no regular expression: {e}"
    ) from e


def _split_names(value: str) -> list[str]:
  return [name.strip() for name in value.split(",") if name.strip()]


def _read(path: str, config) -> list[Row]:
  """A table's rows; of a text file (perplexity), the whole or each line."""
  columns = []
  for key in KINDS[config.kind].columns:
    if config[key]:
      columns += (
        _split_names(config[key]) if key == "choices" else [config[key]]
      )
  is_table = os.path.splitext(path)[1] in tables.EXTENSIONS
  if config.kind != "perplexity" or is_table:
    require(
      bool(columns), f"text is not set; {path} needs the column of its text"
    )
    return tables.read_rows(path, dict.fromkeys(columns), config.header)
  text = tables.read_text(path)
  texts = [text]
  if config.documents == "line":
    texts = [line for _, line in tables.lines_of(text)]
  return [Row(path, {"": text}) for text in texts if text.strip()]


def parser(
  columns: Any, kind: str, labels: tuple[str, ...] = (), empty: bool = False
) -> Callable[[Row], Any]:
  """What makes an example of a row, or raises ValueError without its place.

  Args:
    columns: has the columns' names by key, as a configuration does.
    kind: one of KINDS.
    labels: of a classification.
    empty: whether texts may be empty.
  """
  match kind:
    case "classification":
      index = {name: i for i, name in enumerate(labels)}
      label = functools.partial(_label_id, columns, index)
    case "regression":
      label = functools.partial(_number, columns)
    case "choice":
      return functools.partial(_choice, columns)
    case "generation":
      return functools.partial(_generation, columns)
    case _:
      return lambda row: Document(_text(row, columns.text or ""))
  return lambda row: TextExample(
    _text(row, columns.text, empty),
    _text(row, columns.second, empty) if columns.second else None,
    label(row),
  )


def _text(row: Row, column: str, empty: bool = False) -> str:
  return _check_text(row.values[column], column, empty)


def _check_text(value: Any, column: str, empty: bool = False) -> str:
  text = files.check_text(value, "found no text", column)
  require(
    empty or bool(text.strip()),
    f"the value of {column!r} is empty; expected text",
  )
  return text


def _texts(row: Row, column: str) -> tuple[str, ...]:
  value = row.values[column]
  require(
    isinstance(value, list) and all(isinstance(v, str) for v in value),
    f"the value of {column!r} is {value!r:.60}; expected a list of strings",
  )
  return tuple(_check_text(v, column) for v in value)


def _name(value: Any) -> str:
  """A label as a string; JSON may hold it as an integer or a boolean."""
  if isinstance(value, (bool, int)):
    return json.dumps(value)
  require(
    isinstance(value, str) and bool(value.strip()),
    f"found the label {value!r}; expected a name",
  )
  return value.strip()


def _labels(config, rows: list[Row]) -> tuple[str, ...]:
  """Labels of the file, or of train.

  A cell such as "1,3" is several of them, not one of its own.
  """
  if config.labels:
    return tables.read_labels(config.labels)
  places: dict[str, str] = {}
  for row in rows:
    if row.fault:
      continue  # Raised, or counted, when it is parsed.
    try:
      places.setdefault(_name(row.values[config.label]), row.place)
    except ValueError:
      continue
  several = [
    name
    for name in places
    if "," in name
    and all(p.isdigit() or p in places for p in map(str.strip, name.split(",")))
  ]
  if several and config.on_bad == "error":
    raise ValueError(
      f"{places[several[0]]}: found the labels {several[0]!r}; expected one "
      "label a row (with on_bad='skip', rows with several are left out)"
    )
  return tables.sorted_labels(set(places) - set(several))


def _label_id(columns, index: dict[str, int], row: Row) -> int:
  name = _name(row.values[columns.label])
  if name in index:
    return index[name]
  labels, file = list(index), getattr(columns, "labels", None)
  # A file of labels says what ids mean.
  if file and name.isascii() and name.isdigit() and int(name) < len(labels):
    return int(name)
  expected = "a label that occurs in train"
  if file:
    expected = f"a label of {file} or an id below {len(labels)}"
  shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
  raise ValueError(f"found the label {name!r}; expected {expected}: {shown}")


def _number(columns, row: Row) -> float:
  value = row.values[columns.label]
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  require(
    math.isfinite(number),
    f"found the label {value!r}; expected a finite number",
  )
  return number


def _choice(columns, row: Row) -> ChoiceExample:
  names = _split_names(columns.choices)
  if len(names) == 1:
    choices = _texts(row, names[0])
  else:
    choices = tuple(_text(row, name) for name in names)
  require(
    len(choices) > 1, f"found {len(choices)} choices; expected two or more"
  )
  return ChoiceExample(
    _text(row, columns.prompt) if columns.prompt else "",
    choices,
    _answer(row, columns.answer, choices, names) if columns.answer else 0,
    _name(row.values[columns.group]) if columns.group else "",
  )


def _answer(row: Row, column: str, choices, names: list[str]) -> int:
  """An index from 0, a choice's text, or the name of its column."""
  value = row.values[column]
  texts = [choice.strip() for choice in choices]
  if isinstance(value, str):
    value = value.strip()
    if texts.count(value) == 1:
      return texts.index(value)
    if len(names) > 1 and value in names:
      return names.index(value)
    if value.isascii() and value.isdigit():
      value = int(value)
  is_index = isinstance(value, int) and not isinstance(value, bool)
  require(
    is_index and 0 <= value < len(choices),
    f"found the answer {value!r}; expected an index from 0 to "
    f"{len(choices) - 1} or the text of exactly one choice",
  )
  return value


def _generation(columns, row: Row) -> GenerationExample:
  if isinstance(row.values[columns.answer], list):
    answers = _texts(row, columns.answer)
  else:
    answers = (_text(row, columns.answer),)
  require(bool(answers), "no answer; expected one or more")
  if columns.answer_pattern:
    answers = tuple(_extract(columns.answer_pattern, a) for a in answers)
  return GenerationExample(_text(row, columns.prompt), answers)


def _extract(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  answer = found[min(1, found.re.groups)] if found else None
  require(
    bool(answer),
    f"answer_pattern={pattern!r} finds nothing in the answer {text!r:.60}",
  )
  return answer.strip()
