"""Flash attention of other packages, mapped over a mesh by `per_shard`."""

import jax
import jax.numpy as jnp

from gemma_funnel.attention import masks
from gemma_funnel.parallel import mesh as mesh_lib


def tokamax_attention(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  queries,
  keys,
  spec,
  implementation=("mosaic", "triton"),
):
  """tokamax's flash attention for GPUs.

  The order of slots and the window let it skip. Where these are not the whole
  rule it is given an exact mask besides.
  """
  from absl import flags
  import tokamax

  # tokamax reads absl flags, which fails in a program that has parsed none.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  # A part of a row is not its keys.
  unequal = queries is not keys or masks.num_context_shards(queries) > 1
  nonuniform = spec.window is not None and not keys.uniform
  reach = None if unequal else masks.slots_in_window(spec.window, keys)
  local = None if reach is None else (reach, 0 if spec.causal else reach)

  def call(q, k, v, queries, keys):
    mask_BTS, sees_BT = None, queries.segment_BT != 0
    if unequal or nonuniform or keys.packed:
      mask_BTS = masks.visible(queries, keys, spec)
    if unequal:  # A real query may see none of the keys.
      sees_BT = jnp.any(mask_BTS, axis=-1)
    o_BTNH = tokamax.dot_product_attention(
      q,
      k,
      v,
      mask=None if mask_BTS is None else mask_BTS[:, None],
      scale=1.0,
      is_causal=spec.causal and not unequal,
      local_window_size=local,
      logits_soft_cap=spec.softcap,
      implementation=implementation,
    )
    return jnp.where(sees_BT[:, :, None, None], o_BTNH, 0)

  return per_shard(
    call, q_BTNH, k_BSKH, v_BSKH, masks.slots(queries), masks.slots(keys)
  )


def splash_attention(
  q_BTNH, k_BSKH, v_BSKH, queries, keys, spec, interpret=False
):
  """jax's splash (flash) attention for TPUs; `interpret` runs it anywhere."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  reach = masks.slots_in_window(spec.window, queries)
  _, length, heads, _ = q_BTNH.shape
  shape, shards = (length, length), masks.num_context_shards(queries)
  head_shards = mesh_lib.size(mesh_lib.dividing(mesh_lib.HEADS, heads))
  if reach is not None:
    local = (reach, 0 if spec.causal else reach)
    mask = splash.LocalMask(shape, local, offset=0)
  else:
    mask = splash.CausalMask(shape) if spec.causal else splash.FullMask(shape)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * (heads // head_shards)),
    head_shards=1,
    q_seq_shards=shards,
    block_sizes=_splash_blocks(splash, length // shards),
    attn_logits_soft_cap=spec.softcap,
    interpret=interpret,
  )

  def call(q_BTNH, k_BSKH, v_BSKH, queries, keys, kernel):
    segments = (queries.segment_BT, keys.segment_BT)  # Positions: implied.
    ids = splash.SegmentIds(*segments) if queries.packed else None
    in_axes = (0, 0, 0, None if ids is None else 0)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    o_BNTH = jax.vmap(kernel, in_axes=in_axes)(
      *map(heads_first, (q_BTNH, k_BSKH, v_BSKH)), ids
    )
    sees = (queries.segment_BT != 0)[:, :, None, None]
    return jnp.where(sees, heads_first(o_BNTH), 0).astype(q_BTNH.dtype)

  queries, keys = masks.slots(queries), masks.slots(keys)
  return per_shard(call, q_BTNH, k_BSKH, v_BSKH, queries, keys, kernel)


def _splash_blocks(splash, length: int):
  """The largest blocks up to 512 that divide the length, backward ones too."""
  block = next(b for b in (512, 256, 128) if length % b == 0)
  forward, backward = (
    "q kv kv_compute",
    "q_dkv kv_dkv kv_dkv_compute q_dq kv_dq",
  )
  names = (*forward.split(), *backward.split())
  return splash.BlockSizes(**{f"block_{name}": block for name in names})


def per_shard(call, q_BTNH, k_BSKH, v_BSKH, queries, keys, *kernel):
  """Runs a hand-written kernel on each device's own rows, heads and queries.

  The compiler cannot partition such a kernel, so where the ambient mesh has
  several devices it is mapped over the mesh. Keys and values of a row that is
  split over devices are gathered: each has its queries and all keys (context
  parallelism, as in arXiv 2407.21783, section 3.3.2).

  Args:
    call: takes the other arguments; streams have no hidden states.
    kernel: one of splash, whose masks are split as queries are; or nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return call(q_BTNH, k_BSKH, v_BSKH, queries, keys, *kernel)
  batch, length, num_heads, _ = q_BTNH.shape
  rows = mesh_lib.dividing(mesh_lib.ROWS, batch)
  slots = mesh_lib.dividing(mesh_lib.TOKENS, length)
  heads = mesh_lib.dividing(mesh_lib.HEADS, num_heads)
  kv_heads, shards = k_BSKH.shape[2], mesh_lib.size(heads)
  if kv_heads % shards:
    # Fewer than the axis: each device has the one that its queries read.
    times = (num_heads if shards % kv_heads else shards) // kv_heads
    k_BSKH, v_BSKH = (jnp.repeat(x, times, axis=2) for x in (k_BSKH, v_BSKH))
  P = jax.sharding.PartitionSpec
  mask_specs = tuple(
    k.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(None, slots)))
    for k in kernel
  )
  q_spec, k_spec = P(rows, slots, heads, None), P(rows, None, heads, None)
  return jax.shard_map(
    call,
    in_specs=(q_spec, k_spec, k_spec, P(rows, slots), P(rows), *mask_specs),
    out_specs=q_spec,
    check_vma=False,
  )(q_BTNH, k_BSKH, v_BSKH, queries, keys, *kernel)
