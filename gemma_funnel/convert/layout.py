"""Where our parameters lie within the tensors of a format, and in which order.

A format is a list of `Tensor`s, each a name and the `Part`s of ours that it is
made of: `kv_einsum` of Google's trees holds a layer's keys and its values, a
stacked tensor one part a layer. Axes are named by the letters of model.py;
letters in one word are folded into one axis, the first one outermost: "NH D" is
[N*H, D].
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math

from flax import nnx
import numpy as np

from gemma_funnel import params
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.convert.store import Index
from gemma_funnel.model import Transformer

# In our tree, such as ("layers", "attn", "query").
Path = tuple[str, ...]

sizes_of = params.sizes_of


def axes_of(path: Path) -> str:
  """Of our parameter at `path`, without the layers it may be stacked over."""
  return params.row_of("/".join(path)).layer_dims


def shape_of(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The shape of folded `axes`."""
  return tuple(math.prod(sizes[c] for c in word) for word in axes.split())


@dataclasses.dataclass(frozen=True)
class Part:
  """One of our parameters, or one layer of it, within a stored tensor.

  Attributes:
    path: of our parameter.
    layer: of a stacked one; None where it is not stacked.
    at: its place in the stored tensor: indices of leading axes, and at last
      perhaps a slice of the axis after them. Such a slice says which rows.
    axes: of the stored tensor at that place.
  """

  path: Path
  layer: int | None
  at: Index
  axes: str

  def index(self, cut: Mapping[str, slice], sizes: Mapping[str, int]) -> Index:
    """Where in the stored tensor the `cut` of this part is.

    Args:
      cut: for some letters, each the first of its word, a range.
      sizes: of all letters.
    """
    *whole, last = self.at or (slice(None),)
    if not isinstance(last, slice):
      whole, last = list(self.at), slice(None)
    for number, word in enumerate(self.axes.split()):
      inner = math.prod(sizes[c] for c in word[1:])
      letter = cut.get(word[0], slice(0, sizes[word[0]]))
      offset = (last.start or 0) if number == 0 else 0
      whole.append(
        slice(offset + letter.start * inner, offset + letter.stop * inner)
      )
    return tuple(whole)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a format.

  Attributes:
    name: in the file.
    shape: of the whole.
    parts: that make it up, in C order.
  """

  name: str
  shape: tuple[int, ...]
  parts: tuple[Part, ...]


def own_parameters(
  config: TransformerConfig, stages: tuple[FunnelConfig, ...]
) -> dict[Path, tuple[int, ...]]:
  """The shape of each of our parameters, what stages learn included."""
  state = nnx.to_flat_state(nnx.state(Transformer.abstract(config, stages)))
  return {tuple(map(str, path)): param.shape for path, param in state}


def own_tensors(
  config: TransformerConfig, stages: tuple[FunnelConfig, ...] = ()
) -> list[Tensor]:
  """Our own tree: names are paths joined by dots, layers are stacked."""
  tensors = []
  for path, shape in own_parameters(config, stages).items():
    layers = range(shape[0]) if path[0] == "layers" else (None,)
    parts = (
      Part(path, layer, () if layer is None else (layer,), axes_of(path))
      for layer in layers
    )
    tensors.append(Tensor(".".join(path), shape, tuple(parts)))
  return tensors


def learned_tensors(tensors: list[Tensor]) -> list[Tensor]:
  """Those of `own_tensors` that a funnel has learned."""
  return [tensor for tensor in tensors if tensor.name.startswith("funnel.")]


def parts_of(tensors: list[Tensor]) -> dict[tuple[Path, int | None], tuple]:
  """(tensor, part) by our path and layer."""
  return {
    (part.path, part.layer): (tensor, part)
    for tensor in tensors
    for part in tensor.parts
  }


def cut_sizes(
  sizes: Mapping[str, int], cut: Mapping[str, slice]
) -> dict[str, int]:
  """The sizes of what is left by a `cut`."""
  left = {letter: part.stop - part.start for letter, part in cut.items()}
  return {**sizes, **left}


def rearrange(
  block: np.ndarray,
  source: str,
  target: str,
  sizes: Mapping[str, int],
  dtype: np.dtype,
) -> np.ndarray:
  """A C-contiguous copy of `block` in other axes and another dtype.

  Args:
    block: of the axes `source`, folded.
    source, target: the same letters, in two orders or foldings.
    sizes: of the letters in `block`.
    dtype: of the result.
  """
  letters, wanted = source.replace(" ", ""), target.replace(" ", "")
  order = [letters.index(c) for c in wanted]
  view = block.reshape([sizes[c] for c in letters]).transpose(order)
  copy = np.empty(view.shape, dtype)
  # Read a few of the source's rows at a time: what is written then stays in
  # the caches, three times as fast as one assignment for 16-bit matrices.
  outer = order.index(0)
  for rows in _ranges(view.shape[outer], 128):
    at = (slice(None),) * outer + (rows,)
    copy[at] = view[at]
  return copy.reshape(shape_of(target, sizes))


def _ranges(size: int, step: int) -> Iterator[slice]:
  for start in range(0, size, step):
    yield slice(start, min(start + step, size))


def blocks_of(
  part: Part, sizes: Mapping[str, int], itemsize: int, most: int
) -> Iterator[dict[str, slice]]:
  """Cuts of a part into ranges of one letter, each of about `most` bytes.

  The letter is the outermost one of Hugging Face's matrices, so that blocks
  are consecutive there; within ours they are chunks.
  """
  row = params.row_of("/".join(part.path))
  if not row.outputs or row.role == "funnel":
    yield {}
    return
  letter = "V" if "V" in row.dims else row.outputs[0]
  size = sizes[letter]
  nbytes = math.prod(shape_of(part.axes, sizes)) * itemsize
  step = max(1, min(size, size * most // nbytes))
  # A last block of another size would be stored as a whole chunk.
  even = next(n for n in range(step, 0, -1) if size % n == 0)
  for cut in _ranges(size, even if 2 * even > step else step):
    yield {letter: cut}
