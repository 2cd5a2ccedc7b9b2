"""Loading: what is recognised, what is refused, and where values land."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_funnel
from gemma_funnel.config import PRESETS, FunnelConfig, GemmaConfig
from gemma_funnel.convert import huggingface

V, D, F, L, N, K, H = 31, 8, 12, 3, 4, 2, 6
GEMMA2 = dict(
    model_type="gemma2", vocab_size=V, hidden_size=D, intermediate_size=F,
    num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=K,
    head_dim=H, query_pre_attn_scalar=11, sliding_window=5,
    attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    hidden_activation="gelu_pytorch_tanh", max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=500.0, attention_bias=False,
)  # fmt: skip
GEMMA1 = dict(
    model_type="gemma", vocab_size=V, hidden_size=D, intermediate_size=F,
    num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=K,
    head_dim=H, hidden_act="gelu", max_position_embeddings=64,
    rms_norm_eps=1e-6, rope_theta=10000.0, attention_bias=False,
)  # fmt: skip


def random_tensors(raw, dtype=np.float32):
  """Tensors by the names and shapes of transformers."""
  shapes = {
    "model.embed_tokens.weight": (V, D),
    "model.norm.weight": (D,),
  }
  norms = ["input_layernorm", "post_attention_layernorm"]
  if raw["model_type"] == "gemma2":
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
  for i in range(L):
    layer = {
      "self_attn.q_proj": (N * H, D),
      "self_attn.k_proj": (K * H, D),
      "self_attn.v_proj": (K * H, D),
      "self_attn.o_proj": (D, N * H),
      "mlp.gate_proj": (F, D),
      "mlp.up_proj": (F, D),
      "mlp.down_proj": (D, F),
      **{norm: (D,) for norm in norms},
    }
    for name, shape in layer.items():
      shapes[f"model.layers.{i}.{name}.weight"] = shape
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


def write_config(folder, raw):
  (folder / "config.json").write_text(json.dumps(raw))


def write(folder, raw, tensors):
  write_config(folder, raw)
  save_file(tensors, folder / "model.safetensors")
  return folder


def write_shards(folder, raw, tensors, shards=3):
  write_config(folder, raw)
  names = sorted(tensors)
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = {name: tensors[name] for name in names[i::shards]}
    save_file(part, folder / file)
    weight_map.update(dict.fromkeys(part, file))
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def config_of(tmp_path, raw, without=(), **changes):
  raw = {k: v for k, v in {**raw, **changes}.items() if k not in without}
  write_config(tmp_path, raw)
  return huggingface.read_config(tmp_path)


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


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2_9b", "tiny"])
def test_the_table_covers_every_parameter_once(name):
  config = GemmaConfig.preset(name)
  state = nnx.state(gemma_funnel.Gemma.abstract(config))
  expected = []
  for path, param in nnx.to_flat_state(state):
    layers = range(param.shape[0]) if path[0] == "layers" else [None]
    expected += [(path, layer) for layer in layers]
  table = huggingface.tensor_table(config)
  found = [(layout.path, layer) for layer, layout in table.values()]
  assert sorted(map(str, found)) == sorted(map(str, expected))


def test_a_loaded_model_is_one_like_any_other(tmp_path):
  folder = write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  model = gemma_funnel.load(str(folder))
  fresh = gemma_funnel.Gemma(model.config, rngs=nnx.Rngs(0))
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
  assert first == "funnel stage 0: freshly initialised gate"
  assert "attend/attn/key, " in second and ", pool_query" in second
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
      jnp.dtype("bfloat16")
  }  # fmt: skip
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


# Configurations.


def test_gemma2_config(tmp_path):
  assert config_of(tmp_path, GEMMA2) == GemmaConfig(
      vocab_size=V, num_layers=L, embed_dim=D, mlp_dim=F, num_heads=N,
      num_kv_heads=K, head_dim=H, query_pre_attn_scalar=11.0,
      attention_pattern=("local", "global"), window=5, attn_softcap=2.0,
      final_softcap=3.0, post_norms=True, rope_base=500.0, norm_eps=1e-5,
      max_length=64,
  )  # fmt: skip


def test_gemma1_config(tmp_path):
  assert config_of(tmp_path, GEMMA1) == GemmaConfig(
      vocab_size=V, num_layers=L, embed_dim=D, mlp_dim=F, num_heads=N,
      num_kv_heads=K, head_dim=H, query_pre_attn_scalar=float(H),
      attention_pattern=("global",), attn_softcap=None, final_softcap=None,
      post_norms=False, max_length=64,
  )  # fmt: skip


# As published: without layer_types, and with the keys of their time.
PUBLISHED = {
  "gemma1_2b": (GEMMA1, 2048, 16_384, 18, 8, 1, 256, None),
  "gemma1_7b": (GEMMA1, 3072, 24_576, 28, 16, 16, 256, None),
  "gemma2_2b": (GEMMA2, 2304, 9216, 26, 8, 4, 256, 256),
  "gemma2_9b": (GEMMA2, 3584, 14_336, 42, 16, 8, 256, 256),
  "gemma2_27b": (GEMMA2, 4608, 36_864, 46, 32, 16, 128, 144),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_are_the_presets(tmp_path, name):
  raw, width, mlp, depth, heads, kv_heads, head_dim, scalar = PUBLISHED[name]
  changes = dict(
      vocab_size=256_000, hidden_size=width, intermediate_size=mlp,
      num_hidden_layers=depth, num_attention_heads=heads,
      num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-6,
      max_position_embeddings=8192, rope_theta=10_000.0,
  )  # fmt: skip
  if scalar:
    changes |= dict(
        query_pre_attn_scalar=scalar, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
  config = config_of(tmp_path, raw, **changes)
  assert config == GemmaConfig.from_dict(PRESETS[name])


LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
  "types, pattern",
  [
    ([LOCAL, GLOBAL, LOCAL], ("local", "global")),
    ([GLOBAL, LOCAL, GLOBAL], ("global", "local")),
    ([LOCAL, LOCAL, LOCAL], ("local",)),
    ([GLOBAL], ("global",)),
    ([LOCAL, LOCAL, GLOBAL, LOCAL], ("local", "local", "global")),
    ([LOCAL, GLOBAL, GLOBAL], ("local", "global", "global")),
  ],
)
def test_layer_types_become_the_shortest_pattern(tmp_path, types, pattern):
  config = config_of(
    tmp_path, GEMMA2, layer_types=types, num_hidden_layers=len(types)
  )
  assert config.attention_pattern == pattern
  assert [{"local": LOCAL, "global": GLOBAL}[kind]
          for kind in config.attention_kinds] == types  # fmt: skip


def test_keys_of_other_versions(tmp_path):
  get = lambda raw=GEMMA2, **changes: config_of(tmp_path, raw, **changes)
  rope = {"rope_type": "default", "rope_theta": 700.0}
  assert get(rope_parameters=rope).rope_base == 700.0
  assert get(rope_parameters=None, rope_scaling=None).rope_base == 500.0
  without = ("rope_theta", "attention_bias", "sliding_window")
  config = config_of(tmp_path, GEMMA2, without)
  assert (config.rope_base, config.window) == (10_000.0, 4096)
  assert get(attn_logit_softcapping=None).attn_softcap is None
  assert get(final_logit_softcapping=None).final_softcap is None
  everywhere = dict(layer_types=[GLOBAL] * L, sliding_window=None)
  assert get(**everywhere).attention_kinds == ("global",) * L
  both = dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")
  assert get(GEMMA1, **both) == get(GEMMA1, hidden_act="gelu_pytorch_tanh")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(model_type="llama"), "model_type='llama'"),
    (dict(model_type="gemma3_text"), "model_type='gemma3_text'"),
    (dict(hidden_activation="gelu"), "hidden_activation='gelu'"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    (dict(use_bidirectional_attention=True), "use_bidirectional"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters"),
    (dict(rope_parameters=3), "rope_parameters=3"),
    (dict(layer_types=[LOCAL]), "num_hidden_layers=3"),
    (dict(layer_types="local"), "layer_types='local'"),
    (dict(layer_types=[LOCAL, "chunked", GLOBAL]), "'chunked'"),
    (dict(layer_types=[LOCAL, [], GLOBAL]), "layer_types has"),
    (dict(num_hidden_layers="3"), "num_layers='3'"),
    (dict(num_key_value_heads=3), "num_kv_heads=3"),
    (dict(query_pre_attn_scalar="256"), "query_pre_attn_scalar='256'"),
    (dict(query_pre_attn_scalar=None), "query_pre_attn_scalar=None"),
    (dict(attn_logit_softcapping=0.0), "attn_softcap=0.0"),
    (dict(sliding_window=None), "window=None"),
  ],
)
def test_unsupported_configs_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    config_of(tmp_path, GEMMA2, **changes)
  assert "config.json" in str(error.value)


def test_absent_sizes_are_all_named(tmp_path):
  with pytest.raises(ValueError, match="'hidden_size', 'head_dim'"):
    config_of(tmp_path, GEMMA2, without=("head_dim", "hidden_size"))


# Faults of files.


def test_all_wrong_tensors_are_named_at_once(tmp_path):
  stored = random_tensors(GEMMA2)
  gone = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
  for name in gone:
    del stored[name]
  extra = ["score.weight", "model.layers.3.mlp.up_proj.weight"]
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
  with pytest.raises(ValueError, match=r"in two files.*embed_tokens"):
    gemma_funnel.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
  write_shards(tmp_path, GEMMA2, random_tensors(GEMMA2))
  (tmp_path / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
    gemma_funnel.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_damaged_file_is_named(tmp_path, keep):
  write(tmp_path, GEMMA2, random_tensors(GEMMA2))
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match="model.safetensors cannot be read"):
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
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="expected model.safetensors.*_model"):
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
  with pytest.raises(ValueError, match=f"not a folder.*{expected}"):
    gemma_funnel.load(tmp_path / "notes.txt")
  write_config(tmp_path, {"lr": 0.1})
  with pytest.raises(ValueError, match=expected):
    gemma_funnel.load(tmp_path)


@pytest.mark.parametrize("sign", ["checkpoints", "config"])
def test_our_runs_are_passed_on(tmp_path, monkeypatch, sign):
  from gemma_funnel.training import checkpoint

  seen = []
  monkeypatch.setattr(checkpoint, "load_model", lambda *args: seen.append(args))
  if sign == "checkpoints":
    (tmp_path / "checkpoints").mkdir()
  else:
    write_config(tmp_path, {"gemma_funnel": "0.1.0"})
  gemma_funnel.load(tmp_path, "start=1", dtype="bfloat16")
  assert seen == [(tmp_path, "start=1", "bfloat16")]
