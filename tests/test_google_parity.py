"""Google's own code (the package `gemma`) as the oracle of its trees.

It loads what we write, and computes the same logits; we load what it saves,
bit for bit. Constants bite, as in test_parity.py: but for what Google's
configuration has no field for (epsilon, RoPE's base), and Gemma 1's scale.
"""

import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints as tiny

import gemma_funnel
from gemma_funnel.convert import conversion, writer

pytestmark = pytest.mark.parity

# gemma_pytorch's package is called `gemma` too.
gm = pytest.importorskip("gemma.gm")

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  from gemma.gm.nn import _config, _modules, _transformer

TOLERANCE = 1e-4
VISIBLE = 1e-2
LENGTH = 20
LAYOUTS = ("flat", "nested", "stacked")
_COMMON = dict(rms_norm_eps=1e-6, rope_theta=10_000.0)
_GEMMA2 = {**tiny.GEMMA2, **_COMMON}
FAMILIES = {
  "g2": {**_GEMMA2, "query_pre_attn_scalar": tiny.H},
  # 27B's scale is D / N, and not H.
  "g2_27b": {
    **_GEMMA2,
    "query_pre_attn_scalar": tiny.D // tiny.N,
    "head_dim": 4,
  },
  "g1_mqa": {**tiny.GEMMA1, "num_key_value_heads": 1},
  "g1_mha": {**tiny.GEMMA1, "num_key_value_heads": tiny.N},
}


@pytest.fixture(autouse=True)
def _their_modes():
  """Theirs promotes ranks, and calls what is deprecated."""
  with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
    warnings.simplefilter("ignore")
    yield


class Case:
  """A family of a tiny size: its weights, our logits and Google's model."""

  def __init__(self, folder, name):
    self.name, self.raw, self.folder = name, FAMILIES[name], folder
    tensors = tiny.random_tensors(self.raw)
    # Peaked attention, but no saturated softcaps.
    tensors = {key: x * np.float32(0.3) for key, x in tensors.items()}
    self.source = folder / "hf"
    self.source.mkdir()
    tiny.write(self.source, self.raw, tensors)
    self.model = gemma_funnel.load(self.source)
    # Google's code takes 0 for padding.
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, tiny.V, (1, LENGTH))
    self.tokens = jnp.asarray(tokens, jnp.int32)
    self.logits = np.asarray(self.model(self.tokens))

  def theirs(self, transposed, **changes):
    """(their model, its parameters at random)."""
    raw = self.raw
    is_gemma2 = raw["model_type"] == "gemma2"
    kinds = _modules.AttentionType
    norm = _config.QueryPreAttentionNormalisation
    fields = dict(
      num_embed=raw["vocab_size"],
      embed_dim=raw["hidden_size"],
      hidden_dim=raw["intermediate_size"],
      num_heads=raw["num_attention_heads"],
      head_dim=raw["head_dim"],
      num_kv_heads=raw["num_key_value_heads"],
      final_logit_softcap=raw.get("final_logit_softcapping"),
      attn_logits_soft_cap=raw.get("attn_logit_softcapping"),
      use_post_attn_norm=is_gemma2,
      use_post_ffw_norm=is_gemma2,
      attention_types=tuple(
        kinds.LOCAL_SLIDING if is_gemma2 and i % 2 == 0 else kinds.GLOBAL
        for i in range(raw["num_hidden_layers"])
      ),
      query_pre_attn_norm=(
        norm.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        if self.name == "g2_27b"
        else norm.BY_ONE_OVER_SQRT_HEAD_DIM
      ),
      sliding_window_size=raw.get("sliding_window"),
      transpose_gating_einsum=transposed,
    )
    config = _config.TransformerConfig(**fields | changes)
    model = _transformer.Transformer(
      config=config, dtype=jnp.float32, tokens="tokens"
    )
    init = jax.jit(model.init)(jax.random.key(0), self.tokens)
    return model, init["params"]

  def written(self, kind, transposed, monkeypatch):
    """A tree of ours."""
    path = self.folder / f"{kind}-{transposed}"
    if not path.exists():
      monkeypatch.setattr(writer, "_is_transposed", lambda config: transposed)
      conversion.convert(self.source, path, "google", google_layout=kind)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
  return Case(tmp_path_factory.mktemp(request.param), request.param)


