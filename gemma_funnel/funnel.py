"""The funnel: make a sequence short, run layers on it, make it long again.

A `Stream` is a sequence: hidden states, their positions and their segments.
`reduce` turns a stream into a short one, together with the short slot that
each token reads back; `restore` undoes it with that one index. Blocks and
attention know of streams only, never of funnels.

Grouping, with `rank` the place of a token within its segment and k the stride:
tokens with rank % k == 0 are anchors, one a group, and token t reads back the
group of the newest anchor at or before it. A causal group holds the anchor and
the k-1 tokens before it, so that no token reads its own future (the shifted
pooling of Hourglass, arXiv 2110.13711); a bidirectional group holds the anchor
and the k-1 tokens after it (Funnel-Transformer, arXiv 2006.03236). A segment's
first token is an anchor: in a causal funnel it is alone in its group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.config import FunnelConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["hidden_BTD", "position_BT", "segment_BT"],
  meta_fields=["spacing", "packed"],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """A batch of token sequences; all that attention may know of a token.

  A segment's slots are contiguous in a row, in order, and `spacing` positions
  apart. Kernels rely on that to skip what cannot be visible.

  Attributes:
    hidden_BTD: hidden states, in the compute dtype.
    position_BT: int32, in tokens of the original text.
    segment_BT: int32; tokens see only their own segment; 0 is padding, which
      sees and is seen by none.
    spacing: positions between neighbouring slots of a segment: 1, or the
      stride of the funnel that the stream is in.
    packed: False promises that one segment fills every row, so that segments
      need no masking.
  """

  hidden_BTD: jax.Array
  position_BT: jax.Array
  segment_BT: jax.Array
  spacing: int = 1
  packed: bool = True

  def replace(self, **changes) -> "Stream":
    return dataclasses.replace(self, **changes)


def rank(segment_BT: jax.Array) -> jax.Array:
  """The place of each slot within its segment: int32 [B, T], from 0."""
  slot_1T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)[None]
  before_BT = jnp.pad(segment_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  starts_BT = jnp.where(segment_BT != before_BT, slot_1T, 0)
  return slot_1T - jax.lax.cummax(starts_BT, axis=1)


def make_stream(
  hidden_BTD: jax.Array,
  segment_BT: jax.Array | None = None,
  position_BT: jax.Array | None = None,
) -> Stream:
  """A stream of unreduced tokens; positions default to ranks in the segment."""
  packed = segment_BT is not None
  if segment_BT is None:
    segment_BT = jnp.ones(hidden_BTD.shape[:2], jnp.int32)
  if position_BT is None:
    position_BT = rank(segment_BT)
  return Stream(hidden_BTD, position_BT, segment_BT, packed=packed)


def check_segments(segment_BT: np.ndarray, stride: int) -> None:
  """Checks host segments for what a `Stream` promises.

  Raises:
    ValueError: a segment in two pieces, a negative id, or more groups of
      `stride` in a row than a reduction has slots for; it names the row.
  """
  slots = -(-segment_BT.shape[1] // stride)
  for row, segment_T in enumerate(segment_BT):
    cuts = np.flatnonzero(np.diff(segment_T)) + 1
    runs = [run for run in np.split(segment_T, cuts) if run[0] != 0]
    ids = [int(run[0]) for run in runs]
    if len(set(ids)) != len(ids) or min(ids, default=1) < 0:
      raise ValueError(
        f"row {row} has the segments {ids}: expected each to be one "
        "contiguous run of a positive id (0 is padding)"
      )
    groups = sum(-(-len(run) // stride) for run in runs)
    if groups > slots:
      raise ValueError(
        f"row {row} needs {groups} groups of {stride} tokens and has room "
        f"for {slots}: start its segments at multiples of the stride"
      )


def reduce(
  stream: Stream, funnel: FunnelConfig, causal: bool
) -> tuple[Stream, jax.Array]:
  """Pools groups of `funnel.stride` tokens by their mean.

  Rows have R = ceil(T / stride) groups. That holds every group of rows whose
  segments start at multiples of the stride, or that hold a single segment
  wherever it starts; the packer sees to it.

  Args:
    stream: the sequence, T slots.
    funnel: its stride counts slots of `stream`.
    causal: whether groups end or begin at their anchor.

  Returns:
    The short stream, and int32 read_BT: the short slot each token reads back.
    A group has the position of its last slot, and the segment of its anchor; a
    mean is over the group's slots of that segment.
  """
  stride = funnel.stride
  anchor_BR, read_BT = _anchors(stream, stride)
  take = functools.partial(_take, index=anchor_BR)
  # Groups that do not exist are past the end.
  exists_BR = anchor_BR < stream.segment_BT.shape[1]
  position_BR = take(stream.position_BT)
  if not causal:
    position_BR += (stride - 1) * stream.spacing
  short = stream.replace(
    hidden_BTD=_group_means(stream, anchor_BR, stride, causal),
    position_BT=position_BR,
    segment_BT=jnp.where(exists_BR, take(stream.segment_BT), 0),
    spacing=stream.spacing * stride,
  )
  return short, read_BT


def _anchors(stream: Stream, stride: int) -> tuple[jax.Array, jax.Array]:
  """(anchor_BR, read_BT): the groups' anchor slots, and who reads which group.

  Anchors are in order; T, past the end, stands for a group that does not exist.
  """
  length = stream.segment_BT.shape[1]
  slot_1T = jnp.arange(length, dtype=jnp.int32)[None]
  is_anchor_BT = (rank(stream.segment_BT) % stride == 0) & (
    stream.segment_BT != 0
  )
  read_BT = jnp.maximum(jnp.cumsum(is_anchor_BT, axis=1) - 1, 0)
  anchor_BT = jnp.sort(jnp.where(is_anchor_BT, slot_1T, length), axis=1)
  return anchor_BT[:, : -(-length // stride)], read_BT


def _group_means(
  stream: Stream, anchor_BR: jax.Array, stride: int, causal: bool
) -> jax.Array:
  """Means [B, R, D] over the slots of a group that are of its segment."""
  batch, length, width = stream.hidden_BTD.shape
  offset_k = jnp.arange(stride) - (stride - 1 if causal else 0)
  member_BRk = anchor_BR[..., None] + offset_k[None, None]
  member_BX = member_BRk.reshape(batch, -1)
  segment_BRk = _take(stream.segment_BT, member_BX).reshape(member_BRk.shape)
  segment_BR = _take(stream.segment_BT, anchor_BR)
  counts_BRk = (
    (member_BRk >= 0)
    & (member_BRk < length)
    & (anchor_BR < length)[..., None]
    & (segment_BRk == segment_BR[..., None])
  )
  member_BRkD = _take(stream.hidden_BTD, member_BX).reshape(
    *member_BRk.shape, width
  )
  total_BRD = jnp.sum(
    jnp.where(counts_BRk[..., None], member_BRkD, 0), axis=2, dtype=jnp.float32
  )
  count_BR1 = jnp.maximum(jnp.sum(counts_BRk, axis=2), 1)[..., None]
  return (total_BRD / count_BR1).astype(stream.hidden_BTD.dtype)


def restore(
  deep: Stream, before: Stream, read_BT: jax.Array, funnel: FunnelConfig
) -> Stream:
  """Gives every token its group's deep state back.

  Args:
    deep: the short stream after the stage.
    before: the stream that was reduced.
    read_BT: the short slot each token reads, from `reduce`.
    funnel: its `recover` says how u (deep) and h (before) become one.

  Returns:
    A stream like `before`, with the recovered hidden states.
  """
  u_BTD = _take(deep.hidden_BTD, read_BT)
  h_BTD = before.hidden_BTD
  match funnel.recover:
    case "average":
      hidden_BTD = (u_BTD + h_BTD) * 0.5
    case "add":
      hidden_BTD = u_BTD + h_BTD
    case "repeat":
      hidden_BTD = u_BTD
    case _:
      raise ValueError(f"funnel.recover={funnel.recover!r} has no rule here")
  return before.replace(hidden_BTD=hidden_BTD)


def _take(x_BT: jax.Array, index: jax.Array) -> jax.Array:
  """x_BT at `index` along axis 1, row by row; beyond an end is that end."""
  expand = (...,) + (None,) * (x_BT.ndim - 2)
  return jnp.take_along_axis(x_BT, index[expand], axis=1, mode="clip")
