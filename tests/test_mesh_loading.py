"""Loading onto a mesh: each device's own part is read, and nothing else."""

import json
import pathlib
import socket
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import GEMMA2, random_tensors, write
import tiny_run

import gemma_funnel
from gemma_funnel import convert
from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import safetensors_file, tensor_io, writer
from gemma_funnel.parallel import sharding

ROWS, WIDTH = 65_536, 512
# Sizes that the axes of the mesh divide; the vocabulary too.
RAW = {**GEMMA2, "vocab_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("source")
  tensors = random_tensors(RAW, ml_dtypes.bfloat16)
  rows = np.random.default_rng(0).normal(size=(32, RAW["hidden_size"]))
  tensors["model.embed_tokens.weight"] = rows.astype(ml_dtypes.bfloat16)
  return write(made, RAW, tensors)


@pytest.fixture(
  scope="module", params=["hf", "orbax", "google", "gemma_pytorch"]
)
def converted(request, folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("converted") / request.param
  convert.convert(folder, path, request.param)
  return path


@pytest.mark.parametrize(
  "axes",
  [
    dict(data=8),
    dict(fsdp=2, tensor=4),
    dict(data=2, fsdp=4),
    dict(fsdp=2, sequence=2, tensor=2),
  ],
  ids=str,
)
def test_parameters_are_where_the_rules_say(folder, converted, axes):
  mesh = sharding.make_mesh(axes)
  model = gemma_funnel.load(converted, mesh=mesh)
  whole = gemma_funnel.load(folder)
  places = sharding.shardings_of(nnx.to_pure_dict(nnx.state(model)), mesh)
  jax.tree.map(
    lambda p, place: np.testing.assert_(
      p.sharding.is_equivalent_to(place, p.ndim)
    ),
    nnx.to_pure_dict(nnx.state(model)),
    places,
  )
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(model), nnx.state(whole)
  )
  tokens = jnp.arange(1, 9)[None]
  np.testing.assert_allclose(model(tokens), whole(tokens), atol=1e-4)


def test_what_several_devices_hold_is_read_once(folder, monkeypatch):
  read, sizes = tensor_io.read_range, []

  def counted(path, offset, nbytes):
    sizes.append(nbytes)
    return read(path, offset, nbytes)

  monkeypatch.setattr(safetensors_file, "read_range", counted)
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  gemma_funnel.load(folder, mesh=mesh)
  config = convert.describe(folder).config
  plan = writer.make_spec("hf", config, (), np.dtype(ml_dtypes.bfloat16))
  assert sum(sizes) == plan.nbytes


def test_a_mesh_that_does_not_divide_is_named(folder):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=8))
  with pytest.raises(ValueError, match="tensor=8 does not divide 4"):
    gemma_funnel.load(folder, mesh=mesh)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A checkpoint whose embedding is nearly all of it, and a small one."""
  folder = tmp_path_factory.mktemp("large")
  config = TransformerConfig.preset(
    "tiny",
    vocab_size=ROWS,
    embed_dim=WIDTH,
    num_heads=8,
    num_kv_heads=8,
    mlp_dim=64,
    num_layers=1,
  )
  draw = np.random.default_rng(0)
  for name, sizes in (("all", config), ("all-small", None)):
    sizes = sizes or TransformerConfig.from_dict(
      config.to_dict() | {"vocab_size": 64}
    )
    plan = writer.make_spec("hf", sizes, (), np.dtype(np.float32))
    (folder / name).mkdir()
    (file,) = plan.files
    headers = plan.headers(file)
    with file.open(folder / name / file.name, headers) as opened:
      for key, header in headers.items():
        values = draw.standard_normal(header.shape, np.float32)
        opened.write(key, (), values)
    for text, content in plan.texts.items():
      (folder / name / text).write_text(content)
  return folder / "all"


@pytest.mark.slow
def test_no_process_holds_the_whole_of_a_sharded_tensor(large):
  """Two processes of four devices; the embedding is split over all eight."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  script = pathlib.Path(__file__).with_name("load_on_mesh.py")
  processes = [
    subprocess.Popen(
      [sys.executable, str(script), str(large), address, "2", str(n)],
      stdout=subprocess.PIPE,
      text=True,
      env=tiny_run.environment(4),
    )
    for n in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  reports = [json.loads(output.splitlines()[-1]) for output in outputs]
  nbytes = 4 * ROWS * WIDTH
  file = safetensors_file.SafetensorsFile(large / "model.safetensors")
  rows = ROWS // 8
  starts = []
  for report in reports:
    assert report["shape"] == [ROWS, WIDTH]
    assert report["largest_read"] <= nbytes / 8
    # Half of it, and the little else there is.
    assert report["read"] < 0.55 * nbytes
    assert report["peak"] < 0.8 * nbytes, report
    for start, total in report["shards"]:
      values = file.read(
        "model.embed_tokens.weight", (slice(start, start + rows),)
      )
      assert total == pytest.approx(values.astype(np.float64).sum(), abs=1e-6)
      starts.append(start)
  assert sorted(starts) == list(range(0, ROWS, rows))
