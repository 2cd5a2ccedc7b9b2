"""Other families: files of transformers' in, its logits out, and files back.

Sizes are tiny, constants those of published models where they bite, and
windows and original lengths shorter than the text. That they bite is tested
too: each fault that a port is known for is planted, and must be seen.
"""

import functools
import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_funnel import convert
from gemma_funnel import layers as layers_lib
from gemma_funnel.config import TransformerConfig
from gemma_funnel.decode.decoder import Decoder
from gemma_funnel.model import Transformer
from gemma_funnel.parallel import sharding
from gemma_funnel.parallel.mesh import AXES

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VISIBLE = 1e-2
TOKENS = np.random.default_rng(1).integers(3, 97, (2, 90)).astype(np.int32)


def _config(kind, **changes):
  common = dict(
    vocab_size=98,
    hidden_size=40,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    attn_implementation="eager",
  )
  return getattr(transformers, f"{kind}Config")(**common | changes)


def _gemma3(scalar=256, head_dim=256, scaled=True, **changes):
  scaling = dict(rope_type="linear", factor=8.0)
  whole = scaling if scaled else dict(rope_type="default")
  return _config(
    "Gemma3Text",
    num_hidden_layers=7,
    head_dim=head_dim,
    query_pre_attn_scalar=scalar,
    sliding_window=8,
    rope_parameters={
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      "full_attention": {"rope_theta": 1e6, **whole},
    },
    **changes,
  )


def _sees_images():
  text = _gemma3().to_dict()
  vision = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=8,
    patch_size=4,
  )
  tokens = dict(boi_token_index=90, eoi_token_index=91, image_token_index=92)
  return transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
  )


def _rope(base, factor=None):
  if factor is None:
    return dict(rope_type="default", rope_theta=base)
  return dict(
    rope_type="llama3",
    rope_theta=base,
    factor=factor,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
  )


def _llama(base, factor=None, **changes):
  rope = _rope(base, factor)
  return _config("Llama", rope_parameters=rope, rms_norm_eps=1e-5, **changes)


def _mistral(base, window):
  return _config(
    "Mistral",
    rope_parameters=_rope(base),
    rms_norm_eps=1e-5,
    sliding_window=window,
  )


def _qwen2(base, **changes):
  return _config("Qwen2", rope_parameters=_rope(base), **changes)


SLIDING = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
CONFIGS = {
  "gemma3_270m": lambda: _gemma3(scaled=False, num_key_value_heads=1),
  "gemma3_1b": lambda: _gemma3(
    scaled=False, num_key_value_heads=1, hidden_size=72
  ),
  "gemma3_4b": _gemma3,
  "gemma3_12b": lambda: _gemma3(hidden_size=60),
  "gemma3_27b": lambda: _gemma3(168, 128),
  "gemma3_sees_images": _sees_images,
  "llama2": lambda: _llama(1e4, num_key_value_heads=4),
  "llama3": lambda: _llama(5e5),
  "llama3.1": lambda: _llama(5e5, 8.0),
  "llama3.2": lambda: _llama(5e5, 32.0, head_dim=6, tie_word_embeddings=True),
  "smollm2": lambda: _llama(
    1e5,
    hidden_size=72,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
  ),
  "mistral_v0.1": lambda: _mistral(1e4, 8),
  "mistral_v0.3": lambda: _mistral(1e6, None),
  "qwen2": lambda: _qwen2(1e6),
  "qwen2_tied": lambda: _qwen2(1e6, tie_word_embeddings=True),
  "qwen2_sliding": lambda: _qwen2(1e6, **SLIDING),
  "qwen2_sliding_tied": lambda: _qwen2(
    1e6, **SLIDING, tie_word_embeddings=True
  ),
  "deepseek_r1_distill_qwen": lambda: _qwen2(1e4),
}
ALL = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def theirs(name):
  """A random model of transformers; no norm is 1, and no bias 0."""
  kind = transformers.AutoModelForCausalLM
  if name == "gemma3_sees_images":
    kind = transformers.AutoModelForImageTextToText
  model = kind.from_config(CONFIGS[name]()).eval()
  model.set_attn_implementation("eager")
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for path, weight in model.named_parameters():
      deviation = 0.5 if weight.ndim == 1 else weight.shape[1] ** -0.5
      plain_norm = path.endswith("norm.weight") and "gemma" not in name
      weight.normal_(float(plain_norm), deviation, generator=generator)
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """name -> the folder that transformers saved it to."""

  @functools.cache
  def save(name):
    folder = tmp_path_factory.mktemp(name)
    theirs(name).save_pretrained(folder)
    return folder

  return save


