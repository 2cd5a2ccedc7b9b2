"""Generation: prompts to their continuations, on the device.

One program runs prompts of a length bucket, one takes steps: a loop that comes
back to the host once in a chunk of tokens. It gives what the one-pass forward
would give, under every causal funnel.

Rows of a batch are brought to one phase of the funnel: where prompts differ,
the prefill stops up to k-1 tokens early, and the first steps feed what is left.
"""

from collections.abc import Iterator, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel import config as config_lib
from gemma_funnel.checks import require_int
from gemma_funnel.decode import caches as caches_lib
from gemma_funnel.decode import sampling as sampling_lib
from gemma_funnel.decode.caches import Cache, StageState, pytree
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.model import Transformer
from gemma_funnel.parallel.sharding import cache_sharding
from gemma_funnel.registry import REDUCERS
from gemma_funnel.stream import Stream, make_stream, round_span

# Prompts are padded to one of this many lengths between powers of two.
_BUCKETS_PER_OCTAVE = 4
_SMALLEST_BUCKET = 16
_PAD = 0
# Put out where logits are not finite.
_NOT_FINITE = -1


@pytree
class State:
  """A batch of rows in the midst of generation; all of it on the device.

  Attributes:
    caches: one for each run of layers.
    stages: one for each stage.
    rank_B: int32, tokens that each row has run.
    phase: int32 scalar, the last token's rank modulo the total stride.
    token_B: int32, what runs next.
    rest_BK: int32, the end of the prompt, which steps feed.
    rest_B: int32, how many of them there are.
    step: int32 scalar, steps since the prefill.
    out_BX: int32, what was generated.
    count_B: int32, how many tokens that is.
    limit: int32 scalar, how many it may be.
    stop_Z: int32, token ids that end a row.
    done_B: bool.
    key_B: a PRNG key a row.
    seen_BV: bool, tokens that the row has had; None where nothing asks.
  """

  caches: list[Cache]
  stages: list[StageState]
  rank_B: jax.Array
  phase: jax.Array
  token_B: jax.Array
  rest_BK: jax.Array
  rest_B: jax.Array
  step: jax.Array
  out_BX: jax.Array
  count_B: jax.Array
  limit: jax.Array
  stop_Z: jax.Array
  done_B: jax.Array
  key_B: jax.Array
  seen_BV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Generation:
  """What was generated.

  Attributes:
    prompt: which of the prompts it goes on from.
    sample: which of that prompt's samples it is.
    tokens: ids, without the stop id that ended it.
    stopped: whether a stop id did, and not the limit.
  """

  prompt: int
  sample: int
  tokens: list[int]
  stopped: bool


def unstacked(model: Transformer) -> Transformer:
  """The model with a list of layers, and matrices in the compute dtype.

  Reading a matrix out of a stack copies it first, which a long prompt does not
  notice; a single token would take three times as long.
  """
  if isinstance(model.layers, nnx.List):
    return model
  dtype = jnp.dtype(model.config.dtype)
  # Vectors (norm scales) are used in the dtype that they are stored in.
  cast = lambda x: x.astype(dtype) if x.ndim > 1 else x
  block, stacked_L = nnx.split(model.layers)

  @jax.jit
  def layer(stacked_L, i):
    return jax.tree.map(lambda p: cast(p[i]), stacked_L)

  layers = [layer(stacked_L, i) for i in range(model.config.num_layers)]
  model = nnx.merge(*nnx.split(model))
  model.layers = nnx.List([nnx.merge(block, params) for params in layers])
  nnx.update(model, jax.tree.map(cast, nnx.state(model)))
  return model


