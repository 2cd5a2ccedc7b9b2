"""The trainer: restore or start, step, report, save, whatever is trained.

A `RunSpec` says what; its task gives the loss, the data and what is measured.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import cli, inputs
from gemma_funnel.convert.reader import base_fingerprints
from gemma_funnel.convert.run import (
  INPUTS,
  fingerprints_of,
  tokenizer_fingerprint,
)
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import processes, sharding
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import init_state, workdir
from gemma_funnel.training import optimizer as optimizer_lib
from gemma_funnel.training import step as step_lib
from gemma_funnel.training import watchdog as watchdog_lib
from gemma_funnel.training.init_state import Params, TrainState
from gemma_funnel.training.metric_writer import MetricWriter
from gemma_funnel.training.spec import Evaluate, RunSpec


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended."""

  model: nnx.Module  # Of the last parameters, or the best by `stopping`.
  data: Any  # What the task loaded: the corpus of text.
  steps: int  # That the run has taken in all.
  finished: bool  # False if a SIGTERM ended it early.


def train(
  spec: RunSpec, make_evaluate: Callable[[Any, RunSpec], Evaluate] | None = None
) -> Result:
  """Trains, or goes on training, the run in `spec.workdir`.

  The same spec resumes an interrupted run at its newest checkpoint, and takes
  the same steps that it would have taken. SIGTERM saves and returns.

  Args:
    spec: of `pretrain.resolve` or `finetune.resolve`.
    make_evaluate: gives what measures the model every `eval_every` steps, of
      the data and the spec; None is the task's own.

  Raises:
    ValueError: a mistake in the data or the folder, or processes that differ.
    FloatingPointError: a loss or gradient norm that is not finite, or losses
      that rise again each time the run goes back.
  """
  processes.assert_same_config(spec.config)
  task = spec.task
  loss = task.make_loss(spec)
  init, state_shapes = init_state.make_init(spec)  # Fails on a wrong mesh.
  model = Transformer.abstract(spec.model_config, spec.stages)
  loop = spec.loop
  with contextlib.ExitStack() as stack:
    stack.enter_context(workdir.hold(spec.workdir))
    workdir.init_workdir(spec.config, free=task.free_keys)
    data = task.load_data(spec)
    found = processes.on_host0(lambda: _fingerprints(spec))
    # Batches may have worker processes.
    batches = stack.enter_context(contextlib.closing(task.batches(spec, data)))
    frozen_params = init_state.load_frozen(spec)

    def assemble(params: Params) -> nnx.Module:
      trunk = init_state.model_params(spec, params, frozen_params)
      merged = nnx.merge(nnx.graphdef(model), trunk)
      return task.assemble(spec, merged, params)

    evaluate = (make_evaluate or task.make_evaluate)(data, spec)
    stack.enter_context(jax.set_mesh(spec.mesh))
    checkpoints = stack.enter_context(
      checkpoint_lib.Checkpoints(
        spec.workdir, loop.keep, loop.keep_best, loop.keep_period
      )
    )
    watchdog = stack.enter_context(watchdog_lib.Watchdog(loop.watchdog_minutes))
    stack.enter_context(watchdog_lib.Peers())
    termination = stack.enter_context(watchdog_lib.Termination())
    trainer = _Trainer(
      spec,
      state_shapes,
      frozen_params,
      step_lib.make_train_step(spec, loss, state_shapes),
      batches,
      lambda params: evaluate(assemble(params)),
      checkpoints,
      watchdog,
      found,
    )
    trainer.begin(lambda: init(frozen_params))
    trainer.run(termination)
  return Result(assemble(trainer.result), data, trainer.step, trainer.finished)


def _fingerprints(spec: RunSpec) -> dict[str, str]:
  """Of the data, the tokenizer, and the base where steps depend on it."""
  found = {f"data:{k}": v for k, v in spec.task.fingerprints(spec).items()}
  found |= tokenizer_fingerprint(workdir.path_of(spec.workdir))
  if spec.base and (spec.lora or spec.task.distills):
    found |= base_fingerprints(spec.base.path)
  return found


