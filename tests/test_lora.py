"""LoRA: attached and merged are one, the base stays, and it learns."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from gemma_funnel import lora as lora_lib
from gemma_funnel.config import TransformerConfig
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.params import path_of
from gemma_funnel.training import objectives, optimizer

CONFIG = dataclasses.replace(
  TransformerConfig.preset("tiny"),
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=24,
  embed_dim=32,
  mlp_dim=40,
  vocab_size=64,
  window=4,
  kernel="reference",
)
FUNNELS = ["off", "start=1,stride=2,recover=gate"]
LORA = lora_lib.LoraConfig(rank=3, alpha=6.0, target="attn|mlp")
TOKENS = np.random.default_rng(0).integers(5, 64, (2, 12))


def _like(shapes, seed, size):
  """Drawn values for a tree of shapes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(size * rng.normal(size=x.shape), x.dtype), shapes
  )


@functools.cache
def _params(funnel, dtype="float32"):
  config = dataclasses.replace(CONFIG, param_dtype=dtype)
  state = nnx.state(Transformer.abstract(config, funnel))
  return _like(nnx.to_pure_dict(state), 0, 0.2)


def _model(params, funnel):
  graphdef = nnx.graphdef(Transformer.abstract(CONFIG, funnel))
  return nnx.merge(graphdef, params)


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, funnel):
  return _model(params, funnel)(jnp.asarray(TOKENS))


def _loss(params, funnel):
  logits = _logits(params, funnel)[:, :-1]
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, TOKENS[:, 1:]
  ).mean()


def _drawn(params, lora=LORA):
  """Adapters of which B too is drawn."""
  shapes = jax.eval_shape(_init, params, lora, jax.random.key(0))
  return _like(shapes, 1, 0.2)


_init = jax.jit(lora_lib.init, static_argnums=1)
_merge = jax.jit(lora_lib.merge, static_argnums=2)


def _assert_close(got, want, **tolerance):
  close = functools.partial(np.testing.assert_allclose, **tolerance)
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: close(x, y, err_msg=path_of(path)), got, want
  )


@pytest.mark.parametrize(
  "funnel, target, base_dtype",
  [
    ("off", "query|down$", None),
    (FUNNELS[1], "attn|mlp", "nf4"),
    ("off", "query", "int8"),
    (FUNNELS[1], "query", "int4"),
  ],
)
def test_attached_is_merged(funnel, target, base_dtype):
  lora = dataclasses.replace(LORA, target=target, base_dtype=base_dtype)
  params = _params(funnel)
  base, adapters = lora_lib.freeze(params, lora), _drawn(params, lora)
  attached = lambda x: lora_lib.attach(base, x, lora)
  merged = lambda x: lora_lib.merge(base, x, lora)
  # The forward pass alone reads layers out of the stack; with a gradient they
  # are a scan's.
  got = _logits(attached(adapters), funnel)
  np.testing.assert_allclose(
    got, _logits(merged(adapters), funnel), rtol=1e-5, atol=1e-5
  )
  assert np.max(np.abs(got - _logits(params, funnel))) > 0.1
  loss = lambda make: jax.jit(
    jax.value_and_grad(lambda x: _loss(make(x), funnel))
  )(adapters)
  found, wanted = loss(attached), loss(merged)
  _assert_close(found, wanted, rtol=1e-4, atol=1e-6)
  assert all(np.any(x) for x in jax.tree.leaves(found))


def test_merged_is_the_formula():
  params = _params("off")
  lora = dataclasses.replace(LORA, target="query|out$")
  adapters = _drawn(params, lora)
  merged = _merge(lora_lib.freeze(params, lora), adapters, lora)
  want = jax.tree.map(np.array, params)  # All else is as it was.
  equations = {"query": "ldr,lrnh->ldnh", "out": "lnhr,lrd->lnhd"}
  for name, equation in equations.items():
    factors = adapters["layers"]["attn"][name]
    product = np.einsum(equation, factors["a"], factors["b"])
    want["layers"]["attn"][name] += 6.0 / 3 * product
  for name in equations:
    _assert_close(
      merged["layers"]["attn"].pop(name),
      want["layers"]["attn"].pop(name),
      rtol=1e-5,
      atol=1e-6,
    )
  jax.tree.map(np.testing.assert_array_equal, merged, want)


