"""A step: parts of a batch, steps that are skipped, what it tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gemma_funnel.parallel import sharding
from gemma_funnel.training import init_state, pretrain
from gemma_funnel.training.step import make_train_step

EXACT = {
  "optimizer.warmup_steps": 0,
  "optimizer.learning_rate": 0.01,
  # Of a gradient near zero, Adam's step would be its sign, which is noise.
  "optimizer.eps": 1e-3,
  "z_loss": 1e-3,
}


def _setup(**changes):
  config = tiny_run.make_config("unused", "unused", **{**EXACT, **changes})
  return pretrain.resolve(config, jax.devices()[:1])


def _batch(rows=8, seed=1):
  """Rows of which each has another number of tokens."""
  rng = np.random.default_rng(seed)
  length = np.linspace(3, 32, rows).astype(int)[:, None]
  slot = np.arange(32)[None]
  segment = (slot < length).astype(np.int32)
  return {
    "tokens": rng.integers(5, 512, (rows, 32)).astype(np.int32) * segment,
    "segment": segment,
    "position": (slot * segment).astype(np.int32),
  }


def _step(setup, batch, loss=None, given=None):
  """(state, metrics) after one step."""
  with jax.set_mesh(setup.mesh):
    init, shapes = init_state.make_init(setup)
    step = make_train_step(setup, loss or setup.task.make_loss(setup), shapes)
    rows = sharding.put_batch(batch, setup.mesh)
    args = (given or init(), None, rows, jax.random.key(0))
    return jax.device_get(step(setup.stages, *args))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_make_up_the_step_of_the_whole(parts):
  whole = _step(_setup(), _batch())
  got = _step(_setup(accumulate=parts), _batch())
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, whole)
  assert got[1].keys() == whole[1].keys()
  assert got[1]["tokens"] == whole[1]["tokens"]


def test_each_part_has_its_own_key():
  keys = []

  def loss(variant, params, frozen_params, batch, key):
    jax.debug.callback(
      lambda k: keys.append(tuple(np.asarray(k).tolist())),
      jax.random.key_data(key),
    )
    return jnp.sum(params["params"]["embedding"]), {"loss": jnp.float32(0)}

  _step(_setup(accumulate=4), _batch(), loss)
  jax.effects_barrier()
  assert len(set(keys)) == 4


def test_rows_that_cannot_be_cut_are_refused():
  with pytest.raises(ValueError, match="multiple of 1.*times accumulate=3"):
    _setup(accumulate=3)


@pytest.mark.parametrize("rule", ["skip", "stop"])
def test_a_step_that_is_not_finite_changes_nothing_if_skipped(rule):
  setup = _setup(on_nonfinite=rule)
  honest = setup.task.make_loss(setup)

  def loss(variant, params, frozen_params, batch, key):
    value, metrics = honest(variant, params, frozen_params, batch, key)
    return value * jnp.nan, metrics

  with jax.set_mesh(setup.mesh):
    given = init_state.make_init(setup)[0]()
    before = jax.device_get(given)
  state, metrics = _step(setup, _batch(), loss, given)
  assert np.isnan(metrics["grad_norm"])
  same = jax.tree.map(np.array_equal, state, before)
  assert all(jax.tree.leaves(same)) == (rule == "skip")


def test_norms_by_group_make_up_the_whole():
  setup = _setup(funnel="start=1,stride=2,recover=gate")
  metrics = _step(setup, _batch())[1]
  groups = ("funnel", "embedding", "norm", "attention", "mlp")
  for name in ("grad_norm", "update_norm"):
    found = {k for k in metrics if k.startswith(name + "/")}
    assert found == {f"{name}/{group}" for group in groups}
    assert all(metrics[k] > 0 for k in found)
  squares = [np.square(metrics[f"grad_norm/{group}"]) for group in groups]
  np.testing.assert_allclose(
    np.sqrt(sum(squares)), metrics["grad_norm"], rtol=1e-5
  )


def test_gradients_of_what_is_frozen_are_not_made():
  def flops(**changes):
    setup = _setup(**changes)
    with jax.set_mesh(setup.mesh):
      shapes = init_state.make_init(setup)[1]
      step = make_train_step(setup, setup.task.make_loss(setup), shapes)
      args = (shapes, {}, _batch(), jax.random.key(0))
      compiled = step.lower(setup.stages, *args).compile()
    return compiled.cost_analysis()["flops"]

  assert flops(optimizer__freeze="layers") < 0.85 * flops()


def test_what_is_frozen_keeps_every_bit():
  setup = _setup(optimizer__freeze="embedding|mlp")
  with jax.set_mesh(setup.mesh):
    before = jax.device_get(init_state.make_init(setup)[0]().params)["params"]
  after = _step(setup, _batch())[0].params["params"]
  np.testing.assert_array_equal(after["embedding"], before["embedding"])
  same = jax.tree.map(np.array_equal, after["layers"], before["layers"])
  assert all(jax.tree.leaves(same["mlp"]))
  assert not any(jax.tree.leaves(same["attn"]))
