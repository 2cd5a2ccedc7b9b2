"""A corpus of ids: the batches of the text, and what is found to be wrong."""

import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import tiny_run

from gemma_funnel.data import documents, pipeline, sources, tokenize, tokenized
from gemma_funnel.data import tokenizer as tokenizer_lib

SHAPE = dict(batch_size=4, length=32, segment_alignment=2)
COUNT = 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder with text, its tokenizer and its ids."""
  folder = tmp_path_factory.mktemp("tokenize")
  texts = [f"text {i} é漢\n" * (i % 7) for i in range(COUNT)]
  lines = [json.dumps({"text": text}) for text in texts]
  (folder / "a.jsonl").write_text("\n".join(lines[:90]))
  (folder / "b.jsonl").write_text("\n".join(lines[90:]))
  tokenizer_lib.train(
    sources.load(f"{folder}/*.jsonl"), 280, folder / "given.model"
  )
  tokenize.tokenize(_config(folder))
  return folder


def _config(folder, **changes):
  config = tiny_run.load_config("tokenize")
  config.update(
    source=f"{folder}/*.jsonl",
    tokenizer=f"{folder}/given.model",
    out=f"{folder}/ids",
    shards=4,
  )
  config.update(changes)
  return config


def _data(folder, **changes):
  cfg = pipeline.default_config()
  cfg.update(
    source=f"{folder}/ids",
    tokenizer=f"{folder}/ids/tokenizer.model",
    heldout_fraction=0.2,
  )
  cfg.update(changes)
  return cfg


def _batches(corpus, count=20, **changes):
  iterator = pipeline.train_iterator(
    corpus.train, corpus.tokenizer, seed=3, **SHAPE, **changes
  )
  found = [next(iterator) for _ in range(count)]
  iterator.close()
  return found


def _same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    for key in b:
      np.testing.assert_array_equal(a[key], b[key])


class TestReading:
  @pytest.mark.parametrize("num_shards", [1, 3])
  def test_the_batches_of_the_text(self, corpus, tmp_path, num_shards):
    ids = pipeline.load_corpus(_data(corpus), 300, tmp_path)
    text = pipeline.load_corpus(
      _data(corpus, source=f"{corpus}/*.jsonl"), 300, tmp_path
    )
    assert isinstance(ids.train[0], documents.TokenizedDocument)
    assert [d.key for d in ids.train] == [d.key for d in text.train]
    _same(
      _batches(ids, num_shards=num_shards),
      _batches(text, num_shards=num_shards),
    )
    ours, theirs = (
      pipeline.heldout_batches(c.heldout, c.tokenizer, **SHAPE)
      for c in (ids, text)
    )
    _same(ours.batches, theirs.batches)
    assert ours.num_bytes == theirs.num_bytes > 0
    assert ours.num_documents == theirs.num_documents

  def test_in_workers(self, corpus, tmp_path):
    ids = pipeline.load_corpus(_data(corpus), 300, tmp_path)
    _same(_batches(ids, num_workers=1), _batches(ids))

  def test_the_split_reads_a_record_of_each_shard(self, corpus, monkeypatch):
    read, of_record = [], tokenized.TokenizedFile.record

    def record(self, i):
      read.append(i)
      return of_record(self, i)

    monkeypatch.setattr(tokenized.TokenizedFile, "record", record)
    train, held = sources.load_split(f"{corpus}/ids", heldout_fraction=0.2)
    assert len(train) + len(held) > 120 and len(pickle.dumps(train)) < 20_000
    assert read == [0] * 4

  @pytest.mark.parametrize("glob", ["ids", "id*", "ids/*.array_record"])
  def test_globs(self, corpus, glob):
    everything = sources.load(f"{corpus}/{glob}")
    expected = sources.load(f"{corpus}/[ab].jsonl")
    assert [d.key for d in everything] == [d.key for d in expected]

  def test_as_held_out_files(self, corpus, tmp_path):
    cfg = _data(corpus, source="stdlib", heldout=f"{corpus}/ids")
    found = pipeline.load_corpus(cfg, 300, tmp_path)
    assert len(found.heldout) == len(sources.load(f"{corpus}/ids"))

  def test_of_a_mixture(self, corpus, tmp_path):
    cfg = _data(corpus, source="stdlib")
    cfg.mixture = {
      "ids": dict(source=f"{corpus}/ids", weight=1),
      "text": dict(source=f"{corpus}/*.jsonl", weight=1),
    }
    found = pipeline.load_corpus(cfg, 300, tmp_path)
    assert {type(d).__name__ for d in found.train} == {
      "Document",
      "TokenizedDocument",
    }
    _batches(found, 3)
    cfg.tokenizer = f"{corpus}/given.model"  # The same content.
    pipeline.load_corpus(cfg, 300, tmp_path)


class TestWhatIsWritten:
  def test_metadata(self, corpus):
    metadata = tokenized.read_metadata(str(corpus / "ids"))
    tokenizer = tokenizer_lib.Tokenizer.load(corpus / "given.model")
    texts = [d.text for d in sources.load(f"{corpus}/*.jsonl")]
    assert metadata["tokenizer"] == {
      "file": "tokenizer.model",
      "sha256": tokenizer.sha256,
      "vocab_size": 280,
    }
    assert metadata["documents"] == len(texts)
    assert metadata["tokens"] == sum(len(tokenizer.encode(t)) for t in texts)
    assert metadata["bytes"] == sum(len(t.encode()) for t in texts)
    assert metadata["dtype"] == "<u2"
    assert (corpus / "ids" / "tokenizer.model").read_bytes() == (
      corpus / "given.model"
    ).read_bytes()
    names = sorted(os.listdir(corpus / "ids"))
    shards = [f"tokens-0000{i}-of-00004" for i in range(4)]
    assert names == sorted(
      [
        "metadata.json",
        "tokenizer.model",
        *(f"{s}.array_record" for s in shards),
        *(f"{s}.digests.npy" for s in shards),
      ]
    )

  def test_ids_of_a_large_vocabulary(self):
    dtypes = [tokenized.dtype_for(n) for n in (65_536, 65_537)]
    assert [d.str for d in dtypes] == ["<u2", "<u4"]
    for dtype, ids in zip(dtypes, ([], [5, 65_535]), strict=True):
      record = tokenized.encode_record(
        documents.Document("é:1", "text é"), ids, dtype
      )
      found = tokenized.decode_record(record, dtype)
      assert (found.key, found.num_bytes) == ("é:1", 7)
      assert found.tokens.tolist() == ids

  def test_workers_and_shards_change_nothing(self, corpus, tmp_path):
    for shards, num_workers in ((1, 0), (7, 2)):
      out = tmp_path / str(shards)
      tokenize.tokenize(
        _config(corpus, out=str(out), shards=shards, num_workers=num_workers)
      )
      ours, theirs = sources.load(str(out)), sources.load(f"{corpus}/ids")
      assert [(d.key, d.tokens.tolist()) for d in ours] == [
        (d.key, d.tokens.tolist()) for d in theirs
      ]

  def test_goes_on_where_it_was_interrupted(
    self, corpus, tmp_path, monkeypatch, capsys
  ):
    config = _config(corpus, out=str(tmp_path / "ids"))
    whole, made = tokenize._encode, []

    def interrupted(*arguments):
      for i, block in enumerate(whole(*arguments)):
        if i == 2:
          raise KeyboardInterrupt
        yield block

    monkeypatch.setattr(tokenize, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
      tokenize.tokenize(config)
    assert os.listdir(tmp_path) == ["ids.partial"]
    with pytest.raises(ValueError, match="no file matches"):
      sources.load(str(tmp_path / "ids"))
    with pytest.raises(
      ValueError, match=r"begun with .*\['shards'\].*: 4}; del"
    ):
      tokenize.tokenize(_config(corpus, out=config.out, shards=5))
    with monkeypatch.context() as patch:
      now = {"0:a.txt": "other"}
      patch.setattr(tokenize.sources, "fingerprints", lambda source: now)
      with pytest.raises(ValueError, match="not what it was .*: 0:a.txt; put"):
        tokenize.tokenize(config)

    def counted(*arguments):
      for block in whole(*arguments):
        made.append(len(block))
        yield block

    monkeypatch.setattr(tokenize, "_encode", counted)
    metadata = tokenize.tokenize(config)
    assert os.listdir(tmp_path) == ["ids"]
    # Two shards were whole.
    assert 0 < sum(made) < 0.6 * metadata["documents"]
    assert metadata == tokenized.read_metadata(str(corpus / "ids"))
    for name in os.listdir(corpus / "ids"):
      if not name.endswith(".array_record"):  # Those hold a time.
        ours, theirs = tmp_path / "ids" / name, corpus / "ids" / name
        assert ours.read_bytes() == theirs.read_bytes()
    assert [d.tokens.tolist() for d in sources.load(config.out)] == [
      d.tokens.tolist() for d in sources.load(f"{corpus}/ids")
    ]
    assert "documents/s" in capsys.readouterr().err


class TestErrors:
  @pytest.fixture
  def copied(self, corpus, tmp_path):
    shutil.copytree(corpus / "ids", tmp_path / "ids")
    return tmp_path / "ids"

  def test_another_tokenizer(self, corpus, tmp_path):
    other = tmp_path / "other.model"
    tokenizer_lib.train(sources.load(f"{corpus}/*.jsonl"), 279, other)
    message = (
      "ids: was tokenized with tokenizer.model .* is .*other.model .*exp"
    )
    with pytest.raises(ValueError, match=message):
      pipeline.load_corpus(_data(corpus, tokenizer=str(other)), 300, tmp_path)
    found = sources.load(f"{corpus}/ids")
    loaded = tokenizer_lib.Tokenizer.load(other)
    with pytest.raises(ValueError, match=message):
      pipeline.heldout_batches(found, loaded, **SHAPE)
    with pytest.raises(ValueError, match=message):
      pipeline.train_iterator(found, loaded, seed=0, **SHAPE)

  def test_none_would_be_trained(self, corpus, tmp_path):
    message = (
      "is none, which would .* expected data.tokenizer=.*ids/tokenizer.m"
    )
    with pytest.raises(ValueError, match=message):
      pipeline.load_corpus(_data(corpus, tokenizer=None), 300, tmp_path)

  def _cut_digests(shard):
    path = f"{shard}.digests.npy"
    np.save(path, np.load(path)[:-1])

  @pytest.mark.parametrize(
    ("damage", "message"),
    [
      (
        lambda shard: os.remove(f"{shard}.array_record"),
        "ids: 1 of 4 shards are missing, such",
      ),
      (
        lambda shard: shutil.copy(
          f"{shard.replace('00002', '00000')}.array_record",
          f"{shard}.array_record",
        ),
        "00002.* first document is 'a.jsonl:1', which",
      ),
      (_cut_digests, "00002.*found .* metadata.json says"),
      (
        lambda shard: pathlib.Path(f"{shard}.digests.npy").write_text("text"),
        "digests.npy: not what data.tokenize",
      ),
      (
        lambda shard: os.remove(f"{shard}.digests.npy"),
        "digests.npy: cannot be read: No such",
      ),
    ],
  )
  def test_a_damaged_shard(self, copied, damage, message):
    damage(f"{copied}/tokens-00002-of-00004")
    with pytest.raises(ValueError, match=message):
      sources.load(str(copied))

  def test_a_shard_that_is_not_named(self, copied):
    shard = copied / "tokens-00002-of-00004.array_record"
    shutil.copy(shard, copied / "more.array_record")
    with pytest.raises(ValueError, match="more.*metadata.json names no such"):
      sources.load(f"{copied}/more.array_record")

  @pytest.mark.parametrize("record", [b"", b"\xff" * 20, b"\0" * 13])
  def test_damaged_records(self, record):
    with pytest.raises(ValueError, match="found .* bytes, expected"):
      tokenized.decode_record(record, np.dtype("<u2"))

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (dict(tokenizer=None), "tokenizer is not set"),
      (dict(out=None), "out is not set"),
      (dict(out="gs://bucket/ids"), "expected a local folder"),
      (dict(shards=0), "shards=0: expected an integer >= 1"),
      (dict(shards=1000), "shards=1000 of .* documents in"),
      (dict(num_workers=-1), "num_workers=-1: expected"),
      (dict(tokenizer="none.model"), "none.model: cannot be read"),
      (dict(source="none*"), "no file matches"),
      (dict(source="{}/ids"), "ids: is tokenized already"),
      (dict(out="{}/ids"), "ids': is there already; expected no"),
    ],
  )
  def test_configuration(self, corpus, tmp_path, changes, message):
    config = _config(corpus, out=str(tmp_path / "new"))
    for key, value in changes.items():
      is_text = isinstance(value, str)
      config[key] = value.format(corpus) if is_text else value
    with pytest.raises(ValueError, match=message):
      tokenize.tokenize(config)
    assert not os.listdir(tmp_path)

  def test_a_bad_line(self, corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    for num_workers in (0, 1):
      config = _config(
        corpus,
        source=f"{tmp_path}/a.jsonl",
        out=str(tmp_path / "ids"),
        shards=1,
        num_workers=num_workers,
        on_bad="error",
      )
      with pytest.raises(ValueError, match="a.jsonl, line 2: the value of"):
        tokenize.tokenize(config)
