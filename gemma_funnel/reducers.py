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
from gemma_funnel.config import KEYS, TransformerConfig
from gemma_funnel.layers import LAST_QUERIES
from gemma_funnel.numerics import normalize
from gemma_funnel.registry import REDUCERS
from gemma_funnel.stream import Stream, last_slot, rank, take, take_slots

# A slot that reads this back has no deep state: it stays as it was before.
BYPASS = -1
# What a layer can be asked for (`layers.make_attention_fn`), and the queries at
# a row's end that it is of; 0 is all.
NEEDS = {"attention_received": 0, "attention_of_last": LAST_QUERIES}


# Of neighbouring slots, whose scores "last_queries" takes the mean of.
_NEIGHBOURS = 7


class Step(NamedTuple):
  """A reducer's answer to one further slot in decoding.

  Attributes:
    state: after it.
    short: the short stream's one slot [B, 1]; any values where not `due`.
    due: bool, whether the stage runs on it: a scalar, or [B] where rows differ
      (those that it does not run on have segment 0 in `short`); None is always.
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
    options: fields of `FunnelConfig` that it honours, besides those that all
      do; others raise when they are set.
    recover: the recovery where the configuration names none.
    keys: values of `FunnelConfig.keys` that make sense with it, its default
      first.
    needs: names of `NEEDS`: collected from a layer before the stage.
    trains: whether a loss may be taken at every token; False for a choice that
      looks at later tokens, or needs what training data do not have.
    decodes: whether `init_state` and `step` exist.
    by_row: whether its steps are due for some rows and not for others.
    packs: whether rows may hold several segments.
    bidirectional: whether it knows streams that are not causal.
    rows: the parameters that it learns.
  """

  options: tuple[str, ...] = ()
  recover: str = "average"
  keys: tuple[str, ...] = KEYS
  needs: tuple[str, ...] = ()
  trains: bool = True
  decodes: bool = False
  by_row: bool = False
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

  def cache_length(self, length: int, stream: Stream, further: int) -> int:
    """Short slots that decoding has room for.

    Args:
      length: slots of the long stream that a row may come to have.
      stream: the prompt's.
      further: slots that a row may come to have after that.
    """
    return self.length(length, True)

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


def slots_of(chosen_BT: jax.Array, count: int) -> jax.Array:
  """int32 [B, count]: the first chosen slots in order; T for none."""
  size = chosen_BT.shape[1]
  slot_1T = jnp.arange(size, dtype=jnp.int32)[None]
  return jnp.sort(jnp.where(chosen_BT, slot_1T, size), axis=1)[:, :count]


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

  options = ("stride", "keep_first", "position")
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

  def step(self, state, stream):
    stride = self.stage.stride
    join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1)
    window = jax.tree.map(join, state.slots, self._pending(stream))
    anchor_B1 = jnp.full((len(window.segment_BT), 1), stride - 1, jnp.int32)
    short, _ = self.shrink(window, anchor_B1, None, causal=True)
    count = (state.count + 1) % stride
    pending = jax.tree.map(lambda x_BT: x_BT[:, 1:], window)
    return Step(Pending(pending, count), short, count == 0)


@REDUCERS.register("strided")
class Strided(Groups):
  """selects each stride-th slot; the others bypass the stage (token dropping,
  arXiv 2203.13240)"""

  options = ("stride", "keep_first")

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


class OfPrompt(Reducer):
  """Chooses among the slots of a prompt; further slots all go on."""

  recover = "repeat"
  decodes = True

  def cache_length(self, length, stream, further):
    slots = stream.segment_BT.shape[1]
    kept = self.length(slots, True, stream.context_length)
    return min(length, kept + further)

  def init_state(self, stream, phase):
    return ()

  def step(self, state, stream):
    short = stream.slots().replace(
      hidden_BTD=stream.hidden_BTD, uniform=False, packed=True
    )
    return Step(state, short, None)


@REDUCERS.register("all")
class All(OfPrompt):
  """every slot goes on: for `keys` and `layers`"""

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return length

  def reduce(self, stream, aux, causal):
    slot_1T = jnp.arange(stream.segment_BT.shape[1], dtype=jnp.int32)[None]
    return stream, jnp.broadcast_to(slot_1T, stream.segment_BT.shape)

  def step(self, state, stream):
    return Step(state, stream, None)


