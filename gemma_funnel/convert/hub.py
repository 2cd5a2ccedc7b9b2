"""Models of the Hugging Face Hub by name: OWNER/NAME, hf://OWNER/NAME@REVISION.

Only the files that are read are downloaded, into the Hub's own cache and with
its own token (package huggingface_hub, extra "hf").
"""

from collections.abc import Collection, Sequence
import contextlib
import functools
import os
import re

from gemma_funnel.checks import require

_SCHEME = "hf://"
_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
# Weights in the order of preference: one file, or an index and its shards.
_WEIGHTS = (
  ("model.safetensors",),
  ("model.safetensors.index.json", "model-*-of-*.safetensors"),
  ("pytorch_model.bin",),
  ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def is_name(path: str | os.PathLike[str]) -> bool:
  """Whether it names a model of the Hub; a bare name, if nothing else does.

  "runs/x" is a path wherever there is a folder "runs".
  """
  text = os.fspath(path)
  if text.startswith(_SCHEME):
    return True
  return bool(_NAME.fullmatch(text)) and not os.path.exists(text.split("/")[0])


def fetch(path: str | os.PathLike[str], beside: Sequence[str]) -> str:
  """The folder of a model in the cache, which it is downloaded to if need be.

  Args:
    path: a name, or hf:// and a name; behind an "@" a branch, tag or commit.
    beside: names of files besides weights that are read.

  Raises:
    ValueError: no such model or revision, terms that are not accepted, no
      weights that are read, no connection, or no huggingface_hub.
  """
  return _fetch(os.fspath(path), tuple(beside))


@functools.lru_cache
def _fetch(text: str, beside: tuple[str, ...]) -> str:
  found = _NAME.fullmatch(text.removeprefix(_SCHEME))
  require(
    found is not None,
    f"{text}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION",
  )
  name, revision = found.groups()
  try:
    import huggingface_hub as hub
    from huggingface_hub import errors
  except ImportError as error:
    raise ValueError(
      f"{text} is of the Hub, which needs the package huggingface_hub: "
      "expected pip install 'gemma-funnel[hf]', or a folder"
    ) from error
  api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
  page = f"{api.endpoint}/{name}"
  download = functools.partial(api.snapshot_download, name, revision=revision)
  not_here = f"there is no folder {text}, and " if "://" not in text else ""
  try:
    # Unlike a list of the files, it is not asked for again for half a minute
    # where there is no connection.
    about = api.model_info(name, revision=revision)
    files = [entry.rfilename for entry in about.siblings or ()]
    if chosen := _choose(files, beside):
      return download(allow_patterns=chosen)
  except errors.GatedRepoError as error:
    raise ValueError(
      f"{text}: its terms have to be accepted at {page}, by who the token is of "
      "(hf auth login, or HF_TOKEN)"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise ValueError(
      f"{text}: {page} has no branch, tag or commit {revision!r}"
    ) from error
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise ValueError(
      f"{text}: {not_here}{page} does not exist, or needs a token (hf auth "
      "login, or HF_TOKEN)"
    ) from error
  except Exception as error:  # Its clients of HTTP raise of every kind.
    for patterns in _WEIGHTS:
      wanted = dict(allow_patterns=[*patterns, *beside], local_files_only=True)
      with contextlib.suppress(errors.LocalEntryNotFoundError):
        folder = download(**wanted)
        if os.path.exists(os.path.join(folder, patterns[0])):
          return folder
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f"{text}: {not_here}{api.endpoint} cannot be reached, nor is it in the "
      f"cache: {reason}"
    ) from error
  raise ValueError(
    f"{text} has no weights that are read: expected model.safetensors, shards "
    f"of it, or pytorch_model.bin; found {sorted(files)[:10]}"
  )


def _choose(files: Collection[str], beside: Collection[str]) -> list[str]:
  """The files that are read of those that a model has; [] without weights."""
  for first, *others in _WEIGHTS:
    if first in files:
      return [first, *others, *(name for name in beside if name in files)]
  return []
