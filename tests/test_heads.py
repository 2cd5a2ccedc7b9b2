"""Heads: pools by hand, padding that counts for nothing, short states."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import TransformerConfig
from gemma_funnel.heads import POOLS, Encoder, Head, HeadConfig
from gemma_funnel.model import Transformer

D, C = 8, 3
# Two rows of five tokens: padding after, and padding before.
SEGMENT = np.asarray([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], np.int32)


def _head(width=D, **config):
  """A head whose parameters, which start at zero, have values."""
  config = HeadConfig(**{"outputs": C, "dropout": 0.0, **config})
  head = Head(width, config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    nnx.state(head),
  )
  return nnx.merge(nnx.graphdef(head), values)


def _hidden(seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, 5, D)).astype(np.float32)


def _pooled(pool, rows, query):
  """Of one sequence's real states [n, D]."""
  if pool in ("first", "last"):
    return rows[0 if pool == "first" else -1]
  weight = np.ones(len(rows))
  if pool == "attention":
    rms = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    weight = np.exp((rows / rms) @ query)
  return weight @ rows / weight.sum()


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("pool", POOLS)
def test_a_sequence_is_pooled_and_projected(pool, width):
  head, hidden = _head(pool=pool, hidden=width), _hidden()
  query = np.asarray(head.pool_query[...]) if pool == "attention" else None
  outputs = head(jnp.asarray(hidden), jnp.asarray(SEGMENT))
  assert outputs.shape == (2, C) and outputs.dtype == jnp.float32
  for row in range(2):
    x = _pooled(pool, hidden[row][SEGMENT[row] != 0].astype(np.float64), query)
    if width:
      x = np.tanh(x @ np.asarray(head.hidden[...]))
    expected = x @ np.asarray(head.out[...]) + np.asarray(head.bias[...])
    np.testing.assert_allclose(outputs[row], expected, rtol=2e-5, atol=1e-5)


def test_every_token_has_outputs():
  head, hidden = _head(per_token=True, pool="attention"), _hidden()
  assert not hasattr(head, "pool_query")  # It would have no effect.
  outputs = head(jnp.asarray(hidden), jnp.asarray(SEGMENT))
  expected = hidden @ np.asarray(head.out[...]) + np.asarray(head.bias[...])
  assert outputs.shape == (2, 5, C)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_states_of_padding_do_not_matter(pool):
  head, hidden = _head(pool=pool), _hidden()
  outputs = head(jnp.asarray(hidden), jnp.asarray(SEGMENT))
  hidden[SEGMENT == 0] = 1e4
  other = head(jnp.asarray(hidden), jnp.asarray(SEGMENT))
  np.testing.assert_array_equal(outputs, other)
  # A row of padding alone pools to nothing.
  outputs = head(jnp.asarray(hidden), jnp.zeros((2, 5), jnp.int32))
  np.testing.assert_array_equal(outputs, np.stack([head.bias[...]] * 2))


def test_attention_starts_as_the_mean():
  outputs = []
  for pool in ("attention", "mean"):
    head = Head(D, HeadConfig(C, pool=pool), rngs=nnx.Rngs(0))
    head.out[...] = np.random.default_rng(0).normal(size=(D, C))
    outputs.append(head(jnp.asarray(_hidden()), jnp.asarray(SEGMENT)))
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
  assert np.ptp(outputs[0]) > 0.1


def test_a_fresh_head_prefers_no_output():
  head = Head(D, HeadConfig(C, hidden=4), rngs=nnx.Rngs(0))
  outputs = head(jnp.asarray(_hidden()), jnp.asarray(SEGMENT))
  assert not np.any(outputs)
  assert np.all(np.std(head.hidden[...], axis=0) > 0)


@pytest.mark.parametrize("per_token", [False, True])
def test_dropout_needs_a_key(per_token):
  head = _head(dropout=0.5, per_token=per_token)
  inputs = jnp.asarray(_hidden()), jnp.asarray(SEGMENT)
  none = _head(dropout=0.0, per_token=per_token)
  plain = none(*inputs)
  np.testing.assert_array_equal(head(*inputs), plain)
  keys = jax.random.split(jax.random.key(0), 400)
  dropped = np.stack([head(*inputs, key) for key in keys])
  assert not np.array_equal(dropped[0], dropped[1])
  np.testing.assert_array_equal(dropped[0], head(*inputs, keys[0]))
  # What is kept is scaled up: the mean stays.
  spread = dropped.std(axis=0) / np.sqrt(len(keys))
  assert np.all(np.abs(dropped.mean(axis=0) - plain) < 5 * spread)
  np.testing.assert_array_equal(none(*inputs, keys[0]), plain)


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"pool": "max"}, "head.pool='max': expected one of .*'attention'"),
    ({"dropout": 1.0}, "head.dropout=1.0: expected at least 0 and below 1"),
    ({"dropout": -0.1}, "head.dropout=-0.1"),
    ({"dropout": float("nan")}, "head.dropout=nan"),
    ({"hidden": -1}, "head.hidden=-1"),
    ({"outputs": 0}, "head.outputs=0"),
  ],
  ids=str,
)
def test_a_head_that_cannot_be(changes, text):
  with pytest.raises(ValueError, match=text):
    HeadConfig(**{"outputs": C, **changes})


