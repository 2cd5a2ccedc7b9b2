"""The parts of a block: norm, rotary embeddings, attention, MLP.

Blocks know no funnel, no mask and no cache: whoever runs one passes an
`AttentionFn` of queries, keys and values, and the rotary angles of its slots.

Dimensions, as suffixes of names: B batch, T tokens (queries), S keys, D model
width, F MLP width, N query heads, K key/value heads, H head width.
"""

from collections.abc import Callable
import functools
import re

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from gemma_funnel import params
from gemma_funnel.attention.api import attend
from gemma_funnel.attention.blocked import attention_of_last, attention_received
from gemma_funnel.config import LayerSpec, RopeScaling, TransformerConfig
from gemma_funnel.numerics import normalize
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream

# Queries at the end of a row that "attention_of_last" is of (arXiv 2404.14469).
LAST_QUERIES = 8
# What `remat` may keep, products of activations and parameters, is called.
PRODUCT = "product"

# (cos, sin) of rotary angles, each [B, T, 1, H/2].
Rope = tuple[jax.Array, jax.Array]
# What a layer was asked for, by name; see `reducers.NEEDS`.
Aux = dict[str, jax.Array]
# (q_BTNH, k_BSKH, v_BSKH) -> (o_BTNH, aux); queries are scaled, both rotated.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Aux]]


def make_attention_fn(
  config: TransformerConfig,
  queries: Stream,
  keys: Stream,
  causal: bool,
  window: int | None = None,
  needs: tuple[str, ...] = (),
) -> AttentionFn:
  """Attention to keys that are all at hand; see `attention.api.attend`.

  Args:
    config: of the model.
    queries, keys: where they stand.
    causal, window: what queries may see.
    needs: what it gives besides, float32 [B, S]: "attention_received" is the
      attention that each key gets, summed over heads and queries;
      "attention_of_last" that of the last `LAST_QUERIES` queries of each row.
  """
  rules = dict(
    queries=queries.slots(),
    keys=keys.slots(),
    causal=causal,
    window=window,
    softcap=config.attn_softcap,
    softmax_dtype=config.softmax_dtype,
  )
  if queries is keys:
    rules["keys"] = rules["queries"]

  def attention_fn(q_BTNH, k_BSKH, v_BSKH):
    aux = {}
    if "attention_received" in needs:
      aux["attention_received"] = attention_received(q_BTNH, k_BSKH, **rules)
    if "attention_of_last" in needs:
      aux["attention_of_last"] = attention_of_last(
        q_BTNH, k_BSKH, LAST_QUERIES, **rules
      )
    o_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, kernel=config.kernel, **rules)
    return o_BTNH, aux

  return attention_fn


class RMSNorm(nnx.Module):
  """x / rms(x) * (offset + scale), in float32 and cast once, at the end."""

  def __init__(self, config: TransformerConfig, path: str):
    self.epsilon, self.offset = config.norm_eps, config.norm_offset
    scale = params.init(f"{path}/scale", config)
    self.scale = nnx.Param(scale + (1 - config.norm_offset))

  def __call__(self, x: jax.Array) -> jax.Array:
    return _rms_norm(x, self.scale[...], self.epsilon, self.offset)


# All that the backward pass has of it is x.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _rms_norm(x, scale_D, epsilon: float, offset: float) -> jax.Array:
  scale_D = offset + scale_D.astype(jnp.float32)
  normal = normalize(x, epsilon)
  scale = jnp.expand_dims(scale_D, range(x.ndim - 1))
  return (normal * scale).astype(x.dtype)


def rope_angles(
  position_BT: jax.Array, config: TransformerConfig, spec: LayerSpec
) -> Rope:
  """Cosines and sines [B, T, 1, H/2], float32, of arXiv 2104.09864."""
  frequency_111h = jnp.asarray(
    _frequencies(config.head_dim, *spec.rope)[None, None, None], jnp.float32
  )
  angle = position_BT.astype(jnp.float32)[..., None, None] * frequency_111h
  return jnp.cos(angle), jnp.sin(angle)


