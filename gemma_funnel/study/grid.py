"""The grid of a study: its cells, and the trainings that they share."""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from gemma_funnel import flops, tasks
from gemma_funnel.checks import (
  require,
  require_bool,
  require_choice,
  require_int,
)
from gemma_funnel.config import (
  OFF,
  FunnelConfig,
  TransformerConfig,
  check_recovers,
  check_reducers,
  resolve_funnel,
)
from gemma_funnel.data import pipeline
from gemma_funnel.inputs import fingerprint
from gemma_funnel.registry import RECOVERIES, REDUCERS
from gemma_funnel.tasks.task import GENERATIVE_KINDS, Task
from gemma_funnel.training import finetune, metric_writer, optimizer, pretrain

# Without a funnel; with the cell's own, from the first step or from a later
# one; with any of the study's, drawn for each step; and without, and then
# distilled into the cell's own.
PRETRAININGS = ("standard", "aware", "switched", "sampled", "distilled")
_FUNNELLED = ("aware", "switched", "distilled")
# "sampled": each step draws one of the study's funnels, or none; the result is
# measured with all of them.
FINETUNINGS = ("off", "on", "sampled")
INFERENCES = ("off", "on")
FUNNEL_AXES = ("start", "stop", "stride", "reduce", "recover")
_TRAINING_AXES = ("model", "pretraining", "finetuning", "inference")
AXES = (*_TRAINING_AXES, *FUNNEL_AXES, "task", "seed")
_KEYS = (
  *("workdir", "title", "axes", "exclude", "models", "tasks", "pretrain"),
  *("switch_step", "distill_steps", "finetune", "generative", "latency"),
  *("similarity", "keep_finetuned", "retry", "dry_run"),
)
# Integers, and the least that each may be.
_COUNTS = {
  "switch_step": 0,
  "distill_steps": 1,
  "generative.batch_size": 1,
  "generative.few_shot": 0,
  "generative.max_new_tokens": 1,
  "latency.batch_size": 1,
  "latency.length": 1,
  "latency.repeats": 0,
  "similarity.rows": 0,
  "similarity.length": 1,
}
# Keys of a training that the study sets itself.
_SHARED_KEYS = (
  *("workdir", "model", "init_from"),
  *("funnel", "funnel_from", "funnel_sampled"),
  # What has changed is another training here: see `Grid.inputs`.
  "accept_changed",
)
_STUDY_KEYS = {
  "pretrain": (*_SHARED_KEYS, "objective", "latency"),
  "finetune": (*_SHARED_KEYS, "seeds", "tokenizer", "task", "eval_funnels"),
}


def training_keys(
  config: ml_collections.ConfigDict, kind: str
) -> ml_collections.ConfigDict:
  """A training's configuration without what a study sets itself.

  Args:
    config: of configs/quickstart.py or configs/finetune.py.
    kind: "pretrain" or "finetune".
  """
  for key in {*_STUDY_KEYS[kind]} & {*config}:
    del config[key]
  return config


