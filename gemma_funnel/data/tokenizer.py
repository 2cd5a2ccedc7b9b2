"""Text to token ids and back: SentencePiece models, tokenizer.json, training.

A `tokenizer.json` of Hugging Face's is read by the package tokenizers. What its
special tokens are called is said in the files beside it.

Training is lossless by construction: no normalisation, all whitespace kept,
bytes for characters outside the vocabulary, so `decode(encode(x)) == x`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import io
import json
import os
import re
from typing import Any

from etils import epath

from gemma_funnel import atomic, buckets, inputs
from gemma_funnel.checks import require
from gemma_funnel.data import gguf_tokenizer
from gemma_funnel.data.documents import Document, key_of

# Gemma's, which trained tokenizers have.
PAD_ID = 0
EOS_ID = 1
BOS_ID = 2
UNK_ID = 3
MASK_ID = 4
MASK_PIECE = "<mask>"
# What a tokenizer's file is called, by whether it is JSON.
FILES = {False: "tokenizer.model", True: "tokenizer.json"}
SPECIAL = ("pad", "eos", "bos", "unk", "mask")
# Beside a tokenizer.json: what its special tokens are called, newest first.
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
# Where no file says it.
_USUAL = dict(
  pad=("<pad>",),
  eos=("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
  bos=("<bos>", "<s>", "<|begin_of_text|>"),
  unk=("<unk>",),
  mask=(MASK_PIECE,),
)
# What texts begin with where they have no BOS.
_BETWEEN = "<|endoftext|>"
# Tokens around texts, which are none within one; those of a chat's turns are.
_AROUND = re.compile(
  r"<(pad|eos|bos|unk|s|/s)>|<\|(endoftext|begin_of_text|end_of_text)\|>"
)

# SentencePiece writes a space as this character, so it cannot tell the
# character itself from a space; only its UTF-8 bytes as tokens are lossless.
_SPACE_SYMBOL = "\u2581"
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in _SPACE_SYMBOL.encode()]
# Spaces, case, a ligature, and a character that no vocabulary has.
_PROBE = "  Two\t spaces,\n\ufb01\ue000 "
# SentencePiece skips sentences above a length in bytes: texts are cut.
_SENTENCE_CHARS = 1000
_SAMPLE_BYTES = 16 << 20


class _SentencePiece:
  """A SentencePiece model."""

  def __init__(self, model: bytes, name: str):
    import sentencepiece

    sp = self._processor = sentencepiece.SentencePieceProcessor()
    try:
      sp.LoadFromSerializedProto(model)
    except (RuntimeError, OSError) as e:
      raise ValueError(
        f"tokenizer {name}: not a SentencePiece model of {len(model)} bytes, "
        f"or a damaged one: {e}"
      ) from e
    self.vocab_size = sp.vocab_size()
    mask = sp.piece_to_id(MASK_PIECE)
    ids = dict(
      pad=sp.pad_id(),
      eos=sp.eos_id(),
      bos=sp.bos_id(),
      unk=sp.unk_id(),
      mask=-1 if mask == sp.unk_id() else mask,
    )
    self.special_ids = {k: None if i < 0 else i for k, i in ids.items()}
    self.piece, self.encode = sp.id_to_piece, sp.encode
    self.byte_ids = [
      None if (i := sp.piece_to_id(piece)) == sp.unk_id() else i
      for piece in _SPACE_BYTES
    ]

  def decode(self, ids: list[int]) -> str:
    sp = self._processor
    drop = lambda i: sp.is_control(i) or i == self.special_ids["unk"]
    return sp.decode([i for i in ids if not drop(i)])


def _byte_of() -> dict[str, int]:
  """The byte that each character of a byte-level vocabulary stands for.

  GPT-2's: printable bytes are themselves, the others follow from 256 on.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  codes = [*plain, *range(256, 256 + len(others))]
  return {chr(c): byte for c, byte in zip(codes, plain + others, strict=True)}


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Drops what is written to the process's stderr, whoever writes it."""
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


