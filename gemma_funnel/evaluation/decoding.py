"""How long generation takes with funnels, against the same code without.

The first token's time is that of the prefill: prompts of a batch have one
length, so rows are in one phase without further steps. A token's time is that
of a step, averaged over all phases of the funnel. Decoding is greedy, and no
row ends early.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import flops
from gemma_funnel.checks import require, require_int
from gemma_funnel.config import OFF, Funnel, TransformerConfig, format_funnel
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import report, timing
from gemma_funnel.model import Transformer

Row = dict[str, Any]
_FIRST, _EACH = "first", "each"


def measure(
  model: Transformer,
  funnels: Sequence[Funnel],
  *,
  batch_sizes: Sequence[int],
  prompts: Sequence[int],
  new_tokens: int,
  context_length: int = 0,
  protocol: timing.Protocol = timing.DEFAULT_PROTOCOL,
) -> list[Row]:
  """Measures generation with each funnel, and with none.

  Args:
    model, funnels, batch_sizes, protocol: as for `latency.measure`.
    prompts: tokens of each row's prompt.
    new_tokens: steps that are timed after it, one token a row each.
    context_length: tokens after BOS that `reduce=context` drops, of a prompt
      without its last token.

  Returns:
    A row for each batch size, prompt and funnel, "off" first. In seconds:
    `first_token_s` and `token_s`, medians. `first_reduction` and `reduction`,
    measured against "off"; beside them the ideal ones: `first_ideal` of the
    prefill's FLOPs, `ideal_flops` and `ideal_bytes` of a token's FLOPs and
    bytes. `speedup` in tokens/s with `ideal_speedup` (of bytes), `tokens_per_s`
    of all rows, `bytes_per_s` that a step's least bytes were read at,
    `cache_bytes` held and `ideal_cache_bytes`.

  Raises:
    ValueError: an argument out of range, or a funnel that does not fit.
  """
  named = check(
    model.config, funnels, batch_sizes, prompts, new_tokens, context_length
  )
  base = decoder_lib.unstacked(model)
  cells = itertools.product(batch_sizes, prompts)
  work = {(b, n): b * (n + new_tokens) for b, n in cells}
  rows = []
  for cell in timing.progress(work, "decode: batch {}, prompt {}", protocol):
    rows += _measure_cell(
      base, named, *cell, new_tokens, context_length, protocol
    )
  return rows


def check(
  config: TransformerConfig,
  funnels: Sequence[Funnel],
  batch_sizes: Sequence[int],
  prompts: Sequence[int],
  new_tokens: int,
  context_length: int = 0,
) -> dict[str, funnels_lib.Stages]:
  """Checks the arguments of `measure`, and names its funnels."""
  timing.require_ints("decode.batch_sizes", batch_sizes, 1)
  timing.require_ints("decode.prompts", prompts, 1)
  require_int("decode.new_tokens", new_tokens, 1)
  require(
    max(prompts) + new_tokens + 1 <= config.max_length,
    f"decode: a prompt of {max(prompts)} tokens and {new_tokens} new ones are "
    f"more than model.max_length={config.max_length}",
  )
  named = funnels_lib.resolve(
    funnels,
    config.num_layers,
    recovers="decoding (decode.new_tokens=0 leaves it out)",
  )
  longest, key = max(min(prompts) - 2, 0), "decode.context_length"
  funnels_lib.check_context(named, key, context_length, longest)
  return funnels_lib.with_off(named)


def _measure_cell(
  model, named, batch, length, new_tokens, context_length, protocol
) -> list[Row]:
  """Rows of one batch size and prompt length, with all funnels."""
  rng = np.random.default_rng(protocol.seed)
  prompts = rng.integers(0, model.config.vocab_size, (batch, length)).tolist()
  # A token more than is timed: no row is done before the end.
  options = dict(max_new_tokens=new_tokens + 1)
  if context_length:
    options["context_lengths"] = [context_length] * batch
  cache_length, held = length + new_tokens + 1, {}
  decoders = {
    name: decoder_lib.Decoder(model.with_funnel(stages), cache_length)
    for name, stages in named.items()
  }

  def build(name, part):
    # It is compiled by being run once.
    protocol.log(f"  compiling {name}, {part}")
    decoder = decoders[name]
    call = functools.partial(decoder.prefill, prompts, **options)
    start = protocol.clock()
    state = jax.block_until_ready(call())
    if part == _EACH:
      held[name] = decoder_lib.cache_bytes(state)
      # Steps use up the state that they are given. Copying one costs as much
      # as a part of one step does.
      copy = functools.partial(jax.tree.map, jnp.copy, state)
      call = lambda: decoder.advance(copy(), new_tokens)
      assert int(jax.block_until_ready(call()).step) == new_tokens
    return timing.Program(call, protocol.clock() - start, None)

  variants = [(name, part) for part in (_FIRST, _EACH) for name in named]
  measured = timing.measure_together(
    {v: functools.partial(build, *v) for v in variants},
    {(name, part): (OFF, part) for name, part in variants},
    protocol,
  )
  rows = []
  for name, stages in named.items():
    about = {"batch": batch, "prompt": length, "new_tokens": new_tokens}
    row = about | {"funnel": name, "resolved": format_funnel(stages)}
    row |= _costs(
      model.config,
      stages,
      **about,
      context_length=context_length,
      held=held.get(name),
      first=measured[name, _FIRST],
      each=measured[name, _EACH],
    )
    rows.append(row)
    text = f"failed: {row['error']}"
    if not row["error"]:
      text = f"first token {row['first_token_s'] * 1e3:.1f} ms, then "
      text += f"{row['token_s'] * 1e3:.2f} ms each"
      if name != OFF and row["reduction"] is not None:
        text += f", {row['reduction']:.1%} less (ideal {row['ideal_bytes']:.1%}"
        text += f" of bytes, {row['ideal_flops']:.1%} of FLOPs)"
    protocol.log(f"  {name}: {text}")
  return rows


def _costs(
  config, stages, batch, prompt, new_tokens, context_length, held, first, each
) -> Row:
  """What was measured, beside what it ideally costs."""
  # Half of the new tokens are in the cache, on average.
  context, span = prompt + new_tokens // 2, dict(context_length=context_length)
  bytes_, plain_bytes = (
    flops.decode_bytes(config, f, batch, context, **span)
    for f in (stages, None)
  )
  flops_, plain_flops = (
    flops.decode_flops(config, f, context, **span) for f in (stages, None)
  )
  seconds, reduction = each.get("latency_s"), each.get("reduction")
  token_s = seconds and seconds / new_tokens
  return {
    "error": first["error"] or each["error"],
    "first_token_s": first.get("latency_s"),
    "first_spread": first.get("spread"),
    "first_reduction": first.get("reduction"),
    "first_ideal": flops.ideal_reduction(
      config, stages, batch, prompt, head=False, **span
    ),
    "token_s": token_s,
    "spread": each.get("spread"),
    "reduction": reduction,
    "speedup": None if reduction is None else 1 / (1 - reduction),
    "ideal_flops": 1 - flops_ / plain_flops,
    "ideal_bytes": 1 - bytes_ / plain_bytes,
    "ideal_speedup": plain_bytes / bytes_,
    "tokens_per_s": token_s and batch / token_s,
    "bytes_per_s": token_s and bytes_ / token_s,
    "cache_bytes": held,
    "ideal_cache_bytes": flops.cache_bytes(
      config, stages, batch, prompt + new_tokens + 1, **span
    ),
    "times_s": {_FIRST: first.get("times_s"), _EACH: each.get("times_s")},
  }


COLUMNS = report.columns(
  "batch",
  report.Column("prompt", "prompt", "d"),
  "funnel",
  report.Column("first_token_s", "first token ms", ".2f", 1e3),
  report.percent("first_reduction", "latency reduction, measured"),
  report.percent("first_ideal", "latency reduction, ideal"),
  report.Column("token_s", "ms a token", ".3f", 1e3),
  "spread",
  "reduction",
  report.percent("ideal_flops", "ideal FLOPs"),
  report.percent("ideal_bytes", "ideal bytes"),
  report.Column("tokens_per_s", "tokens/s", ",.1f"),
  report.Column("speedup", "speed-up", ".2f"),
  report.Column("ideal_speedup", "ideal", ".2f"),
  report.Column("bytes_per_s", "GB/s", ".1f", 1e-9),
  report.Column("cache_bytes", "cache MiB", ",.2f", 2**-20),
  report.Column("ideal_cache_bytes", "least MiB", ",.2f", 2**-20),
  "error",
)
NOTES = (
  "First token: a prompt's prefill; ideal of its FLOPs. A token: a step for all "
  "rows, over all phases of the funnel; ideal of FLOPs and of bytes (weights, "
  "visible cache entries, logits). GB/s: those bytes by the time.",
)
