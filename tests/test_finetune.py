"""Fine-tuning: it learns, stops, resumes, and gives back its best weights."""

import os
import pathlib
import random

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert
from gemma_funnel.config import TransformerConfig, format_funnel
from gemma_funnel.data import sources
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.tasks.task import TaggedExample, Task, TextExample
from gemma_funnel.training import finetune, init_state, trainer

WORDS = ("apple", "house", "river", "stone", "cloud", "tiger", "chair", "paper")
QUICK = dict(
  vocab_size=320,
  num_layers=2,
  attention_pattern=("global",),
  kernel="reference",
  attn_softcap=50.0,
)
MAKE_MESH = sharding.make_mesh


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  """Programs for eight take long to compile; test_trainer.py has those."""
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """In which each of the words is one or two tokens."""
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  draw = random.Random(0)
  text = lambda: " ".join(draw.choices(WORDS, k=60))
  documents = [sources.Document(str(i), text()) for i in range(40)]
  tokenizer_lib.train(documents, 300, path)
  return str(path)


def _sentence(draw, count=4):
  return draw.choices(WORDS, k=count)


def _classified(draw):
  words = _sentence(draw)
  label = draw.randrange(2)
  words = [w for w in words if w not in WORDS[:2]]
  words.insert(draw.randrange(len(words) + 1), WORDS[label])
  return TextExample(" ".join(words), None, label)


def _pair(draw):
  words, label = _sentence(draw, 2), draw.randrange(2)
  second = [w for w in _sentence(draw, 2) if w != "tiger"]
  second += ["tiger"] * label
  return TextExample(" ".join(words), " ".join(second), label)


def _number(draw):
  words = _sentence(draw, 5)
  return TextExample(" ".join(words), None, 5.0 + words.count("river"))


def _tagged(draw):
  words = tuple(_sentence(draw))
  return TaggedExample(words, tuple(int(w in WORDS[:3]) for w in words))


KINDS = {
  "classification": (_classified, ("no", "yes"), ("accuracy",)),
  "pair": (_pair, ("no", "yes"), ("accuracy",)),
  "regression": (_number, (), ("pearson", "spearman")),
  "tagging": (_tagged, ("O", "THING"), ("token_accuracy",)),
}


def _task(kind, sizes=(96, 24, 24), seed=0):
  make, labels, metrics = KINDS[kind]
  draw = random.Random(seed)
  splits = {
    split: [make(draw) for _ in range(size)]
    for split, size in zip(("train", "dev", "test"), sizes, strict=True)
  }
  if kind == "pair":
    kind = "classification"
  return Task("made", kind, labels, metrics, splits)


def _config(workdir, tokenizer, **changes):
  config = tiny_run.load_config("finetune")
  config.model = TransformerConfig.preset("tiny", **QUICK).to_dict()
  config.update(
    workdir=str(workdir),
    tokenizer=tokenizer,
    funnel="off",
    length=32,
    batch_size=16,
    epochs=6.0,
    log_every=1000,
    tensorboard=False,
  )
  with config.unlocked():
    config.seed = 0
  config.optimizer.update(learning_rate=1e-2, warmup_steps=4)
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in changes.items()}
  )
  return config


def _setup(workdir, tokenizer, kind="classification", task=None, **changes):
  return finetune.resolve(
    _config(workdir, tokenizer, **changes), task or _task(kind)
  )


def _state(module):
  return jax.device_get(nnx.to_pure_dict(nnx.state(module)))


def _same(module, other):
  jax.tree.map(np.testing.assert_array_equal, _state(module), _state(other))


