"""Sharding: the same step on eight devices as on one."""

from flax import nnx
import jax
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict
import numpy as np
import pytest
import tiny_run

from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.mesh import AXES, WIDTH
from gemma_funnel.params import path_of
from gemma_funnel.training import init_state, pretrain
from gemma_funnel.training.step import make_train_step

MESHES = (
  dict(data=2, fsdp=2, tensor=2),
  dict(slice=2, sequence=2, tensor=2),
  dict(data=8),
  dict(fsdp=8),
  dict(tensor=8),
  dict(sequence=8),
  dict(slice=8),
)
# Eight query heads for tensor=8; the fewer key and value heads stay whole.
WIDE = {
  "model.num_heads": 8,
  "model.num_kv_heads": 2,
  "optimizer.warmup_steps": 0,
  "optimizer.learning_rate": 0.01,
  # Of a gradient near zero, Adam's step would be its sign, which is noise.
  "optimizer.eps": 1e-3,
  "z_loss": 1e-3,
}
LEARNED = "start=0,recover=gate+start=1,pool=attention,recover=attend"


def _sizes(**sizes):
  return config_dict.ConfigDict({**dict.fromkeys(AXES, 1), **sizes})


def _mesh(devices=None, **sizes):
  return sharding.make_mesh(_sizes(**sizes), devices)


def _setup(mesh, devices=None, **changes):
  config = tiny_run.make_config("unused", "unused", **{**WIDE, **changes})
  config.mesh = _sizes(**mesh)
  return pretrain.resolve(config, devices)


def _batch():
  rng = np.random.default_rng(1)
  segment = np.repeat([[1, 2, 0]], 8, 0).repeat([12, 18, 2], axis=1)
  position = np.concatenate([np.arange(12), np.arange(18), [0, 0]])
  return {
    "tokens": rng.integers(5, 512, (8, 32)).astype(np.int32) * (segment > 0),
    "segment": segment.astype(np.int32),
    "position": np.tile(position, (8, 1)).astype(np.int32),
  }


def _steps(setup, count=2):
  """(params, first params, metrics of each step) as numpy arrays."""
  with jax.set_mesh(setup.mesh):
    init, shapes = init_state.make_init(setup)
    step = make_train_step(setup, setup.task.make_loss(setup), shapes)
    state = init()
    before = jax.device_get(state.params["params"])
    every = []
    for _ in range(count):
      batch = sharding.put_batch(_batch(), setup.mesh)
      state, metrics = step(setup.stages, state, None, batch, jax.random.key(0))
      every.append(jax.device_get(metrics))
    return jax.device_get(state.params["params"]), before, every


@pytest.fixture(scope="module")
def on_one_device():
  return _steps(_setup({}, jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_is_the_same_on_any_mesh(mesh, on_one_device):
  params, before, metrics = _steps(_setup(mesh))
  expected, expected_before, expected_metrics = on_one_device
  jax.tree.map(np.testing.assert_array_equal, before, expected_before)
  for got, want in zip(metrics, expected_metrics, strict=True):
    assert got.keys() == want.keys()
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
  for (path, got), want, began in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(expected),
    jax.tree.leaves(before),
    strict=True,
  ):
    assert np.max(np.abs(want - began)) > 1e-4, path_of(path)  # It moved.
    np.testing.assert_allclose(
      got, want, rtol=2e-5, atol=2e-5, err_msg=path_of(path)
    )


def test_parameters_and_moments_are_split():
  setup = _setup(dict(data=2, fsdp=2, tensor=2), funnel=LEARNED)
  with jax.set_mesh(setup.mesh):
    params, opt_state = init_state.make_init(setup)[0]()
  expected = {
    "embedding": (256, 16),
    "layers/attn/query": (2, 16, 4, 8),
    "layers/attn/key": (2, 16, 1, 8),
    "layers/attn/out": (2, 4, 8, 16),
    "layers/mlp/gate": (2, 16, 32),
    "layers/mlp/down": (2, 32, 16),
    "final_norm/scale": (32,),
    "funnel/0/recovery/gate": (32,),
    "funnel/1/reducer/pool_query": (32,),
    "funnel/1/recovery/attend/attn/query": (16, 4, 8),
    "funnel/1/recovery/attend/attn/value": (16, 1, 8),
    "funnel/1/recovery/attend/attn/out": (4, 8, 16),
    "funnel/1/recovery/attend/key_norm/scale": (32,),
  }
  found = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, opt_state)):
    for name, shape in expected.items():
      if path_of(path).endswith(name):
        assert leaf.sharding.shard_shape(leaf.shape) == shape, path_of(path)
        assert len(leaf.addressable_shards) == 8
        assert leaf.addressable_shards[0].data.shape == shape
        found += 1
  assert found == 3 * len(expected)  # The parameter and its two moments.


