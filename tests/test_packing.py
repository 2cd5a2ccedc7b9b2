"""Chunks and rows: nothing lost, nothing twice, every segment aligned."""

import collections

import grain
import numpy as np
import pytest

from gemma_funnel.config import resolve_funnel, total_stride
from gemma_funnel.data import packing, sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.funnel import check_segments

LENGTH = 24


class FakeTokenizer:
  """Every character is a token of its own, its code plus 5."""

  bos_id, eos_id = tokenizer_lib.BOS_ID, tokenizer_lib.EOS_ID

  def encode(self, text):
    return [ord(c) + 5 for c in text]


def _documents(count=60):
  rng = np.random.default_rng(0)
  return [
    sources.Document(str(i), chr(1000 + i) * int(rng.integers(1, 70)))
    for i in range(count)
  ]


def _pack(documents, segment_alignment=1, **changes):
  length, seed = changes.pop("length", LENGTH), changes.pop("seed", None)
  chunk = packing.ChunkDocuments(
    FakeTokenizer(), length, segment_alignment, **changes
  )
  dataset = grain.MapDataset.source(documents).to_iter_dataset()
  return list(packing.pack(chunk(dataset), length, seed))


def _segments(rows):
  """The tokens of every segment of every row."""
  for row in rows:
    for segment in range(1, row["segment"].max() + 1):
      yield row["tokens"][row["segment"] == segment]


@pytest.mark.parametrize("length", [2, 3, 5, 24])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 22, 23, 24, 100])
def test_chunk(length, count):
  tokens = list(range(10, 10 + count))
  chunks = packing.chunk(tokens, length)
  assert all(c.dtype == np.int32 and 2 <= len(c) <= length for c in chunks)
  assert all(c[0] == 2 and 2 not in c[1:] for c in chunks)
  assert np.concatenate([c[1:] for c in chunks]).tolist() == [*tokens, 1]
  assert len(chunks) == -(-(count + 1) // (length - 1))


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("segment_alignment", [1, 2, 3, 4])
def test_rows(segment_alignment, shuffle_seed):
  rows = _pack(
    _documents(), segment_alignment=segment_alignment, seed=shuffle_seed
  )
  for row in rows:
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
      key: ((LENGTH,), np.int32) for key in ("tokens", "segment", "position")
    }
    padding = row["segment"] == 0
    assert np.array_equal(padding, row["tokens"] == 0)
    assert not row["position"][padding].any()
    for segment in range(1, row["segment"].max() + 1):
      (where,) = np.nonzero(row["segment"] == segment)
      assert where[0] % segment_alignment == 0
      assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
      assert row["position"][where].tolist() == list(range(len(where)))
      assert row["tokens"][where[0]] == tokenizer_lib.BOS_ID


def test_alignment_is_not_there_by_chance():
  is_start = [
    (r["position"] == 0) & (r["segment"] > 0) for r in _pack(_documents())
  ]
  starts = np.concatenate([np.flatnonzero(row) for row in is_start])
  assert any(starts % 2) and any(starts % 3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alignment", [1, 2, 3, 4])
def test_every_token_is_in_exactly_one_segment(alignment, padded):
  padding = padded * alignment
  rows = _pack(_documents(), alignment, segment_padding=padding)
  assert collections.Counter(
    tuple(s.tolist()) for s in _segments(rows)
  ) == collections.Counter(
    tuple(c.tolist())
    for d in _documents()
    for c in packing.chunk(FakeTokenizer().encode(d.text), LENGTH - padding)
  )
  several = 0
  for row in rows:
    ends = np.flatnonzero(np.diff(row["segment"], append=0) != 0) + 1
    ends = [e for e in ends if row["segment"][e - 1]]
    several += len(ends) > 1
    for end in ends:
      # Up to the end of the row too: the short row ends there as well.
      assert end + padding <= LENGTH
      for value in row.values():
        assert not value[end : end + padding].any()
  assert several > 5


@pytest.mark.parametrize(
  "funnel, segment_alignment",
  [
    ("start=1,stride=2,keep_first=true", 2),
    ("start=1,stride=3,keep_first=true", 3),
    ("start=0,stride=2,keep_first=true+start=1,stride=2,keep_first=true", 4),
    ("start=0,stride=2+start=1,stride=3,keep_first=true", 6),
  ],
)
def test_a_gap_makes_room_for_first_tokens_kept_apart(
  funnel, segment_alignment
):
  stages = resolve_funnel(funnel, 4)
  assert total_stride(stages) == segment_alignment
  stack = lambda segment_padding: np.stack(
    [
      r["segment"]
      for r in _pack(
        _documents(120),
        segment_alignment=segment_alignment,
        segment_padding=segment_padding,
      )
    ]
  )
  check_segments(stack(segment_alignment), stages, causal=False)
  with pytest.raises(ValueError, match="leave a stride of padding"):
    check_segments(stack(0), stages, causal=False)
  check_segments(stack(0), stages, causal=True)


def test_eos_only_at_the_end_of_documents():
  documents = _documents()
  segments = list(_segments(_pack(documents, segment_alignment=2)))
  assert sum(s[-1] == tokenizer_lib.EOS_ID for s in segments) == len(documents)
  assert not any(tokenizer_lib.EOS_ID in s[:-1] for s in segments)


def test_rows_are_full():
  rows = _pack(_documents(400))
  assert np.mean([r["segment"] > 0 for r in rows]) > 0.9


def test_shuffle_seed():
  def order(shuffle_seed):
    segments = _segments(_pack(_documents(), seed=shuffle_seed))
    return [tuple(map(int, segment)) for segment in segments]

  plain, first, second = order(None), order(1), order(2)
  assert first != second != plain != first
  assert sorted(first) == sorted(second) == sorted(plain)
  assert order(1) == first


def test_predicted_mask():
  segment_BT = np.asarray([[1, 1, 1, 0, 2, 2, 0, 0], [0] * 8])
  expected = [[True, True, False, False, True, False, False], [False] * 7]
  assert packing.predicted_mask(segment_BT).tolist() == expected


@pytest.mark.parametrize(
  ("length", "segment_alignment", "message"),
  [
    (10, 4, "length=10: expected a multiple of segment_alignment=4"),
    (2, 4, "length=2: expected a multiple of segment_alignment=4"),
    (1, 1, "length=1: expected an integer >= 2"),
    (8, 0, "segment_alignment=0: expected an integer >= 1"),
  ],
)
def test_lengths(length, segment_alignment, message):
  with pytest.raises(ValueError, match=message):
    _pack(_documents(), segment_alignment=segment_alignment, length=length)
