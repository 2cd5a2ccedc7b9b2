"""The training loop: restore or start, step, report, save, whatever is trained.

`pretrain` and `finetune` say what (a `Job`); the loop knows nothing of models.
"""

from collections.abc import Callable, Hashable
import dataclasses
import math
import signal
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import sharding
from gemma_funnel.training.progress import Metrics

# Trees of parameters by the name that a checkpoint has them under: "params" of
# the model, and "head" of what is fine-tuned on it.
Weights = dict[str, Any]


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
      `log_every`, `eval_every`, `checkpoint_every`, `keep`, `tensorboard`.
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
    data: a grain iterator of host batches with "tokens" [B, T].
    evaluate: held-out metrics of weights.
    stopping: None is to train to the end, and to keep what is there then.
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


def place(tree, mesh: jax.sharding.Mesh):
  """A tree of shapes, with the shardings that the rules give it on `mesh`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.shardings_of(tree, mesh),
  )


def make_train_step(
  loss, optimizer: optax.GradientTransformation, abstract, mesh
):
  """One pure step, jitted, compiled for each member.

  Returns:
    (member, weights, opt_state, frozen, batch, key) -> (weights, opt_state,
    metrics); weights and state are given away.
  """

  def train_step(member, weights, opt_state, frozen, batch, key):
    of_weights = lambda w: loss(member, w, frozen, batch, key)
    grads, metrics = jax.grad(of_weights, has_aux=True)(weights)
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return optax.apply_updates(weights, updates), opt_state, metrics

  state = jax.tree.map(lambda x: x.sharding, abstract)
  batch = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(
    train_step,
    static_argnums=0,
    # What is frozen stays where it was put.
    in_shardings=(*state, None, batch, whole),
    out_shardings=(*state, whole),
    donate_argnums=(1, 2),
  )


def run(job: Job) -> Result:
  """Trains, or goes on training, the run in `job.config.workdir`.

  The same job resumes an interrupted run at its newest checkpoint, and takes
  the same steps that it would have taken. SIGTERM saves and returns.

  Raises:
    FloatingPointError: a loss or gradient norm that is not finite.
  """
  config = job.config
  with (
    jax.set_mesh(job.mesh),
    checkpoint_lib.Checkpoints(config.workdir, config.keep) as checkpoints,
    _Terminated() as terminated,
  ):
    loop = _Loop(job, checkpoints)
    loop.run(terminated)
    return Result(loop.weights, loop.step, loop.finished)


class _Loop:
  """The state of a run, and how it advances."""

  def __init__(self, job: Job, checkpoints: checkpoint_lib.Checkpoints):
    self.job, self.checkpoints = job, checkpoints
    self.train_step = make_train_step(
      job.loss, job.optimizer, job.abstract, job.mesh
    )
    # Handed to the step: runs that differ by a seed alone share a program.
    self.key = jax.random.key(job.config.seed)
    if checkpoints.latest() is not None:
      self._restore()
      print(f"resuming {job.config.workdir} at step {self.step}", flush=True)
    else:
      self.step = 0
      self.weights, self.opt_state = job.init(job.config.seed)
      self.best = _begin(job.stopping, self.weights)
    print(f"{job.config.workdir}: {job.about}", flush=True)

  @property
  def finished(self) -> bool:
    if self.step >= self.job.steps:
      return True
    patience = self.job.stopping and self.job.stopping.patience
    return bool(patience) and int(self.best["waited"]) >= patience

  def save(self) -> None:
    trees = {**self.weights, "opt_state": self.opt_state}
    if self.best is not None:
      trees["best"] = self.best
    self.checkpoints.save(self.step, trees, self.job.data, self.job.config)

  def _restore(self) -> None:
    weights, opt_state = self.job.abstract
    trees = {**weights, "opt_state": opt_state}
    if self.job.stopping:
      trees["best"] = jax.eval_shape(
        lambda w: _begin(self.job.stopping, w), weights
      )
      trees["best"] = place(trees["best"], self.job.mesh)
    self.step, trees = self.checkpoints.restore(trees, self.job.data)
    self.opt_state = trees["opt_state"]
    self.best = trees.get("best")
    self.weights = {name: trees[name] for name in weights}

  def run(self, terminated: "_Terminated") -> None:
    job, config = self.job, self.job.config
    # Metrics of a step are read when the next one is under way, so that the
    # device never waits for the host. A checkpoint is written only of steps
    # whose metrics have been read and are finite.
    pending = None
    with Metrics(config, self.step, job.steps) as metrics:
      while not self.finished and not terminated:
        host = next(job.data)
        self.weights, self.opt_state, values = self.train_step(
          job.member(self.step), self.weights, self.opt_state, job.frozen,
          sharding.put_batch(host, job.mesh),
          jax.random.fold_in(self.key, self.step),
        )  # fmt: skip
        self.step += 1
        self._read(metrics, pending)
        pending = (self.step, values, host["tokens"].size)
        due = lambda every: self.step % every == 0 or self.step == job.steps
        if due(config.checkpoint_every) or due(config.eval_every):
          self._read(metrics, pending)
          pending = None
        # All metrics up to a checkpoint are written before it, so that a run
        # that resumes at it has them.
        if due(config.eval_every):
          self._evaluate(metrics)
        if due(config.checkpoint_every) and not self.finished:
          self.save()
      self._read(metrics, pending)
      if self.finished and self.best is not None:
        self.weights = self.best["weights"]
      self.save()
      self.checkpoints.wait()
    if not self.finished:
      print(
        f"SIGTERM: saved {config.workdir} at step {self.step}; the same "
        "command goes on from there",
        flush=True,
      )

  def _evaluate(self, metrics: Metrics) -> None:
    values = self.job.evaluate(self.weights)
    metrics.evaluated(self.step, values)
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
      weights = jax.tree.map(jnp.copy, self.weights)
      self.best = _best(weights, value, self.step, waited)
    else:
      self.best |= {"waited": waited}

  def _read(self, metrics: Metrics, pending) -> None:
    if pending is None:
      return
    step, values, slots = pending
    values = {name: float(value) for name, value in values.items()}
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        raise FloatingPointError(
          f"{name} is {values[name]} at step {step}; the last good "
          f"checkpoint is {'none' if good is None else f'of step {good}'}"
        )
    values["learning_rate"] = float(self.job.schedule(step - 1))
    metrics.trained(step, values, slots * jax.process_count())


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
