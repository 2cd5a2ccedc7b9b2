"""What a pass costs beside the pass it is compared with, and its columns."""

from collections.abc import Callable
import dataclasses
from typing import Any

from gemma_funnel import flops
from gemma_funnel.config import Funnel, TransformerConfig
from gemma_funnel.evaluation.report import Column

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a pass."""

  flops: float
  baseline_flops: float  # Of the pass it is compared with.
  tokens: int  # That it is given.

  def row(self, measured: Row) -> Row:
    """A row of `timing.measure_together` with what follows from its time.

    Adds `ideal_reduction`, `measured_over_ideal`, `flops`, `flops_per_s` and
    `tokens_per_s`; None where there is no time.
    """
    seconds, reduction = measured.get("latency_s"), measured.get("reduction")
    ideal = 1 - self.flops / self.baseline_flops
    comparable = reduction is not None and ideal > 0
    return measured | {
      "ideal_reduction": ideal,
      "measured_over_ideal": reduction / ideal if comparable else None,
      "flops": self.flops,
      "flops_per_s": self.flops / seconds if seconds else None,
      "tokens_per_s": self.tokens / seconds if seconds else None,
    }


def of_forward(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  *,
  head: bool = True,
  causal: bool = True,
  context_length: int = 0,
) -> Cost:
  """The cost of a forward pass, against one without a funnel."""
  count = lambda stages: flops.forward(
    config, stages, batch, length, head, causal, context_length
  )
  return Cost(count(funnel), count(None), batch * length)


def saved(count: Callable[[Funnel], float], funnel: Funnel) -> float:
  """The share of `count` that a funnel saves."""
  return 1 - count(funnel) / count(None)


def percent(key: str, header: str, format: str = ".1f") -> Column:
  """A column of shares, in percent."""
  return Column(key, f"{header} %", format, 100)


_COLUMNS = {
  column.key: column
  for column in (
    Column("batch", "batch", "d"),
    Column("length", "length", "d"),
    Column("head", "vocabulary head"),
    Column("funnel", "funnel"),
    Column("resolved", "stages"),
    Column("latency_s", "latency ms", ".3f", 1e3),
    percent("spread", "spread"),
    percent("reduction", "latency reduction, measured"),
    percent("ideal_reduction", "FLOPs saved"),
    Column("measured_over_ideal", "measured / ideal", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("flops_per_s", "TFLOP/s", ".3f", 1e-12),
    Column("peak_bytes", "memory MiB", ",.1f", 2**-20),
    Column("loss", "loss (nats/token)", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("error", "error"),
  )
}


def columns(*columns: str | Column) -> tuple[Column, ...]:
  """Columns of a table: those that several have by their keys, and others."""
  return tuple(_COLUMNS[c] if isinstance(c, str) else c for c in columns)


# What every table of times ends with.
TIMES = columns(
  "latency_s",
  "spread",
  "reduction",
  percent("ideal_reduction", "latency reduction, ideal"),
  "measured_over_ideal",
  "tokens_per_s",
  "flops_per_s",
  "peak_bytes",
  "error",
)
