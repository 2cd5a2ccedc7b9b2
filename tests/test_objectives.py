"""Losses: against full logits, in value, gradient and memory."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from gemma_funnel.config import TransformerConfig
from gemma_funnel.data.tokenizer import BOS_ID, MASK_ID
from gemma_funnel.model import Transformer
from gemma_funnel.training import objectives

FUNNELS = (None, "start=1,stop=3,stride=2,recover=average")
# Total stride 4; all that a funnel can learn.
LEARNED = (
  "start=0,stride=2,recover=gate"
  "+start=1,stop=3,stride=2,pool=attention,recover=attend"
)


def _model(funnel=None, **changes):
  config = TransformerConfig.preset("tiny", kernel="reference", **changes)
  return Transformer(config, funnel, rngs=nnx.Rngs(0))


def _batch(length=24, packed=True, vocab=97):
  """Rows of three segments, and one row with padding within and at its end."""
  rng = np.random.default_rng(0)
  segment = np.ones((2, length), np.int32)
  if packed:
    segment[0] = np.repeat([1, 2, 3], [8, 4, length - 12])
    segment[1] = np.repeat([1, 0, 2, 0], [7, 1, length - 12, 4])
  position = np.zeros_like(segment)
  for row in range(2):
    for t in range(1, length):
      if segment[row, t] and segment[row, t] == segment[row, t - 1]:
        position[row, t] = position[row, t - 1] + 1
  tokens = rng.integers(5, vocab, segment.shape) * (segment > 0)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "segment": jnp.asarray(segment),
    "position": jnp.asarray(position),
  }


def _naive(model, batch):
  """The same sums, one predicted token after the other."""
  logits = np.asarray(
    model(batch["tokens"], batch["segment"], batch["position"]), np.float64
  )
  sums = dict.fromkeys(("nll", "square_log_z", "correct", "tokens"), 0.0)
  tokens, segment = np.asarray(batch["tokens"]), np.asarray(batch["segment"])
  for b, t in np.ndindex(tokens.shape):
    last = t + 1 == tokens.shape[1]
    if last or segment[b, t] == 0 or segment[b, t] != segment[b, t + 1]:
      continue
    row, target = logits[b, t], tokens[b, t + 1]
    log_z = np.log(np.sum(np.exp(row)))
    sums["nll"] += log_z - row[target]
    sums["square_log_z"] += log_z**2
    sums["correct"] += np.argmax(row) == target
    sums["tokens"] += 1.0
  return sums


@pytest.mark.parametrize("funnel", FUNNELS)
@pytest.mark.parametrize("packed", [True, False])
def test_sums_are_those_of_full_logits(funnel, packed):
  model, batch = _model(funnel), _batch(packed=packed)
  expected = _naive(model, batch)
  assert expected["tokens"] == (21 + 6 + 11 if packed else 46)
  for chunk in (7, 8, 100):
    sums = objectives.next_token_sums(model, **_named(batch), chunk=chunk)
    for name, value in expected.items():
      np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


def _named(batch):
  return {f"{name}_BT": value for name, value in batch.items()}


@pytest.mark.parametrize("funnel", [FUNNELS[1], LEARNED])
def test_gradients_are_those_of_full_logits(funnel):
  model = _model(funnel)
  if funnel == LEARNED:  # Zeros keep gradients from what is behind them.
    out = model.funnel[1].recovery.attend.attn.out
    out[...] = jnp.full(out.shape, 0.1) * jnp.sign(model.layers.attn.out[0])
  graphdef, params = nnx.split(model)
  batch, z_loss, chunk = _batch(), 0.3, 7  # 7 does not divide 24.

  def naive(params):
    model = nnx.merge(graphdef, params)
    logits = model(batch["tokens"], batch["segment"], batch["position"])
    log_p = jax.nn.log_softmax(logits[:, :-1])
    target = batch["tokens"][:, 1:, None]
    nll = -jnp.take_along_axis(log_p, target, axis=-1)[..., 0]
    log_z = jax.nn.logsumexp(logits[:, :-1], axis=-1)
    segment = batch["segment"]
    weight = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    loss = nll + z_loss * log_z**2
    return jnp.sum(loss * weight) / jnp.sum(weight)

  def chunked(params):
    model = nnx.merge(graphdef, params)
    return objectives.next_token(model, batch, chunk=chunk, z_loss=z_loss)[0]

  value, grads = jax.jit(jax.value_and_grad(chunked))(params)
  expected_value, expected = jax.jit(jax.value_and_grad(naive))(params)
  np.testing.assert_allclose(value, expected_value, rtol=1e-6)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    want = _at(expected, path)
    assert jnp.any(want != 0), path
    np.testing.assert_allclose(
      grad, want, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path)
    )


def _at(tree, path):
  return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


def test_targets_of_padding_do_not_matter():
  model, batch = _model(FUNNELS[1]), _batch()
  # Whatever is predicted across a boundary, or by padding, counts for nothing.
  tokens = batch["tokens"].at[1, -4:].set(50).at[1, 7].set(50)
  other = {**batch, "tokens": tokens}
  first, second = (
    objectives.next_token(model, b, chunk=8, z_loss=0.1)[0]
    for b in (batch, other)
  )
  assert first == second


def test_a_batch_of_padding_has_no_loss():
  batch = {k: jnp.zeros((2, 24), jnp.int32) for k in _batch()}
  loss, metrics = objectives.next_token(_model(), batch, chunk=8, z_loss=0.1)
  assert loss == 0 and metrics["tokens"] == 0


def test_uniform_logits_have_closed_forms():
  # No final scale: logits are 0, so log Z = log V for every token.
  model = _model(final_softcap=None)
  model.final_norm.scale[...] = -jnp.ones_like(model.final_norm.scale[...])
  loss, metrics = objectives.next_token(model, _batch(), chunk=8, z_loss=0.25)
  log_v = math.log(97)
  np.testing.assert_allclose(metrics["loss"], log_v, rtol=1e-6)
  np.testing.assert_allclose(loss, log_v + 0.25 * log_v**2, rtol=1e-6)
  assert metrics["tokens"] == 38


def _avals(jaxpr):
  """Shapes of all that a program makes, those of inner programs too."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _avals(inner)


