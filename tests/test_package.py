"""Importing the package is as light as importing jax and flax."""

import subprocess
import sys

_HEAVY = (
  "tensorflow",
  "tensorflow_datasets",
  "torch",
  "transformers",
  "grain",
  "orbax",
  "matplotlib",
  "sentencepiece",
  "safetensors",
  "tokamax",
)


def test_import_is_light():
  """By modules and not by a clock: flax's own imports are what is allowed."""
  program = (
    "import sys, jax, flax.nnx; before = set(sys.modules)\n"
    "import gemma_funnel\n"
    "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
  )
  new = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  ).stdout.split()
  assert "gemma_funnel" in new
  assert not set(new) & set(_HEAVY)


def test_public_names():
  import gemma_funnel

  for name in (
    "FunnelConfig",
    "Transformer",
    "TransformerConfig",
    "flops",
    "load",
  ):
    assert hasattr(gemma_funnel, name)
