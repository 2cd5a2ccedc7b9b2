"""Rows and batches: every word keeps its tag, every row is met once."""

import collections

import numpy as np
import pytest

from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from gemma_funnel.tasks import encode
from gemma_funnel.tasks.task import TaggedExample, Task, TextExample

TAGS = ("B-X", "I-X", "O")


class Characters:
  """Characters are tokens; "-" is none, and "#" is three."""

  bos_id, eos_id, unk_id = 2, 1, 3

  def encode(self, text):
    tokens = []
    for c in text.strip():
      tokens += [] if c == "-" else [ord(c) % 500 + 5] * (3 if c == "#" else 1)
    return tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp("encode") / "tokenizer.model"
  texts = [f"document {i}: " + f"word{i}\n" * (i % 9) for i in range(50)]
  documents = [sources.Document(str(i), t) for i, t in enumerate(texts)]
  return tokenizer_lib.train(documents, 300, path)


def _task(kind, labels=(), examples=()):
  return Task("t", kind, labels, ("accuracy",), {"train": examples})


_LETTERS = "abcxyz019.,'#-éß漢字🙂\u0301\u200b"


def _sentences(seed, count=30):
  """Words of odd letters; some are nothing to a tokenizer, some very long."""
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(count):
    words = [
      "".join(rng.choice(list(_LETTERS), int(rng.choice([1, 2, 5, 40]))))
      for _ in range(rng.integers(1, 30))
    ]
    words[0] = str(rng.choice(["-", "--", words[0]]))
    before = None
    if rng.random() < 0.5:
      before = tuple(map(str, rng.choice(["", " ", "\n  "], len(words))))
    tags = tuple(map(int, rng.integers(0, len(TAGS), len(words))))
    found.append(TaggedExample(tuple(words), tags, before))
  return found


@pytest.mark.parametrize("long", encode.LONG)
@pytest.mark.parametrize("length", [4, 9, 33])
@pytest.mark.parametrize("which", ["characters", "trained"])
def test_words_get_their_tags_back(which, length, long, trained):
  tokenizer = Characters() if which == "characters" else trained
  task = _task("tagging", TAGS)
  for seed in range(3):
    examples = _sentences(seed)
    rows = encode.encode(task, examples, tokenizer, length, long)
    assert {row.example for row in rows} == set(range(len(examples)))
    assert max(len(row.tokens) for row in rows) <= length
    assert all(row.label.shape == row.tokens.shape for row in rows)
    # What is predicted elsewhere does not matter.
    rng = np.random.default_rng(seed)
    predicted = [
      np.where(row.label < 0, rng.integers(0, 3, len(row.label)), row.label)
      for row in rows
    ]
    found = encode.join_words(task, rows, predicted, examples)
    kept = collections.Counter()
    for row in rows:
      kept[row.example] += np.sum(row.label != encode.IGNORE)
    for number, (example, tags) in enumerate(zip(examples, found, strict=True)):
      expected = [TAGS[tag] for tag in example.tags]
      count = kept[number]
      assert count >= 1
      if long == "window":
        assert count == len(expected)
      assert tags == expected[:count] + ["O"] * (len(expected) - count)
      cut = sum(row.num_cut for row in rows if row.example == number)
      assert cut == len(expected) - count


