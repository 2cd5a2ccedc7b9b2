"""Prefill and steps equal the one-pass forward, under the grid of funnels."""

import dataclasses
import functools

from flax import nnx
import funnel_grid
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import reducers
from gemma_funnel.config import format_funnel, resolve_funnel, total_stride
from gemma_funnel.decode import caches as caches_lib
from gemma_funnel.decode import decoder as decoder_lib
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

# Beyond the window, a ring of which comes round four times.
TOKENS = 70
CACHE = 80
# Of padded prompts; the longest has 36 tokens. One width for all funnels, so
# that the operations of a prefill are compiled once.
WIDTH = 40
FUNNELS = funnel_grid.decodable()
# Further slots all go on, or rows differ in which do; plans of layers.
OTHERS = [
  "start=1,stop=4,reduce=all,keys=before",
  "layers=0,3,3,1",
  "start=2,reduce=all,keys=none",
  "start=1,stop=4,stride=2,keys=before,layers=2,2,1",
  "start=2,stop=4,reduce=boundary,stride=1,threshold=0.3",
  "start=2,reduce=boundary,stride=2,threshold=0.25,keys=before",
  "start=1,stride=2+start=3,stop=4,reduce=boundary,stride=2,threshold=0.2",
]


def _model(funnel: str) -> Transformer:
  return funnel_grid.make_model(resolve_funnel(funnel, 5))


def _prefill(graphdef, params, lengths_B, phase, begin_BP):
  """`caches.prefill` of left-padded beginnings."""
  model = nnx.merge(graphdef, params)
  longest = begin_BP.shape[1]
  slot_1P = jnp.arange(longest)[None]
  segment_BP = (slot_1P >= longest - lengths_B[:, None]).astype(jnp.int32)
  stream = make_stream(model.embed(begin_BP), segment_BP)
  return caches_lib.prefill(model, stream, phase, CACHE, CACHE - 1)


