"""Every kernel against the definition, and what each refuses."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import config
from gemma_funnel.attention import api, blocked, flash, masks
from gemma_funnel.attention.masks import AttentionSpec
from gemma_funnel.stream import Stream, make_stream
from gemma_funnel.training import aot

B, K, G, H = 2, 2, 2, 8
_BLOCKS = blocked._blocks
CASES = [
  (segments, AttentionSpec(causal, window, softcap))
  for segments in ("none", "packed", "padded")
  for causal in (True, False)
  for window in (None, 1, 5)
  for softcap in (None, 4.0, 100.0)
]
WHO = ("pooled", "short", "same")


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocked, "_BLOCK", 4)


def _attend(qkv, queries, keys, spec, kernel="auto"):
  return api.attend(
    *qkv, queries, keys, kernel=kernel, **dataclasses.asdict(spec)
  )


def _received(qk, queries, keys, spec):
  return blocked.attention_received(
    *qk, queries, keys, **dataclasses.asdict(spec)
  )


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
  rows = [slots + [(0, 0, 0)] * (room - len(slots)) for slots in rows]
  at, end, segment = np.moveaxis(np.array(rows), 2, 0)
  even = rule == "last" and base.even
  return Stream(
    None,
    at.astype(np.int32 if even else np.float32),
    end.astype(np.int32),
    segment.astype(np.int32),
    spacing=base.spacing * stride,
    even=even,
    packed=base.packed,
  )


def _chosen(base, count):
  """`count` slots of each row, at random, as token selection leaves them."""
  random = np.random.default_rng(count)
  length = base.segment_BT.shape[1]
  keep_BR = np.stack(
    [np.sort(random.permutation(length)[:count]) for _ in range(B)]
  )
  take = lambda x: np.take_along_axis(np.asarray(x), keep_BR, 1)
  return jax.tree.map(take, masks.slots(base)).replace(spacing=1, even=False)


def _moved(stream, spacing=1):
  """Rows need not begin at position 0."""
  move = lambda x: x * spacing + 7
  return stream.replace(
    position_BT=move(stream.position_BT),
    end_BT=move(stream.end_BT),
    spacing=spacing,
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
    "base": (base, base),
  }[who]


def _qkv(queries, keys, dtype=jnp.float32, width=H):
  random = jax.random.split(jax.random.key(0), 3)
  length, keys_length = (x.segment_BT.shape[1] for x in (queries, keys))
  shapes = [(B, length, K * G, width), *[(B, keys_length, K, width)] * 2]
  # Logits well beyond the caps below.
  return [
    3 * jax.random.normal(key, shape, dtype)
    for key, shape in zip(random, shapes, strict=True)
  ]


def _sees(queries, keys, spec):
  """Which keys each query may see, [B, T, S]: the definition, in numpy."""
  column = lambda x: np.asarray(x)[:, :, None]
  row = lambda x: np.asarray(x)[:, None]
  see = column(queries.segment_BT) == row(keys.segment_BT)
  see &= column(queries.segment_BT) != 0
  if spec.causal:
    see &= row(keys.end_BT) <= column(queries.end_BT)
  if spec.window is not None:
    distance = column(queries.position_BT) - row(keys.position_BT)
    see &= np.abs(distance) < spec.window
  return see


def _weights(q, k, queries, keys, spec):
  """The definition, in numpy: [B, N, T, S]."""
  q, k = (np.asarray(x, np.float64) for x in (q, k))
  logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, G, axis=2))
  if spec.softcap:
    logits = spec.softcap * np.tanh(logits / spec.softcap)
  see = _sees(queries, keys, spec)[:, None]
  logits = np.where(see, logits, -np.inf)
  weight = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e9))
  total = weight.sum(-1, keepdims=True)
  return weight / np.where(total > 0, total, 1)


def _by_definition(q, k, v, queries, keys, spec):
  weights = _weights(q, k, queries, keys, spec)
  return np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, G, axis=2))


def _flops(fn, arrays, queries, keys, spec):
  call = functools.partial(fn, queries=queries, keys=keys, spec=spec)
  return jax.jit(call).lower(*arrays).cost_analysis()["flops"]


def _agree(call, queries, keys, spec, width=H, tol=1e-4):
  """Values and gradients of `call` are those of the reference."""
  qkv = _qkv(queries, keys, width=width)
  weight = jax.random.normal(jax.random.key(1), qkv[0].shape)

  def value_and_grads(fn):
    loss = lambda *qkv: jnp.sum(weight * fn(*qkv, queries, keys, spec))
    return fn(*qkv, queries, keys, spec), jax.grad(loss, (0, 1, 2))(*qkv)

  got, want = map(
    jax.jit(value_and_grads, static_argnums=0),
    (call, blocked.reference_attention),
  )
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=tol, rtol=tol)
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("segments,spec", CASES)
def test_reference_and_blocked_are_the_definition(
  segments, spec, spacing, small_blocks
):
  stream = _moved(_stream(21, segments), spacing)
  qkv = _qkv(stream, stream)
  want = _by_definition(*qkv, stream, stream, spec)
  for kernel in ("reference", "blocked"):
    got = _attend(qkv, stream, stream, spec, kernel)
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=kernel)
  if spacing == 1 and spec.window != 1 and spec.softcap != 100.0:
    _agree(blocked.blocked_attention, stream, stream, spec)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(fn, same, spec, q, k, v, queries, keys):
  return fn(q, k, v, queries, queries if same else keys, spec)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "stride,window,softcap", [(2, None, 4.0), (3, 4, None)]
)
@pytest.mark.parametrize("who", WHO)
def test_blocked_and_reference_of_pooled_streams(
  who, stride, window, softcap, causal, monkeypatch
):
  """They are the definition; programs are compiled once for several rules."""
  monkeypatch.setattr(blocked, "_BLOCK", 8)
  spec = AttentionSpec(causal, window, softcap)
  for segments, rule in itertools.product(
    ("none", "packed", "padded"), ("last", "first", "mean")
  ):
    queries, keys = _streams(who, stride, causal, rule, segments)
    qkv = _qkv(queries, keys)
    want = _by_definition(*qkv, queries, keys, spec)
    plain = [blocked.reference_attention] if segments == "packed" else []
    for fn in (blocked.blocked_attention, *plain):
      got = _jitted(
        fn, who == "same", spec, *qkv, masks.slots(queries), masks.slots(keys)
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
  _agree(blocked.blocked_attention, queries, keys, AttentionSpec(True, 5, 4.0))


def test_slots_of_packed_keys_may_stand_in_any_order():
  """As in a cache that is a ring, where it is said to be packed."""
  queries = _stream(9, "none").replace(packed=True)
  spec = AttentionSpec(True, 4, 4.0)
  order = np.random.default_rng(0).permutation(9)
  keys = jax.tree.map(lambda x: x[:, order], masks.slots(queries))
  q, k, v = _qkv(queries, keys)
  want = _by_definition(q, k, v, queries, queries, spec)
  k, v = k[:, order], v[:, order]
  for kernel in ("reference", "blocked"):
    got = _attend((q, k, v), queries, keys, spec, kernel)
    np.testing.assert_allclose(got, want, atol=1e-4)
  head_major = [x.transpose(0, 2, 1, 3) for x in (k, v)]
  got = blocked.attend_cache(
    q, *head_major, queries, keys, window=4, softcap=4.0
  )
  np.testing.assert_allclose(got, want, atol=1e-4)


def _families(length, causal):
  """Streams of one row of `length` tokens, each before those made of it."""
  base = _moved(_stream(length, "none"))
  rules = [*itertools.product(("last", "first", "mean"), {False, not causal})]
  short = [
    _pooled(base, stride, causal, *rule)
    for stride, rule in itertools.product((1, 2, 3, 5), rules)
  ]
  yield from ([base, pooled] for pooled in short)
  for first, rule in itertools.product(short[3:], rules):
    yield [first, _pooled(first, 3, causal, *rule)]
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
    spec = AttentionSpec(causal, window)
    for queries, keys in ((long, short), (short, long), (short, short)):
      sees = _sees(queries, keys, spec).any(0)
      for lo in range(0, len(sees), 4):
        hi = min(lo + 4, len(sees))
        first, last = masks.key_slots(lo, hi, queries, keys, spec)
        assert 0 <= first < last <= sees.shape[1]
        assert not sees[lo:hi, :first].any(), (queries, keys, lo, window)
        assert not sees[lo:hi, last:].any(), (queries, keys, lo, window)


@pytest.mark.parametrize("rule", ["last", "first", "mean"])
@pytest.mark.parametrize("who", ["base", "pooled", "short"])
def test_blocked_skips_the_future_and_what_the_window_hides(who, rule):
  """FLOPs of the program, against those of all pairs; unequal: only unpacked."""
  queries, keys = _streams(who, 2, True, rule, "none", length=1024)
  qkv = _qkv(queries, keys)
  flops = lambda fn, window, causal=True, keys=keys: _flops(
    fn, qkv, queries, keys, AttentionSpec(causal, window, 4.0)
  )
  dense = flops(blocked.reference_attention, None)
  call = blocked.blocked_attention
  # Blocks of 128 queries: of 4, or of 8.
  assert flops(call, None) < (0.6 if who == "base" else 0.65) * dense
  assert flops(call, 128) < (0.3 if who == "base" else 0.4) * dense
  assert flops(call, 128, causal=False) < 0.5 * dense
  packed = keys.replace(packed=True)
  assert flops(call, 128, keys=packed) > 0.95 * dense


@pytest.mark.parametrize("segments,spec", CASES)
def test_attention_received_is_the_column_sums(segments, spec, small_blocks):
  stream = _moved(_stream(21, segments))
  q, k, _ = _qkv(stream, stream)
  got = _received((q, k), stream, stream, spec)
  assert (got.dtype, got.shape) == (jnp.float32, (B, 21))
  want = _weights(q, k, stream, stream, spec).sum((1, 2))
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.all(got[stream.segment_BT == 0] == 0)
  real = jnp.sum(stream.segment_BT != 0, axis=1)
  np.testing.assert_allclose(got.sum(1), K * G * real, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("who", WHO)
def test_attention_received_of_pooled_streams(who, causal, small_blocks):
  spec = AttentionSpec(causal, 5, 4.0)
  for segments, at in [
    ("none", "last"),
    ("packed", "mean"),
    ("padded", "last"),
  ]:
    queries, keys = _streams(who, 3, causal, at, segments)
    q, k, _ = _qkv(queries, keys)
    got = _received((q, k), queries, keys, spec)
    want = _weights(q, k, queries, keys, spec).sum((1, 2))
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"{segments} {at}")


@pytest.mark.parametrize("softmax_dtype", ["float32", "bfloat16"])
def test_attention_received_in_low_precision(softmax_dtype):
  stream = _stream(32, "packed")
  q, k, _ = _qkv(stream, stream, jnp.bfloat16)
  spec = AttentionSpec(True, 9, 4.0, softmax_dtype)
  got = _received((q, k), stream, stream, spec)
  assert got.dtype == jnp.float32
  want = _weights(q, k, stream, stream, spec).sum((1, 2))
  tol = {"float32": 1e-4, "bfloat16": 0.05}[softmax_dtype]
  np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def test_attention_received_has_no_gradient():
  stream, spec = _stream(9, "none"), AttentionSpec(True, None, 4.0)
  loss = lambda *qk: jnp.sum(_received(qk, stream, stream, spec) ** 2)
  grads = jax.grad(loss, (0, 1))(*_qkv(stream, stream)[:2])
  assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("sequence,tensor", [(4, 1), (2, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("who", ["base", "short", "same"])
def test_attention_received_on_a_mesh(who, sequence, tensor, small_blocks):
  """Queries split over `sequence`, heads over `tensor`, rows over `data`."""
  queries, keys = _streams(who, 3, True, "mean", "padded", length=24)
  q, k, _ = _qkv(queries, keys)
  spec = AttentionSpec(True, 5, 4.0)
  call = jax.jit(lambda *qk: _received(qk, queries, keys, spec))
  with _mesh(data=8 // sequence // tensor, sequence=sequence, tensor=tensor):
    got = call(q, k)
  want = _weights(q, k, queries, keys, spec).sum((1, 2))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_attention_received_keeps_no_whole_weights_and_skips():
  """Arrays of the program, and its FLOPs against those of all pairs."""
  stream = _stream(1024, "none")
  qk = _qkv(stream, stream)[:2]
  call = lambda q, k, queries, keys, spec: _received(
    (q, k), stream, stream, spec
  )
  flops = lambda *spec: _flops(call, qk, stream, stream, AttentionSpec(*spec))
  program = jax.make_jaxpr(
    lambda q, k: _received((q, k), stream, stream, AttentionSpec(True, None))
  )(*qk)
  shapes = re.findall(r":[a-z]+\d*\[([\d,]+)\]", str(program))
  sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
  assert max(sizes) == B * K * G * 128 * 1024
  dense = flops(False, None, 4.0)
  assert flops(True, None, 4.0) < 0.65 * dense
  assert flops(True, 128, 4.0) < 0.3 * dense


def _heads_in_turn(q_BTNH, kv_heads):
  """As if query head n read kv head n % K."""
  batch, length, heads, width = q_BTNH.shape
  q_BTGKH = q_BTNH.reshape(batch, length, heads // kv_heads, kv_heads, width)
  return q_BTGKH.transpose(0, 3, 1, 2, 4)


def _without_a_block(*args):
  return list(_BLOCKS(*args))[:-1]


def _without_a_key(*args):
  return [(t, slice(s.start, s.stop - 1)) for t, s in _BLOCKS(*args)]


@pytest.mark.parametrize(
  "name,fault",
  [
    ("_query_groups", _heads_in_turn),
    ("_blocks", _without_a_block),
    ("_blocks", _without_a_key),
  ],
)
def test_faults_of_attention_received_are_seen(
  name, fault, small_blocks, monkeypatch
):
  spec = AttentionSpec(True, 5, 4.0)
  test_attention_received_is_the_column_sums("packed", spec, None)
  monkeypatch.setattr(blocked, name, fault)
  with pytest.raises(AssertionError):
    test_attention_received_is_the_column_sums("packed", spec, None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nothing_visible_gives_zeros_and_finite_gradients(window, softcap):
  stream = make_stream(jnp.zeros((B, 6, 1)), jnp.zeros((B, 6), int))
  spec = AttentionSpec(True, window, softcap)
  for kernel in ("reference", "blocked"):
    loss = lambda *qkv, kernel=kernel: jnp.sum(
      _attend(qkv, stream, stream, spec, kernel)
    )
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(*_qkv(stream, stream))
    assert value == 0
    assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_dtype_is_used(dtype):
  """Low precision differs from float32, and by no more than it should."""
  stream = _stream(32, "packed")
  qkv = _qkv(stream, stream)
  for kernel in ("reference", "blocked"):
    low, full = (
      _attend(qkv, stream, stream, AttentionSpec(True, None, 4.0, x), kernel)
      for x in (dtype, "float32")
    )
    assert low.dtype == qkv[0].dtype
    assert 1e-5 < np.abs(low - full).max() < 0.2


@pytest.mark.parametrize("segments", ["none", "packed", "padded"])
@pytest.mark.parametrize(
  "causal,window", [(True, None), (True, 30), (False, 30)]
)
def test_splash_is_the_reference(segments, causal, window):
  """The TPU kernel, interpreted; its gradients too."""
  call = functools.partial(flash.splash_attention, interpret=True)
  stream, spec = _stream(128, segments), AttentionSpec(causal, window, 4.0)
  _agree(call, stream, stream, spec, width=128, tol=2e-3)


@pytest.fixture
def tokamax_xla():
  """What we ask of tokamax, by its own XLA implementation."""
  pytest.importorskip("tokamax")
  with jax.numpy_rank_promotion("allow"):  # tokamax's own code promotes.
    yield functools.partial(flash.tokamax_attention, implementation="xla")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "who,segments,window",
  [
    *itertools.product(["base"], ["none", "packed", "padded"], [None, 5]),
    ("same", "none", 4),
    ("pooled", "packed", None),
    ("short", "none", 4),
  ],
)
def test_tokamax_is_the_reference(who, segments, window, causal, tokamax_xla):
  queries, keys = _streams(who, 3, causal, "mean", segments)
  _agree(tokamax_xla, queries, keys, AttentionSpec(causal, window, 4.0))


def test_tokamax_gives_zeros_to_queries_that_see_no_key(tokamax_xla):
  """Real ones, before the first key that a selection has kept."""
  queries = _stream(12, "none")
  keys = masks.slots(queries, slice(5, 8)).replace(even=False)
  _agree(tokamax_xla, queries, keys, AttentionSpec(True, None, 4.0))


def _mesh(**axes):
  types = (jax.sharding.AxisType.Auto,) * len(axes)
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)
  return jax.set_mesh(mesh)


def test_a_hand_written_kernel_gets_its_own_rows_of_both_streams(tokamax_xla):
  """On a mesh: the rows differ in their segments."""
  queries, keys = _streams("short", 3, True, "last", "padded")
  qkv, spec = _qkv(queries, keys), AttentionSpec(True, 5, 4.0)
  with _mesh(data=2, fsdp=1, tensor=2):
    got = jax.jit(lambda *qkv: tokamax_xla(*qkv, queries, keys, spec))(*qkv)
  want = _by_definition(*qkv, queries, keys, spec)
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


def _choose(
  kernel, length=128, unequal=False, uneven=False, packed=False, **spec
):
  stream = make_stream(jnp.zeros((1, length, 1)))
  stream = stream.replace(packed=packed, even=not uneven)
  spec = AttentionSpec(
    **{"causal": True, "window": None, "softcap": 50.0} | spec
  )
  keys = stream.replace() if unequal else stream
  return api.choose_kernel(kernel, stream, keys, spec)


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
  assert _choose("auto", **request_) == want


@pytest.mark.parametrize("capped,want", [(True, "tokamax"), (False, "blocked")])
def test_auto_on_a_gpu_is_tokamax_for_any_streams(capped, want, monkeypatch):
  pytest.importorskip("tokamax")
  monkeypatch.setattr(api, "target_platform", lambda: "gpu")
  monkeypatch.setattr(api, "_has_capped_backward", lambda: capped)
  request = dict(unequal=True, uneven=True, window=8, packed=True)
  assert _choose("auto", **request) == want
  assert _choose("auto", **request, softcap=None) == "tokamax"


@pytest.mark.parametrize(
  "who,message", [("same", "evenly spaced"), ("short", "same stream.*evenly")]
)
def test_attend_tells_what_its_streams_are(who, message):
  queries, keys = _streams(who, 3, True, "mean", "none")
  qkv, spec = _qkv(queries, keys), AttentionSpec(True, 5)
  with pytest.raises(ValueError, match=message):
    _attend(qkv, queries, keys, spec, "splash")
  got = _attend(qkv, queries, keys, spec)
  want = _by_definition(*qkv, queries, keys, spec)
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
    _choose(kernel, **request_)


def test_the_model_may_name_every_kernel():
  assert config.KERNELS == ("auto", *api.KERNELS)
