"""Rows become examples: what each kind of task makes of a row."""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import math
import os
import re
from typing import Any

from gemma_funnel.checks import is_number, require, require_choice
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
  """The keys that a kind reads and its metrics."""

  columns: tuple[str, ...]
  needed: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ()
  other: tuple[str, ...] = ()  # Keys that name no column.


_LABELLED = ("text", "second", "label"), ("text", "label")
# Kinds of tables; tagging reads CoNLL files.
KINDS = {
  "classification": KindSpec(*_LABELLED, ("accuracy", "macro_f1"), ("labels",)),
  "regression": KindSpec(*_LABELLED, ("pearson", "spearman")),
  "choice": KindSpec(
    ("prompt", "choices", "answer", "group"), ("choices",), ("accuracy",)
  ),
  "generation": KindSpec(
    ("prompt", "answer"),
    ("prompt", "answer"),
    ("exact_match",),
    ("answer_pattern",),
  ),
  "perplexity": KindSpec(("text",)),
}


def load(config: Any) -> Task:
  """Reads the splits that a configuration names; see `tasks.load`."""
  kind = config.kind
  require_choice("kind", kind, KINDS)
  _check_keys(config, KINDS[kind])
  rows = tables.read_splits(config, lambda path: _read(path, config))
  labels = ()
  if kind == "classification":
    labels = _labels(config, rows.get("train", []))
  parse = parser(config, kind, labels)
  metrics = KINDS[kind].metrics
  return tables.make_task(config, kind, labels, metrics, rows, parse)


def _check_keys(config, spec: KindSpec) -> None:
  for key in spec.needed:
    require(
      bool(config[key]),
      f"{key} is not set; kind={config.kind!r} needs its column",
    )
  read = spec.columns + spec.other
  for key in {k for s in KINDS.values() for k in s.columns + s.other}:
    require(
      not config[key] or key in read,
      f"{key}={config[key]!r}: kind={config.kind!r} does not use it; it reads "
      f"{list(read)}",
    )
  require(
    config.kind != "choice"
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
  is_table = os.path.splitext(path)[1] in tables.EXTENSIONS
  if config.kind == "perplexity" and not is_table:
    require(
      not config.text,
      f"text={config.text!r}: {path} is a text without columns; leave it unset",
    )
    text = tables.read_text(path)
    texts = [text]
    if config.documents == "line":
      texts = [line for _, line in tables.lines_of(text)]
    return [Row(path, {"": text}) for text in texts if text.strip()]
  columns = []
  for key in KINDS[config.kind].columns:
    value = config[key] or ""
    columns += _split_names(value) if key == "choices" else [value]
  columns = dict.fromkeys(filter(None, columns))
  require(
    bool(columns), f"text is not set; {path} needs the column of its text"
  )
  return tables.read_rows(path, columns, config.header)


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

  def labelled(row: Row) -> TextExample:
    second, value = columns.second, row.values[columns.label]
    return TextExample(
      _text(row.values[columns.text], columns.text, empty),
      _text(row.values[second], second, empty) if second else None,
      _number(value) if kind == "regression" else label_id(_name(value)),
    )

  index = {name: i for i, name in enumerate(labels)}
  file = getattr(columns, "labels", None)

  def label_id(name: str) -> int:
    # A file of labels says what ids mean.
    is_id = file and name.isascii() and name.isdigit()
    if name not in index and is_id and int(name) < len(labels):
      return int(name)
    expected = "a label that occurs in train"
    if file:
      expected = f"a label of {file} or an id below {len(labels)}"
    shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    require(
      name in index, f"found the label {name!r}; expected {expected}: {shown}"
    )
    return index[name]

  match kind:
    case "classification" | "regression":
      return labelled
    case "choice":
      return lambda row: _choice(columns, row.values)
    case "generation":
      return lambda row: _generation(columns, row.values)
  text = columns.text or ""
  return lambda row: Document(_text(row.values[text], text))


def _text(value: Any, column: str, empty: bool = False) -> str:
  text = files.check_text(value, "found no text", column)
  require(
    empty or bool(text.strip()),
    f"the value of {column!r} is empty; expected text",
  )
  return text


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

  A cell such as "1,3" is several of them, if they are numbers.
  """
  if config.labels:
    return tables.read_labels(config.labels)
  places: dict[str, str] = {}
  for row in rows:
    # Rows without a name are raised, or counted, when they are parsed.
    with contextlib.suppress(ValueError):
      require(not row.fault, row.fault)
      places.setdefault(_name(row.values[config.label]), row.place)
  several = [
    name
    for name in places
    if "," in name and all(part.strip().isdigit() for part in name.split(","))
  ]
  if several and config.on_bad == "error":
    raise ValueError(
      f"{places[several[0]]}: found the labels {several[0]!r}; expected one "
      "label a row (with on_bad='skip', rows with several are left out)"
    )
  return tables.sorted_labels(set(places) - set(several))


def _number(value: Any) -> float:
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  require(
    is_number(number), f"found the label {value!r}; expected a finite number"
  )
  return number


def _choice(columns, values) -> ChoiceExample:
  names, prompt = _split_names(columns.choices), columns.prompt
  found = [values[name] for name in names]
  if len(names) == 1:
    (found,) = found
    require(
      isinstance(found, list),
      f"the value of {names[0]!r} is {found!r:.60}; expected a list of strings",
    )
    names = names * len(found)
  choices = tuple(map(_text, found, names))
  require(
    len(choices) > 1, f"found {len(choices)} choices; expected two or more"
  )
  answer, group = columns.answer, columns.group
  return ChoiceExample(
    _text(values[prompt], prompt) if prompt else "",
    choices,
    _answer(values[answer], choices, names) if answer else 0,
    _name(values[group]) if group else "",
  )


def _answer(value: Any, choices: tuple[str, ...], names: list[str]) -> int:
  """An index from 0, a choice's text, or the name of its column."""
  if isinstance(value, str):
    value, texts = value.strip(), [choice.strip() for choice in choices]
    if texts.count(value) == 1:
      return texts.index(value)
    if names.count(value) == 1:
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


def _generation(columns, values) -> GenerationExample:
  found, pattern = values[columns.answer], columns.answer_pattern
  found = found if isinstance(found, list) else [found]
  require(bool(found), "no answer; expected one or more")
  answers = [_text(text, columns.answer) for text in found]
  for i, text in enumerate(answers if pattern else ()):
    match = re.search(pattern, text)
    group = match[min(1, match.re.groups)] if match else None
    require(
      bool(group),
      f"answer_pattern={pattern!r} finds nothing in the answer {text!r:.60}",
    )
    answers[i] = group.strip()
  prompt = _text(values[columns.prompt], columns.prompt)
  return GenerationExample(prompt, tuple(answers))
