"""The parts of a Gemma block: norm, rotary embeddings, attention, MLP.

Blocks know no funnel, no mask and no cache: whoever runs one passes `look`, a
function of queries, keys and values that says what they see of each other.

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
from gemma_funnel.config import TransformerConfig
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.stream import Stream

# What `remat` may keep, products of activations and parameters, is called.
PRODUCT = "product"

# (cos, sin) of rotary angles, each [B, T, 1, H/2].
Rope = tuple[jax.Array, jax.Array]
# (q_BTNH, k_BSKH, v_BSKH) -> o_BTNH; queries are scaled, both are rotated.
Look = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_look(
  config: TransformerConfig,
  queries: Stream,
  keys: Stream,
  causal: bool,
  window: int | None = None,
) -> Look:
  """What queries see of keys that are all at hand; see `attention.attend`."""
  return functools.partial(
    attend,
    queries=queries,
    keys=keys,
    causal=causal,
    window=window,
    softcap=config.attn_softcap,
    softmax_dtype=config.softmax_dtype,
    kernel=config.kernel,
  )


class RMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale), in float32 and cast once, at the end."""

  def __init__(self, config: TransformerConfig, path: str):
    self.epsilon = config.norm_eps
    self.scale = nnx.Param(params.init(f"{path}/scale", config))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return _rms_norm(x_BTD, self.scale[...], self.epsilon)


# All that the backward pass has of it is x.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x_BTD, scale_D, epsilon: float) -> jax.Array:
  scale_D = 1.0 + scale_D.astype(jnp.float32)
  x = normalize(x_BTD, epsilon)
  return (x * scale_D[None, None]).astype(x_BTD.dtype)


def normalize(x: jax.Array, epsilon: float) -> jax.Array:
  """x / rms(x) over the last axis, float32."""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + epsilon)


def rope_angles(position_BT: jax.Array, config: TransformerConfig) -> Rope:
  """Cosines and sines [B, T, 1, H/2], float32, of arXiv 2104.09864."""
  exponent = np.arange(0, config.head_dim, 2) / config.head_dim
  frequency_111h = jnp.asarray(
    config.rope_base ** -exponent[None, None, None], jnp.float32
  )
  angle = position_BT.astype(jnp.float32)[..., None, None] * frequency_111h
  return jnp.cos(angle), jnp.sin(angle)


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
    self.query = nnx.Param(params.init(f"{path}/query", config, rngs))
    self.key = nnx.Param(params.init(f"{path}/key", config, rngs))
    self.value = nnx.Param(params.init(f"{path}/value", config, rngs))
    self.out = nnx.Param(params.init(f"{path}/out", config, rngs))

  def __call__(
    self, x_BTD, rope: Rope, look: Look, keys_BSD=None, keys_rope=None
  ) -> jax.Array:
    """Attention of x to `keys_BSD`; None is x itself."""
    if keys_BSD is None:
      keys_BSD, keys_rope = x_BTD, rope
    q_BTNH = self.queries(x_BTD, rope)
    return self.output(look(q_BTNH, *self.keys_values(keys_BSD, keys_rope)))

  def queries(self, x_BTD, rope: Rope) -> jax.Array:
    """q_BTNH, rotated and scaled."""
    q_BTNH = _einsum("BTD,DNH->BTNH", x_BTD, self.query)
    return rotate(q_BTNH, rope) * self.config.query_scale

  def keys_values(self, x_BSD, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """(k_BSKH, v_BSKH); keys are rotated."""
    k_BSKH = _einsum("BSD,DKH->BSKH", x_BSD, self.key)
    v_BSKH = _einsum("BSD,DKH->BSKH", x_BSD, self.value)
    return rotate(k_BSKH, rope), v_BSKH

  def output(self, o_BTNH) -> jax.Array:
    return _einsum("BTNH,NHD->BTD", o_BTNH, self.out)


class MLP(nnx.Module):
  """GeGLU with the tanh approximation of GELU."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.gate = nnx.Param(params.init("layers/mlp/gate", config, rngs))
    self.up = nnx.Param(params.init("layers/mlp/up", config, rngs))
    self.down = nnx.Param(params.init("layers/mlp/down", config, rngs))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    gate_BTF = _einsum("BTD,DF->BTF", x_BTD, self.gate)
    up_BTF = _einsum("BTD,DF->BTF", x_BTD, self.up)
    out_BTD = _gated_back(gate_BTF, up_BTF, self.down.get_value())
    return checkpoint_name(out_BTD, PRODUCT)


# For the backward pass GELU is made again, which takes less than keeping it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated_back(gate_BTF: jax.Array, up_BTF: jax.Array, down) -> jax.Array:
  hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
  return _product("BTF,FD->BTD", hidden_BTF, down)


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
    self, x_BTD, rope: Rope, look: Look, keys_BSD=None, keys_rope=None
  ) -> jax.Array:
    """x after the layer; it attends to `keys_BSD`, None being x itself."""
    if keys_BSD is not None:
      keys_BSD = self.pre_attn_norm(keys_BSD)
    branch_BTD = self.attn(
      self.pre_attn_norm(x_BTD), rope, look, keys_BSD, keys_rope
    )
    if self.post_norms:
      branch_BTD = self.post_attn_norm(branch_BTD)
    x_BTD = x_BTD + branch_BTD
    branch_BTD = self.mlp(self.pre_mlp_norm(x_BTD))
    if self.post_norms:
      branch_BTD = self.post_mlp_norm(branch_BTD)
    return x_BTD + branch_BTD


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
