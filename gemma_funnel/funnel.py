"""The funnel: make a sequence short, run layers on it, make it long again.

`Stage.reduce` turns a stream into a short one, together with the short slot
that each token reads back; `Stage.restore` undoes it with that one index.
`walk` strings layers and stages together. Blocks and attention know of streams
only, never of funnels.

Grouping, with `rank` the place of a slot within its segment and k the stride:
slots with rank % k == 0 are anchors, one a group, and slot t reads back the
group of the newest anchor at or before it. A causal group holds the anchor and
the k-1 slots before it, so that no token reads its own future (the shifted
pooling of Hourglass, arXiv 2110.13711); a bidirectional group holds the anchor
and the k-1 slots after it (Funnel-Transformer, arXiv 2006.03236). A segment's
first slot is an anchor: in a causal funnel it is alone in its group, elsewhere
where `keep_first` says so (anchors are then rank 0, 1, k+1, 2k+1, ...).

A reduction of another kind needs a name in `config.POOLS` and a case in
`Stage.reduce`: if it chooses slots, `select` does the rest.
"""

from collections.abc import Callable, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import params
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.layers import (
  Attention,
  Look,
  RMSNorm,
  make_look,
  normalize,
  rope_angles,
)
from gemma_funnel.stream import Stream, rank, take

# What a slot reads back that has no deep state: itself, as it was before.
BYPASS = -1


@dataclasses.dataclass(frozen=True)
class Run:
  """Layers [start, stop), on the stream of the open `stages`.

  `query_only`: on the stream's queries, and keys from before its reduction.
  """

  start: int
  stop: int
  stages: tuple[int, ...] = ()
  query_only: bool = False


@dataclasses.dataclass(frozen=True)
class Reduce:
  """Stage `stage` begins."""

  stage: int


@dataclasses.dataclass(frozen=True)
class Restore:
  """Stage `stage` ends."""

  stage: int


def schedule(
  stages: Sequence[FunnelConfig], num_layers: int
) -> list[Run | Reduce | Restore]:
  """What a model with these (resolved) stages does, in order.

  A stage that is never restored has no `Restore`.
  """
  steps, open_stages, at = [], [], 0

  def run_to(layer):
    nonlocal at
    if at < layer and steps and isinstance(steps[-1], Reduce):
      if stages[steps[-1].stage].pool_query_only:
        steps.append(Run(at, at + 1, tuple(open_stages), query_only=True))
        at += 1
    if at < layer:
      steps.append(Run(at, layer, tuple(open_stages)))
      at = layer

  def close_to(layer):
    while open_stages and stages[open_stages[-1]].stop <= layer:
      run_to(stages[open_stages[-1]].stop)
      stage = open_stages.pop()
      if stages[stage].recover != "none":
        steps.append(Restore(stage))

  for number, stage in enumerate(stages):
    close_to(stage.start)
    run_to(stage.start)
    steps.append(Reduce(number))
    open_stages.append(number)
  close_to(num_layers)
  run_to(num_layers)
  return steps


def walk(
  steps: Sequence[Run | Reduce | Restore],
  stream: Stream,
  run: Callable[[Run, Stream, Stream | None], Stream],
  reduce: Callable[[int, Stream], tuple[Stream, jax.Array]],
  restore: Callable[[int, Stream, Stream, jax.Array], Stream],
) -> Stream:
  """The trunk, for whatever runs it: layers, and what the stages do between.

  Args:
    steps: from `schedule`.
    stream: what enters the first layer.
    run: (which layers, stream, keys) -> stream; keys are the stream from before
      the reduction for a query-only run, and None otherwise.
    reduce: (stage, stream) -> (short stream, read_BT).
    restore: (stage, deep stream, stream from before, read_BT) -> stream.
  """
  before = []
  for step in steps:
    match step:
      case Run():
        keys = before[-1][0] if step.query_only else None
        stream = run(step, stream, keys)
      case Reduce(stage):
        short, read_BT = reduce(stage, stream)
        before.append((stream, read_BT))
        stream = short
      case Restore(stage):
        stream = restore(stage, stream, *before.pop())
  return stream


