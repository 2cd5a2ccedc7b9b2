"""Writing a checkpoint in another format, a block of a tensor at a time.

Threads read, rearrange and write blocks, a few at a time. Everything is written
to a folder of its own beside the destination, which takes its name when it is
complete. A lock, beside it too, names that folder: one conversion at a time
writes to a destination, and what one that was killed left is known for ours.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any
import uuid

from etils import epath
import numpy as np

from gemma_funnel import buckets, cli, inputs, locks
from gemma_funnel.checks import require
from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import detect, gguf, sums, writer
from gemma_funnel.convert.param_mapping import (
  ParamView,
  Slices,
  shape_of,
  sliced_sizes,
)
from gemma_funnel.convert.reader import (
  THREADS,
  CheckpointReader,
  open_checkpoint,
)
from gemma_funnel.convert.tensor_io import TensorWriter, to_path
from gemma_funnel.data.tokenizer import Tokenizer

# Room for what is not a tensor.
_SPARE_BYTES = 64 << 20
_MAX_NAME = 4096

# Told of each block: the tensor's name and the bytes of it.
Progress = Callable[[str, int], None]


def convert(
  source: str | os.PathLike[str],
  destination: str | os.PathLike[str],
  to: str,
  *,
  dtype: str | None = None,
  vocab_size: int | None = None,
  google_layout: str = "flat",
  config: TransformerConfig | None = None,
) -> writer.CheckpointSpec:
  """Converts a checkpoint.

  Args:
    source: of any format that `load` knows.
    destination: a folder that does not exist, or is empty.
    to: one of `writer.FORMATS`.
    dtype: of its tensors; None is the widest of the source's.
    vocab_size: tokens there, if not as many as in the source: rows of zeros
      are added to the embedding, or its last rows are left out.
    google_layout: "flat", "nested" or "stacked".
    config: see `load`.

  Returns:
    What was written.

  Raises:
    ValueError: see `open_checkpoint` and `writer.make_spec`; or `destination`
      cannot be written. Nothing is left there.
  """
  opened = open_checkpoint(source, config)
  spec = spec_for(opened, to, dtype, vocab_size, google_layout)
  check_destination(opened, spec, destination)
  write(opened, spec, destination)
  return spec


def spec_for(
  source: CheckpointReader,
  to: str,
  dtype: str | None = None,
  vocab_size: int | None = None,
  google_layout: str = "flat",
) -> writer.CheckpointSpec:
  """The spec of `convert`.

  Raises:
    ValueError: see `writer.make_spec` and `Tokenizer.load`.
  """
  config = source.config
  if vocab_size is not None:
    config = dataclasses.replace(config, vocab_size=vocab_size)
  wanted = source.dtype if dtype is None else np.dtype(dtype)
  if wanted.itemsize > 4:
    raise ValueError(
      f"{source.where} has tensors of {wanted.name}: expected "
      "--dtype=float32, or another one"
    )
  files, tokenizer = companions_of(source), None
  origin = detect.tokenizer_of(source.companions)
  if to == "hf" and "tokenizer_config.json" not in files and origin:
    try:
      tokenizer = Tokenizer.load(origin)
    except ValueError as error:
      if origin.name == "tokenizer.model":
        raise
      # The weights need it not, and who wrote it reads it.
      cli.say(f"{origin} is kept as it is: {error}")
  spec = writer.make_spec(
    to, config, source.stages, wanted, google_layout, tokenizer, source.kept
  )
  return dataclasses.replace(spec, texts={**spec.texts, **files})


def companions_of(source: CheckpointReader) -> dict[str, bytes]:
  """What else of a source goes with its weights, by name.

  A checkpoint may be a stranger's: what a link in it, or a run's configuration,
  leads to out of its folder stays, unless it is a tokenizer that fits. A line
  names each such file.
  """
  path = to_path(source.where)
  if inputs.is_gguf(path):
    return gguf.companions(path)
  folder = _resolve(path if path.is_dir() else path.parent)
  inside = [folder, folder.parent]
  if folder.parent.name == "snapshots":  # Of a cache of Hugging Face's.
    inside.append(folder.parent.parent / "blobs")
  found = {}
  for name, file in source.companions.items():
    origin = _resolve(file)
    data = inputs.read_bytes(origin, inputs.MAX_TOKENIZER)
    within = [place for place in inside if place in origin.parents]
    if name in detect.TOKENIZERS and (not within or source.format == "run"):
      fits = Tokenizer.load(origin).vocab_size <= source.rows
      require(fits, f"tokenizer {origin} has more tokens than {source.where}")
    elif not within:
      cli.say(f"{file} is left out: it leads to {origin}, out of {folder}")
      continue
    elif name.endswith(".json") and not _is_object(data):
      cli.say(f"{file} is left out: expected a JSON object")
      continue
    if not within:
      cli.say(f"the tokenizer is {origin}, out of {folder}")
    found[name] = data
  return found


def _resolve(path: pathlib.Path | epath.Path) -> pathlib.Path | epath.Path:
  """Where links lead; a bucket has none."""
  return path if buckets.is_remote(path) else pathlib.Path(path).resolve()


def _is_object(data: bytes) -> bool:
  try:
    return isinstance(json.loads(data.decode("utf-8-sig")), dict)
  except (ValueError, RecursionError):
    return False


def check_destination(
  source: CheckpointReader,
  spec: writer.CheckpointSpec,
  destination: str | os.PathLike[str],
) -> None:
  """Raises a ValueError where nothing can be written, before anything is."""
  require(
    not buckets.is_remote(destination),
    f"{destination}: expected a local folder, which can then be copied there",
  )
  with _naming(destination):
    path = pathlib.Path(destination).absolute()
    _require_free(path, locks.read_note(_lock_of(path)))
    origin = _resolve(to_path(source.where))
    if path.resolve().is_relative_to(origin) and origin.is_dir():
      raise ValueError(f"{destination} is within the source, {source.where}")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
      raise ValueError(f"{destination} cannot be made: {parent} is no folder")
    needed = spec.peak_nbytes + _SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
      raise ValueError(
        f"{destination} needs {needed:,} bytes: {parent} has {free:,} free"
      )


@contextlib.contextmanager
def _naming(destination: str | os.PathLike[str]) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"{destination} cannot be written: {error.strerror or error}"
    ) from error


def _lock_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f".{path.name}.lock")


def _require_free(path: pathlib.Path, note: dict[str, Any]) -> None:
  """Raises a ValueError if what is at `path` is not known for ours or empty."""
  if path.is_symlink() or not path.is_dir():
    free = not os.path.lexists(path)
  else:
    free = not any(path.iterdir()) or _is_left_by(note, path)
  if not free:
    raise ValueError(
      f"{path} exists: expected a folder that does not, or is empty"
    )


def _is_left_by(note: dict[str, Any], path: pathlib.Path) -> bool:
  """Whether the noted conversion was killed as its folder had become `path`."""
  try:
    content = inputs.read_bytes(path / detect.UNFINISHED, _MAX_NAME)
  except ValueError:
    return False
  return content.decode(errors="replace") == _partial_in(note, path)


def _partial_in(note: dict[str, Any], path: pathlib.Path) -> str | None:
  """The name of the noted conversion's own folder, if it can be one."""
  name = note.get("partial")
  pattern = re.escape(path.name) + r"\.[0-9a-f]{32}\.partial"
  ours = isinstance(name, str) and re.fullmatch(pattern, name)
  return name if ours else None


