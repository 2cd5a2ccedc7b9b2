"""The parameters, one row each: path, dimensions, initialiser and role.

Whatever depends on which parameter it has before it asks here: initialisation,
sharding, optimizers, weight decay, LoRA, conversion and parameter counts.

Dimensions: L layers, V vocabulary, D model width, F MLP width, N query heads,
K key/value heads, H head width; of a task's head, E hidden width, C outputs;
of LoRA's factors, r rank.
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

Sizes = Mapping[str, int]

# The mesh axes that each dimension of a sharded parameter is split over. The
# devices of "sequence" all work with the whole width D and gather it by layer.
MESH_AXES: dict[str, mesh_lib.Axes] = {
  "V": mesh_lib.HEADS,
  "D": mesh_lib.WIDTH,
  "F": mesh_lib.HEADS,
  "N": mesh_lib.HEADS,
  "K": mesh_lib.HEADS,
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter.

  Attributes:
    path: in a model's tree, or "head/.." in a task's; "*" is a stage's number.
    dims: letters of its dimensions; "L" is the depth that layers are stacked
      over.
    role: "embedding", "unembedding", "attention", "mlp", "norm", "funnel" or
      "head".
    outputs: of a matrix, the letters in `dims` of its outputs; "" is a vector.
    init: (row, sizes) -> initialiser of one layer; None is zeros, without a
      key.
    decays: whether weight decay applies by default.
    when: whether a model has it, by its TransformerConfig; of a funnel's, by
      that and the FunnelConfig of the stage; of a head's, by its HeadConfig.
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


def _unit(row: Row, sizes: Sizes):
  """Of variance one, scaled by sqrt(D), and logits of that variance."""
  return nnx.initializers.normal(sizes["D"] ** -0.5)


def _zeros(row: Row, sizes: Sizes):
  """Takes a key, which `init=None` does not: later draws depend on it."""
  return nnx.initializers.zeros


def _vector(path: str, dims: str, role: str, **options) -> Row:
  return Row(path, dims, role, **options)


def _matrix(
  path: str, dims: str, role: str, outputs: str, init=None, **options
):
  return Row(path, dims, role, outputs, init, decays=True, **options)


def _attention(path: str, depth: str, role: str, out, when) -> list[Row]:
  """Of an `Attention` at `path`; `depth` is "L " in stacked layers."""
  norms = lambda *c: when(*c) and getattr(c[0], "qk_norm", False)
  biases = lambda *c: when(*c) and getattr(c[0], "attention_bias", False)
  matrix = functools.partial(_matrix, role=role, init=_lecun, when=when)
  bias = functools.partial(_vector, role=role, when=biases)
  norm_role = role if role == "funnel" else "norm"
  return [
    matrix(f"{path}/query", f"{depth}D N H", outputs="N H"),
    matrix(f"{path}/key", f"{depth}D K H", outputs="K H"),
    matrix(f"{path}/value", f"{depth}D K H", outputs="K H"),
    _matrix(f"{path}/out", f"{depth}N H D", role, "D", out, when=when),
    bias(f"{path}/query_bias", f"{depth}N H"),
    bias(f"{path}/key_bias", f"{depth}K H"),
    bias(f"{path}/value_bias", f"{depth}K H"),
    _vector(f"{path}/query_norm/scale", f"{depth}H", norm_role, when=norms),
    _vector(f"{path}/key_norm/scale", f"{depth}H", norm_role, when=norms),
  ]


_always = lambda *configs: True
_post_norms = lambda config: config.post_norms
_attends = lambda config, stage: stage.recover == "attend"

MODEL: tuple[Row, ...] = (
  _matrix("embedding", "V D", "embedding", "D", _unit),
  _matrix(
    "unembedding",
    "V D",
    "unembedding",
    "V",
    _unit,
    when=lambda config: not getattr(config, "tied", True),
  ),
  *_attention("layers/attn", "L ", "attention", _residual, _always),
  _matrix("layers/mlp/gate", "L D F", "mlp", "F", _lecun),
  _matrix("layers/mlp/up", "L D F", "mlp", "F", _lecun),
  _matrix("layers/mlp/down", "L F D", "mlp", "D", _residual),
  _vector("layers/pre_attn_norm/scale", "L D", "norm"),
  _vector("layers/pre_mlp_norm/scale", "L D", "norm"),
  _vector("layers/post_attn_norm/scale", "L D", "norm", when=_post_norms),
  _vector("layers/post_mlp_norm/scale", "L D", "norm", when=_post_norms),
  _vector("final_norm/scale", "D", "norm"),
)
FUNNEL: tuple[Row, ...] = (
  _vector(
    "funnel/*/pool_query",
    "D",
    "funnel",
    when=lambda config, stage: stage.pool == "attention",
  ),
  _vector(
    "funnel/*/gate",
    "D",
    "funnel",
    when=lambda config, stage: stage.recover == "gate",
  ),
  # At first it adds nothing.
  *_attention("funnel/*/attend/attn", "", "funnel", _zeros, _attends),
  _vector("funnel/*/attend/query_norm/scale", "D", "funnel", when=_attends),
  _vector("funnel/*/attend/key_norm/scale", "D", "funnel", when=_attends),
)
HEAD: tuple[Row, ...] = (
  _vector(
    "head/pool_query",
    "D",
    "head",
    when=lambda head: head.pool == "attention" and not head.per_token,
  ),
  _matrix(
    "head/hidden", "D E", "head", "E", _lecun, when=lambda head: head.hidden
  ),
  _matrix("head/out", "E C", "head", "C"),
  _vector("head/bias", "C", "head"),
)


def factors(row: Row) -> tuple[Row, Row]:
  """LoRA's two of a stacked matrix: a [L, inputs.., r], b [L, r, outputs..]."""
  outputs = row.outputs.split()
  inputs = [d for d in row.layer_dims.split() if d not in outputs]
  return tuple(
    Row(f"{row.path}/{name}", " ".join(dims), row.role, decays=True)
    for name, dims in (("a", ["L", *inputs, "r"]), ("b", ["L", "r", *outputs]))
  )


