"""Hugging Face's config.json, read and written, and names of tensors."""

import dataclasses

import pytest
from tiny_checkpoints import GEMMA1, GEMMA2, D, F, H, K, L, N, V, write_config

from gemma_funnel.config import PRESETS, TransformerConfig
from gemma_funnel.convert import huggingface


def config_of(tmp_path, raw, without=(), **changes):
  raw = {k: v for k, v in {**raw, **changes}.items() if k not in without}
  write_config(tmp_path, raw)
  return huggingface.read_config(tmp_path / "config.json")


def test_gemma2_config(tmp_path):
  assert config_of(tmp_path, GEMMA2) == TransformerConfig(
    vocab_size=V,
    num_layers=L,
    embed_dim=D,
    mlp_dim=F,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    query_pre_attn_scalar=11.0,
    attention_pattern=("local", "global"),
    window=5,
    attn_softcap=2.0,
    final_softcap=3.0,
    post_norms=True,
    rope_base=500.0,
    norm_eps=1e-5,
    max_length=64,
  )


def test_gemma1_config(tmp_path):
  assert config_of(tmp_path, GEMMA1) == TransformerConfig(
    vocab_size=V,
    num_layers=L,
    embed_dim=D,
    mlp_dim=F,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    query_pre_attn_scalar=float(H),
    attention_pattern=("global",),
    attn_softcap=None,
    final_softcap=None,
    post_norms=False,
    max_length=64,
  )


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
    vocab_size=256_000,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    rms_norm_eps=1e-6,
    max_position_embeddings=8192,
    rope_theta=10_000.0,
  )
  if scalar:
    changes |= dict(
      query_pre_attn_scalar=scalar,
      sliding_window=4096,
      attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
    )
  config = config_of(tmp_path, raw, **changes)
  assert config == TransformerConfig.from_dict(PRESETS[name])


def _sized(model_type, depth, width, mlp, heads, kv_heads, vocab, **others):
  return (
    dict(
      model_type=model_type,
      num_hidden_layers=depth,
      hidden_size=width,
      intermediate_size=mlp,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
      vocab_size=vocab,
    )
    | others
  )


def _sees_images(depth, width, mlp, **others):
  """As released: most of what its configuration class says is left out."""
  text = dict(
    model_type="gemma3_text",
    num_hidden_layers=depth,
    hidden_size=width,
    intermediate_size=mlp,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    sliding_window=1024,
  )
  return dict(
    model_type="gemma3",
    boi_token_index=255_999,
    eoi_token_index=256_000,
    eos_token_id=[1, 106],
    image_token_index=262_144,
    mm_tokens_per_image=256,
    text_config=text | others,
    vision_config=dict(model_type="siglip_vision_model", hidden_size=1152),
  )


