"""Tokenizer: lossless, Gemma's ids, deterministic training, clear errors.

And a Hugging Face tokenizer.json does what SentencePiece does.
"""

import json
import pickle
import random
import sys
import types

import numpy as np
import pytest
import sentencepiece

from gemma_funnel import generate
from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib

VOCAB = 320
TEXTS = (
  "",
  " ",
  "   lead, trail   ",
  "a\n\n\n\tb\t\t c\r\nd\r",
  "\x00\x01\x0b\x0c\x1c\x85\u2028\xa0",
  "naïve façade é e\u0301 ﬁ Ａ",
  "漢字 עברית 🎉👩‍👩‍👧 \U0010ffff \ufffd \ufeff",
  "\u2581 \u2581\u2581x\u2581",
  "<mask><pad><s></s><bos><unk> <0x0A> ⁇",
  "0123456789" * 5,
  "x" * 10_000,
)


def _documents():
  text = "def f(x):\n    return x + 12\n\n\nclass Long:\n\tpass  # the end\n"
  return [
    sources.Document(f"{i}.py", text.replace("f(x)", f"f{i}(name_{i % 7})"))
    for i in range(40)
  ]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "trained.model"
  tokenizer_lib.train(_documents(), VOCAB, path)
  return path


@pytest.fixture(scope="module")
def content():
  """A tokenizer.json like Gemma's, flags of special tokens included."""
  hf = pytest.importorskip("tokenizers")
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
  made = hf.Tokenizer(
    hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  made.normalizer = hf.normalizers.Replace(" ", "\u2581")
  made.pre_tokenizer = hf.pre_tokenizers.Split(" ", "merged_with_previous")
  made.decoder = hf.decoders.Sequence(
    [
      hf.decoders.Replace("\u2581", " "),
      hf.decoders.ByteFallback(),
      hf.decoders.Fuse(),
    ]
  )
  made.post_processor = hf.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 2)]
  )
  pieces = [*special, "<start_of_turn>"]
  made.train_from_iterator(
    [d.text for d in _documents()],
    hf.trainers.BpeTrainer(
      vocab_size=VOCAB,
      special_tokens=pieces + [f"<0x{byte:02X}>" for byte in range(256)],
      show_progress=False,
    ),
  )
  content = json.loads(made.to_str())
  content["added_tokens"] = content["added_tokens"][: len(pieces)]
  return content


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request, tmp_path_factory):
  """Of either kind; what is said of it below holds for both."""
  if request.param == "sentencepiece":
    path = request.getfixturevalue("model_path")
  else:
    content = request.getfixturevalue("content")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
  return tokenizer_lib.Tokenizer.load(path)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(5 <= i < VOCAB for i in ids)


def _random_texts(seed):
  rng = random.Random(seed)
  common = "ab 12\n\t\r\u2581<>_é漢"
  for _ in range(200):
    chars = []
    for _ in range(rng.randrange(40)):
      char = chr(rng.randrange(rng.choice((0x7F, 0x3000, 0x110000))))
      is_surrogate = 0xD800 <= ord(char) < 0xE000
      chars.append(rng.choice(common) if is_surrogate else char)
      chars.append(rng.choice(common) * rng.randrange(3))
    yield "".join(chars)


@pytest.mark.parametrize("seed", range(4))
def test_round_trip_of_random_text(tokenizer, seed):
  for text in _random_texts(seed):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["a \ud800", "\u2581 \udfff", "\udc80"])
def test_a_lone_surrogate(tokenizer, text):
  with pytest.raises(ValueError, match="the lone surrogate '.ud.* UTF-8"):
    tokenizer.encode(text)


def test_special_ids_are_dropped_and_numpy_ids_are_taken(tokenizer):
  ids = tokenizer.encode("return x")
  row = np.asarray([2, *ids[:1], 4, 3, *ids[1:], 1, 0, 0], np.int32)
  assert tokenizer.decode(row) == "return x"
  assert tokenizer.decode([0, 1, 2, 3, 4]) == ""
  for bad in (-1, VOCAB):
    with pytest.raises(ValueError, match=f"id {bad}: .* 0 to {VOCAB - 1}"):
      tokenizer.decode([7, bad])


