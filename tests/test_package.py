"""Importing the package is as light as importing jax and flax."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import gemma_funnel

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
  for name in (
    "FunnelConfig",
    "Transformer",
    "TransformerConfig",
    "flops",
    "load",
  ):
    assert hasattr(gemma_funnel, name)


ROOT = pathlib.Path(gemma_funnel.__file__).parent
# Training, and what is built upon it.
UPPER = ("training", "evaluation", "study", "experiment", "cli")


def _imports() -> dict[str, set[str]]:
  """Modules of the package, and those that each imports, also in functions."""
  names = {}
  for path in ROOT.rglob("*.py"):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  found = {}
  for name, path in names.items():
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        targets |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{name}: relative import"
        targets |= {
          full
          if (full := f"{node.module}.{alias.name}") in names
          else node.module
          for alias in node.names
        }
    # A package's __init__ runs before what is in it.
    targets |= {t.rpartition(".")[0] for t in targets}
    inside = {p for p in names if f"{name}.".startswith(f"{p}.")}
    found[name] = targets & names.keys() - inside
  return found


def test_no_import_circle():
  list(graphlib.TopologicalSorter(_imports()).static_order())


def test_nothing_below_training_imports_it():
  for name, targets in _imports().items():
    room = name.split(".")[1:2]
    if room and room[0] not in UPPER:
      above = {t for t in targets if t.split(".")[1:2] == ["training"]}
      assert not above, f"{name} imports {above}"
