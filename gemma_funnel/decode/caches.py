"""The trunk, one token at a time: caches of keys and values, and of stages.

A prompt runs through the model once. Then each token runs alone, against what
is kept: keys and values of all layers (local layers keep only what their window
can see, in a ring), and for each stage of a funnel what its reducer waits with
and the deep state that tokens read meanwhile. A stage runs when its reducer
says that it is due, and its layers keep one entry for each of those slots.

All rows are in one phase, so that a stage is due for all of them at once, or
for none; `decoder` sees to it.

Every cache is a ring: slot s of a stream lies at s % size, and rows are aligned
so that the newest slot is the same one in all. A full cache is a ring that does
not come round. What an entry may be seen by follows from its position and
segment, as everywhere else.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_funnel import funnel as funnel_lib
from gemma_funnel.attention.blocked import attend_cache
from gemma_funnel.config import TransformerConfig
from gemma_funnel.funnel import LayerRun, Stage
from gemma_funnel.layers import Aux, make_attention_fn, rope_angles
from gemma_funnel.model import Transformer
from gemma_funnel.stream import Stream, last_slot, take, take_slots


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
    reducer: its reducer's own state.
    held_B1D: what tokens read of the newest short slot (`Recovery.hold`).
    offset_B1: int32, how many slots ago its anchor is.
    deep: keys and values of deep states, for a recovery that attends.
  """

  reducer: Any
  held_B1D: jax.Array
  offset_B1: jax.Array
  deep: Cache | None


def _ring_size(
  config: TransformerConfig, layer: int, keys: Stream, most: int, extra
):
  """Entries that `layer` can ever see of its keys, `most` at most."""
  window = config.layers[layer].window
  if window is None:
    return most
  nonuniform = 0 if keys.uniform else 2  # See `Stream.uniform`.
  return min(most, (window - 1) // keys.stride + 1 + nonuniform + extra)


def _ring_index(keys: Stream, size: int) -> jax.Array:
  """int32 [B, size]: the slot that each ring entry holds; below 0 for none."""
  last = keys.segment_BT.shape[1] - 1
  entry_S = jnp.arange(size, dtype=jnp.int32)
  aligned_S = last - (last - entry_S) % size
  index_BS = aligned_S[None] - (last - last_slot(keys))[:, None]
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
    {size: take_slots(keys.slots(), i) for size, i in index.items()},
    start,
    jnp.int32(0),
  )


def _put(ring, new, slot, axis: int):
  """Writes one slot into a ring."""
  at = slot % ring.shape[axis]
  new = new.astype(ring.dtype)
  return jax.lax.dynamic_update_slice_in_dim(ring, new, at, axis)


def _put_slots(cache: Cache, keys: Stream) -> Cache:
  """The cache, with the places of `keys` noted; their values follow."""
  put = lambda ring, new: _put(ring, new, cache.next, 1)
  slots = {
    size: jax.tree.map(put, slots, keys.slots())
    for size, slots in cache.slots.items()
  }
  return dataclasses.replace(cache, slots=slots)


def prefill(
  model: Transformer, stream: Stream, phase, cache_length: int, further: int
):
  """Runs prompts, and keeps what their continuation needs.

  Args:
    model: its layers are a list of blocks.
    stream: left-padded rows; their last tokens are all in `phase`.
    phase: int32 scalar, the last tokens' ranks modulo the total stride.
    cache_length: tokens that a row may come to have.
    further: how many of them may come after the prompt.

  Returns:
    (the stream after the layers, a `Cache` for each run of layers, a
    `StageState` for each stage).
  """
  walker = _Prefill(model, phase, cache_length, further)
  stream = _walk(model, walker, stream)
  return stream, walker.caches, walker.stages


def step(model: Transformer, stream: Stream, caches, stages):
  """Runs one more token of each row.

  Args:
    model: its layers are a list of blocks.
    stream: [B, 1, D], with each row's position.
    caches, stages: as `prefill` or the last step left them.

  Returns:
    What `prefill` returns, a token later.
  """
  walker = _Step(model, caches, stages)
  stream = _walk(model, walker, stream)
  return stream, walker.caches, walker.stages


def _walk(model: Transformer, walker, stream: Stream) -> Stream:
  steps = funnel_lib.layer_plan(model.stages, model.config)
  return funnel_lib.run_trunk(
    steps, stream, walker.run, walker.reduce, walker.upsample
  )


def _layer(
  model: Transformer,
  layer: int,
  stream: Stream,
  keys: Stream | None,
  attention_fn,
) -> tuple[Stream, Aux]:
  """(the stream after a layer, what the layer was asked for)."""
  angles = lambda x: rope_angles(
    x.position_BT, model.config, model.config.layers[layer]
  )
  of_keys = () if keys is None else (keys.hidden_BTD, angles(keys))
  hidden_BTD, aux = model.layers[layer](
    stream.hidden_BTD, angles(stream), attention_fn, *of_keys
  )
  return stream.replace(hidden_BTD=hidden_BTD), aux


