"""What a forward pass costs: FLOPs, bytes, parameters, and what a funnel saves.

FLOPs are two for every multiply-add of a matrix product. Attention counts the
(query, key) pairs that the mask lets through and not T x T: it is what must be
computed, and what "ideal" means beside a measured latency.
"""

import dataclasses

import jax.numpy as jnp

from gemma_funnel.config import FunnelConfig, GemmaConfig


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Parameter counts by kind; the head is the embedding, counted once."""

  embedding: int
  layers: int
  final_norm: int

  @property
  def total(self) -> int:
    return self.embedding + self.layers + self.final_norm


def _matmul_parameters(config: GemmaConfig) -> int:
  """Weights of one layer's matrices."""
  attention = (
    config.embed_dim
    * config.head_dim
    * (2 * config.num_heads + 2 * config.num_kv_heads)
  )
  return attention + 3 * config.embed_dim * config.mlp_dim


def parameters(config: GemmaConfig) -> Parameters:
  """Counts parameters; no funnel built from means adds any."""
  norms = (4 if config.post_norms else 2) * config.embed_dim
  return Parameters(
    embedding=config.vocab_size * config.embed_dim,
    layers=config.num_layers * (_matmul_parameters(config) + norms),
    final_norm=config.embed_dim,
  )


def attention_pairs(length: int, reach: int | None, causal: bool) -> int:
  """(query, key) pairs that a mask lets through.

  Args:
    length: slots.
    reach: how many slots away the farthest visible key is; None is any.
    causal: whether the slots after a query are hidden.
  """
  reach = length - 1 if reach is None else min(reach, length - 1)
  # Query i sees min(i, reach) slots before it, and itself.
  before = reach * (reach + 1) // 2 + (length - 1 - reach) * reach
  return length + before * (1 if causal else 2)


def _stage_of(
  config: GemmaConfig, funnel: FunnelConfig | None, length: int
) -> list[tuple[int, int]]:
  """(slots, spacing) of the stream that each layer sees."""
  plain = (length, 1)
  if funnel is None:
    return [plain] * config.num_layers
  funnel = funnel.resolve(config.num_layers)
  short = (-(-length // funnel.stride), funnel.stride)
  return [
    short if funnel.start <= layer < funnel.stop else plain
    for layer in range(config.num_layers)
  ]


def forward(
  config: GemmaConfig,
  funnel: FunnelConfig | None,
  batch: int,
  length: int,
  head: bool = True,
  causal: bool = True,
) -> int:
  """FLOPs of one forward pass.

  Args:
    config: the model.
    funnel: the funnel, or None.
    batch: rows B.
    length: tokens T in each.
    head: whether the vocabulary head runs, on all T positions.
    causal: whether attention is causal or bidirectional.

  Returns:
    FLOPs, 2 for a multiply-add.

  Raises:
    ValueError: the funnel does not fit the model.
  """
  total = 0
  per_pair = 4 * config.num_heads * config.head_dim
  for layer, (slots, spacing) in enumerate(_stage_of(config, funnel, length)):
    window = config.window_of(layer)
    reach = None if window is None else (window - 1) // spacing
    total += 2 * slots * _matmul_parameters(config)
    total += per_pair * attention_pairs(slots, reach, causal)
  if head:
    total += 2 * length * config.embed_dim * config.vocab_size
  return batch * total


def forward_bytes(
  config: GemmaConfig,
  funnel: FunnelConfig | None,
  batch: int,
  length: int,
  head: bool = True,
) -> int:
  """Least bytes that a forward pass moves to and from memory.

  Every matrix is read once in the compute dtype; the residual stream is read
  and written, and keys and values written and read, once a layer; logits are
  written in float32. It is the memory side of a roofline: a small batch cannot
  take less time than this, with or without a funnel.

  Raises:
    ValueError: the funnel does not fit the model.
  """
  size = jnp.dtype(config.dtype).itemsize
  weights = parameters(config).layers
  slots = sum(slots for slots, _ in _stage_of(config, funnel, length))
  kv_width = 2 * config.num_kv_heads * config.head_dim
  total = size * (weights + batch * slots * 2 * (config.embed_dim + kv_width))
  total += size * batch * length * config.embed_dim  # embedding rows
  if head:
    total += size * parameters(config).embedding
    total += 4 * batch * length * config.vocab_size
  return total


def ideal_reduction(
  config: GemmaConfig,
  funnel: FunnelConfig | None,
  batch: int,
  length: int,
  head: bool = True,
  causal: bool = True,
) -> float:
  """The part of the plain forward's FLOPs that the funnel saves, in [0, 1).

  Raises:
    ValueError: the funnel does not fit the model.
  """
  plain = forward(config, None, batch, length, head, causal)
  return 1 - forward(config, funnel, batch, length, head, causal) / plain
