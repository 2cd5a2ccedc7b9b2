"""Where our parameters lie within the tensors of a format, and in which order.

A format is a list of `Tensor`s, each a name and the `ParamView`s of our
parameters that make it up: `kv_einsum` of Google's trees holds a layer's keys
and its values, a stacked tensor one view a layer. `axes` is a string of the
dims of model.py; dims in one word are folded into one axis, the first one
outermost: "NH D" is [N*H, D].
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

from flax import nnx
import numpy as np

from gemma_funnel import params
from gemma_funnel.checks import require
from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.convert.tensor_io import Index, TensorReader, rename
from gemma_funnel.model import Transformer

# Fields that Google's formats have not, each with what Gemma has there.
_GEMMA = {
  "local_rope_base": None,
  "rope_scaling": None,
  "norm_offset": 1.0,
  "activation": "gelu",
  "embed_scale": None,
  "tied": True,
  "qk_norm": False,
  "attention_bias": False,
}
# Where version 0.1 had what a funnel learns, and where it is.
_OLD_PARTS = {
  "pool_query": "reducer",
  "gate": "recovery",
  "scale": "recovery",
  "attend": "recovery",
}

# In our tree, such as ("layers", "attn", "query").
Path = tuple[str, ...]
# A range of some dims; the others are whole.
Slices = Mapping[str, slice]

sizes_of = params.sizes_of


def axes_of(path: Path) -> str:
  """Of our parameter at `path`, without the layers it may be stacked over."""
  return params.row_of("/".join(path)).layer_dims


def sliced_sizes(sizes: Mapping[str, int], slices: Slices) -> dict[str, int]:
  """The size of each dim of a slice."""
  return {**sizes, **{dim: s.stop - s.start for dim, s in slices.items()}}


def shape_of(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The shape of folded `axes`."""
  return tuple(math.prod(sizes[dim] for dim in word) for word in axes.split())


@dataclasses.dataclass(frozen=True)
class ParamView:
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

  def index(self, slices: Slices, sizes: Mapping[str, int]) -> Index:
    """Where in the stored tensor a slice of this view is.

    Args:
      slices: of dims that are each the first of their word.
      sizes: of all dims.
    """
    *whole, last = self.at or (slice(None),)
    if not isinstance(last, slice):
      whole, last = list(self.at), slice(None)
    offset = last.start or 0
    for word in self.axes.split():
      inner = math.prod(sizes[dim] for dim in word[1:])
      rows = slices.get(word[0], slice(0, sizes[word[0]]))
      whole.append(
        slice(offset + rows.start * inner, offset + rows.stop * inner)
      )
      offset = 0
    return tuple(whole)

  def blocks(
    self, sizes: Mapping[str, int], itemsize: int, most: int
  ) -> Iterator[dict[str, slice]]:
    """Slices of the view along one dim, each of about `most` bytes.

    The dim is the outermost one of Hugging Face's matrices, so that blocks are
    consecutive there; within ours they are chunks.
    """
    row = params.row_of("/".join(self.path))
    if not row.outputs or row.role == "funnel":
      yield {}
      return
    dim = "V" if "V" in row.dims else row.outputs[0]
    size = sizes[dim]
    nbytes = math.prod(shape_of(self.axes, sizes)) * itemsize
    step = max(1, min(size, size * most // nbytes))
    # A last block of another size would be stored as a whole chunk.
    even = next(n for n in range(step, 0, -1) if size % n == 0)
    step = even if 2 * even > step else step
    for start in range(0, size, step):
      yield {dim: slice(start, min(start + step, size))}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a format.

  Attributes:
    name: in the file.
    shape: of the whole.
    views: of our parameters that make it up, in C order.
  """

  name: str
  shape: tuple[int, ...]
  views: tuple[ParamView, ...]


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
    views = (
      ParamView(path, layer, () if layer is None else (layer,), axes_of(path))
      for layer in layers
    )
    tensors.append(Tensor(".".join(path), shape, tuple(views)))
  return tensors


def check_gemma(config: TransformerConfig, where: str = "") -> None:
  """Checks that Google's formats can express a model; `where` it lies.

  Raises:
    ValueError: it cannot; all fields are named.
  """
  same = {
    "embed_scale": config.embed_scale == math.sqrt(config.embed_dim),
    "local_rope_base": config.local_rope_base == config.rope_base,
  }
  differ = [
    f"model.{name}={getattr(config, name)!r}"
    for name, value in _GEMMA.items()
    if getattr(config, name) != value and not same.get(name)
  ]
  require(
    not differ,
    f"{where and f'{where}: '}Google's formats cannot have "
    f"{', '.join(differ)}: expected a Gemma 1 or 2, or the formats hf or orbax",
  )


def current_names(reader: TensorReader) -> TensorReader:
  """A reader of our names, of files that may have those of version 0.1."""
  pattern = re.compile(rf"(funnel\.\d+)\.({'|'.join(_OLD_PARTS)})\b")
  current = lambda old: pattern.sub(
    lambda m: f"{m[1]}.{_OLD_PARTS[m[2]]}.{m[2]}", old
  )
  return rename(reader, {current(old): old for old in reader.tensors})


def learned_tensors(tensors: list[Tensor]) -> list[Tensor]:
  """Those of `own_tensors` that a funnel has learned."""
  return [tensor for tensor in tensors if tensor.name.startswith("funnel.")]


def rearrange(
  block: np.ndarray,
  axes: str,
  wanted: str,
  sizes: Mapping[str, int],
  dtype: np.dtype,
) -> np.ndarray:
  """A C-contiguous copy of `block` in other axes and another dtype.

  Args:
    block: of `axes`, folded.
    axes: of it.
    wanted: the same dims in another order or folding.
    sizes: of the dims in `block`.
    dtype: of the result.
  """
  dims = axes.replace(" ", "")
  order = [dims.index(dim) for dim in wanted.replace(" ", "")]
  view = block.reshape([sizes[dim] for dim in dims]).transpose(order)
  copy = np.empty(view.shape, dtype)
  # Read a few of the source's rows at a time: what is written then stays in
  # the caches, three times as fast as one assignment for 16-bit matrices.
  outer = order.index(0)
  for start in range(0, view.shape[outer], 128):
    at = (slice(None),) * outer + (slice(start, start + 128),)
    copy[at] = view[at]
  return copy.reshape(shape_of(wanted, sizes))
