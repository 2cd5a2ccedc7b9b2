"""Values of the configuration that make other families: the logits of their
own code in transformers, and each value is seen alone.

There is no converter of these families: weights are copied here, one by one.
"""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import RopeScaling, TransformerConfig
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.model import Transformer

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10)
COMMON = dict(
  vocab_size=97,
  hidden_size=40,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  attn_implementation="eager",
)
LLAMA3 = dict(
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
OURS = dict(
  llama=dict(
    attention_pattern=("global",),
    attn_softcap=None,
    final_softcap=None,
    post_norms=False,
    activation="silu",
    norm_offset=0.0,
    embed_scale=1.0,
    tied=False,
    query_pre_attn_scalar=10.0,
    rope_base=300.0,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 32),
    norm_eps=1e-5,
  ),
  qwen2=dict(
    attention_pattern=("global",),
    attn_softcap=None,
    final_softcap=None,
    post_norms=False,
    activation="silu",
    norm_offset=0.0,
    embed_scale=1.0,
    query_pre_attn_scalar=10.0,
    rope_base=300.0,
    attention_bias=True,
  ),
  gemma3=dict(
    attention_pattern=("local", "local", "global"),
    window=8,
    attn_softcap=None,
    final_softcap=None,
    qk_norm=True,
    query_pre_attn_scalar=5.0,
    rope_base=3000.0,
    local_rope_base=300.0,
    rope_scaling=RopeScaling("linear", 8.0),
  ),
)
# What a family has, and what would be there without: each must be seen.
PLAIN = dict(
  llama=dict(
    activation="gelu",
    norm_offset=1.0,
    embed_scale=None,
    rope_scaling=None,
    norm_eps=1e-2,
  ),
  qwen2=dict(attention_bias=False, norm_offset=1.0),
  gemma3=dict(
    qk_norm=False, local_rope_base=None, rope_scaling=None, window=99
  ),
)


def _config(name, **changes):
  return TransformerConfig(
    vocab_size=97, embed_dim=40, mlp_dim=48, **SIZES, **OURS[name] | changes
  )


@functools.cache
def _theirs(name):
  if name == "llama":
    rope = {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3}
    config = transformers.LlamaConfig(
      **COMMON, head_dim=10, rms_norm_eps=1e-5, rope_parameters=rope
    )
  elif name == "qwen2":
    rope = {"rope_type": "default", "rope_theta": 300.0}
    config = transformers.Qwen2Config(
      **COMMON, rope_parameters=rope, tie_word_embeddings=True
    )
  else:
    config = transformers.Gemma3TextConfig(
      **COMMON,
      head_dim=10,
      query_pre_attn_scalar=5,
      sliding_window=8,
      layer_types=["sliding_attention", "sliding_attention", "full_attention"],
      rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        "full_attention": {
          "rope_type": "linear",
          "rope_theta": 3000.0,
          "factor": 8.0,
        },
      },
    )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for path, x in model.named_parameters():
      start = float(path.endswith("norm.weight") and name != "gemma3")
      x.copy_(start + 0.3 * torch.randn(x.shape))
  return model


def _paths(config):
  """(theirs, ours, from [out, in] to ours) of each parameter of a layer."""
  flat = lambda x: x
  heads = lambda n: lambda x: x.T.reshape(-1, n, config.head_dim)
  bias = lambda n: lambda x: x.reshape(n, config.head_dim)
  N, K = config.num_heads, config.num_kv_heads
  yield "input_layernorm.weight", "pre_attn_norm.scale", flat
  if config.post_norms:
    yield "post_attention_layernorm.weight", "post_attn_norm.scale", flat
    yield "pre_feedforward_layernorm.weight", "pre_mlp_norm.scale", flat
    yield "post_feedforward_layernorm.weight", "post_mlp_norm.scale", flat
  else:
    yield "post_attention_layernorm.weight", "pre_mlp_norm.scale", flat
  for name, n in ("query", N), ("key", K), ("value", K):
    yield f"self_attn.{name[0]}_proj.weight", f"attn.{name}", heads(n)
    if config.attention_bias:
      yield f"self_attn.{name[0]}_proj.bias", f"attn.{name}_bias", bias(n)
    if config.qk_norm and name != "value":
      yield f"self_attn.{name[0]}_norm.weight", f"attn.{name}_norm.scale", flat
  out = lambda x: x.T.reshape(N, config.head_dim, -1)
  yield "self_attn.o_proj.weight", "attn.out", out
  for name in ("gate", "up", "down"):
    yield f"mlp.{name}_proj.weight", f"mlp.{name}", lambda x: x.T


def _ours(name, config):
  weights = {
    k: v.detach().numpy() for k, v in _theirs(name).state_dict().items()
  }
  found = {
    "embedding": weights["model.embed_tokens.weight"],
    "final_norm.scale": weights["model.norm.weight"],
  }
  if not config.tied:
    found["unembedding"] = weights["lm_head.weight"]
  for theirs, ours, change in _paths(config):
    found[f"layers.{ours}"] = np.stack(
      [
        change(weights[f"model.layers.{n}.{theirs}"])
        for n in range(config.num_layers)
      ]
    )
  graphdef, state = nnx.split(Transformer.abstract(config))
  flat = {
    path: param.replace(jnp.asarray(found.pop(".".join(path))))
    for path, param in nnx.to_flat_state(state)
  }
  assert not found
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


@functools.cache
def _tokens_and_logits(name):
  tokens = np.random.default_rng(1).integers(3, 97, (2, 90))
  with torch.no_grad():
    logits = _theirs(name)(torch.tensor(tokens), use_cache=False).logits
  return tokens, logits.numpy()


def _difference(name, **changes):
  tokens, want = _tokens_and_logits(name)
  return np.abs(_ours(name, _config(name, **changes))(tokens) - want).max()


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_logits_are_those_of_the_family(name, scan):
  assert _difference(name, scan_layers=scan) < 1e-4


@pytest.mark.parametrize(
  ("name", "key"), [(name, key) for name in PLAIN for key in PLAIN[name]]
)
def test_each_value_is_seen_alone(name, key):
  assert _difference(name, **{key: PLAIN[name][key]}) > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_cached_decoding_is_the_one_pass_forward(name):
  model = _ours(name, _config(name)).with_funnel("start=1,stop=2,stride=2")
  prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
  results = Decoder(model, 64).generate(prompts, max_new_tokens=30)
  for prompt, result in zip(prompts, results, strict=True):
    whole = np.asarray([prompt + result.tokens], np.int32)
    want = np.argmax(model(whole)[0], axis=1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(result.tokens, want)


@pytest.mark.parametrize("name", OURS)
def test_gradients_reach_every_parameter(name):
  graphdef, params = nnx.split(_ours(name, _config(name)))
  tokens = _tokens_and_logits(name)[0]
  loss = lambda p: jnp.mean(nnx.merge(graphdef, p)(tokens) ** 2)
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
    assert np.abs(grad).max() > 0 and np.all(np.isfinite(grad)), path


@pytest.mark.parametrize("name", OURS)
def test_a_config_of_a_family_survives_json(name):
  text = json.dumps(_config(name).to_dict())
  assert TransformerConfig.from_dict(json.loads(text)) == _config(name)
