"""Tables as tasks of each kind, and what messages say of bad rows."""

import json
import os
import pathlib

import pytest

from gemma_funnel import tasks
from gemma_funnel.tasks.task import (
  ChoiceExample,
  Document,
  GenerationExample,
  TextExample,
)


def _load(tmp_path, files, **keys):
  """Files by split: a list is written as .jsonl, a string as .tsv."""
  config = tasks.default_config()
  config.update(keys)
  for split, content in files.items():
    is_json = isinstance(content, list)
    path = tmp_path / f"{split}.{'jsonl' if is_json else 'tsv'}"
    if is_json:
      content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content)
    config[split] = str(path)
  return tasks.load(config)


def _test(tmp_path, kind, *rows, **keys):
  """The test split of rows, a task of that kind."""
  task = _load(tmp_path, {"test": list(rows)}, kind=kind, **keys)
  return task.splits["test"]


_TRAIN = "text\tlabel\nx\tpos\ny\tneg\nz\tpos\n"
_TEST = "text\tlabel\nu\tneg\n"


def _classify(tmp_path, train=_TRAIN, dev=_TEST, test=_TEST, **keys):
  keys = {"kind": "classification", "text": "text", "label": "label", **keys}
  return _load(tmp_path, dict(train=train, dev=dev, test=test), **keys)


def _write_labels(tmp_path, content):
  (tmp_path / "labels.txt").write_text(content)
  return str(tmp_path / "labels.txt")


class TestClassification:
  def test_labels_are_those_of_train_sorted(self, tmp_path):
    task = _classify(tmp_path)
    assert task.labels == ("neg", "pos")
    assert task.splits["train"] == tuple(
      TextExample(text, None, label)
      for text, label in (("x", 1), ("y", 0), ("z", 1))
    )
    assert task.metrics == ("accuracy", "macro_f1")
    assert not task.skipped

  def test_pairs(self, tmp_path):
    content = "b\ta\tlabel\n1\t2\tx\n"
    task = _classify(tmp_path, content, content, content, text="a", second="b")
    assert task.splits["test"] == (TextExample("2", "1", 0),)

  def test_names_or_ids_of_a_file(self, tmp_path):
    labels = _write_labels(tmp_path, "pos\nneg\nother\n")
    test = "text\tlabel\nu\t2\nv\tneg\n"
    task = _classify(tmp_path, test=test, labels=labels)
    assert task.labels == ("pos", "neg", "other")
    assert [e.label for e in task.splits["test"]] == [2, 1]
    assert [e.label for e in task.splits["train"]] == [0, 1, 0]
    # Labels that are numbers are names first.
    labels = _write_labels(tmp_path, "1\n0\n")
    content = "text\tlabel\nu\t1\nv\t0\n"
    task = _classify(tmp_path, content, content, content, labels=labels)
    assert [e.label for e in task.splits["test"]] == [0, 1]

  @pytest.mark.parametrize("split", ["dev", "test"])
  def test_unknown_label(self, tmp_path, split):
    message = f"{split}.tsv, line 3: found the label 'new'.*neg, pos"
    with pytest.raises(ValueError, match=message):
      _classify(tmp_path, **{split: _TEST + "v\tnew\n"})
    labels = _write_labels(tmp_path, "pos\nneg\n")
    with pytest.raises(
      ValueError, match=f"{split}.tsv, line 3: .*'2'.*below 2"
    ):
      _classify(tmp_path, **{split: _TEST + "v\t2\n"}, labels=labels)

  def test_several_labels_in_a_cell(self, tmp_path):
    train = "text\tlabel\nx\t1\ny\t3\nz\t1,3\n"
    rows = dict(train=train, dev=train, test="text\tlabel\nx\t1\n")
    with pytest.raises(ValueError, match="line 4: found the labels '1,3'"):
      _classify(tmp_path, **rows)
    task = _classify(tmp_path, **rows, on_bad="skip")
    assert task.labels == ("1", "3")
    assert task.skipped == {"train": 1, "dev": 1}

  def test_a_comma_in_a_name(self, tmp_path):
    content = "text\tlabel\nx\tyes, sir\ny\tno\nz\tyes\nw\tsir\n"
    task = _classify(tmp_path, content, content, content)
    assert task.labels == ("no", "sir", "yes", "yes, sir")

  @pytest.mark.parametrize(
    ("row", "message"),
    [
      ("x\n", "found 1 columns; expected 2"),
      (" \tpos\n", "'text' is empty"),
      ("x\t \n", "found the label ' '"),
    ],
  )
  def test_bad_rows(self, tmp_path, row, message):
    with pytest.raises(ValueError, match=f"train.tsv, line 5: .*{message}"):
      _classify(tmp_path, train=_TRAIN + row)
    task = _classify(tmp_path, train=_TRAIN + row, on_bad="skip")
    assert len(task.splits["train"]) == 3
    assert task.skipped == {"train": 1}

  def test_bad_json(self, tmp_path):
    rows = [{"text": "x", "label": True}, {"text": "y", "label": 0}]
    assert _classify(tmp_path, rows, rows, rows).labels == ("0", "true")
    for text, label, message in [
      (["x"], 0, "'text' is a list"),
      ("\ud800", 0, "not Unicode"),
      ("x", None, "found the label None"),
    ]:
      bad = [*rows, {"text": text, "label": label}]
      with pytest.raises(ValueError, match=f"jsonl, line 3: .*{message}"):
        _classify(tmp_path, rows, rows, bad)

  @pytest.mark.parametrize("content", ["", "text\tlabel\n"])
  def test_empty_file(self, tmp_path, content):
    with pytest.raises(ValueError, match="train.tsv: no rows"):
      _classify(tmp_path, train=content)

  def test_all_rows_skipped(self, tmp_path):
    with pytest.raises(ValueError, match=r"split test .* empty \(1 malformed"):
      _classify(tmp_path, test="text\tlabel\nu\tnew\n", on_bad="skip")


