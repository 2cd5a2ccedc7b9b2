"""What a model is (`TransformerConfig`) and where it is short (`FunnelConfig`).

Every mistake of configuration is found here, as a `ValueError` that names the
field, what was found and what was expected, before anything is computed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from gemma_funnel.checks import (
  is_number,
  near,
  require,
  require_between,
  require_bool,
  require_choice,
  require_int,
  require_positive,
)
from gemma_funnel.registry import RECOVERIES, REDUCERS

ATTENTION_KINDS = ("local", "global")
POSITIONS = ("last", "first", "mean")
# What the layers of a stage attend to; see `FunnelConfig.keys`.
KEYS = ("own", "first", "before", "none")
KERNELS = ("auto", "reference", "blocked", "tokamax", "splash")
REMATS = ("none", "dots", "offload", "block")
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("gelu", "silu")
ROPE_SCALINGS = ("linear", "llama3")
# Fields of a model that are of a run and not of its weights: one that starts
# from a checkpoint sets these itself, and sizes are the checkpoint's.
RUNTIME = (
  "param_dtype",
  "dtype",
  "softmax_dtype",
  "kernel",
  "scan_layers",
  "remat",
)
# Fields of a stage that every reducer goes by.
_ALWAYS = ("start", "stop", "reduce", "recover", "keys", "layers")
# Those that are always in its string, where its reducer goes by them.
_SHOWN = ("stride", "keep", "last", "threshold")


def _from_mapping(cls, values: Mapping[str, Any]):
  """Builds dataclass `cls` from a mapping; an unknown key is an error."""
  known = [f.name for f in dataclasses.fields(cls)]
  unknown = sorted(set(values) - set(known))
  meant = unknown and near(str(unknown[0]), known)
  hint = f"did you mean {meant!r}? It" if meant else "it"
  require(
    not unknown, f"{cls.__name__} has no field {unknown}; {hint} has {known}"
  )
  types = {f.name: f.type for f in dataclasses.fields(cls)}

  def convert(name, value):
    if isinstance(value, (list, tuple)):
      return tuple(value)
    if types[name] in (float, float | None) and isinstance(value, int):
      return float(value) if is_number(value) else value
    return value

  return cls(**{k: convert(k, v) for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class FunnelConfig:
  """One stage `[start, stop)` of layers that sees a shortened sequence.

  Layers before `start` and from `stop` on see the sequence as it came. The
  string form is "start=2,stop=8,stride=2,reduce=mean,recover=average", in
  which all but `start` may be left out. "layers=0-9,14-25" alone is the plain
  model with these layers in its layers' stead.

  Attributes:
    start: the first layer of the stage, >= 0.
    stop: the first layer after it; None is the model's depth (recover after
      the last block, before the final norm).
    stride: slots a group, >= 1.
    reduce: the reducer, a name of `registry.REDUCERS`; `reducers.py` defines
      ours.
    recover: how the full length returns, a name of `registry.RECOVERIES`;
      `funnel.py` defines ours. None is the reducer's own default.
    keys: what the stage's layers take keys and values from: their "own" short
      sequence; the sequence "before" the reduction, as it entered the stage
      (SwiftKV, arXiv 2410.03960); that one for the "first" layer alone (Dai et
      al. 2020); "none", without attention (arXiv 2404.05741). None is the
      reducer's own default.
    layers: the layers that run in the stead of [start, stop), in their order;
      None is each of them once. A string is such as "4-9,8,8,12-19".
    keep: of a selection, the part of the slots that go on, in thousandths.
    last: of "tail", how many slots at the end of a row go on.
    threshold: of "boundary", the least probability of a boundary.
    keep_first: the first slot (BOS, CLS) is a group of its own. In a causal
      model it always is.
    position: a group's position is that of its "last" slot, of its "first", or
      their "mean".
  """

  start: int
  stop: int | None = None
  stride: int = 2
  reduce: str = "mean"
  recover: str | None = None
  keys: str | None = None
  layers: tuple[int, ...] | str | None = None
  keep_first: bool = False
  position: str = "last"
  keep: float = 0.5
  last: int = 1
  threshold: float = 0.5

  def __post_init__(self):
    require_int("funnel.start", self.start, 0)
    if self.stop is not None:
      require_int("funnel.stop", self.stop, 0)
      require(
        self.start < self.stop,
        f"funnel.start={self.start} must be below funnel.stop={self.stop}",
      )
    require_int("funnel.stride", self.stride, 1)
    kind = REDUCERS.find(self.reduce)
    for name, default in (("recover", kind.recover), ("keys", kind.keys[0])):
      if getattr(self, name) is None:
        object.__setattr__(self, name, default)
    RECOVERIES.find(self.recover)
    require_choice("funnel.keys", self.keys, KEYS)
    require(
      self.keys in kind.keys,
      f"funnel.keys={self.keys!r} cannot be with funnel.reduce="
      f"{self.reduce!r}: expected one of {list(kind.keys)}",
    )
    require_choice("funnel.position", self.position, POSITIONS)
    require_bool("funnel.keep_first", self.keep_first)
    require_int("funnel.last", self.last, 1)
    for name in ("keep", "threshold"):
      require_between(f"funnel.{name}", getattr(self, name), 0, 1)
      object.__setattr__(self, name, float(getattr(self, name)))
    require(
      self.keep > 0 and round(self.keep * 1000, 6) % 1 == 0,
      f"funnel.keep={self.keep}: expected thousandths, from 0.001 to 1",
    )
    if self.layers is not None:
      object.__setattr__(self, "layers", _layers_of(self.layers))
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(
        field.name in (*_ALWAYS, *kind.options) or value == field.default,
        f"funnel.{field.name}={value!r} has no effect with funnel.reduce="
        f"{self.reduce!r}, whose options are {list(kind.options)}",
      )

  def __str__(self) -> str:
    kind = REDUCERS[self.reduce]
    plain = {f.name: f.default for f in dataclasses.fields(self)}
    plain["keys"] = kind.keys[0]
    shown = {
      name: getattr(self, name)
      for name in plain
      if name in ("start", "stop", "reduce", "recover")
      or (name in _SHOWN and name in kind.options)
      or getattr(self, name) != plain[name]
    }
    if self.layers is not None:
      shown["layers"] = _format_layers(self.layers)
    text = lambda v: str(v).lower() if isinstance(v, bool) else str(v)
    return ",".join(f"{k}={text(v)}" for k, v in shown.items() if v is not None)

  @classmethod
  def parse(cls, text: str) -> "FunnelConfig":
    """Reads the string form.

    Raises:
      ValueError: a key or value that is none, named.
    """
    values = {}
    # The values of `layers` have commas of their own.
    for item in re.split(r",(?!\s*[\d\s-]+(?:,|$))", text):
      key, equals, value = (part.strip() for part in item.partition("="))
      require(
        bool(equals and value) and "=" not in value,
        f"funnel {text!r}: {item!r} is not key=value, joined by commas; "
        "expected 'off' or e.g. 'start=2,stride=2,recover=average'",
      )
      value = _from_text(value) if key != "layers" else value
      match key:  # Names of version 0.1.
        case "pool":
          key, value = "reduce", {"every": "strided"}.get(value, value)
        case "pool_query_only" if isinstance(value, bool):
          key, value = "keys", "first" if value else "own"
      require(key not in values, f"funnel {text!r}: {key} is given twice")
      values[key] = value
    if list(values) == ["layers"]:
      values |= dict(start=0, reduce="all")
    require("start" in values, f"funnel {text!r}: start is missing")
    return _from_mapping(cls, values)


def _from_text(value: str) -> int | float | bool | str:
  if value in ("true", "false"):
    return value == "true"
  for number in (int, float):
    try:
      return number(value)
    except ValueError:
      pass
  return value


def _layers_of(layers: Any) -> tuple[int, ...]:
  """Numbers of layers, of a tuple or of a string such as "0-9,12"."""
  if isinstance(layers, str):
    found = []
    for part in layers.split(","):
      match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
      require(
        match and int(match[1]) <= int(match[2] or match[1]),
        f"funnel.layers={layers!r}: expected such as '0-9,14-25'",
      )
      found += range(int(match[1]), int(match[2] or match[1]) + 1)
    layers = tuple(found)
  require(
    isinstance(layers, tuple) and len(layers) > 0,
    f"funnel.layers={layers!r}: expected such as (0, 1, 2) or '0-9,14-25'",
  )
  for layer in layers:
    require_int("funnel.layers", layer, 0)
  return layers


def contiguous(layers: Sequence[int]) -> list[tuple[int, int]]:
  """[first, last) of each run of neighbours in an order of layers."""
  runs = []
  for layer in layers:
    if runs and layer == runs[-1][1]:
      runs[-1] = runs[-1][0], layer + 1
    else:
      runs.append((layer, layer + 1))
  return runs


def _format_layers(layers: tuple[int, ...]) -> str:
  return ",".join(
    str(lo) if lo + 1 == hi else f"{lo}-{hi - 1}"
    for lo, hi in contiguous(layers)
  )


# What is taken for a funnel: one stage, several of them, or a string. None,
# () and "off" are no funnel.
Funnel = FunnelConfig | Sequence[FunnelConfig] | str | None
OFF = "off"
_AND = "+"


def parse_funnel(funnel: Funnel) -> tuple[FunnelConfig, ...]:
  """The stages of a funnel, as they are written; () is no funnel.

  Stages of a string are separated by "+": "start=6,stride=2+start=12,stride=2".

  Raises:
    ValueError: see `FunnelConfig.parse`.
  """
  if funnel is None:
    return ()
  if isinstance(funnel, FunnelConfig):
    return (funnel,)
  if isinstance(funnel, str):
    if funnel.strip() in ("", OFF):
      return ()
    return tuple(FunnelConfig.parse(part) for part in funnel.split(_AND))
  require(
    isinstance(funnel, Sequence),
    f"funnel {funnel!r}: expected such as 'start=2,stride=2', or 'off'",
  )
  for stage in funnel:
    require(
      isinstance(stage, FunnelConfig),
      f"funnel stage {stage!r}: expected a FunnelConfig",
    )
  return tuple(funnel)


def resolve_funnel(funnel: Funnel, num_layers: int) -> tuple[FunnelConfig, ...]:
  """The stages of a funnel in a model of that depth.

  Returns:
    Stages in the order of their starts, each with its `stop`; () is no funnel.

  Raises:
    ValueError: a stage that does not fit the depth; two that cross each other
      or start at one layer; a "none" recovery before the end of the model.
  """
  stages = []
  for stage in parse_funnel(funnel):
    stop = num_layers if stage.stop is None else stage.stop
    require(
      stop <= num_layers,
      f"funnel.stop={stop} is past the model's {num_layers} layers",
    )
    require(
      stage.start < stop,
      f"funnel.start={stage.start} must be below funnel.stop={stop} "
      f"(the model has {num_layers} layers)",
    )
    require(
      max(stage.layers or (0,)) < num_layers,
      f"funnel.layers={stage.layers}: the model has {num_layers} layers",
    )
    stages.append(dataclasses.replace(stage, stop=stop))
  stages.sort(key=lambda stage: stage.start)
  for n, inner in enumerate(stages):
    for outer in stages[:n]:
      require(
        outer.start < inner.start,
        f"two funnel stages start at layer {inner.start}: expected one of a "
        "larger stride",
      )
      require(
        inner.start >= outer.stop or inner.stop <= outer.stop,
        f"funnel stages [{outer.start}, {outer.stop}) and [{inner.start}, "
        f"{inner.stop}) cross: expected one within the other, or apart",
      )
      require(
        outer.layers is None or inner.start >= outer.stop,
        f"funnel.layers={_format_layers(outer.layers or ())} of the stage "
        f"[{outer.start}, {outer.stop}), which holds [{inner.start}, "
        f"{inner.stop}): expected funnel.layers in the inner stage, or none",
      )
    kind = REDUCERS[inner.reduce]
    alone = inner.start > 0 and all(s.stop != inner.start for s in stages[:n])
    require(
      alone or not kind.needs,
      f"funnel.reduce={inner.reduce!r} needs {list(kind.needs)} of a layer "
      "before the stage: expected funnel.start >= 1, and not another's stop",
    )
    if inner.recover == "none":
      require(
        inner.stop == num_layers,
        f"funnel.recover='none' with stop={inner.stop}: layers after it need "
        f"a recovery; expected stop={num_layers}, or another recovery",
      )
      require(
        all(o.recover == "none" for o in stages[:n] if o.stop == num_layers),
        f"funnel.recover='none' at layer {inner.start} is within a stage that "
        "recovers: expected 'none' there too, or another recovery here",
      )
  return tuple(stages)


def check_recovers(stages: Sequence[FunnelConfig], what: str) -> None:
  """Checks that every token gets a state back.

  Raises:
    ValueError: a "none" recovery; it names `what` needs more.
  """
  for stage in stages:
    require(
      RECOVERIES[stage.recover].upsamples,
      f"funnel.recover={stage.recover!r} leaves the sequence short, but {what} "
      "needs a state for every token: expected another recovery",
    )


def check_reducers(stages: Sequence[FunnelConfig], can: str, what: str) -> None:
  """Checks that reducers can do what is asked of them.

  Args:
    stages: of a funnel.
    can: an attribute of `reducers.Reducer`: "decodes", "trains", "packs" or
      "bidirectional".
    what: for the error, such as "decoding".

  Raises:
    ValueError: one cannot; it names it, and those that can.
  """
  for stage in stages:
    able = [name for name, kind in REDUCERS.items() if getattr(kind, can)]
    require(
      stage.reduce in able,
      f"funnel.reduce={stage.reduce!r} cannot be used for {what} "
      f"({can}=False); expected one of {able}",
    )


def format_funnel(stages: Sequence[FunnelConfig]) -> str:
  """The string that `parse_funnel` reads; "off" is no funnel."""
  return _AND.join(map(str, stages)) or OFF


def total_stride(stages: Sequence[FunnelConfig]) -> int:
  """Tokens after which all stages' groups begin anew; 1 without a funnel.

  Segments of packed rows start at multiples of it. Stages are resolved.
  """
  periods = [1]
  for stage in stages:
    around = [s for s in stages if s.start <= stage.start < s.stop]
    periods.append(math.prod(REDUCERS[s.reduce](s).period for s in around))
  return math.lcm(*periods)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for texts longer than pretraining's.

  Attributes:
    kind: "linear" divides all frequencies by `factor` (arXiv 2306.15595);
      "llama3" divides those of wavelengths above original_max_length /
      low_freq_factor, leaves those below original_max_length /
      high_freq_factor, and goes smoothly between (Llama 3.1).
    factor: > 0.
    low_freq_factor, high_freq_factor, original_max_length: of "llama3".
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192

  def __post_init__(self):
    require_choice("model.rope_scaling.kind", self.kind, ROPE_SCALINGS)
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
      require_positive(f"model.rope_scaling.{name}", getattr(self, name))
    require_int(
      "model.rope_scaling.original_max_length", self.original_max_length, 1
    )
    require(
      self.low_freq_factor < self.high_freq_factor,
      f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be "
      f"below high_freq_factor={self.high_freq_factor}",
    )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """What sets one layer apart from its neighbours.

  Attributes:
    window: tokens that it sees, itself included; None is all.
    rope_base: the base of its rotary frequencies.
    rope_scaling: their scaling; None is none.
  """

  window: int | None
  rope_base: float
  rope_scaling: RopeScaling | None = None

  @property
  def rope(self) -> tuple[float, RopeScaling | None]:
    """Layers with the same value share their angles."""
    return self.rope_base, self.rope_scaling


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder-only transformer by numbers, with the defaults of Gemma 2.

  Attributes:
    vocab_size: rows of the embedding.
    num_layers: depth L.
    embed_dim: width D of the residual stream.
    mlp_dim: hidden width F of each of the gate and the up projection.
    num_heads: query heads N.
    num_kv_heads: key/value heads K; N is a multiple of it.
    head_dim: H, not necessarily D/N.
    query_pre_attn_scalar: queries are multiplied by its inverse square root.
    attention_pattern: kinds of attention, cycled over the layers.
    window: tokens that a local layer sees, itself included (bidirectional:
      |i - j| < window).
    attn_softcap, final_softcap: c in c * tanh(x / c) on attention logits and
      on vocabulary logits; None is no cap.
    post_norms: RMSNorm after attention and after the MLP too (Gemma 2).
    rope_base: the base of the rotary frequencies.
    local_rope_base: that of local layers; None is the same (Gemma 3 has two).
    rope_scaling: of global layers; None is none.
    norm_eps: epsilon within RMSNorm.
    norm_offset: RMSNorm multiplies by norm_offset + w: 1 (Gemma) or 0 (Llama).
    activation: of the gated MLP: "gelu" (tanh approximation) or "silu".
    embed_scale: embeddings are multiplied by it; None is sqrt(embed_dim).
    tied: the head is the embedding; else it is a matrix of its own.
    qk_norm: RMSNorm of each query and key head before the rotation (Gemma 3).
    attention_bias: biases of queries, keys and values (Qwen2).
    max_length: the longest sequence, in tokens.
    param_dtype: what parameters are stored in.
    dtype: what matrices are multiplied in; norms, softmax statistics and
      logits are float32 whatever it says.
    softmax_dtype: what attention logits and weights are held in.
    kernel: the attention kernel (`attention.KERNELS`); "auto" chooses the best
      that can do what is asked on the device at hand.
    scan_layers: layers as one `lax.scan` (fast to compile), or unrolled.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix
      products), "offload" (the same, with products kept in the host's memory),
      "block" (everything within a block).
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  query_pre_attn_scalar: float
  attention_pattern: tuple[str, ...] = ATTENTION_KINDS
  window: int = 4096
  attn_softcap: float | None = 50.0
  final_softcap: float | None = 30.0
  post_norms: bool = True
  rope_base: float = 10_000.0
  local_rope_base: float | None = None
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-6
  norm_offset: float = 1.0
  activation: str = "gelu"
  embed_scale: float | None = None
  tied: bool = True
  qk_norm: bool = False
  attention_bias: bool = False
  max_length: int = 8192
  param_dtype: str = "float32"
  dtype: str = "float32"
  softmax_dtype: str = "float32"
  kernel: str = "auto"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    require_int("model.num_layers", self.num_layers, 1, 10_000)
    for name in (
      "vocab_size",
      "embed_dim",
      "mlp_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "window",
      "max_length",
    ):
      require_int(f"model.{name}", getattr(self, name), 1)
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.num_heads={self.num_heads} must be a multiple of "
      f"model.num_kv_heads={self.num_kv_heads}",
    )
    require(
      self.head_dim % 2 == 0,
      f"model.head_dim={self.head_dim}: rotary embeddings need an even one",
    )
    for name in ("query_pre_attn_scalar", "rope_base", "norm_eps"):
      require_positive(f"model.{name}", getattr(self, name))
    for name, none in (
      ("attn_softcap", "no cap"),
      ("final_softcap", "no cap"),
      ("local_rope_base", "model.rope_base"),
      ("embed_scale", "sqrt(embed_dim)"),
    ):
      value = getattr(self, name)
      if value is not None:
        require_positive(f"model.{name}", value, f", or None for {none}")
    require_choice("model.norm_offset", self.norm_offset, (0.0, 1.0))
    require_choice("model.activation", self.activation, ACTIVATIONS)
    require(
      self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
      f"model.rope_scaling={self.rope_scaling!r}: expected a RopeScaling",
    )
    for name in (
      "post_norms",
      "scan_layers",
      "tied",
      "qk_norm",
      "attention_bias",
    ):
      require_bool(f"model.{name}", getattr(self, name))
    require(
      isinstance(self.attention_pattern, tuple),
      f"model.attention_pattern={self.attention_pattern!r}: expected a tuple",
    )
    require(len(self.attention_pattern) > 0, "model.attention_pattern is empty")
    for kind in self.attention_pattern:
      require_choice("model.attention_pattern", kind, ATTENTION_KINDS)
    for name in ("param_dtype", "dtype", "softmax_dtype"):
      require_choice(f"model.{name}", getattr(self, name), DTYPES)
    require_choice("model.kernel", self.kernel, KERNELS)
    require_choice("model.remat", self.remat, REMATS)

  @property
  def attention_kinds(self) -> tuple[str, ...]:
    """The kind of attention of each of the L layers."""
    pattern = self.attention_pattern
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

  @property
  def query_scale(self) -> float:
    """What queries are multiplied by."""
    return 1.0 / math.sqrt(self.query_pre_attn_scalar)

  @property
  def layers(self) -> tuple[LayerSpec, ...]:
    """The specification of each of the L layers."""
    local = LayerSpec(self.window, self.local_rope_base or self.rope_base)
    whole = LayerSpec(None, self.rope_base, self.rope_scaling)
    return tuple(
      local if kind == "local" else whole for kind in self.attention_kinds
    )

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
    """Builds from a mapping (a ConfigDict too).

    Raises:
      ValueError: an unknown field, or a value out of range.
    """
    scaling = values.get("rope_scaling")
    if hasattr(scaling, "items"):
      values = {**values, "rope_scaling": _from_mapping(RopeScaling, scaling)}
    return _from_mapping(cls, values)

  @classmethod
  def preset(cls, name: str, **changes: Any) -> "TransformerConfig":
    """A named size, with fields replaced by `changes`.

    Raises:
      ValueError: no preset of that name, or a value out of range.
    """
    require_choice("preset", name, tuple(PRESETS))
    return cls.from_dict({**PRESETS[name], **changes})


_GEMMA1 = dict(
  attention_pattern=("global",),
  attn_softcap=None,
  final_softcap=None,
  post_norms=False,
)
_LLAMA = _GEMMA1 | dict(norm_offset=0.0, embed_scale=1.0, activation="silu")
# What all models of a family have, where it is not what Gemma 2 has. Families
# have transformers' names.
FAMILIES: dict[str, dict[str, Any]] = dict(
  gemma=_GEMMA1,
  gemma2={},
  gemma3_text=dict(qk_norm=True),
  llama=_LLAMA,
  mistral=_LLAMA,
  qwen2=_LLAMA | dict(attention_bias=True),
)


def _sized(sizes: str, **others) -> dict[str, Any]:
  """A preset of "L D F N K"; heads are D/N wide if `others` do not say."""
  names = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")
  found = dict(zip(names, map(int, sizes.split()), strict=True)) | others
  found.setdefault("head_dim", found["embed_dim"] // found["num_heads"])
  found.setdefault("query_pre_attn_scalar", float(found["head_dim"]))
  return found


_G1 = FAMILIES["gemma"] | dict(vocab_size=256_000, head_dim=256)
_G2 = FAMILIES["gemma2"] | dict(vocab_size=256_000, head_dim=256)
_G3 = FAMILIES["gemma3_text"] | dict(
  vocab_size=262_144,
  head_dim=256,
  attention_pattern=("local",) * 5 + ("global",),
  window=512,
  attn_softcap=None,
  final_softcap=None,
  rope_base=1e6,
  local_rope_base=1e4,
  max_length=32_768,
)
# Those that see images have 64 rows of the embedding more.
_G3_LARGE = _G3 | dict(
  vocab_size=262_208,
  window=1024,
  rope_scaling=dict(kind="linear", factor=8.0),
  max_length=131_072,
)
_L2 = FAMILIES["llama"] | dict(
  vocab_size=32_000, norm_eps=1e-5, max_length=4096, tied=False
)
_L3 = _L2 | dict(vocab_size=128_256, rope_base=5e5, max_length=8192)
_L31 = _L3 | dict(
  rope_scaling=dict(kind="llama3", factor=8.0), max_length=131_072
)
_L32 = _L31 | dict(rope_scaling=dict(kind="llama3", factor=32.0), tied=True)
_SMOL = FAMILIES["llama"] | dict(
  vocab_size=49_152, rope_base=1e5, norm_eps=1e-5
)
_MISTRAL = FAMILIES["mistral"] | dict(
  norm_eps=1e-5, max_length=32_768, tied=False
)
# Qwen2.5's are the same; some are for texts of at most 32,768 tokens.
_QWEN = FAMILIES["qwen2"] | dict(
  vocab_size=151_936, rope_base=1e6, max_length=131_072
)
_DISTILL = _QWEN | dict(rope_base=1e4, tied=False)

# The published sizes of Gemma 1 and 2 agree in google-deepmind/gemma,
# google/gemma_pytorch and Hugging Face's configurations. Two are often got
# wrong: Gemma 2 9B scales queries by 256 (= head_dim) and not 224 (= D/N), 27B
# by 144 (= D/N) and not 128. The others are those of Hugging Face's.
PRESETS: dict[str, dict[str, Any]] = {
    "gemma1_2b": _sized("18 2048 16384 8 1", **_G1),
    "gemma1_7b": _sized("28 3072 24576 16 16", **_G1),
    "gemma2_2b": _sized("26 2304 9216 8 4", **_G2),
    "gemma2_9b": _sized("42 3584 14336 16 8", **_G2),
    "gemma2_27b": _sized(
        "46 4608 36864 32 16",
        **_G2 | dict(head_dim=128, query_pre_attn_scalar=144.0),
    ),
    "gemma3_270m": _sized("18 640 2048 4 1", **_G3),
    "gemma3_1b": _sized("26 1152 6912 4 1", **_G3),
    "gemma3_4b": _sized("34 2560 10240 8 4", **_G3_LARGE),
    "gemma3_12b": _sized("48 3840 15360 16 8", **_G3_LARGE),
    "gemma3_27b": _sized(
        "62 5376 21504 32 16",
        **_G3_LARGE | dict(head_dim=128, query_pre_attn_scalar=168.0),
    ),
    "llama2_7b": _sized("32 4096 11008 32 32", **_L2),
    "llama2_13b": _sized("40 5120 13824 40 40", **_L2),
    "llama2_70b": _sized("80 8192 28672 64 8", **_L2),
    "llama3_8b": _sized("32 4096 14336 32 8", **_L3),
    "llama3_70b": _sized("80 8192 28672 64 8", **_L3),
    "llama3.1_8b": _sized("32 4096 14336 32 8", **_L31),
    "llama3.1_70b": _sized("80 8192 28672 64 8", **_L31),
    "llama3.2_1b": _sized("16 2048 8192 32 8", **_L32),
    "llama3.2_3b": _sized("28 3072 8192 24 8", **_L32),
    "smollm2_135m": _sized("30 576 1536 9 3", **_SMOL),
    "smollm2_360m": _sized("32 960 2560 15 5", **_SMOL),
    "smollm2_1.7b": _sized(
        "24 2048 8192 32 32", **_SMOL | dict(rope_base=1.3e5)
    ),
    "mistral_7b_v0.1": _sized(
        "32 4096 14336 32 8", vocab_size=32_000,
        **_MISTRAL | dict(attention_pattern=("local",)),
    ),
    "mistral_7b_v0.3": _sized(
        "32 4096 14336 32 8", vocab_size=32_768, rope_base=1e6, **_MISTRAL
    ),
    "qwen2_0.5b": _sized("24 896 4864 14 2", **_QWEN),
    "qwen2_1.5b": _sized("28 1536 8960 12 2", **_QWEN),
    "qwen2_7b": _sized(
        "28 3584 18944 28 4", **_QWEN | dict(vocab_size=152_064, tied=False)
    ),
    "deepseek_r1_distill_qwen_1.5b": _sized("28 1536 8960 12 2", **_DISTILL),
    "deepseek_r1_distill_qwen_7b": _sized(
        "28 3584 18944 28 4", **_DISTILL | dict(vocab_size=152_064)
    ),
    # The shape that latency is compared on with other implementations.
    "bench": dict(
        vocab_size=32_768, num_layers=12, embed_dim=768, mlp_dim=3072,
        num_heads=8, num_kv_heads=4, head_dim=96, query_pre_attn_scalar=96.0,
        window=512,
    ),
    # Learns something in minutes on two CPU cores.
    "quickstart": dict(
        vocab_size=4096, num_layers=8, embed_dim=192, mlp_dim=768, num_heads=4,
        num_kv_heads=2, head_dim=48, query_pre_attn_scalar=48.0, window=128,
        max_length=4096,
    ),
    # For tests. No constant is neutral: the query scale is not head_dim,
    # head_dim is not D/N, the window is short and both caps are low.
    "tiny": dict(
        vocab_size=97, num_layers=4, embed_dim=32, mlp_dim=48, num_heads=4,
        num_kv_heads=2, head_dim=6, query_pre_attn_scalar=11.0, window=8,
        attn_softcap=2.0, final_softcap=3.0, max_length=256,
    ),
}  # fmt: skip
