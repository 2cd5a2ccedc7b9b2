"""The parameters, one row each: path, dimensions, initialiser and role.

Whatever depends on which parameter it has before it asks here: initialisation,
sharding, optimizers, weight decay, LoRA, conversion and parameter counts.

Dimensions: L layers, V vocabulary, D model width, F MLP width, N query heads,
K key/value heads, H head width; of a task's head, E hidden width, C outputs;
of LoRA's factors, r rank; of what a recovery learns, d is D once more, O
distances to an anchor, W a narrow width.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from gemma_funnel.config import FunnelConfig, TransformerConfig
from gemma_funnel.parallel import mesh as mesh_lib
from gemma_funnel.registry import RECOVERIES, REDUCERS

Sizes = Mapping[str, int]

# The mesh axes that each dimension of a sharded parameter is split over. The
# devices of "sequence" all work with the whole width D and gather it by layer.
MESH_AXES: dict[str, mesh_lib.Axes] = {
  "V": mesh_lib.HEADS,
  "D": mesh_lib.WIDTH,
  "F": mesh_lib.HEADS,
  "N": mesh_lib.HEADS,
  "K": mesh_lib.HEADS,
  "d": mesh_lib.HEADS,
  "W": mesh_lib.HEADS,
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter.

  Attributes:
    path: in a model's tree, or "head/.." in a task's; of what a funnel learns,
      within its reducer or recovery.
    dims: letters of its dimensions; "L" is the depth that layers are stacked
      over.
    role: "embedding", "unembedding", "attention", "mlp", "norm", "funnel" or
      "head".
    outputs: of a matrix, the letters in `dims` of its outputs; "" is a vector.
    init: (row, sizes) -> initialiser of one layer; None is zeros, without a
      key.
    decays: whether weight decay applies by default.
    when: whether a model has it, by its TransformerConfig; of a head's, by its
      HeadConfig.
  """

  path: str
  dims: str
  role: str
  outputs: str = ""
  init: Callable[["Row", Sizes], Callable[..., jax.Array]] | None = None
  decays: bool = False
  when: Callable[..., bool] = lambda *configs: True

  @property
  def stacked(self) -> bool:
    return self.dims.startswith("L")

  @property
  def layer_dims(self) -> str:
    """`dims` of one layer."""
    return self.dims.removeprefix("L ")

  @property
  def output_axes(self) -> tuple[int, ...]:
    """Axes of a matrix's outputs, counted from the last."""
    return self._axes(self.outputs.split())

  @property
  def input_axes(self) -> tuple[int, ...]:
    """Axes of a matrix's inputs, counted from the last."""
    return self._axes(set(self.dims.split()) - {"L", *self.outputs.split()})

  def _axes(self, letters) -> tuple[int, ...]:
    dims = self.dims.split()
    return tuple(i - len(dims) for i, d in enumerate(dims) if d in letters)

  @property
  def is_layer_matrix(self) -> bool:
    """Whether Muon and, in stacked layers, LoRA apply."""
    return bool(self.outputs) and self.role in ("attention", "mlp", "funnel")

  @property
  def mesh_axes(self) -> tuple[mesh_lib.Axes, ...]:
    """Of each dimension. Vectors and tasks' heads are small, and kept whole."""
    dims = self.dims.split()
    if not self.outputs or self.role == "head":
      return (None,) * len(dims)
    return tuple(MESH_AXES.get(letter) for letter in dims)

  def shape(self, sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in self.dims.split())

  def size(self, sizes: Sizes) -> int:
    """How many numbers it is made of."""
    return math.prod(self.shape(sizes))


def _lecun(row: Row, sizes: Sizes, scale: float = 1.0):
  """Truncated normal of variance scale / fan-in (Efficient BackProp, 1998; the
  default of flax, nanodo and MaxText)."""
  return nnx.initializers.variance_scaling(
    scale,
    "fan_in",
    "truncated_normal",
    in_axis=row.input_axes,
    out_axis=row.output_axes,
  )


