"""The model's own properties; parity with Hugging Face is test_parity.py."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import GemmaConfig
from gemma_funnel.model import Gemma, RMSNorm, rope_angles, rotate

CONFIG = GemmaConfig.preset("tiny", num_layers=5)
FUNNEL = "start=1,stop=4,stride=3"


def _tokens(batch=2, length=21):
  return np.random.default_rng(0).integers(5, 97, (batch, length))


def _variant(model: Gemma, **changes) -> Gemma:
  """The same parameters under a changed configuration."""
  config = dataclasses.replace(model.config, **changes)
  graphdef = nnx.graphdef(Gemma.abstract(config, str(model.funnel or "off")))
  return nnx.merge(graphdef, nnx.state(model))


def _loss_and_grads(model: Gemma):
  graphdef, params = nnx.split(model)

  def loss(params):
    logits = nnx.merge(graphdef, params)(_tokens())
    return -jax.nn.log_softmax(logits)[..., 7].mean()

  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module", params=["off", FUNNEL])
def model(request):
  return Gemma(CONFIG, request.param, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "changes",
  [
    dict(scan_layers=False),
    dict(kernel="reference"),
    dict(remat="dots"),
    dict(remat="block"),
    dict(scan_layers=False, remat="block"),
  ],
  ids=str,
)
def test_switches_that_keep_the_numbers(model, changes):
  want, got = (_loss_and_grads(m) for m in (model, _variant(model, **changes)))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_remat_saves_memory():
  """The switch is not only accepted: fewer temporaries, in this order."""

  def temporaries(remat):
    config = GemmaConfig.preset(
      "tiny", num_layers=8, embed_dim=64, mlp_dim=256, remat=remat
    )
    graphdef, params = nnx.split(Gemma.abstract(config))
    loss = lambda params, tokens: jnp.sum(
      nnx.merge(graphdef, params).encode(tokens, causal=True) ** 2
    )
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, block = map(temporaries, ("none", "dots", "block"))
  assert block < dots < none


def test_dtypes_are_used(model):
  low = _variant(model, dtype="bfloat16")
  hidden = low.encode(_tokens(), causal=True)
  assert hidden.dtype == jnp.bfloat16
  assert low(_tokens()).dtype == jnp.float32
  difference = np.abs(low(_tokens()) - model(_tokens()))
  assert 1e-4 < difference.mean() < 0.1
  stored = Gemma.abstract(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
  dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(stored))}
  assert dtypes == {jnp.dtype("bfloat16")}


def test_embedding_scale_is_rounded_to_the_compute_dtype():
  """sqrt(3072) = 55.43 is 55.5 in bfloat16."""
  config = dataclasses.replace(
    CONFIG, embed_dim=3072, num_layers=1, dtype="bfloat16"
  )
  model = Gemma(config, rngs=nnx.Rngs(0))
  token = jnp.asarray([[7]])
  row = model.embedding[...][7].astype(jnp.bfloat16)
  want = row * jnp.asarray(55.5, jnp.bfloat16)
  np.testing.assert_array_equal(model.embed(token)[0, 0], want)


def test_norm_works_in_float32_and_adds_one():
  config = dataclasses.replace(CONFIG, embed_dim=4)
  norm = RMSNorm(config)
  norm.scale[...] = jnp.asarray([0.0, 1.0, -1.0, 0.5])
  x = jnp.asarray([[[1e-3, 2e-3, 3e-3, 4e-3]]])
  want = (
    x
    / np.sqrt(np.mean(np.square(x)) + 1e-6)
    * np.array([[[1.0, 2.0, 0.0, 1.5]]])
  )
  np.testing.assert_allclose(norm(x), want, rtol=1e-5)
  assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rope_depends_on_distance_alone():
  key = jax.random.key(0)
  q, k = jax.random.normal(key, (2, 1, 1, 1, CONFIG.head_dim))

  def score(t, s):
    at = lambda p: rope_angles(jnp.asarray([[p]]), CONFIG)
    return jnp.sum(rotate(q, at(t)) * rotate(k, at(s)))

  np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
  assert abs(score(7, 3) - score(7, 2)) > 1e-3


def test_positions_of_bfloat16_do_not_collapse():
  """Angles are float32: positions 4095 and 4096 stay apart."""
  cos, sin = rope_angles(jnp.asarray([[4095, 4096]]), CONFIG)
  assert np.abs(sin[0, 0] - sin[0, 1]).max() > 0.1
  assert cos.dtype == jnp.float32


def test_positions_can_be_given(model):
  """Shifted by a constant they change nothing; stretched, they do."""
  tokens = _tokens()
  position = np.broadcast_to(np.arange(21, dtype=np.int32), tokens.shape)
  want = model(tokens)
  np.testing.assert_allclose(
    model(tokens, None, position + 50), want, atol=1e-4
  )
  assert np.abs(model(tokens, None, position * 2) - want).max() > 1e-2


def test_with_funnel_shares_parameters():
  model = Gemma(CONFIG, rngs=nnx.Rngs(0))
  funnelled = model.with_funnel(FUNNEL)
  assert funnelled.embedding[...] is model.embedding[...]
  assert funnelled.funnel.stop == 4
  back = funnelled.with_funnel(None)
  np.testing.assert_array_equal(back(_tokens()), model(_tokens()))


def test_initialisation_is_fit_for_training():
  """Logits of about unit variance; no layer starts dead."""
  config = GemmaConfig.preset("quickstart", final_softcap=None)
  model = Gemma(config, rngs=nnx.Rngs(0))
  tokens = np.random.default_rng(0).integers(0, 4096, (2, 64))
  assert 0.7 < model(tokens).std() < 1.4
  for path, x in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
    name = jax.tree_util.keystr(path)
    assert (x.std() == 0) == ("scale" in name), name


@pytest.mark.parametrize("name", ["gemma2_27b", "gemma1_7b"])
def test_full_sizes_run_by_shape(name):
  config = GemmaConfig.preset(name)
  graphdef, params = nnx.split(Gemma.abstract(config, "start=3,stride=2"))
  tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  logits = jax.eval_shape(
    lambda p, t: nnx.merge(graphdef, p)(t), params, tokens
  )
  assert logits.shape == (1, 512, 256_000)
  assert logits.dtype == jnp.float32


def test_the_parameter_tree_does_not_depend_on_the_funnel():
  shapes = lambda funnel: jax.tree.map(
    lambda x: x.shape,
    nnx.to_pure_dict(nnx.state(Gemma.abstract(CONFIG, funnel))),
  )
  assert shapes("off") == shapes(FUNNEL) == shapes("start=0,stride=2")


@pytest.mark.parametrize(
  "tokens,message",
  [
    (np.full((1, 4), 97), "token ids from 97 to 97: expected 0 to 96"),
    (np.full((1, 4), -1), "token ids from -1 to -1"),
    (np.zeros((1, 257), int), "257 tokens; model.max_length is 256"),
    (np.zeros((0, 4), int), r"shape \(0, 4\)"),
    (np.zeros(4, int), r"shape \(4,\): expected \[batch, length\]"),
    (np.zeros((1, 4)), "float64: expected integers"),
  ],
)
def test_bad_tokens(model, tokens, message):
  with pytest.raises(ValueError, match=message):
    model(tokens)
  with pytest.raises(ValueError, match=message):
    model.encode(tokens)