@REDUCERS.register("context")
class ContextDrop(OfPrompt):
  """drops a span of tokens, such as demonstrations, which bypasses the stage
  (Sia et al., arXiv 2403.04510)

  BOS and all that is outside of the span go on, with their own positions.
  Tokens say which they are (`Stream.context_BT`).
  """

  trains = False

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return length - context_length

  def cache_length(self, length, stream, further):
    return self.length(length, True, stream.context_length)

  def reduce(self, stream, aux, causal):
    if stream.context_BT is None:
      raise ValueError(
        f"funnel.reduce='context' at layer {self.stage.start}: expected a span "
        "of tokens to drop (context), of a stage that is in no other"
      )
    kept_BT = (stream.segment_BT != 0) & ~stream.context_BT
    size = kept_BT.shape[1]
    length = self.length(size, causal, stream.context_length)
    return select(stream, slots_of(kept_BT, length), stride=stream.stride)


@REDUCERS.register("tail")
class Tail(OfPrompt):
  """the last slots of a row, whose logits are wanted; keys and values are of
  all slots, as they entered the stage (SwiftKV, arXiv 2410.03960)

  Others bypass the stage. What it computes is what "all" computes with the
  same keys, which can be trained at every token.
  """

  options = ("last",)
  keys = ("before",)
  trains = False
  packs = False

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return min(length, self.stage.last)

  def reduce(self, stream, aux, causal):
    size = stream.segment_BT.shape[1]
    slot_1T = jnp.arange(size, dtype=jnp.int32)[None]
    from_B1 = last_slot(stream)[:, None] - self.stage.last
    kept_BT = (stream.segment_BT != 0) & (slot_1T > from_B1)
    keep_BR = slots_of(kept_BT, self.length(size, causal))
    return select(stream, keep_BR, stride=stream.stride)


