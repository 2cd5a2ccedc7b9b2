"""The trunk, one token at a time: caches of keys and values, and of stages.

A prompt runs through the model once. Then each token runs alone, against what
is kept: keys and values of all layers (local layers keep only what their window
can see, in a ring), and for each stage of a funnel the last slots that wait to
be pooled and the deep state that tokens read meanwhile. A stage of stride k
runs once in k tokens, and its layers keep one entry a group.

All rows are in one phase (tokens since a group ended), so that a stage is due
for all of them at once, or for none; `decode` sees to it.

Every cache is a ring: slot s of a stream lies at s % size, and rows are aligned
so that the newest slot is the same one in all. A full cache is a ring that does
not come round. What an entry may be seen by follows from its position and
segment, as everywhere else.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gemma_funnel import funnel as funnel_lib
from gemma_funnel.attention.blocked import attend_cache
from gemma_funnel.config import TransformerConfig
from gemma_funnel.funnel import Run, Stage
from gemma_funnel.layers import make_look, rope_angles
from gemma_funnel.model import Transformer
from gemma_funnel.stream import Stream, take


def pytree(cls):
  """A frozen dataclass whose fields are all data."""
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = [f.name for f in dataclasses.fields(cls)]
  return jax.tree_util.register_dataclass(cls, fields, [])


@pytree
class Cache:
  """Keys and values of consecutive layers on one stream.

  Attributes:
    keys_values: (k_BKSH, v_BKSH) of each layer, rotated; S is that layer's
      ring.
    slots: for each ring size, a Stream (of no hidden states) that says what is
      in the rings of that size.
    next: int32 scalar, the slot that is written next.
    runs: int32 scalar, how often the layers ran since the prefill.
  """

  keys_values: list[tuple[jax.Array, jax.Array]]
  slots: dict[int, Stream]
  next: jax.Array
  runs: jax.Array


@pytree
class StageState:
  """What a stage waits with.

  Attributes:
    pending: the last stride - 1 slots of the stream that it reduces.
    held_B1D: the newest group's deep state.
    deep: keys and values of deep states, for the recovery "attend".
  """

  pending: Stream
  held_B1D: jax.Array
  deep: Cache | None


def _ring_size(
  config: TransformerConfig, layer: int, keys: Stream, most: int, extra
):
  """Entries that `layer` can ever see of its keys, `most` at most."""
  window = config.window_of(layer)
  if window is None:
    return most
  uneven = 0 if keys.even else 2  # See `Stream.even`.
  return min(most, (window - 1) // keys.spacing + 1 + uneven + extra)


def _last_slot(stream: Stream) -> jax.Array:
  """int32 [B]: each row's last slot that is no padding."""
  slot_1T = jnp.arange(stream.segment_BT.shape[1], dtype=jnp.int32)[None]
  return jnp.max(jnp.where(stream.segment_BT != 0, slot_1T, -1), axis=1)


def _bare(stream: Stream) -> Stream:
  return stream.replace(hidden_BTD=None)


def _take_slots(stream: Stream, index_BS: jax.Array) -> Stream:
  """The stream at `index_BS`; below 0 is padding."""
  at = jax.tree.map(lambda x_BT: take(x_BT, jnp.maximum(index_BS, 0)), stream)
  return at.replace(segment_BT=jnp.where(index_BS >= 0, at.segment_BT, 0))


def _ring_index(keys: Stream, size: int) -> jax.Array:
  """int32 [B, size]: the slot that each ring entry holds; below 0 for none."""
  last = keys.segment_BT.shape[1] - 1
  entry_S = jnp.arange(size, dtype=jnp.int32)
  aligned_S = last - (last - entry_S) % size
  index_BS = aligned_S[None] - (last - _last_slot(keys))[:, None]
  return jnp.where((aligned_S >= 0)[None], index_BS, -1)


def _fill(keys_values, keys: Stream, sizes: Sequence[int], start) -> Cache:
  """Rings of the given sizes, of a stream and each layer's (k, v)_BSKH."""
  index = {size: _ring_index(keys, size) for size in sizes}
  ring = lambda x_BSKH, size: take(
    x_BSKH, jnp.maximum(index[size], 0)
  ).transpose(0, 2, 1, 3)
  return Cache(
    [
      (ring(k, size), ring(v, size))
      for (k, v), size in zip(keys_values, sizes, strict=True)
    ],
    {size: _take_slots(_bare(keys), i) for size, i in index.items()},
    start,
    jnp.int32(0),
  )


def _put(ring, new, start, axis: int):
  """Writes the slots of `new` into a ring, from slot `start` on."""
  size = ring.shape[axis]
  for n in range(new.shape[axis]):
    one = jax.lax.slice_in_dim(new, n, n + 1, axis=axis)
    ring = jax.lax.dynamic_update_slice_in_dim(
      ring, one.astype(ring.dtype), (start + n) % size, axis
    )
  return ring


