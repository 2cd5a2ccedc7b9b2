"""The latency of generation: what is timed, and what stands beside it."""

from flax import nnx
import numpy as np
import pytest

from gemma_funnel import flops
from gemma_funnel.config import TransformerConfig
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.evaluation import decoding, plots, report, timing
from gemma_funnel.model import Transformer

TINY = TransformerConfig.preset("tiny", kernel="reference")
FUNNELS = ("start=1,stride=2", "start=1,stop=3,stride=4")
NEW = 6


@pytest.fixture(scope="module")
def model():
  return Transformer(TINY, rngs=nnx.Rngs(0))


def _measure(model, funnels=FUNNELS, **changes):
  arguments = (
    dict(
      batch_sizes=(2,),
      prompts=(9,),
      new_tokens=NEW,
      protocol=timing.Protocol(3, 1, log=lambda line: None),
    )
    | changes
  )
  return decoding.measure(model, funnels, **arguments)


def test_rows_say_what_was_measured(model, monkeypatch):
  steps = []
  advance = decoder_lib.Decoder.advance

  def counted(self, state, until, *args):
    before = int(state.step)
    state = advance(self, state, until, *args)
    steps.append((len(state.done_B), int(state.step) - before))
    return state

  monkeypatch.setattr(decoder_lib.Decoder, "advance", counted)
  rows = _measure(model)
  # Of three variants: one to compile, and all rounds; whole each time.
  assert steps == [(2, NEW)] * 3 * (1 + 4)
  assert [row["funnel"] for row in rows] == ["off", *FUNNELS]
  off = rows[0]
  for row in rows:
    each, first = row["times_s"]["each"], row["times_s"]["first"]
    assert row["token_s"] == pytest.approx(np.median(each) / NEW)
    assert row["first_token_s"] == pytest.approx(np.median(first))
    ratios = np.asarray(each) / np.asarray(off["times_s"]["each"])
    assert row["reduction"] == pytest.approx(1 - np.median(ratios))
    assert row["speedup"] == pytest.approx(1 / np.median(ratios))
    assert row["tokens_per_s"] == pytest.approx(2 / row["token_s"])
  plots.decoding(rows)
  assert "| first token ms |" in report.table(rows, decoding.COLUMNS)


def test_ideals_are_those_of_flops(model):
  context = 9 + NEW // 2
  for row in _measure(model):
    stages = row["resolved"]
    cost = flops.decode_bytes(TINY, stages, 2, context)
    plain = flops.decode_bytes(TINY, None, 2, context)
    assert row["ideal_bytes"] == pytest.approx(1 - cost / plain)
    assert row["ideal_speedup"] == pytest.approx(plain / cost)
    assert row["bytes_per_s"] == pytest.approx(cost / row["token_s"])
    assert row["ideal_flops"] == pytest.approx(
      1
      - flops.decode_flops(TINY, stages, context)
      / flops.decode_flops(TINY, None, context)
    )
    assert row["first_ideal"] == flops.ideal_reduction(
      TINY, stages, 2, 9, head=False
    )
    least = flops.cache_bytes(TINY, stages, 2, 9 + NEW + 1)
    assert row["ideal_cache_bytes"] == least <= row["cache_bytes"]
    assert row["cache_bytes"] < 1.2 * least


def test_a_context_is_dropped_from_prompts(model):
  funnel, span = "start=1,reduce=context", 6
  off, row = _measure(model, (funnel,), context_length=span)
  assert off["error"] is row["error"] is None
  assert row["first_ideal"] == flops.ideal_reduction(
    TINY, funnel, 2, 9, head=False, context_length=span
  )
  assert row["ideal_cache_bytes"] == flops.cache_bytes(
    TINY, funnel, 2, 9 + NEW + 1, span
  )
  assert row["ideal_cache_bytes"] <= row["cache_bytes"] < off["cache_bytes"]


def test_a_failure_is_the_error_of_its_row(model, monkeypatch):
  prefill = decoder_lib.Decoder.prefill

  def fails(self, *args, **kw):
    if self.stride == 4:
      raise RuntimeError("out of memory")
    return prefill(self, *args, **kw)

  monkeypatch.setattr(decoder_lib.Decoder, "prefill", fails)
  rows = _measure(model)
  assert [bool(row["error"]) for row in rows] == [False, False, True]
  assert "out of memory" in rows[2]["error"] and rows[2]["speedup"] is None
  assert rows[1]["token_s"] > 0
  plots.decoding(rows)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(batch_sizes=()), r"decode.batch_sizes=\(\): expected one value"),
    (dict(prompts=(0,)), "decode.prompts=0"),
    (dict(new_tokens=-1), "decode.new_tokens=-1"),
    (dict(prompts=(250,)), "250 tokens and 6 new ones are more than .*=256"),
    (dict(funnels=("start=9",)), "start=9"),
    (dict(funnels=("start=1,reduce=context",)), "decode.context_length=0"),
    (dict(context_length=8), "decode.context_length=8.*from 0 to 7"),
    (dict(funnels=("start=1,recover=none",)), "'none' .*decode.new_tokens=0"),
  ],
)
def test_bad_arguments_are_named(model, changes, message):
  with pytest.raises(ValueError, match=message):
    _measure(model, **changes)
