"""Checkpoints as others save and wrap them: read right, or refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import GEMMA2, V, random_tensors, write, write_shards
import torch

import gemma_funnel
from gemma_funnel import convert

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = np.arange(2, 14)[None]


def _renamed(change):
  return lambda folder, raw, stored: write(
    folder, raw, {change(name): x for name, x in stored.items()}
  )


def _with(tensors=lambda stored: {}, **keys):
  """Further tensors and keys of the configuration."""
  return lambda folder, raw, stored: write(
    folder, raw | keys, stored | tensors(stored)
  )


def _head(dtype):
  return lambda stored: {HEAD: stored[EMBEDDING].astype(dtype)}


def _multimodal(prefix, head):
  def make(folder, raw, stored):
    tensors = {prefix + n.removeprefix("model."): x for n, x in stored.items()}
    tensors["vision_tower.encoder.weight"] = np.ones((2, 2), np.float32)
    tensors[head] = stored[EMBEDDING]
    return write(folder, raw, tensors)

  return make


def _beside_bin(folder, raw, stored):
  write(folder, raw, stored)
  other = {name: torch.zeros(x.shape) for name, x in stored.items()}
  torch.save(other, folder / "pytorch_model.bin")


def _index_names_more(folder, raw, stored):
  write_shards(folder, raw, stored)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  shard = next(iter(index["weight_map"].values()))
  index["weight_map"] |= {HEAD: shard, "model.rotary_emb.inv_freq": shard}
  path.write_text(json.dumps(index))


def _bom(folder, raw, stored):
  write(folder, raw, stored)
  path = folder / "config.json"
  path.write_text("\ufeff" + path.read_text())


@pytest.mark.parametrize(
  "make",
  [
    pytest.param(_renamed(lambda n: f"_orig_mod.{n}"), id="compiled"),
    pytest.param(_renamed(lambda n: f"module.{n}"), id="distributed"),
    pytest.param(
      _renamed(lambda n: n.replace("layers.0.", "layers.0._orig_mod.")),
      id="layer by layer",
    ),
    pytest.param(_renamed(lambda n: f"base_model.model.{n}"), id="peft"),
    pytest.param(_renamed(lambda n: n.removeprefix("model.")), id="trunk"),
    pytest.param(
      _multimodal("language_model.model.", "language_model.lm_head.weight"),
      id="sees images",
    ),
    pytest.param(
      _multimodal("model.language_model.", HEAD), id="sees images, newer"
    ),
    pytest.param(_beside_bin, id="beside another"),
    pytest.param(_index_names_more, id="index names more"),
    pytest.param(_bom, id="byte order mark"),
    pytest.param(
      _with(_head("f4"), tie_word_embeddings=False), id="equal head"
    ),
    pytest.param(_with(_head("f8")), id="head of another dtype"),
    pytest.param(
      _with(lambda _: {"score.weight": np.ones(3)}), id="classifier"
    ),
    pytest.param(
      _with(lambda _: {"model.rotary_emb.original_inv_freq": np.ones(3)}),
      id="buffer",
    ),
    pytest.param(
      _with(unsloth_version="1", rope_scaling=None, my_notes="x"), id="keys"
    ),
  ],
)
def test_what_others_save_is_read(make, tmp_path):
  stored = random_tensors(GEMMA2)
  (tmp_path / "plain").mkdir()
  write(tmp_path / "plain", GEMMA2, stored)
  (tmp_path / "saved").mkdir()
  make(tmp_path / "saved", GEMMA2, stored)
  plain, saved = (
    gemma_funnel.load(tmp_path / n)(jnp.asarray(TOKENS))
    for n in ("plain", "saved")
  )
  np.testing.assert_allclose(saved, plain, rtol=1e-6, atol=1e-6)


def _adapter(folder):
  save_file({"a": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
  "keys, spoil, words",
  [
    ({}, _adapter, "adapter_model.safetensors.*merge_and_unload"),
    (
      dict(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rope_scaling={"rope_type": "linear", "factor": 8.0},
      ),
      None,
      "rope_scaling=.*'linear'",
    ),
    (
      dict(rope_parameters={"rope_theta": 7.0}),
      None,
      "the base of RoPE is said",
    ),
    (dict(partial_rotary_factor=0.5), None, "partial_rotary_factor=0.5"),
    (dict(residual_multiplier=2.0), None, "residual_multiplier=2.0"),
    (dict(num_experts=4), None, "num_experts=4"),
    (
      dict(layer_types=["full_attention"] * 3, sliding_window_pattern=2),
      None,
      "which layers are local is said twice",
    ),
    (dict(mlp_bias=True), None, "mlp_bias=True"),
    (
      {},
      lambda folder: (folder / "generation_config.json").write_text(
        '{"eos_token_id": [1, 999]}'
      ),
      "generation_config.json: eos_token_id",
    ),
  ],
)
def test_what_would_be_another_function_is_refused(
  keys, spoil, words, tmp_path
):
  write(tmp_path, GEMMA2 | keys, random_tensors(GEMMA2))
  if spoil:
    spoil(tmp_path)
  with pytest.raises(ValueError, match=words) as error:
    convert.describe(tmp_path)
  assert "\n" not in str(error.value)


def test_special_ids_and_stops_are_kept(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  keys = dict(eos_token_id=[1, 7], bos_token_id=5, id2label={"0": "yes"})
  write(source, GEMMA2 | keys, random_tensors(GEMMA2))
  convert.convert(source, tmp_path / "own", "orbax")
  convert.convert(tmp_path / "own", tmp_path / "back", "hf")
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  assert {key: written[key] for key in keys} == keys
  for name in ("source", "own", "back"):
    assert convert.describe(tmp_path / name).stop_ids == (1, 7)


def test_what_a_link_leads_to_is_not_copied(tmp_path, capsys):
  source, secret = tmp_path / "a" / "source", tmp_path / "secret"
  source.mkdir(parents=True)
  write(source, GEMMA2, random_tensors(GEMMA2))
  secret.write_text("{}")
  for name in ("added_tokens.json", "chat_template.jinja"):
    (source / name).symlink_to(secret)
  (source / "tokenizer_config.json").write_text("no JSON")
  convert.convert(source, tmp_path / "there", "hf")
  names = {path.name for path in (tmp_path / "there").iterdir()}
  assert names == {
    *("config.json", "generation_config.json", "model.safetensors"),
    "sums.json",
  }
  assert capsys.readouterr().err.count("is left out") == 3
  (source / "tokenizer.model").symlink_to(secret)
  with pytest.raises(ValueError, match="secret"):
    convert.convert(source, tmp_path / "other", "hf")
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["segment_BT", "position_BT", "context_BT"])
def test_arguments_of_another_shape_are_refused(name):
  config = gemma_funnel.TransformerConfig.preset("tiny", vocab_size=V)
  model = gemma_funnel.Transformer(config, rngs=_rngs())
  with pytest.raises(ValueError, match=f"{name} has shape .1, 12.: expected"):
    model.encode(np.repeat(TOKENS, 2, 0), **{name: np.ones((1, 12), int)})


def _rngs():
  from flax import nnx

  return nnx.Rngs(0)
