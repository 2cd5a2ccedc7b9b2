"""Training objectives, computed so that full logits never exist."""

import functools

import jax
import jax.numpy as jnp

from gemma_funnel.config import check_recovers
from gemma_funnel.model import Gemma


def next_token_sums(
  model: Gemma,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  position_BT: jax.Array,
  *,
  chunk: int,
) -> dict[str, jax.Array]:
  """Sums over the tokens that follow another within their segment.

  Logits are made for `chunk` positions of each row at a time, and made again
  in the backward pass: [B, chunk, V] is the most that exists.

  Args:
    model: causal, with or without a funnel.
    tokens_BT: int32 token ids.
    segment_BT: int32 segments, 0 is padding.
    position_BT: int32 positions within segments.
    chunk: positions a piece, >= 1.

  Returns:
    float32 scalars: "nll", negative log likelihoods in nats; "square_log_z",
    squared log partition functions; "correct", tokens that were the likeliest;
    "tokens", how many there were.

  Raises:
    ValueError: a funnel that does not recover.
  """
  check_recovers(model.stages, "predicting tokens")
  hidden_BTD = model.encode(tokens_BT, segment_BT, position_BT, causal=True)
  target_BT = jnp.roll(tokens_BT, -1, axis=1)
  follows_BT = (segment_BT == jnp.roll(segment_BT, -1, axis=1)) & (
    segment_BT != 0
  )
  follows_BT = follows_BT.at[:, -1].set(False)

  pieces = -(-tokens_BT.shape[1] // chunk)
  padding = pieces * chunk - tokens_BT.shape[1]

  def cut(x_BT):
    """[B, T, ...] to [pieces, B, chunk, ...]."""
    widths = [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2)
    x_BT = jnp.pad(x_BT, widths)
    batch, _, *rest = x_BT.shape
    return jnp.moveaxis(x_BT.reshape(batch, pieces, chunk, *rest), 1, 0)

  @functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable
  )
  def piece(sums, inputs):
    hidden_BCD, target_BC, follows_BC = inputs
    logits_BCV = model.logits(hidden_BCD)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    chosen_BC = jnp.take_along_axis(
      logits_BCV, target_BC[..., None], axis=-1
    ).squeeze(-1)
    weight_BC = follows_BC.astype(jnp.float32)
    hit_BC = jnp.argmax(logits_BCV, axis=-1) == target_BC
    new = {
      "nll": jnp.sum((log_z_BC - chosen_BC) * weight_BC),
      "square_log_z": jnp.sum(jnp.square(log_z_BC) * weight_BC),
      "correct": jnp.sum(hit_BC * weight_BC),
      "tokens": jnp.sum(weight_BC),
    }
    return jax.tree.map(jnp.add, sums, new), None

  names = ("nll", "square_log_z", "correct", "tokens")
  zeros = {name: jnp.zeros((), jnp.float32) for name in names}
  sums, _ = jax.lax.scan(
    piece, zeros, (cut(hidden_BTD), cut(target_BT), cut(follows_BT))
  )
  return sums


def next_token(
  model: Gemma,
  batch: dict[str, jax.Array],
  *,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean next-token cross-entropy in nats, and its metrics.

  Args:
    model: the model.
    batch: "tokens", "segment" and "position", int32 [B, T].
    chunk: see `next_token_sums`.
    z_loss: weight of the mean squared log partition function, which keeps
      logits from drifting (PaLM, arXiv 2204.02311, section 5).

  Returns:
    The loss, and {"loss": the cross-entropy alone, "accuracy", "tokens"}.
  """
  sums = next_token_sums(
    model, batch["tokens"], batch["segment"], batch["position"], chunk=chunk
  )
  count = jnp.maximum(sums["tokens"], 1)
  loss = sums["nll"] / count
  metrics = {
    "loss": loss,
    "accuracy": sums["correct"] / count,
    "tokens": sums["tokens"],
  }
  return loss + z_loss * sums["square_log_z"] / count, metrics
