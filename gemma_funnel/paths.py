"""Which places a path may name: this machine, and buckets."""

import importlib.util
import os
import re

from gemma_funnel import buckets
from gemma_funnel.checks import require

# What paths of other places begin with; "gs:/b" is no folder here.
_SCHEMES = ("gs", "s3", "az", "hf", "http", "https", "file")
_CLIENTS = {
  "hf": ("huggingface_hub",),
  "gs": ("gcsfs", "tensorflow"),
  "s3": ("s3fs", "tensorflow"),
  "az": ("adlfs",),
}
_EXTRAS = {"gs": "'gemma-funnel[gcs]'", "hf": "'gemma-funnel[hf]'"}
# Keys and flags that may name a model of the Hub.
OF_MODELS = ("init_from", "checkpoint")


def check(path: str | os.PathLike[str]) -> str:
  """A path as it can be opened: of this machine, or of a bucket.

  Raises:
    ValueError: a model of the Hugging Face Hub, of the web, or of a bucket
      whose client is not installed.
  """
  name = os.fspath(path)
  scheme, colon, rest = name.partition(":")
  if not colon or not (rest.startswith("//") or scheme in _SCHEMES):
    return name
  if scheme == "file" and rest.startswith("/"):
    return "/" + rest.removeprefix("//localhost").lstrip("/")
  require(
    scheme not in ("http", "https"),
    f"{name}: is not read from there: download it and name the file or folder",
  )
  require(
    scheme != "hf" or rest.startswith("//datasets/"),
    f"{name}: models of the Hub are read by {' and '.join(OF_MODELS)} alone",
  )
  require(
    re.match("//[^/]", rest) is not None,
    f"{name}: expected {scheme}://BUCKET/PATH",
  )
  client = _CLIENTS.get(scheme)
  package = _EXTRAS.get(scheme) or (client and client[0])
  require(
    client is None or any(map(importlib.util.find_spec, client)),
    f"{name}: needs {client and client[0]}: pip install {package}",
  )
  buckets.prepare(scheme)
  return name
