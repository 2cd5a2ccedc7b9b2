"""Broken and hostile checkpoints: one clear error, nothing left, no harm."""

import builtins
import dataclasses
import itertools
import json
import pickle
import re
import shutil
import zipfile

from made_checkpoints import (
  FORMATS,
  fails,
  make,
  parameters,
  refused_by_command,
)
import numpy as np
import pytest
from tiny_checkpoints import GEMMA2

import gemma_funnel
from gemma_funnel.convert import conversion, detect, reader, writer


def refused(path, *words, to="hf"):
  """By `load` and by `convert`, with these words, and nothing is left."""
  destination = path.parent / "dst"
  with fails(destination, *words):
    gemma_funnel.load(path)
  with fails(destination, *words):
    conversion.convert(path, destination, to)


# Files that are damaged, or missing.


class Touch:
  """Pickled as a program that makes a file."""

  def __init__(self, file):
    self.code = f"__import__('pathlib').Path({str(file)!r}).touch()"

  def __reduce__(self):
    return builtins.exec, (self.code,)


@pytest.mark.parametrize(
  "name, file",
  [
    ("ckpt", "model.ckpt"),
    ("bin", "pytorch_model-00002-of-*.bin"),
    ("bin", "pytorch_model.bin"),
  ],
)
def test_a_pickle_that_would_run_code(copy, tmp_path, capsys, name, file):
  folder, ran = copy(name), tmp_path / "ran"
  code = pickle.dumps({"embedder.weight": Touch(ran)}, 2)
  pickle.loads(code)
  assert ran.exists()
  ran.unlink()
  if "*" not in file:
    (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    (folder / file).touch()
  (hostile,) = folder.glob(file)
  with zipfile.ZipFile(hostile, "w") as archive:
    archive.writestr("archive/data.pkl", code)
  words = (hostile.name, "exec", "no code of a stranger is run")
  refused(folder, *words)
  refused_by_command(capsys, folder, tmp_path / "dst", "--to=hf", words=words)
  if file == "model.ckpt":
    refused(hostile, *words)
  assert not ran.exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
  "name, file",
  [
    ("hf", "model.safetensors"),
    ("hf shards", "model-00002-of-*.safetensors"),
    ("learned", "funnel.safetensors"),
    ("ckpt", "model.ckpt"),
    ("bin", "pytorch_model-00002-of-*.bin"),
    ("plain", "params/layers.mlp.up/0.0.0"),
    ("plain", "params/layers.mlp.up/.zarray"),
    ("ocdbt", "params/manifest.ocdbt"),
    ("ours", "params/embedding/.zarray"),
    ("flat", "transformer/embedder.input_embedding/.zarray"),
  ],
)
def test_a_file_that_is_cut_off(copy, name, file, keep):
  folder = copy(name)
  (cut,) = folder.glob(file)
  data = cut.read_bytes()
  cut.write_bytes(data[: int(len(data) * keep)])
  named = cut.name
  if name in ("plain", "ours"):
    named = cut.parent.name if name == "plain" else "params"
  refused(folder, str(folder) if name == "flat" else named)


