"""Reducers that choose slots, against their papers' formulas in numpy.

Groups are in test_funnel.py and test_invariants.py; how reducers from outside
are taken, and context drop, in test_reducers.py.
"""

import dataclasses

from dense_attention import dense_attention, dense_forward
from flax import nnx
from funnel_grid import CONFIG, make_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import flops
from gemma_funnel.config import check_reducers, resolve_funnel
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.layers import LAST_QUERIES
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import Boundary, Scored
from gemma_funnel.stack import run_layers
from gemma_funnel.stream import make_stream

LAYERS = CONFIG.num_layers
# Of noise, at the stage's start; the middle of what is found there.
THRESHOLD = 0.3


def _tokens(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 97, shape).astype(np.int32)


def _model(funnel, family="gemma2") -> Transformer:
  return make_model(resolve_funnel(funnel, LAYERS), family)


def _kept(model, tokens, segments=None, *, causal=True):
  """Which slots the first stage keeps, bool [B, T], found in the model."""
  seen = []
  reducer = model.funnel[0].reducer
  reduce = type(reducer).reduce

  def spy(self, stream, aux, causal):
    short, gather_index_BT = reduce(self, stream, aux, causal)
    seen.append((short, gather_index_BT))
    return short, gather_index_BT

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(reducer), "reduce", spy)
    stream = make_stream(model.embed(tokens), segments)
    model.trunk(stream, causal=causal)
  ((short, gather_index_BT),) = seen
  kept = np.zeros(tokens.shape, bool)
  position = np.asarray(short.position_BT)
  first = np.argmax(np.ones_like(tokens) if segments is None else segments, 1)
  for row in range(len(tokens)):
    real = np.asarray(short.segment_BT)[row] != 0
    kept[row, position[row][real] + first[row]] = True
  return kept, np.asarray(gather_index_BT)


# --- Layers, and what they attend to --------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "funnel,order,start,keys",
  [
    ("layers=0,2-4", [0, 2, 3, 4], LAYERS, "own"),
    ("layers=0,1,1,4,3,2", [0, 1, 1, 4, 3, 2], LAYERS, "own"),
    ("start=2,reduce=all,keys=none", [0, 1, 2, 3, 4], 2, "none"),
    ("start=2,reduce=all,keys=before", [0, 1, 2, 3, 4], 2, "before"),
    ("start=1,reduce=all,keys=before,layers=3,1,1", [0, 3, 1, 1], 1, "before"),
  ],
)
def test_plans_of_layers_are_the_same_layers_by_hand(
  family, causal, funnel, order, start, keys
):
  """Order, repeats, no attention, keys of an earlier state (SwiftKV)."""
  model = _model(funnel, family)
  tokens = _tokens(2, 23)
  got = model.encode(tokens, causal=causal)
  want = dense_forward(
    make_model((), family), tokens, order, start, keys, causal
  )
  np.testing.assert_allclose(got, want, atol=2e-5)
  plain = make_model((), family).encode(tokens, causal=causal)
  assert np.abs(plain - want).max() > 1e-2


@pytest.mark.parametrize("last", [1, 5])
@pytest.mark.parametrize("start", [0, 2])
def test_tail_is_all_of_the_same_keys_at_its_slots(start, last):
  """Of rows padded on either side."""
  tokens = _tokens(3, 20)
  segments = np.ones_like(tokens)
  segments[1, 15:], segments[2, :7] = 0, 0
  model = _model(f"start={start},reduce=tail,last={last}")
  whole = _model(f"start={start},reduce=all,keys=before")
  got = np.asarray(model.encode(tokens, segments, causal=True))
  want = np.asarray(whole.encode(tokens, segments, causal=True))
  ends = [20, 15, 20]
  for row, end in enumerate(ends):
    np.testing.assert_allclose(
      got[row, end - last : end], want[row, end - last : end], atol=1e-5
    )
  assert np.abs(got - want)[0, 20 - last - 1].max() > 1e-3


