"""Muon and Adafactor of stacked layers, against optax layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
import pytest

from gemma_funnel.parallel import sharding
from gemma_funnel.params import path_of
from gemma_funnel.training import transforms

L, D, N, K, H, F, V = 3, 160, 4, 1, 40, 200, 300
# By the parameter's path: its shape, and that of a layer's matrix.
SHAPES = {
  "params/layers/attn/query": ((L, D, N, H), (D, N * H)),
  "params/layers/attn/key": ((L, D, K, H), (D, K * H)),
  "params/layers/attn/out": ((L, N, H, D), (N * H, D)),
  "params/layers/mlp/up": ((L, D, F), (D, F)),
  "params/layers/mlp/down": ((L, F, D), (F, D)),
  "params/layers/pre_mlp_norm/scale": ((L, D), (D,)),
  "params/embedding": ((V, D), (V, D)),
  "params/funnel/0/attend/attn/value": ((D, N, H), (D, N * H)),
  "head/bias": ((7,), (7,)),
}


def _tree(flat):
  tree = {}
  for path, value in flat.items():
    *folders, name = path.split("/")
    at = tree
    for folder in folders:
      at = at.setdefault(folder, {})
    at[name] = value
  return tree


def _flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def _draw(seed, shapes=None):
  rng = np.random.default_rng(seed)
  # Layers of unlike size, so that statistics taken over the depth would show.
  return {
    path: np.asarray(
      rng.normal(size=shape)
      * 10.0 ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
      if "layers/" in path
      else rng.normal(size=shape),
      np.float32,
    )
    for path, shape in (
      shapes or {p: s for p, (s, _) in SHAPES.items()}
    ).items()
  }


def _layers(flat):
  """{(path, layer): matrix}."""
  return {
    (path, layer): part.reshape(SHAPES[path][1])
    for path, x in flat.items()
    for layer, part in enumerate(x if "layers/" in path else x[None])
  }


def _run(optimizer, steps, as_layers):
  """Updates of `steps` steps of drawn gradients."""
  params = _draw(0)
  if as_layers:
    of = lambda flat: {f"{p}:{i}": x for (p, i), x in _layers(flat).items()}
    inverse = lambda tree: {k: np.asarray(x) for k, x in tree.items()}
  else:
    of = _tree
    inverse = lambda tree: {
      f"{p}:{i}": x for (p, i), x in _layers(_flat(tree)).items()
    }
  state, found = optimizer.init(of(params)), []
  update = jax.jit(optimizer.update)
  for step in range(steps):
    updates, state = update(of(_draw(step + 1)), state, of(params))
    found.append(inverse(updates))
  return found


def _assert_close(got, want, paths=SHAPES, **tolerance):
  for ours, theirs in zip(got, want, strict=True):
    for name, x in theirs.items():
      if name.split(":")[0] in paths:
        np.testing.assert_allclose(ours[name], x, err_msg=name, **tolerance)


MATRICES = [p for p in SHAPES if p.split("/")[-2] in ("attn", "mlp")]


@pytest.mark.parametrize("b2", [0.999, 0.3])
def test_adafactor_is_optax_s_of_each_layer(b2):
  # Optax takes the two largest axes of whatever it is given, and the RMS of all
  # of it: each layer's matrix is given by itself.
  capped = optax.scale_by_factored_rms(
    decay_rate_fn=lambda i, e: jnp.minimum(
      b2, 1.0 - jnp.asarray(i + 1, jnp.float32) ** -e
    )
  )
  theirs = optax.chain(capped, optax.clip_by_block_rms(1.0))
  ours = transforms.scale_by("adafactor", {"b1": 0.0, "b2": b2, "eps": 1e-30})
  got, want = _run(ours, 4, False), _run(theirs, 4, True)
  _assert_close(got, want, rtol=2e-4, atol=1e-6)


def test_adafactor_averages_its_updates():
  options = {"b1": 0.0, "b2": 0.999, "eps": 1e-30}
  plain = _run(transforms.scale_by("adafactor", options), 3, False)
  options["b1"] = 0.75
  got = _run(transforms.scale_by("adafactor", options), 3, False)
  want = 0.0
  for step, updates in enumerate(plain):
    want = 0.75 * want + 0.25 * updates["params/embedding:0"]
    np.testing.assert_allclose(
      got[step]["params/embedding:0"], want, rtol=1e-4, atol=1e-6
    )


def test_adafactor_keeps_rows_and_columns_of_a_layer_s_matrix():
  state = transforms.scale_by(
    "adafactor", {"b1": 0.0, "b2": 0.999, "eps": 1e-30}
  ).init(_tree(_draw(0)))
  shapes = {path: x.shape for path, x in _flat(state[0]).items()}
  assert shapes == {
    "count": (),
    "v_row/params/layers/attn/query": (L, D, 1, 1),
    "v_col/params/layers/attn/query": (L, 1, N, H),
    "v/params/layers/attn/key": (L, D, K, H),  # 40 columns are too few.
    "v_row/params/layers/attn/out": (L, N, H, 1),
    "v_col/params/layers/attn/out": (L, 1, 1, D),
    "v_row/params/layers/mlp/up": (L, D, 1),
    "v_col/params/layers/mlp/up": (L, 1, F),
    "v_row/params/layers/mlp/down": (L, F, 1),
    "v_col/params/layers/mlp/down": (L, 1, D),
    "v/params/layers/pre_mlp_norm/scale": (L, D),
    "v_row/params/embedding": (V, 1),
    "v_col/params/embedding": (1, D),
    "v_row/params/funnel/0/attend/attn/value": (D, 1, 1),
    "v_col/params/funnel/0/attend/attn/value": (1, N, H),
    "v/head/bias": (7,),
  }


def test_adafactor_never_factors_by_depth():
  deep = {"layers": {"mlp": {"up": jnp.ones((500, 128, 130))}}}
  state = transforms.scale_by(
    "adafactor", {"b1": 0.0, "b2": 0.999, "eps": 1e-30}
  ).init(deep)
  assert state[0].v_row["layers"]["mlp"]["up"].shape == (500, 128, 1)
  # Which optax would.
  theirs = optax.scale_by_factored_rms().init(deep)
  assert 500 not in theirs.v_row["layers"]["mlp"]["up"].shape


MUON = {"momentum": 0.9, "b1": 0.8, "b2": 0.97, "eps": 1e-3}


def test_muon_is_optax_s_of_each_layer_s_matrix():
  got = _run(transforms.scale_by("muon", MUON), 3, False)
  keys = [f"{p}:{i}" for p in MATRICES for i in range(L)]
  by_hand = scale_by_muon(
    beta=0.9,
    weight_dimension_numbers=lambda tree: jax.tree.map(
      lambda x: MuonDimensionNumbers(0, 1), tree
    ),
  )
  only = optax.GradientTransformation(
    lambda tree: by_hand.init({k: x for k, x in tree.items() if k in keys}),
    lambda tree, *rest: by_hand.update(
      {k: x for k, x in tree.items() if k in keys}, *rest
    ),
  )
  want = _run(only, 3, True)
  assert {key.split(":")[0] for key in want[0]} == set(MATRICES)
  for updates in want:
    for key, x in updates.items():
      updates[key] = 0.2 * max(x.shape) ** 0.5 * x
  _assert_close(got, want, rtol=1e-3, atol=2e-4)


def test_muon_orthogonalises_and_has_the_size_of_adam():
  updates = _run(transforms.scale_by("muon", MUON), 1, False)[0]
  for path in MATRICES:
    for layer in range(L if "layers/" in path else 1):
      x = updates[f"{path}:{layer}"]
      singular = np.linalg.svd(x, compute_uv=False)
      singular /= 0.2 * max(x.shape) ** 0.5
      # What five iterations come to; of the least, more would be needed.
      assert 0.3 < np.quantile(singular, 0.1), (path, singular)
      assert singular.max() < 1.3, (path, singular)
      assert 0.1 < np.sqrt(np.mean(x**2)) < 0.25


def test_muon_leaves_the_rest_to_adam():
  others = [path for path in SHAPES if path not in MATRICES]
  got = _run(transforms.scale_by("muon", MUON), 3, False)
  want = _run(optax.scale_by_adam(0.8, 0.97, 1e-3, nesterov=True), 3, True)
  assert others and any("embedding" in path for path in others)
  _assert_close(got, want, others, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_others_are_optax_s(name):
  ours, theirs = {
    "adamw": (dict(b1=0.8, b2=0.9, eps=0.1), optax.scale_by_adam),
    "lion": (dict(b1=0.8, b2=0.9), optax.scale_by_lion),
  }[name]
  got = _run(transforms.scale_by(name, ours), 3, False)
  want = _run(theirs(**ours), 3, True)
  _assert_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_state_lies_as_its_parameters_do(name):
  config = sharding.default_config()
  config.update(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(config)
  options = MUON if name == "muon" else {"b1": 0.5, "b2": 0.9, "eps": 1e-30}
  state = jax.eval_shape(
    transforms.scale_by(name, options).init, _tree(_draw(0))
  )
  leaves = jax.tree_util.tree_leaves_with_path(state)
  split = 0
  for path, leaf in leaves:
    path = path_of(path)
    spec = sharding.spec_of(path, leaf.shape, mesh)
    of = [p for p in SHAPES if path.endswith("/" + p)]
    if not of:
      assert not any(spec), path
      continue
    whole = sharding.spec_of(of[0], SHAPES[of[0]][0], mesh)
    for size, got, want in zip(leaf.shape, spec, whole, strict=True):
      assert got == (want if size > 1 else None), path
      split += got is not None
  assert split > 10
