"""Scores and continuations of texts by a language model: one way for all tasks.

`Scorer` serves our own tasks (`generative`) and lm-evaluation-harness
(`lm_eval_model`) alike. BOS comes first in every text: a Gemma without it is at
chance.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import generate
from gemma_funnel.checks import require, require_int
from gemma_funnel.config import check_recovers, check_reducers
from gemma_funnel.data.tokenizer import BOS_ID, Tokenizer
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.decode.sampling import GREEDY, Sampling
from gemma_funnel.model import Transformer

# (context, continuation), token ids.
Pair = tuple[Sequence[int], Sequence[int]]

_LOG2_SMALLEST = 5
# Positions of a batch whose logits are in memory at one time.
_LOGITS = 256
# Tokens between looks for a stop string.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Score:
  """What a model makes of a continuation."""

  log_likelihood: float  # The sum over its tokens, in nats.
  is_greedy: bool  # Whether each of them was the likeliest.
  num_tokens: int


@dataclasses.dataclass(frozen=True)
class Limits:
  """How a text is continued."""

  max_new_tokens: int
  stop: tuple[str, ...] = ()  # Ends a text, and is no part of it; so is EOS.
  sampling: Sampling = GREEDY


def bucket_lengths(longest: int) -> tuple[int, ...]:
  """Powers of two below `longest`, and `longest`: what to pad requests to."""
  powers = (2**n for n in range(_LOG2_SMALLEST, longest.bit_length()))
  return (*(p for p in powers if p < longest), longest)


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
  """Token ids of a context, BOS first, and of what follows it.

  As lm_eval's `TemplateLM`, so that numbers compare: spaces at the end of the
  context go with the continuation, and the two are encoded as one text, cut
  after as many tokens as the context alone has. Where that leaves no
  continuation, the cut is at the first token that the context alone has not.

  Raises:
    ValueError: a continuation without tokens.
  """
  if not context:
    first, rest = [tokenizer.bos_id], tokenizer.encode(continuation)
  else:
    stripped = context.rstrip()
    first = [tokenizer.bos_id, *tokenizer.encode(stripped)]
    whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    at = len(first)
    if at >= len(whole):
      same = [a == b for a, b in zip(first, whole, strict=False)]
      at = same.index(False) if False in same else len(whole)
      first = whole[:at]
    rest = whole[at:]
  require(
    bool(rest),
    f"the continuation {continuation!r} has no tokens after "
    f"{context[-40:]!r}: expected one at least",
  )
  return first, rest


def windows(
  ids: Sequence[int], length: int, bos_id: int = BOS_ID
) -> Iterator[Pair]:
  """Pairs that predict each token of a long text, without BOS, once.

  As lm_eval's `get_rolling_token_windows` of length - 1 with context_len=1:
  windows overlap by one token, the last one by as many as there is room for.
  Unlike there, every window of `length` fed tokens begins with BOS.
  """
  require(
    length >= 2, f"length={length}: expected 2 or more, of which one is BOS"
  )
  size = length - 1
  for start in range(0, len(ids), size):
    end = min(start + size, len(ids))
    before = ids[max(0, end - size - 1) : start]
    yield [bos_id, *before], ids[start:end]


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A language model that scores and continues texts, given as token ids.

  Raises:
    ValueError: a value out of range, or a funnel that does not recover.
  """

  model: Transformer  # With the funnel to run it with.
  tokenizer: Tokenizer | None = None  # Only `generate_until` needs it.
  batch_size: int = 8  # Rows of a pass.
  # Rising: passes are padded to the least that holds them, and the last one is
  # the most tokens of a pass. None is `bucket_lengths` of the model's.
  lengths: Sequence[int] | None = None
  seed: int = 0  # Of what is drawn.
  stop_ids: Sequence[int] = ()  # That end a text; () is the tokenizer's EOS.

  def __post_init__(self):
    check_recovers(self.model.stages, "log-likelihoods")
    require_int("batch_size", self.batch_size, 1)
    longest = self.model.config.max_length
    lengths = self.lengths
    lengths = bucket_lengths(longest) if lengths is None else tuple(lengths)
    rising = list(lengths) == sorted(set(lengths))
    require(
      bool(lengths) and rising and 1 <= lengths[0] and lengths[-1] <= longest,
      f"lengths={lengths}: expected rising integers from 1 to "
      f"model.max_length={longest}",
    )
    object.__setattr__(self, "lengths", lengths)

  @property
  def bos_id(self) -> int:
    """What every pass begins with; Gemma's where there is no tokenizer."""
    return self.tokenizer.bos_id if self.tokenizer else BOS_ID

  @property
  def max_length(self) -> int:
    """Tokens that a pass, or a prompt with its continuation, has at most."""
    return self.lengths[-1]

  def loglikelihood(self, pairs: Sequence[Pair]) -> list[Score]:
    """Scores continuations; equal pairs are run once.

    Args:
      pairs: (context, continuation) each. BOS is put before a context that does
        not begin with it; one too long loses its beginning, but BOS. The
        continuation's last token is not fed.

    Raises:
      ValueError: a continuation that is empty or longer than `max_length`; a
        token id outside the vocabulary; a reducer that allows no such loss.
      FloatingPointError: a score that is not finite.
    """
    check_reducers(self.model.stages, "trains", "log-likelihoods")
    vocab_size = self.model.config.vocab_size
    fitted = [
      _fit(f"request {number}", *pair, self.max_length, vocab_size, self.bos_id)
      for number, pair in enumerate(pairs)
    ]
    num_fed = lambda pair: len(pair[0]) + len(pair[1]) - 1
    # The longest first: what does not fit into memory is known at once.
    unique = sorted(set(fitted), key=lambda pair: (-num_fed(pair), pair))
    graphdef, params = nnx.split(self.model)
    scores = {}
    while unique:
      length = min(n for n in self.lengths if n >= num_fed(unique[0]))
      batch, unique = unique[: self.batch_size], unique[self.batch_size :]
      inputs = _arrays(batch, self.batch_size, length)
      log_p_B, hits_B = jax.device_get(_batch_scores(graphdef, params, inputs))
      for pair, log_p, hits in zip(batch, log_p_B, hits_B, strict=False):
        if not math.isfinite(log_p):
          raise FloatingPointError(f"a log-likelihood is {log_p}")
        count = len(pair[1])
        scores[pair] = Score(float(log_p), int(hits) == count, count)
    return [scores[pair] for pair in fitted]

  def rolling(self, texts: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihoods of whole texts by windows, in nats; 0 for an empty one.

    Texts are token ids without BOS, of any length. Raises as `loglikelihood`.
    """
    pairs = [list(windows(ids, self.max_length, self.bos_id)) for ids in texts]
    scores = iter(self.loglikelihood([pair for text in pairs for pair in text]))
    return [
      float(sum(next(scores).log_likelihood for _ in text)) for text in pairs
    ]

  def generate_until(
    self, prompts: Sequence[Sequence[int]], limits: Limits
  ) -> list[str]:
    """Texts that go on from prompts, up to EOS or the first stop string.

    Prompts are token ids, BOS first; one too long loses tokens after BOS.
    Raises ValueError where `max_new_tokens` leaves no room for a prompt.
    """
    room = self.prompt_room(limits.max_new_tokens)
    if not prompts:
      return []
    cut = lambda ids: [*ids[:1], *ids[1:][max(0, len(ids) - room) :]]
    prompts = [cut(list(ids)) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    cache_length = len(prompts[order[0]]) + limits.max_new_tokens
    decoder = decoder_lib.Decoder(self.model, cache_length)
    texts = [""] * len(prompts)
    size = min(self.batch_size, len(prompts))
    for start in range(0, len(order), size):
      batch = order[start : start + size]
      # A batch that is not full would be compiled for anew.
      full = batch + batch[-1:] * (size - len(batch))
      for results in decoder.stream(
        [prompts[n] for n in full],
        max_new_tokens=limits.max_new_tokens,
        sampling=limits.sampling,
        stop_ids=self.stop_ids or [self.tokenizer.eos_id],
        seed=self.seed,
        first_row=start,
        chunk=_CHUNK,
      ):
        found = [generate.decode(self.tokenizer, r.tokens) for r in results]
        ended = [any(s in text for s in limits.stop) for text in found]
        if all(e or r.stopped for e, r in zip(ended, results, strict=True)):
          break
      for number, text in zip(batch, found, strict=False):
        ends = [text.find(s) for s in limits.stop if s in text]
        texts[number] = text[: min(ends, default=len(text))]
    return texts

  def prompt_room(self, max_new_tokens: int) -> int:
    """Tokens that a prompt has at most beside its continuation."""
    require(
      max_new_tokens < self.max_length,
      f"max_new_tokens={max_new_tokens}: expected less than the "
      f"{self.max_length} tokens that a prompt and its continuation may have",
    )
    return self.max_length - max_new_tokens


def _fit(what: str, context, continuation, longest, vocab_size, bos_id) -> Pair:
  """The pair as tuples that begin with BOS and fit."""
  context = tuple(map(int, context))
  continuation = tuple(map(int, continuation))
  require(
    1 <= len(continuation) <= longest,
    f"{what} has a continuation of {len(continuation)} tokens: expected 1 to "
    f"{longest}, which a pass is given",
  )
  for i in (*context, *continuation):
    fits, most = 0 <= i < vocab_size, vocab_size - 1
    require(fits, f"{what} has the token id {i}: expected 0 to {most}")
  if context[:1] == (bos_id,):
    context = context[1:]
  room = longest - len(continuation)
  return (bos_id, *context[max(0, len(context) - room) :]), continuation


def _arrays(batch, batch_size, length) -> dict[str, np.ndarray]:
  """Pairs, padded to `batch_size` rows of `length` tokens."""
  shape = batch_size, length
  zeros = lambda shape, *names: {n: np.zeros(shape, np.int32) for n in names}
  inputs = zeros(shape, "tokens_BT", "segment_BT", "target_BT")
  inputs |= zeros(batch_size, "first_B", "count_B")
  for row, (context, continuation) in enumerate(batch):
    fed = (context + continuation)[:-1]
    inputs["tokens_BT"][row, : len(fed)] = fed
    inputs["segment_BT"][row, : len(fed)] = 1
    inputs["target_BT"][row, : len(continuation)] = continuation
    inputs["first_B"][row] = len(context) - 1
    inputs["count_B"][row] = len(continuation)
  # A row of padding alone would have queries that see nothing.
  inputs["segment_BT"][len(batch) :, 0] = 1
  return inputs


@functools.partial(jax.jit, static_argnums=0)
def _batch_scores(graphdef, params, inputs):
  """Of each row's continuation: the log-likelihood, float32 [B], and how many
  of its `count_B` tokens, the first predicted at `first_B`, were the likeliest,
  int32 [B]. Logits are made of continuations only, a piece of each at a time.
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
    chosen_BC1 = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)
    log_p_BC = chosen_BC1[..., 0] - jax.nn.logsumexp(logits_BCV, axis=-1)
    hit_BC = counts_BC & (jnp.argmax(logits_BCV, axis=-1) == target_BC)
    log_p_B += jnp.sum(jnp.where(counts_BC, log_p_BC, 0), axis=1)
    return log_p_B, hits_B + jnp.sum(hit_BC, axis=1, dtype=jnp.int32)

  pieces = (jnp.max(inputs["count_B"]) + size - 1) // size
  zeros = jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.int32)
  return jax.lax.fori_loop(0, pieces, piece, zeros)
