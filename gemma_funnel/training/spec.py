"""A run, resolved once: its configuration as frozen, checked, typed values.

`pretrain.resolve` and `finetune.resolve` make a `RunSpec`; `trainer.train` runs
it. Nothing below reads a ConfigDict, parses a funnel or opens `init_from` anew.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import typing
from typing import Any

from flax import nnx
import jax
import ml_collections
from ml_collections import config_dict
import optax

from gemma_funnel import checks, convert
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.mesh import ROWS
from gemma_funnel.training import optimizer as optimizer_lib
from gemma_funnel.training import schedules

# A run that starts from a checkpoint sets these itself; sizes are the
# checkpoint's.
RUNTIME = (
  "param_dtype",
  "dtype",
  "softmax_dtype",
  "kernel",
  "scan_layers",
  "remat",
)

# Held-out metrics of a model; "loss" ranks checkpoints.
Evaluate = Callable[[nnx.Module], dict[str, float | None]]


@dataclasses.dataclass(frozen=True)
class RollbackSpec:
  """Return to the last checkpoint after a spike of the loss.

  Attributes:
    factor: a spike is so many times the median of the last losses; None never
      returns.
    window: losses that the median is of.
    most: rollbacks of a run.
  """

  factor: float | None = None
  window: int = 100
  most: int = 3

  def __post_init__(self):
    if self.factor is not None:
      ok = checks.is_number(self.factor) and self.factor > 1
      checks.require(ok, f"rollback.factor={self.factor}: expected > 1")
    checks.require_int("rollback.window", self.window, 1)
    checks.require_int("rollback.most", self.most, 1)


@dataclasses.dataclass(frozen=True)
class LoopSpec:
  """How a run steps, reports and saves, whatever it trains.

  Attributes:
    accumulate: parts of a batch that are computed one after the other.
    log_every: steps between lines of progress.
    eval_every: steps between evaluations.
    checkpoint_every: steps between checkpoints.
    checkpoint_minutes: minutes between checkpoints besides; None is never.
    keep: newest checkpoints that are kept.
    keep_best: checkpoints of least held-out loss that are kept besides.
    keep_period: checkpoints at its multiples are kept besides.
    on_nonfinite: "stop" at a loss or gradient that is not finite, or "skip"
      the step.
    max_skipped: steps skipped in a row at most.
    rollback: what follows a spike of the loss.
    watchdog_minutes: silence after which the process ends; None never does.
      It has to be longer than a compilation.
    tensorboard: whether TensorBoard's files are written.
    wandb: project on Weights & Biases; None is none.
    profile_steps: first and last step of a trace; () is none.
  """

  accumulate: int = 1
  log_every: int = 20
  eval_every: int = 100
  checkpoint_every: int = 100
  checkpoint_minutes: float | None = None
  keep: int = 2
  keep_best: int = 0
  keep_period: int | None = None
  on_nonfinite: str = "stop"
  max_skipped: int = 10
  rollback: RollbackSpec = RollbackSpec()
  watchdog_minutes: float | None = None
  tensorboard: bool = True
  wandb: str | None = None
  profile_steps: tuple[int, ...] = ()

  def __post_init__(self):
    every = ("log_every", "eval_every", "checkpoint_every")
    for name in (*every, "accumulate", "keep", "max_skipped"):
      checks.require_int(name, getattr(self, name), 1)
    if self.keep_period is not None:
      checks.require_int("keep_period", self.keep_period, 1)
    checks.require_int("keep_best", self.keep_best)
    for name in ("checkpoint_minutes", "watchdog_minutes"):
      if getattr(self, name) is not None:
        checks.require_positive(name, getattr(self, name))
    checks.require_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
    traced = self.profile_steps
    checks.require(
      not traced or (len(traced) == 2 and 1 <= traced[0] <= traced[1]),
      f"profile_steps={traced}: expected the first and the last step of a "
      "trace, such as 10,15, or none",
    )


def loop_config(**changes: Any) -> dict[str, Any]:
  """The keys of `LoopSpec` and `mesh` for a configuration, with defaults.

  Args:
    **changes: other values. `mesh` has the axes of `sharding.make_mesh`.
  """
  values = {**_defaults(LoopSpec), "mesh": sharding.default_config().to_dict()}
  unknown = changes.keys() - values.keys()
  checks.require(not unknown, f"the loop has no keys {sorted(unknown)}")
  return {**values, **changes}


def _defaults(spec_class) -> dict[str, Any]:
  values = {}
  for field in dataclasses.fields(spec_class):
    value = field.default
    if dataclasses.is_dataclass(value):
      value = _defaults(field.type)
    elif value is None:
      value = config_dict.placeholder(typing.get_args(field.type)[0])
    values[field.name] = value
  return values


def read(spec_class, config: Any):
  """The dataclass made of the keys that its fields are named after."""

  def value_of(field):
    value = config[field.name]
    if dataclasses.is_dataclass(field.type):
      return read(field.type, value)
    if isinstance(value, ml_collections.ConfigDict):
      return ml_collections.FrozenConfigDict(value)
    return tuple(value) if isinstance(value, list) else value

  fields = dataclasses.fields(spec_class)
  return spec_class(**{field.name: value_of(field) for field in fields})


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """An optimizer, and what the step must know of it.

  Attributes:
    transform: of all parameters that are trained.
    schedule: learning rate by step.
    freeze: expression of the paths that are not trained; None is none.
    stochastic_rounding: of updated bfloat16 parameters.
  """

  transform: optax.GradientTransformation
  schedule: optax.Schedule
  freeze: str | None
  stochastic_rounding: bool


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """The checkpoint that a run starts from, by its configuration.

  Attributes:
    path: of the checkpoint.
    stages: funnel that it was trained with, resolved.
    tokenizer_path: of its tokenizer.
  """

  path: str
  stages: tuple[FunnelConfig, ...]
  tokenizer_path: str


@dataclasses.dataclass(frozen=True)
class StoppingSpec:
  """Training ends when a held-out metric no longer improves.

  Attributes:
    metric: its name among the held-out metrics; more is better.
    patience: evaluations in a row without improvement that end the run; None
      never does. The parameters of the best evaluation are the result either
      way.
  """

  metric: str
  patience: int | None


class RunTask:
  """What a run trains for: `pretrain.TextTask` or `finetune.LabelTask`.

  Attributes:
    causal: whether tokens see only those before them.
    distills: whether the base checkpoint without a funnel is a teacher.
    stopping: None trains to the last step and keeps the last parameters.
    free_keys: keys of the configuration that may change when a run resumes,
      besides those of `workdir`.
  """

  causal: bool
  distills = False
  stopping: StoppingSpec | None = None
  free_keys: tuple[str, ...] = ()

  def describe(self, spec: "RunSpec", num_params: int) -> str:
    """A line on what is trained."""
    raise NotImplementedError

  def init_head(self, spec: "RunSpec", rngs: nnx.Rngs) -> dict[str, Any]:
    """Trees of parameters trained beside the model's, by checkpoint name."""
    return {}

  def make_loss(self, spec: "RunSpec") -> Callable:
    """(variant, params, frozen_params, batch, key) -> (loss, metrics).

    Raises:
      ValueError: a variant that learns what the run's own funnel has not.
    """
    raise NotImplementedError

  def load_data(self, spec: "RunSpec") -> Any:
    """The data that `batches` and `make_evaluate` read; workdir is claimed."""
    return None

  def batches(self, spec: "RunSpec", data: Any) -> Any:
    """This process's rows of host batches with "tokens" [B, T].

    An iterator with `get_state()` and `set_state()` of what JSON can hold.
    """
    raise NotImplementedError

  def merge_data_states(self, states: Sequence[Any]) -> Any:
    """The run's data state, of those of all processes in order."""
    return states[0]

  def assemble(self, spec: "RunSpec", model: Transformer, params) -> nnx.Module:
    """What is measured and returned: the model, perhaps with a head."""
    return model

  def make_evaluate(self, data: Any, spec: "RunSpec") -> Evaluate:
    """Held-out metrics, where the caller of `trainer.train` has none."""
    return lambda model: {}

  def step_flops(self, spec: "RunSpec", stages: schedules.Stages) -> int | None:
    """FLOPs of a step on all devices; None where they are not known."""
    return None


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """A run, before any long work.

  Attributes:
    config: what a run's folder stores and is compared by, with all that was
      left open filled in. It is never read for a value.
    workdir: folder of the run.
    seed: of initialisation, and of the keys of all steps.
    steps: of the whole run.
    batch_size: rows of a step, on all devices.
    length: tokens of a row.
    model_config: of the trunk.
    funnels: which funnel each step runs with.
    base: checkpoint to start from; None starts afresh.
    lora: None trains all parameters.
    mesh: of the devices.
    optimizer: of what is trained.
    loop: how it steps, reports and saves.
    task: what it trains for.
  """

  config: ml_collections.ConfigDict
  workdir: str
  seed: int
  steps: int
  batch_size: int
  length: int
  model_config: TransformerConfig
  funnels: schedules.FunnelSchedule
  base: BaseCheckpoint | None
  lora: lora_lib.LoraConfig | None
  mesh: jax.sharding.Mesh
  optimizer: OptimizerSpec
  loop: LoopSpec
  task: RunTask

  @property
  def stages(self) -> schedules.Stages:
    """The funnel that the checkpoint is said to be trained with."""
    return self.funnels.funnel

  @property
  def segment_padding(self) -> int:
    """Slots of padding that packing leaves after a segment at least."""
    return self.funnels.segment_padding(self.task.causal)


