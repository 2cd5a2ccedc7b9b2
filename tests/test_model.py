"""The model's own properties; parity with Hugging Face is test_parity.py."""

import dataclasses
import re

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_funnel.config import TransformerConfig, format_funnel
from gemma_funnel.layers import make_attention_fn, rope_angles
from gemma_funnel.model import Transformer
from gemma_funnel.registry import REDUCERS
from gemma_funnel.stream import make_stream

CONFIG = TransformerConfig.preset("tiny", num_layers=5)
FUNNEL = "start=1,stop=4,stride=3"
# Everything that a funnel may learn, and positions that are not integers.
NESTED = (
  "start=1,stop=4,reduce=attention,recover=attend,keys=first+"
  "start=2,stop=3,reduce=max,recover=gate,position=mean"
)


def _tokens(batch=2, length=21):
  return np.random.default_rng(0).integers(5, 97, (batch, length))


def _variant(model: Transformer, **changes) -> Transformer:
  """The same parameters under a changed configuration."""
  config = dataclasses.replace(model.config, **changes)
  graphdef = nnx.graphdef(
    Transformer.abstract(config, format_funnel(model.stages))
  )
  return nnx.merge(graphdef, nnx.state(model))


def _loss_and_grads(model: Transformer):
  graphdef, params = nnx.split(model)

  def loss(params):
    logits = nnx.merge(graphdef, params)(_tokens())
    return -jax.nn.log_softmax(logits)[..., 7].mean()

  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module", params=["off", FUNNEL])
def model(request):
  return Transformer(CONFIG, request.param, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def numbers(model):
  return _loss_and_grads(model)


# With the funnel, no loop over layers runs more than once; without, one does.
@pytest.mark.parametrize(
  "model,changes",
  [
    ("off", dict(scan_layers=False)),
    ("off", dict(remat="block")),
    (FUNNEL, dict(scan_layers=False)),
    (FUNNEL, dict(kernel="reference")),
    (FUNNEL, dict(remat="dots")),
    (FUNNEL, dict(remat="block")),
  ],
  ids=str,
  indirect=["model"],
)
def test_switches_that_keep_the_numbers(model, numbers, changes):
  _check_same_numbers(_loss_and_grads(_variant(model, **changes)), numbers)


def test_switches_keep_the_numbers_of_all_that_a_funnel_learns():
  model = Transformer(CONFIG, NESTED, rngs=nnx.Rngs(0))
  changes = dict(scan_layers=False, kernel="reference", remat="block")
  other = _variant(model, **changes)
  _check_same_numbers(_loss_and_grads(other), _loss_and_grads(model))


def _check_same_numbers(got, want):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_remat_saves_memory():
  """The switch is not only accepted: fewer temporaries, in this order."""

  def temporaries(remat):
    config = TransformerConfig.preset(
      "tiny", num_layers=8, embed_dim=64, mlp_dim=256, remat=remat
    )
    graphdef, params = nnx.split(Transformer.abstract(config))
    loss = lambda params, tokens: jnp.sum(
      nnx.merge(graphdef, params).encode(tokens, causal=True) ** 2
    )
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, block = map(temporaries, ("none", "dots", "block"))
  assert block < dots < none


def test_the_backward_pass_keeps_no_parameters_and_nothing_twice():
  config = dataclasses.replace(CONFIG, num_layers=6, mlp_dim=88)
  model = Transformer.abstract(config)
  graphdef, params = nnx.split(model)

  def loss(params, tokens):
    return jnp.sum(nnx.merge(graphdef, params).encode(tokens) ** 2)

  tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
  text = jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
  # The forward pass is the first loop that gives something of each period.
  results = re.findall(r"stablehlo.while\(.*\) : (.*)", text)
  kept = max((line.split(", ") for line in results), key=len)
  matrices = [t for t in kept if re.fullmatch(r"tensor<3x\d+x88xf32>", t)]
  assert not matrices and not [t for t in kept if "tensor<3x88x" in t]
  # The MLP's two products; not the GELU, nor their product.
  wide = [t for t in kept if t == "tensor<3x2x24x88xf32>"]
  assert len(wide) % 4 == 0 and 4 <= len(wide) <= 8, kept


def test_dtypes_are_used(model):
  low = _variant(model, dtype="bfloat16")
  hidden = low.encode(_tokens(), causal=True)
  assert hidden.dtype == jnp.bfloat16
  assert low(_tokens()).dtype == jnp.float32
  difference = np.abs(low(_tokens()) - model(_tokens()))
  assert 1e-4 < difference.mean() < 0.1
  stored = Transformer.abstract(
    dataclasses.replace(CONFIG, param_dtype="bfloat16")
  )
  dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(stored))}
  assert dtypes == {jnp.dtype("bfloat16")}


