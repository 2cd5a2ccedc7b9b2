"""Untrained funnels beside layers left out."""

import numpy as np
import pytest
from tiny_language_model import make_model, train_tokenizer
import tiny_run

from gemma_funnel import evaluation, weights
from gemma_funnel.evaluation import damage, load_for_eval

LENGTH = 32


@pytest.fixture(scope="module")
def model():
  return make_model(LENGTH)


def test_a_layer_that_does_nothing_is_found():
  config = damage.dataclasses.replace(
    make_model(LENGTH).config, num_layers=4, post_norms=False
  )
  model = damage.nnx.jit(
    lambda: damage.Transformer(config, rngs=damage.nnx.Rngs(0))
  )()
  for part in (model.layers.attn.out, model.layers.mlp.down):
    values = part[...] * 30
    part[...] = values.at[2].set(0)
  tokens = np.random.default_rng(0).integers(0, 300, (1, 16))
  assert damage.least_influence(model, tokens, 1) == 2


def test_the_table(model, tmp_path, monkeypatch):
  tokenizer = train_tokenizer(tmp_path)
  loaded = load_for_eval.EvalModel("x", model, tokenizer.name)
  monkeypatch.setattr(load_for_eval, "load", lambda *a, **kw: loaded)
  text = tmp_path / "text.txt"
  text.write_text("one two three four five six red green blue " * 5)
  config = tiny_run.load_config("eval_damage")
  config.update(
    checkpoint="x",
    funnels=("start=1,stride=2",),
    text=str(text),
    length=LENGTH,
    prompt="one",
    new_tokens=2,
    repeats=1,
    warmup=0,
    out=str(tmp_path / "out"),
  )
  plain, funnel, skip = evaluation.run(config)
  assert [r["kind"] for r in (plain, funnel, skip)] == [
    "plain",
    "funnel",
    "skip",
  ]
  assert plain["damage_text"] == 0 and funnel["damage_text"] != 0
  assert skip["variant"] == "skip 1:2" and 0.4 < skip["flops_saved"] < 0.6
  assert 0 < funnel["flops_saved_with_head"] < funnel["flops_saved"] < 0.5
  assert (tmp_path / "out" / "damage.png").stat().st_size > 1000
  monkeypatch.undo()
  config.checkpoint = "nowhere/at/all"
  with pytest.raises(ValueError, match="nowhere/at/all.*is not there"):
    evaluation.run(config)


def test_names_of_packages(monkeypatch):
  assert weights.find("some/path") == "some/path" and weights.find(None) is None
  monkeypatch.setitem(weights.PACKAGES, "smollm2_135m", "no_such_package")
  with pytest.raises(ValueError, match=r"install 'gemma-funnel\[weights\]'"):
    weights.find("smollm2_135m")