FUNNEL = "start=1,stride=2"


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, funnel",
  [
    ("classification", "start=1,stride=2,recover=none"),
    ("pair", "off"),
    ("regression", FUNNEL),
    ("tagging", FUNNEL),
  ],
)
def test_what_can_be_learned_is(kind, funnel, tokenizer, tmp_path):
  task = _task(kind, (160, 24, 40))
  setup = _setup(tmp_path / "run", tokenizer, task=task, funnel=funnel)
  result = trainer.train(setup)
  assert result.finished and result.steps == setup.steps == 60
  sizes = dict(batch_size=16, length=32)
  found = finetune.measure(
    result.model, task, "test", setup.task.rows["test"], **sizes
  )
  assert found.keys() == set(task.metrics)
  assert found[task.metrics[0]] > (0.5 if kind == "regression" else 0.9)
  # And it can be read back.
  encoder, labels, config = finetune.load(tmp_path / "run")
  assert labels == task.labels and config.task == setup.config.task
  assert format_funnel(encoder.model.stages) == format_funnel(setup.stages)
  _same(encoder, result.model)
  again = finetune.predict(
    encoder, task, "test", setup.task.rows["test"], **sizes
  )
  assert len(again) == 40
  if kind == "tagging":
    assert {len(tags) for tags in again} == {4}


@pytest.fixture
def scripted(monkeypatch):
  """Makes development results up; notes what weights they were of."""

  def script(values):
    seen, left = [], iter(values)

    def measure(encoder, task, split, rows, **_):
      assert split == "dev"
      seen.append(_state(encoder))
      return {task.metrics[0]: next(left)}

    monkeypatch.setattr(finetune, "measure", measure)
    return seen

  return script


def test_patience_ends_early_and_the_best_weights_are_kept(
  scripted, tokenizer, tmp_path
):
  seen = scripted([0.1, 0.7, 0.7, 0.4, 0.9])
  setup = _setup(tmp_path / "run", tokenizer, patience=2, eval_every=2)
  result = trainer.train(setup)
  # Not better is no better, and 0.7 as it is kept, in float32, is 0.7.
  assert result.finished and result.steps == 8 and len(seen) == 4
  _assert_is(result.model, seen[1])
  assert np.any(seen[3]["head"]["out"] != seen[1]["head"]["out"])
  _assert_is(finetune.load(tmp_path / "run")[0], seen[1])
  # The same call again trains nothing.
  again = trainer.train(setup)
  assert again.finished and len(seen) == 4
  _assert_is(again.model, seen[1])
  # Nor does one of other labels change what the run says of itself.
  path = tmp_path / "run" / "head.json"
  path.write_text(
    path.read_text().replace('"labels": [', '"labels": ["more", ')
  )
  before = path.read_bytes()
  with pytest.raises(ValueError, match="was trained on other labels"):
    trainer.train(setup)
  assert path.read_bytes() == before


def _assert_is(encoder, state):
  jax.tree.map(np.testing.assert_array_equal, _state(encoder), state)


def test_without_patience_the_best_weights_are_kept_too(
  scripted, tokenizer, tmp_path
):
  seen = scripted([0.3, None, 0.1])
  setup = _setup(tmp_path / "run", tokenizer, eval_every=2, epochs=1.0)
  result = trainer.train(setup)
  assert result.steps == setup.steps == 6 and len(seen) == 3
  _assert_is(result.model, seen[0])


def test_a_metric_that_is_undefined_ends_nothing(scripted, tokenizer, tmp_path):
  seen = scripted([None, float("nan"), None])
  setup = _setup(tmp_path / "a", tokenizer, eval_every=2, epochs=1.0)
  result = trainer.train(setup)
  assert result.finished and len(seen) == 3
  _assert_is(result.model, seen[2])  # The newest, as none is the best.
  seen = scripted([None, None, 0.2])
  setup = _setup(tmp_path / "b", tokenizer, eval_every=2, patience=2)
  assert trainer.train(setup).steps == 4 and len(seen) == 2


def test_predictions_that_are_all_equal_have_no_correlation(
  tokenizer, tmp_path
):
  setup = _setup(tmp_path / "run", tokenizer, "regression")
  params = init_state.make_init(setup)[0]().params
  labels = [e.label for e in setup.task.task.splits["train"]]
  np.testing.assert_allclose(params["head"]["bias"], [np.mean(labels)])
  encoder = finetune.Encoder(
    Transformer(setup.model_config, None, rngs=nnx.Rngs(0)),
    finetune.Head(32, setup.task.head, rngs=nnx.Rngs(0)),
  )
  rows = setup.task.rows["dev"]
  found = finetune.measure(
    encoder, setup.task.task, "dev", rows, batch_size=16, length=32
  )
  assert found == {"pearson": None, "spearman": None}