def test_vocab_size_and_pickle(tokenizer):
  assert tokenizer.vocab_size == VOCAB
  copy = pickle.loads(pickle.dumps(tokenizer))
  # Hugging Face's flag for special tokens is none of what the package pickles.
  text = "class <bos>Long"
  assert copy.encode(text) == tokenizer.encode(text)
  assert copy.name == tokenizer.name


def test_digits_are_split_and_text_is_compressed(model_path):
  tokenizer = tokenizer_lib.Tokenizer.load(model_path)
  assert len(tokenizer.encode("1212")) == 4
  text = _documents()[0].text
  assert len(tokenizer.encode(text)) < 0.7 * len(text)


@pytest.mark.parametrize("sample_bytes", [500, 1 << 20])
def test_training_does_not_depend_on_order(tmp_path, sample_bytes):
  paths = [tmp_path / "new" / name for name in ("a.model", "b.model")]
  for path, step in zip(paths, (1, -1), strict=True):
    tokenizer_lib.train(
      _documents()[::step], 300, path, sample_bytes=sample_bytes
    )
  assert paths[0].read_bytes() == paths[1].read_bytes()
  # Nothing temporary is left.
  assert sorted(paths[0].parent.iterdir()) == paths


def test_training_sample_is_bounded(tmp_path):
  # The rare characters of all but one document are outside of the sample.
  documents = [
    sources.Document(str(i), (chr(0x4E00 + i) + " some words here\n") * 99)
    for i in range(20)
  ]
  small = tokenizer_lib.train(
    documents, 290, tmp_path / "small.model", sample_bytes=1000
  )
  known = [len(small.encode(chr(0x4E00 + i))) == 1 for i in range(20)]
  assert sum(known) == 1


def test_training_is_quiet(capfd, tmp_path):
  tokenizer_lib.train(_documents(), VOCAB, tmp_path / "quiet.model")
  captured = capfd.readouterr()
  assert captured.out == captured.err == ""


@pytest.mark.parametrize("vocab_size", [97, 100_000])
def test_vocab_size_that_cannot_be_trained(tmp_path, vocab_size):
  path = tmp_path / "none.model"
  with pytest.raises(ValueError, match=f"vocab_size={vocab_size}: .*Vocabul"):
    tokenizer_lib.train(_documents(), vocab_size, path)
  with pytest.raises(ValueError, match="no documents to train on"):
    tokenizer_lib.train([], vocab_size, path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9])
def test_damaged_file(model_path, tmp_path, kept):
  model = model_path.read_bytes()
  path = tmp_path / "damaged.model"
  path.write_bytes(model[: int(kept * len(model))])
  with pytest.raises(ValueError, match="damaged.model: (not a|its special)"):
    tokenizer_lib.Tokenizer.load(path)


def test_files_of_something_else(tmp_path):
  path = tmp_path / "other.model"
  with pytest.raises(ValueError, match="other.model: cannot be read: No such"):
    tokenizer_lib.Tokenizer.load(path)
  path.write_bytes(b"this is text")  # It has SentencePiece's own words.
  with pytest.raises(ValueError, match="other.model: not a.*ParseFromArray"):
    tokenizer_lib.Tokenizer.load(path)


def test_other_special_ids(tmp_path):
  # SentencePiece's defaults: no pad, unk 0, bos 1, eos 2.
  path = tmp_path / "llama.model"
  with open(path, "wb") as f:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([d.text for d in _documents()]),
      model_writer=f,
      vocab_size=60,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  found = tokenizer_lib.Tokenizer.load(path)
  ids = (found.bos_id, found.eos_id, found.unk_id, found.pad_id, found.mask_id)
  assert ids == (1, 2, 0, None, None)


