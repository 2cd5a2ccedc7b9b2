"""Plans of steps on slices of TPUs that are not at hand."""

import importlib.util
import math
import subprocess
import sys

import jax
import pytest
import tiny_run

from gemma_funnel import flops
from gemma_funnel.parallel import hardware
from gemma_funnel.training import aot, pretrain

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
  ),
]


def _config(**changes):
  changes = {
    "model.param_dtype": "float32",
    "model.dtype": "bfloat16",
    "model.embed_dim": 128,
    "model.mlp_dim": 256,
    "batch_size": 16,
    "length": 64,
    **changes,
  }
  return tiny_run.make_config("unused", "unused", **changes)


@pytest.fixture(scope="module")
def devices():
  return aot.slice_devices("v5e:2x2")


@pytest.fixture(scope="module")
def plan(devices):
  return aot.plan(_config(mesh__data=1, mesh__fsdp=4), devices)


def test_bytes_are_those_of_a_chip(plan):
  model = pretrain.find_model(_config())
  count = flops.parameters(model, "start=1,stride=2").total
  # Norm scales, which are whole on each chip, are few.
  assert plan.parameters == pytest.approx(4 * count / 4, rel=0.02)
  assert plan.optimizer == pytest.approx(2 * 4 * count / 4, rel=0.02)
  assert plan.temporaries > 0 and plan.activations > 0
  assert plan.memory == 16 << 30 and plan.fits
  assert plan.total < 1e8


def test_times_are_those_of_the_roofline(plan):
  chip = hardware.CHIPS["TPU v5 lite"]
  model = pretrain.find_model(_config())
  step = flops.train_step(model, "start=1,stride=2", 16, 64)
  assert plan.model_flops == step
  assert plan.compute_s == pytest.approx(step / 4 / chip.flops)
  assert plan.step_s == max(plan.compute_s, plan.send_s, plan.memory_s)
  assert plan.mfu_bound == pytest.approx(plan.model_s / plan.step_s)
  # Weights are gathered, and their gradients summed.
  assert set(plan.sent) == {"fsdp"}
  count = flops.parameters(model).total
  assert plan.sent["fsdp"] > 2 * 2 * count * 3 / 4


def test_no_text_of_jaxlib_is_needed(devices, monkeypatch, plan):
  def as_text(self):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
  found = aot.plan(_config(mesh__data=1, mesh__fsdp=4), devices)
  assert found.sent == plan.sent


def test_what_does_not_fit_is_said(devices):
  config = _config(**{"model.vocab_size": 1 << 20, "model.embed_dim": 2048})
  found = aot.plan(config, devices)  # Copies of 8 GiB, and twice moments.
  assert not found.fits
  assert found.parameters + found.optimizer > 16 << 30


def test_a_search_tries_what_promises_most(devices):
  found = list(aot.search(_config(), devices, ("none", "block"), most=3))
  assert 1 <= len(found) <= 3
  assert all(math.prod(one.mesh.values()) == 4 for one in found)
  assert any(one.fits for one in found)


def test_every_mesh_is_a_candidate():
  config = _config()
  found = list(aot.candidates(config, 8))
  assert all(math.prod(sizes.values()) == 8 for sizes in found)
  # Ways to share three factors of two among four axes.
  assert len(found) == 20
  config.mesh.slice = 2
  assert {s["slice"] for s in aot.candidates(config, 8)} == {2}


def test_slices_are_joined(devices):
  both = aot.slice_devices("v5e:2x2", 2)
  assert len(both) == 2 * len(devices)
  with pytest.raises(ValueError, match="mesh.slice=1: the 8 devices are of 2"):
    pretrain.make_setup(_config(), both)
  mesh = pretrain.make_setup(_config(mesh__slice=2), both).mesh
  assert mesh.shape["slice"] == 2 and mesh.shape["data"] == 4
  for number in range(2):
    part = mesh.devices[number].ravel()
    assert {d.slice_index for d in part} == {number}


def test_no_such_topology():
  with pytest.raises(ValueError, match="expected such as v5p:4x4x4"):
    aot.slice_devices("big")
  with pytest.raises(ValueError, match="'v5e:3x5x7' cannot be described"):
    aot.slice_devices("v5e:3x5x7")


def test_an_unknown_device_has_no_bound():
  with pytest.raises(ValueError, match="peaks of 'cpu' are not known"):
    aot.plan(_config(), jax.devices()[:1])


def test_the_command_prints_a_table(tmp_path):
  command = [
    sys.executable,
    str(tiny_run.ROOT / "tpu" / "plan.py"),
    *tiny_run.command("unused", "unused")[2:],
    "--topology=v5e:2x2",
    f"--out={tmp_path / 'out'}",
  ]
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    env=tiny_run.environment(),
    cwd=tiny_run.ROOT,
  )
  assert done.returncode == 0, done.stderr
  assert "4 x TPU v5 lite (v5e:2x2): batch 8 x 32" in done.stdout
  assert "Fastest that fits on 4 chips: --config.mesh.slice=1" in done.stdout
  assert (tmp_path / "out" / "plan.md").read_text() in done.stdout + "\n"
  assert (tmp_path / "out" / "plan.json").exists()
