"""Bottleneck by depth: states without and with a funnel, layer by layer."""

import dataclasses
import functools

from flax import nnx
from funnel_grid import stirred
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import TransformerConfig
from gemma_funnel.layers import make_attention_fn, rope_angles
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream
from gemma_funnel.study import layer_similarity

# The window is shorter than a row.
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=3, window=6, scan_layers=False, kernel="reference"
)
NESTED = "start=1,stop=3,reduce=strided,recover=add+start=2,stop=3,stride=3"


@pytest.fixture(scope="module")
def model():
  return stirred(Transformer(CONFIG, rngs=nnx.Rngs(0)))


def _tokens(length=13):
  return np.random.default_rng(0).integers(5, 97, (2, length))


def _segments(length=13):
  segment_BT = np.ones((2, length), np.int32)
  segment_BT[1, 9:] = 0
  return segment_BT


def _by_depth(model, funnel, causal=True, **kwargs):
  return layer_similarity.by_depth(
    model, funnel, _tokens(), _segments(), causal=causal, **kwargs
  )


@functools.partial(jax.jit, static_argnums=0)
def _states_of(graphdef, params):
  model = nnx.merge(graphdef, params)
  segment_BT = jnp.ones((2, 13), jnp.int32)
  found = layer_similarity.states(model, _tokens(), segment_BT, True)
  states = list(found.values())
  return states, model.final_norm(states[-1])


def _cosine(x_D, y_D):
  x_D, y_D = np.float64(x_D), np.float64(y_D)
  return x_D @ y_D / np.linalg.norm(x_D) / np.linalg.norm(y_D)


@pytest.mark.parametrize(
  "funnel", ["off", "start=1,stop=3,stride=1,recover=repeat"]
)
def test_a_funnel_that_does_nothing(model, funnel):
  rows = _by_depth(model, funnel)
  layers = [r for r in rows if r["at"] == "layer"]
  assert [r["layer"] for r in layers] == [0, 1, 2]
  assert len(rows) == 3 + (funnel != "off")
  for row in rows:
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["error"] == pytest.approx(0, abs=1e-3)


def test_what_is_before_the_stage_is_the_same(model):
  rows = _by_depth(model, "start=1,stop=2,stride=3", causal=False)
  shown = [(r["layer"], r["at"], r["short"]) for r in rows]
  assert shown == [
    (0, "layer", False),
    (1, "layer", True),
    (1, "recovery", False),
    (2, "layer", False),
  ]
  assert (rows[0]["cosine"], rows[0]["error"]) == (1, 0)
  assert all(0.1 < r["cosine"] < 0.99 for r in rows[1:])


@functools.partial(jax.jit, static_argnums=(1, 3))
def _layer(model, number, stream, causal):
  """A layer's output, from the block itself."""
  block, params_L = nnx.split(model.layers)
  params = jax.tree.map(lambda p: p[number], params_L)
  spec = CONFIG.layers[number]
  rope = rope_angles(stream.position_BT, CONFIG, spec)
  attention_fn = make_attention_fn(CONFIG, stream, stream, causal, spec.window)
  hidden_BTD, _ = nnx.merge(block, params)(
    stream.hidden_BTD, rope, attention_fn
  )
  return stream.replace(hidden_BTD=hidden_BTD)


