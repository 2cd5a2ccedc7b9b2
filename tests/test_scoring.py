"""Scores against full logits, one request at a time."""

import random

from flax import nnx
import jax
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest
from tiny_language_model import VOCAB, make_model

from gemma_funnel.data.tokenizer import BOS_ID
from gemma_funnel.evaluation import scoring

LONGEST = 64
FUNNELS = ("off", "start=1,stride=3")
# One shape almost throughout: tests spend their time compiling.
SHAPE = dict(batch_size=4, lengths=(LONGEST,))


@pytest.fixture(scope="module")
def model():
  return make_model(LONGEST, norm=3)


def draw_requests(seed, count=11, longest=30):
  draw = random.Random(seed)
  ids = lambda most: [
    draw.randrange(3, VOCAB) for _ in range(draw.randint(1, most))
  ]
  return [([BOS_ID, *ids(longest)], ids(longest)) for _ in range(count)]


def naive(model, context, continuation):
  """(log-likelihood, whether greedy) by full logits of one row, in float64."""
  ids = [*context, *continuation]
  # To one length, so that one program serves: what comes after is not seen.
  # The last one, which may be one too many, predicts nothing that is asked.
  tokens = np.asarray([(ids + [3] * LONGEST)[:LONGEST]], np.int32)
  logits = np.asarray(model(tokens), np.float64)
  logits = logits[0, len(context) - 1 : len(ids) - 1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = log_p[np.arange(len(continuation)), continuation]
  return chosen.sum(), bool((logits.argmax(-1) == continuation).all())


def score_pairs(model, pairs, **options):
  return scoring.Scorer(model, **options).loglikelihood(pairs)


def values(scores):
  return [score.log_likelihood for score in scores]


@pytest.mark.parametrize("funnel", FUNNELS)
def test_scores_equal_full_logits(model, funnel):
  model = model.with_funnel(funnel)
  requests = draw_requests(0)
  found = score_pairs(model, requests, **SHAPE)
  for score, (context, continuation) in zip(found, requests, strict=True):
    expected, greedy = naive(model, context, continuation)
    assert score.log_likelihood == pytest.approx(expected, rel=2e-5)
    assert score.is_greedy == greedy
    assert score.num_tokens == len(continuation)


@pytest.mark.parametrize("funnel", [FUNNELS[1], "start=1,reduce=attention"])
def test_padding_and_batch_do_not_matter(model, funnel):
  model = model.with_funnel(funnel)
  requests = draw_requests(1)
  expected = values(score_pairs(model, requests, **SHAPE))
  found = score_pairs(model, requests, batch_size=3, lengths=(61,))
  np.testing.assert_allclose(values(found), expected, rtol=2e-5)


def test_pieces_of_logits_do_not_matter(model, monkeypatch):
  requests = draw_requests(0)
  expected = score_pairs(model, requests, **SHAPE)
  # Read while tracing: 2 positions of each of 4 rows, and a function that has
  # not been traced yet.
  monkeypatch.setattr(scoring, "_LOGITS", 11)
  inner = scoring._batch_scores.__wrapped__
  monkeypatch.setattr(
    scoring,
    "_batch_scores",
    jax.jit(lambda *args: inner(*args), static_argnums=0),
  )
  found = score_pairs(model, requests, **SHAPE)
  np.testing.assert_allclose(values(found), values(expected), rtol=2e-5)


def test_logits_are_made_of_a_piece_only(model):
  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.shape for v in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        yield from shapes(inner)

  graphdef, params = nnx.split(model)
  inputs = scoring._arrays([((2, 5), (7,))], 16, LONGEST)
  jaxpr = jax.make_jaxpr(scoring._batch_scores, static_argnums=0)(
    graphdef, params, inputs
  )
  logits = [s for s in shapes(jaxpr.jaxpr) if len(s) == 3 and s[-1] == VOCAB]
  assert logits and set(logits) == {(16, 16, VOCAB)}


def test_greedy_is_known(model):
  context = [BOS_ID, 40, 41]
  likeliest, tokens = [], list(context)
  for _ in range(4):
    row = np.asarray([tokens + [0] * (LONGEST - len(tokens))])
    likeliest.append(int(np.argmax(model(row)[0, len(tokens) - 1])))
    tokens.append(likeliest[-1])
  almost = [*likeliest[:3], (likeliest[3] + 1) % VOCAB]
  found = score_pairs(model, [(context, likeliest), (context, almost)], **SHAPE)
  assert [score.is_greedy for score in found] == [True, False]


def test_bos_is_put_first_once(model):
  assert score_pairs(model, [], batch_size=2) == []
  requests = [([5, 6], [7, 8]), ([BOS_ID, 5, 6], [7, 8]), ([], [7])]
  found = score_pairs(model, requests, **SHAPE)
  assert found[0] == found[1]
  expected, _ = naive(model, [BOS_ID], [7])
  assert found[2].log_likelihood == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("fed", [LONGEST, 20])
def test_a_long_context_is_cut_on_the_left(model, fed):
  draw = random.Random(3)
  context = [BOS_ID, *(draw.randrange(3, VOCAB) for _ in range(100))]
  for count in (1, 5, fed - 1, fed):
    continuation = [draw.randrange(3, VOCAB) for _ in range(count)]
    [found] = score_pairs(
      model, [(context, continuation)], batch_size=4, lengths=(10, fed)
    )
    kept = [BOS_ID, *context[len(context) - (fed - count) :]]
    assert len(kept) + count - 1 == fed
    expected, _ = naive(model, kept, continuation)
    assert found.log_likelihood == pytest.approx(expected, rel=2e-5)


def oracle(ids, size):
  """The windows of lm_eval 0.4's get_rolling_token_windows, context_len=1."""
  count = min(size, len(ids))
  yield [BOS_ID, *ids[: count - 1]], ids[:count]
  done = count
  while done < len(ids):
    count = min(len(ids) - done, size)
    end = done + count
    yield ids[end - size - 1 : end - 1], ids[done:end]
    done = end


def test_windows_are_those_of_lm_eval_after_bos():
  for length in (2, 3, 8):
    for count in range(1, 40):
      ids = list(range(100, 100 + count))
      found = list(scoring.windows(ids, length))
      assert [i for _, part in found for i in part] == ids
      for number, (mine, theirs) in enumerate(
        zip(found, oracle(ids, length - 1), strict=True)
      ):
        fed = [*mine[0], *mine[1]][:-1]
        assert len(fed) <= length
        assert fed == ([BOS_ID] if number else []) + theirs[0]
        assert mine[1] == theirs[1]
  assert list(scoring.windows([], 8)) == []


def test_rolling_sums_windows(model):
  model = model.with_funnel(FUNNELS[1])
  draw = random.Random(4)
  texts = [
    [draw.randrange(3, VOCAB) for _ in range(n)] for n in (1, 19, 20, 75, 0)
  ]
  found = scoring.Scorer(model, None, 4, (20,)).rolling(texts)
  for total, ids in zip(found, texts, strict=True):
    expected = sum(naive(model, *w)[0] for w in scoring.windows(ids, 20))
    assert total == pytest.approx(expected, rel=2e-5)
  # A text that fits is one pass.
  whole = scoring.Scorer(model, **SHAPE).rolling(texts[1:2])
  assert whole[0] == pytest.approx(
    naive(model, [BOS_ID], texts[1])[0], rel=2e-5
  )


def test_equal_requests_have_equal_scores(model, monkeypatch):
  passes = []
  inner = scoring._batch_scores
  monkeypatch.setattr(
    scoring, "_batch_scores", lambda *a: passes.append(1) or inner(*a)
  )
  request = ([BOS_ID, 9], [10, 11])
  found = score_pairs(model, [request] * 7, **SHAPE)
  assert len(set(found)) == 1 and len(passes) == 1


def test_few_programs_are_compiled(model):
  requests = draw_requests(5, count=40, longest=32)
  before = scoring._batch_scores._cache_size()
  score_pairs(model, requests, batch_size=4)
  # Of lengths 32 and 64.
  assert scoring._batch_scores._cache_size() - before <= 2


def test_bucket_lengths():
  assert scoring.bucket_lengths(100) == (32, 64, 100)
  assert scoring.bucket_lengths(64) == (32, 64)
  assert scoring.bucket_lengths(8) == (8,)


class Words:
  """Encodes each word with the space before it, and "ab" as one token."""

  bos_id = 2

  def encode(self, text):
    text = text.replace("ab", "\0")
    return [ord(c) for c in text]


def test_pairs_are_cut_as_lm_eval_does():
  encode = scoring.encode_pair
  ids = lambda text: [ord(c) for c in text]
  assert encode(Words(), "xy", " z") == ([BOS_ID, *ids("xy")], ids(" z"))
  assert encode(Words(), "xy ", "z") == ([BOS_ID, *ids("xy")], ids(" z"))
  assert encode(Words(), "", "xy") == ([BOS_ID], ids("xy"))
  # "a" + "b" is one token, and so is "a" alone.
  assert encode(Words(), "xa", "b") == ([BOS_ID, *ids("x")], [0])
  assert encode(Words(), "xa", "bc") == ([BOS_ID, *ids("xa")], ids("c"))
  # Spaces alone are no context.
  assert encode(Words(), "  ", "x") == ([BOS_ID], ids("  x"))
  with pytest.raises(ValueError, match="continuation '' has no tokens after"):
    encode(Words(), "xy", "")


@pytest.mark.parametrize(
  "requests, options, message",
  [
    ([([2], [])], {}, "request 0 has a continuation of 0 tokens"),
    ([([2], [5] * 65)], {}, "request 0 .* of 65 tokens: expected 1 to 64"),
    ([([2], [5]), ([2], [VOCAB])], {}, "request 1 has the token id 300"),
    ([([-1], [5])], {}, "request 0 has the token id -1: expected 0 to 299"),
    ([], dict(batch_size=0), "batch_size=0: expected an integer >= 1"),
    ([], dict(lengths=()), r"lengths=\(\): expected rising"),
    ([], dict(lengths=(8, 8)), r"lengths=\(8, 8\): expected rising"),
    ([], dict(lengths=(65,)), r"lengths=\(65,\): .*max_length=64"),
  ],
)
def test_mistakes_are_named(model, requests, options, message):
  with pytest.raises(ValueError, match=message):
    score_pairs(model, requests, **{"batch_size": 2} | options)


def test_more_mistakes(model):
  with pytest.raises(ValueError, match="recover='none' .*log-likelihoods"):
    score_pairs(model.with_funnel("start=1,recover=none"), [], batch_size=1)
  with pytest.raises(ValueError, match="reduce='context' .*log-likelihoods"):
    score_pairs(model.with_funnel("start=1,reduce=context"), [], batch_size=1)
  with pytest.raises(ValueError, match="length=1: expected 2 or more"):
    list(scoring.windows([5], 1))
  broken = jax.tree.map(lambda p: p * np.nan, nnx.state(model))
  with pytest.raises(FloatingPointError, match="a log-likelihood is nan"):
    score_pairs(nnx.merge(nnx.graphdef(model), broken), [([], [5])], **SHAPE)