@pytest.mark.slow
def test_what_a_funnel_learns_takes_the_same_step_on_any_mesh():
  # Steps in proportion to gradients: those of what starts as zero are small.
  changes = {
    "funnel": LEARNED,
    "optimizer.eps": 1.0,
    "optimizer.clip_norm": 9.0,
    "optimizer.learning_rate": 1.0,
  }
  setup = _setup(MESHES[0], **changes)
  whole = _setup({}, jax.devices()[:1], **changes)
  (params, before, _), (expected, _, _) = _steps(setup), _steps(whole)
  for path, want in jax.tree_util.tree_leaves_with_path(expected["funnel"]):
    got, start = params["funnel"], before["funnel"]
    for key in path:
      got, start = got[key.key], start[key.key]
    np.testing.assert_allclose(
      got, want, rtol=1e-3, atol=1e-6, err_msg=path_of(path)
    )
    assert np.max(np.abs(want - start)) > 1e-5, path_of(path)


def test_the_batch_is_split_by_rows():
  mesh = _mesh(data=2, fsdp=2, tensor=2)
  batch = _batch()
  put = sharding.put_batch(batch, mesh)
  for name, array in put.items():
    np.testing.assert_array_equal(array, batch[name])
    assert {s.data.shape for s in array.addressable_shards} == {(2, 32)}


def test_key_heads_that_the_axis_does_not_divide_stay_whole():
  mesh = _mesh(fsdp=2, tensor=4)
  spec = lambda heads: sharding.spec_of(
    "layers/attn/key", (2, 32, heads, 8), mesh
  )
  assert spec(1) == P(None, WIDTH, None, None)
  assert spec(2) == P(None, WIDTH, None, None)
  assert spec(4) == P(None, WIDTH, "tensor", None)
  learned = lambda heads: sharding.spec_of(
    "funnel/10/recovery/attend/attn/value", (32, heads, 8), mesh
  )
  assert learned(2) == P(WIDTH, None, None)
  assert learned(4) == P(WIDTH, "tensor", None)


def test_a_parameter_without_a_rule_is_named():
  mesh = _mesh(data=8)
  with pytest.raises(ValueError, match="no sharding rule.*'layers/new'"):
    sharding.shardings_of({"layers": {"new": np.zeros(3)}}, mesh)


@pytest.mark.parametrize(
  "sizes",
  [
    dict(data=3),
    dict(data=4),
    dict(data=16),
    dict(data=-1, fsdp=3),
    dict(data=-1, fsdp=-1),
    dict(data=0),
    dict(data=-2),
    dict(data=-1, tensor=0),
  ],
  ids=str,
)
def test_meshes_that_cannot_be(sizes):
  with pytest.raises(ValueError, match=r"mesh(\.| {'slice': )"):
    _mesh(**sizes)


@pytest.mark.parametrize(
  "mesh, name, value, text",
  [
    (dict(tensor=8), "model.num_heads", 4, "tensor=8 does not divide 4.*attn"),
    (dict(tensor=8), "model.vocab_size", 509, "tensor=8 .* 509.*embed"),
    (dict(fsdp=8), "model.embed_dim", 36, "fsdp=8 does not divide 36"),
    (MESHES[0], "batch_size", 6, "batch_size=6.*multiple of 4"),
  ],
)
def test_what_the_mesh_does_not_divide_is_named(mesh, name, value, text):
  with pytest.raises(ValueError, match=text):
    init_state.make_init(_setup(mesh, **{name: value}))


def test_one_axis_takes_what_is_left():
  assert _mesh(data=-1, tensor=2).shape["data"] == 4
  assert _mesh(jax.devices()[:4], fsdp=-1).shape["fsdp"] == 4


def test_one_device_holds_the_whole_model(on_one_device):
  params, _, metrics = on_one_device
  assert nnx.to_pure_dict(nnx.state(_abstract())).keys() == params.keys()
  assert metrics[0]["tokens"] == 8 * (11 + 17)
  assert metrics[1]["loss"] < metrics[0]["loss"]


def _abstract():
  setup = _setup(dict(data=8))
  return Transformer.abstract(setup.model_config, setup.stages)