@pytest.mark.parametrize("funnel", FUNNELS)
def test_fresh_adapters_change_nothing(funnel):
  params = _params(funnel)
  base = lora_lib.freeze(params, LORA)
  adapters = _init(params, LORA, jax.random.key(0))
  for make in (lora_lib.attach, _merge):
    np.testing.assert_array_equal(
      _logits(make(base, adapters, LORA), funnel), _logits(params, funnel)
    )
  a = adapters["layers"]["attn"]["out"]["a"]
  assert a.shape == (2, 4, 24, 3) and a.dtype == jnp.float32
  # He's uniform of 96 inputs; layers differ.
  bound = (6 / 96) ** 0.5
  assert 0.9 * bound < np.max(np.abs(a)) <= bound
  assert not np.allclose(a[0], a[1])
  # Unlike each other too: each matrix has its own.
  mlp = adapters["layers"]["mlp"]
  assert not np.allclose(mlp["gate"]["a"], mlp["up"]["a"])


# Of a block: half a step of int8 and int4, and half of the widest gap of nf4.
ERROR = {"int8": 0.5 / 127.5, "int4": 0.5 / 7.5, "nf4": 0.152}


@pytest.mark.parametrize("base_dtype", lora_lib.BASE_DTYPES)
def test_values_are_quantised_by_block(base_dtype):
  rng = np.random.default_rng(0)
  layers = {
    "attn": {
      "query": rng.normal(size=(2, 128, 3, 8)),
      "out": rng.normal(size=(2, 3, 128, 16)),
    },
    "mlp": {"down": rng.normal(size=(2, 192, 16))},
  }
  # Outputs and blocks of unlike size: scales that were shared would show.
  layers["attn"]["query"] *= 10.0 ** np.arange(3)[:, None]
  layers["attn"]["query"][1] *= 100
  layers["mlp"]["down"][:, :, 3] *= 1000
  if base_dtype != "int8":
    layers["mlp"]["down"][:, :64] *= 0.01
    layers["attn"]["out"][:, 1] *= 50
    layers["attn"]["out"][:, :, 64:] *= 7
  params = {"layers": jax.tree.map(jnp.float32, layers)}
  lora = dataclasses.replace(LORA, base_dtype=base_dtype)
  base = lora_lib.freeze(params, lora)
  dense = _merge(base, {}, lora)
  shapes = {
    "attn/query": ((2, 1, 3, 8), (2, 2, 3, 8)),
    "attn/out": ((2, 1, 1, 16), (2, 3, 2, 16)),
    "mlp/down": ((2, 1, 16), (2, 3, 16)),
  }
  for path, (per_output, per_block) in shapes.items():
    part, name = path.split("/")
    x = np.asarray(params["layers"][part][name])
    q = base["layers"][part][name]
    assert q.qvalue.shape == x.shape
    bits = jnp.dtype(jnp.uint4 if base_dtype == "nf4" else base_dtype)
    assert q.qvalue.dtype == bits
    want = per_output if base_dtype == "int8" else per_block
    assert q.scale.shape == want and q.scale.dtype == jnp.float32
    # The largest of what shares a scale.
    groups = [
      s for n, k in zip(x.shape, want, strict=True) for s in (k, n // k)
    ]
    blocks = np.abs(x.reshape(groups))
    largest = blocks.max(axis=tuple(range(1, blocks.ndim, 2)), keepdims=True)
    error = np.abs(np.asarray(dense["layers"][part][name]) - x).reshape(groups)
    assert np.all(error <= 1.01 * ERROR[base_dtype] * largest + 1e-7)


def _bytes(tree):
  """What a program that is given the tree says its arguments take."""
  take = jax.jit(lambda tree: jax.tree.map(lambda x: x[:1], tree))
  return take.lower(tree).compile().memory_analysis().argument_size_in_bytes


def test_memory_of_a_quantised_base():
  params = {"layers": {"mlp": {"up": jnp.ones((4, 128, 256), jnp.bfloat16)}}}
  entries = 4 * 128 * 256
  made = lambda dtype: _bytes(
    lora_lib.freeze(params, dataclasses.replace(LORA, base_dtype=dtype))
  )
  assert made(None) == 2 * entries
  # A bfloat16 scale for each output, or for 64 inputs of it.
  assert made("int8") == entries + 2 * 4 * 256
  for dtype in ("int4", "nf4"):
    assert made(dtype) == entries // 2 + 2 * entries // 64


def test_merge_keeps_dtypes():
  params = _params("off", "bfloat16")
  for dtype in (None, "int8"):
    lora = dataclasses.replace(LORA, base_dtype=dtype)
    merged = _merge(lora_lib.freeze(params, lora), _drawn(params, lora), lora)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, merged, params)
    assert all(jax.tree.leaves(same))


