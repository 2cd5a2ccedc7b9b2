"""Gradient transformations of each optimizer, before the learning rate.

Each layer's matrix is one for itself, though layers are stacked, [L, ..]; heads
and their width are one axis of it (`params.Row`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gemma_funnel import params

# Smaller matrices have second moments of their own for each entry (the default
# of optax and t5x).
_FACTOR_FROM = 128
# What Adam's updates are in size, so that Muon goes by the same learning rate
# (arXiv 2502.16982).
_MUON_RMS = 0.2


def scale_by(
  name: str, options: dict[str, Any]
) -> optax.GradientTransformation:
  """An optimizer of `optimizer.OPTIONS`, as far as its direction of ascent."""
  match name:
    case "adamw":
      return optax.scale_by_adam(**options)
    case "lion":
      return optax.scale_by_lion(**options)
    case "muon":
      return _scale_by_muon(**options)
    case "adafactor":
      parts = [
        _scale_by_factored_rms(options["b2"], options["eps"]),
        _map_with_path(_clip_rms),
      ]
      if options["b1"]:
        parts.append(optax.ema(options["b1"], debias=False))
      return optax.chain(*parts)
  raise AssertionError(name)


def _scale_by_muon(momentum, b1, b2, eps) -> optax.GradientTransformation:
  """Muon for the matrices of layers, Adam for the rest; both Nesterov's.

  Each layer's matrix is orthogonalised by itself, and scaled as in arXiv
  2502.16982.
  """

  def numbers(path: str) -> MuonDimensionNumbers | None:
    row = params.layer_matrix(path)
    return row and MuonDimensionNumbers(row.input_axes, row.output_axes)

  kind = lambda path: "muon" if params.layer_matrix(path) else "adam"

  def scale(path, update):
    row = params.layer_matrix(params.path_of(path))
    width = max(_size(update, row.input_axes), _size(update, row.output_axes))
    return _MUON_RMS * math.sqrt(width) * update

  return optax.partition(
    {
      "muon": optax.chain(
        scale_by_muon(
          beta=momentum,
          weight_dimension_numbers=functools.partial(params.by_path, numbers),
        ),
        _map_with_path(scale),
      ),
      "adam": optax.scale_by_adam(b1, b2, eps, nesterov=True),
    },
    functools.partial(params.by_path, kind),
  )


class FactoredState(NamedTuple):
  """Means of squared gradients: of rows and of columns of a matrix, or of all.

  Dimensions that a mean is taken over are kept, with size 1, so that a mean is
  sharded as its parameter. A parameter has either `v_row` and `v_col` or `v`.
  """

  count: jax.Array
  v_row: Any
  v_col: Any
  v: Any


def _scale_by_factored_rms(b2, eps) -> optax.GradientTransformation:
  """Adafactor's second moments (arXiv 1804.04235, algorithm 4).

  As `optax.scale_by_factored_rms`, which would factor the two largest axes:
  here they are the matrix's own, whatever the depth, and heads are one axis
  with their width.
  """
  masked = optax.MaskedNode()

  def init(weights):
    def moments(path, param):
      row = _factored_row(path, param)
      if row is None:
        return masked, masked, jnp.zeros_like(param)
      mean = lambda over: jnp.zeros(
        [1 if i - param.ndim in over else n for i, n in enumerate(param.shape)],
        param.dtype,
      )
      return mean(row.output_axes), mean(row.input_axes), masked

    leaves, tree = jax.tree_util.tree_flatten_with_path(weights)
    parts = zip(*[moments(*leaf) for leaf in leaves], strict=True)
    return FactoredState(jnp.zeros([], jnp.int32), *map(tree.unflatten, parts))

  def update(updates, state, _=None):
    time = (state.count + 1).astype(jnp.float32)
    decay = jnp.minimum(b2, 1.0 - time**-0.8)
    mix = lambda old, new: decay * old + (1.0 - decay) * new

    def one(path, grad, v_row, v_col, v):
      square, row = jnp.square(grad) + eps, _factored_row(path, grad)
      if row is None:
        v = mix(v, square)
        return grad * jax.lax.rsqrt(v), masked, masked, v
      mean = lambda x, over: jnp.mean(x, axis=over, keepdims=True)
      v_row = mix(v_row, mean(square, row.output_axes))
      v_col = mix(v_col, mean(square, row.input_axes))
      scale = jax.lax.rsqrt(v_row / mean(v_row, row.input_axes))
      return grad * scale * jax.lax.rsqrt(v_col), v_row, v_col, masked

    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    moments = [tree.flatten_up_to(part) for part in state[1:]]
    parts = zip(
      *[one(*leaf, *v) for leaf, *v in zip(leaves, *moments, strict=True)],
      strict=True,
    )
    updates, *moments = map(tree.unflatten, parts)
    return updates, FactoredState(optax.safe_increment(state.count), *moments)

  return optax.GradientTransformation(init, update)


def _clip_rms(path, update):
  """Adafactor's: no layer's update of a parameter has an RMS above one."""
  row = params.row_of(params.path_of(path))
  axes = range(1 if row and row.stacked else 0, update.ndim)
  mean = jnp.mean(jnp.square(update), axis=axes, keepdims=True)
  return update / jnp.maximum(1.0, jnp.sqrt(mean))


def _map_with_path(function) -> optax.GradientTransformation:
  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(function, updates)
  )


def _factored_row(path: tuple, x: jax.Array) -> params.Row | None:
  """Of a matrix; None of any other, and of one too small to be factored."""
  row = params.row_of(params.path_of(path))
  if row is None or not row.outputs:
    return None
  sides = (row.input_axes, row.output_axes)
  return row if min(_size(x, axes) for axes in sides) >= _FACTOR_FROM else None


def _size(x: jax.Array, axes: tuple[int, ...]) -> int:
  return math.prod(x.shape[axis] for axis in axes)
