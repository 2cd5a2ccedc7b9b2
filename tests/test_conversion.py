"""Converting: plans, what comes along, dtypes, verifying, the command."""

import dataclasses
import json
import math
import pathlib
import threading

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_flops import PUBLISHED
from tiny_checkpoints import GEMMA1, GEMMA2, L, random_tensors, write
import tiny_run

import gemma_funnel
from gemma_funnel import convert
from gemma_funnel.config import RopeScaling, TransformerConfig, resolve_funnel
from gemma_funnel.convert import __main__ as command
from gemma_funnel.convert import (
  conversion,
  param_mapping,
  run,
  sums,
  verify,
  writer,
)
from gemma_funnel.convert.reader import BLOCK_BYTES, open_checkpoint
from gemma_funnel.data import sources, tokenizer

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = writer.FORMATS
LEARNED = "start=1,pool=attention,recover=attend+start=2,recover=gate"


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  return write(folder, GEMMA2, random_tensors(GEMMA2, ml_dtypes.bfloat16))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  text = pathlib.Path(tiny_run.write_corpus(folder)).read_text()
  documents = [sources.Document(key="0", text=text)]
  tokenizer.train(documents, 320, folder / "tokenizer.model")
  return folder / "tokenizer.model"


# Plans.


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("to", FORMATS)
def test_plans_of_the_published_models(name, to):
  """Shapes, bytes, shards and blocks, without a weight."""
  config = TransformerConfig.preset(name)
  if to in ("google", "gemma_pytorch") and name[:7] not in (
    "gemma1_",
    "gemma2_",
  ):
    with pytest.raises(ValueError, match="expected a Gemma 1 or 2, or the"):
      writer.make_spec(to, config, (), BFLOAT16)
    return
  plan = writer.make_spec(to, config, (), BFLOAT16)
  # Google's embedding has 128 rows more.
  rows = 128 * config.embed_dim if to == "google" else 0
  assert plan.nbytes == 2 * (PUBLISHED[name] + rows)
  for file in plan.files:
    headers = plan.headers(file)
    size = sum(h.nbytes for h in headers.values())
    if to == "hf" or (to == "gemma_pytorch" and len(plan.files) > 1):
      assert size <= writer.SHARD_BYTES or len(headers) == 1
    for tensor in file.tensors:
      # What is in memory at once does not grow with the model.
      sizes = [
        math.prod(
          param_mapping.shape_of(
            view.axes, param_mapping.sliced_sizes(plan.sizes, slices)
          )
        )
        for view in tensor.views
        for slices in plan.blocks(view)
      ]
      assert sum(sizes) == np.prod(tensor.shape, dtype=np.int64)
      assert max(sizes) * 2 <= BLOCK_BYTES
  if len(plan.files) > 1:
    (index,) = (json.loads(t) for n, t in plan.texts.items() if "index" in n)
    assert index["metadata"]["total_size"] == plan.nbytes
    named = {(file.name, t.name) for file in plan.files for t in file.tensors}
    assert {(f, t) for t, f in index["weight_map"].items()} == named


@pytest.mark.parametrize("name", ["gemma3_270m", "llama2_7b"])
def test_only_gemmas_have_the_special_ids_of_gemma(name):
  plan = writer.make_spec("hf", TransformerConfig.preset(name), (), BFLOAT16)
  for file in ("config.json", "generation_config.json"):
    found = json.loads(plan.texts[file]).get("pad_token_id", "none")
    assert found == (0 if "gemma" in name else "none")


def test_the_shards_of_27b():
  plan = writer.make_spec(
    "hf", TransformerConfig.preset("gemma2_27b"), (), BFLOAT16
  )
  names = [file.name for file in plan.files]
  assert len(names) == 12 and names[3] == "model-00004-of-00012.safetensors"
  raw = json.loads(plan.texts["config.json"])
  assert (raw["query_pre_attn_scalar"], raw["head_dim"]) == (144, 128)


# What comes along.


