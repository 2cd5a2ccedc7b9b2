"""Training a model on text: next tokens, masked tokens, or distillation."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import operator
import os
from typing import Any

from flax import nnx
import jax
import ml_collections
import optax

from gemma_funnel import convert, flops
from gemma_funnel import funnel as funnel_lib
from gemma_funnel import lora as lora_lib
from gemma_funnel.config import TransformerConfig, format_funnel
from gemma_funnel.data import lanes, pipeline
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import processes, sharding
from gemma_funnel.parallel.mesh import ROWS, TOKENS
from gemma_funnel.training import loop, objectives, schedules, start, workdir
from gemma_funnel.training import optimizer as optimizer_lib

OBJECTIVES = ("next_token", "masked", "distill")
# Of a checkpoint that training starts from, sizes are its own; these are not.
RUNTIME = (
  "param_dtype",
  "dtype",
  "softmax_dtype",
  "kernel",
  "scan_layers",
  "remat",
)

# Gives at least "loss".
Evaluator = Callable[[Transformer], dict[str, float | None]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run's configuration amounts to; made before any long work."""

  config: ml_collections.ConfigDict
  model_config: TransformerConfig
  funnels: schedules.FunnelSchedule
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  lora: lora_lib.LoraConfig | None

  @property
  def stages(self) -> schedules.Stages:
    """Of the funnel that the checkpoint is said to be trained with."""
    return self.funnels.funnel

  @property
  def causal(self) -> bool:
    return self.config.objective != "masked"

  @property
  def gap(self) -> int:
    """Padding that packing leaves after a segment at least."""
    return segment_gap(self.funnels, self.causal)


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended.

  Attributes:
    model: with the last parameters.
    corpus: the data it was trained on.
    steps: how many steps the run has taken in all.
    finished: False if a SIGTERM ended it early.
  """

  model: Transformer
  corpus: pipeline.Corpus
  steps: int
  finished: bool


def segment_gap(funnels: schedules.FunnelSchedule, causal: bool) -> int:
  """Padding after packed segments: a first token kept apart takes a group."""
  kept = any(stage.keep_first for m in funnels.members for stage in m)
  return funnels.align if kept and not causal else 0


def check_numbers(config: Any, at_least: dict[str, int | float]) -> None:
  """Checks keys such as "latency.length"; a key without a value passes.

  Raises:
    ValueError: one is below its least value, or no number.
  """
  for name, least in at_least.items():
    value = functools.reduce(operator.getitem, name.split("."), config)
    if value is not None and not value >= least:  # A NaN neither.
      bound = f"at least {least}" if least else ">= 0"
      raise ValueError(f"{name}={value}: expected {bound}")


def check_lengths(
  lengths: dict[str, int], model_config: TransformerConfig
) -> None:
  """Checks lengths by the names of their keys.

  Raises:
    ValueError: one is more than the model can be given.
  """
  for name, value in lengths.items():
    if value > model_config.max_length:
      raise ValueError(
        f"{name}={value} is beyond model.max_length={model_config.max_length}"
      )


def check_batch(config: Any, mesh: jax.sharding.Mesh) -> None:
  """Checks that `config.batch_size` rows can lie on a mesh, part by part.

  Raises:
    ValueError: they cannot.
  """
  rows = sharding.parts(sharding.BATCH, mesh)[0]
  if config.batch_size % (rows * config.accumulate):
    raise ValueError(
      f"batch_size={config.batch_size} must be a multiple of {rows}, the "
      f"mesh's {' x '.join(ROWS)}, times accumulate={config.accumulate}"
    )


def check_tokens(
  length: int,
  funnels: schedules.FunnelSchedule,
  causal: bool,
  mesh: jax.sharding.Mesh,
) -> None:
  """Checks that rows of `length` tokens, and short ones, can be split.

  Raises:
    ValueError: they cannot.
  """
  parts = mesh.shape[TOKENS]
  for stages in funnels.members:
    for slots in (length, *funnel_lib.short_lengths(length, stages, causal)):
      if slots % parts:
        raise ValueError(
          f"mesh.sequence={parts} does not divide the {slots} slots that the "
          f"funnel {format_funnel(stages)} has for length={length}"
        )


def find_model(config: Any) -> TransformerConfig:
  """The sizes of `config.model`, or of the checkpoint `config.init_from`.

  Raises:
    ValueError: no checkpoint there, or a value that cannot be.
  """
  wanted = TransformerConfig.from_dict(config.model)
  if config.init_from is None:
    return wanted
  if not os.path.exists(config.init_from):
    raise ValueError(f"init_from={config.init_from!r} is not there")
  how = {name: getattr(wanted, name) for name in RUNTIME}
  found = convert.describe(config.init_from).config
  return dataclasses.replace(found, **how)


def with_model(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, TransformerConfig]:
  """(a copy whose `model` is what will be trained, the same as GemmaConfig)."""
  config = config.copy_and_resolve_references()
  model_config = find_model(config)
  for name, value in model_config.to_dict().items():
    config.model[name] = value
  return config, model_config


def make_setup(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Setup:
  """Checks a configuration whole.

  Args:
    config: as in configs/quickstart.py.
    devices: to train on; None is all there are.

  Raises:
    ValueError: a value that cannot be, named.
  """
  config, model_config = with_model(config)
  if config.init_from is not None and config.data.tokenizer is None:
    found = convert.describe(config.init_from)
    config.data.tokenizer = found.tokenizer_path
  if config.objective not in OBJECTIVES:
    raise ValueError(
      f"objective={config.objective!r}: expected one of {list(OBJECTIVES)}"
    )
  funnels = schedules.make_schedule(
    config, model_config.num_layers, "training to predict tokens"
  )
  ones = (
    "steps",
    "batch_size",
    "length",
    "loss_chunk",
    "eval_documents",
    "heldout_documents",
    "latency.batch_size",
    "latency.length",
  )
  zeros = (
    "z_loss",
    "seed",
    "latency.repeats",
    "distill.logits",
    "distill.hidden",
    "distill.tokens",
  )
  check_numbers(config, {**dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)})
  lengths = {"length": config.length}
  if config.latency.repeats:
    lengths["latency.length"] = config.latency.length
  check_lengths(lengths, model_config)
  if config.length % funnels.align:
    raise ValueError(
      f"length={config.length} must be a multiple of the funnel's total stride "
      f"{funnels.align}, for packing"
    )
  _check_objective(config)
  loop.check_config(config)
  mesh = sharding.make_mesh(config.mesh, devices)
  check_batch(config, mesh)
  if model_config.remat == "offload":
    sharding.check_host_memory(mesh)
  causal = config.objective != "masked"
  check_tokens(config.length, funnels, causal, mesh)
  optimizer, schedule = optimizer_lib.make_optimizer(
    config.optimizer, config.steps
  )
  setup = Setup(
    config, model_config, funnels, mesh, optimizer, schedule, make_lora(config)
  )
  if config.length - setup.gap < 2:
    raise ValueError(
      f"length={config.length} leaves no room for text beside keep_first's "
      f"padding of {setup.gap}"
    )
  return setup


def make_lora(config: Any) -> lora_lib.LoraConfig | None:
  """`config.lora`, checked; None is to train all parameters.

  Raises:
    ValueError: a value that cannot be, or no checkpoint that factors could be
      beside.
  """
  lora = lora_lib.make_config(config.lora)
  if lora and config.init_from is None:
    raise ValueError(
      f"lora.rank={lora.rank} needs init_from: the checkpoint whose matrices "
      "stay as they are"
    )
  return lora


def _check_objective(config: Any) -> None:
  if not 0 < config.mask_rate < 1:
    raise ValueError(
      f"mask_rate={config.mask_rate}: expected a number between 0 and 1"
    )
  if not config.distill.temperature > 0:
    raise ValueError(
      f"distill.temperature={config.distill.temperature}: expected > 0"
    )
  if config.objective != "distill":
    return
  if config.init_from is None:
    raise ValueError(
      "objective='distill' needs init_from: the checkpoint that is the teacher, "
      "without a funnel, and what the student starts from"
    )
  if not (config.distill.logits or config.distill.hidden):
    raise ValueError(
      "distill.logits=0 and distill.hidden=0: nothing is learned of the teacher"
    )


def restrict(weights: dict[str, Any], model: nnx.Module) -> nnx.Module:
  """`model` with the parameters it has among `weights`; unused ones are left.

  A funnel's member may learn less than the funnel that the run is of.

  Raises:
    ValueError: a parameter that `weights` has not.
  """
  graphdef, state = nnx.split(model)
  have = dict(nnx.to_flat_state(nnx.State(weights)))
  flat = {}
  for path, _ in nnx.to_flat_state(state):
    if path not in have:
      raise ValueError(
        f"funnel {format_funnel(model.stages)} learns "
        f"{'/'.join(map(str, path))}, which the run's own funnel has not: name "
        "a funnel that has it, or sample funnels that learn nothing"
      )
    flat[path] = have[path]
  return nnx.merge(graphdef, nnx.to_pure_dict(nnx.from_flat_state(flat)))


def make_loss(setup: Setup):
  """The loss of a `loop.Job`; its members are the schedule's funnels.

  Raises:
    ValueError: a member that learns what the run's own funnel has not.
  """
  config = setup.config
  models = {
    stages: Transformer.abstract(setup.model_config, stages)
    for stages in (*setup.funnels.members, ())
  }
  made = nnx.to_pure_dict(nnx.state(models[setup.stages]))
  for stages in setup.funnels.members:
    restrict(made, models[stages])
  chunk = config.loss_chunk

  def loss(stages, weights, frozen, batch, key):
    params = start.params_of(setup, weights, frozen)
    model = restrict(params, models[stages])
    match config.objective:
      case "next_token":
        return objectives.next_token(
          model, batch, chunk=chunk, z_loss=config.z_loss
        )
      case "masked":
        return objectives.masked_tokens(
          model,
          batch,
          key,
          rate=config.mask_rate,
          chunk=chunk,
          z_loss=config.z_loss,
        )
      case "distill":
        teacher = restrict(frozen["teacher"], models[()])
        return objectives.distill(
          model, teacher, batch, chunk=chunk, **config.distill
        )

  return loss


def train(
  config: ml_collections.ConfigDict,
  make_evaluator: Callable[[pipeline.Corpus, Setup], Evaluator],
) -> Result:
  """Trains, or goes on training, the run in `config.workdir`.

  Args:
    config: as in configs/quickstart.py.
    make_evaluator: gives what measures the model every `eval_every` steps.

  Raises:
    ValueError: a mistake in the configuration, the data or the folder.
    FloatingPointError: see `loop.run`.
  """
  processes.assert_same_config(config)
  setup = make_setup(config)
  config = setup.config
  loss = make_loss(setup)
  # Fails if the mesh does not fit.
  init, abstract = start.make_init(setup)
  # Where data are is a number of rows, whatever the batch.
  workdir.init_workdir(config, free=("batch_size",))
  corpus = pipeline.load_corpus(
    config.data, setup.model_config.vocab_size, config.workdir
  )
  data = _make_data(setup, corpus)
  graphdef = nnx.graphdef(
    Transformer.abstract(setup.model_config, setup.stages)
  )
  frozen = start.load_frozen(setup)
  model_of = lambda weights: nnx.merge(
    graphdef, start.params_of(setup, weights, frozen)
  )
  evaluate = make_evaluator(corpus, setup)
  count = sum(x.size for x in jax.tree.leaves(abstract[0]))
  with contextlib.closing(data):  # It may have worker processes.
    result = loop.run(
      loop.Job(
        config=config,
        about=f"{count:,} parameters trained, funnel {format_funnel(setup.stages)}, "
        + sharding.describe(setup.mesh),
        steps=config.steps,
        mesh=setup.mesh,
        optimizer=setup.optimizer,
        schedule=setup.schedule,
        abstract=abstract,
        init=lambda seed: init(seed, frozen),
        loss=loss,
        frozen=frozen,
        member=setup.funnels.at,
        data=data,
        evaluate=lambda weights: evaluate(model_of(weights)),
        merge=_merge,
        # Those of a partly frozen model are not known.
        flops=None
        if config.optimizer.freeze
        else functools.partial(step_flops, setup),
      )
    )
  model = model_of(result.weights)
  return Result(model, corpus, result.steps, result.finished)


def _make_data(setup: Setup, corpus: pipeline.Corpus):
  """This process's share of the batches."""
  config = setup.config
  part, parts = sharding.row_share(setup.mesh)
  return pipeline.train_iterator(
    corpus.train,
    corpus.tokenizer,
    batch_size=config.batch_size // parts,
    length=config.length,
    align=setup.funnels.align,
    gap=setup.gap,
    seed=config.data.seed,
    lanes=config.data.lanes,
    num_workers=config.data.num_workers,
    process_index=part,
    process_count=parts,
  )


def _merge(states: list[dict[str, Any]]) -> dict[str, Any]:
  """Of all processes' data; those that have the same rows have the same lanes."""
  different = {tuple(sorted(state["lanes"])): state for state in states}
  return lanes.merge_states(list(different.values()))


def step_flops(setup: Setup, stages: schedules.Stages) -> int:
  """FLOPs of a step, forward and backward, on all devices."""
  config = setup.config
  sizes = setup.model_config, config.batch_size, config.length
  count = lambda f, stages: f(sizes[0], stages, *sizes[1:], causal=setup.causal)
  total = count(
    functools.partial(flops.train_step, matrices=setup.lora is None), stages
  )
  if config.objective == "distill":
    total += count(flops.forward, ())
  return total