class TestFindTokenizer:
  def test_none_then_the_cache(self, model_path, tmp_path):
    find = tokenizer_lib.find_tokenizer
    assert find(None, tmp_path / "cache.model", VOCAB) is None
    assert find(None, model_path, VOCAB).name == str(model_path)

  def test_path_comes_first(self, model_path, tmp_path):
    cache = tmp_path / "cache.model"
    cache.write_text("of no use")
    found = tokenizer_lib.find_tokenizer(model_path, cache, VOCAB + 80)
    assert found.vocab_size == VOCAB

  def test_more_pieces_than_the_model(self, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="320 pieces.*vocab_size=319"):
      tokenizer_lib.find_tokenizer(tokenizer.name, tmp_path, VOCAB - 1)

  @pytest.mark.parametrize("vocab_size", [300, 400])
  def test_cache_of_another_size(self, model_path, vocab_size):
    with pytest.raises(
      ValueError, match=f"trained.model.*320 pieces.*={vocab_size}; delete"
    ):
      tokenizer_lib.find_tokenizer(None, model_path, vocab_size)


def _rename_pieces(source, path):
  """Our model with Gemma's names: SentencePiece's own are <s> and </s>."""
  pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
  model = pb.ModelProto.FromString(source.read_bytes())
  model.pieces[1].piece, model.pieces[2].piece = "<eos>", "<bos>"
  model.trainer_spec.eos_piece, model.trainer_spec.bos_piece = "<eos>", "<bos>"
  path.write_bytes(model.SerializeToString())


def _train_with_symbols(path):
  with open(path, "wb") as f:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([d.text for d in _documents()]),
      model_writer=f,
      vocab_size=VOCAB + 10,
      model_type="bpe",
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      pad_piece="<pad>",
      eos_piece="<eos>",
      bos_piece="<bos>",
      unk_piece="<unk>",
      user_defined_symbols=[
        "<mask>",
        "<unused0>",
        "<start_of_turn>",
        "<end_of_turn>",
        "\n\n",
        "\n\n\n",
        "\u2581\u2581",
        "\u2581\u2581\u2581",
        "<b>",
      ],
      minloglevel=2,
    )


