"""The parts of a block, each against its formula."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import layers
from gemma_funnel.config import TransformerConfig
from gemma_funnel.layers import MLP, Attention, Block, RMSNorm, rotate

CONFIG = TransformerConfig.preset("tiny")


def _states(length=5, seed=0):
  shape = (2, length, CONFIG.embed_dim)
  return jax.random.normal(jax.random.key(seed), shape)


def _rope_at(*positions):
  return layers.rope_angles(jnp.asarray([positions]), CONFIG, CONFIG.layers[0])


def _rope(length=5):
  return _rope_at(*range(length))


def _attention_fn(output):
  """Whose output is a function of queries, keys and values."""
  return lambda q, k, v: (output(q, k, v), {"asked": k})


def test_norm_works_in_float32_and_adds_one():
  config = dataclasses.replace(CONFIG, embed_dim=4)
  norm = RMSNorm(config, "final_norm")
  norm.scale[...] = jnp.asarray([0.0, 1.0, -1.0, 0.5])
  x = jnp.asarray([[[1e-3, 2e-3, 3e-3, 4e-3]]])
  want = x / np.sqrt(np.mean(x**2) + 1e-6) * np.array([[[1, 2, 0, 1.5]]])
  np.testing.assert_allclose(norm(x), want, rtol=1e-5)
  assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert layers.normalize(x.astype(jnp.bfloat16), 1e-6).dtype == jnp.float32


def test_rope_depends_on_distance_alone():
  key = jax.random.key(0)
  q, k = jax.random.normal(key, (2, 1, 1, 1, CONFIG.head_dim))

  def score(t, s):
    return jnp.sum(rotate(q, _rope_at(t)) * rotate(k, _rope_at(s)))

  np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
  # A mean of positions is as good a place as any.
  np.testing.assert_allclose(score(7.5, 3), score(107.5, 103), rtol=1e-4)
  assert abs(score(7, 3) - score(7, 2)) > 1e-3
  assert abs(score(7, 3) - score(7.5, 3)) > 1e-3


def test_positions_of_bfloat16_do_not_collapse():
  """Angles are float32: positions 4095 and 4096 stay apart."""
  cos, sin = _rope_at(4095, 4096)
  assert np.abs(sin[0, 0] - sin[0, 1]).max() > 0.1
  assert cos.dtype == jnp.float32


def test_rotate_turns_the_pairs_of_the_two_halves():
  """As complex numbers x[i] + j x[i + H/2], times exp(j p base^(-2i/H))."""
  x_BTNH = jax.random.normal(jax.random.key(3), (1, 1, 2, CONFIG.head_dim))
  half = CONFIG.head_dim // 2
  angle = 3 * CONFIG.rope_base ** -(np.arange(half) * 2 / CONFIG.head_dim)
  pair = np.asarray(x_BTNH[..., :half] + 1j * x_BTNH[..., half:])
  turned = pair * np.exp(1j * angle)
  got = rotate(x_BTNH, _rope_at(3))
  want = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_attention_scales_and_rotates_queries_and_rotates_keys():
  attention, x, keys = Attention(CONFIG, nnx.Rngs(0)), _states(), _states(7, 1)
  seen = {}
  attention_fn = _attention_fn(lambda q, k, v: seen.update(q=q, k=k, v=v) or q)
  _, aux = attention(x, _rope(), attention_fn, keys, _rope(7))
  assert aux["asked"] is seen["k"]
  project = lambda x, w: np.einsum("btd,dnh->btnh", x, w[...])
  q, k = project(x, attention.query), project(keys, attention.key)
  want = dict(
    q=rotate(jnp.asarray(q), _rope()) / np.sqrt(CONFIG.query_pre_attn_scalar),
    k=rotate(jnp.asarray(k), _rope(7)),
    v=project(keys, attention.value),
  )
  for name, value in want.items():
    np.testing.assert_allclose(seen[name], value, atol=1e-5, err_msg=name)


def test_attention_that_starts_at_zero_adds_nothing():
  args = (_states(), _rope(), _attention_fn(lambda q, k, v: q))
  zero = Attention(CONFIG, nnx.Rngs(0), "funnel/*/recovery/attend/attn")
  assert np.all(zero(*args)[0] == 0)
  assert np.abs(Attention(CONFIG, nnx.Rngs(0))(*args)[0]).max()


def test_mlp_is_gelu_gated():
  mlp, x = MLP(CONFIG, nnx.Rngs(0)), np.asarray(_states())
  gate = x @ mlp.gate[...]
  tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
  want = (gate * (1 + tanh) / 2 * (x @ mlp.up[...])) @ mlp.down[...]
  np.testing.assert_allclose(mlp(x), want, atol=1e-5)


@pytest.mark.parametrize("post_norms", [True, False])
def test_block_is_two_residuals(post_norms):
  config = dataclasses.replace(CONFIG, post_norms=post_norms)
  block, x, rope = Block(config, nnx.Rngs(0)), _states(), _rope()
  key = jax.random.key(1)
  for n, name in enumerate(("pre_attn", "pre_mlp", "post_attn", "post_mlp")):
    if norm := getattr(block, f"{name}_norm", None):
      noise = jax.random.normal(jax.random.fold_in(key, n), norm.scale.shape)
      norm.scale[...] = 0.5 * noise
  attention_fn = _attention_fn(lambda q, k, v: q * 2)
  post = lambda name, x: getattr(block, name)(x) if post_norms else x
  branch, aux = block.attn(block.pre_attn_norm(x), rope, attention_fn)
  want = x + post("post_attn_norm", branch)
  want = want + post("post_mlp_norm", block.mlp(block.pre_mlp_norm(want)))
  got, got_aux = block(x, rope, attention_fn)
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_array_equal(got_aux["asked"], aux["asked"])


def test_keys_of_a_block_are_normalised_as_its_queries_are():
  """Given its own states as keys, a block does what it does without."""
  block, x, rope = Block(CONFIG, nnx.Rngs(0)), _states(), _rope()
  block.pre_attn_norm.scale[...] = jnp.linspace(-1, 1, CONFIG.embed_dim)
  attention_fn = _attention_fn(lambda q, k, v: q + jnp.repeat(k + v, 2, axis=2))
  run = lambda *keys: block(x, rope, attention_fn, *keys)[0]
  want = run()
  np.testing.assert_array_equal(run(x, rope), want)
  other = run(_states(seed=1), rope)
  assert np.abs(other - want).max() > 1e-2
