"""google/gemma_pytorch: names of its state dict.

They are Hugging Face's but for the embedding and one tensor of queries, keys
and values, and mean the same. Quantized variants have int8 weights, and a
`weight_scaler` for each of their rows.
"""

from collections.abc import Mapping
import re

import numpy as np

from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert import huggingface
from gemma_funnel.convert.param_mapping import (
  ParamView,
  Tensor,
  check_gemma,
  sizes_of,
)
from gemma_funnel.convert.tensor_io import (
  Header,
  Index,
  TensorReader,
  require_ranks,
)

EMBEDDING = "embedder.weight"
_SCALES = ".weight_scaler"
# Tables of angles, which can be computed.
_BUFFERS = re.compile(r"(local_|global_)?freqs_cis$")


def tensors(config: TransformerConfig) -> list[Tensor]:
  """All tensors of a state dict, in its order."""
  check_gemma(config)
  sizes = sizes_of(config)
  queries = sizes["N"] * sizes["H"]
  keys = sizes["K"] * sizes["H"]
  found = []
  for tensor in huggingface.tensors(config):
    name = tensor.name
    if name == huggingface.EMBEDDING:
      tensor = Tensor(EMBEDDING, tensor.shape, tensor.views)
    elif name.endswith("self_attn.q_proj.weight"):
      views, start = [], 0
      layer = tensor.views[0].layer
      for ours, axes, size in (
        ("query", "NH D", queries),
        ("key", "KH D", keys),
        ("value", "KH D", keys),
      ):
        rows = (slice(start, start + size),)
        views.append(ParamView(("layers", "attn", ours), layer, rows, axes))
        start += size
      name = name.replace("q_proj", "qkv_proj")
      tensor = Tensor(name, (start, sizes["D"]), tuple(views))
    elif re.search(r"self_attn\.[kv]_proj\.weight$", name):
      continue
    found.append(tensor)
  return found


def infer_sizes(names: Mapping[str, Header]) -> dict[str, int | bool]:
  """Fields of `TransformerConfig` that the shapes of a state dict tell.

  Heads are not among them: of H, N and K, only N*H and K*H can be told.

  Raises:
    ValueError: tensors that it takes are missing or have other axes.
  """
  first = "model.layers.0."
  out, gate = first + "self_attn.o_proj.weight", first + "mlp.gate_proj.weight"
  qkv = first + "self_attn.qkv_proj.weight"
  require_ranks(names, dict.fromkeys((EMBEDDING, out, gate, qkv), 2))
  layers = {
    int(match[1])
    for name in names
    if (match := re.match(r"model\.layers\.(\d+)\.", name))
  }
  queries = names[out].shape[1]
  rows, width = names[EMBEDDING].shape
  return dict(
    vocab_size=rows,
    num_layers=len(layers),
    embed_dim=width,
    mlp_dim=names[gate].shape[0],
    query_width=queries,
    key_width=(names[qkv].shape[0] - queries) // 2,
    post_norms=first + "pre_feedforward_layernorm.weight" in names,
  )


class Dequantized:
  """A state dict without buffers, int8 weights times their scales.

  A `TensorReader`. Weights that were int8 are float32.
  """

  def __init__(self, reader: TensorReader):
    """Checks the scales.

    Raises:
      ValueError: int8 weights without scales, scales of another shape.
    """
    self.where = reader.where
    self._reader = reader
    self._scaled = {}
    self.tensors = {}
    for name, header in reader.tensors.items():
      if name.endswith(_SCALES) or _BUFFERS.search(name):
        continue
      if header.dtype == np.int8:
        scales = name.removesuffix(".weight") + _SCALES
        found = reader.tensors.get(scales)
        if found is None or found.shape != header.shape[:1]:
          what = found.shape if found else "no such tensor"
          raise ValueError(
            f"{self.where}: {name} is of int8: expected {scales} of shape "
            f"{header.shape[:1]}, found {what}"
          )
        self._scaled[name] = scales
        header = Header(header.shape, np.dtype(np.float32))
      self.tensors[name] = header
    used = set(self._scaled.values())
    unused = [
      name
      for name in reader.tensors
      if name.endswith(_SCALES) and name not in used
    ]
    if unused:
      raise ValueError(f"{self.where}: scales of weights not int8: {unused}")

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    values = self._reader.read(name, index)
    if name not in self._scaled:
      return values
    scale = self._reader.read(self._scaled[name], index[:1])
    columns = scale.astype(np.float32).reshape(
      *scale.shape, *[1] * (values.ndim - scale.ndim)
    )
    return values * columns
