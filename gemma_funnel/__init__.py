"""Gemma 1 and 2 in JAX, with funnels: shorter sequences for the deep layers."""

from gemma_funnel import flops as flops
from gemma_funnel.config import FunnelConfig as FunnelConfig
from gemma_funnel.config import GemmaConfig as GemmaConfig
from gemma_funnel.convert import load as load
from gemma_funnel.decode import Decoder as Decoder
from gemma_funnel.model import Gemma as Gemma
from gemma_funnel.sampling import Sampling as Sampling

__version__ = "0.1.0"
