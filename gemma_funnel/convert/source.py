"""An open checkpoint: its tensors are checked, any part of them can be read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import os
import pathlib

import numpy as np

from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.convert import (
  discover,
  gemma_pytorch,
  google,
  huggingface,
  layout,
)
from gemma_funnel.convert.layout import Path, Tensor
from gemma_funnel.convert.safetensors_file import SafetensorsFile
from gemma_funnel.convert.store import BFLOAT16, Header, Reader, Shards

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, BFLOAT16)))
# What is read, rearranged and written at a time. Larger arrays are given back
# to the system when they are freed, and taking them anew costs as much as all
# else that is done with them.
BLOCK_BYTES = 16 << 20
# That read, and rearrange what was read.
THREADS = max(2, min(8, os.cpu_count() or 1))
# Far above any model's: what a damaged configuration says is not tried out.
_MOST_LAYERS, _MOST_WIDTH = 1_000, 1 << 24


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint whose tensors fit its configuration.

  Attributes:
    where: what errors call it.
    format: "run", "orbax", "huggingface", "gemma_pytorch" or "google".
    config: of the model; the dtypes are those of our default.
    stages: of the funnel it was trained with, resolved; () is none.
    dtype: the narrowest that holds every stored value.
    companions: files of the tokenizer and of generating, by name.
  """

  where: str
  format: str
  config: TransformerConfig
  stages: tuple[FunnelConfig, ...]
  dtype: np.dtype
  companions: Mapping[str, pathlib.Path]
  _reader: Reader
  _sizes: Mapping[str, int]
  _parts: Mapping[tuple[Path, int | None], tuple[Tensor, layout.Part]]

  def read(
    self,
    path: Path,
    layer: int | None,
    axes: str,
    cut: Mapping[str, slice],
    dtype: np.dtype,
  ) -> np.ndarray:
    """Reads a part of one of our parameters, and of no other.

    Args:
      path: of the parameter.
      layer: of it; None where it is not stacked.
      axes: of the result, folded; see `layout.Part`.
      cut: a range of some letters; the others are whole.
      dtype: of the result.

    Returns:
      A C-contiguous array.

    Raises:
      ValueError: a file that is damaged; values that are not finite.
    """
    tensor, part = self._parts[path, layer]
    cut = {letter: cut[letter] for letter in part.axes if letter in cut}
    first = {word[0] for word in part.axes.split()}
    # What lies within a folded axis is read whole and cut afterwards.
    outer = {letter: s for letter, s in cut.items() if letter in first}
    inner = {letter: s for letter, s in cut.items() if letter not in first}
    sizes = layout.cut_sizes(self._sizes, outer)
    block = self._reader.read(tensor.name, part.index(outer, self._sizes))
    target = " ".join(axes.replace(" ", "")) if inner else axes
    # What overflows is told of below, by name.
    with np.errstate(over="ignore"):
      values = layout.rearrange(block, part.axes, target, sizes, dtype)
    if inner:
      letters = target.split()
      values = values[tuple(inner.get(c, slice(None)) for c in letters)]
      left = layout.cut_sizes(sizes, inner)
      values = np.ascontiguousarray(values).reshape(layout.shape_of(axes, left))
    if not _all_finite(values):
      what = "infinite or not a number"
      if _all_finite(np.ascontiguousarray(block)):
        what = f"beyond the range of {dtype.name}"
      raise ValueError(f"{self._reader.where}: {tensor.name} has values {what}")
    return values

  def read_slice(
    self, path: Path, index: Sequence[slice], dtype: np.dtype
  ) -> np.ndarray:
    """`parameter[index]` of ours, layers stacked; see `read`."""
    axes = layout.axes_of(path)
    letters = axes.split()
    if path[0] != "layers":
      return self.read(path, None, axes, _cut_of(letters, index), dtype)
    layers, *rest = index
    cut = _cut_of(letters, rest)
    sizes = layout.cut_sizes(self._sizes, cut)
    numbers = range(*layers.indices(self.config.num_layers))
    values = np.empty((len(numbers), *layout.shape_of(axes, sizes)), dtype)

    def fill(n: int) -> None:
      values[n] = self.read(path, numbers[n], axes, cut, dtype)

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
    cut, largest = {"V": slice(used, rows)}, 0.0
    if rows > used:
      values = self.read(("embedding",), None, "V D", cut, np.float32)
      largest = float(np.abs(values).max())
    return rows - used, largest