class _Prefill:
  """What `run_trunk` calls for prompts: the trunk, and a note of its states."""

  def __init__(
    self, model: Transformer, phase, cache_length: int, further: int
  ):
    self._model, self._phase, self._further = model, phase, further
    # Slots that the open streams may come to have, the innermost last.
    self._lengths = [cache_length]
    self.caches: list[Cache] = []
    self.stages: list[StageState] = []

  def run(self, run: LayerRun, stream: Stream, keys: Stream | None):
    keys_values = []

    def stash(attention_fn, q_BTNH, *kv):
      keys_values.append(kv)
      return attention_fn(q_BTNH, *kv)

    config = self._model.config
    for layer in range(run.start, run.stop):
      attention_fn = make_attention_fn(
        config,
        stream,
        keys or stream,
        True,
        config.layers[layer].window,
        run.needs,
      )
      attention_fn = functools.partial(stash, attention_fn)
      if run.keys == "none":
        attention_fn = None
      stream, aux = _layer(self._model, layer, stream, keys, attention_fn)
    self.caches.append(self._cache(run, keys_values, keys or stream))
    return stream, aux

  def _cache(self, run: LayerRun, keys_values, keys: Stream) -> Cache:
    most, extra = self._lengths[-1], 0
    if run.keys == "before":
      # A group's position may be that of an earlier slot than its last.
      most = self._lengths[-2]
      extra = self._model.funnel[run.stages[-1]].reducer.period
    sizes = [
      _ring_size(self._model.config, run.start + n, keys, most, extra)
      for n in range(len(keys_values))
    ]
    start = jnp.int32(keys.segment_BT.shape[1])
    return _fill(keys_values, keys, sizes, start)

  def reduce(self, number: int, stream: Stream, aux: Aux):
    reducer = self._model.funnel[number].reducer
    state = reducer.init_state(stream, self._phase)
    self.stages.append(StageState(state, None, None, None))
    self._lengths.append(
      reducer.cache_length(self._lengths[-1], stream, self._further)
    )
    return reducer.reduce(stream, aux, True)

  def upsample(
    self,
    number: int,
    deep: Stream,
    short: Stream,
    before: Stream,
    gather_index_BT,
  ) -> Stream:
    stage, cache = self._model.funnel[number], None
    most = self._lengths.pop()
    if stage.recovery.attends:
      start = jnp.int32(deep.segment_BT.shape[1])
      keys_values = stage.recovery.attend.keys_values(deep)
      cache = _fill([keys_values], deep, [most], start)
    held_BRD = stage.recovery.hold(deep.hidden_BTD, short.hidden_BTD)
    self.stages[number] = dataclasses.replace(
      self.stages[number],
      held_B1D=take(held_BRD, last_slot(deep)[:, None]),
      offset_B1=take(
        funnel_lib.offsets(gather_index_BT, before.segment_BT),
        last_slot(before)[:, None],
      ),
      deep=cache,
    )
    return stage.upsample(deep, short, before, gather_index_BT, True)


