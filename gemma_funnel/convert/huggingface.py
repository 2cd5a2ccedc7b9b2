"""Folders of Hugging Face's: names of tensors, and config.json.

Nothing of torch or transformers is needed: configurations are JSON.
"""

from collections.abc import Iterable, Sequence
import pathlib
import re
from typing import Any

from gemma_funnel.config import (
  OFF,
  FunnelConfig,
  TransformerConfig,
  format_funnel,
  resolve_funnel,
)
from gemma_funnel.convert import families
from gemma_funnel.convert.param_mapping import (
  ParamView,
  Path,
  Tensor,
  shape_of,
  sizes_of,
)
from gemma_funnel.convert.tensor_io import peek_json, read_json
from gemma_funnel.data.tokenizer import (
  BOS_ID,
  EOS_ID,
  PAD_ID,
  SPECIAL,
  Tokenizer,
)

CONFIG = "config.json"
EMBEDDING = "model.embed_tokens.weight"
TIED_HEAD = "lm_head.weight"
# Buffers, which can be computed.
_BUFFERS = (
  "inv_freq",
  "cos_cached",
  "sin_cached",
  "position_ids",
  "embed_scale",
  "masked_bias",
)
# Of torch.compile, FSDP, DistributedDataParallel, Lightning and PEFT.
_WRAPPERS = re.compile(
  r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
  r"|^(module|state_dict|base_model\.model)\.(?=\w+\.)"
)
# What may be beside a language model, and is left.
_BESIDE = re.compile(
  r"^(model\.)?(vision_tower|vision_model|multi_modal_projector|audio_tower|"
  r"embed_vision)\.|^(score|classifier|v_head|value_head|summary)\."
)
_FUNNEL = "funnel"
_IDS = ("bos", "eos", "pad")


def tensors(config: TransformerConfig) -> list[Tensor]:
  """Every tensor of a causal language model.

  Raises:
    ValueError: no family has it.
  """
  family, _ = families.from_config(config)
  sizes = sizes_of(config)

  def tensor(name: str, path: Path, layer: int | None, axes: str) -> Tensor:
    part = ParamView(path, layer, (), axes)
    name += "" if name.endswith(".bias") else ".weight"
    return Tensor(name, shape_of(axes, sizes), (part,))

  head = (
    [] if config.tied else [tensor("lm_head", ("unembedding",), None, "V D")]
  )
  return [
    tensor("model.embed_tokens", ("embedding",), None, "V D"),
    *(
      tensor(f"model.layers.{layer}.{name}", ("layers", *path), layer, axes)
      for layer in range(config.num_layers)
      for name, (path, axes) in family.layer.items()
    ),
    tensor("model.norm", ("final_norm", "scale"), None, "D"),
    *head,
  ]


def own_names(stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
  """Names of `tensors`, of those that are stored.

  Wrappers put words before all names, or between their parts: those of a
  compiled or distributed model, of a trainer, of one that sees images too. A
  bare trunk (transformers' Gemma2Model) is stored without "model".

  Returns:
    (the stored name of each tensor of the language model, the names of what
    else is there and nothing of it needs: vision, heads of classifiers).
  """
  plain = {_WRAPPERS.sub("", name): name for name in stored}
  inner = EMBEDDING.removeprefix("model.")
  found = [name for name in plain if re.search(rf"(^|\.){inner}$", name)]
  # Of several the language model's: others lie deeper.
  prefix = min(found, key=len).removesuffix(inner) if found else "model."
  # "model.language_model." of newer multimodal ones has its head outside.
  around = prefix.removesuffix("model.")
  names, left = {}, []
  for name, origin in plain.items():
    if name.endswith(_BUFFERS):
      continue
    if name in (TIED_HEAD, around + TIED_HEAD):
      names[TIED_HEAD] = origin
    elif name.startswith(prefix):
      names["model." + name.removeprefix(prefix)] = origin
    elif _BESIDE.search(name):
      left.append(origin)
    else:
      names[name] = origin
  return names, left


def read_config(file: pathlib.Path) -> TransformerConfig:
  """The model that a config.json describes, in float32.

  Raises:
    ValueError: of no family that we know, or with something that ours has
      not; it names the file, the key and what was found.
  """
  raw = read_json(file)
  try:
    return families.to_config(families.language_model(raw))
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def read_funnel(
  file: pathlib.Path, num_layers: int
) -> tuple[FunnelConfig, ...]:
  """The funnel that a config.json of ours names beside the model; () is none.

  Raises:
    ValueError: it is none, or does not fit the depth.
  """
  funnel = peek_json(file).get(_FUNNEL)
  if funnel is None:
    return ()
  try:
    if not isinstance(funnel, str):
      raise ValueError(f"expected a string, such as {OFF!r}")
    return resolve_funnel(funnel, num_layers)
  except ValueError as error:
    raise ValueError(f"{file}: {_FUNNEL}={funnel!r}: {error}") from error


def make_config(
  config: TransformerConfig, stages: Sequence[FunnelConfig], dtype: str
) -> dict[str, Any]:
  """The config.json of a model, with a key `funnel` if it has one.

  transformers and others ignore that key, and run the model without.

  Raises:
    ValueError: no family of transformers' has it.
  """
  _, raw = families.from_config(config)
  # The first key is of transformers 4, the second one of 5.
  raw |= dict(torch_dtype=dtype, dtype=dtype)
  if stages:
    raw[_FUNNEL] = format_funnel(stages)
  return raw


def special_ids(
  tokenizer: Tokenizer | None, model_type: str = "gemma"
) -> dict[str, int | None]:
  """The keys of a config.json for what is around texts.

  Without a tokenizer those of all Gemmas; other families have none in common.
  """
  if tokenizer is None:
    if not model_type.startswith("gemma"):
      return {}
    return dict(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
  return {f"{key}_token_id": getattr(tokenizer, f"{key}_id") for key in _IDS}


def make_tokenizer_config(
  tokenizer: Tokenizer, model_type: str
) -> dict[str, Any]:
  """The tokenizer_config.json of a tokenizer that came without one.

  transformers would else know neither its special tokens nor that text begins
  with BOS.
  """
  ids = {key: getattr(tokenizer, f"{key}_id") for key in SPECIAL}
  return dict(
    {f"{k}_token": tokenizer.piece(i) for k, i in ids.items() if i is not None},
    # Which differ in what they do with spaces.
    tokenizer_class="GemmaTokenizer"
    if model_type.startswith("gemma")
    else "LlamaTokenizer",
    add_bos_token=True,
    add_eos_token=False,
    clean_up_tokenization_spaces=False,
  )