def test_training_lowers_the_loss_and_leaves_the_base():
  funnel, lora = FUNNELS[1], dataclasses.replace(LORA, base_dtype="int8")
  params = _params(funnel)
  frozen = lora_lib.freeze(params, lora)
  before = jax.tree.map(np.array, frozen)
  weights = {"lora": _init(params, lora, jax.random.key(0))}
  # A step gives weights away, and the funnel's are the parameters' own.
  weights = jax.tree.map(jnp.copy, weights)
  config = tiny_run.load_config().optimizer
  config.update(learning_rate=3e-2, warmup_steps=0)
  tx, _ = optimizer.make_optimizer(config, 30)
  state = tx.init(weights)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(weights, state, frozen):
    of = lambda w: _loss(lora_lib.attach(frozen, w["lora"], lora), funnel)
    loss, grads = jax.value_and_grad(of)(weights)
    updates, state = tx.update(grads, state, weights)
    return optimizer.apply_updates(weights, updates, None), state, loss

  losses, start = [], jax.tree.map(np.array, weights)
  for _ in range(12):
    weights, state, loss = step(weights, state, frozen)
    losses.append(float(loss))
  assert losses[-1] < losses[0] - 0.5, losses
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  # All of it is trained; what the funnel learns too.
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), weights, start)
  assert all(jax.tree.leaves(moved)), moved
  assert len(jax.tree.leaves(weights["lora"]["funnel"])) == 1
  # A plain model: whatever reads parameters reads these.
  merged = _merge(frozen, weights["lora"], lora)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  attached = lora_lib.attach(frozen, weights["lora"], lora)
  want = _loss(attached, funnel)
  np.testing.assert_allclose(_loss(merged, funnel), want, rtol=1e-4)


def test_the_base_has_no_gradient():
  params = _params("off")
  lora = dataclasses.replace(LORA, target="query$")
  adapters, base = _drawn(params, lora), lora_lib.freeze(params, lora)
  of_base = lambda x: _loss(lora_lib.attach(x, adapters, lora), "off")
  grads = jax.jit(jax.grad(of_base))(base)["layers"]
  matrices = {part: grads[part] for part in ("attn", "mlp")}
  assert not any(np.any(x) for x in jax.tree.leaves(matrices))


@pytest.mark.parametrize("base_dtype", ["int8", None])
def test_the_backward_pass_keeps_no_layers(base_dtype):
  config = dataclasses.replace(
    CONFIG, num_layers=8, embed_dim=256, mlp_dim=1024
  )
  model = Transformer.abstract(config)
  graphdef, shapes = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model))
  lora = dataclasses.replace(LORA, base_dtype=base_dtype)
  base = jax.eval_shape(lambda x: lora_lib.freeze(x, lora), shapes)
  adapters = jax.eval_shape(_init, shapes, lora, jax.random.key(0))

  def loss(adapters, base):
    attached = lora_lib.attach(base, adapters, lora)
    return jnp.mean(nnx.merge(graphdef, attached)(jnp.asarray(TOKENS)))

  memory = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
  whole = sum(4 * x.size for x in jax.tree.leaves(shapes["layers"]))
  assert memory.memory_analysis().temp_size_in_bytes < whole / 2


