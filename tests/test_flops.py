"""Costs against published counts, the compiler's, and brute force."""

from flax import nnx
import jax
import numpy as np
import pytest

from gemma_funnel import flops
from gemma_funnel.config import PRESETS, FunnelConfig, GemmaConfig
from gemma_funnel.model import Gemma

# Parameters of the released checkpoints.
PUBLISHED = {
  "gemma1_2b": 2_506_172_416,
  "gemma1_7b": 8_537_680_896,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma2_27b": 27_227_128_320,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
  assert flops.parameters(GemmaConfig.preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_model_s(name):
  config = GemmaConfig.preset(name)
  leaves = jax.tree.leaves(nnx.state(Gemma.abstract(config)))
  assert flops.parameters(config).total == sum(x.size for x in leaves)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reach", [None, 0, 1, 4, 50])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_pairs_are_those_that_can_be_seen(length, reach, causal):
  t, s = np.mgrid[:length, :length]
  see = (
    np.ones((length, length), bool) if reach is None else (abs(t - s) <= reach)
  )
  if causal:
    see &= s <= t
  assert flops.attention_pairs(length, reach, causal) == see.sum()


@pytest.mark.parametrize(
  "funnel", [None, FunnelConfig(1), FunnelConfig(1, 3, 3)], ids=str
)
@pytest.mark.parametrize("head", [True, False])
def test_forward_is_the_compiler_s_count(funnel, head):
  """Bidirectional, all global, unrolled: nothing skipped, looped or fused.

  Wide enough for norms and softmax to be a small part.
  """
  config = GemmaConfig.preset(
      "tiny", embed_dim=512, mlp_dim=2048, num_heads=8, head_dim=64,
      vocab_size=4096, attention_pattern=("global",), scan_layers=False,
      kernel="reference",
  )  # fmt: skip
  graphdef, params = nnx.split(Gemma.abstract(config, funnel))

  def run(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    return model(tokens_BT, causal=False) if head else model.encode(tokens_BT)

  tokens_BT = jax.ShapeDtypeStruct((2, 192), "int32")
  lowered = jax.jit(run).lower(params, tokens_BT)
  counted = lowered.compile().cost_analysis()["flops"]
  ours = flops.forward(config, funnel, 2, 192, head=head, causal=False)
  assert ours == pytest.approx(counted, rel=0.02)


def test_windows_keep_their_meaning_in_a_funnel():
  """By brute force over the positions of pooled tokens."""
  config = GemmaConfig.preset("tiny", attention_pattern=("local",), window=8)
  funnel = FunnelConfig(0, stride=3)
  position = np.arange(0, 40, 3)
  distance = position[:, None] - position[None]
  pairs = ((distance >= 0) & (distance < 8)).sum()
  per_pair = 4 * config.num_heads * config.head_dim * config.num_layers
  matmuls = flops.forward(config, funnel, 1, 40, head=False) - per_pair * pairs
  weights = flops.parameters(config).layers - 4 * 4 * config.embed_dim
  assert matmuls == 2 * len(position) * weights


def test_what_a_funnel_saves():
  config = GemmaConfig.preset("gemma2_2b")
  half = FunnelConfig(0, stride=2)
  short = flops.ideal_reduction(config, half, 1, 512, head=False)
  assert short == pytest.approx(0.5, abs=0.01)
  # The head is not shortened: 22.6% of this model's parameters.
  assert flops.ideal_reduction(config, half, 1, 512) < 0.4
  assert flops.ideal_reduction(config, None, 1, 512) == 0
  # Attention grows with the square: a long sequence saves more than half.
  assert flops.ideal_reduction(config, half, 1, 8192, head=False) > 0.52
  with pytest.raises(ValueError, match="past the model's 26 layers"):
    flops.forward(config, FunnelConfig(1, 27), 1, 16)


def test_bytes_at_batch_1_are_the_weights():
  config = GemmaConfig.preset("gemma2_2b", dtype="bfloat16")
  least = 2 * flops.parameters(config).total
  moved = flops.forward_bytes(config, None, 1, 1)
  assert least < moved < 1.01 * least
  # Pooling tokens does not shrink the weights.
  funnel = FunnelConfig(0, stride=2)
  assert flops.forward_bytes(config, funnel, 1, 16) > 0.99 * least
  long = [flops.forward_bytes(config, f, 8, 8192) for f in (None, funnel)]
  assert long[1] < long[0]
