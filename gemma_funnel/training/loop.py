"""The training loop: claim a folder, restore or start, step, report, save."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
import math
import operator
import os
import pathlib
import signal
import time

from flax import nnx
import jax
import ml_collections
import optax

from gemma_funnel.config import (
  FunnelConfig,
  GemmaConfig,
  check_recovers,
  format_funnel,
  resolve_funnel,
  total_stride,
)
from gemma_funnel.data import pipeline
from gemma_funnel.model import Gemma
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import objectives, sharding
from gemma_funnel.training import optimizer as optimizer_lib

# Gives at least "loss" and "bits_per_byte".
Evaluator = Callable[[Gemma], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run's configuration amounts to; made before any long work."""

  config: ml_collections.ConfigDict
  model_config: GemmaConfig
  stages: tuple[FunnelConfig, ...]
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule

  @property
  def align(self) -> int:
    """What segments of a packed row start at multiples of."""
    return total_stride(self.stages)


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended.

  Attributes:
    model: with the last parameters.
    corpus: the data it was trained on.
    steps: how many steps the run has taken in all.
    finished: False if a SIGTERM ended it early.
  """

  model: Gemma
  corpus: pipeline.Corpus
  steps: int
  finished: bool


def make_setup(config: ml_collections.ConfigDict) -> Setup:
  """Checks a configuration whole.

  Raises:
    ValueError: a value that cannot be, named.
  """
  model_config = GemmaConfig.from_dict(config.model)
  stages = resolve_funnel(config.funnel, model_config.num_layers)
  check_recovers(stages, "training to predict tokens")
  for name in ("steps", "batch_size", "length", "loss_chunk", "log_every",
               "eval_every", "eval_documents", "heldout_documents",
               "checkpoint_every", "keep", "latency.batch_size",
               "latency.length"):  # fmt: skip
    value = _value(config, name)
    if value is not None and value < 1:
      raise ValueError(f"{name}={value}: expected at least 1")
  for name in ("z_loss", "seed", "latency.repeats"):
    value = _value(config, name)
    if not value >= 0:  # A NaN neither.
      raise ValueError(f"{name}={value}: expected >= 0")
  for name in ("length", "latency.length"):
    value = _value(config, name)
    used = name == "length" or config.latency.repeats
    if used and value > model_config.max_length:
      raise ValueError(
        f"{name}={value} is beyond model.max_length={model_config.max_length}"
      )
  if config.length % total_stride(stages):
    raise ValueError(
      f"length={config.length} must be a multiple of the funnel's total stride "
      f"{total_stride(stages)}, for packing"
    )
  mesh = sharding.make_mesh(config.mesh)
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.batch_size % rows:
    raise ValueError(
      f"batch_size={config.batch_size} must be a multiple of {rows}, the "
      "mesh's data x fsdp"
    )
  optimizer, schedule = optimizer_lib.make_optimizer(
    config.optimizer, config.steps
  )
  return Setup(config, model_config, stages, mesh, optimizer, schedule)


def _value(config: ml_collections.ConfigDict, name: str):
  """The value of a key such as "latency.length"."""
  return functools.reduce(operator.getitem, name.split("."), config)


def make_init(setup: Setup):
  """(init, abstract): makes (params, opt_state) from a seed, and its shapes.

  `abstract` holds ShapeDtypeStructs with shardings; nothing is ever whole on
  one device.
  """

  def init(seed):
    rngs = nnx.Rngs(jax.random.key(seed))
    model = Gemma(setup.model_config, setup.stages, rngs=rngs)
    params = nnx.to_pure_dict(nnx.state(model))
    return params, setup.optimizer.init(params)

  shapes = jax.eval_shape(init, 0)
  shardings = sharding.shardings_of(shapes, setup.mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  return jax.jit(init, out_shardings=shardings), abstract


def make_train_step(setup: Setup, abstract):
  """One pure step, jitted: (params, opt_state, batch) -> (..., metrics)."""
  config = setup.config
  graphdef = nnx.graphdef(Gemma.abstract(setup.model_config, setup.stages))

  def loss_of(params, batch):
    return objectives.next_token(
      nnx.merge(graphdef, params),
      batch,
      chunk=config.loss_chunk,
      z_loss=config.z_loss,
    )

  def train_step(params, opt_state, batch):
    grads, metrics = jax.grad(loss_of, has_aux=True)(params, batch)
    updates, opt_state = setup.optimizer.update(grads, opt_state, params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return optax.apply_updates(params, updates), opt_state, metrics

  state = jax.tree.map(lambda x: x.sharding, abstract)
  batch = jax.sharding.NamedSharding(setup.mesh, sharding.BATCH)
  whole = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
  return jax.jit(
    train_step,
    in_shardings=(*state, batch),
    out_shardings=(*state, whole),
    donate_argnums=(0, 1),
  )


def train(
  config: ml_collections.ConfigDict,
  make_evaluator: Callable[[pipeline.Corpus, Setup], Evaluator],
) -> Result:
  """Trains, or goes on training, the run in `config.workdir`.

  The same call resumes an interrupted run at its newest checkpoint, and takes
  the same steps that it would have taken. SIGTERM saves and returns.

  Args:
    config: as in configs/quickstart.py.
    make_evaluator: gives what measures the model every `eval_every` steps.

  Raises:
    ValueError: a mistake in the configuration, the data or the folder.
    FloatingPointError: a loss or gradient norm that is not finite.
  """
  setup = make_setup(config)
  init, abstract = make_init(setup)  # Fails if the mesh does not fit.
  checkpoint_lib.claim_workdir(config)
  corpus = pipeline.load_corpus(
    config.data, setup.model_config.vocab_size, config.workdir
  )
  data = pipeline.train_iterator(
    corpus.train,
    corpus.tokenizer,
    batch_size=config.batch_size // jax.process_count(),
    length=config.length,
    align=setup.align,
    seed=config.data.seed,
    num_workers=config.data.num_workers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with (
    contextlib.closing(data),  # It may have worker processes.
    jax.set_mesh(setup.mesh),
    checkpoint_lib.Checkpoints(config.workdir, config.keep) as checkpoints,
    _Terminated() as terminated,
  ):
    loop = _Loop(setup, init, abstract, data, checkpoints)
    loop.run(terminated, make_evaluator(corpus, setup))
    model = loop.model()
  return Result(model, corpus, loop.step, loop.step >= config.steps)


class _Loop:
  """The state of a run, and how it advances."""

  def __init__(self, setup: Setup, init, abstract, data, checkpoints):
    self.setup, self.data, self.checkpoints = setup, data, checkpoints
    self.train_step = make_train_step(setup, abstract)
    workdir = setup.config.workdir
    if checkpoints.latest() is not None:
      self.step, self.params, self.opt_state = checkpoints.restore(
        *abstract, data
      )
      print(f"resuming {workdir} at step {self.step}", flush=True)
    else:
      self.step = 0
      self.params, self.opt_state = init(setup.config.seed)
    count = sum(x.size for x in jax.tree.leaves(self.params))
    print(
      f"{workdir}: {count:,} parameters, funnel "
      f"{format_funnel(setup.stages)}, mesh {dict(setup.mesh.shape)}",
      flush=True,
    )

  def model(self) -> Gemma:
    model = Gemma.abstract(self.setup.model_config, self.setup.stages)
    return nnx.merge(nnx.graphdef(model), self.params)

  def save(self) -> None:
    self.checkpoints.save(
      self.step, self.params, self.opt_state, self.data, self.setup.config
    )

  def run(self, terminated: "_Terminated", evaluate: Evaluator) -> None:
    config = self.setup.config
    # Metrics of a step are read when the next one is under way, so that the
    # device never waits for the host. A checkpoint is written only of steps
    # whose metrics have been read and are finite.
    pending = None
    with _Metrics(config, self.step) as metrics:
      while self.step < config.steps and not terminated:
        batch = sharding.put_batch(next(self.data), self.setup.mesh)
        self.params, self.opt_state, values = self.train_step(
          self.params, self.opt_state, batch
        )
        self.step += 1
        self._read(metrics, pending)
        pending = (self.step, values)
        due = lambda every: self.step % every == 0 or self.step == config.steps
        if due(config.checkpoint_every) or due(config.eval_every):
          self._read(metrics, pending)
          pending = None
        # All metrics up to a checkpoint are written before it, so that a run
        # that resumes at it has them.
        if due(config.eval_every):
          metrics.evaluated(self.step, evaluate(self.model()))
        if due(config.checkpoint_every):
          self.save()
      self._read(metrics, pending)
      self.save()
      self.checkpoints.wait()
    if self.step < config.steps:
      print(
        f"SIGTERM: saved {config.workdir} at step {self.step}; the same "
        "command goes on from there",
        flush=True,
      )

  def _read(self, metrics: "_Metrics", pending) -> None:
    if pending is None:
      return
    step, values = pending
    values = {name: float(value) for name, value in values.items()}
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        raise FloatingPointError(
          f"{name} is {values[name]} at step {step}; the last good "
          f"checkpoint is {'none' if good is None else f'of step {good}'}"
        )
    values["learning_rate"] = float(self.setup.schedule(step - 1))
    metrics.trained(step, values)


class _Metrics:
  """Progress on the terminal; metrics as JSON lines and for TensorBoard."""

  def __init__(self, config: ml_collections.ConfigDict, step: int):
    self._config = config
    self._first = self._last = (step, time.monotonic())
    self._path = pathlib.Path(config.workdir) / "metrics.jsonl"
    self._board = None
    if jax.process_index() == 0:
      _keep_until(self._path, step)
      if config.tensorboard:
        import tensorboardX

        self._board = tensorboardX.SummaryWriter(
          os.path.join(config.workdir, "tensorboard"), purge_step=step + 1
        )

  def __enter__(self) -> "_Metrics":
    return self

  def __exit__(self, *_) -> None:
    if self._board:
      self._board.close()

  def trained(self, step: int, values: dict[str, float]) -> None:
    """Takes the metrics of a step; tells of every `log_every`-th."""
    self._write(step, "train", values)
    if step % self._config.log_every and step != self._config.steps:
      return
    now = time.monotonic()
    steps, seconds = step - self._last[0], now - self._last[1]
    self._last = (step, now)
    slots = self._config.batch_size * self._config.length
    left = self._config.steps - step
    mean_seconds = (now - self._first[1]) / (step - self._first[0])
    self._say(
      step,
      f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
      f"grad {values['grad_norm']:.2f}  "
      f"{steps * slots / max(seconds, 1e-9):,.0f} tokens/s  "
      f"ETA {_duration(left * mean_seconds)}",
    )

  def evaluated(self, step: int, values: dict[str, float]) -> None:
    """Takes held-out metrics, and tells of them."""
    self._write(step, "heldout", values)
    self._say(
      step,
      f"held out: loss {values['loss']:.4f}  bits per byte "
      f"{values['bits_per_byte']:.4f}",
    )

  def _say(self, step: int, text: str) -> None:
    if jax.process_index() == 0:
      print(f"step {step}/{self._config.steps}  {text}", flush=True)

  def _write(self, step: int, kind: str, values: dict[str, float]) -> None:
    if jax.process_index() != 0:
      return
    with self._path.open("a") as f:
      f.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(f"{kind}/{name}", value, step)


def _keep_until(path: pathlib.Path, step: int) -> None:
  """Drops the lines of steps that are about to be taken again."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except json.JSONDecodeError:
      continue  # A line cut short by a kill.
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(kept))
  os.replace(temporary, path)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class _Terminated:
  """True once SIGTERM has come; the loop then ends at the next step."""

  def __enter__(self) -> "_Terminated":
    self._came = False
    self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def _note(self, *_) -> None:
    self._came = True

  def __bool__(self) -> bool:
    return self._came
