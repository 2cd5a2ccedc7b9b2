"""The affine map of tokens that bypass a stage, found on a text."""

import re
import types

import numpy as np
import pytest
from tiny_checkpoints import GEMMA2, random_tensors, write

import gemma_funnel
from gemma_funnel.config import resolve_funnel
from gemma_funnel.data import packing
from gemma_funnel.study import calibrate

FUNNEL = "start=1,reduce=received,keep=0.5,recover=affine"


class Letters:
  """A tokenizer of one token a letter."""

  bos_id = 2

  def encode(self, text):
    return [5 + ord(letter) % 25 for letter in text]


@pytest.fixture
def source(tmp_path, monkeypatch):
  letters = types.SimpleNamespace(load=lambda path: Letters())
  monkeypatch.setattr(calibrate, "Tokenizer", letters)
  (tmp_path / "hf").mkdir()
  (tmp_path / "text.txt").write_text("The quick brown fox, and the dog. " * 30)
  return write(tmp_path / "hf", GEMMA2, random_tensors(GEMMA2))


def test_an_affine_map_is_found():
  rng = np.random.default_rng(0)
  h, map_, shift = (rng.normal(size=s) for s in ((400, 8), (8, 8), 8))
  got, c = calibrate.fit_affine(h, h + h @ map_ + shift, ridge=1e-12)
  np.testing.assert_allclose(got, map_, atol=1e-5)
  np.testing.assert_allclose(c, shift, atol=1e-5)
  # A large ridge leaves the states as they are, but for their mean.
  got, c = calibrate.fit_affine(h, h + h @ map_ + shift, ridge=1e9)
  np.testing.assert_allclose(got, 0, atol=1e-5)
  np.testing.assert_allclose(c, (h @ map_ + shift).mean(axis=0), atol=1e-3)


def test_the_command_writes_a_checkpoint_that_has_it(source, capsys):
  target = source.parent / "out"
  arguments = ["--funnel", FUNNEL, "--text", str(source.parent / "text.txt")]
  arguments += ["--length=40", "--ridge=1e-4"]
  assert calibrate.main([str(source), str(target), *arguments]) == 0
  said = capsys.readouterr()
  assert "relative error" in said.out + said.err
  model = gemma_funnel.load(target)
  stages = resolve_funnel(FUNNEL, model.config.num_layers)
  assert model.stages == stages
  text = (source.parent / "text.txt").read_text()
  tokens = packing.windows(2, Letters().encode(text), 40)[:32]
  (fit,) = calibrate.calibrate(model, stages, tokens, 1e-4).values()
  assert fit.after < 0.9 * fit.before
  recovery = model.funnel[0].recovery
  np.testing.assert_allclose(recovery.map[...], fit.map, atol=1e-5)
  np.testing.assert_allclose(recovery.shift[...], fit.shift, atol=1e-5)
  # What bypasses is nearer to the plain model than it is without the map.
  plain = model.with_funnel("off").encode(tokens)
  without = model.with_funnel(FUNNEL.replace("affine", "repeat"))
  far = lambda model: float(np.mean((model.encode(tokens) - plain) ** 2))
  assert far(model) < far(without)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(funnel="start=1"), "expected a stage with recover=affine"),
    (
      dict(funnel="start=1,reduce=attention,recover=affine"),
      "learns ..pool_query",
    ),
    (dict(length="1"), "--length=1: expected an integer"),
    (dict(ridge="0"), "--ridge=0.0: expected a number > 0"),
    (dict(text="nowhere"), "nowhere"),
    (dict(length="2000"), "--length=2000: expected"),
  ],
)
def test_what_cannot_be_is_one_line(source, changes, message, capsys):
  given = dict(funnel=FUNNEL, text=str(source.parent / "text.txt")) | changes
  flags = [f"--{name}={value}" for name, value in given.items()]
  target = source.parent / "out"
  assert calibrate.main([str(source), str(target), *flags]) == 2
  said = capsys.readouterr().err
  assert re.search(message, said) and said.count("\n") == 1, said
  assert not target.exists()