def test_one_stage_by_hand(model):
  """Bidirectional, means of two tokens, no padding: all of it by hand."""
  tokens, length = _tokens(12), 12
  plain = make_stream(model.embed(tokens))
  before = _layer(model, 0, plain, False)
  plain = _layer(model, 1, before, False)
  pairs = np.asarray(before.hidden_BTD).reshape(2, length // 2, 2, -1)
  position = jnp.broadcast_to(jnp.arange(length // 2) * 2, (2, length // 2))
  short = make_stream(
    jnp.asarray(pairs.mean(2)), position_BT=position + 1
  ).replace(last_token_position_BT=position, stride=2)
  deep = np.asarray(_layer(model, 1, short, False).hidden_BTD)
  read = np.repeat(deep, 2, axis=1)
  recovered = (read + np.asarray(before.hidden_BTD)) / 2
  want = [
    np.mean(
      [
        _cosine(x, y)
        for x, y in zip(
          np.asarray(plain.hidden_BTD).reshape(2 * length, -1),
          other.reshape(2 * length, -1),
          strict=True,
        )
      ]
    )
    for other in (read, recovered)
  ]
  rows = layer_similarity.by_depth(
    model, "start=1,stop=2,stride=2,reduce=mean", tokens, causal=False
  )
  assert [r["cosine"] for r in rows[1:3]] == pytest.approx(want, abs=1e-5)
  assert abs(want[0] - want[1]) > 0.01
  # The mean square distance of unit vectors is 2 - 2 cos.
  for row in rows:
    assert row["error"] ** 2 == pytest.approx(2 - 2 * row["cosine"], abs=1e-5)


@pytest.mark.parametrize(
  "funnel",
  [NESTED, "start=0,stop=2,keys=first", "start=1,reduce=strided,recover=none"],
)
def test_the_last_states_are_what_encode_norms(model, funnel):
  model = model.with_funnel(funnel)
  got = np.asarray(_states_of(*nnx.split(model))[1])
  want = np.asarray(model.encode(_tokens(), causal=True))
  if want.shape[1] < 13:
    got = got[:, ::2]
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_nested_stages_are_read_through_both(model):
  """Of slots 0, 2, 4, .. the groups are 0 | 2 4 6 | 8 10 12; the odd ones
  keep the state that layer 0 gave them."""
  states, _ = _states_of(*nnx.split(model.with_funnel(NESTED)))
  assert len(states) == 3 + 2
  first, inner = np.asarray(states[0]), np.asarray(states[2])
  np.testing.assert_array_equal(inner[:, 1::2], first[:, 1::2])
  # A causal group is read back from its newest slot on.
  for a, b in ((0, 2), (0, 4), (6, 8), (6, 10)):
    np.testing.assert_array_equal(inner[:, a], inner[:, b])
  assert np.abs(inner[:, 0] - inner[:, 6]).max() > 0.01
  rows = _by_depth(model, NESTED)
  assert [(r["layer"], r["at"], r["short"]) for r in rows] == [
    (0, "layer", False),
    (1, "layer", True),
    (2, "layer", True),
    (2, "recovery", True),
    (2, "recovery", False),
  ]


def test_padding_does_not_count(model):
  rows = lambda tokens, segments: layer_similarity.by_depth(
    model, "start=1", tokens, segments, causal=True
  )
  spoiled = _tokens()
  spoiled[1, 9:] = 11
  assert (spoiled != _tokens()).any()
  both = rows(_tokens(), _segments())
  assert rows(spoiled, _segments()) == both
  # 13 tokens of a row and 9 of the other have the same weight each.
  alone = [
    rows(_tokens(), _segments() * np.array([[row == 0], [row == 1]]))
    for row in (0, 1)
  ]
  for row, long, short in zip(both, *alone, strict=True):
    mean = (13 * long["cosine"] + 9 * short["cosine"]) / 22
    assert row["cosine"] == pytest.approx(mean, abs=1e-6)


def test_two_models(model):
  other = Transformer(CONFIG, rngs=nnx.Rngs(7))
  same = _by_depth(model, "start=1")
  assert _by_depth(model, "start=1", funnelled=model) == same
  rows = _by_depth(model, "start=1", funnelled=other)
  assert all(abs(r["cosine"]) < 0.5 for r in rows)
  # Which of them has the funnel matters from the first short layer on.
  swapped = _by_depth(other, "start=1", funnelled=model)
  assert rows[0]["cosine"] == pytest.approx(swapped[0]["cosine"], abs=1e-6)
  assert abs(rows[1]["cosine"] - swapped[1]["cosine"]) > 1e-3
  # A funnel that the given model has does not matter.
  held = model.with_funnel("start=0,stop=2,stride=3")
  assert _by_depth(held, "start=1") == same


def test_what_cannot_be_compared(model):
  wide = dataclasses.replace(CONFIG, num_layers=2)
  with pytest.raises(ValueError, match="num_layers is 3 without.* 2 with it"):
    _by_depth(model, "off", funnelled=Transformer.abstract(wide))
  with pytest.raises(ValueError, match="0 everywhere"):
    layer_similarity.by_depth(
      model, "off", _tokens(), np.zeros((2, 13), np.int32), causal=True
    )
  with pytest.raises(ValueError, match="funnel.stop=9"):
    _by_depth(model, "start=1,stop=9")
  with pytest.raises(ValueError, match="vocab_size"):
    layer_similarity.by_depth(model, "off", _tokens() + 10_000, causal=True)
  graphdef, params = nnx.split(model)
  spoiled = nnx.merge(graphdef, jax.tree.map(lambda p: p * np.nan, params))
  with pytest.raises(ValueError, match="layer 0 are not finite"):
    _by_depth(model, "off", funnelled=spoiled)
