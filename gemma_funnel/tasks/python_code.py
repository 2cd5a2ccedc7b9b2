"""Tasks that need no download, of the standard library's own sources.

`code_tags`: what each word of a snippet of code is (a parameter, an attribute,
a call...), which for names its place in the syntax tree tells and the word
alone does not. `code_packages`: the package a snippet is from.

No file is in two splits, so that what is nearly the same does not leak. Labels
and sizes are those of the running Python: another version has other sources.
"""

import ast
import builtins
from collections.abc import Iterator, Sequence
import hashlib
import io
import keyword
import re
import tokenize
from typing import Any, NamedTuple
import warnings

from gemma_funnel.checks import require
from gemma_funnel.data import sources
from gemma_funnel.tasks import conll, examples
from gemma_funnel.tasks.task import (
  SPLITS,
  TaggedExample,
  Task,
  TextExample,
  sample,
)

# Words of a snippet to tag, and the longest word: a docstring is one, and
# would crowd the rest out.
MIN_WORDS, MAX_WORDS = 24, 60
MAX_WORD_CHARACTERS = 80
# Snippets of one file, for many files to be seen.
_TAGGED_PER_FILE = 20
_TEXTS_PER_FILE = 40
# Lines of a snippet whose package is to be told.
_TEXT_LINES = 12
# How many packages, and how many files each must have.
MAX_PACKAGES = 10
MIN_FILES = 12
_TEST_FRACTION = 0.1

# Classes of names that no list of words can tell apart, and of other words.
NAME_TAGS = tuple(
  "attribute call class function import keyword_argument parameter "
  "variable".split()
)
_OF_TOKENS = {
  "STRING": "string",
  "NUMBER": "number",
  "COMMENT": "comment",
  "OP": "operator",
}
TAGS = tuple(sorted({*NAME_TAGS, *_OF_TOKENS.values(), "builtin", "keyword"}))
_BUILTINS = frozenset(dir(builtins))


class Word(NamedTuple):
  """A word of code, and where it is: (line from 1, column)."""

  tag: str
  text: str
  start: tuple[int, int]
  end: tuple[int, int]


def load(config: Any) -> Task:
  """Makes the task; see `tasks.load`.

  Sizes are `max_train`, `max_dev` and `max_test`, or what there is: only as
  many files are read as it takes. Classes of code_packages have equal sizes.
  """
  make = _load_tags if config.format == "code_tags" else _load_packages
  return make(sources.stdlib_documents(), config)


def split_files(
  documents: Sequence[sources.Document], config: Any
) -> dict[str, list[sources.Document]]:
  """Files by split, each in a random order; at least one in dev and in test."""
  found = _shuffled(documents, config)
  test = max(1, round(_TEST_FRACTION * len(found)))
  end = test + max(1, round(config.dev_fraction * len(found)))
  _require_train(end < len(found), f"{len(found)}", config)
  return {"test": found[:test], "dev": found[test:end], "train": found[end:]}


def _shuffled(documents, config) -> list[sources.Document]:
  key = lambda d: hashlib.sha256(f"{config.split_seed}:{d.key}".encode())
  return sorted(documents, key=lambda d: key(d).digest())


def _require_train(ok: bool, files: str, config) -> None:
  require(
    ok,
    f"dev_fraction={config.dev_fraction}: leaves no file of {files} to train "
    f"on; expected less than {1 - _TEST_FRACTION}",
  )


def _load_tags(documents, config) -> Task:
  parts = {}
  for split, files in split_files(documents, config).items():
    wanted, part = config[f"max_{split}"], []
    for document in files:
      if wanted is not None and len(part) >= wanted:
        break
      found = list(_snippets(document.text))
      part += sample(found, _TAGGED_PER_FILE, config, document.key)
    parts[split] = part[:wanted]
  return Task("code_tags", "tagging", TAGS, conll.PLAIN_METRICS, parts)


def _snippets(source: str) -> Iterator[TaggedExample]:
  """Disjoint runs of words within functions and classes, exact to the blank."""
  try:
    words, inside = words_of(source)
  except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
    return  # A file for another version: lib2to3 has some.
  lines = _lines(source)
  run: list[Word] = []
  for word in [*words, None]:
    fits = (
      word is not None
      and len(word.text) <= MAX_WORD_CHARACTERS
      and word.start[0] in inside
    )
    new_line = bool(run) and fits and word.start[0] != run[-1].end[0]
    is_full = len(run) == MAX_WORDS or (new_line and len(run) >= MIN_WORDS)
    if run and (not fits or is_full):
      if len(run) >= MIN_WORDS:
        tags, texts, starts, ends = zip(*run, strict=True)
        gaps = zip(ends[:-1], starts[1:], strict=True)
        before = ("", *(_slice(lines, start, end) for start, end in gaps))
        yield TaggedExample(texts, tuple(map(TAGS.index, tags)), before)
      run = []
    if fits:
      run.append(word)


def _lines(source: str) -> list[str]:
  # As tokenize reads them: not splitlines(), which cuts at form feeds.
  return list(io.StringIO(source, newline=None))


def _slice(lines: list[str], start, end) -> str:
  (row, column), (last, stop) = start, end
  part = lines[row - 1 : last]
  part[-1] = part[-1][:stop]
  part[0] = part[0][column:]
  return "".join(part)


