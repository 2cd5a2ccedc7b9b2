"""The same logits as transformers, and nothing wrong that would give them.

Constants bite: the query scale is not head_dim's, head_dim is not D / N, the
window is short, caps are low, norms are not at their initial zero, attention
is peaked. That they do is tested too: each fault that a port is known for is
planted, and must be seen.
"""

import copy
import dataclasses
import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gemma_funnel import convert, flops
from gemma_funnel import layers as layers_lib
from gemma_funnel.config import PRESETS, TransformerConfig
from gemma_funnel.convert import families, huggingface, writer
from gemma_funnel.data import sources, tokenizer
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.model import Transformer

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VISIBLE = 1e-3
VOCAB, WIDTH, HEADS, HEAD_DIM, LENGTH = 97, 32, 4, 10, 150
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _common(**changes):
  return (
    dict(
      vocab_size=VOCAB,
      hidden_size=WIDTH,
      intermediate_size=48,
      num_attention_heads=HEADS,
      head_dim=HEAD_DIM,
      max_position_embeddings=256,
      rms_norm_eps=1e-5,
      attn_implementation="eager",
      rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    | changes
  )


def _gemma2(**changes):
  return transformers.Gemma2Config(
    **_common(
      num_hidden_layers=5,
      num_key_value_heads=2,
      query_pre_attn_scalar=5,
      sliding_window=8,
      attn_logit_softcapping=3.0,
      final_logit_softcapping=4.0,
    )
    | changes
  )


def _gemma1(**changes):
  return transformers.GemmaConfig(**_common(num_hidden_layers=3) | changes)


# Depths are odd, and more than one period of the pattern.
CONFIGS = {
  "gemma2": lambda: _gemma2(),
  "gemma2_period3": lambda: _gemma2(
    num_hidden_layers=7, layer_types=([LOCAL, LOCAL, GLOBAL] * 3)[:7]
  ),
  "gemma1_mqa": lambda: _gemma1(num_key_value_heads=1),
  "gemma1_mha": lambda: _gemma1(num_key_value_heads=HEADS),
}


@functools.cache
def theirs(name):
  """A model of transformers with random weights, norms included."""
  model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for path, weight in model.named_parameters():
      deviation = 0.5 if weight.ndim == 1 else weight.shape[1] ** -0.5
      if "q_proj" in path or "k_proj" in path:
        deviation *= 1.5
      weight.normal_(0, deviation, generator=generator)
  return model


@pytest.fixture(scope="module")
def load_ours(tmp_path_factory):
  """name -> the same model, by way of its files; loaded once each."""

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp(name)
    theirs(name).save_pretrained(folder)
    return convert.load(folder)

  return load


def _logits(model, tokens, **options):
  with torch.no_grad():
    return model(
      torch.tensor(tokens), use_cache=False, **options
    ).logits.numpy()


def _tokens(batch=2, length=LENGTH):
  return np.random.default_rng(1).integers(3, VOCAB, (batch, length))


@functools.cache
def _their_logits(name):
  return _logits(theirs(name), _tokens())


def _changed(model, **changes):
  """The same parameters under a changed configuration."""
  config = dataclasses.replace(model.config, **changes)
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return nnx.merge(graphdef, nnx.state(model))


def _difference(model, name="gemma2"):
  logits = np.asarray(model(jnp.asarray(_tokens(), jnp.int32)))
  return np.max(np.abs(logits - _their_logits(name)))


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("kernel", ["reference", "blocked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree(load_ours, name, kernel, scan):
  model = _changed(load_ours(name), kernel=kernel, scan_layers=scan)
  logits = np.asarray(model(jnp.asarray(_tokens(), jnp.int32)))
  expected = _their_logits(name)
  assert logits.dtype == expected.dtype == np.float32
  np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
  np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
@pytest.mark.parametrize("name", ["gemma2", "gemma1_mqa"])
def test_left_padding_agrees(load_ours, name, kernel):
  """Rows of unequal length, filled up with token 0 on the left."""
  tokens, real = _tokens(3, 40), np.ones((3, 40), np.int32)
  real[0, :13], real[1, :1] = 0, 0
  tokens = np.where(real, tokens, 0)
  expected = _logits(theirs(name), tokens, attention_mask=torch.tensor(real))
  model = _changed(load_ours(name), kernel=kernel)
  logits = np.asarray(model(jnp.asarray(tokens, jnp.int32), jnp.asarray(real)))
  assert np.isfinite(logits).all()
  at = real.astype(bool)
  np.testing.assert_allclose(logits[at], expected[at], rtol=0, atol=TOLERANCE)


def test_bfloat16_files_agree(tmp_path):
  """Stored in bfloat16, computed in float32 by both."""
  tokens = _tokens(2, 24)
  copy.deepcopy(theirs("gemma2")).to(torch.bfloat16).save_pretrained(tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32, attn_implementation="eager"
  )
  expected = _logits(model, tokens)
  logits = convert.load(tmp_path)(jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_shards_of_transformers_agree(tmp_path):
  theirs("gemma2").save_pretrained(tmp_path, max_shard_size="20KB")
  assert (tmp_path / "model.safetensors.index.json").exists()
  assert _difference(convert.load(tmp_path)) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_our_files_open_in_transformers(tmp_path, name, monkeypatch):
  """By way of two other formats; in shards, with a funnel that it ignores."""
  theirs(name).save_pretrained(tmp_path / "theirs")
  monkeypatch.setattr(writer, "SHARD_BYTES", 30_000)
  path = tmp_path / "theirs"
  for to in ("gemma_pytorch", "google", "hf"):
    convert.convert(path, tmp_path / to, to)
    path = tmp_path / to
  raw = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(raw | {"funnel": "start=1"}))
  assert len(list(path.glob("*.safetensors"))) > 3
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    path, attn_implementation="eager", output_loading_info=True
  )
  assert not any(report.values()), report
  np.testing.assert_array_equal(_logits(model, _tokens()), _their_logits(name))
  # What is computed is what their own file said.
  ours, own = model.config.to_dict(), theirs(name).config.to_dict()
  kept = set(own) - {"_name_or_path", "dtype", "funnel", "transformers_version"}
  assert {k: ours[k] for k in kept} == {k: own[k] for k in kept}
  found = model.generation_config
  ids = (found.bos_token_id, found.eos_token_id, found.pad_token_id)
  assert ids == (BOS_ID, EOS_ID, PAD_ID)
  assert convert.describe(path).stages[0].start == 1


def test_our_tokenizers_open_in_transformers(tmp_path):
  corpus = tiny_run.write_corpus(tmp_path)
  documents = [sources.Document("0", pathlib.Path(corpus).read_text())]
  ours = tokenizer.train(documents, 320, tmp_path / "own" / "tokenizer.model")
  theirs("gemma2").save_pretrained(tmp_path / "own")
  convert.convert(tmp_path / "own", tmp_path / "hf", "hf")
  found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  text = "abc def  ghi"
  assert found(text).input_ids == [BOS_ID, *ours.encode(text)]
  assert found.decode(found(text).input_ids, skip_special_tokens=True) == text
  special = (found.pad_token_id, found.eos_token_id, found.bos_token_id)
  assert special == (PAD_ID, EOS_ID, BOS_ID)


# Faults. Each takes the model and pytest's monkeypatch, and returns the model.


def _by_config(**changes):
  return lambda model, _: _changed(model, **changes)


def _by_code(target, attribute, make):
  """A fault that replaces `target.attribute` by make(original)."""

  def plant(model, monkeypatch):
    replacement = make(getattr(target, attribute))
    monkeypatch.setattr(target, attribute, replacement)
    return model

  return plant


def _norm_without_one(call):
  def wrong(self, x):
    shifted = nnx.clone(self)
    shifted.scale[...] = self.scale[...] - 1.0
    return call(shifted, x)

  return wrong


def _embed_without_scale(embed):
  return lambda self, tokens: embed(self, tokens) / np.sqrt(WIDTH)


def _gelu_by_erf(gelu):
  return lambda x, approximate: gelu(x, approximate=not approximate)


def _heads_in_turn(attend):
  """Query head n reads key head n % K, where n // (N / K) is right."""

  def wrong(q, k, v, *args, **kwargs):
    repeats = (1, 1, q.shape[2] // k.shape[2], 1)
    return attend(
      q, jnp.tile(k, repeats), jnp.tile(v, repeats), *args, **kwargs
    )

  return wrong


def _rotate_neighbours(rotate):
  """Pairs (x[2i], x[2i + 1]), where (x[i], x[i + H/2]) is right."""

  def wrong(x, rope):
    order = np.arange(x.shape[-1]).reshape(-1, 2).T.ravel()
    return rotate(x[..., order], rope)[..., np.argsort(order)]

  return wrong


def _swap_norms(model, _):
  """Gemma 1's meaning of post_attention_layernorm, in a Gemma 2."""
  model = nnx.clone(model)
  a, b = model.layers.post_attn_norm.scale, model.layers.pre_mlp_norm.scale
  a[...], b[...] = b[...], a[...]
  return model


FAULTS = {
  "window + 1": _by_config(window=9),
  "window - 1": _by_config(window=7),
  "global layer first": _by_config(attention_pattern=("global", "local")),
  "no window at all": _by_config(attention_pattern=("global",)),
  "query scale of head_dim": _by_config(query_pre_attn_scalar=float(HEAD_DIM)),
  "query scale of D / N": _by_config(query_pre_attn_scalar=WIDTH / HEADS),
  "no attention softcap": _by_config(attn_softcap=None),
  "no final softcap": _by_config(final_softcap=None),
  "another rope base": _by_config(rope_base=10_000.0),
  "another epsilon": _by_config(norm_eps=1e-2),
  "norm w for 1 + w": _by_code(
    layers_lib.RMSNorm, "__call__", _norm_without_one
  ),
  "embedding not scaled": _by_code(Transformer, "embed", _embed_without_scale),
  "gelu by erf": _by_code(jax.nn, "gelu", _gelu_by_erf),
  "key heads in turn": _by_code(layers_lib, "attend", _heads_in_turn),
  "rope of neighbours": _by_code(layers_lib, "rotate", _rotate_neighbours),
  "norms swapped": _swap_norms,
}


@pytest.fixture
def retrace(monkeypatch):
  """monkeypatch, with nothing compiled reused from before or left behind."""
  jax.clear_caches()
  yield monkeypatch
  monkeypatch.undo()
  jax.clear_caches()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(load_ours, retrace, fault):
  right = load_ours("gemma2")
  assert _difference(FAULTS[fault](right, retrace)) > VISIBLE


def test_without_a_fault_nothing_is_seen(load_ours, retrace):
  """The faults' yardstick, through the same machinery."""
  unchanged = _by_code(layers_lib, "attend", lambda attend: attend)
  assert _difference(unchanged(load_ours("gemma2"), retrace)) < TOLERANCE
  assert _difference(_changed(load_ours("gemma2"))) < TOLERANCE


# Sizes.


@pytest.mark.parametrize(
  "name", [n for n in PRESETS if n not in ("bench", "quickstart", "tiny")]
)
def test_parameter_counts_are_those_of_transformers(name):
  """Of the model that we write of a preset, made without memory."""
  config = TransformerConfig.preset(name)
  raw = huggingface.make_config(config, (), "float32")
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**raw)
    )
  assert model.num_parameters() == flops.parameters(config).total
  read = families.to_config(raw)
  assert dataclasses.replace(read, window=config.window) == config
  assert read.layers == config.layers


def _their_continuations(name, rows, **options):
  """Greedy ones of 100 tokens, of rows padded on the left."""
  longest = max(map(len, rows))
  padded = np.zeros((len(rows), longest), np.int64)
  real = np.zeros_like(padded)
  for row, ids in enumerate(rows):
    padded[row, longest - len(ids) :], real[row, longest - len(ids) :] = ids, 1
  options |= dict(attention_mask=torch.tensor(real), do_sample=False)
  options |= dict(max_new_tokens=100, min_new_tokens=100)
  options |= dict(eos_token_id=VOCAB + 1, pad_token_id=0)
  with torch.no_grad():
    found = theirs(name).generate(torch.tensor(padded), **options)
  return found.numpy()[:, longest:]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_agrees(load_ours, name):
  """100 tokens, far beyond the window."""
  prompts = [_tokens(1, 21)[0].tolist()]
  decoder = Decoder(load_ours(name), 160)
  (plain,) = decoder.generate(prompts, max_new_tokens=100)
  want = _their_continuations(name, prompts)
  np.testing.assert_array_equal([plain.tokens], want)
  # Random weights tend to repeat themselves, which hides faults.
  (varied,) = decoder.generate(
    prompts, max_new_tokens=100, sampling=Sampling(repetition_penalty=20.0)
  )
  want = _their_continuations(name, prompts, repetition_penalty=20.0)
  np.testing.assert_array_equal([varied.tokens], want)
  assert len(set(varied.tokens)) > 20


def test_greedy_generation_of_unequal_prompts_agrees(load_ours):
  prompts = [_tokens(1, n)[0].tolist() for n in (5, 13, 30)]
  results = Decoder(load_ours("gemma2"), 160).generate(
    prompts, max_new_tokens=100
  )
  want = _their_continuations("gemma2", prompts)
  np.testing.assert_array_equal([r.tokens for r in results], want)
