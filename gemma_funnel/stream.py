"""A sequence of vectors, and where in the text they stand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Spans are counted in this many steps of a row, so that few programs differ.
_SPAN_STEPS = 64


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "hidden_BTD",
    "position_BT",
    "last_token_position_BT",
    "segment_BT",
    "context_BT",
  ],
  meta_fields=["stride", "uniform", "packed", "context_length"],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """A batch of sequences; all that attention may know of their slots.

  A segment's slots are contiguous in a row and in order. Neighbours are
  `stride` positions apart, or else `uniform` is False. Kernels rely on that to
  skip what cannot be visible.

  Attributes:
    hidden_BTD: hidden states, in the compute dtype.
    position_BT: int32, or float32 where they are means, in tokens of the
      original text; rotary embeddings and windows go by it.
    last_token_position_BT: int32, of the last token that is in the slot; the
      causal order goes by it, and nothing else does (in a bidirectional funnel
      it is the anchor's).
    segment_BT: int32; tokens see only their own segment; 0 is padding, which
      sees and is seen by none.
    context_BT: bool, the tokens of a span that a reducer may drop, such as
      demonstrations; None is no span.
    stride: positions between neighbouring slots of a segment: 1, or the
      stride of the funnel that the stream is in.
    uniform: whether all neighbours are exactly `stride` apart, by position and
      by end. If not, they are `stride` or more, but for the first two and last
      two of a segment, which are at least 1 apart.
    packed: False promises that one segment fills every row, so that segments
      need no masking.
    context_length: how many tokens of a span each row has at least.
  """

  hidden_BTD: jax.Array | None
  position_BT: jax.Array
  last_token_position_BT: jax.Array
  segment_BT: jax.Array
  context_BT: jax.Array | None = None
  stride: int = 1
  uniform: bool = True
  packed: bool = True
  context_length: int = 0

  def replace(self, **changes) -> "Stream":
    return dataclasses.replace(self, **changes)

  def slots(self) -> "Stream":
    """Where its slots stand: no hidden states, no span."""
    return self.replace(hidden_BTD=None, context_BT=None, context_length=0)


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
  context_BT: jax.Array | None = None,
  context_length: int = 0,
) -> Stream:
  """A stream of unreduced tokens; positions default to ranks in the segment."""
  packed = segment_BT is not None
  if segment_BT is None:
    segment_BT = jnp.ones(hidden_BTD.shape[:2], jnp.int32)
  if position_BT is None:
    position_BT = rank(segment_BT)
  return Stream(
    hidden_BTD,
    position_BT,
    position_BT,
    segment_BT,
    context_BT,
    packed=packed,
    context_length=context_length,
  )


def round_span(least: int, length: int) -> int:
  """`Stream.context_length` of rows of `length` slots with `least` of a span.

  Rounded down to a 64th of the row: programs differ by it.
  """
  step = max(1, length // _SPAN_STEPS)
  return least // step * step


def take(x_BT: jax.Array, index: jax.Array) -> jax.Array:
  """x_BT at `index` >= 0 along axis 1, by row; beyond the end is the end."""
  expand = (...,) + (None,) * (x_BT.ndim - 2)
  return jnp.take_along_axis(x_BT, index[expand], axis=1, mode="clip")


def last_slot(stream: Stream) -> jax.Array:
  """int32 [B]: each row's last slot that is no padding; -1 for none."""
  slot_1T = jnp.arange(stream.segment_BT.shape[1], dtype=jnp.int32)[None]
  return jnp.max(jnp.where(stream.segment_BT != 0, slot_1T, -1), axis=1)


def take_slots(stream: Stream, index_BS: jax.Array) -> Stream:
  """The stream at `index_BS`; below 0 is padding."""
  at = jax.tree.map(lambda x_BT: take(x_BT, jnp.maximum(index_BS, 0)), stream)
  return at.replace(segment_BT=jnp.where(index_BS >= 0, at.segment_BT, 0))
