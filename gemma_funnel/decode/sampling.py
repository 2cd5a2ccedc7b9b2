"""From the next token's logits to a token: penalty, filters, draw.

In the order and the meaning of Hugging Face's: repetition penalty, temperature,
top-k, top-p, min-p. Each filter is a lowest logit that is kept, so tokens of
equal logits are kept or hidden together (Hugging Face's top-p alone cuts among
equals, by the order that its sort leaves them in).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from gemma_funnel.checks import is_number, require, require_int

# Beyond these, float32 logits over- or underflow.
_LEAST, _MOST = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn (hashable: a static argument of jit).

  Attributes:
    temperature: what logits are divided by; 0 is greedy.
    top_k: keeps the k largest logits, and all that equal the k-th (k past the
      vocabulary is all of it); None is all.
    top_p: keeps the fewest tokens whose probabilities sum to it or more, and
      all as probable as the last of them (nucleus, arXiv 1904.09751).
    min_p: keeps what is at least this times as probable as the most probable
      token (arXiv 2407.01082).
    repetition_penalty: logits of tokens seen are divided by it where positive,
      multiplied where negative (CTRL, arXiv 1909.05858); 1 is none.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    within = lambda x: _LEAST <= x <= _MOST
    for name, fits, expected in (
      (
        "temperature",
        lambda x: x == 0 or within(x),
        f"0 (greedy), or a number >= {_LEAST:g} and <= {_MOST:g}",
      ),
      ("top_p", lambda x: 0 < x <= 1, "a number > 0 and <= 1"),
      ("min_p", lambda x: 0 <= x < 1, "a number >= 0 and < 1"),
      (
        "repetition_penalty",
        within,
        f"a number >= {_LEAST:g} and <= {_MOST:g} (1 is none)",
      ),
    ):
      value = getattr(self, name)
      require(
        is_number(value) and fits(value),
        f"sampling.{name}={value!r}: expected {expected}",
      )
    if self.top_k is not None:
      require_int("sampling.top_k", self.top_k, 1)
    for name, off in (("top_k", None), ("top_p", 1), ("min_p", 0)):
      value = getattr(self, name)
      require(
        self.temperature != 0 or value == off,
        f"sampling.{name}={value!r} has no effect with temperature=0 (greedy): "
        "expected temperature > 0",
      )

  @property
  def needs_seen(self) -> bool:
    """Whether the draw depends on the tokens seen so far."""
    return self.repetition_penalty != 1


GREEDY = Sampling()


def filtered_logits(
  logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling
) -> jax.Array:
  """The logits that are drawn from: penalised, tempered, hidden ones -inf.

  Args:
    logits_BV: the next token's; -inf is a token that may not come.
    seen_BV: bool, tokens of the prompt and those generated since. Read only
      where `sampling.needs_seen`; may be None elsewhere.
    sampling: static.

  Returns:
    float32 [B, V], at least one of each row kept. Where greedy, penalised only.

  Raises:
    ValueError: `seen_BV` is needed and is not bool [B, V].
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if sampling.needs_seen:
    _require_seen(seen_BV, logits_BV.shape)
    penalty = sampling.repetition_penalty
    less_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    logits_BV = jnp.where(seen_BV, less_BV, logits_BV)
  if sampling.temperature == 0:
    return logits_BV
  logits_BV = logits_BV / sampling.temperature
  return _hide(logits_BV, _lowest_kept(logits_BV, sampling))


def draw(
  logits_BV: jax.Array,
  keys_B: jax.Array | None,
  seen_BV: jax.Array | None,
  sampling: Sampling,
) -> jax.Array:
  """The next token of each row: int32 [B].

  A row's token depends on its own key, logits and tokens seen, not on the rows
  beside it.

  Args:
    logits_BV, seen_BV, sampling: as `filtered_logits`.
    keys_B: typed PRNG keys, one a row; unused where greedy, and may be None.

  Raises:
    ValueError: `seen_BV` or `keys_B` is needed and is not what is expected.
  """
  kept_BV = filtered_logits(logits_BV, seen_BV, sampling)
  if sampling.temperature == 0:
    return jnp.argmax(kept_BV, axis=-1).astype(jnp.int32)
  _require_keys(keys_B, kept_BV.shape[0])
  return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def _hide(logits_BV, lowest_B1):
  return jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)


def _lowest_kept(logits_BV, sampling):
  """The lowest logit that every filter keeps: [B, 1], never above the top."""
  vocab = logits_BV.shape[1]
  lowest_B1 = jnp.full_like(logits_BV, -jnp.inf, shape=(len(logits_BV), 1))
  k = min(sampling.top_k or vocab, vocab)
  if k < vocab:
    top_BK, _ = jax.lax.top_k(logits_BV, k)
    lowest_B1 = top_BK[:, -1:]
  if sampling.top_p < 1:
    if k == vocab:
      top_BK = jnp.sort(logits_BV, axis=-1, descending=True, stable=False)
    # What equals the k-th counts in the total. It need not stand in top_BK: a
    # cut among equals keeps them all.
    total_B1 = jax.nn.logsumexp(
      _hide(logits_BV, lowest_B1), axis=-1, keepdims=True
    )
    lowest_B1 = _nucleus(top_BK, total_B1, sampling.top_p)
  if sampling.min_p > 0:
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    lowest_B1 = jnp.maximum(lowest_B1, best_B1 + math.log(sampling.min_p))
  return lowest_B1


def _nucleus(top_BK, total_B1, top_p):
  """The lowest logit whose betters sum to less than top_p: [B, 1].

  Args:
    top_BK: logits, descending.
    total_B1: logsumexp of all logits kept so far.
    top_p: probability.
  """
  upto_BK = jnp.cumsum(jnp.exp(top_BK - total_B1), axis=-1)
  within_BK = upto_BK[:, :-1] < top_p
  lowest_BK = jnp.where(within_BK, top_BK[:, 1:], jnp.inf)
  lowest_B1 = jnp.min(lowest_BK, axis=-1, keepdims=True, initial=jnp.inf)
  # The first is kept however small top_p is.
  return jnp.minimum(lowest_B1, top_BK[:, :1])


def _found(array) -> str:
  dtype = getattr(array, "dtype", None)
  return str(array) if dtype is None else f"{dtype}{list(array.shape)}"


def _require_seen(seen_BV, shape) -> None:
  found, expected = _found(seen_BV), f"bool{list(shape)}"
  require(
    found == expected,
    f"seen_BV={found}: expected {expected}, as sampling.repetition_penalty "
    "needs the tokens seen",
  )


def _require_keys(keys_B, batch: int) -> None:
  """Typed keys [B], of a generator whose vmap keeps rows independent."""
  dtype = getattr(keys_B, "dtype", None)
  typed = dtype is not None and jax.dtypes.issubdtype(
    dtype, jax.dtypes.prng_key
  )
  require(
    typed and keys_B.shape == (batch,),
    f"keys_B={_found(keys_B)}: expected {batch} typed keys, as of "
    "jax.random.split",
  )
  implementation = str(jax.random.key_impl(keys_B))
  # jax draws the whole batch from one key (jax.random, "Advanced RNG").
  require(
    "rbg" not in implementation,
    f"keys_B of {implementation!r}: a row's draw would depend on its batch; "
    "expected keys of 'threefry2x32'",
  )
