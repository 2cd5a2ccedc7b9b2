"""Attention over streams: one function, its kernels, and what each can do.

Every kernel computes, for query t and the keys s that it may see,

  softmax_s(softcap * tanh(q_t . k_s / softcap)) . v_s

(without the cap where `softcap` is None). Key s is visible to query t if both
are in one segment, e_s <= e_t (causal; e is the last token of a slot), and
|p_t - p_s| < window (p is its position). A query that sees nothing (padding)
gets zeros. Positions are those of the original text, so a window means the same
in a funnel.

A mask of these rules makes a kernel exact; the order and the spacing of slots,
known when a program is traced, let it skip what no mask would show. Of one
stream with itself: a key in a later slot is in the future, and a window of W
positions is one of (W-1) // spacing slots to each side, two more where slots
are not evenly spaced. Of one stream with another: `_bounds`.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import mesh as mesh_lib
from gemma_funnel.stream import Stream

# Logits within +-this can be exponentiated and summed in float32 as they are.
_MAX_UNSHIFTED_SOFTCAP = 60.0
# Queries a block, and at most how many blocks a program is unrolled into.
_BLOCK = 128
_MAX_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class Capability:
  """What a kernel can do. `platforms` is where it runs, () is anywhere.

  `packed` covers packing and padding; `unequal` is a query stream that is not
  the key stream; `uneven`, slots that are not evenly spaced, where there is a
  window; `skips` is what it does not spend time on.
  """

  softcap: bool
  window: bool
  packed: bool
  unequal: bool
  uneven: bool
  any_length: bool
  softmax_dtypes: tuple[str, ...]
  platforms: tuple[str, ...]
  module: str | None
  skips: str


CAPABILITIES: dict[str, Capability] = {
    "reference": Capability(
        softcap=True, window=True, packed=True, unequal=True, uneven=True,
        any_length=True, softmax_dtypes=("float32", "bfloat16", "float16"),
        platforms=(), module=None, skips="nothing",
    ),
    # Unequal streams: skips only where neither is packed.
    "blocked": Capability(
        softcap=True, window=True, packed=True, unequal=True, uneven=True,
        any_length=True, softmax_dtypes=("float32", "bfloat16", "float16"),
        platforms=(), module=None, skips="the future, outside the window",
    ),
    # tokamax's Triton backward has no softcap: Hopper and later have one.
    # Unequal streams go by a mask alone: nothing is skipped.
    "tokamax": Capability(
        softcap=True, window=True, packed=True, unequal=True, uneven=True,
        any_length=True, softmax_dtypes=("float32",), platforms=("gpu",),
        module="tokamax", skips="the future, outside the window",
    ),
    # jax's own: tokamax's TPU kernel takes neither a window nor a mask that
    # differs from row to row.
    "splash": Capability(
        softcap=True, window=True, packed=True, unequal=False, uneven=False,
        any_length=False, softmax_dtypes=("float32",), platforms=("tpu",),
        module="jax.experimental.pallas.ops.tpu.splash_attention",
        skips="the future, outside the window",
    ),
}  # fmt: skip


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  queries: Stream,
  keys: Stream,
  *,
  causal: bool,
  window: int | None,
  softcap: float | None,
  softmax_dtype: str = "float32",
  kernel: str = "auto",
) -> jax.Array:
  """Attention of `queries` to `keys`.

  Args:
    q_BTNH: queries, already scaled and rotated.
    k_BSKH: keys; query head n reads key head n // (N / K).
    v_BSKH: values.
    queries, keys: where the T queries and the S keys stand. Kernels that take
      no `unequal` streams want one and the same object. Two streams that are
      not `packed` must both cover the whole of the same rows, as those from
      before and after a reduction do; a part of a row, or a cache, is packed.
    causal: whether the future is hidden.
    window: positions that a query sees, itself included; None is all.
    softcap: cap of the logits; None is none.
    softmax_dtype: dtype of logits and weights; sums are float32.
    kernel: "auto" or a name in `CAPABILITIES`.

  Returns:
    [B, T, N, H] in the dtype of `q_BTNH`.

  Raises:
    ValueError: the kernel cannot do what is asked.
  """
  name = choose_kernel(
    kernel,
    softcap=softcap,
    window=window,
    packed=queries.packed or keys.packed,
    unequal=queries is not keys,
    uneven=not (queries.even and keys.even),
    length=q_BTNH.shape[1] // _parts(queries),
    softmax_dtype=softmax_dtype,
  )
  return _KERNELS[name](
      q_BTNH, k_BSKH, v_BSKH, queries, keys,
      causal=causal, window=window, softcap=softcap,
      softmax_dtype=softmax_dtype,
  )  # fmt: skip


def target_platform() -> str:
  """The platform compiled for: the ambient mesh's, or the default backend's.

  Under `jax.set_mesh` of a described topology that is a TPU, whatever the host.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def choose_kernel(kernel: str, **request) -> str:
  """The kernel that does `request` (the keyword arguments of `_lacks`).

  Raises:
    ValueError: `kernel` is none, or lacks something; it names what, and the
      kernels that would do.
  """
  if kernel == "auto":
    platform = target_platform()
    order = {"tpu": ("splash",), "gpu": ("tokamax",)}.get(platform, ())
    if platform == "gpu" and request["softcap"] and not _has_capped_backward():
      order = ()
    for name in (*order, "blocked"):
      if not _lacks(name, **request):
        return name
    return "reference"
  if kernel not in CAPABILITIES:
    raise ValueError(
      f"attention kernel {kernel!r}: expected 'auto' or one of "
      f"{list(CAPABILITIES)}"
    )
  lacks = _lacks(kernel, **request)
  if lacks:
    able = [name for name in CAPABILITIES if not _lacks(name, **request)]
    raise ValueError(
      f"attention kernel {kernel!r} cannot do this: {'; '.join(lacks)}. "
      f"Here these can: {able}"
    )
  return kernel


