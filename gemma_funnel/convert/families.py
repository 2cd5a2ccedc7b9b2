"""Configurations of Hugging Face's families, and names of their tensors.

A family is a row of `FAMILIES`: what an absent key of its config.json means,
and how a layer's tensors are called; what its models always are is in
`config.FAMILIES`. Nothing of torch or transformers is needed.

Everything that a config.json says of what is computed is read, or refused: two
spellings of one fact have to agree, and so does a key that we do not know with
there being no such thing.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from gemma_funnel import config as config_lib
from gemma_funnel.checks import require
from gemma_funnel.config import RopeScaling, TransformerConfig
from gemma_funnel.convert.param_mapping import Path

# Our path within a block, and the axes of the file.
Names = Mapping[str, tuple[Path, str]]

_SIZES = {
  "vocab_size": "vocab_size",
  "num_hidden_layers": "num_layers",
  "hidden_size": "embed_dim",
  "intermediate_size": "mlp_dim",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
}
# Far above any model's: what a damaged configuration says is not tried out.
_MAX_LAYERS = 1_000
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_KINDS = {_LOCAL: "local", _GLOBAL: "global"}
_ACTIVATIONS = {"gelu": "gelu_pytorch_tanh", "silu": "silu"}

_LLAMA_LAYER: Names = {
  "input_layernorm": (("pre_attn_norm", "scale"), "D"),
  "self_attn.q_proj": (("attn", "query"), "NH D"),
  "self_attn.k_proj": (("attn", "key"), "KH D"),
  "self_attn.v_proj": (("attn", "value"), "KH D"),
  "self_attn.o_proj": (("attn", "out"), "D NH"),
  "post_attention_layernorm": (("pre_mlp_norm", "scale"), "D"),
  "mlp.gate_proj": (("mlp", "gate"), "F D"),
  "mlp.up_proj": (("mlp", "up"), "F D"),
  "mlp.down_proj": (("mlp", "down"), "D F"),
}
_QWEN2_LAYER: Names = {
  **_LLAMA_LAYER,
  "self_attn.q_proj.bias": (("attn", "query_bias"), "NH"),
  "self_attn.k_proj.bias": (("attn", "key_bias"), "KH"),
  "self_attn.v_proj.bias": (("attn", "value_bias"), "KH"),
}
_GEMMA2_LAYER: Names = {
  **_LLAMA_LAYER,
  "post_attention_layernorm": (("post_attn_norm", "scale"), "D"),
  "pre_feedforward_layernorm": (("pre_mlp_norm", "scale"), "D"),
  "post_feedforward_layernorm": (("post_mlp_norm", "scale"), "D"),
}
_GEMMA3_LAYER: Names = {
  **_GEMMA2_LAYER,
  "self_attn.q_norm": (("attn", "query_norm", "scale"), "H"),
  "self_attn.k_norm": (("attn", "key_norm", "scale"), "H"),
}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, as transformers has it.

  Attributes:
    model_type, architecture: its names.
    layer: of a layer's tensors.
    keys: (field, what an absent key means) of those of its keys that are one
      number of ours; None is nothing.
    rope_base, local_rope_base, max_length, tied: what absent keys mean.
    scalings: kinds of RoPE scaling that it knows.
    pattern: local layers before each global one; None is no such key.
    window: what an absent `sliding_window` means; None is no such key.
    head_dim: whether its key has to be there, else it is width / heads.
  """

  model_type: str
  architecture: str
  layer: Names
  keys: Mapping[str, tuple[str, float | None]] = dataclasses.field(
    default_factory=dict
  )
  rope_base: float = 10_000.0
  local_rope_base: float | None = None
  max_length: int = 8192
  tied: bool = True
  scalings: tuple[str, ...] = ()
  pattern: int | None = None
  window: int | None = None
  head_dim: bool = True

  @property
  def fixed(self) -> Mapping[str, Any]:
    """Fields of TransformerConfig that all its models have."""
    return config_lib.FAMILIES[self.model_type]