# As `Decoder` runs it. Op by op is cheaper where many funnels share the shapes.
_compiled_prefill = jax.jit(_prefill, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(graphdef, fault, params, tokens_BT, carry):
  """(hidden states of a token at a time, caches, stages).

  A new `fault` is a new program: one may have been planted since.
  """
  del fault
  model = nnx.merge(graphdef, params)

  def one(carry, _):
    rank_B, caches, stages = carry
    token_B1 = jnp.take_along_axis(tokens_BT, rank_B[:, None], 1, mode="clip")
    stream = make_stream(
      model.embed(token_B1), jnp.ones_like(token_B1), rank_B[:, None]
    )
    stream, caches, stages = caches_lib.step(model, stream, caches, stages)
    return (rank_B + 1, caches, stages), stream.hidden_BTD[:, 0]

  carry, steps_SBD = jax.lax.scan(one, carry, length=TOKENS - 1)
  return steps_SBD, carry[1], carry[2]


def _inputs(model: Transformer, lengths, width: int):
  """(tokens_BT, lengths_B, phase, begin_BP) of random rows.

  Rows are of one phase; row b's prompt has lengths[b] tokens.
  """
  rng = np.random.default_rng(0)
  lengths = np.asarray(lengths, np.int32)
  tokens = rng.integers(5, 97, (len(lengths), TOKENS)).astype(np.int32)
  begin = np.full((len(lengths), width), 96, np.int32)
  for row, n in enumerate(lengths):
    begin[row, -n:] = tokens[row, :n]
  stride = total_stride(model.stages)
  phase = np.int32((lengths[0] - 1) % stride)
  assert np.all((lengths - 1) % stride == phase)
  return tokens, lengths, phase, begin


def _compare(
  model: Transformer,
  lengths,
  *,
  width=WIDTH,
  prefill=_prefill,
  fault="",
  late=0,
) -> tuple[float, list]:
  """(the largest relative difference to the one pass, caches at the end).

  Stages think that they are in a phase `late` tokens ago.
  """
  tokens, lengths, phase, begin = _inputs(model, lengths, width)
  phase = (phase - late) % total_stride(model.stages)
  graphdef, params = nnx.split(decoder_lib.unstacked(model))
  stream, caches, stages = prefill(graphdef, params, lengths, phase, begin)
  steps, caches, stages = _steps(
    graphdef, fault, params, tokens, (lengths, caches, stages)
  )
  prefilled_B1D, steps_SBD = stream.hidden_BTD[:, -1:], np.asarray(steps)
  stream = make_stream(model.embed(tokens))
  want = np.asarray(model.trunk(stream, causal=True).hidden_BTD)
  worst = 0.0
  for row, n in enumerate(lengths):
    got = np.concatenate([prefilled_B1D[row], steps_SBD[:, row]])
    got = got[: TOKENS - n + 1]
    worst = max(worst, np.abs(got - want[row, n - 1 :]).max())
  return worst / np.abs(want).max(), (caches, stages)


def _caches_by_shape(model: Transformer, lengths):
  """(caches, stages) of a prefill, which steps keep the shapes of."""
  _, *inputs = _inputs(model, lengths, WIDTH)
  graphdef, params = nnx.split(decoder_lib.unstacked(model))
  prefill = functools.partial(_prefill, graphdef)
  return jax.eval_shape(prefill, params, *inputs)[1:]


def _lengths(model, phase):
  """Prompts of three rows, the shortest of which may be one token."""
  stride = total_stride(model.stages)
  return [1 + phase % stride + stride * i for i in (0, 2, 1)]


@pytest.mark.parametrize(
  "number", range(len(FUNNELS)), ids=lambda n: format_funnel(FUNNELS[n])
)
def test_steps_are_the_one_pass_forward(number):
  model = funnel_grid.make_model(FUNNELS[number])
  assert _compare(model, _lengths(model, number))[0] < 1e-5


@pytest.mark.parametrize("funnel", OTHERS)
def test_steps_of_other_reducers_are_the_one_pass_forward(funnel):
  model = _model(funnel)
  assert _compare(model, _lengths(model, 1))[0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("funnel", FUNNELS[::15], ids=format_funnel)
def test_prompts_of_every_phase_alone(funnel):
  """In less than the window, compiled as a whole."""
  model = funnel_grid.make_model(funnel)
  for length in range(1, 1 + min(total_stride(funnel), 4)):
    worst, _ = _compare(model, [length], width=7, prefill=_compiled_prefill)
    assert worst < 1e-5, length


# Each run of layers, by funnel: after how many tokens it runs.
COUNTED = {
  "off": [1],
  "start=1,stop=4,stride=3": [1, 3, 1],
  "start=1,stride=2,keys=first": [1, 2, 2],
  "start=1,stop=4,stride=2+start=2,stop=3,stride=3": [1, 2, 6, 2, 1],
  "start=0,stop=2,stride=2+start=3,stop=4,stride=3": [2, 1, 3, 1],
}


@pytest.mark.parametrize("funnel", COUNTED)
def test_deep_layers_run_once_a_group(funnel):
  model = _model(funnel)
  for length in (1, 7):
    _, (caches, _) = _compare(model, [length] * 3)
    for cache, stride in zip(caches, COUNTED[funnel], strict=True):
      prefilled = -(-length // stride)
      ran = TOKENS - 1 + length  # `_compare` goes on for TOKENS - 1 steps.
      assert prefilled + int(cache.runs) == -(-ran // stride), stride


def test_local_layers_keep_their_window_only():
  """5 layers, of which 0, 2 and 4 are local; stage 1 to 4 of stride 3."""
  model = _model("start=1,stop=4,stride=3")
  caches, _ = _caches_by_shape(model, [1])
  sizes = [[k.shape[2] for k, _ in cache.keys_values] for cache in caches]
  window, groups = model.config.window, -(-CACHE // 3)
  in_window = (window - 1) // 3 + 1
  assert sizes == [[window], [groups, in_window, groups], [window]]


FAULTY = "start=1,stop=4,stride=3,reduce=attention"


@pytest.mark.parametrize("late", [1, -1])
def test_a_stage_a_token_late_or_early_is_seen(late):
  model = _model(FAULTY)
  assert _compare(model, [4] * 3)[0] < 1e-5
  assert _compare(model, [4] * 3, late=late)[0] > 1e-3


@pytest.mark.parametrize("fault", ["ring", "pending"])
def test_planted_faults_are_seen(fault, monkeypatch):
  """A ring too short by one, a lost slot."""
  size, step = caches_lib._ring_size, reducers.Groups.step
  if fault == "ring":
    monkeypatch.setattr(
      caches_lib, "_ring_size", lambda *args: max(1, size(*args) - 1)
    )
  else:

    def rolled(self, state, stream):
      roll = lambda x: jnp.roll(x, 1, axis=1)
      slots = jax.tree.map(roll, state.slots)
      return step(self, dataclasses.replace(state, slots=slots), stream)

    monkeypatch.setattr(reducers.Groups, "step", rolled)
  worst, _ = _compare(_model(FAULTY), [4] * 3, fault=fault)
  assert worst > 1e-3


def test_a_cache_is_as_large_as_it_is_said_to_be():
  """For the least that flops counts; rings have no slack in even streams."""
  from gemma_funnel import flops

  funnel = "start=1,stop=4,stride=3,recover=attend"
  model = _model(funnel)
  caches, stages = _caches_by_shape(model, [1, 4])
  kept = [*(cache.keys_values for cache in caches), stages[0].deep.keys_values]
  got = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  assert got == flops.cache_bytes(model.config, funnel, 2, CACHE)


def test_mixed_precision_keeps_its_dtype():
  model = _model("start=1,stride=2")
  config = dataclasses.replace(model.config, dtype="bfloat16")
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  model = nnx.merge(graphdef, nnx.state(model))
  worst, (caches, _) = _compare(model, [3], width=7, prefill=_compiled_prefill)
  assert worst < 0.05
  assert all(k.dtype == jnp.bfloat16 for c in caches for k, _ in c.keys_values)
