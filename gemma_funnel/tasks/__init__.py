"""What is measured: tasks read from files, TFDS or Python's own sources.

`load` reads a task whole. Formats: tables (.tsv, .csv, .jsonl), CoNLL, prepared
TensorFlow Datasets, and two that need no file at all: the standard library's
code, tagged or told apart by package. `preset` has configurations by name.
"""

import dataclasses
import os
import re
from typing import Any

from ml_collections import config_dict

from gemma_funnel import cli
from gemma_funnel.checks import (
  require,
  require_between,
  require_choice,
  require_int,
)
from gemma_funnel.tasks import conll, examples, metrics, python_code, tfds
from gemma_funnel.tasks.task import (
  GENERATIVE_KINDS,
  KINDS,
  SPLITS,
  Task,
  sample,
)

_READERS = {
  "table": examples.load,
  "conll": conll.load,
  "tfds": tfds.load,
  "code_tags": python_code.load,
  "code_packages": python_code.load,
}
FORMATS = tuple(_READERS)
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
# A set of minimal pairs by its columns (Warstadt et al., TACL 2020).
BLIMP = "blimp"
PRESETS = (*FORMATS, *GLUE, "conll2003", BLIMP)
# Keys that only some formats read; one that is set elsewhere is a mistake.
_READ_BY = {
  ("table",): ("prompt", "choices", "answer", "group", "answer_pattern"),
  ("conll",): ("separator",),
  ("tfds",): ("dataset", "data_dir"),
  ("table", "conll"): ("labels",),
  ("table", "tfds"): ("text", "second", "label"),
  ("table", "conll", "tfds"): SPLITS,
}
# The kinds of formats that have but one.
_KIND_OF = {
  "conll": "tagging",
  "code_tags": "tagging",
  "code_packages": "classification",
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


def preset(name: str) -> config_dict.ConfigDict:
  """The configuration of one of PRESETS; it leaves open files or folders."""
  require_choice("task", name, PRESETS)
  config = default_config()
  if name in FORMATS:
    config.format = name
  elif name == BLIMP:
    config.update(kind="choice", choices="sentence_good,sentence_bad")
    config.group = "UID"
  else:
    dataset = f"glue/{name}" if name in GLUE else name
    config.update(format="tfds", dataset=dataset)
  if name in ("code_tags", "code_packages"):
    config.update(max_train=2000, max_dev=300, max_test=600)
  return config


def load(config: Any) -> Task:
  """Reads a task whole.

  Args:
    config: as `default_config` has it.

  Returns:
    The task: train, dev and test for kinds that are fine-tuned (dev is taken
    from train where there is none), the splits that were given for the others.

  Raises:
    ValueError: a value of a key, a file, a row or a split that is not as it
      should be; the message names it.
  """
  _check(config)
  task = _READERS[config.format](config)
  names = task.metrics
  if config.metrics:
    names = tuple(name.strip() for name in config.metrics.split(","))
  metrics.check_names(names, task.kind, task.labels)
  if config.train and config.train == config.test:
    cli.say(
      f"train and test are both {config.train}: results are of examples that "
      "a model is trained on, or shown"
    )
  name = config.name or config.dataset or config.format
  paths = [config[split] for split in SPLITS if config[split]]
  if paths and not (config.name or config.dataset):
    name = _name_of(os.path.abspath(paths[-1]))
  task = dataclasses.replace(task, name=name, metrics=names)
  return dataclasses.replace(task, splits=_splits(task, config))


def _name_of(path: str) -> str:
  """What tells a file from others: "data/snli/test.tsv" is "snli"."""
  folder, file = os.path.split(path)
  stem = os.path.splitext(file)[0]
  if re.search(r"(?i)(^|[^a-z])(test|dev|valid|validation|train)", stem):
    return os.path.basename(folder) or stem
  return stem


def read_from(config: Any) -> dict[str, Any]:
  """The keys of a configuration that say where its examples are from."""
  return {key: config[key] for key in ("format", "dataset", *SPLITS)}


def _check(config: Any) -> None:
  require_choice("format", config.format, FORMATS)
  require_choice("documents", config.documents, ("file", "line"))
  require_choice("kind", config.kind, (None, *KINDS))
  require_between("dev_fraction", config.dev_fraction, 0, 1, open=True)
  for split in SPLITS:
    if config[f"max_{split}"] is not None:
      require_int(f"max_{split}", config[f"max_{split}"], 1)
  for formats, keys in _READ_BY.items():
    for key in keys:
      require(
        not config[key] or config.format in formats,
        f"{key}={config[key]!r}: format={config.format!r} does not use it; "
        f"only {list(formats)} do",
      )
  kind = _KIND_OF.get(config.format, config.kind)
  require(
    config.kind in (None, kind),
    f"kind={config.kind!r}: format={config.format!r} is {kind!r}; expected "
    "that, or None",
  )
  if config.format in ("table", "conll"):
    require(
      bool(config.test),
      "test is not set: name the file that results are of by "
      "--config.task.test=FILE (only dev can be taken from train)",
    )
    require(
      bool(config.train) or config.kind in GENERATIVE_KINDS,
      f"train is not set: name its file; only {GENERATIVE_KINDS} need none",
    )


def _splits(task: Task, config: Any) -> dict[str, tuple]:
  """The splits, dev out of train where there is none, each at most its size."""
  splits = dict(task.splits)
  for split, part in splits.items():
    skipped = task.skipped.get(split, 0)
    why = f" ({skipped} malformed rows were skipped)" if skipped else ""
    require(bool(part), f"the split {split} of {task.name!r} is empty{why}")
  if "dev" not in splits and task.kind not in GENERATIVE_KINDS:
    train = splits["train"]
    require(
      len(train) > 1,
      f"train has {len(train)} example, too few to take dev from; name a dev",
    )
    count = round(len(train) * config.dev_fraction)
    count = min(max(count, 1), len(train) - 1)
    held = set(sample(range(len(train)), count, config, "dev of train"))
    splits["dev"] = [x for i, x in enumerate(train) if i in held]
    splits["train"] = [x for i, x in enumerate(train) if i not in held]
  return {
    s: tuple(sample(splits[s], config[f"max_{s}"], config, s))
    for s in SPLITS
    if s in splits
  }
