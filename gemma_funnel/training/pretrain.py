"""Training a model on text: next tokens, masked tokens, or distillation."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
import ml_collections

from gemma_funnel import checks, flops
from gemma_funnel import funnel as funnel_lib
from gemma_funnel.config import format_funnel
from gemma_funnel.data import pipeline, shards
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.parallel import processes, sharding
from gemma_funnel.parallel.mesh import TOKENS
from gemma_funnel.training import init_state, objectives, schedules, workdir
from gemma_funnel.training import spec as spec_lib
from gemma_funnel.training.spec import RunSpec

OBJECTIVES = ("next_token", "masked", "distill")


@dataclasses.dataclass(frozen=True)
class DistillSpec:
  """Temperature and weights of the terms of `objectives.distill`."""

  temperature: float
  logits: float
  hidden: float
  tokens: float

  def __post_init__(self):
    checks.require_positive("distill.temperature", self.temperature)
    for name in ("logits", "hidden", "tokens"):
      _require_weight(f"distill.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class LatencySpec:
  """Shape and rounds of the latency report; 0 `repeats` is none."""

  batch_size: int
  length: int
  repeats: int

  def __post_init__(self):
    checks.require_int("latency.batch_size", self.batch_size, 1)
    checks.require_int("latency.length", self.length, 1)
    checks.require_int("latency.repeats", self.repeats)


@dataclasses.dataclass(frozen=True)
class TextTask(spec_lib.RunTask):
  """Text, what is predicted of it, and what is reported at the end."""

  objective: str  # One of OBJECTIVES.
  mask_rate: float  # Share of the tokens that "masked" predicts.
  distill: DistillSpec
  z_loss: float  # Weight of the squared log partition function.
  loss_chunk: int  # Positions of a row that have logits at one time.
  funnel: str | None  # As it was written, for tables.
  data: ml_collections.FrozenConfigDict  # Keys of `pipeline.default_config`.
  eval_documents: int | None  # Of an evaluation; None is all.
  heldout_documents: int | None  # Of the report.
  latency: LatencySpec

  # Data are resumed at a number of rows, whatever the batch.
  free_keys = ("batch_size",)

  def __post_init__(self):
    checks.require_choice("objective", self.objective, OBJECTIVES)
    checks.require_between("mask_rate", self.mask_rate, 0, 1, open=True)
    _require_weight("z_loss", self.z_loss)
    checks.require_int("loss_chunk", self.loss_chunk, 1)
    for name in ("eval_documents", "heldout_documents"):
      if getattr(self, name) is not None:
        checks.require_int(name, getattr(self, name), 1)
    if self.distills and not (self.distill.logits or self.distill.hidden):
      raise ValueError(
        "distill.logits=0 and distill.hidden=0: nothing is learned of the "
        "teacher"
      )

  @property
  def causal(self) -> bool:
    return self.objective != "masked"

  @property
  def distills(self) -> bool:
    return self.objective == "distill"

  def describe(self, spec: RunSpec, num_params: int) -> str:
    funnel, devices = format_funnel(spec.stages), sharding.describe(spec.mesh)
    return f"{num_params:,} parameters trained, funnel {funnel}, {devices}"

  def make_loss(self, spec: RunSpec):
    models = init_state.variant_models(spec, others=((),))
    sizes = dict(chunk=self.loss_chunk)

    def loss(stages, params, frozen_params, batch, key):
      params = init_state.model_params(spec, params, frozen_params)
      model = init_state.select_params(params, models[stages])
      match self.objective:
        case "next_token":
          return objectives.next_token(
            model, batch, z_loss=self.z_loss, **sizes
          )
        case "masked":
          return objectives.masked_tokens(
            model, batch, key, rate=self.mask_rate, z_loss=self.z_loss, **sizes
          )
        case "distill":
          teacher = frozen_params["teacher"]
          teacher = init_state.select_params(teacher, models[()])
          terms = dataclasses.asdict(self.distill)
          return objectives.distill(model, teacher, batch, **terms, **sizes)

    return loss

  def load_data(self, spec: RunSpec) -> pipeline.Corpus:
    """The corpus; the run's folder then has the tokenizer."""
    data, folder = ml_collections.ConfigDict(self.data), spec.workdir
    given, own = data.tokenizer, tokenizer_lib.find_in(folder)
    begun = (workdir.path_of(folder) / workdir.FOLDER).exists()
    checks.require(
      bool(own or given) or not begun,
      f"the tokenizer of the run in {folder} is missing: expected the "
      f"{pipeline.TOKENIZER_FILE} that it has trained, there",
    )
    if given and own:
      # The file that was given may have moved since.
      if epath.Path(given).exists():
        same = [tokenizer_lib.Tokenizer.load(p).sha256 for p in (given, own)]
        checks.require(
          same[0] == same[1],
          f"data.tokenizer={given!r} is another than {own}, which the run "
          "was begun with: put it back, or name another workdir",
        )
      data.tokenizer = own
    corpus = pipeline.load_corpus(data, spec.model_config.vocab_size, folder)
    ids = corpus.tokenizer.mask_id, corpus.tokenizer.bos_id
    gemmas = tokenizer_lib.MASK_ID, tokenizer_lib.BOS_ID
    checks.require(
      self.objective != "masked" or ids == gemmas,
      f"objective='masked': the tokenizer's ids of <mask> and BOS are {ids}; "
      f"expected Gemma's, {gemmas}",
    )
    if given and not own:
      processes.on_host0(lambda: corpus.tokenizer.save(folder))
    return corpus

  def fingerprints(self, spec: RunSpec) -> dict[str, str]:
    return pipeline.fingerprints(self.data)

  def batches(self, spec: RunSpec, data: pipeline.Corpus):
    part, parts = sharding.row_share(spec.mesh)
    return pipeline.train_iterator(
      data.train,
      data.tokenizer,
      batch_size=spec.batch_size // parts,
      length=spec.length,
      segment_alignment=spec.funnels.segment_alignment,
      segment_padding=spec.segment_padding,
      seed=self.data.seed,
      num_shards=self.data.lanes,
      num_workers=self.data.num_workers,
      process_index=part,
      process_count=parts,
    )

  def merge_data_states(self, states: Sequence[dict[str, Any]]):
    # Processes that have the same rows have the same shards.
    different = {tuple(sorted(state["lanes"])): state for state in states}
    return shards.merge_states(list(different.values()))

  def step_flops(self, spec: RunSpec, stages: schedules.Stages) -> int:
    count = lambda f, stages: f(
      spec.model_config,
      stages,
      spec.batch_size,
      spec.length,
      causal=self.causal,
    )
    step = functools.partial(flops.train_step, matrices=spec.lora is None)
    teacher = count(flops.forward, ()) if self.distills else 0
    return count(step, stages) + teacher


