"""Training objectives, computed so that full logits never exist.

Next token (causal), masked tokens (bidirectional), distillation of a model with
a funnel from the same model without, and the labels of a task.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from gemma_funnel.config import check_recovers, check_reducers
from gemma_funnel.data.tokenizer import BOS_ID, MASK_ID
from gemma_funnel.layers import normalize
from gemma_funnel.model import Transformer, head_logits
from gemma_funnel.parallel import mesh as mesh_lib

# Up to the mask's, ids are of control tokens.
_FIRST_TEXT_ID = MASK_ID + 1
# Of the tokens that are to be predicted, as BERT has it (arXiv 1810.04805).
_MASKED, _RANDOM = 0.8, 0.1

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


def _pieces(x_BT: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] to [pieces, B, chunk, ...], padded with zeros.

  Where rows are split over devices, each device's own tokens make up a share of
  every piece: none is sent anywhere.
  """
  batch, length, *rest = x_BT.shape
  shares = mesh_lib.size(mesh_lib.dividing(mesh_lib.TOKENS, length))
  own, size = length // shares, -(-chunk // shares)
  x_BST = x_BT.reshape(batch, shares, own, *rest)
  widths = [(0, 0)] * x_BST.ndim
  widths[2] = (0, -own % size)
  x_BSPC = jnp.pad(x_BST, widths).reshape(batch, shares, -1, size, *rest)
  x_PBSC = jnp.moveaxis(x_BSPC, 2, 0)
  return x_PBSC.reshape(-1, batch, shares * size, *rest)


def _whole(x_PBC: jax.Array, length: int) -> jax.Array:
  """The inverse of `_pieces`."""
  pieces, batch, chunk, *rest = x_PBC.shape
  shares = mesh_lib.size(mesh_lib.dividing(mesh_lib.TOKENS, length))
  x_PBSC = x_PBC.reshape(pieces, batch, shares, chunk // shares, *rest)
  x_BST = jnp.moveaxis(x_PBSC, 0, 2).reshape(batch, shares, -1, *rest)
  return x_BST[:, :, : length // shares].reshape(batch, length, *rest)


def _sum_chunks(
  function: Callable[..., Sums], fixed, arrays: tuple[jax.Array, ...], chunk
) -> Sums:
  """Sums of `function(*fixed, *pieces)` over pieces of `chunk` positions."""

  def piece(sums, inputs):
    return jax.tree.map(jnp.add, sums, function(*fixed, *inputs)), None

  inputs = tuple(_pieces(x, chunk) for x in arrays)
  shapes = jax.eval_shape(function, *fixed, *(x[0] for x in inputs))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(piece, zeros, inputs)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(
  function: Callable[..., Sums],
  chunk: int,
  head_VD: jax.Array,
  hidden_BTD: jax.Array,
  factors: Sums,
  fixed: tuple[jax.Array, ...],
  arrays: tuple[jax.Array, ...],
) -> tuple[jax.Array, Sums]:
  """(sum of factors times sums, all sums), with logits for a chunk at a time.

  The forward pass computes the gradients of each piece beside its logits, which
  the backward pass then does not need (Liger Kernel, arXiv 2410.10989, section
  3.2). Gradients enter the head and the hidden states only.

  `function` takes (head, *fixed, hidden, *arrays) of one piece to float32 sums,
  to which padding (zeros) must add nothing; `factors` are their weights in the
  loss. Each piece has all of `fixed`, and its part of `arrays`, [B, T, ...].
  """
  sums = _sum_chunks(function, (head_VD, *fixed), (hidden_BTD, *arrays), chunk)
  return sum(f * sums[name] for name, f in factors.items()), sums


def _chunked_forward(
  function, chunk, head_VD, hidden_BTD, factors, fixed, arrays
):
  def loss(head_VD, hidden_BCD, *rest):
    sums = function(head_VD, *fixed, hidden_BCD, *rest)
    return sum(f * sums[name] for name, f in factors.items()), sums

  def piece(so_far, inputs):
    sums, gradient_VD = so_far
    (_, more), (d_VD, d_BCD) = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(head_VD, *inputs)
    sums = jax.tree.map(jnp.add, sums, more)
    return (sums, gradient_VD + d_VD.astype(gradient_VD.dtype)), d_BCD

  inputs = tuple(_pieces(x, chunk) for x in (hidden_BTD, *arrays))
  shapes = jax.eval_shape(loss, head_VD, *(x[0] for x in inputs))[1]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  start = (zeros, jnp.zeros(head_VD.shape, jnp.float32))
  (sums, d_VD), d_PBCD = jax.lax.scan(piece, start, inputs)
  total = sum(f * sums[name] for name, f in factors.items())
  d_BTD = _whole(d_PBCD, hidden_BTD.shape[1])
  return (total, sums), (d_VD.astype(head_VD.dtype), d_BTD)


def _chunked_backward(function, chunk, gradients, cotangents):
  del function, chunk
  scale = cotangents[0]  # The sums are metrics.
  return *(g * scale.astype(g.dtype) for g in gradients), None, None, None


_chunked_loss.defvjp(_chunked_forward, _chunked_backward)


def _token_sums(logits_BCV, target_BC, weight_BC) -> Sums:
  top_BC = jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1))
  shifted_BCV = logits_BCV - top_BC[..., None]
  log_z_BC = top_BC + jnp.log(jnp.sum(jnp.exp(shifted_BCV), axis=-1))
  chosen_BC = _chosen(logits_BCV, target_BC)
  hit_BC = chosen_BC >= top_BC
  return {
    "nll": jnp.sum((log_z_BC - chosen_BC) * weight_BC),
    "square_log_z": jnp.sum(jnp.square(log_z_BC) * weight_BC),
    "correct": jnp.sum(hit_BC * weight_BC),
    "tokens": jnp.sum(weight_BC),
  }