# --- Selections by attention ----------------------------------------------


def _best(score_T, count, always):
  """The first slot, the last `always`, and the best of the others."""
  size = len(score_T)
  fixed = {0, *range(size - always, size)}
  others = sorted(set(range(size)) - fixed, key=lambda t: (-score_T[t], t))
  count = min(size, max(count, always + 1))
  return sorted(fixed | set(others[: count - len(fixed)]))


def _last_queries(weight_NTT):
  """FastKV's score: of the last 8 queries, pooled over 7 neighbours."""
  score_T = weight_NTT[:, -LAST_QUERIES:].sum(axis=(0, 1))
  padded = np.pad(score_T, 3)
  return np.mean([padded[i : i + len(score_T)] for i in range(7)], axis=0)


def _received(weight_NTT):
  """PoWER-BERT's significance, of an encoder."""
  return weight_NTT.sum(axis=(0, 1))


@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral"])
@pytest.mark.parametrize("keep", [0.35, 0.6])
@pytest.mark.parametrize(
  "kind,score,causal,layer",
  [
    ("last_queries", _last_queries, True, {"gemma2": 1}),
    ("received", _received, False, {"gemma2": 1}),
  ],
)
def test_what_is_kept_is_what_the_paper_says(
  kind, score, causal, layer, keep, family
):
  """Scores are of the last layer before that sees all, here the second."""
  model = _model(f"start=3,reduce={kind},keep={keep}", family)
  lengths = [31, 22, 9]
  always = LAST_QUERIES if kind == "last_queries" else 1
  left = np.zeros((3, 31), np.int32)
  right = np.zeros((3, 31), np.int32)
  tokens = {"left": _tokens(3, 31), "right": _tokens(3, 31)}
  for row, n in enumerate(lengths):
    left[row, 31 - n :] = right[row, :n] = 1
    tokens["right"][row, :n] = tokens["left"][row, 31 - n :]
  kept = {}
  for side, segments in (("left", left), ("right", right)):
    found, _ = _kept(model, tokens[side], segments, causal=causal)
    kept[side] = [np.flatnonzero(r) for r in found]
  for row, n in enumerate(lengths):
    alone = tokens["left"][row : row + 1, 31 - n :]
    weights = dense_attention(
      make_model((), family), alone, layer.get(family, 2), causal
    )
    want = _best(score(weights[0]), int(np.ceil(keep * n - 1e-9)), always)
    np.testing.assert_array_equal(kept["left"][row] - (31 - n), want)
    np.testing.assert_array_equal(kept["right"][row], want)


@pytest.mark.parametrize("kind", ["last_queries", "received"])
def test_what_is_kept_is_a_text_of_its_own(kind):
  """The others bypass; decoding goes on with the same choice."""
  model = _model(f"start=2,stop=4,reduce={kind},keep=0.5")
  tokens = _tokens(1, 24)
  (kept,), _ = _kept(model, tokens)
  assert kept.sum() == 12
  # Dropping the others as a span is the same, and says what decoding does.
  spanned = make_model(resolve_funnel("start=2,stop=4,reduce=context", LAYERS))
  got = model(tokens)
  want = spanned(tokens, context_BT=~kept[None])
  np.testing.assert_allclose(got, want, atol=2e-5)
  decoder = Decoder(model, 64)
  (result,) = decoder.generate(tokens.tolist(), max_new_tokens=24)
  whole = np.asarray([tokens[0].tolist() + result.tokens], np.int32)
  span = np.append(~kept, np.zeros(24, bool))[None]
  logits = spanned(whole, context_BT=span)
  np.testing.assert_array_equal(
    result.tokens, np.argmax(logits[0], axis=1)[23:-1]
  )
  for slots in (
    decoder.prefill(tokens.tolist(), max_new_tokens=24)
    .caches[-2]
    .slots.values()
  ):
    real = np.asarray(slots.segment_BT)[0] != 0
    held = np.asarray(slots.position_BT)[0][real]
    assert set(held) <= set(np.flatnonzero(kept))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["last_queries", "received"])