@pytest.mark.slow
def test_an_interrupted_run_is_the_uninterrupted_one(
  tokenizer, tmp_path, monkeypatch
):
  # Results go down after the first evaluations: the best are not the last.
  changes = dict(eval_every=3, epochs=2.0, head__dropout=0.3)
  task = _task("classification", (96, 25, 24))
  measure = finetune.measure

  def worse_and_worse(encoder, *args, **kwargs):
    found = measure(encoder, *args, **kwargs)
    bias = float(np.sum(np.abs(encoder.head.bias[...])))
    return {"accuracy": found["accuracy"] / 100 - bias}

  monkeypatch.setattr(finetune, "measure", worse_and_worse)
  train = lambda name: trainer.train(
    _setup(tmp_path / name, tokenizer, task=task, **changes)
  )
  whole = train("whole")
  put, count = trainer.sharding.put_batch, []

  def fail(*args):
    count.append(1)
    if len(count) == 9:
      raise RuntimeError("the power fails")
    return put(*args)

  monkeypatch.setattr(trainer.sharding, "put_batch", fail)
  with pytest.raises(RuntimeError, match="the power fails"):
    train("cut")
  cut = train("cut")
  assert cut.steps == whole.steps == 12
  assert len(count) == 9 + 6  # From step 6 on.
  _same(cut.model, whole.model)
  _same(finetune.load(tmp_path / "cut")[0], whole.model)
  cut, whole = (tiny_run.metrics(tmp_path / name) for name in ("cut", "whole"))
  assert cut == whole and cut.count("heldout") == 4


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
  """A run of text, of other sizes than the configuration's, and a funnel."""
  folder = tmp_path_factory.mktemp("base")
  source = tiny_run.write_corpus(folder)
  config = tiny_run.make_config(
    folder / "run",
    source,
    steps=3,
    model__attention_pattern=("global",),
    funnel=FUNNEL,
    data__tokenizer=tokenizer,
    model__mlp_dim=40,
  )
  tiny_run.train(config, lambda *_: lambda model: {"loss": 0.0})
  return config.workdir


def test_a_fine_tuned_run_has_the_sizes_of_what_it_started_from(base, tmp_path):
  config = _config(tmp_path / "run", None, init_from=base, epochs=1.0)
  config.tokenizer = config.funnel = None
  setup = finetune.resolve(config, _task("classification"))
  there = convert.describe(base)
  assert setup.model_config.mlp_dim == 40 and config.model.mlp_dim == 48
  assert setup.config.tokenizer == there.tokenizer_path
  assert setup.config.funnel == format_funnel(there.stages)
  params = init_state.make_init(setup)[0]().params
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(params["params"]),
    _state(convert.load(base)),
  )
  result = trainer.train(setup)
  found = convert.describe(tmp_path / "run")
  assert found.is_run and found.config == setup.model_config
  assert found.stages == there.stages
  # A copy: the run does not depend on where it came from.
  assert found.tokenizer_path == str(tmp_path / "run" / "tokenizer.model")
  read = lambda x: pathlib.Path(x.tokenizer_path).read_bytes()
  assert read(found) == read(there)
  _same(convert.load(tmp_path / "run"), result.model.model)
  other, _, _ = finetune.load(tmp_path / "run", "off")
  assert other.model.stages == ()
  _same(other.head, result.model.head)


def test_causal_is_what_it_is_trained_with(tokenizer, tmp_path):
  losses = []
  for causal in (False, True):
    setup = _setup(tmp_path / "unused", tokenizer, causal=causal)
    params = init_state.make_init(setup)[0]().params
    params["head"]["out"] = jnp.ones((32, 2)) * jnp.asarray([[0.1, -0.1]])
    batch = finetune.encode.batch(setup.task.rows["train"][:4], 4, 32)
    loss = jax.jit(setup.task.make_loss(setup), static_argnums=0)
    losses.append(loss((), params, None, batch, None)[0])
  assert abs(losses[0] - losses[1]) > 1e-5


