"""What is measured: tasks read from files, TFDS or Python's own sources.

`load` reads a task whole. Formats: tables (.tsv, .csv, .jsonl), CoNLL, prepared
TensorFlow Datasets, and two that need no file at all: the standard library's
code, tagged or told apart by package.
"""

import dataclasses
import os
from typing import Any

from ml_collections import config_dict

from gemma_funnel.tasks import metrics
from gemma_funnel.tasks.task import GENERATIVE_KINDS, KINDS, SPLITS, Task

FORMATS = ("table", "conll", "tfds", "code_tags", "code_packages")
_TABLE_KEYS = ("prompt", "choices", "answer", "group", "answer_pattern")
# Keys that only some formats read; one that is set elsewhere is a mistake.
_READ_BY = {
  "dataset": ("tfds",),
  "data_dir": ("tfds",),
  "text": ("table", "tfds"),
  "second": ("table", "tfds"),
  "label": ("table", "tfds"),
  "labels": ("table", "conll"),
  "separator": ("conll",),
  "train": ("table", "conll", "tfds"),
  "dev": ("table", "conll", "tfds"),
  "test": ("table", "conll", "tfds"),
  **{key: ("table",) for key in _TABLE_KEYS},
}


def default_config() -> config_dict.ConfigDict:
  """Every key of a task, with its default."""
  placeholder = config_dict.placeholder
  return config_dict.create(
    # What tables of results call it; None is made of the files' names.
    name=placeholder(str),
    # One of FORMATS.
    format="table",
    # One of task.KINDS; only tables need it.
    kind=placeholder(str),
    # Files, several joined by commas; for TFDS, splits of the data set, by
    # default the official ones.
    train=placeholder(str),
    dev=placeholder(str),
    test=placeholder(str),
    # TFDS: a name such as "glue/sst2", and the folder it was prepared in
    # (None is $TFDS_DATA_DIR or ~/tensorflow_datasets).
    dataset=placeholder(str),
    data_dir=placeholder(str),
    # The share of train that becomes dev where there is none.
    dev_fraction=0.1,
    # Of that share, and of the samples of at most so many examples.
    split_seed=0,
    max_train=placeholder(int),
    max_dev=placeholder(int),
    max_test=placeholder(int),
    # Columns: names, or numbers ("0") where header is False (.tsv, .csv).
    header=True,
    text=placeholder(str),
    second=placeholder(str),
    label=placeholder(str),
    # A file of label names, one a line, of which cells may also be the
    # numbers from 0; None is those found in train.
    labels=placeholder(str),
    # "error", or "skip" to leave out malformed rows and count them.
    on_bad="error",
    # Choice: one column that holds a list, or columns joined by commas (of
    # which the first is right where there is no answer column).
    prompt=placeholder(str),
    choices=placeholder(str),
    answer=placeholder(str),
    group=placeholder(str),
    # Generation: a regular expression that finds the answer; its first group.
    answer_pattern=placeholder(str),
    # Perplexity: whether a text file is one document ("file"), or each "line".
    documents="file",
    # CoNLL: columns from 0, -1 is the last; "tab", "space", or None for any
    # run of both; "auto" or one of conll.SCHEMES.
    word_column=0,
    tag_column=-1,
    separator=placeholder(str),
    scheme="auto",
    # Names that metrics.compute knows, joined by commas; None is the kind's.
    metrics=placeholder(str),
  )


def load(config: Any) -> Task:
  """Reads a task whole.

  Args:
    config: as `default_config` has it.

  Returns:
    The task: train, dev and test for kinds that are fine-tuned (dev is taken
    from train where there is none), what was given for the others.

  Raises:
    ValueError: a value of a key, a file, a row or a split that is not as it
      should be; the message names it.
  """
  _check(config)
  # A format is imported when it is wanted: TFDS takes a second.
  match config.format:
    case "table":
      from gemma_funnel.tasks import examples as reader
    case "conll":
      from gemma_funnel.tasks import conll as reader
    case "tfds":
      from gemma_funnel.tasks import tfds as reader
    case _:
      from gemma_funnel.tasks import python_code as reader
  from gemma_funnel.tasks import splits

  splits.check(config)
  task = dataclasses.replace(reader.load(config), name=_name(config))
  names = task.metrics
  if config.metrics:
    names = tuple(name.strip() for name in config.metrics.split(","))
  metrics.check_names(names, task.kind)
  return splits.finish(dataclasses.replace(task, metrics=names), config)


def _check(config: Any) -> None:
  """Raises on a key that the format does not read, rather than ignore it."""
  if config.format not in FORMATS:
    raise ValueError(
      f"format={config.format!r}: expected one of {list(FORMATS)}"
    )
  if config.documents not in ("file", "line"):
    raise ValueError(
      f"documents={config.documents!r}: expected 'file' or 'line'"
    )
  if config.kind is not None and config.kind not in KINDS:
    raise ValueError(f"kind={config.kind!r}: expected one of {list(KINDS)}")
  for key, formats in _READ_BY.items():
    if config[key] and config.format not in formats:
      raise ValueError(
        f"{key}={config[key]!r}: format={config.format!r} does not use it; "
        f"only {list(formats)} do"
      )
  kind = {"conll": "tagging", "code_tags": "tagging"}.get(config.format)
  kind = "classification" if config.format == "code_packages" else kind
  if kind and config.kind not in (None, kind):
    raise ValueError(
      f"kind={config.kind!r}: format={config.format!r} is {kind!r}; expected "
      "that, or None"
    )
  if config.format not in ("table", "conll"):
    return
  if not config.test:
    raise ValueError(
      "test is not set: name the file that results are of (dev can be taken "
      "from train, test cannot)"
    )
  if not config.train and config.kind not in GENERATIVE_KINDS:
    raise ValueError(
      f"train is not set: name its file; only the kinds {GENERATIVE_KINDS} "
      "need none"
    )


def _name(config: Any) -> str:
  if config.name:
    return config.name
  if config.dataset:
    return config.dataset
  paths = [config[split] for split in SPLITS if config[split]]
  if not paths:
    return config.format
  # "data/snli/test.tsv" is snli: files are called after their splits.
  folder = os.path.basename(os.path.dirname(os.path.abspath(paths[-1])))
  return folder or os.path.basename(paths[-1])
