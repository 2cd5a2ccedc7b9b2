"""Log-likelihoods of continuations, and of texts longer than a model reads.

One forward pass a request, with the model's own funnel. BOS comes first in all
of them: a Gemma without it is at chance.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.config import check_recovers
from gemma_funnel.data.tokenizer import BOS_ID, Tokenizer
from gemma_funnel.model import Transformer

# (context, continuation), token ids.
Request = tuple[Sequence[int], Sequence[int]]

_SMALLEST_LENGTH = 32
# Positions of a batch whose logits are in memory at one time.
_LOGITS = 256


@dataclasses.dataclass(frozen=True)
class Score:
  """What a model makes of a continuation.

  Attributes:
    log_likelihood: the sum over its tokens, in nats.
    is_greedy: whether each of them was the likeliest.
    num_tokens: how many there are.
  """

  log_likelihood: float
  is_greedy: bool
  num_tokens: int


def bucket_lengths(longest: int) -> tuple[int, ...]:
  """Powers of two below `longest`, and `longest`: what to pad requests to."""
  powers = []
  length = _SMALLEST_LENGTH
  while length < longest:
    powers.append(length)
    length *= 2
  return (*powers, longest)


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
  """Token ids of a context, BOS first, and of what follows it.

  Spaces at the end of the context go with the continuation, and the two are
  encoded as one text that is cut after as many tokens as the context alone has:
  as lm_eval's `TemplateLM`, so that numbers compare. Where that leaves nothing,
  the continuation is what differs from the context alone.

  Raises:
    ValueError: a continuation without tokens.
  """
  if not context:
    first, rest = [BOS_ID], tokenizer.encode(continuation)
  else:
    stripped = context.rstrip()
    first = [BOS_ID, *tokenizer.encode(stripped)]
    whole = [BOS_ID, *tokenizer.encode(context + continuation)]
    at = len(first)
    if at >= len(whole):
      same = [a == b for a, b in zip(first, whole, strict=False)]
      at = same.index(False) if False in same else len(whole)
      first = whole[:at]
    rest = whole[at:]
  if not rest:
    raise ValueError(
      f"the continuation {continuation!r} has no tokens after "
      f"{context[-40:]!r}: expected one at least"
    )
  return first, rest


def windows(ids: Sequence[int], length: int) -> Iterator[Request]:
  """Requests that predict each token of a long text once.

  As lm_eval's `get_rolling_token_windows` of length - 1 with context_len=1:
  windows overlap by one token, the last one by as many as there is room for.
  Unlike there, BOS is before those after the first too.

  Args:
    ids: of the text, without BOS.
    length: tokens that a window feeds, BOS included, >= 2.

  Raises:
    ValueError: `length` out of range.
  """
  if length < 2:
    raise ValueError(
      f"length={length}: expected 2 or more, of which one is BOS"
    )
  size = length - 1
  for start in range(0, len(ids), size):
    end = min(start + size, len(ids))
    before = ids[max(0, end - size - 1) : start]
    yield [BOS_ID, *before], ids[start:end]


def rolling(
  model: Transformer,
  texts: Sequence[Sequence[int]],
  *,
  batch_size: int,
  lengths: Sequence[int] | None = None,
) -> list[float]:
  """Log-likelihoods of whole texts, in nats; 0 for an empty one.

  Args:
    model: with the funnel to run it with.
    texts: token ids of each, without BOS, of any length.
    batch_size, lengths: as `log_likelihoods`.

  Raises:
    ValueError: as `log_likelihoods` and `windows`.
  """
  lengths = _check_lengths(model, lengths)
  requests, owners = [], []
  for number, ids in enumerate(texts):
    for request in windows(ids, lengths[-1]):
      requests.append(request)
      owners.append(number)
  totals = [0.0] * len(texts)
  scores = log_likelihoods(
    model, requests, batch_size=batch_size, lengths=lengths
  )
  for number, score in zip(owners, scores, strict=True):
    totals[number] += score.log_likelihood
  return totals


def log_likelihoods(
  model: Transformer,
  requests: Sequence[Request],
  *,
  batch_size: int,
  lengths: Sequence[int] | None = None,
) -> list[Score]:
  """Scores continuations.

  Requests that are equal are run once, and so have equal scores.

  Args:
    model: with the funnel to run it with.
    requests: (context, continuation) each. BOS is put before a context that
      does not begin with it. Of a context too long the beginning is cut, BOS
      kept.
    batch_size: rows of a pass, >= 1.
    lengths: rising; requests are padded to the least that holds them, and the
      last one is the most tokens that are fed (the continuation's last token
      is not). None is `bucket_lengths` of the model's max_length.

  Returns:
    A score for each request, in their order.

  Raises:
    ValueError: an argument out of range; a continuation that is empty or longer
      than the last of `lengths`; a token id outside the vocabulary; a funnel
      that does not recover.
    FloatingPointError: a score that is not finite.
  """
  check_recovers(model.stages, "log-likelihoods")
  if isinstance(batch_size, bool) or not (
    isinstance(batch_size, int) and batch_size >= 1
  ):
    raise ValueError(f"batch_size={batch_size!r}: expected an integer >= 1")
  lengths = _check_lengths(model, lengths)
  fitted = [
    _fit(number, request, lengths[-1], model.config.vocab_size)
    for number, request in enumerate(requests)
  ]
  # The longest first: what does not fit into memory is known at once.
  unique = sorted(set(fitted), key=lambda r: (-_fed(r), r))
  graphdef, params = nnx.split(model)
  scores = {}
  while unique:
    length = min(n for n in lengths if n >= _fed(unique[0]))
    batch, unique = unique[:batch_size], unique[batch_size:]
    inputs = _arrays(batch, batch_size, length)
    found = jax.device_get(_batch_scores(graphdef, params, inputs))
    for row, request in enumerate(batch):
      scores[request] = _score(found, row, len(request[1]))
  return [scores[request] for request in fitted]


def _check_lengths(model, lengths) -> tuple[int, ...]:
  longest = model.config.max_length
  if lengths is None:
    return bucket_lengths(longest)
  lengths = tuple(lengths)
  rising = all(a < b for a, b in zip(lengths, lengths[1:], strict=False))
  if not lengths or not rising or lengths[0] < 1 or lengths[-1] > longest:
    raise ValueError(
      f"lengths={lengths}: expected rising integers from 1 to "
      f"model.max_length={longest}"
    )
  return lengths


def _fed(request: Request) -> int:
  """How many tokens a pass is given; nothing follows the last one."""
  return len(request[0]) + len(request[1]) - 1


def _fit(number, request, longest, vocab_size):
  """The request as tuples that begin with BOS and fit."""
  context, continuation = (tuple(map(int, ids)) for ids in request)
  if not continuation:
    raise ValueError(f"request {number} has an empty continuation")
  if len(continuation) > longest:
    raise ValueError(
      f"request {number} has a continuation of {len(continuation)} tokens: "
      f"expected at most {longest}, which a pass is given"
    )
  for i in (*context, *continuation):
    if not 0 <= i < vocab_size:
      raise ValueError(
        f"request {number} has the token id {i}: expected 0 to {vocab_size - 1}"
      )
  if context[:1] == (BOS_ID,):
    context = context[1:]
  room = longest - len(continuation)
  return (BOS_ID, *context[max(0, len(context) - room) :]), continuation


def _arrays(batch, batch_size, length) -> dict[str, np.ndarray]:
  """Requests, padded; rows that are none have no tokens to be scored."""
  shape = batch_size, length
  tokens_BT, target_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  segment_BT = np.zeros(shape, np.int32)
  first_B, count_B = np.zeros((2, batch_size), np.int32)
  for row, (context, continuation) in enumerate(batch):
    count = len(context) + len(continuation) - 1
    tokens_BT[row, :count] = (context + continuation)[:-1]
    segment_BT[row, :count] = 1
    target_BT[row, : len(continuation)] = continuation
    first_B[row], count_B[row] = len(context) - 1, len(continuation)
  # A row of padding alone would have queries that see nothing.
  segment_BT[len(batch) :, 0] = 1
  return {
    "tokens_BT": tokens_BT,
    "segment_BT": segment_BT,
    "target_BT": target_BT,
    "first_B": first_B,
    "count_B": count_B,
  }


@functools.partial(jax.jit, static_argnums=0)
def _batch_scores(graphdef, params, inputs):
  """Sums over each row's continuation.

  Logits are made of continuations only, a piece of each at a time.

  Args:
    graphdef, params: the model.
    inputs: of `_arrays`. Row b has `count_B[b]` targets, of which the first is
      predicted at `first_B[b]`.

  Returns:
    Log-likelihoods, float32 [B], and tokens that were the likeliest, int32 [B].
  """
  model = nnx.merge(graphdef, params)
  hidden_BTD = model.encode(
    inputs["tokens_BT"], inputs["segment_BT"], causal=True
  )
  batch, length, _ = hidden_BTD.shape
  size = max(1, min(length, _LOGITS // batch))
  first_B1, count_B1 = inputs["first_B"][:, None], inputs["count_B"][:, None]

  def piece(number, sums):
    log_p_B, hits_B = sums
    # Clipped to the row: what lies past a continuation does not count.
    nth_1C = (number * size + jnp.arange(size))[None]
    counts_BC = nth_1C < count_B1
    at_BC = jnp.minimum(first_B1 + nth_1C, length - 1)
    target_BC = inputs["target_BT"][:, jnp.minimum(nth_1C[0], length - 1)]
    hidden_BCD = jnp.take_along_axis(hidden_BTD, at_BC[..., None], axis=1)
    logits_BCV = model.logits(hidden_BCD)
    chosen_BC = jnp.take_along_axis(
      logits_BCV, target_BC[..., None], axis=-1
    ).squeeze(-1)
    log_p_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
    hit_BC = counts_BC & (jnp.argmax(logits_BCV, axis=-1) == target_BC)
    return (
      log_p_B + jnp.sum(jnp.where(counts_BC, log_p_BC, 0), axis=1),
      hits_B + jnp.sum(hit_BC, axis=1, dtype=jnp.int32),
    )

  pieces = (jnp.max(inputs["count_B"]) + size - 1) // size
  zeros = jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.int32)
  return jax.lax.fori_loop(0, pieces, piece, zeros)


def _score(found, row: int, count: int) -> Score:
  log_likelihood = float(found[0][row])
  if not math.isfinite(log_likelihood):
    raise FloatingPointError(f"a log-likelihood is {log_likelihood}")
  return Score(log_likelihood, int(found[1][row]) == count, count)