def _residual(row: Row, sizes: Sizes):
  """LeCun's, of branches into the residual stream: smaller by the root of their
  number (GPT-2's rule). Gemma 2's post norms undo it, Gemma 1 needs it."""
  return _lecun(row, sizes, 1 / (2 * sizes["L"]))


def unit_inputs(row: Row, sizes: Sizes):
  """Variance 1 / D: embeddings of variance one when scaled by sqrt(D), logits
  of that variance, and products of states that have it."""
  return nnx.initializers.normal(sizes["D"] ** -0.5)


def zeros(row: Row, sizes: Sizes):
  """Takes a key, which `init=None` does not: later draws depend on it."""
  return nnx.initializers.zeros


def vector(path: str, dims: str, role: str, **options) -> Row:
  """A row of no matrix, which starts as zeros."""
  return Row(path, dims, role, **options)


def matrix(
  path: str, dims: str, role: str, outputs: str, init=None, **options
) -> Row:
  """A row of a matrix; `outputs` are the letters of what it gives."""
  return Row(path, dims, role, outputs, init, decays=True, **options)


def attention(path: str, depth: str, role: str, out) -> tuple[Row, ...]:
  """Rows of a `layers.Attention` at `path`.

  Args:
    path: of the module.
    depth: "L " in stacked layers, else "".
    role: of its matrices.
    out: initialiser of the output projection.
  """
  project = functools.partial(matrix, role=role, init=_lecun)
  bias = functools.partial(vector, role=role, when=lambda c: c.attention_bias)
  norm = functools.partial(
    vector,
    role="funnel" if role == "funnel" else "norm",
    when=lambda c: c.qk_norm,
  )
  return (
    project(f"{path}/query", f"{depth}D N H", outputs="N H"),
    project(f"{path}/key", f"{depth}D K H", outputs="K H"),
    project(f"{path}/value", f"{depth}D K H", outputs="K H"),
    matrix(f"{path}/out", f"{depth}N H D", role, "D", out),
    bias(f"{path}/query_bias", f"{depth}N H"),
    bias(f"{path}/key_bias", f"{depth}K H"),
    bias(f"{path}/value_bias", f"{depth}K H"),
    norm(f"{path}/query_norm/scale", f"{depth}H"),
    norm(f"{path}/key_norm/scale", f"{depth}H"),
  )


_post_norms = lambda config: config.post_norms
MODEL: tuple[Row, ...] = (
  matrix("embedding", "V D", "embedding", "D", unit_inputs),
  matrix(
    "unembedding",
    "V D",
    "unembedding",
    "V",
    unit_inputs,
    when=lambda config: not config.tied,
  ),
  *attention("layers/attn", "L ", "attention", _residual),
  matrix("layers/mlp/gate", "L D F", "mlp", "F", _lecun),
  matrix("layers/mlp/up", "L D F", "mlp", "F", _lecun),
  matrix("layers/mlp/down", "L F D", "mlp", "D", _residual),
  vector("layers/pre_attn_norm/scale", "L D", "norm"),
  vector("layers/pre_mlp_norm/scale", "L D", "norm"),
  vector("layers/post_attn_norm/scale", "L D", "norm", when=_post_norms),
  vector("layers/post_mlp_norm/scale", "L D", "norm", when=_post_norms),
  vector("final_norm/scale", "D", "norm"),
)
HEAD: tuple[Row, ...] = (
  vector(
    "head/pool_query",
    "D",
    "head",
    when=lambda head: head.pool == "attention" and not head.per_token,
  ),
  matrix(
    "head/hidden", "D E", "head", "E", _lecun, when=lambda head: head.hidden
  ),
  matrix("head/out", "E C", "head", "C"),
  vector("head/bias", "C", "head"),
)