def _chosen(logits_BCV, target_BC) -> jax.Array:
  if mesh_lib.size(mesh_lib.HEADS) == 1:
    return jnp.take_along_axis(
      logits_BCV, target_BC[..., None], axis=-1
    ).squeeze(-1)
  # Each device has a part of the vocabulary; a lookup would gather all parts.
  id_11V = jnp.arange(logits_BCV.shape[-1])[None, None]
  is_it_BCV = id_11V == target_BC[..., None]
  return jnp.sum(jnp.where(is_it_BCV, logits_BCV, 0), axis=-1)


def _logit_sums(model: Transformer) -> Callable[..., Sums]:
  """(head, hidden, target, weight) of a piece to its sums."""
  config = model.config

  def sums(head_VD, hidden_BCD, target_BC, weight_BC):
    logits_BCV = head_logits(head_VD, hidden_BCD, config.final_softcap)
    return _token_sums(logits_BCV, target_BC, weight_BC)

  return sums


def _next_tokens(model: Transformer, tokens_BT, segment_BT, position_BT):
  """(hidden states, (the token that follows each, its float32 weight))."""
  check_recovers(model.stages, "predicting tokens")
  check_reducers(model.stages, "trains", "predicting tokens")
  hidden_BTD = model.encode(tokens_BT, segment_BT, position_BT, causal=True)
  is_same_BT = segment_BT == jnp.roll(segment_BT, -1, axis=1)
  follows_BT = (is_same_BT & (segment_BT != 0)).at[:, -1].set(False)
  next_BT = jnp.roll(tokens_BT, -1, axis=1)
  return hidden_BTD, (next_BT, follows_BT.astype(jnp.float32))


def next_token_sums(
  model: Transformer,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
  position_BT: jax.Array,
  *,
  chunk: int,
) -> Sums:
  """Sums over the tokens that follow another within their segment.

  Logits are made for `chunk` positions of each row at a time: [B, chunk, V] is
  the most that exists. Segment 0 is padding.

  Returns:
    float32 scalars: "nll", negative log likelihoods in nats; "square_log_z",
    squared log partition functions; "correct", tokens that were the likeliest;
    "tokens", how many there were.

  Raises:
    ValueError: a funnel that does not recover.
  """
  inputs = tokens_BT, segment_BT, position_BT
  return _all_sums(model, *_next_tokens(model, *inputs), chunk)


def _all_sums(model: Transformer, hidden_BTD, targets, chunk: int) -> Sums:
  arrays = (hidden_BTD, *targets)
  return _sum_chunks(_logit_sums(model), (model.head_VD,), arrays, chunk)


def _mean_loss(
  model: Transformer, hidden_BTD, targets, chunk: int, z_loss: float
) -> tuple[jax.Array, Sums]:
  """The mean cross-entropy (and z loss) of weighted positions; its metrics."""
  count = jnp.maximum(jnp.sum(targets[1]), 1)
  factors = {"nll": 1 / count}
  if z_loss:
    factors["square_log_z"] = z_loss / count
  loss, sums = _chunked_loss(
    _logit_sums(model), chunk, model.head_VD, hidden_BTD, factors, (), targets
  )
  return loss, _metrics(sums)


def _metrics(sums: Sums) -> Sums:
  count = jnp.maximum(sums["tokens"], 1)
  return {
    "loss": sums["nll"] / count,
    "accuracy": sums["correct"] / count,
    "tokens": sums["tokens"],
    "weight": sums["tokens"],
  }


