"""LoRA and QLoRA: factors that are trained beside matrices that are not.

A layer's matrix W is used as W + alpha / rank * A B (arXiv 2106.09685); W may
be kept in 8 or 4 bits (arXiv 2305.14314). What a funnel learns is new, and is
trained whole.

  base = freeze(params, lora)            what stays; no gradients, no state
  adapters = init(params, lora, key)     what is trained
  attach(base, adapters, lora)           parameters for a model to run with
  merge(base, adapters, lora)            plain parameters, for export

Quantisation is qwix's. Its LoraProvider is not used: it makes parameters in the
modules that it sees running, and a layer here is a slice within a loop.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import re
from typing import Any

from flax import nnx
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections
from ml_collections import config_dict

from gemma_funnel import params as params_lib
from gemma_funnel.checks import (
  require,
  require_choice,
  require_int,
  require_positive,
)
from gemma_funnel.parallel import sharding
from gemma_funnel.params import path_of

Params = dict[str, Any]

BASE_DTYPES = ("int8", "int4", "nf4")
# Entries that share a scale in 4 bits (QLoRA's).
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which matrices have factors, and how they are used."""

  rank: int
  alpha: float  # Times A B, over the rank.
  target: str  # Found in paths such as "params/layers/attn/query".
  base_dtype: str | None = None  # Of all layers' matrices; None: as they are.

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def default_config() -> ml_collections.ConfigDict:
  """The keys of a configuration; a rank of 0 is no LoRA."""
  dtype = config_dict.placeholder(str)
  return config_dict.create(
    rank=0, alpha=16.0, target="attn|mlp", base_dtype=dtype
  )


def make_config(config: ml_collections.ConfigDict) -> LoraConfig | None:
  """Checks a configuration (ValueError); None is no LoRA."""
  require_int("lora.rank", config.rank, 0)
  require_choice("lora.base_dtype", config.base_dtype, (*BASE_DTYPES, None))
  require(
    config.rank > 0 or config.base_dtype is None,
    f"lora.base_dtype={config.base_dtype!r} with lora.rank=0: parameters that "
    "are trained themselves cannot be quantised; set lora.rank",
  )
  require_positive("lora.alpha", config.alpha)
  try:
    re.compile(config.target)
  except re.error as error:
    raise ValueError(
      f"lora.target={config.target!r} is no regular expression: {error}"
    ) from error
  if config.base_dtype is not None:
    _qwix(config.base_dtype)
  return LoraConfig(**config) if config.rank else None


def of_run(config: Mapping[str, Any]) -> LoraConfig | None:
  """Of the configuration of a run, which may be older than LoRA is."""
  said = config.get("lora") or {"rank": 0}
  return LoraConfig(**said) if said["rank"] else None


def _qwix(base_dtype: str):
  try:
    import qwix
  except ImportError as error:
    raise ValueError(
      f"lora.base_dtype={base_dtype!r} needs qwix: pip install "
      "'gemma-funnel[qwix]'"
    ) from error
  return qwix


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["base", "a", "b"],
  meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Adapted:
  """Stands for a parameter: a frozen matrix, and its factors if it has any.

  A pytree, all leaves of which begin with the depth, so that a loop over layers
  slices it as it does an array.
  """

  base: Any  # [L, in.., out..], an array or a qwix QArray.
  a: jax.Array | None  # [L, in.., rank]; None is no factors.
  b: jax.Array | None  # [L, rank, out..].
  scale: float  # Of their product.

  def einsum(self, subscripts: str, x: jax.Array) -> jax.Array:
    """The einsum of x and a layer's matrix, of which A B is never made.

    `subscripts` are capitals, "x,matrix->result"; the result has x's dtype.
    """
    # Else the backward pass would keep what each layer's is made into.
    product = jax.checkpoint(
      lambda x, base: jnp.einsum(subscripts, x, _dense(base).astype(x.dtype)),
      prevent_cse=False,
    )
    result = product(x, self.base)
    if self.a is None:
      return result
    inputs, matrix, outputs = re.split(",|->", subscripts)
    reads = "".join(axis for axis in matrix if axis in inputs)
    gives = "".join(axis for axis in matrix if axis not in inputs)
    kept = "".join(axis for axis in inputs if axis not in reads)
    a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
    low = jnp.einsum(f"{inputs},{reads}r->{kept}r", x, a)
    delta = jnp.einsum(f"{kept}r,r{gives}->{outputs}", low, b)
    return result + self.scale * delta


def _is_quantised(x) -> bool:
  return hasattr(x, "qvalue")


def _dense(base) -> jax.Array:
  if not _is_quantised(base):
    return base
  import qwix

  return qwix.dequantize(base)


def freeze(params: Params, lora: LoraConfig) -> Params:
  """A model's parameters that are not trained, quantised as `lora` says.

  What the funnel learns is among them, as its initial value; `attach` uses the
  trained one. Scales have the parameters' dtype: one for each output of a
  matrix in 8 bits, one for each 64 inputs of an output in 4. Peak memory is
  both trees'.
  """
  if lora.base_dtype is None:
    return params

  def quantise(path, x):
    row = _row(path)
    return _quantise(row.input_axes, lora.base_dtype, x) if row else x

  return jax.tree_util.tree_map_with_path(quantise, params)


