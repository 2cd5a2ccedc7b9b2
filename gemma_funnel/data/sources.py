"""Corpora: the standard library's sources, or text and JSONL files.

A corpus is split into train and held-out by a hash of each document's key, so
that the split is the same on every machine and a document never moves.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import glob
import hashlib
import io
import json
import os
import sysconfig

STDLIB = "stdlib"
# A big text file becomes documents of about this size, for it to have both
# splits.
TEXT_DOCUMENT_BYTES = 16 << 10

_SKIPPED_DIRECTORIES = frozenset((
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test",
    "tests",
))  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A text and the key that decides which split it is in.

  Attributes:
    key: a name that is the same on every machine, such as
      "asyncio/events.py" or "notes.txt:3".
    text: the content; not empty.
  """

  key: str
  text: str


def is_heldout(key: str, heldout_fraction: float) -> bool:
  """Whether the document of this key is held out: a hash below a threshold.

  Raising the fraction moves documents to the held-out split only.
  """
  digest = hashlib.sha256(key.encode()).digest()
  return int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64


def stdlib_documents(root: str | os.PathLike | None = None) -> list[Document]:
  """The .py files of the standard library, sorted by key.

  Tests, installed packages and files that are empty or not UTF-8 are left out.

  Args:
    root: the library's folder; None is that of the running interpreter.

  Returns:
    Documents whose keys are paths relative to the library, such as
    "asyncio/events.py".

  Raises:
    ValueError: there is none.
  """
  root = os.fspath(root or sysconfig.get_path("stdlib"))
  documents = []
  for directory, subdirectories, names in os.walk(root):
    subdirectories[:] = set(subdirectories) - _SKIPPED_DIRECTORIES
    for name in names:
      path = os.path.join(directory, name)
      if not name.endswith(".py"):
        continue
      try:
        text = _read_text(path)
      except ValueError:
        continue
      key = os.path.relpath(path, root).replace(os.sep, "/")
      if text:
        documents.append(Document(key, text))
  if not documents:
    raise ValueError(
      f"source 'stdlib': no .py file below {root}; expected the sources of "
      "the standard library. Name text or JSONL files as the source instead"
    )
  return sorted(documents, key=lambda d: d.key)


def _read_text(path: str) -> str:
  """Reads UTF-8 without changing line ends."""
  try:
    with open(path, "rb") as f:
      return f.read().decode("utf-8")
  except OSError as e:
    raise ValueError(f"{path}: cannot be read: {e.strerror}") from e
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: not UTF-8: {e}; expected UTF-8 text") from e


def _match(globs: str) -> list[str]:
  """The files that a comma-separated list of globs matches, sorted."""
  patterns = [p.strip() for p in globs.split(",") if p.strip()]
  if not patterns:
    raise ValueError(f"source {globs!r}: expected 'stdlib' or globs of files")
  paths = set()
  for pattern in patterns:
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [path for path in matches if os.path.isfile(path)]
    if not files:
      raise ValueError(
        f"source {pattern!r}: no file matches; expected text or JSONL files"
      )
    paths.update(files)
  return sorted(paths)


def _cut(text: str) -> Iterator[str]:
  """Cuts at line ends into parts of at least TEXT_DOCUMENT_BYTES."""
  lines, size = [], 0
  # Not splitlines(), which also cuts at form feeds and the like.
  for line in io.StringIO(text, newline="\n"):
    lines.append(line)
    size += len(line.encode())
    if size >= TEXT_DOCUMENT_BYTES:
      yield "".join(lines)
      lines, size = [], 0
  yield "".join(lines)


def _jsonl_text(line: bytes, place: str, text_key: str) -> str:
  """The text of one line of a JSONL file; `place` is its file and line."""
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as e:
    raise ValueError(f"{place}: not UTF-8: {e}; expected UTF-8 JSON") from e
  except json.JSONDecodeError as e:
    raise ValueError(f"{place}: malformed JSON: {e}") from e
  if not isinstance(record, dict):
    raise ValueError(
      f"{place}: found a JSON {type(record).__name__}; expected an object "
      f"with the key {text_key!r}"
    )
  if text_key not in record:
    raise ValueError(
      f"{place}: no key {text_key!r}; found the keys {sorted(record)}"
    )
  text = record[text_key]
  if not isinstance(text, str):
    raise ValueError(
      f"{place}: the value of {text_key!r} is a {type(text).__name__}; "
      "expected a string"
    )
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as e:
    raise ValueError(f"{place}: {text_key!r} is not Unicode text: {e}") from e
  return text


