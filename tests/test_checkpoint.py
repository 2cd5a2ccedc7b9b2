"""Checkpoints: what is read is what was written, or the one before it."""

import json
import os
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import gemma_funnel
from gemma_funnel import convert, generate
from gemma_funnel.config import FunnelConfig
from gemma_funnel.convert import __main__ as command
from gemma_funnel.parallel import sharding
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import init_state, pretrain, workdir


def _params(model):
  return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


def _same(tree, other):
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  return len(leaves) == len(others) and all(
    a.dtype == b.dtype and np.array_equal(a, b)
    for a, b in zip(leaves, others, strict=True)
  )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
  """(folder, result) of a run with checkpoints 4, 8 and 12."""
  folder = tmp_path_factory.mktemp("checkpoint") / "run"
  result = tiny_run.train(tiny_run.make_config(folder, source))
  return folder, result


@pytest.fixture
def copy(trained, tmp_path):
  """The same run in a folder to damage."""
  return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def _only(folder, step):
  for path in (folder / workdir.FOLDER).iterdir():
    if path.name != str(step):
      shutil.rmtree(path)
  return folder


@pytest.fixture(scope="module")
def by_step(trained, tmp_path_factory):
  """Parameters of each checkpoint, each read from a folder of its own."""
  read = {}
  for step in (4, 8, 12):
    folder = tmp_path_factory.mktemp("only") / "run"
    _only(pathlib.Path(shutil.copytree(trained[0], folder)), step)
    run = convert.load_run(folder)
    assert run.step == step
    read[step] = _params(run.model)
  return read


def _tokens():
  return jnp.asarray(np.random.default_rng(0).integers(5, 512, (2, 16)))


def test_a_loaded_run_is_the_trained_model(trained, source):
  folder, result = trained
  run = convert.load_run(folder)
  assert run.step == 12 == result.steps
  assert run.tokenizer_path == str(folder / "tokenizer.model")
  assert run.config.data.source == source
  assert run.model.stages == result.model.stages == (FunnelConfig(1, 2, 2),)
  assert _same(_params(run.model), _params(result.model))
  params = jax.device_put(nnx.state(result.model), jax.devices()[0])
  model = nnx.merge(nnx.graphdef(result.model), params)
  np.testing.assert_array_equal(run.model(_tokens()), model(_tokens()))


def test_checkpoints_hold_the_parameters_of_their_own_step(
  by_step, source, tmp_path
):
  # Their buffers are donated while they are being written.
  for step in (4, 8):
    config = tiny_run.make_config(tmp_path / str(step), source)
    stopped = _stop_at(config, step)
    assert stopped.steps == step and not stopped.finished
    assert _same(by_step[step], _params(stopped.model))
  assert not _same(by_step[4], by_step[8])


def _stop_at(config, step):
  """Trains until a SIGTERM after `step` steps."""
  config.eval_every = step

  def make_evaluator(corpus, setup):
    del corpus, setup

    def evaluate(model):
      del model
      os.kill(os.getpid(), 15)
      return {"loss": 0.0, "bits_per_byte": 0.0}

    return evaluate

  return tiny_run.train(config, make_evaluator)


def test_a_run_is_loaded_with_another_funnel(trained):
  folder, result = trained
  off = convert.load(folder, "off")
  other = convert.load(folder, "start=0,stride=3,recover=add")
  trained_with = convert.load(folder)
  assert off.stages == ()
  assert other.stages == (FunnelConfig(0, 2, 3, recover="add"),)
  for model in (off, other, trained_with):
    assert _same(_params(model), _params(result.model))
  logits = [m(_tokens()) for m in (off, other, trained_with)]
  assert np.max(np.abs(logits[0] - logits[1])) > 1e-3
  assert np.max(np.abs(logits[0] - logits[2])) > 1e-3
  with_funnel = off.with_funnel("start=1,stride=2")
  np.testing.assert_array_equal(with_funnel(_tokens()), logits[2])


