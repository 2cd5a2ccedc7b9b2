"""Google's trees: made and restored by Orbax itself, and by its rules.

No code of ours makes them: `google_tree` is written from Google's names and
shapes alone, and Orbax saves what it makes. (test_google_parity.py runs
Google's own code.)
"""

import dataclasses
import functools
import json
import pathlib
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
import tiny_checkpoints as tiny
from tiny_checkpoints import D, F, H, K, L, N, V

import gemma_funnel
from gemma_funnel.config import PRESETS, TransformerConfig
from gemma_funnel.convert import conversion, detect, google, writer
from gemma_funnel.convert.__main__ import main
from gemma_funnel.convert.orbax_tree import OrbaxTree
from gemma_funnel.convert.reader import open_checkpoint
from gemma_funnel.convert.tensor_io import Header
from gemma_funnel.model import Transformer

# Grouped queries, one head of keys and values, and as many as of queries,
# which Google stores as one tensor.
FAMILIES = {
  "gqa": tiny.GEMMA2,
  "mqa": {**tiny.GEMMA1, "num_key_value_heads": 1},
  "mha": {**tiny.GEMMA1, "num_key_value_heads": N},
}
KINDS = ("flat", "nested", "stacked", "kauldron")
WRITTEN = tuple(kind for kind in KINDS if kind != "kauldron")


@functools.cache
def stored_of(family, dtype="float32"):
  """Hugging Face's tensors."""
  numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
  return tiny.random_tensors(FAMILIES[family], numpy_dtype)


@functools.cache
def reference_of(family, dtype="float32"):
  """The model that they are, loaded from Hugging Face's format."""
  with tempfile.TemporaryDirectory() as name:
    return gemma_funnel.load(write_hf(name, family, dtype), dtype=dtype)


def write_hf(folder, family, dtype="float32"):
  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True)
  return tiny.write(folder, FAMILIES[family], stored_of(family, dtype))


def layer_of(stored, raw, layer, transposed):
  """{module: {leaf: values}} of a layer, as Google's modules hold it."""
  get = lambda name: stored[f"model.layers.{layer}.{name}.weight"]
  heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]

  def project(name, count):
    """[heads * H, D] to [heads, D, H]."""
    rows = get(f"self_attn.{name}")
    return np.stack([rows[n * H : (n + 1) * H].T for n in range(count)])

  query, key, value = (
    project("q_proj", heads),
    project("k_proj", kv_heads),
    project("v_proj", kv_heads),
  )
  out = get("self_attn.o_proj")
  gating = np.stack([get("mlp.gate_proj"), get("mlp.up_proj")])
  modules = {
    "attn/attn_vec_einsum": {
      "w": np.stack([out[:, n * H : (n + 1) * H].T for n in range(heads)])
    },
    "mlp": {
      "gating_einsum": gating if transposed else np.swapaxes(gating, 1, 2),
      "linear": get("mlp.down_proj").T,
    },
  }
  if heads == kv_heads:
    modules["attn/qkv_einsum"] = {"w": np.stack([query, key, value])}
  else:
    modules["attn/q_einsum"] = {"w": query}
    modules["attn/kv_einsum"] = {"w": np.stack([key, value])}
  norms = {"pre_attention_norm": "input_layernorm"}
  if raw["model_type"] == "gemma2":
    norms |= {
      "post_attention_norm": "post_attention_layernorm",
      "pre_ffw_norm": "pre_feedforward_layernorm",
      "post_ffw_norm": "post_feedforward_layernorm",
    }
  else:
    norms["pre_ffw_norm"] = "post_attention_layernorm"
  for theirs, ours in norms.items():
    modules[theirs] = {"scale": get(ours)}
  return modules