class Scored(OfPrompt):
  """The slots of the highest scores; the others bypass the stage.

  A row of n slots that are no padding keeps `keep` n, rounded up, whatever
  batch and padding it is in. A row's first slot and its last `always` are
  kept in any case.

  Attributes:
    always: how many slots at the end.
  """

  options = ("keep",)
  trains = False
  packs = False
  always: int = 1

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return min(length, max(self._part(length), self.always + 1))

  def _part(self, count):
    """`keep` of a number of slots, rounded up; of an array too."""
    return -(-count * round(1000 * self.stage.keep) // 1000)

  def score(self, stream: Stream, aux, causal: bool) -> jax.Array:
    """float32 [B, T], >= 0."""
    raise NotImplementedError

  def reduce(self, stream, aux, causal):
    real_BT = stream.segment_BT != 0
    size = real_BT.shape[1]
    slot_1T = jnp.arange(size, dtype=jnp.int32)[None]
    ends_BT = slot_1T > last_slot(stream)[:, None] - self.always
    score_BT = self.score(stream, aux, causal)
    fixed_BT = ends_BT | (rank(stream.segment_BT) == 0)
    score_BT = jnp.where(fixed_BT, jnp.inf, score_BT)
    length = self.length(size, causal)
    _, best_BR = jax.lax.top_k(jnp.where(real_BT, score_BT, -1), length)
    count_B1 = jnp.sum(real_BT, axis=1, keepdims=True)
    count_B1 = jnp.minimum(
      count_B1, jnp.maximum(self._part(count_B1), self.always + 1)
    )
    place_1R = jnp.arange(length)[None]
    keep_BR = jnp.sort(jnp.where(place_1R < count_B1, best_BR, size), axis=1)
    return select(stream, keep_BR, stride=stream.stride)


@REDUCERS.register("last_queries")
class LastQueries(Scored):
  """the slots that a prompt's last 8 queries attend to most, by 7 neighbours,
  and these 8 (SnapKV, arXiv 2404.14469; FastKV, arXiv 2502.01068)"""

  needs = ("attention_of_last",)
  always = LAST_QUERIES

  def score(self, stream, aux, causal):
    score_BT = aux["attention_of_last"]
    sum_BT = jax.lax.reduce_window(
      score_BT, 0.0, jax.lax.add, (1, _NEIGHBOURS), (1, 1), "SAME"
    )
    return sum_BT / _NEIGHBOURS


@REDUCERS.register("received")
class Received(Scored):
  """the slots that receive most attention (PoWER-BERT, arXiv 2001.08950; LTP,
  arXiv 2107.00910)

  Of an encoder. Where the future is hidden, what a slot receives is divided by
  the number of slots that see it.
  """

  needs = ("attention_received",)

  def score(self, stream, aux, causal):
    received_BT = aux["attention_received"]
    if not causal:
      return received_BT
    slot_1T = jnp.arange(received_BT.shape[1])[None]
    seen_BT = last_slot(stream)[:, None] + 1 - slot_1T
    return received_BT / jnp.maximum(seen_BT, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundaries:
  """What a stage of "boundary" waits with.

  Attributes:
    hidden_B1D: of the newest slot.
    rank_B: int32, its place in its row.
    count_B: int32, boundaries up to it.
  """

  hidden_B1D: jax.Array
  rank_B: jax.Array
  count_B: jax.Array


@REDUCERS.register("boundary")
class Boundary(Reducer):
  """slots that are unlike the one before, by their states (H-Net, arXiv
  2507.07955, of tokens as in ConceptMoE, arXiv 2601.21420); the others read
  the newest of them

  The probability of a boundary is (1 - cos(h[t-1], h[t])) / 2, and 1 at a
  segment's first slot. There is one where it is `threshold` at least and no
  more than one slot in `stride` has been one so far: a budget that each slot
  can tell without the slots after it, so that decoding makes the same choice.
  """

  options = ("stride", "threshold")
  recover = "delta"
  keys = ("own", "before", "none")
  decodes = True
  by_row = True
  bidirectional = False

  @property
  def period(self) -> int:
    return self.stage.stride

  def length(self, length: int, causal: bool, context_length: int = 0) -> int:
    return -(-length // self.stage.stride)

  def cache_length(self, length, stream, further):
    return length  # An entry of one row is one of all rows.

  def reduce(self, stream, aux, causal):
    size = stream.segment_BT.shape[1]
    rank_BT = rank(stream.segment_BT)
    before_BTD = jnp.pad(stream.hidden_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    wants_BT = self._wants(before_BTD, stream.hidden_BTD) | (rank_BT == 0)
    wants_BT &= stream.segment_BT != 0
    # Within a segment, count[t] = min(count[t-1] + wants[t], budget[t]): the
    # least, over s <= t, of budget[s] and all that is wanted after s.
    budget_BT = rank_BT // self.stage.stride + 1
    total_BT = jnp.cumsum(wants_BT, axis=1, dtype=jnp.int32)
    first_BT = (rank_BT == 0) & wants_BT
    base_BT = jax.lax.cummax(jnp.where(first_BT, total_BT - 1, 0), axis=1)
    spare_BT = budget_BT - (total_BT - base_BT)
    # Segments are told apart by a step down that no spare can make up for.
    step_BT = jnp.cumsum(first_BT, axis=1, dtype=jnp.int32) * 2 * (size + 1)
    least_BT = jax.lax.cummin(spare_BT - step_BT, axis=1) + step_BT
    count_BT = total_BT - base_BT + jnp.minimum(least_BT, 0)
    earlier_BT = jnp.where(
      rank_BT == 0, 0, jnp.pad(count_BT[:, :-1], ((0, 0), (1, 0)))
    )
    is_one_BT = (count_BT > earlier_BT) & (stream.segment_BT != 0)
    keep_BR = slots_of(is_one_BT, self.length(size, causal))
    short, _ = select(stream, keep_BR, stride=stream.stride)
    newest_BT = jnp.cumsum(is_one_BT, axis=1, dtype=jnp.int32) - 1
    return short, jnp.maximum(newest_BT, 0)

  def _wants(self, before_BTD, hidden_BTD) -> jax.Array:
    """bool [B, T]: whether the probability of a boundary is high enough."""
    return self.probability(before_BTD, hidden_BTD) >= self.stage.threshold

  def probability(self, before_BTD, hidden_BTD) -> jax.Array:
    """float32 [B, T], of slots and the ones before them."""
    x, y = (normalize(h, 1e-30) for h in (before_BTD, hidden_BTD))
    return (1 - jnp.mean(x * y, axis=-1)) / 2

  def init_state(self, stream, phase):
    at_B1 = last_slot(stream)[:, None]
    rank_B1 = take(rank(stream.segment_BT), at_B1)
    _, newest_BT = self.reduce(stream, {}, True)
    return Boundaries(
      take(stream.hidden_BTD, at_B1),
      rank_B1[:, 0],
      take(newest_BT, at_B1)[:, 0] + 1,
    )

  def step(self, state, stream):
    rank_B = state.rank_B + 1
    wants_B = self._wants(state.hidden_B1D, stream.hidden_BTD)[:, 0]
    due_B = wants_B & (state.count_B < rank_B // self.stage.stride + 1)
    short = stream.slots().replace(
      hidden_BTD=stream.hidden_BTD,
      segment_BT=jnp.where(due_B[:, None], stream.segment_BT, 0),
      uniform=False,
      packed=True,
    )
    count_B = state.count_B + due_B
    return Step(Boundaries(stream.hidden_BTD, rank_B, count_B), short, due_B)
