"""Axes of the device mesh, and constraints on activations.

Model code names a dimension; the ambient mesh (`jax.set_mesh`) says how it is
split. Without a mesh nothing happens.
"""

from collections.abc import Sequence
import math

import jax
from jax.sharding import PartitionSpec as P

# "slice" is the outermost, over the network between slices of a pod, or between
# nodes. "data" holds copies of the model; "fsdp" parts of it that are gathered
# to be used; "sequence" parts of each row's tokens; "tensor" heads, parts of
# the MLP and of the vocabulary.
AXES = ("slice", "data", "fsdp", "sequence", "tensor")
ROWS = ("slice", "data", "fsdp")
TOKENS = "sequence"
HEADS = "tensor"
# The model width of parameters.
WIDTH = ("fsdp", "sequence")

Axes = str | Sequence[str] | None


def size(axes: Axes) -> int:
  """Product of the sizes of axes of the ambient mesh; 1 for absent ones."""
  shape = jax.sharding.get_abstract_mesh().shape
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(shape.get(axis, 1) for axis in names)


def dividing(axes: Axes, dimension: int) -> Axes:
  """Those of `axes` that split the ambient mesh; None if they do not divide."""
  shape = jax.sharding.get_abstract_mesh().shape
  names = (axes,) if isinstance(axes, str) else axes or ()
  names = tuple(axis for axis in names if shape.get(axis, 1) > 1)
  parts = math.prod(shape[axis] for axis in names)
  return names if names and dimension % parts == 0 else None


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
  """Splits the leading dimensions of x over axes, and no others.

  The compiler may otherwise split activations as their parameters are, and send
  them around in every layer.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return x
  spec = map(dividing, axes, x.shape)
  return jax.lax.with_sharding_constraint(x, P(*spec))
