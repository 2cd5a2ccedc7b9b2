"""Gemma 1 and 2 in JAX, with funnels: shorter sequences for the deep layers."""

from gemma_funnel import flops as flops
from gemma_funnel.config import FunnelConfig as FunnelConfig
from gemma_funnel.config import TransformerConfig as TransformerConfig
from gemma_funnel.convert import load as load
from gemma_funnel.decode.decoder import Decoder as Decoder
from gemma_funnel.decode.sampling import Sampling as Sampling
from gemma_funnel.model import Transformer as Transformer
from gemma_funnel.version import __version__ as __version__
