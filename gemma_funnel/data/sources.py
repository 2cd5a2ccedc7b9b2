"""Corpora: the standard library's sources, files, or prepared data sets.

A corpus is split into train and held-out by a hash of each document's key, so
that the split is the same on every machine and a document never moves.
"""

from collections.abc import Iterable, Sequence
import functools
import hashlib
import os
import sysconfig

from gemma_funnel import buckets, inputs
from gemma_funnel.checks import require, require_between
from gemma_funnel.data import documents as documents_lib
from gemma_funnel.data import files, tokenized
from gemma_funnel.data.documents import Document

STDLIB = "stdlib"

_SKIPPED_DIRECTORIES = frozenset(
  "__pycache__ dist-packages idle_test site-packages test tests".split()
)


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
      if not name.endswith(".py"):
        continue
      path = os.path.join(directory, name)
      try:
        text = files.read_bytes(path).decode("utf-8")
      except ValueError:
        continue
      key = os.path.relpath(path, root).replace(os.sep, "/")
      if text:
        documents.append(Document(key, text))
  require(
    documents,
    f"source 'stdlib': no .py file below {root}; expected the sources of the "
    "standard library. Name text or JSONL files as the source instead",
  )
  return sorted(documents, key=lambda d: d.key)


def paths_of(source: str) -> list[str]:
  """The files of a source other than "stdlib", sorted, then TFDS's splits.

  Args:
    source: comma-separated globs of files and of folders that `data.tokenize`
      wrote, local or of a bucket, and "tfds:NAME[:VERSION][:SPLIT]".

  Raises:
    ValueError: there is no glob, or one that matches nothing.
  """
  patterns = [p.strip() for p in source.split(",") if p.strip()]
  if os.path.exists(source):  # A comma may be part of a name.
    patterns = [source]
  require(patterns, f"source {source!r}: expected 'stdlib' or globs of files")
  splits = [p for p in patterns if p.startswith("tfds:")]
  paths = set()
  for pattern in patterns:
    if pattern in splits:
      continue
    found = []
    for match in files.matches(pattern):
      if files.is_file(match):
        found.append(match)
      elif tokenized.is_tokenized(match):
        found += tokenized.shard_paths(match)
    require(
      found,
      f"source {pattern!r}: no file matches; expected text, JSONL, Parquet or "
      "array_record files, or a folder that data.tokenize wrote",
    )
    paths.update(found)
  return [*sorted(paths), *dict.fromkeys(splits)]


def file_documents(
  paths: Iterable[str], text_key: str, on_bad: str = "skip"
) -> documents_lib.Joined:
  """Documents of files, each read when it is asked for.

  Args:
    paths: files. ".jsonl" has a JSON object a line, ".array_record" and
      ".arrayrecord" one a record, or what `data.tokenize` wrote; ".parquet" has
      a row each; others are UTF-8 text, cut at line ends into about 16 KiB,
      unless their content is one of these. "tfds:.." is a split of TensorFlow
      Datasets.
    text_key: the key or the column of the text; within others after a dot.
    on_bad: see `files.open_file`.

  Returns:
    Documents with keys "<file name>:<index within the file>".

  Raises:
    ValueError: a file cannot be read, is not UTF-8 text, or its first record
      has no string at `text_key`; reading a later record may raise too. It
      names file and line.
  """
  open_file = lambda path: (
    tokenized.TokenizedFile(path)
    if tokenized.is_shard(path)
    else files.open_file(path, text_key, on_bad)
  )
  return documents_lib.Joined(list(map(open_file, paths)))


def fingerprints(source: str) -> dict[str, str]:
  """What tells a source from what it was: see `inputs.fingerprint`.

  By numbers and names of files, so that folders may move. What is known by its
  name alone (TFDS) is left out.
  """
  if source == STDLIB:
    return {source: _hash_of_stdlib()}
  paths = [p for p in paths_of(source) if not p.startswith("tfds:")]
  found = inputs.fingerprint_all(paths)
  return {
    f"{number}:{os.path.basename(path)}": value
    for number, (path, value) in enumerate(found.items())
  }


@functools.cache
def _hash_of_stdlib() -> str:
  digest = hashlib.sha256()
  for document in stdlib_documents():
    digest.update(f"{document.key}\0{document.text}\0".encode())
  return digest.hexdigest()


def load(
  source: str, text_key: str = "text", on_bad: str = "skip"
) -> Sequence[Document]:
  """All documents of a source; see `load_split`."""
  if source == STDLIB:
    return stdlib_documents()
  return file_documents(paths_of(source), text_key, on_bad)


def check_disjoint(source: str, heldout: str) -> None:
  """Checks that no file is trained on and held out."""

  def real_paths(source):
    is_name = lambda path: buckets.is_remote(path) or path.startswith("tfds:")
    return {p if is_name(p) else os.path.realpath(p) for p in paths_of(source)}

  held = real_paths(heldout)
  shared = held & real_paths(source) if source != STDLIB else ()
  require(
    not shared,
    f"source {source!r} and heldout {heldout!r} share {len(shared)} files, "
    f"such as {min(shared, default=None)}; expected none in both",
  )


def load_split(
  source: str = STDLIB,
  *,
  heldout: str | None = None,
  heldout_fraction: float = 0.1,
  text_key: str = "text",
  on_bad: str = "skip",
) -> tuple[Sequence[Document], Sequence[Document]]:
  """Finds the documents of a corpus and splits them.

  Texts of files are read when they are asked for; that of "stdlib" is in
  memory.

  Args:
    source: "stdlib" for the sources of the running interpreter's standard
      library, or what `paths_of` takes.
    heldout: files as `source` names them, which replace the split by hash;
      none of them may be a file of `source`.
    heldout_fraction: share of the documents that are held out by hash, in
      (0, 1); unused with `heldout`.
    text_key: the key or the column of the text.
    on_bad: see `files.open_file`.

  Returns:
    The train and the held-out documents, neither empty, in an order that is
    the same on every machine.

  Raises:
    ValueError: no file matches, a file is not of its format, a file is in both
      splits, a split is empty, or a fraction outside (0, 1).
  """
  if heldout:
    check_disjoint(source, heldout)
    train = load(source, text_key, on_bad)
    held = file_documents(paths_of(heldout), text_key, on_bad)
    remedies = ["give files with text"] * 2
  else:
    require_between("heldout_fraction", heldout_fraction, 0, 1, open=True)
    documents = load(source, text_key, on_bad)
    train, held = documents_lib.split(documents, heldout_fraction)
    found = f"of {len(documents)} documents, {heldout_fraction=}"
    remedies = [
      f"{found}: give more text, or lower the fraction",
      f"{found}: give more text, raise the fraction, or name heldout files",
    ]
  for split, part, of, remedy in zip(
    ("train", "held-out"),
    (train, held),
    (source, heldout or source),
    remedies,
    strict=True,
  ):
    require(len(part), f"source {of!r}: the {split} split is empty; {remedy}")
  return train, held