def _put_slots(cache: Cache, keys: Stream) -> Cache:
  """The cache, with the places of `keys` noted; their values follow."""
  put = lambda ring, new: _put(ring, new, cache.next, 1)
  slots = {
    size: jax.tree.map(put, slots, _bare(keys))
    for size, slots in cache.slots.items()
  }
  return dataclasses.replace(cache, slots=slots)


def prefill(model: Transformer, stream: Stream, phase, cache_length: int):
  """Runs prompts, and keeps what their continuation needs.

  Args:
    model: its layers are a list of blocks.
    stream: left-padded rows; their last tokens are all in `phase`.
    phase: int32 scalar, the last tokens' ranks modulo the total stride.
    cache_length: tokens that a row may come to have.

  Returns:
    (the stream after the layers, a `Cache` for each run of layers, a
    `StageState` for each stage).
  """
  walker = _Prefill(model, phase, cache_length)
  stream = _walk(model, walker, stream)
  return stream, walker.caches, walker.stages


def step(model: Transformer, stream: Stream, phase, caches, stages):
  """Runs one more token of each row.

  Args:
    model: its layers are a list of blocks.
    stream: [B, 1, D], with each row's position.
    phase: int32 scalar, the tokens' ranks modulo the total stride.
    caches, stages: as `prefill` or the last step left them.

  Returns:
    What `prefill` returns, a token later.
  """
  walker = _Step(model, phase, caches, stages)
  stream = _walk(model, walker, stream)
  return stream, walker.caches, walker.stages


def _walk(model: Transformer, walker, stream: Stream) -> Stream:
  steps = funnel_lib.schedule(model.stages, model.config.num_layers)
  return funnel_lib.walk(
    steps, stream, walker.run, walker.reduce, walker.restore
  )


def _layer(
  model: Transformer, layer: int, stream: Stream, keys: Stream | None, see
):
  """The stream after a layer whose queries see `see`."""
  rope = rope_angles(stream.position_BT, model.config)
  of_keys = ()
  if keys is not None:
    of_keys = keys.hidden_BTD, rope_angles(keys.position_BT, model.config)
  hidden_BTD = model.layers[layer](stream.hidden_BTD, rope, see, *of_keys)
  return stream.replace(hidden_BTD=hidden_BTD)