@pytest.fixture(scope="module")
def load_ours(saved):
  return functools.cache(lambda name: convert.load(saved(name)))


def _logits(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()


@functools.cache
def _their_logits(name):
  return _logits(theirs(name))


def _difference(model, name):
  return np.abs(np.asarray(model(TOKENS)) - _their_logits(name)).max()


@ALL
def test_logits_agree(load_ours, name):
  assert _difference(load_ours(name), name) < TOLERANCE


def test_what_sees_images_is_named_and_left(saved, capsys):
  convert.load(saved("gemma3_sees_images"))
  told = capsys.readouterr().err
  assert "beside the language model are left" in told
  assert "vision_tower" in told and "multi_modal_projector" in told


@ALL
def test_files_come_back(saved, tmp_path, name):
  """Through our own format: every bit, and the configuration."""
  convert.convert(saved(name), tmp_path / "own", "orbax")
  convert.convert(tmp_path / "own", tmp_path / "hf", "hf")
  stored = load_file(saved(name) / "model.safetensors")
  if name == "gemma3_sees_images":
    text = re.compile(r"^(language_model\.model|model\.language_model)\.")
    stored = {
      text.sub("model.", n): x for n, x in stored.items() if text.match(n)
    }
  written = load_file(tmp_path / "hf" / "model.safetensors")
  assert written.keys() == stored.keys()
  for tensor, x in written.items():
    assert x.tobytes() == stored[tensor].tobytes(), tensor
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "hf", attn_implementation="eager", output_loading_info=True
  )
  assert not any(report.values()), report
  np.testing.assert_array_equal(_logits(model), _their_logits(name))
  got = json.loads(model.config.to_json_string(use_diff=False))
  want = theirs(name).config
  want = json.loads(want.get_text_config().to_json_string(use_diff=False))
  # Without a window, a Mistral is a Llama. What max_window_layers says is in
  # layer_types.
  other = "_name_or_path dtype architectures max_window_layers".split()
  other += ["model_type"] if name == "mistral_v0.3" else []
  for key in want.keys() - set(other):
    assert got.get(key) == want[key], key


# As another of its family, in other sizes, bases or heads.
ALIKE = "gemma3_1b gemma3_12b gemma3_sees_images llama3 qwen2_tied".split()
ALIKE += ["qwen2_sliding_tied", "deepseek_r1_distill_qwen"]


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
    for name in CONFIGS
  ],
)
def test_cached_decoding_is_the_one_pass_forward(load_ours, name):
  model = load_ours(name).with_funnel("start=1,stop=2,stride=2")
  prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
  results = Decoder(model, 64).generate(prompts, max_new_tokens=30)
  rows = np.zeros((2, 35), np.int32)
  for row, prompt, result in zip(rows, prompts, results, strict=True):
    whole = prompt + result.tokens
    row[: len(whole)] = whole
  likeliest = np.argmax(model(rows), axis=-1)
  for row, prompt, result in zip(likeliest, prompts, results, strict=True):
    start = len(prompt) - 1
    assert result.tokens == row[start : start + len(result.tokens)].tolist()


# One of each kind of layer's parameters and switches.
FEW = ("gemma3_4b", "llama3.1", "mistral_v0.1", "qwen2_sliding")


@pytest.mark.parametrize("name", FEW)
def test_it_is_loaded_onto_a_mesh(saved, name):
  sizes = dict.fromkeys(AXES, 1) | dict(data=2, fsdp=2, tensor=2)
  mesh = sharding.make_mesh(config_dict.ConfigDict(sizes))
  with jax.set_mesh(mesh):
    assert _difference(convert.load(saved(name), mesh=mesh), name) < TOLERANCE


