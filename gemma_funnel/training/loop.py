"""The training loop: restore or start, step, report, save, whatever is trained.

`pretrain` and `finetune` say what (a `Job`); the loop knows nothing of models.
"""

from collections.abc import Callable, Hashable
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict
import optax

from gemma_funnel.parallel import processes, sharding
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import optimizer as optimizer_lib
from gemma_funnel.training import step as step_lib
from gemma_funnel.training import watchdog as watchdog_lib
from gemma_funnel.training.metric_writer import MetricWriter

# Trees of parameters by the name that a checkpoint has them under: "params" of
# the model, and "head" of what is fine-tuned on it.
Weights = dict[str, Any]


def default_config(**changes: Any) -> dict[str, Any]:
  """What the loop reads of a configuration, every key with its default.

  Keys:
    accumulate: parts that a batch is cut into, one after the other in memory.
    mesh: axes of the device mesh; -1 is what is left.
    log_every: steps between lines of progress.
    eval_every: steps between evaluations.
    checkpoint_every: steps between checkpoints.
    checkpoint_minutes: and as many minutes after the last; unset is never.
    keep: how many checkpoints are kept, the newest; keep_best, how many of the
      least held-out loss besides; keep_period, and those of its multiples.
    on_nonfinite: "stop" at a loss or gradient that is not finite, or "skip" the
      step, up to max_skipped times in a row.
    rollback: go back to the last checkpoint, and on with the data, when a loss
      is `factor` times the median of the last `window`; `most` times. A factor
      that is unset never does.
    watchdog_minutes: end a run of which nothing is heard for so long; unset
      never does. It has to be longer than a compilation.
    tensorboard: whether TensorBoard's files are written.
    wandb: the project on Weights & Biases; unset is none.
    profile_steps: the first and the last step of a trace; () is none.

  Args:
    **changes: other values.
  """
  values = dict(
    accumulate=1,
    mesh=sharding.default_config().to_dict(),
    log_every=20,
    eval_every=100,
    checkpoint_every=100,
    checkpoint_minutes=config_dict.placeholder(float),
    keep=2,
    keep_best=0,
    keep_period=config_dict.placeholder(int),
    on_nonfinite="stop",
    max_skipped=10,
    rollback=dict(factor=config_dict.placeholder(float), window=100, most=3),
    watchdog_minutes=config_dict.placeholder(float),
    tensorboard=True,
    wandb=config_dict.placeholder(str),
    profile_steps=(),
  )
  unknown = changes.keys() - values.keys()
  if unknown:
    raise ValueError(f"the loop has no keys {sorted(unknown)}")
  return {**values, **changes}


def check_config(config: ml_collections.ConfigDict) -> None:
  """Checks what `default_config` has.

  Raises:
    ValueError: a value that cannot be, named.
  """
  for name in (
    "accumulate",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "keep_period",
    "max_skipped",
  ):
    value = config[name]
    if value is not None and not value >= 1:  # A NaN neither.
      raise ValueError(f"{name}={value}: expected at least 1")
  for name in ("checkpoint_minutes", "watchdog_minutes"):
    value = config[name]
    if value is not None and not value > 0:
      raise ValueError(f"{name}={value}: expected > 0")
  if not config.keep_best >= 0:
    raise ValueError(f"keep_best={config.keep_best}: expected >= 0")
  if config.on_nonfinite not in ("stop", "skip"):
    raise ValueError(
      f"on_nonfinite={config.on_nonfinite!r}: expected 'stop' or 'skip'"
    )
  factor = config.rollback.factor
  if factor is not None and not factor > 1:
    raise ValueError(f"rollback.factor={factor}: expected > 1")
  for name in ("window", "most"):
    if not config.rollback[name] >= 1:
      raise ValueError(
        f"rollback.{name}={config.rollback[name]}: expected at least 1"
      )
  traced = tuple(config.profile_steps)
  if traced and not (len(traced) == 2 and 1 <= traced[0] <= traced[1]):
    raise ValueError(
      f"profile_steps={traced}: expected the first and the last step of a "
      "trace, such as 10,15, or none"
    )