def next_token(
  model: Transformer, batch: Batch, *, chunk: int, z_loss: float = 0.0
) -> tuple[jax.Array, Sums]:
  """Mean next-token cross-entropy in nats, and its metrics.

  Args:
    model: the model.
    batch: "tokens", "segment" and "position", int32 [B, T].
    chunk: positions that have logits at a time.
    z_loss: weight of the mean squared log partition function, which keeps
      logits from drifting (PaLM, arXiv 2204.02311, section 5).

  Returns:
    The loss, and {"loss": the cross-entropy alone, "accuracy", "tokens",
    "weight": tokens that the loss is a mean of}.

  Raises:
    ValueError: a funnel that does not recover.
  """
  inputs = batch["tokens"], batch["segment"], batch["position"]
  return _mean_loss(model, *_next_tokens(model, *inputs), chunk, z_loss)


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


def _masked(model: Transformer, batch: Batch, key: jax.Array, rate: float):
  """(hidden states, (the tokens that were there, which are to be predicted))."""
  check_recovers(model.stages, "predicting masked tokens")
  check_reducers(model.stages, "trains", "predicting masked tokens")
  tokens_BT, segment_BT = batch["tokens"], batch["segment"]
  shown_BT, weight_BT = mask(
    tokens_BT, segment_BT, key, rate, model.config.vocab_size
  )
  hidden_BTD = model.encode(
    shown_BT, segment_BT, batch["position"], causal=False
  )
  return hidden_BTD, (tokens_BT, weight_BT)


def masked_token_sums(
  model: Transformer, batch: Batch, key: jax.Array, *, rate: float, chunk: int
) -> Sums:
  """As `next_token_sums`, of masked tokens read in both directions.

  Raises:
    ValueError: a funnel that does not recover.
  """
  return _all_sums(model, *_masked(model, batch, key, rate), chunk)


def masked_tokens(
  model: Transformer,
  batch: Batch,
  key: jax.Array,
  *,
  rate: float,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
  """Mean cross-entropy of a share of tokens; as `next_token` otherwise."""
  return _mean_loss(model, *_masked(model, batch, key, rate), chunk, z_loss)


def distill(
  model: Transformer,
  teacher: Transformer,
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
  states; and the student's own next-token cross-entropy. `logits`, `hidden` and
  `tokens` are their weights. No gradient enters the teacher.

  Returns:
    The loss, and {"loss": the cross-entropy, "accuracy", "tokens", "kl",
    "hidden"}; KL in nats a token.
  """
  inputs = batch["tokens"], batch["segment"], batch["position"]
  student_BTD, rest = _next_tokens(model, *inputs)
  teacher_BTD = teacher.encode(*inputs, causal=True)
  eps, cap = model.config.norm_eps, model.config.final_softcap

  def piece(own_VD, theirs_VD, s_BCD, t_BCD, target_BC, weight_BC):
    own_BCV = head_logits(own_VD, s_BCD, cap)
    theirs_BCV = head_logits(theirs_VD, t_BCD, cap)
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

  count = jnp.maximum(jnp.sum(rest[1]), 1)
  weights = {"kl": logits * temperature**2, "hidden": hidden, "nll": tokens}
  total, sums = _chunked_loss(
    piece,
    chunk,
    model.head_VD,
    student_BTD,
    {name: weight / count for name, weight in weights.items()},
    (teacher.head_VD,),
    (teacher_BTD, *rest),
  )
  metrics = {name: sums[name] / count for name in ("kl", "hidden")}
  return total, _metrics(sums) | metrics


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
    The mean over what has a weight, and {"loss", "weight"}, with "accuracy" of
    classes; "weight" is what the loss is a mean over.
  """
  label, weight = batch["label"], batch["weight"]
  if not jnp.issubdtype(label.dtype, jnp.integer):
    square = jnp.square(outputs[..., 0] - label)
    loss = jnp.sum(square * weight) / jnp.maximum(jnp.sum(weight), 1)
    return loss, {"loss": loss, "weight": jnp.sum(weight)}
  log_p = jax.nn.log_softmax(outputs, axis=-1)
  nll = -jnp.take_along_axis(log_p, label[..., None], axis=-1).squeeze(-1)
  hit = jnp.argmax(outputs, axis=-1) == label
  accuracy = jnp.sum(hit * weight) / jnp.maximum(jnp.sum(weight), 1)
  if class_weight_C is not None:
    weight = weight * class_weight_C[label]
  loss = jnp.sum(nll * weight) / jnp.maximum(jnp.sum(weight), 1e-9)
  return loss, {"loss": loss, "accuracy": accuracy, "weight": jnp.sum(weight)}
