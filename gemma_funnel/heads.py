"""Heads: one label for a sequence, or one for each of its tokens."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel import params
from gemma_funnel.checks import is_number, require, require_choice, require_int
from gemma_funnel.config import check_recovers
from gemma_funnel.layers import normalize
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

POOLS = ("mean", "first", "last", "attention")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """A head on top of the trunk."""

  outputs: int  # Classes, or 1 (regression).
  per_token: bool = False  # An output for every token, not for the sequence.
  # "attention" is by a learned query, which starts as the mean.
  pool: str = "mean"
  dropout: float = 0.1  # Share of the head's input that training drops.
  hidden: int = 0  # Width of a tanh layer between; 0 is none.

  def __post_init__(self):
    require_choice("head.pool", self.pool, POOLS)
    require(
      is_number(self.dropout) and 0 <= self.dropout < 1,
      f"head.dropout={self.dropout}: expected at least 0 and below 1",
    )
    require_int("head.hidden", self.hidden)
    require_int("head.outputs", self.outputs, 1)


class Head(nnx.Module):
  """Pools states, and projects them to outputs; float32 throughout.

  `out` starts at zero: no output is preferred.
  """

  def __init__(self, width: int, config: HeadConfig, *, rngs: nnx.Rngs):
    self.config = config
    sizes = dict(D=width, E=config.hidden or width, C=config.outputs)
    init = lambda name: params.init_array(
      f"head/{name}", sizes, "float32", rngs
    )
    if config.pool == "attention" and not config.per_token:
      self.pool_query = nnx.Param(init("pool_query"))
    if config.hidden:
      self.hidden = nnx.Param(init("hidden"))
    self.out = nnx.Param(init("out"))
    self.bias = nnx.Param(init("bias"))

  def __call__(
    self,
    hidden_BTD: jax.Array,
    segment_BT: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Outputs, float32 [B, C], or [B, T, C] where `per_token`.

    Args:
      hidden_BTD: after the final norm, of T tokens or as many groups.
      segment_BT: int32; 0 is padding, on either side, which counts for nothing.
      key: of dropout; None drops nothing.
    """
    x = hidden_BTD.astype(jnp.float32)
    if not self.config.per_token:
      x = self._pool(x, segment_BT != 0)
    rate = self.config.dropout
    if key is not None and rate:
      kept = jax.random.bernoulli(key, 1 - rate, x.shape)
      x = jnp.where(kept, x / (1 - rate), 0)
    if self.config.hidden:
      x = jnp.tanh(jnp.einsum("...d,dh->...h", x, self.hidden[...]))
    outputs = jnp.einsum("...h,hc->...c", x, self.out[...])
    return outputs + jnp.expand_dims(self.bias[...], range(x.ndim - 1))

  def _pool(self, x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    slot_1T = jnp.arange(x_BTD.shape[1])[None]
    match self.config.pool:
      case "first":
        weight_BT = slot_1T == jnp.argmax(real_BT, axis=1, keepdims=True)
      case "last":
        newest_B1 = jnp.max(jnp.where(real_BT, slot_1T, 0), 1, keepdims=True)
        weight_BT = slot_1T == newest_B1
      case "attention":
        logit_BT = jnp.einsum(
          "BTD,D->BT", normalize(x_BTD, 1e-6), self.pool_query[...]
        )
        weight_BT = jax.nn.softmax(
          jnp.where(real_BT, logit_BT, jnp.finfo(jnp.float32).min), axis=1
        )
      case _:
        weight_BT = real_BT
    weight_BT = jnp.where(real_BT, weight_BT, 0).astype(jnp.float32)
    total_B1 = jnp.maximum(jnp.sum(weight_BT, axis=1, keepdims=True), 1e-9)
    # A row of padding alone has no weights, and gives 0.
    return jnp.einsum("BTD,BT->BD", x_BTD, weight_BT / total_B1)


class Encoder(nnx.Module):
  """A trunk with a head, read in both directions unless `causal`."""

  def __init__(self, model: Transformer, head: Head, *, causal: bool = False):
    """Raises ValueError if a funnel leaves a token's label without a state."""
    self.model, self.head, self.causal = model, head, causal
    if head.config.per_token:
      check_recovers(model.stages, "a label for every token")

  def with_funnel(self, funnel: Any) -> "Encoder":
    """The same parameters under another funnel; see `Transformer.with_funnel`."""
    return Encoder(
      self.model.with_funnel(funnel), self.head, causal=self.causal
    )

  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """The head's outputs, of a sequence a row; see `Head.__call__`.

    A funnel that does not recover gives a sequence's head the short states.
    """
    model = self.model
    stream = make_stream(model.embed(tokens_BT), segment_BT)
    stream = model.trunk(stream, causal=self.causal)
    hidden_BTD = model.final_norm(stream.hidden_BTD)
    return self.head(hidden_BTD, stream.segment_BT, key)