def _remove_left(path: pathlib.Path, note: dict[str, Any]) -> None:
  """Removes what a conversion to `path` that was killed left."""
  if (name := _partial_in(note, path)) is None:
    return
  shutil.rmtree(path.with_name(name), ignore_errors=True)
  if not path.is_symlink() and _is_left_by(note, path):
    shutil.rmtree(path)


def write(
  source: CheckpointReader,
  spec: writer.CheckpointSpec,
  destination: str | os.PathLike[str],
  progress: Progress = lambda name, nbytes: None,
) -> None:
  """Writes what `spec` says; the destination is there when it is complete.

  Raises:
    ValueError: the source is damaged, or the destination cannot be written.
      Nothing is left of it.
    HeldError: another conversion writes there.
  """
  path = pathlib.Path(destination).absolute()
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  with _naming(destination), contextlib.ExitStack() as stack:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context(locks.Lock(_lock_of(path), os.fspath(path)))
    _remove_left(path, lock.previous)
    _require_free(path, {})
    lock.note(partial=partial.name)
    partial.mkdir()
    # Whatever ends it, nothing half-written stays.
    stack.callback(shutil.rmtree, partial, ignore_errors=True)
    (partial / detect.UNFINISHED).write_text(partial.name)
    for file in spec.files:
      with file.open(partial / file.name, spec.headers(file)) as opened:
        for name, nbytes in _move(source, spec, file, opened):
          progress(name, nbytes)
    # Last: without a configuration or an index it is no checkpoint.
    for name, text in spec.texts.items():
      data = text if isinstance(text, bytes) else text.encode()
      (partial / name).write_bytes(data)
    # A configuration may be edited; what it is of must not.
    kept = {detect.CONFIG, detect.SIDECAR, detect.UNFINISHED}
    files = sums.files_in(partial)
    sums.write(partial, [file for file in files if file.name not in kept])
    os.replace(partial, path)
    # Until now, whatever killed it, the next conversion would start anew.
    (path / detect.UNFINISHED).unlink()


def _move(
  source: CheckpointReader,
  spec: writer.CheckpointSpec,
  file: writer.File,
  opened: TensorWriter,
) -> Iterator[tuple[str, int]]:
  """Writes all tensors of a file; yields (tensor, bytes) of each block."""

  def move(name: str, view: ParamView, slices: Slices) -> tuple[str, int]:
    block = _read(source, spec, view, slices)
    opened.write(name, view.index(slices, spec.sizes), block)
    return name, block.nbytes

  blocks = (
    (tensor.name, view, slices)
    for tensor in file.tensors
    for view in tensor.views
    for slices in spec.blocks(view)
  )
  waiting: deque[futures.Future] = deque()
  with futures.ThreadPoolExecutor(THREADS) as pool:
    try:
      for block in blocks:
        waiting.append(pool.submit(move, *block))
        if len(waiting) > THREADS:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def _read(
  source: CheckpointReader,
  spec: writer.CheckpointSpec,
  view: ParamView,
  slices: Slices,
) -> np.ndarray:
  if view.path[-1] not in ("embedding", "unembedding"):
    return source.read(view.path, view.layer, view.axes, slices, spec.dtype)
  # Rows that the source, or a vocabulary made smaller, has not are zeros.
  rows, used = slices["V"], source.rows
  if spec.config.vocab_size < source.config.vocab_size:
    used = spec.config.vocab_size
  stop = max(rows.start, min(rows.stop, used))
  sizes = sliced_sizes(spec.sizes, slices)
  values = np.zeros(shape_of(view.axes, sizes), spec.dtype)
  if stop > rows.start:
    kept = {"V": slice(rows.start, stop)}
    values[: stop - rows.start] = source.read(
      view.path, view.layer, view.axes, kept, spec.dtype
    )
  return values
