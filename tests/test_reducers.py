"""Reducers from inside and outside of the package, and what they cannot do.

Groups against their definition are in test_funnel.py, and what holds for whole
models in test_invariants.py.
"""

import dataclasses

from flax import nnx
from funnel_grid import CONFIG, LENGTH, make_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import flops
from gemma_funnel.attention.masks import AttentionSpec, visible
from gemma_funnel.config import FunnelConfig, check_reducers, resolve_funnel
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.layers import rope_angles
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import Pool, Reducer, select
from gemma_funnel.registry import REDUCERS, Registry
from gemma_funnel.stack import run_layers
from gemma_funnel.stream import make_stream, rank

LAYERS = CONFIG.num_layers


def _tokens(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 97, shape).astype(np.int32)


def _model(funnel, **changes) -> Transformer:
  """That of the grid; with another configuration, the same parameters."""
  model = make_model(resolve_funnel(funnel, LAYERS))
  if not changes:
    return model
  config = dataclasses.replace(CONFIG, **changes)
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return nnx.merge(graphdef, nnx.state(model))


# --- Reducers from outside ------------------------------------------------


class Loudest(Reducer):
  """Keeps the slots of largest norm: a choice that knows the whole row."""

  options = ("stride",)
  trains = False
  packs = False

  def length(self, length, causal, context_length=0):
    return -(-length // self.stage.stride)

  def reduce(self, stream, aux, causal):
    norm_BT = jnp.linalg.norm(stream.hidden_BTD, axis=2)
    size = self.length(norm_BT.shape[1], causal)
    return select(stream, self.choose(norm_BT, size))

  def choose(self, norm_BT, size):
    return jnp.sort(jnp.argsort(-norm_BT, axis=1)[:, :size], axis=1)


class FirstLoud(Loudest):
  """Keeps the first slots that are loud enough: each decides for itself."""

  trains = True

  def choose(self, norm_BT, size):
    length = norm_BT.shape[1]
    slot_1T = jnp.arange(length)[None]
    loud_BT = jnp.where(norm_BT > 5.3, slot_1T, length)
    return jnp.sort(loud_BT, axis=1)[:, :size]


class LoudestOfGroup(Pool):
  """Selects the loudest slot of each group."""

  def weigh(self, x_BRkD, counts_BRk):
    norm_BRk = jnp.where(counts_BRk, jnp.linalg.norm(x_BRkD, axis=3), -1)
    loud_BR1 = jnp.argmax(norm_BRk, axis=2, keepdims=True)
    index_k = jnp.arange(counts_BRk.shape[2])[None, None]
    return (counts_BRk & (index_k == loud_BR1)).astype(jnp.float32)


class MostAttended(Loudest):
  """Keeps the slots that the layer before attends to most."""

  needs = ("attention_received",)
  trains = True

  def reduce(self, stream, aux, causal):
    received_BT = aux["attention_received"]
    size = self.length(received_BT.shape[1], causal)
    return select(stream, self.choose(received_BT, size))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  kinds = dict(
    loudest=Loudest,
    first_loud=FirstLoud,
    loudest_of_group=LoudestOfGroup,
    most_attended=MostAttended,
  )
  for name, kind in kinds.items():
    monkeypatch.setitem(REDUCERS, name, kind)


@pytest.mark.parametrize("kind", ["loudest", "first_loud"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_stage_that_chooses_needs_no_other_model(kind, causal):
  """Tokens it keeps are a text of their own; the others stay as they were."""
  tokens = _tokens(2, 13)
  model = _model(f"start=0,stride=3,recover=repeat,reduce={kind}")
  got = model.encode(tokens, causal=causal)
  stream = make_stream(model.embed(tokens))
  _, gather_index_BT = model.funnel[0].reducer.reduce(stream, {}, causal)
  kept_BR = np.stack(
    [np.flatnonzero(r >= 0) for r in np.asarray(gather_index_BT)]
  )
  assert kept_BR.shape == (2, 5) and not np.array_equal(*kept_BR)
  at_kept = lambda x: np.take_along_axis(x, kept_BR, axis=1)
  want = np.array(model.final_norm(model.embed(tokens)))
  alone = make_model().encode(at_kept(tokens), None, kept_BR, causal=causal)
  np.put_along_axis(want, kept_BR[..., None], np.asarray(alone), axis=1)
  np.testing.assert_allclose(got, want, atol=1e-5)


def _future_leak(funnel) -> float:
  """The largest change of a logit by a change of later tokens."""
  tokens_T = _tokens(25)
  changed = [
    np.append(tokens_T[:s], _tokens(25 - s, seed=s)) for s in range(25)
  ]
  hidden = np.asarray(
    _model(funnel).encode(np.stack([*changed, tokens_T]), causal=True)
  )
  change_ST = np.abs(hidden[:-1] - hidden[-1:]).max(axis=-1)
  return change_ST[np.tril(np.ones((25, 25), bool), -1)].max()


@pytest.mark.parametrize(
  "kind,leaks",
  [("first_loud", False), ("loudest_of_group", False), ("loudest", True)],
)
def test_perturbation_sees_what_a_choice_knows(kind, leaks):
  """No gradient tells that a choice looked at the future."""
  leak = _future_leak(f"start=1,stop=4,stride=3,reduce={kind}")
  assert (leak > 1e-3) == leaks


@pytest.mark.parametrize("kind", ["first_loud", "loudest_of_group"])
def test_a_selector_from_outside_trains(kind):
  """Gradients of all layers, and a loss that falls along them."""
  model = _model(f"start=1,stop=4,stride=2,reduce={kind}", scan_layers=True)
  graphdef, params = nnx.split(model)
  tokens = _tokens(2, 16)

  @jax.jit
  def loss(params):
    logits = nnx.merge(graphdef, params)(tokens)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)
    return jnp.mean(jax.nn.logsumexp(logits, axis=2) - picked[..., 0])

  grads = jax.grad(loss)(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(grad)), path
    rows = grad if "layers" in jax.tree_util.keystr(path) else grad[None]
    assert all(np.abs(row).max() > 0 for row in rows), path
  lower = jax.tree.map(lambda x, g: x - 0.02 * g, params, grads)
  assert loss(lower) < loss(params)


def test_a_selector_from_outside_decodes_if_it_says_so():
  model = _model("start=1,stop=4,stride=3,reduce=loudest_of_group")
  prompts = [_tokens(n, seed=n).tolist() for n in (4, 9, 7)]
  results = Decoder(model, 64).generate(prompts, max_new_tokens=24)
  for prompt, result in zip(prompts, results, strict=True):
    whole = np.asarray([prompt + result.tokens], np.int32)
    want = np.argmax(model(whole)[0], axis=1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(result.tokens, want)


@pytest.mark.parametrize(
  "kind", ["loudest", "loudest_of_group", "first_loud", "most_attended"]
)
def test_a_selector_from_outside_is_counted_by_its_own_length(kind):
  """Matrix products by slots; pairs by the slots that are kept."""
  config = dataclasses.replace(CONFIG, attention_pattern=("global",))
  plain = flops.forward(config, None, 1, 30, head=False)
  funnel = f"start=2,stride=3,reduce={kind}"
  got = flops.forward(config, funnel, 1, 30, head=False)
  N, H = config.num_heads, config.head_dim
  layer_slot = 2 * (flops.parameters(config).layers // LAYERS - 4 * 32)
  pairs = lambda n: 4 * N * H * n * (n + 1) // 2
  layer = lambda n: n * layer_slot + pairs(n)
  assert plain == LAYERS * layer(30)
  want = 2 * layer(30) + 3 * layer(10)
  if kind == "most_attended":
    want += pairs(30) // 2  # The logits of the layer before, once more.
  if kind == "first_loud":  # Fewer may be kept than there is room for.
    assert 2 * layer(30) + 3 * 10 * layer_slot <= got <= want
  else:
    assert got == want


@pytest.mark.parametrize(
  "can,kind,call",
  [
    ("decodes", "loudest", lambda m: Decoder(m, 16)),
    (
      "decodes",
      "first_loud",
      lambda m: flops.decode_flops(CONFIG, m.stages, 9),
    ),
    ("packs", "loudest", lambda m: m(_tokens(1, 4), np.array([[1, 1, 2, 2]]))),
    (
      "trains",
      "context",
      lambda m: check_reducers(m.stages, "trains", "next-token training"),
    ),
  ],
)
def test_a_reducer_that_cannot_says_so_by_name(can, kind, call):
  with pytest.raises(ValueError, match=f"reduce='{kind}'.*{can}=False"):
    call(
      _model(
        f"start=1,stride=2,reduce={kind}"
        if kind != "context"
        else "start=1,reduce=context"
      )
    )


def test_a_reducer_of_causal_streams_alone(monkeypatch):
  monkeypatch.setattr(FirstLoud, "bidirectional", False)
  model = _model("start=1,stride=2,reduce=first_loud")
  model.encode(_tokens(1, 4), causal=True)
  with pytest.raises(ValueError, match="'first_loud'.*bidirectional=False"):
    model.encode(_tokens(1, 4), causal=False)


def test_options_that_a_reducer_does_not_have():
  with pytest.raises(ValueError, match="funnel.keep_first=True has no effect"):
    FunnelConfig(0, reduce="loudest", keep_first=True)
  with pytest.raises(ValueError, match="funnel.stride=3 has no effect"):
    FunnelConfig(0, reduce="context", stride=3)
  with pytest.raises(ValueError, match="funnel.reduce='quietest'.*'loudest'"):
    FunnelConfig(0, reduce="quietest")
  with pytest.raises(ValueError, match="'attention_received'.*start >= 1"):
    resolve_funnel("start=0,reduce=most_attended", LAYERS)


def test_a_name_is_registered_once():
  registry = Registry("funnel.reduce", "gemma_funnel.reducers")
  registry.register("loudest")(Loudest)
  with pytest.raises(ValueError, match="funnel.reduce='loudest'"):
    registry.register("loudest")(FirstLoud)
  assert registry.describe().startswith("loudest: Keeps the slots")


# --- What the layer before is asked for -----------------------------------


def _received(model, tokens, segments, layer, causal):
  """Column sums of the attention of one layer, [B, S], by dense softmax."""
  config = model.config
  stream = make_stream(model.embed(tokens), segments)
  graphdef, params = nnx.split(model.layers)
  block = lambda n: nnx.merge(graphdef, jax.tree.map(lambda p: p[n], params))
  if layer:
    stream, _ = run_layers(
      model.layers, config, 0, layer, stream, causal=causal
    )
  spec = config.layers[layer]
  rope = rope_angles(stream.position_BT, config, spec)
  x = block(layer).pre_attn_norm(stream.hidden_BTD)
  q = np.asarray(block(layer).attn.queries(x, rope))
  k = np.asarray(block(layer).attn.keys_values(x, rope)[0])
  group = config.num_heads // config.num_kv_heads
  logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, group, axis=2))
  if config.attn_softcap:
    logits = config.attn_softcap * np.tanh(logits / config.attn_softcap)
  see = visible(stream, stream, AttentionSpec(causal, spec.window))
  weights = np.exp(logits) * np.asarray(see)[:, None]
  total = weights.sum(axis=-1, keepdims=True)
  return (weights / np.where(total > 0, total, 1)).sum(axis=(1, 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("scan", [True, False])
def test_aux_is_the_attention_of_the_layer_before(
  causal, start, scan, monkeypatch
):
  """Local or global; packed and padded; inference, and a gradient's forward."""
  seen = []

  def reduce(self, stream, aux, causal):
    jax.debug.callback(
      lambda x: seen.append(np.asarray(x)), aux["attention_received"]
    )
    received_BT = aux["attention_received"]
    return select(stream, self.choose(received_BT, 12))

  monkeypatch.setattr(MostAttended, "reduce", reduce)
  monkeypatch.setattr(MostAttended, "packs", True)
  model = _model(
    f"start={start},stride=3,reduce=most_attended", scan_layers=scan
  )
  tokens = _tokens(2, LENGTH)
  segments = np.zeros_like(tokens)
  segments[0, 2:20], segments[0, 20:35], segments[1] = 1, 2, 1
  want = _received(model, tokens, segments, start - 1, causal)
  graphdef, params = nnx.split(model)

  def loss(params):
    model = nnx.merge(graphdef, params)
    stream = make_stream(model.embed(tokens), jnp.asarray(segments))
    return jnp.sum(model.trunk(stream, causal=causal).hidden_BTD ** 2)

  jax.block_until_ready(jax.jit(loss)(params))
  jax.block_until_ready(jax.jit(jax.grad(loss))(params))
  jax.effects_barrier()
  assert len(seen) >= 2
  for got in seen:
    np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.all(want[segments == 0] == 0) and want.max() > 1


def test_nothing_is_collected_where_nothing_asks(monkeypatch):
  from gemma_funnel import layers

  def fail(*args, **kwargs):
    raise AssertionError

  monkeypatch.setattr(layers, "attention_received", fail)
  model = _model("start=1,stride=4,recover=add,reduce=last", scan_layers=True)
  model.encode(_tokens(1, 11))
  with pytest.raises(AssertionError):
    _model("start=1,stride=3,reduce=most_attended").encode(_tokens(1, 11))


# --- delta ----------------------------------------------------------------


@pytest.mark.parametrize("recover", ["delta", "scaled_delta"])
@pytest.mark.parametrize("span", ["start=0", "start=1,stop=4"])
def test_delta_at_stride_1_is_the_plain_model_with_every_pool(recover, span):
  tokens = _tokens(2, 21)
  plain = make_model()
  want = {causal: plain.encode(tokens, causal=causal) for causal in (0, 1)}
  for name, kind in REDUCERS.items():
    if not issubclass(kind, Pool):
      continue
    funnel = f"{span},stride=1,reduce={name},recover={recover}"
    model = plain.with_funnel(funnel)
    for causal in (0, 1):
      got = model.encode(tokens, causal=bool(causal))
      np.testing.assert_allclose(got, want[causal], atol=1e-5, err_msg=name)
  halved = plain.with_funnel(f"{span},stride=1,recover=average")
  assert np.abs(halved.encode(tokens, causal=True) - want[1]).max() > 1e-2


# --- Context drop ---------------------------------------------------------


def _masked(model, tokens, segments, context, r):
  """Logits of a forward that hides a span's keys from layers >= r.

  Dense, and without streams: an independent statement of what context drop is.
  """
  config = model.config
  graphdef, params = nnx.split(model.layers)
  position = np.asarray(rank(jnp.asarray(segments)))
  x = model.embed(tokens)
  same = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
  order = np.arange(tokens.shape[1])
  see = same & (order[None, :, None] >= order[None, None, :])
  group = config.num_heads // config.num_kv_heads
  for n in range(config.num_layers):
    block = nnx.merge(graphdef, jax.tree.map(lambda p: p[n], params))  # noqa: B023
    spec = config.layers[n]
    rope = rope_angles(jnp.asarray(position), config, spec)
    shown = see & ~context[:, None] if n >= r else see
    if spec.window is not None:
      shown = shown & (position[:, :, None] - position[:, None] < spec.window)

    def attend(q, k, v, shown=shown):
      k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
      logits = jnp.einsum("btnh,bsnh->bnts", q, k)
      logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
      weights = jnp.exp(logits) * shown[:, None]
      total = jnp.sum(weights, axis=-1, keepdims=True)
      weights = weights / jnp.where(total > 0, total, 1)
      return jnp.einsum("bnts,bsnh->btnh", weights, v), {}

    x, _ = block(x, rope, attend)
  return np.asarray(model.logits(model.final_norm(x)))


def _spans(packed: bool):
  """(tokens, segments, context): spans of unequal lengths after BOS."""
  tokens = _tokens(3, 40)
  segments = np.ones_like(tokens)
  context = np.zeros(tokens.shape, bool)
  if packed:
    segments[0, 22:], segments[1, :5], segments[2, 36:] = 2, 0, 0
    context[0, 1:12], context[0, 23:30] = True, True
    context[1, 6:20], context[2, 1:18] = True, True
  else:
    for row, size in enumerate((25, 13, 18)):
      context[row, 1 : 1 + size] = True
  return tokens, segments, context


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("r", [0, 1, LAYERS // 2, LAYERS - 1])
def test_context_drop_is_a_mask_of_the_span_in_layers_from_r_on(r, packed):
  tokens, segments, context = _spans(packed)
  model = _model(f"start={r},reduce=context")
  given = segments if packed else None
  got = np.asarray(model(tokens, given, context_BT=context))
  want = _masked(make_model(), tokens, segments, context, r)
  asked = (segments != 0) & ~context
  np.testing.assert_allclose(got[asked], want[asked], atol=2e-5)
  seen = _masked(make_model(), tokens, segments, context & False, r)
  assert np.abs(seen - want)[asked].max() > 1e-2


def test_what_context_drop_saves_is_static():
  """Layers from r on run on no more slots than the shortest span leaves."""
  tokens, segments, context = _spans(False)
  model = _model("start=2,reduce=context")
  made = []
  reducer = model.funnel[0].reducer
  stream = make_stream(
    model.embed(tokens), None, None, jnp.asarray(context), 13
  )
  short, gather_index_BT = jax.jit(lambda s: reducer.reduce(s, {}, True))(
    stream
  )
  assert short.hidden_BTD.shape[1] == 40 - 13
  for row in range(3):
    made = np.asarray(short.position_BT)[row][
      np.asarray(short.segment_BT)[row] != 0
    ]
    np.testing.assert_array_equal(made, np.flatnonzero(~context[row]))
    np.testing.assert_array_equal(
      np.asarray(gather_index_BT)[row] >= 0, ~context[row]
    )


@pytest.mark.parametrize("r", [0, 2, LAYERS - 1])
def test_context_drop_decodes_as_the_one_pass_forward(r):
  """Greedily, 64 tokens; caches of layers >= r never hold the span."""
  model = _model(f"start={r},reduce=context")
  lengths = {30: 20, 17: 9, 24: 20}
  prompts = [_tokens(n, seed=n).tolist() for n in lengths]
  spans = list(lengths.values())
  decoder = Decoder(model, 128)
  results = decoder.generate(prompts, max_new_tokens=64, context_lengths=spans)
  for prompt, span, result in zip(prompts, spans, results, strict=True):
    whole = np.asarray([prompt + result.tokens], np.int32)
    context = np.zeros(whole.shape, bool)
    context[0, 1 : 1 + span] = True
    logits = model(whole, context_BT=context)
    want = np.argmax(logits[0], axis=1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(result.tokens, want)
  state = decoder.prefill(prompts, max_new_tokens=64, context_lengths=spans)
  deep = state.caches[-1]
  for slots in deep.slots.values():
    for row, span in enumerate(spans):
      held = np.asarray(slots.position_BT)[row][
        np.asarray(slots.segment_BT)[row] != 0
      ]
      assert not np.any((held >= 1) & (held <= span))
  assert max(k.shape[2] for k, _ in deep.keys_values) <= 128 - 9


@pytest.mark.parametrize("r", [1, 3])
def test_context_drop_saves_the_share_of_layers_and_of_the_span(r):
  """(L - r)/L * span/(span + rest), of the layers' matrices."""
  config = dataclasses.replace(
    CONFIG, num_heads=4, embed_dim=1024, mlp_dim=4096
  )
  got = flops.ideal_reduction(
    config, f"start={r},reduce=context", 1, 120, head=False, context_length=90
  )
  assert got == pytest.approx((LAYERS - r) / LAYERS * 90 / 120, rel=0.02)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda m: m(_tokens(1, 8)), "'context' at layer 1: expected a span"),
    (
      lambda m: m(_tokens(1, 8), context_BT=np.zeros((1, 7), bool)),
      r"context_BT has shape \(1, 7\)",
    ),
    (
      lambda m: Decoder(m, 16).generate(
        [[2, 5]], max_new_tokens=2, context_lengths=[2]
      ),
      "context_lengths",
    ),
    (
      lambda m: Decoder(m, 16).generate(
        [[2, 5]], max_new_tokens=2, context_lengths=[0, 0]
      ),
      "context_lengths",
    ),
    (
      lambda m: m.with_funnel("start=0,stride=2+start=2,reduce=context")(
        _tokens(1, 8), context_BT=np.zeros((1, 8), bool)
      ),
      "'context' at layer 2: expected a span",
    ),
  ],
)
def test_spans_that_cannot_be(call, message):
  with pytest.raises(ValueError, match=message):
    call(_model("start=1,reduce=context"))
