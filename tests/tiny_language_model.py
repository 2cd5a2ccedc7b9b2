"""A language model of random weights, and a tokenizer of a few words."""

from flax import nnx

from gemma_funnel.config import TransformerConfig
from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.model import Transformer

VOCAB = 300


def make_model(max_length: int, funnel=None, norm: float = 6) -> Transformer:
  """A model whose layers matter: fresh ones add little to the embedding."""
  config = TransformerConfig.preset(
    "tiny", num_layers=2, vocab_size=VOCAB, max_length=max_length
  )
  model = nnx.jit(lambda: Transformer(config, funnel, rngs=nnx.Rngs(0)))()
  for part in (model.layers.post_attn_norm, model.layers.post_mlp_norm):
    part.scale[...] = part.scale[...] + norm
  return model


def train_tokenizer(folder) -> tokenizer_lib.Tokenizer:
  """A tokenizer whose file is in `folder`."""
  words = "one two three four five six a cat sat red green blue grey".split()
  lines = [f"{w} {v}" for w in words for v in words]
  documents = [sources.Document(str(n), x) for n, x in enumerate(lines)]
  return tokenizer_lib.train(documents, VOCAB, folder / "t.model")
