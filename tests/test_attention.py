"""Every kernel against the reference, and what each refuses."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.attention import api, blocked, flash, masks
from gemma_funnel.stream import Stream, make_stream
from gemma_funnel.training import aot

B, K, G, H = 2, 2, 2, 8
_BLOCKS = blocked._blocks


def _stream(length, segments):
  """Rows without segments, packed, or padded on the left and the right."""
  if segments == "none":
    return make_stream(jnp.zeros((B, length, 1)))
  if segments == "packed":
    cuts = np.array([[0.3, 0.8], [0.5, 0.55]]) * length
    slot_T = np.arange(length)
    segment_BT = 1 + (slot_T >= cuts[:, :1]) + (slot_T >= cuts[:, 1:])
  else:
    left = np.arange(length) >= length // 3
    right = np.arange(length) < length // 2
    segment_BT = np.stack([left, right])
  return make_stream(jnp.zeros((B, length, 1)), jnp.asarray(segment_BT, int))


def _groups(size, stride, causal, keep_first):
  """[(first, last), ...] of the groups of a segment of `size` slots."""
  if causal:
    return [(max(0, g - stride + 1), g) for g in range(0, size, stride)]
  starts = list(range(0, size, stride))
  if keep_first:
    starts = [0, *range(1, size, stride)]
  return [(a, b - 1) for a, b in zip(starts, [*starts[1:], size], strict=True)]


def _pooled(base, stride, causal, rule, keep_first=False, room=None):
  """`base` in groups, by the definition; hidden states aside.

  `room`: slots in a row; by default what the fullest row needs.
  """
  position, end, segment = map(
    np.asarray, (base.position_BT, base.end_BT, base.segment_BT)
  )
  rows = []
  for row, ids in enumerate(segment):
    slots = []
    for id_ in sorted(set(ids) - {0}, key=list(ids).index):
      inside = np.flatnonzero(ids == id_)
      for a, b in _groups(len(inside), stride, causal, keep_first):
        p = position[row, inside[a : b + 1]]
        at = {"last": p[-1], "first": p[0], "mean": p.mean()}[rule]
        alone = keep_first and a == 0
        if rule == "last" and base.even and not causal and not alone:
          at = p[0] + (stride - 1) * base.spacing
        slots.append((at, end[row, inside[b]], id_))
    rows.append(slots)
  room = room or max(map(len, rows))
  at, end, segment = np.moveaxis(
    np.array([slots + [(0, 0, 0)] * (room - len(slots)) for slots in rows]),
    2,
    0,
  )
  even = rule == "last" and base.even
  return Stream(
    None,
    at.astype(np.int32 if even else np.float32),
    end.astype(np.int32),
    segment.astype(np.int32),
    base.spacing * stride,
    even,
    base.packed,
  )


def _chosen(base, count):
  """`count` slots of each row, at random, as token selection leaves them."""
  random = np.random.default_rng(count)
  length = base.segment_BT.shape[1]
  keep_BR = np.stack(
    [np.sort(random.permutation(length)[:count]) for _ in range(B)]
  )
  take = lambda x: np.take_along_axis(np.asarray(x), keep_BR, 1)
  return Stream(
    None,
    take(base.position_BT),
    take(base.end_BT),
    take(base.segment_BT),
    1,
    even=False,
    packed=base.packed,
  )


def _moved(stream, by=7):
  """Rows need not begin at position 0."""
  return stream.replace(
    position_BT=stream.position_BT + by, end_BT=stream.end_BT + by
  )


def _qkv(length, keys_length=None, dtype=jnp.float32, width=H):
  keys = jax.random.split(jax.random.key(0), 3)
  keys_length = keys_length or length
  shapes = [(B, length, K * G, width), *[(B, keys_length, K, width)] * 2]
  # Logits well beyond the caps below.
  return [
    3 * jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def _sees(queries, keys, causal, window):
  """Which keys each query may see, [B, T, S]: the definition, in numpy."""
  column = lambda x: np.asarray(x)[:, :, None]
  row = lambda x: np.asarray(x)[:, None]
  see = column(queries.segment_BT) == row(keys.segment_BT)
  see &= column(queries.segment_BT) != 0
  if causal:
    see &= row(keys.end_BT) <= column(queries.end_BT)
  if window is not None:
    distance = column(queries.position_BT) - row(keys.position_BT)
    see &= np.abs(distance) < window
  return see


def _brute_force(q, k, v, queries, keys, causal, window, softcap):
  """The definition, in numpy loops."""
  q, k, v = map(np.asarray, (q, k, v))
  out = np.zeros(q.shape)
  sees = _sees(queries, keys, causal, window)
  for b, t, n in np.ndindex(q.shape[:3]):
    see = sees[b, t]
    if not see.any():
      continue
    logit = k[b, see, n // G].astype(np.float64) @ q[b, t, n]
    if softcap:
      logit = softcap * np.tanh(logit / softcap)
    weight = np.exp(logit - logit.max())
    out[b, t, n] = weight / weight.sum() @ v[b, see, n // G]
  return out


CASES = [
  (segments, causal, window, softcap)
  for segments in ("none", "packed", "padded")
  for causal in (True, False)
  for window in (None, 1, 5)
  for softcap in (None, 4.0, 100.0)
]


@pytest.mark.parametrize("segments,causal,window,softcap", CASES)
def test_reference_is_the_definition(segments, causal, window, softcap):
  q, k, v = _qkv(13)
  stream = _stream(13, segments)
  got = api.attend(
    q,
    k,
    v,
    stream,
    stream,
    causal=causal,
    window=window,
    softcap=softcap,
    kernel="reference",
  )
  want = _brute_force(q, k, v, stream, stream, causal, window, softcap)
  np.testing.assert_allclose(got, want, atol=1e-4)


def _agree(call, queries, keys, causal, window, softcap, width=H, tol=1e-4):
  """Values and gradients of `call` are those of the reference."""
  lengths = [stream.segment_BT.shape[1] for stream in (queries, keys)]
  qkv = _qkv(*lengths, width=width)
  kw = dict(
    causal=causal, window=window, softcap=softcap, softmax_dtype="float32"
  )
  weight = jax.random.normal(jax.random.key(1), qkv[0].shape)

  def value_and_grads(fn):
    loss = lambda *qkv: jnp.sum(weight * fn(*qkv, queries, keys, **kw))
    return fn(*qkv, queries, keys, **kw), jax.grad(loss, (0, 1, 2))(*qkv)

  got, want = map(
    jax.jit(value_and_grads, static_argnums=0),
    (call, blocked.reference_attention),
  )
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=tol, rtol=tol)
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("segments,causal,window,softcap", CASES)
def test_blocked_is_the_reference(
  segments, causal, window, softcap, spacing, monkeypatch
):
  monkeypatch.setattr(blocked, "_BLOCK", 4)

  def strided(fn, *args, **kw):
    *qkv, stream, _ = args
    position_BT = stream.position_BT * spacing + 7
    stream = stream.replace(
      position_BT=position_BT, end_BT=position_BT, spacing=spacing
    )
    return fn(*qkv, stream, stream, **kw)

  qkv, stream = _qkv(21), _stream(21, segments)
  kw = dict(
    causal=causal, window=window, softcap=softcap, softmax_dtype="float32"
  )
  got = strided(blocked.blocked_attention, *qkv, stream, stream, **kw)
  want = strided(blocked.reference_attention, *qkv, stream, stream, **kw)
  np.testing.assert_allclose(got, want, atol=1e-4)
  if spacing == 1 and window != 1 and softcap != 100.0:
    _agree(blocked.blocked_attention, stream, stream, causal, window, softcap)


def _received(q, k, queries, keys, causal, window, softcap):
  """Column sums of a dense softmax in numpy, [B, S]."""
  q, k = (np.asarray(x, np.float64) for x in (q, k))
  logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, G, axis=2))
  if softcap:
    logits = softcap * np.tanh(logits / softcap)
  sees = _sees(queries, keys, causal, window)[:, None]
  weight = np.exp(logits - logits.max(-1, keepdims=True)) * sees
  total = weight.sum(-1, keepdims=True)
  return (weight / np.where(total > 0, total, 1)).sum((1, 2))


@pytest.mark.parametrize("segments,causal,window,softcap", CASES)
def test_attention_received_is_the_column_sums(
  segments, causal, window, softcap, monkeypatch
):
  monkeypatch.setattr(blocked, "_BLOCK", 4)
  q, k, _ = _qkv(21)
  stream = _moved(_stream(21, segments))
  rule = dict(causal=causal, window=window, softcap=softcap)
  got = blocked.attention_received(q, k, stream, stream, **rule)
  assert (got.dtype, got.shape) == (jnp.float32, (B, 21))
  want = _received(q, k, stream, stream, **rule)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.all(got[stream.segment_BT == 0] == 0)
  real = jnp.sum(stream.segment_BT != 0, axis=1)
  np.testing.assert_allclose(got.sum(1), K * G * real, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("who", ["pooled", "short", "same"])
def test_attention_received_of_pooled_streams(who, causal, monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK", 8)
  rule = dict(causal=causal, window=5, softcap=4.0)
  for segments, at in itertools.product(
    ("none", "packed", "padded"), ("last", "mean")
  ):
    queries, keys = _streams(who, 3, causal, at, segments)
    q, k, _ = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])
    got = blocked.attention_received(q, k, queries, keys, **rule)
    want = _received(q, k, queries, keys, **rule)
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"{segments} {at}")


@pytest.mark.parametrize(
  "dtype,softmax_dtype", [("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_attention_received_in_low_precision(dtype, softmax_dtype):
  q, k, _ = _qkv(32, dtype=dtype)
  stream = _stream(32, "packed")
  rule = dict(causal=True, window=9, softcap=4.0)
  got = blocked.attention_received(
    q, k, stream, stream, **rule, softmax_dtype=softmax_dtype
  )
  assert got.dtype == jnp.float32
  want = _received(q, k, stream, stream, **rule)
  np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05)


def test_attention_received_has_no_gradient():
  q, k, _ = _qkv(9)
  stream = _stream(9, "none")
  loss = lambda q, k: jnp.sum(
    blocked.attention_received(
      q, k, stream, stream, causal=True, window=None, softcap=4.0
    )
    ** 2
  )
  assert all(np.all(g == 0) for g in jax.grad(loss, (0, 1))(q, k))


@pytest.mark.parametrize("sequence,tensor", [(4, 1), (2, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("who", ["base", "short", "same"])
def test_attention_received_on_a_mesh(who, sequence, tensor, monkeypatch):
  """Queries split over `sequence`, heads over `tensor`, rows over `data`."""
  monkeypatch.setattr(blocked, "_BLOCK", 4)
  base = _stream(24, "padded")
  pooled = _pooled(base, 3, True, "mean", room=8)
  queries, keys = {
    "base": (base, base),
    "short": (base, pooled),
    "same": (pooled, pooled),
  }[who]
  q, k, _ = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])
  rule = dict(causal=True, window=5, softcap=4.0)
  mesh = jax.make_mesh(
    (8 // sequence // tensor, sequence, tensor),
    ("data", "sequence", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  with jax.set_mesh(mesh):
    got = jax.jit(
      lambda q, k: blocked.attention_received(q, k, queries, keys, **rule)
    )(q, k)
  want = _received(q, k, queries, keys, **rule)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_attention_received_keeps_no_whole_weights_and_skips():
  """Arrays of the program, and its FLOPs against those of all pairs."""
  stream = _stream(1024, "none")
  q, k, _ = _qkv(1024)

  def trace(window, causal=True):
    call = functools.partial(
      blocked.attention_received, causal=causal, window=window, softcap=4.0
    )
    return jax.jit(lambda q, k: call(q, k, stream, stream)).trace(q, k)

  sizes = [
    math.prod(shape)
    for shape in re.findall(r":[a-z]+\d*\[([\d,]+)\]", str(trace(None).jaxpr))
    for shape in [map(int, shape.split(","))]
  ]
  assert max(sizes) == B * K * G * 128 * 1024
  flops = lambda traced: traced.lower().cost_analysis()["flops"]
  dense = flops(trace(None, causal=False))
  assert flops(trace(None)) < 0.65 * dense
  assert flops(trace(128)) < 0.3 * dense


def _heads_in_turn(q_BTNH, kv_heads):
  """As if query head n read kv head n % K."""
  batch, length, heads, width = q_BTNH.shape
  q_BTGKH = q_BTNH.reshape(batch, length, heads // kv_heads, kv_heads, width)
  return q_BTGKH.transpose(0, 3, 1, 2, 4)


@pytest.mark.parametrize(
  "name,fault",
  [
    ("_query_groups", _heads_in_turn),
    ("_blocks", lambda *args: list(_BLOCKS(*args))[:-1]),
    (
      "_blocks",
      lambda *args: [
        (t, slice(s.start, s.stop - 1)) for t, s in _BLOCKS(*args)
      ],
    ),
  ],
)
def test_faults_of_attention_received_are_seen(name, fault, monkeypatch):
  monkeypatch.setattr(blocked, name, fault)
  with pytest.raises(AssertionError):
    test_attention_received_is_the_column_sums(
      "packed", True, 5, 4.0, monkeypatch
    )


def _streams(who, stride, causal, rule, segments, length=25):
  """(queries, keys): "pooled" to full, full to "short", pooled to "same"."""
  base = _moved(_stream(length, segments))
  room = None if segments == "none" else length // stride + 3
  pooled = _pooled(base, stride, causal, rule, room=room)
  return {
    "pooled": (pooled, base),
    "short": (base, pooled),
    "same": (pooled, pooled),
  }[who]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("kw",))
def _jitted(fn, same, q, k, v, queries, keys, *, kw):
  return fn(q, k, v, queries, queries if same else keys, **dict(kw))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "stride,window,softcap", [(2, None, 4.0), (3, 4, None)]
)
@pytest.mark.parametrize("who", ["pooled", "short", "same"])
def test_blocked_and_reference_of_pooled_streams(
  who, stride, window, softcap, causal, monkeypatch
):
  """They are the definition; programs are compiled once for several rules."""
  monkeypatch.setattr(blocked, "_BLOCK", 8)
  kw = dict(causal=causal, window=window, softcap=softcap)
  for segments, rule in itertools.product(
    ("none", "packed", "padded"), ("last", "first", "mean")
  ):
    queries, keys = _streams(who, stride, causal, rule, segments)
    bare = lambda stream: stream.replace(hidden_BTD=None)
    qkv = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])
    want = _brute_force(*qkv, queries, keys, **kw)
    plain = [blocked.reference_attention] if segments == "packed" else []
    for fn in (blocked.blocked_attention, *plain):
      got = _jitted(
        fn,
        who == "same",
        *qkv,
        bare(queries),
        bare(keys),
        kw=(*kw.items(), ("softmax_dtype", "float32")),
      )
      np.testing.assert_allclose(
        got, want, atol=1e-4, err_msg=f"{segments} {rule} {fn.__name__}"
      )


@pytest.mark.parametrize(
  "who,segments", [("pooled", "packed"), ("short", "none")]
)
def test_gradients_of_blocked_unequal_streams(who, segments, monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK", 8)
  queries, keys = _streams(who, 2, True, "mean", segments)
  _agree(blocked.blocked_attention, queries, keys, True, 5, 4.0)


def test_slots_of_packed_keys_may_stand_in_any_order():
  """As in a cache that is a ring, where it is said to be packed."""
  queries = _stream(9, "none").replace(packed=True)
  kw = dict(causal=True, window=4, softcap=4.0)
  order = np.random.default_rng(0).permutation(9)
  keys = masks.slots(queries)
  keys = jax.tree.map(lambda x: x[:, order], keys)
  q, k, v = _qkv(9)
  want = _brute_force(q, k, v, queries, queries, **kw)
  k, v = k[:, order], v[:, order]
  for kernel in ("reference", "blocked"):
    got = api.attend(q, k, v, queries, keys, kernel=kernel, **kw)
    np.testing.assert_allclose(got, want, atol=1e-4)
  head_major = [x.transpose(0, 2, 1, 3) for x in (k, v)]
  del kw["causal"]  # A cache always is.
  got = blocked.attend_cache(q, *head_major, queries, keys, **kw)
  np.testing.assert_allclose(got, want, atol=1e-4)


def _families(length, causal):
  """Streams of one row of `length` tokens, each before those made of it."""
  base = _moved(_stream(length, "none"))
  short = [
    _pooled(base, stride, causal, rule, keep_first)
    for stride, rule, keep_first in itertools.product(
      (1, 2, 3, 5), ("last", "first", "mean"), {False, not causal}
    )
  ]
  yield from ([base, pooled] for pooled in short)
  for first in short[3:]:
    for rule, keep_first in itertools.product(
      ("last", "first", "mean"), {False, not causal}
    ):
      yield [first, _pooled(first, 3, causal, rule, keep_first)]
  chosen = _chosen(base, -(-length // 3))
  yield [base, chosen]
  yield [chosen, _pooled(chosen, 2, causal, "last")]
  yield [chosen, _pooled(chosen, 2, causal, "mean")]
  yield [_chosen(base, -(-length // 2)), chosen]


@pytest.mark.parametrize("causal", [True, False])
def test_no_visible_key_is_skipped(causal):
  """By the indices alone: for every rule, both ways, nested, and selected."""
  families = [f for n in (1, 7, 21, 24) for f in _families(n, causal)]
  for (long, short), window in itertools.product(families, (None, 1, 2, 5, 9)):
    for queries, keys in ((long, short), (short, long), (short, short)):
      sees = _sees(queries, keys, causal, window).any(0)
      for lo in range(0, len(sees), 4):
        hi = min(lo + 4, len(sees))
        first, last = masks.key_slots(
          lo, hi, queries, keys, causal=causal, window=window
        )
        assert 0 <= first < last <= sees.shape[1]
        assert not sees[lo:hi, :first].any(), (queries, keys, lo, window)
        assert not sees[lo:hi, last:].any(), (queries, keys, lo, window)


@pytest.mark.parametrize("rule", ["last", "first", "mean"])
@pytest.mark.parametrize("who", ["pooled", "short"])
def test_blocked_unequal_skips_the_future_and_what_the_window_hides(who, rule):
  """FLOPs of the program, against those of all pairs; only unpacked."""
  queries, keys = _streams(who, 2, True, rule, "none", length=1024)
  qkv = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])

  def flops(fn, window, causal=True, packed=False):
    lowered = jax.jit(
      functools.partial(
        fn,
        queries=queries,
        keys=keys.replace(packed=packed),
        causal=causal,
        window=window,
        softcap=4.0,
        softmax_dtype="float32",
      )
    ).lower(*qkv)
    return lowered.cost_analysis()["flops"]

  dense = flops(blocked.reference_attention, None)
  # Blocks of 128 queries: of 4, or of 8.
  assert flops(blocked.blocked_attention, None) < 0.65 * dense
  assert flops(blocked.blocked_attention, 128) < 0.4 * dense
  assert flops(blocked.blocked_attention, 128, causal=False) < 0.5 * dense
  assert flops(blocked.blocked_attention, 128, packed=True) > 0.95 * dense


def test_blocked_skips_the_future_and_what_the_window_hides():
  """Compiled FLOPs, against those of all pairs."""
  stream = _stream(1024, "none")

  def flops(fn, window):
    compiled = (
      jax.jit(
        functools.partial(
          fn,
          queries=stream,
          keys=stream,
          causal=True,
          window=window,
          softcap=4.0,
          softmax_dtype="float32",
        )
      )
      .lower(*_qkv(1024))
      .compile()
    )
    return compiled.cost_analysis()["flops"]

  dense = flops(blocked.reference_attention, None)
  assert flops(blocked.blocked_attention, None) < 0.6 * dense
  assert flops(blocked.blocked_attention, 128) < 0.3 * dense


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nothing_visible_gives_zeros_and_finite_gradients(window, softcap):
  q, k, v = _qkv(6)
  stream = make_stream(jnp.zeros((B, 6, 1)), jnp.zeros((B, 6), int))
  for kernel in ("reference", "blocked"):
    loss = lambda *qkv, kernel=kernel: jnp.sum(
      api.attend(
        *qkv,
        stream,
        stream,
        causal=True,
        window=window,
        softcap=softcap,
        kernel=kernel,
      )
    )
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert value == 0
    assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_dtype_is_used(dtype):
  """Low precision differs from float32, and by no more than it should."""
  q, k, v = _qkv(32)
  stream = _stream(32, "packed")
  call = functools.partial(
    api.attend, q, k, v, stream, stream, causal=True, window=None, softcap=4.0
  )
  for kernel in ("reference", "blocked"):
    low = call(kernel=kernel, softmax_dtype=dtype)
    difference = np.abs(low - call(kernel=kernel)).max()
    assert low.dtype == q.dtype
    assert 1e-5 < difference < 0.2


@pytest.mark.parametrize("segments", ["none", "packed", "padded"])
@pytest.mark.parametrize(
  "causal,window", [(True, None), (True, 30), (False, 30)]
)
def test_splash_is_the_reference(segments, causal, window):
  """The TPU kernel, interpreted; its gradients too."""
  call = functools.partial(flash.splash_attention, interpret=True)
  stream = _stream(128, segments)
  _agree(call, stream, stream, causal, window, 4.0, width=128, tol=2e-3)


@pytest.mark.parametrize("segments", ["none", "packed", "padded"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_tokamax_is_the_reference(segments, causal, window):
  """What we ask of tokamax, by its own XLA implementation."""
  pytest.importorskip("tokamax")
  call = functools.partial(flash.tokamax_attention, implementation="xla")
  stream = _stream(24, segments)
  with jax.numpy_rank_promotion("allow"):  # tokamax's own code promotes.
    _agree(call, stream, stream, causal, window, 4.0)


def _tokamax_xla(*args, **kw):
  pytest.importorskip("tokamax")
  with jax.numpy_rank_promotion("allow"):  # tokamax's own code promotes.
    return flash.tokamax_attention(*args, **kw, implementation="xla")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "who,segments,window",
  [("same", "none", 4), ("pooled", "packed", None), ("short", "none", 4)],
)
def test_tokamax_of_pooled_streams(who, segments, window, causal):
  queries, keys = _streams(who, 3, causal, "mean", segments)
  with jax.numpy_rank_promotion("allow"):
    _agree(_tokamax_xla, queries, keys, causal, window, 4.0)


def test_tokamax_gives_zeros_to_queries_that_see_no_key():
  """Real ones, before the first key that a selection has kept."""
  queries = _stream(12, "none")
  keys = jax.tree.map(lambda x: x[:, 5:8], masks.slots(queries))
  keys = keys.replace(even=False)
  with jax.numpy_rank_promotion("allow"):
    _agree(_tokamax_xla, queries, keys, True, None, 4.0)


def test_a_hand_written_kernel_gets_its_own_rows_of_both_streams():
  """On a mesh: the rows differ in their segments."""
  queries, keys = _streams("short", 3, True, "last", "padded")
  qkv = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])
  kw = dict(causal=True, window=5, softcap=4.0)
  mesh = jax.make_mesh(
    (2, 1, 2),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  call = functools.partial(_tokamax_xla, softmax_dtype="float32", **kw)
  with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"):
    got = jax.jit(lambda *qkv: call(*qkv, queries, keys))(*qkv)
  want = _brute_force(*qkv, queries, keys, **kw)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_auto_on_a_tpu_compiles_to_its_kernel():
  """Ahead of time, forward and backward, on a mesh of a described slice."""
  pytest.importorskip("libtpu")
  devices = aot.slice_devices("v5e:2x2")
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor")
  )
  P = jax.sharding.PartitionSpec
  place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P(*spec))
  )
  heads = lambda n: place(
    (4, 256, n, 256), jnp.bfloat16, "data", None, "tensor"
  )

  def loss(q, k, v, segment_BT):
    stream = make_stream(jnp.zeros((4, 256, 1)), segment_BT)
    out = api.attend(
      q, k, v, stream, stream, causal=True, window=100, softcap=50.0
    )
    return jnp.sum(out.astype(jnp.float32) ** 2)

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
      heads(8), heads(4), heads(4), place((4, 256), jnp.int32, "data")
    )
  assert lowered.as_text().count("tpu_custom_call") == 3
  lowered.compile()


def _request(**changes):
  return (
    dict(
      softcap=50.0,
      window=None,
      packed=False,
      unequal=False,
      uneven=False,
      length=128,
      softmax_dtype="float32",
    )
    | changes
  )


@pytest.mark.parametrize("platform,skips", [("tpu", "splash"), ("cpu", None)])
@pytest.mark.parametrize(
  "request_,by_order",
  [
    ({}, True),
    (dict(packed=True, window=8), True),
    (dict(uneven=True), True),
    (dict(uneven=True, window=8), False),
    (dict(unequal=True), False),
    (dict(unequal=True, uneven=True, window=8, packed=True), False),
  ],
)
def test_auto_takes_blocked_where_the_platforms_kernel_cannot(
  platform, skips, request_, by_order, monkeypatch
):
  monkeypatch.setattr(api, "target_platform", lambda: platform)
  want = skips if skips and by_order else "blocked"
  assert api.choose_kernel("auto", **_request(**request_)) == want


def test_auto_on_a_gpu_is_tokamax_for_any_streams(monkeypatch):
  pytest.importorskip("tokamax")
  monkeypatch.setattr(api, "target_platform", lambda: "gpu")
  monkeypatch.setattr(api, "_has_capped_backward", lambda: True)
  request = _request(unequal=True, uneven=True, window=8, packed=True)
  assert api.choose_kernel("auto", **request) == "tokamax"


@pytest.mark.parametrize(
  "who,message", [("same", "evenly spaced"), ("short", "same stream.*evenly")]
)
def test_attend_tells_what_its_streams_are(who, message):
  queries, keys = _streams(who, 3, True, "mean", "none")
  qkv = _qkv(*[x.segment_BT.shape[1] for x in (queries, keys)])
  kw = dict(causal=True, window=5, softcap=None)
  with pytest.raises(ValueError, match=message):
    api.attend(*qkv, queries, keys, kernel="splash", **kw)
  got = api.attend(*qkv, queries, keys, **kw)
  want = _brute_force(*qkv, queries, keys, **kw)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
  "kernel,request_,message",
  [
    ("flash", {}, "expected 'auto' or one of"),
    ("splash", {}, "runs on tpu, not on cpu"),
    ("tokamax", {}, "runs on gpu, not on cpu"),
    ("splash", dict(unequal=True), "must be the same stream"),
    ("splash", dict(uneven=True, window=8), "slots must be evenly spaced"),
    ("splash", dict(softmax_dtype="bfloat16"), "softmax_dtype must be"),
    ("splash", dict(length=130), "multiple of 128, not 130"),
  ],
)
def test_what_a_kernel_cannot_do_raises(kernel, request_, message):
  with pytest.raises(ValueError, match=message):
    api.choose_kernel(kernel, **_request(**request_))
