"""Attention in jax.numpy: whole, in blocks of queries, and of a cache.

Dimensions besides those of `layers`: G = N / K query heads a kv head, X = T G.
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from gemma_funnel.attention import flash, masks
from gemma_funnel.stream import Stream

# Logits within +-this can be exponentiated and summed in float32 as they are.
_MAX_UNSHIFTED_SOFTCAP = 60.0
# Queries a block, and at most how many blocks a program is unrolled into.
_BLOCK = 128
_MAX_BLOCKS = 64


def reference_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, **kw):
  """Every query against every key: the definition, and the oracle."""
  q, k, v = (
    _query_groups(q_BTNH, k_BSKH.shape[2]),
    *map(_head_major, (k_BSKH, v_BSKH)),
  )
  return _token_major(_block(q, k, v, queries, keys, **kw))


def blocked_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, **kw):
  """Blocks of queries, each against the keys that it could see at all.

  The order and the spacing of slots, known when the program is traced, give
  those keys. The backward pass recomputes a block's weights.
  """
  return _per_shard(_attend_blocks, q_BTNH, k_BSKH, v_BSKH, queries, keys, kw)


def attend_cache(
  q_BTNH,
  k_BKSH,
  v_BKSH,
  queries,
  keys,
  *,
  window,
  softcap,
  softmax_dtype="float32",
):
  """Causal attention of a few queries to a cache, in any order of slots.

  As `attend` by "reference", with keys and values that already lie as the
  product wants them: a step would otherwise copy the whole cache.
  """
  o_BKTGH = _block(
    _query_groups(q_BTNH, k_BKSH.shape[1]),
    k_BKSH,
    v_BKSH,
    queries,
    keys,
    causal=True,
    window=window,
    softcap=softcap,
    softmax_dtype=softmax_dtype,
  )
  return _token_major(o_BKTGH)


def attention_received(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  queries: Stream,
  keys: Stream,
  *,
  causal: bool,
  window: int | None,
  softcap: float | None,
  softmax_dtype: str = "float32",
) -> jax.Array:
  """Attention that each key gets, summed over query heads and queries.

  A second pass over queries and keys, in blocks as `blocked_attention`, so it
  serves every kernel; the weights [T, S] never exist whole. No gradient.

  Args:
    q_BTNH, k_BSKH, queries, keys: as of `attend`.
    causal, window, softcap, softmax_dtype: as of `attend`.

  Returns:
    float32 [B, S]; 0 for padding. The sum over keys is N times the number of
    queries that see a key.
  """
  q_BTNH, k_BSKH = map(jax.lax.stop_gradient, (q_BTNH, k_BSKH))
  kw = dict(
    causal=causal, window=window, softcap=softcap, softmax_dtype=softmax_dtype
  )
  # Each device's own sum: one row a part of the queries, one column a part of
  # the heads.
  received_BXXS = _per_shard(
    _received_blocks, q_BTNH, k_BSKH, k_BSKH, queries, keys, kw
  )
  return received_BXXS.sum((1, 2))


def _per_shard(blocks, q_BTNH, k_BSKH, v_BSKH, queries, keys, kw):
  """`blocks` of each device's own queries where a mesh splits rows."""
  call = functools.partial(blocks, **kw)
  if masks.parts(queries) == 1:
    return call(q_BTNH, k_BSKH, v_BSKH, queries, keys)
  return flash.per_shard(
    call,
    q_BTNH,
    k_BSKH,
    v_BSKH,
    masks.slots(queries).replace(packed=True),
    masks.slots(keys),
  )