def google_tree(family, kind, transposed, dtype="float32", rows=V):
  """The tree of `stored_of` in one of Google's layouts."""
  raw, stored = FAMILIES[family], stored_of(family, dtype)
  embedding = stored["model.embed_tokens.weight"]
  embedding = np.pad(embedding, [(0, rows - V), (0, 0)])
  layers = [layer_of(stored, raw, i, transposed) for i in range(L)]
  top = {
    "embedder": {"input_embedding": embedding},
    "final_norm": {"scale": stored["model.norm.weight"]},
  }
  if kind in ("nested", "kauldron"):
    for i, modules in enumerate(layers):
      block = top[f"layer_{i}"] = {}
      for module, leaves in modules.items():
        node = block
        for word in module.split("/"):
          node = node.setdefault(word, {})
        node.update(leaves)
    if kind == "nested":
      return top
    return {
      "params": top,
      "opt_state": {"0": {"mu": np.ones((3, 2), np.float32)}},
      "step": np.int32(7),
      "collections": {},
    }
  # These layouts have parameters of the MLP in modules of their own.
  layers = [
    {
      **{name: leaves for name, leaves in modules.items() if name != "mlp"},
      **{f"mlp/{name}": {"w": x} for name, x in modules["mlp"].items()},
    }
    for modules in layers
  ]
  named = {f"transformer/{name}": leaves for name, leaves in top.items()}
  if kind == "flat":
    for i, modules in enumerate(layers):
      for name, leaves in modules.items():
        named[f"transformer/layer_{i}/{name}"] = leaves
    return named
  period = 2 if raw["model_type"] == "gemma2" else 1
  for residue in range(period):
    of_kind = [layers[i] for i in range(L) if i % period == residue]
    for name, leaves in of_kind[0].items():
      whole = f"transformer/stacked_layers/attention_type_{residue}/{name}"
      named[whole] = {
        leaf: np.stack([modules[name][leaf] for modules in of_kind])
        for leaf in leaves
      }
  return named


def save(path, tree, how="standard"):
  """By Orbax: what Google's code of today, and of the releases' time, calls."""
  if how == "standard":
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, tree)
      checkpointer.wait_until_finished()
    return path
  options = {
    "legacy": dict(use_ocdbt=False),
    "zarr3": dict(use_zarr3=True),
    "zarr3 files": dict(use_zarr3=True, use_ocdbt=False),
    "chunked": dict(),
  }[how]
  save_args = None
  if how == "chunked":
    tree = jax.tree.map(jnp.asarray, tree)
    save_args = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=100), tree)
  with ocp.PyTreeCheckpointer(**options) as checkpointer:
    checkpointer.save(path, tree, save_args=save_args)
  return path


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def config_of(family):
  return reference_of(family).config


# Trees of others.


# A sample in which each layout meets each family, both layouts of
# gating_einsum and several ways of being saved.
@pytest.mark.parametrize(
  "family, kind, transposed, how, dtype",
  [
    ("gqa", "flat", False, "standard", "float32"),
    ("gqa", "flat", True, "legacy", "bfloat16"),
    ("gqa", "nested", True, "zarr3", "float32"),
    ("gqa", "stacked", False, "chunked", "float32"),
    ("gqa", "stacked", True, "standard", "bfloat16"),
    ("gqa", "kauldron", False, "standard", "float32"),
    ("mqa", "flat", True, "zarr3 files", "float32"),
    ("mqa", "nested", False, "standard", "bfloat16"),
    ("mqa", "stacked", True, "legacy", "float32"),
    ("mqa", "kauldron", True, "chunked", "float32"),
    ("mha", "flat", False, "chunked", "bfloat16"),
    ("mha", "nested", True, "legacy", "float32"),
    ("mha", "stacked", False, "zarr3", "float32"),
    ("mha", "kauldron", True, "zarr3", "float32"),
  ],
)
def test_a_tree_is_the_model(tmp_path, family, kind, transposed, how, dtype):
  tree = google_tree(family, kind, transposed, dtype)
  path = tmp_path / "tree"
  if kind == "kauldron":
    # The trainer's folder of a step, beside other items.
    path = tmp_path / "ckpt_7"
    (path / "dataset").mkdir(parents=True)
    (path / "_CHECKPOINT_METADATA").write_text("{}")
    save(path / "default", tree, how)
  else:
    save(path, tree, how)
  if how == "chunked":
    assert_chunked(path)
  model = gemma_funnel.load(path, dtype=dtype, config=config_of(family))
  same(reference_of(family, dtype), model)


def assert_chunked(path):
  tree = OrbaxTree(path if (path / "_METADATA").exists() else path / "default")
  for name, array in tree._arrays.items():
    chunk = array.chunk_layout.read_chunk.shape
    assert "norm" in name or "opt" in name or chunk != array.shape or not chunk


