"""GGUF files: read as the checkpoint that they were made of, or refused."""

import json
import tracemalloc

from flax import nnx
import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_funnel
from gemma_funnel import convert, gguf_head
from gemma_funnel.convert import families, huggingface
from gemma_funnel.data.tokenizer import Tokenizer

VOCAB = 300
SIZES = dict(
  vocab_size=VOCAB,
  num_hidden_layers=3,
  hidden_size=64,
  intermediate_size=96,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)
# What transformers calls a model, and what else it has, by architecture.
MODELS = {
  "gemma": dict(model_type="gemma", head_dim=32),
  "gemma2": dict(
    model_type="gemma2",
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=8,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
  ),
  "gemma3": dict(
    model_type="gemma3_text",
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=8,
    rope_theta=1e6,
    rope_scaling=dict(rope_type="linear", factor=8.0),
  ),
  "llama": dict(model_type="llama", rope_theta=5e5, rms_norm_eps=1e-5),
  "llama tied": dict(
    model_type="llama",
    tie_word_embeddings=True,
    rope_theta=5e5,
    rope_scaling=LLAMA3,
  ),
  "mistral": dict(model_type="mistral", sliding_window=8),
  "qwen2": dict(model_type="qwen2", rope_theta=1e6),
}


def _permute(values, heads):
  """As llama.cpp's converter: halves of a head become pairs."""
  rows = values.shape[0]
  halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
  return halves.swapaxes(1, 2).reshape(values.shape)


def _name(name, arch):
  name = name.replace("model.layers", "blk")
  swaps = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
    "post_attention_layernorm": (
      "post_attention_norm" if arch in ("gemma2", "gemma3") else "ffn_norm"
    ),
  }
  for theirs, here in swaps.items():
    name = name.replace(theirs, here)
  return name


