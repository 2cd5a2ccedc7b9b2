"""Reducing and restoring, each against its definition.

What holds for whole models is in test_invariants.py.
"""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import funnel as funnel_lib
from gemma_funnel.config import (
  POSITIONS,
  FunnelConfig,
  TransformerConfig,
  resolve_funnel,
)
from gemma_funnel.funnel import LayerRun, Reduce, Stage, Upsample
from gemma_funnel.reducers import BYPASS, Groups, Pending, select
from gemma_funnel.registry import RECOVERIES, REDUCERS
from gemma_funnel.stream import Stream, make_stream, rank

CONFIG = TransformerConfig.preset("tiny", kernel="reference")
LENGTH = 29
POOLS = tuple(n for n, kind in REDUCERS.items() if issubclass(kind, Groups))


def _stage(funnel: FunnelConfig, seed=0) -> Stage:
  """A stage whose learned parts are away from where they start."""
  stage = Stage(CONFIG, funnel, nnx.Rngs(seed))
  graphdef, params = nnx.split(stage)
  noise = lambda n, x: jax.random.normal(jax.random.key(n), x.shape)
  leaves, tree = jax.tree.flatten(params)
  leaves = [x + 0.5 * noise(n + 9, x) for n, x in enumerate(leaves)]
  return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def _stream(segment_BT) -> Stream:
  """Random states; what padding holds would be noticed."""
  segment_BT = jnp.asarray(segment_BT, jnp.int32)
  hidden_BTD = jax.random.normal(
    jax.random.key(2), (*segment_BT.shape, CONFIG.embed_dim)
  )
  hidden_BTD = jnp.where(segment_BT[..., None] == 0, jnp.nan, hidden_BTD)
  return make_stream(hidden_BTD, segment_BT)


def _host(tree):
  return jax.tree.map(np.asarray, tree)


def _segments(align: int) -> np.ndarray:
  """Rows full, padded on both sides, packed at multiples of `align`, empty."""
  rows = np.zeros((5, LENGTH), np.int32)
  rows[0] = 1
  rows[1, 3:20] = 4
  rows[2, 28:] = 7
  starts = range(0, LENGTH, align)
  sizes = zip(starts, (5, 1, 7, 2, 3), strict=False)
  for number, (start, size) in enumerate(sizes):
    # The last group of a segment is not full, if a segment fills it at all.
    rows[3, start : min(start + size, start + align, LENGTH)] = number + 1
  return rows


# --- The definition -------------------------------------------------------


def _groups(size: int, funnel: FunnelConfig, causal: bool):
  """The groups of a segment of `size` slots: (anchor, members)."""
  k = funnel.stride
  if causal:
    return [(a, range(max(a - k + 1, 0), a + 1)) for a in range(0, size, k)]
  if funnel.keep_first:
    rest = [(a, range(a, min(a + k, size))) for a in range(1, size, k)]
    return [(0, range(1)), *rest]
  return [(a, range(a, min(a + k, size))) for a in range(0, size, k)]


def _pooled(x_kD: np.ndarray, stage: Stage) -> np.ndarray:
  match stage.stage.reduce:
    case "mean":
      return x_kD.mean(axis=0)
    case "max":
      return x_kD.max(axis=0)
    case "first" | "strided":  # `strided` has one member.
      return x_kD[0]
    case "last":
      return x_kD[-1]
  rms_k1 = np.sqrt(np.square(x_kD).mean(axis=1, keepdims=True) + 1e-6)
  weight_k = np.exp((x_kD / rms_k1) @ np.asarray(stage.reducer.pool_query[...]))
  return (weight_k / weight_k.sum()) @ x_kD


def _position(position_k, anchor, stream: Stream, stage: Stage, causal: bool):
  funnel = stage.stage
  match funnel.position:
    case "first":
      return position_k[0]
    case "mean":
      return np.mean(position_k)
  whole = stream.uniform and not (causal or funnel.reduce == "strided")
  if whole and not (funnel.keep_first and anchor == 0):
    return position_k[0] + (funnel.stride - 1) * stream.stride
  return position_k[-1]