def test_truncation_leaves_out_no_word_that_fits():
  task, tokenizer = _task("tagging", TAGS), Characters()
  example = TaggedExample(("ab", "cde", "f", "gh"), (0, 1, 2, 0))
  count = lambda length: np.sum(
    encode.encode(task, [example], tokenizer, length)[0].label >= 0
  )
  assert [count(n) for n in (4, 6, 7, 8, 9, 10, 50)] == [1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("long", encode.LONG)
def test_a_label_stands_at_the_last_token_of_its_word(trained, long):
  task = _task("tagging", TAGS)
  for tokenizer in (Characters(), trained):
    examples = _sentences(7)
    for row in encode.encode(task, examples, tokenizer, 24, long):
      example, at = examples[row.example], row.first_word
      assert row.tokens[0] == BOS_ID and row.tokens[-1] == EOS_ID
      assert row.label[0] == row.label[-1] == encode.IGNORE
      (where,) = np.nonzero(row.label != encode.IGNORE)
      begin = 1
      before = example.before or ("", *[" "] * (len(example.words) - 1))
      for offset, end in enumerate(where):
        text = before[at + offset] + example.words[at + offset]
        expected = (tokenizer.encode(text) or [UNK_ID])[-22:]
        assert row.tokens[begin : end + 1].tolist() == expected
        assert row.label[end] == example.tags[at + offset]
        begin = end + 1
      assert begin == len(row.tokens) - 1


def test_words_without_a_row_are_outside_or_the_first_label():
  tokenizer, example = Characters(), TaggedExample(("ab", "cd"), (1, 1))
  for labels, outside in ((TAGS, "O"), (("noun", "verb"), "noun")):
    task = _task("tagging", labels)
    rows = encode.encode(task, [example], tokenizer, 4)
    found = encode.join_words(task, rows, [r.label for r in rows], [example])
    assert found == [[labels[1], outside]]


def _text_row(text, second=None, length=50):
  task = _task("classification", ("a", "b"))
  example = TextExample(text, second, 1)
  (row,) = encode.encode(task, [example], Characters(), length)
  return "".join(
    {BOS_ID: "[", EOS_ID: "]"}.get(t, chr((t - 5) % 500)) for t in row.tokens
  )


def test_texts_and_pairs():
  assert _text_row("abc") == "[abc]" and _text_row("") == "[]"
  assert _text_row("abcdef", length=6) == "[abcd]"
  assert _text_row("abc", "de") == "[abc]de]" and _text_row("", "") == "[]]"


@pytest.mark.parametrize("first", range(0, 12, 3))
@pytest.mark.parametrize("second", range(0, 12, 3))
def test_of_a_pair_the_longer_is_cut(first, second):
  for length in range(4, 26):
    row = _text_row("a" * first, "b" * second, length)
    kept = row.count("a"), row.count("b")
    assert row == f"[{'a' * kept[0]}]{'b' * kept[1]}]"
    # One token of the longer after the other.
    a, b = first, second
    while a + b > length - 3:
      a, b = (a - 1, b) if a > b else (a, b - 1)
    assert sum(kept) == a + b == min(first + second, length - 3)
    assert abs(kept[0] - a) <= 1


def test_numbers_stay_numbers():
  examples = [TextExample("a", None, label) for label in (3, 2.5)]
  rows = encode.encode(_task("regression"), examples, Characters(), 8)
  label = encode.batch(rows, 2, 8)["label"]
  assert label.dtype == np.float32 and label.tolist() == [3, 2.5]


@pytest.mark.parametrize(
  "length, long, text",
  [
    (3, "truncate", "length=3: expected .* >= 4"),
    (8, "cut", "long='cut': expected one of .*'window'"),
  ],
)
def test_what_cannot_be_encoded(length, long, text):
  with pytest.raises(ValueError, match=text):
    encode.encode(_task("tagging", TAGS), [], Characters(), length, long)


def test_a_batch_is_padded_and_filled_up():
  task = _task("tagging", TAGS)
  example = TaggedExample(("ab", "c"), (2, 0))
  rows = encode.encode(task, [example], Characters(), 8)
  batch = encode.batch(rows, 2, 6)
  a, b, c = (ord(x) + 5 for x in "abc")
  nothing = [0] * 6
  expected = {
    "tokens": [[BOS_ID, a, b, c, EOS_ID, PAD_ID], nothing],
    "segment": [[1, 1, 1, 1, 1, 0], nothing],
    "label": [[0, 0, 2, 0, 0, 0], nothing],
    "weight": [[0, 0, 1, 1, 0, 0], nothing],
  }
  assert {k: v.tolist() for k, v in batch.items()} == expected
  assert batch["weight"].dtype == np.float32
  task = _task("classification", ("x", "y"))
  rows = encode.encode(task, [TextExample("ab", None, 1)], Characters(), 8)
  batch = encode.batch(rows, 3, 4)
  assert batch["label"].tolist() == [1, 0, 0]
  assert batch["weight"].tolist() == [1, 0, 0]


def _rows(count, seed=0, longest=60):
  """Row i has the label i, and a length of its own."""
  rng = np.random.default_rng(seed)
  return [
    encode.Row(np.full(rng.integers(3, longest + 1), 9, np.int32), i, i)
    for i in range(count)
  ]


def _batches(rows, **changes):
  kwargs = dict(batch_size=4, length=60, seed=0, num_steps=500)
  return encode.TrainBatches(rows, **(kwargs | changes))


@pytest.mark.parametrize("count", [4, 5, 7, 70, 131])
def test_an_epoch_has_each_row_at_most_once(count):
  batches = _batches(_rows(count))
  steps = batches.epoch_steps
  assert steps == count // 4
  orders, seen = set(), set()
  for epoch in range(6):
    labels = [
      int(x)
      for step in range(epoch * steps, (epoch + 1) * steps)
      for x in batches[step]["label"]
    ]
    assert len(set(labels)) == len(labels) == steps * 4
    orders.add(tuple(labels))
    seen |= set(labels)
  assert seen == set(range(count))  # The remainder is not always the same.
  assert len(orders) == 6 or count < 50


def test_fewer_rows_than_a_batch_are_repeated():
  batches = _batches(_rows(3))
  assert batches.epoch_steps == 1 == encode.steps_of_epoch(3, 4)
  for step in range(4):
    counts = collections.Counter(batches[step]["label"].tolist())
    assert sorted(counts) == [0, 1, 2] and max(counts.values()) == 2


def test_batches_are_of_rows_about_as_long():
  rows = _rows(400)
  spreads = [
    np.ptp(_batches(rows)[i]["segment"].sum(axis=1)) for i in range(100)
  ]
  assert 1 < np.mean(spreads) < 8  # Of four drawn at random it is 34.
  widths = {_batches(rows)[i]["tokens"].shape[1] for i in range(100)}
  assert widths <= {16, 32, 60}  # Few programs, none beyond the length.
  assert widths == {16, 32, 60}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_parts_of_the_same_batch(count):
  rows = _rows(50)
  whole = _batches(rows)
  parts = [
    _batches(rows, process_index=i, process_count=count) for i in range(count)
  ]
  for step in range(60):
    expected, found = whole[step], [part[step] for part in parts]
    for name, value in expected.items():
      shares = [part[name] for part in found]
      assert {len(share) for share in shares} == {4 // count}
      together = np.concatenate(shares)
      order = np.argsort(np.concatenate([p["label"] for p in found]))
      np.testing.assert_array_equal(
        together[order], value[np.argsort(expected["label"])], err_msg=name
      )


def test_steps_at_random_are_those_in_order():
  rows = _rows(30)
  iterator = encode.train_iterator(_batches(rows, num_steps=40))
  found = list(iterator)
  assert len(found) == 40
  batches = _batches(rows, num_steps=40)
  for step in (39, 0, 7, 6, 21, 20):
    for name, value in batches[step].items():
      np.testing.assert_array_equal(value, found[step][name])
  labels = lambda seed: _batches(rows, seed=seed)[0]["label"].tolist()
  assert labels(0) != labels(1)


def test_an_iterator_goes_on_from_its_state():
  make = lambda: encode.train_iterator(_batches(_rows(30), num_steps=40))
  first, second = make(), make()
  for _ in range(17):
    next(first)
  second.set_state(first.get_state())
  rest, others = list(first), list(second)
  assert len(rest) == len(others) == 23
  for batch, other in zip(rest, others, strict=True):
    np.testing.assert_array_equal(batch["label"], other["label"])


@pytest.mark.parametrize("count", [1, 4, 11])
def test_evaluation_has_each_row_once(count):
  rows = _rows(count)
  seen, last = [], 0
  for chosen, batch in encode.eval_batches(rows, 4, 60):
    assert batch["tokens"].shape[0] == 4
    assert batch["weight"].tolist() == [1] * len(chosen) + [0] * (
      4 - len(chosen)
    )
    assert batch["label"][: len(chosen)].tolist() == chosen
    lengths = [len(rows[i].tokens) for i in chosen]
    assert batch["segment"].sum(axis=1)[: len(chosen)].tolist() == lengths
    assert max(lengths) <= batch["tokens"].shape[1]
    assert min(lengths) >= last
    last = max(lengths)
    seen += chosen
  assert sorted(seen) == list(range(count))
