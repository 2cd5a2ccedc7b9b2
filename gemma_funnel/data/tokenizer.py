"""A tokenizer with Gemma's special ids, and its training.

It is a SentencePiece model, which training writes, or a Hugging Face
`tokenizer.json`, which the package tokenizers reads.

Training is lossless by construction: no normalisation, all whitespace kept,
bytes for characters outside the vocabulary, so `decode(encode(x)) == x`.
"""

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import io
import json
import os
import re

from etils import epath

from gemma_funnel import atomic, inputs
from gemma_funnel.checks import require
from gemma_funnel.data.documents import Document, key_of

PAD_ID = 0
EOS_ID = 1
BOS_ID = 2
UNK_ID = 3
MASK_ID = 4
MASK_PIECE = "<mask>"
NUM_SPECIAL = 5

# SentencePiece writes a space as this character, so it cannot tell the
# character itself from a space; only its UTF-8 bytes as tokens are lossless.
_SPACE_SYMBOL = "\u2581"
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
    self.special_ids = dict(
      pad=sp.pad_id(),
      eos=sp.eos_id(),
      bos=sp.bos_id(),
      unk=sp.unk_id(),
      mask=sp.piece_to_id(MASK_PIECE),
    )
    self.id_of, self.piece = sp.piece_to_id, sp.id_to_piece
    self.encode = sp.encode

  def decode(self, ids: list[int]) -> str:
    sp = self._processor
    return sp.decode([i for i in ids if not sp.is_control(i)])


class _HuggingFace:
  """A `tokenizer.json` like Gemma's, with the meaning of its SentencePiece."""

  def __init__(self, model: bytes, name: str):
    try:
      import tokenizers  # An extra: few files need it.
    except ImportError as e:
      raise ValueError(
        f"tokenizer {name}: a Hugging Face tokenizer.json needs the package "
        "tokenizers; expected pip install 'gemma-funnel[hf]'"
      ) from e
    try:
      content = json.loads(model)
      # What Gemma's has not, and would change text or draw ids. With a prefix
      # that its pieces lack, the package ends the process.
      for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        value = content["model"].get(key)
        require(not value, f"its model has {key}={value!r}; expected none")
      added = content.get("added_tokens", [])
      for token in added:
        # Special tokens are none in text, as in SentencePiece. Files flag
        # <start_of_turn> and <end_of_turn> too, though they are user-defined
        # symbols of Gemma's SentencePiece model, which text can have.
        if token["id"] != MASK_ID:
          token["special"] = token["id"] < NUM_SPECIAL
      # Ids of the text alone, and all; decode() is here.
      content |= dict.fromkeys(
        ("truncation", "padding", "post_processor", "decoder")
      )
      tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
      moved = [
        token["content"]
        for token in added
        if tokenizer.token_to_id(token["content"]) != token["id"]
      ]
    except Exception as e:  # The package raises no narrower one.
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
    self._tokenizer = tokenizer
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    # Not their number: there may be gaps.
    self.vocab_size = 1 + max(vocab.values(), default=-1)
    self.special_ids = {
      key: tokenizer.token_to_id(f"<{key}>")
      for key in ("pad", "eos", "bos", "unk", "mask")
    }
    self.id_of = lambda piece: vocab.get(piece, UNK_ID)
    self.piece = tokenizer.id_to_token
    self._utf8 = {
      i: piece.replace(_SPACE_SYMBOL, " ").encode()
      for piece, i in vocab.items()
    }
    for byte in range(256):
      if (piece := f"<0x{byte:02X}>") in vocab:
        self._utf8[vocab[piece]] = bytes([byte])

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    # Not the package's decode: where one of adjacent bytes is no text, it
    # replaces all of them, so that text would change as tokens are added.
    whole = b"".join(self._utf8.get(i, b"") for i in ids)
    # Surrogates are no UTF-8: all there are stand for a byte that is no text.
    text = whole.decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", "\ufffd", text)


class Tokenizer:
  """Text to token ids and back. Can be pickled (grain's workers need it).

  Text never has padding, EOS, BOS or the unknown token: "<bos>" is five
  characters. "<mask>" is text too if the file has it as a control symbol
  (SentencePiece) or a special token (Hugging Face), as trained ones do. Symbols
  that a file defines for use in text, "<start_of_turn>" in Gemma's, are one id.

  Attributes:
    name: what error messages call it: its path if it has one.
    content: the file's content.
    is_json: whether it is a Hugging Face `tokenizer.json`.
    vocab_size: pieces, special ones included; ids are below it.
    piece: a function of an id: how the token is written in the vocabulary.
  """

  def __init__(self, model: bytes, name: str = "tokenizer"):
    """Reads the content of a SentencePiece model or of a `tokenizer.json`.

    Raises:
      ValueError: neither of them, special ids other than Gemma's, a
        `tokenizer.json` that does not give text back as it was, or one without
        the package tokenizers.
    """
    self.content, self.name = bytes(model), name
    # SentencePiece has the length of "<pad>" there, after a tag that is "\n".
    self.is_json = self.content.lstrip().startswith(b"{")
    backend = _HuggingFace if self.is_json else _SentencePiece
    self._backend = backend(self.content, name)
    self.vocab_size = self._backend.vocab_size
    self.piece = self._backend.piece
    found = self._backend.special_ids
    expected = dict(
      pad=PAD_ID, eos=EOS_ID, bos=BOS_ID, unk=UNK_ID, mask=MASK_ID
    )
    require(
      found == expected,
      f"tokenizer {name}: its special ids are {found}; expected Gemma's, "
      f"{expected}",
    )
    self._space_symbol_ids = [
      self._backend.id_of(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()
    ]
    # A tokenizer.json can hold any normaliser and any code for bytes.
    text = self.decode(self.encode(_PROBE)) if self.is_json else _PROBE
    require(
      text == _PROBE,
      f"tokenizer {name}: {_PROBE!r} comes back as {text!r}; expected a "
      "tokenizer.json like Gemma's, which changes no text, has "
      f"{_SPACE_SYMBOL!r} for a space, and bytes for other characters",
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Tokenizer":
    """Reads a file; its content tells the format, not the name.

    Raises:
      ValueError: the file cannot be read, or see `__init__`.
    """
    try:
      model = inputs.read_bytes(path, inputs.MAX_TOKENIZER)
    except ValueError as error:
      raise ValueError(
        f"tokenizer {error}; expected a SentencePiece model or a Hugging Face "
        "tokenizer.json"
      ) from error
    return cls(model, os.fspath(path))

  def __reduce__(self):
    return Tokenizer, (self.content, self.name)

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
    if _SPACE_SYMBOL not in text or UNK_ID in self._space_symbol_ids:
      return self._backend.encode(text)
    first, *rest = text.split(_SPACE_SYMBOL)
    ids = self._backend.encode(first)
    for part in rest:
      ids += self._space_symbol_ids + self._backend.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of token ids (ints or numpy integers); special ids are dropped.

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
    return self._backend.decode([i for i in ids if i >= NUM_SPECIAL])


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
  if "://" not in name:  # A bucket has no folders.
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
  atomic.write_bytes(name, model.getvalue())
  return Tokenizer(model.getvalue(), name)


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
