"""How well a model predicts held-out text, with its funnel and with others.

All funnels get the same batches, whose segments start at multiples of every
total stride: rows differ by their funnels alone.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import nnx
import jax
from ml_collections import config_dict

from gemma_funnel import flops
from gemma_funnel.checks import require, require_int
from gemma_funnel.config import Funnel, check_reducers, total_stride
from gemma_funnel.data import pipeline
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import load_for_eval, plots, report
from gemma_funnel.evaluation.funnels import TRAINED as TRAINED
from gemma_funnel.model import Transformer
from gemma_funnel.training import objectives

_BATCH_SIZE = 8  # Where neither the configuration nor a run has one.
_NEEDS = dict(recovers="predicting tokens", trains=True)

Row = dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(graphdef, chunk, rate, params, batch, key):
  model = nnx.merge(graphdef, params)
  if rate is not None:
    return objectives.masked_token_sums(
      model, batch, key, rate=rate, chunk=chunk
    )
  return objectives.next_token_sums(
    model, batch["tokens"], batch["segment"], batch["position"], chunk=chunk
  )


def _means(model, heldout, chunk: int, rate=None, seed: int = 0) -> Row:
  check_reducers(model.stages, "trains", _NEEDS["recovers"])
  graphdef, params = nnx.split(model)
  totals = dict(nll=0.0, correct=0.0, tokens=0.0)
  for number, batch in enumerate(heldout.batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    sums = jax.device_get(_sums(graphdef, chunk, rate, params, batch, key))
    # In double precision here; within a batch, float32 is enough.
    totals = {name: total + float(sums[name]) for name, total in totals.items()}
  count = max(1.0, totals["tokens"])
  return {
    "loss": totals["nll"] / count,
    "accuracy": totals["correct"] / count,
    "num_tokens": int(totals["tokens"]),
  }


def evaluate(
  model: Transformer, heldout: pipeline.HeldOut, chunk: int = 512
) -> Row:
  """Next-token statistics of a model, with its funnel, on held-out text.

  Args:
    model: with the funnel to run it with.
    heldout: batches whose segments start at multiples of the total stride.
    chunk: positions of a row whose logits are in memory at one time.

  Returns:
    `loss`, nats a token; `perplexity`, its exponential, None where that is out
    of a float's range; `bits_per_byte` of UTF-8; `accuracy`, the share of
    tokens that were the likeliest; and `num_tokens`, how many were predicted.

  Raises:
    ValueError: `chunk` out of range, no batches, or a funnel that does not
      recover.
    FloatingPointError: a loss that is not finite.
  """
  require_int("chunk", chunk, 1)
  require(bool(heldout.batches), "heldout.batches is empty: expected one")
  row = _means(model, heldout, chunk)
  loss = row["loss"]
  if not math.isfinite(loss):
    raise FloatingPointError(f"the loss on held-out text is {loss}")
  bits = loss * row["num_tokens"] / math.log(2)
  return row | {
    "perplexity": load_for_eval.perplexity(loss),
    "bits_per_byte": bits / heldout.num_bytes,
  }


def evaluate_masked(
  model: Transformer,
  heldout: pipeline.HeldOut,
  *,
  rate: float,
  chunk: int = 512,
  seed: int = 0,
) -> Row:
  """Masked-token statistics of a bidirectional model on held-out text.

  Args:
    model, heldout, chunk: as for `evaluate`.
    rate: share of tokens that are masked, and predicted.
    seed: of the choice of masked tokens.

  Returns:
    `loss`, nats a masked token; `accuracy`; `num_tokens`, how many there were.
  """
  return _means(model, heldout, chunk, rate, seed)


def measure(
  model: Transformer,
  funnels: Sequence[Funnel],
  heldout: pipeline.HeldOut,
  chunk: int = 512,
) -> list[Row]:
  """Evaluates a model with each of several funnels.

  Args:
    model, heldout, chunk: as for `evaluate`.
    funnels: configurations or strings; "trained" is the model's own.

  Returns:
    A row for each funnel: what `evaluate` returns, `funnel`, `resolved`,
    `unigram_bits_per_byte` (the least without any context) and
    `ideal_reduction`, the share of a row's FLOPs that the funnel saves, head
    included.

  Raises:
    ValueError: a funnel that cannot be, or see `evaluate`.
  """
  named = funnels_lib.resolve_for(model, funnels, **_NEEDS)
  length = heldout.batches[0]["tokens"].shape[1]
  unigram = pipeline.unigram_bits_per_byte(heldout)

  def measure_one(stages):
    ideal = flops.ideal_reduction(model.config, stages, 1, length)
    about = {"unigram_bits_per_byte": unigram, "ideal_reduction": ideal}
    return evaluate(model.with_funnel(stages), heldout, chunk) | about

  what = f"{len(heldout.batches)} batches of held-out text"
  return funnels_lib.measure_each(what, named, measure_one)


COLUMNS = report.columns(
  "funnel",
  "resolved",
  "loss",
  "perplexity",
  "bits_per_byte",
  report.Column("unigram_bits_per_byte", "unigram bits/byte", ".4f"),
  report.percent("accuracy", "top-1", ".2f"),
  "ideal_reduction",
)
KEYS = (
  "checkpoint tokenizer funnels batch_size length max_documents chunk data out"
).split()


def run(config: Any) -> list[Row]:
  """Runs configs/eval_accuracy.py; returns the rows of `measure`.

  Writes accuracy.json, .md and .png to `config.out`.

  Raises:
    ValueError: a value out of range.
    FloatingPointError: a loss that is not finite.
  """
  require_int("chunk", config.chunk, 1)
  # What can be said before a checkpoint is read.
  funnels_lib.resolve(config.funnels, own=(), **_NEEDS)
  loaded = load_for_eval.load(config, needs=("length",))
  named = funnels_lib.resolve_for(loaded.model, config.funnels, **_NEEDS)
  alignment = math.lcm(*map(total_stride, named.values()))
  heldout, settings = _heldout(config, loaded, alignment)
  settings |= loaded.settings()
  out = config.out or load_for_eval.default_out(config.checkpoint)
  of = {key: settings[key] for key in ("checkpoint", "data")}
  report.claim(out, "accuracy", of)
  rows = measure(loaded.model, config.funnels, heldout, config.chunk)
  report.write(
    out,
    "accuracy",
    rows,
    COLUMNS,
    loaded.title("Held-out text"),
    plots.accuracy,
    settings=settings,
    notes=[
      f"{rows[0]['num_tokens']} tokens, {heldout.num_bytes} bytes, "
      f"{heldout.num_documents} documents, in rows of {settings['length']}. "
      "Unigram: the least that token frequencies alone allow."
    ],
  )
  return rows


def _heldout(
  config: Any, loaded: load_for_eval.EvalModel, alignment: int
) -> tuple[pipeline.HeldOut, dict[str, Any]]:
  """The batches, and the settings that they follow from."""
  trained = loaded.config or config_dict.create(
    length=None, batch_size=_BATCH_SIZE, data=pipeline.default_config()
  )
  sizes = {
    key: trained[key] if config[key] is None else config[key]
    for key in ("length", "batch_size")
  }
  for key, value in sizes.items():
    require_int(key, value, 1)
  length, longest = sizes["length"], loaded.model.config.max_length
  require(
    length <= longest,
    f"length={length}: expected at most model.max_length={longest}",
  )
  require(
    length % alignment == 0,
    f"length={length}: expected a multiple of {alignment}, which all total "
    f"strides divide, such as {max(1, length // alignment) * alignment}",
  )
  data = config_dict.ConfigDict(trained.data.to_dict())
  with data.unlocked():
    if config.data.source is not None:
      # The files held out of another source are not of this one.
      data.source, data.heldout = config.data.source, None
    if config.data.heldout is not None:
      data.heldout = config.data.heldout
    data.tokenizer = loaded.tokenizer_path
  vocab_size = loaded.model.config.vocab_size
  corpus = pipeline.load_corpus(data, vocab_size, config.checkpoint)
  heldout = pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    **sizes,
    segment_alignment=alignment,
    max_documents=config.max_documents,
  )
  settings = sizes | {
    "segment_alignment": alignment,
    "data": data.to_dict(),
    "num_documents": heldout.num_documents,
    "num_bytes": heldout.num_bytes,
  }
  return heldout, settings