class TestRegression:
  def _load(self, tmp_path, *test):
    rows = [{"text": "x", "label": 1}]
    test = [{"text": "x", "label": value} for value in test]
    files = dict(train=rows, dev=rows, test=test)
    return _load(tmp_path, files, kind="regression", text="text", label="label")

  def test_numbers(self, tmp_path):
    task = self._load(tmp_path, 1, "-2.5e1")
    assert [e.label for e in task.splits["test"]] == [1.0, -25.0]
    assert task.labels == ()
    assert task.metrics == ("pearson", "spearman")

  @pytest.mark.parametrize("value", ["nan", "inf", "four", "", None, True, [1]])
  def test_no_finite_number(self, tmp_path, value):
    with pytest.raises(ValueError, match="line 1: .*expected a finite number"):
      self._load(tmp_path, value)


class TestChoice:
  def test_minimal_pairs(self, tmp_path):
    row = {"sentence_good": "a", "sentence_bad": "b", "UID": "agreement"}
    task = _load(tmp_path, {"test": [row]}, **tasks.preset("blimp"))
    expected = ChoiceExample("", ("a", "b"), 0, "agreement")
    assert task.splits == {"test": (expected,)}
    assert task.metrics == ("accuracy",)

  @pytest.mark.parametrize(
    ("answer", "index"), [(1, 1), ("0", 0), ("blue", 2), ("4", 1)]
  )
  def test_answers_in_a_list(self, tmp_path, answer, index):
    row = {"q": "It is", "c": ["red", "4", "blue"], "a": answer}
    keys = dict(prompt="q", choices="c", answer="a")
    expected = ChoiceExample("It is", ("red", "4", "blue"), index)
    assert _test(tmp_path, "choice", row, **keys) == (expected,)

  def test_answer_names_a_column(self, tmp_path):
    row = {"a": "x", "b": "y", "right": "b"}
    (found,) = _test(tmp_path, "choice", row, choices="a,b", answer="right")
    assert found.answer == 1

  @pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
      (["x", "y"], 2, "found the answer 2; expected an index from 0 to 1"),
      (["x", "y"], -1, "found the answer -1"),
      (["x", "y"], True, "found the answer True"),
      (["x", "x"], "x", "found the answer 'x'"),
      (["x"], 0, "found 1 choices"),
      ("xy", 0, "expected a list of strings"),
      (["x", ""], 0, "is empty"),
    ],
  )
  def test_bad_rows(self, tmp_path, choices, answer, message):
    row = {"c": choices, "a": answer}
    with pytest.raises(ValueError, match=f"test.jsonl, line 1: .*{message}"):
      _test(tmp_path, "choice", row, choices="c", answer="a")
    with pytest.raises(ValueError, match="answer is not set"):
      _test(tmp_path, "choice", row, choices="c")


