"""Batches: determinism, exact resumption, sharding, held-out accounting."""

import collections
import json
import math
import random

import grain
import numpy as np
import pytest

from gemma_funnel.data import packing, pipeline, sources
from gemma_funnel.data import shards as shards_lib
from gemma_funnel.data import tokenizer as tokenizer_lib

SHAPE = dict(batch_size=4, length=24, segment_alignment=2)


def _documents(count=50):
  return [
    sources.Document(f"{i}.py", f"documént {i}: " + f"word{i}\n" * (i % 9))
    for i in range(count)
  ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("pipeline") / "tokenizer.model"
  return tokenizer_lib.train(_documents(), 300, path)


@pytest.fixture
def make_iterator(tokenizer):
  """`train_iterator` with defaults; closes what it made."""
  made = []

  def make(documents=None, **changes):
    kwargs = {**SHAPE, "seed": 0, **changes}
    documents = _documents() if documents is None else documents
    made.append(pipeline.train_iterator(documents, tokenizer, **kwargs))
    return made[-1]

  yield make
  for iterator in made:
    iterator.close()


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _equal(batches, others):
  return len(batches) == len(others) and all(
    a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    for a, b in zip(batches, others, strict=True)
  )


def _segments(batch):
  for tokens, segment in zip(batch["tokens"], batch["segment"], strict=True):
    for s in range(1, segment.max() + 1):
      yield tuple(tokens[segment == s].tolist())


def _chunks(documents, tokenizer):
  return collections.Counter(
    tuple(c.tolist())
    for d in documents
    for c in packing.chunk(tokenizer.encode(d.text), SHAPE["length"])
  )


class TestTrain:
  @pytest.mark.parametrize("segment_alignment", [1, 2, 3, 4])
  def test_batches(self, make_iterator, segment_alignment):
    iterator = make_iterator(segment_alignment=segment_alignment)
    assert isinstance(iterator, grain.DatasetIterator)
    for batch in _take(iterator, 30):
      assert set(batch) == {"tokens", "segment", "position"}
      for value in batch.values():
        assert value.shape == (4, 24) and value.dtype == np.int32
      is_start = (batch["position"] == 0) & (batch["segment"] > 0)
      assert not (np.nonzero(is_start)[1] % segment_alignment).any()
      assert (batch["tokens"][is_start] == tokenizer_lib.BOS_ID).all()

  def test_determined_by_the_seed(self, make_iterator):
    first, again, other = (
      _take(make_iterator(seed=seed), 20) for seed in (1, 1, 2)
    )
    assert _equal(first, again)
    assert not _equal(first, other)

  def test_shuffled_anew_each_epoch(self, make_iterator, monkeypatch):
    # One open row and documents of a row each: rows are in document order.
    monkeypatch.setattr(packing, "_NUM_OPEN_ROWS", 1)
    monkeypatch.setattr(packing, "_SHUFFLE_WINDOW", 1)
    documents = [
      sources.Document(str(i), chr(0x4E00 + i) * 5) for i in range(12)
    ]

    def order(seed):
      rows = _take(make_iterator(documents, batch_size=1, seed=seed), 36)
      rows = [tuple(r["tokens"][0].tolist()) for r in rows]
      return [rows[:12], rows[12:24], rows[24:]]

    epochs = order(0)
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Nor are the epochs of one seed those of the next, shifted.
    assert order(1)[0] not in epochs

  @pytest.mark.parametrize("process_count", [1, 3])
  def test_processes_share_all_documents(
    self, make_iterator, tokenizer, process_count
  ):
    documents = _documents()
    seen = []
    for index in range(process_count):
      iterator = make_iterator(process_index=index, process_count=process_count)
      chunks = set()
      # Several epochs of the largest shard.
      for batch in _take(iterator, 96):
        chunks.update(_segments(batch))
      seen.append(chunks)
    assert set.union(*seen) == set(_chunks(documents, tokenizer))
    assert sum(map(len, seen)) == len(set.union(*seen))

  def test_shards_do_not_read_neighbours_together(self, make_iterator):
    """With one seed for all they would: each has as many documents."""
    documents = [
      sources.Document(str(i), chr(0x4E00 + i) * 5) for i in range(64)
    ]
    first = [
      make_iterator(documents, num_shards=8, process_count=8, process_index=p)
      for p in range(8)
    ]
    # Pieces are of bytes: the document's number is that of its text.
    number = {
      tuple(first[0]._make_shard.chunk._tokenizer.encode(d.text)): i
      for i, d in enumerate(documents)
    }
    orders = []
    for p, iterator in enumerate(first):
      found = [
        number[s[1:-1]] for b in _take(iterator, 6) for s in _segments(b)
      ]
      assert {n % 8 for n in found} == {p}
      orders.append([n // 8 for n in found])
    assert len({tuple(order) for order in orders}) == 8

  def test_rows_stay_full_with_many_shards(self, make_iterator):
    documents = [
      sources.Document(str(i), f"{i} " * (i % 13)) for i in range(640)
    ]
    fill = [
      np.mean([b["segment"] > 0 for b in _take(iterator, 30)])
      for iterator in (
        make_iterator(documents, num_shards=n, length=48) for n in (1, 8)
      )
    ]
    assert fill[0] - fill[1] < 0.06

  def test_documents_without_text(self, make_iterator, monkeypatch):
    some = [sources.Document(str(i), "a b" * (i % 2)) for i in range(8)]
    batch = next(make_iterator(some))
    assert len({s for s in _segments(batch)}) == 1
    monkeypatch.setattr(packing, "_MOST_EMPTY", 100)
    nothing = [sources.Document(str(i), "") for i in range(8)]
    with pytest.raises(ValueError, match="last 100 documents have no text"):
      next(make_iterator(nothing))

  def test_chunks_of_a_document_are_spread(self, make_iterator, monkeypatch):
    """Over batches: side by side without the window, apart with it."""
    long = [sources.Document(str(i), f"{i} " * 2000) for i in range(8)]

    def mixed(window):
      monkeypatch.setattr(packing, "_SHUFFLE_WINDOW", window)
      batches = _take(make_iterator(long, batch_size=8), 10)
      return np.mean([len(np.unique(b["tokens"][:, 3])) for b in batches])

    assert mixed(512) > mixed(1) + 1

  def test_an_epoch_has_every_chunk_once(
    self, make_iterator, tokenizer, monkeypatch
  ):
    # With one open row, chunks come out in the order they are read in.
    monkeypatch.setattr(packing, "_NUM_OPEN_ROWS", 1)
    monkeypatch.setattr(packing, "_SHUFFLE_WINDOW", 1)
    expected = _chunks(_documents(), tokenizer)
    iterator = make_iterator(batch_size=1)
    seen = []
    while len(seen) < 2 * expected.total():
      seen += _segments(next(iterator))
    epochs = [
      seen[i * expected.total() : (i + 1) * expected.total()] for i in range(2)
    ]
    assert [collections.Counter(e) for e in epochs] == [expected, expected]


class TestResume:
  @pytest.mark.parametrize("taken", [0, 1, 5, 16, 17, 40])
  def test_in_process(self, make_iterator, taken):
    iterator = make_iterator()
    _take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _take(iterator, 30)
    restored = make_iterator()
    restored.set_state(state)
    assert _equal(_take(restored, 30), expected)
    # The same iterator goes back, too.
    iterator.set_state(state)
    assert _equal(_take(iterator, 30), expected)

  def test_workers(self, make_iterator):
    """Their number changes neither the order nor the state."""
    in_process = make_iterator(num_shards=3)
    expected = _take(in_process, 19)
    state = json.loads(json.dumps(in_process.get_state()))
    following = _take(in_process, 20)
    iterator = make_iterator(num_shards=3, num_workers=2)
    assert _equal(_take(iterator, 19), expected)
    assert json.loads(json.dumps(iterator.get_state())) == state
    # Where shard 0 is not the next one.
    assert state["rows"] % 3
    iterator.set_state(state)
    assert _equal(_take(iterator, 20), following)

  def test_processes_batches_and_workers_may_change(self, make_iterator):
    """The rows of a whole run, in order, against those of one process."""
    draw = random.Random(0)
    num_shards, rows, state = 4, [], None
    for _ in range(4):
      count = draw.choice([1, 2, 4])
      size, steps = draw.randint(1, 5), draw.randint(1, 6)
      processes = [
        make_iterator(
          num_shards=num_shards,
          batch_size=size,
          process_index=p,
          process_count=count,
        )
        for p in range(count)
      ]
      for process in processes:
        if state is not None:
          process.set_state(json.loads(json.dumps(state)))
      for _ in range(steps):
        ours = [iter(next(p)["tokens"].tolist()) for p in processes]
        at = len(rows)
        rows += [next(ours[g % count]) for g in range(at, at + size * count)]
      state = shards_lib.merge_states([p.get_state() for p in processes])
      assert state["rows"] == len(rows)
    whole = make_iterator(num_shards=num_shards, batch_size=1)
    assert rows == [b["tokens"][0].tolist() for b in _take(whole, len(rows))]
    assert len(rows) > 20

  def test_a_state_is_not_of_what_comes_after_it(self, make_iterator):
    iterator = make_iterator(num_shards=2)
    _take(iterator, 3)
    state = iterator.get_state()
    before = json.dumps(state)
    _take(iterator, 40)
    assert json.dumps(state) == before

  def test_orbax(self, make_iterator, tmp_path):
    import grain.checkpoint
    import orbax.checkpoint as ocp

    iterator = make_iterator()
    _take(iterator, 21)
    with ocp.CheckpointManager(tmp_path) as manager:
      manager.save(21, args=grain.checkpoint.CheckpointSave(iterator))
      manager.wait_until_finished()
      expected = _take(iterator, 20)
      restored = make_iterator()
      manager.restore(21, args=grain.checkpoint.CheckpointRestore(restored))
    assert _equal(_take(restored, 20), expected)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(length=25), "length=25: expected a multiple of segment_alignment=2"),
    (dict(batch_size=0), "batch_size=0: expected an integer >= 1"),
    (dict(seed=-1), "seed=-1: expected an integer from 0"),
    (dict(seed=2**32), "seed=4294967296: .* to 4294967295"),
    (dict(num_workers=-1), "num_workers=-1: expected an integer >= 0"),
    (dict(process_count=0), "process_count=0: expected"),
    (
      dict(process_index=2, process_count=2),
      "process_index=2: expected an integer from 0 to 1",
    ),
    (dict(process_count=51), "50 training documents for data.lanes=51"),
    (dict(num_shards=0), "data.lanes=0: expected an integer >= 1"),
  ],
)
def test_train_errors(make_iterator, changes, message):
  with pytest.raises(ValueError, match=message):
    make_iterator(**changes)