def test_keeping_all_is_the_plain_model(kind, causal):
  tokens = _tokens(2, 19)
  got = _model(f"start=2,reduce={kind},keep=1").encode(tokens, causal=causal)
  want = make_model().encode(tokens, causal=causal)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_cascade_never_grows():
  """Stages within each other: each keeps a part of what is left."""
  funnel = "start=1,reduce=received,keep=0.6+start=3,reduce=received,keep=0.5"
  model = _model(funnel)
  seen = []
  score = Scored.reduce

  def spy(self, stream, aux, causal):
    short, gather_index_BT = score(self, stream, aux, causal)
    seen.append(np.asarray(short.position_BT[0]))
    return short, gather_index_BT

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Scored, "reduce", spy)
    model.trunk(make_stream(model.embed(_tokens(1, 30))), causal=False)
  first, second = seen
  assert len(first) == 18 and len(second) == 9
  assert {0, 29} <= set(second) <= set(first)
  plain = flops.forward(CONFIG, None, 1, 30, head=False, causal=False)
  assert (
    flops.forward(CONFIG, funnel, 1, 30, head=False, causal=False)
    < (1 + 0.6 * 2 + 0.3 * 2 + 0.3) / LAYERS * plain
  )


# --- Boundaries -----------------------------------------------------------


def _boundaries(states_TD, threshold, stride):
  """H-Net's p of neighbours, with a budget of one in `stride` so far."""
  unit = states_TD / np.linalg.norm(states_TD, axis=1, keepdims=True)
  found = []
  for t in range(len(unit)):
    p = 1.0 if t == 0 else (1 - unit[t - 1] @ unit[t]) / 2
    if p >= threshold and len(found) < t // stride + 1:
      found.append(t)
  return found


BOUNDARY = f"start=2,stop=4,reduce=boundary,stride=2,threshold={THRESHOLD}"


