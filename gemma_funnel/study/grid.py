"""What a study is made of: its cells, and the trainings that they share."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from typing import Any

import ml_collections

from gemma_funnel import flops, tasks
from gemma_funnel.config import (
  OFF,
  FunnelConfig,
  TransformerConfig,
  check_recovers,
  resolve_funnel,
)
from gemma_funnel.tasks.task import GENERATIVE_KINDS, Task
from gemma_funnel.training import finetune, metric_writer, optimizer, pretrain

# Without a funnel; with the cell's own, from the first step or from a later
# one; with any of the study's, drawn for each step; and without, and then
# distilled into the cell's own.
PRETRAININGS = ("standard", "aware", "switched", "sampled", "distilled")
_FUNNELLED = ("aware", "switched", "distilled")
SWITCH = ("off", "on")
# "sampled": each step draws one of the study's funnels, or none, and what comes
# of it is measured with all of them.
FINETUNINGS = (*SWITCH, "sampled")
FUNNEL_AXES = ("start", "stop", "stride", "pool", "recover")
AXES = (
  "model",
  "pretraining",
  "finetuning",
  "inference",
  *FUNNEL_AXES,
  "task",
  "seed",
)
# Keys of a training that the study sets itself.
_PRETRAIN_SET = (
  "workdir",
  "model",
  "init_from",
  "objective",
  "funnel",
  "funnel_from",
  "funnel_sampled",
  "latency",
)
_FINETUNE_SET = (
  "workdir",
  "seeds",
  "model",
  "init_from",
  "tokenizer",
  "task",
  "funnel",
  "funnel_from",
  "funnel_sampled",
  "eval_funnels",
)


def training_keys(
  config: ml_collections.ConfigDict, kind: str
) -> ml_collections.ConfigDict:
  """A training's configuration without what a study sets itself.

  Args:
    config: of configs/quickstart.py or configs/finetune.py.
    kind: "pretrain" or "finetune".
  """
  for key in _PRETRAIN_SET if kind == "pretrain" else _FINETUNE_SET:
    del config[key]
  return config


def _hash(*parts: Any) -> str:
  text = json.dumps(parts, sort_keys=True, default=str)
  return hashlib.sha1(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Pretraining:
  """A model trained on text.

  Attributes:
    model: its name.
    kind: one of PRETRAININGS.
    funnel: that it is trained with, "off" for none; of "sampled", all that are.
    hash: of all that determines it.
  """

  model: str
  kind: str
  funnel: str
  hash: str

  def config(self, study: Any, folder: str) -> ml_collections.ConfigDict:
    """The configuration of `pretrain.train`; `init_from` is left open."""
    return _pretrain_config(study, self.model, self.kind, self.funnel, folder)


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A pretrained model fine-tuned on a task.

  `funnel` is what it has then: one, "off", or "sampled".
  """

  task: str
  funnel: str
  seed: int


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number of the study.

  Attributes:
    pretraining: what it starts from.
    finetuning: one of FINETUNINGS; None for a task without it.
    inference: whether the funnel is on when it is measured.
    funnel: the cell's, as its axes say; None where nothing is funnelled.
    tuning: the fine-tuning; None for a task without it.
    hash: of all that determines it.
  """

  pretraining: Pretraining
  finetuning: str | None
  inference: str
  funnel: FunnelConfig | None
  task: str
  task_kind: str
  seed: int
  tuning: Tuning | None
  hash: str

  @property
  def measured_with(self) -> str:
    on = self.inference == "on" and self.funnel is not None
    return str(self.funnel) if on else OFF

  def to_dict(self) -> dict[str, Any]:
    """The axes, as a line of results has them."""
    axes = {
      name: self.funnel and getattr(self.funnel, name) for name in FUNNEL_AXES
    }
    return {
      "hash": self.hash,
      "model": self.pretraining.model,
      "pretraining": self.pretraining.kind,
      "finetuning": self.finetuning,
      "inference": self.inference,
      "funnel": str(self.funnel) if self.funnel else OFF,
      **axes,
      "task": self.task,
      "task_kind": self.task_kind,
      "seed": self.seed,
    }


def make(study: ml_collections.ConfigDict) -> "Plan":
  """Reads the tasks of a study, and lays out its cells.

  Raises:
    ValueError: an axis, a funnel, a task or a training that cannot be.
  """
  _check(study)
  read = {name: _read_task(study, name) for name in study.axes.task}
  excluded = [_parse_exclusion(text, _known(study)) for text in study.exclude]
  cells = {}
  for values in itertools.product(*(study.axes[axis] for axis in AXES)):
    axes = dict(zip(AXES, values, strict=True))
    if read[axes["task"]].kind in GENERATIVE_KINDS:
      axes["finetuning"] = None
    if any(all(axes[k] == v for k, v in x.items()) for x in excluded):
      continue
    cell = _make_cell(study, axes, read[axes["task"]])
    cells.setdefault(cell.hash, cell)
  if not cells:
    raise ValueError("the study has no cells: exclude leaves nothing")
  plan = Plan(study, read, tuple(cells.values()))
  for pretraining in plan.pretrainings:
    config = pretraining.config(study, "")
    if pretraining.kind == "distilled":
      # Its teacher is yet to be trained: that, and all else, can be checked.
      pretrain.make_setup(plan.teacher(pretraining).config(study, ""))
      config.objective = "next_token"
    pretrain.make_setup(config)
  for tuning in {
    c.tuning.task: c.tuning for c in plan.cells if c.tuning
  }.values():
    _check_tuning(plan, tuning)
  return plan


def _check_tuning(plan: "Plan", tuning: Tuning) -> None:
  """Raises on a fine-tuning's schedule that cannot be, as far as is known."""
  config = plan.finetune_config(plan.pretrainings[0], tuning)
  rows = len(plan.tasks[tuning.task].splits["train"])
  try:
    steps = finetune.num_steps(config, rows)
    optimizer.make_optimizer(config.optimizer, steps)
  except ValueError as error:
    raise ValueError(f"tasks.{tuning.task}: {error}") from error