def test_embedding_scale_is_rounded_to_the_compute_dtype():
  """sqrt(3072) = 55.43 is 55.5 in bfloat16."""
  config = dataclasses.replace(
    CONFIG, embed_dim=3072, num_layers=1, dtype="bfloat16"
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  token = jnp.asarray([[7]])
  row = model.embedding[...][7].astype(jnp.bfloat16)
  want = row * jnp.asarray(55.5, jnp.bfloat16)
  np.testing.assert_array_equal(model.embed(token)[0, 0], want)


@pytest.mark.parametrize("causal", [True, False])
def test_pooled_queries_see_the_keys_from_before(causal):
  """A model of one such layer, against a call of its block."""
  config = dataclasses.replace(CONFIG, num_layers=1, kernel="reference")
  funnel = "start=0,stride=3,reduce=max,recover=none,keys=first"
  model = Transformer(config, funnel, rngs=nnx.Rngs(0))
  stream = make_stream(model.embed(_tokens()))
  short, _ = model.funnel[0].reducer.reduce(stream, {}, causal)
  graphdef, params = nnx.split(model.layers)
  block = nnx.merge(graphdef, jax.tree.map(lambda p: p[0], params))
  want, _ = block(
    short.hidden_BTD,
    rope_angles(short.position_BT, config, config.layers[0]),
    make_attention_fn(config, short, stream, causal, config.layers[0].window),
    stream.hidden_BTD,
    rope_angles(stream.position_BT, config, config.layers[0]),
  )
  got = model.encode(_tokens(), causal=causal)
  np.testing.assert_allclose(got, model.final_norm(want), atol=1e-5)
  pooled = model.with_funnel("start=0,stride=3,reduce=max,recover=none")
  assert np.abs(pooled.encode(_tokens(), causal=causal) - got).max() > 1e-2


def test_positions_can_be_given(model):
  """Shifted by a constant they change nothing; stretched, they do."""
  tokens = _tokens()
  position = np.broadcast_to(np.arange(21, dtype=np.int32), tokens.shape)
  want = model(tokens)
  np.testing.assert_allclose(
    model(tokens, None, position + 50), want, atol=1e-4
  )
  assert np.abs(model(tokens, None, position * 2) - want).max() > 1e-2


def test_logits_are_of_the_encoded(model):
  """The tied head, capped."""
  hidden_BTD = np.asarray(model.encode(_tokens(), causal=True))
  logits_BTV = hidden_BTD @ np.asarray(model.embedding[...]).T
  cap = CONFIG.final_softcap
  np.testing.assert_allclose(
    model(_tokens()), cap * np.tanh(logits_BTV / cap), atol=1e-5
  )


@pytest.mark.parametrize(
  "funnel,strides",
  [
    ("start=2,stride=4,recover=none", [4]),
    ("start=0,recover=none+start=3,stride=3,recover=none", [2, 3]),
    ("start=0,recover=none+start=1,stop=3,stride=3", [2]),
  ],
)
def test_a_funnel_that_does_not_recover_encodes_alone(funnel, strides):
  model = Transformer(CONFIG, funnel, rngs=nnx.Rngs(0))
  length = 21
  for stage, stride in zip(model.stages, strides, strict=False):
    length = REDUCERS[stage.reduce](stage).length(length, causal=True)
    assert stage.stride == stride
  assert model.encode(_tokens(), causal=True).shape == (2, length, 32)
  with pytest.raises(ValueError, match="recover='none' .* a language model"):
    model(_tokens())


def _paths(model: Transformer, under=None) -> dict:
  """Parameters by path, those in `under` or all."""
  flat = nnx.to_flat_state(nnx.state(model))
  return {
    "/".join(map(str, path)): variable[...]
    for path, variable in flat
    if under in (None, path[0])
  }


def test_with_funnel_shares_parameters():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  funnelled = model.with_funnel(FUNNEL)
  assert funnelled.embedding[...] is model.embedding[...]
  assert [(s.start, s.stop) for s in funnelled.stages] == [(1, 4)]
  back = funnelled.with_funnel(None)
  np.testing.assert_array_equal(back(_tokens()), model(_tokens()))


def test_with_funnel_keeps_makes_and_drops_what_is_learned(capsys):
  """By the number of the stage; a line names what is fresh."""
  fresh = lambda n, name: f"funnel stage {n}: freshly initialised {name}\n"
  plain = Transformer(CONFIG, rngs=nnx.Rngs(0))
  plain.with_funnel(FUNNEL)
  assert capsys.readouterr().out == ""
  gated = plain.with_funnel("start=1,recover=gate")
  assert capsys.readouterr().out == fresh(0, "recovery/gate")
  gated.funnel[0].recovery.gate[...] += 3.0
  # The gate stays, whatever else of its stage changes.
  other = gated.with_funnel("start=2,stride=3,recover=gate,reduce=attention")
  assert capsys.readouterr().out == fresh(0, "reducer/pool_query")
  assert np.all(other.funnel[0].recovery.gate[...] == 3)
  assert np.all(other.funnel[0].reducer.pool_query[...] == 0)
  # It is a copy: models train apart.
  other.funnel[0].recovery.gate[...] += 1.0
  assert np.all(gated.funnel[0].recovery.gate[...] == 3)
  # A second stage has one of its own.
  two = gated.with_funnel("start=0,stop=2,recover=gate+start=3,recover=gate")
  assert capsys.readouterr().out == fresh(1, "recovery/gate")
  gates = _paths(two, "funnel")
  assert np.all(gates["funnel/0/recovery/gate"] == 3)
  assert np.all(gates["funnel/1/recovery/gate"] == 0)
  # What the funnel has no use for is gone, and is fresh when it comes back.
  dropped = two.with_funnel(FUNNEL)
  assert capsys.readouterr().out == ""
  assert _paths(dropped, "funnel") == {}
  again = dropped.with_funnel("start=1,recover=gate")
  assert capsys.readouterr().out == fresh(0, "recovery/gate")
  assert np.all(again.funnel[0].recovery.gate[...] == 0)


def test_with_funnel_makes_an_attention_that_adds_nothing(capsys):
  plain = Transformer(CONFIG, rngs=nnx.Rngs(0))
  attending = plain.with_funnel("start=1,stop=4,stride=3,recover=attend")
  (line,) = capsys.readouterr().out.splitlines()
  for name in ("query", "key", "value", "out"):
    assert f" recovery/attend/attn/{name}" in line
  parts = _paths(attending, "funnel")
  assert np.all(parts["funnel/0/recovery/attend/attn/out"] == 0)
  assert np.std(parts["funnel/0/recovery/attend/attn/key"]) > 0.1
  # And as a model made with that funnel does.
  made = Transformer(
    CONFIG, "start=1,stop=4,stride=3,recover=attend", rngs=nnx.Rngs(0)
  )
  assert set(_paths(made)) == set(_paths(attending))


@pytest.mark.parametrize(
  "learned,plain",
  [
    ("reduce=attention", "reduce=mean"),
    ("recover=gate", "recover=average"),
    ("recover=attend", "recover=average"),
  ],
)
def test_what_a_funnel_learns_starts_as_what_it_replaces(learned, plain):
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  got, want = (
    model.with_funnel(f"{FUNNEL},{rule}")(_tokens())
    for rule in (learned, plain)
  )
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_initialisation_is_fit_for_training():
  """Logits of about unit variance; no layer starts dead."""
  config = TransformerConfig.preset("quickstart", final_softcap=None)
  model = Transformer(config, rngs=nnx.Rngs(0))
  tokens = np.random.default_rng(0).integers(0, 4096, (2, 64))
  assert 0.7 < model(tokens).std() < 1.4
  for path, x in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
    name = jax.tree_util.keystr(path)
    assert (x.std() == 0) == ("scale" in name), name


@pytest.mark.parametrize("name", ["gemma2_27b", "gemma1_7b"])
def test_full_sizes_run_by_shape(name):
  config = TransformerConfig.preset(name)
  graphdef, params = nnx.split(Transformer.abstract(config, "start=3,stride=2"))
  tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  logits = jax.eval_shape(
    lambda p, t: nnx.merge(graphdef, p)(t), params, tokens
  )
  assert logits.shape == (1, 512, 256_000)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("funnel", [FUNNEL, NESTED, "start=0,recover=none"])
def test_the_parameters_do_not_depend_on_the_funnel(funnel):
  """Paths, shapes and, of one seed, values; `funnel/` comes besides."""
  make = lambda funnel: _paths(Transformer(CONFIG, funnel, rngs=nnx.Rngs(3)))
  plain, funnelled = make("off"), make(funnel)
  learned = {name for name in funnelled if name.startswith("funnel/")}
  assert set(funnelled) - learned == set(plain)
  assert bool(learned) == (funnel == NESTED)
  for name, value in plain.items():
    np.testing.assert_array_equal(funnelled[name], value, err_msg=name)


@pytest.mark.parametrize(
  "tokens,message",
  [
    (np.full((1, 4), 97), "token ids from 97 to 97: expected 0 to 96"),
    (np.full((1, 4), -1), "token ids from -1 to -1"),
    (np.zeros((1, 257), int), "257 tokens; model.max_length is 256"),
    (np.zeros((0, 4), int), r"shape \(0, 4\)"),
    (np.zeros(4, int), r"shape \(4,\): expected \[batch, length\]"),
    (np.zeros((1, 4)), "float64: expected integers"),
  ],
)
def test_bad_tokens(model, tokens, message):
  with pytest.raises(ValueError, match=message):
    model(tokens)
  with pytest.raises(ValueError, match=message):
    model.encode(tokens)


def test_it_is_exported_for_any_number_of_rows(model):
  """Of a fixed length: blocks of attention, and a funnel, divide it."""
  graphdef, params = nnx.split(model)
  rows = jax.export.symbolic_shape("rows")[0]
  exported = jax.export.export(
    jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
  )(params, jax.ShapeDtypeStruct((rows, 21), jnp.int32))
  for batch in (1, 3):
    tokens = jnp.asarray(_tokens(batch), jnp.int32)
    np.testing.assert_allclose(
      exported.call(params, tokens), model(tokens), rtol=1e-5, atol=1e-5
    )
