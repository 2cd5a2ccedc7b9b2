"""How far a funnel moves the hidden states, layer by layer."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.checks import require
from gemma_funnel.config import Funnel, resolve_funnel
from gemma_funnel.funnel import (
  LayerRun,
  Reduce,
  Upsample,
  layer_plan,
  run_trunk,
)
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
    ValueError: as `Transformer.encode`; a funnel that does
      not fit; models of unlike shapes; no tokens; states that are not finite.
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
  plain, other = _under(model, ()), _under(funnelled, funnel)
  other._check(tokens_BT, segment_BT, causal)
  require(
    bool(np.any(segment_BT)),
    "by_depth: segment_BT is 0 everywhere: expected tokens",
  )
  compared = _compare(
    *nnx.split(plain), *nnx.split(other), causal, tokens_BT, segment_BT
  )
  rows = []
  for (layer, at, short), numbers in zip(_points(other), compared, strict=True):
    cosine, error = map(float, numbers)
    require(
      np.isfinite(cosine + error),
      f"by_depth: states after layer {layer} are not finite: expected "
      "parameters that can run",
    )
    row = dict(layer=layer, at=at, short=short, cosine=cosine, error=error)
    rows.append(row)
  return rows


def _under(model: Transformer, funnel: Funnel) -> Transformer:
  """The model under the funnel; itself where it has that one already."""
  same = resolve_funnel(funnel, model.config.num_layers) == model.stages
  return model if same else model.with_funnel(funnel)


def _single_layers(model: Transformer) -> list:
  """The model's plan with a run for each layer."""
  steps = []
  for step in layer_plan(model.stages, model.config.num_layers):
    if not isinstance(step, LayerRun):
      steps.append(step)
      continue
    for layer in range(step.start, step.stop):
      needs = step.needs if layer == step.stop - 1 else ()
      one = dict(start=layer, stop=layer + 1, needs=needs)
      steps.append(dataclasses.replace(step, **one))
  return steps


def _points(model: Transformer) -> list[tuple[int, str, bool]]:
  """(last layer that ran, what has just ended, whether a stage is open) of
  each of `states`."""
  points, depth = [], 0
  for step in _single_layers(model):
    match step:
      case LayerRun():
        points.append((step.start, "layer", depth > 0))
      case Reduce():
        depth += 1
      case Upsample(stage):
        depth -= 1
        points.append((model.stages[stage].stop - 1, "recovery", depth > 0))
  return points


def states(
  model: Transformer, tokens_BT: jax.Array, segment_BT: jax.Array, causal: bool
) -> list[jax.Array]:
  """What each token reads back after each layer and recovery: [B, T, D]s.

  In order; the last is what the final norm sees, read back where it is short.
  """
  around, found = [], []

  def report(stream):
    hidden_BTD = stream.hidden_BTD
    for before, gather_index_BT in reversed(around):
      deep_BTD = take(hidden_BTD, jnp.maximum(gather_index_BT, 0))
      bypass_BT1 = (gather_index_BT == BYPASS)[..., None]
      hidden_BTD = jnp.where(bypass_BT1, before.hidden_BTD, deep_BTD)
    found.append(hidden_BTD)
    return stream

  def run(step, stream, keys):
    layers = model.layers, model.config, step.start, step.stop
    options = dict(causal=causal, needs=step.needs)
    stream, aux = run_layers(*layers, stream, keys, **options)
    return report(stream), aux

  def reduce(stage, stream, aux):
    short, gather_index_BT = model.funnel[stage].reducer.reduce(
      stream, aux, causal
    )
    around.append((stream, gather_index_BT))
    return short, gather_index_BT

  def upsample(stage, *args):
    around.pop()
    return report(model.funnel[stage].upsample(*args, causal))

  stream = make_stream(model.embed(tokens_BT), segment_BT)
  run_trunk(_single_layers(model), stream, run, reduce, upsample)
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
  """(cosine, error) for each of the funnelled model's states."""
  plain = nnx.merge(plain_def, plain_params)
  other = nnx.merge(other_def, other_params)
  of_layer = states(plain, tokens_BT, segment_BT, causal)
  found = states(other, tokens_BT, segment_BT, causal)
  return [
    _likeness(of_layer[layer], hidden_BTD, segment_BT != 0)
    for (layer, _, _), hidden_BTD in zip(_points(other), found, strict=True)
  ]


def _likeness(x_BTD, y_BTD, counts_BT):
  """(mean cosine, root-mean-square relative distance) where it counts.

  The cosine is 1 - |x - y|^2 / 2 of unit vectors, which is 1 exactly where
  they are equal.
  """
  unit = lambda z: normalize(z, 1e-30) * z.shape[-1] ** -0.5
  square_BT = jnp.sum(jnp.square(unit(x_BTD) - unit(y_BTD)), axis=-1)
  # Padding may hold anything.
  square_BT = jnp.where(counts_BT, square_BT, 0)
  square = jnp.sum(square_BT) / jnp.sum(counts_BT)
  return 1 - square / 2, jnp.sqrt(square)