class TestGeneration:
  def test_answers(self, tmp_path):
    keys = dict(kind="generation", prompt="q", answer="a")
    rows = {"test": [{"q": "1 + 1?", "a": "It is 1 + 1 = 2.\n#### 2 "}]}
    task = _load(tmp_path, rows, **keys, answer_pattern="#### (.*)")
    assert task.splits["test"] == (GenerationExample("1 + 1?", ("2",)),)
    assert task.metrics == ("exact_match",)
    task = _load(tmp_path, {"test": [{"q": "x", "a": ["one", "1"]}]}, **keys)
    assert task.splits["test"][0].answers == ("one", "1")

  @pytest.mark.parametrize(
    ("answer", "pattern", "message"),
    [
      ("none", "#### (.*)", "line 1: .*finds nothing in the answer 'none'"),
      ("####", "####(.*)", "line 1: .*finds nothing"),
      ("x", "(", r"answer_pattern='\(': no regular expression"),
      ([], None, "line 1: no answer"),
      (2, None, "line 1: .*'a' is a int"),
    ],
  )
  def test_bad(self, tmp_path, answer, pattern, message):
    row, keys = {"q": "x", "a": answer}, dict(prompt="q", answer="a")
    with pytest.raises(ValueError, match=message):
      _test(tmp_path, "generation", row, **keys, answer_pattern=pattern)


class TestPerplexity:
  def test_a_table_has_many(self, tmp_path):
    rows = {"test": [{"t": "one"}, {"t": "two"}]}
    task = _load(tmp_path, rows, kind="perplexity", text="t")
    assert task.splits["test"] == (Document("one"), Document("two"))
    assert task.metrics == ()
    with pytest.raises(ValueError, match="text is not set"):
      _load(tmp_path, rows, kind="perplexity")

  def test_a_text_is_a_document_or_its_lines_are(self, tmp_path):
    path = tmp_path / "text.txt"
    load = lambda documents: _load(
      tmp_path, {}, kind="perplexity", test=str(path), documents=documents
    )
    text = "one\x85still one\r\n\n  \ntwo\n"
    path.write_bytes(text.encode())
    assert load("file").splits["test"] == (Document(text),)
    lines = Document("one\x85still one"), Document("two")
    assert load("line").splits["test"] == lines
    with pytest.raises(ValueError, match="documents='page'"):
      load("page")
    path.write_text(" \n")
    with pytest.raises(ValueError, match="text.txt: no rows"):
      load("file")


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"kind": None}, "kind=None: expected one of"),
    ({"kind": "tagging"}, "kind='tagging': expected one of"),
    ({"label": None}, "label is not set"),
    ({"prompt": "text"}, "prompt='text': kind='classification' does not"),
    ({"answer_pattern": "x"}, "answer_pattern='x'"),
    ({"text": "none"}, r"train.tsv: no column 'none'; found \['text'"),
    ({"kind": "regression", "labels": "x"}, "labels='x'.*does not use it"),
  ],
)
def test_keys(tmp_path, keys, message):
  with pytest.raises(ValueError, match=message):
    _classify(tmp_path, **keys)


@pytest.mark.skipif(
  "GEMMA_FUNNEL_DATA" not in os.environ, reason="needs GEMMA_FUNNEL_DATA"
)
def test_real_tables():
  root = pathlib.Path(os.environ["GEMMA_FUNNEL_DATA"])
  config, folder = tasks.default_config(), root / "cls" / "goemotions_group"
  config.update(kind="classification", header=False, text="0", label="1")
  config.update(on_bad="skip", labels=str(folder / "labels.txt"))
  config.update({s: str(folder / f"{s}.tsv") for s in ("train", "dev", "test")})
  task = tasks.load(config)
  assert len(task.splits["train"]) == 18454
  assert task.skipped["train"] == 20000 - 18454


def test_a_split_may_be_several_files(tmp_path):
  for name, label in (("a", "x"), ("b", "y"), ("c,d", "x")):
    (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\nof {name}\t{label}\n")
  at = lambda *names: ", ".join(str(tmp_path / f"{n}.tsv") for n in names)
  config = tasks.default_config()
  config.update(kind="classification", text="text", label="label")
  config.update(train=at("a", "b"), dev=at("c,d"), test=at("b"))
  task = tasks.load(config)
  texts = lambda split: [e.text for e in task.splits[split]]
  assert texts("train") == ["of a", "of b"] and texts("dev") == ["of c,d"]
  config.train = at("a", "missing")
  with pytest.raises(ValueError, match="missing.tsv: cannot be read"):
    tasks.load(config)
