"""The funnel: make a sequence short, run layers on it, make it long again.

A `Stage` has a reducer (`reducers.py`), which turns a stream into a short one
together with the short slot that each token reads back, and a recovery, which
makes the full length again from that one index. `layer_plan` and `run_trunk`
string layers and stages together. Blocks and attention know of streams only,
never of funnels.
"""

from collections.abc import Callable, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import config as config_lib
from gemma_funnel import params
from gemma_funnel.config import FunnelConfig, LayerSpec, TransformerConfig
from gemma_funnel.layers import (
  Attention,
  AttentionFn,
  RMSNorm,
  make_attention_fn,
  rope_angles,
)
from gemma_funnel.reducers import BYPASS
from gemma_funnel.registry import RECOVERIES, REDUCERS
from gemma_funnel.stream import Stream, take

Aux = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerRun:
  """Layers [start, stop), on the stream of the open `stages`.

  Attributes:
    keys: what they attend to: the stream's "own" slots, as it goes on; those
      from "before" the innermost stage's reduction; "none", not at all.
    needs: what the only one of them is asked for, of `reducers.NEEDS`.
  """

  start: int
  stop: int
  stages: tuple[int, ...] = ()
  keys: str = "own"
  needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reduce:
  """Stage `stage` begins."""

  stage: int


@dataclasses.dataclass(frozen=True)
class Upsample:
  """Stage `stage` ends."""

  stage: int


def layer_plan(
  stages: Sequence[FunnelConfig], config: TransformerConfig
) -> list[LayerRun | Reduce | Upsample]:
  """What a model with these (resolved) stages does, in order.

  A stage that is never upsampled has no `Upsample`. What a stage needs of a
  layer before it comes from the last one on the same stream that sees all
  tokens, or from the last one if none does.
  """
  steps, open_stages, at = [], [], 0

  def run(layers, keys, **options):
    for start, stop in config_lib.contiguous(layers):
      steps.append(LayerRun(start, stop, tuple(open_stages), keys, **options))

  def run_to(layer, needs=()):
    nonlocal at
    layers, keys = range(at, layer), "own"
    at = layer
    if open_stages:
      stage = stages[open_stages[-1]]
      layers = layers if stage.layers is None else stage.layers
      keys = stage.keys
      if keys == "first":
        keys = "own"
        if isinstance(steps[-1], Reduce):
          run(layers[:1], "before")
          layers = layers[1:]
    if needs:
      sees_all = lambda i: config.layers[layers[i]].window is None
      chosen = max(range(len(layers)), key=lambda i: (sees_all(i), i))
      run(layers[:chosen], keys)
      run(layers[chosen : chosen + 1], keys, needs=needs)
      layers = layers[chosen + 1 :]
    run(layers, keys)

  def close_to(layer):
    while open_stages and stages[open_stages[-1]].stop <= layer:
      run_to(stages[open_stages[-1]].stop)
      stage = open_stages.pop()
      if RECOVERIES[stages[stage].recover].upsamples:
        steps.append(Upsample(stage))

  for number, stage in enumerate(stages):
    close_to(stage.start)
    run_to(stage.start, REDUCERS[stage.reduce].needs)
    steps.append(Reduce(number))
    open_stages.append(number)
  close_to(config.num_layers)
  run_to(config.num_layers)
  return steps


def run_trunk(
  steps: Sequence[LayerRun | Reduce | Upsample],
  stream: Stream,
  run: Callable[[LayerRun, Stream, Stream | None], tuple[Stream, Aux]],
  reduce: Callable[[int, Stream, Aux], tuple[Stream, jax.Array]],
  upsample: Callable[[int, Stream, Stream, Stream, jax.Array], Stream],
) -> Stream:
  """Layers, and what the stages do between, for whoever computes them.

  Args:
    steps: from `layer_plan`.
    stream: what enters the first layer.
    run: (which layers, stream, keys) -> (stream, what was needed); keys are
      the stream from before the reduction where they attend to that, else None.
    reduce: (stage, stream, what it needs) -> (short stream, gather_index_BT).
    upsample: (stage, deep stream, short stream before its layers, stream before
      the reduction, gather_index_BT) -> stream.
  """
  before, aux = [], {}
  for step in steps:
    match step:
      case LayerRun():
        keys = before[-1][1] if step.keys == "before" else None
        stream, found = run(step, stream, keys)
        aux |= found
      case Reduce(stage):
        short, gather_index_BT = reduce(stage, stream, aux)
        before.append((short, stream, gather_index_BT))
        stream, aux = short, {}
      case Upsample(stage):
        stream = upsample(stage, stream, *before.pop())
  return stream