class _Prefill:
  """What `walk` calls for whole prompts: the trunk, and a note of its states."""

  def __init__(self, model: Transformer, phase, cache_length: int):
    self._model, self._phase, self._length = model, phase, cache_length
    self.caches: list[Cache] = []
    self.stages: list[StageState] = []

  def run(self, run: Run, stream: Stream, keys: Stream | None) -> Stream:
    keys_values = []

    def stash(see, q_BTNH, *kv):
      keys_values.append(kv)
      return see(q_BTNH, *kv)

    config = self._model.config
    for layer in range(run.start, run.stop):
      window = config.window_of(layer)
      see = make_look(config, stream, keys or stream, True, window)
      see = functools.partial(stash, see)
      stream = _layer(self._model, layer, stream, keys, see)
    self.caches.append(self._cache(run, keys_values, keys or stream))
    return stream

  def _cache(self, run: Run, keys_values, keys: Stream) -> Cache:
    most = -(-self._length // keys.spacing)
    start, extra = jnp.int32(keys.segment_BT.shape[1]), 0
    if run.query_only:
      # Slots since the newest group ended are written again with their group.
      stride = self._model.stages[run.stages[-1]].stride
      start, extra = start - self._phase // keys.spacing % stride, stride
    sizes = [
      _ring_size(self._model.config, layer, keys, most, extra)
      for layer in range(run.start, run.stop)
    ]
    return _fill(keys_values, keys, sizes, start)

  def reduce(self, number: int, stream: Stream):
    stage = self._model.funnel[number]
    stride = stage.funnel.stride
    back_k = jnp.arange(stride - 1, dtype=jnp.int32) - (stride - 2)
    pending = _take_slots(stream, _last_slot(stream)[:, None] + back_k[None])
    self.stages.append(StageState(pending, None, None))
    return stage.reduce(stream, causal=True)

  def restore(self, number: int, deep: Stream, before: Stream, read_BT):
    stage, cache = self._model.funnel[number], None
    if stage.funnel.recover == "attend":
      size = -(-self._length // deep.spacing)
      start = jnp.int32(deep.segment_BT.shape[1])
      cache = _fill([stage.attend.keys_values(deep)], deep, [size], start)
    held_B1D = take(deep.hidden_BTD, _last_slot(deep)[:, None])
    self.stages[number] = dataclasses.replace(
      self.stages[number], held_B1D=held_B1D, deep=cache
    )
    return stage.restore(deep, before, read_BT, causal=True)


class _Step:
  """What `walk` calls for one token a row."""

  def __init__(self, model: Transformer, phase, caches, stages):
    self._model, self._phase = model, phase
    self._old_caches = iter(caches)
    self._windows: dict[int, Stream] = {}
    self._open: list[int] = []
    self.caches: list[Cache] = []
    self.stages: list[StageState] = list(stages)

  def _due(self) -> jax.Array | None:
    """Whether this token ends a group of the open stages; None is always."""
    if not self._open:
      return None
    stages = self._model.stages
    stride = math.prod(stages[number].stride for number in self._open)
    return self._phase % stride == 0

  def run(self, run: Run, stream: Stream, keys: Stream | None) -> Stream:
    if run.query_only:
      keys = self._windows[run.stages[-1]]

    def layers(carry):
      hidden_BTD, cache = carry
      return self._layers(
        run, stream.replace(hidden_BTD=hidden_BTD), keys, cache
      )

    hidden_BTD, cache = _if_due(
      self._due(), layers, (stream.hidden_BTD, next(self._old_caches))
    )
    self.caches.append(cache)
    return stream.replace(hidden_BTD=hidden_BTD)

  def _layers(self, run: Run, stream: Stream, keys: Stream | None, cache):
    """(hidden_BTD, cache) after a run of layers, which adds to its cache."""
    cache = _put_slots(cache, keys or stream)
    rings = []
    for n, layer in enumerate(range(run.start, run.stop)):

      def see(q_BTNH, *kv, n=n, layer=layer):
        rings.append(_put_values(cache, n, kv))
        window = self._model.config.window_of(layer)
        return self._see(cache.slots, rings[n], stream, window, q_BTNH)

      stream = _layer(self._model, layer, stream, keys, see)
    added = (keys or stream).segment_BT.shape[1]
    return stream.hidden_BTD, Cache(
      rings, cache.slots, cache.next + added, cache.runs + 1
    )

  def _see(self, slots, keys_values, queries: Stream, window, q_BTNH, *_):
    """What queries make of one layer's keys and values."""
    config = self._model.config
    return attend_cache(
      q_BTNH,
      *keys_values,
      queries,
      slots[keys_values[0].shape[2]],
      window=window,
      softcap=config.attn_softcap,
      softmax_dtype=config.softmax_dtype,
    )

  def reduce(self, number: int, stream: Stream):
    state = self.stages[number]
    window = _join(state.pending, stream)
    moved = jax.tree.map(lambda x_BT: x_BT[:, 1:], window)
    pending = _where(self._due(), moved, state.pending)
    self.stages[number] = dataclasses.replace(state, pending=pending)
    self._windows[number] = window
    self._open.append(number)
    return self._model.funnel[number].newest(window), None

  def restore(self, number: int, deep: Stream, before: Stream, _) -> Stream:
    stage, state = self._model.funnel[number], self.stages[number]
    due = self._due()
    held_B1D = _where(due, deep.hidden_BTD, state.held_B1D)
    cache, extra_BTD = state.deep, None
    if cache is not None:
      cache = _if_due(due, functools.partial(_put_deep, stage, deep), cache)
      see = functools.partial(
        self._see, cache.slots, cache.keys_values[0], before, None
      )
      extra_BTD = stage.attend(before, (None, None), see)
    self.stages[number] = StageState(state.pending, held_B1D, cache)
    self._open.pop()
    bypass_BT = jnp.broadcast_to(stage.selects & ~due, before.segment_BT.shape)
    return stage.recover(held_B1D, before, bypass_BT, extra_BTD)


def _put_values(cache: Cache, n: int, keys_values):
  """The n-th layer's rings with new (k, v)_BSKH."""
  return tuple(
    _put(ring, new.transpose(0, 2, 1, 3), cache.next, 2)
    for ring, new in zip(cache.keys_values[n], keys_values, strict=True)
  )


def _put_deep(stage: Stage, deep: Stream, cache: Cache) -> Cache:
  cache = _put_slots(cache, deep)
  rings = [_put_values(cache, 0, stage.attend.keys_values(deep))]
  return Cache(rings, cache.slots, cache.next + 1, cache.runs + 1)


def _join(pending: Stream, stream: Stream) -> Stream:
  join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=1)
  return jax.tree.map(join, pending, stream)


def _where(due: jax.Array | None, new, old):
  """`new` where due (None is always), else `old`; trees."""
  if due is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(due, x, y), new, old)


def _if_due(due: jax.Array | None, body, carry):
  """body(carry) where due (None is always), else carry.

  A loop that runs once or not at all changes its carry in place; a conditional
  may copy it.
  """
  if due is None:
    return body(carry)
  return jax.lax.fori_loop(
    0, due.astype(jnp.int32), lambda _, carry: body(carry), carry
  )