class _HuggingFace:
  """A `tokenizer.json`, which gives text back as it was."""

  def __init__(self, model: bytes, name: str, special: Mapping[str, str]):
    try:
      import tokenizers  # An extra: few files need it.
    except ImportError as e:
      raise ValueError(
        f"tokenizer {name}: a Hugging Face tokenizer.json needs the package "
        "tokenizers; expected pip install 'gemma-funnel[hf]'"
      ) from e
    try:
      content = json.loads(model)
      # What would change text or draw ids. With a prefix that its pieces lack,
      # the package ends the process.
      for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        value = content["model"].get(key)
        require(not value, f"its model has {key}={value!r}; expected none")
      added = content.get("added_tokens", [])
      for token in added:
        # Files flag tokens of a chat's turns as special too, though text has
        # them; what stands around texts is none in text.
        if token["content"] != MASK_PIECE:
          token["special"] = bool(_AROUND.fullmatch(token["content"]))
      # Ids of the text alone, and all; decode() is here.
      content |= dict.fromkeys(
        ("truncation", "padding", "post_processor", "decoder")
      )
      with _without_stderr():  # Where Rust shows a panic.
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
      moved = [
        token["content"]
        for token in added
        if tokenizer.token_to_id(token["content"]) != token["id"]
      ]
    except (KeyboardInterrupt, SystemExit):
      raise
    # The package raises no narrower one, and a panic of Rust is none at all.
    except BaseException as e:
      raise ValueError(
        f"tokenizer {name}: not a Hugging Face tokenizer.json of "
        f"{len(model)} bytes, or a damaged one: {e!r}"
      ) from e
    require(
      not moved,
      f"tokenizer {name}: the ids of its added tokens {moved[:5]} are not "
      "those in its vocabulary, or leave a gap",
    )
    # Special tokens in text are text. (It could be taken for the opposite.)
    tokenizer.encode_special_tokens = True
    self._tokenizer, self._name = tokenizer, name
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    # Not their number: there may be gaps.
    self.vocab_size = 1 + max(vocab.values(), default=-1)
    self.special_ids = {
      key: next((vocab[p] for p in _names(key, special) if p in vocab), None)
      for key in SPECIAL
    }
    self.between_id = vocab.get(_BETWEEN)
    self.piece = tokenizer.id_to_token
    pieces = {t["content"] for t in added}
    dropped = {t["id"] for t in added if t["special"]}
    bytelevel = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
    byte_of = _byte_of()
    self.byte_ids = [None if bytelevel else vocab.get(p) for p in _SPACE_BYTES]
    self._utf8 = {
      i: bytes(byte_of[c] for c in piece)
      if bytelevel and piece not in pieces and set(piece) <= byte_of.keys()
      else (piece if bytelevel else piece.replace(_SPACE_SYMBOL, " ")).encode()
      for piece, i in vocab.items()
    }
    for byte in range(256):
      if (piece := f"<0x{byte:02X}>") in vocab and not bytelevel:
        self._utf8[vocab[piece]] = bytes([byte])
    dropped.add(self.special_ids["unk"])
    self._utf8 |= dict.fromkeys(dropped, b"")

  def encode(self, text: str) -> list[int]:
    try:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:  # A panic of Rust's is no Exception.
      raise ValueError(
        f"tokenizer {self._name}: cannot encode {text[:40]!r}: {error}"
      ) from error

  def decode(self, ids: list[int]) -> str:
    # Not the package's decode: where one of adjacent bytes is no text, it
    # replaces all of them, so that text would change as tokens are added.
    whole = b"".join(self._utf8.get(i, b"") for i in ids)
    # Surrogates are no UTF-8: all there are stand for a byte that is no text.
    text = whole.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


def _names(key: str, special: Mapping[str, str]) -> Sequence[str]:
  """What a special token may be called, the first that there is."""
  return [special[key]] if key in special else _USUAL[key]


def is_json(path: str | os.PathLike[str]) -> bool:
  """Whether a tokenizer's file is a tokenizer.json, by its content."""
  with inputs.open_file(path, inputs.MAX_TOKENIZER) as file:
    return file.read(64).lstrip().startswith(b"{")