def test_kauldron_by_its_own_folder(tmp_path):
  tree = google_tree("mqa", "kauldron", False)
  save(tmp_path / "step" / "default", tree)
  model = gemma_funnel.load(
    tmp_path / "step" / "default", config=config_of("mqa")
  )
  same(reference_of("mqa"), model)


def test_an_old_tree_has_no_metadata(tmp_path):
  path = save(tmp_path / "tree", google_tree("gqa", "flat", False))
  (path / "_METADATA").unlink()
  # Where small values were once aggregated.
  (path / "checkpoint").write_bytes(b"\x80")
  model = gemma_funnel.load(path, config=config_of("gqa"))
  same(reference_of("gqa"), model)


@pytest.mark.parametrize("given", ["archive", "tree"])
def test_the_archive_of_a_release(tmp_path, given):
  folder = tmp_path / "archive"
  folder.mkdir()
  tokenizer = folder / "tokenizer.model"
  tokenizer.write_bytes(b"")
  save(folder / "2b", google_tree("mqa", "flat", False), "legacy")
  path = folder if given == "archive" else folder / "2b"
  found = gemma_funnel.convert.describe(path)
  assert found.tokenizer_path == str(tokenizer)
  assert not found.is_run
  # All of a Gemma 1 but its context follows from its shapes.
  ours = dataclasses.replace(config_of("mqa"), max_length=8192)
  assert found.config == ours
  same(reference_of("mqa"), gemma_funnel.load(path, config=config_of("mqa")))


def test_two_trees_side_by_side(tmp_path):
  for name in ("2b", "2b-it"):
    save(tmp_path / name, google_tree("mqa", "flat", False), "legacy")
  with pytest.raises(ValueError, match=r"several.*\(2b\).*\(2b-it\)"):
    gemma_funnel.load(tmp_path)
  assert gemma_funnel.load(tmp_path / "2b").config.num_kv_heads == 1


def test_gating_that_cannot_be_told(tmp_path):
  # Not even where a configuration is given: either would fit.
  tree = google_tree("mqa", "nested", False)
  for i in range(L):
    tree[f"layer_{i}"]["mlp"] = {
      "gating_einsum": np.zeros((2, D, D), np.float32),
      "linear": np.zeros((D, D), np.float32),
    }
  path = save(tmp_path / "tree", tree)
  config = dataclasses.replace(config_of("mqa"), mlp_dim=D)
  with pytest.raises(ValueError, match=r"gating_einsum.*\(8, 8\).*cannot be"):
    gemma_funnel.load(path, config=config)


@pytest.mark.parametrize("kind", ["flat", "nested"])
def test_what_a_gemma_has_not_is_named(tmp_path, kind):
  tree = google_tree("gqa", kind, False)
  if kind == "flat":
    tree["SigLiPFromPatches_0/embedding"] = {"kernel": np.ones(3)}
    name = "SigLiPFromPatches_0/embedding.kernel"
  else:
    tree["vision_encoder"] = {"embedding": {"kernel": np.ones(3)}}
    tree["embedder"]["mm_input_projection"] = {"w": np.ones((2, 2))}
    name = "vision_encoder.embedding.kernel"
  path = save(tmp_path / "tree", tree)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path, config=config_of("gqa"))
  text = str(error.value)
  assert "unexpected" in text and name in text and "missing" not in text
  assert ("embedder.mm_input_projection.w" in text) == (kind == "nested")


@pytest.mark.parametrize(
  "kind, names",
  [
    (
      "flat",
      (
        "transformer/layer_1/attn/q_einsum.w",
        "transformer/layer_1/mlp/linear.w",
      ),
    ),
    ("nested", ("layer_1.attn.kv_einsum.w", "layer_1.mlp.gating_einsum")),
    ("kauldron", ("params.layer_1.post_ffw_norm.scale",)),
  ],
)
def test_a_missing_layer_is_named(tmp_path, kind, names):
  tree = google_tree("gqa", kind, False)
  layers = tree["params"] if kind == "kauldron" else tree
  for name in [name for name in layers if "layer_1" in name]:
    del layers[name]
  path = save(tmp_path / "tree", tree)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path, config=config_of("gqa"))
  text = str(error.value)
  assert "missing" in text and "unexpected" not in text
  for name in names:
    assert name in text


