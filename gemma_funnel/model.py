"""Gemma 1 and 2, top to bottom, with a funnel.

Dimensions, as suffixes of names: B batch, T tokens (queries), S keys, R reduced
length, D model width, F MLP width, N query heads, K key/value heads, G = N/K,
H head width, V vocabulary, L layers (stacked parameters only).

The parameter tree is the same with any funnel and none: the L layers are one
stacked tree, of which the trunk runs [0, start) at full length, [start, stop)
on the pooled stream and [stop, L) at full length again.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import funnel as funnel_lib
from gemma_funnel.attention import attend
from gemma_funnel.config import FunnelConfig, GemmaConfig
from gemma_funnel.funnel import Stream


def _projection(fan_in_axes, out_axes, scale=1.0):
  """LeCun's rule: truncated normal of variance scale / fan-in (Efficient
  BackProp, 1998; the default of flax, nanodo and MaxText)."""
  return nnx.initializers.variance_scaling(
      scale, "fan_in", "truncated_normal", in_axis=fan_in_axes,
      out_axis=out_axes,
  )  # fmt: skip


class RMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale), in float32 and cast once, at the end."""

  def __init__(self, config: GemmaConfig):
    self.epsilon = config.norm_eps
    self.scale = nnx.Param(
      jnp.zeros(config.embed_dim, jnp.dtype(config.param_dtype))
    )

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    scale_D = 1.0 + self.scale[...].astype(jnp.float32)
    return (x * scale_D[None, None]).astype(x_BTD.dtype)


