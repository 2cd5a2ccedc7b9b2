"""The table of parameters: it is the tree, and each consumer's answer."""

import dataclasses
import types

from flax import nnx
import jax
import pytest

from gemma_funnel import lora as lora_lib
from gemma_funnel import params
from gemma_funnel.config import TransformerConfig, resolve_funnel
from gemma_funnel.heads import POOLS, Head, HeadConfig
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding

CONFIG = TransformerConfig.preset("tiny")
SIZES = params.sizes_of(CONFIG)
FUNNELS = [
  "off",
  "start=0,recover=gate",
  "start=1,pool=attention,recover=attend",
  "start=0,pool=attention,recover=gate+start=2,recover=attend",
  "start=1,recover=average",
]


def _shapes(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {params.path_of(path): x.shape for path, x in leaves}


def _table(rows, sizes=SIZES):
  return {row.path: row.shape(sizes) for row in rows}


@pytest.mark.parametrize("funnel", FUNNELS)
@pytest.mark.parametrize("post_norms", [True, False])
def test_the_table_is_a_model_s_tree(funnel, post_norms):
  config = dataclasses.replace(CONFIG, post_norms=post_norms)
  stages = resolve_funnel(funnel, config.num_layers)
  model = Transformer.abstract(config, stages)
  got = _shapes(nnx.to_pure_dict(nnx.state(model)))
  assert got == _table(params.rows_of(config, stages))
  for path in got:
    row = params.row_of(f"1/mu/params/{path}")
    assert row.shape(SIZES) == got[path]


@pytest.mark.parametrize(
  "head",
  [HeadConfig(3, pool=pool, hidden=h) for pool in POOLS for h in (0, 7)]
  + [HeadConfig(3, pool="attention", per_token=True)],
  ids=str,
)
def test_the_table_is_a_head_s_tree(head):
  made = nnx.eval_shape(lambda: Head(32, head, rngs=nnx.Rngs(0)))
  rows = [row for row in params.HEAD if row.when(head)]
  sizes = dict(D=32, E=head.hidden or 32, C=3)
  tree = {"head": nnx.to_pure_dict(nnx.state(made))}
  assert _shapes(tree) == _table(rows, sizes)


def test_the_table_is_lora_s_tree():
  lora = lora_lib.LoraConfig(rank=2, alpha=1.0, target=".")
  model = nnx.to_pure_dict(nnx.state(Transformer.abstract(CONFIG)))
  made = jax.eval_shape(lambda: lora_lib.init(model, lora, jax.random.key(0)))
  rows = [
    factor
    for row in params.MODEL
    if row.stacked and row.is_layer_matrix
    for factor in params.factors(row)
  ]
  assert _shapes(made) == _table(rows, {**SIZES, "r": 2})
  assert all(params.row_of(f"mu/lora/{row.path}") == row for row in rows)


def test_optional_parameters_follow_the_config():
  values = dict(post_norms=True, qk_norm=True, attention_bias=True, tied=False)
  paths = {
    row.path: row for row in params.rows_of(types.SimpleNamespace(**values))
  }
  assert paths.keys() == {row.path for row in params.MODEL}
  plain = {row.path for row in params.rows_of(CONFIG)}
  assert {p: paths[p].dims for p in paths.keys() - plain} == {
    "unembedding": "V D",
    "layers/attn/query_bias": "L N H",
    "layers/attn/key_bias": "L K H",
    "layers/attn/value_bias": "L K H",
    "layers/attn/query_norm/scale": "L H",
    "layers/attn/key_norm/scale": "L H",
  }


@pytest.mark.parametrize("row", [*params.MODEL, *params.FUNNEL, *params.HEAD])
def test_every_row_lies_on_a_mesh(row):
  config = sharding.default_config()
  config.update(data=1, fsdp=2, sequence=2, tensor=2)
  mesh = sharding.make_mesh(config)
  sizes = {**SIZES, "V": 96, "E": 8, "C": 2}
  path = f"params/{row.path.replace('*', '12')}"
  spec = sharding.spec_of(path, row.shape(sizes), mesh)
  whole = not row.outputs or row.role == "head"
  split = {axis for axis in spec if axis}
  assert split == (set() if whole else {("fsdp", "sequence"), "tensor"})


def test_roles_and_axes():
  row = params.row_of("lora/layers/attn/out/b")
  assert (row.role, row.decays, row.is_layer_matrix) == (
    "attention",
    True,
    False,
  )
  out = params.layer_matrix("params/layers/attn/out")
  assert (out.input_axes, out.output_axes) == ((-3, -2), (-1,))
  key = params.layer_matrix("funnel/3/attend/attn/key")
  assert (key.input_axes, key.output_axes) == ((-3,), (-2, -1))
  assert params.layer_matrix("params/embedding") is None
  assert params.layer_matrix("head/out") is None


def test_what_a_reduction_learns_without_a_row_is_a_vector():
  row = params.row_of("mu/params/funnel/0/scale")
  assert (row.dims, row.role, row.decays) == ("D", "funnel", False)
  assert params.row_of("layers/new") is None
  assert params.row_of("attn/query") is None