@dataclasses.dataclass(frozen=True)
class Opened:
  """What text and labels resolve alike, before the task is known."""

  config: ml_collections.ConfigDict
  model_config: TransformerConfig
  base: BaseCheckpoint | None
  mesh: jax.sharding.Mesh

  def finish(
    self, funnels: schedules.FunnelSchedule, task: RunTask, steps: int
  ) -> RunSpec:
    """The whole run; raises ValueError for a key that cannot be."""
    config, given = self.config, self.config.optimizer
    loop = read(LoopSpec, config)
    optimizer = OptimizerSpec(
      *optimizer_lib.make_optimizer(given, steps),
      freeze=given.freeze,
      stochastic_rounding=given.stochastic_rounding,
    )
    lora = lora_lib.make_config(config.lora)
    if lora and self.base is None:
      raise ValueError(
        f"lora.rank={lora.rank} needs init_from: the checkpoint whose matrices "
        "stay as they are"
      )
    keys = ("workdir", "seed", "batch_size", "length")
    return RunSpec(
      config,
      **{key: config[key] for key in keys},
      steps=steps,
      model_config=self.model_config,
      funnels=funnels,
      base=self.base,
      lora=lora,
      mesh=self.mesh,
      optimizer=optimizer,
      loop=loop,
      task=task,
    )


