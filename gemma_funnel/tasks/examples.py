"""Tables become tasks: what each kind makes of a row."""

from collections.abc import Callable, Mapping
import json
import math
import os
import re
from typing import Any

from gemma_funnel.tasks import tables
from gemma_funnel.tasks.task import (
  SPLITS,
  ChoiceExample,
  Document,
  Example,
  GenerationExample,
  Task,
  TextExample,
)

# Columns that each kind reads, and those it cannot do without. Tagging reads
# CoNLL files.
_COLUMNS = {
  "classification": ("text", "second", "label"),
  "regression": ("text", "second", "label"),
  "choice": ("prompt", "choices", "answer", "group"),
  "generation": ("prompt", "answer"),
  "perplexity": ("text",),
}
_NEEDED = {
  "classification": ("text", "label"),
  "regression": ("text", "label"),
  "choice": ("choices",),
  "generation": ("prompt", "answer"),
  "perplexity": (),
}
COLUMN_KEYS = (
  "text",
  "second",
  "label",
  "prompt",
  "choices",
  "answer",
  "group",
)
METRICS = {
  "classification": ("accuracy", "macro_f1"),
  "regression": ("pearson", "spearman"),
  "choice": ("accuracy",),
  "generation": ("exact_match",),
  "perplexity": (),
}


def load(config: Any) -> Task:
  """Reads the splits that a configuration names; see `tasks.load`.

  Raises:
    ValueError: a file, a row or a column that is not as it should be.
  """
  kind = config.kind
  if kind not in _COLUMNS:
    raise ValueError(
      f"kind={kind!r}: expected one of {list(_COLUMNS)} with format='table'"
    )
  _check_columns(config, kind)
  columns = _wanted(config, kind)
  bad = tables.Bad(config.on_bad)
  paths = {
    split: tables.paths_of(config[split]) for split in SPLITS if config[split]
  }
  if kind == "perplexity":
    read = lambda path, split: _documents(path, split, config, bad)
    return _task(config, (), _each(paths, read), bad)
  read = lambda path, split: tables.read_rows(path, columns, config.header)
  rows = _each(paths, read)
  for split in paths:
    if not rows[split]:
      raise ValueError(
        f"{config[split]}: no rows; expected at least one in {split}"
      )
  labels, parse = (), _parser(config, kind)
  if kind == "classification":
    labels, parse = _label_parser(config, rows)
  splits = {
    split: bad.keep(rows[split], _whole(parse), split) for split in rows
  }
  return _task(config, labels, splits, bad)


def _each(paths, read) -> dict[str, list]:
  """What `read` gives for each file of a split, in one list."""
  return {
    split: [item for path in of_split for item in read(path, split)]
    for split, of_split in paths.items()
  }


def _task(config, labels, splits, bad) -> Task:
  return Task(
    name=config.name or "",
    kind=config.kind,
    labels=labels,
    metrics=METRICS[config.kind],
    splits=splits,
    skipped=bad.skipped,
  )


def _check_columns(config, kind: str) -> None:
  """Raises on a column that is missing, or that the kind would not read."""
  for key in _NEEDED[kind]:
    if not config[key]:
      raise ValueError(f"{key} is not set; kind={kind!r} needs its column")
  for key in COLUMN_KEYS:
    if config[key] and key not in _COLUMNS[kind]:
      raise ValueError(
        f"{key}={config[key]!r}: kind={kind!r} has no such column; it reads "
        f"{list(_COLUMNS[kind])}"
      )
  if config.labels and kind != "classification":
    raise ValueError(f"labels={config.labels!r}: kind={kind!r} has no labels")
  if config.answer_pattern and kind != "generation":
    raise ValueError(
      f"answer_pattern={config.answer_pattern!r}: kind={kind!r} does not use it"
    )


