"""What a model costs: FLOPs, bytes, parameters, and what a funnel saves.

FLOPs are two for every multiply-add of a matrix product. Attention counts the
(query, key) pairs that the mask lets through and not T x T: it is what must be
computed, and what "ideal" means beside a measured latency. A learned pool
counts the product of its query with each slot, once; weighted sums of slots,
norms, gates and the averages of pools and recoveries are no matrix products.

Costs are of rows full of one text. Decoding is causal, and its costs are
averages over the tokens that make up a group: a layer that runs on one slot
in s tokens costs 1/s of a run.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import funnel as funnel_lib
from gemma_funnel import params
from gemma_funnel.config import (
  Funnel,
  FunnelConfig,
  TransformerConfig,
  check_recovers,
  check_reducers,
  resolve_funnel,
)
from gemma_funnel.reducers import NEEDS
from gemma_funnel.stream import Stream, make_stream

# A model that reducers are run for, to see which slots they leave.
_NARROW = TransformerConfig.preset("tiny", embed_dim=8)


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Parameter counts by kind; a tied head is the embedding, counted once."""

  embedding: int
  layers: int
  final_norm: int
  funnel: int = 0
  unembedding: int = 0

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))

  @property
  def head(self) -> int:
    return self.unembedding or self.embedding


def parameters(config: TransformerConfig, funnel: Funnel = None) -> Parameters:
  """Counts parameters; of a funnel those that its stages learn.

  Raises:
    ValueError: the funnel does not fit the model.
  """
  sizes = params.sizes_of(config)
  counts = dict.fromkeys((f.name for f in dataclasses.fields(Parameters)), 0)
  for row in params.rows_of(config, resolve_funnel(funnel, config.num_layers)):
    counts[row.path.partition("/")[0]] += row.size(sizes)
  return Parameters(**counts)


def _attention_weights(config: TransformerConfig) -> tuple[int, int]:
  """Weights of a layer that queries go through (q, o), and keys do (k, v)."""
  sizes = params.sizes_of(config)
  count = {"N": 0, "K": 0}
  for row in params.rows_of(config):
    if row.role == "attention" and row.outputs:
      heads = "K" if "K" in row.dims else "N"
      count[heads] += row.size(sizes) // config.num_layers
  return count["N"], count["K"]


@dataclasses.dataclass(frozen=True)
class _Slots:
  """One full row of a stream, as far as costs go.

  Attributes:
    stream: [1, T], of a narrow model.
    rate: its slots for each token, in the long run.
  """

  stream: Stream
  rate: float = 1.0

  def __len__(self) -> int:
    return self.stream.segment_BT.shape[1]

  def num_visible(
    self, keys: "_Slots", window: int | None, causal: bool
  ) -> np.ndarray:
    """How many of `keys` each slot sees (`masks.visible`); none if padding."""
    (position, end), (at, ends) = self._stands(), keys._stands()
    low, high = np.zeros(len(end), int), np.full(len(end), len(ends))
    if window is not None:
      low = np.searchsorted(at, position - window, "right")
      high = np.searchsorted(at, position + window, "left")
    if causal:
      high = np.minimum(high, np.searchsorted(ends, end, "right"))
    return np.maximum(high - low, 0)

  def _stands(self) -> tuple[np.ndarray, np.ndarray]:
    """(positions, ends) of the slots that are no padding."""
    real = np.asarray(self.stream.segment_BT[0]) != 0
    where = self.stream.position_BT[0], self.stream.last_token_position_BT[0]
    return tuple(np.asarray(x)[real] for x in where)


def _row(length: int, context_length: int) -> _Slots:
  """A row of tokens, with the span that a reducer may drop after the first."""
  slot_1T = np.arange(length)[None]
  hidden = np.random.default_rng(0).normal(size=(1, length, _NARROW.embed_dim))
  stream = make_stream(
    hidden.astype(np.float32),
    context_BT=(slot_1T > 0) & (slot_1T <= context_length),
    context_length=context_length,
  )
  return _Slots(stream)


@dataclasses.dataclass(frozen=True)
class _Part:
  """A layer, or what a stage learns, and the slots that it runs on.

  Attributes:
    queries, keys: one row's.
    query_weights, key_weights: of the matrices that each goes through; without
      key weights there are no keys.
    vectors: weights that are in no matrix.
    visible: how many keys each query sees; None where it is no layer.
    asked: pairs whose logits are made once more, for what a reducer needs.
  """

  queries: _Slots
  keys: _Slots
  query_weights: int = 0
  key_weights: int = 0
  vectors: int = 0
  visible: np.ndarray | None = None
  asked: int = 0


def _pair_flops(config: TransformerConfig, pairs: int) -> int:
  """Of the logit of each (query, key) pair, and of its weighted value."""
  return 4 * config.num_heads * config.head_dim * pairs