def _require_weight(name: str, value: Any) -> None:
  ok = checks.is_number(value) and value >= 0
  checks.require(ok, f"{name}={value}: expected a number >= 0")


def resolve(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> RunSpec:
  """Checks a configuration whole.

  Args:
    config: as in configs/quickstart.py; it is copied.
    devices: to train on; None is all there are.

  Raises:
    ValueError: a value that cannot be, named.
  """
  opened = spec_lib.open_run(config, devices)
  config, base = opened.config, opened.base
  if base and config.data.tokenizer is None:
    config.data.tokenizer = base.tokenizer_path
  task = spec_lib.read(TextTask, config)
  checks.require_int("steps", config.steps, 1)
  if task.distills and base is None:
    raise ValueError(
      "objective='distill' needs init_from: the checkpoint that is the teacher, "
      "without a funnel, and what the student starts from"
    )
  if task.latency.repeats:
    lengths = {"latency.length": task.latency.length}
    spec_lib.check_lengths(lengths, opened.model_config)
  funnels = schedules.make_schedule(
    config,
    opened.model_config.num_layers,
    "training to predict tokens",
    causal=task.causal,
    packs=True,
  )
  spec = opened.finish(funnels, task, config.steps)
  _check_packing(spec)
  return spec


def _check_packing(spec: RunSpec) -> None:
  """Raises ValueError where rows cannot be packed, or split over tokens."""
  length, stride = spec.length, spec.funnels.segment_alignment
  if length % stride:
    raise ValueError(
      f"length={length} must be a multiple of the funnel's total stride "
      f"{stride}, for packing"
    )
  parts = spec.mesh.shape[TOKENS]
  for stages in spec.funnels.variants:
    short = funnel_lib.short_lengths(length, stages, spec.task.causal)
    for slots in (length, *short):
      if slots % parts:
        raise ValueError(
          f"mesh.sequence={parts} does not divide the {slots} slots that the "
          f"funnel {format_funnel(stages)} has for length={length}"
        )
  if length - spec.segment_padding < 2:
    raise ValueError(
      f"length={length} leaves no room for text beside keep_first's padding of "
      f"{spec.segment_padding}"
    )
