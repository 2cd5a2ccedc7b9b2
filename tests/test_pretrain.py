"""Training on text: its objectives, what it starts from, sampled funnels."""

import collections
import json
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert
from gemma_funnel.config import TransformerConfig, format_funnel
from gemma_funnel.data import pipeline
from gemma_funnel.funnel import check_segments
from gemma_funnel.training import init_state, objectives, pretrain, trainer

# Quick to compile: one kind of layer.
QUICK = {"model__attention_pattern": ("global",), "checkpoint_every": 1000}


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  """Programs for eight take long to compile; test_trainer.py has those."""
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


def _config(workdir, source, **changes):
  return tiny_run.make_config(workdir, source, **(QUICK | changes))


def _train(workdir, source, **changes):
  return tiny_run.train(_config(workdir, source, **changes))


def _params(model):
  return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


def _same(params, others):
  jax.tree.map(np.testing.assert_array_equal, params, others)


def _metrics(workdir, name):
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  lines = map(json.loads, text.splitlines())
  return [x[name] for x in lines if x["kind"] == "train"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(source, tmp_path_factory):
  """A run without a funnel, of other sizes than `tiny_run`'s."""
  folder = str(tmp_path_factory.mktemp("base") / "run")
  changes = dict(funnel="off", steps=25, model__mlp_dim=48)
  _train(folder, source, **changes)
  return folder


def test_masked_tokens_are_learned(source, tmp_path, monkeypatch):
  batches, made = [], pipeline.train_iterator

  def spy(*args, **kwargs):
    iterator = made(*args, **kwargs)
    other = made(*args, **kwargs)
    batches.extend(next(other) for _ in range(3))
    other.close()
    return iterator

  monkeypatch.setattr(pipeline, "train_iterator", spy)
  funnel = "start=1,stride=2,keep_first=true"
  _train(
    tmp_path / "run",
    source,
    objective="masked",
    funnel=funnel,
    steps=30,
    mask_rate=0.3,
    log_every=100,
  )
  losses = _metrics(tmp_path / "run", "loss")
  assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.5
  # Some of the batch's 256 slots are padding; of the rest, three in ten.
  assert 50 < np.mean(_metrics(tmp_path / "run", "tokens")) < 80
  # What is packed has room for first tokens that are kept apart.
  stages = convert.load_run(tmp_path / "run").model.stages
  gap = 2
  assert len(batches) == 3
  for batch in batches:
    check_segments(batch["segment"], stages, causal=False)
    assert not batch["segment"][:, -gap:].any()


def test_a_gap_is_there_only_where_it_is_needed():
  gap = lambda **changes: (
    pretrain.resolve(
      tiny_run.make_config("unused", "unused", **changes)
    ).segment_padding
  )
  kept = "start=1,stride=4,keep_first=true"
  assert gap(objective="masked", funnel=kept) == 4
  assert gap(funnel=kept) == 0
  assert gap(objective="masked") == 0
  assert gap(objective="masked", funnel="off", funnel_sampled=(kept,)) == 4


def test_a_checkpoint_brings_its_sizes_and_tokenizer(base, source, tmp_path):
  config = _config(tmp_path / "run", source, init_from=base)
  setup = pretrain.resolve(config)
  there = convert.load_run(base)
  assert setup.model_config.mlp_dim == 48 == setup.config.model.mlp_dim
  assert config.model.mlp_dim == 64  # What was given is left as it is.
  assert setup.model_config == there.model.config
  assert setup.task.data.tokenizer == there.tokenizer_path
  init, abstract = init_state.make_init(setup)
  params = init().params
  _same(jax.device_get(params["params"]), _params(there.model))
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(params) == shapes(abstract.params)


def test_how_it_is_run_is_not_the_checkpoints(base, source, tmp_path):
  setup = pretrain.resolve(
    _config(
      tmp_path / "run",
      source,
      init_from=base,
      model__remat="block",
      model__dtype="bfloat16",
    )
  )
  found = setup.model_config
  assert (found.remat, found.dtype, found.mlp_dim) == ("block", "bfloat16", 48)


@pytest.mark.slow
def test_distilling_makes_the_student_agree(
  base, source, tmp_path, monkeypatch
):
  read, load_frozen = [], init_state.load_frozen
  monkeypatch.setattr(
    init_state,
    "load_frozen",
    lambda spec: read.append(load_frozen(spec)) or read[-1],
  )
  workdir = str(tmp_path / "run")
  result = _train(
    workdir,
    source,
    objective="distill",
    init_from=base,
    steps=40,
    distill__temperature=1.5,
    optimizer__learning_rate=1e-2,
    funnel="start=1,stride=2,recover=gate",
  )
  kl = _metrics(workdir, "kl")
  assert np.mean(kl[-4:]) < 0.6 * np.mean(kl[:3])
  teacher = _params(convert.load_run(base).model)
  (frozen_params,) = read
  _same(jax.device_get(frozen_params["teacher"]), teacher)
  student = _params(result.model)
  assert np.any(student["embedding"] != teacher["embedding"])
  # The gate is the student's alone; it has learned.
  assert "funnel" not in teacher or not teacher["funnel"]
  assert np.any(student["funnel"][0]["recovery"]["gate"])
  assert convert.describe(workdir).stages[0].recover == "gate"


@pytest.mark.slow
def test_a_run_from_a_checkpoint_resumes_exactly(
  base, source, tmp_path, monkeypatch
):
  changes = dict(init_from=base, steps=10, checkpoint_every=4)
  whole = _train(tmp_path / "whole", source, **changes)
  put, count = trainer.sharding.put_batch, []

  def fail(*args):
    count.append(1)
    if len(count) == 7:
      raise RuntimeError("the power fails")
    return put(*args)

  monkeypatch.setattr(trainer.sharding, "put_batch", fail)
  with pytest.raises(RuntimeError, match="the power fails"):
    _train(tmp_path / "cut", source, **changes)
  cut = _train(tmp_path / "cut", source, **changes)
  assert len(count) == 7 + 6  # From the checkpoint of step 4 on.
  _same(_params(cut.model), _params(whole.model))
  losses = [_metrics(tmp_path / name, "loss") for name in ("cut", "whole")]
  assert losses[0] == losses[1] and len(losses[0]) == 10
  start = _params(convert.load_run(base).model)
  assert np.any(_params(whole.model)["embedding"] != start["embedding"])


SAMPLED = ("off", "start=1,stride=2", "start=0,stride=4")


def _count_traces(monkeypatch):
  traced, loss = collections.Counter(), objectives.next_token

  def count(model, *args, **kwargs):
    traced[format_funnel(model.stages)] += 1
    return loss(model, *args, **kwargs)

  monkeypatch.setattr(objectives, "next_token", count)
  return traced


@pytest.mark.slow
def test_a_sampled_run_serves_all_its_members(source, tmp_path, monkeypatch):
  traced = _count_traces(monkeypatch)
  config = _config(
    tmp_path / "run",
    source,
    funnel=SAMPLED[1],
    funnel_from=3,
    funnel_sampled=SAMPLED[1:],
    steps=14,
  )
  members = pretrain.resolve(config).funnels.variants
  tiny_run.train(config)
  assert traced == {format_funnel(m): 1 for m in members} and len(members) == 3
  assert next(iter(traced)) == "off"  # The first steps are plain.
  found = convert.load_run(tmp_path / "run").model
  assert found.stages == members[0]  # Whatever the last step had.
  tokens = np.arange(5, 21)[None]
  logits = [
    np.asarray(convert.load(tmp_path / "run", format_funnel(m))(tokens))
    for m in members
  ]
  assert all(np.all(np.isfinite(x)) for x in logits)
  assert not np.allclose(logits[0], logits[1])


def test_a_member_cannot_learn_what_the_run_has_not(source, tmp_path):
  learned = "start=1,stride=2,recover=gate"
  config = _config(
    tmp_path / "run", source, funnel=SAMPLED[1], funnel_sampled=(learned,)
  )
  with pytest.raises(ValueError) as error:
    tiny_run.train(config)
  assert (
    "recover=gate learns funnel/0/recovery/gate, which the run's own"
    in str(error.value)
  )
  assert not (tmp_path / "run").exists()
  # The other way round it can.
  config.funnel, config.funnel_sampled = learned, (SAMPLED[1], "off")
  spec = pretrain.resolve(config)
  spec.task.make_loss(spec)


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"objective": "mask"}, "objective='mask': expected one of .*'masked'"),
    ({"objective": "distill"}, "objective='distill' needs init_from"),
    ({"mask_rate": 0.0}, "mask_rate=0.0: expected a number between 0 and 1"),
    ({"mask_rate": 1.0}, "mask_rate=1.0"),
    ({"mask_rate": float("nan")}, "mask_rate=nan"),
    (
      {"distill.temperature": 0.0},
      "distill.temperature=0.0: expected a number > 0",
    ),
    ({"distill.hidden": -1.0}, "distill.hidden=-1.0: expected a number >= 0"),
    ({"funnel": "start=0,stride=3"}, "length=32 .*multiple .* stride 3"),
    (
      {"funnel": "start=0,stride=8+start=1,stride=8"},
      "length=32 .*multiple .* total stride 64",
    ),
    ({"funnel": "start=1,recover=none"}, "recover='none'.*training"),
    ({"funnel": "start=3"}, "funnel.start=3.*2 layers"),
    ({"z_loss": -1.0}, "z_loss=-1.0"),
    ({"z_loss": float("nan")}, "z_loss=nan"),
    ({"latency.repeats": -1}, "latency.repeats=-1"),
    (
      {"latency.length": 65, "latency.repeats": 3},
      "latency.length=65 .*max_length=64",
    ),
    ({"funnel_from": -2}, "funnel_from=-2"),
    ({"funnel_sampled": ("start=1,recover=none",)}, "recover='none'"),
    ({"funnel_sampled": ("start=1,stride=3",)}, "length=32 .* stride 6"),
    (
      {"objective": "masked", "funnel": "start=1,stride=32,keep_first=true"},
      "length=32 leaves no room for text beside .* of 32",
    ),
  ],
  ids=str,
)
def test_a_configuration_that_cannot_be(changes, text):
  config = tiny_run.make_config("unused", "unused", **changes)
  with pytest.raises(ValueError, match=text):
    pretrain.resolve(config)


def test_a_distillation_of_nothing(base):
  config = tiny_run.make_config(
    "unused",
    "unused",
    objective="distill",
    init_from=base,
    distill__logits=0.0,
    distill__hidden=0.0,
  )
  with pytest.raises(ValueError, match="nothing is learned of the teacher"):
    pretrain.resolve(config)
  config.distill.hidden = 0.5
  assert pretrain.resolve(config).task.causal


def test_a_folder_that_is_no_checkpoint(tmp_path):
  config = tiny_run.make_config("unused", "unused", init_from=str(tmp_path))
  with pytest.raises(ValueError, match=str(tmp_path)):
    pretrain.resolve(config)


def test_the_sizes_of_the_configuration_are_used_without_a_checkpoint():
  config = tiny_run.make_config("unused", "unused")
  assert pretrain.resolve(config).model_config == TransformerConfig.from_dict(
    config.model
  )
