"""Tokenizer: lossless, Gemma's ids, deterministic training, clear errors."""

import pickle
import random

import numpy as np
import pytest
import sentencepiece

from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib

VOCAB = 320


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
def tokenizer(model_path):
  return tokenizer_lib.Tokenizer.load(model_path)


@pytest.mark.parametrize(
  "text",
  [
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
  ],
)
def test_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(tokenizer_lib.NUM_SPECIAL <= i < VOCAB for i in ids)


@pytest.mark.parametrize("seed", range(4))
def test_round_trip_of_random_text(tokenizer, seed):
  rng = random.Random(seed)
  common = "ab 12\n\t\r\u2581<>_é漢"
  for _ in range(200):
    chars = []
    for _ in range(rng.randrange(40)):
      code = rng.choice((0x7F, 0x3000, 0x110000))
      char = chr(rng.randrange(code))
      is_surrogate = 0xD800 <= ord(char) < 0xE000
      chars.append(rng.choice(common) if is_surrogate else char)
      chars.append(rng.choice(common) * rng.randrange(3))
    text = "".join(chars)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_dropped_and_numpy_ids_are_taken(tokenizer):
  ids = tokenizer.encode("return x")
  row = np.asarray([2, *ids[:1], 4, 3, *ids[1:], 1, 0, 0], np.int32)
  assert tokenizer.decode(row) == "return x"
  assert tokenizer.decode([0, 1, 2, 3, 4]) == ""


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_decoding_an_unknown_id(tokenizer, bad):
  with pytest.raises(ValueError, match=f"token id {bad}: .* 0 to {VOCAB - 1}"):
    tokenizer.decode([7, bad])


def test_digits_are_split_and_text_is_compressed(tokenizer):
  assert len(tokenizer.encode("1212")) == 4
  text = _documents()[0].text
  assert len(tokenizer.encode(text)) < 0.7 * len(text)


def test_vocab_size_and_pickle(tokenizer):
  assert tokenizer.vocab_size == VOCAB
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode("class Long") == tokenizer.encode("class Long")
  assert copy.name == tokenizer.name


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
  assert not list(tmp_path.iterdir())


def test_training_on_nothing(tmp_path):
  with pytest.raises(ValueError, match="no documents to train on"):
    tokenizer_lib.train([], VOCAB, tmp_path / "none.model")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, None])
def test_damaged_file(model_path, tmp_path, kept):
  model = model_path.read_bytes()
  path = tmp_path / "damaged.model"
  path.write_bytes(
    b"this is text" if kept is None else model[: int(kept * len(model))]
  )
  with pytest.raises(ValueError, match="damaged.model: (not a|its special)"):
    tokenizer_lib.Tokenizer.load(path)


def test_error_has_sentencepieces_own_text(tmp_path):
  path = tmp_path / "damaged.model"
  path.write_bytes(b"this is text")
  with pytest.raises(ValueError, match="damaged.model.*ParseFromArray"):
    tokenizer_lib.Tokenizer.load(path)


def test_missing_file(tmp_path):
  path = tmp_path / "missing.model"
  with pytest.raises(ValueError, match="missing.model: cannot be read: No suc"):
    tokenizer_lib.Tokenizer.load(path)


def test_other_special_ids(tmp_path):
  # SentencePiece's defaults: no pad, unk 0, bos 1, eos 2.
  path = tmp_path / "llama.model"
  with open(path, "wb") as f:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([d.text for d in _documents()]),
        model_writer=f, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
  with pytest.raises(ValueError, match="llama.model: .*'bos': 1.*Gemma's"):
    tokenizer_lib.Tokenizer.load(path)


class TestGetTokenizer:
  def test_trains_then_reads_the_cache(self, tmp_path):
    cache = tmp_path / "cache.model"
    trained = tokenizer_lib.get_tokenizer(None, cache, _documents(), VOCAB)
    # An empty corpus cannot be trained on: this one is read.
    read = tokenizer_lib.get_tokenizer(None, cache, [], VOCAB)
    assert read.encode("class Long") == trained.encode("class Long")

  def test_path_comes_first(self, model_path, tmp_path):
    cache = tmp_path / "cache.model"
    found = tokenizer_lib.get_tokenizer(model_path, cache, [], VOCAB + 80)
    assert found.vocab_size == VOCAB
    assert not cache.exists()

  def test_more_pieces_than_the_model(self, model_path, tmp_path):
    with pytest.raises(ValueError, match="320 pieces.*vocab_size=319"):
      tokenizer_lib.get_tokenizer(
        model_path, tmp_path / "cache.model", [], VOCAB - 1
      )

  @pytest.mark.parametrize("vocab_size", [300, 400])
  def test_cache_of_another_size(self, model_path, vocab_size):
    with pytest.raises(
      ValueError, match=f"trained.model.*320 pieces.*={vocab_size}; delete"
    ):
      tokenizer_lib.get_tokenizer(None, model_path, _documents(), vocab_size)