def hash_of(*parts: Any) -> str:
  """12 hexadecimal digits that tell values of JSON apart."""
  text = json.dumps(parts, sort_keys=True, default=str)
  return hashlib.sha1(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Pretraining:
  """A model trained on text."""

  model: str  # Its name.
  kind: str  # One of PRETRAININGS.
  funnel: str  # That it is trained with; "off" for none, and for "sampled".
  hash: str  # Of all that determines it.

  def config(self, study: Any, folder: str) -> ml_collections.ConfigDict:
    """The configuration of `pretrain.resolve`; `init_from` is left open."""
    config = _pretrain_config(study, self.model, self.kind, self.funnel)
    if folder:
      name = f"{self.kind}-{self.hash}"
      config.workdir = os.path.join(folder, "pretrain", name)
    return config


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A fine-tuning of a pretrained model."""

  task: str
  funnel: str  # That it is tuned with, "off", or "sampled".
  seed: int


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number of the study."""

  pretraining: Pretraining
  tuning: Tuning | None  # None for a task without fine-tuning.
  measured_with: str  # The funnel at inference, or "off".
  axes: Mapping[str, Any]  # And the funnel and the hash: a line of results.
  hash: str  # Of all that determines it.

  @property
  def task(self) -> str:
    return self.axes["task"]


def funnel_axes(funnel: FunnelConfig | None) -> dict[str, Any]:
  """A funnel in a line of results: its string, and the value of each axis."""
  axes = {name: funnel and getattr(funnel, name) for name in FUNNEL_AXES}
  if funnel and not _has_stride(funnel.reduce):
    axes["stride"] = None
  return {"funnel": str(funnel) if funnel else OFF, **axes}


def _has_stride(reducer: str) -> bool:
  return "stride" in REDUCERS.find(reducer).options


class Branch(NamedTuple):
  """A pretraining and its cells: without fine-tuning, and by fine-tuning."""

  pretraining: Pretraining
  generative: list[Cell]
  tunings: dict[Tuning, list[Cell]]

  @property
  def cells(self) -> list[Cell]:
    return [*self.generative, *itertools.chain(*self.tunings.values())]

  def left(self, done: Collection[str]) -> "Branch":
    """The branch of the cells whose hash is not in `done`."""
    left = lambda cells: [cell for cell in cells if cell.hash not in done]
    tunings = {t: left(cells) for t, cells in self.tunings.items()}
    tunings = {t: cells for t, cells in tunings.items() if cells}
    return Branch(self.pretraining, left(self.generative), tunings)


def make(study: ml_collections.ConfigDict) -> "Grid":
  """Reads the tasks of a study, and lays out its cells.

  Raises:
    ValueError: an axis, a funnel, a task or a training that cannot be.
  """
  excluded = _check(study)
  read = {name: _load_task(study, name) for name in study.axes.task}
  # Of a task, what is measured, wherever it comes from.
  inputs = {f"task {name}": hash_of(repr(task)) for name, task in read.items()}
  inputs["text"] = hash_of_text(study.pretrain.data)
  cells = {}
  for values in itertools.product(*(study.axes[axis] for axis in AXES)):
    axes = dict(zip(AXES, values, strict=True))
    kind = read[axes["task"]].kind
    if kind in GENERATIVE_KINDS:
      axes["finetuning"] = None
    if not any(exclusion.items() <= axes.items() for exclusion in excluded):
      cell = _make_cell(study, inputs, axes, kind)
      cells.setdefault(cell.hash, cell)
  require(bool(cells), "the study has no cells: exclude leaves nothing")
  made = Grid(study, read, inputs, tuple(cells.values()))
  for pretraining in made.pretrainings:
    config = pretraining.config(study, "")
    if pretraining.kind == "distilled":
      # Its teacher is yet to be trained: that, and all else, can be checked.
      pretrain.resolve(made.teacher(pretraining).config(study, ""))
      config.objective = "next_token"
    pretrain.resolve(config)
  return made


def _check(study: Any) -> list[dict[str, Any]]:
  """Checks the keys and axes; returns the values of them to leave out."""
  missing = [key for key in _KEYS if key not in study]
  require(
    not missing,
    f"the configuration of a study lacks {missing}: expected one such as "
    "configs/ablation_quick.py",
  )
  require(
    bool(study.workdir) and "://" not in study.workdir,
    f"workdir={study.workdir!r}: expected a local folder for a study",
  )
  for name, least in _COUNTS.items():
    value = study
    for key in name.split("."):
      value = value[key]
    require_int(name, value, least)
  for name in ("keep_finetuned", "retry", "dry_run"):
    require_bool(name, study[name])
  known = {
    "model": tuple(study.models),
    "task": tuple(study.tasks),
    "pretraining": PRETRAININGS,
    "finetuning": FINETUNINGS,
    "inference": INFERENCES,
    "reduce": tuple(REDUCERS),
    "recover": tuple(RECOVERIES),
  }
  for axis in AXES:
    values = study.axes.get(axis)
    require(
      bool(values) and not isinstance(values, str),
      f"axes.{axis}={values!r}: expected a tuple of one value at least",
    )
    for value in values:
      require_choice(f"axes.{axis}", value, known.get(axis, values))
  for seed in study.axes.seed:
    require_int("axes.seed", seed)
  excluded = []
  for text in study.exclude:  # Such as "pretraining=aware,inference=off".
    found = {}
    for item in text.split(","):
      key, equals, value = (part.strip() for part in item.partition("="))
      require(
        bool(equals) and key in AXES,
        f"exclude: {text!r}: expected such as 'pretraining=aware,"
        f"inference=off', of the axes {list(AXES)}",
      )
      require_choice(
        f"exclude: {text!r}: {key}", value, known.get(key, (value,))
      )
      found[key] = int(value) if value.lstrip("-").isdigit() else value
      if (key, value) == ("stop", "None"):
        found[key] = None
    excluded.append(found)
  return excluded


def hash_of_text(data: Any) -> str:
  """Tells a corpus, and the tokenizer that is given, from what they were."""
  tokenizer = data.tokenizer and fingerprint(data.tokenizer)
  return hash_of(pipeline.fingerprints(data) | {"tokenizer": tokenizer})


def _load_task(study: Any, name: str) -> Task:
  """Reads a task, and checks what it is fine-tuned with."""
  config = study.finetune.copy_and_resolve_references().lock()
  try:
    config.update(study.tasks[name].tune)
  except (AttributeError, KeyError, TypeError) as error:
    text = f"tasks.{name}.tune: {error}; expected keys of finetune"
    raise ValueError(text) from error
  try:
    task = tasks.load(study.tasks[name].task)
    if task.kind not in GENERATIVE_KINDS:
      finetune.check_task(task)
      steps = finetune.num_steps(config, len(task.splits["train"]))
      optimizer.make_optimizer(config.optimizer, steps)
  except ValueError as error:
    raise ValueError(f"tasks.{name}: {error}") from error
  return task


def _make_cell(
  study: Any, inputs: Mapping[str, str], axes: Mapping[str, Any], task_kind: str
) -> Cell:
  """The cell of some axes; an axis that makes no difference is dropped."""
  model, kind, task = axes["model"], axes["pretraining"], axes["task"]
  finetuning, seed = axes["finetuning"], axes["seed"]
  funnel = _resolve(study, model, [axes[name] for name in FUNNEL_AXES])
  tune = study.tasks[task].tune
  if task_kind not in ("classification", "regression"):
    check_recovers((funnel,), f"task {task}")
  if task_kind == "generation":
    check_reducers((funnel,), "decodes", f"task {task}")
  if finetuning and not tune.get("causal", study.finetune.causal):
    check_reducers((funnel,), "bidirectional", f"task {task}, causal=False")
  if task_kind in GENERATIVE_KINDS:
    seed = study.pretrain.seed
  if kind not in _FUNNELLED and "on" not in (finetuning, axes["inference"]):
    funnel = None
  pretraining = _make_pretraining(study, inputs["text"], model, kind, funnel)
  tuning = None
  settings = [study.finetune.to_dict(), study.generative.to_dict()]
  if finetuning is not None:
    own = {"on": str(funnel), "off": OFF}.get(finetuning, finetuning)
    tuning = Tuning(task, own, seed)
    if finetuning == "sampled":
      settings.append(all_funnels(study, model))
  hash_ = hash_of(
    pretraining.hash,
    tuning and dataclasses.astuple(tuning),
    task,
    study.tasks[task].to_dict(),
    inputs[f"task {task}"],
    axes["inference"],
    str(funnel),
    seed,
    settings,
    study.latency.to_dict(),
  )
  about = {"hash": hash_, **axes, **funnel_axes(funnel)}
  about |= {"task_kind": task_kind, "seed": seed}
  on = axes["inference"] == "on" and funnel is not None
  measured_with = str(funnel) if on else OFF
  return Cell(pretraining, tuning, measured_with, about, hash_)


def _resolve(study: Any, model: str, values: Any) -> FunnelConfig:
  """The funnel of these values of FUNNEL_AXES, which can be trained with."""
  axes = dict(zip(FUNNEL_AXES, values, strict=True))
  if not _has_stride(axes["reduce"]):
    del axes["stride"]
  layers = study.models[model].num_layers
  [funnel] = resolve_funnel(FunnelConfig(**axes), layers)
  check_reducers((funnel,), "trains", "a study, which trains with it")
  return funnel


def all_funnels(study: Any, model: str) -> tuple[str, ...]:
  """All funnels of the study's axes."""
  axes = itertools.product(*(study.axes[axis] for axis in FUNNEL_AXES))
  found = (str(_resolve(study, model, values)) for values in axes)
  return tuple(dict.fromkeys(found))


def _make_pretraining(
  study: Any, text: str, model: str, kind: str, funnel: FunnelConfig | None
) -> Pretraining:
  name = str(funnel) if kind in _FUNNELLED else OFF
  config = _pretrain_config(study, model, kind, name).to_dict()
  # A student is another one where its teacher is.
  teacher = kind == "distilled" and _pretrain_config(study, model, "standard")
  hash_ = hash_of(kind, config, text, teacher and teacher.to_dict())
  return Pretraining(model, kind, name, hash_)


def _pretrain_config(study, model: str, kind: str, funnel: str = OFF):
  config = study.pretrain.copy_and_resolve_references()
  with config.unlocked():
    sampled = kind == "sampled"
    _set_shared(config, study, model, "sampled" if sampled else funnel)
    config.init_from = config_dict.placeholder(str)
    config.objective, config.workdir = "next_token", ""
    config.latency = dict(repeats=0, batch_size=1, length=1)
    if kind == "switched":
      config.funnel_from = study.switch_step
    if kind == "distilled":
      config.objective, config.steps = "distill", study.distill_steps
  return config


def _set_shared(config, study, model: str, funnel: str) -> None:
  """Sets a training's model, and its funnel, "off" or "sampled"."""
  config.model = study.models[model].copy_and_resolve_references()
  config.funnel, config.funnel_from, config.funnel_sampled = funnel, 0, ()
  config.accept_changed = False
  if funnel == "sampled":
    config.funnel = OFF
    config.funnel_sampled = (OFF, *all_funnels(study, model))


@dataclasses.dataclass(frozen=True)
class Grid:
  """A study's cells, in the order in which they are run."""

  study: ml_collections.ConfigDict
  tasks: Mapping[str, Task]  # By name, as read.
  # Hashes of the text ("text") and the tasks ("task NAME").
  inputs: Mapping[str, str]
  cells: tuple[Cell, ...]  # All of them, each once.

  @functools.cached_property
  def branches(self) -> tuple[Branch, ...]:
    """The cells by pretraining; those that others start from are first."""
    found = {c.pretraining: Branch(c.pretraining, [], {}) for c in self.cells}
    for cell in self.cells:
      branch, tuning = found[cell.pretraining], cell.tuning
      own = branch.tunings.setdefault(tuning, []) if tuning else None
      (branch.generative if own is None else own).append(cell)
    order = lambda branch: PRETRAININGS.index(branch.pretraining.kind)
    return tuple(sorted(found.values(), key=order))

  @property
  def pretrainings(self) -> tuple[Pretraining, ...]:
    """Each once, in the order of `branches`."""
    return tuple(branch.pretraining for branch in self.branches)

  def teacher(self, pretraining: Pretraining) -> Pretraining:
    """What a distilled one starts from."""
    text, model = self.inputs["text"], pretraining.model
    return _make_pretraining(self.study, text, model, "standard", None)

  def funnels(self) -> dict[str, tuple[str, ...]]:
    """Funnels that cells of each model are measured with, and "off"."""
    found: dict[str, dict[str, None]] = {}
    for cell in self.cells:
      named = found.setdefault(cell.pretraining.model, {OFF: None})
      named[cell.measured_with] = None
    return {model: tuple(named) for model, named in found.items()}

  def finetune_config(
    self,
    pretraining: Pretraining,
    tuning: Tuning,
    checkpoint: str = "",
    workdir: str = "",
  ) -> ml_collections.ConfigDict:
    """The configuration of `finetune.resolve` for one fine-tuning."""
    config = self.study.finetune.copy_and_resolve_references()
    with config.unlocked():
      config.update(self.study.tasks[tuning.task].tune)
      _set_shared(config, self.study, pretraining.model, tuning.funnel)
      config.task = self.study.tasks[tuning.task].task
      config.init_from, config.workdir = checkpoint, workdir
      config.tokenizer = config_dict.placeholder(str)
      config.seed = tuning.seed
    return config

  def work(
    self, done: Collection[str] = (), trained: Collection[Pretraining] = ()
  ) -> float:
    """FLOPs of training that is left.

    Args:
      done: hashes of cells that have a result.
      trained: pretrainings that are there.
    """
    left = (branch.left(done) for branch in self.branches)
    return sum(sum(self._work_of(branch, trained)) for branch in left)

  def _work_of(self, branch: Branch, trained=()) -> list[float]:
    """FLOPs of each training of a branch."""
    first, found = branch.pretraining, []
    model = TransformerConfig.from_dict(self.study.models[first.model])
    if branch.cells and first not in trained:
      config = first.config(self.study, "")
      shape = config.batch_size, config.length
      # A teacher's forward pass besides.
      passes = 4.0 if first.kind == "distilled" else 3.0
      each = flops.forward(model, first.funnel, *shape)
      found.append(passes * each * config.steps)
    for tuning in branch.tunings:
      config = self.finetune_config(first, tuning)
      rows = len(self.tasks[tuning.task].splits["train"]) * config.epochs
      # Rows are shorter than the limit; how much is the tokenizer's to say.
      length = max(1, config.length // 2)
      # Sampled ones are counted as the longest of them, which has none.
      shape = dict(batch=1, length=length, head=False, causal=False)
      found.append(3.0 * rows * flops.forward(model, config.funnel, **shape))
    return found

  def describe(
    self, done: set[str], rate: float, overhead: float = 6.0
  ) -> list[str]:
    """Lines on what will be run, and about how long it takes.

    Args:
      done: hashes of cells that have a result.
      rate: FLOP/s of training.
      overhead: seconds of compiling and measuring of each training.
    """
    lines, total = [], 0.0
    for branch in self.branches:
      branch, first = branch.left(done), branch.pretraining
      work = self._work_of(branch)
      seconds = sum(work) / rate + overhead * len(work)
      total += seconds
      lines.append(
        f"  {first.model} {first.kind} {first.funnel}: "
        f"{len(branch.tunings)} fine-tunings, {len(branch.cells)} cells, about "
        f"{metric_writer.duration(seconds)}"
      )
    left = sum(cell.hash not in done for cell in self.cells)
    return [
      f"{len(self.cells)} cells, {left} to be measured, from {len(lines)} "
      "pretrainings:",
      *lines,
      f"in all about {metric_writer.duration(total)}, by {rate:.2g} FLOP/s here",
    ]