class TestHeldOut:
  @pytest.mark.parametrize("batch_size", [1, 3, 64])
  @pytest.mark.parametrize("segment_alignment", [1, 2, 3, 4])
  def test_accounting(self, tokenizer, segment_alignment, batch_size):
    documents = _documents()
    heldout = pipeline.heldout_batches(
      documents,
      tokenizer,
      batch_size=batch_size,
      length=24,
      segment_alignment=segment_alignment,
    )
    assert all(
      value.shape == (batch_size, 24) and value.dtype == np.int32
      for batch in heldout.batches
      for value in batch.values()
    )
    # One EOS a document and every text token; BOS is not predicted.
    expected = sum(len(tokenizer.encode(d.text)) + 1 for d in documents)
    assert heldout.num_tokens == expected
    counted = 0
    for batch in heldout.batches:
      here, following = batch["segment"][:, :-1], batch["segment"][:, 1:]
      counted += np.sum((here == following) & (following != 0))
    assert counted == expected
    assert heldout.num_bytes == sum(len(d.text.encode()) for d in documents)
    assert heldout.num_documents == len(documents)
    found = collections.Counter()
    for batch in heldout.batches:
      found.update(_segments(batch))
      # The last batch is filled up with padding.
      for value in batch.values():
        assert not value[batch["segment"] == 0].any()
    assert found == _chunks(documents, tokenizer)

  def test_same_every_time(self, tokenizer):
    first, second = (
      pipeline.heldout_batches(_documents(), tokenizer, **SHAPE)
      for _ in range(2)
    )
    assert _equal(first.batches, second.batches)

  @pytest.mark.parametrize("count", [1, 7, 50, 80])
  def test_max_documents(self, tokenizer, count):
    heldout = pipeline.heldout_batches(
      _documents(), tokenizer, max_documents=count, **SHAPE
    )
    expected = min(count, 50)
    assert heldout.num_documents == expected
    chunks = collections.Counter()
    for batch in heldout.batches:
      chunks.update(_segments(batch))
    ends = sum(n for c, n in chunks.items() if c[-1] == tokenizer_lib.EOS_ID)
    assert ends == expected
    all_chunks = _chunks(_documents(), tokenizer)
    assert not chunks - all_chunks
    assert heldout.num_bytes == sum(
      len(d.text.encode())
      for d in _documents()
      if not _chunks([d], tokenizer) - chunks
    )

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (dict(length=25), "multiple of segment_alignment=2"),
      (dict(batch_size=0), "batch_size=0"),
      (dict(max_documents=0), "max_documents=0: expected an integer >= 1"),
    ],
  )
  def test_errors(self, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
      pipeline.heldout_batches(_documents(), tokenizer, **{**SHAPE, **changes})
    with pytest.raises(ValueError, match="no held-out documents"):
      pipeline.heldout_batches([], tokenizer, **SHAPE)


class TestUnigram:
  def test_by_hand(self):
    # Predicted: 7, 7, 8, 1 and 8, 7, 9, 1 = 7 x3, 8 x2, 1 x2, 9 x1.
    batch = {
      "tokens": np.asarray(
        [[2, 7, 7, 8, 1, 0, 0, 0], [2, 8, 7, 2, 9, 1, 0, 0]]
      ),
      "segment": np.asarray(
        [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 2, 2, 2, 0, 0]]
      ),
    }
    heldout = pipeline.HeldOut((batch,), 16, 8, 2)
    counts = [3, 2, 2, 1]
    entropy = -sum(n / 8 * math.log2(n / 8) for n in counts)
    bits = pipeline.unigram_bits_per_byte(heldout)
    assert bits == pytest.approx(entropy * 8 / 16, rel=1e-12)


