"""Reducing and restoring, and the invariants of every funnel."""

import itertools
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import funnel as funnel_lib
from gemma_funnel.config import FunnelConfig, GemmaConfig
from gemma_funnel.model import Gemma

# Odd starts, a stop before the last layer, strides that do not divide T.
STAGES = [(0, None), (1, 4), (2, 3), (3, None)]
GRID = [
  FunnelConfig(start, stop, stride, recover=recover)
  for (start, stop), stride, recover in itertools.product(
    STAGES, (2, 3, 4), ("average", "add", "repeat")
  )
]
# Each stage, stride and recovery at least once, for what takes long.
SOME = GRID[::7]
LENGTH = 13  # The last token ends a group, whatever the stride.
IDS = lambda value: str(value)


def _model(**changes) -> Gemma:
  """A tiny model with nothing neutral; unrolled, since that compiles fast."""
  config = GemmaConfig.preset(
    "tiny", num_layers=5, window=6, scan_layers=False, **changes
  )
  model = Gemma(config, rngs=nnx.Rngs(0))
  key = jax.random.key(1)

  def stir(path, x):
    """Norm scales away from 0, weights large enough for peaked attention."""
    name = jax.tree_util.keystr(path)
    noise = jax.random.normal(
      jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape
    )
    return x + (0.3 if "scale" in name else 0.0) * noise

  graphdef, params = nnx.split(model)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(stir, params))


@pytest.fixture(scope="module")
def model():
  return _model()


def _tokens(batch=2, length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 97, (batch, length)).astype(np.int32)


def _stream(segment_BT, width=3):
  segment_BT = jnp.asarray(segment_BT)
  hidden_BTD = jax.random.normal(
    jax.random.key(2), (*segment_BT.shape, width), jnp.float32
  )
  return funnel_lib.make_stream(hidden_BTD, segment_BT)


def _groups(segment_T, stride, causal):
  """The groups of a row by the definition: (anchor, member slots)."""
  groups = []
  for t, segment in enumerate(segment_T):
    start = next(
      s for s in range(t + 1) if set(segment_T[s : t + 1]) == {segment}
    )
    if segment == 0 or (t - start) % stride:
      continue
    span = range(t - stride + 1, t + 1) if causal else range(t, t + stride)
    inside = [s for s in span if 0 <= s < len(segment_T)]
    groups.append((t, [s for s in inside if segment_T[s] == segment]))
  return groups


