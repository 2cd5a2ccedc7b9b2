"""What queries may see of keys, and what no mask would show them.

A mask of `attention`'s rules makes a kernel exact; the order and the spacing of slots,
known when a program is traced, let it skip what no mask would show. Of one
stream with itself: a key in a later slot is in the future, and a window of W
positions is one of (W-1) // spacing slots to each side, two more where slots
are not evenly spaced. Of one stream with another: `_bounds`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream


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


def slots_in_window(window: int | None, stream: Stream) -> int | None:
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


def key_slots(
  lo: int,
  hi: int,
  queries: Stream,
  keys: Stream,
  *,
  causal: bool,
  window: int | None,
) -> tuple[int, int]:
  """[first, last) of the keys that no rule hides from all queries [lo, hi)."""
  length = keys.segment_BT.shape[1]
  first, last = 0, length
  if queries is keys:
    reach = slots_in_window(window, keys)
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


def slots(stream: Stream, lo: int = 0, hi: int | None = None) -> Stream:
  """Where slots [lo, hi) stand; no hidden states."""
  return stream.replace(
    hidden_BTD=None,
    position_BT=stream.position_BT[:, lo:hi],
    end_BT=stream.end_BT[:, lo:hi],
    segment_BT=stream.segment_BT[:, lo:hi],
  )


def parts(queries: Stream) -> int:
  """How many devices share each row's slots."""
  length = queries.segment_BT.shape[1]
  return mesh_lib.size(mesh_lib.dividing(mesh_lib.TOKENS, length))