def _lacks(
  name, *, softcap, window, packed, unequal, uneven, length, softmax_dtype
) -> list[str]:
  """What kernel `name` lacks for a request; empty if it can do it."""
  can = CAPABILITIES[name]
  platform = target_platform()
  lacks = []
  if can.platforms and platform not in can.platforms:
    lacks.append(f"it runs on {'/'.join(can.platforms)}, not on {platform}")
  elif can.module and importlib.util.find_spec(can.module) is None:
    lacks.append(f"the package {can.module} is not installed")
  if softcap is not None and not can.softcap:
    lacks.append("it has no softcap")
  if window is not None and not can.window:
    lacks.append("it has no window")
  if packed and not can.packed:
    lacks.append("it has no segments or padding")
  if unequal and not can.unequal:
    lacks.append("queries and keys must be the same stream")
  if uneven and window is not None and not can.uneven:
    lacks.append("with a window, slots must be evenly spaced")
  if length % 128 and not can.any_length:
    lacks.append(f"the length must be a multiple of 128, not {length}")
  if softmax_dtype not in can.softmax_dtypes:
    lacks.append(f"softmax_dtype must be one of {can.softmax_dtypes}")
  return lacks


def _has_capped_backward() -> bool:
  """Whether this GPU runs a flash backward pass that knows the softcap."""
  capability = getattr(jax.devices()[0], "compute_capability", "0")
  return float(capability) >= 9.0


def visible(
  queries: Stream, keys: Stream, *, causal: bool, window: int | None
) -> jax.Array:
  """Which keys each query may see: bool [B, T, S]."""
  segment_BT1 = queries.segment_BT[:, :, None]
  see_BTS = (segment_BT1 == keys.segment_BT[:, None]) & (segment_BT1 != 0)
  if causal:
    see_BTS &= keys.end_BT[:, None] <= queries.end_BT[:, :, None]
  if window is not None:
    distance_BTS = queries.position_BT[:, :, None] - keys.position_BT[:, None]
    see_BTS &= jnp.abs(distance_BTS) < window
  return see_BTS


def _slots_in_window(window: int | None, stream: Stream) -> int | None:
  """How many slots away in `stream` a window can reach; None is any."""
  if window is None:
    return None
  # Two gaps, a segment's first and last, may be shorter than `spacing`.
  return (window - 1) // stream.spacing + (0 if stream.even else 2)