class _Step:
  """What `run_trunk` calls for one token a row."""

  def __init__(self, model: Transformer, caches, stages):
    self._model = model
    self._old_caches = iter(caches)
    # Of the open stages: whether the stage is due (None is always), and whether
    # others bypass it.
    self._dues: list[jax.Array | None] = [None]
    self._bypasses: list[bool] = []
    self.caches: list[Cache] = []
    self.stages: list[StageState] = list(stages)

  def run(self, run: LayerRun, stream: Stream, keys: Stream | None):
    """Layers on a slot that is due; keys from before it are cached always."""
    cache = next(self._old_caches)
    if keys is not None:
      put = lambda cache: self._put_keys(run, keys, cache)
      cache = _if_due(self._dues[-2], put, cache)
    layers = lambda carry: self._layers(run, stream, keys, *carry)
    hidden_BTD, cache = _if_due(
      self._dues[-1], layers, (stream.hidden_BTD, cache)
    )
    self.caches.append(cache)
    return stream.replace(hidden_BTD=hidden_BTD), {}

  def _put_keys(self, run: LayerRun, keys: Stream, cache: Cache) -> Cache:
    """The cache with the keys and values that all layers of a run have."""
    cache, rings = _put_slots(cache, keys), []
    for n, layer in enumerate(range(run.start, run.stop)):
      block = self._model.layers[layer]
      keys_values = block.attn.keys_values(
        block.pre_attn_norm(keys.hidden_BTD),
        rope_angles(
          keys.position_BT, self._model.config, self._model.config.layers[layer]
        ),
      )
      rings.append(_put_values(cache, n, keys_values))
    return Cache(rings, cache.slots, cache.next + 1, cache.runs)

  def _layers(self, run: LayerRun, stream, keys, hidden_BTD, cache):
    """(hidden_BTD, cache) after layers; they add keys that are their own."""
    stream = stream.replace(hidden_BTD=hidden_BTD)
    if keys is None:
      cache = _put_slots(cache, stream)
    rings = list(cache.keys_values)
    for n, layer in enumerate(range(run.start, run.stop)):

      def attention_fn(q_BTNH, *kv, n=n, layer=layer):
        if keys is None:
          rings[n] = _put_values(cache, n, kv)
        window = self._model.config.layers[layer].window
        return self._attend(cache.slots, rings[n], stream, window, q_BTNH)

      stream, _ = _layer(
        self._model,
        layer,
        stream,
        keys,
        None if run.keys == "none" else attention_fn,
      )
    next_slot = cache.next + (keys is None)
    return stream.hidden_BTD, Cache(
      rings, cache.slots, next_slot, cache.runs + 1
    )

  def _attend(self, slots, keys_values, queries: Stream, window, q_BTNH, *_):
    """(attention to one layer's cached keys and values, no aux)."""
    config = self._model.config
    o_BTNH = attend_cache(
      q_BTNH,
      *keys_values,
      queries,
      slots[keys_values[0].shape[2]],
      window=window,
      softcap=config.attn_softcap,
      softmax_dtype=config.softmax_dtype,
    )
    return o_BTNH, {}

  def reduce(self, number: int, stream: Stream, aux: Aux):
    reducer, state = self._model.funnel[number].reducer, self.stages[number]
    step = reducer.step(state.reducer, stream)
    around = self._dues[-1]
    self.stages[number] = dataclasses.replace(
      state, reducer=_where(around, step.state, state.reducer)
    )
    both = [due for due in (around, step.due) if due is not None]
    self._dues.append(functools.reduce(jnp.logical_and, both) if both else None)
    self._bypasses.append(step.bypasses)
    return step.short, None

  def upsample(
    self, number: int, deep: Stream, short: Stream, before: Stream, _
  ) -> Stream:
    stage, state = self._model.funnel[number], self.stages[number]
    due, bypasses = self._dues.pop(), self._bypasses.pop()
    held_B1D = stage.recovery.hold(deep.hidden_BTD, short.hidden_BTD)
    held_B1D = _where(due, held_B1D, state.held_B1D)
    offset_B1 = _where(
      due, jnp.zeros_like(state.offset_B1), state.offset_B1 + 1
    )
    offset_B1 = _where(self._dues[-1], offset_B1, state.offset_B1)
    cache, attended_BTD = state.deep, None
    if cache is not None:
      cache = _if_due(due, functools.partial(_put_deep, stage, deep), cache)
      attention_fn = functools.partial(
        self._attend, cache.slots, cache.keys_values[0], before, None
      )
      attended_BTD = stage.recovery.attend(before, (None, None), attention_fn)
    self.stages[number] = StageState(state.reducer, held_B1D, offset_B1, cache)
    misses = jnp.bool_(False) if due is None else ~due & bypasses
    bypass_BT = jnp.broadcast_to(misses.reshape(-1, 1), before.segment_BT.shape)
    return stage.combine(
      held_B1D,
      before,
      bypass_BT,
      attended_BTD=attended_BTD,
      offset_BT=offset_B1,
    )


def _put_values(cache: Cache, n: int, keys_values):
  """The n-th layer's rings with new (k, v)_BSKH."""
  return tuple(
    _put(ring, new.transpose(0, 2, 1, 3), cache.next, 2)
    for ring, new in zip(cache.keys_values[n], keys_values, strict=True)
  )


def _put_deep(stage: Stage, deep: Stream, cache: Cache) -> Cache:
  cache = _put_slots(cache, deep)
  rings = [_put_values(cache, 0, stage.recovery.attend.keys_values(deep))]
  return Cache(rings, cache.slots, cache.next + 1, cache.runs + 1)


def _where(due: jax.Array | None, new, old):
  """`new` where due (None is always), else `old`; trees."""
  if due is None:
    return new

  def choose(x, y):
    of_row = due.reshape(due.shape + (1,) * (x.ndim - due.ndim) * due.ndim)
    return jnp.where(of_row, x, y)

  return jax.tree.map(choose, new, old)


def _if_due(due: jax.Array | None, body, carry):
  """body(carry) where due (None is always), else carry.

  A loop that runs once or not at all changes its carry in place; a conditional
  may copy it.
  """
  if due is None:
    return body(carry)
  return jax.lax.fori_loop(
    0, jnp.any(due).astype(jnp.int32), lambda _, carry: body(carry), carry
  )