def _check_reduction(stage: Stage, stream: Stream, causal: bool):
  """That `stage` reduces as defined; what it made, for another to reduce."""
  result, gather_index_BT = stage.reducer.reduce(stream, {}, causal)
  stream, short, gather_index_BT = _host((stream, result, gather_index_BT))
  every = stage.stage.reduce == "strided"
  for row, segment_T in enumerate(stream.segment_BT):
    at = lambda x_BT, slots: x_BT[row][list(slots)]
    made = 0
    for segment in dict.fromkeys(segment_T[segment_T != 0]):
      (slots,) = np.nonzero(segment_T == segment)
      groups = _groups(len(slots), stage.stage, causal)
      for g, (anchor, members) in enumerate(groups):
        members = slots[[anchor]] if every else slots[list(members)]
        np.testing.assert_allclose(
          short.hidden_BTD[row, made],
          _pooled(at(stream.hidden_BTD, members), stage),
          atol=1e-5,
        )
        position = _position(
          at(stream.position_BT, members), anchor, stream, stage, causal
        )
        np.testing.assert_allclose(short.position_BT[row, made], position)
        assert short.segment_BT[row, made] == segment
        if causal:
          assert (
            short.last_token_position_BT[row, made]
            == at(stream.last_token_position_BT, members).max()
          )
        stop = groups[g + 1][0] if g + 1 < len(groups) else len(slots)
        want = np.full(stop - anchor, BYPASS if every else made)
        want[0] = made
        np.testing.assert_array_equal(
          at(gather_index_BT, slots[anchor:stop]),
          want,
          err_msg=str((row, segment)),
        )
        made += 1
    assert np.all(short.segment_BT[row, made:] == 0)
  _check_promises(short)
  return result


def _check_promises(stream: Stream):
  """What `Stream` says of the gaps between slots, which kernels rely on."""
  for row, segment_T in enumerate(stream.segment_BT):
    for segment in set(segment_T[segment_T != 0]):
      (slots,) = np.nonzero(segment_T == segment)
      assert np.all(np.diff(slots) == 1)
      gap_T = np.diff(stream.position_BT[row, slots])
      assert np.all(np.diff(stream.last_token_position_BT[row, slots]) > 0)
      if stream.uniform:
        assert np.all(gap_T == stream.stride)
      assert np.all(gap_T >= 1)
      assert np.all(gap_T[1:-1] >= stream.stride)


def _rules(stride, pool):
  """Funnels of that stride and pool with every other choice of reduction."""
  for keep_first, position in itertools.product((False, True), POSITIONS):
    if pool != "strided" or position == "last":
      yield FunnelConfig(
        0, stride=stride, reduce=pool, keep_first=keep_first, position=position
      )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_reduce_is_the_definition(stride, pool, causal):
  """Of a sequence, and again of what that gave."""
  # The inner pool and its rules take turns: each meets each outer one.
  turn = (stride + 3 * causal) % len(POOLS)
  inner = [
    _stage(funnel, seed=1)
    for pool in POOLS[turn:] + POOLS[:turn]
    for funnel in _rules(2, pool)
  ]
  for number, funnel in enumerate(_rules(stride, pool)):
    room = stride if funnel.keep_first and not causal else 0
    stream = _stream(_segments(stride + room))
    short = _check_reduction(_stage(funnel), stream, causal)
    assert short.hidden_BTD.shape[1] == REDUCERS[funnel.reduce](funnel).length(
      LENGTH, causal
    )
    assert short.stride == stride
    stream = _stream(_segments(2 * stride * (2 if not causal else 1)))
    short = _check_reduction(_stage(funnel), stream, causal)
    for stage in inner[number::12]:
      again = _check_reduction(stage, short, causal)
      assert again.stride == 2 * stride


@pytest.mark.parametrize("pool", POOLS)
def test_a_step_makes_the_group_that_reduce_would_make(pool):
  """From its own slots alone, as decoding has them; at first that is one."""
  stream = _stream([[1] * 13])
  two = lambda x: jnp.zeros((1, 2, *x.shape[2:]), x.dtype)
  padded = jax.tree.map(lambda x: jnp.concatenate([two(x), x], axis=1), stream)
  for stage in map(_stage, _rules(3, pool)):
    made = _host(stage.reducer.reduce(stream, {}, causal=True)[0])
    for g in range(5):
      slots = slice(3 * g, 3 * g + 3)
      window = jax.tree.map(lambda x: x[:, slots], padded)  # noqa: B023
      state = Pending(jax.tree.map(lambda x: x[:, :2], window), jnp.int32(1))
      step = stage.reducer.step(state, jax.tree.map(lambda x: x[:, 2:], window))
      newest = step.short
      assert not step.due and int(step.state.count) == 2
      for name in (
        "hidden_BTD",
        "position_BT",
        "last_token_position_BT",
        "segment_BT",
      ):
        got, want = getattr(newest, name)[:, 0], getattr(made, name)[:, g]
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{g} {name}")
      assert (newest.stride, newest.uniform) == (made.stride, made.uniform)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_uniform_stays_so_by_default(pool, causal):
  """Kernels skip least where it is not known."""
  stream = _stream([[1] * LENGTH])
  for stride in (2, 3):
    stage = Stage(CONFIG, FunnelConfig(0, stride=stride, reduce=pool), None)
    reduce = lambda stream: stage.reducer.reduce(stream, {}, causal)[0]  # noqa: B023
    stream = jax.eval_shape(reduce, stream)
    assert stream.uniform


