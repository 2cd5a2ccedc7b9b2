"""AdamW: its schedule, what it decays and what it clips."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gemma_funnel.config import GemmaConfig
from gemma_funnel.model import Gemma
from gemma_funnel.training import optimizer as optimizer_lib


def _config(**changes):
  config = tiny_run.load_config().optimizer
  config.update({"learning_rate": 0.01, "warmup_steps": 10, **changes})
  return config


def test_schedule():
  schedule = optimizer_lib.schedule_of(_config(final_fraction=0.1), 100)
  at = lambda step: float(schedule(step))
  assert at(0) == 0.0
  np.testing.assert_allclose(at(5), 0.005, rtol=1e-6)
  np.testing.assert_allclose(at(10), 0.01, rtol=1e-6)
  # Halfway through the cosine, from step 10 to 100.
  np.testing.assert_allclose(at(55), 0.001 + 0.009 / 2, rtol=1e-6)
  np.testing.assert_allclose(at(100), 0.001, rtol=1e-5)
  np.testing.assert_allclose(at(1000), 0.001, rtol=1e-5)


def test_schedule_without_warmup_starts_at_its_peak():
  schedule = optimizer_lib.schedule_of(_config(warmup_steps=0), 100)
  np.testing.assert_allclose(schedule(0), 0.01, rtol=1e-6)


def _params():
  """A Gemma's, all of them 0.5."""
  model = Gemma.abstract(
    GemmaConfig.preset("tiny"),
    "start=0,recover=gate+start=1,pool=attention,recover=attend",
  )
  shapes = nnx.to_pure_dict(nnx.state(model))
  return jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)


def test_weight_decay_leaves_scales_and_a_funnel_s_vectors_alone():
  config = _config(warmup_steps=0, weight_decay=0.1)
  optimizer, _ = optimizer_lib.make_optimizer(config, 100)
  params = _params()
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  kept = []
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    name = optimizer_lib.path_of(path)
    if not jnp.any(update):
      kept.append(name)
    else:
      np.testing.assert_allclose(update, -0.01 * 0.1 * 0.5, rtol=1e-5)
  norms = [
      "final_norm", "funnel/1/attend/key_norm", "funnel/1/attend/query_norm",
      "layers/post_attn_norm", "layers/post_mlp_norm", "layers/pre_attn_norm",
      "layers/pre_mlp_norm",
  ]  # fmt: skip
  assert sorted(kept) == sorted(
    [f"{name}/scale" for name in norms]
    + ["funnel/0/gate", "funnel/1/pool_query"]
  )


def test_first_step_is_adamw_of_the_clipped_gradient():
  # An epsilon that matters: else the first step is but the gradient's sign.
  config = _config(warmup_steps=0, eps=1.0, weight_decay=0.1, clip_norm=0.5)
  optimizer, _ = optimizer_lib.make_optimizer(config, 100)
  params = {"kernel": jnp.asarray([1.0, -2.0]), "scale": jnp.asarray([3.0])}
  grads = {"kernel": jnp.asarray([3.0, 0.0]), "scale": jnp.asarray([4.0])}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  clipped = {"kernel": np.asarray([0.3, 0.0]), "scale": np.asarray([0.4])}
  adam = {k: g / (np.abs(g) + 1.0) for k, g in clipped.items()}
  np.testing.assert_allclose(
    updates["kernel"],
    -0.01 * (adam["kernel"] + 0.1 * np.asarray([1.0, -2.0])),
    rtol=1e-5,
  )
  np.testing.assert_allclose(updates["scale"], -0.01 * adam["scale"], rtol=1e-5)


def test_small_gradients_are_not_clipped():
  config = _config(warmup_steps=0, eps=1.0, weight_decay=0.0, clip_norm=10.0)
  optimizer, _ = optimizer_lib.make_optimizer(config, 100)
  params = {"kernel": jnp.asarray([1.0, -2.0])}
  grads = {"kernel": jnp.asarray([3.0, 4.0])}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  expected = -0.01 * np.asarray([3 / 4, 4 / 5])
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_learning_rate_follows_the_schedule():
  optimizer, schedule = optimizer_lib.make_optimizer(
    _config(eps=1e-12, weight_decay=0.0), 100
  )
  params = {"kernel": jnp.asarray([1.0])}
  state = optimizer.init(params)
  for step in range(12):
    updates, state = optimizer.update(params, state, params)
    # Of a constant gradient, every step of Adam is the learning rate.
    np.testing.assert_allclose(-updates["kernel"][0], schedule(step), rtol=1e-4)
    params = {"kernel": jnp.asarray([1.0])}


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(learning_rate=0.0), "optimizer.learning_rate=0.0"),
    (dict(b1=-0.1), "optimizer.b1=-0.1"),
    (dict(b2=1.0), "optimizer.b2=1.0"),
    (dict(clip_norm=float("nan")), "optimizer.clip_norm=nan"),
    (dict(weight_decay=-1.0), "optimizer.weight_decay=-1.0"),
    (dict(weight_decay=float("nan")), "optimizer.weight_decay=nan"),
    (dict(final_fraction=-1.0), "optimizer.final_fraction=-1.0"),
    (dict(warmup_steps=-1), "optimizer.warmup_steps=-1"),
    (dict(warmup_steps=100), "optimizer.warmup_steps=100.*steps=100"),
  ],
)
def test_values_out_of_range_are_named(changes, text):
  config = _config()
  config.update(changes)
  with pytest.raises(ValueError, match=text):
    optimizer_lib.make_optimizer(config, 100)
