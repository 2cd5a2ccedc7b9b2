"""Attention in jax.numpy: whole, in blocks of queries, and of a cache.

Dimensions besides those of `layers`: G = N / K query heads a kv head, X = T G.
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from gemma_funnel.attention import flash, masks
from gemma_funnel.attention.masks import AttentionSpec
from gemma_funnel.stream import Stream, last_slot, take, take_slots

# Logits within +-this can be exponentiated and summed in float32 as they are.
_MAX_UNSHIFTED_SOFTCAP = 60.0
# Queries a block, and at most how many blocks a program is unrolled into.
_BLOCK = 128
_MAX_BLOCKS = 64


def reference_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, spec):
  """Every query against every key: the definition, and the oracle."""
  q_BKTGH = _query_groups(q_BTNH, k_BSKH.shape[2])
  k_BKSH, v_BKSH = map(_head_major, (k_BSKH, v_BSKH))
  return _token_major(_attend(q_BKTGH, k_BKSH, v_BKSH, queries, keys, spec))


def blocked_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, spec):
  """Blocks of queries, each against the keys that it could see at all.

  The order and the spacing of slots, known when the program is traced, give
  those keys. The backward pass recomputes a block's weights.
  """
  call = functools.partial(_attend_blocks, spec=spec)
  return _per_shard(call, q_BTNH, k_BSKH, v_BSKH, queries, keys)


def attend_cache(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  queries: Stream,
  keys: Stream,
  **spec,
) -> jax.Array:
  """Causal attention of a few queries to a cache, in any order of slots.

  As `attend` by "reference", with the fields of `AttentionSpec` but `causal`.
  Keys and values are head-major, as the product wants them: a step would
  otherwise copy the whole cache.
  """
  spec = AttentionSpec(causal=True, **spec)
  q_BKTGH = _query_groups(q_BTNH, k_BKSH.shape[1])
  return _token_major(_attend(q_BKTGH, k_BKSH, v_BKSH, queries, keys, spec))


def attention_received(
  q_BTNH: jax.Array, k_BSKH: jax.Array, queries: Stream, keys: Stream, **spec
) -> jax.Array:
  """Attention that each key gets, summed over query heads and queries.

  A second pass over queries and keys, in blocks as `blocked_attention`: it
  serves every kernel, and holds a block's weights rather than all. It has no
  gradient.

  Args:
    q_BTNH, k_BSKH, queries, keys, **spec: as of `api.attend`.

  Returns:
    float32 [B, S]; 0 for padding. A row sums to N times the number of its
    queries that see a key.
  """
  q_BTNH, k_BSKH = map(jax.lax.stop_gradient, (q_BTNH, k_BSKH))
  call = functools.partial(_received_blocks, spec=AttentionSpec(**spec))
  # On a mesh: one entry a part of the queries, and of the heads.
  received_BTNS = _per_shard(call, q_BTNH, k_BSKH, k_BSKH, queries, keys)
  return received_BTNS.sum((1, 2))


def attention_of_last(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  count: int,
  queries: Stream,
  keys: Stream,
  **spec,
) -> jax.Array:
  """Attention that each key gets of a row's last queries, summed over heads.

  It costs `count` queries, whichever kernel does the rest, and has no gradient.

  Args:
    q_BTNH, k_BSKH, queries, keys, **spec: as of `api.attend`.
    count: how many queries that are no padding, at the end of each row.

  Returns:
    float32 [B, S]; 0 for padding. A row sums to N times `count`, or to N times
    its queries if it has fewer.
  """
  q_BTNH, k_BSKH = map(jax.lax.stop_gradient, (q_BTNH, k_BSKH))
  back_W = jnp.arange(count, dtype=jnp.int32) - (count - 1)
  index_BW = last_slot(queries)[:, None] + back_W[None]
  p_BKXS, total_BKX1 = _weights(
    _query_groups(take(q_BTNH, jnp.maximum(index_BW, 0)), k_BSKH.shape[2]),
    _head_major(k_BSKH),
    take_slots(queries.slots(), index_BW),
    keys,
    AttentionSpec(**spec),
  )
  p_BKXS = p_BKXS / jnp.where(total_BKX1 > 0, total_BKX1, 1)
  return jnp.sum(p_BKXS, axis=(1, 2), dtype=jnp.float32)


def _per_shard(call, q_BTNH, k_BSKH, v_BSKH, queries, keys):
  """`call`, by each device on its own queries where a mesh splits rows."""
  if masks.num_context_shards(queries) == 1:
    return call(q_BTNH, k_BSKH, v_BSKH, queries, keys)
  queries = masks.slots(queries).replace(packed=True)
  return flash.per_shard(
    call, q_BTNH, k_BSKH, v_BSKH, queries, masks.slots(keys)
  )


def _blocks(queries, keys, spec) -> Iterator[tuple[slice, slice]]:
  """Blocks of queries, each with the keys that it could see at all."""
  length = queries.segment_BT.shape[1]
  block = max(_BLOCK, -(-length // (_MAX_BLOCKS * _BLOCK)) * _BLOCK)
  for lo in range(0, length, block):
    hi = min(lo + block, length)
    yield slice(lo, hi), slice(*masks.key_slots(lo, hi, queries, keys, spec))


def _attend_blocks(q_BTNH, k_BSKH, v_BSKH, queries, keys, spec):
  q = _query_groups(q_BTNH, k_BSKH.shape[2])
  k, v = map(_head_major, (k_BSKH, v_BSKH))
  attend_block = jax.checkpoint(functools.partial(_attend, spec=spec))

  # Once more, so that what is kept are not each block's keys.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend_all(q, k, v):
    out = [
      attend_block(
        q[:, :, t],
        k[:, :, s],
        v[:, :, s],
        masks.slots(queries, t),
        masks.slots(keys, s),
      )
      for t, s in _blocks(queries, keys, spec)
    ]
    return jnp.concatenate(out, axis=2)

  return _token_major(attend_all(q, k, v))


def _received_blocks(q_BTNH, k_BSKH, _, queries, keys, spec):
  """Column sums of the weights, float32 [B, 1, 1, S]."""
  q, k = _query_groups(q_BTNH, k_BSKH.shape[2]), _head_major(k_BSKH)
  received_BS = jnp.zeros(k_BSKH.shape[:2], jnp.float32)
  for t, s in _blocks(queries, keys, spec):
    p_BKXS, total_BKX1 = _weights(
      q[:, :, t],
      k[:, :, s],
      masks.slots(queries, t),
      masks.slots(keys, s),
      spec,
    )
    p_BKXS = p_BKXS / jnp.where(total_BKX1 > 0, total_BKX1, 1)
    sum_BS = jnp.sum(p_BKXS, axis=(1, 2), dtype=jnp.float32)
    received_BS = received_BS.at[:, s].add(sum_BS)
  return received_BS[:, None, None]


def _attend(q_BKTGH, k_BKSH, v_BKSH, queries, keys, spec):
  """Attention of some queries to some keys, head-major."""
  p_BKXS, total_BKX1 = _weights(q_BKTGH, k_BKSH, queries, keys, spec)
  o_BKXH = jnp.einsum(
    "bkxs,bksh->bkxh",
    p_BKXS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  o_BKXH = o_BKXH / jnp.where(total_BKX1 > 0, total_BKX1, 1)
  return o_BKXH.reshape(q_BKTGH.shape).astype(q_BKTGH.dtype)


def _weights(q_BKTGH, k_BKSH, queries, keys, spec):
  """Weights before their division by their sum, and the sum; both may be 0."""
  batch, kv_heads, length, group, width = q_BKTGH.shape
  s_BKXS = jnp.einsum(
    "bkxh,bksh->bkxs",
    q_BKTGH.reshape(batch, kv_heads, length * group, width),
    k_BKSH,
    preferred_element_type=jnp.dtype(spec.softmax_dtype),
  )
  see_BTS = masks.visible(queries, keys, spec)
  see_B1XS = jnp.repeat(see_BTS, group, axis=1)[:, None]
  if spec.softcap is not None:
    s_BKXS = spec.softcap * jnp.tanh(s_BKXS / spec.softcap)
  if spec.softcap is None or spec.softcap > _MAX_UNSHIFTED_SOFTCAP:
    lowest = jnp.finfo(spec.softmax_dtype).min
    top = jnp.max(jnp.where(see_B1XS, s_BKXS, lowest), axis=-1, keepdims=True)
    s_BKXS = s_BKXS - jax.lax.stop_gradient(top)
  # Hidden logits are replaced before exp, so that none overflows into a NaN
  # gradient, and after it.
  p_BKXS = jnp.where(see_B1XS, jnp.exp(jnp.where(see_B1XS, s_BKXS, 0)), 0)
  return p_BKXS, jnp.sum(p_BKXS, axis=-1, keepdims=True, dtype=jnp.float32)


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