def _blocks(queries, keys, causal, window) -> Iterator[tuple[slice, slice]]:
  """Blocks of queries, and for each the keys that it could see at all."""
  length = queries.segment_BT.shape[1]
  block = max(_BLOCK, -(-length // (_MAX_BLOCKS * _BLOCK)) * _BLOCK)
  for lo in range(0, length, block):
    hi = min(lo + block, length)
    first, last = masks.key_slots(
      lo, hi, queries, keys, causal=causal, window=window
    )
    yield slice(lo, hi), slice(first, last)


def _attend_blocks(q_BTNH, k_BSKH, v_BSKH, queries, keys, **kw):
  q = _query_groups(q_BTNH, k_BSKH.shape[2])
  k, v = map(_head_major, (k_BSKH, v_BSKH))
  attend_block = jax.checkpoint(functools.partial(_block, **kw))

  # Once more, so that what is kept are not each block's keys.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend_all(q, k, v):
    out = [
      attend_block(
        q[:, :, t],
        k[:, :, s],
        v[:, :, s],
        masks.slots(queries, t.start, t.stop),
        masks.slots(keys, s.start, s.stop),
      )
      for t, s in _blocks(queries, keys, kw["causal"], kw["window"])
    ]
    return jnp.concatenate(out, axis=2)

  return _token_major(attend_all(q, k, v))


def _received_blocks(q_BTNH, k_BSKH, _, queries, keys, **kw):
  """Column sums of the weights, float32 [B, 1, 1, S]."""
  q, k = _query_groups(q_BTNH, k_BSKH.shape[2]), _head_major(k_BSKH)
  received_BS = jnp.zeros(k_BSKH.shape[:2], jnp.float32)
  for t, s in _blocks(queries, keys, kw["causal"], kw["window"]):
    p_BKXS, total_BKX1 = _weights(
      q[:, :, t],
      k[:, :, s],
      masks.slots(queries, t.start, t.stop),
      masks.slots(keys, s.start, s.stop),
      **kw,
    )
    p_BKXS = p_BKXS / jnp.where(total_BKX1 > 0, total_BKX1, 1)
    sum_BS = jnp.sum(p_BKXS, axis=(1, 2), dtype=jnp.float32)
    received_BS = received_BS.at[:, s].add(sum_BS)
  return received_BS[:, None, None]


def _weights(
  q_BKTGH, k_BKSH, queries, keys, *, causal, window, softcap, softmax_dtype
):
  """Weights before their division by their sum, and the sum; both may be 0."""
  batch, kv_heads, length, group, width = q_BKTGH.shape
  s_BKXS = jnp.einsum(
    "bkxh,bksh->bkxs",
    q_BKTGH.reshape(batch, kv_heads, length * group, width),
    k_BKSH,
    preferred_element_type=jnp.dtype(softmax_dtype),
  )
  see_BTS = masks.visible(queries, keys, causal=causal, window=window)
  see_B1XS = jnp.repeat(see_BTS, group, axis=1)[:, None]
  if softcap is not None:
    s_BKXS = softcap * jnp.tanh(s_BKXS / softcap)
  if softcap is None or softcap > _MAX_UNSHIFTED_SOFTCAP:
    lowest = jnp.finfo(softmax_dtype).min
    top = jnp.max(jnp.where(see_B1XS, s_BKXS, lowest), axis=-1, keepdims=True)
    s_BKXS = s_BKXS - jax.lax.stop_gradient(top)
  # Hidden logits are replaced before exp, so that none overflows into a NaN
  # gradient, and after it.
  p_BKXS = jnp.where(see_B1XS, jnp.exp(jnp.where(see_B1XS, s_BKXS, 0)), 0)
  total_BKX1 = jnp.sum(p_BKXS, axis=-1, keepdims=True, dtype=jnp.float32)
  return p_BKXS, total_BKX1


def _block(q_BKTGH, k_BKSH, v_BKSH, queries, keys, **kw):
  """Attention of one block of queries, head-major; the whole of `reference`."""
  p_BKXS, total_BKX1 = _weights(q_BKTGH, k_BKSH, queries, keys, **kw)
  o_BKXH = jnp.einsum(
    "bkxs,bksh->bkxh",
    p_BKXS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  o_BKXH = o_BKXH / jnp.where(total_BKX1 > 0, total_BKX1, 1)
  return o_BKXH.reshape(q_BKTGH.shape).astype(q_BKTGH.dtype)


def _query_groups(q_BTNH, kv_heads: int):
  """[B, K, T, G, H]: query heads by the kv head that they read."""
  batch, length, heads, width = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
  return q_BTKGH.transpose(0, 2, 1, 3, 4)


def _head_major(k_BSKH):
  return k_BSKH.transpose(0, 2, 1, 3)


def _token_major(o_BKTGH):
  batch, kv_heads, length, group, width = o_BKTGH.shape
  o_BTKGH = o_BKTGH.transpose(0, 2, 1, 3, 4)
  return o_BTKGH.reshape(batch, length, kv_heads * group, width)
