"""Prepared TensorFlow Datasets, read without tensorflow.

TFDS's data sources read array_record files by index. Sets that were prepared as
tfrecord, TFDS's default, need tensorflow and are refused.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_funnel.data.tfds import open_split
from gemma_funnel.tasks import conll, examples, tables
from gemma_funnel.tasks.task import ENCODER_KINDS, SPLITS, Task, TextExample


@dataclasses.dataclass(frozen=True)
class Known:
  """Columns, splits and official metrics of a set.

  Attributes:
    text: the column of the text, or of the words.
    label: the column of the label, or of the tags.
    second: the column of the second text.
    metrics: the first is the main one.
    train, dev, test: names of splits; dev None is taken from train.
  """

  text: str
  metrics: tuple[str, ...]
  second: str | None = None
  label: str = "label"
  train: str = "train"
  dev: str | None = None
  test: str = "validation"


_ACCURACY = ("accuracy",)
# The labels of GLUE's test splits are not published: its validation split is
# the test, and dev is taken from train.
KNOWN = {
  "glue/cola": Known("sentence", ("matthews", "accuracy")),
  "glue/sst2": Known("sentence", _ACCURACY),
  "glue/mrpc": Known("sentence1", ("f1", "accuracy"), "sentence2"),
  "glue/qqp": Known("question1", ("f1", "accuracy"), "question2"),
  "glue/stsb": Known("sentence1", ("pearson", "spearman"), "sentence2"),
  # test="validation_mismatched" gives the other domains.
  "glue/mnli": Known(
    "premise", _ACCURACY, "hypothesis", test="validation_matched"
  ),
  "glue/qnli": Known("question", _ACCURACY, "sentence"),
  "glue/rte": Known("sentence1", _ACCURACY, "sentence2"),
  "glue/wnli": Known("sentence1", _ACCURACY, "sentence2"),
  "conll2003": Known(
    "tokens", conll.SPAN_METRICS, label="ner", dev="dev", test="test"
  ),
}


def load(config: Any) -> Task:
  """Reads a set that has been prepared; see `tasks.load`.

  Args:
    config: `dataset`, such as "glue/sst2"; `data_dir`; and, where the set is
      none of KNOWN or others are wanted, the columns `text`, `second`, `label`
      and the names of the splits `train`, `dev`, `test`.

  Raises:
    ValueError: the set is not prepared, or a split, a column or a label is not
      as it should be.
  """
  columns = _columns(config)
  sources = {
    split: open_split(
      config.dataset, getattr(columns, split), config.data_dir, key=split
    )
    for split in SPLITS
    if getattr(columns, split)
  }
  _check_columns(config, columns, sources["train"])
  kind = _kind(config, columns, sources["train"])
  if kind == "tagging":
    raw = {s: _sentences(config, columns, sources[s]) for s in sources}
    task = conll.make_task(config, raw)
    return dataclasses.replace(task, metrics=columns.metrics or task.metrics)
  labels, names = (), None
  if kind == "classification":
    names = _label_names(columns, sources["train"])
    labels = names or _found_labels(columns, sources["train"])
  bad = tables.Bad(config.on_bad)
  parse = lambda item: _example(item, kind, columns, labels, names is None)
  return Task(
    name=config.name or "",
    kind=kind,
    labels=labels,
    metrics=columns.metrics or examples.METRICS[kind],
    splits={
      split: bad.keep(_records(config, sources[split]), parse, split)
      for split in sources
    },
    skipped=bad.skipped,
  )


def _columns(config: Any) -> Known:
  """What is known of the set, with what the configuration says otherwise."""
  if not config.dataset:
    raise ValueError(
      "dataset is not set; expected a name such as 'glue/sst2' with "
      "format='tfds'"
    )
  set_ = {
    key: config[key]
    for key in ("text", "second", "label", "train", "dev", "test")
    if config[key]
  }
  known = KNOWN.get(config.dataset.split(":")[0])
  if known:
    return dataclasses.replace(known, **set_)
  for key in ("text", "label", "train", "test"):
    if key not in set_:
      raise ValueError(
        f"{key} is not set; dataset={config.dataset!r} is none of "
        f"{list(KNOWN)}, so its columns and splits must be named"
      )
  return Known(metrics=(), **set_)


def _features(source: Any) -> Any:
  return source.dataset_info.features


def _check_columns(config: Any, columns: Known, source: Any) -> None:
  features = _features(source)
  for key in ("text", "second", "label"):
    column = getattr(columns, key)
    if column and column not in features:
      raise ValueError(
        f"{key}={column!r}: dataset {config.dataset!r} has no such column; "
        f"found {sorted(features)}"
      )


def _kind(config: Any, columns: Known, source: Any) -> str:
  """What the label's feature makes of the set."""
  feature = _features(source)[columns.label]
  if hasattr(feature, "feature"):
    kind = "tagging"
  elif np.issubdtype(feature.np_dtype, np.floating):
    kind = "regression"
  else:
    kind = "classification"
  if config.kind not in (None, kind):
    raise ValueError(
      f"kind={config.kind!r}: the column {columns.label!r} of "
      f"{config.dataset!r} makes it {kind!r}; expected that, or None "
      f"(format='tfds' reads {list(ENCODER_KINDS)})"
    )
  return kind