def read_special(folder: str | os.PathLike[str]) -> dict[str, str]:
  """What the files beside a tokenizer.json call its special tokens.

  Returns:
    By the names of `SPECIAL`; "add_bos" is "no" where texts begin without.
  """
  found: dict[str, str] = {}
  for name in reversed(CONFIGS):
    path = epath.Path(folder) / name
    if not path.exists():
      continue
    try:
      raw = json.loads(inputs.read_bytes(path, inputs.MAX_JSON))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path} cannot be read: {error}") from error
    require(isinstance(raw, dict), f"{path}: expected a JSON object")
    for key in SPECIAL:
      token = raw.get(f"{key}_token")
      # An object where spaces around it matter.
      token = token.get("content") if isinstance(token, dict) else token
      if isinstance(token, str):
        found[key] = token
    if raw.get("add_bos_token") is False:
      found["add_bos"] = "no"
  return found


def _added_beside(folder: str | os.PathLike[str]) -> dict[str, int]:
  """The ids of tokens that files beside a SentencePiece model add to it."""
  added: dict[str, int] = {}
  for name in (CONFIGS[0], "added_tokens.json"):
    raw = _peek(epath.Path(folder) / name)
    if name == CONFIGS[0]:
      entries = raw.get("added_tokens_decoder")
      entries = entries.items() if isinstance(entries, dict) else ()
      raw = {
        token.get("content"): int(i)
        for i, token in entries
        if isinstance(token, dict) and i.isdecimal()
      }
    added |= {t: i for t, i in raw.items() if type(t) is str and type(i) is int}
  return added


def _peek(path: epath.Path) -> dict[str, Any]:
  """The object that a JSON file holds; {} if it is not there or is damaged."""
  try:
    raw = json.loads(inputs.read_bytes(path, inputs.MAX_TOKENIZER))
  except (ValueError, RecursionError):
    return {}
  return raw if isinstance(raw, dict) else {}


def choose(
  model: str | os.PathLike[str], other: str | os.PathLike[str]
) -> str | os.PathLike[str]:
  """Which of a SentencePiece model and a tokenizer.json beside it to use.

  The model, unless the other one has tokens that it lacks, as fine-tuned ones
  do whose chat has marks of its own.
  """
  tokens = _peek(epath.Path(other)).get("added_tokens")
  added = {
    token["content"]: token["id"]
    for token in (tokens if isinstance(tokens, list) else ())
    if isinstance(token, dict) and {"content", "id"} <= token.keys()
  }
  try:
    found = Tokenizer(inputs.read_bytes(model, inputs.MAX_TOKENIZER))
  except ValueError:
    return model  # Whoever loads it is told.
  return other if found._lacks(added) else model