_SCALAR = {"query_pre_attn_scalar": ("query_pre_attn_scalar", 256.0)}
FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (
    Family("gemma", "GemmaForCausalLM", _LLAMA_LAYER),
    Family(
      "gemma2",
      "Gemma2ForCausalLM",
      _GEMMA2_LAYER,
      keys=_SCALAR
      | {
        "attn_logit_softcapping": ("attn_softcap", 50.0),
        "final_logit_softcapping": ("final_softcap", 30.0),
      },
      pattern=2,
      window=4096,
    ),
    Family(
      "gemma3_text",
      "Gemma3ForCausalLM",
      _GEMMA3_LAYER,
      keys=_SCALAR
      | {
        "attn_logit_softcapping": ("attn_softcap", None),
        "final_logit_softcapping": ("final_softcap", None),
      },
      rope_base=1_000_000.0,
      local_rope_base=10_000.0,
      max_length=131_072,
      scalings=("linear",),
      pattern=6,
      window=4096,
    ),
    Family(
      "llama",
      "LlamaForCausalLM",
      _LLAMA_LAYER,
      max_length=2048,
      tied=False,
      scalings=("linear", "llama3"),
      head_dim=False,
    ),
    Family(
      "mistral",
      "MistralForCausalLM",
      _LLAMA_LAYER,
      max_length=131_072,
      tied=False,
      scalings=("linear", "llama3"),
      window=4096,
      head_dim=False,
    ),
    Family(
      "qwen2",
      "Qwen2ForCausalLM",
      _QWEN2_LAYER,
      max_length=32_768,
      tied=False,
      scalings=("linear", "llama3"),
      window=4096,
      head_dim=False,
    ),
  )
}
# A Gemma 3 that sees images has its language model in text_config.
_MULTIMODAL = {"gemma3": "gemma3_text"}

# Keys that say nothing of what is computed, besides those of `_is_harmless`.
_HARMLESS = frozenset(
  """
  architectures attn_implementation auto_map cache_implementation
  chunk_size_feed_forward dtype hidden_act id2label initializer_range
  is_llama_config label2id model_type num_labels output_attentions
  output_hidden_states pretraining_tp torch_dtype transformers_version
  use_cache attention_dropout hidden_dropout embd_pdrop embedding_dropout
  resid_pdrop output_scores output_logits max_window_layers
  """.split()
)
# A key of another name that has one of these in it says what is computed.
_SAYS_WHAT = re.compile(
  r"act(ivation)?s?$|^act_|alibi|attention|attn|base_freq|bias|bidirectional"
  r"|cap(ping)?$|compress|decoder|embed|expert|head|hidden|kv_|layer|lora"
  r"|logits?_|mlp|moe|multiplier|norm|position|quant|query|residual|rope|rotary"
  r"|rotation|scal(e|ing)|sliding|softcap|theta|tie_|window"
)


def to_config(raw: Mapping[str, Any]) -> TransformerConfig:
  """The model that the content of a config.json describes, in float32.

  An absent key means what it means to transformers; sizes have to be there.

  Raises:
    ValueError: no family that is known, a key that is missing, that is of
      another kind, that contradicts another, or that says of a model what
      ours has not.
  """
  keys = _Keys(raw)
  model_type = keys.get("model_type")
  require(
    isinstance(model_type, str) and model_type in FAMILIES,
    f"model_type={model_type!r} is not supported: expected one of "
    f"{[*FAMILIES, *_MULTIMODAL]}",
  )
  family = FAMILIES[model_type]
  sizes = _sizes(keys, family)
  kinds, window = _attention(keys, family, sizes["num_layers"])
  base, local_base, scaling = _rope(keys, family)
  fixed = dict(family.fixed)
  activation = fixed.get("activation", "gelu")
  _check_activation(keys, family, activation)
  max_length = keys.get("max_position_embeddings", family.max_length)
  numbers = {
    field: keys.number(key, default)
    for key, (field, default) in family.keys.items()
  }
  head_dim = _number("head_dim", sizes["head_dim"])
  numbers.setdefault("query_pre_attn_scalar", head_dim)
  if family.window is not None:
    # A model of global layers alone may come without a window.
    fixed["window"] = max_length if window is None else window
  config = fixed | dict(
    sizes,
    **numbers,
    attention_pattern=_shortest(kinds),
    rope_base=base,
    local_rope_base=local_base,
    rope_scaling=scaling,
    norm_eps=keys.number("rms_norm_eps", 1e-6),
    max_length=max_length,
    tied=keys.boolean("tie_word_embeddings", family.tied),
  )
  for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
    if key == "attention_bias" and fixed.get("attention_bias"):
      continue
    require(
      keys.get(key) in (False, None),
      f"not supported: {key}={raw.get(key)!r}: expected false",
    )
  keys.check_rest()
  return TransformerConfig(**config)


def language_model(raw: Mapping[str, Any]) -> Mapping[str, Any]:
  """The configuration of the language model of one that sees images too."""
  model_type = raw.get("model_type")
  if model_type not in list(_MULTIMODAL):
    return raw
  text = raw.get("text_config")
  require(
    isinstance(text, dict),
    f"model_type={model_type!r}: expected an object text_config, found "
    f"{text!r}",
  )
  around = {k: raw[k] for k in ("tie_word_embeddings",) if k in raw}
  return {"model_type": _MULTIMODAL[model_type], **around, **text}


