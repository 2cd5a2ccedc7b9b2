"""How well a model predicts held-out text, with its funnel and with others.

All funnels are given the same batches, whose segments start at multiples of
every total stride, so that a difference between two rows is one of the funnels.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import nnx
import jax
from ml_collections import config_dict

from gemma_funnel import flops
from gemma_funnel.config import (
  Funnel,
  check_recovers,
  format_funnel,
  total_stride,
)
from gemma_funnel.data import pipeline
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import plots, report
from gemma_funnel.evaluation import subject as subject_lib
from gemma_funnel.model import Transformer
from gemma_funnel.training import objectives

TRAINED = "trained"
_MAX_EXPONENT = 709.0
_BATCH_SIZE = 8  # Where neither the configuration nor a run has one.

Row = dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(graphdef, chunk, params, batch):
  model = nnx.merge(graphdef, params)
  return objectives.next_token_sums(
    model, batch["tokens"], batch["segment"], batch["position"], chunk=chunk
  )


def evaluate(
  model: Transformer, heldout: pipeline.HeldOut, chunk: int = 512
) -> Row:
  """Next-token statistics of a model on held-out text.

  Args:
    model: with the funnel to run it with.
    heldout: batches whose segments start at multiples of the total stride.
    chunk: positions of a row whose logits are in memory at one time, >= 1.

  Returns:
    `loss`, nats a token; `perplexity`, its exponential, None where that is out
    of a float's range; `bits_per_byte` of UTF-8; `accuracy`, the share of
    tokens that were the likeliest; and `num_tokens`, how many were predicted.

  Raises:
    ValueError: `chunk` out of range, no batches, or a funnel that does not
      recover.
    FloatingPointError: a loss that is not finite.
  """
  _require_int("chunk", chunk)
  if not heldout.batches:
    raise ValueError("heldout.batches is empty: expected at least one")
  graphdef, params = nnx.split(model)
  totals = dict(nll=0.0, correct=0.0, tokens=0.0)
  for batch in heldout.batches:
    sums = jax.device_get(_sums(graphdef, chunk, params, batch))
    # In double precision here; within a batch, float32 is enough.
    totals = {key: total + float(sums[key]) for key, total in totals.items()}
  loss = totals["nll"] / totals["tokens"]
  if not math.isfinite(loss):
    raise FloatingPointError(f"the loss on held-out text is {loss}")
  return {
    "loss": loss,
    "perplexity": math.exp(loss) if loss < _MAX_EXPONENT else None,
    "bits_per_byte": totals["nll"] / math.log(2) / heldout.num_bytes,
    "accuracy": totals["correct"] / totals["tokens"],
    "num_tokens": int(totals["tokens"]),
  }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _masked_sums(graphdef, rate, chunk, params, batch, key):
  return objectives.masked_token_sums(
    nnx.merge(graphdef, params), batch, key, rate=rate, chunk=chunk
  )


def evaluate_masked(
  model: Transformer,
  heldout: pipeline.HeldOut,
  *,
  rate: float,
  chunk: int = 512,
  seed: int = 0,
) -> Row:
  """How well masked tokens of held-out text are predicted, both ways read.

  Args:
    model: with the funnel to run it with.
    heldout, chunk: as for `evaluate`.
    rate: share of tokens that are to be predicted.
    seed: of which they are.

  Returns:
    `loss`, nats a masked token; `accuracy`; `num_tokens`, how many there were.
  """
  graphdef, params = nnx.split(model)
  totals = dict(nll=0.0, correct=0.0, tokens=0.0)
  for number, batch in enumerate(heldout.batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    sums = _masked_sums(graphdef, rate, chunk, params, batch, key)
    totals = {name: total + float(sums[name]) for name, total in totals.items()}
  count = max(1.0, totals["tokens"])
  return {
    "loss": totals["nll"] / count,
    "accuracy": totals["correct"] / count,
    "num_tokens": int(totals["tokens"]),
  }


def _require_int(name: str, value: Any) -> None:
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or value < 1:
    raise ValueError(f"{name}={value!r}: expected an integer >= 1")


def _heldout(
  config: Any, subject: subject_lib.Subject, align: int
) -> tuple[pipeline.HeldOut, dict[str, Any]]:
  """The batches, and the settings that they follow from."""
  trained = subject.config
  if trained is None:
    trained = config_dict.create(
      length=None, batch_size=_BATCH_SIZE, data=pipeline.default_config()
    )
  length = trained.length if config.length is None else config.length
  batch_size = (
    trained.batch_size if config.batch_size is None else config.batch_size
  )
  _require_int("length", length)
  _require_int("batch_size", batch_size)
  longest = subject.model.config.max_length
  if length > longest:
    raise ValueError(
      f"length={length}: expected at most model.max_length={longest}"
    )
  if length % align:
    raise ValueError(
      f"length={length}: expected a multiple of {align}, which all total "
      f"strides divide, such as {max(1, length // align) * align}"
    )
  data = config_dict.ConfigDict(trained.data.to_dict())
  with data.unlocked():
    if config.data.source is not None:
      # The files held out of another source are not of this one.
      data.source, data.heldout = config.data.source, None
    if config.data.heldout is not None:
      data.heldout = config.data.heldout
    data.tokenizer = subject.tokenizer_path
  corpus = pipeline.load_corpus(
    data, subject.model.config.vocab_size, config.checkpoint
  )
  heldout = pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=batch_size,
    length=length,
    segment_alignment=align,
    max_documents=config.max_documents,
  )
  settings = dict(
    length=length,
    batch_size=batch_size,
    align=align,
    data=data.to_dict(),
    num_documents=heldout.num_documents,
    num_bytes=heldout.num_bytes,
  )
  return heldout, settings


COLUMNS = (
  report.Column("funnel", "funnel"),
  report.Column("resolved", "in full"),
  report.Column("loss", "loss (nats/token)", ".4f"),
  report.Column("perplexity", "perplexity", ".3f"),
  report.Column("bits_per_byte", "bits/byte", ".4f"),
  report.Column("unigram_bits_per_byte", "unigram bits/byte", ".4f"),
  report.Column("accuracy", "top-1 %", ".2f", 100),
  report.Column("ideal_reduction", "FLOPs saved %", ".1f", 100),
)
KEYS = (
  "checkpoint",
  "tokenizer",
  "funnels",
  "batch_size",
  "length",
  "max_documents",
  "chunk",
  "data",
  "out",
)


def measure(
  model: Transformer,
  funnels: Sequence[Funnel],
  heldout: pipeline.HeldOut,
  chunk: int = 512,
) -> list[Row]:
  """Evaluates a model with each of several funnels.

  Args:
    model: a model with the funnel it was trained with, if any.
    funnels: configurations or strings; "trained" is the model's own.
    heldout: batches whose segments start at multiples of every total stride.
    chunk: see `evaluate`.

  Returns:
    A row for each funnel: what `evaluate` returns, `funnel`, `resolved`,
    `unigram_bits_per_byte` (the least without any context) and
    `ideal_reduction`, the share of a row's FLOPs that the funnel saves, head
    included.

  Raises:
    ValueError: a funnel that is malformed or does not fit or recover, or see
      `evaluate`.
  """
  named = _resolve(model, funnels)
  unigram = pipeline.unigram_bits_per_byte(heldout)
  length = heldout.batches[0]["tokens"].shape[1]
  rows = []
  for name, stages in named.items():
    print(f"evaluating {name} on {len(heldout.batches)} batches", flush=True)
    rows.append(
      {
        "funnel": name,
        "resolved": format_funnel(stages),
        **evaluate(model.with_funnel(stages), heldout, chunk),
        "unigram_bits_per_byte": unigram,
        "ideal_reduction": flops.ideal_reduction(
          model.config, stages, 1, length
        ),
      }
    )
  return rows


def _resolve(model, funnels):
  named = funnels_lib.resolve(
    funnels, model.config.num_layers, {TRAINED: model.stages}
  )
  _check_recover(named)
  return named


def _check_recover(named):
  for stages in named.values():
    check_recovers(stages, "predicting tokens")


def run(config: Any) -> list[Row]:
  """Evaluates what a configuration names, and writes a table and a plot.

  Writes accuracy.json, .md and .png to `config.out`.

  Args:
    config: a ConfigDict with the keys of configs/eval_accuracy.py.

  Returns:
    The rows of `measure`.

  Raises:
    ValueError: a key that is missing, or a value out of range.
    FloatingPointError: a loss that is not finite.
  """
  missing = [key for key in KEYS if key not in config]
  if missing:
    raise ValueError(f"the configuration lacks {missing}")
  _require_int("chunk", config.chunk)
  # What can be said before a checkpoint is read.
  _check_recover(funnels_lib.parse(config.funnels, {TRAINED: ()}))
  subject = subject_lib.load(config, needs=("length",))
  named = _resolve(subject.model, config.funnels)
  align = math.lcm(*map(total_stride, named.values()))
  heldout, settings = _heldout(config, subject, align)
  rows = measure(subject.model, config.funnels, heldout, config.chunk)
  settings |= dict(
    checkpoint=config.checkpoint,
    step=subject.step,
    model=subject.model.config.to_dict(),
  )
  step = "" if subject.step is None else f", step {subject.step}"
  note = (
    f"{rows[0]['num_tokens']} tokens, {heldout.num_bytes} bytes, "
    f"{heldout.num_documents} documents, in rows of {settings['length']}. "
    "Unigram: the least that token frequencies alone allow."
  )
  report.write(
    config.out or subject_lib.folder(config.checkpoint),
    "accuracy",
    rows,
    COLUMNS,
    f"Held-out text: {config.checkpoint}{step}",
    plots.accuracy,
    settings=settings,
    notes=[note],
  )
  return rows
