"""A sequence of vectors, and where in the text they stand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["hidden_BTD", "position_BT", "end_BT", "segment_BT"],
  meta_fields=["spacing", "even", "packed"],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """A batch of sequences; all that attention may know of their slots.

  A segment's slots are contiguous in a row and in order. Neighbours are
  `spacing` positions apart, or else `even` is False. Kernels rely on that to
  skip what cannot be visible.

  Attributes:
    hidden_BTD: hidden states, in the compute dtype.
    position_BT: int32, or float32 where they are means, in tokens of the
      original text; rotary embeddings and windows go by it.
    end_BT: int32, the position of the last token that is in the slot; what is
      causal goes by it, and nothing else (in a bidirectional funnel it is the
      anchor's).
    segment_BT: int32; tokens see only their own segment; 0 is padding, which
      sees and is seen by none.
    spacing: positions between neighbouring slots of a segment: 1, or the
      stride of the funnel that the stream is in.
    even: whether all neighbours are exactly `spacing` apart, by position and
      by end. If not, they are `spacing` or more, but for the first two and last
      two of a segment, which are at least 1 apart.
    packed: False promises that one segment fills every row, so that segments
      need no masking.
  """

  hidden_BTD: jax.Array | None
  position_BT: jax.Array
  end_BT: jax.Array
  segment_BT: jax.Array
  spacing: int = 1
  even: bool = True
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
  return Stream(hidden_BTD, position_BT, position_BT, segment_BT, packed=packed)


def take(x_BT: jax.Array, index: jax.Array) -> jax.Array:
  """x_BT at `index` >= 0 along axis 1, row by row; beyond the end is the end."""
  expand = (...,) + (None,) * (x_BT.ndim - 2)
  return jnp.take_along_axis(x_BT, index[expand], axis=1, mode="clip")