def _frequencies(
  head_dim: int, base: float, scaling: RopeScaling | None
) -> np.ndarray:
  """Radians a token of each of the H/2 pairs, float64."""
  frequency_h = base ** -(np.arange(0, head_dim, 2) / head_dim)
  if scaling is None:
    return frequency_h
  if scaling.kind == "linear":
    return frequency_h / scaling.factor
  # llama3: how many times a frequency turns within the original length.
  turns_h = scaling.original_max_length * frequency_h / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept_h = np.clip((turns_h - low) / (high - low), 0, 1)
  return frequency_h * (kept_h + (1 - kept_h) / scaling.factor)


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
  """Rotates the half-split pairs (x[i], x[i + H/2]), in float32."""
  cos, sin = rope
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with RoPE: its projections."""

  def __init__(
    self, config: TransformerConfig, rngs: nnx.Rngs, path: str = "layers/attn"
  ):
    self.config = config
    new = lambda name: nnx.Param(params.init(f"{path}/{name}", config, rngs))
    self.query, self.key = new("query"), new("key")
    self.value, self.out = new("value"), new("out")
    if config.attention_bias:
      self.query_bias, self.key_bias = new("query_bias"), new("key_bias")
      self.value_bias = new("value_bias")
    if config.qk_norm:
      self.query_norm = RMSNorm(config, f"{path}/query_norm")
      self.key_norm = RMSNorm(config, f"{path}/key_norm")

  def __call__(
    self,
    x_BTD,
    rope: Rope,
    attention_fn: AttentionFn,
    keys_BSD=None,
    keys_rope=None,
  ) -> tuple[jax.Array, Aux]:
    """(attention of x to `keys_BSD`, aux); None is x itself."""
    if keys_BSD is None:
      keys_BSD, keys_rope = x_BTD, rope
    q_BTNH = self.queries(x_BTD, rope)
    o_BTNH, aux = attention_fn(q_BTNH, *self.keys_values(keys_BSD, keys_rope))
    return self.output(o_BTNH), aux

  def queries(self, x_BTD, rope: Rope) -> jax.Array:
    """q_BTNH, rotated and scaled."""
    q_BTNH = _einsum("BTD,DNH->BTNH", x_BTD, self.query)
    if self.config.attention_bias:
      q_BTNH = _add_bias(q_BTNH, self.query_bias)
    if self.config.qk_norm:
      q_BTNH = self.query_norm(q_BTNH)
    return rotate(q_BTNH, rope) * self.config.query_scale

  def keys_values(self, x_BSD, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """(k_BSKH, v_BSKH); keys are rotated."""
    k_BSKH = _einsum("BSD,DKH->BSKH", x_BSD, self.key)
    v_BSKH = _einsum("BSD,DKH->BSKH", x_BSD, self.value)
    if self.config.attention_bias:
      k_BSKH = _add_bias(k_BSKH, self.key_bias)
      v_BSKH = _add_bias(v_BSKH, self.value_bias)
    if self.config.qk_norm:
      k_BSKH = self.key_norm(k_BSKH)
    return rotate(k_BSKH, rope), v_BSKH

  def output(self, o_BTNH) -> jax.Array:
    return _einsum("BTNH,NHD->BTD", o_BTNH, self.out)


class MLP(nnx.Module):
  """A gated MLP: GeGLU (tanh approximation of GELU) or SwiGLU."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.activation = config.activation
    self.gate = nnx.Param(params.init("layers/mlp/gate", config, rngs))
    self.up = nnx.Param(params.init("layers/mlp/up", config, rngs))
    self.down = nnx.Param(params.init("layers/mlp/down", config, rngs))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = _einsum("BTD,DF->BTF", x_BTD, self.gate)
    up_BTF = _einsum("BTD,DF->BTF", x_BTD, self.up)
    down_FD = self.down.get_value()
    out_BTD = _gated_back(gate_BTF, up_BTF, down_FD, self.activation)
    return checkpoint_name(out_BTD, PRODUCT)