def factors(row: Row) -> tuple[Row, Row]:
  """LoRA's two of a stacked matrix: a [L, inputs.., r], b [L, r, outputs..]."""
  outputs = row.outputs.split()
  inputs = [d for d in row.layer_dims.split() if d not in outputs]
  return tuple(
    Row(f"{row.path}/{name}", " ".join(dims), row.role, decays=True)
    for name, dims in (("a", ["L", *inputs, "r"]), ("b", ["L", "r", *outputs]))
  )


# What reducers and recoveries learn is in `rows` of their classes.
PARTS = {"reducer": REDUCERS, "recovery": RECOVERIES}

_TABLE: dict[str, Row] = {row.path: row for row in (*MODEL, *HEAD)}
_TABLE |= {
  factor.path: factor
  for row in MODEL
  if row.stacked and row.is_layer_matrix
  for factor in factors(row)
}


def path_of(key_path: tuple) -> str:
  """A parameter's path as text, such as "layers/attn/query"."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(function: Callable[[str], Any], tree):
  """A tree of a function's values at the parameters' paths."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: function(path_of(path)), tree
  )


def _find(path: str) -> Row | None:
  """The row at a path, in which "*" is a stage's number."""
  if not path.startswith("funnel/*/"):
    return _TABLE.get(path)
  part, _, name = path.removeprefix("funnel/*/").partition("/")
  for kind in PARTS.get(part, {}).values():
    for row in kind.rows:
      if row.path == name:
        return dataclasses.replace(row, path=path)
  return None


def row_of(path: str) -> Row | None:
  """The row of the parameter that a path ends in; None if there is none.

  So do the paths of weights ("params/layers/attn/query"), of LoRA's factors
  ("lora/layers/attn/query/a") and of an optimizer's moments.
  """
  parts = re.sub(r"(^|/)funnel/\d+/", r"\1funnel/*/", path).split("/")
  rows = (_find("/".join(parts[start:])) for start in range(len(parts)))
  return next((row for row in rows if row), None)


def layer_matrix(path: str) -> Row | None:
  """The row of a matrix that is orthogonalised by Muon, or None."""
  row = row_of(path)
  return row if row and row.is_layer_matrix else None


# Of `funnel.Offset`: distances that have a map of their own, and its rank.
OFFSETS, OFFSET_WIDTH = 8, 16


def sizes_of(config: TransformerConfig) -> dict[str, int]:
  """The size of each letter of a model's dimensions."""
  return dict(
    V=config.vocab_size,
    D=config.embed_dim,
    F=config.mlp_dim,
    N=config.num_heads,
    K=config.num_kv_heads,
    H=config.head_dim,
    L=config.num_layers,
    d=config.embed_dim,
    O=OFFSETS,
    W=OFFSET_WIDTH,
  )


def rows_of(
  config: TransformerConfig, stages: Sequence[FunnelConfig] = ()
) -> list[Row]:
  """The parameters of a model and of what its stages learn."""
  learned = [
    dataclasses.replace(row, path=f"funnel/{number}/{part}/{row.path}")
    for number, stage in enumerate(stages)
    for part, name in (("reducer", stage.reduce), ("recovery", stage.recover))
    for row in PARTS[part][name].rows
  ]
  return [row for row in (*MODEL, *learned) if row.when(config)]


def init(
  path: str, config: TransformerConfig, rngs: nnx.Rngs | None = None
) -> jax.Array:
  """A parameter of a model, of one layer, as it is at first.

  Args:
    path: of a row.
    config: of the model: sizes, and the dtype.
    rngs: of which a key is taken, unless the parameter starts as zeros.
  """
  return init_array(path, sizes_of(config), config.param_dtype, rngs)


def init_array(
  path: str, sizes: Sizes, dtype: str, rngs: nnx.Rngs | None = None
) -> jax.Array:
  """As `init`, with the sizes of the letters."""
  row = _find(path)
  shape = tuple(sizes[letter] for letter in row.layer_dims.split())
  if row.init is None:
    return jnp.zeros(shape, jnp.dtype(dtype))
  return row.init(row, sizes)(rngs.params(), shape, jnp.dtype(dtype))