@functools.lru_cache(maxsize=512)
def _parts(
  config: TransformerConfig,
  stages: tuple[FunnelConfig, ...],
  length: int,
  causal: bool,
  context_length: int = 0,
) -> tuple[_Part, ...]:
  """All that runs between the embedding and the final norm, in order.

  Reducers themselves say which slots remain: they reduce a row of a narrow
  model's noise, with a value for each of what they need.
  """
  # Reducers run as they are, also where the caller is being traced.
  with jax.ensure_compile_time_eval():
    return tuple(_make_parts(config, stages, length, causal, context_length))


def _make_parts(config, stages, length, causal, context_length):
  D, parts = config.embed_dim, []
  query_weights, key_weights = _attention_weights(config)
  mlp_weights = 3 * D * config.mlp_dim
  matrices = query_weights + key_weights + mlp_weights
  vectors = parameters(config).layers // config.num_layers - matrices
  mlp_norms = (1 + config.post_norms) * D
  make = lambda config, stage: funnel_lib.Stage(config, stage, nnx.Rngs(0))
  made = [make(_NARROW, stage) for stage in stages]
  sized = [nnx.eval_shape(lambda s=s: make(config, s)) for s in stages]

  def run(step, slots, keys):
    keys = keys or slots
    for layer in range(step.start, step.stop):
      if step.keys == "none":
        none = np.zeros(len(slots), int)
        parts.append(_Part(slots, slots, mlp_weights, 0, mlp_norms, none))
        continue
      visible = slots.num_visible(keys, config.layers[layer].window, causal)
      parts.append(
        _Part(
          slots,
          keys,
          query_weights + mlp_weights,
          key_weights,
          vectors,
          visible,
          sum(int(visible[-NEEDS[need] :].sum()) for need in step.needs),
        )
      )
    return slots, {need: jnp.ones((1, len(keys))) for need in step.needs}

  def reduce(number, slots, aux):
    reducer = made[number].reducer
    if weights := sized[number].reducer.weights:
      parts.append(_Part(slots, slots, query_weights=weights))
    short, _ = reducer.reduce(slots.stream, aux, causal)
    return _Slots(short, slots.rate * reducer.rate), None

  def upsample(number, deep, short, before, _):
    recovery = sized[number].recovery
    if recovery.vectors or recovery.weights:
      learned = recovery.weights, 0, recovery.vectors
      parts.append(_Part(before, before, *learned))
    if recovery.attends:
      visible = before.num_visible(deep, None, causal)
      parts.append(
        _Part(before, deep, query_weights, key_weights, 2 * D, visible)
      )
    return before

  steps = funnel_lib.layer_plan(stages, config)
  row = _row(length, context_length)
  funnel_lib.run_trunk(steps, row, run, reduce, upsample)
  return parts


def forward(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  head: bool = True,
  causal: bool = True,
  context_length: int = 0,
) -> int:
  """FLOPs of one forward pass.

  Args:
    config: the model.
    funnel: one, or none.
    batch: rows B.
    length: tokens T in each.
    head: whether the vocabulary head runs, on all T positions.
    causal: whether attention is causal or bidirectional.
    context_length: tokens, after the first, of a span that a reducer may drop.

  Returns:
    FLOPs, 2 for a multiply-add.

  Raises:
    ValueError: the funnel does not fit the model, or does not recover what the
      head needs.
  """
  stages = _check(config, funnel, head)
  total = head * 2 * length * config.embed_dim * config.vocab_size
  for part in _parts(config, stages, length, causal, context_length):
    total += 2 * len(part.queries) * part.query_weights
    total += 2 * len(part.keys) * part.key_weights
    if part.visible is not None:
      total += _pair_flops(config, int(part.visible.sum()))
      total += _pair_flops(config, part.asked) // 2
  return batch * total


def train_step(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  causal: bool = True,
  matrices: bool = True,
) -> int:
  """FLOPs of a forward and backward pass: three times the forward's.

  Without gradients of matrices, as where they are frozen and a few factors
  beside them are trained, their products count twice.

  What is recomputed (remat) is not counted: it is work that a larger memory
  would not need, so that model FLOPs utilisation falls by it (PaLM, arXiv
  2204.02311, appendix B).

  Raises:
    ValueError: see `forward`.
  """
  total = forward(config, funnel, batch, length, causal=causal)
  if matrices:
    return 3 * total
  stages = resolve_funnel(funnel, config.num_layers)
  pairs = sum(
    _pair_flops(config, int(part.visible.sum()))
    for part in _parts(config, stages, length, causal)
    if part.visible is not None
  )
  return 2 * total + batch * pairs


def _check(config: TransformerConfig, funnel: Funnel, head: bool):
  """The stages of a funnel, which recover if there is a head."""
  stages = resolve_funnel(funnel, config.num_layers)
  if head:
    check_recovers(stages, "the vocabulary head")
  return stages