def _wanted(config, kind: str) -> list[str]:
  columns = [config[key] for key in _COLUMNS[kind] if config[key]]
  if kind == "choice":
    columns.remove(config.choices)
    columns += _split_names(config.choices)
  return list(dict.fromkeys(columns))


def _split_names(value: str) -> list[str]:
  return [name.strip() for name in value.split(",") if name.strip()]


def _whole(parse: Callable[[tables.Row], Example]):
  """A parser that first tells of faults of the row as a whole."""

  def parse_whole(row: tables.Row) -> Example:
    if row.fault:
      raise ValueError(f"{row.place}: {row.fault}")
    return parse(row)

  return parse_whole


def _text(row: tables.Row, column: str, empty: bool = False) -> str:
  value = row.values[column]
  if not isinstance(value, str):
    raise ValueError(
      f"{row.place}: the value of {column!r} is a {type(value).__name__}; "
      "expected a string"
    )
  return check_text(value, f"{row.place}: the value of {column!r}", empty)


def check_text(value: str, place: str, empty: bool = False) -> str:
  """The text itself, if it is Unicode and (unless `empty`) not blank."""
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as e:  # JSON can hold half a surrogate pair.
    raise ValueError(f"{place} is not Unicode text: {e}") from e
  if not (empty or value.strip()):
    raise ValueError(f"{place} is empty; expected text")
  return value


def _texts(config, row: tables.Row) -> tuple[str, str | None]:
  second = _text(row, config.second) if config.second else None
  return _text(row, config.text), second


def label_name(value: Any, place: str) -> str:
  """A label as a string; JSON may hold it as an integer or a boolean."""
  if isinstance(value, (bool, int)):
    return json.dumps(value)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{place}: found the label {value!r}; expected a name")
  return value.strip()


def _label_parser(config, rows: Mapping[str, list[tables.Row]]):
  """The labels, and the parser of a row that has one of them."""
  if config.labels:
    labels = tables.read_labels(config.labels)
  else:
    labels = _found_labels(config, rows.get("train", []))
  index = {name: i for i, name in enumerate(labels)}

  def parse(row: tables.Row) -> TextExample:
    name = label_name(row.values[config.label], row.place)
    if name not in index:
      id_ = _label_id(config, name, labels)
      if id_ is None:
        raise ValueError(_unknown_label(config, row.place, name, labels))
      return TextExample(*_texts(config, row), id_)
    return TextExample(*_texts(config, row), index[name])

  return labels, parse


def _found_labels(config, rows: list[tables.Row]) -> tuple[str, ...]:
  """Labels in train; a cell such as "1,3" is several, not one of its own."""
  places: dict[str, str] = {}
  for row in rows:
    if row.fault:
      continue  # Told of, or counted, when it is parsed.
    try:
      name = label_name(row.values[config.label], row.place)
    except ValueError:
      continue
    places.setdefault(name, row.place)
  for name, place in list(places.items()):
    parts = [part.strip() for part in name.split(",")]
    if len(parts) < 2 or not all(p.isdigit() or p in places for p in parts):
      continue
    if config.on_bad == "error":
      raise ValueError(
        f"{place}: found the labels {name!r}; expected one label a row (with "
        "on_bad='skip', rows with several are left out)"
      )
    del places[name]
  return tables.sorted_labels(places)


def _label_id(config, name: str, labels: tuple[str, ...]) -> int | None:
  """An id, where a file of labels says what ids mean."""
  if config.labels and name.isascii() and name.isdigit():
    return int(name) if int(name) < len(labels) else None
  return None


def _unknown_label(config, place: str, name: str, labels) -> str:
  shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
  if config.labels:
    known = f"a label of {config.labels} or an id below {len(labels)}"
  else:
    known = "a label that occurs in train"
  return f"{place}: found the label {name!r}; expected {known}: {shown}"


def _parser(config, kind: str):
  match kind:
    case "regression":
      return lambda row: TextExample(*_texts(config, row), _number(config, row))
    case "choice":
      return _choice_parser(config)
    case "generation":
      return _generation_parser(config)
  return None


