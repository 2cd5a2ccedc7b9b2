"""Which keys a query may see, and which no query of a block can.

`visible` is exact. The order and the spacing of slots, known when a program is
traced, let a kernel skip what no mask would show. In one stream, a key in a
later slot is in the future, and a window of W positions reaches
(W-1) // stride slots to each side, two more where slots are not evenly spaced.
Between two streams: `_bounds`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """How queries attend to keys, besides what their streams say.

  Attributes:
    causal: whether the future is hidden.
    window: positions that a query sees, itself included; None is all.
    softcap: cap of the logits; None is none.
    softmax_dtype: dtype of logits and weights; sums are float32.
  """

  causal: bool
  window: int | None
  softcap: float | None = None
  softmax_dtype: str = "float32"


def visible(queries: Stream, keys: Stream, spec: AttentionSpec) -> jax.Array:
  """Which keys each query may see: bool [B, T, S]."""
  segment_BT1 = queries.segment_BT[:, :, None]
  see_BTS = (segment_BT1 == keys.segment_BT[:, None]) & (segment_BT1 != 0)
  if spec.causal:
    see_BTS &= (
      keys.last_token_position_BT[:, None]
      <= queries.last_token_position_BT[:, :, None]
    )
  if spec.window is not None:
    distance_BTS = queries.position_BT[:, :, None] - keys.position_BT[:, None]
    see_BTS &= jnp.abs(distance_BTS) < spec.window
  return see_BTS


def slots_in_window(window: int | None, stream: Stream) -> int | None:
  """How many slots away in `stream` a window can reach; None is any."""
  if window is None:
    return None
  # Two gaps, a segment's first and last, may be shorter than `stride`.
  return (window - 1) // stream.stride + (0 if stream.uniform else 2)


def _bounds(stream: Stream, other: Stream) -> tuple[np.ndarray, np.ndarray]:
  """First and last position at which each slot of a full row can be, [T].

  They bound its position and, in causal streams, its end; positions count from
  the row's first token. Slot i of an uniform stream holds tokens of
  [i * stride, (i+1) * stride), or ends with the first of them. The least gaps
  between other slots bound them from the row's start, and from the row's end,
  which `other` gives if it is uniform.
  """
  slot_T, stride = np.arange(stream.segment_BT.shape[1]), stream.stride
  if stream.uniform:
    return slot_T * stride, slot_T * stride + stride - 1
  short = 2 * (stride - 1)  # By how much two gaps can fall short.
  from_start_T = np.maximum(slot_T * stride - short, 0)
  end = (
    other.segment_BT.shape[1] * other.stride - 1 if other.uniform else np.inf
  )
  return from_start_T, end - from_start_T[::-1]


def key_slots(
  lo: int, hi: int, queries: Stream, keys: Stream, spec: AttentionSpec
) -> tuple[int, int]:
  """[first, last) of the keys that no rule hides from all queries [lo, hi)."""
  length = keys.segment_BT.shape[1]
  first, last = 0, length
  if queries is keys:
    reach = slots_in_window(spec.window, keys)
    if reach is not None:
      first, last = max(0, lo - reach), min(length, hi + reach)
    return first, hi if spec.causal else last
  if queries.packed or keys.packed:
    return first, last
  query_from_T, query_to_T = _bounds(queries, keys)
  key_from_S, key_to_S = _bounds(keys, queries)
  if spec.causal:
    last = np.searchsorted(key_from_S, query_to_T[hi - 1], side="right")
  if spec.window is not None:
    lowest, highest = query_from_T[lo], query_to_T[hi - 1]
    first = np.searchsorted(key_to_S, lowest - spec.window, side="right")
    last = min(last, np.searchsorted(key_from_S, highest + spec.window))
  # One key at least: a softmax over none has no shape.
  first = min(int(first), length - 1)
  return first, max(int(last), first + 1)


def slots(stream: Stream, some: slice = slice(None)) -> Stream:
  """Where some slots stand; no hidden states."""
  return jax.tree.map(lambda x_BT: x_BT[:, some], stream.slots())


def num_context_shards(queries: Stream) -> int:
  """How many devices share each row's slots."""
  length = queries.segment_BT.shape[1]
  return mesh_lib.size(mesh_lib.dividing(mesh_lib.TOKENS, length))