@pytest.mark.parametrize("name", FEW)
def test_gradients_reach_every_parameter(load_ours, name):
  graphdef, params = nnx.split(load_ours(name))
  loss = lambda p: jnp.mean(nnx.merge(graphdef, p)(TOKENS) ** 2)
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
    assert np.abs(grad).max() > 0 and np.all(np.isfinite(grad)), path


@ALL
def test_a_config_survives_json(load_ours, name):
  config = load_ours(name).config
  text = json.dumps(config.to_dict())
  assert TransformerConfig.from_dict(json.loads(text)) == config


# Faults. Each takes the model and pytest's monkeypatch, and returns the model.


def _by_config(**changes):
  """Values by name, or made of the configuration there is."""

  def plant(model, _):
    old = model.config
    values = {k: v(old) if callable(v) else v for k, v in changes.items()}
    config = TransformerConfig.from_dict({**vars(old), **values})
    graphdef, wanted = nnx.split(Transformer.abstract(config))
    found = dict(nnx.to_flat_state(nnx.state(model)))
    wanted = {path: found[path] for path, _ in nnx.to_flat_state(wanted)}
    return nnx.merge(graphdef, nnx.from_flat_state(wanted))

  return plant


def _norm_after_rope(model, monkeypatch):
  def queries(self, x_BTD, rope):
    q_BTNH = layers_lib._einsum("BTD,DNH->BTNH", x_BTD, self.query)
    q_BTNH = self.query_norm(layers_lib.rotate(q_BTNH, rope))
    return q_BTNH * self.config.query_scale

  monkeypatch.setattr(layers_lib.Attention, "queries", queries)
  return model


def _interleaved(model, _):
  """Queries and keys as Meta's files, and GGUF's, have them."""
  model = nnx.clone(model)
  for param in (model.layers.attn.query, model.layers.attn.key):
    x = param[...]
    param[...] = (
      x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
    )
  return model


def _add(value):
  return lambda config: config.window + value


FAULTS = {
  "norm offset, gemma": ("gemma3_4b", _by_config(norm_offset=0.0)),
  "norm offset, llama": ("llama2", _by_config(norm_offset=1.0)),
  "qk-norm left out": ("gemma3_4b", _by_config(qk_norm=False)),
  "qk-norm after rope": ("gemma3_4b", _norm_after_rope),
  "bases swapped": (
    "gemma3_4b",
    _by_config(
      rope_base=lambda c: c.local_rope_base,
      local_rope_base=lambda c: c.rope_base,
    ),
  ),
  "pattern shifted": (
    "gemma3_4b",
    _by_config(
      attention_pattern=lambda c: (
        *c.attention_pattern[1:],
        c.attention_pattern[0],
      )
    ),
  ),
  "query scale": (
    "gemma3_27b",
    _by_config(query_pre_attn_scalar=lambda c: float(c.head_dim)),
  ),
  "q and k permuted": ("llama2", _interleaved),
  "bias dropped": ("qwen2", _by_config(attention_bias=False)),
  "linear scaling dropped": ("gemma3_4b", _by_config(rope_scaling=None)),
  "llama3 scaling dropped": ("llama3.1", _by_config(rope_scaling=None)),
  "silu for gelu": ("gemma3_4b", _by_config(activation="silu")),
  "gelu for silu": ("llama2", _by_config(activation="gelu")),
  "embedding not scaled": ("gemma3_4b", _by_config(embed_scale=1.0)),
  "embedding scaled": ("llama2", _by_config(embed_scale=None)),
  "tied head": ("llama2", _by_config(tied=True)),
  "window + 1, gemma": ("gemma3_4b", _by_config(window=_add(1))),
  "window - 1, mistral": ("mistral_v0.1", _by_config(window=_add(-1))),
  "window + 1, qwen2": ("qwen2_sliding", _by_config(window=_add(1))),
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
  name, plant = FAULTS[fault]
  assert _difference(plant(load_ours(name), retrace), name) > VISIBLE


@pytest.mark.parametrize("name", FEW)
def test_without_a_fault_nothing_is_seen(load_ours, retrace, name):
  """The faults' yardstick, through the same machinery."""
  assert _difference(_by_config()(load_ours(name), retrace), name) < TOLERANCE
