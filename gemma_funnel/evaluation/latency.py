"""How long a forward pass takes with funnels, against the same code without.

Variants of one batch size and length are timed together, as `timing` says.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
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
from gemma_funnel.evaluation import decoding, plots, report, timing
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation.load_for_eval import reconfigured
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

# Where kinds of layers are compared: layers of each, and what with.
_LAYERS = 2
_BASE_KIND = "global"

Row = dict[str, Any]


def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
  """A model of random weights, made on the device in `param_dtype`."""
  make = lambda key: nnx.state(Transformer(config, rngs=nnx.Rngs(key)))
  params = jax.jit(make)(jax.random.key(seed))
  return nnx.merge(nnx.graphdef(Transformer.abstract(config)), params)


def _check_sweep(config, batch_sizes, lengths) -> None:
  timing.require_ints("batch_sizes", batch_sizes, 1)
  timing.require_ints("lengths", lengths, 1)
  require(
    max(lengths) <= config.max_length,
    f"lengths: found {max(lengths)}, expected at most model.max_length="
    f"{config.max_length}",
  )


def _recovers(head: Sequence[bool]) -> str | None:
  needed = "head=True (head=(False,) measures the encoder)"
  return needed if True in head else None


def _check(
  config, funnels, batch_sizes, lengths, head, context_length
) -> dict[str, funnels_lib.Stages]:
  """Checks the arguments of `measure`, and names its funnels."""
  _check_sweep(config, batch_sizes, lengths)
  require(
    bool(head) and all(isinstance(h, bool) for h in head),
    f"head={head!r}: expected one or both of False and True",
  )
  named = funnels_lib.resolve(
    funnels, config.num_layers, recovers=_recovers(head)
  )
  longest = min(lengths) - 1
  funnels_lib.check_context(named, "context_length", context_length, longest)
  return funnels_lib.with_off(named)


@dataclasses.dataclass(frozen=True)
class _Variant:
  """A program that each cell (batch size, length) times."""

  label: str
  about: Row  # What its rows say of it.
  baseline: Hashable  # The key of the variant that it is compared with.
  function: Callable[..., jax.Array]  # Of `params` and a cell's inputs.
  params: nnx.State
  flops: Callable[[int, int], float]  # Of a batch size and a length.
  layers: int = 1  # Of the program; rows and FLOPs are of one.


def _measure(
  variants: Mapping[Hashable, _Variant],
  cells: Sequence[tuple[int, int]],
  make_inputs: Callable[[tuple[int, int]], jax.Array],
  protocol: timing.Protocol,
) -> list[Row]:
  """A row for each cell and variant."""
  work = {c: sum(v.flops(*c) for v in variants.values()) for c in cells}
  rows = []

  def build(variant, inputs):
    protocol.log(f"  compiling {variant.label}")
    return timing.compile_program(
      variant.function, variant.params, inputs, clock=protocol.clock
    )

  for cell in timing.progress(work, "batch {}, length {}", protocol):
    inputs = make_inputs(cell)
    measured = timing.measure_together(
      {k: functools.partial(build, v, inputs) for k, v in variants.items()},
      {key: variant.baseline for key, variant in variants.items()},
      protocol,
    )
    for key, variant in variants.items():
      found = measured[key]
      if not found["error"]:
        found["latency_s"] /= variant.layers
        found["times_s"] = [s / variant.layers for s in found["times_s"]]
      row = {"batch": cell[0], "length": cell[1], **variant.about}
      baseline = variants[variant.baseline].flops(*cell)
      row |= timing.with_rates(
        found, variant.flops(*cell), baseline, math.prod(cell)
      )
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
    model: its parameters are those of all variants; its own funnel is unused.
    funnels: what to compare with no funnel, as configurations or strings. What
      one learns is the model's where its own funnel has that, or else fresh.
    batch_sizes, lengths: rows B, and tokens T of a row.
    head: what to measure: False, passes to the hidden states; True, to logits.
    causal: whether attention is causal.
    context_length: tokens after BOS that `reduce=context` drops, < T.
    protocol: how times are taken.

  Returns:
    A row for each batch size, length, `head` and funnel, "off" first: what
    `timing.measure_together` and `with_rates` give against "off".

  Raises:
    ValueError: an argument that cannot be, or a model that cannot run here.
  """
  config = model.config
  named = _check(config, funnels, batch_sizes, lengths, head, context_length)
  models = {k: nnx.split(model.with_funnel(s)) for k, s in named.items()}
  variants = {}
  spans = dict(causal=causal, context_length=context_length)
  for h, name in itertools.product(dict.fromkeys(head), named):
    (graphdef, params), stages = models[name], named[name]
    variants[name, h] = _Variant(
      label=f"{name}, {'with' if h else 'without'} the head",
      about={"head": h, "funnel": name, "resolved": format_funnel(stages)},
      baseline=(OFF, h),
      function=functools.partial(_forward, graphdef, h, causal, context_length),
      params=params,
      flops=functools.partial(flops.forward, config, stages, head=h, **spans),
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
  """
  _check_sweep(config, batch_sizes, lengths)
  kinds = (_BASE_KIND, *set(ATTENTION_KINDS) - {_BASE_KIND})

  def layers(kind, count):
    return dataclasses.replace(
      config, num_layers=count, attention_pattern=(kind,), vocab_size=1
    )

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
      flops=functools.partial(
        flops.forward, layers(kind, 1), None, head=False, causal=causal
      ),
      layers=_LAYERS,
    )

  def draw_hidden(cell):
    key, dtype = jax.random.key(protocol.seed), jnp.dtype(config.dtype)
    return jax.random.normal(key, (*cell, config.embed_dim), dtype)

  cells = list(itertools.product(batch_sizes, lengths))
  return _measure(variants, cells, draw_hidden, protocol)


COLUMNS = report.columns("batch", "length", "head", "funnel", *report.TIMES)
LAYER_KIND_COLUMNS = report.columns(
  "batch",
  "length",
  report.Column("kind", "layer"),
  report.Column("window", "window", "d"),
  *report.TIMES,
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
  decodes = config.decode.new_tokens != 0
  require(
    config.causal or not decodes,
    "causal=False measures an encoder, which does not decode: expected "
    f"decode.new_tokens=0, found {config.decode.new_tokens}",
  )
  # What can be said before a checkpoint is read, and then before it is run.
  report.claim(config.out, "latency")
  funnels_lib.resolve(config.funnels, recovers=_recovers(config.head))
  wanted, model = TransformerConfig.from_dict(config.model), None
  if config.checkpoint is not None:
    model = convert.load(config.checkpoint, OFF, wanted.param_dtype)
  sweep = dict(batch_sizes=config.batch_sizes, lengths=config.lengths)
  asked = dict(head=config.head, context_length=config.context_length)
  sizes = model.config if model else wanted
  _check(sizes, config.funnels, **sweep, **asked)
  if decodes:
    decoding.check(sizes, config.funnels, **config.decode)
  if model:
    model = reconfigured(
      model, **{name: getattr(wanted, name) for name in _HOW}
    )
  else:
    model = random_model(wanted, config.seed)
  sweep |= dict(causal=config.causal, protocol=protocol)
  how = (
    f"Medians of {config.repeats} interleaved rounds after {config.warmup} of "
    "warm-up. Spread: interquartile range / median. Measured reduction: 1 - "
    "median of the rounds' time / baseline."
  )
  ideal = "Ideal reduction: the same of FLOPs, counting what masks let through."
  settings = {"model": model.config.to_dict()} | {
    key: config[key]
    for key in "checkpoint causal context_length repeats warmup seed".split()
  }
  about = (
    f"width {model.config.embed_dim}, {model.config.dtype} (parameters "
    f"{model.config.param_dtype}), attention kernel {model.config.kernel}"
  )

  def write(name, rows, columns, what, plot, *notes):
    title = f"{what}: {about}"
    report.write(
      config.out,
      name,
      rows,
      columns,
      title,
      plot,
      settings=settings,
      notes=notes,
    )

  rows = measure(model, config.funnels, **asked, **sweep)
  what = f"Latency of {model.config.num_layers} layers"
  write("latency", rows, COLUMNS, what, plots.latency, how, ideal)
  if config.layer_kinds:
    kinds = measure_layer_kinds(model.config, **sweep)
    what, columns = "Latency of one layer", LAYER_KIND_COLUMNS
    write("layer_kinds", kinds, columns, what, plots.layer_kinds, how, ideal)
  if decodes:
    decoded = decoding.measure(
      model, config.funnels, protocol=protocol, **config.decode
    )
    columns, notes = decoding.COLUMNS, (how, *decoding.NOTES)
    write("decode", decoded, columns, "Generation", plots.decoding, *notes)
  if all(row["error"] for row in rows):
    raise RuntimeError(f"no variant could run: {rows[0]['error']}")
  return rows