def _elements_by_vocab(function, *args, vocab):
  """Most elements of any array with a dimension of the vocabulary's size."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return max(math.prod(shape) for shape in _avals(jaxpr) if vocab in shape)


def test_full_logits_never_exist():
  vocab, length, chunk = 10_007, 48, 4
  graphdef, params = nnx.split(
    _model("start=1,stride=2", vocab_size=vocab, embed_dim=8, num_layers=2)
  )
  batch = _batch(length, packed=False, vocab=vocab)

  def chunked(params):
    model = nnx.merge(graphdef, params)
    return objectives.next_token(model, batch, chunk=chunk, z_loss=1e-4)[0]

  def whole(params):
    return jnp.sum(nnx.merge(graphdef, params)(batch["tokens"]))

  full = 2 * length * vocab
  measure = lambda f: _elements_by_vocab(jax.grad(f), params, vocab=vocab)
  assert measure(whole) >= full  # The search finds them where they are.
  assert measure(chunked) == 2 * chunk * vocab

  # And in bytes: what the compiled gradient needs grows by no logits.
  def temporaries(function):
    compiled = jax.jit(jax.grad(function)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(whole) > 4 * full
  assert temporaries(chunked) < 4 * full


VOCAB = 97


def test_what_is_masked():
  shape, rate = (400, 60), 0.2
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, VOCAB, shape)
  tokens[:, 0] = tokens[:, 30] = BOS_ID
  segment = np.ones(shape, np.int32)
  segment[:, 30:] = 2
  segment[:, 50:] = 0  # Whose tokens are not all 0.
  shown, weight = map(
    np.asarray,
    objectives.mask(
      jnp.asarray(tokens, jnp.int32),
      jnp.asarray(segment),
      jax.random.key(0),
      rate,
      VOCAB,
    ),
  )
  chosen = weight == 1
  may = (segment > 0) & (tokens != BOS_ID)
  assert np.all(may[chosen]) and set(np.unique(weight)) == {0, 1}
  assert weight.dtype == np.float32
  np.testing.assert_array_equal(shown[~chosen], tokens[~chosen])
  near = lambda share, expected, n: (
    abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
  )
  assert near(chosen[may].mean(), rate, may.sum())
  count = chosen.sum()
  masked = shown[chosen] == MASK_ID
  assert near(masked.mean(), 0.8, count)
  stay = shown[chosen] == tokens[chosen]
  # A random token is now and then the same.
  assert near(stay.mean(), 0.1 + 0.1 / (VOCAB - 5), count)
  drawn = shown[chosen][~masked & ~stay]
  assert near(len(drawn) / count, 0.1 - 0.1 / (VOCAB - 5), count)
  assert drawn.min() == MASK_ID + 1 and drawn.max() == VOCAB - 1
  assert len(np.unique(drawn)) > 85
  other, _ = objectives.mask(
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(segment),
    jax.random.key(1),
    rate,
    VOCAB,
  )
  assert np.any(other != shown)


@pytest.mark.parametrize("funnel", FUNNELS)
def test_masked_tokens_are_those_of_full_logits(funnel):
  model, batch, key = _model(funnel), _batch(), jax.random.key(3)
  shown, weight = objectives.mask(
    batch["tokens"], batch["segment"], key, 0.4, VOCAB
  )
  logits = np.asarray(
    model(shown, batch["segment"], batch["position"], causal=False), np.float64
  )
  log_z = np.log(np.sum(np.exp(logits), axis=-1))
  target, weight = np.asarray(batch["tokens"]), np.asarray(weight)
  own = np.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  count = weight.sum()
  assert 10 < count < 30
  nll = ((log_z - own) * weight).sum() / count
  hits = ((logits.argmax(-1) == target) * weight).sum() / count
  for chunk in (1, 7, 100):
    loss, metrics = objectives.masked_tokens(
      model, batch, key, rate=0.4, chunk=chunk, z_loss=0.1
    )
    square = (log_z**2 * weight).sum() / count
    np.testing.assert_allclose(loss, nll + 0.1 * square, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], hits, rtol=1e-5)
    assert metrics["tokens"] == count


TERMS = dict(temperature=2.0, logits=0.7, hidden=0.3, tokens=0.2)


def _direct(student, teacher, batch, terms):
  """The distillation's loss and terms, of full logits in float64."""
  inputs = batch["tokens"], batch["segment"], batch["position"]
  wide = lambda x: np.asarray(x, np.float64)
  log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  segment = np.asarray(batch["segment"])
  weight = np.zeros(segment.shape)
  weight[:, :-1] = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
  own, theirs = wide(student(*inputs)), wide(teacher(*inputs))
  t = terms["temperature"]
  log_p, log_q = log_softmax(theirs / t), log_softmax(own / t)
  mean = lambda x: (x * weight).sum() / weight.sum()
  kl = mean((np.exp(log_p) * (log_p - log_q)).sum(-1))

  def normal(model):
    h = wide(model.encode(*inputs, causal=True))
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + model.config.norm_eps)

  hidden = mean(((normal(student) - normal(teacher)) ** 2).mean(-1))
  target = np.roll(np.asarray(batch["tokens"]), -1, axis=1)[..., None]
  nll = mean(-np.take_along_axis(log_softmax(own), target, -1)[..., 0])
  total = terms["logits"] * t**2 * kl + terms["hidden"] * hidden
  return total + terms["tokens"] * nll, {
    "kl": kl,
    "hidden": hidden,
    "loss": nll,
  }


