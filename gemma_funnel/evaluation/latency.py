"""How long a forward pass takes with funnels, against the same code without.

Variants of one batch size and length are timed together, as `timing` says.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import convert, flops
from gemma_funnel.checks import require
from gemma_funnel.config import (
  ATTENTION_KINDS,
  OFF,
  Funnel,
  TransformerConfig,
  format_funnel,
)
from gemma_funnel.evaluation import cost as cost_lib
from gemma_funnel.evaluation import decoding, plots, report, timing
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation.cost import Cost
from gemma_funnel.evaluation.load_for_eval import reconfigured
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

# Where kinds of layers are compared: layers of each, and what with.
_LAYERS = 2
_BASE_KIND = "global"

Row = dict[str, Any]


def _check_sweep(config, batch_sizes, lengths) -> None:
  timing.require_ints("batch_sizes", batch_sizes, 1)
  timing.require_ints("lengths", lengths, 1)
  require(
    max(lengths) <= config.max_length,
    f"lengths: found {max(lengths)}, expected at most model.max_length="
    f"{config.max_length}",
  )


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
  """A model of random weights, made on the device in `param_dtype`."""
  make = lambda key: nnx.state(Transformer(config, rngs=nnx.Rngs(key)))
  params = jax.jit(make)(jax.random.key(seed))
  return nnx.merge(nnx.graphdef(Transformer.abstract(config)), params)


@dataclasses.dataclass(frozen=True)
class _Variant:
  """A program that each cell (batch size, length) times."""

  label: str
  about: Row  # What its rows say of it.
  baseline: Hashable  # The key of the variant that it is compared with.
  function: Callable[..., jax.Array]  # Of `params` and a cell's inputs.
  params: nnx.State
  cost: Callable[[int, int], Cost]  # Of a batch size and a length.
  layers: int = 1  # Of the program; rows and costs are of one.

  def build(self, inputs: jax.Array, protocol) -> timing.Program:
    protocol.log(f"  compiling {self.label}")
    return timing.compile_program(
      self.function, self.params, inputs, clock=protocol.clock
    )

  def row(self, cell: tuple[int, int], measured: Row) -> Row:
    if not measured["error"]:
      measured = measured | {
        "latency_s": measured["latency_s"] / self.layers,
        "times_s": [s / self.layers for s in measured["times_s"]],
      }
    about = {"batch": cell[0], "length": cell[1], **self.about}
    return about | self.cost(*cell).row(measured)


def _measure(
  variants: Mapping[Hashable, _Variant],
  cells: Sequence[tuple[int, int]],
  make_inputs: Callable[[tuple[int, int]], jax.Array],
  protocol: timing.Protocol,
) -> list[Row]:
  """A row for each cell and variant."""
  work = {c: sum(v.cost(*c).flops for v in variants.values()) for c in cells}
  progress = timing.Progress(work, protocol)
  rows = []
  for cell in cells:
    progress.cell(cell, f"batch {cell[0]}, length {cell[1]}")
    inputs = make_inputs(cell)
    measured = timing.measure_together(
      {
        key: functools.partial(variant.build, inputs, protocol)
        for key, variant in variants.items()
      },
      {key: variant.baseline for key, variant in variants.items()},
      protocol,
    )
    for key, variant in variants.items():
      row = variant.row(cell, measured[key])
      rows.append(row)
      text = "failed" if row["error"] else f"{row['latency_s'] * 1e3:.2f} ms"
      if row["ideal_reduction"] and row.get("reduction") is not None:
        text += f", {row['reduction']:.1%} less"
        text += f" (ideal {row['ideal_reduction']:.1%})"
      protocol.log(f"  {variant.label}: {text}")
  return rows


def _forward(graphdef, head, causal, context_length, params, tokens_BT):
  model = nnx.merge(graphdef, params)
  options = {}
  if context_length:
    slot_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    options["context_BT"] = (slot_BT > 0) & (slot_BT <= context_length)
    options["context_length"] = context_length
  call = model if head else model.encode
  return call(tokens_BT, causal=causal, **options)


def measure(
  model: Transformer,
  funnels: Sequence[Funnel],
  *,
  batch_sizes: Sequence[int],
  lengths: Sequence[int],
  head: Sequence[bool] = (False, True),
  causal: bool = True,
  context_length: int = 0,
  protocol: timing.Protocol = timing.DEFAULT_PROTOCOL,
) -> list[Row]:
  """Measures forward passes with each funnel, and with none.

  Args:
    model: all variants run with its parameters; its own funnel is unused.
    funnels: what to compare with no funnel, as configurations or strings. What
      one learns is the model's where its own funnel has that, or else fresh.
    batch_sizes: rows B.
    lengths: tokens T of a row.
    head: of False and True, those to measure: a forward pass to the hidden
      states, and one to the logits [B, T, V].
    causal: whether attention is causal.
    context_length: tokens after BOS that `reduce=context` drops, < T.
    protocol: how times are taken.

  Returns:
    A row for each batch size, length, `head` and funnel, "off" first: what
    `timing.measure_together` and `Cost.row` give against "off".

  Raises:
    ValueError: an argument out of range, a funnel that does not recover what
      the head needs, or a model that cannot run here.
  """
  config = model.config
  _check_sweep(config, batch_sizes, lengths)
  require(
    bool(head) and all(isinstance(h, bool) for h in head),
    f"head={head!r}: expected one or both of False and True",
  )
  named = funnels_lib.resolve(
    funnels, config.num_layers, recovers=_recovers(head)
  )
  for stages in named.values():
    funnels_lib.check_context(
      stages, "context_length", context_length, min(lengths) - 1
    )
  named = funnels_lib.with_off(named)
  models = {k: nnx.split(model.with_funnel(s)) for k, s in named.items()}
  variants = {}
  for h, (name, stages) in itertools.product(
    dict.fromkeys(head), named.items()
  ):
    graphdef, params = models[name]
    variants[name, h] = _Variant(
      label=f"{name}, {'with' if h else 'without'} the head",
      about={"head": h, "funnel": name, "resolved": format_funnel(stages)},
      baseline=(OFF, h),
      function=functools.partial(_forward, graphdef, h, causal, context_length),
      params=params,
      cost=functools.partial(
        cost_lib.of_forward,
        config,
        stages,
        head=h,
        causal=causal,
        context_length=context_length,
      ),
    )
  # A kernel that cannot run is named before anything runs.
  for variant, length in itertools.product(variants.values(), lengths):
    tokens_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jax.eval_shape(variant.function, variant.params, tokens_BT)

  def draw_tokens(cell):
    rng = np.random.default_rng(protocol.seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, cell), jnp.int32)

  cells = list(itertools.product(batch_sizes, lengths))
  return _measure(variants, cells, draw_tokens, protocol)


def _recovers(head: Sequence[bool]) -> str | None:
  if True in head:
    return "head=True (head=(False,) measures the encoder)"
  return None


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
    batch_sizes, lengths, causal, protocol: as for `measure`.

  Returns:
    A row for each batch size, length and `kind`, "global" first: what
    `measure` has in a row, against "global", and `window`.

  Raises:
    ValueError: an argument out of range.
  """
  _check_sweep(config, batch_sizes, lengths)
  kinds = (_BASE_KIND, *set(ATTENTION_KINDS) - {_BASE_KIND})

  def layers(kind, count):
    return dataclasses.replace(
      config, num_layers=count, attention_pattern=(kind,), vocab_size=1
    )

  def cost(kind, batch, length):
    count = lambda kind: flops.forward(
      layers(kind, 1), None, batch, length, head=False, causal=causal
    )
    return Cost(count(kind), count(_BASE_KIND), batch * length)

  # Parameters know no window: all kinds run with the same.
  params = nnx.state(random_model(layers(_BASE_KIND, _LAYERS), protocol.seed))
  variants = {}
  for kind in kinds:
    short = layers(kind, _LAYERS)
    graphdef = nnx.graphdef(Transformer.abstract(short))

    def trunk(params, hidden_BTD, graphdef=graphdef):
      model = nnx.merge(graphdef, params)
      return model.trunk(make_stream(hidden_BTD), causal=causal).hidden_BTD

    variants[kind] = _Variant(
      label=f"{kind} layers",
      about={"kind": kind, "window": short.layers[0].window},
      baseline=_BASE_KIND,
      function=trunk,
      params=params,
      cost=functools.partial(cost, kind),
      layers=_LAYERS,
    )

  def draw_hidden(cell):
    key, dtype = jax.random.key(protocol.seed), jnp.dtype(config.dtype)
    return jax.random.normal(key, (*cell, config.embed_dim), dtype)

  cells = list(itertools.product(batch_sizes, lengths))
  return _measure(variants, cells, draw_hidden, protocol)


