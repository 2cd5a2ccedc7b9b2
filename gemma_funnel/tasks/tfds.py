"""Prepared TensorFlow Datasets, read without tensorflow.

TFDS's data sources read array_record files by index. Sets that were prepared as
tfrecord, TFDS's default, need tensorflow and are refused.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from gemma_funnel.checks import require, require_int
from gemma_funnel.data.tfds import open_split
from gemma_funnel.tasks import conll, examples, tables
from gemma_funnel.tasks.task import SPLITS, Task


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """Columns, splits and official metrics of a set."""

  text: str  # The column of the text, or of the words.
  metrics: tuple[str, ...]  # The first is the main one; () is the kind's.
  second: str | None = None  # The column of the second text.
  label: str = "label"  # The column of the label, or of the tags.
  train: str = "train"
  dev: str | None = None  # None is taken from train.
  test: str = "validation"


_ACCURACY = ("accuracy",)
# The labels of GLUE's test splits are not published: its validation split is
# the test, and dev is taken from train.
DATASETS = {
  "glue/cola": DatasetSpec("sentence", ("matthews", "accuracy")),
  "glue/sst2": DatasetSpec("sentence", _ACCURACY),
  "glue/mrpc": DatasetSpec("sentence1", ("f1", "accuracy"), "sentence2"),
  "glue/qqp": DatasetSpec("question1", ("f1", "accuracy"), "question2"),
  "glue/stsb": DatasetSpec("sentence1", ("pearson", "spearman"), "sentence2"),
  # test="validation_mismatched" gives the other domains.
  "glue/mnli": DatasetSpec(
    "premise", _ACCURACY, "hypothesis", test="validation_matched"
  ),
  "glue/qnli": DatasetSpec("question", _ACCURACY, "sentence"),
  "glue/rte": DatasetSpec("sentence1", _ACCURACY, "sentence2"),
  "glue/wnli": DatasetSpec("sentence1", _ACCURACY, "sentence2"),
  "conll2003": DatasetSpec(
    "tokens", conll.SPAN_METRICS, label="ner", dev="dev", test="test"
  ),
}


def load(config: Any) -> Task:
  """Reads a set that has been prepared; see `tasks.load`.

  Columns and splits are those of DATASETS, unless `config` names others.
  """
  spec = _spec(config)
  sources = {
    split: open_split(
      config.dataset, getattr(spec, split), config.data_dir, key=split
    )
    for split in SPLITS
    if getattr(spec, split)
  }
  features = sources["train"].dataset_info.features
  for key in ("text", "second", "label"):
    column = getattr(spec, key)
    require(
      not column or column in features,
      f"{key}={column!r}: dataset {config.dataset!r} has no such column; "
      f"found {sorted(features)}",
    )
  feature = features[spec.label]
  if hasattr(feature, "feature"):
    require(
      hasattr(features[spec.text], "feature"),
      f"text={spec.text!r}: expected a sequence of words, as label="
      f"{spec.label!r} is one of tags; found {features[spec.text]}",
    )
    kind, feature = "tagging", feature.feature
  elif np.issubdtype(feature.np_dtype, np.floating):
    kind = "regression"
  else:
    kind = "classification"
  require(
    config.kind in (None, kind),
    f"kind={config.kind!r}: the column {spec.label!r} of {config.dataset!r} "
    f"makes it {kind!r}; expected that, or None",
  )
  names = getattr(feature, "names", None)
  require(
    kind != "tagging" or bool(names),
    f"label={spec.label!r}: expected a sequence of ClassLabel, with names",
  )
  make = _sentence if kind == "tagging" else _row
  rows = {
    split: [
      make(f"{config.dataset}, example {i}", source[i], spec, names)
      for i in range(len(source))
    ]
    for split, source in sources.items()
  }
  if kind == "tagging":
    # CoNLL-2003 as TFDS has it begins with an empty sentence.
    rows = {k: [s for s in v if s.words or s.fault] for k, v in rows.items()}
    return conll.make_task(config, rows, spec.metrics)
  labels = ()
  if kind == "classification":
    found = (r.values[spec.label] for r in rows["train"] if not r.fault)
    labels = tuple(names or tables.sorted_labels(found))
  parse = examples.parser(spec, kind, labels, empty=True)
  metrics = spec.metrics or examples.KINDS[kind].metrics
  return tables.make_task(config, kind, labels, metrics, rows, parse)


def _spec(config: Any) -> DatasetSpec:
  """What is known of the set, with what the configuration says otherwise."""
  require(bool(config.dataset), "dataset is not set: such as 'glue/sst2'")
  keys = ("text", "second", "label", *SPLITS)
  set_ = {key: config[key] for key in keys if config[key]}
  known = DATASETS.get(config.dataset.split(":")[0])
  if known:
    return dataclasses.replace(known, **set_)
  for key in ("text", "label", "train", "test"):
    require(
      key in set_,
      f"{key} is not set; dataset={config.dataset!r} is none of "
      f"{list(DATASETS)}, so its columns and splits must be named",
    )
  return DatasetSpec(metrics=(), **set_)


def _row(place: str, record, spec: DatasetSpec, names) -> tables.Row:
  try:
    columns = filter(None, (spec.text, spec.second))
    values = {column: _text(record[column]) for column in columns}
    values[spec.label] = _label(record[spec.label], names)
  except ValueError as e:
    return tables.Row(place, {}, str(e))
  return tables.Row(place, values)


def _sentence(place: str, record, spec: DatasetSpec, names) -> conll.Sentence:
  try:
    words = tuple(map(_text, record[spec.text]))
    tags = tuple(_label(tag, names) for tag in record[spec.label])
    require(
      len(words) == len(tags), f"found {len(words)} words and {len(tags)} tags"
    )
  except ValueError as e:
    return conll.Sentence(place, (), (), str(e))
  return conll.Sentence(place, words, tags)


def _text(value: Any) -> str:
  """Text of bytes; it may be empty: some questions of QQP are."""
  found = type(value).__name__
  require(isinstance(value, (bytes, str)), f"found a {found}; expected a text")
  try:
    return value.decode("utf-8") if isinstance(value, bytes) else value
  except UnicodeDecodeError as e:
    raise ValueError(f"not UTF-8: {e}") from e


def _label(value: Any, names: Sequence[str] | None) -> Any:
  """A label's name, or the number of a regression."""
  if isinstance(value, bytes):
    return value.decode("utf-8", errors="replace")
  if not np.issubdtype(np.asarray(value).dtype, np.integer):
    return value
  require(
    value != -1,
    "found the label -1, which is none; of a "
    "whole split, its labels are hidden",
  )
  if names is None:
    return str(value)
  require_int("label id", int(value), 0, len(names) - 1)
  return names[value]