def open_run(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Opened:
  """Resolves sizes, base checkpoint and mesh of a configuration.

  Args:
    config: as in configs/; it is copied.
    devices: to train on; None is all.

  Raises:
    ValueError: a value that cannot be, or no checkpoint at `init_from`.
  """
  config = config.copy_and_resolve_references()
  model_config = TransformerConfig.from_dict(config.model)
  base = None
  if config.init_from is not None:
    if not os.path.exists(config.init_from):
      raise ValueError(f"init_from={config.init_from!r} is not there")
    runtime = {name: getattr(model_config, name) for name in RUNTIME}
    found = convert.describe(config.init_from)
    model_config = dataclasses.replace(found.config, **runtime)
    base = BaseCheckpoint(config.init_from, found.stages, found.tokenizer_path)
  for name, value in model_config.to_dict().items():
    config.model[name] = value
  for name, least in (("batch_size", 1), ("length", 1), ("seed", 0)):
    checks.require_int(name, config[name], least)
  checks.require_int("accumulate", config.accumulate, 1)
  check_lengths({"length": config.length}, model_config)
  mesh = sharding.make_mesh(config.mesh, devices)
  rows = sharding.parts(sharding.BATCH, mesh)[0]
  if config.batch_size % (rows * config.accumulate):
    raise ValueError(
      f"batch_size={config.batch_size} must be a multiple of {rows}, the "
      f"mesh's {' x '.join(ROWS)}, times accumulate={config.accumulate}"
    )
  if model_config.remat == "offload":
    sharding.check_host_memory(mesh)
  return Opened(config, model_config, base, mesh)


def check_lengths(
  lengths: Mapping[str, int], model_config: TransformerConfig
) -> None:
  """Raises ValueError for a length, by its key, beyond what the model takes."""
  for name, value in lengths.items():
    if value > model_config.max_length:
      raise ValueError(
        f"{name}={value} is beyond model.max_length={model_config.max_length}"
      )
