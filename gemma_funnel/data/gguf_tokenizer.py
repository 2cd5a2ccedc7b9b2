"""A GGUF file's tokenizer as a file of its own: SentencePiece or tokenizer.json."""

from collections.abc import Iterator, Mapping
import json
import os
import struct
from typing import Any

import numpy as np

from gemma_funnel import gguf_head
from gemma_funnel.checks import require

# A control symbol, which never is text.
_MASK = "<mask>"
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


def read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, str]]:
  """A file's tokenizer: (the content of a file of its own, `special`).

  The content is a SentencePiece model's or a tokenizer.json's, the rest as
  `tokenizer.read_special` gives it.

  Raises:
    ValueError: it has none, or one that is damaged or of an unknown kind.
  """
  head = gguf_head.read(path)
  data = TokenizerData(head.where, head.metadata)
  special = data.special()
  if data.kind == "llama":
    return data.sentencepiece(), {}
  return data.json(), special


class TokenizerData:
  """What metadata say of a tokenizer."""

  def __init__(self, where: str, metadata: Mapping[str, Any]):
    self._where, self._metadata = where, metadata
    self.kind = self.get("model", str)
    require(
      self.kind in ("llama", "gpt2"),
      f"{where}: tokenizer.ggml.model={self.kind!r}: expected 'llama' "
      "(SentencePiece) or 'gpt2' (merges of bytes)",
    )
    tokens = self.get("tokens", list)
    require(
      bool(tokens) and all(isinstance(t, bytes) for t in tokens),
      f"{where}: tokenizer.ggml.tokens: expected texts",
    )
    try:
      self.texts = [token.decode() for token in tokens]
    except UnicodeDecodeError as error:
      raise ValueError(f"{where}: tokenizer.ggml.tokens: {error}") from error
    self.types = self._numbers("token_type", np.int32)
    self.ids = {}
    for key, name in _SPECIAL.items():
      found = self.get(f"{name}_token_id", int)
      require(
        found is None or 0 <= found < len(self.texts),
        f"{where}: tokenizer.ggml.{name}_token_id={found}: expected an id "
        f"below {len(self.texts)}",
      )
      if found is not None:
        self.ids[key] = found

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    whole = f"tokenizer.ggml.{key}"
    value = self._metadata.get(whole, default)
    require(
      isinstance(value, kind) or (value is default and default is None),
      f"{self._where}: {whole}={value!r:.60}: expected {kind.__name__}",
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
      f"{self._where}: tokenizer.ggml.{key} has {found}: expected one for "
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
      if kind == _CONTROL and i not in around and text != _MASK:
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
    where = self._where
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