def _check(study: Any) -> None:
  for axis in AXES:
    values = study.axes.get(axis)
    if isinstance(values, str) or not values:
      raise ValueError(
        f"axes.{axis}={values!r}: expected a tuple of one value at least"
      )
    known = _known(study).get(axis, values)
    for value in values:
      if value not in known:
        raise ValueError(
          f"axes.{axis}: found {value!r}, expected some of {list(known)}"
        )
  for seed in study.axes.seed:
    if not isinstance(seed, int) or seed < 0:
      raise ValueError(f"axes.seed: found {seed!r}, expected integers >= 0")
  for name in study.axes.task:
    tuned = study.finetune.copy_and_resolve_references().lock()
    try:
      tuned.update(study.tasks[name].tune)
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f"tasks.{name}.tune: {error}; expected keys of finetune"
      ) from error


def _known(study: Any) -> dict[str, tuple[str, ...]]:
  """What some axes may hold."""
  return {
    "model": tuple(study.models),
    "task": tuple(study.tasks),
    "pretraining": PRETRAININGS,
    "finetuning": FINETUNINGS,
    "inference": SWITCH,
  }


def _parse_exclusion(
  text: str, known: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
  """{"pretraining": "aware", ..} of "pretraining=aware,finetuning=off"."""
  found = {}
  for item in text.split(","):
    key, equals, value = (part.strip() for part in item.partition("="))
    if not equals or key not in AXES:
      raise ValueError(
        f"exclude: {text!r}: expected such as 'pretraining=aware,inference="
        f"off', of the axes {list(AXES)}"
      )
    if value not in known.get(key, (value,)):
      raise ValueError(f"exclude: {text!r}: {key} is one of {list(known[key])}")
    found[key] = int(value) if value.lstrip("-").isdigit() else value
    if (key, value) == ("stop", "None"):
      found[key] = None
  return found


def _read_task(study: Any, name: str) -> Task:
  try:
    task = tasks.load(study.tasks[name].task)
    if task.kind not in GENERATIVE_KINDS:
      finetune.check_task(task)
  except ValueError as error:
    raise ValueError(f"tasks.{name}: {error}") from error
  return task


def _make_cell(study: Any, axes: Mapping[str, Any], task: Task) -> Cell:
  """The cell of some axes; those that make no difference to it are dropped."""
  depth = study.models[axes["model"]].num_layers
  funnel = FunnelConfig(**{name: axes[name] for name in FUNNEL_AXES})
  (funnel,) = resolve_funnel(funnel, depth)
  if task.kind not in ("classification", "regression"):
    check_recovers((funnel,), f"task {axes['task']}")
  finetuning, seed = axes["finetuning"], axes["seed"]
  if task.kind in GENERATIVE_KINDS:
    seed = study.pretrain.seed
  kind = axes["pretraining"]
  if kind not in _FUNNELLED and "on" not in (finetuning, axes["inference"]):
    funnel = None
  pretraining = _make_pretraining(study, axes["model"], kind, funnel)
  tuning = None
  if finetuning is not None:
    own = {"on": str(funnel), "off": OFF}.get(finetuning, finetuning)
    tuning = Tuning(axes["task"], own, seed)
  settings = [study.finetune.to_dict(), study.generative.to_dict()]
  if tuning and tuning.funnel == "sampled":
    settings.append(sampled_funnels(study, axes["model"]))
  hash_ = _hash(
    pretraining.hash,
    tuning and dataclasses.astuple(tuning),
    axes["task"],
    study.tasks[axes["task"]].to_dict(),
    axes["inference"],
    str(funnel),
    seed,
    settings,
    study.latency.to_dict(),
  )
  return Cell(
    pretraining,
    finetuning,
    axes["inference"],
    funnel,
    axes["task"],
    task.kind,
    seed,
    tuning,
    hash_,
  )


def _make_pretraining(study, model: str, kind: str, funnel) -> Pretraining:
  name = str(funnel) if kind in _FUNNELLED else OFF
  config = _pretrain_config(study, model, kind, name, "")
  return Pretraining(
    model, kind, name, _pretrain_hash(study, model, kind, config)
  )


def _pretrain_hash(study, model: str, kind: str, config: Any) -> str:
  """Of all that determines a pretraining; of a teacher's too."""
  teacher = kind == "distilled" and _pretrain_config(
    study, model, "standard", OFF, ""
  )
  return _hash(kind, config.to_dict(), teacher and teacher.to_dict())


def _pretrain_config(study, model: str, kind: str, funnel: str, folder: str):
  config = study.pretrain.copy_and_resolve_references()
  with config.unlocked():
    config.model = study.models[model].copy_and_resolve_references()
    config.init_from = ml_collections.config_dict.placeholder(str)
    config.objective = "next_token"
    config.funnel, config.funnel_from, config.funnel_sampled = funnel, 0, ()
    if kind == "sampled":
      config.funnel_sampled = (OFF, *sampled_funnels(study, model))
    if kind == "switched":
      config.funnel_from = study.switch_step
    config.latency = dict(repeats=0, batch_size=1, length=1)
    if kind == "distilled":
      config.objective = "distill"
      config.steps = study.distill_steps
    config.workdir = ""
  if folder:
    config.workdir = os.path.join(
      folder, "pretrain", f"{kind}-{_pretrain_hash(study, model, kind, config)}"
    )
  return config


def tokenizer_path(folder: str, vocab_size: int) -> str:
  """Where a study keeps the tokenizer that it trains."""
  return os.path.join(folder, f"tokenizer_{vocab_size}", "tokenizer.model")


def sampled_funnels(study: Any, model: str) -> tuple[str, ...]:
  """All funnels of the study's axes."""
  depth = study.models[model].num_layers
  found = {}
  for values in itertools.product(*(study.axes[a] for a in FUNNEL_AXES)):
    funnel = FunnelConfig(**dict(zip(FUNNEL_AXES, values, strict=True)))
    found[str(resolve_funnel(funnel, depth)[0])] = None
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A study's cells, in the order in which they are run."""

  study: ml_collections.ConfigDict
  tasks: Mapping[str, Task]
  cells: tuple[Cell, ...]

  @functools.cached_property
  def pretrainings(self) -> tuple[Pretraining, ...]:
    """Each once; the ones that others start from are first."""
    found = dict.fromkeys(cell.pretraining for cell in self.cells)
    return tuple(sorted(found, key=lambda p: PRETRAININGS.index(p.kind)))

  def teacher(self, pretraining: Pretraining) -> Pretraining:
    """What a distilled one starts from."""
    return _make_pretraining(self.study, pretraining.model, "standard", None)

  def by_pretraining(
    self,
  ) -> Iterator[tuple[Pretraining, list[Cell], dict[Tuning, list[Cell]]]]:
    """(pretraining, cells without a fine-tuning, the others by theirs)."""
    for pretraining in self.pretrainings:
      own = [c for c in self.cells if c.pretraining == pretraining]
      tunings: dict[Tuning, list[Cell]] = {}
      for cell in own:
        if cell.tuning:
          tunings.setdefault(cell.tuning, []).append(cell)
      yield pretraining, [c for c in own if not c.tuning], tunings

  def funnels(self) -> dict[str, tuple[str, ...]]:
    """What cells of each model are measured with, "off" too."""
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
    """The configuration of `finetune.make_setup` for one fine-tuning."""
    study = self.study
    config = study.finetune.copy_and_resolve_references()
    with config.unlocked():
      config.update(study.tasks[tuning.task].tune)
      config.task = study.tasks[tuning.task].task
      config.model = study.models[pretraining.model]
      config.init_from = checkpoint
      config.tokenizer = ml_collections.config_dict.placeholder(str)
      config.funnel, config.funnel_from = tuning.funnel, 0
      config.funnel_sampled = ()
      if tuning.funnel == "sampled":
        config.funnel = OFF
        config.funnel_sampled = (
          OFF,
          *sampled_funnels(study, pretraining.model),
        )
      config.seed, config.workdir = tuning.seed, workdir
    return config

  def work(
    self, done: Iterable[str] = (), trained: Iterable[Pretraining] = ()
  ) -> float:
    """FLOPs of training that is left.

    Args:
      done: hashes of cells that have a result.
      trained: pretrainings that are there.
    """
    total, done = 0.0, set(done)
    for pretraining, cells, tunings in self.by_pretraining():
      left = {t: own for t, own in tunings.items() if _left(own, done)}
      if pretraining not in trained and (left or _left(cells, done)):
        total += self._pretraining_work(pretraining)
      total += sum(self._tuning_work(pretraining, t) for t in left)
    return total

  def _pretraining_work(self, pretraining: Pretraining) -> float:
    config = pretraining.config(self.study, "")
    model = TransformerConfig.from_dict(config.model)
    funnel = pretraining.funnel
    each = flops.forward(model, funnel, config.batch_size, config.length)
    if pretraining.kind == "distilled":
      each *= 4 / 3
    return 3.0 * each * config.steps

  def _tuning_work(self, pretraining: Pretraining, tuning: Tuning) -> float:
    config = self.finetune_config(pretraining, tuning)
    model = TransformerConfig.from_dict(self.study.models[pretraining.model])
    rows = len(self.tasks[tuning.task].splits["train"]) * config.epochs
    # Rows are shorter than the limit; how much is the tokenizer's to say.
    length = max(1, config.length // 2)
    # Sampled ones are counted as the longest of them.
    funnel = OFF if tuning.funnel == "sampled" else tuning.funnel
    each = flops.forward(model, funnel, 1, length, head=False, causal=False)
    return 3.0 * rows * each

  def describe(self, done: set[str], rate: float, overhead: float = 6.0) -> str:
    """What will be run, and about how long it takes.

    Args:
      done: hashes of cells that have a result.
      rate: FLOP/s of training.
      overhead: seconds of compiling and measuring of each training.
    """
    lines, total = [], 0.0
    for pretraining, cells, tunings in self.by_pretraining():
      own = [*cells, *itertools.chain(*tunings.values())]
      left = {t: c for t, c in tunings.items() if _left(c, done)}
      seconds = 0.0
      if _left(own, done):
        seconds = self._pretraining_work(pretraining) / rate + overhead
      for tuning in left:
        seconds += self._tuning_work(pretraining, tuning) / rate + overhead
      total += seconds
      lines.append(
        f"  {pretraining.model} {pretraining.kind} {pretraining.funnel}: "
        f"{len(left)} fine-tunings, {len(_left(own, done))} cells, about "
        f"{metric_writer.duration(seconds)}"
      )
    left = len(_left(self.cells, done))
    return "\n".join(
      [
        f"{len(self.cells)} cells, {left} to be measured, from "
        f"{len(self.pretrainings)} pretrainings:",
        *lines,
        f"in all about {metric_writer.duration(total)}, by {rate:.2g} FLOP/s here",
      ]
    )


def _left(cells: Iterable[Cell], done: set[str]) -> list[Cell]:
  return [cell for cell in cells if cell.hash not in done]
