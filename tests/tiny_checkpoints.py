"""Small checkpoints of Hugging Face's kind, for tests, and damage to them."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file

from gemma_funnel.convert.tensor_io import Header

V, D, F, L, N, K, H = 31, 8, 12, 3, 4, 2, 6
GEMMA2 = dict(
  model_type="gemma2",
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=L,
  num_attention_heads=N,
  num_key_value_heads=K,
  head_dim=H,
  query_pre_attn_scalar=11,
  sliding_window=5,
  attn_logit_softcapping=2.0,
  final_logit_softcapping=3.0,
  hidden_activation="gelu_pytorch_tanh",
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=500.0,
  attention_bias=False,
)
GEMMA1 = dict(
  model_type="gemma",
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=L,
  num_attention_heads=N,
  num_key_value_heads=K,
  head_dim=H,
  hidden_act="gelu",
  max_position_embeddings=64,
  rms_norm_eps=1e-6,
  rope_theta=10000.0,
  attention_bias=False,
)


def random_tensors(raw, dtype=np.float32):
  """Tensors by the names and shapes of transformers."""
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  norms = ["input_layernorm", "post_attention_layernorm"]
  if raw["model_type"] == "gemma2":
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
  queries = raw["num_attention_heads"] * raw["head_dim"]
  keys = raw["num_key_value_heads"] * raw["head_dim"]
  for i in range(L):
    layer = {
      "self_attn.q_proj": (queries, D),
      "self_attn.k_proj": (keys, D),
      "self_attn.v_proj": (keys, D),
      "self_attn.o_proj": (D, queries),
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


def damage(rng, data):
  """One of the ways to spoil bytes."""
  data = bytearray(data)
  start = int(rng.integers(len(data)))
  stop = min(len(data), start + int(rng.integers(1, 9)))
  match rng.integers(7):
    case 0:
      data[start] ^= 1 << int(rng.integers(8))
    case 1:
      data[start:stop] = rng.bytes(stop - start)
    case 2:
      del data[start:stop]
    case 3:
      data[start:start] = rng.bytes(stop - start)
    case 4:
      data[start:stop] = bytes(stop - start)
    case 5:
      data[start:stop] = b"\xff" * (stop - start)
    case 6:
      del data[start:]
  return bytes(data)


@dataclasses.dataclass
class Headers:
  """A reader of nothing but headers."""

  tensors: dict[str, Header]
  where: str = "somewhere"

  def read(self, name, index=()):
    raise AssertionError(f"{name} was read")
