"""What a model is (`TransformerConfig`) and where it is short (`FunnelConfig`).

Every mistake of configuration is found here, as a `ValueError` that names the
field, what was found and what was expected, before anything is computed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from gemma_funnel.checks import (
  require,
  require_bool,
  require_choice,
  require_int,
  require_positive,
)

ATTENTION_KINDS = ("local", "global")
POOLS = ("mean", "max", "first", "last", "attention", "every")
RECOVERIES = ("average", "add", "repeat", "gate", "attend", "none")
POSITIONS = ("last", "first", "mean")
KERNELS = ("auto", "reference", "blocked", "tokamax", "splash")
REMATS = ("none", "dots", "offload", "block")
DTYPES = ("float32", "bfloat16", "float16")


def _from_mapping(cls, values: Mapping[str, Any]):
  """Builds dataclass `cls` from a mapping; an unknown key is an error."""
  known = [f.name for f in dataclasses.fields(cls)]
  unknown = sorted(set(values) - set(known))
  require(not unknown, f"{cls.__name__} has no field {unknown}; it has {known}")
  as_tuple = lambda v: tuple(v) if isinstance(v, (list, tuple)) else v
  return cls(**{k: as_tuple(v) for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class FunnelConfig:
  """One stage `[start, stop)` of layers that sees a shortened sequence.

  Layers before `start` and from `stop` on see the sequence as it came; the
  layers between see one vector for every `stride` of its slots. Written and
  read as the string "start=2,stop=8,stride=2,pool=mean,recover=average", in
  which all but `start` may be left out.

  Attributes:
    start: the first layer of the stage, >= 0.
    stop: the first layer after it; None is the model's depth (recover after
      the last block, before the final norm).
    stride: slots a group, >= 1.
    pool: how a group becomes one vector: "mean", "max", "first" or "last" of
      its slots; "attention", weighted by a learned query that starts as the
      mean; "every" selects each stride-th slot, and the others bypass the stage
      (as in token dropping, Hou et al. 2022).
    recover: how the full length returns from the deep state u of a group and
      the state h from before: "average" (u+h)/2; "add" u+h; "repeat" u; "gate"
      s*u + (1-s)*h with a learned s that starts at 1/2; "attend" the average
      and a learned attention of h to the deep states, which starts at zero;
      "none" leaves the sequence short, for heads that read a whole sequence.
    pool_query_only: the first layer of the stage has pooled queries, and the
      keys and values of the sequence before pooling (Dai et al. 2020).
    keep_first: the first slot (BOS, CLS) is a group of its own. In a causal
      model it always is.
    position: that of a group is its "last" slot's, its "first" one's or their
      "mean".
  """

  start: int
  stop: int | None = None
  stride: int = 2
  pool: str = "mean"
  recover: str = "average"
  pool_query_only: bool = False
  keep_first: bool = False
  position: str = "last"

  def __post_init__(self):
    require_int("funnel.start", self.start, 0)
    if self.stop is not None:
      require_int("funnel.stop", self.stop, 0)
      require(
        self.start < self.stop,
        f"funnel.start={self.start} must be below funnel.stop={self.stop}",
      )
    require_int("funnel.stride", self.stride, 1)
    require_choice("funnel.pool", self.pool, POOLS)
    require_choice("funnel.recover", self.recover, RECOVERIES)
    require_choice("funnel.position", self.position, POSITIONS)
    for name in ("pool_query_only", "keep_first"):
      require_bool(f"funnel.{name}", getattr(self, name))
    require(
      self.pool != "every" or self.position == "last",
      f"funnel.position={self.position!r} has no effect with pool='every', "
      "whose slots keep their own positions",
    )

  def __str__(self) -> str:
    always = ("start", "stop", "stride", "pool", "recover")
    shown = {
      f.name: getattr(self, f.name)
      for f in dataclasses.fields(self)
      if f.name in always or getattr(self, f.name) != f.default
    }
    text = lambda v: str(v).lower() if isinstance(v, bool) else str(v)
    return ",".join(f"{k}={text(v)}" for k, v in shown.items() if v is not None)

  @classmethod
  def parse(cls, text: str) -> "FunnelConfig":
    """Reads the string form.

    Raises:
      ValueError: a key or value that is none, named.
    """
    values = {}
    for item in text.split(","):
      key, equals, value = (part.strip() for part in item.partition("="))
      require(
        bool(equals and value),
        f"funnel {text!r}: {item!r} is not key=value; expected 'off' or "
        "e.g. 'start=2,stride=2,recover=average'",
      )
      require(key not in values, f"funnel {text!r}: {key} is given twice")
      values[key] = _from_text(value)
    require("start" in values, f"funnel {text!r}: start is missing")
    return _from_mapping(cls, values)


def _from_text(value: str) -> int | bool | str:
  if value in ("true", "false"):
    return value == "true"
  try:
    return int(value)
  except ValueError:
    return value


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
      stage.recover != "none",
      f"funnel.recover='none' leaves the sequence short, but {what} needs a "
      "state for every token: expected another recovery",
    )


def format_funnel(stages: Sequence[FunnelConfig]) -> str:
  """The string that `parse_funnel` reads; "off" is no funnel."""
  return _AND.join(map(str, stages)) or OFF


def total_stride(stages: Sequence[FunnelConfig]) -> int:
  """Tokens after which all stages' groups begin anew; 1 without a funnel.

  Segments of packed rows start at multiples of it. Stages are resolved.
  """
  strides = [1]
  for stage in stages:
    around = [s for s in stages if s.start <= stage.start < s.stop]
    strides.append(math.prod(s.stride for s in around))
  return math.lcm(*strides)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Gemma 1 or 2, by numbers. Defaults are those common to Gemma 2.

  Attributes:
    vocab_size: rows of the tied embedding.
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
    norm_eps: epsilon within RMSNorm.
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
  norm_eps: float = 1e-6
  max_length: int = 8192
  param_dtype: str = "float32"
  dtype: str = "float32"
  softmax_dtype: str = "float32"
  kernel: str = "auto"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    for name in (
      "vocab_size",
      "num_layers",
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
    for name in ("attn_softcap", "final_softcap"):
      value = getattr(self, name)
      if value is not None:
        require_positive(f"model.{name}", value, ", or None for no cap")
    for name in ("post_norms", "scan_layers"):
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

  def window_of(self, layer: int) -> int | None:
    """The window of `layer` in tokens; None where it is global."""
    return self.window if self.attention_kinds[layer] == "local" else None

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
    """Builds from a mapping (a ConfigDict too).

    Raises:
      ValueError: an unknown field, or a value out of range.
    """
    return _from_mapping(cls, values)

  @classmethod
  def preset(cls, name: str, **changes: Any) -> "TransformerConfig":
    """A named size, with fields replaced by `changes`.

    Raises:
      ValueError: no preset of that name, or a value out of range.
    """
    require_choice("preset", name, tuple(PRESETS))
    return _from_mapping(cls, {**PRESETS[name], **changes})


def _gemma1(**sizes) -> dict[str, Any]:
  return dict(
    vocab_size=256_000,
    head_dim=256,
    query_pre_attn_scalar=256.0,
    attention_pattern=("global",),
    attn_softcap=None,
    final_softcap=None,
    post_norms=False,
    **sizes,
  )


def _gemma2(head_dim=256, query_pre_attn_scalar=256.0, **sizes):
  return dict(
    vocab_size=256_000,
    head_dim=head_dim,
    query_pre_attn_scalar=query_pre_attn_scalar,
    **sizes,
  )


# The published sizes agree in google-deepmind/gemma, google/gemma_pytorch and
# Hugging Face's configurations. Two are often got wrong: 9B scales queries by
# 256 (= head_dim) and not 224 (= D/N), 27B by 144 (= D/N) and not 128.
PRESETS: dict[str, dict[str, Any]] = {
  "gemma1_2b": _gemma1(
    num_layers=18, embed_dim=2048, mlp_dim=16_384, num_heads=8, num_kv_heads=1
  ),
  "gemma1_7b": _gemma1(
    num_layers=28, embed_dim=3072, mlp_dim=24_576, num_heads=16, num_kv_heads=16
  ),
  "gemma2_2b": _gemma2(
    num_layers=26, embed_dim=2304, mlp_dim=9216, num_heads=8, num_kv_heads=4
  ),
  "gemma2_9b": _gemma2(
    num_layers=42, embed_dim=3584, mlp_dim=14_336, num_heads=16, num_kv_heads=8
  ),
  "gemma2_27b": _gemma2(
    num_layers=46,
    embed_dim=4608,
    mlp_dim=36_864,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    query_pre_attn_scalar=144.0,
  ),
  # The shape that latency is compared on with other implementations.
  "bench": dict(
    vocab_size=32_768,
    num_layers=12,
    embed_dim=768,
    mlp_dim=3072,
    num_heads=8,
    num_kv_heads=4,
    head_dim=96,
    query_pre_attn_scalar=96.0,
    window=512,
  ),
  # Learns something in minutes on two CPU cores.
  "quickstart": dict(
    vocab_size=4096,
    num_layers=8,
    embed_dim=192,
    mlp_dim=768,
    num_heads=4,
    num_kv_heads=2,
    head_dim=48,
    query_pre_attn_scalar=48.0,
    window=128,
    max_length=4096,
  ),
  # For tests. No constant is neutral: the query scale is not head_dim,
  # head_dim is not D/N, the window is short and both caps are low.
  "tiny": dict(
    vocab_size=97,
    num_layers=4,
    embed_dim=32,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    query_pre_attn_scalar=11.0,
    window=8,
    attn_softcap=2.0,
    final_softcap=3.0,
    max_length=256,
  ),
}
