"""Costs against published counts, the compiler's, hand's, and brute force."""

import dataclasses
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel import flops
from gemma_funnel import funnel as funnel_lib
from gemma_funnel.attention.masks import AttentionSpec, visible
from gemma_funnel.config import (
  FAMILIES,
  PRESETS,
  FunnelConfig,
  TransformerConfig,
  resolve_funnel,
)
from gemma_funnel.model import Transformer
from gemma_funnel.stream import make_stream

# Parameters of the released checkpoints, as the Hub counts them. From 4B on,
# those of Gemma 3 are without what sees images: of 4,300,079,472 (4B),
# 12,187,325,040 and 27,432,406,640.
PUBLISHED = {
  "gemma1_2b": 2_506_172_416,
  "gemma1_7b": 8_537_680_896,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma2_27b": 27_227_128_320,
  "gemma3_270m": 268_098_176,
  "gemma3_1b": 999_885_952,
  "gemma3_4b": 3_880_263_168,
  "gemma3_12b": 11_766_034_176,
  "gemma3_27b": 27_009_346_304,
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3.1_8b": 8_030_261_248,
  "llama3.1_70b": 70_553_706_496,
  "llama3.2_1b": 1_235_814_400,
  "llama3.2_3b": 3_212_749_824,
  "smollm2_135m": 134_515_008,
  "smollm2_360m": 361_821_120,
  "smollm2_1.7b": 1_711_376_384,
  "mistral_7b_v0.1": 7_241_732_096,
  "mistral_7b_v0.3": 7_248_023_552,
  "qwen2_0.5b": 494_032_768,
  "qwen2_1.5b": 1_543_714_304,
  "qwen2_7b": 7_615_616_512,
  "deepseek_r1_distill_qwen_1.5b": 1_777_088_000,
  "deepseek_r1_distill_qwen_7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_model_s_and_the_published_ones(name):
  config = TransformerConfig.preset(name)
  leaves = jax.tree.leaves(nnx.state(Transformer.abstract(config)))
  total = flops.parameters(config).total
  assert total == sum(x.size for x in leaves)
  own = ("bench", "quickstart", "tiny")
  assert name in own or total == PUBLISHED[name]


@pytest.mark.parametrize(
  "family, funnel, head",
  [
    *itertools.product(
      ["gemma2"], [None, FunnelConfig(1), FunnelConfig(1, 3, 3)], [True, False]
    ),
    ("gemma3_text", FunnelConfig(1), True),
    ("llama", FunnelConfig(1, 3, 3), True),
    ("qwen2", None, True),
  ],
  ids=str,
)
def test_forward_is_the_compiler_s_count(family, funnel, head):
  """Bidirectional, all global, unrolled: nothing skipped, looped or fused.

  Wide enough for norms and softmax to be a small part.
  """
  config = TransformerConfig.preset(
    "tiny",
    **FAMILIES[family] | dict(attention_pattern=("global",)),
    embed_dim=512,
    mlp_dim=2048,
    num_heads=8,
    head_dim=64,
    vocab_size=4096,
    scan_layers=False,
    kernel="reference",
  )
  graphdef, params = nnx.split(Transformer.abstract(config, funnel))

  def run(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    return model(tokens_BT, causal=False) if head else model.encode(tokens_BT)

  tokens_BT = jax.ShapeDtypeStruct((2, 192), "int32")
  lowered = jax.jit(run).lower(params, tokens_BT)
  counted = lowered.compile().cost_analysis()["flops"]
  ours = flops.forward(config, funnel, 2, 192, head=head, causal=False)
  assert ours == pytest.approx(counted, rel=0.02)


LEARNED = (
  "start=0,stop=1,stride=4,recover=gate"
  "+start=1,stride=2,reduce=attention,recover=attend"
)


@pytest.mark.parametrize(
  "funnel",
  [
    "start=1",
    "start=1,reduce=attention",
    "start=1,recover=attend",
    "start=0,reduce=attention,recover=gate",
    LEARNED,
  ],
)
def test_what_a_funnel_learns_is_counted(funnel):
  config = TransformerConfig.preset("tiny")
  state = nnx.to_pure_dict(nnx.state(Transformer.abstract(config, funnel)))
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  counted = flops.parameters(config, funnel)
  assert counted.funnel == size(state.get("funnel", {}))
  assert counted.layers == size(state["layers"])
  assert counted.total == size(state)


# Six layers, of which 1 and 4 are local in a cycle of three; the window bites.
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=6, attention_pattern=("global", "local", "global")
)
D, F, N, K, H = 32, 48, 4, 2, 6
Q_O, K_V, MLP = 2 * D * N * H, 2 * D * K * H, 3 * D * F
NORMS, VOCAB = 4 * D, 97
ENTRY = 2 * K * H


def by_hand(config, funnel, length, causal):
  """What runs: (name, queries, keys, bool [R, S]), with real streams and masks.

  Streams are those that the model itself would have.
  """
  stages = resolve_funnel(funnel, config.num_layers)
  # How it recovers does not matter to how it reduces.
  made = [
    funnel_lib.Stage(config, dataclasses.replace(s, recover="add"), nnx.Rngs(0))
    for s in stages
  ]
  found = []

  def add(name, queries, keys, window):
    see = visible(queries, keys, AttentionSpec(causal, window))
    found.append((name, queries, keys, np.asarray(see[0])))

  def run(step, stream, keys):
    assert (step.keys == "before") == (keys is not None)
    for layer in range(step.start, step.stop):
      if step.keys == "none":
        found.append(("mlp", stream, stream, None))
        continue
      add("layer", stream, keys or stream, config.layers[layer].window)
    return stream, {}

  def reduce(stage, stream, aux):
    if stages[stage].reduce == "attention":
      found.append(("pool", stream, stream, None))
    return made[stage].reducer.reduce(stream, aux, causal)

  def upsample(stage, deep, short, before, _):
    if stages[stage].recover == "attend":
      add("attend", before, deep, None)
    if stages[stage].recover == "gate":
      found.append(("gate", before, before, None))
    return before

  stream = make_stream(jnp.zeros((1, length, config.embed_dim)))
  steps = funnel_lib.layer_plan(stages, config)
  funnel_lib.run_trunk(steps, stream, run, reduce, upsample)
  return found


def slots(stream):
  return stream.segment_BT.shape[1]


GRID = [
  FunnelConfig(
    1,
    5,
    stride,
    pool,
    "gate" if keys == "first" else "attend",
    keys=keys,
    keep_first=keep_first,
    position=position,
  )
  for stride, pool, keys, keep_first, position in itertools.product(
    (2, 3),
    ("mean", "attention", "strided"),
    ("own", "first"),
    (False, True),
    ("last", "first", "mean"),
  )
  if position == "last" or (pool == "mean" and stride == 3)
]
# Stages one within another, and apart; keys from before the stage in both; and
# layers left out, repeated, and without attention.
NESTED = [
  (outer, FunnelConfig(2, 4, 2, keys="first", recover="attend"))
  for outer in GRID[::2]
] + [
  (FunnelConfig(0, 2, 3), FunnelConfig(3, 6, 2, keys="first")),
  (FunnelConfig(0, 6, 2), FunnelConfig(1, 5, 2), FunnelConfig(4, 5, 2)),
  (FunnelConfig(1, stride=40), FunnelConfig(2, 4, 3, "strided")),
  (FunnelConfig(1, 5, 3, keys="before"), FunnelConfig(5, 6, keys="none")),
  FunnelConfig.parse("layers=0,3,3,1-2,5"),
  FunnelConfig(1, 5, 3, keys="before", layers=(3, 2, 2)),
]
FUNNELS = [None, *GRID[::5], *NESTED[::5], *NESTED[-6:]]
ENCODER = FunnelConfig(1, stride=4, recover="none")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 26])
def test_forward_is_what_real_streams_make_visible(length, causal):
  funnels = FUNNELS if length == 1 else (None, *GRID, *NESTED)
  for funnel in (*funnels, ENCODER):
    expected = 0
    for name, queries, keys, see in by_hand(CONFIG, funnel, length, causal):
      if name in ("layer", "attend"):
        mlp = MLP if name == "layer" else 0
        expected += 2 * slots(queries) * (Q_O + mlp) + 2 * slots(keys) * K_V
        expected += 4 * N * H * see.sum()
      elif name == "pool":
        expected += 2 * slots(queries) * D
      elif name == "mlp":
        expected += 2 * slots(queries) * MLP
    arguments = CONFIG, funnel, 3, length
    assert flops.forward(*arguments, False, causal) == 3 * expected, funnel
    if funnel is not ENCODER:
      expected += 2 * length * D * VOCAB
      assert flops.forward(*arguments, True, causal) == 3 * expected, funnel