def test_distillation_is_that_of_full_logits():
  teacher, batch = _model(), _batch()
  student = teacher.with_funnel(FUNNELS[1])
  expected, parts = _direct(student, teacher, batch, TERMS)
  assert parts["kl"] > 1e-3 and parts["hidden"] > 1e-2
  for chunk in (1, 7, 100):
    loss, metrics = objectives.distill(
      student, teacher, batch, chunk=chunk, **TERMS
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name, value in parts.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4)


def test_an_untied_head_has_the_loss_and_the_gradient():
  model, teacher, batch = _model(tied=False), _model(tied=False), _batch()
  expected = _naive(model, batch)
  (graphdef, params), key = nnx.split(model), jax.random.key(0)

  def next_token(model):
    return objectives.next_token(model, batch, chunk=7)[0]

  np.testing.assert_allclose(
    next_token(model), expected["nll"] / expected["tokens"], rtol=1e-5
  )
  want = _direct(model, teacher, batch, TERMS)[0]
  distill = lambda m: objectives.distill(m, teacher, batch, chunk=7, **TERMS)[0]
  np.testing.assert_allclose(distill(model), want, rtol=1e-4)
  masked = lambda m: objectives.masked_tokens(m, batch, key, rate=0.5, chunk=7)[
    0
  ]
  for loss in (next_token, distill, masked):
    grads = jax.grad(lambda p: loss(nnx.merge(graphdef, p)))(params)
    assert jnp.any(grads["unembedding"][...] != 0)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
  model, batch = _model(), _batch()
  terms = TERMS | {"tokens": 0.0}
  loss, metrics = objectives.distill(model, model, batch, chunk=8, **terms)
  assert abs(loss) < 1e-6 and metrics["loss"] > 1