ROWS = {
  2: [[1] * 9, [0, 0, 0, 4, 4, 4, 4, 4, 0], [1, 1, 2, 2, 2, 2, 3, 0, 0]],
  3: [[1] * 9, [0, 4, 4, 4, 4, 4, 0, 0, 0], [1, 1, 0, 2, 2, 2, 2, 0, 0]],
  4: [[1] * 9, [0, 0, 0, 0, 0, 0, 0, 0, 7], [1, 1, 0, 0, 2, 2, 2, 2, 3]],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_reduce_is_the_definition(stride, causal):
  stream = _stream(ROWS[stride])
  short, read_BT = funnel_lib.reduce(
    stream, FunnelConfig(0, stride=stride), causal
  )
  assert short.hidden_BTD.shape[1] == -(-9 // stride)
  assert short.spacing == stride
  for row, segment_T in enumerate(ROWS[stride]):
    groups = _groups(segment_T, stride, causal)
    hidden_TD = np.asarray(stream.hidden_BTD)[row]
    position_T = np.asarray(stream.position_BT)[row]
    for g, (anchor, members) in enumerate(groups):
      np.testing.assert_allclose(
        short.hidden_BTD[row, g], hidden_TD[members].mean(0), atol=1e-6
      )
      last = position_T[anchor] + (0 if causal else stride - 1)
      assert short.position_BT[row, g] == last
      assert short.segment_BT[row, g] == segment_T[anchor]
    np.testing.assert_array_equal(short.segment_BT[row, len(groups) :], 0)
    np.testing.assert_array_equal(short.hidden_BTD[row, len(groups) :], 0)
    anchors = [anchor for anchor, _ in groups]
    for t, segment in enumerate(segment_T):
      if segment:
        newest = max(g for g, anchor in enumerate(anchors) if anchor <= t)
        assert read_BT[row, t] == newest


@pytest.mark.parametrize("recover", ["average", "add", "repeat"])
def test_restore_is_the_definition(recover):
  before, deep = _stream([[1, 1, 1, 1, 1]]), _stream([[1, 1]])
  read_BT = jnp.asarray([[0, 0, 0, 1, 1]])
  got = funnel_lib.restore(
    deep, before, read_BT, FunnelConfig(0, stride=3, recover=recover)
  )
  u = np.asarray(deep.hidden_BTD)[:, [0, 0, 0, 1, 1]]
  h = np.asarray(before.hidden_BTD)
  want = {"average": (u + h) / 2, "add": u + h, "repeat": u}[recover]
  np.testing.assert_allclose(got.hidden_BTD, want, atol=1e-6)
  assert got.position_BT is before.position_BT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start,stop", STAGES)
def test_stride_1_with_repeat_is_the_plain_model(model, start, stop, causal):
  funnel = FunnelConfig(start, stop, 1, recover="repeat")
  tokens = _tokens()
  segment_BT = np.array([[0] * 3 + [1] * 10, [1] * 6 + [2] * 4 + [0] * 3])
  for segments, real in ((None, slice(None)), (segment_BT, segment_BT != 0)):
    got = model.with_funnel(funnel)(tokens, segments, causal=causal)
    want = model(tokens, segments, causal=causal)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_a_funnel_changes_the_output(model, funnel):
  tokens = _tokens()
  difference = model.with_funnel(funnel)(tokens) - model(tokens)
  assert np.abs(difference[:, 1:]).max() > 1e-2


def _future_leaks(model) -> float:
  """The largest change of an output by a change of a later token."""
  tokens = _tokens(batch=1)
  changed = np.repeat(tokens, LENGTH, axis=0)
  for s in range(LENGTH):
    changed[s, s:] = (changed[s, s:] + 40) % 90 + 5
  outputs = model(np.concatenate([changed, tokens]))
  difference_ST = np.abs(outputs[:-1] - outputs[-1:]).max(axis=-1)
  past = np.tril(np.ones((LENGTH, LENGTH), bool), -1)
  # With `repeat` a token does not see itself, but its group does.
  assert np.all(np.where(past, 0, difference_ST).max(axis=1) > 1e-3)
  return difference_ST[past].max()


@pytest.mark.parametrize("funnel", GRID, ids=IDS)
def test_causal_by_perturbation(model, funnel):
  assert _future_leaks(model.with_funnel(funnel)) < 1e-5


def test_perturbation_sees_a_planted_leak(model, monkeypatch):
  """Aligned groups, read back by their own tokens."""
  funnel = FunnelConfig(1, 4, 3)
  reduce = funnel_lib.reduce
  monkeypatch.setattr(
    funnel_lib,
    "reduce",
    lambda stream, funnel, _: reduce(stream, funnel, False),
  )
  jax.clear_caches()
  leak = _future_leaks(model.with_funnel(funnel))
  monkeypatch.undo()
  jax.clear_caches()
  assert leak > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_causal_by_jacobian_and_prefixes(model, funnel):
  model = model.with_funnel(funnel)
  tokens = _tokens(batch=1)
  hidden_BTD = model.embed(tokens)

  def trunk(hidden_BTD):
    stream = funnel_lib.make_stream(hidden_BTD)
    return model.trunk(stream, causal=True).hidden_BTD.sum(axis=(0, 2))

  jacobian = jax.jit(jax.jacrev(trunk))(hidden_BTD)
  influence_TT = np.abs(jacobian).sum(axis=(1, 3))
  future = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  assert np.all(influence_TT[future] == 0)
  assert np.all(np.tril(influence_TT).max(axis=0) > 0)
  full = model(tokens)
  for length in (1, funnel.stride, funnel.stride + 1):
    np.testing.assert_allclose(
      model(tokens[:, :length]), full[:, :length], atol=1e-5
    )


@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_bidirectional_tokens_see_the_future(model, funnel):
  tokens = _tokens()
  changed = tokens.copy()
  changed[:, -1] = (changed[:, -1] + 40) % 90 + 5
  model = model.with_funnel(funnel)
  difference = model.encode(changed) - model.encode(tokens)
  assert np.abs(difference[:, 0]).max() > 1e-4


def _pack(documents, align, length):
  tokens, segments = np.full(length, 96), np.zeros(length, np.int64)
  at = 0
  for number, document in enumerate(documents, 1):
    tokens[at : at + len(document)] = document
    segments[at : at + len(document)] = number
    at += -(-len(document) // align) * align
  return tokens[None], segments[None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_packed_equals_unpacked(model, funnel, causal):
  rng = np.random.default_rng(3)
  documents = [rng.integers(5, 96, n) for n in (7, 1, 4, 5)]
  model = model.with_funnel(funnel)
  tokens, segments = _pack(documents, funnel.stride, 32)
  packed = model(tokens, segments, causal=causal)
  for number, document in enumerate(documents, 1):
    np.testing.assert_allclose(
      packed[0, segments[0] == number],
      model(document[None], causal=causal)[0],
      atol=1e-5,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_padding_on_either_side_changes_nothing(model, funnel, causal):
  """Wherever a row's only segment starts, and whatever the padding holds."""
  document = _tokens(1, 8, seed=4)
  model = model.with_funnel(funnel)
  want = model(document, causal=causal)[0]
  offsets = np.arange(6)
  segments = np.zeros((6, LENGTH), np.int32)
  rows = _tokens(6, LENGTH, seed=5)
  for row in offsets:
    segments[row, row : row + 8] = 1
    rows[row, row : row + 8] = document[0]
  got = model(rows, segments, causal=causal)
  for row in offsets:
    np.testing.assert_allclose(got[row, row : row + 8], want, atol=1e-5)
  assert np.all(np.isfinite(got))


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_padding_alone_give_no_nan(model, causal):
  model = model.with_funnel(FunnelConfig(1, 4, 2))
  segments = np.array([[1] * 6, [0] * 6])
  loss = lambda params: jnp.sum(
    nnx.merge(nnx.graphdef(model), params)(
      _tokens(2, 6), segments, causal=causal
    )
    ** 2
  )
  value, grads = jax.value_and_grad(loss)(nnx.state(model))
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("funnel", SOME, ids=IDS)
def test_gradients_reach_every_parameter(model, funnel, causal):
  model = model.with_funnel(funnel)
  graphdef, params = nnx.split(model)
  tokens = _tokens()

  def loss(params):
    logits = nnx.merge(graphdef, params)(tokens, causal=causal)
    return -jax.nn.log_softmax(logits)[..., 7].mean()

  grads = jax.grad(loss)(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    each = grad if "layers" in name else grad[None]
    for layer, g in enumerate(each):
      assert np.abs(g).max() > 1e-7, (name, layer)


@pytest.mark.parametrize(
  "segments,stride,message",
  [
    ([[1, 2, 1, 0]], 1, "one contiguous run"),
    ([[1, -2, 0, 0]], 1, "positive id"),
    ([[1, 2, 3, 4]], 2, "row 0 needs 4 groups of 2 .* has room for 2"),
  ],
)
def test_segments_that_cannot_be(model, segments, stride, message):
  model = model.with_funnel(FunnelConfig(1, 3, stride))
  with pytest.raises(ValueError, match=message):
    model(_tokens(1, 4), np.array(segments))
