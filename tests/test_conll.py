"""CoNLL files: sentences, comments and marks, and tags in every scheme."""

import os
import pathlib
import random

import pytest

from gemma_funnel import tasks
from gemma_funnel.tasks import conll


def _read(tmp_path, content, **keys):
  path = tmp_path / "x.conll"
  path.write_bytes(content.encode())
  return conll.read_sentences(str(path), **keys)


def _load(tmp_path, files, **keys):
  config = tasks.default_config()
  config.format = "conll"
  for split, content in files.items():
    path = tmp_path / f"{split}.conll"
    path.write_text(content)
    setattr(config, split, str(path))
  config.update(keys)
  return tasks.load(config)


class TestSentences:
  def test_white_space_lines_and_document_marks(self, tmp_path):
    content = (
      "-DOCSTART- -X- O\n\nThis DT O\r\nbank NN  I-ORG\n \t\n\n"
      "-DOCSTART- -X- O\nnext JJ O\n-DOCSTART-\none CD O"
    )
    found = _read(tmp_path, content)
    assert [s.words for s in found] == [("This", "bank"), ("next",), ("one",)]
    assert found[0].tags == ("O", "I-ORG")
    assert [s.place[-6:] for s in found] == ["line 3", "line 8", "ine 10"]

  def test_columns_and_separators(self, tmp_path):
    content = "1\tNew York\tB-LOC\tx\n2\t \u00a0a\tO\ty\n"
    found = _read(
      tmp_path, content, word_column=1, tag_column=2, separator="tab"
    )
    assert found[0].words == ("New York", " \u00a0a")
    assert found[0].tags == ("B-LOC", "O")

  def test_only_spaces_and_tabs_separate(self, tmp_path):
    found = _read(tmp_path, "a\u00a0b\u0085c \t O\n")
    assert found[0].words == ("a\u00a0b\u0085c",)

  def test_comments_are_no_words_and_words_no_comments(self, tmp_path):
    content = "# id = 7\n# a text\n#\n# O\nhere O\n# O\n\n#tag O\n"
    assert [s.words for s in _read(tmp_path, content)] == [
      ("#", "here", "#"),
      ("#tag",),
    ]

  def test_a_comment_within_a_sentence_is_a_bad_line(self, tmp_path):
    (found,) = _read(tmp_path, "a O\n# a b c\nb O\n")
    assert found.fault == "found 4 columns; expected 2"
    assert found.place.endswith("line 2")

  @pytest.mark.parametrize("separator", [None, "tab"])
  def test_an_empty_word_costs_nothing_but_itself(self, tmp_path, separator):
    content = "a\tO\n\tO\nb\tB-X\n \tO\n"
    (found,) = _read(tmp_path, content, separator=separator)
    assert not found.fault and found.tags == ("O", "O", "B-X", "O")
    assert [word.strip() for word in found.words] == ["a", "", "b", ""]

  def test_metrics_of_spans_need_them(self, tmp_path):
    rows = dict.fromkeys(("train", "dev", "test"), "a N\nb V\n")
    with pytest.raises(ValueError, match="'span_f1': found the tag 'N'"):
      _load(tmp_path, rows, metrics="span_f1")

  def test_wrong_number_of_columns(self, tmp_path):
    content = "a B-X O\nb O\n\nc x O\n\nd x O\n"
    with pytest.raises(ValueError, match="line 2: found 2 columns; expected 3"):
      _load(tmp_path, dict(train=content, dev=content, test=content))
    task = _load(
      tmp_path, dict(train=content, dev=content, test="a x O\n"), on_bad="skip"
    )
    assert [e.words for e in task.splits["train"]] == [("c",), ("d",)]
    assert task.skipped == {"train": 1, "dev": 1}

  @pytest.mark.parametrize(
    ("keys", "message"),
    [
      ({"word_column": 2}, "word_column=2, but it has 2 columns"),
      ({"tag_column": -3}, "tag_column=-3, but it has 2 columns"),
      ({"separator": ";"}, "separator=';'"),
    ],
  )
  def test_bad_keys(self, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
      _read(tmp_path, "a O\n", **keys)


# (what is read, its scheme, BIO2)
_SENTENCES = [
  ("I-A I-A O I-B", "bio1", "B-A I-A O B-B"),
  ("I-A B-A I-A I-B", "bio1", "B-A B-A I-A B-B"),
  ("B-A I-A O B-B B-B", "bio2", "B-A I-A O B-B B-B"),
  ("S-A B-A I-A E-A O S-B", "iobes", "B-A B-A I-A I-A O B-B"),
  ("U-A B-A I-A L-A O U-B", "iobes", "B-A B-A I-A I-A O B-B"),
  ("O O", "bio2", "O O"),
]


class TestSchemes:
  @pytest.mark.parametrize(("tags", "scheme", "expected"), _SENTENCES)
  def test_to_bio2(self, tags, scheme, expected):
    assert conll.detect_scheme([tags.split()]) == scheme
    assert conll.to_bio2(tags.split(), scheme) == tuple(expected.split())

  def test_detection_sees_all_sentences(self):
    assert conll.detect_scheme([["B-A"], ["B-A", "I-A"]]) == "bio2"
    assert conll.detect_scheme([["B-A"], ["O", "I-A"]]) == "bio1"
    assert conll.detect_scheme([["B-A"], ["B-A", "E-A"]]) == "iobes"
    assert conll.detect_scheme([["NN", "B"], ["O", "DT"]]) == "plain"

  @pytest.mark.parametrize("scheme", ["bio1", "bio2", "iobes"])
  def test_spans_survive(self, scheme):
    """Random spans, written in each scheme, are the same spans in BIO2."""
    rng = random.Random(0)
    for _ in range(300):
      spans = []  # Types and lengths; type O is outside.
      for _ in range(rng.randint(1, 6)):
        spans.append((rng.choice("OAB"), rng.randint(1, 3)))
      tags, bio2, previous = [], [], "O"
      for type_, length in spans:
        if type_ == "O":
          tags, bio2 = tags + ["O"] * length, bio2 + ["O"] * length
        else:
          tags += _write_span(type_, length, scheme, previous)
          bio2 += [f"B-{type_}"] + [f"I-{type_}"] * (length - 1)
        previous = type_
      assert conll.to_bio2(tags, scheme) == tuple(bio2)

  @pytest.mark.parametrize(
    ("tags", "scheme"),
    [
      ("O PER", "bio2"),
      ("O PER", "bio1"),
      ("B-", "bio2"),
      ("S-A", "bio2"),
      ("BI-A", "bio1"),
      ("-A", "bio1"),
    ],
  )
  def test_unknown_to_the_scheme(self, tags, scheme):
    *_, last = tags.split()
    with pytest.raises(ValueError, match=f"found the tag {last!r}.*{scheme!r}"):
      conll.to_bio2(tags.split(), scheme)

  @pytest.mark.parametrize(
    ("tags", "scheme", "message"),
    [
      ("O I-A", "bio2", "'I-A' .* after 'O'"),
      ("B-A I-B", "bio2", "'I-B' .* after 'B-A'"),
      ("B-A O", "iobes", "'O' .* after 'B-A'"),
      ("B-A", "iobes", "'O' .* after 'B-A'"),
      ("B-A E-B", "iobes", "'E-B' .* after 'B-A'"),
      ("O I-A", "iobes", "'I-A' .* after 'O'"),
      ("S-A E-A", "iobes", "'E-A' .* after 'S-A'"),
    ],
  )
  def test_malformed(self, tags, scheme, message):
    with pytest.raises(ValueError, match=message):
      conll.to_bio2(tags.split(), scheme)


def _write_span(type_, length, scheme, previous):
  inner = [f"I-{type_}"] * length
  if scheme == "bio2" or (scheme == "bio1" and previous == type_):
    inner[0] = f"B-{type_}"
  if scheme == "iobes":
    inner[0], inner[-1] = f"B-{type_}", f"E-{type_}"
    if length == 1:
      inner = [f"S-{type_}"]
  return inner


class TestTask:
  def test_span_labels(self, tmp_path):
    train = "a I-PER\nb I-PER\n\nc O\nd I-LOC\n"
    task = _load(tmp_path, dict(train=train, dev=train, test=train))
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert [e.tags for e in task.splits["test"]] == [(3, 4), (0, 1)]
    assert task.metrics[0] == "span_f1"

  def test_plain_labels(self, tmp_path):
    train = "a NN\nb DT\n"
    task = _load(tmp_path, dict(train=train, dev=train, test="a NN\n"))
    assert task.labels == ("DT", "NN")
    assert task.metrics == ("token_accuracy", "token_macro_f1")

  @pytest.mark.parametrize("split", ["dev", "test"])
  def test_unknown_tag(self, tmp_path, split):
    train = "a B-PER\n"
    files = dict(train=train, dev=train, test=train)
    files[split] = "a O\n\nb O\nc B-ORG\n"
    message = rf"{split}.conll, line 3: found the tag 'B-ORG' \(word 2"
    with pytest.raises(ValueError, match=message):
      _load(tmp_path, files)
    (tmp_path / "labels.txt").write_text("O\nB-ORG\nI-ORG\nB-PER\nI-PER\n")
    task = _load(tmp_path, files, labels=str(tmp_path / "labels.txt"))
    assert task.splits[split][1].tags == (0, 1)

  @pytest.mark.parametrize(
    ("test", "scheme", "message"),
    [
      # A tag without a prefix among spans.
      ("a B-PER\nb O\n\nc PER\n", "auto", "line 4: found the tag 'PER'"),
      ("\n \n", "auto", "test.conll: no rows"),
      ("a B-PER\n", "bmes", "scheme='bmes'"),
    ],
  )
  def test_what_is_no_task(self, tmp_path, test, scheme, message):
    files = dict(train="a B-PER\n", dev="a B-PER\n", test=test)
    with pytest.raises(ValueError, match=message):
      _load(tmp_path, files, scheme=scheme)


@pytest.mark.skipif(
  "GEMMA_FUNNEL_DATA" not in os.environ, reason="needs GEMMA_FUNNEL_DATA"
)
@pytest.mark.parametrize(
  ("files", "separator", "words", "spans"),
  [
    ("wnut17/train wnut17/dev wnut17/test", "tab", 23394, 1079),
    ("sec_filings/train_FIN5 - sec_filings/test_FIN3", None, 13246, 318),
  ],
)
def test_published_counts(files, separator, words, spans):
  root = pathlib.Path(os.environ["GEMMA_FUNNEL_DATA"]) / "ner"
  config = tasks.default_config()
  config.update(format="conll", separator=separator)
  for split, name in zip(("train", "dev", "test"), files.split(), strict=True):
    if name != "-":
      setattr(config, split, str(root / f"{name}.conll"))
  task = tasks.load(config)
  tags = [task.labels[t] for e in task.splits["test"] for t in e.tags]
  assert len(tags) == words
  assert sum(tag.startswith("B-") for tag in tags) == spans
