"""Fine-tuned models measured with several funnels; and tuned, of several seeds.

`run` is of train.py, which trains them first; `evaluate` is of eval.py, which
is given what is there.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import statistics
from typing import Any

import jax
import ml_collections

from gemma_funnel import flops, tasks
from gemma_funnel.config import check_recovers, format_funnel
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import plots, report
from gemma_funnel.evaluation import subject as subject_lib
from gemma_funnel.evaluation.asking import Settings
from gemma_funnel.heads import Encoder
from gemma_funnel.tasks import encode
from gemma_funnel.tasks.task import ENCODER_KINDS, Task
from gemma_funnel.training import finetune, trainer

TRAINED = "trained"
Row = dict[str, Any]
# Of configs/eval_task.py: what else than these a head has no use for.
_USED = ("batch_size", "split", "max_examples")
# What the seeds of one table have in common.
_COMMON = (
  "task",
  "length",
  "long",
  "causal",
  "head",
  "init_from",
  "tokenizer",
  "funnel",
  "funnel_from",
  "funnel_sampled",
  "epochs",
  "batch_size",
  "optimizer",
)


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
  if not config.seeds or isinstance(config.seeds, int):
    raise ValueError(f"seeds={config.seeds!r}: expected such as (0, 1, 2)")
  task = tasks.load(config.task)
  # All that can be wrong of a seed is found before the first is trained.
  specs = [finetune.resolve(of_seed(config, s), task) for s in config.seeds]
  funnels = (TRAINED, *config.eval_funnels)
  own, sizes = specs[0].stages, specs[0].model_config
  _resolve(funnels, own, sizes.num_layers, specs[0].task.head.per_token)
  measured = []
  for spec in specs:
    result = trainer.train(spec)
    if not result.finished:
      return None
    measured.append(
      measure(
        result.model,
        task,
        "test",
        spec.task.rows["test"],
        funnels,
        batch_size=spec.batch_size,
        length=spec.length,
      )
    )
  rows = _over_seeds(task, measured)
  if jax.process_index() == 0:
    _report(
      config.workdir,
      "task",
      rows,
      task,
      f"{task.name}: test split",
      settings={"config": config.to_dict()},
      length=specs[0].length,
    )
  return rows


def of_seed(config: ml_collections.ConfigDict, seed: int):
  """The configuration of the run of one seed."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = seed
    config.workdir = os.path.join(config.workdir, f"seed_{seed}")
    del config.seeds, config.eval_funnels
  return config


def measure(
  encoder: Encoder,
  task: Task,
  split: str,
  rows: Sequence[encode.Row],
  funnels: Sequence[str],
  *,
  batch_size: int,
  length: int,
) -> list[Row]:
  """Metrics of an encoder on a task, with each of several funnels.

  Args:
    encoder: with its own funnel, which "trained" names.
    task: that its head is of.
    split: of the task.
    rows: of that split, from `encode.encode`.
    funnels: configurations or strings.
    batch_size: rows at a time.
    length: tokens of a row at most.

  Returns:
    A row for each funnel: the task's metrics, `funnel`, `resolved`,
    `num_examples`, and `ideal_reduction`, the share of the trunk's FLOPs that
    the funnel saves at `length` tokens.

  Raises:
    ValueError: a funnel that is malformed, does not fit, or does not recover
      under a head that needs it.
  """
  model = encoder.model
  named = _resolve(
    funnels,
    model.stages,
    model.config.num_layers,
    encoder.head.config.per_token,
  )
  measured = []
  for name, stages in named.items():
    print(f"task {task.name}: {name}", flush=True)
    found = finetune.measure(
      encoder.with_funnel(stages),
      task,
      split,
      rows,
      batch_size=batch_size,
      length=length,
    )
    measured.append(
      {
        "funnel": name,
        "resolved": format_funnel(stages),
        **found,
        "num_examples": len(task.splits[split]),
        "ideal_reduction": flops.ideal_reduction(
          model.config, stages, 1, length, head=False, causal=encoder.causal
        ),
      }
    )
  return measured


def _resolve(funnels, own, num_layers: int, per_token: bool):
  named = funnels_lib.resolve(funnels, num_layers, {TRAINED: own})
  if per_token:
    for stages in named.values():
      check_recovers(stages, "a label for every token")
  return named


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


def _report(
  out: str,
  name: str,
  rows: Sequence[Row],
  task: Task,
  title: str,
  *,
  settings: dict[str, Any],
  length: int,
) -> None:
  columns = [
    report.Column("funnel", "funnel"),
    report.Column("resolved", "in full"),
    *(report.Column(name, f"{name} %", ".2f", 100) for name in task.metrics),
    report.Column("spread", f"deviation of {task.metrics[0]} %", ".2f", 100),
    report.Column("seeds", "seeds", "d"),
    report.Column("ideal_reduction", "FLOPs saved %", ".1f", 100),
  ]
  counts = ", ".join(f"{len(task.splits[s])} {s}" for s in task.splits)
  skipped = sum(task.skipped.values())
  report.write(
    out,
    name,
    rows,
    columns,
    title,
    plots.task,
    settings=settings,
    notes=[
      f"{counts} examples, {skipped} malformed rows left out. FLOPs of the "
      f"trunk at {length} tokens."
    ],
  )