# The activation is made again in the backward pass, which takes less time than
# keeping it.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _gated_back(gate_BTF, up_BTF, down_FD, activation: str) -> jax.Array:
  if activation == "silu":
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
  else:
    hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
  return _product("BTF,FD->BTD", hidden_BTF, down_FD)


class Block(nnx.Module):
  """One layer: attention and MLP, each with a residual."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.pre_attn_norm = RMSNorm(config, "layers/pre_attn_norm")
    self.attn = Attention(config, rngs)
    self.pre_mlp_norm = RMSNorm(config, "layers/pre_mlp_norm")
    self.mlp = MLP(config, rngs)
    self.post_norms = config.post_norms
    if config.post_norms:
      self.post_attn_norm = RMSNorm(config, "layers/post_attn_norm")
      self.post_mlp_norm = RMSNorm(config, "layers/post_mlp_norm")

  def __call__(
    self,
    x_BTD,
    rope: Rope,
    attention_fn: AttentionFn | None,
    keys_BSD=None,
    keys_rope=None,
  ) -> tuple[jax.Array, Aux]:
    """(x after the layer, aux); it attends to `keys_BSD`, None is x itself.

    `aux` is that of `attention_fn`; without one there is no attention.
    """
    aux = {}
    if attention_fn is not None:
      if keys_BSD is not None:
        keys_BSD = self.pre_attn_norm(keys_BSD)
      branch_BTD, aux = self.attn(
        self.pre_attn_norm(x_BTD), rope, attention_fn, keys_BSD, keys_rope
      )
      if self.post_norms:
        branch_BTD = self.post_attn_norm(branch_BTD)
      x_BTD = x_BTD + branch_BTD
    branch_BTD = self.mlp(self.pre_mlp_norm(x_BTD))
    if self.post_norms:
      branch_BTD = self.post_mlp_norm(branch_BTD)
    return x_BTD + branch_BTD, aux


def _add_bias(x_BTNH: jax.Array, bias: nnx.Param) -> jax.Array:
  return x_BTNH + bias[...].astype(x_BTNH.dtype)[None, None]


def _einsum(subscripts: str, x: jax.Array, param: nnx.Param) -> jax.Array:
  """Of x and a parameter, in the dtype of x.

  Args:
    subscripts: of which those of x and of the result begin with rows, tokens.
    x: activations.
    param: an array, or what can do that by itself: see `training.lora.Adapted`.
  """
  product = _product(subscripts, x, param.get_value())
  return checkpoint_name(product, PRODUCT)


def _product(subscripts: str, x: jax.Array, weight) -> jax.Array:
  if hasattr(weight, "einsum"):
    return weight.einsum(subscripts, x)
  return _matmul(subscripts, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  return jnp.einsum(subscripts, x, weight.astype(x.dtype))


def _matmul_forward(subscripts, x, weight):
  # What is kept are x and the weight themselves, which others keep as well.
  return _matmul(subscripts, x, weight), (x, weight)


def _matmul_backward(subscripts, kept, gradient):
  x, weight = kept
  inputs, matrix, outputs = re.split(",|->", subscripts)
  d_x = jnp.einsum(
    f"{outputs},{matrix}->{inputs}", gradient, weight.astype(x.dtype)
  )
  inputs, x = by_position(inputs, x)
  outputs, gradient = by_position(outputs, gradient)
  d_weight = jnp.einsum(f"{inputs},{outputs}->{matrix}", x, gradient)
  return d_x, d_weight.astype(weight.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def by_position(subscripts: str, x: jax.Array) -> tuple[str, jax.Array]:
  """Rows and tokens, the first two dimensions of x, as one.

  For sums over both, the gradients of a matrix: XLA:CPU transposes what it sums
  over two, and takes half as long again. Where tokens are split over devices
  both are left as they are.
  """
  if mesh_lib.size(mesh_lib.TOKENS) > 1:
    return subscripts, x
  return f"P{subscripts[2:]}", x.reshape(-1, *x.shape[2:])