def _number(config, row: tables.Row) -> float:
  value = row.values[config.label]
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(
      f"{row.place}: found the label {value!r}; expected a finite number"
    )
  return number


def _choice_parser(config):
  columns = _split_names(config.choices)
  if len(columns) == 1 and not config.answer:
    raise ValueError(
      "answer is not set; choices in one column need an answer column (with "
      "two or more columns the first is right)"
    )

  def parse(row: tables.Row) -> ChoiceExample:
    if len(columns) == 1:
      choices = _strings(row, columns[0])
    else:
      choices = tuple(_text(row, column) for column in columns)
    if len(choices) < 2:
      raise ValueError(
        f"{row.place}: found {len(choices)} choices; expected two or more"
      )
    return ChoiceExample(
      _text(row, config.prompt) if config.prompt else "",
      choices,
      _answer(row, config.answer, choices, columns) if config.answer else 0,
      label_name(row.values[config.group], row.place) if config.group else "",
    )

  return parse


def _strings(row: tables.Row, column: str) -> tuple[str, ...]:
  value = row.values[column]
  if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
    raise ValueError(
      f"{row.place}: the value of {column!r} is {value!r:.60}; expected a list "
      "of strings"
    )
  place = f"{row.place}: a value of {column!r}"
  return tuple(check_text(v, place) for v in value)


def _answer(row, column: str, choices, columns: list[str]) -> int:
  """An index from 0, a choice's text, or the name of its column."""
  value = row.values[column]
  names = [n.strip() for n in choices]
  if isinstance(value, str):
    value = value.strip()
    if names.count(value) == 1:
      return names.index(value)
    if len(columns) > 1 and value in columns:
      return columns.index(value)
    if value.isascii() and value.isdigit():
      value = int(value)
  is_index = isinstance(value, int) and not isinstance(value, bool)
  if not is_index or not 0 <= value < len(choices):
    raise ValueError(
      f"{row.place}: found the answer {value!r}; expected an index from 0 to "
      f"{len(choices) - 1} or the text of exactly one choice"
    )
  return value


def _generation_parser(config):
  try:
    pattern = re.compile(config.answer_pattern or "")
  except re.error as e:
    raise ValueError(
      f"answer_pattern={config.answer_pattern!r}: no regular expression: {e}"
    ) from e

  def extract(text: str, row: tables.Row) -> str:
    if not config.answer_pattern:
      return text
    found = pattern.search(text)
    answer = found[min(1, pattern.groups)] if found else None
    if not answer:
      raise ValueError(
        f"{row.place}: answer_pattern={config.answer_pattern!r} finds nothing "
        f"in the answer {text!r:.60}"
      )
    return answer.strip()

  def parse(row: tables.Row) -> GenerationExample:
    value = row.values[config.answer]
    if isinstance(value, list):
      answers = _strings(row, config.answer)
    else:
      answers = (_text(row, config.answer),)
    if not answers:
      raise ValueError(f"{row.place}: no answer; expected one or more")
    answers = tuple(extract(answer, row) for answer in answers)
    return GenerationExample(_text(row, config.prompt), answers)

  return parse


def _documents(path: str, split: str, config, bad) -> list[Document]:
  """A table's texts; of any other extension, the whole file or its lines."""
  if os.path.splitext(path)[1] in tables.EXTENSIONS:
    if not config.text:
      raise ValueError(f"text is not set; {path} needs the column of its text")
    rows = tables.read_rows(path, [config.text], config.header)
    parse = lambda row: Document(_text(row, config.text))
    return bad.keep(rows, _whole(parse), split)
  text = tables.read_text(path)
  texts = [text]
  if config.documents == "line":
    texts = [line for _, line in tables.lines_of(text)]
  return [Document(text) for text in texts if text.strip()]