LEARNED = (
  "start=0,stop=1,stride=4,recover=gate"
  "+start=1,stride=2,pool=attention,recover=attend"
)


@pytest.fixture(scope="module")
def learned(source, tmp_path_factory):
  """(folder, result) of a run that has learned something of a funnel."""
  folder = tmp_path_factory.mktemp("learned") / "run"
  config = tiny_run.make_config(
    folder,
    source,
    steps=3,
    checkpoint_every=3,
    funnel=LEARNED,
    optimizer__warmup_steps=0,
  )
  return folder, tiny_run.train(config)


def test_what_a_funnel_learned_is_read_back(learned, capsys):
  folder, result = learned
  params = _params(result.model)
  for leaf in jax.tree.leaves(params["funnel"]):
    assert np.max(np.abs(leaf)) > 1e-3  # Those that start at zero too.
  model = convert.load(folder)
  assert _same(_params(model), params)
  graphdef, _ = nnx.split(result.model)
  whole = nnx.merge(graphdef, jax.device_put(params, jax.devices()[0]))
  np.testing.assert_array_equal(model(_tokens()), whole(_tokens()))
  off = convert.load(folder, "off")
  assert "funnel" not in _params(off)
  assert _same(_params(off)["layers"], params["layers"])
  assert "fresh" not in capsys.readouterr().out
  assert np.max(np.abs(off(_tokens()) - model(_tokens()))) > 1e-3


def test_another_funnel_keeps_what_its_stages_learned(learned, capsys):
  folder, result = learned
  params = _params(result.model)["funnel"]
  other = convert.load(
    folder, "start=0,recover=gate,pool=attention+start=1,recover=gate"
  )
  said = capsys.readouterr().out
  assert said == (
    "funnel stage 0: freshly initialised reducer/pool_query\n"
    "funnel stage 1: freshly initialised recovery/gate\n"
  )
  found = _params(other)["funnel"]
  gate = lambda stage: stage["recovery"]["gate"]
  np.testing.assert_array_equal(gate(found[0]), gate(params[0]))
  assert not np.any(found[0]["reducer"]["pool_query"])
  assert not np.any(gate(found[1]))
  back = convert.load(folder, LEARNED)
  assert _same(_params(back)["funnel"], params)


def test_a_run_that_learns_a_funnel_resumes(learned, source, tmp_path):
  changes = dict(
    steps=3, funnel=LEARNED, optimizer__warmup_steps=0, checkpoint_every=100
  )
  config = tiny_run.make_config(tmp_path / "run", source, **changes)
  assert not _stop_at(config, 1).finished
  config.eval_every = 1000
  result = tiny_run.train(config)
  assert result.finished
  assert _same(_params(result.model), _params(learned[1].model))


def test_a_run_is_loaded_in_another_dtype(trained):
  folder, result = trained
  model = convert.load(folder, dtype="bfloat16")
  assert model.config.dtype == model.config.param_dtype == "bfloat16"
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), _params(result.model)
  )
  assert _same(_params(model), rounded)
  exact = convert.load(folder)(_tokens())
  assert 0 < np.max(np.abs(model(_tokens()) - exact)) < 0.1


@pytest.mark.parametrize(
  "funnel, text",
  [
    ("start=2,stride=2", "funnel.start=2.*2 layers"),
    ("start=0,stop=5", "funnel.stop=5 is past the model's 2 layers"),
    ("begin=1", "start is missing"),
  ],
)
def test_a_funnel_that_does_not_fit_is_refused(trained, funnel, text):
  with pytest.raises(ValueError, match=text):
    convert.load_run(trained[0], funnel)


def test_a_dtype_that_is_none_is_refused(trained):
  with pytest.raises(ValueError, match="dtype='int7'"):
    convert.load_run(trained[0], dtype="int7")


def test_a_path_that_is_no_run_is_refused(tmp_path, copy):
  for path in (tmp_path / "nothing", tmp_path):
    with pytest.raises(ValueError, match="no run: it has no folder"):
      convert.load_run(path)
  (copy / "config.json").unlink()
  with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
    convert.load_run(copy)


