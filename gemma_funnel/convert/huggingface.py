"""Hugging Face's Gemma 1 and 2: names of their tensors, and config.json.

Nothing of torch or transformers is needed: configurations are JSON. A name says
what a tensor is, except that `post_attention_layernorm` is the norm before the
MLP in Gemma 1 and the one after attention in Gemma 2.
"""

from collections.abc import Iterable, Sequence
import pathlib
from typing import Any

from gemma_funnel.config import (
  OFF,
  FunnelConfig,
  TransformerConfig,
  format_funnel,
  resolve_funnel,
)
from gemma_funnel.convert.param_mapping import (
  ParamView,
  Path,
  Tensor,
  check_gemma,
  shape_of,
  sizes_of,
)
from gemma_funnel.convert.tensor_io import peek_json, read_json
from gemma_funnel.data.tokenizer import (
  BOS_ID,
  EOS_ID,
  MASK_ID,
  PAD_ID,
  UNK_ID,
  Tokenizer,
)

CONFIG = "config.json"
EMBEDDING = "model.embed_tokens.weight"
TIED_HEAD = "lm_head.weight"
# Old versions of transformers stored these buffers, which can be computed.
_BUFFERS = "rotary_emb.inv_freq"
SPECIAL_IDS = dict(
  bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
)
_FUNNEL = "funnel"
_SIZES = {
  "vocab_size": "vocab_size",
  "num_hidden_layers": "num_layers",
  "hidden_size": "embed_dim",
  "intermediate_size": "mlp_dim",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
}
# Fields besides sizes that say what is computed.
_FUNCTION = (
  "query_pre_attn_scalar",
  "window",
  "attn_softcap",
  "final_softcap",
  "rope_base",
  "norm_eps",
  "max_length",
)
_LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}


# Our path within a block, and the axes of the file.
_LAYER: dict[str, tuple[Path, str]] = {
  "input_layernorm": (("pre_attn_norm", "scale"), "D"),
  "self_attn.q_proj": (("attn", "query"), "NH D"),
  "self_attn.k_proj": (("attn", "key"), "KH D"),
  "self_attn.v_proj": (("attn", "value"), "KH D"),
  "self_attn.o_proj": (("attn", "out"), "D NH"),
  "mlp.gate_proj": (("mlp", "gate"), "F D"),
  "mlp.up_proj": (("mlp", "up"), "F D"),
  "mlp.down_proj": (("mlp", "down"), "D F"),
}
_GEMMA1_LAYER = {
  **_LAYER,
  "post_attention_layernorm": (("pre_mlp_norm", "scale"), "D"),
}
_GEMMA2_LAYER = {
  **_LAYER,
  "post_attention_layernorm": (("post_attn_norm", "scale"), "D"),
  "pre_feedforward_layernorm": (("pre_mlp_norm", "scale"), "D"),
  "post_feedforward_layernorm": (("post_mlp_norm", "scale"), "D"),
}


def tensors(config: TransformerConfig) -> list[Tensor]:
  """Every tensor of a causal language model, whose head is tied."""
  check_gemma(config)
  sizes = sizes_of(config)

  def tensor(name: str, path: Path, layer: int | None, axes: str) -> Tensor:
    part = ParamView(path, layer, (), axes)
    return Tensor(f"model.{name}.weight", shape_of(axes, sizes), (part,))

  names = _GEMMA2_LAYER if config.post_norms else _GEMMA1_LAYER
  return [
    tensor("embed_tokens", ("embedding",), None, "V D"),
    *(
      tensor(f"layers.{layer}.{name}", ("layers", *path), layer, axes)
      for layer in range(config.num_layers)
      for name, (path, axes) in names.items()
    ),
    tensor("norm", ("final_norm", "scale"), None, "D"),
  ]


def own_names(stored: Iterable[str]) -> dict[str, str]:
  """The stored name of each tensor that counts, by its name in `tensors`.

  A bare trunk (transformers' Gemma2Model) is stored without the prefix.
  """
  stored = list(stored)
  bare = EMBEDDING.removeprefix("model.") in stored
  prefix = "model." if bare else ""
  return {
    name if name == TIED_HEAD else prefix + name: name
    for name in stored
    if not name.endswith(_BUFFERS)
  }


