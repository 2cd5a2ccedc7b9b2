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
from gemma_funnel.training import pretrain, start
from gemma_funnel.training import step as step_lib

Row = dict[str, Any]
KEYS = (
  "pretrain",
  "funnels",
  "loss_chunks",
  "remats",
  "memory_limit_gib",
  "warmup",
  "repeats",
  "seed",
  "out",
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a step is measured with; `chunk` 0 is all positions at once."""

  funnel: str
  chunk: int
  remat: str


def _variants(config: ml_collections.ConfigDict) -> dict[Variant, Variant]:
  """All variants, and what each is compared with."""
  base = Variant(OFF, config.loss_chunks[0], config.remats[0])
  changes = dict(
    funnel=config.funnels, chunk=config.loss_chunks, remat=config.remats
  )
  others = [
    dataclasses.replace(base, **{name: value})
    for name, values in changes.items()
    for value in values
  ]
  return dict.fromkeys([base, *others], base)


def _setup(config: ml_collections.ConfigDict, variant: Variant):
  changed = config.pretrain.copy_and_resolve_references()
  changed.funnel = variant.funnel
  changed.loss_chunk = variant.chunk or changed.length
  changed.model.remat = variant.remat
  return pretrain.make_setup(changed)


class _Steps:
  """Compiled steps that share weights, optimizer state and a batch."""

  def __init__(self, config: ml_collections.ConfigDict, protocol):
    self.config, self.protocol = config, protocol
    self.limit = _memory_limit(config)
    self.state = None

  def build(self, variant: Variant) -> timing.Program:
    """Compiles a step.

    Raises:
      MemoryError: it needs more than there is.
    """
    self.protocol.log(f"  compiling {_name(variant)}")
    setup = _setup(self.config, variant)
    mesh, run = setup.mesh, setup.config
    began = self.protocol.clock()
    init, abstract = start.make_init(setup)
    with jax.set_mesh(mesh):
      step = step_lib.make_train_step(
        pretrain.make_loss(setup), setup.optimizer, abstract, mesh, run
      )
      batch = _batch(run, setup.model_config.vocab_size, mesh)
      key = jax.random.key(0)
      frozen = start.load_frozen(setup)
      args = (*abstract, frozen, batch, key)
      compiled = step.lower(setup.stages, *args).compile()
    compile_s = self.protocol.clock() - began
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    peak = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
    peak -= memory.alias_size_in_bytes
    call = functools.partial(self._call, compiled, frozen, batch, key)
    if peak > self.limit:
      call = functools.partial(_too_large, peak, self.limit)
    elif self.state is None:
      with jax.set_mesh(mesh):
        self.state = init(0, frozen)
    return timing.Program(call, compile_s, peak)

  def _call(self, compiled, *rest):
    weights, opt_state, metrics = compiled(*self.state, *rest)
    self.state = weights, opt_state
    return metrics


def _too_large(peak: int, limit: float):
  raise MemoryError(
    f"it needs {peak / 2**30:.1f} GiB, of {limit / 2**30:.1f}: not run"
  )


def _memory_limit(config: ml_collections.ConfigDict) -> float:
  """Bytes of a device that a step may use."""
  if config.memory_limit_gib is not None:
    return config.memory_limit_gib * 2**30
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _batch(run, vocab_size: int, mesh) -> dict[str, jax.Array]:
  """Rows full of one text."""
  rng = np.random.default_rng(run.seed)
  shape = (run.batch_size, run.length)
  host = {
    "tokens": rng.integers(5, vocab_size, shape),
    "segment": np.ones(shape),
    "position": np.tile(np.arange(run.length), (run.batch_size, 1)),
  }
  return sharding.put_batch(
    {name: x.astype(np.int32) for name, x in host.items()}, mesh
  )


def measure(config: ml_collections.ConfigDict) -> list[Row]:
  """Times the steps that a configuration asks for.

  Returns:
    A row for each variant: `funnel`, `loss_chunk`, `remat`; what
    `timing.measure_together` gives; `ideal_reduction`, of FLOPs, with
    `measured_over_ideal`; `memory_ratio` to what it is compared with;
    `tokens_per_s`, `flops_per_s` and, on a device whose peak is known, `mfu`.

  Raises:
    ValueError: a value that cannot be.
  """
  _check(config)
  protocol = timing.Protocol(config.repeats, config.warmup, config.seed)
  variants = _variants(config)
  setups = {variant: _setup(config, variant) for variant in variants}
  steps = _Steps(config, protocol)
  measured = timing.measure_together(
    {v: functools.partial(steps.build, v) for v in variants}, variants, protocol
  )
  rows = []
  for variant, base in variants.items():
    row = _row(variant, measured[variant], setups[variant])
    ideal = 1 - row["flops"] / pretrain.step_flops(
      setups[base], setups[base].stages
    )
    row["ideal_reduction"] = ideal
    reduction = row.get("reduction")
    if ideal > 0 and reduction is not None:
      row["measured_over_ideal"] = reduction / ideal
    peak, other = row.get("peak_bytes"), measured[base].get("peak_bytes")
    if peak and other:
      row["memory_ratio"] = peak / other
    rows.append(row)
  return rows


def _row(variant: Variant, measured: Row, setup: pretrain.Setup) -> Row:
  config, mesh = setup.config, setup.mesh
  flops = pretrain.step_flops(setup, setup.stages)
  row = {
    "batch": config.batch_size,
    "length": config.length,
    "funnel": variant.funnel,
    "loss_chunk": variant.chunk,
    "remat": variant.remat,
    "flops": flops,
    **measured,
  }
  seconds = measured.get("latency_s")
  if seconds:
    row["tokens_per_s"] = config.batch_size * config.length / seconds
    row["flops_per_s"] = flops / seconds
    chip = chip_of(mesh.devices.flat[0])
    if chip:
      row["mfu"] = row["flops_per_s"] / (chip.flops * mesh.size)
  return row


def _check(config: ml_collections.ConfigDict) -> None:
  missing = [key for key in KEYS if key not in config]
  require(not missing, f"the configuration lacks {missing}")
  timing.require_ints("loss_chunks", tuple(config.loss_chunks), 0)
  require(
    len(config.remats) > 0,
    "remats=(): expected one at least, such as ('none',)",
  )
  if config.memory_limit_gib is not None:
    require_positive("memory_limit_gib", config.memory_limit_gib)


def _name(variant: Variant) -> str:
  chunk = f"chunk {variant.chunk}" if variant.chunk else "whole loss"
  return f"{variant.funnel}, {chunk}, remat {variant.remat}"


COLUMNS = (
  report.Column("batch", "batch", "d"),
  report.Column("length", "length", "d"),
  report.Column("funnel", "funnel"),
  report.Column("loss_chunk", "loss chunk", "d"),
  report.Column("remat", "remat"),
  report.Column("latency_s", "step ms", ".1f", 1e3),
  report.Column("spread", "spread %", ".1f", 100),
  report.Column("reduction", "reduction %", ".1f", 100),
  report.Column("ideal_reduction", "ideal %", ".1f", 100),
  report.Column("measured_over_ideal", "measured / ideal", ".2f"),
  report.Column("tokens_per_s", "tokens/s", ",.0f"),
  report.Column("flops_per_s", "TFLOP/s", ".3f", 1e-12),
  report.Column("mfu", "MFU %", ".1f", 100),
  report.Column("peak_bytes", "memory MiB", ",.0f", 2**-20),
  report.Column("memory_ratio", "memory ratio", ".2f"),
  report.Column("error", "error"),
)


def run(config: ml_collections.ConfigDict) -> list[Row]:
  """Measures, and writes training.json, .md and .png to `config.out`.

  Raises:
    ValueError: a key that is missing, or a value out of range.
    RuntimeError: no variant compiles.
  """
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
