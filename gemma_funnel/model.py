"""Gemma 1 and 2 with a funnel: the stack of layers, the trunk, the logits.

Dimensions, as suffixes of names: B batch, T tokens (queries), S keys, R reduced
length, D model width, F MLP width, N query heads, K key/value heads, G = N/K,
H head width, V vocabulary, L layers (stacked parameters only).

`layers/` of the parameter tree is the same with any funnel and none: the L
layers are one stacked tree, of which the trunk runs [0, start) at full length,
[start, stop) on the short stream and [stop, L) at full length again. What a
funnel learns besides is in `funnel/`, a number for each stage.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import config as config_lib
from gemma_funnel import funnel as funnel_lib
from gemma_funnel import params as params_lib
from gemma_funnel.config import Funnel, TransformerConfig
from gemma_funnel.layers import (
  PRODUCT,
  Block,
  RMSNorm,
  by_position,
  make_look,
  rope_angles,
)
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream, make_stream


@dataclasses.dataclass(frozen=True)
class _Span:
  """Layers [start, stop) of a stack, and how to run them; all static."""

  block: nnx.GraphDef
  config: TransformerConfig
  start: int
  stop: int
  causal: bool

  def rope(self, stream):
    return stream and rope_angles(stream.position_BT, self.config)

  def layer(self, params, stream, keys, ropes, index):
    """Runs one layer, given its own parameters."""

    def call(params, stream, keys):
      window = self.config.window_of(index)
      see = make_look(self.config, stream, keys or stream, self.causal, window)
      hidden_BTD = nnx.merge(self.block, params)(
        stream.hidden_BTD, ropes[0], see, keys and keys.hidden_BTD, ropes[1]
      )
      return stream.replace(hidden_BTD=_by_tokens(hidden_BTD))

    policies = jax.checkpoint_policies
    match self.config.remat:
      case "dots":
        call = jax.checkpoint(
          call, policy=policies.save_only_these_names(PRODUCT)
        )
      case "offload":
        call = jax.checkpoint(
          call,
          policy=policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
          ),
        )
      case "block":
        call = jax.checkpoint(call, policy=policies.nothing_saveable)
    return call(params, stream, keys)

  def parts(self) -> list[tuple[int, int, int]]:
    """(first layer, repeats, period) of the loops that make up the span.

    A loop's body is a whole period of the attention pattern; what is left of
    the span is a loop of its own. Unrolled, all of it is one body.
    """
    count, period = self.stop - self.start, len(self.config.attention_pattern)
    if not self.config.scan_layers:
      return [(self.start, 1, count)]
    whole = count - count % period
    parts = [
      (self.start, count // period, period),
      (self.start + whole, 1, count % period),
    ]
    return [part for part in parts if part[1] * part[2]]

  def body(self, first, period, params_of, stream, keys, ropes) -> Stream:
    """Runs layers like `first` and the `period` - 1 after it."""
    for j in range(period):
      stream = self.layer(params_of(j), stream, keys, ropes, first + j)
    return stream


def _pick(params, index):
  return jax.tree.map(lambda p: p[index], params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(span: _Span, stacked_L, stream: Stream, keys: Stream | None) -> Stream:
  """Runs the layers of `span` on `stream`, with its own keys or with `keys`.

  Parameters are read out of the whole stack where they lie. A scan over a part
  of it would copy that part first, on every call.
  """
  ropes = span.rope(stream), span.rope(keys)
  for first, repeats, period in span.parts():

    def body(repeat, stream):
      at = first + repeat * period
      params_of = lambda j: _pick(stacked_L, at + j)
      return span.body(first, period, params_of, stream, keys, ropes)

    if span.config.scan_layers:
      # The compiler must not know that a loop may run only once: it would take
      # the body out of the loop, where XLA:CPU runs it a third slower.
      stop = jax.lax.optimization_barrier(jnp.int32(repeats))
      stream = jax.lax.fori_loop(0, stop, body, stream)
    else:
      stream = body(0, stream)
  return stream


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["arrays"],
  meta_fields=["structure", "places", "learned"],
)
@dataclasses.dataclass(frozen=True)
class _Kept:
  """What a backward pass needs, but for what is at hand there anyway.

  Attributes:
    arrays: each once.
    structure: of the function from `jax.vjp`.
    places: of its arrays: (whether at hand, which).
    learned: whether a gradient is asked for, of each parameter.
  """

  arrays: list[jax.Array]
  structure: jax.tree_util.PyTreeDef
  places: tuple[tuple[bool, int], ...]
  learned: tuple[bool, ...]

  @classmethod
  def of(cls, vjp, at_hand, learned) -> "_Kept":
    leaves, structure = jax.tree.flatten(vjp)
    known = {id(x): n for n, x in enumerate(jax.tree.leaves(at_hand))}
    arrays, places = {}, []
    for x in leaves:
      if id(x) in known:
        places.append((True, known[id(x)]))
      else:
        number, _ = arrays.setdefault(id(x), (len(arrays), x))
        places.append((False, number))
    arrays = [x for _, x in arrays.values()]
    return cls(arrays, structure, tuple(places), learned)

  def vjp(self, at_hand):
    sources = self.arrays, jax.tree.leaves(at_hand)
    leaves = [sources[known][number] for known, number in self.places]
    return jax.tree.unflatten(self.structure, leaves)


def _run_forward(span: _Span, stacked_L, stream: Stream, keys: Stream | None):
  """As `_run`, and what the backward pass needs.

  It scans over layers, so that their gradients are stacked by a scan too: those
  of reads from the whole stack would be summed into all of it, layer by layer.
  Parameters that the backward pass reads are not kept once more, and those that
  no gradient is asked of (LoRA's) have none.
  """
  learned = tuple(x.perturbed for x in jax.tree.leaves(stacked_L))
  stacked_L, stream, keys = jax.tree.map(
    lambda x: x.value, (stacked_L, stream, keys)
  )
  ropes = span.rope(stream), span.rope(keys)
  rest = _rest(stream), _rest(keys)
  loops = []
  for first, repeats, period in span.parts():

    def body(hidden, periods):
      layers = [_pick(periods, j) for j in range(period)]

      def run(changing, hidden, keys_hidden):
        params_of = lambda j: _join(layers[j], learned, changing[j])
        return span.body(
          first,
          period,
          params_of,
          _with(rest[0], hidden),
          _with(rest[1], keys_hidden),
          ropes,
        ).hidden_BTD

      changing = [_split(layer, learned) for layer in layers]
      hidden, vjp = jax.vjp(run, changing, hidden, keys and keys.hidden_BTD)
      return hidden, _Kept.of(vjp, (layers, ropes, rest), learned)

    periods = jax.tree.map(
      lambda p: p[first : first + repeats * period].reshape(
        repeats, period, *p.shape[1:]
      ),
      stacked_L,
    )
    hidden, kept = jax.lax.scan(body, stream.hidden_BTD, periods)
    stream = _with(stream, hidden)
    loops.append((periods, kept))
  return stream, (loops, ropes, rest, keys and jnp.zeros_like(keys.hidden_BTD))


def _split(tree, learned: tuple[bool, ...]) -> list[jax.Array]:
  leaves = jax.tree.leaves(tree)
  return [x for x, chosen in zip(leaves, learned, strict=True) if chosen]


def _join(tree, learned: tuple[bool, ...], values: list[jax.Array]):
  """`tree` with other leaves where they are learned."""
  leaves, structure = jax.tree.flatten(tree)
  values = iter(values)
  pairs = zip(leaves, learned, strict=True)
  leaves = [next(values) if chosen else x for x, chosen in pairs]
  return jax.tree.unflatten(structure, leaves)


def _run_backward(span: _Span, saved, d_stream: Stream):
  loops, ropes, rest, d_keys = saved
  d_hidden, d_parts = d_stream.hidden_BTD, []
  for (_, _, period), loop in zip(span.parts()[::-1], loops[::-1], strict=True):

    def body(sums, inputs):
      d_hidden, d_keys = sums
      periods, kept = inputs
      layers = [_pick(periods, j) for j in range(period)]
      vjp = kept.vjp((layers, ropes, rest))
      d_changing, d_hidden, more = vjp(d_hidden)
      d_keys = jax.tree.map(jnp.add, d_keys, more)
      return (d_hidden, d_keys), jax.tree.map(
        lambda *p: jnp.stack(p), *d_changing
      )

    (d_hidden, d_keys), d_periods = jax.lax.scan(
      body, (d_hidden, d_keys), loop, reverse=True
    )
    d_parts.insert(0, jax.tree.map(jnp.concatenate, d_periods))
  around = (span.start, span.config.num_layers - span.stop)
  d_changing = iter(
    jnp.pad(jnp.concatenate(parts), (around, *[(0, 0)] * (parts[0].ndim - 1)))
    for parts in zip(*d_parts, strict=True)
  )
  periods, kept = loops[0]
  d_stacked_L = jax.tree.unflatten(
    jax.tree.structure(periods),
    [next(d_changing) if chosen else None for chosen in kept.learned],
  )
  # Where slots stand is not learned.
  unlearned = dict(position_BT=None, end_BT=None, segment_BT=None)
  d_stream, d_keys = (
    rest and rest.replace(hidden_BTD=d_hidden, **unlearned)
    for rest, d_hidden in zip(rest, (d_hidden, d_keys), strict=True)
  )
  return d_stacked_L, d_stream, d_keys


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _rest(stream: Stream | None) -> Stream | None:
  return stream and stream.replace(hidden_BTD=None)


def _with(stream: Stream | None, hidden_BTD) -> Stream | None:
  return stream and stream.replace(hidden_BTD=hidden_BTD)


class Transformer(nnx.Module):
  """A Gemma, with or without a funnel.

  Attributes:
    config: sizes and switches.
    stages: of the funnel, resolved against the depth; () is no funnel.
    funnel: what each stage does, and its learned parts if it has any.
  """

  def __init__(
    self, config: TransformerConfig, funnel: Funnel = None, *, rngs: nnx.Rngs
  ):
    """Fresh parameters, as `params` says."""
    self.config = config
    self.stages = config_lib.resolve_funnel(funnel, config.num_layers)
    self.embedding = nnx.Param(params_lib.init("embedding", config, rngs))
    stack = nnx.vmap(Block, in_axes=(None, 0))
    self.layers = stack(config, rngs.split(config.num_layers))
    self.final_norm = RMSNorm(config, "final_norm")
    # Last, so that other parameters do not depend on the funnel.
    self.funnel = nnx.List(
      [funnel_lib.Stage(config, stage, rngs) for stage in self.stages]
    )

  @classmethod
  def abstract(
    cls, config: TransformerConfig, funnel: Funnel = None
  ) -> "Transformer":
    """A model of shapes only: nothing is allocated."""
    return nnx.eval_shape(lambda: cls(config, funnel, rngs=nnx.Rngs(0)))

  def with_funnel(self, funnel: Funnel) -> "Transformer":
    """The same parameters under another funnel, or none.

    Learned parts of a stage stay where the stage of the same number has them
    too. Where it has not they are made afresh, and a line says so.
    """
    stages = config_lib.resolve_funnel(funnel, self.config.num_layers)
    learned = [_parts(stage) for stage in self.funnel]
    model = nnx.merge(*nnx.split(self))
    model.stages = stages
    model.funnel = nnx.List([])
    for number, stage in enumerate(stages):
      made = funnel_lib.Stage(self.config, stage, nnx.Rngs(number))
      fresh = _parts(made)
      kept = learned[number] if number < len(learned) else {}
      missing = sorted(path for path in fresh if path not in kept)
      if missing and jax.process_index() == 0:
        names = ", ".join("/".join(path) for path in missing)
        print(f"funnel stage {number}: freshly initialised {names}", flush=True)
      parts = {
        path: kept[path] if path in kept else self._placed(fresh[path])
        for path in fresh
      }
      nnx.update(made, nnx.from_flat_state(parts))
      model.funnel.append(made)
    return model

  def _placed(self, param: nnx.Param) -> nnx.Param:
    """A fresh parameter on all devices that the model is on."""
    sharding = getattr(self.embedding[...], "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
      return param
    whole = sharding.update(spec=jax.sharding.PartitionSpec())
    return param.replace(jax.device_put(param[...], whole))

  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    *,
    causal: bool = True,
  ) -> jax.Array:
    """Vocabulary logits, float32 [B, T, V]; arguments as for `encode`.

    Raises:
      ValueError: as `encode`; a funnel that does not recover.
    """
    config_lib.check_recovers(self.stages, "a language model")
    return self.logits(
      self.encode(tokens_BT, segment_BT, position_BT, causal=causal)
    )

  def encode(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    *,
    causal: bool = False,
  ) -> jax.Array:
    """Hidden states after the final norm, [B, T, D] in the compute dtype.

    [B, R, D] where a stage's recovery is "none".

    Args:
      tokens_BT: int token ids.
      segment_BT: int32; a token sees its own segment only, 0 is padding (on
        either side). A segment's slots are contiguous. With a funnel, segments
        of a row that holds several start at multiples of the total stride (and
        `keep_first`, unless causal, needs as much padding after each). None
        is one segment a row and no padding.
      position_BT: int32, rising by one within a segment; None counts from 0.
      causal: whether a token sees only what came before it.

    Raises:
      ValueError: too long a sequence; where the arguments are not being
        traced, token ids or segments that cannot be.
    """
    if not isinstance(tokens_BT, jax.Array):
      tokens_BT = np.asarray(tokens_BT)
    self._check(tokens_BT, segment_BT, causal)
    graphdef, params = nnx.split(self)
    return _encode(graphdef, causal, params, tokens_BT, segment_BT, position_BT)

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings times sqrt(D), which is rounded to the compute dtype first."""
    dtype = jnp.dtype(self.config.dtype)
    scale = jnp.asarray(math.sqrt(self.config.embed_dim), dtype)
    return _by_tokens(self.embedding[...][tokens_BT].astype(dtype) * scale)

  def trunk(self, stream: Stream, *, causal: bool) -> Stream:
    """All layers, and what the funnel's stages do between them.

    The result is short where a stage's recovery is "none".
    """
    block, stacked_L = nnx.split(self.layers)

    def run(step, stream, keys):
      span = _Span(block, self.config, step.start, step.stop, causal)
      return _run(span, stacked_L, stream, keys)

    return funnel_lib.walk(
      funnel_lib.schedule(self.stages, self.config.num_layers),
      stream,
      run,
      lambda stage, stream: self.funnel[stage].reduce(stream, causal),
      lambda stage, *args: self.funnel[stage].restore(*args, causal),
    )

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """The tied head: softcapped float32 logits [B, T, V]."""
    return head_logits(
      self.embedding[...], hidden_BTD, self.config.final_softcap
    )

  def _check(self, tokens_BT, segment_BT, causal):
    if tokens_BT.ndim != 2 or tokens_BT.size == 0:
      raise ValueError(
        f"tokens have shape {tokens_BT.shape}: expected [batch, length], "
        "neither of them 0"
      )
    if not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
      raise ValueError(f"tokens are {tokens_BT.dtype}: expected integers")
    length, longest = tokens_BT.shape[1], self.config.max_length
    if length > longest:
      raise ValueError(
        f"the sequence has {length} tokens; model.max_length is {longest}"
      )
    if isinstance(tokens_BT, jax.core.Tracer):
      return
    tokens = np.asarray(tokens_BT)  # Within a trace, jax's min would be traced.
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= self.config.vocab_size:
      raise ValueError(
        f"token ids from {low} to {high}: expected 0 to "
        f"{self.config.vocab_size - 1} (model.vocab_size="
        f"{self.config.vocab_size})"
      )
    if segment_BT is not None and not isinstance(segment_BT, jax.core.Tracer):
      funnel_lib.check_segments(np.asarray(segment_BT), self.stages, causal)


def head_logits(
  embedding_VD: jax.Array, hidden_BTD: jax.Array, softcap: float | None
) -> jax.Array:
  """Softcapped float32 logits [B, T, V] of a tied head."""
  axes, hidden = by_position("BTD", hidden_BTD)
  logits_BTV = jnp.einsum(
    f"{axes},VD->{axes[:-1]}V",
    hidden,
    embedding_VD.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  ).reshape(*hidden_BTD.shape[:-1], -1)
  logits_BTV = mesh_lib.constrain(
    logits_BTV, mesh_lib.ROWS, mesh_lib.TOKENS, mesh_lib.HEADS
  )
  if softcap is None:
    return logits_BTV
  return softcap * jnp.tanh(logits_BTV / softcap)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef, causal, params, tokens_BT, segment_BT, position_BT):
  model = nnx.merge(graphdef, params)
  stream = make_stream(model.embed(tokens_BT), segment_BT, position_BT)
  return model.final_norm(model.trunk(stream, causal=causal).hidden_BTD)


def _by_tokens(hidden_BTD: jax.Array) -> jax.Array:
  return mesh_lib.constrain(hidden_BTD, mesh_lib.ROWS, mesh_lib.TOKENS)


def _parts(stage: funnel_lib.Stage) -> dict[tuple[str, ...], nnx.Param]:
  """A stage's learned parts, by path."""
  return dict(nnx.to_flat_state(nnx.state(stage)))