def test_balanced_weights_give_classes_the_same_sum(tokenizer, tmp_path):
  task = _task("classification")
  train = [TextExample("apple", None, int(i < 12)) for i in range(48)]
  task = Task(
    task.name,
    task.kind,
    task.labels,
    task.metrics,
    {**task.splits, "train": train},
  )
  setup = lambda wanted: _setup(
    tmp_path, tokenizer, task=task, class_weights=wanted
  )
  np.testing.assert_allclose(setup("balanced").task.class_weights, [2 / 3, 2.0])
  assert setup("none").task.class_weights is None
  tagged = _setup(tmp_path, tokenizer, "tagging", class_weights="balanced")
  tags = np.concatenate([e.tags for e in tagged.task.task.splits["train"]])
  sums = np.bincount(tags) * tagged.task.class_weights
  np.testing.assert_allclose(sums, [len(tags) / 2] * 2)
  assert setup("1, 2.5").task.class_weights == (1.0, 2.5)


def test_steps_are_epochs(tokenizer, tmp_path):
  setup = lambda **changes: _setup(
    tmp_path, tokenizer, optimizer__warmup_steps=0, **changes
  )
  found = setup(epochs=2.5)
  assert found.steps == 15 and found.config.eval_every == 6
  assert setup(epochs=0.01).steps == 1 == setup(epochs=0.01).config.eval_every
  assert setup(epochs=0.5, eval_every=2).config.checkpoint_every == 2


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      {"tokenizer": None},
      "tokenizer is missing: expected its path, or init_fr",
    ),
    ({"tokenizer": "nowhere.model"}, "nowhere.model"),
    ({"epochs": 0.0}, "epochs=0.0: expected a number > 0"),
    ({"epochs": float("nan")}, "epochs=nan"),
    ({"length": 300}, "length=300 is beyond model.max_length=256"),
    ({"length": 3}, "length=3: expected .* >= 4"),
    ({"long": "cut"}, "long='cut': expected one of"),
    ({"patience": 0}, "patience=0: expected an integer >= 1"),
    ({"eval_every": 0}, "eval_every=0: expected an integer >= 1"),
    ({"class_weights": "equal"}, "class_weights='equal': .* 2 labels of made"),
    ({"head.pool": "sum"}, "head.pool='sum'"),
    ({"model.vocab_size": 200}, "tokenizer.model has 300 pieces, .* 200"),
    ({"funnel": "start=7"}, "funnel.start=7"),
    ({"init_from": "nowhere"}, "init_from='nowhere' is not there"),
    *(
      ({"class_weights": weights}, f"class_weights='{weights}'.* 2 labels")
      for weights in ("1", "1,-1", "0,0", "1,nan", "1,inf")
    ),
    (
      {"kind": "regression", "class_weights": "balanced"},
      "expected 'none', made is a regression",
    ),
    (
      {"kind": "tagging", "funnel": "start=1,recover=none"},
      "recover='none'.*every token",
    ),
  ],
  ids=str,
)
def test_a_configuration_that_cannot_be(changes, text, tokenizer, tmp_path):
  kind = changes.get("kind", "classification")
  config = _config(tmp_path, tokenizer)
  config.update_from_flattened_dict(
    {key: value for key, value in changes.items() if key != "kind"}
  )
  with pytest.raises(ValueError, match=text):
    finetune.resolve(config, _task(kind))


def test_batches_lie_on_the_mesh(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", MAKE_MESH)
  with pytest.raises(ValueError, match="batch_size=12 must be a multiple of 8"):
    _setup(tmp_path, tokenizer, batch_size=12)


def test_a_task_of_another_kind(tokenizer, tmp_path):
  task = Task("pairs", "choice", (), ("accuracy",), {"test": ()})
  with pytest.raises(ValueError, match="pairs is of kind 'choice'.*eval.py"):
    _setup(tmp_path, tokenizer, task=task)
  task = _task("classification", (8, 0, 8))
  with pytest.raises(ValueError, match="made has no dev examples"):
    _setup(tmp_path, tokenizer, task=task)


def test_a_run_that_was_not_fine_tuned(base, tmp_path):
  with pytest.raises(ValueError, match="is no fine-tuned run: head.json"):
    finetune.load(base)
  for text in ("{", "[]", '{"head": {"outputs": 2, "size": 3}, "labels": []}'):
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(ValueError, match="is no fine-tuned run"):
      finetune.load(tmp_path)
  assert os.listdir(tmp_path) == ["head.json"]