def words_of(source: str) -> tuple[list[Word], set[int]]:
  """The words of a file with their tags, and the lines within a def or class.

  Raises:
    SyntaxError, ValueError, tokenize.TokenError: it is no Python of this
      version.
  """
  lines = _lines(source)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of escapes that are invalid.
    tree = ast.parse("".join(lines))
  names, inside = _names(tree, lines)
  words, previous, depth, opened = [], "", 0, (0, 0)
  for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
    kind = tokenize.tok_name[token.type]
    # From 3.12 on, an f-string is many tokens: one word, as before.
    if kind == "FSTRING_START":
      opened = token.start if depth == 0 else opened
      depth += 1
    elif kind == "FSTRING_END":
      depth -= 1
      if depth == 0:
        text = _slice(lines, opened, token.end)
        words.append(Word("string", text, opened, token.end))
    elif depth == 0 and token.string.strip() and kind != "ENDMARKER":
      tag = _tag(kind, token, previous, names)
      if tag:
        words.append(Word(tag, token.string, token.start, token.end))
        previous = token.string
  return words, inside


def _tag(kind: str, token, previous: str, names) -> str | None:
  if kind != "NAME":
    return _OF_TOKENS.get(kind)
  if keyword.iskeyword(token.string):
    return "keyword"
  if previous in ("def", "class"):
    return "function" if previous == "def" else "class"
  if token.start in names:
    return names[token.start]
  # `match`, `case` and `type` have no place of their own in the tree; names
  # that `global`, `except ... as` and patterns bind have none either.
  soft = keyword.issoftkeyword(token.string) and token.string != "_"
  return "keyword" if soft else "variable"


def _names(tree: ast.AST, lines: list[str]):
  """Tags of names by place, and the lines within a def or class."""
  names, inside, nodes = {}, set(), list(ast.walk(tree))
  called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}

  def put(line: int, offset: int, tag: str) -> None:
    # The tree counts bytes, tokenize characters.
    names[line, len(lines[line - 1].encode()[:offset].decode())] = tag

  for node in nodes:
    match node:
      case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
        inside.update(range(node.lineno, node.end_lineno + 1))
      case ast.arg():
        put(node.lineno, node.col_offset, "parameter")
      case ast.keyword(arg=str()):
        put(node.lineno, node.col_offset, "keyword_argument")
      case ast.Attribute():
        tag = "call" if id(node) in called else "attribute"
        size = len(node.attr.encode())
        put(node.end_lineno, node.end_col_offset - size, tag)
      case ast.Name():
        tag = "call" if id(node) in called else "variable"
        tag = "builtin" if node.id in _BUILTINS else tag
        put(node.lineno, node.col_offset, tag)
      case ast.Import() | ast.ImportFrom():  # Modules, parts of them, aliases.
        for row in range(node.lineno, node.end_lineno + 1):
          for found in re.finditer(r"\w+", lines[row - 1].split("#")[0]):
            names.setdefault((row, found.start()), "import")
  return names, inside


def _load_packages(documents, config) -> Task:
  texts = _texts_by_package(documents, config)
  require(
    len(texts) > 1,
    f"format='code_packages': {len(texts)} packages of the standard library "
    f"have {MIN_FILES} source files or more; expected two",
  )
  by_package = [_split_texts(p, files, config) for p, files in texts.items()]
  parts = {}
  for split in SPLITS:
    # As many of every package: what the least of them has, at most.
    count = min(len(found[split]) for found in by_package)
    wanted = config[f"max_{split}"]
    if wanted is not None:
      require(
        wanted >= len(texts),
        f"max_{split}={wanted}: expected at least one example for each of the "
        f"{len(texts)} packages",
      )
      count = min(count, wanted // len(texts))
    parts[split] = [
      TextExample(text, None, label)
      for label, package in enumerate(texts)
      for text in sample(
        by_package[label][split], count, config, f"{split}:{package}"
      )
    ]
  kind = "classification"
  metrics = examples.KINDS[kind].metrics
  return Task("code_packages", kind, tuple(texts), metrics, parts)


def _texts_by_package(documents, config) -> dict[str, list[list[str]]]:
  """Snippets of each file that has any, in a random order, by package."""
  found: dict[str, list[list[str]]] = {}
  for document in _shuffled(documents, config):
    package, _, rest = document.key.partition("/")
    if not rest or not package.isidentifier():
      continue
    lines = [line for line in document.text.split("\n") if line.strip()]
    starts = range(0, len(lines) - _TEXT_LINES + 1, _TEXT_LINES)
    texts = ["\n".join(lines[i : i + _TEXT_LINES]) for i in starts]
    named = re.compile(rf"(?i)(?<![a-z]){re.escape(package)}(?![a-z])")
    texts = [text for text in texts if not named.search(text)]
    if texts:
      texts = sample(texts, _TEXTS_PER_FILE, config, document.key)
      found.setdefault(package, []).append(texts)
  large = {p: files for p, files in found.items() if len(files) >= MIN_FILES}
  # The richest: those left out differ from one Python to the next.
  ranked = sorted(large, key=lambda p: (-sum(map(len, large[p])), p))
  return {p: large[p] for p in sorted(ranked[:MAX_PACKAGES])}


def _split_texts(package: str, files: list[list[str]], config):
  """Whole files go to test, then to dev, until their share of snippets is."""
  total = sum(map(len, files))
  parts: dict[str, list[str]] = {split: [] for split in SPLITS}
  for texts in files:
    if len(parts["test"]) < _TEST_FRACTION * total:
      parts["test"] += texts
    elif len(parts["dev"]) < config.dev_fraction * total:
      parts["dev"] += texts
    else:
      parts["train"] += texts
  _require_train(bool(parts["train"]), repr(package), config)
  return parts