def test_a_missing_slice_of_stacked_layers_is_named(tmp_path):
  tree = google_tree("gqa", "stacked", False)
  name = "transformer/stacked_layers/attention_type_0/attn/q_einsum"
  tree[name]["w"] = tree[name]["w"][:1]
  path = save(tmp_path / "tree", tree)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path, config=config_of("gqa"))
  assert f"{name}.w" in str(error.value)
  assert f"(1, {N}, {D}, {H})" in str(error.value)
  assert f"(2, {N}, {D}, {H})" in str(error.value)


def test_a_tree_of_something_else(tmp_path):
  path = save(tmp_path / "tree", {"a": {"b": np.ones(3)}})
  for config in (None, config_of("gqa")):
    with pytest.raises(ValueError, match=r"no tree of a Gemma.*a\.b"):
      gemma_funnel.load(path, config=config)


# Trees of ours, restored by Orbax.


def in_place(tree):
  """What a trainer gives to Orbax: shapes, dtypes and shardings."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def tree_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize(
  "family, transposed, dtype",
  [
    ("gqa", False, "bfloat16"),
    ("gqa", True, "float32"),
    ("mqa", True, "bfloat16"),
    ("mha", False, "float32"),
  ],
)
def test_orbax_restores_ours(
  tmp_path, monkeypatch, family, kind, transposed, dtype
):
  monkeypatch.setattr(writer, "_is_transposed", lambda config: transposed)
  hf = write_hf(tmp_path / "hf", family, dtype)
  path = tmp_path / "tree"
  conversion.convert(hf, path, "google", google_layout=kind)
  expected = google_tree(family, kind, transposed, dtype)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(path, in_place(expected))
    tree_equal(expected, restored)
    assert isinstance(jax.tree.leaves(restored)[0], jax.Array)
  with ocp.PyTreeCheckpointer() as checkpointer:
    restore_args = ocp.checkpoint_utils.construct_restore_args(
      in_place(expected)
    )
    tree_equal(expected, checkpointer.restore(path, restore_args=restore_args))


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize(
  "checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer]
)
def test_orbax_restores_ours_without_a_word(tmp_path, kind, checkpointer):
  """As scripts do: neither shapes nor shardings are given."""
  path = tmp_path / "tree"
  hf = write_hf(tmp_path / "hf", "gqa")
  conversion.convert(hf, path, "google", google_layout=kind)
  with checkpointer() as restorer:
    restored = restorer.restore(path)
  tree_equal(google_tree("gqa", kind, False), restored)


@pytest.mark.parametrize("family", FAMILIES)
def test_orbax_restores_our_own_format(tmp_path, family):
  path = tmp_path / "ours"
  conversion.convert(write_hf(tmp_path / "hf", family), path, "orbax")
  graphdef, state = nnx.split(Transformer.abstract(config_of(family)))
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(
      path / "params", in_place(nnx.to_pure_dict(state))
    )
  nnx.replace_by_pure_dict(state, restored)
  same(reference_of(family), nnx.merge(graphdef, state))


# Rows beyond the vocabulary.

ROWS = V + 2


@pytest.fixture
def padded(monkeypatch):
  """As if Gemma had V tokens, and its trees V + 2 rows."""
  monkeypatch.setattr(google, "PUBLISHED_VOCABULARY", V)
  monkeypatch.setattr(google, "PUBLISHED_ROWS", ROWS)


def embedding_of(path, kind="flat"):
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(path)
  lead = "transformer/embedder" if kind in ("flat", "stacked") else "embedder"
  return tree[lead]["input_embedding"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_rows_are_padded_and_left_out_again(tmp_path, padded, kind):
  hf = write_hf(tmp_path / "hf", "gqa", "bfloat16")
  there, back = tmp_path / "there", tmp_path / "back"
  conversion.convert(hf, there, "google", google_layout=kind)
  embedding = embedding_of(there, kind)
  assert embedding.shape == (ROWS, D)
  expected = stored_of("gqa", "bfloat16")["model.embed_tokens.weight"]
  np.testing.assert_array_equal(embedding[:V], expected)
  assert not embedding[V:].any()
  assert open_checkpoint(there).config.vocab_size == V
  assert open_checkpoint(there).dropped_rows() == (2, 0.0)
  same(
    reference_of("gqa", "bfloat16"), gemma_funnel.load(there, dtype="bfloat16")
  )
  conversion.convert(there, back, "hf")
  for name, values in load_file(back / "model.safetensors").items():
    np.testing.assert_array_equal(values, stored_of("gqa", "bfloat16")[name])


@pytest.fixture
def trained_rows(tmp_path, padded):
  """A tree whose last two rows are not zero."""
  tree = google_tree("mqa", "flat", False, rows=ROWS)
  extra = np.arange(2 * D, dtype=np.float32).reshape(2, D) - 4
  tree["transformer/embedder"]["input_embedding"][V:] = extra
  return save(tmp_path / "tree", tree), extra


def test_trained_rows_are_told(tmp_path, trained_rows, capsys):
  path, extra = trained_rows
  same(reference_of("mqa"), gemma_funnel.load(path))
  assert open_checkpoint(path).dropped_rows() == (2, 11.0)
  assert main([str(path), str(tmp_path / "hf"), "--to=hf"]) == 0
  assert "the last 2 rows of the embedding are left out" in (
    capsys.readouterr().err
  )
  # Taken for a model of that many tokens, it keeps them.
  kept = dataclasses.replace(config_of("mqa"), vocab_size=ROWS)
  assert open_checkpoint(path, kept).dropped_rows() == (0, 0.0)
  model = gemma_funnel.load(path, config=kept)
  np.testing.assert_array_equal(model.embedding[...][V:], extra)


@pytest.mark.parametrize("flag", ["--layout=nested", f"--vocab_size={ROWS}"])
def test_trained_rows_are_kept_where_there_is_room(
  tmp_path, trained_rows, capsys, flag
):
  path, _ = trained_rows
  there = tmp_path / "there"
  assert main([str(path), str(there), "--to=google", flag]) == 0
  kind = "nested" if "nested" in flag else "flat"
  kept = embedding_of(there, kind)
  np.testing.assert_array_equal(kept, embedding_of(path, "flat"))
  assert kept[V:].astype(np.float32).any()
  assert "the last 2 rows" not in capsys.readouterr().err


def test_rows_that_are_zero_are_not_worth_a_line(tmp_path, padded, capsys):
  path = save(tmp_path / "tree", google_tree("mqa", "flat", False, rows=ROWS))
  assert main([str(path), str(tmp_path / "hf"), "--to=hf"]) == 0
  assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "google", "orbax", "gemma_pytorch"])
@pytest.mark.parametrize("vocab_size", [V - 3, V, V + 1, V + 5])
def test_vocab_size(tmp_path, padded, to, vocab_size):
  path = save(tmp_path / "tree", google_tree("mqa", "flat", False, rows=ROWS))
  there = tmp_path / "there"
  flags = [f"--to={to}", f"--vocab_size={vocab_size}"]
  assert main([str(path), str(there), *flags]) == 0
  model = gemma_funnel.load(there)
  if to == "google":
    # Of its own, Google has V tokens or ROWS rows.
    stored = ROWS if V <= vocab_size <= ROWS else vocab_size
    assert embedding_of(there).shape == (stored, D)
  assert model.config.vocab_size == vocab_size
  expected = np.zeros((vocab_size, D), np.float32)
  expected[:V] = stored_of("mqa")["model.embed_tokens.weight"][:vocab_size]
  np.testing.assert_array_equal(model.embedding[...], expected)


@pytest.mark.parametrize("rows", [V - 1, V + 1, V + 3])
def test_other_rows_are_an_error(tmp_path, padded, rows):
  tree = google_tree("gqa", "flat", False, rows=V + 3)
  embedder = tree["transformer/embedder"]
  embedder["input_embedding"] = embedder["input_embedding"][:rows]
  path = save(tmp_path / "tree", tree)
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path, config=config_of("gqa"))
  assert "transformer/embedder.input_embedding" in str(error.value)
  assert f"({rows}, {D})" in str(error.value)
  assert f"({V}, {D})" in str(error.value)


# The configuration, from shapes alone.


def weights_of(tensors, folder, format_):
  headers = {t.name: Header(t.shape, np.dtype(np.float32)) for t in tensors}
  return detect.Weights("it", format_, folder, lambda: tiny.Headers(headers))


RELEASED = [name for name in PRESETS if name.startswith(("gemma1_", "gemma2_"))]


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_released_sizes_are_known(tmp_path, name, kind, transposed):
  config = TransformerConfig.preset(name)
  for rows in (256_000, 256_128):
    tensors, _ = google.tensors(config, kind, transposed, rows)
    weights = weights_of(tensors, tmp_path, "google")
    assert detect.read_config(weights) == (config, ())
    reader = detect.open_tensors(weights)[1]
    assert google.is_transposed(reader) == transposed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mqa", "mha"])
def test_an_unreleased_gemma1_is_inferred(tmp_path, family, kind):
  path = tmp_path / "tree"
  save(path, google_tree(family, kind, False))
  model = gemma_funnel.load(path)
  assert model.config == dataclasses.replace(config_of(family), max_length=8192)
  assert model.config.query_pre_attn_scalar == H
  same(reference_of(family), model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreleased_gemma2_needs_a_configuration(tmp_path, kind):
  path = tmp_path / "tree"
  save(path, google_tree("gqa", kind, False))
  with pytest.raises(ValueError) as error:
    gemma_funnel.load(path)
  text = str(error.value)
  assert "no published Gemma" in text and detect.SIDECAR in text
  for size in (
    f"'num_layers': {L}",
    f"'mlp_dim': {F}",
    f"'head_dim': {H}",
    f"'num_kv_heads': {K}",
    f"'vocab_size': {V}",
  ):
    assert size in text
  # What it asks for.
  sidecar = dict(model=config_of("gqa").to_dict(), funnel="off")
  (path / detect.SIDECAR).write_text(json.dumps(sidecar))
  same(reference_of("gqa"), gemma_funnel.load(path))


@pytest.mark.parametrize(
  "change, word",
  [
    (
      lambda tree: tree["layer_0"]["attn"].pop("attn_vec_einsum"),
      r"layer_0\.attn\.attn_vec_einsum\.w.*no such tensor",
    ),
    (
      lambda tree: tree["layer_0"]["mlp"].update(linear=np.ones(5)),
      r"layer_0\.mlp\.linear.*2 axes.*\(5,\)",
    ),
    (
      lambda tree: tree["embedder"].update(input_embedding=np.ones(5)),
      r"embedder\.input_embedding.*2 axes.*\(5,\)",
    ),
  ],
)
def test_shapes_that_tell_nothing(tmp_path, change, word):
  tree = google_tree("gqa", "nested", False)
  change(tree)
  path = save(tmp_path / "tree", tree)
  with pytest.raises(ValueError, match=word):
    gemma_funnel.load(path)


# The query scale of 9B and 27B, which others have got wrong.


@pytest.mark.parametrize(
  "name, wrong, right", [("gemma2_9b", 224, 256), ("gemma2_27b", 128, 144)]
)
def test_a_query_scale_that_is_known_to_be_wrong(tmp_path, name, wrong, right):
  published = TransformerConfig.preset(name)
  config = {
    **tiny.GEMMA2,
    "vocab_size": published.vocab_size,
    "hidden_size": published.embed_dim,
    "intermediate_size": published.mlp_dim,
    "num_hidden_layers": published.num_layers,
    "num_attention_heads": published.num_heads,
    "num_key_value_heads": published.num_kv_heads,
    "head_dim": published.head_dim,
  }
  (tmp_path / "model.safetensors").write_bytes(b"")
  tiny.write_config(tmp_path, {**config, "query_pre_attn_scalar": wrong})
  with pytest.raises(ValueError, match=rf"\b{wrong}\b.*\b{right}\b"):
    detect.read_config(detect.find(tmp_path))
  tiny.write_config(tmp_path, {**config, "query_pre_attn_scalar": right})
  found, _ = detect.read_config(detect.find(tmp_path))
  assert found.query_pre_attn_scalar == right


def test_a_configuration_by_name_overrides(tmp_path, monkeypatch):
  hf = write_hf(tmp_path / "hf", "gqa")
  ours = config_of("gqa")
  other = dataclasses.replace(ours, query_pre_attn_scalar=5.0)
  monkeypatch.setattr(detect, "published", lambda config: other)
  with pytest.raises(ValueError, match="query_pre_attn_scalar=11, but.* 5:"):
    gemma_funnel.load(hf)
  assert gemma_funnel.load(hf, config=ours).config == ours