def _bucket(length: int) -> int:
  """The least length of a bucket that holds `length`."""
  if length <= _SMALLEST_BUCKET:
    return _SMALLEST_BUCKET
  step = 2 ** (length - 1).bit_length() // 2 // _BUCKETS_PER_OCTAVE
  return -(-length // step) * step


def _shortest(bucket: int) -> int:
  """The least length whose bucket this is."""
  if bucket <= _SMALLEST_BUCKET:
    return 1
  step = 2 ** (bucket - 1).bit_length() // 2 // _BUCKETS_PER_OCTAVE
  return bucket - step + 1


def _common_phase(lengths: Sequence[int], stride: int) -> tuple[int, list[int]]:
  """(phase, how much of each prompt to prefill), for the fewest steps after."""

  def beginnings(phase):
    return [n - (n - 1 - phase) % stride for n in lengths]

  usable = [p for p in range(stride) if min(beginnings(p)) >= 1]
  waits = lambda p: max(
    n - m for n, m in zip(lengths, beginnings(p), strict=True)
  )
  phase = min(usable, key=waits)
  return phase, beginnings(phase)


class Decoder:
  """Generates with one model: a compiled prefill per length, a compiled step.

  It holds its own copy of the layers, unstacked; the model may be dropped.
  """

  def __init__(self, model: Transformer, cache_length: int):
    """Prepares a model.

    Args:
      model: with the funnel to decode with. If it comes from `unstacked`, its
        parameters are shared.
      cache_length: tokens of a prompt and its continuation at most.

    Raises:
      ValueError: a length that is out of range, or a funnel that does not
        recover.
    """
    config = model.config
    config_lib.check_recovers(model.stages, "decoding")
    config_lib.check_reducers(model.stages, "decodes", "decoding")
    _check_nesting(model.stages)
    if not 1 < cache_length <= config.max_length:
      raise ValueError(
        f"cache_length={cache_length}: expected 2 to model.max_length="
        f"{config.max_length}"
      )
    self.config, self.stages = config, model.stages
    self.cache_length = cache_length
    self.stride = config_lib.total_stride(model.stages)
    sharding = model.embedding[...].sharding
    one_device = sharding.num_devices == 1
    self._mesh = None if one_device else sharding.mesh
    self._graphdef, self._params = nnx.split(unstacked(model))
    self._prefill = jax.jit(self._make_prefill, static_argnums=(0, 1, 2))
    self._score = jax.jit(self._make_score)
    self._advance = jax.jit(
      self._make_advance, static_argnums=0, donate_argnums=2
    )

  def _run_prompts(self, model, context_length, inputs):
    """(stream after the layers, caches, stages) of left-padded prompts."""
    segment_BT = inputs["segment_BT"]
    stream = make_stream(
      model.embed(inputs["tokens_BT"]),
      segment_BT,
      context_BT=inputs["context_BT"],
      context_length=context_length,
    )
    # The longest row fills its bucket; all take as many steps.
    shortest = _shortest(segment_BT.shape[1])
    return caches_lib.prefill(
      model,
      stream,
      inputs["phase"],
      self.cache_length,
      self.cache_length - shortest,
    )

  def _make_prefill(
    self, sampling, samples, context_length, params, inputs
  ) -> State:
    model = nnx.merge(self._graphdef, params)
    stream, caches, stages = self._run_prompts(model, context_length, inputs)
    # One prefill serves all samples of a prompt.
    fork = lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x
    caches, stages, logits_BV, rank_B, rest_BK, rest_B, row_B, seen_BV = (
      jax.tree.map(
        fork,
        (
          caches,
          stages,
          _last_logits(model, stream),
          jnp.sum(inputs["segment_BT"], axis=1, dtype=jnp.int32),
          inputs["rest_BK"],
          inputs["rest_B"],
          inputs["row_B"],
          inputs["seen_BV"],
        ),
      )
    )
    rows = len(rank_B)
    sample_B = jnp.arange(rows, dtype=jnp.int32) % samples
    key = jax.random.key(inputs["seed"], impl="threefry2x32")
    fold = jax.vmap(jax.random.fold_in)
    state = State(
      caches=caches,
      stages=stages,
      rank_B=rank_B,
      phase=inputs["phase"],
      token_B=jnp.zeros(rows, jnp.int32),
      rest_BK=rest_BK,
      rest_B=rest_B,
      step=jnp.int32(0),
      out_BX=jnp.full((rows, self.cache_length), _PAD, jnp.int32),
      count_B=jnp.zeros(rows, jnp.int32),
      limit=inputs["limit"],
      stop_Z=inputs["stop_Z"],
      done_B=jnp.zeros(rows, bool),
      key_B=fold(jax.vmap(jax.random.fold_in, (None, 0))(key, row_B), sample_B),
      seen_BV=seen_BV,
    )
    return _take_token(self._placed(state), logits_BV, sampling)

  def _placed(self, state: State) -> State:
    """The state with its caches sharded as the model is."""
    if self._mesh is None:
      return state
    sharding = cache_sharding(
      self._mesh, len(state.done_B), self.config.num_kv_heads
    )

    def place(x):
      if x.ndim != 4:
        return x
      return jax.lax.with_sharding_constraint(x, sharding)

    caches, stages = jax.tree.map(place, (state.caches, state.stages))
    return dataclasses.replace(state, caches=caches, stages=stages)

  def _make_advance(self, sampling, params, state: State, until) -> State:
    model = nnx.merge(self._graphdef, params)

    def unfinished(state):
      return (state.step < until) & ~jnp.all(state.done_B)

    def one(state):
      phase = (state.phase + 1) % self.stride
      stream, caches, stages = _step(
        model, state.token_B, state.rank_B, state.caches, state.stages
      )
      state = dataclasses.replace(
        state,
        caches=caches,
        stages=stages,
        rank_B=state.rank_B + 1,
        phase=phase,
        step=state.step + 1,
      )
      logits_BV = _last_logits(model, stream)
      return _take_token(state, logits_BV, sampling)

    return jax.lax.while_loop(unfinished, one, state)

  def prefill(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = sampling_lib.GREEDY,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    num_samples: int = 1,
    first_row: int = 0,
    context_lengths: Sequence[int] | None = None,
  ) -> State:
    """Runs prompts, as far as they have a common phase; see `generate`."""
    inputs = self._inputs(prompts, max_new_tokens, stop_ids, sampling)
    context_length = self._mark_context(inputs, prompts, context_lengths)
    require_int("num_samples", num_samples, 1)
    require_int("seed", seed, 0, 2**32 - 1)
    require_int("first_row", first_row, 0, 2**31 - 1 - len(prompts))
    row_B = np.arange(first_row, first_row + len(prompts), dtype=np.int32)
    inputs |= {"seed": np.uint32(seed), "row_B": row_B}
    return self._prefill(
      sampling, num_samples, context_length, self._params, inputs
    )

  def advance(
    self, state: State, until: int, sampling: Sampling = sampling_lib.GREEDY
  ) -> State:
    """Takes steps until `until` of them, or until all rows are done.

    The memory of `state` is used for the result.
    """
    return self._advance(sampling, self._params, state, until)

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = sampling_lib.GREEDY,
    chunk: int = 8,
    **options,
  ) -> Iterator[list[Generation]]:
    """Generates; yields what there is so far, every `chunk` tokens.

    Args and errors are those of `generate`; they are checked at once.
    """
    require_int("chunk", chunk, 1)
    state = self.prefill(
      prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options
    )
    samples = options.get("num_samples", 1)

    def chunks(state):
      until = 0
      while True:
        done, results = _results(state, samples)
        yield results
        if done:
          return
        until += chunk
        state = self.advance(state, until, sampling)

    return chunks(state)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = sampling_lib.GREEDY,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    num_samples: int = 1,
    first_row: int = 0,
    context_lengths: Sequence[int] | None = None,
  ) -> list[Generation]:
    """Goes on from prompts.

    A row's tokens depend on its prompt, the seed, its number among the prompts
    and its number among the samples; not on what else is in the batch, but for
    rounding.

    Args:
      prompts: token ids of each, BOS included; lengths may differ.
      max_new_tokens: tokens of a continuation at most, a stop id included.
      sampling: how tokens are drawn; greedily if nothing is said.
      stop_ids: ids that end a continuation.
      seed: of what is drawn, >= 0.
      num_samples: continuations of each prompt.
      first_row: the first prompt's number, where these are not the first ones.
      context_lengths: tokens after BOS, of each prompt, that a reducer may
        drop, such as demonstrations (`Stream.context_BT`).

    Returns:
      Prompt by prompt, the samples of each.

    Raises:
      ValueError: no prompts, an empty one, an id outside the vocabulary, a
        prompt longer than the cache has room for, or a number out of range.
    """
    *_, last = self.stream(
      prompts,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      stop_ids=stop_ids,
      seed=seed,
      num_samples=num_samples,
      first_row=first_row,
      context_lengths=context_lengths,
      chunk=self.cache_length,
    )
    return last

  def log_likelihoods(
    self,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
  ) -> np.ndarray:
    """Log-probabilities of given tokens, each after those before it.

    The prompts run as they do for `generate`, and the tokens one by one: what a
    reduction of the prompt costs what comes after it.

    Args:
      prompts: token ids of each, BOS included, all of one length.
      continuations: N token ids of each.

    Returns:
      float32 [B, N], in nats.

    Raises:
      ValueError: lengths that differ; see `generate`.
    """
    for name, rows in (("prompts", prompts), ("continuations", continuations)):
      lengths = sorted({len(row) for row in rows})
      if len(lengths) != 1 or len(rows) != len(prompts):
        raise ValueError(
          f"{name} have the lengths {lengths}, {len(rows)} of them: expected "
          "one length, and as many continuations as prompts"
        )
    next_BN = np.asarray(continuations, np.int32)
    self._require_ids("continuations", next_BN.reshape(-1))
    inputs = self._inputs(prompts, next_BN.shape[1], (), sampling_lib.GREEDY)
    inputs["context_BT"] = None
    return np.asarray(self._score(self._params, inputs, next_BN))

  def _make_score(self, params, inputs, next_BN) -> jax.Array:
    model = nnx.merge(self._graphdef, params)
    stream, *state = self._run_prompts(model, 0, inputs)
    rank_B = jnp.sum(inputs["segment_BT"], axis=1, dtype=jnp.int32)

    def one(carry, token_B):
      rank_B, *state = carry
      stream, *state = _step(model, token_B, rank_B, *state)
      return (rank_B + 1, *state), stream.hidden_BTD

    carry = rank_B, *state
    _, after_NB1D = jax.lax.scan(one, carry, next_BN[:, :-1].T)
    hidden_NB1D = jnp.concatenate([stream.hidden_BTD[None, :, -1:], after_NB1D])

    def score(inputs):
      hidden_B1D, token_B = inputs
      log_p_BV = jax.nn.log_softmax(
        model.logits(model.final_norm(hidden_B1D))[:, 0]
      )
      return jnp.take_along_axis(log_p_BV, token_B[:, None], axis=1)[:, 0]

    scores_NB = jax.lax.map(score, (hidden_NB1D, next_BN.T), batch_size=16)
    return scores_NB.T

  def _inputs(self, prompts, max_new_tokens, stop_ids, sampling):
    """Checked arguments of the prefill."""
    require_int("max_new_tokens", max_new_tokens, 1)
    if len(prompts) == 0:
      raise ValueError("there are no prompts: expected one at least")
    prompts = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
    room = self.cache_length - max_new_tokens
    for number, prompt in enumerate(prompts):
      if not prompt.size:
        raise ValueError(
          f"prompt {number} is empty: expected one token at least, BOS"
        )
      if prompt.size > room:
        raise ValueError(
          f"prompt {number} has {prompt.size} tokens; cache_length="
          f"{self.cache_length} has room for {max(room, 0)} beside "
          f"max_new_tokens={max_new_tokens}"
        )
      self._require_ids(f"prompt {number}", prompt)
    stop_Z = np.asarray(stop_ids, np.int64).reshape(-1)
    self._require_ids("stop_ids", stop_Z)
    phase, beginnings = _common_phase([p.size for p in prompts], self.stride)
    return _arrays(prompts, beginnings, self.stride) | {
      "phase": np.int32(phase),
      "limit": np.int32(max_new_tokens),
      "stop_Z": stop_Z.astype(np.int32),
      "seen_BV": self._seen(prompts) if sampling.needs_seen else None,
    }

  def _mark_context(self, inputs, prompts, lengths) -> int:
    """Adds `context_BT` to the inputs; how many of it each row has at least."""
    inputs["context_BT"] = None
    if lengths is None:
      return 0
    if len(lengths) != len(prompts):
      raise ValueError(
        f"context_lengths has {len(lengths)} values: expected one for each of "
        f"the {len(prompts)} prompts"
      )
    segment_BT = inputs["segment_BT"]
    rank_BT = np.cumsum(segment_BT, axis=1) - 1
    for number, (length, run) in enumerate(
      zip(lengths, segment_BT.sum(axis=1).tolist(), strict=True)
    ):
      # BOS and the last token are of no span.
      require_int(f"context_lengths[{number}]", length, 0, max(run - 2, 0))
    lengths_B1 = np.asarray(lengths)[:, None]
    inputs["context_BT"] = (rank_BT >= 1) & (rank_BT <= lengths_B1)
    return round_span(min(lengths), segment_BT.shape[1])

  def _require_ids(self, what: str, ids: np.ndarray) -> None:
    bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
    if bad.size:
      raise ValueError(
        f"{what} has the token id {bad[0]}: expected 0 to "
        f"{self.config.vocab_size - 1}"
      )

  def _seen(self, prompts) -> np.ndarray:
    seen_BV = np.zeros((len(prompts), self.config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
      seen_BV[row, prompt] = True
    return seen_BV


def _check_nesting(stages) -> None:
  """Refuses stages within one that is due for some rows and not for others."""
  for outer in stages:
    inner = [s for s in stages if outer.start < s.start < outer.stop]
    if REDUCERS[outer.reduce].by_row and inner:
      raise ValueError(
        f"decoding: funnel.reduce={outer.reduce!r} at layer {outer.start} "
        f"holds the stage at layer {inner[0].start}: expected none within it"
      )


def _arrays(prompts, beginnings, stride) -> dict[str, np.ndarray]:
  """Left-padded beginnings of prompts, and what is left of each."""
  shape = len(prompts), _bucket(max(beginnings))
  tokens_BT = np.full(shape, _PAD, np.int32)
  segment_BT = np.zeros(shape, np.int32)
  rest_BK = np.full((len(prompts), max(1, stride - 1)), _PAD, np.int32)
  for row, (prompt, n) in enumerate(zip(prompts, beginnings, strict=True)):
    tokens_BT[row, -n:] = prompt[:n]
    segment_BT[row, -n:] = 1
    rest_BK[row, : prompt.size - n] = prompt[n:]
  rest_B = [p.size - n for p, n in zip(prompts, beginnings, strict=True)]
  return {
    "tokens_BT": tokens_BT,
    "segment_BT": segment_BT,
    "rest_BK": rest_BK,
    "rest_B": np.asarray(rest_B, np.int32),
  }


def _step(model: Transformer, token_B, rank_B, caches, stages):
  """`caches.step` for one more token of each row."""
  token_B1 = token_B[:, None]
  stream = make_stream(
    model.embed(token_B1), jnp.ones_like(token_B1), rank_B[:, None]
  )
  return caches_lib.step(model, stream, caches, stages)


def _last_logits(model: Transformer, stream: Stream) -> jax.Array:
  """Logits [B, V] of the last slot."""
  last_B1D = model.final_norm(stream.hidden_BTD[:, -1:])
  return model.logits(last_B1D)[:, 0]


def _take_token(state: State, logits_BV: jax.Array, sampling) -> State:
  """What runs next: the rest of the prompt, or a token drawn and put out."""
  keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.count_B)
  drawn_B = sampling_lib.draw(logits_BV, keys_B, state.seen_BV, sampling)
  # What comes of no number is no token: it ends the row, and is told of.
  finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
  drawn_B = jnp.where(finite_B, drawn_B, _NOT_FINITE)
  at = jnp.minimum(state.step, state.rest_BK.shape[1] - 1)
  feeds_B = state.rest_B > state.step
  puts_B = ~feeds_B & ~state.done_B
  row_B = jnp.arange(len(drawn_B))
  # A row that puts nothing out writes past the end.
  to_B = jnp.where(puts_B, state.count_B, state.out_BX.shape[1])
  count_B = state.count_B + puts_B
  stops_B = jnp.any(drawn_B[:, None] == state.stop_Z[None], axis=1)
  token_B = jnp.where(feeds_B, state.rest_BK[:, at], drawn_B)
  seen_BV = state.seen_BV
  if seen_BV is not None:
    seen_BV = seen_BV.at[row_B, token_B].set(True)
  return dataclasses.replace(
    state,
    token_B=token_B,
    count_B=count_B,
    seen_BV=seen_BV,
    out_BX=state.out_BX.at[row_B, to_B].set(drawn_B, mode="drop"),
    done_B=state.done_B
    | (puts_B & (stops_B | ~finite_B | (count_B >= state.limit))),
  )


def _results(state: State, samples: int) -> tuple[bool, list[Generation]]:
  """(whether all rows are done, what they have); waits for the device.

  Raises:
    FloatingPointError: logits that are not finite.
  """
  out_BX, count_B, done_B, stop_Z = jax.device_get(
    (state.out_BX, state.count_B, state.done_B, state.stop_Z)
  )
  results = []
  for row, count in enumerate(count_B):
    tokens = out_BX[row, :count].tolist()
    if tokens[-1:] == [_NOT_FINITE]:
      raise FloatingPointError(
        f"prompt {row // samples}: the logits of token {count} are not finite: "
        "values are beyond the range of the dtype, or the weights are damaged; "
        "expected float32 or bfloat16"
      )
    stopped = bool(tokens) and tokens[-1] in stop_Z
    results.append(
      Generation(
        row // samples,
        row % samples,
        tokens[: -1 if stopped else None],
        stopped,
      )
    )
  return bool(np.all(done_B)), results


def cache_bytes(state: State) -> int:
  """Bytes of keys and values that a state holds, for all of its rows."""
  leaves = jax.tree.leaves(
    [
      *(cache.keys_values for cache in state.caches),
      *(stage.deep.keys_values for stage in state.stages if stage.deep),
    ]
  )
  return sum(leaf.nbytes for leaf in leaves)