def find_runs(path: str | None) -> list[str]:
  """The fine-tuned runs at `path`: itself, or its folders seed_N; or none."""
  if path is None:
    return []
  folder = pathlib.Path(path)
  if (folder / finetune.HEAD_FILE).is_file():
    return [str(folder)]
  number = lambda p: int(p.parent.name.removeprefix("seed_"))
  found = [
    p
    for p in folder.glob(f"seed_*/{finetune.HEAD_FILE}")
    if re.fullmatch(r"seed_\d+", p.parent.name)
  ]
  return [str(p.parent) for p in sorted(found, key=number)]


def evaluate(config: Any, settings: Settings) -> list[Row]:
  """Measures the runs of `find_runs` on their task, or on another with the
  same labels, and writes the table that `run` writes, as TASK.json, .md, .png.

  Args:
    config: as in configs/eval_task.py.
    settings: of which `split` and `max_examples` count.

  Returns:
    As `run`.

  Raises:
    ValueError: a key that a head has no use for; seeds that are not of one
      configuration; a task whose labels, or their kind, are not the runs'.
  """
  _check_unused(config, settings)
  loaded = _load(find_runs(config.checkpoint))
  first, labels, trained = loaded[0]
  length = trained.length
  _resolve(
    config.funnels,
    first.model.stages,
    first.model.config.num_layers,
    first.head.config.per_token,
  )
  task = _read_task(config, trained, settings)
  _check_labels(task, labels, first.head.config, config.checkpoint)
  tokenizer = tokenizer_lib.find_tokenizer(
    trained.tokenizer, "", first.model.config.vocab_size
  )
  encoded = encode.encode(
    task, task.splits[settings.split], tokenizer, length, trained.long
  )
  measured = [
    measure(
      encoder,
      task,
      settings.split,
      encoded,
      config.funnels,
      batch_size=config.batch_size or trained.batch_size,
      length=length,
    )
    for encoder, _, _ in loaded
  ]
  rows = _over_seeds(task, measured)
  title = f"{task.name}: {config.checkpoint}, {settings.split} split"
  _report(
    config.out or subject_lib.folder(config.checkpoint),
    re.sub(r"[^\w.-]", "_", task.name),
    rows,
    task,
    title,
    length=length,
    settings={"config": config.to_dict(), "trained": trained.to_dict()},
  )
  return rows


def _load(folders: Sequence[str]):
  """What `finetune.load` gives of each of them, all of one configuration."""
  loaded = []
  for folder in folders:
    encoder, labels, trained = finetune.load(folder)
    loaded.append((_on_this_device(encoder), labels, trained))
    _check_same(folders[0], loaded[0][2], folder, trained)
  return loaded


def _on_this_device(encoder: Encoder) -> Encoder:
  model = subject_lib.on_this_device(encoder.model)
  return Encoder(model, encoder.head, causal=encoder.causal)


def _check_unused(config: Any, settings: Settings) -> None:
  for key in ("tokenizer", "dtype"):
    if config[key] is not None:
      raise ValueError(
        f"{key}={config[key]!r}: expected none, {config.checkpoint} is a "
        "fine-tuned run with its own"
      )
  for field in dataclasses.fields(Settings):
    value = getattr(settings, field.name)
    if field.name not in _USED and value != field.default:
      raise ValueError(
        f"{field.name}={value!r}: expected {field.default!r}, it is of tasks "
        f"without a head, and {config.checkpoint} is a fine-tuned run"
      )


def _check_same(first: str, one, folder: str, other) -> None:
  for key in _COMMON:
    if one[key] != other[key]:
      raise ValueError(
        f"{folder} has not the {key} of {first}: expected seeds of one "
        "configuration; name one of the folders instead"
      )


def _read_task(config: Any, trained: Any, settings: Settings) -> Task:
  """The task that `config` names, or the run's; cut to `max_examples`."""
  given, default = config.task, tasks.default_config()
  changed = [key for key in default if given[key] != default[key]]
  named = {"train", "dev", "test", "dataset", "format"}.intersection(changed)
  if changed and not named:
    raise ValueError(
      f"task.{changed[0]}={given[changed[0]]!r} without a file, a data set or "
      "a format: expected these too, or none of task, which is the run's own"
    )
  task = tasks.load(given if named else trained.task)
  examples = task.splits.get(settings.split)
  if not examples:
    raise ValueError(
      f"task {task.name} has no examples in split={settings.split!r}"
    )
  cut = {settings.split: examples[: settings.max_examples]}
  return dataclasses.replace(task, splits={**task.splits, **cut})


def _check_labels(task: Task, labels, head, path: str) -> None:
  if task.kind not in ENCODER_KINDS or head.per_token != (
    task.kind == "tagging"
  ):
    wanted = "tagging" if head.per_token else "classification or regression"
    raise ValueError(
      f"task {task.name} is of kind {task.kind!r}: expected {wanted}, which "
      f"{path} is fine-tuned for"
    )
  if task.labels == labels:
    return
  more = [x for x in task.labels if x not in labels]
  less = [x for x in labels if x not in task.labels]
  said = (
    f"has {more} more and lacks {less}"
    if more or less
    else (f"has them as {list(task.labels)}")
  )
  raise ValueError(
    f"the labels of task {task.name} are not those of {path}: expected "
    f"{list(labels)}, it {said}"
  )