def write(folder, model, quantised=None):
  """A random model as a Hugging Face folder and as a GGUF file."""
  arch = model.split()[0]
  raw = SIZES | MODELS[model]
  config = families.to_config(raw)
  rng = np.random.default_rng(0)
  tensors = {
    # Norms of a Gemma are exact with 1 added.
    t.name: (rng.integers(-128, 128, t.shape) / 256).astype(np.float32)
    for t in huggingface.tensors(config)
  }
  writer = gguf.GGUFWriter(folder / "x.gguf", arch)
  _write_metadata(writer, raw, config)
  for name, values in tensors.items():
    stored = values
    if arch.startswith("gemma") and name.endswith("norm.weight"):
      stored = values + 1
    if arch in ("llama", "mistral"):
      for part, heads in (("q_proj", 4), ("k_proj", 2)):
        stored = _permute(stored, heads) if part in name else stored
    kind = None
    if quantised is not None and values.ndim == 2:
      kind = quantised
      stored = gguf.quants.quantize(stored, kind)
      kept = gguf.quants.dequantize(stored, kind)
      for part, heads in (("q_proj", 4), ("k_proj", 2)):
        if part in name and arch in ("llama", "mistral"):
          rows = kept.shape[0]
          kept = kept.reshape(heads, rows // heads // 2, 2, -1)
          kept = kept.swapaxes(1, 2).reshape(values.shape)
      tensors[name] = kept
    writer.add_tensor(_name(name, arch), stored, raw_dtype=kind)
  if "llama3" in str(raw.get("rope_scaling")):
    writer.add_tensor("rope_freqs.weight", _factors(raw))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  hf = folder / "hf"
  hf.mkdir()
  (hf / "config.json").write_text(json.dumps(raw))
  save_file(tensors, hf / "model.safetensors")
  return folder / "x.gguf", hf


def _write_metadata(writer, raw, config):
  writer.add_block_count(raw["num_hidden_layers"])
  writer.add_embedding_length(raw["hidden_size"])
  writer.add_feed_forward_length(raw["intermediate_size"])
  writer.add_context_length(raw["max_position_embeddings"])
  writer.add_head_count(raw["num_attention_heads"])
  writer.add_head_count_kv(raw["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(raw.get("rms_norm_eps", 1e-6))
  writer.add_rope_freq_base(raw.get("rope_theta", 10_000.0))
  if "head_dim" in raw:
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
  else:
    writer.add_rope_dimension_count(config.head_dim)
  if "sliding_window" in raw:
    writer.add_sliding_window(raw["sliding_window"])
  if "attn_logit_softcapping" in raw:
    writer.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
  if raw.get("rope_scaling", {}).get("rope_type") == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(raw["rope_scaling"]["factor"])
  words = [f"<0x{i:02X}>".encode() for i in range(256)]
  tokens = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", *words]
  tokens += [bytes([97 + i]) for i in range(26)] + [b"\xe2\x96\x81"]
  tokens += [f"w{i}".encode() for i in range(VOCAB - len(tokens))]
  writer.add_tokenizer_model("llama")
  writer.add_token_list(tokens)
  writer.add_token_scores([-float(i) for i in range(VOCAB)])
  writer.add_token_types([3] * 4 + [6] * 256 + [1] * (VOCAB - 260))
  writer.add_bos_token_id(2)
  writer.add_eos_token_id(1)
  writer.add_unk_token_id(3)
  writer.add_pad_token_id(0)
  writer.add_add_space_prefix(False)


def _factors(raw):
  """Llama 3's, written out: what long waves are slowed down by."""
  found = []
  for i in range(0, 16, 2):
    wave = 2 * np.pi * raw["rope_theta"] ** (i / 16)
    if wave < 8192 / 4:
      found.append(1.0)
    elif wave > 8192:
      found.append(8.0)
    else:
      smooth = (8192 / wave - 1) / 3
      found.append(1 / ((1 - smooth) / 8 + smooth))
  return np.asarray(found, np.float32)


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_checkpoint_it_was_made_of(model, tmp_path):
  file, hf = write(tmp_path, model)
  found, expected = convert.describe(file), convert.describe(hf)
  assert found.config == expected.config
  assert found.stop_ids == (1,)
  loaded = gemma_funnel.load(file)
  _same(loaded, gemma_funnel.load(hf))
  convert.convert(file, tmp_path / "back", "hf")
  _same(gemma_funnel.load(tmp_path / "back"), loaded)
  text = "some w7 text \u00e9"
  tokenizer = Tokenizer.load(file)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  back = convert.describe(tmp_path / "back").tokenizer_path
  assert Tokenizer.load(back).encode(text) == tokenizer.encode(text)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_quantised(kind, tmp_path):
  kind = gguf.GGMLQuantizationType[kind]
  file, hf = write(tmp_path, "llama", kind)
  _same(gemma_funnel.load(file), gemma_funnel.load(hf))


def test_a_part_of_permuted_rows(tmp_path):
  from gemma_funnel.convert.gguf import GGUFTensors
  from gemma_funnel.convert.safetensors_file import SafetensorsFile

  file, hf = write(tmp_path, "llama")
  ours = GGUFTensors(file)
  theirs = SafetensorsFile(hf / "model.safetensors")
  name = "model.layers.1.self_attn.k_proj.weight"
  for index in (
    (),
    (slice(3, 21),),
    (slice(0, 32), slice(5, 9)),
    (17,),
    (slice(4, 4),),
    (31, 3),
  ):
    np.testing.assert_array_equal(
      ours.read(name, index), theirs.read(name)[index]
    )


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("general.architecture", "mamba", "'mamba' is not supported: expected"),
    ("llama.expert_count", 8, r"has \['llama.expert_count'\]: expected none"),
    ("llama.rope.scaling.type", "yarn", "yarn"),
    (
      "llama.attention.head_count",
      3,
      "expected a multiple|the width of a head",
    ),
    ("llama.attention.value_length", 7, "value_length=7: expected 16"),
    ("llama.block_count", "3", "block_count|num_hidden_layers"),
    ("tokenizer.ggml.model", "bert", "'bert': expected 'llama'"),
    ("tokenizer.ggml.scores", [1.0], "scores has 1: expected one for each"),
    ("tokenizer.ggml.bos_token_id", 999, "bos_token_id=999: expected an id"),
  ],
)
def test_metadata_that_cannot_be(tmp_path, monkeypatch, key, value, message):
  file, _ = write(tmp_path, "llama")
  read = gguf_head.read

  def change(path):
    head = read(path)
    head.metadata[key] = np.asarray(value) if isinstance(value, list) else value
    return head

  monkeypatch.setattr(gguf_head, "read", change)
  with pytest.raises(ValueError, match=f"x.gguf.*({message})"):
    Tokenizer.load(file)
    gemma_funnel.load(file)


def test_damaged_files_are_read_or_refused(tmp_path):
  """Five hundred: nothing else is raised, and no more is allocated."""
  file, hf = write(tmp_path, "llama tied", gguf.GGMLQuantizationType.Q8_0)
  data, rng = file.read_bytes(), np.random.default_rng(0)
  names = [t.name for t in huggingface.tensors(convert.describe(hf).config)]
  from gemma_funnel.convert.gguf import GGUFTensors, read_config

  refused = 0
  for case in range(500):
    changed = bytearray(data)
    head = data.index(b"token_embd") + 2000
    match case % 5:
      case 0:
        del changed[int(rng.integers(0, len(data))) :]
      case 1:  # A flipped bit of what comes before values.
        changed[int(rng.integers(0, head))] ^= 1 << int(rng.integers(0, 8))
      case 2:  # A huge number.
        at = int(rng.integers(0, head))
        changed[at : at + 8] = b"\xff" * int(rng.integers(3, 9))
      case 3:
        at, size = rng.integers(0, head), rng.integers(1, 40)
        changed[at : at + size] = rng.bytes(int(size))
      case 4:
        at, size = rng.integers(0, head), rng.integers(1, 40)
        del changed[int(at) : int(at + size)]
    file.write_bytes(changed)
    tracemalloc.start()
    try:
      read_config(file)
      Tokenizer.load(file)
      reader = GGUFTensors(file)
      for name in names:
        if name in reader.tensors:
          reader.read(name)
    except ValueError as error:
      refused += 1
      assert "\n" not in str(error)[:200]
    finally:
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
    assert peak < 8 * len(data) + (4 << 20), case
  assert refused > 200
