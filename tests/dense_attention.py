"""Layers by dense softmax and without streams: an independent statement."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.layers import rope_angles


def _attention(config, spec, causal):
  """An `AttentionFn` that also keeps its weights, float32 [B, N, T, S]."""
  seen = []

  def attend(q_BTNH, k_BSKH, v_BSKH):
    group = config.num_heads // config.num_kv_heads
    k, v = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    logits = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k)
    if config.attn_softcap:
      logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
    order = np.arange(q_BTNH.shape[1])
    distance = order[:, None] - order[None]
    see = np.full(distance.shape, True)
    if causal:
      see &= distance >= 0
    if spec.window is not None:
      see &= np.abs(distance) < spec.window
    weights = jax.nn.softmax(jnp.where(see[None, None], logits, -1e30), axis=-1)
    seen.append(np.asarray(weights))
    return jnp.einsum("bnts,bsnh->btnh", weights, v), {}

  return attend, seen


def _run(model, tokens, order, start, keys, causal):
  """(states after the layers of `order`, the weights of each)."""
  config = model.config
  graphdef, params = nnx.split(model.layers)
  position_BT = jnp.broadcast_to(np.arange(tokens.shape[1])[None], tokens.shape)
  x, before, weights = model.embed(tokens), None, []
  for place, n in enumerate(order):
    block = nnx.merge(graphdef, jax.tree.map(lambda p: p[n], params))  # noqa: B023
    if place == start:
      before = x
    rope = rope_angles(position_BT, config, config.layers[n])
    attend, seen = _attention(config, config.layers[n], causal)
    late = place >= start
    if late and keys == "none":
      x, _ = block(x, rope, None)
    elif late and keys == "before":
      x, _ = block(x, rope, attend, before, rope)
    else:
      x, _ = block(x, rope, attend)
    weights.append(seen)
  return x, weights


def dense_forward(model, tokens, order, start, keys, causal):
  """Hidden states of the layers `order`; from place `start` on with `keys`."""
  x, _ = _run(model, tokens, order, start, keys, causal)
  return np.asarray(model.final_norm(x))


def dense_attention(model, tokens, layer, causal):
  """Attention weights of a layer of the plain model, [B, N, T, S]."""
  _, weights = _run(model, tokens, range(layer + 1), layer + 1, "own", causal)
  return weights[layer][0]
