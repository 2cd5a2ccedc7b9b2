"""One step of training: gradients, perhaps of parts of the batch; an update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_funnel import params as params_lib
from gemma_funnel.training import optimizer as optimizer_lib
from gemma_funnel.training.init_state import TrainState
from gemma_funnel.training.spec import RunSpec


def make_train_step(
  spec: RunSpec, loss: Callable, state_shapes: TrainState
) -> Callable:
  """One pure step, jitted, compiled for each variant.

  Args:
    spec: of the run.
    loss: as of `RunTask.make_loss`. Its metrics hold "loss", and "weight" if
      the loss is a mean over something else than rows: how much.
    state_shapes: with shardings.

  Returns:
    (variant, state, frozen_params, batch, key) -> (state, metrics); the state
    is given away.
  """
  optimizer = spec.optimizer
  placed = jax.tree.map(lambda x: x.sharding, state_shapes)
  whole = jax.sharding.NamedSharding(spec.mesh, jax.sharding.PartitionSpec())

  def train_step(variant, state, frozen_params, batch, key):
    def gradients(batch, key):
      of_params = lambda p: loss(variant, p, frozen_params, batch, key)
      grads, metrics = jax.grad(of_params, has_aux=True)(state.params)
      # Each device then keeps its own part of a sum over devices.
      grads = jax.lax.with_sharding_constraint(grads, placed.params)
      return grads, dict(metrics)

    grads, metrics = _accumulated(gradients, batch, key, spec.loop.accumulate)
    metrics["grad_norm"] = optimizer_lib.grad_norm(optimizer, grads)
    updates, opt_state = optimizer.transform.update(
      grads, state.opt_state, state.params
    )
    # Gradients that nobody reads need not be made.
    used = optimizer_lib.trained(optimizer, grads)
    metrics |= _norms("grad_norm", used) | _norms("update_norm", updates)
    params = optimizer_lib.apply_updates(
      state.params, updates, key, optimizer.stochastic_rounding
    )
    new_state = TrainState(params, opt_state)
    if spec.loop.on_nonfinite == "skip":
      fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      choose = lambda new, old: jnp.where(fine, new, old)
      new_state = jax.tree.map(choose, new_state, state)
    return new_state, metrics

  return jax.jit(
    train_step,
    static_argnums=0,
    # Frozen parameters and the batch stay where they were put.
    in_shardings=(placed, None, None, whole),
    out_shardings=(placed, whole),
    donate_argnums=1,
  )


def _accumulated(gradients, batch, key: jax.Array, num_parts: int):
  """(gradients, metrics) of a batch, of which one part at a time is in memory.

  Means over parts are weighted by how much each is a mean of, so that they are
  those of the whole batch.
  """
  if num_parts == 1:
    grads, metrics = gradients(batch, key)
    metrics.pop("weight", None)
    return grads, metrics

  def split(x: jax.Array) -> jax.Array:
    # Part i has rows i, i + num_parts, ...: each device keeps its own.
    rows = x.reshape(len(x) // num_parts, num_parts, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)

  def weighted(index, batch):
    grads, metrics = gradients(batch, jax.random.fold_in(key, index))
    weight = metrics.pop("weight", jnp.float32(1))
    tokens = {k: metrics.pop(k) for k in ("tokens",) if k in metrics}
    in_float32 = lambda x: x.astype(jnp.float32) * weight
    return jax.tree.map(in_float32, (grads, metrics)), tokens, weight

  parts = jax.tree.map(split, batch)
  shapes = jax.eval_shape(weighted, 0, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda sums, part: (jax.tree.map(jnp.add, sums, weighted(*part)), None)
  sums, _ = jax.lax.scan(add, zeros, (jnp.arange(num_parts), parts))
  means, tokens, weight = sums
  grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), means)
  return grads, metrics | tokens


def _norms(name: str, tree: Any) -> dict[str, jax.Array]:
  """Norms of the parameters of each role, float32."""
  squares: dict[str, jax.Array] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    row = params_lib.row_of(params_lib.path_of(path))
    role = row.role if row else "other"
    square = jnp.sum(jnp.square(x.astype(jnp.float32)))
    squares[role] = squares.get(role, 0) + square
  return {f"{name}/{role}": jnp.sqrt(x) for role, x in squares.items()}