def test_lies_on_a_mesh_as_the_parameters_do():
  funnel = FUNNELS[1]
  config = sharding.default_config()
  config.update(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(config)
  lora = dataclasses.replace(LORA, base_dtype="int8")
  params = _params(funnel)
  base = lora_lib.freeze(params, lora)
  placed = jax.device_put(base, lora_lib.shardings(base, mesh))
  adapters = _drawn(params, lora)
  abstract = sharding.place({"lora": jax.eval_shape(lambda: adapters)}, mesh)
  for path, x in jax.tree_util.tree_leaves_with_path(abstract):
    if path[-1].key in ("a", "b"):
      assert not any(x.sharding.spec), path_of(path)
  is_quantised = lambda x: hasattr(x, "qvalue")
  leaves = jax.tree_util.tree_leaves_with_path(placed, is_leaf=is_quantised)
  quantised = {path_of(p): x for p, x in leaves if is_quantised(x)}
  assert len(quantised) == 7
  for name, x in quantised.items():
    spec = sharding.spec_of(name, x.shape, mesh)
    assert tuple(x.qvalue.sharding.spec) == tuple(spec) and any(spec), name
  # Outputs' scales are split as the outputs are.
  up = placed["layers"]["mlp"]["up"].scale
  assert tuple(up.sharding.spec)[2] == sharding.HEADS
  with jax.set_mesh(mesh):
    got = _logits(lora_lib.attach(placed, adapters, lora), funnel)
  want = _logits(lora_lib.attach(base, adapters, lora), funnel)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_target_chooses():
  adapters = lora_lib.init(
    _params(FUNNELS[1]),
    dataclasses.replace(LORA, target="mlp/(up|down)$"),
    jax.random.key(0),
  )
  assert set(adapters) == {"layers", "funnel"}
  assert set(adapters["layers"]) == {"mlp"}
  assert set(adapters["layers"]["mlp"]) == {"up", "down"}


def test_config():
  config = lora_lib.default_config()
  assert lora_lib.make_config(config) is None
  config.update(rank=4, alpha=8.0, base_dtype="int8")
  got = lora_lib.make_config(config)
  assert got == lora_lib.LoraConfig(4, 8.0, "attn|mlp", "int8")
  assert got.scale == 2.0


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(rank=-1), "lora.rank=-1: expected an integer >= 0"),
    (dict(alpha=0.0), "lora.alpha=0.0: expected"),
    (dict(alpha=float("nan")), "lora.alpha=nan"),
    (dict(target="("), r"lora.target='\(' is no regular expression"),
    (dict(base_dtype="int2"), r"lora.base_dtype='int2'.*int8.*nf4"),
    (
      dict(base_dtype="int8", rank=0),
      "lora.base_dtype='int8' with lora.rank=0",
    ),
  ],
)
def test_values_out_of_range_are_named(changes, text):
  config = lora_lib.default_config()
  config.update({"rank": 4, **changes})
  with pytest.raises(ValueError, match=text):
    lora_lib.make_config(config)


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(target="embedding"), "found in none.*params/layers/attn/key, "),
    (dict(rank=33), "lora.rank=33 is more than layers/attn/key has: 32 x 48"),
  ],
)
def test_what_does_not_fit_the_model_is_named(changes, text):
  with pytest.raises(ValueError, match=text):
    _drawn(_params("off"), dataclasses.replace(LORA, **changes))


def test_qwix_is_asked_for(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "qwix", None)
  config = lora_lib.default_config()
  config.update(rank=4)
  assert lora_lib.make_config(config).base_dtype is None
  config.base_dtype = "nf4"
  with pytest.raises(ValueError, match="lora.base_dtype='nf4' needs qwix"):
    lora_lib.make_config(config)


@pytest.mark.parametrize("name", tuple(optimizer.OPTIONS))
def test_a_model_with_all_that_a_configuration_adds(name):
  config = dataclasses.replace(
    CONFIG, qk_norm=True, attention_bias=True, tied=False
  )
  model = Transformer.abstract(config)
  params = _like(nnx.to_pure_dict(nnx.state(model)), 0, 0.2)
  base, adapters = lora_lib.freeze(params, LORA), _drawn(params)
  loss = lambda p: objectives.next_token(
    nnx.merge(nnx.graphdef(model), p), _batch(), chunk=5
  )[0]
  attached = lambda x: loss(lora_lib.attach(base, x, LORA))
  merged = lambda x: loss(lora_lib.merge(base, x, LORA))
  np.testing.assert_allclose(attached(adapters), merged(adapters), rtol=1e-5)
  trees = [(params, loss)]
  if name != "muon":  # Factors are no matrices of a layer.
    trees.append((adapters, attached))
  for tree, function in trees:
    options = tiny_run.load_config().optimizer
    options.update(name=name, learning_rate=1e-3, warmup_steps=0)
    transform = optimizer.make_optimizer(options, 10)[0]

    def step(tree, function=function, transform=transform):
      value, grads = jax.value_and_grad(function)(tree)
      updates, _ = transform.update(grads, transform.init(tree), tree)
      return value, function(optax.apply_updates(tree, updates)), updates

    before, after, updates = jax.jit(step)(tree)
    assert after < before
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
      assert np.any(update != 0), path_of(path)


def _batch():
  ones = jnp.ones(TOKENS.shape, jnp.int32)
  places = jnp.cumsum(ones, axis=1) - 1
  return {"tokens": jnp.asarray(TOKENS), "segment": ones, "position": places}