class Recovery(nnx.Module):
  """How every token gets a state back; a base class.

  Notation: h is a token's own state from before the reduction, p the short slot
  that it reads back as the reducer made it, u the same slot after the stage.

  Attributes:
    upsamples: whether the full length returns at all.
    attends: whether `attend` is called.
    rows: the parameters that it learns.
  """

  upsamples: bool = True
  attends: bool = False
  rows: tuple[params.Row, ...] = ()

  def learn(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
    """Makes the parameters of `rows`."""
    for row in self.rows:
      value = params.init(f"funnel/*/recovery/{row.path}", config, rngs)
      setattr(self, row.path, nnx.Param(value))

  def hold(self, u_BRD: jax.Array, p_BRD: jax.Array) -> jax.Array:
    """What tokens read of each short slot; decoding holds the newest."""
    del p_BRD
    return u_BRD

  def combine(
    self, held_BTD: jax.Array, h_BTD: jax.Array, **read: jax.Array | None
  ) -> jax.Array:
    """[B, T, D] of what is held and of h, in the dtype of h.

    Args:
      held_BTD: of the slot that each token reads.
      h_BTD: the token's own state.
      **read: `attended_BTD`, of a recovery that attends, and `offset_BT`,
        int32: how many slots ago the anchor of that slot is.
    """
    raise NotImplementedError

  def bypass(self, h_BTD: jax.Array) -> jax.Array:
    """States of tokens that bypassed the stage."""
    return h_BTD

  @property
  def vectors(self) -> int:
    """How many numbers its learned vectors have."""
    return 0 if self.attends else self._count(outputs=False)

  @property
  def weights(self) -> int:
    """Weights that each token is multiplied by, but for its attention."""
    return 0 if self.attends else self._count(outputs=True)

  def _count(self, outputs: bool) -> int:
    rows = [row for row in self.rows if bool(row.outputs) == outputs]
    return sum(getattr(self, row.path).size for row in rows)


@RECOVERIES.register("average")
class Average(Recovery):
  """(u + h) / 2"""

  def combine(self, held_BTD, h_BTD, **read):
    return (held_BTD + h_BTD) * 0.5


@RECOVERIES.register("add")
class Add(Recovery):
  """u + h"""

  def combine(self, held_BTD, h_BTD, **read):
    return held_BTD + h_BTD


@RECOVERIES.register("repeat")
class Repeat(Recovery):
  """u"""

  def combine(self, held_BTD, h_BTD, **read):
    return held_BTD


@RECOVERIES.register("delta")
class Delta(Recovery):
  """h + (u - p): the token's own state, and the stage's change of its slot

  At stride 1, where p is h, it is the plain model; "average" and "add" halve
  what the stage adds, against the token's own state. In float32.
  """

  def hold(self, u_BRD, p_BRD):
    return u_BRD.astype(jnp.float32) - p_BRD.astype(jnp.float32)

  def combine(self, held_BTD, h_BTD, **read):
    return (h_BTD.astype(jnp.float32) + held_BTD).astype(h_BTD.dtype)


@RECOVERIES.register("scaled_delta")
class ScaledDelta(Delta):
  """h + s (u - p), with a learned s a channel that starts at 1

  Attributes:
    scale: [D], s - 1.
  """

  rows = (params.vector("scale", "D", "funnel"),)

  def combine(self, held_BTD, h_BTD, **read):
    s_11D = 1 + self.scale[...].astype(jnp.float32)[None, None]
    return super().combine(s_11D * held_BTD, h_BTD)


@RECOVERIES.register("offset")
class Offset(Delta):
  """h + (u - p) + W u, with a learned W for each distance to the anchor, of
  low rank, which starts at zero (AU-Net, arXiv 2506.14761)

  The farthest distances share one.

  Attributes:
    down: [O, D, W].
    up: [O, W, D], zero at first.
  """

  rows = (
    params.matrix("down", "O D W", "funnel", "W", params.unit_inputs),
    params.matrix("up", "O W D", "funnel", "D", params.zeros),
  )

  def hold(self, u_BRD, p_BRD):
    delta_BRD = super().hold(u_BRD, p_BRD)
    return jnp.concatenate([delta_BRD, u_BRD.astype(jnp.float32)], axis=-1)

  def combine(self, held_BTD, h_BTD, *, offset_BT, **read):
    delta_BTD, u_BTD = jnp.split(held_BTD, 2, axis=-1)
    down_ODW, up_OWD = self.down[...], self.up[...]
    x_BTOW = jnp.einsum(
      "BTD,ODW->BTOW", u_BTD.astype(h_BTD.dtype), down_ODW.astype(h_BTD.dtype)
    )
    size = down_ODW.shape[0]
    own_BTO = jax.nn.one_hot(
      jnp.minimum(offset_BT, size - 1), size, dtype=h_BTD.dtype
    )
    w_BTD = jnp.einsum(
      "BTOW,OWD->BTD", x_BTOW * own_BTO[..., None], up_OWD.astype(h_BTD.dtype)
    )
    return super().combine(delta_BTD + w_BTD.astype(jnp.float32), h_BTD)


@RECOVERIES.register("affine")
class Affine(Repeat):
  """u; a token that bypasses the stage has A h + c, which starts as h: what
  the stage would have made of it, linearly (arXiv 2303.09435)

  `python -m gemma_funnel.study.calibrate` finds A and c on a text.

  Attributes:
    map: [D, D], A - 1 transposed.
    shift: [D], c.
  """

  rows = (
    params.matrix("map", "D d", "funnel", "d", params.zeros),
    params.vector("shift", "D", "funnel"),
  )

  def bypass(self, h_BTD):
    map_Dd = self.map[...].astype(h_BTD.dtype)
    moved_BTD = jnp.einsum("BTD,Dd->BTd", h_BTD, map_Dd)
    return h_BTD + moved_BTD + self.shift[...].astype(h_BTD.dtype)[None, None]


@RECOVERIES.register("gate")
class Gate(Recovery):
  """s u + (1 - s) h, with a learned s a channel that starts at 1/2

  Attributes:
    gate: [D], zero at first; s is its sigmoid.
  """

  rows = (params.vector("gate", "D", "funnel"),)

  def combine(self, held_BTD, h_BTD, **read):
    s_D = jax.nn.sigmoid(self.gate[...].astype(jnp.float32))
    s_11D = s_D[None, None].astype(h_BTD.dtype)
    return s_11D * held_BTD + (1 - s_11D) * h_BTD


@RECOVERIES.register("attend")
class Attend(Recovery):
  """the average, and a learned attention of h to the deep states it may see,
  which starts at zero

  Attributes:
    attend: the attention.
  """

  attends = True
  rows = (
    *params.attention("attend/attn", "", "funnel", params.zeros),
    params.vector("attend/query_norm/scale", "D", "funnel"),
    params.vector("attend/key_norm/scale", "D", "funnel"),
  )

  def learn(self, config, rngs):
    self.attend = CrossAttention(config, rngs)

  def combine(self, held_BTD, h_BTD, *, attended_BTD, **read):
    return (held_BTD + h_BTD) * 0.5 + attended_BTD


@RECOVERIES.register("none")
class Nothing(Recovery):
  """the sequence stays short: for heads that read a whole sequence"""

  upsamples = False


class Stage(nnx.Module):
  """One stage: a reducer and a recovery.

  Attributes:
    stage: its configuration.
    reducer, recovery: of the classes that it names.
  """

  def __init__(
    self, config: TransformerConfig, stage: FunnelConfig, rngs: nnx.Rngs
  ):
    self.config = config
    self.stage = stage
    self.reducer = REDUCERS[stage.reduce](stage)
    self.reducer.learn(config, rngs)
    self.recovery = RECOVERIES[stage.recover]()
    self.recovery.learn(config, rngs)

  def upsample(
    self,
    deep: Stream,
    short: Stream,
    before: Stream,
    gather_index_BT: jax.Array,
    causal: bool,
  ) -> Stream:
    """Gives every slot its group's deep state back.

    Args:
      deep: the short stream after the stage's layers.
      short: the short stream before them.
      before: the stream that was reduced.
      gather_index_BT: the short slot each slot reads, from the reducer.
      causal: whether a recovery's attention is.

    Returns:
      A stream like `before`, with the recovered hidden states.
    """
    held_BRD = self.recovery.hold(deep.hidden_BTD, short.hidden_BTD)
    held_BTD = take(held_BRD, jnp.maximum(gather_index_BT, 0))
    attended_BTD = None
    if self.recovery.attends:
      attention_fn = make_attention_fn(self.config, before, deep, causal)
      attend = self.recovery.attend
      attended_BTD = attend(before, attend.keys_values(deep), attention_fn)
    return self.combine(
      held_BTD,
      before,
      gather_index_BT == BYPASS,
      attended_BTD=attended_BTD,
      offset_BT=offsets(gather_index_BT, before.segment_BT),
    )

  def combine(self, held_BTD, before: Stream, bypass_BT, **read):
    """`before`, with its states and what is held made one."""
    h_BTD = before.hidden_BTD
    hidden_BTD = self.recovery.combine(held_BTD, h_BTD, **read)
    other_BTD = self.recovery.bypass(h_BTD)
    return before.replace(
      hidden_BTD=jnp.where(bypass_BT[..., None], other_BTD, hidden_BTD)
    )


def offsets(gather_index_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: slots since the first one that reads the same short slot."""
  slot_1T = jnp.arange(gather_index_BT.shape[1], dtype=jnp.int32)[None]
  first_BT = slot_1T == 0
  for x_BT in (gather_index_BT, segment_BT):
    first_BT |= x_BT != jnp.roll(x_BT, 1, axis=1)
  return slot_1T - jax.lax.cummax(jnp.where(first_BT, slot_1T, 0), axis=1)


class CrossAttention(nnx.Module):
  """Attention of a full stream to the deep states of a short one.

  Its output projection is zero at first.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.query_norm = RMSNorm(config, "funnel/*/recovery/attend/query_norm")
    self.key_norm = RMSNorm(config, "funnel/*/recovery/attend/key_norm")
    self.attn = Attention(config, rngs, "funnel/*/recovery/attend/attn")

  @property
  def _spec(self) -> LayerSpec:
    return LayerSpec(None, self.config.rope_base, self.config.rope_scaling)

  def keys_values(self, deep: Stream) -> tuple[jax.Array, jax.Array]:
    """(k_BRKH, v_BRKH) of the deep states."""
    rope = rope_angles(deep.position_BT, self.config, self._spec)
    return self.attn.keys_values(self.key_norm(deep.hidden_BTD), rope)

  def __call__(
    self, before: Stream, keys_values, attention_fn: AttentionFn
  ) -> jax.Array:
    """[B, T, D] for `before`; `attention_fn` is as for a block."""
    rope = rope_angles(before.position_BT, self.config, self._spec)
    q_BTNH = self.attn.queries(self.query_norm(before.hidden_BTD), rope)
    o_BTNH, _ = attention_fn(q_BTNH, *keys_values)
    return self.attn.output(o_BTNH)


def short_lengths(
  length: int, stages: Sequence[FunnelConfig], causal: bool
) -> list[int]:
  """Slots of a row of `length` tokens within each stage, and those around."""
  found = []
  for number, funnel in enumerate(stages):
    slots = length
    around = [s for s in stages[:number] if funnel.start < s.stop]
    for stage in (*around, funnel):
      slots = REDUCERS[stage.reduce](stage).length(slots, causal)
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
        length = REDUCERS[stage.reduce](stage).length
        slots = length(slots, causal)
        lengths = [length(n, causal) for n in lengths]
        if sum(lengths) > slots:
          apart = stage.keep_first and not causal
          raise ValueError(
            f"row {row} needs {sum(lengths)} slots in the stage {stage} and "
            f"has room for {slots}: start its segments at multiples of "
            "the total stride"
            + (", and leave a stride of padding" if apart else "")
          )