def test_reading_a_run_changes_nothing_in_it(copy):
  _truncate(_newest_data_file(copy))
  (copy / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()  # Being saved.
  files = lambda: {
    str(p): p.read_bytes() if p.is_file() else None for p in copy.rglob("*")
  }
  before = files()
  assert convert.load_run(copy).step == 8
  assert files() == before


def test_a_checkpoint_that_cannot_be_read_back_does_not_count(
  source, tmp_path, monkeypatch
):
  class Lacking(checkpoint_lib.OrbaxTree):
    def __init__(self, folder):
      super().__init__(folder)
      if "8.orbax" in str(folder):
        self.tensors.popitem()

  monkeypatch.setattr(checkpoint_lib, "OrbaxTree", Lacking)
  config = tiny_run.make_config(tmp_path / "run", source)
  with pytest.raises(
    ValueError, match="is not what was saved: .* as None, exp"
  ):
    tiny_run.train(config)
  assert convert.load_run(tmp_path / "run").step == 4


# Damages: what a disk, a full disk or a copy that was cut short leaves.
def _truncate(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def _delete(path):
  path.unlink()


def _zero(path):
  path.write_bytes(bytes(path.stat().st_size))


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


DAMAGES = (_truncate, _delete, _zero, _flip)


def _files(folder, step):
  found = (folder / workdir.FOLDER / str(step)).rglob("*")
  return sorted(p for p in found if p.is_file())


def _newest_data_file(folder, step=12):
  return max(_files(folder, step), key=lambda p: p.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_of_any_file_never_changes_what_is_read(
  damage, trained, by_step, tmp_path, capsys
):
  names = [p.relative_to(trained[0]) for p in _files(trained[0], 12)]
  names = [n for n in names if (trained[0] / n).stat().st_size > 0]
  assert len(names) > 15
  fallbacks = 0
  for number, name in enumerate(names):
    folder = tmp_path / str(number)
    shutil.copytree(trained[0], folder)
    damage(folder / name)
    capsys.readouterr()
    run = convert.load_run(folder)
    said = capsys.readouterr().out
    assert _same(_params(run.model), by_step[run.step]), name
    if run.step == 12:
      # These two are Orbax's notes on the whole, and hold no numbers.
      assert name.parent.name == "12" and name.name != "sums.json", name
      assert said == "", name
    else:
      fallbacks += 1
      assert run.step == 8, name
      assert said.count("\n") == 1 and "checkpoint 12 is damaged" in said, name
  assert fallbacks >= len(names) - 2


def _restore(folder, source):
  """What a training run restores: (step, params, data state)."""
  config = tiny_run.make_config(folder, source)
  setup = pretrain.resolve(config)
  corpus = pretrain.pipeline.load_corpus(config.data, 512, folder)
  data = pretrain.pipeline.train_iterator(
    corpus.train,
    corpus.tokenizer,
    batch_size=8,
    length=32,
    segment_alignment=2,
    seed=0,
  )
  with checkpoint_lib.Checkpoints(folder, keep=3) as checkpoints:
    abstract = init_state.make_init(setup)[1]
    trees = {**abstract[0], "opt_state": abstract[1]}
    step, trees, progress = checkpoints.restore(trees)
    data.set_state(progress["data"])
    return step, jax.device_get(trees["params"]), next(data)


def test_a_damaged_checkpoint_is_set_aside_and_saved_again(
  copy, source, trained, by_step, capsys
):
  intact = _restore(copy, source)
  assert intact[0] == 12
  _truncate(_newest_data_file(copy))
  step, params, batch = _restore(copy, source)
  assert step == 8 and _same(params, by_step[8])
  assert not np.array_equal(batch["tokens"], intact[2]["tokens"])
  out = capsys.readouterr().out
  assert out.count("checkpoint 12 is damaged") == 1
  assert "using 8 instead" in out
  names = sorted(os.listdir(copy / "checkpoints"))
  assert names == ["12.damaged", "4", "8"]
  # The run takes the steps after 8 again, and ends where it had ended.
  result = tiny_run.train(tiny_run.make_config(copy, source))
  assert _same(_params(result.model), _params(trained[1].model))
  assert convert.load_run(copy).step == 12
  # And once more: the name is taken.
  _truncate(_newest_data_file(copy))
  assert _restore(copy, source)[0] == 8
  assert (copy / "checkpoints" / "12.damaged1").is_dir()


@pytest.mark.parametrize(
  "name", ["progress/metadata", "opt_state/_METADATA", "sums.json"]
)
def test_a_resuming_run_needs_all_of_a_checkpoint(
  name, copy, source, by_step, capsys
):
  _zero(copy / "checkpoints" / "12" / name)
  step, params, _ = _restore(copy, source)
  assert step == 8 and _same(params, by_step[8])
  assert "checkpoint 12 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"a": 1}', "\0"])
def test_sums_of_another_shape_are_damage(content, copy):
  (copy / "checkpoints" / "12" / "sums.json").write_text(content)
  assert convert.load_run(copy).step == 8


def test_nothing_intact_is_an_error_that_names_them(copy, source):
  for step in (4, 8, 12):
    _truncate(_newest_data_file(copy, step))
  for read in (
    lambda: convert.load_run(copy),
    lambda: _restore(copy, source),
    lambda: tiny_run.train(tiny_run.make_config(copy, source)),
  ):
    with pytest.raises(ValueError, match="no checkpoint.*12: .*8: .*4: ") as e:
      read()
    assert "\n" not in str(e.value)
  assert sorted(os.listdir(copy / "checkpoints")) == ["12", "4", "8"]


def test_a_folder_without_checkpoints_is_no_run_to_load(copy):
  _only(copy, None)
  with pytest.raises(ValueError, match="no checkpoint in .*: it is empty"):
    convert.load_run(copy)


def test_what_a_killed_save_left_is_removed(copy, source):
  left = copy / "checkpoints" / "16.orbax-checkpoint-tmp"
  shutil.copytree(copy / "checkpoints" / "12", left)
  assert _restore(copy, source)[0] == 12
  assert not left.exists()


# Elsewhere.


def test_a_run_is_loaded_onto_a_mesh(trained):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  model = gemma_funnel.load(trained[0], mesh=mesh)
  spec = jax.sharding.PartitionSpec("tensor", ("fsdp", "sequence"))
  assert model.embedding[...].sharding.spec == spec
  assert _same(_params(model), _params(trained[1].model))


def test_a_run_is_exported(trained, tmp_path, capsys):
  """To others' layouts and to ours; generation says the same."""
  said = []
  for to in (None, "hf", "orbax"):
    path = tmp_path / to if to else trained[0]
    if to:
      flags = [str(trained[0]), str(path), f"--to={to}", "--verify"]
      assert command.main(flags) == 0
      assert "0 differ; largest difference of a value 0, of a logit 0" in (
        capsys.readouterr().err
      )
    flags = [f"--checkpoint={path}", "--prompt=ab", "--max_new_tokens=8"]
    assert generate.main(flags) == 0
    said.append(capsys.readouterr().out)
  assert said[0] == said[1] == said[2] != ""
  raw = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert raw["funnel"] == "start=1,stop=2,stride=2,reduce=mean,recover=average"


def test_the_newest_intact_checkpoint_is_exported(copy, tmp_path, capsys):
  newest = copy / workdir.FOLDER / "12" / "params"
  (newest / "manifest.ocdbt").write_bytes(b"")
  gemma_funnel.convert.convert(copy, tmp_path / "there", "orbax")
  assert "checkpoint 12 is damaged" in capsys.readouterr().out
  ours = convert.load_run(copy)
  assert ours.step == 8
  there = gemma_funnel.load(tmp_path / "there")
  assert _same(_params(there), _params(ours.model))