@dataclasses.dataclass(frozen=True)
class Stopping:
  """Training ends when a held-out metric no longer improves.

  Attributes:
    metric: what `Job.evaluate` calls it.
    higher: whether more of it is better.
    patience: evaluations without an improvement that end the run; None never
      does. The weights of the best evaluation are the run's result either way.
  """

  metric: str
  higher: bool
  patience: int | None


@dataclasses.dataclass(frozen=True)
class Job:
  """A run: what is trained on what, and how.

  Attributes:
    config: saved with each checkpoint; the loop reads `workdir`, `seed`,
      `optimizer` and what `default_config` has.
    about: a line on what is trained.
    steps: how many there are.
    mesh: what weights and batches lie on.
    optimizer: of all weights.
    schedule: its learning rate by step.
    abstract: (weights, optimizer state) as ShapeDtypeStructs with shardings.
    init: gives both from a seed.
    loss: (member, weights, frozen, batch, key) -> (loss, metrics), to be
      traced.
    frozen: arrays that the loss needs and that are not trained; None is none.
    member: what is static of the step after so many; each is compiled once.
    data: an iterator of host batches with "tokens" [B, T], this process's
      rows, with `get_state()` and `set_state()` of what JSON can hold.
    evaluate: held-out metrics of weights.
    stopping: None is to train to the end, and to keep what is there then.
    merge: makes the run's data state of those of all processes, in order.
    flops: of a member's step, on all devices; None where they are not known.
  """

  config: ml_collections.ConfigDict
  about: str
  steps: int
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  abstract: tuple[Weights, Any]
  init: Callable[[int], tuple[Weights, Any]]
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  member: Callable[[int], Hashable]
  data: Any
  evaluate: Callable[[Weights], dict[str, float | None]]
  frozen: Any = None
  stopping: Stopping | None = None
  merge: Callable[[list[Any]], Any] = lambda states: states[0]
  flops: Callable[[Hashable], float] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run, or a part of one, ended.

  Attributes:
    weights: the last ones, or the best if the job stops by a metric.
    steps: how many the run has taken in all.
    finished: False if a SIGTERM ended it early.
  """

  weights: Weights
  steps: int
  finished: bool


def run(job: Job) -> Result:
  """Trains, or goes on training, the run in `job.config.workdir`.

  The same job resumes an interrupted run at its newest checkpoint, and takes
  the same steps that it would have taken. SIGTERM saves and returns.

  Raises:
    FloatingPointError: a loss or gradient norm that is not finite, or losses
      that rise again each time the run goes back.
  """
  config = job.config
  with (
    jax.set_mesh(job.mesh),
    checkpoint_lib.Checkpoints(
      config.workdir, config.keep, config.keep_best, config.keep_period
    ) as checkpoints,
    watchdog_lib.Watchdog(config.watchdog_minutes) as watchdog,
    watchdog_lib.Termination() as termination,
  ):
    loop = _Loop(job, checkpoints, watchdog)
    loop.run(termination)
    return Result(loop.weights, loop.step, loop.finished)


@dataclasses.dataclass
class _Counts:
  """What is known of a run besides its weights; saved with them."""

  skipped: int = 0
  skipped_in_a_row: int = 0
  rollbacks: int = 0


class _Loop:
  """The state of a run, and how it advances."""

  def __init__(
    self,
    job: Job,
    checkpoints: checkpoint_lib.Checkpoints,
    watchdog: watchdog_lib.Watchdog,
  ):
    self.job, self.checkpoints, self.watchdog = job, checkpoints, watchdog
    config = job.config
    self.train_step = step_lib.make_train_step(
      job.loss, job.optimizer, job.abstract, job.mesh, config
    )
    self.spikes = watchdog_lib.Spikes(
      config.rollback.factor, config.rollback.window
    )
    # Handed to the step: runs that differ by a seed alone share a program.
    self.key = jax.random.key(config.seed)
    self.counts, self.clock = _Counts(), {}
    self.heldout_loss = None
    self.saved_at = time.monotonic()
    watchdog.heard("starting or restoring the run")
    if processes.broadcast_from_host0(checkpoints.latest()) is not None:
      progress = self._restore()
      self.job.data.set_state(progress["data"])
      self.counts = _Counts(**progress["counts"])
      self.clock = progress["clock"]
      _say(f"resuming {config.workdir} at step {self.step}")
    else:
      self.step = 0
      self.weights, self.opt_state = job.init(config.seed)
      self.best = _begin(job.stopping, self.weights)
    _say(f"{config.workdir}: {job.about}")

  @property
  def finished(self) -> bool:
    if self.step >= self.job.steps:
      return True
    patience = self.job.stopping and self.job.stopping.patience
    return bool(patience) and int(self.best["waited"]) >= patience

  def save(self, metrics: MetricWriter) -> None:
    trees = {**self.weights, "opt_state": self.opt_state}
    if self.best is not None:
      trees["best"] = self.best
    states = processes.gather(self.job.data.get_state())
    progress = {
      "data": self.job.merge(states),
      "counts": dataclasses.asdict(self.counts),
      "clock": metrics.clock(),
    }
    self.checkpoints.save(
      self.step, trees, progress, self.job.config, self.heldout_loss
    )
    self.saved_at = time.monotonic()

  def _restore(self) -> dict[str, Any]:
    weights, opt_state = self.job.abstract
    trees = {**weights, "opt_state": opt_state}
    if self.job.stopping:
      trees["best"] = jax.eval_shape(
        lambda w: _begin(self.job.stopping, w), weights
      )
      trees["best"] = sharding.place(trees["best"], self.job.mesh)
    self.step, trees, progress = self.checkpoints.restore(trees)
    self.opt_state = trees["opt_state"]
    self.best = trees.get("best")
    self.weights = {name: trees[name] for name in weights}
    return progress

  def run(self, termination: watchdog_lib.Termination) -> None:
    job, config = self.job, self.job.config
    # Metrics of a step are read when the next one is under way, so that the
    # device never waits for the host. A checkpoint is written only of steps
    # whose metrics have been read and are finite.
    pending = None
    with MetricWriter(
      config, self.step, job.steps, job.mesh, self.clock
    ) as metrics:
      while not self.finished and not termination.by(self.step):
        self.watchdog.heard(f"step {self.step + 1}")
        metrics.trace(self.step + 1)
        host, member = next(job.data), job.member(self.step)
        self.weights, self.opt_state, values = self.train_step(
          member,
          self.weights,
          self.opt_state,
          job.frozen,
          sharding.put_batch(host, job.mesh),
          jax.random.fold_in(self.key, self.step),
        )
        self.step += 1
        went_back = self._read(metrics, pending)
        pending = None
        if went_back:
          continue
        flops = job.flops and job.flops(member)
        pending = (self.step, values, _slots(host, job.mesh), flops)
        save, evaluate = self._saves(), self._due(config.eval_every)
        if save or evaluate:
          went_back = self._read(metrics, pending)
          pending = None
          if went_back:
            continue
        # All metrics up to a checkpoint are written before it, so that a run
        # that resumes at it has them.
        self.heldout_loss = None
        if evaluate:
          with metrics.elsewhere():
            self._evaluate(metrics)
        if save and not self.finished:
          with metrics.elsewhere():
            self.save(metrics)
      self._read(metrics, pending)
      self.watchdog.heard("the last checkpoint")
      if self.finished:
        self.weights = self._result()
      self.save(metrics)
      self.checkpoints.wait()
    if self.finished:
      _say(f"finished {config.workdir} at step {self.step}")
    else:
      _say(
        f"SIGTERM: saved {config.workdir} at step {self.step}; the same "
        "command goes on from there"
      )

  def _due(self, every: int) -> bool:
    return self.step % every == 0 or self.step == self.job.steps

  def _saves(self) -> bool:
    config = self.job.config
    if self._due(config.checkpoint_every):
      return True
    # Processes have to agree, and ask each other only now and then.
    if config.checkpoint_minutes is None or self.step % config.log_every:
      return False
    minutes = (time.monotonic() - self.saved_at) / 60
    return processes.broadcast_from_host0(minutes >= config.checkpoint_minutes)

  def _shown(self) -> Weights:
    """The weights that are measured: averages, where the optimizer has them."""
    found = optimizer_lib.averaged(self.opt_state, self.weights)
    return self.weights if found is None else found

  def _result(self) -> Weights:
    return self._shown() if self.best is None else self.best["weights"]

  def _evaluate(self, metrics: MetricWriter) -> None:
    self.watchdog.heard(f"the evaluation after step {self.step}")
    values = self.job.evaluate(self._shown())
    metrics.evaluated(self.step, values)
    self.heldout_loss = values.get("loss")
    stopping = self.job.stopping
    if stopping is None:
      return
    value = values[stopping.metric]
    if value is None or not math.isfinite(value):
      value = -math.inf
    elif not stopping.higher:
      value = -value
    best, waited = float(self.best["value"]), self.best["waited"] + 1
    if value > best or best == -math.inf:
      # Where none had a value, the newest weights are better than the first.
      waited = 0 if value > best else waited
      # A copy: the next step gives the weights away.
      weights = jax.tree.map(jnp.copy, self._shown())
      self.best = _best(weights, value, self.step, waited)
    else:
      self.best |= {"waited": waited}

  def _read(self, metrics: MetricWriter, pending) -> bool:
    """Takes the metrics of a step; returns whether the run has gone back."""
    if pending is None:
      return False
    step, values, slots, flops = pending
    values = {name: float(value) for name, value in values.items()}
    bad = [n for n in ("loss", "grad_norm") if not math.isfinite(values[n])]
    if bad:
      self._skipped(step, bad[0], values[bad[0]])
    else:
      self.counts.skipped_in_a_row = 0
      if self.spikes.is_spike(values["loss"]):
        return self._go_back(metrics, step, values["loss"])
    values["learning_rate"] = float(self.job.schedule(step - 1))
    values["skipped"] = self.counts.skipped
    metrics.trained(step, values, slots, flops)
    return False

  def _skipped(self, step: int, name: str, value: float) -> None:
    config = self.job.config
    self.counts.skipped += 1
    self.counts.skipped_in_a_row += 1
    in_a_row = self.counts.skipped_in_a_row
    if config.on_nonfinite == "skip" and in_a_row <= config.max_skipped:
      _say(f"step {step}: {name} is {value}; skipped ({in_a_row} in a row)")
      return
    self.checkpoints.wait()
    good = self.checkpoints.latest()
    again = f", as in {in_a_row - 1} steps before" if in_a_row > 1 else ""
    raise FloatingPointError(
      f"{name} is {value} at step {step}{again}; the last good "
      f"checkpoint is {'none' if good is None else f'of step {good}'}"
    )

  def _go_back(self, metrics: MetricWriter, step: int, loss: float) -> bool:
    self.checkpoints.wait()
    if processes.broadcast_from_host0(self.checkpoints.latest()) is None:
      return False  # A run that has just begun has nothing to go back to.
    self.counts.rollbacks += 1
    most = self.job.config.rollback.most
    if self.counts.rollbacks > most:
      raise FloatingPointError(
        f"loss is {loss:.4g} at step {step}, far above those before, after "
        f"{most} rollbacks"
      )
    self._restore()  # All but the data, which go on.
    metrics.rewind(self.step)
    _say(
      f"step {step}: loss {loss:.4g} is far above those before; back to step "
      f"{self.step}, on with the data ({self.counts.rollbacks} of {most})"
    )
    return True


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def _slots(host, mesh: jax.sharding.Mesh) -> int:
  """Tokens of the whole batch, padding included."""
  return host["tokens"].size * sharding.row_share(mesh)[1]


def _best(weights: Weights, value: float, step: int, waited: int):
  return {
    "weights": weights,
    "value": jnp.float32(value),
    "step": jnp.int32(step),
    "waited": jnp.int32(waited),
  }


def _begin(stopping: Stopping | None, weights: Weights):
  if stopping is None:
    return None
  return _best(jax.tree.map(jnp.copy, weights), -math.inf, 0, 0)