def read_config(file: pathlib.Path) -> TransformerConfig:
  """The model that a config.json describes, in float32.

  Raises:
    ValueError: not a Gemma 1 or 2, or one with something that ours has not;
      it names the file, the key and what was found.
  """
  raw = read_json(file)
  try:
    return _to_config(raw)
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
    ValueError: transformers' Gemma 1 is another function than `config`.
  """
  name = "Gemma2" if config.post_norms else "Gemma"
  raw = dict(
    {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
    architectures=[f"{name}ForCausalLM"],
    model_type=name.lower(),
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm_eps,
    # The first key is of transformers 4, the second one of 5.
    rope_theta=config.rope_base,
    rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
    attention_bias=False,
    attention_dropout=0.0,
    initializer_range=0.02,
    tie_word_embeddings=True,
    use_cache=True,
    **SPECIAL_IDS,
    # The first key is of transformers 4, the second one of 5.
    torch_dtype=dtype,
    dtype=dtype,
  )
  if config.post_norms:
    kinds = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
    scalar = config.query_pre_attn_scalar
    raw.update(
      query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
      sliding_window=config.window,
      layer_types=[kinds[kind] for kind in config.attention_kinds],
      attn_logit_softcapping=config.attn_softcap,
      final_logit_softcapping=config.final_softcap,
    )
  if stages:
    raw[_FUNNEL] = format_funnel(stages)
  _check_is_same(config, raw)
  return raw


def make_tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
  """The tokenizer_config.json of a tokenizer that came without one.

  transformers would else know neither its special tokens nor that text begins
  with BOS.
  """
  pieces = dict(bos=BOS_ID, eos=EOS_ID, unk=UNK_ID, pad=PAD_ID, mask=MASK_ID)
  return dict(
    {f"{name}_token": tokenizer.piece(i) for name, i in pieces.items()},
    tokenizer_class="GemmaTokenizer",
    add_bos_token=True,
    add_eos_token=False,
    clean_up_tokenization_spaces=False,
  )


def _check_is_same(config: TransformerConfig, raw: dict[str, Any]) -> None:
  read = _to_config(raw)
  differ = []
  if read.attention_kinds != config.attention_kinds:
    differ.append(f"attention_pattern={config.attention_pattern!r}")
  for key in _FUNCTION:
    wanted, found = getattr(config, key), getattr(read, key)
    unused = key == "window" and "local" not in config.attention_kinds
    if wanted != found and not unused:
      differ.append(f"{key}={wanted!r}, only {found!r}")
  if differ:
    raise ValueError(
      f"Hugging Face's {raw['model_type']} cannot have "
      + "; ".join(f"model.{what}" for what in differ)
    )


def _to_config(raw: dict[str, Any]) -> TransformerConfig:
  """A GemmaConfig of the keys that say what is computed.

  An absent key means what it means to transformers; sizes have to be there.
  """
  model_type = raw.get("model_type")
  if model_type not in ("gemma", "gemma2"):
    raise ValueError(
      f"model_type={model_type!r} is not supported: expected 'gemma' or "
      "'gemma2'"
    )
  missing = [key for key in _SIZES if key not in raw]
  if missing:
    raise ValueError(f"no {missing}")
  _check_supported(raw, model_type)
  common = dict(
    {ours: raw[theirs] for theirs, ours in _SIZES.items()},
    rope_base=_rope_base(raw),
    norm_eps=_number(raw, "rms_norm_eps", 1e-6),
    max_length=raw.get("max_position_embeddings", 8192),
  )
  if model_type == "gemma":
    return TransformerConfig(
      **common,
      query_pre_attn_scalar=_number(raw, "head_dim", 256.0),
      attention_pattern=("global",),
      attn_softcap=None,
      final_softcap=None,
      post_norms=False,
    )
  pattern = _attention_pattern(raw)
  # A model of global layers alone may come without a window.
  window = raw.get("sliding_window", 4096)
  if window is None and "local" not in pattern:
    window = common["max_length"]
  return TransformerConfig(
    **common,
    query_pre_attn_scalar=_number(raw, "query_pre_attn_scalar", 256.0),
    attention_pattern=pattern,
    window=window,
    attn_softcap=_softcap(raw, "attn_logit_softcapping", 50.0),
    final_softcap=_softcap(raw, "final_logit_softcapping", 30.0),
    post_norms=True,
  )


def _check_supported(raw: dict[str, Any], model_type: str) -> None:
  """Raises on whatever would make it another function than ours."""
  allowed = {
    "attention_bias": (False, None),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "hidden_activation": ("gelu_pytorch_tanh", None),
  }
  if model_type == "gemma":
    # The first configurations of Gemma 1 say "gelu" and mean this one.
    allowed["hidden_act"] = ("gelu_pytorch_tanh", "gelu", None)
  wrong = [
    f"{key}={raw[key]!r}: expected one of {list(values)}"
    for key, values in allowed.items()
    if key in raw and raw[key] not in values
  ]
  if wrong:
    raise ValueError("not supported: " + "; ".join(wrong))


def _number(raw: dict[str, Any], key: str, default: float) -> float:
  value = raw.get(key, default)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(f"{key}={value!r}: expected a number")
  try:
    return float(value)
  except OverflowError:
    raise ValueError(f"{key} is beyond the range of a float") from None


def _softcap(raw: dict[str, Any], key: str, default: float) -> float | None:
  cap = raw.get(key, default)
  return None if cap is None else _number(raw, key, default)


def _rope_base(raw: dict[str, Any]) -> float:
  """`rope_parameters` is of transformers 5; older files have two keys."""
  for key in ("rope_parameters", "rope_scaling"):
    rope = raw.get(key)
    if rope is None:
      continue
    if not isinstance(rope, dict):
      raise ValueError(f"{key}={rope!r}: expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
    if kind != "default" or unknown:
      raise ValueError(
        f"{key}={rope!r}: expected rope_type 'default' and at most a "
        "rope_theta beside it"
      )
    if "rope_theta" in rope:
      return _number(rope, "rope_theta", 10_000.0)
  return _number(raw, "rope_theta", 10_000.0)


def _attention_pattern(raw: dict[str, Any]) -> tuple[str, ...]:
  """The shortest pattern that, cycled, gives the kind of every layer."""
  depth = raw["num_hidden_layers"]
  types = raw.get("layer_types")
  if types is None:
    return ("local", "global")
  if not isinstance(types, list) or len(types) != depth:
    raise ValueError(
      f"layer_types={types!r}: expected a list of num_hidden_layers="
      f"{depth!r} kinds"
    )
  unknown = sorted({str(t) for t in types} - set(_LAYER_TYPES))
  if unknown:
    raise ValueError(
      f"layer_types has {unknown}: expected {sorted(_LAYER_TYPES)}"
    )
  kinds = tuple(_LAYER_TYPES[t] for t in types)
  for period in range(1, len(kinds)):
    if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
      return kinds[:period]
  return kinds
