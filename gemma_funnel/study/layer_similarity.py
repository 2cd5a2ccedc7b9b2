"""How far a funnel moves the hidden states, layer by layer."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.config import Funnel, resolve_funnel
from gemma_funnel.funnel import layer_plan, run_trunk
from gemma_funnel.layers import normalize
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import BYPASS
from gemma_funnel.stack import run_layers
from gemma_funnel.stream import make_stream, take


def by_depth(
  model: Transformer,
  funnel: Funnel,
  tokens_BT: jax.Array,
  segment_BT: jax.Array | None = None,
  *,
  causal: bool,
  funnelled: Transformer | None = None,
) -> list[dict[str, int | float | bool | str]]:
  """Compares the states without and with a funnel, after every layer.

  The state of a token within a stage is that of the short slot it reads back;
  one that bypasses a stage keeps the state it had before.

  Args:
    model: its parameters run without a funnel, whatever funnel it has.
    funnel: what the other run has.
    tokens_BT: int token ids.
    segment_BT: as for `Transformer.encode`; what is 0 is not compared.
    causal: whether a token sees only what came before it.
    funnelled: its parameters run with the funnel; None is `model`.

  Returns:
    A row for each layer's output (`at` "layer") and, after that of a stage's
    last layer, one for what the stage's recovery makes of it (`at` "recovery").
    `layer` counts from 0 and is the last layer that ran; `short` is whether the
    compared states were read from a short stream. `cosine` is the mean over
    tokens; `error` is the distance of RMS-normalised states over the length of
    the plain one, root-mean-square over tokens: 0 where they are the same,
    sqrt(2) where they are orthogonal.

  Raises:
    ValueError: arguments that `Transformer.encode` does not take; a funnel that
      does not fit; models of unlike shapes; no tokens; states that are not
      finite.
  """
  funnelled = model if funnelled is None else funnelled
  for name in ("vocab_size", "num_layers", "embed_dim"):
    ours, theirs = (getattr(m.config, name) for m in (model, funnelled))
    require(
      ours == theirs,
      f"by_depth: model.{name} is {ours} without the funnel and {theirs} "
      "with it: expected models of the same shape",
    )
  tokens_BT = np.asarray(tokens_BT)
  if segment_BT is None:
    segment_BT = np.ones(tokens_BT.shape, np.int32)
  segment_BT = np.asarray(segment_BT)
  plain = model.with_funnel(()) if model.stages else model
  if resolve_funnel(funnel, model.config.num_layers) != funnelled.stages:
    funnelled = funnelled.with_funnel(funnel)
  funnelled._check(tokens_BT, segment_BT, causal)
  require(
    bool(np.any(segment_BT)),
    "by_depth: segment_BT is 0 everywhere: expected tokens",
  )
  compared = _compare(
    *nnx.split(plain), *nnx.split(funnelled), causal, tokens_BT, segment_BT
  )
  rows = []
  for (_, layer, at, short), numbers in sorted(compared.items()):
    cosine, error = map(float, numbers)
    require(
      np.isfinite(cosine + error),
      f"by_depth: states after layer {layer} are not finite: expected "
      "parameters that can run",
    )
    row = dict(layer=layer, at=at, short=short, cosine=cosine, error=error)
    rows.append(row)
  return rows


def states(
  model: Transformer, tokens_BT: jax.Array, segment_BT: jax.Array, causal: bool
) -> dict[tuple[int, int, str, bool], jax.Array]:
  """What each token reads back after each layer and recovery: [B, T, D]s.

  In order, by (number, `layer`, `at`, `short`), the last three as `by_depth`
  gives them; the last is what the final norm sees, read back where it is short.
  """
  around, found = [], {}

  def report(stream, layer, at):
    hidden_BTD = stream.hidden_BTD
    for before, gather_index_BT in reversed(around):
      deep_BTD = take(hidden_BTD, jnp.maximum(gather_index_BT, 0))
      bypass_BT1 = (gather_index_BT == BYPASS)[..., None]
      hidden_BTD = jnp.where(bypass_BT1, before.hidden_BTD, deep_BTD)
    found[len(found), layer, at, bool(around)] = hidden_BTD
    return stream

  def run(step, stream, keys):
    aux = {}
    for layer in range(step.start, step.stop):
      needs = step.needs if layer == step.stop - 1 else ()
      layers = model.layers, model.config, layer, layer + 1
      options = dict(causal=causal, needs=needs, attends=step.keys != "none")
      stream, aux = run_layers(*layers, stream, keys, **options)
      report(stream, layer, "layer")
    return stream, aux

  def reduce(stage, stream, aux):
    short, gather_index_BT = model.funnel[stage].reducer.reduce(
      stream, aux, causal
    )
    around.append((stream, gather_index_BT))
    return short, gather_index_BT

  def upsample(stage, *args):
    around.pop()
    stream = model.funnel[stage].upsample(*args, causal)
    return report(stream, model.stages[stage].stop - 1, "recovery")

  stream = make_stream(model.embed(tokens_BT), segment_BT)
  plan = layer_plan(model.stages, model.config)
  run_trunk(plan, stream, run, reduce, upsample)
  return found


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def _compare(
  plain_def,
  plain_params,
  other_def,
  other_params,
  causal,
  tokens_BT,
  segment_BT,
):
  """(cosine, error) for each of the funnelled model's states.

  The cosine is 1 - |x - y|^2 / 2 of unit vectors, which is 1 exactly where
  they are equal.
  """
  unit = lambda z: normalize(z, 1e-30) * z.shape[-1] ** -0.5
  plain, other = (
    states(nnx.merge(graphdef, params), tokens_BT, segment_BT, causal)
    for graphdef, params in (
      (plain_def, plain_params),
      (other_def, other_params),
    )
  )
  of_layer, compared = list(plain.values()), {}
  for point, y_BTD in other.items():
    x_BTD, counts_BT = of_layer[point[1]], segment_BT != 0
    square_BT = jnp.sum(jnp.square(unit(x_BTD) - unit(y_BTD)), axis=-1)
    # Padding may hold anything.
    square_BT = jnp.where(counts_BT, square_BT, 0)
    square = jnp.sum(square_BT) / jnp.sum(counts_BT)
    compared[point] = 1 - square / 2, jnp.sqrt(square)
  return compared