class Tokenizer:
  """Text to token ids and back. Can be pickled (grain's workers need it).

  Text never has padding, EOS, BOS or the unknown token: "<bos>" is five
  characters. "<mask>" is text too if the file has it as a control symbol
  (SentencePiece) or a special token (Hugging Face), as trained ones do. Symbols
  that a file defines for use in text, "<start_of_turn>" in Gemma's, are one id.

  Attributes:
    name: what error messages call it: its path if it has one.
    content: the file's content.
    special: what special tokens are called, as `read_special` gives it.
    is_json: whether it is a Hugging Face `tokenizer.json`.
    vocab_size: pieces, special ones included; ids are below it.
    piece: a function of an id: how the token is written in the vocabulary.
    bos_id, eos_id: what a text begins with and ends in; where a vocabulary has
      no BOS, what stands between texts.
    pad_id, unk_id, mask_id: None where there is none.
  """

  def __init__(
    self,
    model: bytes,
    name: str = "tokenizer",
    special: Mapping[str, str] | None = None,
  ):
    """Reads the content of a SentencePiece model or of a `tokenizer.json`.

    Raises:
      ValueError: neither of them, one without an EOS, a `tokenizer.json` that
        does not give text back as it was, or one without the package
        tokenizers.
    """
    self.content, self.name = bytes(model), name
    self.special = dict(special or {})
    # SentencePiece has the length of "<pad>" there, after a tag that is "\n".
    self.is_json = self.content.lstrip().startswith(b"{")
    if self.is_json:
      self._backend = _HuggingFace(self.content, name, self.special)
    else:
      self._backend = _SentencePiece(self.content, name)
    self.vocab_size = self._backend.vocab_size
    self.piece = self._backend.piece
    ids = self._backend.special_ids
    self.pad_id, self.unk_id, self.mask_id = ids["pad"], ids["unk"], ids["mask"]
    self.eos_id, bos = ids["eos"], ids["bos"]
    if self.is_json and (bos is None or self.special.get("add_bos") == "no"):
      between = self._backend.between_id
      bos = self.eos_id if bos is None else bos
      bos = bos if between is None else between
    require(
      self.eos_id is not None and bos is not None,
      f"tokenizer {name}: it has no {'eos' if bos is not None else 'bos'} token: "
      f"expected one of {_USUAL['eos']}, or one that {CONFIGS[0]} beside it "
      "names",
    )
    self.bos_id: int = bos
    # A tokenizer.json can hold any normaliser and any code for bytes.
    text = self.decode(self.encode(_PROBE)) if self.is_json else _PROBE
    require(
      text == _PROBE,
      f"tokenizer {name}: {_PROBE!r} comes back as {text!r}; expected a "
      "tokenizer.json that changes no text: Gemma's, which has "
      f"{_SPACE_SYMBOL!r} for a space and bytes for other characters, or one "
      "of bytes",
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Tokenizer":
    """Reads a file; its content tells the format, not the name.

    Of a tokenizer.json, what its special tokens are is read from the files
    beside it, `CONFIGS`. A GGUF file has a tokenizer too.

    Raises:
      ValueError: the file cannot be read, or see `__init__`.
    """
    if inputs.is_gguf(path):
      content, special = gguf_tokenizer.read(path)
      return cls(content, os.fspath(path), special)
    try:
      model = inputs.read_bytes(path, inputs.MAX_TOKENIZER)
    except ValueError as error:
      raise ValueError(
        f"tokenizer {error}; expected a SentencePiece model or a Hugging Face "
        "tokenizer.json"
      ) from error
    folder = epath.Path(path).parent
    if model.lstrip().startswith(b"{"):
      return cls(model, os.fspath(path), read_special(folder))
    found = cls(model, os.fspath(path))
    lacks = found._lacks(_added_beside(folder))
    require(
      not lacks,
      f"tokenizer {found.name} lacks the tokens {lacks[:5]}, which the files "
      "beside it add: expected a tokenizer.json there, which has them all",
    )
    return found

  def _lacks(self, added: Mapping[str, int]) -> list[str]:
    """Those of added tokens that it has not, or with another id."""
    return [
      text
      for text, i in added.items()
      if not 0 <= i < self.vocab_size or self.piece(i) != text
    ]

  def save(self, folder: str | os.PathLike) -> str:
    """Writes it to a folder, where `load` finds all of it; returns the path."""
    path = epath.Path(folder) / FILES[self.is_json]
    if self.special:
      raw = {f"{k}_token": v for k, v in self.special.items() if k in SPECIAL}
      raw["add_bos_token"] = self.special.get("add_bos") != "no"
      text = json.dumps(raw, indent=2) + "\n"
      atomic.write_text(path.parent / CONFIGS[0], text)
    atomic.write_bytes(path, self.content)
    return os.fspath(path)

  def __reduce__(self):
    return Tokenizer, (self.content, self.name, self.special)

  @property
  def sha256(self) -> str:
    """The hash of the content, in hexadecimal."""
    return hashlib.sha256(self.content).hexdigest()

  def encode(self, text: str) -> list[int]:
    """The token ids of `text`, without BOS and EOS.

    Raises:
      ValueError: a lone surrogate, which UTF-8 cannot express.
    """
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise ValueError(
        f"text has the lone surrogate {text[e.start]!r} at character "
        f"{e.start}, which UTF-8 cannot express"
      ) from e
    symbol = self._backend.byte_ids
    if _SPACE_SYMBOL not in text or None in symbol:
      return self._backend.encode(text)
    first, *rest = text.split(_SPACE_SYMBOL)
    ids = self._backend.encode(first)
    for part in rest:
      ids += symbol + self._backend.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids (ints or numpy integers).

    Those that no text has, such as EOS, are dropped.

    Each byte that is not valid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    ids = list(map(int, ids))
    for i in ids:
      if not 0 <= i < self.vocab_size:
        raise ValueError(
          f"token id {i}: tokenizer {self.name} has ids 0 to "
          f"{self.vocab_size - 1}"
        )
    return self._backend.decode(ids)


def _sample(documents: Sequence[Document], max_bytes: int) -> Iterator[str]:
  """Sentences of whole documents in the order of their keys' hashes."""
  # Keys alone: a corpus that is read from files may not fit in memory.
  hash_of = lambda i: hashlib.sha256(key_of(documents, i).encode()).digest()
  size = 0
  for i in sorted(range(len(documents)), key=hash_of):
    text = documents[i].text
    # Sentences keep their line ends, or none would be part of a piece.
    for start in range(0, len(text), _SENTENCE_CHARS):
      sentence = text[start : start + _SENTENCE_CHARS]
      yield sentence
      size += len(sentence.encode())
      if size >= max_bytes:
        return


def train(
  documents: Sequence[Document],
  vocab_size: int,
  path: str | os.PathLike,
  *,
  sample_bytes: int = _SAMPLE_BYTES,
) -> Tokenizer:
  """Trains a lossless byte-pair tokenizer and writes it to `path`.

  The result depends on the documents alone, not on their order or the number
  of cores, so that several processes may train the same file at once.

  Args:
    documents: the training split.
    vocab_size: pieces of the result, among them 5 special ones, 256 bytes and
      the characters of the text.
    path: where to write the model; directories are made.
    sample_bytes: UTF-8 bytes of text to train on at most: whole documents, in
      the order of a hash of their keys.

  Raises:
    ValueError: no documents, or `vocab_size` is too small for the characters
      of the text or too large for its amount.
  """
  import sentencepiece

  name = os.fspath(path)
  require(len(documents), f"tokenizer {name}: no documents to train on")
  # Read first: an error of a file would not come through SentencePiece.
  sample = list(_sample(documents, sample_bytes))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sample),
      model_writer=model,
      vocab_size=vocab_size,
      model_type="bpe",
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      # A character has at most 4 bytes of UTF-8.
      max_sentence_length=4 * _SENTENCE_CHARS + 1,
      pad_id=PAD_ID,
      eos_id=EOS_ID,
      bos_id=BOS_ID,
      unk_id=UNK_ID,
      # A control symbol never matches text, so "<mask>" in text is kept.
      control_symbols=[MASK_PIECE],
      num_threads=os.cpu_count() or 1,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as e:
    raise ValueError(
      f"vocab_size={vocab_size}: cannot train a tokenizer of that size on "
      f"{len(documents)} documents: {e}"
    ) from e
  if not buckets.is_remote(name):  # A bucket has no folders.
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
  atomic.write_bytes(name, model.getvalue())
  return Tokenizer(model.getvalue(), name)


