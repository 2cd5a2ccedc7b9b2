"""Google's trees for its Flax models: names, layouts, sizes.

The released checkpoints are "flat": names of modules with slashes in them, and
the leaves below ("transformer/layer_0/attn/q_einsum", "w"). What
google-deepmind/gemma saves is "nested", as its modules are, and its trainer
(Kauldron) puts that under "params" beside the optimizer's state. "stacked" is
flat with all layers of one kind of attention in one tensor: layer i is slice
i // period of `attention_type_{i % period}`.
"""

from collections.abc import Mapping
import re

from gemma_funnel.config import TransformerConfig
from gemma_funnel.convert.param_mapping import (
  ParamView,
  Tensor,
  check_gemma,
  shape_of,
  sizes_of,
)
from gemma_funnel.convert.tensor_io import Header, TensorReader, require_ranks

LAYOUTS = ("flat", "nested", "stacked", "kauldron")
# Rows that the published trees have beyond Gemma's 256,000 tokens.
PUBLISHED_VOCABULARY, PUBLISHED_ROWS = 256_000, 256_128

_STACKED = re.compile(r"transformer/stacked_layers/attention_type_(\d+)/")
_NORMS = {
  "pre_attention_norm": "pre_attn_norm",
  "post_attention_norm": "post_attn_norm",
  "pre_ffw_norm": "pre_mlp_norm",
  "post_ffw_norm": "post_mlp_norm",
}


def layout_of(names: Mapping[str, Header]) -> str | None:
  """Which of `LAYOUTS` the names of a tree are of; None if of none."""
  if any(_STACKED.match(name) for name in names):
    return "stacked"
  if "transformer/embedder.input_embedding" in names:
    return "flat"
  if "params.embedder.input_embedding" in names:
    return "kauldron"
  if "embedder.input_embedding" in names:
    return "nested"
  return None


def is_transposed(reader: TensorReader) -> bool:
  """Whether `gating_einsum` is [2, F, D], as for Gemma 2 9B and 27B.

  Told by `linear`, which is [F, D] in every tree.

  Raises:
    ValueError: F = D, so that it cannot be told.
  """
  last_axes = {}
  for name, header in reader.tensors.items():
    if match := re.search(r"mlp[/.](gating_einsum|linear)(\.w)?$", name):
      last_axes.setdefault(match[1], header.shape[-2:])
  linear = last_axes.get("linear", ())
  if len(set(linear)) == 1 and len(linear) == 2:
    raise ValueError(
      f"{reader.where}: gating_einsum with axes of one size, {linear}: which "
      "of its two layouts it has cannot be told"
    )
  return last_axes.get("gating_einsum") == linear


def rows_of(names: Mapping[str, Header], config: TransformerConfig) -> int:
  """Rows of the stored embedding: of the vocabulary, or padded ones."""
  layout = layout_of(names)
  shape = names[_entry_name(layout, "embedder", "input_embedding")].shape
  rows = shape[0] if shape else 0
  padded = padded_rows(config.vocab_size)
  return padded if rows == padded else config.vocab_size


def padded_rows(vocab_size: int) -> int:
  """Rows that Google's own models of that vocabulary have."""
  within = PUBLISHED_VOCABULARY <= vocab_size <= PUBLISHED_ROWS
  return PUBLISHED_ROWS if within else vocab_size


def infer_sizes(names: Mapping[str, Header]) -> dict[str, int | bool]:
  """Fields of `TransformerConfig` that the shapes of a tree tell.

  Raises:
    ValueError: tensors that it takes are missing or have other axes.
  """
  layout = layout_of(names)
  embedding = _entry_name(layout, "embedder", "input_embedding")
  if layout == "stacked":
    kinds = {int(m[1]) for n in names if (m := _STACKED.match(n))}
    layer = "stacked_layers/attention_type_0"
    depth = lambda name: sum(
      names[n].shape[0]
      for kind in kinds
      if (n := name.replace("type_0", f"type_{kind}")) in names
      and names[n].shape
    )
  else:
    pattern = re.compile(r"(?:.*[/.])?layer_(\d+)[/.]")
    layers = {int(m[1]) for n in names if (m := pattern.match(n))}
    layer, depth = "layer_0", lambda name: len(layers)
  entry = lambda *path: _entry_name(layout, *path)
  out = entry(f"{layer}/attn/attn_vec_einsum", "w")
  linear = entry(f"{layer}/mlp/linear", None)
  keys = entry(f"{layer}/attn/kv_einsum", "w")
  lead = 1 if layout == "stacked" else 0
  ranks = {embedding: 2, out: 3 + lead, linear: 2 + lead}
  require_ranks(names, ranks | ({keys: 4 + lead} if keys in names else {}))
  rows, width = names[embedding].shape
  heads, head_dim, _ = names[out].shape[lead:]
  return dict(
    vocab_size=PUBLISHED_VOCABULARY if rows == PUBLISHED_ROWS else rows,
    num_layers=depth(out),
    embed_dim=width,
    mlp_dim=names[linear].shape[lead],
    num_heads=heads,
    # All three projections are one tensor where there are as many.
    num_kv_heads=names[keys].shape[lead + 1] if keys in names else heads,
    head_dim=head_dim,
    post_norms=entry(f"{layer}/post_attention_norm", "scale") in names,
  )


