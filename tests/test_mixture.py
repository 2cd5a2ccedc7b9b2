"""Mixtures: shares of tokens, held-out sets and what is refused."""

import collections
import json

from ml_collections import config_dict
import numpy as np
import pytest

from gemma_funnel.data import mixture, packing, pipeline, sources
from gemma_funnel.data import tokenizer as tokenizer_lib

SHAPE = dict(length=48, segment_alignment=2, seed=0)
# Short and long documents, and a source that is small.
SIZES = {"short": (200, 2), "long": (30, 60), "tiny": (12, 12)}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """Words of a source say which it is; returns their globs and a tokenizer."""
  folder = tmp_path_factory.mktemp("mixture")
  globs = {}
  for name, (count, words) in SIZES.items():
    path = folder / f"{name}.jsonl"
    lines = [
      json.dumps({"text": f"{name[0].upper()}{i} " * words})
      for i in range(count)
    ]
    path.write_text("\n".join(lines))
    globs[name] = str(path)
  everything = [d for path in globs.values() for d in sources.load(path)]
  path = folder / "tokenizer.model"
  tokenizer = tokenizer_lib.train(everything, 275, path)
  return globs, tokenizer, str(path)


def _config(corpora, **weights):
  cfg = pipeline.default_config()
  cfg.tokenizer = corpora[2]
  cfg.heldout_fraction = 0.2
  cfg.mixture = config_dict.ConfigDict(
    {n: dict(source=corpora[0][n], weight=w) for n, w in weights.items()}
  )
  return cfg


def _segments(batch):
  for tokens, segment in zip(batch["tokens"], batch["segment"], strict=True):
    for s in range(1, segment.max() + 1):
      yield tokens[segment == s]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shares_of_tokens(corpora, tmp_path, num_shards, monkeypatch):
  # Otherwise it would take long for shuffling not to matter.
  monkeypatch.setattr(pipeline.packing, "_SHUFFLE_WINDOW", 16)
  monkeypatch.setattr(pipeline.packing, "_NUM_OPEN_ROWS", 4)
  cfg = _config(corpora, short=2, long=5.5)
  corpus = pipeline.load_corpus(cfg, 300, tmp_path)
  iterator = pipeline.train_iterator(
    corpus.train, corpus.tokenizer, batch_size=6, num_shards=num_shards, **SHAPE
  )
  tokens, chunks = collections.Counter(), collections.Counter()
  for _ in range(60):
    for segment in _segments(next(iterator)):
      # A chunk may begin within a word.
      name = "long" if len(segment) > 15 else "short"
      tokens[name] += len(segment)
      chunks[name] += 1
  assert tokens["long"] / tokens.total() == pytest.approx(5.5 / 7.5, abs=0.02)
  # It is not by chance that of chunks, or of documents.
  assert chunks["long"] / chunks.total() < 0.6


def test_after_any_chunk_shares_are_as_given():
  draw = np.random.default_rng(0)
  weights = (0.5, 0.3, 0.2)

  def parent(name):
    sizes = draw.integers(2, 40, 500)
    values = [
      {"tokens": np.pad(np.full(n, name + 5, np.int32), (0, 3))} for n in sizes
    ]
    return mixture.grain.MapDataset.source(values).to_iter_dataset()

  mixed = iter(
    mixture.MixChunks({str(n): parent(n) for n in range(3)}, weights)
  )
  drawn = np.zeros(3)
  for _ in range(500):
    tokens = next(mixed)["tokens"]
    drawn[tokens[0] - 5] += np.count_nonzero(tokens != packing.PADDING)
    assert np.all(np.abs(drawn - drawn.sum() * np.asarray(weights)) < 2 * 40)
  assert {n: s["drawn"] for n, s in mixed.get_state().items()} == {
    str(n): int(count) for n, count in enumerate(drawn)
  }


def test_each_source_has_its_epochs(corpora, tmp_path):
  """A small source comes again while a large one is not through."""
  cfg = _config(corpora, short=1, tiny=1)
  train = pipeline.load_corpus(cfg, 300, tmp_path).train
  iterator = pipeline.train_iterator(
    train, corpora[1], batch_size=4, num_shards=2, **SHAPE
  )
  found = collections.Counter()
  for _ in range(30):
    for segment in _segments(next(iterator)):
      found[corpora[1].decode(segment.tolist())] += 1
  # A chunk that begins within a word may have no letter.
  mean = {
    letter: np.mean([n for text, n in found.items() if letter in text])
    for letter in "ST"
  }
  assert 1 < mean["S"] < mean["T"] / 1.5


