"""Fine-tuned models measured with several funnels, over several seeds.

train.py calls `run`, which trains them first; eval.py calls `evaluate`, which
reads them.
"""

from collections.abc import Sequence
import dataclasses
import os
import re
import statistics
from typing import Any

import jax
import ml_collections

from gemma_funnel import flops, tasks
from gemma_funnel.checks import require
from gemma_funnel.convert.tensor_io import to_path
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import load_for_eval, plots, report
from gemma_funnel.evaluation.funnels import TRAINED
from gemma_funnel.evaluation.prompts import Settings
from gemma_funnel.heads import Encoder, HeadConfig
from gemma_funnel.tasks import encode
from gemma_funnel.tasks.task import ENCODER_KINDS, Task
from gemma_funnel.training import finetune, trainer

Row = dict[str, Any]
# The settings of configs/eval_task.py that tasks with a head have.
_USED = ("batch_size", "split", "max_examples", "split_seed")
# What the seeds of one table have in common.
_COMMON = """
  task length long causal head init_from tokenizer funnel funnel_from
  funnel_sampled epochs batch_size optimizer
""".split()


@dataclasses.dataclass(frozen=True)
class Examples:
  """What encoders are measured on."""

  task: Task  # Of the encoders' head.
  split: str
  rows: Sequence[encode.Row]  # Of that split, from `encode.encode`.
  batch_size: int
  length: int  # Tokens of a row at most.


def run(config: ml_collections.ConfigDict) -> list[Row] | None:
  """Fine-tunes each seed of `config` and measures them on the test split.

  Writes task.json, .md and .png to `config.workdir`, whose folders seed_N are
  the runs. The same call goes on where it was interrupted.

  Args:
    config: as in configs/finetune.py.

  Returns:
    A row for each funnel: means over seeds by the metrics' names, `metric`, the
    main one, with `value`, its mean, and `spread`, its standard deviation,
    `num_examples`, `seeds`, how many, and `of_seeds`, the row of each. None if
    a SIGTERM ended it early.

  Raises:
    ValueError, FloatingPointError: see `finetune.resolve` and `trainer.train`.
  """
  require(
    bool(config.seeds) and not isinstance(config.seeds, int),
    f"seeds={config.seeds!r}: expected such as (0, 1, 2)",
  )
  task = tasks.load(config.task)
  # All that can be wrong of a seed is found before the first is trained.
  specs = [finetune.resolve(of_seed(config, s), task) for s in config.seeds]
  funnels = (TRAINED, *config.eval_funnels)
  own, depth = specs[0].stages, specs[0].model_config.num_layers
  needs = _needs(specs[0].task.head)
  funnels_lib.resolve(funnels, depth, own=own, **needs)
  measured = []
  for spec in specs:
    result = trainer.train(spec)
    if not result.finished:
      return None
    examples = Examples(
      task, "test", spec.task.rows["test"], spec.batch_size, spec.length
    )
    measured.append(measure(result.model, examples, funnels))
  rows = _over_seeds(task, measured)
  if jax.process_index() == 0:
    title, settings = f"{task.name}: test split", {"config": config.to_dict()}
    _report(config.workdir, "task", rows, examples, title, settings)
  return rows