def tensors(
  config: TransformerConfig, layout: str, transposed: bool, rows: int
) -> tuple[list[Tensor], dict[str, tuple[str, ...]]]:
  """All tensors of a tree, and the keys that lead to each, by name.

  Args:
    config: of the model.
    layout: one of `LAYOUTS`.
    transposed: whether `gating_einsum` is [2, F, D] instead of [2, D, F].
    rows: of the embedding.
  """
  check_gemma(config)
  sizes = {**sizes_of(config), "V": rows}
  found, keys = [], {}

  def add(module: str, leaf: str | None, shape, views) -> None:
    path = _keys(layout, module, leaf)
    keys[".".join(path)] = path
    found.append(Tensor(".".join(path), shape, tuple(views)))

  whole = lambda path, axes: [ParamView(path, None, (), axes)]
  embedding = whole(("embedding",), "V D")
  add("embedder", "input_embedding", (rows, sizes["D"]), embedding)
  norm = whole(("final_norm", "scale"), "D")
  add("final_norm", "scale", (sizes["D"],), norm)
  groups = _layer_groups(config, layout)
  for (module, leaf), parts in _layer_modules(config, transposed).items():
    shape = shape_of(parts[0][1], sizes)
    if len(parts) > 1:
      shape = (len(parts), *shape)
    for folder, layers in groups.items():
      stacked = layout == "stacked"
      places = [
        ParamView(
          ("layers", *path),
          layer,
          ((n,) if stacked else ()) + ((m,) if len(parts) > 1 else ()),
          axes,
        )
        for n, layer in enumerate(layers)
        for m, (path, axes) in enumerate(parts)
      ]
      lead = (len(layers),) if stacked else ()
      add(f"{folder}/{module}", leaf, lead + shape, places)
  return found, keys


def _layer_groups(config: TransformerConfig, layout: str) -> dict[str, range]:
  """The layers that share a module in a tree, by its name."""
  depth = config.num_layers
  if layout != "stacked":
    return {f"layer_{i}": range(i, i + 1) for i in range(depth)}
  period = min(len(config.attention_pattern), depth)
  return {
    f"stacked_layers/attention_type_{kind}": range(kind, depth, period)
    for kind in range(period)
  }


def _layer_modules(config: TransformerConfig, transposed: bool):
  """(module, leaf) -> [(our path in a block, axes)], stacked if several."""
  attn = lambda name: ("attn", name)
  modules = {("attn/attn_vec_einsum", "w"): [(attn("out"), "N H D")]}
  queries = (attn("query"), "N D H")
  keys = [(attn("key"), "K D H"), (attn("value"), "K D H")]
  if config.num_heads == config.num_kv_heads:
    modules["attn/qkv_einsum", "w"] = [queries, *keys]
  else:
    modules["attn/q_einsum", "w"] = [queries]
    modules["attn/kv_einsum", "w"] = keys
  gating = "F D" if transposed else "D F"
  modules["mlp/gating_einsum", None] = [
    (("mlp", "gate"), gating),
    (("mlp", "up"), gating),
  ]
  modules["mlp/linear", None] = [(("mlp", "down"), "F D")]
  for theirs, ours in _NORMS.items():
    if config.post_norms or not ours.startswith("post"):
      modules[theirs, "scale"] = [((ours, "scale"), "D")]
  return modules


def _keys(layout: str, module: str, leaf: str | None) -> tuple[str, ...]:
  """What leads to a leaf; None is a parameter of the module of its name."""
  if layout in ("flat", "stacked"):
    return f"transformer/{module}", leaf or "w"
  lead = ("params",) if layout == "kauldron" else ()
  return *lead, *module.split("/"), *([leaf] if leaf else [])


def _entry_name(layout: str, module: str, leaf: str | None) -> str:
  return ".".join(_keys(layout, module, leaf))
