"""Every kernel against the reference, and what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import attention
from gemma_funnel.funnel import make_stream, rank

B, K, G, H = 2, 2, 2, 8


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


def _qkv(length, dtype=jnp.float32, width=H):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(B, length, n, width) for n in (K * G, K, K)]
  # Logits well beyond the caps below.
  return [
    3 * jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def _brute_force(q, k, v, stream, causal, window, softcap):
  """The definition, in numpy loops."""
  out = np.zeros(q.shape)
  position, segment = map(np.asarray, (stream.position_BT, stream.segment_BT))
  length = q.shape[1]
  for b, t, n in np.ndindex(q.shape[:3]):
    see = [
        s for s in range(length)
        if segment[b, s] == segment[b, t] != 0
        and (not causal or position[b, s] <= position[b, t])
        and (window is None or abs(position[b, s] - position[b, t]) < window)
    ]  # fmt: skip
    if not see:
      continue
    logit = np.array([q[b, t, n] @ k[b, s, n // G] for s in see], np.float64)
    if softcap:
      logit = softcap * np.tanh(logit / softcap)
    weight = np.exp(logit - logit.max())
    weight /= weight.sum()
    out[b, t, n] = sum(
      w * v[b, s, n // G] for w, s in zip(weight, see, strict=False)
    )
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
  q, k, v = map(np.asarray, _qkv(13))
  stream = _stream(13, segments)
  got = attention.attend(
      q, k, v, stream, stream, causal=causal, window=window, softcap=softcap,
      kernel="reference",
  )  # fmt: skip
  want = _brute_force(q, k, v, stream, causal, window, softcap)
  np.testing.assert_allclose(got, want, atol=1e-4)


def _agree(call, length, segments, causal, window, softcap, width=H, tol=1e-4):
  """Values and gradients of `call` are those of the reference."""
  qkv = _qkv(length, width=width)
  stream = _stream(length, segments)
  kw = dict(
    causal=causal, window=window, softcap=softcap, softmax_dtype="float32"
  )
  weight = jax.random.normal(jax.random.key(1), qkv[0].shape)

  def value_and_grads(fn):
    loss = lambda *qkv: jnp.sum(weight * fn(*qkv, stream, stream, **kw))
    return fn(*qkv, stream, stream, **kw), jax.grad(loss, (0, 1, 2))(*qkv)

  got, want = map(
    jax.jit(value_and_grads, static_argnums=0), (call, attention._reference)
  )
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=tol, rtol=tol)
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("segments,causal,window,softcap", CASES)
def test_blocked_is_the_reference(
  segments, causal, window, softcap, spacing, monkeypatch
):
  monkeypatch.setattr(attention, "_BLOCK", 4)

  def strided(fn, *args, **kw):
    *qkv, stream, _ = args
    stream = stream.replace(
      position_BT=stream.position_BT * spacing + 7, spacing=spacing
    )
    return fn(*qkv, stream, stream, **kw)

  qkv, stream = _qkv(21), _stream(21, segments)
  kw = dict(
    causal=causal, window=window, softcap=softcap, softmax_dtype="float32"
  )
  got = strided(attention._blocked, *qkv, stream, stream, **kw)
  want = strided(attention._reference, *qkv, stream, stream, **kw)
  np.testing.assert_allclose(got, want, atol=1e-4)
  if spacing == 1 and window != 1 and softcap != 100.0:
    _agree(attention._blocked, 21, segments, causal, window, softcap)


def test_blocked_skips_the_future_and_what_the_window_hides():
  """Compiled FLOPs, against those of all pairs."""
  stream = _stream(1024, "none")

  def flops(fn, window):
    compiled = jax.jit(
        functools.partial(
            fn, queries=stream, keys=stream, causal=True, window=window,
            softcap=4.0, softmax_dtype="float32",
        )
    ).lower(*_qkv(1024)).compile()  # fmt: skip
    return compiled.cost_analysis()["flops"]

  dense = flops(attention._reference, None)
  assert flops(attention._blocked, None) < 0.6 * dense
  assert flops(attention._blocked, 128) < 0.3 * dense


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nothing_visible_gives_zeros_and_finite_gradients(window, softcap):
  q, k, v = _qkv(6)
  stream = make_stream(jnp.zeros((B, 6, 1)), jnp.zeros((B, 6), int))
  for kernel in ("reference", "blocked"):
    loss = lambda *qkv, kernel=kernel: jnp.sum(
        attention.attend(
            *qkv, stream, stream, causal=True, window=window, softcap=softcap,
            kernel=kernel,
        )
    )  # fmt: skip
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert value == 0
    assert all(np.all(g == 0) for g in grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_dtype_is_used(dtype):
  """Low precision differs from float32, and by no more than it should."""
  q, k, v = _qkv(32)
  stream = _stream(32, "packed")
  call = functools.partial(
      attention.attend, q, k, v, stream, stream, causal=True, window=None,
      softcap=4.0,
  )  # fmt: skip
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
  call = functools.partial(attention._splash, interpret=True)
  _agree(call, 128, segments, causal, window, 4.0, width=128, tol=2e-3)


@pytest.mark.parametrize("segments", ["none", "packed", "padded"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_tokamax_is_the_reference(segments, causal, window):
  """What we ask of tokamax, by its own XLA implementation."""
  pytest.importorskip("tokamax")
  call = functools.partial(attention._tokamax, implementation="xla")
  with jax.numpy_rank_promotion("allow"):  # tokamax's own code promotes.
    _agree(call, 24, segments, causal, window, 4.0)


@pytest.mark.slow
def test_auto_on_a_tpu_compiles_to_its_kernel():
  """Ahead of time, forward and backward, on a mesh of a described slice."""
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = jax.sharding.Mesh(
    np.array(slice_.devices).reshape(2, 1, 2), ("data", "fsdp", "tensor")
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
    out = attention.attend(
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
  return dict(
      softcap=50.0, window=None, packed=False, unequal=False, length=128,
      softmax_dtype="float32",
  ) | changes  # fmt: skip


def test_auto_on_the_cpu_is_blocked():
  assert attention.choose_kernel("auto", **_request()) == "blocked"
  assert attention.choose_kernel("auto", **_request(unequal=True)) == (
    "reference"
  )


@pytest.mark.parametrize(
  "kernel,request_,message",
  [
    ("flash", {}, "expected 'auto' or one of"),
    ("splash", {}, "runs on tpu, not on cpu"),
    ("tokamax", {}, "runs on gpu, not on cpu"),
    ("blocked", dict(unequal=True), "must be the same stream"),
    ("splash", dict(softmax_dtype="bfloat16"), "softmax_dtype must be"),
    ("splash", dict(length=130), "multiple of 128, not 130"),
  ],
)
def test_what_a_kernel_cannot_do_raises(kernel, request_, message):
  with pytest.raises(ValueError, match=message):
    attention.choose_kernel(kernel, **_request(**request_))


def test_rank_counts_within_segments():
  segment_BT = jnp.asarray([[0, 0, 3, 3, 3, 1, 1, 0], [1, 2, 2, 2, 2, 5, 5, 5]])
  want = [[0, 1, 0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0, 1, 2]]
  np.testing.assert_array_equal(rank(segment_BT), want)