def _bounds(stream: Stream, other: Stream) -> tuple[np.ndarray, np.ndarray]:
  """Where each slot of a full row must stand: its first and last position, [T].

  Of its position and, in causal streams, of its end; positions count from the
  row's first token here. An even stream's slot i holds tokens of
  [i * spacing, (i+1) * spacing), or ends with the first of them. Of another we
  know gaps, from below: they bound it from the row's start, and from the row's
  end, which `other` tells if it is even.
  """
  slot_T, spacing = np.arange(stream.segment_BT.shape[1]), stream.spacing
  if stream.even:
    return slot_T * spacing, slot_T * spacing + spacing - 1
  short = 2 * (spacing - 1)  # By how much two gaps can fall short.
  from_start_T = np.maximum(slot_T * spacing - short, 0)
  end = other.segment_BT.shape[1] * other.spacing - 1 if other.even else np.inf
  return from_start_T, end - from_start_T[::-1]


def _key_slots(
    lo: int, hi: int, queries: Stream, keys: Stream,
    *, causal: bool, window: int | None,
) -> tuple[int, int]:  # fmt: skip
  """[first, last) of the keys that no rule hides from all queries [lo, hi)."""
  length = keys.segment_BT.shape[1]
  first, last = 0, length
  if queries is keys:
    reach = _slots_in_window(window, keys)
    if reach is not None:
      first, last = max(0, lo - reach), min(length, hi + reach)
    return first, hi if causal else last
  if queries.packed or keys.packed:
    return first, last
  query_from_T, query_to_T = _bounds(queries, keys)
  key_from_S, key_to_S = _bounds(keys, queries)
  if causal:
    last = np.searchsorted(key_from_S, query_to_T[hi - 1], side="right")
  if window is not None:
    first = np.searchsorted(key_to_S, query_from_T[lo] - window, side="right")
    outside = np.searchsorted(key_from_S, query_to_T[hi - 1] + window)
    last = min(last, outside)
  # One key at least: a softmax over none has no shape.
  first = min(int(first), length - 1)
  return first, max(int(last), first + 1)


def _slots(stream: Stream, lo: int = 0, hi: int | None = None) -> Stream:
  """Where slots [lo, hi) stand; no hidden states."""
  return stream.replace(
    hidden_BTD=None,
    position_BT=stream.position_BT[:, lo:hi],
    end_BT=stream.end_BT[:, lo:hi],
    segment_BT=stream.segment_BT[:, lo:hi],
  )


