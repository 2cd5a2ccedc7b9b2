"""One step of training: gradients, perhaps of parts of the batch; an update."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gemma_funnel import params
from gemma_funnel.training import optimizer as optimizer_lib


def make_train_step(
  loss,
  optimizer: optax.GradientTransformation,
  abstract,
  mesh: jax.sharding.Mesh,
  config: ml_collections.ConfigDict,
):
  """One pure step, jitted, compiled for each member.

  Args:
    loss: of a `loop.Job`. Among its metrics are "loss", and "weight" if the
      loss is a mean over something else than rows: how much it is a mean of.
    optimizer: of all weights.
    abstract: (weights, optimizer state), with shardings.
    mesh: what they are on.
    config: `accumulate`, `on_nonfinite` and `optimizer` of the run.

  Returns:
    (member, weights, opt_state, frozen, batch, key) -> (weights, opt_state,
    metrics); weights and state are given away.
  """
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def train_step(member, weights, opt_state, frozen, batch, key):
    def gradients(batch, key):
      of_weights = lambda w: loss(member, w, frozen, batch, key)
      grads, metrics = jax.grad(of_weights, has_aux=True)(weights)
      # Each device then keeps its own part of a sum over devices.
      grads = jax.lax.with_sharding_constraint(grads, placed[0])
      return grads, dict(metrics)

    grads, metrics = _accumulated(gradients, batch, key, config.accumulate)
    metrics["grad_norm"] = optimizer_lib.grad_norm(config.optimizer, grads)
    updates, new_state = optimizer.update(grads, opt_state, weights)
    # Gradients that nobody reads need not be made.
    used = optimizer_lib.trained(config.optimizer, grads)
    metrics |= _norms("grad_norm", used) | _norms("update_norm", updates)
    new_weights = optimizer_lib.apply_updates(
      weights, updates, key, config.optimizer.stochastic_rounding
    )
    if config.on_nonfinite == "skip":
      fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      new_weights, new_state = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old),
        (new_weights, new_state),
        (weights, opt_state),
      )
    return new_weights, new_state, metrics

  return jax.jit(
    train_step,
    static_argnums=0,
    # What is frozen, and the batch, stay where they were put.
    in_shardings=(*placed, None, None, whole),
    out_shardings=(*placed, whole),
    donate_argnums=(1, 2),
  )


def _accumulated(gradients, batch, key: jax.Array, parts: int):
  """(gradients, metrics) of a batch, of which one part at a time is in memory.

  Means over parts are weighted by how much each is a mean of, so that they are
  those of the whole batch.
  """
  if parts == 1:
    grads, metrics = gradients(batch, key)
    metrics.pop("weight", None)
    return grads, metrics

  def cut(x: jax.Array) -> jax.Array:
    # Every parts-th row, so that each device keeps its own.
    rows = x.reshape(len(x) // parts, parts, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)

  def piece(index, batch):
    part_key = jax.random.fold_in(key, index)
    grads, metrics = gradients(batch, part_key)
    weight = metrics.pop("weight", jnp.float32(1))
    tokens = {k: metrics.pop(k) for k in ("tokens",) if k in metrics}
    in_float32 = lambda x: x.astype(jnp.float32) * weight
    means = jax.tree.map(in_float32, (grads, metrics))
    return means, tokens, weight

  cuts = jax.tree.map(cut, batch)
  shapes = jax.eval_shape(piece, 0, jax.tree.map(lambda x: x[0], cuts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda sums, inputs: (jax.tree.map(jnp.add, sums, piece(*inputs)), None)
  sums, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), cuts))
  means, tokens, weight = sums
  grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), means)
  return grads, metrics | tokens


def _norms(name: str, tree: Any) -> dict[str, jax.Array]:
  """Norms of the parameters of each role, float32."""
  squares: dict[str, jax.Array] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    row = params.row_of(params.path_of(path))
    role = row.role if row else "other"
    square = jnp.sum(jnp.square(x.astype(jnp.float32)))
    squares[role] = squares.get(role, 0) + square
  return {f"{name}/{role}": jnp.sqrt(x) for role, x in squares.items()}