@pytest.mark.parametrize("name", ["flat", "stacked", "ours", "ocdbt"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_data_of_a_tree_that_is_cut_off_or_missing(copy, name, keep):
  folder = copy(name)
  chunks = re.compile(r".*/(d/[^/]+|[0-9.]+)")
  files = [f for f in folder.rglob("*") if chunks.fullmatch(str(f))]
  assert files
  for file in files:
    data = file.read_bytes()
    file.unlink()
    if keep is not None:
      file.write_bytes(data[: int(len(data) * keep)])
  refused(folder, "src", "cannot be read")


def test_a_chunk_that_is_missing_is_not_read_as_zeros(copy, made, tmp_path):
  folder = copy("plain")
  (folder / "params/layers.mlp.up/0.0.0").unlink()
  refused(folder, "layers.mlp.up", "missing")
  # Old trees say that they leave out chunks of zeros.
  file = folder / "params/_METADATA"
  key = "store_array_data_equal_to_fill_value"
  metadata = json.loads(file.read_text())
  assert metadata[key] is True
  for old in ({**metadata, key: False}, {"tree_metadata": {}}):
    file.write_text(json.dumps(old))
    found = dict(parameters(reader.open_checkpoint(folder)))
    for path, values in parameters(reader.open_checkpoint(made / "plain")):
      zero = path == ("layers", "mlp", "up")
      np.testing.assert_array_equal(found[path], 0 * values if zero else values)
  file.write_text("{")
  refused(folder, "_METADATA")


@pytest.mark.parametrize("name", ["hf shards", "bin"])
def test_an_index_that_names_a_missing_shard(copy, capsys, name):
  folder = copy(name)
  shard = sorted(folder.glob("*-00002-of-*"))[0]
  shard.unlink()
  words = (".index.json", "not there", shard.name)
  refused(folder, *words)
  to, destination = "--to=orbax", folder.parent / "dst"
  refused_by_command(capsys, folder, destination, to, words=words)


# Tensors that are not as they should be.


def rewrite(path, change):
  raw = json.loads(path.read_text())
  change(raw.get("model", raw))
  path.write_text(json.dumps(raw))


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_that_are_not_those_of_the_configuration(copy, capsys, name):
  folder = copy(name)
  file = folder / "config.json"
  key = "intermediate_size" if name.startswith("hf") else "mlp_dim"
  if not file.exists():
    file = folder / detect.SIDECAR
  rewrite(file, lambda raw: raw.update({key: 13}))
  words = ("does not fit", "has shape", "13", "12", "linear")
  words = words if FORMATS[name]["to"] == "google" else (*words[:-1], "mlp.")
  refused(folder, *words)
  destination = folder.parent / "dst"
  refused_by_command(capsys, folder, destination, "--to=hf", words=words)


def make_with(change, made, folder, to, dtype=None, **options):
  """A checkpoint whose blocks are changed by `change(view, block)`."""
  read = conversion._read
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      conversion,
      "_read",
      lambda s, plan, view, cut: change(
        view,
        read(s, dataclasses.replace(plan, dtype=np.dtype("f4")), view, cut),
      ),
    )
    if dtype is not None:
      planned = conversion.spec_for
      patch.setattr(
        conversion,
        "spec_for",
        lambda *args: dataclasses.replace(
          planned(*args), dtype=np.dtype(dtype)
        ),
      )
    make(made / "first", folder, to, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_another_dtype(made, tmp_path, name):
  folder = tmp_path / "src"
  to_int = lambda view, block: block.astype(np.int32)
  make_with(to_int, made, folder, dtype=np.int32, **FORMATS[name])
  where = "params" if name == "ours" else str(folder)
  refused(folder, where, "embed", "is of int32: expected one of", "float32")


def poison(value):
  def change(view, block):
    if view.path == ("layers", "mlp", "down") and view.layer == 1:
      block.reshape(-1)[-1] = value
    return block

  return change


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(made, tmp_path, name, value):
  folder = tmp_path / "src"
  make_with(poison(value), made, folder, **FORMATS[name])
  tensor = "linear" if FORMATS[name]["to"] == "google" else "down"
  refused(folder, tensor, "infinite or not a number")


@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_the_dtype_there(made, tmp_path, capsys, name):
  folder, destination = tmp_path / "src", tmp_path / "dst"
  make_with(poison(1e6), made, folder, **FORMATS[name])
  gemma_funnel.load(folder)
  words = ("linear" if "google" in FORMATS[name]["to"] else "down", "float16")
  with fails(destination, *words):
    gemma_funnel.load(folder, dtype="float16")
  with fails(destination, *words, "beyond the range"):
    conversion.convert(folder, destination, "hf", dtype="float16")
  argv = (folder, destination, "--to=google", "--dtype=float16")
  refused_by_command(capsys, *argv, words=words)
  assert not destination.exists()


# Folders that are something else.


@pytest.mark.parametrize("name", FORMATS)
def test_a_configuration_of_another_architecture(copy, capsys, name):
  folder = copy(name)
  raw = dict(GEMMA2, model_type="bert")
  (folder / "config.json").write_text(json.dumps(raw))
  words = ("config.json", "model_type='bert'")
  refused(folder, *words)
  argv = (folder, folder.parent / "dst", "--to=hf")
  refused_by_command(capsys, *argv, words=words)


@pytest.mark.parametrize(
  "name, other",
  [
    pair
    for pair in itertools.combinations(
      ["hf shards", "flat", "ckpt", "bin", "ours"], 2
    )
    # Then the safetensors count, as for transformers.
    if pair != ("hf shards", "bin")
  ],
)
@pytest.mark.parametrize("first", [False, True])
def test_two_formats_in_one_folder(copy, made, name, other, first):
  name, other = (name, other) if first else (other, name)
  folder = copy(name)
  shutil.copytree(made / other, folder, dirs_exist_ok=True)
  refused(folder, str(folder), "holds several checkpoints", "Expected one")


@pytest.mark.parametrize("name", ["nowhere", "a" * 300, "file/within"])
def test_a_path_that_does_not_exist(tmp_path, capsys, name):
  (tmp_path / "file").touch()
  for to in writer.FORMATS:
    with fails(tmp_path / "dst", name):
      conversion.convert(tmp_path / name, tmp_path / "dst", to)
  with fails(tmp_path / "dst", name):
    gemma_funnel.load(tmp_path / name)
  argv = (tmp_path / name, tmp_path / "dst", "--to=hf")
  refused_by_command(capsys, *argv, words=(name,))
  assert sorted(f.name for f in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("size", [2**25, 2**62, 10**400])
def test_a_configuration_of_giants(copy, size):
  for name, file, key in [
    ("hf", "config.json", "num_hidden_layers"),
    ("hf", "config.json", "hidden_size"),
    ("ckpt", detect.SIDECAR, "num_layers"),
    ("ours", "config.json", "vocab_size"),
  ]:
    folder = copy(name)
    change = {key: size, "layer_types": None} if name == "hf" else {key: size}
    rewrite(folder / file, lambda raw: raw.update(change))
    refused(folder, "src", "expected", str(size))
    shutil.rmtree(folder)