@dataclasses.dataclass
class _Counts:
  """What is known of a run besides its state; saved with it."""

  skipped: int = 0
  skipped_in_a_row: int = 0
  rollbacks: int = 0


@dataclasses.dataclass
class _Trainer:
  """A run, and how it advances."""

  spec: RunSpec
  state_shapes: TrainState
  frozen_params: dict[str, Params]
  train_step: Callable
  batches: Any
  evaluate: Callable[[Params], dict[str, float | None]]
  checkpoints: checkpoint_lib.Checkpoints
  watchdog: watchdog_lib.Watchdog
  inputs: dict[str, str]  # Fingerprints of what the run depends on.

  step: int = 0
  state: TrainState | None = None
  # Parameters of the best evaluation, where a metric may end the run.
  best: dict[str, Any] | None = None
  counts: _Counts = dataclasses.field(default_factory=_Counts)
  clock: dict[str, float] = dataclasses.field(default_factory=dict)
  heldout_loss: float | None = None
  saved_at: float = 0.0

  def begin(self, init: Callable[[], TrainState]) -> None:
    """Restores the newest checkpoint, or starts."""
    spec, rollback = self.spec, self.spec.loop.rollback
    self.spikes = watchdog_lib.Spikes(rollback.factor, rollback.window)
    # Handed to the step: runs that differ by a seed alone share a program.
    self.key = jax.random.key(spec.seed)
    self.saved_at = time.monotonic()
    self.watchdog.heard("starting or restoring the run")
    if processes.broadcast_from_host0(self.checkpoints.latest()) is not None:
      progress = self._restore()
      self._check_inputs(progress)
      self.batches.set_state(progress["data"])
      self.counts = _Counts(**progress["counts"])
      self.clock = progress["clock"]
      _say(f"resuming {spec.workdir} at step {self.step}")
    else:
      self.state = init()
      if spec.task.stopping:
        self.best = _best(self.state.params, -math.inf, 0, 0)
    count = sum(x.size for x in jax.tree.leaves(self.state_shapes.params))
    _say(f"{spec.workdir}: {spec.task.describe(spec, count)}")

  def _check_inputs(self, progress: dict[str, Any]) -> None:
    kept = fingerprints_of(progress)
    if kept:  # Version 0.1 kept none.
      what = f"the run in {self.spec.workdir}"
      accept = self.spec.loop.accept_changed
      inputs.require_unchanged(what, kept, self.inputs, accept)

  @property
  def finished(self) -> bool:
    if self.step >= self.spec.steps:
      return True
    patience = self.spec.task.stopping and self.spec.task.stopping.patience
    return bool(patience) and int(self.best["waited"]) >= patience

  @property
  def result(self) -> Params:
    """The last parameters; of a finished run the best, or the averages."""
    if not self.finished:
      return self.state.params
    return self._measured() if self.best is None else self.best["weights"]

  def save(self, metrics: MetricWriter) -> None:
    params = self.result if self.finished else self.state.params
    trees = {**params, "opt_state": self.state.opt_state}
    if self.best is not None:
      trees["best"] = self.best
    states = processes.gather(self.batches.get_state())
    progress = {
      "data": self.spec.task.merge_data_states(states),
      "counts": dataclasses.asdict(self.counts),
      "clock": metrics.clock(),
      INPUTS: self.inputs,
    }
    self.checkpoints.save(
      self.step, trees, progress, self.spec.config, self.heldout_loss
    )
    self.saved_at = time.monotonic()

  def _restore(self) -> dict[str, Any]:
    params, opt_state = self.state_shapes
    trees = {**params, "opt_state": opt_state}
    if self.spec.task.stopping:
      best = jax.eval_shape(lambda p: _best(p, -math.inf, 0, 0), params)
      trees["best"] = sharding.place(best, self.spec.mesh)
    self.step, trees, progress = self.checkpoints.restore(trees)
    self.best = trees.get("best")
    params = {name: trees[name] for name in params}
    self.state = TrainState(params, trees["opt_state"])
    return progress

  def run(self, termination: watchdog_lib.Termination) -> None:
    spec, loop = self.spec, self.spec.loop
    # Metrics of a step are read when the next one is under way, so that the
    # device never waits for the host. A checkpoint is written only of steps
    # whose metrics have been read and are finite.
    pending = None
    with MetricWriter(spec, self.step, self.clock) as metrics:
      while not self.finished and not termination.by(self.step):
        self.watchdog.heard(f"step {self.step + 1}")
        metrics.trace(self.step + 1)
        taken = self._take_step()
        went_back = self._read(metrics, pending)
        pending = None
        if went_back:
          continue
        pending = taken
        save, evaluate = self._saves(), self._due(loop.eval_every)
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
      self.save(metrics)
      self.checkpoints.wait()
    if self.finished:
      _say(f"finished {spec.workdir} at step {self.step}")
    else:
      _say(
        f"SIGTERM: saved {spec.workdir} at step {self.step}; the same "
        "command goes on from there"
      )

  def _take_step(self):
    """Begins a step; (its number, metrics, slots, FLOPs)."""
    spec = self.spec
    host, variant = next(self.batches), spec.funnels.at(self.step)
    self.state, values = self.train_step(
      variant,
      self.state,
      self.frozen_params,
      sharding.put_batch(host, spec.mesh),
      jax.random.fold_in(self.key, self.step),
    )
    self.step += 1
    # Of the whole batch, padding included.
    slots = host["tokens"].size * sharding.row_share(spec.mesh)[1]
    return self.step, values, slots, self._flops(variant)

  @functools.cached_property
  def _flops(self) -> Callable[..., int | None]:
    spec = self.spec
    if spec.optimizer.freeze:  # What is left out is not known.
      return lambda variant: None
    return functools.cache(lambda stages: spec.task.step_flops(spec, stages))

  def _due(self, every: int) -> bool:
    return self.step % every == 0 or self.step == self.spec.steps

  def _saves(self) -> bool:
    loop = self.spec.loop
    if self._due(loop.checkpoint_every):
      return True
    # Processes have to agree, and ask each other only now and then.
    if loop.checkpoint_minutes is None or self.step % loop.log_every:
      return False
    minutes = (time.monotonic() - self.saved_at) / 60
    return processes.broadcast_from_host0(minutes >= loop.checkpoint_minutes)

  def _measured(self) -> Params:
    """What is evaluated: averages, where the optimizer has them."""
    params, opt_state = self.state
    found = optimizer_lib.averaged(opt_state, params)
    return params if found is None else found

  def _evaluate(self, metrics: MetricWriter) -> None:
    self.watchdog.heard(f"the evaluation after step {self.step}")
    values = self.evaluate(self._measured())
    metrics.evaluated(self.step, values)
    self.heldout_loss = values.get("loss")
    if self.spec.task.stopping is None:
      return
    value = values[self.spec.task.stopping.metric]
    if value is None or not math.isfinite(value):
      value = -math.inf
    # As it is kept: a value in more digits would forever be above itself.
    value = float(np.float32(value))
    best, waited = float(self.best["value"]), self.best["waited"] + 1
    if value > best or best == -math.inf:
      # Where none had a value, the newest parameters are better than the first.
      waited = 0 if value > best else waited
      self.best = _best(self._measured(), value, self.step, waited)
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
    values["learning_rate"] = float(self.spec.optimizer.schedule(step - 1))
    values["skipped"] = self.counts.skipped
    metrics.trained(step, values, slots, flops)
    return False

  def _skipped(self, step: int, name: str, value: float) -> None:
    loop = self.spec.loop
    self.counts.skipped += 1
    self.counts.skipped_in_a_row += 1
    in_a_row = self.counts.skipped_in_a_row
    if loop.on_nonfinite == "skip" and in_a_row <= loop.max_skipped:
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
    most = self.spec.loop.rollback.most
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
    cli.tell(text)


def _best(params: Params, value: float, step: int, waited):
  """A checkpoint's tree; parameters are copied: the next step donates them."""
  return {
    "weights": jax.tree.map(jnp.copy, params),
    "value": jnp.float32(value),
    "step": jnp.int32(step),
    "waited": jnp.int32(waited),
  }