class TestLoadCorpus:
  def _config(self, tmp_path, **changes):
    for document in _documents():
      (tmp_path / f"{document.key}.txt").write_text(document.text)
    cfg = pipeline.default_config()
    cfg.source = f"{tmp_path}/*.txt"
    cfg.update(changes)
    return cfg

  def test_default_config(self):
    assert pipeline.default_config().to_dict() == dict(
      source="stdlib",
      heldout=None,
      heldout_fraction=0.1,
      text_key="text",
      on_bad="skip",
      mixture={},
      tokenizer=None,
      lanes=1,
      num_workers=0,
      seed=0,
    )
    cfg = pipeline.default_config()
    cfg.tokenizer = "a.model"  # Placeholders take the type they name.
    with pytest.raises(TypeError):
      cfg.heldout = 3

  def test_corpus(self, tmp_path, make_iterator):
    cfg = self._config(tmp_path, heldout_fraction=0.3)
    workdir = tmp_path / "workdir"
    corpus = pipeline.load_corpus(cfg, 300, workdir)
    assert len(corpus.train) + len(corpus.heldout) == 50
    assert corpus.tokenizer.vocab_size == 300
    assert (workdir / "tokenizer.model").exists()
    again = pipeline.load_corpus(cfg, 300, workdir)
    assert list(again.train) == list(corpus.train)
    assert list(again.heldout) == list(corpus.heldout)
    # The tokenizer that is kept there is the one that is read.
    with pytest.raises(ValueError, match="300 pieces.*vocab_size=301"):
      pipeline.load_corpus(cfg, 301, workdir)
    assert next(make_iterator(corpus.train))["tokens"].shape == (4, 24)

  def test_tokenizer_sees_the_train_split_only(self, tmp_path):
    (tmp_path / "valid.text").write_text("漢" * 500)
    cfg = self._config(tmp_path, heldout=f"{tmp_path}/valid.text")
    corpus = pipeline.load_corpus(cfg, 300, tmp_path / "workdir")
    assert corpus.heldout[0].text == "漢" * 500
    assert len(corpus.tokenizer.encode("漢")) == 3

  def test_given_tokenizer(self, tmp_path, tokenizer):
    path = tmp_path / "given.model"
    tokenizer_lib.train(_documents(), 290, path)
    cfg = self._config(tmp_path, tokenizer=str(path), heldout_fraction=0.3)
    corpus = pipeline.load_corpus(cfg, 300, tmp_path / "workdir")
    assert corpus.tokenizer.vocab_size == 290
    assert not (tmp_path / "workdir").exists()

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (dict(num_workers=-1), "data.num_workers=-1: expected"),
      (dict(lanes=0), "data.lanes=0: expected"),
      (dict(seed=-1), "data.seed=-1: expected"),
      (dict(heldout_fraction=2.0), "heldout_fraction=2.0: expected"),
      (dict(source="none*"), "'none\\*': no file matches"),
      (dict(tokenizer="none.model"), "none.model: cannot be read"),
    ],
  )
  def test_errors(self, tmp_path, changes, message):
    cfg = self._config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
      pipeline.load_corpus(cfg, 300, tmp_path)
    del cfg.text_key
    with pytest.raises(ValueError, match=r"lacks \['text_key'\]"):
      pipeline.load_corpus(cfg, 300, tmp_path)


def test_stdlib_end_to_end(tmp_path, make_iterator):
  corpus = pipeline.load_corpus(pipeline.default_config(), 1024, tmp_path)
  heldout = pipeline.heldout_batches(
    corpus.heldout,
    corpus.tokenizer,
    max_documents=8,
    batch_size=8,
    length=256,
    segment_alignment=4,
  )
  assert 2 < pipeline.unigram_bits_per_byte(heldout) < 5
  fill = [np.mean(b["segment"] > 0) for b in heldout.batches[:-1]]
  assert np.mean(fill) > 0.8