class TestHuggingFace:
  """A tokenizer.json, made by the package that reads it."""

  TURN = 5

  @pytest.fixture
  def write(self, content, tmp_path):
    """Writes the file with changes: a function on its JSON, another name."""

    def call(change=lambda content: None, name="tokenizer.json"):
      copy = json.loads(json.dumps(content))
      change(copy)
      path = tmp_path / name
      path.write_text(json.dumps(copy, indent=2, ensure_ascii=False))
      return path

    return call

  @pytest.fixture
  def fast(self, write):
    return tokenizer_lib.Tokenizer.load(write())

  @pytest.fixture
  def oracle(self, write):
    """The package's own, told to take special tokens in text for text."""
    hf = pytest.importorskip("tokenizers")
    oracle = hf.Tokenizer.from_file(str(write()))
    oracle.encode_special_tokens = True
    return oracle

  @pytest.mark.parametrize("text", TEXTS)
  def test_is_the_package(self, fast, oracle, text):
    ids = fast.encode(text)
    assert oracle.decode(ids, skip_special_tokens=False) == text
    if "\u2581" not in text:  # The package makes it a space.
      assert ids == oracle.encode(text, add_special_tokens=False).ids

  def test_special_tokens_in_text(self, fast, write):
    for i, piece in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")):
      ids = fast.encode(f"a{piece}b")
      assert i not in ids
      assert fast.decode(ids) == f"a{piece}b"
    # Symbols for use in text are one id, though the file flags this one.
    ids = fast.encode("<start_of_turn>class\n")
    assert ids == [self.TURN, *fast.encode("class\n")]
    assert fast.decode(ids) == "<start_of_turn>class\n"

  def test_flags_of_special_tokens(self, write):
    def change(content):
      for token in content["added_tokens"]:
        token["special"] = False

    # Gemma's own file has no flag on <mask>: there, it is a symbol.
    fast = tokenizer_lib.Tokenizer.load(write(change))
    assert fast.encode("<mask>") == [tokenizer_lib.MASK_ID]
    assert not {0, 1, 2, 3} & set(fast.encode("<pad><eos><bos><unk>"))

  def test_bytes_that_are_no_text(self, fast):
    # Each becomes U+FFFD, and characters beside them stay.
    emoji = fast.encode("\U0001f389")
    assert len(emoji) == 4
    a = fast.encode("a")
    assert fast.decode([*emoji, *emoji[:3]]) == "\U0001f389" + 3 * "\ufffd"
    assert fast.decode([*emoji[1:], *a, *emoji]) == (
      3 * "\ufffd" + "a\U0001f389"
    )

  @pytest.mark.parametrize("seed", range(10))
  def test_streams_whole_characters(self, fast, seed):
    draw = random.Random(seed)
    if seed % 2:
      ids = draw.choices(range(VOCAB), k=60)
    else:
      letters = "ab \U0001f389é\u2581漢\ufffd\n"
      ids = fast.encode("".join(draw.choices(letters, k=30)))
    text, pieces, end = generate.Detokenizer(fast), [], 0
    while end < len(ids):
      end = min(len(ids), end + draw.randrange(5))
      pieces.append(text.feed(ids[:end]))
    pieces.append(text.finish())
    assert "".join(pieces) == fast.decode(ids)

  def test_a_gap_between_ids(self, write):
    def change(content):
      content["model"]["vocab"]["far"] = VOCAB + 9

    fast = tokenizer_lib.Tokenizer.load(write(change))
    assert fast.vocab_size == VOCAB + 10
    assert fast.decode([VOCAB, VOCAB + 9]) == "far"

  def test_neither_cut_nor_padded(self, write, fast):
    def change(content):
      content["truncation"] = dict(
        direction="Right", max_length=2, strategy="LongestFirst", stride=0
      )
      content["padding"] = dict(
        strategy={"Fixed": 50},
        direction="Right",
        pad_to_multiple_of=None,
        pad_id=0,
        pad_type_id=0,
        pad_token="<pad>",
      )

    text = "return x + 12"
    assert tokenizer_lib.Tokenizer.load(write(change)).encode(
      text
    ) == fast.encode(text)

  def test_content_says_what_it_is(self, write, model_path, tmp_path):
    load = tokenizer_lib.Tokenizer.load
    assert load(write(name="a.model")).encode("<start_of_turn>") == [self.TURN]
    (tmp_path / "b.json").write_bytes(model_path.read_bytes())
    assert load(tmp_path / "b.json").encode("<start_of_turn>") != [self.TURN]
    path = write()
    path.write_text("\n  " + path.read_text())
    assert load(path).vocab_size == VOCAB

  def test_without_the_package(self, write, model_path, monkeypatch):
    path = write()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert tokenizer_lib.Tokenizer.load(model_path).vocab_size == VOCAB
    with pytest.raises(
      ValueError, match=r"tokenizer.json: .*pip install 'gemma-funnel\[hf\]'"
    ):
      tokenizer_lib.Tokenizer.load(path)

  @pytest.mark.parametrize("kept", [2, 0.01, 0.5, 0.9, -1])
  def test_a_file_cut_off(self, write, kept):
    path = write()
    whole = path.read_bytes()
    path.write_bytes(
      whole[: int(kept * len(whole)) if isinstance(kept, float) else kept]
    )
    with pytest.raises(
      ValueError, match="tokenizer.json: not a Hugging Face tokenizer.json of"
    ):
      tokenizer_lib.Tokenizer.load(path)

  @pytest.mark.parametrize(
    "text",
    [
      "{}",
      '{"vocab_size": 320, "hidden_size": 64}',
      '{"added_tokens": 3}',
      '{"added_tokens": [{"id": 0}]}',
      '{"model": {"type": "Another"}}',
      '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
      '{"a": ' + "[" * 100_000,
      '{"\xff',
    ],
    ids=range(8),
  )
  def test_json_of_another_kind(self, tmp_path, text):
    pytest.importorskip("tokenizers")
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="other.json: not a Hugging Face"):
      tokenizer_lib.Tokenizer.load(path)

  def _no_eos(content):
    content["model"]["vocab"]["<end>"] = content["model"]["vocab"].pop("<eos>")
    del content["post_processor"], content["added_tokens"]

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (
        lambda c: c["model"].update(continuing_subword_prefix="x"),
        "its model has continuing_subword_prefix='x'; expected none",
      ),
      (
        lambda c: c["model"].update(end_of_word_suffix="x"),
        "its model has end_of_word_suffix='x'; expected none",
      ),
      (
        lambda c: c["model"].update(dropout=0.1),
        "its model has dropout=0.1; expected none",
      ),
      (_no_eos, "has no eos token: expected one of .*tokenizer_config.json"),
      (
        lambda c: c["added_tokens"][5].update(id=7),
        "added tokens ..<start_of_turn>",
      ),
    ],
  )
  def test_what_is_not_gemmas(self, write, change, message):
    with pytest.raises(ValueError, match=f"json: .*{message}"):
      tokenizer_lib.Tokenizer.load(write(change))

  @pytest.mark.parametrize(
    "normalizer",
    [
      None,
      {"type": "Lowercase"},
      {"type": "NFKC"},
      {"type": "Prepend", "prepend": "\u2581"},
      {"type": "Strip", "strip_left": False, "strip_right": True},
      {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ],
    ids=str,
  )
  def test_text_that_does_not_come_back(self, write, normalizer):
    def change(content):
      if normalizer is None:
        del content["model"]["byte_fallback"]
      else:
        content["normalizer"] = {
          "type": "Sequence",
          "normalizers": [normalizer, content["normalizer"]],
        }

    with pytest.raises(ValueError, match="json: .* comes back as .* Gemma's"):
      tokenizer_lib.Tokenizer.load(write(change))

  @pytest.mark.parity
  @pytest.mark.parametrize("symbols", [False, True])
  def test_is_sentencepiece(self, model_path, symbols, tmp_path, monkeypatch):
    """A SentencePiece model, converted by what wrote Gemma's tokenizer.json.

    It is ours, or has <mask> and more as symbols for use in text, like Gemma's.
    """
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    path = tmp_path / "slow.model"
    if symbols:
      _train_with_symbols(path)
    else:
      _rename_pieces(model_path, path)
    slow = types.SimpleNamespace(
      vocab_file=str(path),
      pad_token="<pad>",
      eos_token="<eos>",
      bos_token="<bos>",
    )
    # The converter reads an attribute that transformers 5 no longer sets.
    monkeypatch.setattr(
      convert.GemmaSentencePieceExtractor,
      "sp",
      sentencepiece.SentencePieceProcessor(model_file=str(path)),
      raising=False,
    )
    convert.GemmaConverter(slow).converted().save(str(tmp_path / "fast.json"))
    fast = tokenizer_lib.Tokenizer.load(tmp_path / "fast.json")
    slow = tokenizer_lib.Tokenizer.load(path)
    assert fast.vocab_size == slow.vocab_size
    turn = "<start_of_turn>user\n\n\nx<end_of_turn>\n<pad><eos><bos><unk><mask>"
    assert (tokenizer_lib.MASK_ID in slow.encode(turn)) == symbols
    texts = [turn, *TEXTS, *_random_texts(0), *(d.text for d in _documents())]
    for text in texts:
      assert fast.encode(text) == slow.encode(text), text
    draw = random.Random(0)
    for _ in range(500):
      ids = draw.choices(range(slow.vocab_size), k=30)
      assert fast.decode(ids) == slow.decode(ids), ids
