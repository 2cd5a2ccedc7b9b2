"""Training objectives, computed so that full logits never exist.

Next token (causal), masked tokens (bidirectional), distillation of a model with
a funnel from the same model without, and the labels of a task.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from gemma_funnel.config import check_recovers
from gemma_funnel.data.tokenizer import BOS_ID, MASK_ID
from gemma_funnel.layers import normalize
from gemma_funnel.model import Gemma

# Up to the mask's, ids are of control tokens.
_FIRST_TEXT_ID = MASK_ID + 1
# Of the tokens that are to be predicted, as BERT has it (arXiv 1810.04805).
_MASKED, _RANDOM = 0.8, 0.1

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


def _sum_chunks(
  function: Callable[..., Sums], arrays: tuple[jax.Array, ...], chunk: int
) -> Sums:
  """Sums of what `function` gives for `chunk` positions of each row at a time.

  They are computed again in the backward pass: what is within `function` never
  exists for all positions.

  Args:
    function: takes the arrays as [B, chunk, ...]; gives float32 scalars, of
      which padding (zeros) must give 0.
    arrays: [B, T, ...].
    chunk: positions a piece, >= 1.
  """
  length = arrays[0].shape[1]
  pieces = -(-length // chunk)
  padding = pieces * chunk - length

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
    return jax.tree.map(jnp.add, sums, function(*inputs)), None

  inputs = tuple(map(cut, arrays))
  shapes = jax.eval_shape(function, *(x[0] for x in inputs))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(piece, zeros, inputs)[0]


def _token_sums(logits_BCV, target_BC, weight_BC) -> Sums:
  log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  chosen_BC = jnp.take_along_axis(
    logits_BCV, target_BC[..., None], axis=-1
  ).squeeze(-1)
  hit_BC = jnp.argmax(logits_BCV, axis=-1) == target_BC
  return {
    "nll": jnp.sum((log_z_BC - chosen_BC) * weight_BC),
    "square_log_z": jnp.sum(jnp.square(log_z_BC) * weight_BC),
    "correct": jnp.sum(hit_BC * weight_BC),
    "tokens": jnp.sum(weight_BC),
  }


def _followed(tokens_BT, segment_BT) -> tuple[jax.Array, jax.Array]:
  """(the next token, float32 whether it is of the same segment)."""
  follows_BT = (segment_BT == jnp.roll(segment_BT, -1, axis=1)) & (
    segment_BT != 0
  )
  follows_BT = follows_BT.at[:, -1].set(False)
  return jnp.roll(tokens_BT, -1, axis=1), follows_BT.astype(jnp.float32)


def next_token_sums(
  model: Gemma,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  position_BT: jax.Array,
  *,
  chunk: int,
) -> Sums:
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
  return _sum_chunks(
    lambda h_BCD, *rest: _token_sums(model.logits(h_BCD), *rest),
    (hidden_BTD, *_followed(tokens_BT, segment_BT)),
    chunk,
  )


def _mean(sums: Sums, z_loss: float) -> tuple[jax.Array, Sums]:
  count = jnp.maximum(sums["tokens"], 1)
  loss = sums["nll"] / count
  metrics = {
    "loss": loss,
    "accuracy": sums["correct"] / count,
    "tokens": sums["tokens"],
  }
  return loss + z_loss * sums["square_log_z"] / count, metrics


def next_token(
  model: Gemma, batch: Batch, *, chunk: int, z_loss: float = 0.0
) -> tuple[jax.Array, Sums]:
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
  return _mean(sums, z_loss)


def mask(
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  key: jax.Array,
  rate: float,
  vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Hides tokens that are to be predicted.

  Of those, 80% become the mask, 10% a random token, and 10% stay (BERT). BOS
  and padding are never chosen.

  Returns:
    (tokens to read, float32 1 where the original is to be predicted).
  """
  keys = jax.random.split(key, 3)
  uniform = lambda k: jax.random.uniform(k, tokens_BT.shape)
  chosen_BT = (
    (uniform(keys[0]) < rate) & (segment_BT != 0) & (tokens_BT != BOS_ID)
  )
  how_BT = uniform(keys[1])
  random_BT = jax.random.randint(
    keys[2], tokens_BT.shape, _FIRST_TEXT_ID, vocab_size, tokens_BT.dtype
  )
  shown_BT = jnp.where(
    how_BT < _MASKED,
    MASK_ID,
    jnp.where(how_BT < _MASKED + _RANDOM, random_BT, tokens_BT),
  )
  return (
    jnp.where(chosen_BT, shown_BT, tokens_BT),
    chosen_BT.astype(jnp.float32),
  )