def of_seed(config: ml_collections.ConfigDict, seed: int):
  """The configuration of the run of one seed."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = seed
    config.workdir = os.path.join(config.workdir, f"seed_{seed}")
    del config.seeds, config.eval_funnels
  return config


def _needs(head: HeadConfig) -> dict[str, Any]:
  return dict(recovers="a label for every token" if head.per_token else None)


def measure(
  encoder: Encoder, examples: Examples, funnels: Sequence[str]
) -> list[Row]:
  """Metrics of an encoder on a task of its head, with each of several funnels.

  Returns:
    A row for each funnel: the task's metrics, `funnel`, `resolved`,
    `num_examples`, and `ideal_reduction`, the share of the trunk's FLOPs that
    the funnel saves at `length` tokens.

  Raises:
    ValueError: a funnel that cannot be under the head.
  """
  task, config = examples.task, encoder.model.config
  split, rows, length = examples.split, examples.rows, examples.length
  sizes = dict(batch_size=examples.batch_size, length=length)

  def measure_one(stages):
    made = encoder.with_funnel(stages)
    return finetune.measure(made, task, split, rows, **sizes) | {
      "num_examples": len(task.splits[split]),
      "num_cut": sum(row.num_cut for row in rows),
      "ideal_reduction": flops.ideal_reduction(
        config, stages, 1, length, head=False, causal=encoder.causal
      ),
    }

  needs = _needs(encoder.head.config)
  named = funnels_lib.resolve_for(encoder.model, funnels, **needs)
  return funnels_lib.measure_each(f"task {task.name}", named, measure_one)


def _over_seeds(task: Task, measured: Sequence[Sequence[Row]]) -> list[Row]:
  """A row for each funnel of the rows of each seed."""
  main = task.metrics[0]
  rows = []
  for same in zip(*measured, strict=True):
    row = dict(same[0])
    for name in task.metrics:
      # Correlations may be undefined.
      defined = [r[name] for r in same if r[name] is not None]
      row[name] = statistics.fmean(defined) if defined else None
      if name == main and len(defined) > 1:
        row["spread"] = statistics.stdev(defined)
    row |= {"metric": main, "value": row[main], "seeds": len(same)}
    rows.append(row | {"of_seeds": list(same)})
  return rows


def _report(out, name, rows, examples: Examples, title, settings) -> None:
  task, metrics = examples.task, examples.task.metrics
  columns = report.columns(
    "funnel",
    "resolved",
    *(report.percent(metric, metric, ".2f") for metric in metrics),
    report.percent("spread", f"deviation of {metrics[0]}", ".2f"),
    report.Column("seeds", "seeds", "d"),
    report.Column("num_cut", "cut", "d"),
    "ideal_reduction",
  )
  counts = ", ".join(f"{len(task.splits[s])} {s}" for s in task.splits)
  note = (
    f"{counts} examples, {sum(task.skipped.values())} malformed rows left out. "
    f"FLOPs of the trunk at {examples.length} tokens."
  )
  report.write(
    out, name, rows, columns, title, plots.task, settings=settings, notes=[note]
  )


def find_runs(path: str | None) -> list[str]:
  """The fine-tuned runs at `path`: itself, or its folders seed_N; or none."""
  if path is None:
    return []
  folder = to_path(path)
  if (folder / finetune.HEAD_FILE).is_file():
    return [str(folder)]
  seeds = {}
  for head in folder.glob(f"seed_*/{finetune.HEAD_FILE}"):
    if match := re.fullmatch(r"seed_(\d+)", head.parent.name):
      seeds[int(match[1])] = str(head.parent)
  return [seeds[n] for n in sorted(seeds)]


def evaluate(config: Any, settings: Settings) -> list[Row]:
  """Measures the runs of `find_runs` on their task, or on another with the
  same labels; returns and writes the table of `run`, as TASK.json, .md, .png.

  Of `settings` only `split`, `max_examples` and `split_seed` count.

  Raises:
    ValueError: a key that a head has no use for; seeds that are not of one
      configuration; a task whose labels, or their kind, are not the runs'.
  """
  path, split = config.checkpoint, settings.split
  for key in ("tokenizer", "dtype"):
    require(
      config[key] is None,
      f"{key}={config[key]!r}: expected none, {path} is a fine-tuned run with "
      "its own",
    )
  for field in dataclasses.fields(Settings):
    value = getattr(settings, field.name)
    require(
      field.name in _USED or value == field.default,
      f"{field.name}={value!r}: expected {field.default!r}, it is of tasks "
      f"without a head, and {path} is a fine-tuned run",
    )
  folders = find_runs(path)
  encoders, labels, configs = zip(*map(finetune.load, folders), strict=True)
  trained = configs[0]
  for folder, other in zip(folders, configs, strict=True):
    _check_same(folders[0], trained, folder, other)
  on_device = load_for_eval.on_this_device
  encoders = [
    Encoder(on_device(encoder.model), encoder.head, causal=encoder.causal)
    for encoder in encoders
  ]
  model, head = encoders[0].model, encoders[0].head.config
  funnels_lib.resolve_for(model, config.funnels, **_needs(head))
  task, of_task = _read_task(config.task, trained, settings)
  _check_labels(task, labels[0], head, path)
  vocab_size, length = model.config.vocab_size, trained.length
  tokenizer = tokenizer_lib.find_tokenizer(trained.tokenizer, "", vocab_size)
  rows = encode.encode(task, task.splits[split], tokenizer, length, "window")
  batch_size = config.batch_size or trained.batch_size
  examples = Examples(task, split, rows, batch_size, length)
  out = config.out or load_for_eval.default_out(path)
  of = dict(checkpoint=path, task=tasks.read_from(of_task))
  report.claim(out, report.file_name(task.name), of)
  rows = _over_seeds(
    task, [measure(encoder, examples, config.funnels) for encoder in encoders]
  )
  _report(
    out,
    report.file_name(task.name),
    rows,
    examples,
    f"{task.name}: {path}, {split} split",
    {**of, "config": config.to_dict(), "trained": trained.to_dict()},
  )
  return rows


def _check_same(first: str, one, folder: str, other) -> None:
  for key in _COMMON:
    require(
      one[key] == other[key],
      f"{folder} has not the {key} of {first}: expected seeds of one "
      "configuration; name one of the folders instead",
    )


def _read_task(given, trained, settings: Settings) -> tuple[Task, Any]:
  """The task that is `given`, or the run's, with `max_examples`; its keys."""
  default = tasks.default_config()
  changed = [key for key in default if given[key] != default[key]]
  named = {"train", "dev", "test", "dataset", "format"}.intersection(changed)
  if changed and not named:
    raise ValueError(
      f"task.{changed[0]}={given[changed[0]]!r} without a file, a data set or "
      "a format: expected these too, or none of task, which is the run's own"
    )
  given = given if named else trained.task
  task = tasks.load(given)
  examples = task.splits.get(settings.split)
  require(
    bool(examples),
    f"task {task.name} has no examples in split={settings.split!r}",
  )
  cut = {settings.split: settings.sample(examples)}
  return dataclasses.replace(task, splits={**task.splits, **cut}), given


def _check_labels(task: Task, labels, head, path: str) -> None:
  wanted = "tagging" if head.per_token else "classification or regression"
  require(
    task.kind in ENCODER_KINDS and head.per_token == (task.kind == "tagging"),
    f"task {task.name} is of kind {task.kind!r}: expected {wanted}, which "
    f"{path} is fine-tuned for",
  )
  more = [x for x in task.labels if x not in labels]
  less = [x for x in labels if x not in task.labels]
  said = f"has them as {list(task.labels)}"
  if more or less:
    said = f"has {more} more and lacks {less}"
  require(
    task.labels == labels,
    f"the labels of task {task.name} are not those of {path}: expected "
    f"{list(labels)}, it {said}",
  )
