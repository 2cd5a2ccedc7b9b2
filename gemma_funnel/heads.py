"""Heads: one label for a sequence, or one for each of its tokens."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel import params
from gemma_funnel.config import check_recovers
from gemma_funnel.layers import normalize
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

POOLS = ("mean", "first", "last", "attention")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """What is put on top of the trunk.

  Attributes:
    outputs: numbers a label is read from: classes, or 1 (regression).
    per_token: an output for every token, or one for the sequence.
    pool: how a sequence's states become one: their "mean", the "first" or the
      "last", or "attention" by a learned query that starts as the mean. Of no
      effect where `per_token`.
    dropout: share of the pooled (or each token's) state that training drops.
    hidden: width of a tanh layer between; 0 is none.
  """

  outputs: int
  per_token: bool = False
  pool: str = "mean"
  dropout: float = 0.1
  hidden: int = 0

  def __post_init__(self):
    if self.pool not in POOLS:
      raise ValueError(
        f"head.pool={self.pool!r}: expected one of {list(POOLS)}"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"head.dropout={self.dropout}: expected at least 0 and below 1"
      )
    if self.hidden < 0:
      raise ValueError(f"head.hidden={self.hidden}: expected at least 0")
    if self.outputs < 1:
      raise ValueError(f"a head of {self.outputs} outputs: expected at least 1")


class Head(nnx.Module):
  """Pools states, and projects them to outputs; float32 throughout.

  Attributes:
    pool_query: [D], of pool "attention".
    hidden: [D, hidden], where there is a hidden layer.
    out: [D or hidden, outputs]; starts at zero: no output is preferred.
    bias: [outputs].
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
      segment_BT: int32; 0 is padding, which counts for nothing.
      key: of dropout; None drops nothing.
    """
    x = hidden_BTD.astype(jnp.float32)
    if not self.config.per_token:
      x = self._pool(x, segment_BT != 0)
    x = self._drop(x, key)
    if self.config.hidden:
      x = jnp.tanh(jnp.einsum("...d,dh->...h", x, self.hidden[...]))
    outputs = jnp.einsum("...h,hc->...c", x, self.out[...])
    return outputs + jnp.expand_dims(self.bias[...], range(x.ndim - 1))

  def _drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    rate = self.config.dropout
    if key is None or not rate:
      return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)

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
  """A Gemma with a head, read in both directions unless `causal`.

  Attributes:
    model: the trunk, with its funnel; its vocabulary head is unused.
    head: what reads the trunk's states.
    causal: whether a token sees only what came before it.
  """

  def __init__(self, model: Transformer, head: Head, *, causal: bool = False):
    """Puts a head on a model.

    Raises:
      ValueError: a funnel that does not recover, under a head that needs a
        state for every token.
    """
    self.model = model
    self.head = head
    self.causal = causal
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
    """The head's outputs, float32.

    A funnel that does not recover gives a sequence's head the short states.

    Args:
      tokens_BT: int32 token ids, a sequence a row.
      segment_BT: int32, 1 at tokens and 0 at padding, on either side.
      key: of dropout; None drops nothing.
    """
    model = self.model
    stream = make_stream(model.embed(tokens_BT), segment_BT)
    stream = model.trunk(stream, causal=self.causal)
    hidden_BTD = model.final_norm(stream.hidden_BTD)
    return self.head(hidden_BTD, stream.segment_BT, key)