def _cut_of(letters, index) -> dict[str, slice]:
  """What of an index does cut something off."""
  cut = zip(letters, index, strict=True)
  return {c: s for c, s in cut if (s.start, s.stop) != (None, None)}


def open_checkpoint(
  path: str | os.PathLike, config: TransformerConfig | None = None
) -> Source:
  """Opens a checkpoint and checks that its tensors are what they should be.

  Args:
    path: of a folder, or of a single weight file.
    config: what to take it for, instead of the configuration beside it or the
      published one whose shapes it has.

  Raises:
    ValueError: nothing that is known, or two formats at once; a file that is
      damaged; a configuration that is missing or of another model; tensors
      that are missing, unexpected, mis-shaped or not floating point: all are
      named.
  """
  weights = discover.find(path)
  stages: tuple[FunnelConfig, ...] = ()
  if config is None:
    config, stages = discover.read_config(weights)
  _check_sizes(weights.folder, config)
  format_, reader = discover.open_reader(weights)
  readers, own = [reader], layout.own_tensors(config, stages)
  sizes = layout.sizes_of(config)
  if format_ == "google":
    sizes["V"] = google.rows_of(reader.tensors, config)
  tensors = _tensors_of(format_, config, sizes, reader) or own
  _check(reader, tensors)
  learned = layout.learned_tensors(own)
  if learned and tensors is not own:
    beside = SafetensorsFile(weights.folder / discover.LEARNED)
    _check(beside, learned)
    readers.append(beside)
    tensors = [*tensors, *learned]
  merged = Shards(reader.where, readers)
  return Source(
    where=os.fspath(path),
    format=format_,
    config=config,
    stages=stages,
    dtype=_widest({merged.tensors[t.name].dtype for t in tensors}),
    companions=discover.find_companions(weights),
    _reader=merged,
    _sizes=sizes,
    _parts=layout.parts_of(tensors),
  )


def _check_sizes(where: pathlib.Path, config: TransformerConfig) -> None:
  widths = layout.sizes_of(config)
  layers = widths.pop("L")
  if layers > _MOST_LAYERS or max(widths.values()) > _MOST_WIDTH:
    raise ValueError(
      f"{where}: its configuration has {layers} layers and sizes {widths}: "
      f"expected at most {_MOST_LAYERS} and {_MOST_WIDTH}"
    )


def _tensors_of(format_, config, sizes, reader) -> list[Tensor] | None:
  """What the files of others hold; None for ours."""
  match format_:
    case "huggingface":
      return huggingface.tensors(config)
    case "gemma_pytorch":
      return gemma_pytorch.tensors(config)
    case "google":
      names = reader.tensors
      return google.tensors(
        config,
        google.layout_of(names),
        google.is_transposed(reader),
        sizes["V"],
      )[0]
  return None


def _widest(dtypes: Collection[np.dtype]) -> np.dtype:
  """The narrowest dtype that holds the values of all of them."""
  if {np.dtype(np.float16), BFLOAT16} <= set(dtypes):
    dtypes = {*dtypes, np.dtype(np.float32)}
  return max(dtypes, key=lambda dtype: dtype.itemsize)


def _check(reader: Reader, tensors: Sequence[Tensor]) -> None:
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
  if not problems and huggingface.TIED_HEAD in stored:
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


def _check_tied(reader: Reader) -> list[str]:
  """A stored head must repeat the embedding: ours has no other."""
  head, embedding = huggingface.TIED_HEAD, huggingface.EMBEDDING
  header = reader.tensors[embedding]
  same = reader.tensors[head] == header
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