def test_dtypes(source, tmp_path):
  for name in ("float32", "float16", "bfloat16"):
    convert.convert(source, tmp_path / name, "hf", dtype=name)
    stored = load_file(tmp_path / name / "model.safetensors")
    assert {v.dtype.name for v in stored.values()} == {name}
    raw = json.loads((tmp_path / name / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == name
    for key, values in random_tensors(GEMMA2, ml_dtypes.bfloat16).items():
      np.testing.assert_array_equal(stored[key], values.astype(name))


def test_mixed_dtypes_become_the_one_that_holds_all(source, tmp_path):
  tensors = random_tensors(GEMMA2, ml_dtypes.bfloat16)
  for other, found in ((np.float16, "float32"), (np.float32, "float32")):
    mixed = dict(tensors)
    norm = "model.norm.weight"
    mixed[norm] = mixed[norm].astype(other)
    save_file(mixed, source / "model.safetensors")
    assert open_checkpoint(source).dtype.name == found


def test_double_precision_has_to_be_cast_by_name(source, tmp_path):
  save_file(random_tensors(GEMMA2, np.float64), source / "model.safetensors")
  with pytest.raises(ValueError, match="float64: expected --dtype"):
    convert.convert(source, tmp_path / "there", "hf")
  convert.convert(source, tmp_path / "there", "hf", dtype="float32")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("funnel", ["start=1,stride=3", LEARNED])
def test_a_funnel_comes_along(source, tmp_path, to, funnel, capsys):
  """Its stages by name, what it has learned in tensors of its own."""
  first = tmp_path / "first"
  model = gemma_funnel.load(source, funnel, dtype="bfloat16")
  # As a run would have trained it: no part is what it starts as.
  keys = iter(jax.random.split(jax.random.key(0), 99))
  noise = lambda p: jax.random.normal(next(keys), p.shape, p.dtype)
  nnx.update(model, jax.tree.map(noise, nnx.state(model)))
  _write_own(model, first)
  capsys.readouterr()
  there = tmp_path / to
  convert.convert(first, there, to)
  for path in (first, there):
    assert convert.describe(path).stages == resolve_funnel(funnel, L)
    same(gemma_funnel.load(path, dtype="bfloat16"), model)
  assert capsys.readouterr().out == ""  # Nothing was made afresh.
  plain = gemma_funnel.load(there, "off", dtype="bfloat16")
  assert plain.stages == ()
  same(plain, model.with_funnel("off"))
  assert (there / "funnel.safetensors").exists() == (
    funnel == LEARNED and to != "orbax"
  )
  back = tmp_path / "back"
  convert.convert(there, back, "orbax")
  same(gemma_funnel.load(back, dtype="bfloat16"), model)


def _write_own(model, folder):
  """Our format, by Orbax itself."""
  import orbax.checkpoint as ocp

  folder.mkdir()
  params = nnx.to_pure_dict(nnx.state(model))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "params", params)
  config = dict(
    gemma_funnel="0",
    model=model.config.to_dict(),
    funnel=gemma_funnel.config.format_funnel(model.stages),
  )
  (folder / "config.json").write_text(json.dumps(config))


def test_learned_parts_that_are_missing_are_named(source, tmp_path):
  _write_own(gemma_funnel.load(source, LEARNED), tmp_path / "own")
  convert.convert(tmp_path / "own", tmp_path / "hf", "hf")
  beside = tmp_path / "hf" / "funnel.safetensors"
  tensors = load_file(beside)
  del tensors["funnel.1.recovery.gate"]
  save_file(tensors, beside)
  (tmp_path / "hf" / sums.SUMS).unlink()
  with pytest.raises(
    ValueError, match=r"missing: \['funnel.1.recovery.gate'\]"
  ):
    gemma_funnel.load(tmp_path / "hf")
  beside.unlink()
  with pytest.raises(ValueError, match="funnel.safetensors: cannot be read"):
    gemma_funnel.load(tmp_path / "hf")


@pytest.mark.parametrize("funnel", [3, "start=1,stop=9", "half"])
def test_a_funnel_that_is_none_is_named(source, funnel):
  raw = GEMMA2 | {"funnel": funnel}
  (source / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="config.json: funnel="):
    gemma_funnel.load(source)


@pytest.mark.parametrize("to", FORMATS)
def test_tokenizers_come_along(source, tmp_path, to, tokenizer_file):
  (source / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
  (source / "chat_template.jinja").write_text("{{ messages }}")
  there = tmp_path / to
  convert.convert(source, there, to)
  assert convert.describe(there).tokenizer_path == str(
    there / "tokenizer.model"
  )
  for name in ("tokenizer.model", "chat_template.jinja"):
    assert (there / name).read_bytes() == (source / name).read_bytes()
  if to == "hf":
    described = json.loads((there / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "GemmaTokenizer"
    assert (described["bos_token"], described["add_bos_token"]) == ("<s>", True)


@pytest.mark.parametrize(
  ("preset", "kind"),
  [("gemma2_2b", "GemmaTokenizer"), ("llama2_7b", "LlamaTokenizer")],
)
def test_a_tokenizer_is_called_after_its_family(preset, kind, tokenizer_file):
  config = TransformerConfig.preset(preset)
  lone = tokenizer.Tokenizer.load(tokenizer_file)
  spec = writer.make_spec("hf", config, (), BFLOAT16, tokenizer=lone)
  described = json.loads(spec.texts["tokenizer_config.json"])
  assert described["tokenizer_class"] == kind


def test_a_tokenizer_that_is_none_is_told_of_before_anything(source, tmp_path):
  (source / "tokenizer.model").write_bytes(b"none")
  with pytest.raises(ValueError, match="tokenizer.model"):
    convert.convert(source, tmp_path / "there", "hf")
  assert sorted(tmp_path.iterdir()) == [source]


def test_a_tokenizer_json_alone_is_found(source):
  (source / "tokenizer.json").write_text("{}")
  found = convert.describe(source).tokenizer_path
  assert found == str(source / "tokenizer.json")
  (source / "tokenizer.model").write_text("")
  found = convert.describe(source).tokenizer_path
  assert found == str(source / "tokenizer.model")


def test_what_others_cannot_express_is_refused(source, tmp_path):
  changes = dict(post_norms=False, window=7, attn_softcap=2.0)
  config = dataclasses.replace(open_checkpoint(source).config, **changes)
  with pytest.raises(
    ValueError, match=r"gemma2, cannot have model.post_norms=False"
  ):
    writer.make_spec("hf", config, (), BFLOAT16)
  odd = dataclasses.replace(config, post_norms=True, norm_eps=1e-4)
  raw = json.loads(
    writer.make_spec("hf", odd, (), BFLOAT16).texts["config.json"]
  )
  assert raw["rms_norm_eps"] == 1e-4


# Of no Gemma 1 or 2, one by one; some are of other families.
FIELDS = dict(
  activation="silu",
  norm_offset=0.0,
  embed_scale=1.5,
  tied=False,
  qk_norm=True,
  attention_bias=True,
  local_rope_base=77.0,
  rope_scaling=RopeScaling("llama3", 2.0, original_max_length=16),
)


def _random_model(config, funnel=None):
  model = gemma_funnel.Transformer(config, funnel, rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  noise = lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape, p.dtype)
  nnx.update(model, jax.tree.map(noise, nnx.state(model)))
  return model


def test_our_format_carries_any_model(tmp_path, capsys):
  model = _random_model(TransformerConfig.preset("tiny", **FIELDS), LEARNED)
  first, there = tmp_path / "first", tmp_path / "there"
  _write_own(model, first)
  assert command.main([str(first), str(there), "--to=orbax", "--verify"]) == 0
  assert "0 differ" in capsys.readouterr().err
  found = gemma_funnel.load(there)
  assert found.config == model.config and found.stages == model.stages
  same(found, model)
  tokens = verify.make_prompt(model.config.vocab_size)
  logits = verify.plain_logits(open_checkpoint(there), tokens)
  expected = model.with_funnel("off")(jnp.asarray(tokens)[None])[0]
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  # The head has rows of the vocabulary too.
  convert.convert(first, tmp_path / "small", "orbax", vocab_size=90)
  small = gemma_funnel.load(tmp_path / "small")
  for ours, whole in (
    (small.embedding, model.embedding),
    (small.unembedding, model.unembedding),
  ):
    np.testing.assert_array_equal(ours[...], whole[...][:90])


@pytest.mark.parametrize("field", FIELDS)
def test_what_others_cannot_express_is_named(source, tmp_path, field):
  config = open_checkpoint(source).config
  odd = dataclasses.replace(config, **{field: FIELDS[field]})
  known = field in ("tied", "qk_norm")
  for to in FORMATS[2 if known else 1 :]:
    with pytest.raises(ValueError, match=f"cannot have model.{field}="):
      writer.make_spec(to, odd, (), BFLOAT16)
  fault = "missing" if known else f"cannot have model.{field}="
  with pytest.raises(ValueError, match=fault):
    gemma_funnel.load(source, config=odd)
  if field == "tied":
    _write_own(_random_model(odd), tmp_path / "own")
    with pytest.raises(ValueError, match="tied=False"):
      convert.convert(tmp_path / "own", tmp_path / "there", "google")
    assert not (tmp_path / "there").exists()


def test_what_says_the_same_is_no_difference(source):
  config = open_checkpoint(source).config
  same_model = dict(
    embed_scale=math.sqrt(config.embed_dim), local_rope_base=config.rope_base
  )
  writer.make_spec(
    "hf", dataclasses.replace(config, **same_model), (), BFLOAT16
  )


# What version 0.1 wrote.


def _old_tree(model):
  """Its parameters under the names that they had."""
  params = nnx.to_pure_dict(nnx.state(model))
  for stage in params["funnel"].values():
    for part in ("reducer", "recovery"):
      stage.update(stage.pop(part, {}))
  return params


def _old_config(model):
  """Without the fields of models that were not there."""
  fields = model.config.to_dict()
  return dict(
    model={k: v for k, v in fields.items() if k not in FIELDS},
    funnel=gemma_funnel.config.format_funnel(model.stages).replace(
      "reduce=", "pool="
    ),
    data=dict(tokenizer=""),
  )


@pytest.mark.parametrize("kind", ["run", "orbax", "hf"])
def test_what_version_0_1_wrote_is_read(source, tmp_path, kind, capsys):
  import orbax.checkpoint as ocp

  config = open_checkpoint(source).config
  model = _random_model(config, LEARNED + "+start=0,recover=scaled_delta")
  raw, folder = _old_config(model), tmp_path / "old"
  params = _old_tree(model)
  assert "gate" in params["funnel"][2] and "attend" in params["funnel"][1]
  if kind == "hf":
    _write_own(model, tmp_path / "own")
    convert.convert(tmp_path / "own", folder, "hf")
    names = ("reducer.", "recovery.")
    learned = load_file(folder / "funnel.safetensors")
    old = {
      n.replace(names[0], "").replace(names[1], ""): v
      for n, v in learned.items()
    }
    save_file(old, folder / "funnel.safetensors")
    (folder / sums.SUMS).unlink()  # Version 0.1 wrote none.
  else:
    tree = folder / "params"
    if kind == "run":
      step = folder / "checkpoints" / "3"
      tree = step / "params"
      (step / "config").mkdir(parents=True)
      (step / "config" / "metadata").write_text(json.dumps(raw))
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tree.absolute(), params)
    if kind == "run":
      run.write_sums(run.path_of(step))
    else:
      raw["gemma_funnel"] = "0.1.0"
    (folder / "config.json").write_text(json.dumps(raw))
  assert convert.describe(folder).stages == model.stages
  capsys.readouterr()
  same(gemma_funnel.load(folder), model)
  convert.convert(folder, tmp_path / "new", "orbax")
  same(gemma_funnel.load(tmp_path / "new"), model)
  assert "fresh" not in capsys.readouterr().out


# Reading back.


@pytest.mark.parametrize("raw", [GEMMA2, GEMMA1], ids=["gemma2", "gemma1"])
def test_streamed_logits_are_the_models(tmp_path, raw):
  folder = write(tmp_path, raw, random_tensors(raw))
  tokens = verify.make_prompt(raw["vocab_size"])
  logits = verify.plain_logits(open_checkpoint(folder), tokens)
  expected = gemma_funnel.load(folder)(jnp.asarray(tokens)[None])[0]
  np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_differences_are_found(source, tmp_path, capsys):
  there = tmp_path / "there"
  flags = [str(source), str(there), "--to=hf", "--verify"]
  assert command.main(flags) == 0
  assert "35 tensors compared, 0 differ" in capsys.readouterr().err
  file = there / "model.safetensors"
  tensors = load_file(file)
  name = "model.layers.1.mlp.up_proj.weight"
  tensors[name] = tensors[name] + np.float32(0.5).astype(ml_dtypes.bfloat16)
  save_file(tensors, file)
  (there / sums.SUMS).unlink()
  found = verify.compare(open_checkpoint(source), open_checkpoint(there))
  assert found.unequal == ("layers.mlp.up, layer 1",)
  assert found.largest == pytest.approx(0.5, rel=0.02) and found.logits > 0
  # Equal tensors, another function: only the logits tell.
  convert.convert(source, tmp_path / "other", "hf")
  config = tmp_path / "other" / "config.json"
  raw = json.loads(config.read_text())
  config.write_text(json.dumps(raw | {"query_pre_attn_scalar": 12}))
  found = verify.compare(
    open_checkpoint(source), open_checkpoint(tmp_path / "other")
  )
  assert not found.unequal and found.largest == 0 and found.logits > 1e-4
  assert found


def test_rounding_is_no_difference(source, tmp_path, capsys):
  save_file(random_tensors(GEMMA2), source / "model.safetensors")
  flags = ["--to=google", "--dtype=bfloat16", "--verify"]
  assert command.main([str(source), str(tmp_path / "x"), *flags]) == 0
  assert "0 differ" in capsys.readouterr().err


# The command.


def test_dry_run_writes_nothing(source, tmp_path, capsys):
  flags = [str(source), str(tmp_path / "x"), "--to=hf", "--dry_run"]
  assert command.main(flags) == 0
  said = capsys.readouterr().err
  assert "model.safetensors: 35 tensors" in said
  assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--to=hf", "--layout=nested"], "--layout=nested: expected --to=google"),
    (["--to=torch"], "invalid choice: 'torch'"),
    (["--to=hf", "--dtype=int8"], "invalid choice: 'int8'"),
    (["--to=hf", "--vocab_size=0"], "model.vocab_size=0"),
    (
      ["--to=hf", "--config=nowhere.json"],
      "nowhere.json: expected a file, or a preset",
    ),
    (["--to=hf", "--config=gemma2_2b"], "does not fit its configuration"),
    ([], "required: --to"),
  ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, flags, message):
  assert command.main([str(source), str(tmp_path / "x"), *flags]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and message in said
  assert sorted(tmp_path.iterdir()) == [source]


def test_the_destination_may_be_empty_or_below_what_is_not_there(
  source, tmp_path
):
  (tmp_path / "empty").mkdir()
  for name in ("empty", "a/b"):
    convert.convert(source, tmp_path / name, "hf")
    assert (tmp_path / name / "config.json").exists()


def test_blocks_are_read_a_few_ahead(source, tmp_path, monkeypatch):
  """Memory is bounded, whatever the disk does."""
  held, most, lock = 0, 0, threading.Lock()
  read = conversion._read

  def counted(*args):
    nonlocal held, most
    values = read(*args)
    with lock:
      held += 1
      most = max(most, held)
    return values

  def written(name, nbytes):
    nonlocal held
    with lock:
      held -= 1

  monkeypatch.setattr(conversion, "_read", counted)
  opened = open_checkpoint(source)
  plan = conversion.spec_for(opened, "hf")
  conversion.write(opened, plan, tmp_path / "x", written)
  assert held == 0
  assert 1 <= most <= conversion.THREADS + 2
