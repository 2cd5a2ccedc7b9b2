"""Runs that train factors: from a checkpoint, stopped, gone on with, merged."""

import json
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert
from gemma_funnel.convert import reader
from gemma_funnel.parallel.mesh import AXES


def _train(workdir, source, **changes):
  config = tiny_run.make_config(workdir, source, **changes)
  return tiny_run.train(config)


@pytest.fixture(scope="module", autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(source, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("base") / "run")
  _train(workdir, source, steps=4, funnel="off")
  return workdir


LORA = dict(
  lora__rank=2,
  lora__base_dtype="int8",
  optimizer__learning_rate=2e-2,
  funnel="start=1,stride=2,recover=gate",
)


def _params(model):
  return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture(scope="module")
def trained(base, source, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("lora") / "run")
  result = _train(workdir, source, init_from=base, **LORA)
  return workdir, result.model


def test_a_run_is_read_back_merged(base, trained):
  workdir, model = trained
  tokens = np.random.default_rng(0).integers(5, tiny_run.VOCAB, (2, 32))
  found = convert.load_run(workdir).model
  np.testing.assert_allclose(found(tokens), model(tokens), rtol=1e-4, atol=1e-4)
  before, after = _params(convert.load(base)), _params(found)
  np.testing.assert_array_equal(before["embedding"], after["embedding"])
  for part in ("attn", "mlp"):
    for name, x in before["layers"][part].items():
      # Beyond what 8 bits do to it.
      change = np.max(np.abs(after["layers"][part][name] - x))
      assert change > 4 * np.max(np.abs(x)) / 254, name
  assert np.any(after["funnel"][0]["recovery"]["gate"])
  # Only factors were saved, and what the funnel learns.
  steps = pathlib.Path(workdir, "checkpoints")
  saved = json.loads((steps / "12" / "lora" / "_METADATA").read_text())
  assert not (steps / "12" / "params").exists()
  assert len(saved["tree_metadata"]) == 7 * 2 + 1


def test_an_interrupted_run_ends_as_an_uninterrupted(
  base, source, trained, tmp_path
):
  workdir = str(tmp_path / "run")
  config = tiny_run.make_config(workdir, source, init_from=base, **LORA)

  def evaluate(model):
    raise KeyError  # It is killed.

  config.eval_every = 6
  with pytest.raises(KeyError):
    tiny_run.train(config, lambda corpus, spec: evaluate)
  found = _train(workdir, source, init_from=base, **LORA).model
  got, want = _params(found), _params(trained[1])
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_export_has_what_was_merged(trained, tmp_path):
  workdir, _ = trained
  target = tmp_path / "out"
  convert.convert(workdir, target, "orbax")
  got, want = _params(convert.load(target)), _params(convert.load(workdir))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_another_base_is_refused(trained, monkeypatch):
  found = reader.detect.fingerprints
  changed = lambda weights: found(weights) | {"sums": "1:sha256:0"}
  monkeypatch.setattr(reader.detect, "fingerprints", changed)
  with pytest.raises(ValueError, match="depends on other content: base:sums"):
    convert.load(trained[0])


def test_it_is_merged_onto_a_mesh(trained):
  devices = np.array(jax.local_devices()[:2])
  shape = [2 if axis == "fsdp" else 1 for axis in AXES]
  mesh = jax.sharding.Mesh(devices.reshape(shape), AXES)
  model = convert.load(trained[0], mesh=mesh)
  assert len(model.layers.mlp.up[...].sharding.device_set) == 2
  got, want = _params(model), _params(convert.load(trained[0]))
  jax.tree.map(np.testing.assert_array_equal, got, want)
