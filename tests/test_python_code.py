"""Tasks of the standard library: tags by the tree, splits by file."""

import collections
import re
import textwrap

import pytest

from gemma_funnel import tasks
from gemma_funnel.data import sources
from gemma_funnel.tasks import python_code


def _config(**keys):
  config = tasks.default_config()
  config.update(keys)
  return config


def _tags(source):
  words, _ = python_code.words_of(textwrap.dedent(source))
  return [(word.text, word.tag) for word in words]


class TestTags:
  def test_each_class(self):
    found = _tags("""
      from os import path as p  # here
      class Box(Base):
        async def put(self, *items, key=None):
          "Text."
          self.size += len(items) * 2
          return self.sort(items, key=lambda key: key.rank)
    """)
    words = collections.defaultdict(list)
    for word, tag in found:
      words[tag].append(word)
    keywords = "from import as class async def None return lambda"
    assert words == {
      "keyword": keywords.split(),
      "import": ["os", "path", "p"],
      "comment": ["# here"],
      "class": ["Box"],
      "function": ["put"],
      "parameter": ["self", "items", "key", "key"],
      "variable": ["Base", "self", "items", "self", "items", "key"],
      "string": ['"Text."'],
      "attribute": ["size", "rank"],
      "builtin": ["len"],
      "call": ["sort"],
      "keyword_argument": ["key"],
      "number": ["2"],
      "operator": [*"():(,*,=):", ".", "+=", *"()*.(,=:.)"],
    }
    assert [tag for word, tag in found if word == "key"] == [
      *("parameter", "keyword_argument", "parameter", "variable")
    ]

  def test_places_count_characters(self):
    found = _tags('x = "é", f(é=1), é.ö\n')
    assert [x for x in found if x[1] not in ("operator", "string")] == [
      ("x", "variable"),
      ("f", "call"),
      ("é", "keyword_argument"),
      ("1", "number"),
      ("é", "variable"),
      ("ö", "attribute"),
    ]

  def test_an_f_string_is_one_word_in_every_version(self):
    source = "x = f'a{y}b{{c}}{f\"{z}\"}' + f'''{\nw}''' + y\n"
    strings = [word for word, tag in _tags(source) if tag == "string"]
    assert strings == ["f'a{y}b{{c}}{f\"{z}\"}'", "f'''{\nw}'''"]
    assert [tag for _, tag in _tags(source)][-2:] == ["operator", "variable"]

  def test_soft_keywords(self):
    found = _tags("match = 1\nmatch match:\n  case _:\n    pass\n")
    tags = [tag for word, tag in found if word in ("match", "case")]
    assert tags == ["variable", "keyword", "variable", "keyword"]


def test_only_functions_and_classes_are_cut_up():
  table = "".join(f"x{i} = {i}\n" for i in range(60))
  assert not list(python_code._snippets(table))
  body = "def f():\n" + "".join(f"  x{i} = {i}\n" for i in range(60))
  found = list(python_code._snippets(table + body + table))
  assert found[0].words[:2] == ("def", "f")
  # What is left at the end may be too short.
  size = 5 + 3 * 60
  total = sum(len(e.words) for e in found)
  assert size - python_code.MIN_WORDS < total <= size


@pytest.fixture(scope="module")
def code_tags():
  return tasks.load(
    _config(format="code_tags", max_train=300, max_dev=40, max_test=100)
  )