_LLAMA = dict(
  hidden_act="silu",
  max_position_embeddings=8192,
  rms_norm_eps=1e-5,
  rope_theta=500_000.0,
  tie_word_embeddings=False,
  attention_bias=False,
)
_SCALING = dict(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
  rope_type="llama3",
)
_GEMMA3 = dict(
  head_dim=256,
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
  cache_implementation="hybrid",
  hidden_activation="gelu_pytorch_tanh",
  max_position_embeddings=32_768,
  query_pre_attn_scalar=256,
  rms_norm_eps=1e-6,
  rope_local_base_freq=10_000,
  rope_scaling=None,
  rope_theta=1_000_000,
  sliding_window=512,
)
_QWEN = dict(
  hidden_act="silu",
  max_position_embeddings=131_072,
  max_window_layers=28,
  rms_norm_eps=1e-6,
  rope_theta=1_000_000.0,
  sliding_window=131_072,
  use_sliding_window=False,
  use_mrope=False,
)
OTHERS = {
  "gemma3_270m": _sized("gemma3_text", 18, 640, 2048, 4, 1, 262_144, **_GEMMA3)
  | dict(
    _sliding_window_pattern=6,
    use_bidirectional_attention=False,
    layer_types=([*["sliding_attention"] * 5, "full_attention"] * 3),
  ),
  "gemma3_1b": _sized("gemma3_text", 26, 1152, 6912, 4, 1, 262_144, **_GEMMA3)
  | dict(sliding_window_pattern=6),
  "gemma3_4b": _sees_images(34, 2560, 10_240),
  "gemma3_12b": _sees_images(
    48, 3840, 15_360, num_attention_heads=16, num_key_value_heads=8
  ),
  "gemma3_27b": _sees_images(
    62,
    5376,
    21_504,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=168,
  ),
  "llama2_7b": _sized("llama", 32, 4096, 11_008, 32, 32, 32_000, **_LLAMA)
  | dict(rope_theta=None, max_position_embeddings=4096, pretraining_tp=1),
  "llama3_8b": _sized("llama", 32, 4096, 14_336, 32, 8, 128_256, **_LLAMA),
  "llama3.1_8b": _sized("llama", 32, 4096, 14_336, 32, 8, 128_256, **_LLAMA)
  | dict(rope_scaling=_SCALING, max_position_embeddings=131_072),
  "llama3.2_1b": _sized("llama", 16, 2048, 8192, 32, 8, 128_256, **_LLAMA)
  | dict(
    rope_scaling=_SCALING | dict(factor=32.0),
    max_position_embeddings=131_072,
    head_dim=64,
    mlp_bias=False,
    tie_word_embeddings=True,
  ),
  "smollm2_135m": _sized("llama", 30, 576, 1536, 9, 3, 49_152, **_LLAMA)
  | dict(
    rope_theta=100_000,
    rope_interleaved=False,
    is_llama_config=True,
    tie_word_embeddings=True,
  ),
  "mistral_7b_v0.1": _sized("mistral", 32, 4096, 14_336, 32, 8, 32_000)
  | dict(
    _LLAMA,
    rope_theta=10_000.0,
    sliding_window=4096,
    max_position_embeddings=32_768,
  ),
  "mistral_7b_v0.3": _sized("mistral", 32, 4096, 14_336, 32, 8, 32_768)
  | dict(
    _LLAMA,
    rope_theta=1_000_000.0,
    sliding_window=None,
    max_position_embeddings=32_768,
  ),
  "qwen2_0.5b": _sized("qwen2", 24, 896, 4864, 14, 2, 151_936, **_QWEN)
  | dict(tie_word_embeddings=True),
  "qwen2_7b": _sized("qwen2", 28, 3584, 18_944, 28, 4, 152_064, **_QWEN),
  "deepseek_r1_distill_qwen_1.5b": _sized(
    "qwen2", 28, 1536, 8960, 12, 2, 151_936, **_QWEN
  )
  | dict(rope_theta=10_000, sliding_window=4096, max_window_layers=21),
}


@pytest.mark.parametrize("name", OTHERS)
def test_published_configs_of_others_are_the_presets(tmp_path, name):
  config = config_of(tmp_path, OTHERS[name])
  preset = TransformerConfig.preset(name)
  assert dataclasses.replace(config, window=preset.window) == preset
  assert config.layers == preset.layers


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
  assert [
    {"local": LOCAL, "global": GLOBAL}[kind] for kind in config.attention_kinds
  ] == types


def test_keys_of_other_versions(tmp_path):
  get = lambda raw=GEMMA2, **changes: config_of(tmp_path, raw, **changes)
  rope = {"rope_type": "default", "rope_theta": 700.0}
  assert get(rope_parameters=rope, rope_theta=None).rope_base == 700.0
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
    (dict(model_type="bert"), "model_type='bert'"),
    (dict(hidden_activation="gelu"), "hidden_activation='gelu'"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings=1"),
    (dict(use_bidirectional_attention=True), "use_bidirectional"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters"),
    (dict(rope_parameters=3), "rope_parameters=3"),
    (dict(layer_types=[LOCAL]), "num_hidden_layers=3"),
    (dict(layer_types="local"), "layer_types='local'"),
    (dict(layer_types=[LOCAL, "chunked", GLOBAL]), "'chunked'"),
    (dict(layer_types=[LOCAL, [], GLOBAL]), "layer_types has"),
    (dict(num_hidden_layers="3"), "num_hidden_layers='3'"),
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