COLUMNS = cost_lib.columns("batch", "length", "head", "funnel", *cost_lib.TIMES)
LAYER_KIND_COLUMNS = cost_lib.columns(
  "batch",
  "length",
  report.Column("kind", "layer"),
  report.Column("window", "window", "d"),
  *cost_lib.TIMES,
)
KEYS = """
  funnels batch_sizes lengths context_length causal head layer_kinds decode warmup repeats
  seed checkpoint model out
""".split()
# What a configuration decides of a checkpoint's model: how it runs.
_HOW = ("dtype", "softmax_dtype", "kernel", "scan_layers", "remat")


def run(config: Any) -> list[Row]:
  """Runs configs/eval_latency.py; returns the rows of `measure`.

  Writes latency.json, .md and .png to `config.out`, and layer_kinds and decode
  likewise.

  Raises:
    ValueError: a value out of range.
    RuntimeError: every variant failed.
  """
  protocol = timing.Protocol(config.repeats, config.warmup, config.seed)
  # What can be said before a checkpoint is read.
  funnels_lib.resolve(config.funnels, recovers=_recovers(config.head))
  decodes = config.decode.new_tokens != 0
  require(
    config.causal or not decodes,
    "causal=False measures an encoder, which does not decode: expected "
    f"decode.new_tokens=0, found {config.decode.new_tokens}",
  )
  model = _get_model(config)
  sweep = dict(
    batch_sizes=config.batch_sizes,
    lengths=config.lengths,
    causal=config.causal,
    protocol=protocol,
  )
  how = f"Medians of {config.repeats} interleaved rounds after "
  notes = (
    f"{how}{config.warmup} of warm-up. Spread: interquartile range / median. "
    "Measured reduction: 1 - median of the rounds' time / baseline.",
    "Ideal reduction: the same of FLOPs, counting what masks let through.",
  )

  def write(name, rows, columns, what, plot, notes=notes):
    settings = "checkpoint causal context_length repeats warmup seed".split()
    report.write(
      config.out,
      name,
      rows,
      columns,
      f"{what}: width {model.config.embed_dim}, {model.config.dtype} "
      f"(parameters {model.config.param_dtype}), attention kernel "
      f"{model.config.kernel}",
      plot,
      settings={"model": model.config.to_dict()}
      | {key: config[key] for key in settings},
      notes=notes,
    )

  rows = measure(
    model,
    config.funnels,
    head=config.head,
    context_length=config.context_length,
    **sweep,
  )
  what = f"Latency of {model.config.num_layers} layers"
  write("latency", rows, COLUMNS, what, plots.latency)
  if config.layer_kinds:
    kinds = measure_layer_kinds(model.config, **sweep)
    what = "Latency of one layer"
    write("layer_kinds", kinds, LAYER_KIND_COLUMNS, what, plots.layer_kinds)
  if decodes:
    decoded = decoding.measure(
      model, config.funnels, protocol=protocol, **config.decode
    )
    said = (notes[0], *decoding.NOTES)
    what, plot = "Generation", plots.decoding
    write("decode", decoded, decoding.COLUMNS, what, plot, said)
  if all(row["error"] for row in rows):
    raise RuntimeError(f"no variant could run: {rows[0]['error']}")
  return rows


def _get_model(config: Any) -> Transformer:
  """The checkpoint's model, or a random one; checks what it costs to check."""
  wanted = TransformerConfig.from_dict(config.model)
  if config.checkpoint is None:
    _check_fits(config, wanted)
    return random_model(wanted, config.seed)
  model = convert.load(config.checkpoint, OFF, wanted.param_dtype)
  _check_fits(config, model.config)
  return reconfigured(model, **{name: getattr(wanted, name) for name in _HOW})


def _check_fits(config: Any, model: TransformerConfig) -> None:
  """Checks that a model of these sizes can be measured as configured."""
  _check_sweep(model, config.batch_sizes, config.lengths)
  for stages in funnels_lib.resolve(config.funnels, model.num_layers).values():
    funnels_lib.check_context(
      stages, "context_length", config.context_length, min(config.lengths) - 1
    )
  if config.decode.new_tokens:
    decoding.check(model, config.funnels, **config.decode)
