"""Hugging Face folders of Gemma 1 and 2: config.json and safetensors.

Nothing of torch or transformers is needed: configurations are JSON, tensors
are read by safetensors, one at a time. A name says what a tensor is, except
that `post_attention_layernorm` is the norm before the MLP in Gemma 1 and the
one after attention in Gemma 2.
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from gemma_funnel.config import GemmaConfig

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_SIZES = {
  "vocab_size": "vocab_size",
  "num_hidden_layers": "num_layers",
  "hidden_size": "embed_dim",
  "intermediate_size": "mlp_dim",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
}
_LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}
_EMBEDDING = "model.embed_tokens.weight"
_TIED_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Where a tensor goes, and what its axes are.

  Attributes:
    path: of our parameter; within a block for tensors of a layer.
    stored: the axes in the file, with the letters of model.py; letters in one
      word are folded into one axis, the first is outermost.
    ours: the same letters in the order of our parameter.
  """

  path: tuple[str, ...]
  stored: str
  ours: str

  def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape in the file."""
    words = self.stored.split()
    return tuple(math.prod(sizes[c] for c in word) for word in words)

  def to_ours(self, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """A view of the stored `array` in our layout."""
    letters = self.stored.replace(" ", "")
    unfolded = array.reshape([sizes[c] for c in letters])
    return unfolded.transpose([letters.index(c) for c in self.ours])


def _norm(name: str) -> _Layout:
  return _Layout((name, "scale"), "D", "D")


_MODEL = {
  "embed_tokens": _Layout(("embedding",), "V D", "VD"),
  "norm": _norm("final_norm"),
}
_LAYER = {
  "input_layernorm": _norm("pre_attn_norm"),
  "self_attn.q_proj": _Layout(("attn", "query"), "NH D", "DNH"),
  "self_attn.k_proj": _Layout(("attn", "key"), "KH D", "DKH"),
  "self_attn.v_proj": _Layout(("attn", "value"), "KH D", "DKH"),
  "self_attn.o_proj": _Layout(("attn", "out"), "D NH", "NHD"),
  "mlp.gate_proj": _Layout(("mlp", "gate"), "F D", "DF"),
  "mlp.up_proj": _Layout(("mlp", "up"), "F D", "DF"),
  "mlp.down_proj": _Layout(("mlp", "down"), "D F", "FD"),
}
_GEMMA1_LAYER = {
  **_LAYER,
  "post_attention_layernorm": _norm("pre_mlp_norm"),
}
_GEMMA2_LAYER = {
  **_LAYER,
  "post_attention_layernorm": _norm("post_attn_norm"),
  "pre_feedforward_layernorm": _norm("pre_mlp_norm"),
  "post_feedforward_layernorm": _norm("post_mlp_norm"),
}


def tensor_table(
  config: GemmaConfig,
) -> dict[str, tuple[int | None, _Layout]]:
  """Every tensor of a causal language model: its layer, and its layout.

  The layer is None outside the stack; paths are of our whole tree.
  """
  table: dict[str, tuple[int | None, _Layout]] = {
    f"model.{name}.weight": (None, layout) for name, layout in _MODEL.items()
  }
  names = _GEMMA2_LAYER if config.post_norms else _GEMMA1_LAYER
  for layer in range(config.num_layers):
    for name, layout in names.items():
      layout = dataclasses.replace(layout, path=("layers", *layout.path))
      table[f"model.layers.{layer}.{name}.weight"] = (layer, layout)
  return table


def peek(file: pathlib.Path) -> dict[str, Any]:
  """What a JSON file holds; {} if it is none, or holds no object."""
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


def is_checkpoint(folder: pathlib.Path) -> bool:
  """Whether `folder` is one of Hugging Face's, complete or not.

  A config.json that cannot be read counts: `read_config` says what is wrong.
  """
  file = folder / _CONFIG
  if not file.is_file():
    return False
  weights = (folder / _WEIGHTS).exists() or (folder / _INDEX).exists()
  return weights or "model_type" in peek(file)


def read_config(folder: pathlib.Path) -> GemmaConfig:
  """The model that config.json describes, in float32.

  Raises:
    ValueError: not a Gemma 1 or 2, or one with something that ours has not;
      it names the file, the key and what was found.
  """
  file = folder / _CONFIG
  raw = _read_json(file)
  try:
    return _to_config(raw)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def read_pieces(
  folder: pathlib.Path, config: GemmaConfig
) -> Iterator[tuple[tuple[str, ...], int | None, np.ndarray]]:
  """Yields (path, layer, array in our layout) for all parameters of `config`.

  Every tensor's name, shape and dtype are checked before the first is read.

  Raises:
    ValueError: a file that is missing or damaged, or tensors that are missing,
      unexpected, mis-shaped or not floating point: all of them, by name.
  """
  files = _weight_files(folder)
  headers = _read_headers(files)
  # A bare trunk (transformers' Gemma2Model) is stored without the prefix.
  names = {name for header in headers.values() for name in header}
  strip = "model." if "embed_tokens.weight" in names else ""
  table = {
    name.removeprefix(strip): entry
    for name, entry in tensor_table(config).items()
  }
  sizes = _sizes(config)
  problems = _find_problems(headers, table, sizes)
  if not problems and _TIED_HEAD in names:
    problems = _check_tied(headers, _EMBEDDING.removeprefix(strip))
  if problems:
    source = files[0] if len(files) == 1 else folder / _INDEX
    raise ValueError(
      f"{source} does not fit its {_CONFIG}:\n  " + "\n  ".join(problems)
    )
  for file, header in headers.items():
    with _open(file) as tensors:
      for name in header:
        if name in table:
          layer, layout = table[name]
          array = layout.to_ours(tensors.get_tensor(name), sizes)
          yield layout.path, layer, array


def _sizes(config: GemmaConfig) -> dict[str, int]:
  return dict(
      V=config.vocab_size, D=config.embed_dim, F=config.mlp_dim,
      N=config.num_heads, K=config.num_kv_heads, H=config.head_dim,
  )  # fmt: skip


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{file} cannot be read: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(
      f"{file} holds a {type(values).__name__}: expected an object"
    )
  return values


def _to_config(raw: dict[str, Any]) -> GemmaConfig:
  """GemmaConfig of the keys that say what is computed.

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
    return GemmaConfig(
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
  return GemmaConfig(
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
  return float(value)


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
  for period in range(1, depth):
    if all(kinds[i] == kinds[i - period] for i in range(period, depth)):
      return kinds[:period]
  return kinds


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The one file, or the shards that the index names, in order."""
  single, index = folder / _WEIGHTS, folder / _INDEX
  if single.is_file():
    return [single]
  if not index.is_file():
    names = sorted(entry.name for entry in folder.iterdir())
    raise ValueError(
      f"{folder} has no weights that can be read: expected {_WEIGHTS} or "
      f"{_INDEX} beside {_CONFIG}, found {names}"
    )
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} has no weight_map of tensors to files")
  names = sorted({str(name) for name in weight_map.values()})
  missing = [name for name in names if not (folder / name).is_file()]
  if missing:
    raise ValueError(f"{index} names files that are not there: {missing}")
  return [folder / name for name in names]


@contextlib.contextmanager
def _open(file: pathlib.Path):
  import safetensors

  try:
    with safetensors.safe_open(file, framework="numpy") as tensors:
      yield tensors
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{file} cannot be read, it may be damaged or cut off: {error}"
    ) from error


def _read_headers(
  files: list[pathlib.Path],
) -> dict[pathlib.Path, dict[str, tuple[tuple[int, ...], str]]]:
  """For each file, the shape and dtype of each of its tensors."""
  headers = {}
  for file in files:
    with _open(file) as tensors:
      slices = {name: tensors.get_slice(name) for name in tensors.keys()}
      headers[file] = {
        name: (tuple(s.get_shape()), s.get_dtype())
        for name, s in slices.items()
      }
  return headers


def _find_problems(headers, table, sizes) -> list[str]:
  """What keeps the stored tensors from being those of `table`, by name."""
  stored = collections.Counter(n for h in headers.values() for n in h)
  # Old versions of transformers stored these buffers, which can be computed.
  ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
  known = {*table, *ignored, _TIED_HEAD}
  groups = {
    "missing": [name for name in table if name not in stored],
    "unexpected": [name for name in stored if name not in known],
    "in two files": [name for name in table if stored[name] > 1],
  }
  problems = [f"{what}: {names}" for what, names in groups.items() if names]
  for header in headers.values():
    for name, (shape, dtype) in header.items():
      if name not in table:
        continue
      expected = table[name][1].shape(sizes)
      if shape != expected:
        problems.append(f"{name} has shape {shape}: expected {expected}")
      if dtype not in _DTYPES:
        problems.append(f"{name} is of {dtype}: expected {list(_DTYPES)}")
  return problems


def _check_tied(headers, embedding: str) -> list[str]:
  """A stored head must repeat the embedding: ours has no other."""
  arrays = {}
  for file, header in headers.items():
    with _open(file) as tensors:
      for name in (_TIED_HEAD, embedding):
        if name in header:
          arrays[name] = tensors.get_tensor(name)
  if np.array_equal(arrays[_TIED_HEAD], arrays[embedding]):
    return []
  return [
    f"{_TIED_HEAD} differs from {embedding}: expected a tied head, equal to "
    "the embedding"
  ]
