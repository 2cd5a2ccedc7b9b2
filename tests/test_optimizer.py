"""Optimizers: schedules, what they decay, clip, freeze, round and average."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from gemma_funnel.config import TransformerConfig
from gemma_funnel.model import Transformer
from gemma_funnel.params import path_of
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


SHAPED = [
  # (schedule, final_fraction, decay_fraction, values by step), of 100 steps
  # with a warm-up of 10 to 0.01.
  ("linear", 0.1, None, {10: 0.01, 55: 0.0055, 100: 0.001, 200: 0.001}),
  ("constant", 1.0, None, {10: 0.01, 55: 0.01, 100: 0.01}),
  ("wsd", 0.0, 0.2, {10: 0.01, 80: 0.01, 81: 0.0095, 90: 0.005, 100: 0.0}),
  ("wsd", 0.1, 0.9, {10: 0.01, 55: 0.0055, 100: 0.001, 200: 0.001}),
  (
    "wsd_sqrt",
    0.1,
    0.25,
    {10: 0.01, 75: 0.01, 76: 0.01 - 0.009 / 5, 91: 0.01 - 0.0072, 200: 0.001},
  ),
]


@pytest.mark.parametrize("name, end, decay, values", SHAPED)
def test_schedule_s_shape(name, end, decay, values):
  changes = dict(schedule=name, final_fraction=end, decay_fraction=decay)
  schedule = jax.jit(optimizer_lib.schedule_of(_config(**changes), 100))
  for step, value in {0: 0.0, 5: 0.005, 9: 0.009, **values}.items():
    np.testing.assert_allclose(
      schedule(step), value, rtol=1e-5, atol=1e-9, err_msg=f"step {step}"
    )
  # Without a warm-up the first step has the whole of it.
  schedule = optimizer_lib.schedule_of(_config(warmup_steps=0, **changes), 100)
  np.testing.assert_allclose(schedule(0), 0.01, rtol=1e-6)


@pytest.mark.parametrize("name", optimizer_lib.SCHEDULES)
def test_warmup_may_take_all_steps_but_one(name):
  constant = name == "constant"
  changes = dict(
    schedule=name,
    final_fraction=1.0 if constant else 0.0,
    decay_fraction=0.01 if name.startswith("wsd") else None,
    warmup_steps=99,
  )
  schedule = optimizer_lib.schedule_of(_config(**changes), 100)
  np.testing.assert_allclose(schedule(98), 0.01 * 98 / 99, rtol=1e-6)
  np.testing.assert_allclose(schedule(99), 0.01, rtol=1e-6)
  np.testing.assert_allclose(schedule(100), 0.01 * constant, atol=1e-9)


def test_schedule_without_warmup_starts_at_its_peak():
  schedule = optimizer_lib.schedule_of(_config(warmup_steps=0), 100)
  np.testing.assert_allclose(schedule(0), 0.01, rtol=1e-6)


def _params():
  """A Gemma's, all of them 0.5."""
  model = Transformer.abstract(
    TransformerConfig.preset("tiny"),
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
    name = path_of(path)
    if not jnp.any(update):
      kept.append(name)
    else:
      np.testing.assert_allclose(update, -0.01 * 0.1 * 0.5, rtol=1e-5)
  norms = [
    "final_norm",
    "funnel/1/attend/key_norm",
    "funnel/1/attend/query_norm",
    "layers/post_attn_norm",
    "layers/post_mlp_norm",
    "layers/pre_attn_norm",
    "layers/pre_mlp_norm",
  ]
  assert sorted(kept) == sorted(
    [f"{name}/scale" for name in norms]
    + ["funnel/0/gate", "funnel/1/pool_query"]
  )


def test_first_step_is_adamw_of_the_clipped_gradient():
  # An epsilon that matters: else the first step is but the gradient's sign.
  config = _config(warmup_steps=0, eps=1.0, weight_decay=0.1, clip_norm=0.5)
  optimizer, _ = optimizer_lib.make_optimizer(config, 100)
  tree = lambda kernel, scale: {
    "kernel": jnp.asarray(kernel),
    "final_norm": {"scale": jnp.asarray(scale)},
  }
  params, grads = tree([1.0, -2.0], [3.0]), tree([3.0, 0.0], [4.0])
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  clipped = {"kernel": np.asarray([0.3, 0.0]), "scale": np.asarray([0.4])}
  adam = {k: g / (np.abs(g) + 1.0) for k, g in clipped.items()}
  np.testing.assert_allclose(
    updates["kernel"],
    -0.01 * (adam["kernel"] + 0.1 * np.asarray([1.0, -2.0])),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    updates["final_norm"]["scale"], -0.01 * adam["scale"], rtol=1e-5
  )


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


NAMES = list(optimizer_lib.OPTIONS)
# Of two layers; factored where adafactor may.
SHAPES = {
  "params/embedding": (160, 130),
  "params/layers/attn/query": (2, 130, 4, 40),
  "params/layers/pre_mlp_norm/scale": (2, 130),
  "head/out": (130, 3),
}


def _draw(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  tree = {}
  for path, shape in SHAPES.items():
    *folders, name = path.split("/")
    at = tree
    for folder in folders:
      at = at.setdefault(folder, {})
    at[name] = jnp.asarray(rng.normal(size=shape), dtype)
  return tree


def _flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def _assert_equal(got, want):
  got, want = _flat(got), _flat(want)
  assert got.keys() == want.keys()
  for path, x in want.items():
    np.testing.assert_array_equal(got[path], x, err_msg=path, strict=True)


def _make(**changes):
  optimizer, _ = optimizer_lib.make_optimizer(
    _config(**{"warmup_steps": 2, **changes}), 20
  )
  return optimizer


def _step(optimizer, stochastic=False):
  """(params, state, grads, key) -> (params, state), jitted and donated."""

  def step(params, state, grads, key):
    updates, state = optimizer.update(grads, state, params)
    params = optimizer_lib.apply_updates(params, updates, key, stochastic)
    return params, state

  return jax.jit(step, donate_argnums=(0, 1))


def _train(optimizer, steps=3, start=0, dtype=jnp.float32, **how):
  """The (params, state) after each step of drawn gradients, copied."""
  params = _draw(0, dtype)
  state, step, found = optimizer.init(params), _step(optimizer, **how), []
  for number in range(start, start + steps):
    grads = _draw(100 + number, dtype)
    params, state = step(params, state, grads, jax.random.key(number))
    found.append(jax.tree.map(np.asarray, (params, state)))
  return found


def _by_hand(core, decayed=True):
  """Optax's parts in the order that arXiv 1711.05101 has them."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    core,
    optax.add_decayed_weights(
      0.1,
      lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: not path_of(path).endswith("scale"), tree
      ),
    ),
    optax.scale_by_schedule(
      optimizer_lib.schedule_of(_config(warmup_steps=2), 20)
    ),
    optax.scale(-1.0),
  )


BY_HAND = {
  "adamw": optax.scale_by_adam(0.9, 0.95, 1e-8),
  "lion": optax.scale_by_lion(0.9, 0.99),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_several_steps_are_those_of_optax(name):
  got = _train(_make(name=name))
  want = _train(_by_hand(BY_HAND[name]))
  for (ours, _), (theirs, _) in zip(got, want, strict=True):
    for path, x in _flat(theirs).items():
      np.testing.assert_allclose(_flat(ours)[path], x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [1.0, 1e6])
def test_adamw_is_optax_adamw(clip_norm):
  config = _config(warmup_steps=2)
  theirs = optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(
      optimizer_lib.schedule_of(config, 20),
      0.9,
      0.95,
      1e-8,
      weight_decay=0.1,
      mask=lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: not path_of(path).endswith("scale"), tree
      ),
    ),
  )
  got, want = _train(_make(clip_norm=clip_norm)), _train(theirs)
  # Runs from before there were other optimizers go on: the same tree.
  assert jax.tree.structure(got[-1]) == jax.tree.structure(want[-1])
  if clip_norm > 1:  # Nothing is clipped: to the bit.
    _assert_equal(got[-1], want[-1])
  for path, x in _flat(want[-1]).items():
    np.testing.assert_allclose(_flat(got[-1])[path], x, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_unset_options_are_those_of_the_table(name):
  options = {
    key: value
    for key, value in optimizer_lib.OPTIONS[name].items()
    if value is not None
  }
  _assert_equal(
    _train(_make(name=name), 2), _train(_make(name=name, **options), 2)
  )


@pytest.mark.parametrize("name", NAMES)
def test_options_matter(name):
  plain = _train(_make(name=name), 3)[-1][0]
  for option, default in optimizer_lib.OPTIONS[name].items():
    value = 0.1 if default is not None else "bfloat16"
    changes = {option: value}
    if name == "adafactor" and option == "moment_dtype":
      changes["b1"], plain = 0.5, _train(_make(name=name, b1=0.5), 3)[-1][0]
    other = _train(_make(name=name, **changes), 3)[-1][0]
    different = [np.any(x != _flat(plain)[p]) for p, x in _flat(other).items()]
    assert any(different), option


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_falls(name):
  # Of the distance to a target, from the schedule's learning rate alone.
  optimizer = _make(name=name, weight_decay=0.0, learning_rate=0.1)
  params, target = _draw(0), _draw(1)
  state, step = optimizer.init(params), _step(optimizer)
  distance = lambda x: {
    path: np.linalg.norm(y - _flat(target)[path])
    for path, y in _flat(x).items()
  }
  first = distance(params)
  for number in range(20):
    grads = jax.tree.map(jnp.subtract, params, target)
    params, state = step(params, state, grads, jax.random.key(number))
  for path, last in distance(params).items():
    assert last < 0.95 * first[path], path


@pytest.mark.parametrize("name", NAMES)
def test_state_s_paths_end_in_the_parameters_own(name):
  optimizer = _make(name=name, ema_decay=0.5)
  state = jax.eval_shape(optimizer.init, _draw(0))
  shapes = {path: x.shape for path, x in _flat_shapes(state).items()}
  others = {}
  for path, shape in shapes.items():
    of = [p for p in SHAPES if path.endswith("/" + p)]
    if not of:
      others[re.sub(r".*/", "", path)] = shape
      continue
    # Of its shape, but for axes that a mean was taken over.
    assert len(shape) == len(SHAPES[of[0]])
    assert all(a in (1, b) for a, b in zip(shape, SHAPES[of[0]], strict=True))
  ns = {"ns_coeffs": (3,)} if name == "muon" else {}
  assert others == {"count": (), **ns}


def _flat_shapes(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_of(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment_dtype", [None, "float32", "bfloat16"])
def test_dtypes_of_moments(name, moment_dtype):
  changes = {"b1": 0.5} if name == "adafactor" else {}
  optimizer = _make(
    name=name, moment_dtype=moment_dtype, ema_decay=0.5, **changes
  )
  for params in (jnp.float32, jnp.bfloat16):
    drawn = _draw(0, params)
    made = jax.eval_shape(optimizer.init, drawn)
    weights, after = jax.eval_shape(
      _step(optimizer), drawn, made, drawn, jax.random.key(0)
    )
    for state in (made, after):
      found = {"first": set(), "second": set(), "average": set()}
      for path, x in _flat_shapes(state).items():
        kind = re.search(
          r"/(?:(mu|ema)|(nu|v|v_row|v_col)|(average))/", "/" + path
        )
        if kind:
          found[list(found)[kind.lastindex - 1]].add(jnp.dtype(x.dtype).name)
      first = moment_dtype or jnp.dtype(params).name
      second = set() if name == "lion" else {"float32"}
      assert found == {
        "first": {first},
        "second": second,
        "average": {"float32"},
      }
    assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype(params)}


def test_arithmetic_of_bfloat16_parameters_is_float32():
  changes = dict(warmup_steps=0, learning_rate=0.5, moment_dtype="float32")
  params = _draw(0, jnp.bfloat16)
  grads = _draw(1, jnp.bfloat16)
  widened = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  optimizer = _make(**changes)
  got, _ = optimizer.update(grads, optimizer.init(params), params)
  params, grads = widened(params), widened(grads)
  want, _ = optimizer.update(grads, optimizer.init(params), params)
  _assert_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_resumes_from_numpy_to_the_bit(name):
  changes = {"b1": 0.5} if name == "adafactor" else {}
  optimizer = _make(
    name=name,
    ema_decay=0.9,
    moment_dtype="bfloat16",
    freeze="embedding",
    stochastic_rounding=True,
    **changes,
  )
  whole = _train(optimizer, 4, dtype=jnp.bfloat16, stochastic=True)
  params, state = jax.tree.map(jnp.asarray, whole[1])
  step = _step(optimizer, stochastic=True)
  for number in (2, 3):
    grads = _draw(100 + number, jnp.bfloat16)
    params, state = step(params, state, grads, jax.random.key(number))
  _assert_equal((params, state), whole[3])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_keep_every_bit_and_no_state(name):
  optimizer = _make(name=name, freeze="embedding|^head/", ema_decay=0.9)
  params = _draw(0)
  # Adding a zero would make this 0.0, and arithmetic flush the denormal.
  odd = jnp.asarray([-0.0, 1e-42, jnp.inf, 3.0], jnp.float32)
  params["params"]["embedding"] = (
    params["params"]["embedding"].at[0, :4].set(odd)
  )
  before = jax.tree.map(np.asarray, params)
  state = optimizer.init(params)
  assert not [p for p in _flat(state) if "embedding" in p or "head/" in p]
  step = _step(optimizer)
  for number in range(3):
    params, state = step(params, state, _draw(number), jax.random.key(0))
  # Once more without jit, under which x + 0 is x.
  updates, state = optimizer.update(_draw(3), state, params)
  params = optimizer_lib.apply_updates(params, updates, jax.random.key(0))
  for frozen in ("params/embedding", "head/out"):
    got, want = _flat(params)[frozen], _flat(before)[frozen]
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
  for trained in set(SHAPES) - {"params/embedding", "head/out"}:
    assert np.any(_flat(params)[trained] != _flat(before)[trained])
  average = optimizer_lib.averaged(state, params)
  _assert_equal(average["params"]["embedding"], params["params"]["embedding"])


def test_frozen_parameters_do_not_count_in_the_norm():
  changes = dict(warmup_steps=0, eps=1.0, weight_decay=0.0, clip_norm=0.5)
  config = _config(**changes, freeze="embedding")
  optimizer, _ = optimizer_lib.make_optimizer(config, 20)
  params = {"embedding": jnp.ones(2), "kernel": jnp.ones(2)}
  grads = {"embedding": jnp.asarray([1e6, 0]), "kernel": jnp.asarray([3.0, 4])}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  clipped = np.asarray([0.3, 0.4])
  np.testing.assert_allclose(
    updates["kernel"], -0.01 * clipped / (clipped + 1), rtol=1e-5
  )
  np.testing.assert_allclose(optimizer_lib.grad_norm(config, grads), 5.0)
  config.freeze = None
  np.testing.assert_allclose(optimizer_lib.grad_norm(config, grads), 1e6)


def test_grad_norm_of_bfloat16_is_float32():
  grads = {"a": jnp.full((1000,), 0.1, jnp.bfloat16)}
  norm = optimizer_lib.grad_norm(_config(), grads)
  assert norm.dtype == jnp.float32
  np.testing.assert_allclose(norm, float(grads["a"][0]) * 1000**0.5, rtol=1e-5)


def test_decay_exclude_replaces_what_is_left_alone():
  optimizer = _make(warmup_steps=0, decay_exclude="query$|head/")
  params = _draw(0)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  kept = {path for path, x in _flat(updates).items() if not np.any(x)}
  assert kept == {"params/layers/attn/query", "head/out"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_average_is_its_closed_form(dtype):
  decay = 0.75
  optimizer = _make(ema_decay=decay, learning_rate=0.5, warmup_steps=0)
  if dtype == jnp.float32:
    found = _train(optimizer, 4)
    weights = [_flat(_draw(0))] + [_flat(params) for params, _ in found]
    got = _flat(optimizer_lib.averaged(found[-1][1], found[-1][0]))
    for path in SHAPES:
      want = decay**4 * weights[0][path] + sum(
        (1 - decay) * decay ** (4 - i) * weights[i][path] for i in range(1, 5)
      )
      np.testing.assert_allclose(got[path], want, rtol=1e-5, atol=1e-6)
    return
  # The weights are coarse, their average is not.
  params = {"kernel": jnp.full((4,), 256.0, dtype)}
  state, step = optimizer.init(params), _step(optimizer)
  for number in range(3):
    grads = {"kernel": jnp.ones(4, dtype)}
    params, state = step(params, state, grads, jax.random.key(number))
  assert np.all(np.asarray(params["kernel"], np.float32) < 256)
  (average,) = [x for p, x in _flat(state).items() if "average" in p]
  assert average.dtype == np.float32
  assert np.all(average != np.asarray(average, dtype).astype(np.float32))
  assert optimizer_lib.averaged(state, params)["kernel"].dtype == dtype


def test_no_average_unless_asked_for():
  optimizer = _make()
  state = optimizer.init(_draw(0))
  assert optimizer_lib.averaged(state, _draw(0)) is None
  assert not [path for path in _flat(state) if "average" in path]


def test_stochastic_rounding_is_unbiased():
  # Between 1 and the next bfloat16, 1 + 2^-7; and below zero.
  weight = jnp.asarray([1.0, 1.0, -1.0, 3.0, 0.0], jnp.bfloat16)
  update = jnp.asarray([2.0**-9, 2.0**-10, -(2.0**-9), 2.0**-8, 1e-3])
  draw = jax.jit(
    jax.vmap(
      lambda key: optimizer_lib.apply_updates(
        {"a": weight}, {"a": update}, key, True
      )["a"]
    )
  )
  drawn = np.asarray(
    draw(jax.random.split(jax.random.key(0), 20_000)), np.float64
  )
  exact = np.asarray(weight, np.float64) + np.asarray(update, np.float64)
  unit = np.asarray([2.0**-7, 2.0**-7, 2.0**-7, 2.0**-6, 2.0**-17])
  low = np.floor(exact / unit) * unit
  for i in range(len(exact)):
    assert set(drawn[:, i]) == {low[i], low[i] + unit[i]}
    # Four deviations of the mean of as many draws.
    np.testing.assert_allclose(
      drawn[:, i].mean(), exact[i], rtol=0, atol=4 * 0.5 * unit[i] / 20_000**0.5
    )
  # To the nearest, the smallest of them are lost.
  near = optimizer_lib.apply_updates({"a": weight}, {"a": update}, None)["a"]
  np.testing.assert_array_equal(near[:3], weight[:3])


def test_stochastic_rounding_leaves_what_is_exact():
  exact = [0.0, -0.0, 1.0, -1.5, 2.0**-120, np.inf, -np.inf, np.nan, 3.3895e38]
  weight = jnp.asarray(exact, jnp.bfloat16)
  update = jnp.full(weight.shape, -0.0, jnp.float32)
  for seed in range(50):
    got = optimizer_lib.apply_updates(
      {"a": weight}, {"a": update}, jax.random.key(seed), True
    )["a"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
      np.asarray(got).view(np.uint16), np.asarray(weight).view(np.uint16)
    )


def test_stochastic_rounding_keeps_what_is_not_finite():
  # All bits of this NaN are set: a carry would make it a zero.
  odd = np.asarray([0x7FFFFFFF], np.uint32).view(np.float32)
  update = jnp.asarray([np.inf, -np.inf, odd[0]])
  for seed in range(10):
    got = optimizer_lib.apply_updates(
      {"a": jnp.ones(3, jnp.bfloat16)},
      {"a": update},
      jax.random.key(seed),
      True,
    )["a"]
    np.testing.assert_array_equal(
      np.asarray(got, np.float32), [np.inf, -np.inf, np.nan]
    )


def test_stochastic_rounding_draws_for_each_parameter_and_step():
  weights = {n: jnp.ones(256, jnp.bfloat16) for n in ("a", "b")}
  weights["c"] = jnp.ones(256)
  updates = {n: jnp.full(256, 2.0**-8) for n in weights}
  first, second = (
    optimizer_lib.apply_updates(weights, updates, jax.random.key(k), True)
    for k in (0, 1)
  )
  again = optimizer_lib.apply_updates(weights, updates, jax.random.key(0), True)
  _assert_equal(first, again)
  assert np.any(first["a"] != first["b"]) and np.any(first["a"] != second["a"])
  # Nothing is rounded here.
  np.testing.assert_array_equal(first["c"], np.float32(1 + 2.0**-8))


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
    (dict(learning_rate=float("inf")), "optimizer.learning_rate=inf"),
    (dict(eps=0.0), "optimizer.eps=0.0"),
    (dict(name="sgd"), r"optimizer.name='sgd'.*adamw.*lion"),
    (dict(schedule="step"), r"optimizer.schedule='step'.*cosine.*wsd"),
    (dict(schedule="wsd"), "optimizer.decay_fraction=None.*wsd"),
    (dict(schedule="wsd", decay_fraction=1.5), "optimizer.decay_fraction=1.5"),
    (dict(schedule="wsd", decay_fraction=0.95), "95 steps.*warmup_steps=10"),
    (dict(decay_fraction=0.5), "optimizer.decay_fraction=0.5.*'cosine'"),
    (dict(schedule="constant"), "optimizer.final_fraction=0.1: expected 1"),
    (dict(ema_decay=1.0), "optimizer.ema_decay=1.0"),
    (
      dict(moment_dtype="float16"),
      "optimizer.moment_dtype='float16'.*bfloat16",
    ),
    (dict(name="lion", eps=1e-8), "optimizer.eps=1e-08: lion has none"),
    (dict(momentum=0.9), "optimizer.momentum=0.9: adamw has none"),
    (dict(name="muon", momentum=1.0), "optimizer.momentum=1.0"),
    (
      dict(name="adafactor", moment_dtype="bfloat16"),
      "moment_dtype='bfloat16': adafactor has no first moment",
    ),
    (dict(freeze="("), r"optimizer.freeze='\(' is no regular expression"),
    (dict(decay_exclude="["), r"optimizer.decay_exclude='\['"),
    (
      dict(decay_exclude="scale", weight_decay=0.0),
      "decay_exclude='scale': nothing decays",
    ),
  ],
)
def test_values_out_of_range_are_named(changes, text):
  config = _config()
  config.update(changes)
  with pytest.raises(ValueError, match=text):
    optimizer_lib.make_optimizer(config, 100)


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      dict(freeze="qurey"),
      "optimizer.freeze='qurey' matches none of the 4 parameters: head/out, "
      "params/embedding",
    ),
    (dict(freeze="^(params|head)"), "matches every parameter"),
    (dict(decay_exclude="^layers"), "decay_exclude='.layers' matches none"),
    # Of what is trained.
    (dict(decay_exclude="^head", freeze="head"), "decay_exclude='.head'"),
    (
      dict(stochastic_rounding=True),
      "expected trained.*bfloat16, found float32",
    ),
    (dict(name="muon", freeze="layers"), "name='muon': none of the trained"),
  ],
)
def test_parameters_that_do_not_fit_are_named(changes, text):
  with pytest.raises(ValueError, match=text):
    jax.eval_shape(_make(**changes).init, _draw(0))