def rope_angles(
  position_BT: jax.Array, config: GemmaConfig
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, 1, H/2], float32, of arXiv 2104.09864."""
  exponent = np.arange(0, config.head_dim, 2) / config.head_dim
  frequency_111h = jnp.asarray(
    config.rope_base ** -exponent[None, None, None], jnp.float32
  )
  angle = position_BT.astype(jnp.float32)[..., None, None] * frequency_111h
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the half-split pairs (x[i], x[i + H/2]), in float32."""
  cos, sin = rope
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with RoPE."""

  def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
    self.config = config
    D, N, K, H = (
        config.embed_dim, config.num_heads, config.num_kv_heads,
        config.head_dim,
    )  # fmt: skip
    dtype = jnp.dtype(config.param_dtype)
    # Branches into the residual stream start smaller by the root of their
    # number (GPT-2's rule); Gemma 2's post norms undo it, Gemma 1 needs it.
    project, back = (
      _projection((0,), (1, 2)),
      _projection((0, 1), (2,), 1 / (2 * config.num_layers)),
    )
    self.query = nnx.Param(project(rngs.params(), (D, N, H), dtype))
    self.key = nnx.Param(project(rngs.params(), (D, K, H), dtype))
    self.value = nnx.Param(project(rngs.params(), (D, K, H), dtype))
    self.out = nnx.Param(back(rngs.params(), (N, H, D), dtype))

  def __call__(self, x_BTD, stream: Stream, rope, *, window, causal):
    config = self.config
    weight = lambda p: p[...].astype(x_BTD.dtype)
    q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, weight(self.query))
    k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, weight(self.key))
    v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, weight(self.value))
    o_BTNH = attend(
      rotate(q_BTNH, rope) * config.query_scale,
      rotate(k_BTKH, rope),
      v_BTKH,
      stream,
      stream,
      causal=causal,
      window=window,
      softcap=config.attn_softcap,
      softmax_dtype=config.softmax_dtype,
      kernel=config.kernel,
    )
    return jnp.einsum("BTNH,NHD->BTD", o_BTNH, weight(self.out))


class MLP(nnx.Module):
  """GeGLU with the tanh approximation of GELU."""

  def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
    D, F = config.embed_dim, config.mlp_dim
    dtype = jnp.dtype(config.param_dtype)
    project, back = (
      _projection((0,), (1,)),
      _projection((0,), (1,), 1 / (2 * config.num_layers)),
    )
    self.gate = nnx.Param(project(rngs.params(), (D, F), dtype))
    self.up = nnx.Param(project(rngs.params(), (D, F), dtype))
    self.down = nnx.Param(back(rngs.params(), (F, D), dtype))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    weight = lambda p: p[...].astype(x_BTD.dtype)
    gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, weight(self.gate))
    up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, weight(self.up))
    hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
    return jnp.einsum("BTF,FD->BTD", hidden_BTF, weight(self.down))


class Block(nnx.Module):
  """One layer: attention and MLP, each with a residual. Knows no funnel."""

  def __init__(self, config: GemmaConfig, rngs: nnx.Rngs):
    self.pre_attn_norm = RMSNorm(config)
    self.attn = Attention(config, rngs)
    self.pre_mlp_norm = RMSNorm(config)
    self.mlp = MLP(config, rngs)
    self.post_norms = config.post_norms
    if config.post_norms:
      self.post_attn_norm = RMSNorm(config)
      self.post_mlp_norm = RMSNorm(config)

  def __call__(
    self, stream: Stream, rope, *, window: int | None, causal: bool
  ) -> Stream:
    x_BTD = stream.hidden_BTD
    branch_BTD = self.attn(
      self.pre_attn_norm(x_BTD), stream, rope, window=window, causal=causal
    )
    if self.post_norms:
      branch_BTD = self.post_attn_norm(branch_BTD)
    x_BTD = x_BTD + branch_BTD
    branch_BTD = self.mlp(self.pre_mlp_norm(x_BTD))
    if self.post_norms:
      branch_BTD = self.post_mlp_norm(branch_BTD)
    return stream.replace(hidden_BTD=x_BTD + branch_BTD)


@dataclasses.dataclass(frozen=True)
class _Span:
  """Layers [start, stop) of a stack, and how to run them; all static."""

  block: nnx.GraphDef
  config: GemmaConfig
  start: int
  stop: int
  causal: bool

  def layer(self, params, stream, rope, index):
    """Runs one layer, given its own parameters."""

    def call(params, stream):
      return nnx.merge(self.block, params)(
          stream, rope, window=self.config.window_of(index),
          causal=self.causal,
      )  # fmt: skip

    policies = jax.checkpoint_policies
    match self.config.remat:
      case "dots":
        call = jax.checkpoint(
          call, policy=policies.dots_with_no_batch_dims_saveable
        )
      case "block":
        call = jax.checkpoint(call, policy=policies.nothing_saveable)
    return call(params, stream)

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

  def body(self, first, period, params_of, stream, rope) -> Stream:
    """Runs layers like `first` and the `period` - 1 after it."""
    for j in range(period):
      stream = self.layer(params_of(j), stream, rope, first + j)
    return stream


def _pick(params, index):
  return jax.tree.map(lambda p: p[index], params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(span: _Span, stacked_L, stream: Stream) -> Stream:
  """Runs the layers of `span` on `stream`.

  Parameters are read out of the whole stack where they lie. A scan over a part
  of it would copy that part first, on every call.
  """
  rope = rope_angles(stream.position_BT, span.config)
  for first, repeats, period in span.parts():

    def body(repeat, stream):
      at = first + repeat * period
      params_of = lambda j: _pick(stacked_L, at + j)
      return span.body(first, period, params_of, stream, rope)

    if span.config.scan_layers:
      # The compiler must not know that a loop may run only once: it would take
      # the body out of the loop, where XLA:CPU runs it a third slower.
      stop = jax.lax.optimization_barrier(jnp.int32(repeats))
      stream = jax.lax.fori_loop(0, stop, body, stream)
    else:
      stream = body(0, stream)
  return stream


def _run_sliced(span, stacked_L, stream):
  """As `_run`, with the parameters of each loop as a scan's own inputs.

  Their gradients are then stacked by the scan; gradients of reads from the
  whole stack would be summed into all of it, layer after layer.
  """
  rope = rope_angles(stream.position_BT, span.config)
  for first, repeats, period in span.parts():

    def body(stream, params_P):
      params_of = lambda j: _pick(params_P, j)
      return span.body(first, period, params_of, stream, rope), None

    periods = jax.tree.map(
      lambda p: p[first : first + repeats * period].reshape(
        repeats, period, *p.shape[1:]
      ),
      stacked_L,
    )
    stream, _ = jax.lax.scan(body, stream, periods)
  return stream


def _run_forward(span, stacked_L, stream):
  return jax.vjp(functools.partial(_run_sliced, span), stacked_L, stream)


def _run_backward(span, vjp, cotangent):
  del span
  return vjp(cotangent)


_run.defvjp(_run_forward, _run_backward)


class Gemma(nnx.Module):
  """A Gemma, with or without a funnel.

  Attributes:
    config: sizes and switches.
    funnel: the funnel, resolved against the depth; None is none.
  """

  def __init__(
    self,
    config: GemmaConfig,
    funnel: FunnelConfig | str | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    """Fresh parameters.

    Embeddings are normal with deviation 1/sqrt(D), so that scaled by sqrt(D)
    they enter the first layer with variance one, and logits leave with it too.
    """
    self.config = config
    self.funnel = _resolve(funnel, config)
    self.embedding = nnx.Param(
      nnx.initializers.normal(config.embed_dim**-0.5)(
        rngs.params(),
        (config.vocab_size, config.embed_dim),
        jnp.dtype(config.param_dtype),
      )
    )
    stack = nnx.vmap(Block, in_axes=(None, 0))
    self.layers = stack(config, rngs.split(config.num_layers))
    self.final_norm = RMSNorm(config)

  @classmethod
  def abstract(
    cls, config: GemmaConfig, funnel: FunnelConfig | str | None = None
  ) -> "Gemma":
    """A model of shapes only: nothing is allocated."""
    return nnx.eval_shape(lambda: cls(config, funnel, rngs=nnx.Rngs(0)))

  def with_funnel(self, funnel: FunnelConfig | str | None) -> "Gemma":
    """The same parameters under another funnel, or none."""
    graphdef = nnx.graphdef(Gemma.abstract(self.config, funnel))
    return nnx.merge(graphdef, nnx.state(self))

  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    *,
    causal: bool = True,
  ) -> jax.Array:
    """Vocabulary logits, float32 [B, T, V]; arguments as for `encode`."""
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

    Args:
      tokens_BT: int token ids.
      segment_BT: int32; a token sees its own segment only, 0 is padding (on
        either side). A segment's slots are contiguous. With a funnel, segments
        of a row that holds several start at multiples of the stride. None is
        one segment a row and no padding.
      position_BT: int32, rising by one within a segment; None counts from 0.
      causal: whether a token sees only what came before it.

    Raises:
      ValueError: too long a sequence; where the arguments are not being
        traced, token ids or segments that cannot be.
    """
    if not isinstance(tokens_BT, jax.Array):
      tokens_BT = np.asarray(tokens_BT)
    self._check(tokens_BT, segment_BT)
    graphdef, params = nnx.split(self)
    return _encode(graphdef, causal, params, tokens_BT, segment_BT, position_BT)

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Embeddings times sqrt(D), which is rounded to the compute dtype first."""
    dtype = jnp.dtype(self.config.dtype)
    scale = jnp.asarray(math.sqrt(self.config.embed_dim), dtype)
    return self.embedding[...][tokens_BT].astype(dtype) * scale

  def trunk(self, stream: Stream, *, causal: bool) -> Stream:
    """All layers: the first ones, the pooled ones, the last ones."""
    block, stacked_L = nnx.split(self.layers)
    depth = self.config.num_layers

    def run(stream, start, stop):
      if start == stop:
        return stream
      span = _Span(block, self.config, start, stop, causal)
      return _run(span, stacked_L, stream)

    funnel = self.funnel
    if funnel is None:
      return run(stream, 0, depth)
    stream = run(stream, 0, funnel.start)
    short, read_BT = funnel_lib.reduce(stream, funnel, causal)
    short = run(short, funnel.start, funnel.stop)
    stream = funnel_lib.restore(short, stream, read_BT, funnel)
    return run(stream, funnel.stop, depth)

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """The tied head: softcapped float32 logits [B, T, V]."""
    logits_BTV = jnp.einsum(
      "BTD,VD->BTV",
      hidden_BTD,
      self.embedding[...].astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )
    cap = self.config.final_softcap
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

  def _check(self, tokens_BT, segment_BT):
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
      stride = self.funnel.stride if self.funnel else 1
      funnel_lib.check_segments(np.asarray(segment_BT), stride)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef, causal, params, tokens_BT, segment_BT, position_BT):
  model = nnx.merge(graphdef, params)
  stream = funnel_lib.make_stream(
    model.embed(tokens_BT), segment_BT, position_BT
  )
  return model.final_norm(model.trunk(stream, causal=causal).hidden_BTD)


def _resolve(funnel, config) -> FunnelConfig | None:
  if isinstance(funnel, str):
    funnel = FunnelConfig.parse(funnel)
  return None if funnel is None else funnel.resolve(config.num_layers)
