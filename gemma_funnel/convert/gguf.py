"""GGUF files as Hugging Face's: names of tensors, configuration, tokenizer.

llama.cpp's converter adds 1 to a Gemma's norms, reorders the rows of a Llama's
queries and keys (it rotates adjacent pairs, not halves), and leaves out what
its own code knows of a family. Here that is undone; what a family is stays in
`families`.
"""

import json
import math
import os
import re
from typing import Any

import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import families
from gemma_funnel.convert.gguf_file import GGUFFile
from gemma_funnel.convert.tensor_io import Header, Index
from gemma_funnel.data.gguf_tokenizer import TokenizerData
from gemma_funnel.data.tokenizer import CONFIGS, FILES

# The family of each architecture.
_FAMILIES = {
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3": "gemma3_text",
  "llama": "llama",
  "mistral": "mistral",
  "qwen2": "qwen2",
}
# Those whose queries and keys are reordered.
_PERMUTED = ("llama", "mistral")
_TOP = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "post_attention_norm": "post_attention_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Keys behind the architecture's name, and config.json's.
_KEYS = {
  "block_count": "num_hidden_layers",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "context_length": "max_position_embeddings",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.sliding_window": "sliding_window",
  "attn_logit_softcapping": "attn_logit_softcapping",
  "final_logit_softcapping": "final_logit_softcapping",
  "rope.freq_base": "rope_theta",
  "rope.freq_base_swa": "rope_local_base_freq",
}
# Read besides, or of no weight.
_READ = (
  "attention.value_length",
  "rope.dimension_count",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
  "vocab_size",
)
# Models whose query scale is of width / heads, by family and layers, as in
# llama.cpp: Gemma 2 27B and Gemma 3 27B. Of others it is the width of a head.
_BY_WIDTH = {("gemma2", 46), ("gemma3_text", 62)}
# Llama 3.1's scaling, of which a file has the factor of each frequency alone.
_LLAMA3 = dict(
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)