def test_means_are_summed_in_float32():
  """In bfloat16 256 + 1 is 256."""
  stage = Stage(CONFIG, FunnelConfig(0, stride=4), None)
  x_4 = jnp.asarray([256, 1, 1, 1], jnp.bfloat16)
  hidden_BTD = jnp.broadcast_to(x_4[None, :, None], (1, 4, 32))
  short, _ = stage.reducer.reduce(make_stream(hidden_BTD), {}, causal=False)
  assert short.hidden_BTD.dtype == jnp.bfloat16
  assert np.all(short.hidden_BTD == jnp.bfloat16(259 / 4))


def test_max_of_negative_states_is_negative():
  """What does not count is not a zero among them."""
  stage = Stage(CONFIG, FunnelConfig(0, stride=3, reduce="max"), None)
  stream = make_stream(jnp.full((1, 5, 32), -2.0))
  for causal in (True, False):
    assert np.all(stage.reducer.reduce(stream, {}, causal)[0].hidden_BTD == -2)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_pooling_starts_as_the_mean(causal):
  rngs = nnx.Rngs(0)
  stream = _stream(_segments(6))
  mean, learned = (
    Stage(CONFIG, FunnelConfig(0, stride=3, reduce=pool), rngs).reducer.reduce(
      stream, {}, causal
    )[0]
    for pool in ("mean", "attention")
  )
  np.testing.assert_array_equal(mean.hidden_BTD, learned.hidden_BTD)


# --- Recovery -------------------------------------------------------------


