"""An open checkpoint: its tensors are checked, any part of them can be read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from gemma_funnel import inputs
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.convert import (
  detect,
  gemma_pytorch,
  google,
  huggingface,
  param_mapping,
  sums,
)
from gemma_funnel.convert.param_mapping import ParamView, Path, Slices, Tensor
from gemma_funnel.convert.run import LoraTensors, RunTensors
from gemma_funnel.convert.safetensors_file import SafetensorsFile
from gemma_funnel.convert.tensor_io import BFLOAT16, Header, TensorReader, merge
from gemma_funnel.parallel import processes

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, BFLOAT16)))
# What is read, rearranged and written at a time. Larger arrays are given back
# to the system when they are freed, and taking them anew costs as much as all
# else that is done with them.
BLOCK_BYTES = 16 << 20
# Formats of others, which have what a funnel learned in a file beside them.
_BESIDE = ("huggingface", "gemma_pytorch", "google")
# That read, and rearrange what was read.
THREADS = max(2, min(8, os.cpu_count() or 1))
# Far above any model's: what a damaged configuration says is not tried out.
_MAX_LAYERS, _MAX_WIDTH = 1_000, 1 << 24


@dataclasses.dataclass(frozen=True)
class CheckpointReader:
  """A checkpoint whose tensors fit its configuration.

  Attributes:
    where: what errors call it.
    format: "run", "orbax", "huggingface", "gemma_pytorch" or "google".
    config: of the model; its dtypes are those of a training run, else those of
      our default.
    stages: of the funnel it was trained with, resolved; () is none.
    dtype: the narrowest that holds every stored value.
    companions: files of the tokenizer and of generating, by name.
    kept: what its configuration says beside the model, and others need.
    run: the step and the configuration of a training run; None for others.
    learned: parameters of the funnel that are not from the files, by path.
  """

  where: str
  format: str
  config: TransformerConfig
  stages: tuple[FunnelConfig, ...]
  dtype: np.dtype
  companions: Mapping[str, pathlib.Path]
  kept: Mapping[str, Any]
  run: RunTensors | None
  _tensors: TensorReader
  _sizes: Mapping[str, int]
  _views: Mapping[tuple[Path, int | None], tuple[str, ParamView]]
  learned: Mapping[Path, np.ndarray] = dataclasses.field(default_factory=dict)

  def read(
    self,
    path: Path,
    layer: int | None,
    axes: str,
    slices: Slices,
    dtype: np.dtype,
  ) -> np.ndarray:
    """Reads a slice of one of our parameters, and nothing else.

    Args:
      path: of the parameter.
      layer: of it; None where it is not stacked.
      axes: of the result, folded; see `param_mapping`.
      slices: of some dims.
      dtype: of the result.

    Returns:
      A C-contiguous array.

    Raises:
      ValueError: a file that is damaged; values that are not finite.
    """
    if path in self.learned:
      index = tuple(slices.get(dim, slice(None)) for dim in axes.split())
      return np.ascontiguousarray(self.learned[path][index], dtype)
    name, view = self._views[path, layer]
    slices = {dim: slices[dim] for dim in view.axes if dim in slices}
    first = {word[0] for word in view.axes.split()}
    # What lies within a folded axis is read whole and sliced afterwards.
    outer = {dim: s for dim, s in slices.items() if dim in first}
    inner = {dim: s for dim, s in slices.items() if dim not in first}
    sizes = param_mapping.sliced_sizes(self._sizes, outer)
    block = self._tensors.read(name, view.index(outer, self._sizes))
    wanted = " ".join(axes.replace(" ", "")) if inner else axes
    # What overflows is told of below, by name.
    with np.errstate(over="ignore"):
      values = param_mapping.rearrange(block, view.axes, wanted, sizes, dtype)
    if inner:
      values = values[tuple(inner.get(d, slice(None)) for d in wanted.split())]
      sizes = param_mapping.sliced_sizes(sizes, inner)
      shape = param_mapping.shape_of(axes, sizes)
      values = np.ascontiguousarray(values).reshape(shape)
    if not _all_finite(values):
      what = "infinite or not a number"
      if _all_finite(np.ascontiguousarray(block)):
        what = f"beyond the range of {dtype.name}"
      raise ValueError(f"{self._tensors.where}: {name} has values {what}")
    return values

  def read_slice(
    self, path: Path, index: Sequence[slice], dtype: np.dtype
  ) -> np.ndarray:
    """`parameter[index]` of ours, layers stacked; see `read`."""
    axes = param_mapping.axes_of(path)
    *layers, rest = (index[:1], index[1:]) if path[0] == "layers" else (index,)
    dims = zip(axes.split(), rest, strict=True)
    slices = {d: s for d, s in dims if (s.start, s.stop) != (None, None)}
    if not layers:
      return self.read(path, None, axes, slices, dtype)
    sizes = param_mapping.sliced_sizes(self._sizes, slices)
    numbers = range(self.config.num_layers)[layers[0][0]]
    shape = param_mapping.shape_of(axes, sizes)
    values = np.empty((len(numbers), *shape), dtype)

    def fill(n: int) -> None:
      values[n] = self.read(path, numbers[n], axes, slices, dtype)

    with futures.ThreadPoolExecutor(THREADS) as pool:
      # As a list, so that what a thread raises is raised.
      list(pool.map(fill, range(len(numbers))))
    return values

  @property
  def rows(self) -> int:
    """Of the stored embedding: the vocabulary's, and Google's padding."""
    return self._sizes["V"]

  def dropped_rows(self) -> tuple[int, float]:
    """Rows of the embedding beyond the vocabulary: (how many, largest |x|)."""
    rows, used = self.rows, self.config.vocab_size
    slices, largest = {"V": slice(used, rows)}, 0.0
    if rows > used:
      values = self.read(("embedding",), None, "V D", slices, np.float32)
      largest = float(np.abs(values).max())
    return rows - used, largest


def open_checkpoint(
  path: str | os.PathLike,
  config: TransformerConfig | None = None,
  learned: bool = True,
) -> CheckpointReader:
  """Opens a checkpoint and checks that its tensors are what they should be.

  Args:
    path: of a folder, or of a single weight file.
    config: what to take it for, instead of the configuration beside it or the
      published one whose shapes it has.
    learned: whether what its funnel has learned is needed; else it may be
      missing, and is then read as a model without a funnel.

  Raises:
    ValueError: nothing that is known, or two formats at once; a file that is
      damaged; a configuration that is missing or of another model; tensors
      that are missing, unexpected, mis-shaped or not floating point: all are
      named.
  """
  path = detect.local(path)
  weights = detect.find(path)
  if weights.format not in ("run", "gguf"):
    # What is missing of a funnel is told of below, if it is needed.
    own = [detect.LEARNED]
    processes.on_host0(lambda: sums.check(weights.folder, own))
  stages: tuple[FunnelConfig, ...] = ()
  if config is None:
    config, stages = detect.read_config(weights)
  if not learned and not (weights.folder / detect.LEARNED).exists():
    stages = () if weights.format in _BESIDE else stages
  sizes = param_mapping.sizes_of(config)
  widths = {dim: size for dim, size in sizes.items() if dim != "L"}
  if sizes["L"] > _MAX_LAYERS or max(widths.values()) > _MAX_WIDTH:
    raise ValueError(
      f"{weights.folder}: its configuration has {sizes['L']} layers and sizes "
      f"{widths}: expected at most {_MAX_LAYERS} and {_MAX_WIDTH}"
    )
  own = param_mapping.own_tensors(config, stages)
  beside = param_mapping.learned_tensors(own)
  format_, reader = detect.open_tensors(weights)
  run = reader if isinstance(reader, RunTensors) else None
  if format_ == "google":
    sizes["V"] = google.rows_of(reader.tensors, config)
  tensors = _foreign_tensors(format_, config, sizes, reader)
  if tensors is None:
    tensors, beside = own, []
    if run and run.lora:
      reader = LoraTensors(run, _open_base(run))
    reader = param_mapping.current_names(reader)
  _check(reader, tensors)
  readers = [reader]
  if beside:
    reader = SafetensorsFile(weights.folder / detect.LEARNED)
    reader = param_mapping.current_names(reader)
    _check(reader, beside)
    readers.append(reader)
    tensors = [*tensors, *beside]
  merged = merge(readers[0].where, readers)
  return CheckpointReader(
    where=os.fspath(path),
    format=format_,
    config=config,
    stages=stages,
    dtype=_widest({merged.tensors[t.name].dtype for t in tensors}),
    companions=detect.find_companions(weights),
    kept=detect.kept_keys(weights),
    run=run,
    _tensors=merged,
    _sizes=sizes,
    _views={(v.path, v.layer): (t.name, v) for t in tensors for v in t.views},
  )


def _open_base(run: RunTensors) -> CheckpointReader:
  """What the factors of a run are merged into; raises where it is another."""
  path = run.config["init_from"]
  kept = {k: v for k, v in run.inputs.items() if k.startswith("base:")}
  if kept:
    found = base_fingerprints(path)
    inputs.require_unchanged(f"the run in {run.where}", kept, found)
  return open_checkpoint(path)


def base_fingerprints(path: str | os.PathLike[str]) -> dict[str, str]:
  """What a run that starts from the checkpoint at `path` depends on."""
  found = detect.fingerprints(detect.find(path))
  return {f"base:{name}": value for name, value in found.items()}


def _foreign_tensors(format_, config, sizes, reader) -> list[Tensor] | None:
  """What the files of others hold; None for ours."""
  if format_ in ("gemma_pytorch", "google"):
    param_mapping.check_gemma(config, reader.where)
  match format_:
    case "huggingface":
      return huggingface.tensors(config)
    case "gemma_pytorch":
      return gemma_pytorch.tensors(config)
    case "google":
      layout = google.layout_of(reader.tensors)
      transposed = google.is_transposed(reader)
      return google.tensors(config, layout, transposed, sizes["V"])[0]
  return None


def _widest(dtypes: Collection[np.dtype]) -> np.dtype:
  """The narrowest dtype that holds the values of all of them."""
  if {np.dtype(np.float16), BFLOAT16} <= set(dtypes):
    dtypes = {*dtypes, np.dtype(np.float32)}
  return max(dtypes, key=lambda dtype: dtype.itemsize)


def _check(reader: TensorReader, tensors: Sequence[Tensor]) -> None:
  """Raises on whatever keeps the stored tensors from being `tensors`."""
  stored, expected = reader.tensors, {t.name: t for t in tensors}
  problems = [
    f"{what}: {names}"
    for what, names in (
      ("missing", [name for name in expected if name not in stored]),
      ("unexpected", sorted(set(stored) - {*expected, huggingface.TIED_HEAD})),
    )
    if names
  ]
  for name, tensor in expected.items():
    problems += _faults(name, tensor, stored[name]) if name in stored else []
  head = huggingface.TIED_HEAD
  if not problems and head in stored and head not in expected:
    problems = _check_tied(reader)
  if problems:
    raise ValueError(
      f"{reader.where} does not fit its configuration:\n  "
      + "\n  ".join(problems)
    )


def _faults(name: str, tensor: Tensor, header: Header) -> Iterator[str]:
  if header.shape != tensor.shape:
    yield f"{name} has shape {header.shape}: expected {tensor.shape}"
  if header.dtype not in _FLOATS:
    floats = [dtype.name for dtype in _FLOATS]
    yield f"{name} is of {header.dtype.name}: expected one of {floats}"


def _check_tied(reader: TensorReader) -> list[str]:
  """A stored head must repeat the embedding: ours has no other."""
  head, embedding = huggingface.TIED_HEAD, huggingface.EMBEDDING
  header = reader.tensors[embedding]
  same = reader.tensors[head].shape == header.shape
  rows = max(1, BLOCK_BYTES // max(1, header.nbytes // header.shape[0]))
  for start in range(0, header.shape[0], rows):
    at = (slice(start, start + rows),)
    same = same and np.array_equal(
      reader.read(head, at), reader.read(embedding, at)
    )
  if same:
    return []
  return [f"{head} differs from {embedding}: expected a tied head, equal to it"]


def _all_finite(values: np.ndarray) -> bool:
  """Whether a C-contiguous array of floats has no infinity and no NaN.

  By the bits of the exponent, which are all ones in both: comparing them is
  several times faster than `np.isfinite` of bfloat16.
  """
  exponents = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
  }
  bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
  mask = bits.dtype.type(exponents[values.dtype.name])
  # A few at a time stay in the caches.
  return all(
    (bits[start : start + (1 << 17)] & mask).max(initial=0) != mask
    for start in range(0, bits.size, 1 << 17)
  )
