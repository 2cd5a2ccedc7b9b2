"""Reducers: how a stage makes a sequence short, one class each.

A reducer owns everything that depends on how it shortens: the length that
results, the reduction, the state that decoding waits with and its step, what it
needs of the layer before, and what it cannot do. Models, FLOP counts, caches
and kernels ask it. To add one, write a class and register its name:

  @REDUCERS.register("loudest")
  class Loudest(Reducer): ...

Grouping, with `rank` the place of a slot within its segment and k the stride:
slots with rank % k == 0 are anchors, one a group, and slot t reads back the
group of the newest anchor at or before it. A causal group holds the anchor and
the k-1 slots before it, so that no token reads its own future (the shifted
pooling of Hourglass, arXiv 2110.13711); a bidirectional group holds the anchor
and the k-1 slots after it (Funnel-Transformer, arXiv 2006.03236). A segment's
first slot is an anchor. It is alone in its group in a causal funnel, and with
`keep_first` in a bidirectional one (anchors then: rank 0, 1, k+1, 2k+1, ...).
"""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel import params
from gemma_funnel.config import TransformerConfig
from gemma_funnel.numerics import normalize
from gemma_funnel.registry import REDUCERS
from gemma_funnel.stream import Stream, last_slot, rank, take, take_slots

# A slot that reads this back has no deep state: it stays as it was before.
BYPASS = -1
# What a layer can be asked for; see `layers.Block`.
NEEDS = ("attention_received",)


class Step(NamedTuple):
  """A reducer's answer to one further slot in decoding.

  Attributes:
    state: after it.
    short: the short stream's one slot [B, 1]; any values where not `due`.
    due: bool scalar, whether the stage runs on it; None is always.
    bypasses: whether a slot that is not due bypasses the stage.
  """

  state: Any
  short: Stream
  due: jax.Array | None
  bypasses: bool = False


