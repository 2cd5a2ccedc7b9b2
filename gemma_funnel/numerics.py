"""Arithmetic that several parts of a model share."""

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, epsilon: float) -> jax.Array:
  """x / rms(x) over the last axis, float32."""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + epsilon)