def test_no_gradient_enters_the_teacher():
  teacher, batch = _model(num_layers=2), _batch()
  student = teacher.with_funnel("start=1,stride=2")
  (own_def, own), (def_, params) = nnx.split(student), nnx.split(teacher)

  def loss(own, params):
    return objectives.distill(
      nnx.merge(own_def, own), nnx.merge(def_, params), batch, chunk=9, **TERMS
    )[0]

  of_own, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(own, params)
  assert all(np.any(g) for g in jax.tree.leaves(of_own))
  assert not any(np.any(g) for g in jax.tree.leaves(of_teacher))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("class_weights", [None, (0.5, 3.0, 1.0)])
def test_classes_cost_what_scikit_learn_says(class_weights, per_token):
  rng = np.random.default_rng(0)
  shape = (6, 5) if per_token else (30,)
  outputs = rng.normal(size=(*shape, 3)).astype(np.float32)
  label = rng.integers(0, 3, shape).astype(np.int32)
  weight = (rng.random(shape) < 0.7).astype(np.float32)
  weight_C = class_weights and jnp.asarray(class_weights)
  batch = {"label": jnp.asarray(label), "weight": jnp.asarray(weight)}
  loss, metrics = objectives.labelled(jnp.asarray(outputs), batch, weight_C)
  real = weight == 1
  wide = outputs[real].astype(np.float64)
  share = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
  expected = sklearn.metrics.log_loss(
    label[real],
    share,
    labels=[0, 1, 2],
    sample_weight=class_weights and np.asarray(class_weights)[label[real]],
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert metrics["loss"] == loss
  hits = (wide.argmax(-1) == label[real]).mean()
  np.testing.assert_allclose(metrics["accuracy"], hits, rtol=1e-6)
  # What has no weight counts for nothing.
  outputs[~real], label[~real] = 100.0, 0
  batch["label"] = jnp.asarray(label)
  other, _ = objectives.labelled(jnp.asarray(outputs), batch, weight_C)
  np.testing.assert_allclose(other, loss, rtol=1e-6)


def test_numbers_cost_their_squared_error():
  batch = {
    "label": jnp.asarray([1.0, 2.5, 9.0]),
    "weight": jnp.asarray([1.0, 1.0, 0.0]),
  }
  outputs = jnp.asarray([[2.0], [0.5], [3.0]])
  loss, metrics = objectives.labelled(outputs, batch, None)
  assert loss == (1 + 4) / 2 and set(metrics) == {"loss", "weight"}


def test_nothing_with_a_weight_costs_nothing():
  for label in (jnp.zeros(3), jnp.zeros(3, jnp.int32)):
    batch = {"label": label, "weight": jnp.zeros(3)}
    assert objectives.labelled(jnp.ones((3, 2)), batch, None)[0] == 0


@pytest.mark.parametrize(
  "loss",
  [
    lambda m: objectives.next_token(m, _batch(), chunk=8),
    lambda m: objectives.masked_tokens(
      m, _batch(), jax.random.key(0), rate=0.2, chunk=8
    ),
    lambda m: objectives.distill(m, _model(), _batch(), chunk=8, **TERMS),
  ],
  ids=["next_token", "masked", "distill"],
)
@pytest.mark.parametrize(
  "funnel, text",
  [
    ("start=1,recover=none", "recover='none'.*predicting.*tokens"),
    ("start=1,reduce=context", "reduce='context'.*predicting.*trains=False"),
  ],
)
def test_a_funnel_without_a_loss_at_every_token_is_refused(loss, funnel, text):
  with pytest.raises(ValueError, match=text):
    loss(_model(funnel))