class Reducer(nnx.Module):
  """How a stage makes a stream short; a base class.

  Class attributes say what a reducer is capable of. What it cannot do raises
  by its name, before anything runs.

  Attributes:
    stage: the `FunnelConfig` of its stage.
    options: fields of `FunnelConfig` that it honours, besides `start`, `stop`
      and `recover`; others raise when they are set.
    recover: the recovery where the configuration names none.
    needs: names of `NEEDS`: collected from the layer before the stage.
    trains: whether a loss may be taken at every token; False for a choice that
      looks at later tokens, or needs what training data do not have.
    decodes: whether `init_state` and `step` exist.
    packs: whether rows may hold several segments.
    bidirectional: whether it knows streams that are not causal.
    rows: the parameters that it learns.
  """

  options: tuple[str, ...] = ()
  recover: str = "average"
  needs: tuple[str, ...] = ()
  trains: bool = True
  decodes: bool = False
  packs: bool = True
  bidirectional: bool = True
  rows: tuple[params.Row, ...] = ()

  def __init__(self, stage):
    self.stage = stage

  def learn(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
    """Makes the parameters of `rows`."""
    for row in self.rows:
      value = params.init(f"funnel/*/reducer/{row.path}", config, rngs)
      setattr(self, row.path, nnx.Param(value))

  @property
  def period(self) -> int:
    """Slots after which groups begin anew; rows decode in one phase of it."""
    return 1

  @property
  def rate(self) -> float:
    """Short slots for each slot, in the long run."""
    return 1 / self.period

  @property
  def weights(self) -> int:
    """Weights that each slot is multiplied by in matrix products."""
    return 0

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    """Slots that a row of `length` slots is reduced to: static.

    `context_length` is as in `Stream`.
    """
    raise NotImplementedError

  def reduce(
    self, stream: Stream, aux: dict[str, jax.Array], causal: bool
  ) -> tuple[Stream, jax.Array]:
    """Makes a stream short.

    Args:
      stream: T slots.
      aux: a value for each of `needs`.
      causal: whether no slot may read a later one.

    Returns:
      The short stream of `length` slots, and int32 gather_index_BT: the short
      slot that each slot reads back, or BYPASS.
    """
    raise NotImplementedError

  def init_state(self, stream: Stream, phase: jax.Array) -> Any:
    """What decoding waits with after a prompt.

    Args:
      stream: the prompt, as `reduce` took it.
      phase: int32 scalar, the rank of every row's last token modulo the
        funnel's total stride.
    """
    raise NotImplementedError

  def step(self, state: Any, stream: Stream) -> Step:
    """Takes one further slot of each row."""
    raise NotImplementedError


def select(
  stream: Stream,
  keep_BR: jax.Array,
  *,
  stride: int = 1,
  uniform: bool = False,
  packed: bool = True,
) -> tuple[Stream, jax.Array]:
  """Shortens a stream to some of its slots; the others bypass the stage.

  Args:
    stream: the sequence, T slots.
    keep_BR: int32, the kept slots of each row in order; T and above for none.
    stride, uniform, packed: of the kept slots, as in `Stream`.

  Returns:
    (short stream, gather_index_BT), as `Reducer.reduce`.
  """
  length = stream.segment_BT.shape[1]
  short = dataclasses.replace(
    stream.slots(),
    hidden_BTD=take(stream.hidden_BTD, keep_BR),
    position_BT=take(stream.position_BT, keep_BR),
    last_token_position_BT=take(stream.last_token_position_BT, keep_BR),
    segment_BT=jnp.where(keep_BR < length, take(stream.segment_BT, keep_BR), 0),
    stride=stride,
    uniform=uniform,
    packed=packed,
  )
  row_B1 = jnp.arange(keep_BR.shape[0])[:, None]
  slot_1R = jnp.arange(keep_BR.shape[1], dtype=jnp.int32)[None]
  nothing_BT = jnp.full(stream.segment_BT.shape, BYPASS, jnp.int32)
  gather_index_BT = nothing_BT.at[row_B1, keep_BR].set(
    jnp.broadcast_to(slot_1R, keep_BR.shape), mode="drop"
  )
  return short, gather_index_BT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
  """What a stage of groups waits with.

  Attributes:
    slots: the last stride - 1 slots of the stream that it reduces.
    count: int32 scalar, slots since the newest group ended.
  """

  slots: Stream
  count: jax.Array


class Groups(Reducer):
  """Groups of `stride` slots each, at anchors; what they become is `shrink`."""

  options = ("stride", "pool_query_only", "keep_first", "position")
  decodes = True

  @property
  def period(self) -> int:
    return self.stage.stride

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    if self.keeps_first_apart(causal):
      return 1 + -(-(length - 1) // self.stage.stride)
    return -(-length // self.stage.stride)

  def keeps_first_apart(self, causal: bool) -> bool:
    return self.stage.keep_first and not causal

  def reduce(self, stream, aux, causal):
    """As `Reducer.reduce`.

    A row holds every group of a single segment, wherever it starts, and of
    several segments if each has room for as many groups as it needs
    (`funnel.check_segments`). A group has the segment of its anchor, and pools
    the slots of that segment alone.
    """
    stride, length = self.stage.stride, stream.segment_BT.shape[1]
    slot_1T = jnp.arange(length, dtype=jnp.int32)[None]
    rank_BT = rank(stream.segment_BT)
    if self.keeps_first_apart(causal):
      starts_BT = (rank_BT == 0) | ((rank_BT - 1) % stride == 0)
    else:
      starts_BT = rank_BT % stride == 0
    is_anchor_BT = starts_BT & (stream.segment_BT != 0)
    gather_index_BT = jnp.maximum(jnp.cumsum(is_anchor_BT, axis=1) - 1, 0)
    # T, past the end, is the anchor of a group that does not exist.
    anchor_BT = jnp.sort(jnp.where(is_anchor_BT, slot_1T, length), axis=1)
    anchor_BR = anchor_BT[:, : self.length(length, causal)]
    return self.shrink(stream, anchor_BR, gather_index_BT, causal)

  def shrink(self, stream, anchor_BR, gather_index_BT, causal):
    """(short stream, gather_index_BT) of groups at `anchor_BR`; T is none."""
    raise NotImplementedError

  def init_state(self, stream, phase):
    stride = self.stage.stride
    back_k = jnp.arange(stride - 1, dtype=jnp.int32) - (stride - 2)
    at_Bk = last_slot(stream)[:, None] + back_k[None]
    pending = take_slots(self._pending(stream), at_Bk)
    return Pending(pending, phase // stream.stride % stride)

  def _pending(self, stream: Stream) -> Stream:
    return stream.replace(context_BT=None, context_length=0)

  def window(self, state: Pending, stream: Stream) -> Stream:
    """The newest `stride` slots; a query-only layer's keys."""
    join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1)
    return jax.tree.map(join, state.slots, self._pending(stream))

  def step(self, state, stream):
    stride = self.stage.stride
    window = self.window(state, stream)
    anchor_B1 = jnp.full((len(window.segment_BT), 1), stride - 1, jnp.int32)
    short, _ = self.shrink(window, anchor_B1, None, causal=True)
    count = (state.count + 1) % stride
    pending = jax.tree.map(lambda x_BT: x_BT[:, 1:], window)
    return Step(Pending(pending, count), short, count == 0)


@REDUCERS.register("strided")
class Strided(Groups):
  """selects each stride-th slot; the others bypass the stage (token dropping,
  arXiv 2203.13240)"""

  options = ("stride", "pool_query_only", "keep_first")

  def shrink(self, stream, anchor_BR, gather_index_BT, causal):
    return select(
      stream,
      anchor_BR,
      stride=stream.stride * self.stage.stride,
      uniform=stream.uniform and not self.keeps_first_apart(causal),
      packed=stream.packed,
    )

  def step(self, state, stream):
    return super().step(state, stream)._replace(bypasses=True)


class Pool(Groups):
  """One vector for the slots of a group; which is `pool`."""

  def pool(self, x_BRkD: jax.Array, counts_BRk: jax.Array) -> jax.Array:
    """[B, R, D] of the k slots of each group that count; none give 0."""
    weight_BRk = self.weigh(x_BRkD, counts_BRk)
    total_BR1 = jnp.sum(weight_BRk, axis=2)[..., None]
    sum_BRD = jnp.sum(
      weight_BRk[..., None] * jnp.where(counts_BRk[..., None], x_BRkD, 0),
      axis=2,
    )
    mean_BRD = sum_BRD / jnp.where(total_BR1 > 0, total_BR1, 1)
    return mean_BRD.astype(x_BRkD.dtype)

  def weigh(self, x_BRkD, counts_BRk) -> jax.Array:
    """float32 [B, R, k] >= 0, 0 where slots do not count."""
    raise NotImplementedError

  def shrink(self, stream, anchor_BR, gather_index_BT, causal):
    stride, length = self.stage.stride, stream.segment_BT.shape[1]
    offset_k = jnp.arange(stride) - (stride - 1 if causal else 0)
    slot_BRk = anchor_BR[..., None] + offset_k[None, None]
    of_group = lambda x_BT: take(
      x_BT, slot_BRk.reshape(slot_BRk.shape[0], -1)
    ).reshape(*slot_BRk.shape, *x_BT.shape[2:])
    segment_BR = jnp.where(
      anchor_BR < length, take(stream.segment_BT, anchor_BR), 0
    )
    counts_BRk = (
      (slot_BRk >= 0)
      & (slot_BRk < length)
      & (of_group(stream.segment_BT) == segment_BR[..., None])
      & (segment_BR != 0)[..., None]
    )
    if self.keeps_first_apart(causal):
      alone_BR = take(rank(stream.segment_BT), anchor_BR) == 0
      counts_BRk &= ~alone_BR[..., None] | (offset_k == 0)[None, None]
    hidden_BRkD = of_group(stream.hidden_BTD)
    position_BR, uniform = self._position(
      stream, anchor_BR, of_group(stream.position_BT), counts_BRk, causal
    )
    short = dataclasses.replace(
      stream.slots(),
      hidden_BTD=self.pool(hidden_BRkD, counts_BRk),
      position_BT=position_BR,
      last_token_position_BT=take(stream.last_token_position_BT, anchor_BR),
      segment_BT=segment_BR,
      stride=stream.stride * stride,
      uniform=uniform,
    )
    return short, gather_index_BT

  def _position(self, stream, anchor_BR, position_BRk, counts_BRk, causal):
    """(position_BR, whether they are uniform) of groups.

    By the rule "last", a bidirectional group that is cut short by the end of
    its segment has the position its last slot would have: groups are then
    evenly spaced, which all kernels can use.
    """
    rule = self.stage.position
    position_BR = take(stream.position_BT, anchor_BR)
    if rule == "last" and causal:
      return position_BR, stream.uniform
    if rule == "last" and stream.uniform:
      last_BR = position_BR + (self.stage.stride - 1) * stream.stride
      if self.keeps_first_apart(causal):
        first_BR = take(rank(stream.segment_BT), anchor_BR) == 0
        last_BR = jnp.where(first_BR, position_BR, last_BR)
      return last_BR, True
    masked = lambda other: jnp.where(counts_BRk, position_BRk, other)
    if rule == "last":
      return jnp.max(masked(position_BR[..., None]), axis=2), False
    if rule == "first":
      return jnp.min(masked(position_BR[..., None]), axis=2), False
    count_BR = jnp.maximum(jnp.sum(counts_BRk, axis=2), 1)
    return jnp.sum(masked(0), axis=2) / count_BR.astype(jnp.float32), False


@REDUCERS.register("mean")
class MeanPool(Pool):
  """the mean of a group's slots"""

  def weigh(self, x_BRkD, counts_BRk):
    return counts_BRk.astype(jnp.float32)


@REDUCERS.register("max")
class MaxPool(Pool):
  """the largest of each channel"""

  def pool(self, x_BRkD, counts_BRk):
    lowest = jnp.finfo(x_BRkD.dtype).min
    top_BRD = jnp.max(jnp.where(counts_BRk[..., None], x_BRkD, lowest), axis=2)
    return jnp.where(jnp.any(counts_BRk, axis=2)[..., None], top_BRD, 0)


@REDUCERS.register("first")
class FirstPool(Pool):
  """a group's first slot"""

  def weigh(self, x_BRkD, counts_BRk):
    index_k = jnp.arange(counts_BRk.shape[2])[None, None]
    chosen_BR1 = jnp.argmax(counts_BRk, axis=2, keepdims=True)
    return (counts_BRk & (index_k == chosen_BR1)).astype(jnp.float32)


@REDUCERS.register("last")
class LastPool(Pool):
  """a group's last slot"""

  def weigh(self, x_BRkD, counts_BRk):
    index_k = jnp.arange(counts_BRk.shape[2])[None, None]
    last_BR1 = jnp.max(jnp.where(counts_BRk, index_k, 0), axis=2, keepdims=True)
    return (counts_BRk & (index_k == last_BR1)).astype(jnp.float32)


@REDUCERS.register("attention")
class AttentionPool(Pool):
  """weighted by a learned query, which starts as the mean

  Attributes:
    pool_query: [D], zero at first.
  """

  rows = (params.vector("pool_query", "D", "funnel"),)

  def learn(self, config, rngs):
    super().learn(config, rngs)
    self.epsilon = config.norm_eps

  @property
  def weights(self) -> int:
    return self.pool_query.size

  def weigh(self, x_BRkD, counts_BRk):
    logit_BRk = jnp.einsum(
      "BRkD,D->BRk",
      normalize(x_BRkD, self.epsilon),
      self.pool_query[...].astype(jnp.float32),
    )
    top_BR1 = jnp.max(
      jnp.where(counts_BRk, logit_BRk, -jnp.inf), axis=2, keepdims=True
    )
    shifted_BRk = logit_BRk - jax.lax.stop_gradient(top_BR1)
    weight_BRk = jnp.exp(jnp.where(counts_BRk, shifted_BRk, 0))
    return counts_BRk.astype(jnp.float32) * weight_BRk


@REDUCERS.register("context")
class ContextDrop(Reducer):
  """drops a span of tokens, such as demonstrations, which bypasses the stage
  (Sia et al., arXiv 2403.04510)

  BOS and all that is outside of the span go on, with their own positions.
  Tokens say which they are (`Stream.context_BT`).
  """

  recover = "repeat"
  trains = False
  decodes = True

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return length - context_length

  def reduce(self, stream, aux, causal):
    if stream.context_BT is None:
      raise ValueError(
        f"funnel.reduce='context' at layer {self.stage.start}: expected a span "
        "of tokens to drop (context), of a stage that is in no other"
      )
    size = stream.segment_BT.shape[1]
    kept_BT = (stream.segment_BT != 0) & ~stream.context_BT
    slot_1T = jnp.arange(size, dtype=jnp.int32)[None]
    keep_BT = jnp.sort(jnp.where(kept_BT, slot_1T, size), axis=1)
    length = self.length(size, causal, stream.context_length)
    return select(stream, keep_BT[:, :length], stride=stream.stride)

  def init_state(self, stream, phase):
    return ()

  def step(self, state, stream):
    # A generated token is of no span.
    short = stream.slots().replace(
      hidden_BTD=stream.hidden_BTD, uniform=False, packed=True
    )
    return Step(state, short, None)