def _softmax_values(s_BKXS, v_BKSH, see, softcap, softmax_dtype):
  """Capped, masked softmax of logits s times values; nothing seen gives 0."""
  if softcap is not None:
    s_BKXS = softcap * jnp.tanh(s_BKXS / softcap)
  if softcap is None or softcap > _MAX_UNSHIFTED_SOFTCAP:
    lowest = jnp.finfo(softmax_dtype).min
    top = jnp.max(jnp.where(see, s_BKXS, lowest), axis=-1, keepdims=True)
    s_BKXS = s_BKXS - jax.lax.stop_gradient(top)
  # Hidden logits are replaced before exp, so that none overflows into a NaN
  # gradient, and after it.
  p_BKXS = jnp.where(see, jnp.exp(jnp.where(see, s_BKXS, 0)), 0)
  total = jnp.sum(p_BKXS, axis=-1, keepdims=True, dtype=jnp.float32)
  o_BKXH = jnp.einsum(
    "bkxs,bksh->bkxh",
    p_BKXS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  return o_BKXH / jnp.where(total > 0, total, 1)


def _block(
    q_BKTGH, k_BKSH, v_BKSH, queries, keys,
    *, causal, window, softcap, softmax_dtype,
):  # fmt: skip
  """Attention of one block of queries, head-major; the whole of `reference`."""
  batch, kv_heads, length, group, width = q_BKTGH.shape
  s_BKXS = jnp.einsum(
    "bkxh,bksh->bkxs",
    q_BKTGH.reshape(batch, kv_heads, length * group, width),
    k_BKSH,
    preferred_element_type=jnp.dtype(softmax_dtype),
  )
  see_BTS = visible(queries, keys, causal=causal, window=window)
  see_B1XS = jnp.repeat(see_BTS, group, axis=1)[:, None]
  o_BKXH = _softmax_values(s_BKXS, v_BKSH, see_B1XS, softcap, softmax_dtype)
  return o_BKXH.reshape(q_BKTGH.shape).astype(q_BKTGH.dtype)


def attend_cache(
    q_BTNH, k_BKSH, v_BKSH, queries, keys,
    *, window, softcap, softmax_dtype="float32",
):  # fmt: skip
  """Causal attention of a few queries to a cache, in any order of slots.

  As `attend` by "reference", with keys and values that already lie as the
  product wants them: a step would otherwise copy the whole cache.
  """
  batch, length, heads, width = q_BTNH.shape
  kv_heads = k_BKSH.shape[1]
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
  o_BKTGH = _block(
      q_BTKGH.transpose(0, 2, 1, 3, 4), k_BKSH, v_BKSH, queries, keys,
      causal=True, window=window, softcap=softcap, softmax_dtype=softmax_dtype,
  )  # fmt: skip
  return _token_major(o_BKTGH)


def _head_major(q_BTNH, k_BSKH, v_BSKH):
  batch, length, heads, width = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
  return (
    q_BTKGH.transpose(0, 2, 1, 3, 4),
    k_BSKH.transpose(0, 2, 1, 3),
    v_BSKH.transpose(0, 2, 1, 3),
  )


def _token_major(o_BKTGH):
  batch, kv_heads, length, group, width = o_BKTGH.shape
  o_BTKGH = o_BKTGH.transpose(0, 2, 1, 3, 4)
  return o_BTKGH.reshape(batch, length, kv_heads * group, width)


def _reference(q_BTNH, k_BSKH, v_BSKH, queries, keys, **kw):
  """Every query against every key: the definition, and the oracle."""
  q, k, v = _head_major(q_BTNH, k_BSKH, v_BSKH)
  return _token_major(_block(q, k, v, queries, keys, **kw))


def _blocked(q_BTNH, k_BSKH, v_BSKH, queries, keys, *, causal, window, **kw):
  """Blocks of queries, each against the keys that it could see at all.

  Which keys those are follows from the order and the spacing of slots, known
  when the program is traced. A block's weights are never kept for the backward
  pass.
  """
  if _parts(queries) > 1:
    call = functools.partial(
      _blocked_slots, causal=causal, window=window, **kw
    )
    return _per_shard(
      call, q_BTNH, k_BSKH, v_BSKH, _slots(queries).replace(packed=True), _slots(keys)
    )
  return _blocked_slots(
      q_BTNH, k_BSKH, v_BSKH, queries, keys, causal=causal, window=window, **kw
  )  # fmt: skip


def _blocked_slots(
    q_BTNH, k_BSKH, v_BSKH, queries, keys, *, causal, window, **kw
):  # fmt: skip
  q, k, v = _head_major(q_BTNH, k_BSKH, v_BSKH)
  length = q.shape[2]
  block = max(_BLOCK, -(-length // (_MAX_BLOCKS * _BLOCK)) * _BLOCK)
  attend_block = jax.checkpoint(
    functools.partial(_block, causal=causal, window=window, **kw)
  )
  out = []
  for lo in range(0, length, block):
    hi = min(lo + block, length)
    first, last = _key_slots(
      lo, hi, queries, keys, causal=causal, window=window
    )
    out.append(
      attend_block(
        q[:, :, lo:hi],
        k[:, :, first:last],
        v[:, :, first:last],
        _slots(queries, lo, hi),
        _slots(keys, first, last),
      )  # fmt: skip
    )
  return _token_major(jnp.concatenate(out, axis=2))


def _tokamax(
    q_BTNH, k_BSKH, v_BSKH, queries, keys,
    *, causal, window, softcap, softmax_dtype,
    implementation=("mosaic", "triton"),
):  # fmt: skip
  """tokamax's flash attention for GPUs.

  The order and window in slots let it skip; the mask that it is given besides,
  where these are not the whole rule, is exact.
  """
  del softmax_dtype  # float32, as the table says.
  from absl import flags
  import tokamax

  # tokamax reads absl flags, which fails in a program that has parsed none.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  # A part of a row is not its keys.
  unequal = queries is not keys or _parts(queries) > 1
  uneven = window is not None and not keys.even
  reach = None if unequal else _slots_in_window(window, keys)
  local = None if reach is None else (reach, 0 if causal else reach)

  def call(q, k, v, queries, keys):
    mask_BTS, seen_BT = None, queries.segment_BT != 0
    if unequal or uneven or keys.packed:
      mask_BTS = visible(queries, keys, causal=causal, window=window)
    if unequal:  # A real query may see none of the keys.
      seen_BT = jnp.any(mask_BTS, axis=-1)
    o_BTNH = tokamax.dot_product_attention(
        q, k, v, mask=None if mask_BTS is None else mask_BTS[:, None],
        scale=1.0, is_causal=causal and not unequal, local_window_size=local,
        logits_soft_cap=softcap, implementation=implementation,
    )  # fmt: skip
    return jnp.where(seen_BT[:, :, None, None], o_BTNH, 0)

  return _per_shard(
    call, q_BTNH, k_BSKH, v_BSKH, _slots(queries), _slots(keys)
  )


def _splash(
    q_BTNH, k_BSKH, v_BSKH, queries, keys,
    *, causal, window, softcap, softmax_dtype, interpret=False,
):  # fmt: skip
  """jax's splash (flash) attention for TPUs; `interpret` runs it anywhere."""
  del softmax_dtype  # float32, as the table says.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  reach = _slots_in_window(window, queries)
  _, length, heads, _ = q_BTNH.shape
  shape, parts = (length, length), _parts(queries)
  head_parts = mesh_lib.size(mesh_lib.dividing(mesh_lib.HEADS, heads))
  if reach is not None:
    mask = splash.LocalMask(shape, (reach, 0 if causal else reach), offset=0)
  else:
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * (heads // head_parts)),
    head_shards=1,
    q_seq_shards=parts,
    block_sizes=_splash_blocks(splash, length // parts),
    attn_logits_soft_cap=softcap,
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
    seen = (queries.segment_BT != 0)[:, :, None, None]
    return jnp.where(seen, heads_first(o_BNTH), 0).astype(q_BTNH.dtype)

  return _per_shard(
      call, q_BTNH, k_BSKH, v_BSKH, _slots(queries), _slots(keys), kernel
  )  # fmt: skip


def _splash_blocks(splash, length: int):
  """The largest blocks up to 512 that divide the length, backward ones too."""
  block = next(b for b in (512, 256, 128) if length % b == 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute",
           "q_dq", "kv_dq")  # fmt: skip
  return splash.BlockSizes(**{f"block_{name}": block for name in names})


def _parts(queries: Stream) -> int:
  """How many devices share each row's slots."""
  length = queries.segment_BT.shape[1]
  return mesh_lib.size(mesh_lib.dividing(mesh_lib.TOKENS, length))


def _per_shard(call, q_BTNH, k_BSKH, v_BSKH, queries, keys, *kernel):
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
  kv_heads, parts = k_BSKH.shape[2], mesh_lib.size(heads)
  if kv_heads % parts:
    # Fewer than the axis: each device has the one that its queries read.
    times = (num_heads if parts % kv_heads else parts) // kv_heads
    k_BSKH, v_BSKH = (jnp.repeat(x, times, axis=2) for x in (k_BSKH, v_BSKH))
  P = jax.sharding.PartitionSpec
  masks = tuple(
    k.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(None, slots)))
    for k in kernel
  )
  q_spec, k_spec = P(rows, slots, heads, None), P(rows, None, heads, None)
  return jax.shard_map(
    call,
    in_specs=(q_spec, k_spec, k_spec, P(rows, slots), P(rows), *masks),
    out_specs=q_spec,
    check_vma=False,
  )(q_BTNH, k_BSKH, v_BSKH, queries, keys, *kernel)


_KERNELS: dict[str, Callable[..., jax.Array]] = {
  "reference": _reference,
  "blocked": _blocked,
  "tokamax": _tokamax,
  "splash": _splash,
}