def _entering(tokens, segments=None):
  """What enters layer 2."""
  model = make_model()
  stream = make_stream(model.embed(tokens), segments)
  stream, _ = run_layers(model.layers, CONFIG, 0, 2, stream, causal=True)
  return stream


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_boundaries_are_those_of_the_formula(stride):
  """Alone, padded and packed; each reads the newest."""
  funnel = BOUNDARY.replace("stride=2", f"stride={stride}")
  model = _model(funnel)
  sizes = [12, 7, 11]
  parts = [_tokens(n, seed=n) for n in sizes]
  want = [
    _boundaries(
      np.asarray(_entering(part[None]).hidden_BTD[0]), THRESHOLD, stride
    )
    for part in parts
  ]
  assert any(0 < len(w) < n for w, n in zip(want, sizes, strict=True))
  row, segments, starts, at = _tokens(42), np.zeros(42, np.int32), [], 0
  for number, part in enumerate(parts, 1):
    starts.append(at)
    row[at : at + len(part)] = part
    segments[at : at + len(part)] = number
    at += -(-len(part) // stride) * stride
  tokens, segments = row[None], segments[None]
  stream = _entering(tokens, jnp.asarray(segments))
  short, gather = model.funnel[0].reducer.reduce(stream, {}, True)
  number = 0
  for start, size, anchors in zip(starts, sizes, want, strict=True):
    for n, anchor in enumerate(anchors):
      assert int(short.position_BT[0, number + n]) == anchor
    ends = [*anchors[1:], size]
    reads = np.repeat(
      np.arange(number, number + len(anchors)), np.diff([*anchors, ends[-1]])
    )
    np.testing.assert_array_equal(gather[0, start : start + size], reads)
    number += len(anchors)
  assert int(np.sum(np.asarray(short.segment_BT) != 0)) == number
  packed = model.encode(tokens, segments, causal=True)[0]
  for start, part in zip(starts, parts, strict=True):
    alone = model.encode(part[None], causal=True)[0]
    got = packed[start : start + len(part)]
    np.testing.assert_allclose(got, alone, atol=1e-5)


def test_no_threshold_and_every_slot_is_the_plain_model():
  funnel = "start=1,reduce=boundary,stride=1,threshold=0"
  tokens = _tokens(2, 21)
  got = _model(funnel).encode(tokens, causal=True)
  want = make_model().encode(tokens, causal=True)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoding_goes_on_from_a_tail():
  """What comes after it sees what it would with all."""
  model = _model("start=2,reduce=tail,last=3")
  prompts = [_tokens(n, seed=n).tolist() for n in (4, 17, 9)]
  results = Decoder(model, 64).generate(prompts, max_new_tokens=24)
  whole_model = _model("start=2,reduce=all,keys=before")
  for prompt, result in zip(prompts, results, strict=True):
    whole = np.asarray([prompt + result.tokens], np.int32)
    want = np.argmax(whole_model(whole)[0], axis=1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(result.tokens, want)


# --- No token reads its own future ----------------------------------------


def _leak(model, size=25):
  """The largest change of a state by a change of later tokens."""
  tokens_T = _tokens(size)
  rows = [
    np.append(tokens_T[:s], _tokens(size - s, seed=s)) for s in range(size)
  ]
  hidden = np.asarray(model.encode(np.stack([*rows, tokens_T]), causal=True))
  change_ST = np.abs(hidden[:-1] - hidden[-1:]).max(axis=-1)
  return change_ST[np.tril(np.ones((size, size), bool), -1)].max()


CAUSAL = [
  BOUNDARY,
  BOUNDARY.replace("stop=4,", "keys=before,"),
  "start=1,reduce=all,keys=before",
  "layers=0,3,3,1",
]


@pytest.mark.parametrize("funnel", CAUSAL)
def test_no_future_by_perturbation_and_by_jacobian(funnel):
  model = _model(funnel)
  assert _leak(model) < 1e-5
  embedded_TD = model.embed(_tokens(1, 12))[0]

  def states(embedded_TD):
    stream = make_stream(embedded_TD[None])
    return model.trunk(stream, causal=True).hidden_BTD[0].sum(axis=-1)

  jacobian_TT = np.abs(jax.jacobian(states)(embedded_TD)).max(axis=-1)
  assert np.all(jacobian_TT[np.triu_indices(12, 1)] == 0)
  assert np.all(np.diag(jacobian_TT) > 0)


@pytest.mark.parametrize("fault", ["best of all", "mean of the row", "top k"])
def test_planted_leaks_are_seen(fault, monkeypatch):
  """Capacity filled by score, a threshold from the batch, a global top-k."""
  if fault == "top k":
    model = _model("start=2,reduce=last_queries,keep=0.4")
    assert _leak(model) > 1e-3
    with pytest.raises(ValueError, match="'last_queries'.*trains=False"):
      check_reducers(model.stages, "trains", "a loss at every token")
    return

  def by_score(self, before_BTD, hidden_BTD):
    p_BT = self.probability(before_BTD, hidden_BTD)
    if fault == "mean of the row":
      return p_BT >= p_BT.mean()
    least_B1 = jnp.sort(p_BT, axis=1)[:, p_BT.shape[1] // 2, None]
    return p_BT >= least_B1

  monkeypatch.setattr(Boundary, "_wants", by_score)
  model = nnx.merge(*nnx.split(_model(BOUNDARY)))
  model.config = dataclasses.replace(CONFIG, max_length=255)  # Another program.
  assert _leak(model) > 1e-3


# --- What is said before it is done ---------------------------------------


@pytest.mark.parametrize(
  "funnel,message",
  [
    ("start=1,reduce=tail,keys=own", "keys='own' cannot be with .*'tail'"),
    ("start=1,reduce=tail,last=0", "funnel.last=0: expected an integer >= 1"),
    ("start=1,reduce=mean,keep=0.3", "funnel.keep=0.3 has no effect"),
    ("start=1,reduce=received,keep=0", "funnel.keep=0.0: expected thousandths"),
    ("start=1,reduce=received,keep=0.12345", "expected thousandths"),
    ("start=1,reduce=received,keep=1.5", "funnel.keep=1.5: expected a number"),
    ("start=1,reduce=received,keep=nan", "funnel.keep=nan: expected a number"),
    ("start=1,reduce=boundary,threshold=2", "funnel.threshold=2.0: expected"),
    ("start=0,reduce=received", r"needs \['attention_received'\]"),
    ("start=1,stop=3+start=3,reduce=received", "and not another's stop"),
    ("layers=0-9", "funnel.layers=.*: the model has 5 layers"),
    ("layers=3-1", "funnel.layers='3-1': expected such as"),
    ("layers=", "is not key=value"),
    ("layers=0-4+start=1", "funnel.layers=0-4 of the stage"),
    ("start=1,layers=x", "funnel.layers='x': expected such as"),
  ],
)
def test_what_cannot_be(funnel, message):
  with pytest.raises(ValueError, match=message):
    resolve_funnel(funnel, LAYERS)


def test_what_a_selection_cannot_do():
  packed = np.array([[1, 1, 2, 2]])
  for kind in ("last_queries", "received", "tail"):
    model = _model(f"start=1,reduce={kind}")
    with pytest.raises(ValueError, match=f"'{kind}'.*packs=False"):
      model(_tokens(1, 4), packed)
  with pytest.raises(ValueError, match="'boundary'.*bidirectional=False"):
    _model(BOUNDARY).encode(_tokens(1, 4), causal=False)
  with pytest.raises(ValueError, match="decoding.*'boundary' at layer 1"):
    Decoder(_model("start=1,reduce=boundary+start=2,stop=3"), 16)


# --- Costs ----------------------------------------------------------------


def test_flops_are_of_the_slots_that_go_on():
  config = dataclasses.replace(CONFIG, attention_pattern=("global",))
  N, H, D, F = config.num_heads, config.head_dim, 32, config.mlp_dim
  keys = 2 * 2 * D * config.num_kv_heads * H
  rest = 2 * (2 * D * N * H + 3 * D * F)
  pairs = lambda q, s: 4 * N * H * (q * (2 * s - q + 1) // 2)
  layer = lambda q, s: q * rest + s * keys + pairs(q, s)
  cost = lambda funnel: flops.forward(config, funnel, 1, 40, head=False)
  assert cost("layers=0,1,1") == 3 * layer(40, 40)
  assert cost("start=3,reduce=all,keys=none") == 3 * layer(40, 40) + 2 * (
    40 * 6 * D * F
  )
  tail = "start=1,reduce=tail,last=2"
  assert cost(tail) == layer(40, 40) + 4 * layer(2, 40)
  kept = "start=1,reduce=last_queries,keep=0.25"
  asked = pairs(8, 40) // 2
  assert cost(kept) == layer(40, 40) + asked + 4 * layer(10, 10)
  assert flops.decode_flops(config, kept, 40, head=False) == pytest.approx(
    5 * (rest + keys) + 4 * N * H * (40 + 4 * 10)
  )


def test_gradients_of_what_trains():
  """Of the whole model, through boundaries and keys from before."""
  for funnel in (BOUNDARY, "start=1,reduce=all,keys=before"):
    model = _model(funnel)
    graphdef, params = nnx.split(model)
    tokens = _tokens(2, 16)

    def loss(params):
      model = nnx.merge(graphdef, params)  # noqa: B023
      return jnp.mean(model(tokens) ** 2)  # noqa: B023

    grads = jax.grad(loss)(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    layers = grads["layers"]["attn"]["value"][...]
    assert all(np.abs(layer).max() > 0 for layer in layers)
