"""GGUF files as Hugging Face's: names of tensors, configuration, tokenizer.

llama.cpp's converter adds 1 to a Gemma's norms, reorders the rows of a Llama's
queries and keys (it rotates adjacent pairs, not halves), and leaves out what
its own code knows of a family. Here that is undone; what a family is stays in
`families`.
"""

from collections.abc import Iterator, Mapping
import json
import math
import os
import re
import struct
from typing import Any

import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import families
from gemma_funnel.convert.gguf_file import GGUFFile
from gemma_funnel.convert.tensor_io import Header, Index
from gemma_funnel.data.tokenizer import CONFIGS, FILES, MASK_PIECE

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


# --- The tokenizer.

# SentencePiece's types of pieces, and llama.cpp's.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"
# How text is cut before bytes are merged, by llama.cpp's name for it.
_CUTS = {
  "default": (_GPT2,),
  "gpt-2": (_GPT2,),
  "smollm": (r"\p{N}", _GPT2),
  "llama-bpe": (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
  "qwen2": (_QWEN2,),
  "deepseek-r1-qwen": (_QWEN2,),
}
_NFC = ("qwen2",)
# Words that are tokens already are not merged anew.
_IGNORE_MERGES = ("llama-bpe",)


def read_tokenizer(
  path: str | os.PathLike[str],
) -> tuple[bytes, dict[str, str]]:
  """A file's tokenizer: (the content of a file of its own, `special`).

  The content is a SentencePiece model's or a tokenizer.json's, the rest as
  `tokenizer.read_special` gives it.

  Raises:
    ValueError: it has none, or one that is damaged or of an unknown kind.
  """
  file = GGUFFile(path)
  data = _TokenizerData(file)
  special = data.special()
  if data.kind == "llama":
    return data.sentencepiece(), {}
  return data.json(), special


def companions(path: str | os.PathLike[str]) -> dict[str, bytes]:
  """The files of a file's tokenizer, by name; its chat template is kept."""
  file = GGUFFile(path)
  data = _TokenizerData(file)
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


class _TokenizerData:
  """What metadata say of a tokenizer."""

  def __init__(self, file: GGUFFile):
    self._file = file
    self.kind = self.get("model", str)
    require(
      self.kind in ("llama", "gpt2"),
      f"{file.where}: tokenizer.ggml.model={self.kind!r}: expected 'llama' "
      "(SentencePiece) or 'gpt2' (merges of bytes)",
    )
    tokens = self.get("tokens", list)
    require(
      bool(tokens) and all(isinstance(t, bytes) for t in tokens),
      f"{file.where}: tokenizer.ggml.tokens: expected texts",
    )
    try:
      self.texts = [token.decode() for token in tokens]
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{file.where}: tokenizer.ggml.tokens: {error}"
      ) from error
    self.types = self._numbers("token_type", np.int32)
    self.ids = {}
    for key, name in _SPECIAL.items():
      found = self.get(f"{name}_token_id", int)
      require(
        found is None or 0 <= found < len(self.texts),
        f"{file.where}: tokenizer.ggml.{name}_token_id={found}: expected an id "
        f"below {len(self.texts)}",
      )
      if found is not None:
        self.ids[key] = found

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    whole = f"tokenizer.ggml.{key}"
    value = self._file.metadata.get(whole, default)
    require(
      isinstance(value, kind) or (value is default and default is None),
      f"{self._file.where}: {whole}={value!r:.60}: expected {kind.__name__}",
    )
    return value

  def special(self) -> dict[str, str]:
    """What special tokens are called; "add_bos" is "no" without BOS."""
    found = {key: self.texts[i] for key, i in self.ids.items()}
    adds = self.get("add_bos_token", bool, self.kind == "llama")
    return found if adds else found | {"add_bos": "no"}

  def _numbers(self, key: str, dtype: type) -> np.ndarray:
    values = self.get(key, np.ndarray)
    found = "none" if values is None else len(values)
    require(
      values is not None and len(values) == len(self.texts),
      f"{self._file.where}: tokenizer.ggml.{key} has {found}: expected one for "
      f"each of the {len(self.texts)} tokens",
    )
    return values.astype(dtype)

  def sentencepiece(self) -> bytes:
    """A ModelProto of SentencePiece's (sentencepiece_model.proto)."""
    scores = self._numbers("scores", np.float32)
    out = bytearray()
    around = {*self.ids.values()}
    for i, (text, score) in enumerate(zip(self.texts, scores, strict=True)):
      kind = int(self.types[i])
      # Marks of a chat's turns are special to others, and stand in texts.
      if kind == _CONTROL and i not in around and text != MASK_PIECE:
        kind = _USER
      if i == self.ids.get("unk"):
        kind = _UNKNOWN
      if kind == _USER:
        text = text.replace(" ", "\u2581")
      piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
      out += _field(1, piece + _number(3, kind))
    ids = {key: self.ids.get(key, -1) for key in _SPECIAL}
    trainer = _number(3, 2)  # BPE.
    trainer += _number(4, len(self.texts)) + _number(35, 1)  # Bytes.
    for number, key in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
      trainer += _number(number, ids[key])
    for number, key in ((45, "unk"), (46, "bos"), (47, "eos"), (48, "pad")):
      if ids[key] >= 0:
        trainer += _field(number, self.texts[ids[key]].encode())
    prefix = self.get("add_space_prefix", bool, True)
    spaces = self.get("remove_extra_whitespaces", bool, False)
    normalizer = _field(1, b"identity") + _number(3, int(prefix))
    normalizer += _number(4, int(spaces)) + _number(5, 1)
    out += _field(2, trainer) + _field(3, normalizer)
    return bytes(out)

  def json(self) -> bytes:
    """A tokenizer.json of byte-level merges."""
    cut = self.get("pre", str, "default")
    where = self._file.where
    require(
      cut in _CUTS,
      f"{where}: tokenizer.ggml.pre={cut!r}: how text is cut is not known. "
      f"Expected one of {list(_CUTS)}, or --tokenizer=FILE",
    )
    merges = self.get("merges", list)
    require(
      merges is not None and all(m.count(b" ") == 1 for m in merges),
      f"{where}: tokenizer.ggml.merges: expected pairs of texts",
    )
    require(
      len(set(self.texts)) == len(self.texts),
      f"{where}: tokenizer.ggml.tokens has a text twice",
    )
    split = lambda pattern: dict(
      type="Split",
      pattern={"Regex": pattern},
      behavior="Isolated",
      invert=False,
    )
    level = dict(
      type="ByteLevel",
      add_prefix_space=False,
      trim_offsets=True,
      use_regex=False,
    )
    content = dict(
      version="1.0",
      truncation=None,
      padding=None,
      added_tokens=list(self._added()),
      normalizer={"type": "NFC"} if cut in _NFC else None,
      pre_tokenizer=dict(
        type="Sequence", pretokenizers=[*map(split, _CUTS[cut]), level]
      ),
      post_processor=None,
      decoder={**level, "use_regex": True},
      model=dict(
        type="BPE",
        vocab={text: i for i, text in enumerate(self.texts)},
        merges=[m.decode().split(" ") for m in merges],
        ignore_merges=cut in _IGNORE_MERGES,
      ),
    )
    return json.dumps(content, ensure_ascii=False).encode()

  def _added(self) -> Iterator[Mapping[str, Any]]:
    """Tokens that are found in a text before it is cut."""
    for i, (text, kind) in enumerate(zip(self.texts, self.types, strict=True)):
      if kind in (_CONTROL, _USER):
        yield dict(
          id=i,
          content=text,
          single_word=False,
          lstrip=False,
          rstrip=False,
          normalized=False,
          special=bool(kind == _CONTROL),
        )


def _varint(value: int) -> bytes:
  value &= (1 << 64) - 1
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*out, value])


def _field(number: int, value: bytes) -> bytes:
  """A field of a protocol buffer that holds bytes."""
  return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
  """A field of a protocol buffer that holds an integer."""
  return _varint(number << 3) + _varint(value)