def freeze_placed(
  params: Params, lora: LoraConfig, mesh: jax.sharding.Mesh | None
) -> Params:
  """`freeze` of parameters on a mesh, which are given away."""
  function = functools.partial(freeze, lora=lora)
  placed = mesh and shardings(jax.eval_shape(function, params), mesh)
  return jax.jit(function, donate_argnums=0, out_shardings=placed)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantise(input_axes, base_dtype: str, x_L: jax.Array):
  inputs = [x_L.ndim - 1 + axis for axis in input_axes]
  tiled, shared = {}, inputs
  if base_dtype != "int8":
    shared = inputs[-1:]
    tiled = {i: math.gcd(_BLOCK, x_L.shape[1 + i]) for i in shared}
  quantize = functools.partial(
    _qwix(base_dtype).quantize,
    qtype="nf4" if base_dtype == "nf4" else jnp.dtype(base_dtype),
    channelwise_axes=[i for i in range(x_L.ndim - 1) if i not in shared],
    tiled_axes=tiled,
  )
  # A layer at a time: four bits are found by comparing with 16 values.
  return jax.lax.map(quantize, x_L)


def init(params: Params, lora: LoraConfig, key: jax.Array) -> Params:
  """What is trained: factors, float32, and what the funnel learns.

  A is He's uniform and B zero (qwix's), so that nothing changes at first.

  Raises:
    ValueError: `lora.target` is found in no matrix's path, or the rank is more
      than a matrix has.
  """
  found, adapters = [], {}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    row, name = _row(path), path_of(path)
    if row is None:
      continue
    found.append("params/" + name)
    if not re.search(lora.target, found[-1]):
      continue
    sizes = dict(zip(row.dims.split(), x.shape, strict=True), r=lora.rank)
    shape_a, shape_b = (f.shape(sizes) for f in params_lib.factors(row))
    inputs, outputs = math.prod(shape_a[1:-1]), math.prod(shape_b[2:])
    require(
      lora.rank <= min(inputs, outputs),
      f"lora.rank={lora.rank} is more than {name} has: {inputs} x {outputs}",
    )
    he_uniform = nnx.initializers.he_uniform(
      in_axis=range(1, len(shape_a) - 1), out_axis=-1, batch_axis=(0,)
    )
    keys = tuple(part.key for part in path)
    own = jax.random.fold_in(key, len(found))
    adapters[*keys, "a"] = he_uniform(own, shape_a, jnp.float32)
    adapters[*keys, "b"] = jnp.zeros(shape_b, jnp.float32)
  require(
    bool(adapters),
    f"lora.target={lora.target!r} is found in none of the layers' matrices: "
    f"{', '.join(found)}",
  )
  adapters = unflatten_dict(adapters)
  if "funnel" in params:
    adapters["funnel"] = params["funnel"]
  return adapters


def attach(base: Params, adapters: Params, lora: LoraConfig) -> Params:
  """Parameters for a model to run with; each layer's matrix is an `Adapted`.

  Differentiable with respect to `adapters`; `base` has no gradient.
  """
  adapt = lambda x, factors: Adapted(
    x, factors.get("a"), factors.get("b"), lora.scale
  )
  return _joined(adapt, jax.lax.stop_gradient(base), adapters)


def merge(base: Params, adapters: Params, lora: LoraConfig) -> Params:
  """Parameters of a model without factors, in the dtypes it was frozen from.

  Products are added in float32; what was quantised stays as coarse as it is.
  """

  def fold(x, factors):
    dense = _dense(x)
    if not factors:
      return dense
    a = factors["a"].reshape(len(dense), -1, lora.rank)
    b = factors["b"].reshape(len(dense), lora.rank, -1)
    product = jnp.matmul(a, b, precision="highest").reshape(dense.shape)
    whole = dense.astype(jnp.float32) + lora.scale * product
    return whole.astype(dense.dtype)

  return _joined(fold, base, adapters)


def shardings(tree: Params, mesh: jax.sharding.Mesh):
  """NamedShardings of a tree that `freeze` gives.

  Quantised values lie as their parameter would, and scales along with them, or
  whole where the mesh does not divide their blocks.

  Raises:
    ValueError: see `sharding.spec_of`.
  """

  def place(path, x):
    spec = sharding.spec_of(path_of(path), x.shape, mesh)
    if not _is_quantised(x):
      return NamedSharding(mesh, spec)
    split = zip(x.scale.shape, spec, sharding.parts(spec, mesh), strict=True)
    coarse = P(*[None if size % n else axes for size, axes, n in split])
    return dataclasses.replace(
      x, qvalue=NamedSharding(mesh, spec), scale=NamedSharding(mesh, coarse)
    )

  return jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_quantised)


def _joined(function, base: Params, adapters: Params) -> Params:
  """`base` with `function` of each matrix and its factors, {} where it has none."""

  def join(path, x):
    if _row(path) is None:
      return x
    factors = adapters
    for part in path:
      factors = factors.get(part.key, {})
    return function(x, factors)

  params = jax.tree_util.tree_map_with_path(join, base, is_leaf=_is_quantised)
  if "funnel" in adapters:
    params["funnel"] = adapters["funnel"]
  return params


def _row(path: tuple) -> params_lib.Row | None:
  """Of a stacked matrix, which may have factors; None if it is none."""
  row = params_lib.layer_matrix(path_of(path))
  return row if row and row.stacked else None
