"""A run, resolved once: its configuration as frozen, checked, typed values.

`pretrain.resolve` and `finetune.resolve` make a `RunSpec`; `trainer.train` runs
it. Nothing below reads a ConfigDict, parses a funnel or opens `init_from` anew.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import typing
from typing import Any

from flax import nnx
import jax
import ml_collections
from ml_collections import config_dict
import optax

from gemma_funnel import checks, cli, convert
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import RUNTIME, FunnelConfig, TransformerConfig
from gemma_funnel.convert import hub
from gemma_funnel.convert.run import path_of
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.mesh import ROWS
from gemma_funnel.training import optimizer as optimizer_lib
from gemma_funnel.training import schedules

# Held-out metrics of a model; "loss" ranks checkpoints.
Evaluate = Callable[[nnx.Module], dict[str, float | None]]


# Of an average of weights, the most that may be those it began with.
_MOST_INITIAL = 0.1


@dataclasses.dataclass(frozen=True)
class RollbackSpec:
  """Return to the last checkpoint after a spike of the loss."""

  factor: float | None = None  # Of the median of the last losses.
  window: int = 100  # Losses that the median is of.
  most: int = 3  # Rollbacks of a run.

  def __post_init__(self):
    if self.factor is not None:
      ok = checks.is_number(self.factor) and self.factor > 1
      checks.require(ok, f"rollback.factor={self.factor}: expected > 1")
    checks.require_int("rollback.window", self.window, 1)
    checks.require_int("rollback.most", self.most, 1)


@dataclasses.dataclass(frozen=True)
class LoopSpec:
  """How a run steps, reports and saves, whatever it trains."""

  accumulate: int = 1  # Parts of a batch, computed one after the other.
  log_every: int = 20  # Steps, as the next two.
  eval_every: int = 100
  checkpoint_every: int = 100
  checkpoint_minutes: float | None = None  # Besides; None is never.
  keep: int = 2  # The newest checkpoints; the next two are kept besides.
  keep_best: int = 0  # Those of the least held-out loss.
  keep_period: int | None = None  # Those at its multiples.
  on_nonfinite: str = "stop"  # Or "skip" a step of a loss that is not finite.
  max_skipped: int = 10  # In a row.
  rollback: RollbackSpec = RollbackSpec()
  # Silence after which the process ends: longer than a compilation.
  watchdog_minutes: float | None = None
  tensorboard: bool = True
  wandb: str | None = None  # A project.
  profile_steps: tuple[int, ...] = ()  # First and last step of a trace.
  # Goes on where data, tokenizer or base are no longer what they were.
  accept_changed: bool = False

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
    checks.require_bool("accept_changed", self.accept_changed)
    checks.require_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
    traced = self.profile_steps
    checks.require(
      not traced or (len(traced) == 2 and 1 <= traced[0] <= traced[1]),
      f"profile_steps={traced}: expected the first and the last step of a "
      "trace, such as 10,15, or none",
    )


def loop_config(**changes: Any) -> dict[str, Any]:
  """The keys of `LoopSpec` and `mesh`, with defaults but for `changes`."""
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
  """An optimizer, and what the step must know of it."""

  transform: optax.GradientTransformation
  schedule: optax.Schedule  # Learning rate by step.
  freeze: str | None  # Expression of the paths that are not trained.
  stochastic_rounding: bool  # Of updated bfloat16 parameters.


@dataclasses.dataclass(frozen=True)
class BaseCheckpoint:
  """The checkpoint that a run starts from, by its configuration."""

  path: str
  stages: tuple[FunnelConfig, ...]  # That it was trained with, resolved.
  tokenizer_path: str


@dataclasses.dataclass(frozen=True)
class StoppingSpec:
  """Training ends when a held-out metric no longer improves.

  The parameters of the best evaluation are the result.
  """

  metric: str  # Among the held-out ones; more is better.
  patience: int | None  # Evaluations in a row without improvement.


class RunTask:
  """What a run trains for: `pretrain.TextTask` or `finetune.LabelTask`."""

  causal: bool
  distills = False  # Whether `init_from` without a funnel is a teacher.
  stopping: StoppingSpec | None = None  # None keeps the last parameters.
  free_keys: tuple[str, ...] = ()  # May change when a run resumes.

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

  def fingerprints(self, spec: "RunSpec") -> dict[str, str]:
    """What tells the data from what they were, by name; see `inputs`."""
    return {}

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
  """A run, before any long work."""

  # What the folder stores and is compared by; never read for a value.
  config: ml_collections.ConfigDict
  workdir: str
  seed: int  # Of initialisation, and of the keys of all steps.
  steps: int
  batch_size: int  # Rows of a step, on all devices.
  length: int  # Tokens of a row.
  model_config: TransformerConfig  # Of the trunk.
  funnels: schedules.FunnelSchedule
  base: BaseCheckpoint | None  # None starts afresh.
  lora: lora_lib.LoraConfig | None  # None trains all parameters.
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
    kept = (given.ema_decay or 0) ** steps
    if kept > _MOST_INITIAL:
      cli.say(
        f"optimizer.ema_decay={given.ema_decay}: after {steps} steps {kept:.0%} "
        "of the average, which results are of, is the initial weights; with "
        f"{_MOST_INITIAL ** (1 / steps):.3g}, {_MOST_INITIAL:.0%} would be"
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

  Raises:
    ValueError: a value that cannot be, or no checkpoint at `init_from`.
  """
  config = config.copy_and_resolve_references()
  model_config = TransformerConfig.from_dict(config.model)
  base = None
  if config.init_from is not None:
    runtime = {name: getattr(model_config, name) for name in RUNTIME}
    if not (
      hub.is_name(config.init_from) or path_of(config.init_from).exists()
    ):
      raise ValueError(f"init_from={config.init_from!r} is not there")
    found = convert.describe(config.init_from)
    model_config = dataclasses.replace(found.config, **runtime)
    base = BaseCheckpoint(config.init_from, found.stages, found.tokenizer_path)
  with config.ignore_type():  # 10 is as good as 10.0.
    for name, value in model_config.to_dict().items():
      config.model[name] = value
  checks.require_int("seed", config.seed, 0, 2**32 - 1)
  for name in ("batch_size", "length"):
    checks.require_int(name, config[name], 1)
  checks.require(
    config.batch_size * config.length <= checks.LARGEST,
    f"batch_size={config.batch_size} x length={config.length}: expected at most "
    f"{checks.LARGEST} tokens a step",
  )
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
