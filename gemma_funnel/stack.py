"""Running layers: a loop or unrolled, what is recomputed, and the gradient.

`run_layers` runs layers [start, stop) of a stack on a stream. It reads their
parameters where they lie, and has a gradient of its own that keeps nothing
twice.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel.config import TransformerConfig
from gemma_funnel.layers import PRODUCT, Aux, make_attention_fn, rope_angles
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream


def run_layers(
  layers: nnx.Module,
  config: TransformerConfig,
  start: int,
  stop: int,
  stream: Stream,
  keys: Stream | None = None,
  *,
  causal: bool,
  needs: tuple[str, ...] = (),
  attends: bool = True,
) -> tuple[Stream, Aux]:
  """Runs layers [start, stop) of a stack.

  Args:
    layers: one `Block` whose parameters are stacked, [L, ...].
    config: of the model.
    start, stop: which of them.
    stream: the hidden states, and where they stand.
    keys: what they attend to; None is the stream itself, as it goes on.
    causal: whether the future is hidden.
    needs: what a single layer is asked for, of `reducers.NEEDS`; gradients of
      it are stopped.
    attends: whether their attention runs; without it, only their MLPs do.

  Returns:
    (the stream after the layers, a value for each of `needs`).
  """
  assert not needs or stop == start + 1, (start, stop)
  block, stacked_L = nnx.split(layers)
  bare = lambda s: s and s.replace(context_BT=None, context_length=0)
  span = _Span(block, config, start, stop, causal, needs, attends)
  result, aux = _run(span, stacked_L, bare(stream), bare(keys))
  return stream.replace(hidden_BTD=result.hidden_BTD), aux


def by_tokens(hidden_BTD: jax.Array) -> jax.Array:
  """Hidden states, split over the mesh by rows and tokens."""
  return mesh_lib.constrain(hidden_BTD, mesh_lib.ROWS, mesh_lib.TOKENS)


@dataclasses.dataclass(frozen=True)
class _Span:
  """Layers [start, stop) of a stack, and how to run them; all static."""

  block: nnx.GraphDef
  config: TransformerConfig
  start: int
  stop: int
  causal: bool
  needs: tuple[str, ...] = ()
  attends: bool = True

  def ropes(self, stream):
    """The angles of each kind of layer, in the order of `kinds`."""
    return stream and [
      rope_angles(stream.position_BT, self.config, spec)
      for spec in self.kinds.values()
    ]

  @functools.cached_property
  def kinds(self):
    """A layer of each kind of rotation in the span."""
    specs = self.config.layers[self.start : self.stop]
    return {spec.rope: spec for spec in specs}

  def layer(self, params, stream, keys, ropes, index):
    """(stream, aux) after one layer, given its own parameters."""
    spec = self.config.layers[index]
    kind = list(self.kinds).index(spec.rope)
    rope, keys_rope = (angles and angles[kind] for angles in ropes)

    def call(params, stream, keys):
      attention_fn = None
      if self.attends:
        attention_fn = make_attention_fn(
          self.config,
          stream,
          keys or stream,
          self.causal,
          spec.window,
          self.needs,
        )
      hidden_BTD, aux = nnx.merge(self.block, params)(
        stream.hidden_BTD,
        rope,
        attention_fn,
        keys and keys.hidden_BTD,
        keys_rope,
      )
      return stream.replace(hidden_BTD=by_tokens(hidden_BTD)), aux

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

  def body(self, first, period, params_of, stream, keys, ropes):
    """(stream, aux) after layers like `first` and the `period` - 1 after it."""
    aux = {}
    for j in range(period):
      stream, aux = self.layer(params_of(j), stream, keys, ropes, first + j)
    return stream, aux


def _pick(params, index):
  return jax.tree.map(lambda p: p[index], params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
  span: _Span, stacked_L, stream: Stream, keys: Stream | None
) -> tuple[Stream, Aux]:
  """Runs the layers of `span` on `stream`, with its own keys or with `keys`.

  Parameters are read out of the whole stack where they lie. A scan over a part
  of it would copy that part first, on every call.
  """
  ropes, aux = (span.ropes(stream), span.ropes(keys)), {}
  for first, repeats, period in span.parts():

    def body(repeat, stream):
      at = first + repeat * period
      params_of = lambda j: _pick(stacked_L, at + j)
      return span.body(first, period, params_of, stream, keys, ropes)

    if span.config.scan_layers and not span.needs:
      # The compiler must not know that a loop may run only once: it would take
      # the body out of the loop, where XLA:CPU runs it a third slower.
      stop = jax.lax.optimization_barrier(jnp.int32(repeats))
      stream = jax.lax.fori_loop(
        0, stop, lambda repeat, stream: body(repeat, stream)[0], stream
      )
    else:
      stream, aux = body(0, stream)
  return stream, aux


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
  ropes = span.ropes(stream), span.ropes(keys)
  rest = _rest(stream), _rest(keys)
  loops, aux = [], {}
  for first, repeats, period in span.parts():

    def body(hidden, periods):
      layers = [_pick(periods, j) for j in range(period)]

      def run(changing, hidden, keys_hidden):
        params_of = lambda j: _join(layers[j], learned, changing[j])
        stream, aux = span.body(
          first,
          period,
          params_of,
          _with(rest[0], hidden),
          _with(rest[1], keys_hidden),
          ropes,
        )
        return stream.hidden_BTD, jax.lax.stop_gradient(aux)

      changing = [_split(layer, learned) for layer in layers]
      hidden, vjp, aux = jax.vjp(
        run, changing, hidden, keys and keys.hidden_BTD, has_aux=True
      )
      return hidden, (_Kept.of(vjp, (layers, ropes, rest), learned), aux)

    periods = jax.tree.map(
      lambda p: p[first : first + repeats * period].reshape(
        repeats, period, *p.shape[1:]
      ),
      stacked_L,
    )
    hidden, (kept, aux) = jax.lax.scan(body, stream.hidden_BTD, periods)
    stream = _with(stream, hidden)
    aux = _pick(aux, -1)
    loops.append((periods, kept))
  d_keys = keys and jnp.zeros_like(keys.hidden_BTD)
  return (stream, aux), (loops, ropes, rest, d_keys)


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


def _run_backward(span: _Span, saved, gradients: tuple[Stream, Aux]):
  loops, ropes, rest, d_keys = saved
  d_stream, _ = gradients
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
  unlearned = dict(
    position_BT=None, last_token_position_BT=None, segment_BT=None
  )
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
