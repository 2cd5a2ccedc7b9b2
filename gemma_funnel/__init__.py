"""Gemma 1 and 2 in JAX, with funnels: shorter sequences for the deep layers."""

import importlib
import typing

from gemma_funnel.version import __version__ as __version__

if typing.TYPE_CHECKING:
  from gemma_funnel import flops as flops
  from gemma_funnel.config import FunnelConfig as FunnelConfig
  from gemma_funnel.config import TransformerConfig as TransformerConfig
  from gemma_funnel.convert import load as load
  from gemma_funnel.decode.decoder import Decoder as Decoder
  from gemma_funnel.decode.sampling import Sampling as Sampling
  from gemma_funnel.model import Transformer as Transformer

# Imported when they are asked for: a command names a mistake before it waits
# for jax.
_MODULES = {
  "FunnelConfig": "config",
  "TransformerConfig": "config",
  "load": "convert",
  "Decoder": "decode.decoder",
  "Sampling": "decode.sampling",
  "Transformer": "model",
}
__all__ = ("__version__", "flops", *_MODULES)


def __getattr__(name: str) -> typing.Any:
  if name == "flops":
    return importlib.import_module(f"{__name__}.flops")
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
