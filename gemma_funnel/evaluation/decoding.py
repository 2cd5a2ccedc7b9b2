"""How long generation takes with funnels, against the same code without.

The first token's time is that of the prefill: prompts of a batch have one
length, so rows are in one phase without further steps. A token's time is that
of a step, averaged over all phases of the funnel. Decoding is greedy, and no
row ends early.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import flops
from gemma_funnel.checks import require, require_int
from gemma_funnel.config import OFF, Funnel, TransformerConfig, format_funnel
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.evaluation import cost as cost_lib
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
    model: all variants run with its parameters; its own funnel is unused.
    funnels: what to compare with no funnel, as configurations or strings.
    batch_sizes: rows B.
    prompts: tokens of each row's prompt.
    new_tokens: steps that are timed after it, one token a row each.
    context_length: tokens after BOS that `reduce=context` drops, of a prompt
      without its last token.
    protocol: how times are taken.

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
  cells = [(batch, length) for batch in batch_sizes for length in prompts]
  progress = timing.Progress(
    {(b, n): b * (n + new_tokens) for b, n in cells}, protocol
  )
  rows = []
  for batch, length in cells:
    progress.cell((batch, length), f"decode: batch {batch}, prompt {length}")
    cell = _Cell(
      base, named, batch, length, new_tokens, context_length, protocol
    )
    rows += cell.measure()
  return rows


def check(
  config: TransformerConfig,
  funnels: Sequence[Funnel],
  batch_sizes: Sequence[int],
  prompts: Sequence[int],
  new_tokens: int,
  context_length: int = 0,
) -> dict[str, funnels_lib.Stages]:
  """Checks the arguments of `measure`, and names its funnels.

  Raises:
    ValueError: as `measure`.
  """
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
  for stages in named.values():
    funnels_lib.check_context(
      stages, "decode.context_length", context_length, max(min(prompts) - 2, 0)
    )
  return funnels_lib.with_off(named)


class _Cell:
  """One batch size and prompt length, with all funnels."""

  def __init__(
    self, model, named, batch, length, new_tokens, context_length, protocol
  ):
    self.config, self.named = model.config, named
    self.batch, self.length, self.new_tokens = batch, length, new_tokens
    self.protocol = protocol
    rng = np.random.default_rng(protocol.seed)
    vocab_size = model.config.vocab_size
    self.prompts = rng.integers(0, vocab_size, (batch, length)).tolist()
    # A token more than is timed: no row is done before the end.
    self.options = dict(max_new_tokens=new_tokens + 1)
    self.context_length = context_length
    if context_length:
      self.options["context_lengths"] = [context_length] * batch
    self.decoders = {
      name: decoder_lib.Decoder(
        model.with_funnel(stages), length + new_tokens + 1
      )
      for name, stages in named.items()
    }
    self.cache_bytes = {}

  def build(self, name: str, part: str) -> timing.Program:
    # It is compiled by being run once.
    self.protocol.log(f"  compiling {name}, {part}")
    decoder = self.decoders[name]
    prefill = functools.partial(decoder.prefill, self.prompts, **self.options)
    start = self.protocol.clock()
    state = jax.block_until_ready(prefill())
    call = prefill
    if part == _EACH:
      self.cache_bytes[name] = decoder_lib.cache_bytes(state)
      # Steps use up the state that they are given. Copying one costs as much
      # as a part of one step does.
      call = lambda: decoder.advance(
        jax.tree.map(jnp.copy, state), self.new_tokens
      )
      end = jax.block_until_ready(call())
      assert int(end.step) == self.new_tokens
    return timing.Program(call, self.protocol.clock() - start, None)

  def measure(self) -> list[Row]:
    variants = [(name, part) for part in (_FIRST, _EACH) for name in self.named]
    measured = timing.measure_together(
      {v: functools.partial(self.build, *v) for v in variants},
      {(name, part): (OFF, part) for name, part in variants},
      self.protocol,
    )
    rows = []
    for name in self.named:
      row = self._row(name, measured[name, _FIRST], measured[name, _EACH])
      rows.append(row)
      text = f"failed: {row['error']}"
      if not row["error"]:
        text = f"first token {row['first_token_s'] * 1e3:.1f} ms, then "
        text += f"{row['token_s'] * 1e3:.2f} ms each"
        if name != OFF and row["reduction"] is not None:
          text += (
            f", {row['reduction']:.1%} less (ideal {row['ideal_bytes']:.1%}"
          )
          text += f" of bytes, {row['ideal_flops']:.1%} of FLOPs)"
      self.protocol.log(f"  {name}: {text}")
    return rows

  def _row(self, name: str, first: Row, each: Row) -> Row:
    stages, config, batch = self.named[name], self.config, self.batch
    # Half of the new tokens are in the cache, on average.
    context = self.length + self.new_tokens // 2
    span = dict(context_length=self.context_length)
    count_bytes = lambda stages: flops.decode_bytes(
      config, stages, batch, context, **span
    )
    count_flops = lambda stages: flops.decode_flops(
      config, stages, context, **span
    )
    ideal_bytes = cost_lib.saved(count_bytes, stages)
    seconds, reduction = each.get("latency_s"), each.get("reduction")
    token_s = seconds and seconds / self.new_tokens
    return {
      "batch": batch,
      "prompt": self.length,
      "new_tokens": self.new_tokens,
      "funnel": name,
      "resolved": format_funnel(stages),
      "error": first["error"] or each["error"],
      "first_token_s": first.get("latency_s"),
      "first_spread": first.get("spread"),
      "first_reduction": first.get("reduction"),
      "first_ideal": flops.ideal_reduction(
        config, stages, batch, self.length, head=False, **span
      ),
      "token_s": token_s,
      "spread": each.get("spread"),
      "reduction": reduction,
      "speedup": None if reduction is None else 1 / (1 - reduction),
      "ideal_flops": cost_lib.saved(count_flops, stages),
      "ideal_bytes": ideal_bytes,
      "ideal_speedup": 1 / (1 - ideal_bytes),
      "tokens_per_s": token_s and batch / token_s,
      "bytes_per_s": token_s and count_bytes(stages) / token_s,
      "cache_bytes": self.cache_bytes.get(name),
      "ideal_cache_bytes": flops.cache_bytes(
        config, stages, batch, self.length + self.new_tokens + 1, **span
      ),
      "times_s": {_FIRST: first.get("times_s"), _EACH: each.get("times_s")},
    }


COLUMNS = cost_lib.columns(
  "batch",
  report.Column("prompt", "prompt", "d"),
  "funnel",
  report.Column("first_token_s", "first token ms", ".2f", 1e3),
  cost_lib.percent("first_reduction", "latency reduction, measured"),
  cost_lib.percent("first_ideal", "latency reduction, ideal"),
  report.Column("token_s", "ms a token", ".3f", 1e3),
  "spread",
  "reduction",
  cost_lib.percent("ideal_flops", "ideal FLOPs"),
  cost_lib.percent("ideal_bytes", "ideal bytes"),
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