def _encoder(funnel=None, *, causal=False, **config):
  sizes = TransformerConfig.preset(
    "tiny", kernel="reference", num_layers=2, attention_pattern=("global",)
  )
  model = Transformer(sizes, funnel, rngs=nnx.Rngs(0))
  return Encoder(model, _head(sizes.embed_dim, **config), causal=causal)


def _tokens(length=12, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 97, (2, length)).astype(np.int32)


@pytest.mark.parametrize(
  "funnel",
  [
    None,
    "start=1,stop=2,stride=2",
    "start=1,stride=3,recover=none",
    "start=1,stride=2,keep_first=true,recover=none",
  ],
)
def test_padding_on_either_side_changes_nothing(funnel):
  encoders = [_encoder(funnel, pool=pool) for pool in POOLS]

  @jax.jit
  def outputs(tokens, segment):
    return jnp.stack([e(tokens, segment) for e in encoders])

  tokens, count = _tokens(), 7
  alone = outputs(tokens[:, :count], np.ones((2, count), np.int32))
  for start in (0, 5):  # Padding after, and padding before.
    segment = np.zeros((2, 12), np.int32)
    segment[:, start : start + count] = 1
    for garbage in (0, 50):
      padded = np.full((2, 12), garbage, np.int32)
      padded[:, start : start + count] = tokens[:, :count]
      np.testing.assert_allclose(
        outputs(padded, segment), alone, rtol=1e-4, atol=1e-5
      )
  assert np.std(alone) > 0.1


def test_a_head_reads_the_short_states_of_a_funnel_that_does_not_recover():
  encoder = _encoder("start=1,stride=3,recover=none", pool="last")
  tokens = _tokens(8)
  segment = np.asarray([[1] * 8, [1] * 4 + [0] * 4], np.int32)
  short = encoder.model.encode(tokens, segment, causal=False)
  assert short.shape[1] == 3
  # Groups of 3, 3 and 2 tokens; of 3 and 1 and none.
  expected = encoder.head(short, jnp.asarray([[1, 1, 1], [1, 1, 0]]))
  wrong = encoder.head(short, jnp.asarray([[1, 1, 1], [1, 1, 1]]))
  outputs = jax.jit(encoder)(tokens, segment)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
  assert not np.allclose(outputs[1], wrong[1], atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_causal_is_what_the_trunk_is_run_with(causal):
  encoder = jax.jit(_encoder(causal=causal, per_token=True))
  tokens, segment = _tokens(), np.ones((2, 12), np.int32)
  other = tokens.copy()
  other[:, 6] = (other[:, 6] - 4) % 92 + 5
  first, second = encoder(tokens, segment), encoder(other, segment)
  assert np.any(first[:, 6:] != second[:, 6:])
  assert np.array_equal(first[:, :6], second[:, :6]) == causal


def test_a_label_for_every_token_needs_a_recovery():
  with pytest.raises(ValueError, match="recover='none'.*label for every token"):
    _encoder("start=1,recover=none", per_token=True)
  encoder = _encoder(per_token=True)
  with pytest.raises(ValueError, match="recover='none'"):
    encoder.with_funnel("start=1,recover=none")


def test_another_funnel_keeps_the_head_and_the_direction():
  encoder = _encoder(causal=True)
  other = encoder.with_funnel("start=1,stride=2")
  assert other.causal and other.model.stages[0].stride == 2
  assert other.head is encoder.head and not encoder.model.stages
  inputs = _tokens(), np.ones((2, 12), np.int32)
  encoders = encoder, other, other.with_funnel("off")
  first, second, third = (jax.jit(e)(*inputs) for e in encoders)
  assert not np.allclose(first, second)
  np.testing.assert_array_equal(first, third)
