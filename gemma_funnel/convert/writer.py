"""What a checkpoint in each format consists of: the plan of its files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from gemma_funnel.config import FunnelConfig, TransformerConfig, format_funnel
from gemma_funnel.convert import (
  detect,
  gemma_pytorch,
  google,
  huggingface,
  param_mapping,
)
from gemma_funnel.convert.orbax_tree import OrbaxWriter
from gemma_funnel.convert.param_mapping import ParamView, Slices, Tensor
from gemma_funnel.convert.reader import BLOCK_BYTES
from gemma_funnel.convert.safetensors_file import SafetensorsWriter
from gemma_funnel.convert.tensor_io import Header, TensorWriter
from gemma_funnel.convert.torch_file import TorchWriter, import_torch
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.version import __version__

FORMATS = ("orbax", "hf", "google", "gemma_pytorch")
# As transformers has it: 5 GB are 5 * 10^9 bytes.
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class File:
  """One weight file, or one tree.

  Attributes:
    name: in the folder; "" is the folder itself.
    tensors: in the order in which they are written.
    open: makes it, given its path and the headers of its tensors.
  """

  name: str
  tensors: Sequence[Tensor]
  open: Callable[[pathlib.Path, Mapping[str, Header]], TensorWriter]


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """A checkpoint to be written.

  Attributes:
    format: one of `FORMATS`.
    config: of the model there.
    stages: of its funnel; () is none.
    dtype: of all its tensors.
    sizes: of the dims; V is rows of the embedding.
    files: of weights.
    texts: of other files, by name, or their bytes; a checkpoint is one when
      all are there.
  """

  format: str
  config: TransformerConfig
  stages: tuple[FunnelConfig, ...]
  dtype: np.dtype
  sizes: Mapping[str, int]
  files: Sequence[File]
  texts: Mapping[str, str | bytes]

  def headers(self, file: File) -> dict[str, Header]:
    return {t.name: Header(t.shape, self.dtype) for t in file.tensors}

  @property
  def nbytes(self) -> int:
    """Of all tensors."""
    return sum(h.nbytes for f in self.files for h in self.headers(f).values())

  @property
  def peak_nbytes(self) -> int:
    """Of all tensors while they are written: torch.save copies a file's."""
    copied = 0
    if self.format == "gemma_pytorch":
      sizes = (self.headers(file).values() for file in self.files)
      copied = max(sum(h.nbytes for h in headers) for headers in sizes)
    return self.nbytes + copied

  def blocks(self, view: ParamView) -> Iterator[Slices]:
    """Slices of a view, of a size to be held in memory."""
    return view.blocks(self.sizes, self.dtype.itemsize, BLOCK_BYTES)


