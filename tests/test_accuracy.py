"""Accuracy: chunked sums against full logits, and runs from end to end."""

import asyncio
import json
import math
import os

from flax import nnx
import jax
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_checkpoints
import tiny_run

from gemma_funnel import convert, evaluation, flops
from gemma_funnel.config import TransformerConfig, format_funnel
from gemma_funnel.data import packing, pipeline
from gemma_funnel.evaluation import accuracy
from gemma_funnel.model import Transformer
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import workdir

VOCAB = 400
LENGTH = 60
TRAINED = "start=1,stride=2"
OTHER = "start=1,stop=3,stride=3,recover=add"
# Groups of 6 tokens, and within them of 12.
NESTED = "start=1,stride=6+start=2,stop=3,stride=2"


def get_config(**changes):
  config = tiny_run.load_config("eval_accuracy")
  config.update(changes)
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a run that has not learned anything, and its model."""
  folder = tmp_path_factory.mktemp("run")
  data = pipeline.default_config()
  data.source = os.path.join(os.path.dirname(asyncio.__file__), "*.py")
  data.heldout_fraction = 0.1
  config = config_dict.create(
    workdir=str(folder),
    funnel=TRAINED,
    batch_size=4,
    length=LENGTH,
    model=TransformerConfig.preset("tiny", vocab_size=VOCAB).to_dict(),
    data=data,
  )
  workdir.init_workdir(config)
  corpus = pipeline.load_corpus(data, VOCAB, folder)
  batches = pipeline.train_iterator(
    corpus.train,
    corpus.tokenizer,
    batch_size=4,
    length=LENGTH,
    segment_alignment=2,
    seed=0,
  )
  next(batches)
  model = Transformer(
    TransformerConfig.from_dict(config.model), TRAINED, rngs=nnx.Rngs(0)
  )
  with checkpoint_lib.Checkpoints(folder) as checkpoints:
    checkpoints.save(
      7,
      {
        "params": nnx.to_pure_dict(nnx.state(model)),
        "opt_state": {"x": np.zeros(1)},
      },
      {"data": batches.get_state()},
      config,
    )
    checkpoints.wait()
  return folder, model, corpus


@pytest.fixture(scope="module")
def heldout(run):
  _, _, corpus = run
  return pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=4,
    length=LENGTH,
    segment_alignment=6,
    max_documents=2,
  )


def naive(model, heldout):
  """Mean loss and accuracy by full logits, in float64."""
  losses, hits = [], []
  for batch in heldout.batches:
    logits = np.asarray(
      model(batch["tokens"], batch["segment"], batch["position"]), np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, slots = np.nonzero(packing.predicted_mask(batch["segment"]))
    target = batch["tokens"][rows, slots + 1]
    losses += list(-log_p[rows, slots, target])
    hits += list(logits[rows, slots].argmax(-1) == target)
  return np.mean(losses), np.mean(hits), len(losses)


@pytest.mark.parametrize(
  "funnel, chunk", [("off", 512), (TRAINED, 512), (OTHER, 512), (OTHER, 7)]
)
def test_evaluate_equals_full_logits(run, heldout, funnel, chunk):
  model = run[1].with_funnel(funnel)
  loss, hits, count = naive(model, heldout)
  found = accuracy.evaluate(model, heldout, chunk)
  assert found["num_tokens"] == count == heldout.num_tokens
  assert found["loss"] == pytest.approx(loss, rel=1e-5)
  assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
  assert found["accuracy"] == pytest.approx(hits)
  bits = loss * count / math.log(2) / heldout.num_bytes
  assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_measure_compares_funnels_on_the_same_tokens(run, heldout):
  model = run[1]
  rows = accuracy.measure(
    model, ("trained", "off", TRAINED, OTHER), heldout, 512
  )
  assert [row["funnel"] for row in rows] == ["as trained", "off", OTHER]
  assert rows[0]["resolved"] == format_funnel(model.stages)
  assert len({row["num_tokens"] for row in rows}) == 1
  assert len({row["loss"] for row in rows}) == 3
  unigram = pipeline.unigram_bits_per_byte(heldout)
  for row in rows:
    assert row["unigram_bits_per_byte"] == unigram
    assert row["ideal_reduction"] == flops.ideal_reduction(
      model.config, row["resolved"], 1, LENGTH
    )
  own = accuracy.evaluate(model, heldout)
  assert rows[0]["loss"] == pytest.approx(own["loss"], rel=1e-6)


def test_a_loss_that_is_not_finite_raises(run, heldout):
  broken = jax.tree.map(lambda p: p * np.nan, nnx.state(run[1]))
  model = nnx.merge(nnx.graphdef(run[1]), broken)
  with pytest.raises(FloatingPointError, match="held-out text is nan"):
    accuracy.evaluate(model, heldout)


def test_evaluate_errors(run, heldout):
  with pytest.raises(ValueError, match="chunk=0: expected an integer >= 1"):
    accuracy.evaluate(run[1], heldout, 0)
  empty = pipeline.HeldOut((), 1, 0, 0)
  with pytest.raises(ValueError, match="batches is empty"):
    accuracy.evaluate(run[1], empty)
  model = run[1].with_funnel("start=1,reduce=context")
  with pytest.raises(ValueError, match="reduce='context'.*trains=False"):
    accuracy.evaluate(model, heldout)


def test_run_of_a_training_run(run, capsys):
  folder, model, corpus = run
  config = get_config(
    checkpoint=str(folder), funnels=("trained", "off", NESTED), max_documents=2
  )
  rows = evaluation.run(config)
  expected = pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=4,
    length=LENGTH,
    segment_alignment=12,
    max_documents=2,
  )
  assert rows == accuracy.measure(model, config.funnels, expected, 512)
  content = json.loads((folder / "eval" / "accuracy.json").read_text())
  assert content["rows"] == rows
  assert content["settings"]["step"] == 7
  assert content["settings"]["segment_alignment"] == 12
  assert content["settings"]["length"] == LENGTH
  assert content["settings"]["num_documents"] == 2
  png = (folder / "eval" / "accuracy.png").read_bytes()
  assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 5000
  out = capsys.readouterr().out
  assert f"Held-out text: {folder}, step 7" in out
  assert "| bits/byte |" in out


def test_run_on_other_text(run, tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("a small text\n" * 40)
  config = get_config(
    checkpoint=str(run[0]),
    funnels=("off",),
    batch_size=2,
    length=24,
    out=str(tmp_path / "out"),
  )
  config.data.heldout = str(text)
  rows = evaluation.run(config)
  content = json.loads((tmp_path / "out" / "accuracy.json").read_text())
  assert content["settings"]["num_bytes"] == 40 * 13
  assert content["settings"]["length"] == 24
  assert content["settings"]["data"]["heldout"] == str(text)
  assert [row["funnel"] for row in rows] == ["off"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_run_of_a_converted_checkpoint(run, tmp_path, to):
  folder, model, _ = run
  other = tmp_path / "converted"
  convert.convert(folder, other, to)
  # Its tokenizer and its funnel came along.
  config = get_config(
    checkpoint=str(other),
    length=LENGTH,
    funnels=("trained", "off"),
    max_documents=1,
  )
  config.data.source = os.path.join(os.path.dirname(asyncio.__file__), "*.py")
  rows = evaluation.run(config)
  assert [(r["funnel"], r["resolved"]) for r in rows] == [
    ("as trained", format_funnel(model.stages)),
    ("off", "off"),
  ]
  content = json.loads((other / "eval" / "accuracy.json").read_text())
  assert content["settings"]["step"] is None


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(checkpoint=None), "checkpoint is missing: expected"),
    (dict(checkpoint="/nowhere"), "checkpoint='/nowhere' is not there"),
    (dict(tokenizer="x.model"), "tokenizer='x.model': expected none"),
    (dict(funnels=()), r"funnels=\(\): expected a tuple"),
    (dict(funnels=("half",)), "funnels: 'half'"),
    (dict(funnels=("start=2,stop=9",)), "stop=9 is past .* 4 layers"),
    (dict(funnels=("start=1,recover=none",)), "recover='none' .*tokens"),
    (dict(funnels=("start=1,reduce=context",)), "reduce='context'.*tokens"),
    (dict(funnels=(NESTED,), length=42), "length=42: .*12.* such as 36"),
    (dict(length=61), "length=61: expected a multiple of 2.* such as 60"),
    (dict(length=258), "length=258: expected at most .*max_length=256"),
    (dict(length=0), "length=0: expected an integer >= 1"),
    (dict(batch_size=0), "batch_size=0: expected an integer >= 1"),
    (dict(max_documents=0), "max_documents=0"),
    (dict(chunk=0), "chunk=0: expected an integer >= 1"),
  ],
)
def test_bad_configurations_are_named(run, changes, message, monkeypatch):
  if "funnels: " in message or "recover" in message:  # Before a run is read.
    monkeypatch.setattr(convert, "load_run", None)
  config = get_config(**(dict(checkpoint=str(run[0])) | changes))
  with pytest.raises(ValueError, match=message):
    evaluation.run(config)


def test_other_folders_need_a_tokenizer_and_a_length(tmp_path):
  tensors = tiny_checkpoints.random_tensors(tiny_checkpoints.GEMMA2)
  tiny_checkpoints.write(tmp_path, tiny_checkpoints.GEMMA2, tensors)
  config = get_config(checkpoint=str(tmp_path))
  with pytest.raises(ValueError, match="tokenizer is missing.*is no training"):
    evaluation.run(config)
  config.tokenizer = __file__
  with pytest.raises(ValueError, match="length is missing.*is no training"):
    evaluation.run(config)