def from_config(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
  """The family of a model, and the keys that describe it.

  Raises:
    ValueError: no family has it; it names what the nearest has not.
  """
  nearest, fewest = None, None
  for family in FAMILIES.values():
    raw = _to_raw(config, family)
    try:
      differ = _differences(config, to_config(raw))
    except ValueError as error:
      differ = [str(error)]
    if not differ:
      return family, raw
    if fewest is None or len(differ) < len(fewest):
      nearest, fewest = family.model_type, differ
  raise ValueError(
    f"no family of Hugging Face's has this model; the nearest, {nearest}, "
    f"cannot have {'; '.join(fewest)}"
  )


def _differences(wanted: TransformerConfig, found: TransformerConfig):
  """What sets the functions of two models apart, in words."""
  ignored = ("param_dtype", "dtype", "softmax_dtype", "kernel", "remat")
  of_layers = (
    "attention_pattern",
    "window",
    "rope_base",
    "local_rope_base",
    "rope_scaling",
  )
  same_layers = wanted.layers == found.layers
  scale = lambda c: c.embed_scale or math.sqrt(c.embed_dim)
  return [
    f"model.{f.name}={getattr(wanted, f.name)!r}, only "
    f"{getattr(found, f.name)!r}"
    for f in dataclasses.fields(TransformerConfig)
    if f.name not in (*ignored, "scan_layers")
    and not (f.name in of_layers and same_layers)
    and not (f.name == "embed_scale" and scale(wanted) == scale(found))
    and getattr(wanted, f.name) != getattr(found, f.name)
  ]


def _to_raw(config: TransformerConfig, family: Family) -> dict[str, Any]:
  """The keys of a family for a model, which it may not be able to have."""
  # transformers wants an integer here, and floats in other keys.
  whole = lambda key, x: (
    int(x) if key == "query_pre_attn_scalar" and x == int(x) else x
  )
  activation = _ACTIVATIONS[family.fixed.get("activation", "gelu")]
  raw = dict(
    {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
    architectures=[family.architecture],
    model_type=family.model_type,
    hidden_act=activation,
    max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm_eps,
    attention_dropout=0.0,
    initializer_range=0.02,
    tie_word_embeddings=config.tied,
    use_cache=True,
    **_raw_rope(config, family),
    **{
      key: whole(key, getattr(config, field))
      for key, (field, _) in family.keys.items()
    },
  )
  if activation != "silu":
    raw["hidden_activation"] = activation
  if not family.fixed.get("attention_bias"):
    raw["attention_bias"] = False
  kinds = config.attention_kinds
  names = {ours: theirs for theirs, ours in _KINDS.items()}
  if family.window is not None:
    # The window itself says which layers of a Mistral are local.
    is_local = "local" in kinds
    raw["sliding_window"] = (
      config.window if is_local or family.pattern else None
    )
    if family.model_type != "mistral":
      raw["layer_types"] = [names[kind] for kind in kinds]
    if family.model_type == "qwen2":
      raw["use_sliding_window"] = is_local
  return raw


def _raw_rope(config: TransformerConfig, family: Family) -> dict[str, Any]:
  """Of transformers 4 and of 5, which read each other's keys not."""
  found, scaling = config.rope_scaling, None
  if found is not None and found.kind in family.scalings:
    scaling = dict(rope_type=found.kind, factor=found.factor)
  if scaling and found.kind == "llama3":
    scaling |= dict(
      low_freq_factor=found.low_freq_factor,
      high_freq_factor=found.high_freq_factor,
      original_max_position_embeddings=found.original_max_length,
    )
  base = dict(rope_theta=config.rope_base)
  whole = (scaling or dict(rope_type="default")) | base
  raw = dict(base, rope_parameters=whole)
  if scaling:
    raw["rope_scaling"] = scaling
  if family.local_rope_base:
    local = config.local_rope_base or config.rope_base
    sliding = dict(rope_type="default", rope_theta=local)
    raw["rope_local_base_freq"] = local
    raw["rope_parameters"] = {_GLOBAL: whole, _LOCAL: sliding}
  return raw


class _Keys:
  """A config.json, of which what has not been read is told in the end."""

  def __init__(self, raw: Mapping[str, Any]):
    self.raw, self._read = raw, set()

  def get(self, key: str, default: Any = None) -> Any:
    self._read.add(key)
    return self.raw.get(key, default)

  def given(self, key: str) -> bool:
    """Whether it says anything."""
    self._read.add(key)
    return self.raw.get(key) is not None

  def number(self, key: str, default: float | None) -> float | None:
    """A number; null is one that `default` says may be absent."""
    value = self.get(key, default)
    optional = key.endswith("softcapping")
    return None if value is None and optional else _number(key, value)

  def boolean(self, key: str, default: bool) -> bool:
    value = self.get(key, default)
    require(
      isinstance(value, bool) or value is None,
      f"{key}={value!r}: expected true or false",
    )
    return bool(value)

  def check_rest(self) -> None:
    """Refuses what says of the model what nothing has read."""
    rest = {k: v for k, v in self.raw.items() if k not in self._read}
    wrong = [
      f"{key}={value!r}"
      for key, value in rest.items()
      if not _is_harmless(key, value)
    ]
    require(
      not wrong,
      f"not supported: {'; '.join(wrong)}: nothing of ours is like that. "
      "Expected no such key, or null",
    )


def _is_harmless(key: str, value: Any) -> bool:
  nothing = value is None or value is False or value in ("", [], {})
  said = nothing or key in _HARMLESS or key.endswith("_dropout")
  return said or key.startswith("_") or not _SAYS_WHAT.search(key)


def _number(key: str, value: Any) -> float:
  require(
    isinstance(value, (int, float)) and not isinstance(value, bool),
    f"{key}={value!r}: expected a number",
  )
  try:
    return float(value)
  except OverflowError:
    raise ValueError(f"{key} is beyond the range of a float") from None


def _agree(what: str, said: Mapping[str, Any], default: Any) -> Any:
  """The one value of all spellings of a fact."""
  values = list(said.values())
  require(
    all(value == values[0] for value in values),
    f"{what} is said twice, and differs: "
    + ", ".join(f"{key} is {value!r}" for key, value in said.items())
    + "; expected one of them, or the same",
  )
  return values[0] if values else default


def _sizes(keys: _Keys, family: Family) -> dict[str, Any]:
  optional = () if family.head_dim else ("head_dim", "num_key_value_heads")
  missing = [k for k in _SIZES if k not in optional and not keys.given(k)]
  require(not missing, f"no {missing}")
  sizes = {ours: keys.get(theirs) for theirs, ours in _SIZES.items()}
  if sizes["num_kv_heads"] is None:
    sizes["num_kv_heads"] = sizes["num_heads"]
  if sizes["head_dim"] is None:
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    require(
      type(width) is int
      and type(heads) is int
      and heads > 0
      and width % heads == 0,
      f"hidden_size={width!r} and num_attention_heads={heads!r}: expected "
      "head_dim, or a multiple",
    )
    sizes["head_dim"] = width // heads
  depth = sizes["num_layers"]
  require(
    type(depth) is int and 0 < depth <= _MAX_LAYERS,
    f"num_hidden_layers={depth!r}: expected at most {_MAX_LAYERS}",
  )
  return sizes


def _check_activation(keys: _Keys, family: Family, ours: str) -> None:
  expected = {_ACTIVATIONS[ours]}
  said = {k: keys.get(k) for k in ("hidden_activation", "hidden_act")}
  if family.model_type == "gemma":
    # The first configurations of Gemma 1 say "gelu" and mean this one.
    expected = {"gelu_pytorch_tanh", "gelu"}
  elif family.model_type in ("gemma2", "gemma3_text"):
    del said["hidden_act"]  # Not read by transformers.
  for key, value in said.items():
    require(
      value is None or (isinstance(value, str) and value in expected),
      f"not supported: {key}={value!r}: expected {_ACTIVATIONS[ours]!r}",
    )


def _attention(
  keys: _Keys, family: Family, depth: int
) -> tuple[tuple[str, ...], int | None]:
  """(the kind of each layer, the window); None is no window."""
  window = keys.get("sliding_window", family.window) if family.window else None
  said = {}
  if keys.given("layer_types"):
    said["layer_types"] = _layer_types(keys.get("layer_types"), depth)
  for key in ("sliding_window_pattern", "_sliding_window_pattern"):
    if family.pattern and keys.given(key):
      every = keys.get(key)
      require(
        type(every) is int and every > 0, f"{key}={every!r}: expected an int"
      )
      said[key] = _every(every, depth)
  default = ("global",) * depth
  if family.pattern:
    default = _every(family.pattern, depth)
  elif family.model_type == "mistral" and window is not None:
    said["sliding_window"] = ("local",) * depth
  elif family.model_type == "qwen2":
    first = keys.get("max_window_layers", 28)
    if not keys.boolean("use_sliding_window", False):
      window = None
    elif not said and window is not None:
      kinds = ("global", "local")
      default = tuple(kinds[i >= first] for i in range(depth))
    if window is None:
      said["use_sliding_window"] = default
  kinds = _agree("which layers are local", said, default)
  require(
    window is not None or "local" not in kinds,
    f"layers are local, but window={window!r}: expected sliding_window",
  )
  return kinds, window


def _every(pattern: int, depth: int) -> tuple[str, ...]:
  """Global layers are every `pattern`-th."""
  kinds = ("global", "local")
  return tuple(kinds[(i + 1) % pattern > 0] for i in range(depth))


def _layer_types(types: Any, depth: int) -> tuple[str, ...]:
  require(
    isinstance(types, list) and len(types) == depth,
    f"layer_types={types!r}: expected a list of num_hidden_layers={depth!r} "
    "kinds",
  )
  unknown = sorted({str(t) for t in types} - set(_KINDS))
  require(not unknown, f"layer_types has {unknown}: expected {sorted(_KINDS)}")
  return tuple(_KINDS[t] for t in types)


def _shortest(kinds: Sequence[str]) -> tuple[str, ...]:
  """The shortest pattern that, cycled, gives the kind of every layer."""
  kinds = tuple(kinds)
  for period in range(1, len(kinds)):
    if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
      return kinds[:period]
  return kinds


def _rope(
  keys: _Keys, family: Family
) -> tuple[float, float | None, RopeScaling | None]:
  """(base, that of local layers, scaling).

  `rope_parameters` is of transformers 5, where it may hold an object for each
  kind of layer; older files have `rope_theta` and `rope_scaling`.
  """
  bases, local_bases, scalings = {}, {}, {}
  if keys.given("rope_theta"):
    bases["rope_theta"] = keys.number("rope_theta", None)
  if family.local_rope_base and keys.given("rope_local_base_freq"):
    local_bases["rope_local_base_freq"] = keys.number(
      "rope_local_base_freq", None
    )
  parts = {}
  for key in ("rope_parameters", "rope_scaling"):
    if not keys.given(key) or keys.get(key) == {}:
      continue
    value = keys.get(key)
    require(isinstance(value, dict), f"{key}={value!r}: expected an object")
    nested = key == "rope_parameters" and family.local_rope_base is not None
    if not nested:
      parts[key] = value
      continue
    require(
      set(value) <= set(_KINDS),
      f"{key} has {sorted(value)}: expected {sorted(_KINDS)}",
    )
    parts |= {f"{key}.{kind}": part for kind, part in value.items() if part}
  original = keys.get("original_max_position_embeddings")
  for name, part in parts.items():
    local = name.endswith(_LOCAL)
    base, scaling = _rope_part(name, part, family, keys, original)
    if base is not None:
      (local_bases if local else bases)[name] = base
    if local:
      require(scaling is None, f"{name}={part!r}: expected rope_type 'default'")
    else:
      scalings[name] = scaling
  return (
    _agree("the base of RoPE", bases, family.rope_base),
    _agree("its base in local layers", local_bases, family.local_rope_base),
    _agree("the scaling of RoPE", scalings, None),
  )


def _rope_part(name, part, family, keys, original):
  """(base, scaling) of one object; a base of None is not said."""
  require(isinstance(part, dict), f"{name}={part!r}: expected an object")
  kinds = {k: part[k] for k in ("rope_type", "type") if k in part}
  kind = _agree(f"the kind of {name}", kinds, "default")
  fields: tuple[str, ...] = ()
  if kind in family.scalings:
    fields = ("factor",)
  if kind == "llama3" and fields:
    fields = ("factor", "low_freq_factor", "high_freq_factor")
  known = {"rope_type", "type", "rope_theta", *fields}
  if kind == "llama3":
    known.add("original_max_position_embeddings")
  require(
    (kind == "default" or fields) and set(part) <= known,
    f"{name}={part!r}: expected rope_type one of "
    f"{['default', *family.scalings]}, and of its keys at most "
    f"{sorted(known)}",
  )
  base = part.get("rope_theta")
  base = None if base is None else _number(f"{name}.rope_theta", base)
  if not fields:
    return base, None
  missing = [field for field in fields if field not in part]
  require(not missing, f"{name}={part!r}: expected {missing} too")
  numbers = {f: _number(f"{name}.{f}", part[f]) for f in fields}
  if kind == "llama3":
    said = {"original_max_position_embeddings": original}
    said[name] = part.get("original_max_position_embeddings")
    said = {key: value for key, value in said.items() if value is not None}
    usual = keys.get("max_position_embeddings", family.max_length)
    numbers["original_max_length"] = _agree(
      "the original length of RoPE", said, usual
    )
  return base, RopeScaling(kind, **numbers)
