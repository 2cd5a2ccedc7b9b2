"""The axes of a device mesh, by name, and what the model may say of them.

Code that computes says what a dimension is; where that lies is a matter of the
ambient mesh (`jax.set_mesh`). Without one nothing happens.
"""

from collections.abc import Sequence
import math

import jax
from jax.sharding import PartitionSpec as P

# "slice" is the outermost: what crosses it goes by the network between slices
# of a pod, or between nodes. "data" holds copies of the model; "fsdp" holds
# parts of it that are gathered to be used; "sequence" holds parts of each row's
# tokens; "tensor" holds heads, parts of the MLP and of the vocabulary.
AXES = ("slice", "data", "fsdp", "sequence", "tensor")
ROWS = ("slice", "data", "fsdp")
TOKENS = "sequence"
HEADS = "tensor"
# Of parameters, the model width: parts of them for each that works on its own.
WIDTH = ("fsdp", "sequence")

Axes = str | Sequence[str] | None


def size(axes: Axes) -> int:
  """How many parts axes of the ambient mesh make; absent ones make one."""
  shape = jax.sharding.get_abstract_mesh().shape
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(shape.get(axis, 1) for axis in names)


def dividing(axes: Axes, dimension: int) -> Axes:
  """`axes`, as far as the ambient mesh has them, or None.

  None too if they do not divide the dimension, which then stays whole.
  """
  shape = jax.sharding.get_abstract_mesh().shape
  names = (axes,) if isinstance(axes, str) else axes or ()
  names = tuple(axis for axis in names if shape.get(axis, 1) > 1)
  parts = math.prod(shape[axis] for axis in names)
  return names if names and dimension % parts == 0 else None


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
  """Says on which axes the leading dimensions of x are split; others are not.

  Left to itself the compiler may split activations as it does the parameters
  that they meet, and send activations around for every layer.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return x
  spec = map(dividing, axes, x.shape)
  return jax.lax.with_sharding_constraint(x, P(*spec))
