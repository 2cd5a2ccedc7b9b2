"""How long a forward pass takes with funnels, against the same code without.

Variants of one batch size and length are timed together, as `timing` says.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import flops
from gemma_funnel.config import (
  ATTENTION_KINDS,
  OFF,
  Funnel,
  TransformerConfig,
  check_recovers,
  format_funnel,
)
from gemma_funnel.evaluation import decoding, plots, report, timing
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

# Where kinds of layers are compared: layers of each, and what with.
_LAYERS = 2
_BASE_KIND = "global"

Row = dict[str, Any]


def _check_sweep(config, batch_sizes, lengths) -> None:
  timing.require_ints("batch_sizes", batch_sizes, 1)
  timing.require_ints("lengths", lengths, 1)
  if max(lengths) > config.max_length:
    raise ValueError(
      f"lengths: found {max(lengths)}, expected at most model.max_length="
      f"{config.max_length}"
    )


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
  """A model of random weights, made on the device in `param_dtype`."""
  params = _random_params(config, jax.random.key(seed))
  return nnx.merge(nnx.graphdef(Transformer.abstract(config)), params)


@functools.partial(jax.jit, static_argnums=0)
def _random_params(config, key):
  return nnx.state(Transformer(config, rngs=nnx.Rngs(key)))


def _forward(graphdef, head, causal, params, tokens_BT):
  model = nnx.merge(graphdef, params)
  if head:
    return model(tokens_BT, causal=causal)
  return model.encode(tokens_BT, causal=causal)


def measure(
  model: Transformer,
  funnels: Sequence[Funnel],
  *,
  batch_sizes: Sequence[int],
  lengths: Sequence[int],
  head: Sequence[bool] = (False, True),
  causal: bool = True,
  protocol: timing.Protocol = timing.DEFAULT_PROTOCOL,
) -> list[Row]:
  """Measures forward passes with each funnel, and with none.

  Args:
    model: whose parameters all variants run with; its own funnel is unused.
    funnels: what to compare with no funnel, as configurations or strings. What
      one learns is the model's where its own funnel has that, or else fresh.
    batch_sizes: rows B.
    lengths: tokens T of a row.
    head: of False and True, those to measure: a forward pass to the hidden
      states, and one to the logits [B, T, V].
    causal: whether attention is causal.
    protocol: how times are taken.

  Returns:
    A row for each batch size, length, `head` and funnel, "off" first: what
    `timing.measure_together` gives against "off", `ideal_reduction` in FLOPs,
    `measured_over_ideal`, `flops`, `flops_per_s` and `tokens_per_s`.

  Raises:
    ValueError: an argument out of range, a funnel that does not recover what
      the head needs, or a model that cannot run here.
  """
  _check_sweep(model.config, batch_sizes, lengths)
  if not head or any(not isinstance(h, bool) for h in head):
    raise ValueError(f"head={head!r}: expected one or both of False and True")
  named = funnels_lib.resolve(funnels, model.config.num_layers)
  named = {OFF: ()} | {k: stages for k, stages in named.items() if stages}
  _check_head(named, head)
  sweep = _Sweep(
    models={k: nnx.split(model.with_funnel(s)) for k, s in named.items()},
    funnels=named,
    heads=tuple(dict.fromkeys(head)),
    config=model.config,
    causal=causal,
    protocol=protocol,
  )
  sweep.check(lengths)
  cells = [(batch, length) for batch in batch_sizes for length in lengths]
  work = {cell: sweep.work(cell) for cell in cells}
  progress = timing.Progress(work, protocol)
  rows = []
  for cell in cells:
    progress.cell(cell, f"batch {cell[0]}, length {cell[1]}")
    rows += sweep.measure(cell)
  return rows


def _check_head(named, head: Sequence[bool]) -> None:
  if True in head:
    for stages in named.values():
      check_recovers(stages, "head=True (head=(False,) measures the encoder)")


@dataclasses.dataclass(frozen=True)
class _Sweep:
  """What all cells (batch size, length) of a measurement share.

  `models` are (graphdef, params) by name; parameters that two have are one.
  """

  models: dict[str, tuple[nnx.GraphDef, nnx.State]]
  funnels: dict[str, funnels_lib.Stages]
  heads: tuple[bool, ...]
  config: TransformerConfig
  causal: bool
  protocol: timing.Protocol

  @property
  def variants(self) -> list[tuple[str, bool]]:
    return [(name, h) for h in self.heads for name in self.funnels]

  def check(self, lengths) -> None:
    """Finds what no batch size can run with, such as a kernel, before any."""
    for length in lengths:
      tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
      for graphdef, params in self.models.values():
        forward = functools.partial(_forward, graphdef, False, self.causal)
        jax.eval_shape(forward, params, tokens_BT)

  def flops(self, cell, name, head) -> int:
    return flops.forward(
      self.config, self.funnels[name], *cell, head, self.causal
    )

  def work(self, cell) -> int:
    return sum(self.flops(cell, *variant) for variant in self.variants)

  def build(self, tokens_BT, name, head) -> timing.Program:
    self.protocol.log(f"  compiling {_variant(name, head)}")
    graphdef, params = self.models[name]
    forward = functools.partial(_forward, graphdef, head, self.causal)
    return timing.compile_program(
      forward, params, tokens_BT, clock=self.protocol.clock
    )

  def measure(self, cell) -> list[Row]:
    rng = np.random.default_rng(self.protocol.seed)
    tokens_BT = jnp.asarray(
      rng.integers(0, self.config.vocab_size, cell), jnp.int32
    )
    build = functools.partial(self.build, tokens_BT)
    measured = timing.measure_together(
      {v: functools.partial(build, *v) for v in self.variants},
      {(name, h): (OFF, h) for name, h in self.variants},
      self.protocol,
    )
    rows = []
    for (name, h), row in measured.items():
      about = {
        "batch": cell[0],
        "length": cell[1],
        "head": h,
        "funnel": name,
        "resolved": format_funnel(self.funnels[name]),
      }
      ideal = flops.ideal_reduction(
        self.config, self.funnels[name], *cell, h, self.causal
      )
      row = _with_rates(row, ideal, self.flops(cell, name, h), cell)
      rows.append(about | row)
      self.protocol.log(f"  {_result_line(rows[-1])}")
    return rows


def _with_rates(row: Row, ideal: float, count: int, cell) -> Row:
  """Adds what follows from a time, and what to compare it with."""
  latency_s, reduction = row.get("latency_s"), row.get("reduction")
  comparable = reduction is not None and ideal > 0
  return row | {
    "ideal_reduction": ideal,
    "measured_over_ideal": reduction / ideal if comparable else None,
    "flops": count,
    "flops_per_s": count / latency_s if latency_s else None,
    "tokens_per_s": cell[0] * cell[1] / latency_s if latency_s else None,
  }


def _variant(name: str, head: bool) -> str:
  return f"{name}, {'with' if head else 'without'} the head"


def _result_line(row: Row) -> str:
  name = _variant(row["funnel"], row["head"])
  if row["error"]:
    return f"{name}: failed"
  line = f"{name}: {row['latency_s'] * 1e3:.2f} ms"
  if row["funnel"] != OFF and row["reduction"] is not None:
    line += (
      f", {row['reduction']:.1%} less (ideal {row['ideal_reduction']:.1%})"
    )
  return line


def _trunk(graphdef, causal, params, hidden_BTD):
  stream = make_stream(hidden_BTD)
  return nnx.merge(graphdef, params).trunk(stream, causal=causal).hidden_BTD


def measure_layer_kinds(
  config: TransformerConfig,
  *,
  batch_sizes: Sequence[int],
  lengths: Sequence[int],
  causal: bool = True,
  protocol: timing.Protocol = timing.DEFAULT_PROTOCOL,
) -> list[Row]:
  """Measures a layer of each kind of attention, all else being equal.

  Times are those of two such layers, halved; no embedding and no head.

  Args:
    config: the layers' sizes; its depth and attention_pattern are unused.
    batch_sizes: rows B.
    lengths: tokens T of a row.
    causal: whether attention is causal.
    protocol: how times are taken.

  Returns:
    A row for each batch size, length and `kind`, "global" first: what
    `measure` has in a row, against "global", and `window`.

  Raises:
    ValueError: an argument out of range.
  """
  _check_sweep(config, batch_sizes, lengths)
  short = {
    kind: dataclasses.replace(
      config, num_layers=_LAYERS, attention_pattern=(kind,), vocab_size=1
    )
    for kind in (_BASE_KIND, *set(ATTENTION_KINDS) - {_BASE_KIND})
  }
  # Parameters know no window: all kinds run with the same.
  params = nnx.state(random_model(short[_BASE_KIND], protocol.seed))
  cost = lambda kind, cell: flops.forward(
    short[kind], None, *cell, False, causal
  )
  cells = [(batch, length) for batch in batch_sizes for length in lengths]
  work = {cell: sum(cost(kind, cell) for kind in short) for cell in cells}
  progress = timing.Progress(work, protocol)
  key = jax.random.key(protocol.seed)
  rows = []
  for cell in cells:
    progress.cell(cell, f"kinds of layers: batch {cell[0]}, length {cell[1]}")
    hidden_BTD = jax.random.normal(
      key, (*cell, config.embed_dim), jnp.dtype(config.dtype)
    )

    def build(kind, hidden_BTD=hidden_BTD):
      graphdef = nnx.graphdef(Transformer.abstract(short[kind]))
      trunk = functools.partial(_trunk, graphdef, causal)
      return timing.compile_program(
        trunk, params, hidden_BTD, clock=protocol.clock
      )

    measured = timing.measure_together(
      {kind: functools.partial(build, kind) for kind in short},
      dict.fromkeys(short, _BASE_KIND),
      protocol,
    )
    for kind, row in measured.items():
      row = _per_layer(row)
      about = {
        "batch": cell[0],
        "length": cell[1],
        "kind": kind,
        "window": short[kind].window_of(0),
      }
      count = cost(kind, cell)
      ideal = 1 - count / cost(_BASE_KIND, cell)
      rows.append(about | _with_rates(row, ideal, count // _LAYERS, cell))
  return rows


def _per_layer(row: Row) -> Row:
  if row["error"]:
    return row
  return row | {
    "latency_s": row["latency_s"] / _LAYERS,
    "times_s": [seconds / _LAYERS for seconds in row["times_s"]],
  }


def _percent(key: str, header: str) -> report.Column:
  return report.Column(key, f"{header} %", ".1f", 100)


_SHAPE = (
  report.Column("batch", "batch", "d"),
  report.Column("length", "length", "d"),
)
_TIMES = (
  report.Column("latency_s", "latency ms", ".3f", 1e3),
  _percent("spread", "spread"),
  _percent("reduction", "reduction"),
  _percent("ideal_reduction", "ideal"),
  report.Column("measured_over_ideal", "measured / ideal", ".2f"),
  report.Column("tokens_per_s", "tokens/s", ",.0f"),
  report.Column("flops_per_s", "TFLOP/s", ".3f", 1e-12),
  report.Column("peak_bytes", "memory MiB", ",.1f", 2**-20),
  report.Column("error", "error"),
)
COLUMNS = (
  *_SHAPE,
  report.Column("head", "head"),
  report.Column("funnel", "funnel"),
  *_TIMES,
)
LAYER_KIND_COLUMNS = (
  *_SHAPE,
  report.Column("kind", "layer"),
  report.Column("window", "window", "d"),
  *_TIMES,
)


KEYS = (
  "funnels",
  "batch_sizes",
  "lengths",
  "causal",
  "head",
  "layer_kinds",
  "decode",
  "warmup",
  "repeats",
  "seed",
  "checkpoint",
  "model",
  "out",
)
# Of a checkpoint's model, what a configuration decides: how, and not what.
_HOW = ("dtype", "softmax_dtype", "kernel", "scan_layers", "remat")


def run(config: Any) -> list[Row]:
  """Measures what a configuration asks for, and writes tables and plots.

  Writes latency.json, .md and .png to `config.out`, and layer_kinds and decode
  likewise.

  Args:
    config: a ConfigDict with the keys of configs/eval_latency.py.

  Returns:
    The rows of `measure`.

  Raises:
    ValueError: a key that is missing, or a value out of range.
    RuntimeError: every variant failed.
  """
  missing = [key for key in KEYS if key not in config]
  if missing:
    raise ValueError(f"the configuration lacks {missing}")
  protocol = timing.Protocol(config.repeats, config.warmup, config.seed)
  # What can be said before a checkpoint is read.
  _check_head(funnels_lib.parse(config.funnels), config.head)
  decodes = config.decode.new_tokens != 0
  if decodes and not config.causal:
    raise ValueError(
      "causal=False measures an encoder, which does not decode: expected "
      f"decode.new_tokens=0, found {config.decode.new_tokens}"
    )
  sweep = dict(
    batch_sizes=config.batch_sizes,
    lengths=config.lengths,
    causal=config.causal,
    protocol=protocol,
  )
  model = _get_model(config)
  rows = measure(model, config.funnels, head=config.head, **sweep)
  settings = {
    "model": model.config.to_dict(),
    "checkpoint": config.checkpoint,
    "causal": config.causal,
    "repeats": config.repeats,
    "warmup": config.warmup,
    "seed": config.seed,
  }
  report.write(
    config.out,
    "latency",
    rows,
    COLUMNS,
    _title(f"Latency of {model.config.num_layers} layers", model.config),
    plots.latency,
    settings=settings,
    notes=_notes(protocol),
  )
  if config.layer_kinds:
    kinds = measure_layer_kinds(model.config, **sweep)
    report.write(
      config.out,
      "layer_kinds",
      kinds,
      LAYER_KIND_COLUMNS,
      _title("Latency of one layer", model.config),
      plots.layer_kinds,
      settings=settings,
      notes=_notes(protocol),
    )
  if decodes:
    report.write(
      config.out,
      "decode",
      decoding.measure(
        model, config.funnels, protocol=protocol, **config.decode
      ),
      decoding.COLUMNS,
      _title("Generation", model.config),
      plots.decoding,
      settings=settings,
      notes=[_notes(protocol)[0], *decoding.NOTES],
    )
  if all(row["error"] for row in rows):
    raise RuntimeError(f"no variant could run: {rows[0]['error']}")
  return rows


def _get_model(config: Any) -> Transformer:
  """The checkpoint's model, or a random one; checks what it costs to check."""
  wanted = TransformerConfig.from_dict(config.model)
  if config.checkpoint is None:
    _check_fits(config, wanted)
    return random_model(wanted, config.seed)
  from gemma_funnel.convert import load

  model = load(config.checkpoint, OFF, wanted.param_dtype)
  _check_fits(config, model.config)
  how = {name: getattr(wanted, name) for name in _HOW}
  graphdef = nnx.graphdef(
    Transformer.abstract(dataclasses.replace(model.config, **how))
  )
  return nnx.merge(graphdef, nnx.state(model))


def _check_fits(config: Any, model: TransformerConfig) -> None:
  """Checks that a model of these sizes can be measured as configured."""
  funnels_lib.resolve(config.funnels, model.num_layers)
  _check_sweep(model, config.batch_sizes, config.lengths)
  if config.decode.new_tokens:
    decoding.check(model, config.funnels, **config.decode)


def _title(what: str, config: TransformerConfig) -> str:
  return (
    f"{what}: width {config.embed_dim}, {config.dtype} (parameters "
    f"{config.param_dtype}), attention kernel {config.kernel}"
  )


def _notes(protocol: timing.Protocol) -> list[str]:
  return [
    f"Medians of {protocol.repeats} interleaved rounds after "
    f"{protocol.warmup} of warm-up. Spread: interquartile range / median. "
    "Reduction: 1 - median of the rounds' time / baseline.",
    "Ideal: the same of FLOPs, counting what masks let through.",
  ]
