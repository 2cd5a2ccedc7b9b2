"""A transformer with a funnel: the trunk and the logits.

Dimensions, as suffixes of names: B batch, T tokens (queries), S keys, R reduced
length, D model width, F MLP width, N query heads, K key/value heads, G = N/K,
H head width, V vocabulary, L layers (stacked parameters only).

`layers/` of the parameter tree is the same with any funnel and none: the L
layers are one stacked tree, of which the trunk runs [0, start) at full length,
[start, stop) on the short stream and [stop, L) at full length again. What a
funnel learns besides is in `funnel/`, a number for each stage.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import config as config_lib
from gemma_funnel import funnel as funnel_lib
from gemma_funnel import params as params_lib
from gemma_funnel import reducers as reducers  # Registers ours.
from gemma_funnel.config import Funnel, TransformerConfig
from gemma_funnel.layers import Block, RMSNorm, by_position
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stack import by_tokens, run_layers
from gemma_funnel.stream import Stream, make_stream, round_span


class Transformer(nnx.Module):
  """A decoder-only transformer, with or without a funnel.

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
    if not config.tied:
      self.unembedding = nnx.Param(params_lib.init("unembedding", config, rngs))
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
    **context,
  ) -> jax.Array:
    """Vocabulary logits, float32 [B, T, V]; arguments as for `encode`.

    Raises:
      ValueError: as `encode`; a funnel that does not recover.
    """
    config_lib.check_recovers(self.stages, "a language model")
    return self.logits(
      self.encode(tokens_BT, segment_BT, position_BT, causal=causal, **context)
    )

  def encode(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    *,
    causal: bool = False,
    context_BT: jax.Array | None = None,
    context_length: int | None = None,
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
      context_BT: bool, the tokens of a span for a reducer that drops one, such
        as demonstrations; rows may have spans of different lengths.
      context_length: how many tokens of a span each row has at least: what the
        reducer saves. None counts them, which needs values.

    Raises:
      ValueError: too long a sequence; a reducer that cannot do what is asked;
        where the arguments are not being traced, token ids, segments or spans
        that cannot be.
    """
    if not isinstance(tokens_BT, jax.Array):
      tokens_BT = np.asarray(tokens_BT)
    _check_shapes(tokens_BT, segment_BT, position_BT, context_BT)
    self._check(tokens_BT, segment_BT, causal)
    context_length = _context_length(tokens_BT, context_BT, context_length)
    graphdef, params = nnx.split(self)
    return _encode(
      graphdef,
      causal,
      context_length,
      params,
      tokens_BT,
      segment_BT,
      position_BT,
      context_BT,
    )

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings times their scale, which is rounded to the dtype first."""
    dtype = jnp.dtype(self.config.dtype)
    scale = self.config.embed_scale
    if scale is None:
      scale = math.sqrt(self.config.embed_dim)
    scale = jnp.asarray(scale, dtype)
    return by_tokens(self.embedding[...][tokens_BT].astype(dtype) * scale)

  def trunk(self, stream: Stream, *, causal: bool) -> Stream:
    """All layers, and what the funnel's stages do between them.

    The result is short where a stage's recovery is "none".

    Raises:
      ValueError: a reducer that knows no streams that are not causal.
    """
    if not causal:
      config_lib.check_reducers(self.stages, "bidirectional", "causal=False")

    def run(step, stream, keys):
      return run_layers(
        self.layers,
        self.config,
        step.start,
        step.stop,
        stream,
        keys,
        causal=causal,
        needs=step.needs,
        attends=step.keys != "none",
      )

    return funnel_lib.run_trunk(
      funnel_lib.layer_plan(self.stages, self.config),
      stream,
      run,
      lambda stage, *args: self.funnel[stage].reducer.reduce(*args, causal),
      lambda stage, *args: self.funnel[stage].upsample(*args, causal),
    )

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """The head: softcapped float32 logits [B, T, V]."""
    return head_logits(self.head_VD, hidden_BTD, self.config.final_softcap)

  @property
  def head_VD(self) -> jax.Array:
    """The head's matrix: the embedding, or one of its own."""
    param = self.embedding if self.config.tied else self.unembedding
    return param[...]

  def _check(self, tokens_BT, segment_BT, causal):
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
      segment_BT = np.asarray(segment_BT)
      before_BT = np.pad(segment_BT[:, :-1], ((0, 0), (1, 0)))
      starts_BT = (segment_BT != before_BT) & (segment_BT != 0)
      if np.max(np.sum(starts_BT, axis=1)) > 1:
        config_lib.check_reducers(self.stages, "packs", "packed rows")
      funnel_lib.check_segments(segment_BT, self.stages, causal)


def head_logits(
  embedding_VD: jax.Array, hidden_BTD: jax.Array, softcap: float | None
) -> jax.Array:
  """Softcapped float32 logits [B, T, V]."""
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


def _check_shapes(tokens_BT, segment_BT, position_BT, context_BT) -> None:
  if tokens_BT.ndim != 2 or tokens_BT.size == 0:
    raise ValueError(
      f"tokens have shape {tokens_BT.shape}: expected [batch, length], "
      "neither of them 0"
    )
  others = dict(segment=segment_BT, position=position_BT, context=context_BT)
  for name, array in others.items():
    if array is not None and np.shape(array) != tokens_BT.shape:
      raise ValueError(
        f"{name}_BT has shape {np.shape(array)}: expected that of the tokens, "
        f"{tokens_BT.shape}"
      )


def _context_length(tokens_BT, context_BT, given: int | None) -> int:
  """How many tokens of a span each row has at least, as programs are made."""
  if context_BT is None or given is not None:
    return given or 0
  if context_BT.shape != tokens_BT.shape:
    raise ValueError(
      f"context has shape {context_BT.shape}: expected that of the tokens, "
      f"{tokens_BT.shape}"
    )
  if isinstance(context_BT, jax.core.Tracer):
    raise ValueError(
      "context_length is missing: a span that is traced cannot be counted"
    )
  least = int(np.min(np.sum(np.asarray(context_BT, bool), axis=1)))
  return round_span(least, tokens_BT.shape[1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(graphdef, causal, context_length, params, tokens_BT, *where):
  model = nnx.merge(graphdef, params)
  stream = make_stream(model.embed(tokens_BT), *where, context_length)
  return model.final_norm(model.trunk(stream, causal=causal).hidden_BTD)


def _parts(stage: funnel_lib.Stage) -> dict[tuple[str, ...], nnx.Param]:
  """A stage's learned parts, by path."""
  return dict(nnx.to_flat_state(nnx.state(stage)))
