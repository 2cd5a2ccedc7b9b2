"""Time and memory of whole training steps: forward, backward, optimizer.

Variants are funnels, chunks of the loss and remats; each is compared with the
first of its kind in the same rounds, all else as the configuration says.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from gemma_funnel.checks import require, require_positive
from gemma_funnel.config import OFF
from gemma_funnel.evaluation import plots, report, timing
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.hardware import chip_of
from gemma_funnel.training import init_state, pretrain
from gemma_funnel.training import step as step_lib
from gemma_funnel.training.spec import RunSpec

Row = dict[str, Any]
KEYS = """
  pretrain funnels loss_chunks remats memory_limit_gib warmup repeats seed out
""".split()


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a step is measured with; `chunk` 0 is all positions at once."""

  funnel: str
  chunk: int
  remat: str


def _setup(config: ml_collections.ConfigDict, variant: Variant):
  changed = config.pretrain.copy_and_resolve_references()
  changed.funnel = variant.funnel
  changed.loss_chunk = variant.chunk or changed.length
  changed.model.remat = variant.remat
  return pretrain.resolve(changed)


class _Steps:
  """Compiled steps that share weights, optimizer state and a batch."""

  def __init__(self, config: ml_collections.ConfigDict, protocol):
    self.config, self.protocol, self.state = config, protocol, None
    stats = jax.devices()[0].memory_stats() or {}
    if config.memory_limit_gib is not None:  # Bytes that a step may use.
      self.limit = config.memory_limit_gib * 2**30
    elif "bytes_limit" in stats:
      self.limit = stats["bytes_limit"]
    else:
      page, pages = map(os.sysconf, ("SC_PAGE_SIZE", "SC_AVPHYS_PAGES"))
      self.limit = 0.9 * page * pages

  def build(self, variant: Variant) -> timing.Program:
    """Compiles a step; one that needs more than there is fails when called."""
    chunk = f"chunk {variant.chunk}" if variant.chunk else "whole loss"
    name = f"{variant.funnel}, {chunk}, remat {variant.remat}"
    self.protocol.log(f"  compiling {name}")
    setup = _setup(self.config, variant)
    began = self.protocol.clock()
    init, state_shapes = init_state.make_init(setup)
    with jax.set_mesh(setup.mesh):
      loss = setup.task.make_loss(setup)
      step = step_lib.make_train_step(setup, loss, state_shapes)
      args = init_state.load_frozen(setup), _batch(setup), jax.random.key(0)
      compiled = step.lower(setup.stages, state_shapes, *args).compile()
      compile_s = self.protocol.clock() - began
      peak = timing.peak_bytes(compiled)
      call = functools.partial(self._call, compiled, *args)
      if (peak or 0) > self.limit:
        call = functools.partial(_too_large, peak, self.limit)
      elif self.state is None:
        self.state = init(args[0])
    return timing.Program(call, compile_s, peak)

  def _call(self, compiled, *rest):
    self.state, metrics = compiled(self.state, *rest)
    return metrics


def _too_large(peak: int, limit: float):
  raise MemoryError(
    f"it needs {peak / 2**30:.1f} GiB, of {limit / 2**30:.1f}: not run"
  )


def _batch(spec: RunSpec) -> dict[str, jax.Array]:
  """Rows full of one text."""
  rng = np.random.default_rng(spec.seed)
  shape = (spec.batch_size, spec.length)
  host = {
    "tokens": rng.integers(5, spec.model_config.vocab_size, shape),
    "segment": np.ones(shape),
    "position": np.tile(np.arange(spec.length), (spec.batch_size, 1)),
  }
  return sharding.put_batch(
    {name: x.astype(np.int32) for name, x in host.items()}, spec.mesh
  )


def measure(config: ml_collections.ConfigDict) -> list[Row]:
  """Times the steps that a configuration asks for.

  Returns:
    A row for each variant: `funnel`, `loss_chunk`, `remat`; what
    `timing.measure_together` and `with_rates` give; `memory_ratio` to what it
    is compared with; and, on a device whose peak is known, `mfu`.

  Raises:
    ValueError: a value that cannot be.
  """
  timing.require_ints("loss_chunks", tuple(config.loss_chunks), 0)
  require(
    len(config.remats) > 0,
    "remats=(): expected one at least, such as ('none',)",
  )
  if config.memory_limit_gib is not None:
    require_positive("memory_limit_gib", config.memory_limit_gib)
  protocol = timing.Protocol(config.repeats, config.warmup, config.seed)
  base = Variant(OFF, config.loss_chunks[0], config.remats[0])
  changes = [
    *(dict(funnel=value) for value in config.funnels),
    *(dict(chunk=value) for value in config.loss_chunks),
    *(dict(remat=value) for value in config.remats),
  ]
  variants = [base, *(dataclasses.replace(base, **c) for c in changes)]
  variants = dict.fromkeys(variants, base)  # What each is compared with.
  setups = {variant: _setup(config, variant) for variant in variants}
  steps = _Steps(config, protocol)
  measured = timing.measure_together(
    {v: functools.partial(steps.build, v) for v in variants}, variants, protocol
  )
  flops = {v: s.task.step_flops(s, s.stages) for v, s in setups.items()}
  rows = []
  for variant in variants:
    setup, found = setups[variant], measured[variant]
    row = {
      "batch": setup.batch_size,
      "length": setup.length,
      "funnel": variant.funnel,
      "loss_chunk": variant.chunk,
      "remat": variant.remat,
    }
    tokens = setup.batch_size * setup.length
    row |= timing.with_rates(found, flops[variant], flops[base], tokens)
    chip = chip_of(setup.mesh.devices.flat[0])
    if chip and row["flops_per_s"]:
      row["mfu"] = row["flops_per_s"] / (chip.flops * setup.mesh.size)
    peak, other = row.get("peak_bytes"), measured[base].get("peak_bytes")
    if peak and other:
      row["memory_ratio"] = peak / other
    rows.append(row)
  return rows


COLUMNS = report.columns(
  "batch",
  "length",
  "funnel",
  report.Column("loss_chunk", "loss chunk", "d"),
  report.Column("remat", "remat"),
  *report.TIMES[:-1],
  report.percent("mfu", "MFU"),
  report.Column("memory_ratio", "memory ratio", ".2f"),
  "error",
)


def run(config: ml_collections.ConfigDict) -> list[Row]:
  """Measures, and writes training.json, .md and .png to `config.out`.

  Raises:
    ValueError: a key that is missing, or a value out of range.
    RuntimeError: no variant compiles.
  """
  report.claim(config.out, "training")
  rows = measure(config)
  model = config.pretrain.model
  report.write(
    config.out,
    "training",
    rows,
    COLUMNS,
    f"Training steps of {model.num_layers} layers of width {model.embed_dim}, "
    f"{model.dtype}, {config.pretrain.optimizer.name}",
    plots.training,
    settings=dict(pretrain=config.pretrain.to_dict()),
    notes=[
      f"Medians of {config.repeats} interleaved rounds. Reductions are of "
      "the first row's time; ideal, of its FLOPs; memory as compiled."
    ],
  )
  # What needs too much memory has been compiled: that it says is a result.
  if all(row.get("peak_bytes") is None for row in rows):
    raise RuntimeError(f"every variant failed: {rows[0]['error']}")
  return rows