def make_spec(
  format_: str,
  config: TransformerConfig,
  stages: tuple[FunnelConfig, ...],
  dtype: np.dtype,
  google_layout: str = "flat",
  tokenizer: Tokenizer | None = None,
  kept: Mapping[str, Any] | None = None,
) -> CheckpointSpec:
  """Plans a checkpoint of a model, without its weights.

  Args:
    format_: one of `FORMATS`.
    config: of the model; its vocabulary is that of the checkpoint, but that
      Google's trees of 256,000 tokens have 256,128 rows.
    stages: of its funnel.
    dtype: of the checkpoint's tensors.
    google_layout: one of `google.LAYOUTS` but "kauldron".
    tokenizer: that will lie beside it, for formats that describe theirs.
    kept: what the source's configuration says beside the model: special ids.

  Raises:
    ValueError: the format cannot express the model, or hold the dtype.
  """
  if format_ not in FORMATS:
    raise ValueError(f"format {format_!r}: expected one of {list(FORMATS)}")
  config = dataclasses.replace(
    config, param_dtype=dtype.name, dtype=dtype.name, kernel="auto"
  )
  rows = config.vocab_size
  if format_ == "google":
    rows = google.padded_rows(rows)
  sizes = {**param_mapping.sizes_of(config), "V": rows}
  own = param_mapping.own_tensors(config, stages)
  learned = param_mapping.learned_tensors(own)
  kept = dict(kept or {})
  described = {
    detect.OURS: __version__,
    "model": config.to_dict(),
    "funnel": format_funnel(stages),
  }
  ours = _dump(described | ({detect.OTHERS: kept} if kept else {}))
  if format_ == "orbax":
    keys = {tensor.name: tensor.name.split(".") for tensor in own}
    files = [_tree(detect.PARAMS, own, keys, sizes, dtype)]
    texts, learned = {detect.CONFIG: ours}, []
  elif format_ == "google":
    transposed = _is_transposed(config)
    tree = google.tensors(config, google_layout, transposed, rows)
    files = [_tree("", *tree, sizes, dtype)]
    texts = {detect.SIDECAR: ours}
  elif format_ == "gemma_pytorch":
    import_torch()  # Before anything is read or made.
    tensors = gemma_pytorch.tensors(config)
    wrapped = functools.partial(TorchWriter, wrap="model_state_dict")
    alone = File("model.ckpt", tensors, wrapped)
    files, texts = _sharded(tensors, dtype, detect.BIN, TorchWriter, alone)
    texts[detect.SIDECAR] = ours
  else:
    tensors = huggingface.tensors(config)
    files, texts = _sharded(
      tensors, dtype, detect.SAFETENSORS, SafetensorsWriter
    )
    raw = huggingface.make_config(config, stages, dtype.name)
    ids = huggingface.special_ids(tokenizer, raw["model_type"]) | kept
    texts[detect.CONFIG] = _dump(raw | ids)
    ids = {k: v for k, v in ids.items() if k.endswith("_token_id")}
    texts["generation_config.json"] = _dump(ids)
    if tokenizer is not None:
      described = huggingface.make_tokenizer_config(
        tokenizer, raw["model_type"]
      )
      texts["tokenizer_config.json"] = _dump(described)
  if learned:
    files = [*files, File(detect.LEARNED, learned, SafetensorsWriter)]
  return CheckpointSpec(format_, config, stages, dtype, sizes, files, texts)


def _dump(values: Mapping[str, Any]) -> str:
  return json.dumps(values, indent=2) + "\n"


def _is_transposed(config: TransformerConfig) -> bool:
  """Whether Google's tree of this model has gating_einsum [2, F, D]."""
  published = detect.published(config)
  return published is not None and published in (
    TransformerConfig.preset("gemma2_9b"),
    TransformerConfig.preset("gemma2_27b"),
  )


def _tree(name, tensors, keys, sizes, dtype) -> File:
  chunks = {}
  for tensor in tensors:
    view = tensor.views[0]
    first = next(view.blocks(sizes, dtype.itemsize, BLOCK_BYTES))
    block = param_mapping.sliced_sizes(sizes, first)
    shape = param_mapping.shape_of(view.axes, block)
    chunks[tensor.name] = (1,) * len(view.at) + shape

  def open_(path, headers):
    return OrbaxWriter(path, headers, keys, chunks)

  return File(name, tensors, open_)


def _sharded(
  tensors: Sequence[Tensor], dtype: np.dtype, name: str, open_, alone=None
) -> tuple[list[File], dict[str, str]]:
  """Files of at most `SHARD_BYTES`, or of one tensor that is larger.

  Args:
    tensors: of all of them, in order.
    dtype: of the tensors.
    name: of a file that holds all, or that the names of several come from.
    open_: see `File`.
    alone: the `File` to write in place of a single one of that name.

  Returns:
    (files, texts): of several files there is an index that names them.
  """
  nbytes = {t.name: Header(t.shape, dtype).nbytes for t in tensors}
  shards, size = [[]], 0
  for tensor in tensors:
    if shards[-1] and size + nbytes[tensor.name] > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += nbytes[tensor.name]
  if len(shards) == 1:
    return [alone or File(name, tensors, open_)], {}
  stem, end = name.split(".")
  files = [
    File(f"{stem}-{n:05}-of-{len(shards):05}.{end}", shard, open_)
    for n, shard in enumerate(shards, start=1)
  ]
  index = {
    "metadata": {"total_size": sum(nbytes.values())},
    "weight_map": {t.name: file.name for file in files for t in file.tensors},
  }
  return files, {name + detect.OF_INDEX: _dump(index)}
