"""Generation: against the one-pass forward, and what it refuses."""

import dataclasses

from flax import nnx
import funnel_grid
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from gemma_funnel.config import format_funnel, resolve_funnel
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.decode.sampling import GREEDY, Sampling, draw
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding

NEW = 64
SEED = 3
CACHE = 128
FUNNEL = "start=1,stop=4,stride=3"
NESTED = "start=1,stride=2+start=3,stop=4,stride=2,keys=first"
# Of all kinds: full layers, deep ones, deep ones of pooled queries; and back.
AND_BACK = "start=1,stop=4,stride=2+start=2,stop=3,stride=2,keys=first"
# Most of what is tested is the same at any depth: this is a layer of each run.
SHALLOW = "start=1,stop=2,stride=3"
# Its programs are compiled for each number of rows: most tests have these.
LENGTHS = 4, 9, 7


def _prompts(*lengths):
  rng = np.random.default_rng(1)
  return [rng.integers(5, 97, n).tolist() for n in lengths]


def _model(funnel="off"):
  return funnel_grid.make_model(resolve_funnel(funnel, 5))


@pytest.fixture(scope="module")
def shallow():
  config = dataclasses.replace(funnel_grid.CONFIG, num_layers=3)
  return funnel_grid.stirred(Transformer(config, SHALLOW, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def decoder(shallow):
  return Decoder(shallow, CACHE)


def _one_pass(model: Transformer, prompts, results, sampling=GREEDY):
  """The tokens that the one-pass forward's logits would have given."""
  rows = [prompts[r.prompt] + r.tokens for r in results]
  # One length for all, of which operations are compiled once.
  tokens = np.full((len(rows), CACHE), 96, np.int32)
  segments = np.zeros_like(tokens)
  for row, ids in enumerate(rows):
    tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
  logits = model(tokens, segments)
  want = []
  for row, r in enumerate(results):
    key = jax.random.fold_in(jax.random.key(SEED), r.prompt)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(key, r.sample), jnp.arange(len(r.tokens))
    )
    at = len(prompts[r.prompt]) - 1
    logits_TV = logits[row, at : at + len(r.tokens)]
    want.append(draw(logits_TV, keys, None, sampling).tolist())
  return want


@pytest.mark.parametrize(
  "family, funnel",
  [
    *((funnel_grid.GEMMA2, f) for f in funnel_grid.decodable()[::7]),
    *zip(funnel_grid.OTHERS, funnel_grid.decodable()[3::4], strict=False),
  ],
  ids=lambda x: x if isinstance(x, str) else format_funnel(x),
)
def test_tokens_are_those_of_the_one_pass_forward(family, funnel):
  """A batch of unequal prompts; the window is passed by all.

  Drawn: random models repeat themselves when greedy.
  """
  model = funnel_grid.make_model(funnel, family)
  prompts, sampling = _prompts(3, 17, 8, 1, 12), Sampling(temperature=1.5)
  results = Decoder(model, CACHE).generate(
    prompts, max_new_tokens=NEW, sampling=sampling, seed=SEED
  )
  assert [len(r.tokens) for r in results] == [NEW] * 5
  assert all(len(set(r.tokens)) > 20 for r in results)
  want = _one_pass(model, prompts, results, sampling)
  assert [r.tokens for r in results] == want


@pytest.mark.parametrize("funnel", ["off", FUNNEL, NESTED])
def test_single_prompts_of_every_phase(funnel):
  """And greedily."""
  model = _model(funnel)
  decoder = Decoder(model, CACHE)
  prompts, results = _prompts(1, 2, 3, 4, 5), []
  for number, prompt in enumerate(prompts):
    (result,) = decoder.generate([prompt], max_new_tokens=NEW)
    results.append(dataclasses.replace(result, prompt=number))
  assert [len(r.tokens) for r in results] == [NEW] * 5
  assert [r.tokens for r in results] == _one_pass(model, prompts, results)


def test_programs_are_compiled_once(shallow):
  """A prefill per length bucket, and one step for all."""
  decoder = Decoder(shallow, CACHE)
  for lengths in ([9], [14], [4], [30], [31]):
    decoder.generate(_prompts(*lengths), max_new_tokens=20)
  assert decoder._advance._cache_size() == 1
  assert decoder._prefill._cache_size() == 2  # 16 and 32.


def test_steps_do_not_come_back_to_the_host(decoder):
  until = jax.device_put(np.int32(40))
  state = decoder.prefill(_prompts(*LENGTHS), max_new_tokens=41)
  with jax.transfer_guard("disallow"):
    state = decoder.advance(state, until)
  assert int(state.step) == 40


@pytest.mark.parametrize(
  "lengths,stride,want",
  [
    ([5], 4, (0, [5])),
    ([6], 4, (1, [6])),
    ([3, 7, 11], 4, (2, [3, 7, 11])),
    ([1, 8], 4, (0, [1, 5])),
    ([4, 5, 6], 2, (0, [3, 5, 5])),
    ([9, 2], 1, (0, [9, 2])),
  ],
)
def test_rows_are_brought_to_one_phase(lengths, stride, want):
  assert decoder_lib._common_phase(lengths, stride) == want


def test_at_most_a_stride_less_one_steps_are_staggered():
  for stride in (2, 3, 6):
    for lengths in np.random.default_rng(0).integers(1, 30, (50, 4)):
      phase, starts = decoder_lib._common_phase(lengths.tolist(), stride)
      assert all(1 <= m <= n < m + stride for m, n in zip(starts, lengths))  # noqa: B905
      assert all((m - 1) % stride == phase for m in starts)


def test_buckets_waste_a_quarter_at_most():
  for n in range(1, 5000):
    bucket = decoder_lib._bucket(n)
    assert n <= bucket <= max(16, 1.25 * n)
  assert len({decoder_lib._bucket(n) for n in range(513, 1025)}) == 4


def test_stop_ids_end_a_row_and_the_others_go_on(decoder):
  prompts = _prompts(*LENGTHS)
  free = decoder.generate(prompts, max_new_tokens=30)
  stop = free[1].tokens[7]
  first = [r.tokens.index(stop) if stop in r.tokens else 30 for r in free]
  results = decoder.generate(prompts, max_new_tokens=30, stop_ids=[stop, 3])
  for r, whole, n in zip(results, free, first, strict=True):
    n = min([n, *(i for i, t in enumerate(whole.tokens) if t == 3)])
    assert r.tokens == whole.tokens[:n]
    assert r.stopped == (n < 30)
  assert results[1].stopped


def test_streaming_gives_what_is_new_and_ends_alike(decoder):
  prompts = _prompts(*LENGTHS)
  seen = list(decoder.stream(prompts, max_new_tokens=21, chunk=5))
  counts = [len(results[0].tokens) for results in seen]
  assert counts == sorted(set(counts)) and counts[-1] == 21
  assert np.all(np.diff(counts) <= 5)
  assert seen[-1] == decoder.generate(prompts, max_new_tokens=21)


def test_samples_depend_on_seed_and_place_and_on_nothing_else(decoder):
  prompts = _prompts(*LENGTHS)
  draw = lambda prompts, seed, **options: decoder.generate(
    prompts,
    max_new_tokens=12,
    sampling=Sampling(temperature=2.0),
    seed=seed,
    **options,
  )
  one = draw(prompts, 5)
  assert one == draw(prompts, 5)
  for other, again in zip(draw(prompts, 6), one, strict=True):
    assert other.tokens != again.tokens
  assert draw(prompts[:1], 5) == one[:1]
  # A later batch goes on numbering the rows.
  later = draw(prompts[1:2], 5, first_row=1)
  assert later[0].tokens == one[1].tokens
  assert later != draw(prompts[1:2], 5)
  many = draw(prompts, 5, num_samples=3)
  assert [(r.prompt, r.sample) for r in many] == [
    (0, 0),
    (0, 1),
    (0, 2),
    (1, 0),
    (1, 1),
    (1, 2),
    (2, 0),
    (2, 1),
    (2, 2),
  ]
  assert many[::3] == one
  assert len({tuple(r.tokens) for r in many}) == 9


def test_repetition_penalty_counts_prompt_and_continuation(decoder):
  """So high a penalty lets no token come twice, while others are left."""
  prompts = _prompts(6, 3)
  results = decoder.generate(
    prompts,
    max_new_tokens=40,
    sampling=Sampling(temperature=0.0, repetition_penalty=1e6),
  )
  for r in results:
    tokens = prompts[r.prompt] + r.tokens
    new = r.tokens[:20]
    assert len(set(new)) == 20 and not set(new) & set(prompts[r.prompt]), tokens


def _on_a_mesh(model: Transformer):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  params = nnx.to_pure_dict(nnx.state(model))
  params = jax.device_put(params, sharding.shardings_of(params, mesh))
  return mesh, nnx.merge(nnx.graphdef(model), params)


def test_what_a_new_funnel_learns_is_where_the_model_is():
  config = dataclasses.replace(funnel_grid.CONFIG, vocab_size=98)
  model = Transformer(config, rngs=nnx.Rngs(0))
  tokens = np.asarray(_prompts(9))
  new = "start=1,stride=2,reduce=attention,recover=attend"
  call = jax.jit(
    lambda graphdef, params: nnx.merge(graphdef, params)(tokens),
    static_argnums=0,
  )
  got, want = (
    call(*nnx.split(m.with_funnel(new))) for m in (_on_a_mesh(model)[1], model)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_sharded_like_the_model():
  """8 devices: rows over data and fsdp, heads over tensor; the same tokens."""
  config = dataclasses.replace(funnel_grid.CONFIG, vocab_size=98)
  model = Transformer(config, AND_BACK, rngs=nnx.Rngs(0))
  prompts = _prompts(5, 9, 3, 12)
  want = Decoder(model, CACHE).generate(prompts, max_new_tokens=20)
  mesh, sharded = _on_a_mesh(model)
  decoder = Decoder(sharded, CACHE)
  state = decoder.prefill(prompts, max_new_tokens=20)
  for _ in range(2):
    for cache in state.caches:
      for k, v in cache.keys_values:
        for x in (k, v):
          spec = NamedSharding(
            mesh, jax.P(("data", "fsdp"), "tensor", None, None)
          )
          assert x.sharding.is_equivalent_to(spec, 4)
    state = decoder.advance(state, 30)
  assert decoder_lib._results(state, 1)[1] == want


@pytest.mark.parametrize(
  "prompts,options,message",
  [
    ([], {}, "no prompts: expected one"),
    ([[5], []], {}, "prompt 1 is empty"),
    ([[5] * 120], {}, "prompt 0 has 120 tokens; cache_length=128 has room for"),
    ([[5]], dict(max_new_tokens=128), "room for 0 beside max_new_tokens=128"),
    ([[5, 97]], {}, "prompt 0 has the token id 97: expected 0 to 96"),
    ([[-1]], {}, "token id -1"),
    ([[5]], dict(stop_ids=[3, 97]), "stop_ids has the token id 97"),
    ([[5]], dict(max_new_tokens=0), "max_new_tokens=0: expected an integer"),
    ([[5]], dict(num_samples=0), "num_samples=0"),
    ([[5]], dict(seed=-1), "seed=-1: expected an integer from 0"),
    ([[5]], dict(seed=2**32), "seed=4294967296"),
    ([[5]], dict(first_row=-1), "first_row=-1"),
    ([[5]], dict(chunk=0), "chunk=0"),
  ],
)
def test_what_cannot_be_generated(decoder, prompts, options, message):
  options = {"max_new_tokens": 10, **options}
  with pytest.raises(ValueError, match=message):
    decoder.stream(prompts, **options)


def test_models_that_cannot_be_decoded():
  with pytest.raises(ValueError, match="cache_length=512: expected 2 to .*256"):
    Decoder(_model(), 512)
  with pytest.raises(ValueError, match="'none' .* decoding needs a state"):
    Decoder(_model("start=1,recover=none"), 64)


def test_the_model_may_go_on_being_used(shallow, decoder):
  """Nothing of it is donated."""
  prompts = _prompts(*LENGTHS)
  first = decoder.generate(prompts, max_new_tokens=4)
  assert first == decoder.generate(prompts, max_new_tokens=4)
  assert np.isfinite(np.asarray(shallow(np.asarray(prompts[:1])))).all()


@pytest.mark.parametrize("funnel", ["off", "start=1,stop=4,stride=2"])
def test_given_tokens_are_as_likely_as_in_one_pass(funnel):
  model = funnel_grid.make_model(resolve_funnel(funnel, 5))
  rows = np.random.default_rng(0).integers(5, 97, (3, 30)).astype(np.int32)
  got = Decoder(model, 30).log_likelihoods(rows[:, :18], rows[:, 18:])
  log_p = np.asarray(jax.nn.log_softmax(model(rows)))[:, 17:-1]
  want = np.take_along_axis(log_p, rows[:, 18:, None], axis=2)[..., 0]
  np.testing.assert_allclose(got, want, atol=1e-4)