def _attention(
  stage: Stage, before: Stream, deep: Stream, causal
) -> np.ndarray:
  """[B, T, D] of the recovery "attend", one query and head at a time."""
  learned = stage.recovery.attend
  norm = lambda x, scale: (
    x
    / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + CONFIG.norm_eps)
    * (1 + np.asarray(scale))
  )

  def turned(x_H, position):
    half = CONFIG.head_dim // 2
    rate = CONFIG.rope_base ** -(np.arange(half) * 2 / CONFIG.head_dim)
    pair = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * position * rate)
    return np.concatenate([pair.real, pair.imag])

  q_weight, k_weight, v_weight, out = (
    np.asarray(getattr(learned.attn, name)[...])
    for name in ("query", "key", "value", "out")
  )
  h = norm(np.asarray(before.hidden_BTD), learned.query_norm.scale[...])
  u = norm(np.asarray(deep.hidden_BTD), learned.key_norm.scale[...])
  result = np.zeros(before.hidden_BTD.shape)
  group = CONFIG.num_heads // CONFIG.num_kv_heads
  for b, t, n in np.ndindex(*h.shape[:2], CONFIG.num_heads):
    if before.segment_BT[b, t] == 0:
      continue  # Padding sees nothing.
    q = turned(h[b, t] @ q_weight[:, n], before.position_BT[b, t])
    logits, values = [], []
    for g in range(u.shape[1]):
      if deep.segment_BT[b, g] != before.segment_BT[b, t]:
        continue
      if (
        causal
        and deep.last_token_position_BT[b, g]
        > before.last_token_position_BT[b, t]
      ):
        continue
      k = turned(u[b, g] @ k_weight[:, n // group], deep.position_BT[b, g])
      logit = q @ k / np.sqrt(CONFIG.query_pre_attn_scalar)
      logits.append(CONFIG.attn_softcap * np.tanh(logit / CONFIG.attn_softcap))
      values.append(u[b, g] @ v_weight[:, n // group])
    weight = np.exp(logits) / np.exp(logits).sum()
    result[b, t] += (weight @ np.array(values)) @ out[n]
  return result


def _before_and_deep(funnel: FunnelConfig, causal: bool):
  before = _stream(_segments(4))
  before = before.replace(hidden_BTD=jnp.nan_to_num(before.hidden_BTD))
  short, gather_index_BT = _stage(funnel).reducer.reduce(before, {}, causal)
  states = jax.random.normal(jax.random.key(5), short.hidden_BTD.shape)
  return before, short, short.replace(hidden_BTD=states), gather_index_BT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["mean", "strided"])
@pytest.mark.parametrize(
  "recover", [name for name in RECOVERIES if RECOVERIES[name].upsamples]
)
def test_upsample_is_the_definition(recover, pool, causal):
  funnel = FunnelConfig(0, stride=2, reduce=pool, recover=recover)
  stage = _stage(funnel)
  before, short, deep, gather_index_BT = _before_and_deep(funnel, causal)
  got = _host(stage.upsample(deep, short, before, gather_index_BT, causal))
  before, short, deep, gather_index_BT = _host(
    (before, short, deep, gather_index_BT)
  )
  h = before.hidden_BTD
  u = np.stack(
    [x[r] for x, r in zip(deep.hidden_BTD, gather_index_BT, strict=True)]
  )
  p = np.stack(
    [x[r] for x, r in zip(short.hidden_BTD, gather_index_BT, strict=True)]
  )
  match recover:
    case "delta":
      want = h + (u - p)
    case "scaled_delta":
      want = h + (1 + np.asarray(stage.recovery.scale[...])) * (u - p)
    case "average":
      want = (u + h) / 2
    case "add":
      want = u + h
    case "repeat":
      want = u
    case "gate":
      s = 1 / (1 + np.exp(-np.asarray(stage.recovery.gate[...])))
      want = s * u + (1 - s) * h
    case "attend":
      want = (u + h) / 2 + _attention(stage, before, deep, causal)
    case "affine":
      want = u
    case "offset":
      down, up = (
        np.asarray(getattr(stage.recovery, name)[...])
        for name in ("down", "up")
      )
      odd = np.asarray(rank(before.segment_BT))[..., None] % 2 == 1
      maps = [u @ down[o] @ up[o] for o in (0, 1)]
      want = h + (u - p) + np.where(odd, maps[1], maps[0])
  other = h
  if recover == "affine":
    other = h + h @ np.asarray(stage.recovery.map[...])
    other = other + np.asarray(stage.recovery.shift[...])
  want = np.where(gather_index_BT[..., None] == BYPASS, other, want)
  real = before.segment_BT != 0
  np.testing.assert_allclose(got.hidden_BTD[real], want[real], atol=1e-4)
  assert np.all(np.isfinite(got.hidden_BTD))
  for name in ("position_BT", "last_token_position_BT", "segment_BT"):
    np.testing.assert_array_equal(getattr(got, name), getattr(before, name))
  assert (got.stride, got.uniform) == (before.stride, before.uniform)


@pytest.mark.parametrize(
  "recover,start,learned",
  [
    ("gate", "average", "gate"),
    ("attend", "average", "attend/attn/out"),
    ("scaled_delta", "delta", "scale"),
  ],
)
def test_learned_recoveries_start_as_what_they_replace(recover, start, learned):
  funnel = FunnelConfig(0, stride=2, recover=recover)
  before, short, deep, gather_index_BT = _before_and_deep(funnel, True)
  fresh = Stage(CONFIG, funnel, nnx.Rngs(0))
  plain = Stage(CONFIG, FunnelConfig(0, stride=2, recover=start), None)
  want = plain.upsample(deep, short, before, gather_index_BT, True).hidden_BTD
  got = fresh.upsample(deep, short, before, gather_index_BT, True).hidden_BTD
  np.testing.assert_array_equal(got, want)
  value = fresh.recovery
  for name in learned.split("/"):
    value = getattr(value, name)
  value[...] += 1.0
  other = fresh.upsample(deep, short, before, gather_index_BT, True).hidden_BTD
  assert np.abs(other - want).max() > 1e-2


# --- Selection ------------------------------------------------------------


def test_select_leaves_the_others_as_they_were():
  before = _stream([[1] * 6, [0, 2, 2, 2, 3, 3]])
  before = before.replace(hidden_BTD=jnp.nan_to_num(before.hidden_BTD))
  stage = _stage(FunnelConfig(0, recover="add"))

  @jax.jit
  def there_and_back(before, keep_BR):
    short, gather_index_BT = select(before, keep_BR)
    return (
      short,
      gather_index_BT,
      stage.upsample(short, short, before, gather_index_BT, True),
    )

  kept = [[1, 2, 5], [3, 4, 6]]  # 6 is past the end.
  done = there_and_back(before, jnp.asarray(kept, jnp.int32))
  before, short, gather_index_BT, after = _host((before, *done))
  for row, slots in enumerate([[1, 2, 5], [3, 4]]):
    for name in (
      "hidden_BTD",
      "position_BT",
      "last_token_position_BT",
      "segment_BT",
    ):
      got, have = getattr(short, name)[row], getattr(before, name)[row]
      np.testing.assert_array_equal(got[: len(slots)], have[slots], name)
    want = np.full(6, BYPASS)
    want[slots] = np.arange(len(slots))
    np.testing.assert_array_equal(gather_index_BT[row], want)
    times = np.where(want == BYPASS, 1, 2)[:, None]
    np.testing.assert_array_equal(
      after.hidden_BTD[row], before.hidden_BTD[row] * times
    )
  assert short.segment_BT[1, 2] == 0
  assert not short.uniform and short.stride == 1


# --- Which layers see what ------------------------------------------------

# Layers 1, 3 and 5 see all.
SIX = TransformerConfig.preset("tiny", num_layers=6)


@pytest.mark.parametrize(
  "funnel,steps",
  [
    ("off", [LayerRun(0, 6)]),
    ("start=2", [LayerRun(0, 2), Reduce(0), LayerRun(2, 6, (0,)), Upsample(0)]),
    ("start=0,recover=none", [Reduce(0), LayerRun(0, 6, (0,))]),
    (
      "start=1,stop=4,keys=first",
      [
        LayerRun(0, 1),
        Reduce(0),
        LayerRun(1, 2, (0,), "before"),
        LayerRun(2, 4, (0,)),
        Upsample(0),
        LayerRun(4, 6),
      ],
    ),
    (
      "start=3,stop=4,keys=first",
      [
        LayerRun(0, 3),
        Reduce(0),
        LayerRun(3, 4, (0,), "before"),
        Upsample(0),
        LayerRun(4, 6),
      ],
    ),
    (
      "start=0,stop=5+start=2,stop=4,keys=first",
      [
        Reduce(0),
        LayerRun(0, 2, (0,)),
        Reduce(1),
        LayerRun(2, 3, (0, 1), "before"),
        LayerRun(3, 4, (0, 1)),
        Upsample(1),
        LayerRun(4, 5, (0,)),
        Upsample(0),
        LayerRun(5, 6),
      ],
    ),
    (
      "start=0,keys=first+start=1",
      [
        Reduce(0),
        LayerRun(0, 1, (0,), "before"),
        Reduce(1),
        LayerRun(1, 6, (0, 1)),
        Upsample(1),
        Upsample(0),
      ],
    ),
    (
      "start=0,stop=2+start=2,stop=3+start=4",
      [
        Reduce(0),
        LayerRun(0, 2, (0,)),
        Upsample(0),
        Reduce(1),
        LayerRun(2, 3, (1,)),
        Upsample(1),
        LayerRun(3, 4),
        Reduce(2),
        LayerRun(4, 6, (2,)),
        Upsample(2),
      ],
    ),
    (
      "start=0,recover=none+start=2,recover=none",
      [Reduce(0), LayerRun(0, 2, (0,)), Reduce(1), LayerRun(2, 6, (0, 1))],
    ),
    (
      "start=0,recover=none+start=2",
      [
        Reduce(0),
        LayerRun(0, 2, (0,)),
        Reduce(1),
        LayerRun(2, 6, (0, 1)),
        Upsample(1),
      ],
    ),
    (
      "start=1,stop=4,keys=before+start=2,stop=3",
      [
        LayerRun(0, 1),
        Reduce(0),
        LayerRun(1, 2, (0,), "before"),
        Reduce(1),
        LayerRun(2, 3, (0, 1)),
        Upsample(1),
        LayerRun(3, 4, (0,), "before"),
        Upsample(0),
        LayerRun(4, 6),
      ],
    ),
    (
      "layers=0-1,4,4,3-5",
      [
        Reduce(0),
        LayerRun(0, 2, (0,)),
        LayerRun(4, 5, (0,)),
        LayerRun(4, 5, (0,)),
        LayerRun(3, 6, (0,)),
        Upsample(0),
      ],
    ),
    (
      "start=2,stop=5,keys=first,layers=3,2",
      [
        LayerRun(0, 2),
        Reduce(0),
        LayerRun(3, 4, (0,), "before"),
        LayerRun(2, 3, (0,)),
        Upsample(0),
        LayerRun(5, 6),
      ],
    ),
    (
      "start=5,reduce=last_queries,keys=none",
      [
        LayerRun(0, 3),
        LayerRun(3, 4, needs=("attention_of_last",)),
        LayerRun(4, 5),
        Reduce(0),
        LayerRun(5, 6, (0,), "none"),
        Upsample(0),
      ],
    ),
    (
      "start=1,reduce=received",
      [
        LayerRun(0, 1, needs=("attention_received",)),
        Reduce(0),
        LayerRun(1, 6, (0,)),
        Upsample(0),
      ],
    ),
  ],
)
def test_layer_plan(funnel, steps):
  assert funnel_lib.layer_plan(resolve_funnel(funnel, 6), SIX) == steps


def test_run_trunk_hands_each_what_it_needs(monkeypatch):
  """Streams as strings: what was done, in order."""
  kind = type("Asks", (REDUCERS["mean"],), {"needs": ("received",)})
  monkeypatch.setitem(REDUCERS, "asks", kind)
  funnel = "start=1,stop=5,keys=first+start=3,stop=4,recover=add,reduce=asks"
  end = funnel_lib.run_trunk(
    funnel_lib.layer_plan(resolve_funnel(funnel, 6), SIX),
    "x",
    lambda step, x, keys: (
      f"{x}>{step.start}{step.stop}" + (f"[{keys}]" if keys else ""),
      {need: f"{need}{step.start}" for need in step.needs},
    ),
    lambda stage, x, aux: (f"({x})/{stage}{[*aux.values()]}", f"r{stage}"),
    lambda stage, deep, short, before, read: f"{deep}*{short}*{before}*{read}",
  )
  first = "x>01"
  outer_short = f"({first})/0[]"
  outer = f"{outer_short}>12[{first}]>23"
  inner_short = f"({outer})/1['received2']"
  inner = f"{inner_short}>34*{inner_short}*{outer}*r1"
  assert end == f"{inner}>45*{outer_short}*{first}*r0>56"


# --- Segments -------------------------------------------------------------


@pytest.mark.parametrize(
  "segments,funnel,causal,message",
  [
    ([1, 2, 1, 0], "off", True, "row 0 has .* one contiguous run"),
    ([1, -2, 0, 0], "off", True, "positive id"),
    (
      [1, 2, 3, 4],
      "start=0",
      True,
      "row 0 needs 4 slots in the stage start=.* for 2",
    ),
    (
      [1, 1, 2, 2, 3, 3, 4, 4],
      "start=0,stride=2+start=1,stride=2",
      True,
      "needs 4 slots in the stage start=.* for 2",
    ),
    ([1, 1, 2, 2], "start=0,keep_first=true", False, "needs 4 .* for 3: .*pad"),
  ],
)
def test_segments_that_cannot_be(segments, funnel, causal, message):
  stages = resolve_funnel(funnel, 6)
  with pytest.raises(ValueError, match=message):
    funnel_lib.check_segments(np.array([segments]), stages, causal)


@pytest.mark.parametrize(
  "segments,funnel,causal",
  [
    ([0, 5, 5, 0, 3], "off", True),
    ([0, 0, 0, 0, 0], "start=0", True),
    ([0, 1, 1, 1, 1], "start=0,stride=4", True),
    ([1, 1, 2, 2], "start=0,keep_first=true", True),
    ([1, 1, 1, 0, 2, 2, 2, 2], "start=0+start=1,stop=3", True),
    # Stages one after another do not add up.
    ([1, 1, 2, 2], "start=0,stop=2+start=3", True),
    ([1, 1, 0, 0, 2, 2], "start=0,keep_first=true", False),
  ],
)
def test_segments_that_can_be(segments, funnel, causal):
  """No group is lost, in this row or in any of its segments alone."""
  stages = resolve_funnel(funnel, 6)
  funnel_lib.check_segments(np.array([segments]), stages, causal)


def test_only_a_bidirectional_row_is_asked_for_padding():
  stages = resolve_funnel("start=0,keep_first=true", 6)
  with pytest.raises(ValueError) as error:
    funnel_lib.check_segments(np.array([[1, 2]]), stages, True)
  assert "padding" not in str(error.value)
