"""gemma_pytorch's state dicts, written by torch.

They are made from its names and shapes alone, by no code of ours.
"""

import contextlib
import json
import re

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny
from tiny_checkpoints import D, F, H, K, L, N

import gemma_funnel
from gemma_funnel.config import PRESETS, TransformerConfig
from gemma_funnel.convert import conversion, detect, gemma_pytorch, writer
from gemma_funnel.convert.__main__ import main
from gemma_funnel.convert.reader import open_checkpoint
from gemma_funnel.convert.tensor_io import Header
from gemma_funnel.convert.torch_file import TorchFile

FAMILIES = {
  "gqa": tiny.GEMMA2,
  "mqa": {**tiny.GEMMA1, "num_key_value_heads": 1},
  "mha": {**tiny.GEMMA1, "num_key_value_heads": N},
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def state_dict_of(stored):
  """Google's names of Hugging Face's tensors."""
  stored = dict(stored)
  state = {"embedder.weight": stored.pop("model.embed_tokens.weight")}
  for i in range(L):
    attn = f"model.layers.{i}.self_attn"
    state[f"{attn}.qkv_proj.weight"] = np.concatenate(
      [stored.pop(f"{attn}.{x}_proj.weight") for x in "qkv"]
    )
  # What is left has the same names.
  return state | stored


def save(path, state, wrap="model_state_dict"):
  """A file of torch.load's kind."""
  torch = pytest.importorskip("torch")
  state = {name: to_torch(torch, x) for name, x in state.items()}
  torch.save({wrap: state, "step": 3} if wrap else state, path)
  return path


def to_torch(torch, x):
  if x.dtype == BFLOAT16:
    return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
  return torch.from_numpy(np.ascontiguousarray(x))


def reference_of(folder, raw, stored, dtype="float32"):
  """The model that Hugging Face's tensors are."""
  folder.mkdir()
  return gemma_funnel.load(tiny.write(folder, raw, stored), dtype=dtype)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


# What is read.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ckpt_is_the_model(tmp_path, family, dtype):
  raw = FAMILIES[family]
  stored = tiny.random_tensors(raw, np.dtype(dtype))
  reference = reference_of(tmp_path / "hf", raw, stored, dtype)
  state = state_dict_of(stored)
  state["freqs_cis"] = np.ones((16, H // 2), np.complex64)
  folder = tmp_path / "pytorch"
  folder.mkdir()
  file = save(folder / "gemma.ckpt", state)
  (folder / "tokenizer.model").write_bytes(b"")
  # By the file, and by its folder.
  for path in (file, folder):
    opened = open_checkpoint(path, reference.config)
    assert opened.format == "gemma_pytorch"
    assert opened.dtype == np.dtype(dtype)
    assert set(opened.companions) == {"tokenizer.model"}
    model = gemma_funnel.load(path, dtype=dtype, config=reference.config)
    same(reference, model)


def test_shards(tmp_path):
  stored = tiny.random_tensors(tiny.GEMMA2, BFLOAT16)
  reference = reference_of(tmp_path / "hf", tiny.GEMMA2, stored)
  state = state_dict_of(stored)
  state["local_freqs_cis"] = np.ones((16, H // 2), np.complex64)
  folder = tmp_path / "pytorch"
  folder.mkdir()
  weight_map = {}
  for n in range(3):
    file = f"pytorch_model-{n + 1:05}-of-00003.bin"
    part = {name: state[name] for name in sorted(state)[n::3]}
    save(folder / file, part, None)
    written = TorchFile(folder / file).tensors
    weight_map |= dict.fromkeys(written, file)
  index = folder / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  same(reference, gemma_funnel.load(folder, config=reference.config))
  (folder / "pytorch_model-00002-of-00003.bin").unlink()
  with pytest.raises(ValueError, match="pytorch_model-00002-of-00003.bin"):
    gemma_funnel.load(folder, config=reference.config)


@pytest.mark.parametrize("family", ["gqa", "mqa"])
def test_hugging_faces_own_bin(tmp_path, family):
  raw = FAMILIES[family]
  stored = tiny.random_tensors(raw)
  reference = reference_of(tmp_path / "hf", raw, stored)
  folder = tmp_path / "bin"
  folder.mkdir()
  tiny.write_config(folder, raw)
  names = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}
  save(folder / "pytorch_model.bin", names, None)
  model = gemma_funnel.load(folder)
  same(reference, model)
  assert model.config == reference.config


def test_all_wrong_tensors_are_named_at_once(tmp_path):
  stored = tiny.random_tensors(tiny.GEMMA2)
  reference = reference_of(tmp_path / "hf", tiny.GEMMA2, stored)
  state = state_dict_of(stored)
  packed = "model.layers.1.self_attn.qkv_proj.weight"
  state[packed] = state[packed][:-1]
  del state["model.norm.weight"]
  state["vision.weight"] = np.ones(3, np.float32)
  path = save(tmp_path / "a.ckpt", state)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path, config=reference.config)
  rows = (N + 2 * K) * H
  for what in (
    str(path),
    packed,
    f"({rows - 1}, {D})",
    f"({rows}, {D})",
    "missing: ['model.norm.weight']",
    "unexpected: ['vision.weight']",
  ):
    assert what in str(error.value)


# Quantized weights.


def quantize(state, rng):
  """(int8 weights and a scale a row, the values that they stand for)."""
  quantized, values = {}, {}
  for name, x in state.items():
    if x.ndim != 2:
      quantized[name] = values[name] = x
      continue
    weights = rng.integers(-127, 128, x.shape).astype(np.int8)
    # Of rows, and of no two the same.
    scales = rng.uniform(0.001, 0.1, x.shape[0]).astype(np.float32)
    quantized[name] = weights
    quantized[name.removesuffix(".weight") + ".weight_scaler"] = scales
    values[name] = weights.astype(np.float32) * scales[:, None]
  return quantized, values


def unpack(state, raw):
  """Hugging Face's tensors of a state dict."""
  state = dict(state)
  stored = {"model.embed_tokens.weight": state.pop("embedder.weight")}
  queries = raw["num_attention_heads"] * H
  keys = raw["num_key_value_heads"] * H
  for i in range(L):
    attn = f"model.layers.{i}.self_attn"
    packed = state.pop(f"{attn}.qkv_proj.weight")
    parts = np.split(packed, [queries, queries + keys])
    for x, part in zip("qkv", parts, strict=True):
      stored[f"{attn}.{x}_proj.weight"] = part
  return stored | state


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_times_their_scales(tmp_path, family):
  raw = FAMILIES[family]
  rng = np.random.default_rng(1)
  quantized, values = quantize(state_dict_of(tiny.random_tensors(raw)), rng)
  # The embedding's, and of each layer qkv, o, gate, up and down.
  assert sum(name.endswith("_scaler") for name in quantized) == 1 + 5 * L
  reference = reference_of(tmp_path / "hf", raw, unpack(values, raw))
  path = save(tmp_path / "int8.ckpt", quantized)
  opened = open_checkpoint(path, reference.config)
  assert opened.dtype == np.float32
  same(reference, gemma_funnel.load(path, config=reference.config))
  # A part of a weight takes the scales of its rows alone.
  index = (slice(3, 5), slice(1, 2), slice(2, 6))
  for name in ("query", "key", "value"):
    if name != "query" and raw["num_key_value_heads"] < 2:
      index = (slice(3, 5), slice(0, 1), slice(2, 6))
    part = opened.read_slice(
      ("layers", "attn", name), [slice(1, 3), *index], np.dtype(np.float32)
    )
    whole = getattr(reference.layers.attn, name)[...]
    np.testing.assert_array_equal(part, whole[(slice(1, 3), *index)])


def test_some_int8_weights(tmp_path):
  # Norms stay as they are; so does whatever is not of int8.
  state = state_dict_of(tiny.random_tensors(tiny.GEMMA2))
  quantized, values = quantize(state, np.random.default_rng(1))
  name = "model.layers.0.mlp.up_proj.weight"
  quantized[name] = values[name] = state[name]
  del quantized["model.layers.0.mlp.up_proj.weight_scaler"]
  stored = unpack(values, tiny.GEMMA2)
  reference = reference_of(tmp_path / "hf", tiny.GEMMA2, stored)
  path = save(tmp_path / "a.ckpt", quantized)
  same(reference, gemma_funnel.load(path, config=reference.config))


@pytest.mark.parametrize(
  "weight", ["embedder", "model.layers.1.self_attn.qkv_proj"]
)
@pytest.mark.parametrize("fault", ["none", "shape", "columns", "unused"])
def test_scales_that_do_not_fit(tmp_path, weight, fault):
  state = state_dict_of(tiny.random_tensors(tiny.GEMMA2))
  quantized, _ = quantize(state, np.random.default_rng(1))
  scaler = f"{weight}.weight_scaler"
  rows = len(quantized[scaler])
  found = {
    "none": "no such tensor",
    "shape": f"({rows - 1},)",
    "columns": f"({rows}, 1)",
    "unused": "not int8",
  }[fault]
  match fault:
    case "none":
      del quantized[scaler]
    case "shape":
      quantized[scaler] = quantized[scaler][1:]
    case "columns":
      quantized[scaler] = quantized[scaler][:, None]
    case "unused":
      quantized[f"{weight}.weight"] = state[f"{weight}.weight"]
  path = save(tmp_path / "a.ckpt", quantized)
  config = TransformerConfig.preset("gemma2_2b")
  with pytest.raises(ValueError, match=re.escape(scaler)) as error:
    gemma_funnel.load(path, config=config)
  assert str(path) in str(error.value) and found in str(error.value)


def test_int8_to_another_format(tmp_path):
  raw = tiny.GEMMA2
  state = state_dict_of(tiny.random_tensors(raw))
  quantized, values = quantize(state, np.random.default_rng(1))
  reference = reference_of(tmp_path / "hf", raw, unpack(values, raw))
  path = save(tmp_path / "a.ckpt", quantized)
  conversion.convert(path, tmp_path / "b", "hf", config=reference.config)
  same(reference, gemma_funnel.load(tmp_path / "b"))


# What is written.


@contextlib.contextmanager
def small_shards(monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(writer, "SHARD_BYTES", 2000)
    yield


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_loads_ours(tmp_path, monkeypatch, family, dtype):
  """As gemma_pytorch's load_weights does."""
  torch = pytest.importorskip("torch")
  raw = FAMILIES[family]
  stored = tiny.random_tensors(raw, np.dtype(dtype))
  expected = state_dict_of(stored)
  (tmp_path / "hf").mkdir()
  hf = tiny.write(tmp_path / "hf", raw, stored)

  def check(state):
    assert set(state) == set(expected)
    for name, tensor in state.items():
      assert tensor.dtype == getattr(torch, dtype) and tensor.is_contiguous()
      want = to_torch(torch, expected[name])
      assert torch.equal(tensor, want), name

  one = tmp_path / "one"
  conversion.convert(hf, one, "gemma_pytorch")
  load = lambda file: torch.load(file, mmap=True, weights_only=True)
  check(load(one / "model.ckpt")["model_state_dict"])
  many = tmp_path / "many"
  with small_shards(monkeypatch):
    conversion.convert(hf, many, "gemma_pytorch")
  index = json.loads((many / "pytorch_model.bin.index.json").read_text())
  names = sorted(set(index["weight_map"].values()))
  assert len(names) > 1
  shards = [load(many / name) for name in names]
  check({name: x for shard in shards for name, x in shard.items()})
  for name, shard in zip(names, shards, strict=True):
    assert {index["weight_map"][tensor] for tensor in shard} == {name}


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_and_back(tmp_path, monkeypatch, family):
  raw = FAMILIES[family]
  stored = tiny.random_tensors(raw, BFLOAT16)
  reference = reference_of(tmp_path / "hf", raw, stored)
  for name, context in (
    ("one", contextlib.nullcontext()),
    ("many", small_shards(monkeypatch)),
  ):
    with context:
      conversion.convert(tmp_path / "hf", tmp_path / name, "gemma_pytorch")
    expected = state_dict_of(stored)
    files = [
      TorchFile(file)
      for pattern in ("*.ckpt", "*.bin")
      for file in sorted((tmp_path / name).glob(pattern))
    ]
    found = {n: file.read(n) for file in files for n in file.tensors}
    assert set(found) == set(expected)
    for n, values in found.items():
      assert values.dtype == BFLOAT16
      np.testing.assert_array_equal(values, expected[n])
    model = gemma_funnel.load(tmp_path / name)
    same(reference, model)
    # Its scale and softcaps lie beside the weights.
    assert model.config == reference.config


# The configuration.


RELEASED = [name for name in PRESETS if name.startswith(("gemma1_", "gemma2_"))]


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("int8", [False, True])
def test_released_sizes_are_known(tmp_path, name, int8):
  config = TransformerConfig.preset(name)
  headers = {"freqs_cis": Header((16_384, 128), np.dtype(np.complex64))}
  for tensor in gemma_pytorch.tensors(config):
    quantized = int8 and len(tensor.shape) == 2
    dtype = np.dtype(np.int8 if quantized else BFLOAT16)
    headers[tensor.name] = Header(tensor.shape, dtype)
    if quantized:
      scales = Header(tensor.shape[:1], np.dtype(np.float32))
      headers[tensor.name.removesuffix(".weight") + ".weight_scaler"] = scales
  weights = detect.Weights(
    "it", "gemma_pytorch", tmp_path, lambda: tiny.Headers(headers)
  )
  assert detect.read_config(weights) == (config, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_unreleased_sizes_need_a_configuration(tmp_path, family):
  # Even of a Gemma 1: only N * H and K * H can be told.
  raw = FAMILIES[family]
  stored = tiny.random_tensors(raw)
  reference = reference_of(tmp_path / "hf", raw, stored)
  folder = tmp_path / "pytorch"
  folder.mkdir()
  state = state_dict_of(stored)
  save(folder / "a.ckpt", state)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(folder)
  keys = raw["num_key_value_heads"] * H
  for what in (
    "no published Gemma",
    detect.SIDECAR,
    f"'mlp_dim': {F}",
    f"'query_width': {N * H}",
    f"'key_width': {keys}",
  ):
    assert what in str(error.value)
  # By the command, a configuration of Hugging Face's will do.
  config = tmp_path / "hf" / "config.json"
  flags = ["--to=hf", f"--config={config}"]
  assert main([str(folder), str(tmp_path / "back"), *flags]) == 0
  same(reference, gemma_funnel.load(tmp_path / "back"))
  sidecar = dict(model=reference.config.to_dict(), funnel="off")
  (folder / detect.SIDECAR).write_text(json.dumps(sidecar))
  same(reference, gemma_funnel.load(folder))