def find_in(folder: str | os.PathLike) -> str | None:
  """The tokenizer in a folder; None if there is none."""
  paths = (epath.Path(folder) / name for name in FILES.values())
  return next((os.fspath(path) for path in paths if path.exists()), None)


def find_tokenizer(
  path: str | os.PathLike | None, cache_path: str | os.PathLike, vocab_size: int
) -> Tokenizer | None:
  """The tokenizer at `path`, else the one at `cache_path`, else None.

  That of `path` may have fewer pieces than the model's `vocab_size`; the cached
  one, which an earlier run has trained, must have as many.

  Raises:
    ValueError: a file that cannot be loaded, or with another number of pieces.
  """
  if path:
    found = Tokenizer.load(path)
    require(
      found.vocab_size <= vocab_size,
      f"tokenizer {found.name} has {found.vocab_size} pieces, the model has "
      f"vocab_size={vocab_size}; expected at least as many",
    )
    return found
  if not epath.Path(cache_path).exists():
    return None
  found = Tokenizer.load(cache_path)
  require(
    found.vocab_size == vocab_size,
    f"tokenizer {found.name} was trained with {found.vocab_size} pieces, the "
    f"model has vocab_size={vocab_size}; delete the file, or use "
    f"vocab_size={found.vocab_size}",
  )
  return found
