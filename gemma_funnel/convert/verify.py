"""Reading two checkpoints back: is every value, and what they compute, equal?

Nothing is held whole here either: the logits are computed a layer at a time,
in float32, each side by its own files and its own configuration.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import param_mapping
from gemma_funnel.convert.conversion import Progress
from gemma_funnel.convert.reader import BLOCK_BYTES, CheckpointReader
from gemma_funnel.data.tokenizer import BOS_ID
from gemma_funnel.layers import Block, make_attention_fn, normalize, rope_angles
from gemma_funnel.stream import make_stream

_PROMPT_LENGTH = 24
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Difference:
  """Between two checkpoints, of which the second was made from the first.

  Attributes:
    tensors: how many of our parameters were compared, each layer by itself.
    unequal: names of those that differ in the dtype of the second.
    largest: |difference| of a value, in float32.
    logits: the largest |difference| on a fixed prompt, without a funnel.
  """

  tensors: int
  unequal: tuple[str, ...]
  largest: float
  logits: float

  def __bool__(self) -> bool:
    return bool(self.unequal) or self.logits != 0

  def __str__(self) -> str:
    return (
      f"{self.tensors} tensors compared, {len(self.unequal)} differ; largest "
      f"difference of a value {self.largest:.3g}, of a logit {self.logits:.3g}"
    )


def compare(
  first: CheckpointReader,
  second: CheckpointReader,
  progress: Progress = lambda name, nbytes: None,
) -> Difference:
  """Compares all that both have; rows of the vocabulary that one lacks are not.

  Raises:
    ValueError: a file is damaged.
  """
  vocab_size = min(first.config.vocab_size, second.config.vocab_size)
  config = dataclasses.replace(second.config, vocab_size=vocab_size)
  sizes, dtype = param_mapping.sizes_of(config), second.dtype
  unequal, count, largest = [], 0, 0.0
  for tensor in param_mapping.own_tensors(config, second.stages):
    for view in tensor.views:
      same = True
      for slices in view.blocks(sizes, dtype.itemsize, BLOCK_BYTES):
        a, b = (
          source.read(view.path, view.layer, view.axes, slices, dtype)
          for source in (first, second)
        )
        if a.tobytes() != b.tobytes():
          same = False
          gap = np.abs(a.astype(_FLOAT32) - b.astype(_FLOAT32)).max()
          largest = max(largest, float(gap))
        progress(tensor.name, b.nbytes)
      count += 1
      if not same:
        layer = "" if view.layer is None else f", layer {view.layer}"
        unequal.append(tensor.name + layer)
  prompt = make_prompt(vocab_size)
  # Weights that the second has rounded are compared as rounded.
  a, b = (
    plain_logits(s, prompt, dtype)[:, :vocab_size] for s in (first, second)
  )
  gap = float(np.abs(a - b).max())
  return Difference(count, tuple(unequal), largest, gap)


def make_prompt(vocab_size: int) -> np.ndarray:
  """BOS and token ids from all over the vocabulary, the same on each call."""
  rest = np.arange(1, _PROMPT_LENGTH) * 7919 % vocab_size
  return np.array([min(BOS_ID, vocab_size - 1), *rest])


def plain_logits(
  source: CheckpointReader, tokens: np.ndarray, dtype: np.dtype = _FLOAT32
) -> np.ndarray:
  """Float32 logits [T, V] of one row of tokens, without a funnel.

  Args:
    source: of the weights; one layer of it is in memory at a time.
    tokens: int [T].
    dtype: what weights are rounded to first.
  """
  config = dataclasses.replace(
    source.config, param_dtype="float32", dtype="float32", kernel="reference"
  )

  def read(path, layer, slices):
    axes = param_mapping.axes_of(path)
    return source.read(path, layer, axes, slices, dtype).astype(_FLOAT32)

  rows = [
    read(("embedding",), None, {"V": slice(token, token + 1)})
    for token in map(int, tokens)
  ]
  scale = config.embed_scale or math.sqrt(config.embed_dim)
  hidden_BTD = jnp.concatenate(rows)[None] * scale
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
  )
  paths = [path for path, _ in nnx.to_flat_state(state)]
  for layer in range(config.num_layers):
    params = [read(("layers", *path), layer, {}) for path in paths]
    hidden_BTD = _run_layer(
      graphdef, config, config.layers[layer], tuple(paths), params, hidden_BTD
    )
  scale = config.norm_offset + read(("final_norm", "scale"), None, {})
  hidden_TD = normalize(hidden_BTD[0], config.norm_eps) * scale[None]
  head = "embedding" if config.tied else "unembedding"
  view = param_mapping.ParamView((head,), None, (), "V D")
  sizes = param_mapping.sizes_of(config)
  blocks = view.blocks(sizes, _FLOAT32.itemsize, BLOCK_BYTES)
  heads = (read(view.path, None, slices) for slices in blocks)
  logits = np.concatenate([np.asarray(hidden_TD @ h.T) for h in heads], axis=1)
  cap = config.final_softcap
  return logits if cap is None else cap * np.tanh(logits / cap)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_layer(
  graphdef, config: TransformerConfig, spec, paths, params, hidden_BTD
):
  stream = make_stream(hidden_BTD)
  flat = {p: nnx.Param(v) for p, v in zip(paths, params, strict=True)}
  block = nnx.merge(graphdef, nnx.from_flat_state(flat))
  attention_fn = make_attention_fn(config, stream, stream, True, spec.window)
  rope = rope_angles(stream.position_BT, config, spec)
  return block(hidden_BTD, rope, attention_fn)[0]