def test_goes_on_exactly(corpora, tmp_path):
  cfg = _config(corpora, short=1, long=2, tiny=0.5)
  corpus = pipeline.load_corpus(cfg, 300, tmp_path)

  def make(**changes):
    return pipeline.train_iterator(
      corpus.train, corpus.tokenizer, num_shards=2, **SHAPE, **changes
    )

  iterator = make(batch_size=3)
  for _ in range(7):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [r for _ in range(10) for r in next(iterator)["tokens"].tolist()]
  restored = make(batch_size=5)
  restored.set_state(state)
  found = [r for _ in range(6) for r in next(restored)["tokens"].tolist()]
  assert found == expected
  del cfg.mixture["tiny"]
  other = pipeline.load_corpus(cfg, 300, tmp_path)
  iterator = pipeline.train_iterator(
    other.train, other.tokenizer, batch_size=3, num_shards=2, **SHAPE
  )
  with pytest.raises(ValueError, match="mixture .*'tiny'.*found .*'short'"):
    iterator.set_state(state)


def test_heldout_is_that_of_each(corpora, tmp_path):
  cfg = _config(corpora, short=1, long=0)
  cfg.mixture.short.text_key = "body"
  cfg.mixture.short.source = str(tmp_path / "body.jsonl")
  (tmp_path / "body.jsonl").write_text('{"body": "a"}\n{"body": "b"}')
  (tmp_path / "valid.jsonl").write_text('{"body": "held out"}')
  cfg.mixture.short.heldout = str(tmp_path / "valid.jsonl")
  corpus = pipeline.load_corpus(cfg, 300, tmp_path)
  assert [d.text for d in corpus.train] == ["a", "b"]
  assert [(p.name, p.weight) for p in corpus.train.mixed] == [("short", 1.0)]
  _, held = sources.load_split(corpora[0]["long"], heldout_fraction=0.2)
  assert [d.text for d in corpus.heldout] == [
    *(d.text for d in held),
    "held out",
  ]
  batches = pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    batch_size=2,
    length=48,
    segment_alignment=2,
  )
  assert batches.num_documents == 1 + len(held)


def test_a_tokenizer_is_trained_on_all_of_them(corpora, tmp_path):
  cfg = _config(corpora, short=1, long=1)
  cfg.tokenizer = None
  tokenizer = pipeline.load_corpus(cfg, 274, tmp_path).tokenizer
  # Characters that only one of them has.
  pieces = {tokenizer.piece(i) for i in range(tokenizer.vocab_size)}
  assert any("S" in p for p in pieces) and any("L" in p for p in pieces)


class TestErrors:
  @pytest.mark.parametrize(
    ("entry", "message"),
    [
      (dict(weight=1.0), "mixture.a has no source"),
      (dict(source="", weight=1.0), "mixture.a has no source"),
      (dict(source="stdlib"), "mixture.a has no weight"),
      (dict(source="stdlib", weight=-0.5), "a.weight=-0.5: expected a number"),
      (dict(source="stdlib", weight=float("nan")), "a.weight=nan: expected a"),
      (dict(source="stdlib", weight=float("inf")), "a.weight=inf: expected a"),
      (dict(source="stdlib", weight=True), "a.weight=True: expected a number"),
      (dict(source="stdlib", weight="1"), "a.weight='1': expected a number"),
      (dict(source="stdlib", weight=0), r"weights of \['a'\] sum to 0"),
      (
        dict(source="stdlib", weight=1, shards=3),
        r"mixture.a has the keys \['shards'\]; expected some of",
      ),
      ("stdlib", r"data.mixture.a='stdlib': expected dict\(source"),
      (dict(source="none*", weight=1), r"mixture.a: source 'none\*': no file"),
    ],
  )
  def test_entries(self, tmp_path, entry, message):
    cfg = pipeline.default_config()
    cfg.mixture = config_dict.ConfigDict({"a": entry})
    with pytest.raises(ValueError, match=message):
      pipeline.load_corpus(cfg, 300, tmp_path)

  @pytest.mark.parametrize("key", ["source", "heldout"])
  def test_both(self, corpora, tmp_path, key):
    cfg = _config(corpora, short=1)
    cfg[key] = corpora[0]["long"]
    with pytest.raises(ValueError, match=f"data.{key}=.* are both set; exp"):
      pipeline.load_corpus(cfg, 300, tmp_path)

  def test_an_empty_source(self, corpora, tmp_path):
    cfg = _config(corpora, short=1, long=1)
    (tmp_path / "empty.txt").write_text("")
    cfg.mixture.long.source = str(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="mixture.long: .* split is empty"):
      pipeline.load_corpus(cfg, 300, tmp_path)

  def test_what_one_holds_out_and_another_trains_on(self, corpora, tmp_path):
    cfg = _config(corpora, short=1, long=1)
    cfg.mixture.long.heldout = corpora[0]["short"]
    with pytest.raises(ValueError, match="share 1 files, such as .*short"):
      pipeline.load_corpus(cfg, 300, tmp_path)

  def test_more_shards_than_documents(self, corpora, tmp_path):
    train = pipeline.load_corpus(
      _config(corpora, short=1, tiny=1), 300, tmp_path
    ).train
    with pytest.raises(ValueError, match="of data.mixture.tiny for data.lan"):
      pipeline.train_iterator(
        train, corpora[1], batch_size=2, num_shards=16, **SHAPE
      )