class GGUFTensors:
  """A file's tensors as transformers has them; a `TensorReader`."""

  def __init__(self, path: str | os.PathLike[str]):
    """Reads headers.

    Raises:
      ValueError: see `GGUFFile`; an architecture or a tensor that is unknown.
    """
    self._file = GGUFFile(path)
    self.where = self._file.where
    self.family = _family_of(self._file)
    heads = _get(self._file, "attention.head_count", int)
    kv_heads = _get(self._file, "attention.head_count_kv", int, heads)
    self._heads = {"q_proj": heads, "k_proj": kv_heads}
    self._names: dict[str, str] = {}
    for name in self._file.tensors:
      if name != _ROPE_FACTORS:
        self._names[self._name_of(name)] = name
    self.tensors: dict[str, Header] = {
      new: self._file.tensors[old] for new, old in self._names.items()
    }
    for name, heads in self._heads.items() if self._is_permuted else ():
      for tensor, header in self.tensors.items():
        rows = header.shape[0]
        require(
          f".{name}." not in tensor or (heads > 0 and rows % (2 * heads) == 0),
          f"{self.where}: {self._names[tensor]!r} has {rows} rows: expected a "
          f"multiple of twice its {heads} heads",
        )

  @property
  def _is_permuted(self) -> bool:
    return self.family in _PERMUTED

  def _name_of(self, name: str) -> str:
    top = re.fullmatch(r"(\w+)\.weight", name)
    if top and top[1] in _TOP:
      return f"{_TOP[top[1]]}.weight"
    part = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
    ours = part and _LAYER.get(part[2])
    if part and part[2] == "ffn_norm":
      post_norms = self.family in ("gemma2", "gemma3_text")
      before = "pre_feedforward" if post_norms else "post_attention"
      ours = f"{before}_layernorm"
    require(
      bool(ours),
      f"{self.where} has a tensor {name!r}: it is none of a {self.family}",
    )
    return f"model.layers.{part[1]}.{ours}.{part[3]}"

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    old = self._names[name]
    part = next((p for p in self._heads if f".{p}." in name), None)
    if part and self._is_permuted:
      return self._unpermuted(old, self._heads[part], index)
    values = self._file.read(old, index)
    if self.family.startswith("gemma") and name.endswith("norm.weight"):
      return values.astype(np.float32) - np.float32(1)
    return values

  def _unpermuted(self, old: str, heads: int, index: Index) -> np.ndarray:
    """Rows in our order, of whole heads that hold those asked for."""
    rows = self._file.tensors[old].shape[0]
    width = rows // heads
    item, *rest = index or (slice(None),)
    single = not isinstance(item, slice)
    start, stop, _ = (slice(item, item + 1) if single else item).indices(rows)
    first = start // width
    last = max(first, -(-stop // width))
    values = self._file.read(old, (slice(first * width, last * width), *rest))
    pairs = values.reshape(last - first, width // 2, 2, *values.shape[1:])
    ours = pairs.swapaxes(1, 2).reshape(values.shape)
    ours = ours[start - first * width : stop - first * width]
    return ours[0] if single else ours


def read_config(path: str | os.PathLike[str]) -> TransformerConfig:
  """The model that a file's metadata describe, in float32.

  Raises:
    ValueError: an architecture that is unknown, or something that ours has
      not; it names the file and the key.
  """
  file = GGUFFile(path)
  raw = _raw_config(file)
  try:
    return families.to_config(raw)
  except ValueError as error:
    raise ValueError(f"{file.where}: {error}") from error


def _family_of(file: GGUFFile) -> str:
  name = file.metadata.get("general.architecture")
  require(
    isinstance(name, str) and name in _FAMILIES,
    f"{file.where}: general.architecture={name!r} is not supported: expected "
    f"one of {list(_FAMILIES)}",
  )
  return _FAMILIES[name]


def _get(file: GGUFFile, key: str, kind: type, default: Any = None) -> Any:
  """What metadata say behind the architecture's name."""
  whole = f"{file.metadata.get('general.architecture')}.{key}"
  value = file.metadata.get(whole, default)
  require(
    type(value) is kind or (value is None and whole not in file.metadata),
    f"{file.where}: {whole}={value!r:.60}: expected {kind.__name__}",
  )
  return value


def _raw_config(file: GGUFFile) -> dict[str, Any]:
  """The config.json of the model."""
  family = _family_of(file)
  start = f"{file.metadata['general.architecture']}."
  keys = {
    k.removeprefix(start): v
    for k, v in file.metadata.items()
    if k.startswith(start)
  }
  unknown = sorted(keys.keys() - {*_KEYS, *_READ})
  require(
    not unknown,
    f"{file.where} has {[start + key for key in unknown]}: expected none of "
    "these, which say of a model what is not known here",
  )
  raw: dict[str, Any] = {"model_type": family, "use_sliding_window": False}
  if family != "qwen2":
    del raw["use_sliding_window"]
  for theirs, ours in _KEYS.items():
    if theirs in keys:
      value = keys[theirs]
      # 1e-6 is a float32 there: the shortest number that rounds to it.
      raw[ours] = (
        float(str(np.float32(value))) if isinstance(value, float) else value
      )
  embedding = file.tensors.get("token_embd.weight")
  require(
    embedding is not None and len(embedding.shape) == 2,
    f"{file.where} has no matrix token_embd.weight",
  )
  raw["vocab_size"] = embedding.shape[0]
  raw["tie_word_embeddings"] = "output.weight" not in file.tensors
  heads = _get(file, "attention.head_count", int, 0)
  width = _get(file, "embedding_length", int, 0)
  head_dim = _get(file, "attention.key_length", int)
  if head_dim is None and heads > 0:
    head_dim = raw["head_dim"] = width // heads
  for key in ("attention.value_length", "rope.dimension_count"):
    value = _get(file, key, int, head_dim)
    require(
      value == head_dim,
      f"{file.where}: {start}{key}={value!r}: expected {head_dim!r}, the width "
      "of a head",
    )
  if family.startswith("gemma") and family != "gemma":
    by_width = (family, raw.get("num_hidden_layers")) in _BY_WIDTH
    scalar = width / heads if by_width and heads else head_dim
    raw["query_pre_attn_scalar"] = scalar
  if scaling := _scaling(file, family, raw):
    raw["rope_scaling"] = scaling
  return raw


def _scaling(file: GGUFFile, family: str, raw) -> dict[str, Any] | None:
  kind = _get(file, "rope.scaling.type", str, "none")
  factors = file.tensors.get(_ROPE_FACTORS)
  if factors is not None:
    return _llama3_scaling(file, raw)
  if kind == "none":
    return None
  return {"rope_type": kind, "factor": _get(file, "rope.scaling.factor", float)}


def _llama3_scaling(file: GGUFFile, raw) -> dict[str, Any]:
  """The scaling whose factor of each frequency the file has."""
  found = file.read(_ROPE_FACTORS).astype(np.float64)
  factor = float(found.max(initial=0))
  base, head_dim = raw.get("rope_theta", 10_000.0), 2 * found.size
  length = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  original = _LLAMA3["original_max_position_embeddings"]
  low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
  smooth = np.clip((original / length - low) / (high - low), 0, 1)
  wanted = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else found + 1
  require(
    found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-3),
    f"{file.where}: {_ROPE_FACTORS} is not of Llama 3's scaling of RoPE with "
    f"{_LLAMA3} and factor {factor:g}: no other is known",
  )
  return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def companions(path: str | os.PathLike[str]) -> dict[str, bytes]:
  """The files of a file's tokenizer, by name; its chat template is kept."""
  file = GGUFFile(path)
  data = TokenizerData(file.where, file.metadata)
  special, is_json = data.special(), data.kind == "gpt2"
  raw: dict[str, Any] = {
    f"{key}_token": text for key, text in special.items() if key != "add_bos"
  }
  raw["add_bos_token"] = special.get("add_bos") != "no"
  template = file.metadata.get("tokenizer.chat_template")
  if isinstance(template, str):
    raw["chat_template"] = template
  raw["tokenizer_class"] = "LlamaTokenizer"
  if is_json:
    raw["tokenizer_class"] = "PreTrainedTokenizerFast"
  elif _family_of(file).startswith("gemma"):
    raw["tokenizer_class"] = "GemmaTokenizer"
  text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
  content = data.json() if is_json else data.sentencepiece()
  return {FILES[is_json]: content, CONFIGS[0]: text.encode()}


def stop_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
  """Ids that end a text, and a turn; () is not said."""
  metadata = GGUFFile(path).metadata
  found = [metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot")]
  return tuple(dict.fromkeys(i for i in found if type(i) is int))
