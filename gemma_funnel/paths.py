"""Which places a path may name: this machine, and buckets."""

import importlib.util
import os
import re

from gemma_funnel.checks import require

# What paths of other places begin with; "gs:/b" is no folder here.
_SCHEMES = ("gs", "s3", "az", "hf", "http", "https", "file")
_CLIENTS = {
  "gs": ("gcsfs", "tensorflow"),
  "s3": ("s3fs", "tensorflow"),
  "az": ("adlfs",),
}
_DOWNLOAD = (
  "Download it (hf download OWNER/NAME --local-dir=DIR, of huggingface_hub) and "
  "name the folder"
)


def check(path: str | os.PathLike[str]) -> str:
  """A path as it can be opened: of this machine, or of a bucket.

  Raises:
    ValueError: of the Hugging Face Hub, of the web, or of a bucket whose
      client is not installed.
  """
  name = os.fspath(path)
  scheme, colon, rest = name.partition(":")
  if not colon or not (rest.startswith("//") or scheme in _SCHEMES):
    return name
  if scheme == "file" and rest.startswith("/"):
    return "/" + rest.removeprefix("//localhost").lstrip("/")
  require(
    scheme not in ("hf", "http", "https"),
    f"{name}: is not read from there. {_DOWNLOAD}",
  )
  require(
    re.match("//[^/]", rest) is not None,
    f"{name}: expected {scheme}://BUCKET/PATH",
  )
  client = _CLIENTS.get(scheme)
  require(
    client is None or any(map(importlib.util.find_spec, client)),
    f"{name}: needs {client and client[0]}: pip install {client and client[0]}",
  )
  return name


def hint_missing(path: str | os.PathLike[str]) -> str:
  """What a message adds where nothing is at `path`: it may be of the Hub."""
  is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path))
  return f" (names of the Hub are not read. {_DOWNLOAD})" if is_name else ""