def _records(config: Any, source: Any):
  for i in range(len(source)):
    yield f"{config.dataset}, example {i}", source[i]


def _label_names(columns: Known, source: Any) -> tuple[str, ...] | None:
  names = getattr(_features(source)[columns.label], "names", None)
  return tuple(names) if names else None


def _found_labels(columns: Known, source: Any) -> tuple[str, ...]:
  """Labels without names: the distinct values in train."""
  values = (source[i][columns.label] for i in range(len(source)))
  return tables.sorted_labels(_plain_name(value) for value in values)


def _plain_name(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="replace")
  return str(value)


def _example(item, kind, columns: Known, labels, unnamed: bool) -> TextExample:
  place, record = item
  text = _text(record[columns.text], place)
  second = _text(record[columns.second], place) if columns.second else None
  value = record[columns.label]
  if kind == "regression":
    number = float(value)
    if not math.isfinite(number):
      raise ValueError(f"{place}: found the label {number}; expected a number")
    return TextExample(text, second, number)
  if unnamed:
    name = _plain_name(value)
    if name not in labels or name == "-1":
      raise ValueError(
        f"{place}: found the label {name!r}; expected one that occurs in "
        f"train, and not -1: {list(labels)[:12]}"
      )
    return TextExample(text, second, labels.index(name))
  return TextExample(text, second, _index(value, len(labels), place))


def _index(value: Any, count: int, place: str) -> int:
  index = int(value)
  if index == -1:
    raise ValueError(
      f"{place}: found the label -1: the labels of this split are hidden; "
      "expected a split that has labels (GLUE's test has none)"
    )
  if not 0 <= index < count:
    raise ValueError(
      f"{place}: found the label id {index}; expected 0 to {count - 1}"
    )
  return index


def _text(value: Any, place: str) -> str:
  """Text of bytes; it may be empty: some questions of QQP are."""
  if not isinstance(value, (bytes, str)):
    raise ValueError(
      f"{place}: found a {type(value).__name__}; expected a text"
    )
  try:
    return value.decode("utf-8") if isinstance(value, bytes) else value
  except UnicodeDecodeError as e:
    raise ValueError(f"{place}: not UTF-8: {e}") from e


def _sentences(config, columns: Known, source: Any) -> list[conll.Sentence]:
  names = getattr(_features(source)[columns.label].feature, "names", None)
  if not names:
    raise ValueError(
      f"label={columns.label!r}: a sequence of {config.dataset!r} without "
      "names; expected a sequence of ClassLabel"
    )
  sentences = []
  for place, record in _records(config, source):
    words = tuple(_text(word, place) for word in record[columns.text])
    ids = [_index(i, len(names), place) for i in record[columns.label]]
    if not words:
      continue  # CoNLL-2003 as TFDS has it begins with an empty sentence.
    fault = ""
    if len(words) != len(ids):
      fault = f"found {len(words)} words and {len(ids)} tags"
    elif not all(word.strip() for word in words):
      fault = "a word is empty"
    tags = tuple(names[i] for i in ids)
    sentences.append(conll.Sentence(place, words, tags, fault))
  return sentences