class Stage(nnx.Module):
  """One stage's reduction and recovery, with what they learn.

  Attributes:
    funnel: its configuration.
    pool_query: [D], of pool "attention"; zero at first, which is the mean.
    gate: [D], of recover "gate"; zero at first, which is the average.
    attend: of recover "attend"; at first it adds nothing to the average.
  """

  def __init__(
    self, config: TransformerConfig, funnel: FunnelConfig, rngs: nnx.Rngs
  ):
    self.config = config
    self.funnel = funnel
    if funnel.pool == "attention":
      self.pool_query = nnx.Param(params.init("funnel/*/pool_query", config))
    if funnel.recover == "gate":
      self.gate = nnx.Param(params.init("funnel/*/gate", config))
    if funnel.recover == "attend":
      self.attend = CrossAttention(config, rngs)

  @property
  def selects(self) -> bool:
    """Whether slots are chosen, and not pooled: the others bypass the stage."""
    return self.funnel.pool == "every"

  def reduce(self, stream: Stream, causal: bool) -> tuple[Stream, jax.Array]:
    """Makes a stream short.

    Rows have R = `num_groups` slots. That holds every group of rows that hold
    a single segment, wherever it starts, and of rows in which each segment has
    room for as many groups as it needs (`check_segments`).

    Args:
      stream: the sequence, T slots.
      causal: whether groups end or begin at their anchor.

    Returns:
      The short stream, and int32 read_BT: the short slot each slot reads back,
      or BYPASS. A group has the segment of its anchor, and pools the slots of
      that segment alone.
    """
    anchor_BR, read_BT = self._anchors(stream, causal)
    if self.selects:
      return self._select(stream, anchor_BR, causal)
    return self.pool(stream, anchor_BR, causal), read_BT

  def _select(self, stream: Stream, keep_BR: jax.Array, causal: bool):
    return select(
      stream,
      keep_BR,
      spacing=stream.spacing * self.funnel.stride,
      even=stream.even and not self._keeps_first_apart(causal),
      packed=stream.packed,
    )

  def _keeps_first_apart(self, causal: bool) -> bool:
    return self.funnel.keep_first and not causal

  def _anchors(self, stream: Stream, causal: bool):
    """(anchor_BR, read_BT): anchors' slots in order, and who reads which group.

    T, past the end, is the anchor of a group that does not exist.
    """
    stride, length = self.funnel.stride, stream.segment_BT.shape[1]
    slot_1T = jnp.arange(length, dtype=jnp.int32)[None]
    rank_BT = rank(stream.segment_BT)
    if self._keeps_first_apart(causal):
      starts_BT = (rank_BT == 0) | ((rank_BT - 1) % stride == 0)
    else:
      starts_BT = rank_BT % stride == 0
    is_anchor_BT = starts_BT & (stream.segment_BT != 0)
    read_BT = jnp.maximum(jnp.cumsum(is_anchor_BT, axis=1) - 1, 0)
    anchor_BT = jnp.sort(jnp.where(is_anchor_BT, slot_1T, length), axis=1)
    return anchor_BT[:, : num_groups(length, self.funnel, causal)], read_BT

  def pool(self, stream: Stream, anchor_BR: jax.Array, causal: bool) -> Stream:
    """One slot for each anchor's group, pooled as the configuration says."""
    stride, length = self.funnel.stride, stream.segment_BT.shape[1]
    offset_k = jnp.arange(stride) - (stride - 1 if causal else 0)
    slot_BRk = anchor_BR[..., None] + offset_k[None, None]
    of_group = lambda x_BT: take(
      x_BT, slot_BRk.reshape(len(slot_BRk), -1)
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
    if self._keeps_first_apart(causal):
      alone_BR = take(rank(stream.segment_BT), anchor_BR) == 0
      counts_BRk &= ~alone_BR[..., None] | (offset_k == 0)[None, None]
    hidden_BRkD = of_group(stream.hidden_BTD)
    position_BR, even = self._position(
      stream, anchor_BR, of_group(stream.position_BT), counts_BRk, causal
    )
    return stream.replace(
      hidden_BTD=self._pool_group(hidden_BRkD, counts_BRk),
      position_BT=position_BR,
      end_BT=take(stream.end_BT, anchor_BR),
      segment_BT=segment_BR,
      spacing=stream.spacing * stride,
      even=even,
    )

  def newest(self, window: Stream) -> Stream:
    """The causal group that ends with the last of `stride` slots."""
    batch, length = window.segment_BT.shape
    anchor_B1 = jnp.full((batch, 1), length - 1, jnp.int32)
    if self.selects:
      return self._select(window, anchor_B1, causal=True)[0]
    return self.pool(window, anchor_B1, causal=True)

  def _pool_group(self, x_BRkD: jax.Array, counts_BRk: jax.Array) -> jax.Array:
    """[B, R, D] of the k slots of each group that count; none give 0."""
    weight_BRk = counts_BRk.astype(jnp.float32)
    index_k = jnp.arange(counts_BRk.shape[2])[None, None]
    match self.funnel.pool:
      case "max":
        lowest = jnp.finfo(x_BRkD.dtype).min
        top_BRD = jnp.max(
          jnp.where(counts_BRk[..., None], x_BRkD, lowest), axis=2
        )
        return jnp.where(jnp.any(counts_BRk, axis=2)[..., None], top_BRD, 0)
      case "first":
        chosen_BR1 = jnp.argmax(counts_BRk, axis=2, keepdims=True)
        weight_BRk *= index_k == chosen_BR1
      case "last":
        last_BR1 = jnp.max(
          jnp.where(counts_BRk, index_k, 0), axis=2, keepdims=True
        )
        weight_BRk *= index_k == last_BR1
      case "attention":
        logit_BRk = jnp.einsum(
          "BRkD,D->BRk",
          normalize(x_BRkD, self.config.norm_eps),
          self.pool_query[...].astype(jnp.float32),
        )
        top_BR1 = jnp.max(
          jnp.where(counts_BRk, logit_BRk, -jnp.inf), axis=2, keepdims=True
        )
        shifted_BRk = logit_BRk - jax.lax.stop_gradient(top_BR1)
        weight_BRk *= jnp.exp(jnp.where(counts_BRk, shifted_BRk, 0))
    total_BR1 = jnp.sum(weight_BRk, axis=2)[..., None]
    sum_BRD = jnp.sum(
      weight_BRk[..., None] * jnp.where(counts_BRk[..., None], x_BRkD, 0),
      axis=2,
    )
    return (sum_BRD / jnp.where(total_BR1 > 0, total_BR1, 1)).astype(
      x_BRkD.dtype
    )

  def _position(self, stream, anchor_BR, position_BRk, counts_BRk, causal):
    """(position_BR, whether they are even) of groups.

    By the rule "last", a bidirectional group that is cut short by the end of
    its segment has the position its last slot would have: groups are then
    evenly spaced, which all kernels can use.
    """
    rule = self.funnel.position
    position_BR = take(stream.position_BT, anchor_BR)
    if rule == "last" and causal:
      return position_BR, stream.even
    if rule == "last" and stream.even:
      last_BR = position_BR + (self.funnel.stride - 1) * stream.spacing
      if self._keeps_first_apart(causal):
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

  def restore(
    self, deep: Stream, before: Stream, read_BT: jax.Array, causal: bool
  ) -> Stream:
    """Gives every slot its group's deep state back.

    Args:
      deep: the short stream after the stage's layers.
      before: the stream that was reduced.
      read_BT: the short slot each slot reads, from `reduce`.
      causal: whether the attention of "attend" is.

    Returns:
      A stream like `before`, with the recovered hidden states.
    """
    u_BTD = take(deep.hidden_BTD, jnp.maximum(read_BT, 0))
    extra_BTD = None
    if self.funnel.recover == "attend":
      see = make_look(self.config, before, deep, causal)
      extra_BTD = self.attend(before, self.attend.keys_values(deep), see)
    return self.recover(u_BTD, before, read_BT == BYPASS, extra_BTD)

  def recover(self, u_BTD, before: Stream, bypass_BT, extra_BTD) -> Stream:
    """`before` with its states h and deep states u made one."""
    h_BTD = before.hidden_BTD
    match self.funnel.recover:
      case "average":
        hidden_BTD = (u_BTD + h_BTD) * 0.5
      case "add":
        hidden_BTD = u_BTD + h_BTD
      case "repeat":
        hidden_BTD = u_BTD
      case "gate":
        s_D = jax.nn.sigmoid(self.gate[...].astype(jnp.float32))
        s_11D = s_D[None, None].astype(h_BTD.dtype)
        hidden_BTD = s_11D * u_BTD + (1 - s_11D) * h_BTD
      case "attend":
        hidden_BTD = (u_BTD + h_BTD) * 0.5 + extra_BTD
    hidden_BTD = jnp.where(bypass_BT[..., None], h_BTD, hidden_BTD)
    return before.replace(hidden_BTD=hidden_BTD)


class CrossAttention(nnx.Module):
  """Attention of a full stream to the deep states of a short one.

  Its output projection is zero at first.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.query_norm = RMSNorm(config, "funnel/*/attend/query_norm")
    self.key_norm = RMSNorm(config, "funnel/*/attend/key_norm")
    self.attn = Attention(config, rngs, "funnel/*/attend/attn")

  def keys_values(self, deep: Stream) -> tuple[jax.Array, jax.Array]:
    """(k_BRKH, v_BRKH) of the deep states."""
    rope = rope_angles(deep.position_BT, self.config)
    return self.attn.keys_values(self.key_norm(deep.hidden_BTD), rope)

  def __call__(self, before: Stream, keys_values, see: Look) -> jax.Array:
    """[B, T, D] for `before`; `see` is as for a block."""
    rope = rope_angles(before.position_BT, self.config)
    q_BTNH = self.attn.queries(self.query_norm(before.hidden_BTD), rope)
    return self.attn.output(see(q_BTNH, *keys_values))


def select(
  stream: Stream,
  keep_BR: jax.Array,
  *,
  spacing: int = 1,
  even: bool = False,
  packed: bool = True,
) -> tuple[Stream, jax.Array]:
  """Shortens a stream to some of its slots; the others bypass the stage.

  Args:
    stream: the sequence, T slots.
    keep_BR: int32, the kept slots of each row in order; T and above for none.
    spacing, even, packed: of the kept slots, as in `Stream`.

  Returns:
    (short stream, read_BT), as `Stage.reduce`.
  """
  length = stream.segment_BT.shape[1]
  exists_BR = keep_BR < length
  short = stream.replace(
    hidden_BTD=take(stream.hidden_BTD, keep_BR),
    position_BT=take(stream.position_BT, keep_BR),
    end_BT=take(stream.end_BT, keep_BR),
    segment_BT=jnp.where(exists_BR, take(stream.segment_BT, keep_BR), 0),
    spacing=spacing,
    even=even,
    packed=packed,
  )
  row_B1 = jnp.arange(len(keep_BR))[:, None]
  slot_1R = jnp.arange(keep_BR.shape[1], dtype=jnp.int32)[None]
  nothing_BT = jnp.full(stream.segment_BT.shape, BYPASS, jnp.int32)
  read_BT = nothing_BT.at[row_B1, keep_BR].set(
    jnp.broadcast_to(slot_1R, keep_BR.shape), mode="drop"
  )
  return short, read_BT


def num_groups(length: int, funnel: FunnelConfig, causal: bool) -> int:
  """Slots that a row of `length` slots is reduced to."""
  if funnel.keep_first and not causal:
    return 1 + -(-(length - 1) // funnel.stride)
  return -(-length // funnel.stride)


def short_lengths(
  length: int, stages: Sequence[FunnelConfig], causal: bool
) -> list[int]:
  """Slots of a row of `length` tokens within each stage, those around it too."""
  found = []
  for number, funnel in enumerate(stages):
    slots = length
    around = [s for s in stages[:number] if funnel.start < s.stop]
    for stage in (*around, funnel):
      slots = num_groups(slots, stage, causal)
    found.append(slots)
  return found


def check_segments(
  segment_BT: np.ndarray, stages: Sequence[FunnelConfig], causal: bool
) -> None:
  """Checks host segments for what a `Stream` promises.

  Raises:
    ValueError: a segment in two pieces, a negative id, or more groups in a row
      than a reduction has slots for; it names the row.
  """
  for row, segment_T in enumerate(segment_BT):
    cuts = np.flatnonzero(np.diff(segment_T)) + 1
    runs = [run for run in np.split(segment_T, cuts) if run[0] != 0]
    ids = [int(run[0]) for run in runs]
    if len(set(ids)) != len(ids) or min(ids, default=1) < 0:
      raise ValueError(
        f"row {row} has the segments {ids}: expected each to be one "
        "contiguous run of a positive id (0 is padding)"
      )
    for number, funnel in enumerate(stages):
      slots, lengths = len(segment_T), [len(run) for run in runs]
      around = [s for s in stages[:number] if funnel.start < s.stop]
      for stage in (*around, funnel):
        slots = num_groups(slots, stage, causal)
        lengths = [num_groups(n, stage, causal) for n in lengths]
        if sum(lengths) > slots:
          apart = stage.keep_first and not causal
          raise ValueError(
            f"row {row} needs {sum(lengths)} groups of {stage.stride} tokens "
            f"and has room for {slots}: start its segments at multiples of "
            "the total stride"
            + (", and leave a stride of padding" if apart else "")
          )