class TestCodeTags:
  def test_sizes_and_labels(self, code_tags):
    sizes = {s: len(part) for s, part in code_tags.splits.items()}
    assert sizes == {"train": 300, "dev": 40, "test": 100}
    assert code_tags.labels == python_code.TAGS
    assert code_tags.metrics == ("token_accuracy", "token_macro_f1")
    for example in code_tags.splits["train"]:
      size = len(example.words)
      assert python_code.MIN_WORDS <= size <= python_code.MAX_WORDS
      assert size == len(example.tags) == len(example.before)

  def test_text_is_exact(self, code_tags):
    """Words and what is before them are a piece of some file, in its split."""
    config = _config(format="code_tags")
    files = python_code.split_files(sources.stdlib_documents(), config)
    for split in ("dev", "test"):
      text = "\0".join(d.text.replace("\r\n", "\n") for d in files[split])
      for example in code_tags.splits[split]:
        pairs = zip(example.before, example.words, strict=True)
        assert "".join(b + w for b, w in pairs) in text

  def test_all_tags_occur(self, code_tags):
    found = {tag for e in code_tags.splits["train"] for tag in e.tags}
    assert found == set(range(len(python_code.TAGS)))

  def test_a_name_alone_does_not_tell(self, code_tags):
    """The likeliest tag of each word: far from right, far from chance."""
    names = {code_tags.labels.index(tag) for tag in python_code.NAME_TAGS}
    counts = collections.defaultdict(collections.Counter)
    for example in code_tags.splits["train"]:
      for word, tag in zip(example.words, example.tags, strict=True):
        counts[word][tag] += 1
    variable = collections.Counter([code_tags.labels.index("variable")])
    hits = [
      counts.get(word, variable).most_common(1)[0][0] == tag
      for example in code_tags.splits["test"]
      for word, tag in zip(example.words, example.tags, strict=True)
      if tag in names
    ]
    assert 0.3 < sum(hits) / len(hits) < 0.8

  def test_the_same_again_and_another_by_seed(self, code_tags):
    keys = dict(format="code_tags", max_train=30, max_dev=5, max_test=10)
    again = tasks.load(_config(**keys)).splits
    assert again["train"] == code_tags.splits["train"][:30]
    other = tasks.load(_config(**keys, split_seed=1)).splits
    assert other["train"] != again["train"]


def test_files_are_in_one_split():
  documents = sources.stdlib_documents()
  files = python_code.split_files(documents, _config())
  keys = [d.key for part in files.values() for d in part]
  assert sorted(keys) == [d.key for d in documents]
  assert 0.08 < len(files["test"]) / len(keys) < 0.12
  with pytest.raises(ValueError, match="leaves no file"):
    python_code.split_files(documents, _config(dev_fraction=0.95))


@pytest.fixture(scope="module")
def code_packages():
  return tasks.load(
    _config(format="code_packages", max_train=200, max_test=100)
  )


class TestCodePackages:
  def test_balanced(self, code_packages):
    assert 4 <= len(code_packages.labels) <= python_code.MAX_PACKAGES
    for part in code_packages.splits.values():
      counts = collections.Counter(e.label for e in part)
      assert set(counts) == set(range(len(code_packages.labels)))
      assert len(set(counts.values())) == 1
    size = 100 // len(code_packages.labels) * len(code_packages.labels)
    assert 0 < len(code_packages.splits["test"]) <= size
    assert code_packages.kind == "classification"

  def test_snippets_are_of_their_package_and_no_file_is_shared(
    self, code_packages
  ):
    used = {}
    squeeze = lambda text: re.sub(r"\n(\s*\n)+", "\n", text)
    files = [(d.key, squeeze(d.text)) for d in sources.stdlib_documents()]
    for split, part in code_packages.splits.items():
      keys = used.setdefault(split, set())
      for example in part:
        package = code_packages.labels[example.label]
        own = [(key, text) for key, text in files if key.startswith(package)]
        found = [key for key, text in own if example.text in text]
        assert found
        assert package not in example.text.lower().split()
        # Some snippets are in several files, word for word.
        if len(found) == 1:
          keys.update(found)
    assert sum(map(len, used.values())) == len(set().union(*used.values()))

  def test_too_few(self):
    with pytest.raises(ValueError, match="max_test=2: expected at least one"):
      tasks.load(_config(format="code_packages", max_test=2))


def test_few_packages(monkeypatch):
  document = sources.Document("json/a.py", "x = 1\n" * 100)
  monkeypatch.setattr(sources, "stdlib_documents", lambda: [document])
  with pytest.raises(ValueError, match="0 packages of the standard library"):
    tasks.load(_config(format="code_packages"))