def test_bytes_of_a_forward_pass():
  for funnel in FUNNELS:
    slots_, weights = 26 * D, 0
    for name, queries, keys, see in by_hand(CONFIG, funnel, 26, True):
      if name == "layer":
        weights += Q_O + K_V + MLP + NORMS
      elif name == "attend":
        weights += Q_O + K_V + 2 * D
      elif name == "mlp":
        weights += MLP + NORMS // 2
        slots_ += 2 * D * slots(queries)
      else:
        weights += D
      if see is not None:
        slots_ += 2 * D * slots(queries) + 2 * ENTRY * slots(keys)
        slots_ += 0 if keys is queries else D * slots(keys)
    found = flops.forward_bytes(CONFIG, funnel, 3, 26, head=False)
    assert found == 4 * (weights + 3 * slots_), funnel


@pytest.mark.parametrize("context", [1, 23])
def test_decoding_is_what_real_streams_make_visible(context):
  for funnel in FUNNELS:
    cost, moved, entries = 0, 3 * D, 0
    for name, queries, keys, see in by_hand(CONFIG, funnel, context, True):
      often, key_often = 1 / queries.stride, 1 / keys.stride
      if name in ("layer", "attend"):
        weights = Q_O + (MLP if name == "layer" else 0)
        cost += often * (2 * weights + 4 * N * H * see[-1].sum())
        cost += key_often * 2 * K_V
        moved += often * (weights + (NORMS if name == "layer" else 2 * D))
        moved += key_often * K_V
        moved += 3 * ENTRY * (often * see[-1].sum() + key_often)
        entries += see.sum(1).max()
      elif name == "pool":
        cost += often * 2 * D
        moved += often * D
      elif name == "mlp":
        cost += often * 2 * MLP
        moved += often * (MLP + NORMS // 2)
      else:
        moved += often * D
    found = flops.decode_flops(CONFIG, funnel, context, head=False)
    assert found == pytest.approx(cost, rel=1e-12), funnel
    found = flops.decode_bytes(CONFIG, funnel, 3, context, head=False)
    assert found == pytest.approx(4 * moved, rel=1e-12), funnel
    found = flops.cache_bytes(CONFIG, funnel, 3, context)
    assert found == 4 * 3 * ENTRY * entries, funnel


def test_decoding_by_hand():
  """Layers 0 g, 1 l, 2 g, 3 g, 4 l, 5 g, window 8, and 24 tokens."""
  layer = 2 * (Q_O + K_V + MLP)
  pair = 4 * N * H
  head = 2 * D * VOCAB
  plain = 6 * layer + (4 * 24 + 2 * 8) * pair + head
  assert flops.decode_flops(CONFIG, None, 24) == plain
  entries = 4 * 24 + 2 * 8
  assert flops.cache_bytes(CONFIG, None, 2, 24) == 4 * 2 * ENTRY * entries
  # Every other token runs layers 1 to 4, that hold 12 groups and a window's 4.
  funnel = FunnelConfig(1, 5, 2)
  short = (2 + 4 / 2) * layer + (2 * 24 + (2 * 12 + 2 * 4) / 2) * pair + head
  assert flops.decode_flops(CONFIG, funnel, 24) == short
  entries = 2 * 24 + 2 * 12 + 2 * 4
  assert flops.cache_bytes(CONFIG, funnel, 2, 24) == 4 * 2 * ENTRY * entries
  weights = 4 * (Q_O + K_V + MLP + NORMS)
  moved = weights + 2 * (D + ENTRY * (2 * 24 + 16 + 2 + 4 / 2)) + VOCAB * D
  found = flops.decode_bytes(CONFIG, funnel, 2, 24)
  assert found == 4 * moved + 4 * 2 * VOCAB
  # In it, every sixth runs layers 2 and 3, of 4 groups and 24 tokens.
  funnel = (funnel, FunnelConfig(2, 4, 3))
  short = (2 + 2 / 2 + 2 / 6) * layer + head
  short += (2 * 24 + 2 * 4 / 2 + 2 * 4 / 6) * pair
  assert flops.decode_flops(CONFIG, funnel, 24) == pytest.approx(short)


def test_decoding_with_pooled_queries_alone_by_hand():
  """Layer 1 has a key for every token, of which it sees a window's 8."""
  funnel = FunnelConfig(1, 5, 2, keys="first")
  layer, pair = 2 * (Q_O + K_V + MLP), 4 * N * H
  cost = (2 + 4 / 2) * layer + 2 * K_V / 2
  cost += (2 * 24 + (2 * 12 + 8 + 4) / 2) * pair
  assert flops.decode_flops(CONFIG, funnel, 24, head=False) == cost
  entries = 2 * 24 + 2 * 12 + 8 + 4
  assert flops.cache_bytes(CONFIG, funnel, 1, 24) == 4 * ENTRY * entries


def test_decoding_and_a_head_need_a_recovery():
  funnel = "start=1,recover=none"
  for count in (flops.decode_flops, flops.cache_bytes, flops.decode_bytes):
    rows = () if count is flops.decode_flops else (1,)
    with pytest.raises(ValueError, match="0 tokens: expected at least 1"):
      count(CONFIG, None, *rows, 0)
    with pytest.raises(ValueError, match="recover='none'.*decoding"):
      count(CONFIG, funnel, *rows, 8)
  for count in (flops.forward, flops.forward_bytes, flops.ideal_reduction):
    with pytest.raises(ValueError, match="recover='none'.*vocabulary head"):
      count(CONFIG, funnel, 1, 8)
    assert count(CONFIG, funnel, 1, 8, head=False) > 0


def test_what_a_funnel_saves():
  config = TransformerConfig.preset("gemma2_2b")
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
  config = TransformerConfig.preset("gemma2_2b", dtype="bfloat16")
  least = 2 * flops.parameters(config).total
  moved = flops.forward_bytes(config, None, 1, 1)
  assert least < moved < 1.01 * least
  # Pooling tokens does not shrink the weights.
  funnel = FunnelConfig(0, stride=2)
  assert flops.forward_bytes(config, funnel, 1, 16) > 0.99 * least
  long = [flops.forward_bytes(config, f, 8, 8192) for f in (None, funnel)]
  assert long[1] < long[0]