def _jsonl_texts(path: str, text_key: str) -> Iterator[str]:
  try:
    with open(path, "rb") as f:
      for number, line in enumerate(f, start=1):
        if line.strip():
          yield _jsonl_text(line, f"{path}, line {number}", text_key)
  except OSError as e:
    raise ValueError(f"{path}: cannot be read: {e.strerror}") from e


def file_documents(paths: Iterable[str], text_key: str) -> list[Document]:
  """Documents of files: a line of `.jsonl` each, or about 16 KiB of text.

  Args:
    paths: files; one that ends in ".jsonl" has a JSON object a line, any other
      is UTF-8 text, cut at line ends.
    text_key: the key of the text within a JSON object.

  Returns:
    Non-empty documents with keys "<file name>:<index within the file>".

  Raises:
    ValueError: a file or line is not UTF-8, or a line is not a JSON object
      with a string at `text_key`; file and line are named.
  """
  documents = []
  for path in paths:
    if path.endswith(".jsonl"):
      texts = _jsonl_texts(path, text_key)
    else:
      texts = _cut(_read_text(path))
    # The name alone, not the folder: the split is the same elsewhere.
    name = os.path.basename(path)
    documents += [
      Document(f"{name}:{i}", text) for i, text in enumerate(texts) if text
    ]
  return documents


def _require_nonempty(
  documents: list[Document], split: str, source: str, remedy: str
) -> None:
  if not documents:
    raise ValueError(f"source {source!r}: the {split} split is empty; {remedy}")


def _explicit_split(
  source: str, heldout: str, text_key: str
) -> tuple[list[Document], list[Document]]:
  """All of `source` to train on, all of `heldout` held out."""
  heldout_paths = _match(heldout)
  if source == STDLIB:
    train = stdlib_documents()
  else:
    train_paths = _match(source)
    shared = {os.path.realpath(p) for p in train_paths} & {
      os.path.realpath(p) for p in heldout_paths
    }
    if shared:
      raise ValueError(
        f"source {source!r} and heldout {heldout!r} share {len(shared)} "
        f"files, such as {min(shared)}; expected none in both"
      )
    train = file_documents(train_paths, text_key)
  _require_nonempty(train, "train", source, "give files that are not empty")
  held = file_documents(heldout_paths, text_key)
  _require_nonempty(held, "held-out", heldout, "give files that are not empty")
  return train, held


def load_split(
  source: str = STDLIB,
  *,
  heldout: str | None = None,
  heldout_fraction: float = 0.1,
  text_key: str = "text",
) -> tuple[list[Document], list[Document]]:
  """Reads a corpus and splits it.

  Args:
    source: "stdlib" for the sources of the running interpreter's standard
      library, or comma-separated globs of text and `.jsonl` files.
    heldout: globs of the held-out files, which replace the split by hash; none
      of them may be a file of `source`.
    heldout_fraction: share of the documents that are held out by hash, in
      (0, 1); unused with `heldout`.
    text_key: the key of the text within a JSON object.

  Returns:
    The train and the held-out documents, neither empty, in an order that is
    the same on every machine.

  Raises:
    ValueError: no file matches, a file cannot be read as what it should be, a
      file is in both splits, a split is empty, or a fraction outside (0, 1).
  """
  if heldout:
    return _explicit_split(source, heldout, text_key)
  is_number = isinstance(heldout_fraction, (int, float))
  if not is_number or not 0 < heldout_fraction < 1:
    raise ValueError(
      f"heldout_fraction={heldout_fraction!r}: expected a number between 0 "
      "and 1, both excluded"
    )
  if source == STDLIB:
    documents = stdlib_documents()
  else:
    documents = file_documents(_match(source), text_key)
  train, held = [], []
  for document in documents:
    target = held if is_heldout(document.key, heldout_fraction) else train
    target.append(document)
  found = f"of {len(documents)} documents, {heldout_fraction=}"
  _require_nonempty(
    train, "train", source, f"{found}: give more text, or lower the fraction"
  )
  _require_nonempty(
      held, "held-out", source,
      f"{found}: give more text, raise the fraction, or name heldout files",
  )  # fmt: skip
  return train, held