def masked_token_sums(
  model: Gemma, batch: Batch, key: jax.Array, *, rate: float, chunk: int
) -> Sums:
  """As `next_token_sums`, of masked tokens read in both directions.

  Raises:
    ValueError: a funnel that does not recover.
  """
  check_recovers(model.stages, "predicting masked tokens")
  tokens_BT, segment_BT = batch["tokens"], batch["segment"]
  shown_BT, weight_BT = mask(
    tokens_BT, segment_BT, key, rate, model.config.vocab_size
  )
  hidden_BTD = model.encode(
    shown_BT, segment_BT, batch["position"], causal=False
  )
  return _sum_chunks(
    lambda h_BCD, *rest: _token_sums(model.logits(h_BCD), *rest),
    (hidden_BTD, tokens_BT, weight_BT),
    chunk,
  )


def masked_tokens(
  model: Gemma,
  batch: Batch,
  key: jax.Array,
  *,
  rate: float,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
  """Mean cross-entropy of masked tokens; as `next_token` otherwise.

  Args:
    model: read in both directions.
    batch: "tokens", "segment" and "position", int32 [B, T].
    key: of what is masked.
    rate: share of tokens that are to be predicted.
    chunk, z_loss: see `next_token`.
  """
  return _mean(
    masked_token_sums(model, batch, key, rate=rate, chunk=chunk), z_loss
  )


def distill(
  model: Gemma,
  teacher: Gemma,
  batch: Batch,
  *,
  chunk: int,
  temperature: float,
  logits: float,
  hidden: float,
  tokens: float,
) -> tuple[jax.Array, Sums]:
  """A funnelled student's loss against the plain teacher; both are causal.

  The loss is a weighted sum of: KL(teacher || student) of next-token
  distributions at a temperature, times its square (Hinton et al., arXiv
  1503.02531); the mean squared difference of RMS-normalised final hidden
  states; and the student's own next-token cross-entropy.

  Args:
    model: the student.
    teacher: what it is to agree with; no gradient enters it.
    batch: "tokens", "segment" and "position", int32 [B, T].
    chunk: see `next_token_sums`.
    temperature: > 0, of both distributions.
    logits, hidden, tokens: weights of the three terms.

  Returns:
    The loss, and {"loss": the cross-entropy, "accuracy", "tokens", "kl",
    "hidden"}; KL in nats a token.
  """
  check_recovers(model.stages, "predicting tokens")
  inputs = batch["tokens"], batch["segment"], batch["position"]
  student_BTD = model.encode(*inputs, causal=True)
  teacher_BTD = jax.lax.stop_gradient(teacher.encode(*inputs, causal=True))
  eps = model.config.norm_eps

  def piece(s_BCD, t_BCD, target_BC, weight_BC):
    own_BCV = model.logits(s_BCD)
    theirs_BCV = jax.lax.stop_gradient(teacher.logits(t_BCD))
    log_p_BCV = jax.nn.log_softmax(theirs_BCV / temperature, axis=-1)
    log_q_BCV = jax.nn.log_softmax(own_BCV / temperature, axis=-1)
    kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
    apart_BCD = normalize(s_BCD, eps) - normalize(t_BCD, eps)
    square_BC = jnp.mean(jnp.square(apart_BCD), axis=-1)
    return {
      **_token_sums(own_BCV, target_BC, weight_BC),
      "kl": jnp.sum(kl_BC * weight_BC),
      "hidden": jnp.sum(square_BC * weight_BC),
    }

  sums = _sum_chunks(
    piece, (student_BTD, teacher_BTD, *_followed(*inputs[:2])), chunk
  )
  loss, metrics = _mean(sums, 0.0)
  count = jnp.maximum(sums["tokens"], 1)
  for name in ("kl", "hidden"):
    metrics[name] = sums[name] / count
  total = (
    logits * temperature**2 * metrics["kl"]
    + hidden * metrics["hidden"]
    + tokens * loss
  )
  return total, metrics


def labelled(
  outputs: jax.Array, batch: Batch, class_weight_C: jax.Array | None
) -> tuple[jax.Array, Sums]:
  """The loss of a head's outputs: cross-entropy, or squared error.

  Args:
    outputs: float32 [B, C], or [B, T, C] for a label a token.
    batch: "label" and "weight", [B] or [B, T]; integer labels are classes,
      others numbers that the one output is to be.
    class_weight_C: what an example of each class counts for; None is 1.

  Returns:
    The mean over what has a weight, and {"loss"} or {"loss", "accuracy"}.
  """
  label, weight = batch["label"], batch["weight"]
  if not jnp.issubdtype(label.dtype, jnp.integer):
    square = jnp.square(outputs[..., 0] - label)
    loss = jnp.sum(square * weight) / jnp.maximum(jnp.sum(weight), 1)
    return loss, {"loss": loss}
  log_p = jax.nn.log_softmax(outputs, axis=-1)
  nll = -jnp.take_along_axis(log_p, label[..., None], axis=-1).squeeze(-1)
  hit = jnp.argmax(outputs, axis=-1) == label
  accuracy = jnp.sum(hit * weight) / jnp.maximum(jnp.sum(weight), 1)
  if class_weight_C is not None:
    weight = weight * class_weight_C[label]
  loss = jnp.sum(nll * weight) / jnp.maximum(jnp.sum(weight), 1e-9)
  return loss, {"loss": loss, "accuracy": accuracy}
