"""Loading: what is recognised, what is refused, and where values land."""

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import (
  GEMMA1,
  GEMMA2,
  D,
  H,
  K,
  L,
  N,
  V,
  random_tensors,
  write,
  write_config,
  write_shards,
)

import gemma_funnel
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.convert import (
  conversion,
  gemma_pytorch,
  google,
  huggingface,
  param_mapping,
  writer,
)
from gemma_funnel.convert.orbax_tree import OrbaxTree


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


# Values.


def test_every_value_lands_in_its_place(tmp_path):
  stored = random_tensors(GEMMA2)
  model = gemma_funnel.load(write(tmp_path, GEMMA2, stored))
  layers = model.layers
  for i in range(L):
    get = lambda name: stored[f"model.layers.{i}.{name}.weight"]
    for n in range(N):
      rows = slice(n * H, (n + 1) * H)
      np.testing.assert_array_equal(
        layers.attn.query[...][i, :, n], get("self_attn.q_proj")[rows].T
      )
      np.testing.assert_array_equal(
        layers.attn.out[...][i, n], get("self_attn.o_proj")[:, rows].T
      )
    for n in range(K):
      rows = slice(n * H, (n + 1) * H)
      for ours, theirs in (("key", "k_proj"), ("value", "v_proj")):
        np.testing.assert_array_equal(
          getattr(layers.attn, ours)[...][i, :, n],
          get(f"self_attn.{theirs}")[rows].T,
        )
    for name in ("gate", "up", "down"):
      np.testing.assert_array_equal(
        getattr(layers.mlp, name)[...][i], get(f"mlp.{name}_proj").T
      )
    for ours, theirs in {
      "pre_attn_norm": "input_layernorm",
      "post_attn_norm": "post_attention_layernorm",
      "pre_mlp_norm": "pre_feedforward_layernorm",
      "post_mlp_norm": "post_feedforward_layernorm",
    }.items():
      np.testing.assert_array_equal(
        getattr(layers, ours).scale[...][i], get(theirs)
      )
  np.testing.assert_array_equal(
    model.embedding[...], stored["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(
    model.final_norm.scale[...], stored["model.norm.weight"]
  )


def test_gemma1_norm_after_attention_is_the_one_before_the_mlp(tmp_path):
  stored = random_tensors(GEMMA1)
  model = gemma_funnel.load(write(tmp_path, GEMMA1, stored))
  np.testing.assert_array_equal(
    model.layers.pre_mlp_norm.scale[...][1],
    stored["model.layers.1.post_attention_layernorm.weight"],
  )
  assert not hasattr(model.layers, "post_attn_norm")


@pytest.mark.parametrize(
  "name", ["gemma1_2b", "gemma1_7b", "gemma2_9b", "tiny"]
)
def test_formats_cover_every_parameter_once(name):
  config = TransformerConfig.preset(name)
  state = nnx.state(gemma_funnel.Transformer.abstract(config))
  expected = []
  for path, param in nnx.to_flat_state(state):
    layers = range(param.shape[0]) if path[0] == "layers" else [None]
    expected += [(path, layer) for layer in layers]
  formats = [
    huggingface.tensors(config),
    gemma_pytorch.tensors(config),
    param_mapping.own_tensors(config),
  ]
  for kind in ("flat", "nested", "stacked", "kauldron"):
    for transposed in (False, True):
      formats.append(google.tensors(config, kind, transposed, 300_000)[0])
  for tensors in formats:
    found = [(p.path, p.layer) for tensor in tensors for p in tensor.views]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_a_loaded_model_is_one_like_any_other(tmp_path):
  folder = write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  model = gemma_funnel.load(str(folder))
  fresh = gemma_funnel.Transformer(model.config, rngs=nnx.Rngs(0))
  # Equal graph definitions share compiled functions.
  assert nnx.graphdef(model) == nnx.graphdef(fresh)
  shapes = lambda m: jax.tree.map(lambda p: (p.shape, p.dtype), nnx.state(m))
  assert shapes(model) == shapes(fresh)
  assert model(jnp.ones((1, 9), jnp.int32)).shape == (1, 9, V)


def test_shards_equal_one_file(tmp_path):
  stored = random_tensors(GEMMA2)
  (tmp_path / "one").mkdir()
  (tmp_path / "many").mkdir()
  one = gemma_funnel.load(write(tmp_path / "one", GEMMA2, stored))
  many = gemma_funnel.load(write_shards(tmp_path / "many", GEMMA2, stored))
  same(one, many)


def test_a_bare_trunk_loads(tmp_path):
  stored = random_tensors(GEMMA2)
  (tmp_path / "bare").mkdir()
  bare = {k.removeprefix("model."): v for k, v in stored.items()}
  same(
    gemma_funnel.load(write(tmp_path, GEMMA2, stored)),
    gemma_funnel.load(write(tmp_path / "bare", GEMMA2, bare)),
  )


@pytest.mark.parametrize(
  "stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, stored, dtype):
  tensors = random_tensors(GEMMA2, stored)
  model = gemma_funnel.load(write(tmp_path, GEMMA2, tensors), dtype=dtype)
  assert model.config.dtype == model.config.param_dtype == dtype
  assert model.config.softmax_dtype == "float32"
  for param in jax.tree.leaves(nnx.state(model)):
    assert param.dtype == dtype
  np.testing.assert_array_equal(
    np.asarray(model.embedding[...]),
    tensors["model.embed_tokens.weight"].astype(jnp.dtype(dtype)),
  )
  hidden = model.encode(jnp.ones((1, 4), jnp.int32))
  assert hidden.dtype == dtype


def test_funnel_does_not_change_what_is_loaded(tmp_path):
  folder = write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  plain = gemma_funnel.load(folder)
  assert plain.stages == ()
  for funnel in ("start=1,stride=2", FunnelConfig(1, stride=2)):
    model = gemma_funnel.load(folder, funnel)
    assert model.stages == (FunnelConfig(1, L, 2),)
    same(plain, model)


def test_what_a_funnel_learns_is_made_afresh(tmp_path, capsys):
  folder = write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  learned = "start=0,recover=gate+start=1,pool=attention,recover=attend"
  model = gemma_funnel.load(folder, learned, dtype="bfloat16")
  first, second = capsys.readouterr().out.splitlines()
  assert first == "funnel stage 0: freshly initialised recovery/gate"
  assert "attend/attn/key, " in second and "/pool_query" in second
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
    jnp.dtype("bfloat16")
  }
  # It starts as what learns nothing.
  average = gemma_funnel.load(folder, "start=0+start=1", dtype="bfloat16")
  assert capsys.readouterr().out == ""
  same(average, model.with_funnel("off"))
  tokens = jnp.arange(12, dtype=jnp.int32)[None]
  np.testing.assert_allclose(
    model.encode(tokens).astype(jnp.float32),
    average.encode(tokens).astype(jnp.float32),
    atol=0.1,
  )


def test_ignored_buffers_and_a_tied_head(tmp_path):
  stored = random_tensors(GEMMA2)
  plain = gemma_funnel.load(write(tmp_path, GEMMA2, stored))
  stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(H // 2)
  stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
  same(plain, gemma_funnel.load(write(tmp_path, GEMMA2, stored)))
  stored["lm_head.weight"][0, 0] += 1
  write(tmp_path, GEMMA2, stored)
  with pytest.raises(ValueError, match="lm_head.weight differs"):
    gemma_funnel.load(tmp_path)


# Faults of files.


def test_all_wrong_tensors_are_named_at_once(tmp_path):
  stored = random_tensors(GEMMA2)
  gone = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
  for name in gone:
    del stored[name]
  extra = ["scores.weight", "model.layers.3.mlp.up_proj.weight"]
  for name in extra:
    stored[name] = np.zeros(3, np.float32)
  shape = "model.layers.1.self_attn.q_proj.weight"
  stored[shape] = stored[shape].T.copy()
  ints = "model.layers.0.mlp.down_proj.weight"
  stored[ints] = stored[ints].astype(np.int8)
  write(tmp_path, GEMMA2, stored)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(tmp_path)
  text = str(error.value)
  assert str(tmp_path / "model.safetensors") in text
  for name in (*gone, *extra, shape, ints):
    assert name in text
  assert f"({D}, {N * H})" in text and f"({N * H}, {D})" in text


def test_one_tensor_in_two_shards(tmp_path):
  stored = random_tensors(GEMMA2)
  write_shards(tmp_path, GEMMA2, stored)
  shard = tmp_path / "model-00003-of-00003.safetensors"
  names = sorted(stored)[2::3] + ["model.embed_tokens.weight"]
  save_file({name: stored[name] for name in names}, shard)
  gemma_funnel.load(tmp_path)  # With the same values it may be.
  other = {"model.embed_tokens.weight": stored["model.embed_tokens.weight"] + 1}
  save_file({name: stored[name] for name in names} | other, shard)
  with pytest.raises(ValueError, match=r"in two files.*embed_tokens"):
    gemma_funnel.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": {}}'])
def test_a_damaged_index_is_named(tmp_path, text):
  write_shards(tmp_path, GEMMA2, random_tensors(GEMMA2))
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(ValueError, match="model.safetensors.index.json"):
    gemma_funnel.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_config_is_named(tmp_path, text):
  write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match="config.json"):
    gemma_funnel.load(tmp_path)


def test_no_weights(tmp_path):
  write_config(tmp_path, GEMMA2)
  (tmp_path / "weights.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="expected model.safetensors.*weights"):
    gemma_funnel.load(tmp_path)


@pytest.mark.parametrize(
  "funnel, message",
  [
    ("start=1,stop=9", "funnel.stop=9 is past the model's 3 layers"),
    ("start=3", "funnel.start=3 must be below"),
    ("start=1,strid=2", "strid"),
  ],
)
def test_the_funnel_is_checked_before_any_weight_is_read(
  tmp_path, funnel, message
):
  write_config(tmp_path, GEMMA2)
  (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
  with pytest.raises(ValueError, match=message):
    gemma_funnel.load(tmp_path, funnel)


def test_dtype_is_checked(tmp_path):
  write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  with pytest.raises(ValueError, match="dtype='int8'"):
    gemma_funnel.load(tmp_path, dtype="int8")


# What a path is.


def test_anything_else_is_described(tmp_path):
  expected = "Expected a Hugging Face folder"
  with pytest.raises(ValueError, match=f"nothing there.*{expected}"):
    gemma_funnel.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=f"it is empty.*{expected}"):
    gemma_funnel.load(tmp_path)
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match=rf"notes.txt.*{expected}"):
    gemma_funnel.load(tmp_path)
  with pytest.raises(ValueError, match=f"another kind.*{expected}"):
    gemma_funnel.load(tmp_path / "notes.txt")
  write_config(tmp_path, {"lr": 0.1})
  with pytest.raises(ValueError, match=expected):
    gemma_funnel.load(tmp_path)


# From every format to every other.


def _write_source(folder, family, dtype=ml_dtypes.bfloat16):
  """A random Hugging Face checkpoint of a family, at a tiny size."""
  raw = FAMILIES[family]
  folder.mkdir()
  (folder / "generation_config.json").write_text("{}")
  return write(folder, raw, random_tensors(raw, dtype))


# GQA, MQA and MHA; a query scale that is neither H nor D/N; and sizes that are
# Gemma 2 27B's in all but scale.
FAMILIES = {
  "gemma1_2b": {**GEMMA1, "num_key_value_heads": 1},
  "gemma1_7b": {**GEMMA1, "num_key_value_heads": N},
  "gemma2_2b": GEMMA2,
  "gemma2_9b": {**GEMMA2, "num_attention_heads": 2, "num_key_value_heads": 1},
  "gemma2_27b": {**GEMMA2, "query_pre_attn_scalar": 2, "head_dim": 4},
}
KINDS = [
  ("orbax", None),
  ("hf", None),
  ("gemma_pytorch", None),
  ("google", "flat"),
  ("google", "nested"),
  ("google", "stacked"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_to_every_other(tmp_path, family, monkeypatch):
  # Google's two layouts of gating_einsum, whatever the published sizes.
  for transposed in (False, True):
    monkeypatch.setattr(writer, "_is_transposed", lambda config: transposed)
    folder = tmp_path / str(transposed)
    folder.mkdir()
    source = _write_source(folder / "source", family)
    first = {}
    for to, google_layout in KINDS:
      options = {"google_layout": google_layout} if google_layout else {}
      first[to, google_layout] = folder / f"{to}-{google_layout}"
      conversion.convert(source, first[to, google_layout], to, **options)
    for number, path in enumerate(first.values()):
      back = folder / f"back{number}"
      conversion.convert(path, back, "hf")
      # Bit for bit, through every format and back.
      _same_files(first["hf", None], back)
    same(
      gemma_funnel.load(source, dtype="bfloat16"),
      gemma_funnel.load(first["orbax", None], dtype="bfloat16"),
    )
    # And from each of the others to each of the others.
    if family == "gemma2_27b":
      for a, path in first.items():
        for to, google_layout in KINDS:
          options = {"google_layout": google_layout} if google_layout else {}
          there = folder / f"{'-'.join(map(str, a))}-{to}-{google_layout}"
          conversion.convert(path, there, to, **options)
          _same_files(first[to, google_layout], there)


def _same_files(a, b):
  """All but OCDBT's own files, whose names are random."""
  for folder in (a, b):
    assert not list(folder.parent.glob("*.partial"))
  names = lambda folder: {
    str(f.relative_to(folder))
    for f in folder.rglob("*")
    if f.is_file() and f.parent.name != "d" and f.name != "manifest.ocdbt"
  }
  assert names(a) == names(b)
  for name in names(a):
    assert (a / name).read_bytes() == (b / name).read_bytes(), name
  if (a / "_METADATA").exists() or (a / "params").exists():
    left, right = OrbaxTree(_tree_of(a)), OrbaxTree(_tree_of(b))
    assert left.tensors == right.tensors
    for name in left.tensors:
      np.testing.assert_array_equal(left.read(name), right.read(name))


def _tree_of(folder):
  return folder / "params" if (folder / "params").exists() else folder