_TABLE: dict[str, Row] = {row.path: row for row in (*MODEL, *FUNNEL, *HEAD)}
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


@functools.lru_cache(maxsize=4096)
def row_of(path: str) -> Row | None:
  """The row of the parameter that a path ends in; None if there is none.

  So do the paths of weights ("params/layers/attn/query"), of LoRA's factors
  ("lora/layers/attn/query/a") and of an optimizer's moments. What is learned at
  "funnel/0/NAME" and has no row is a vector [D] of a reduction or a recovery.
  """
  parts = re.sub(r"(^|/)funnel/\d+/", r"\1funnel/*/", path).split("/")
  for start in range(len(parts)):
    if row := _TABLE.get("/".join(parts[start:])):
      return row
  if parts[-3:-1] == ["funnel", "*"]:
    return _vector("/".join(parts[-3:]), "D", "funnel")
  return None


def layer_matrix(path: str) -> Row | None:
  """The row of a matrix that is orthogonalised by Muon, or None."""
  row = row_of(path)
  return row if row and row.is_layer_matrix else None


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
  )


def rows_of(
  config: TransformerConfig, stages: Sequence[FunnelConfig] = ()
) -> list[Row]:
  """The parameters of a model and of what its stages learn."""
  learned = [
    dataclasses.replace(row, path=row.path.replace("*", str(number)))
    for number, stage in enumerate(stages)
    for row in FUNNEL
    if row.when(config, stage)
  ]
  return [row for row in MODEL if row.when(config)] + learned


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
  row = _TABLE[path]
  shape = tuple(sizes[letter] for letter in row.layer_dims.split())
  if row.init is None:
    return jnp.zeros(shape, jnp.dtype(dtype))
  return row.init(row, sizes)(rngs.params(), shape, jnp.dtype(dtype))