def forward_bytes(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  head: bool = True,
  causal: bool = True,
  context_length: int = 0,
) -> int:
  """Least bytes that a forward pass moves to and from memory.

  What runs reads its weights once in the compute dtype; the residual stream is read
  and written, and keys and values written and read, once a layer; logits are
  written in float32. It is the memory side of a roofline: a small batch cannot
  take less time than this, with or without a funnel.

  Raises:
    ValueError: see `forward`.
  """
  stages = _check(config, funnel, head)
  numbers, weights = length * config.embed_dim, 0  # embedding rows
  for part in _parts(config, stages, length, causal, context_length):
    weights += part.query_weights + part.key_weights + part.vectors
    if part.visible is not None:
      numbers += 2 * len(part.queries) * config.embed_dim
      if part.key_weights:
        numbers += 2 * len(part.keys) * _key_width(config)
      if part.keys is not part.queries:
        numbers += len(part.keys) * config.embed_dim
  numbers = batch * numbers + weights + head * parameters(config).head
  size = jnp.dtype(config.dtype).itemsize
  return size * numbers + head * 4 * batch * length * config.vocab_size


def _key_width(config: TransformerConfig) -> int:
  """Numbers that a slot's key and value are made of, in one layer."""
  return 2 * config.num_kv_heads * config.head_dim


def ideal_reduction(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  head: bool = True,
  causal: bool = True,
  context_length: int = 0,
) -> float:
  """The part of the plain forward's FLOPs that the funnel saves, below 1.

  What a funnel learns costs too: it may save less than nothing.

  Raises:
    ValueError: see `forward`.
  """
  plain = forward(config, None, batch, length, head, causal)
  funnelled = forward(
    config, funnel, batch, length, head, causal, context_length
  )
  return 1 - funnelled / plain


def _decoding_parts(
  config: TransformerConfig, funnel: Funnel, context: int, context_length: int
):
  """The parts of a decoder, by a cache of `context` tokens."""
  stages = resolve_funnel(funnel, config.num_layers)
  check_recovers(stages, "decoding")
  check_reducers(stages, "decodes", "decoding")
  if context < 1:
    raise ValueError(f"{context} tokens: expected at least 1")
  return _parts(config, stages, context, True, context_length)


def decode_flops(
  config: TransformerConfig,
  funnel: Funnel,
  context: int,
  head: bool = True,
  context_length: int = 0,
) -> float:
  """FLOPs of one row for one generated token, on average.

  Args:
    config: the model.
    funnel: one, or none.
    context: tokens that the cache holds, the new one's included.
    head: whether the vocabulary head runs.
    context_length: as for `forward`.

  Raises:
    ValueError: the funnel does not fit the model, or does not recover; no
      tokens.
  """
  total = 0.0
  for part in _decoding_parts(config, funnel, context, context_length):
    total += 2 * part.key_weights * part.keys.rate
    per_run = 2 * part.query_weights
    if part.visible is not None:
      per_run += _pair_flops(config, int(part.visible[-1]))
    total += per_run * part.queries.rate
  return total + 2 * head * config.embed_dim * config.vocab_size


def decode_bytes(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  context: int,
  head: bool = True,
  context_length: int = 0,
) -> float:
  """Least bytes that a step of decoding moves, on average.

  Rows are in one phase: a step that runs a stage runs it for all of them, and
  others do not read its weights. A step reads the weights that it runs and the
  visible entries of caches, writes one entry of each, and reads embedding rows,
  all in the compute dtype; logits are written in float32.

  Args:
    config: the model.
    funnel: one, or none.
    batch: rows B.
    context: tokens that the cache holds, the new one's included.
    head: whether the vocabulary head runs.
    context_length: as for `forward`.

  Raises:
    ValueError: see `decode_flops`.
  """
  numbers = batch * config.embed_dim  # embedding rows
  for part in _decoding_parts(config, funnel, context, context_length):
    often, key_often = part.queries.rate, part.keys.rate
    numbers += often * (part.query_weights + part.vectors)
    numbers += key_often * part.key_weights
    if part.key_weights:
      entries = often * int(part.visible[-1]) + key_often
      numbers += batch * entries * _key_width(config)
  numbers += head * parameters(config).head
  size = jnp.dtype(config.dtype).itemsize
  return float(size * numbers + head * 4 * batch * config.vocab_size)


def cache_bytes(
  config: TransformerConfig,
  funnel: Funnel,
  batch: int,
  length: int,
  context_length: int = 0,
) -> int:
  """The least that keys and values of `length` tokens take, compute dtype.

  A layer keeps an entry for each slot of its keys, but never more than a query
  sees; a recovery that attends keeps one for each group.

  Raises:
    ValueError: see `decode_flops`.
  """
  entries = sum(
    int(part.visible.max())
    for part in _decoding_parts(config, funnel, length, context_length)
    if part.visible is not None
  )
  size = jnp.dtype(config.dtype).itemsize
  return size * batch * entries * _key_width(config)
