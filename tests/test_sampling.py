"""The filters against their definition and Hugging Face; draws by counting."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.decode.sampling import Sampling, draw, filtered_logits

B, V = 4, 60

GRID = [
  dict(
    zip(
      ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
      v,
      strict=True,
    )
  )
  for v in itertools.product(
    (0.7, 1, 2.5),
    (None, 1, 7, V - 1, V, V + 5),
    (1, 1e-50, 0.3, 0.9, 0.999),
    (0, 0.02, 0.6),
    (1, 1.7, 0.6),
  )
]


def _logits(seed=0, batch=B, vocab=V):
  """Signs mixed, all distinct; flat and peaked rows."""
  rng = np.random.default_rng(seed)
  scale_B1 = np.geomspace(0.5, 4, batch)[:, None]
  return np.float32(scale_B1 * rng.normal(0, 1, (batch, vocab)))


def _seen(seed=1, batch=B, vocab=V):
  return np.random.default_rng(seed).random((batch, vocab)) < 0.4


def _keys(seed=2, batch=B):
  return jax.random.split(jax.random.key(seed), batch)


def _softmax(x_V):
  p_V = np.exp(x_V - x_V.max())
  return p_V / p_V.sum()


def _brute_force(
  logits_V, seen_V, *, temperature, top_k, top_p, min_p, repetition_penalty
):
  """The definitions, one token after another, in float64."""
  x = np.array(logits_V, np.float64)
  for token in np.flatnonzero(seen_V):
    x[token] *= repetition_penalty ** (1 if x[token] < 0 else -1)
  x /= temperature
  if top_k is not None:
    kth = sorted(x, reverse=True)[min(top_k, len(x)) - 1]
    x[x < kth] = -np.inf
  if top_p < 1:
    p, mass = _softmax(x), 0.0
    for token in sorted(range(len(x)), key=lambda token: -x[token]):
      last = x[token]
      mass += p[token]
      if mass >= top_p:
        break
    x[x < last] = -np.inf
  if min_p > 0:
    p = _softmax(x)
    x[p < min_p * p.max()] = -np.inf
  return x


def _filtered(logits_BV, seen_BV=None, **settings):
  logits_BV = jnp.asarray(logits_BV)
  seen_BV = None if seen_BV is None else jnp.asarray(seen_BV)
  return np.asarray(filtered_logits(logits_BV, seen_BV, Sampling(**settings)))


def test_filters_are_the_definition():
  logits_BV, seen_BV = _logits(), _seen()
  counts = set()
  for settings in GRID:
    got = _filtered(logits_BV, seen_BV, **settings)
    want = [
      _brute_force(x, seen, **settings)
      for x, seen in zip(logits_BV, seen_BV, strict=True)
    ]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=str(settings))
    counts |= set(np.isfinite(got).sum(-1).tolist())
  assert counts >= set(range(1, 9)) | {V - 1, V}


def test_equals_are_kept_together():
  """In top-k as in Hugging Face; beyond k too, they share the mass."""
  p = np.array([0.3, 0.2, 0.2, 0.2, 0.1])
  kept = lambda **settings: np.isfinite(
    _filtered(np.log(p)[None], temperature=1, **settings)[0]
  )
  np.testing.assert_array_equal(kept(top_k=2), p > 0.15)
  np.testing.assert_array_equal(kept(top_p=0.4), p > 0.15)
  # 0.3 / 0.9 of what top-k leaves: enough for 0.33, not for 0.34.
  np.testing.assert_array_equal(kept(top_k=2, top_p=0.33), p > 0.25)
  np.testing.assert_array_equal(kept(top_k=2, top_p=0.34), p > 0.15)


def test_forbidden_tokens_stay_so():
  logits_BV = _logits()
  logits_BV[:, 5:] = -np.inf
  for settings in GRID[::7]:
    kept_BV = np.isfinite(_filtered(logits_BV, _seen(), **settings))
    assert kept_BV.any(-1).all() and not kept_BV[:, 5:].any()


def test_filters_take_bfloat16_and_compute_in_float32():
  logits_BV = jnp.asarray(_logits(), jnp.bfloat16)
  settings = dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
  got = _filtered(logits_BV, **settings)
  assert got.dtype == np.float32
  want = _filtered(logits_BV.astype(jnp.float32), **settings)
  np.testing.assert_array_equal(got, want)


def test_a_real_vocabulary():
  """Sums over 256,000 tokens: the cut is where float64 has it, or beside it."""
  logits_BV = _logits(batch=2, vocab=256_000)
  for settings in (dict(top_p=0.95), dict(top_p=0.95, top_k=1000)):
    got = np.isfinite(_filtered(logits_BV, temperature=0.8, **settings))
    for kept_V, x_V in zip(got, logits_BV, strict=True):
      want_V = _brute_force(
        x_V,
        [],
        **dict(temperature=0.8, top_k=None, min_p=0, repetition_penalty=1)
        | settings,
      )
      want = np.isfinite(want_V).sum()
      assert abs(kept_V.sum() - want) <= 1e-4 * want
      assert want < 256_000


@pytest.mark.parity
def test_filters_are_those_of_transformers():
  torch = pytest.importorskip("torch")
  hf = pytest.importorskip("transformers.generation.logits_process")
  logits_BV, seen_BV = _logits(), _seen()
  # As a prompt: tokens seen, some more than once, the first to fill up.
  prompt_BT = np.stack([np.resize(np.flatnonzero(s), V) for s in seen_BV])

  def theirs(temperature, top_k, top_p, min_p, repetition_penalty):
    # Those that generate() makes, in its order.
    steps = [
      hf.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)),
      hf.TemperatureLogitsWarper(float(temperature)),
    ]
    if top_k is not None:
      steps.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
      steps.append(hf.TopPLogitsWarper(top_p))
    steps.append(hf.MinPLogitsWarper(min_p))
    steps = hf.LogitsProcessorList(steps)
    return steps(torch.tensor(prompt_BT), torch.tensor(logits_BV)).numpy()

  for settings in GRID:
    np.testing.assert_allclose(
      _filtered(logits_BV, seen_BV, **settings),
      theirs(**settings),
      rtol=1e-6,
      err_msg=str(settings),
    )

  # Where logits are equal: theirs are among ours, and ours that are not equal
  # their lowest.
  logits_BV = np.round(2 * logits_BV) / 2
  more = 0
  for settings in GRID:
    ours, hf_kept = (
      _filtered(logits_BV, seen_BV, **settings),
      theirs(**settings),
    )
    for x, y in zip(ours, hf_kept, strict=True):
      kept = np.isfinite(y)
      np.testing.assert_allclose(x[kept], y[kept], rtol=1e-6)
      beyond = x[np.isfinite(x) & ~kept]
      np.testing.assert_allclose(beyond, y[kept].min(), rtol=1e-6)
      more += len(beyond)
      if settings["top_p"] == 1:
        assert not len(beyond)
  assert more


SETTINGS = [
  Sampling(temperature=1),
  Sampling(temperature=2, top_k=5),
  Sampling(temperature=0.8, top_p=0.8, repetition_penalty=1.5),
  Sampling(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_are_the_filtered_softmax(sampling):
  draws, vocab = 20_000, 12
  rows = lambda x_1V: jnp.tile(jnp.asarray(x_1V), (draws, 1))
  logits_1V, seen_1V = _logits(3, 1, vocab), _seen(3, 1, vocab)
  tokens_B = jax.jit(draw, static_argnums=3)(
    rows(logits_1V), _keys(batch=draws), rows(seen_1V), sampling
  )
  assert tokens_B.dtype == jnp.int32 and tokens_B.shape == (draws,)
  count_V = np.bincount(tokens_B, minlength=vocab)
  settings = {name: getattr(sampling, name) for name in GRID[0]}
  expected_V = draws * _softmax(
    _brute_force(logits_1V[0], seen_1V[0], **settings)
  )
  kept_V = expected_V > 0
  assert kept_V.sum() > 2 and not count_V[~kept_V].any()
  chi2 = np.sum((count_V - expected_V)[kept_V] ** 2 / expected_V[kept_V])
  freedom = kept_V.sum() - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
  "sampling", [*SETTINGS, Sampling(repetition_penalty=1.5)], ids=str
)
def test_a_row_does_not_depend_on_its_batch(sampling):
  batch = 16
  inputs = [_logits(batch=batch), _keys(batch=batch), _seen(batch=batch)]
  logits_BV, keys_B, seen_BV = map(jnp.asarray, inputs)
  tokens_B = np.asarray(draw(logits_BV, keys_B, seen_BV, sampling))
  assert len(set(tokens_B.tolist())) > 2
  for b in range(batch):
    one = slice(b, b + 1)
    alone = draw(logits_BV[one], keys_B[one], seen_BV[one], sampling)
    assert alone[0] == tokens_B[b]
  flipped = draw(logits_BV[::-1], keys_B[::-1], seen_BV[::-1], sampling)
  np.testing.assert_array_equal(flipped[::-1], tokens_B)
  # Beside other rows, too.
  beside = draw(
    logits_BV.at[1:].multiply(-1), keys_B, seen_BV.at[1:].set(True), sampling
  )
  assert beside[0] == tokens_B[0]


def test_greedy_is_the_argmax_and_needs_no_keys():
  logits_BV = _logits()
  assert not Sampling().needs_seen
  tokens_B = draw(jnp.asarray(logits_BV), None, None, Sampling())
  assert tokens_B.dtype == jnp.int32
  np.testing.assert_array_equal(tokens_B, logits_BV.argmax(-1))


def test_little_temperature_or_top_p_is_greedy():
  logits_BV = _logits()
  for settings in (
    dict(temperature=1e-6),
    dict(temperature=9, top_k=1),
    dict(temperature=9, top_p=1e-9),
    dict(temperature=9, min_p=0.9999),
  ):
    tokens_B = draw(jnp.asarray(logits_BV), _keys(), None, Sampling(**settings))
    np.testing.assert_array_equal(tokens_B, logits_BV.argmax(-1))


def test_greedy_is_penalised():
  """Both signs; what is not seen is left as it is."""
  logits_BV = jnp.asarray([[3.0, 2.0, -1.0], [-1.0, -1.5, -9.0]])
  seen_BV = jnp.asarray([[True, False, True], [True, False, False]])
  sampling = Sampling(repetition_penalty=2)
  assert sampling.needs_seen
  np.testing.assert_array_equal(
    filtered_logits(logits_BV, seen_BV, sampling),
    [[1.5, 2.0, -2.0], [-2.0, -1.5, -9.0]],
  )
  np.testing.assert_array_equal(
    draw(logits_BV, None, seen_BV, sampling), [1, 1]
  )
  np.testing.assert_array_equal(draw(logits_BV, None, None, Sampling()), [0, 0])


@pytest.mark.parametrize(
  "settings,sorts,top_ks",
  [
    (dict(), 0, 0),
    (dict(min_p=0.1, repetition_penalty=2), 0, 0),
    (dict(top_k=9, min_p=0.1), 0, 1),
    (dict(top_p=0.9, min_p=0.1), 1, 0),
    (dict(top_k=9, top_p=0.9), 0, 1),
    (dict(top_k=V, top_p=0.9), 1, 0),
  ],
)
def test_jits_and_sorts_no_more_than_needed(settings, sorts, top_ks):
  sampling = Sampling(temperature=0.7, **settings)
  args = (jnp.asarray(_logits()), _keys(), jnp.asarray(_seen()))
  jitted = jax.jit(draw, static_argnums=3)
  np.testing.assert_array_equal(jitted(*args, sampling), draw(*args, sampling))
  # An equal one is the same program.
  assert hash(sampling) == hash(Sampling(temperature=0.7, **settings))
  compiled = jitted._cache_size()
  jitted(*args, Sampling(temperature=0.7, **settings))
  assert jitted._cache_size() == compiled
  program = str(jax.make_jaxpr(draw, static_argnums=3)(*args, sampling))
  assert program.count(" sort[") == sorts
  assert program.count(" top_k[") == top_ks
  assert "callback" not in program


NAN, INF = float("nan"), float("inf")
WRONG = {
  "temperature": (-1, -0.1, 1e-7, 2e6, NAN, INF, True, False, "1", None),
  "top_k": (0, -3, 5.0, NAN, True, False, "5", (5,)),
  "top_p": (0, 0.0, -0.1, 1.5, 2, NAN, INF, True, False, "0.9", None, [0.9]),
  "min_p": (-0.1, 1, 1.0, NAN, INF, True, False, "0.1", None, jnp.ones(2)),
  "repetition_penalty": (0, 0.0, -1, 2e6, NAN, INF, True, False, "1", None),
}


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_raises(name, greedy):
  for value in WRONG[name]:
    settings = {"temperature": 0 if greedy else 1, name: value}
    with pytest.raises(ValueError) as error:
      Sampling(**settings)
    want = f"sampling.{name}={value!r}: expected "
    assert str(error.value).startswith(want)


def test_right_values_are_accepted():
  """Integers for floats, both ends, and what is off where greedy."""
  Sampling(temperature=1, top_k=1, top_p=1, min_p=0, repetition_penalty=2)
  Sampling(0, None, 1, 0, 1)
  Sampling(0.0, None, 1.0, 0.0, 0.5)
  Sampling(1e6, 2**31 - 1, 1e-9, 0.999, 1e-6)


@pytest.mark.parametrize(
  "settings", [dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)]
)
def test_a_filter_where_greedy_raises(settings):
  ((name, value),) = settings.items()
  with pytest.raises(
    ValueError, match=f"sampling.{name}={value} has no effect"
  ):
    Sampling(**settings)


@pytest.mark.parametrize(
  "seen_BV", [None, jnp.zeros((B, V), jnp.int32), jnp.zeros((1, V), bool)]
)
def test_seen_where_needed(seen_BV):
  sampling = Sampling(repetition_penalty=1.2)
  with pytest.raises(ValueError, match=rf"seen_BV=.*: expected bool\[{B}, {V}"):
    draw(jnp.asarray(_logits()), None, seen_BV, sampling)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: None, "keys_B=None: expected 4 typed keys"),
    (lambda: _keys(batch=3), r"keys_B=key<fry>\[3\]: expected 4 typed keys"),
    (lambda: jax.random.key(0), r"keys_B=key<fry>\[\]: expected 4 typed keys"),
    (lambda: jax.random.key_data(_keys()), r"keys_B=uint32\[4, 2\]: expected"),
    *(
      (
        lambda impl=impl: jax.random.split(jax.random.key(0, impl=impl), B),
        f"keys_B of '{impl}': a row's draw would depend on its batch",
      )
      for impl in ("rbg", "unsafe_rbg")
    ),
  ],
)
def test_keys_where_needed(make, message):
  with pytest.raises(ValueError, match=message):
    draw(jnp.asarray(_logits()), make(), None, Sampling(temperature=1))