def logits_of(model, params, tokens):
  apply = jax.jit(lambda p: model.apply({"params": p}, tokens).logits)
  return np.asarray(apply(params))


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def worst(a, b):
  return float(np.abs(a - b).max())


@pytest.mark.parametrize("transposed", [False, True])
def test_theirs_loads_ours(case, transposed, monkeypatch):
  model, init = case.theirs(transposed)
  found = None
  for kind in LAYOUTS:
    path = case.written(kind, transposed, monkeypatch)
    for given in ({}, {"params": init, "donate": False}):
      params = gm.ckpts.load_params(path, **given)
      assert shapes(params) == shapes(init)
      # Equal in every layout: computed once.
      if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found, params)
      found = params
  gap = worst(logits_of(model, found, case.tokens), case.logits)
  assert gap < TOLERANCE


@pytest.mark.parametrize("transposed", [False, True])
def test_we_load_theirs(case, transposed, tmp_path, monkeypatch):
  path = case.written("flat", transposed, monkeypatch)
  params = gm.ckpts.load_params(path)
  saved = {name: tmp_path / name for name in ("saved", "legacy", "kauldron")}
  gm.ckpts.save_params(params, str(saved["saved"]), wait_until_finished=True)
  ocp.PyTreeCheckpointer(use_ocdbt=False).save(saved["legacy"], params)
  # The state of its trainer.
  state = {
    "params": params,
    "opt_state": {"mu": jax.tree.map(jnp.ones_like, params)},
    "step": jnp.zeros((), jnp.int32),
    "collections": {},
  }
  ocp.PyTreeCheckpointer().save(saved["kauldron"] / "default", state)
  for name, folder in saved.items():
    model = gemma_funnel.load(folder, config=case.model.config)
    same(case.model, model)
    if case.name.startswith("g1"):
      # Known by its shapes, as far as they say it.
      inferred = gemma_funnel.load(folder)
      same(case.model, inferred)
      got = np.asarray(inferred(case.tokens))
      np.testing.assert_array_equal(got, case.logits, err_msg=name)


@pytest.mark.parametrize("transposed", [False, True])
def test_we_load_what_it_initialises(case, transposed, tmp_path):
  """Not a value of it has come from us."""
  model, params = case.theirs(transposed)
  # Norms and gates begin at zero.
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params
  )
  gm.ckpts.save_params(params, str(tmp_path / "t"), wait_until_finished=True)
  ours = gemma_funnel.load(tmp_path / "t", config=case.model.config)
  wanted = logits_of(model, params, case.tokens)
  gap = worst(wanted, np.asarray(ours(case.tokens)))
  assert gap < TOLERANCE


# Gemma 1 has none of it.
@pytest.mark.parametrize("case", ["g2", "g2_27b"], indirect=True)
@pytest.mark.parametrize(
  "changes",
  [
    dict(query_pre_attn_norm="other"),
    dict(sliding_window_size=6),
    dict(attn_logits_soft_cap=2.5),
    dict(final_logit_softcap=3.5),
    dict(attention_types="other"),
  ],
  ids=lambda changes: next(iter(changes)),
)
def test_what_a_tree_does_not_say_would_be_seen(case, changes, monkeypatch):
  """Else equal logits would prove nothing."""
  changes = dict(changes)
  norm = _config.QueryPreAttentionNormalisation
  kinds = _modules.AttentionType
  if "query_pre_attn_norm" in changes:
    changes["query_pre_attn_norm"] = (
      norm.BY_ONE_OVER_SQRT_HEAD_DIM
      if case.name == "g2_27b"
      else norm.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
    )
  if "attention_types" in changes:
    local_last = (kinds.GLOBAL, kinds.LOCAL_SLIDING) * tiny.L
    changes["attention_types"] = local_last[: tiny.L]
  model, _ = case.theirs(False, **changes)
  path = case.written("flat", False, monkeypatch)
  params = gm.ckpts.load_params(path)
  assert worst(logits_of(model, params, case.tokens), case.logits) > VISIBLE
