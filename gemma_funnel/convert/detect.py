"""What a path holds: which weight files, and which configuration.

Both are told by the content of the folder. No weight is read here, and headers
only where there is no configuration.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import os
import pathlib
from typing import Any

from etils import epath

from gemma_funnel import cli, inputs
from gemma_funnel.checks import require
from gemma_funnel.config import (
  PRESETS,
  FunnelConfig,
  TransformerConfig,
  resolve_funnel,
)
from gemma_funnel.convert import (
  gemma_pytorch,
  gguf,
  google,
  hub,
  huggingface,
  sums,
)
from gemma_funnel.convert.orbax_tree import OrbaxTree, is_orbax_tree
from gemma_funnel.convert.run import (
  CONFIG,
  FOLDER,
  SUMS,
  TOKENIZERS,
  RunTensors,
  find_intact,
  find_tokenizer,
)
from gemma_funnel.convert.safetensors_file import SafetensorsFile
from gemma_funnel.convert.tensor_io import (
  TensorReader,
  open_indexed,
  peek_json,
  read_json,
  rename,
  to_path,
)
from gemma_funnel.convert.torch_file import TorchFile, is_torch_file
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import FILES, is_json

# In a folder that is being written.
UNFINISHED = "unfinished"
# The configuration that we write beside formats that have none.
SIDECAR = "gemma_funnel.json"
# What a funnel learns, beside formats that know no funnel.
LEARNED = "funnel.safetensors"
SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
OF_INDEX = ".index.json"
# The tree of a converted checkpoint of ours, and of each one of a run.
PARAMS = "params"
# A key of every config.json of ours; it holds the version.
OURS = "gemma_funnel"
# A key of ours, of what a configuration of others says beside the model.
OTHERS = "huggingface"
# Its keys, and what goes without saying of a Gemma.
_KEPT = huggingface.special_ids(None) | dict.fromkeys(
  ("id2label", "label2id", "problem_type")
)
# What else belongs to a tokenizer, or to generating with a model.
COMPANIONS = (
  *TOKENIZERS,
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "generation_config.json",
)

# Of peft.
_ADAPTERS = (
  "adapter_config.json",
  "adapter_model.safetensors",
  "adapter_model.bin",
)

_EXPECTED = (
  "Expected a Hugging Face folder (config.json with a model_type, and "
  "model.safetensors or model.safetensors.index.json), a tree of Google's "
  "(a folder with _METADATA, or the one around it), a .ckpt or sharded .bin of "
  "gemma_pytorch, a converted checkpoint (config.json and params/) or the "
  "folder of a training run (with checkpoints/ in it)"
)


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weight files that were found, unopened.

  Attributes:
    what: of messages: the format, and how the files are called.
    format: "run", "orbax" (converted by us), "huggingface" (until names of
      tensors are known: gemma_pytorch's `.bin` too), "gemma_pytorch",
      "google" or "gguf".
    folder: what lies beside them is in here.
    open: reads their headers.
  """

  what: str
  format: str
  folder: pathlib.Path
  open: Callable[[], TensorReader]
  file: pathlib.Path | None = None  # Of "gguf", which has all in one.


def find(path: str | os.PathLike) -> Weights:
  """The weight files at `path`, a folder or a single file.

  Raises:
    ValueError: nothing that is known, or two formats at once.
  """
  try:
    return _find(to_path(local(path)))
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def local(path: str | os.PathLike) -> str | os.PathLike:
  """Where a model of the Hub is here; other paths as they are.

  Raises:
    ValueError: see `hub.fetch`.
  """
  if not hub.is_name(path):
    return path
  return hub.fetch(path, (CONFIG, SIDECAR, LEARNED, SUMS, *COMPANIONS))


def _find(path: pathlib.Path) -> Weights:
  if ((path.parent if path.is_file() else path) / UNFINISHED).exists():
    raise ValueError(
      f"{path} is of a conversion that was not finished: run it again"
    )
  if path.is_file() and path.name.endswith(".safetensors"):
    opened = functools.partial(SafetensorsFile, path)
    found = [
      Weights(f"weights ({path.name})", "huggingface", path.parent, opened)
    ]
  elif inputs.is_gguf(path):
    found = [_gguf(path)]
  elif path.is_file():
    found = [_torch(path, path.parent)] if is_torch_file(path) else []
  else:
    found = list(_candidates(path)) if path.is_dir() else []
  if len(found) > 1:
    raise ValueError(
      f"{path} holds several checkpoints: "
      + ", ".join(weights.what for weights in found)
      + ". Expected one: name its own folder or file, or remove the others"
    )
  if found:
    _check_adapters(found[0])
    return found[0]
  if "model_type" in peek_json(path / CONFIG):
    raise ValueError(
      f"{path} has no weights that can be read: expected {SAFETENSORS} or "
      f"{SAFETENSORS}{OF_INDEX} beside {CONFIG}, found {_names(path)}"
    )
  raise ValueError(
    f"{path} is no checkpoint that is known: {_describe(path)}. {_EXPECTED}"
  )


def _check_adapters(weights: Weights) -> None:
  """Refuses weights that others would change by an adapter beside them."""
  if weights.format in ("run", "gguf"):
    return
  there = [n for n in _ADAPTERS if (weights.folder / n).exists()]
  require(
    not there,
    f"{weights.folder} has an adapter beside its weights ({', '.join(there)}), "
    "which changes what they compute: expected the weights with the adapter "
    "merged into them (merge_and_unload of peft), or a folder without it",
  )


def _candidates(folder: pathlib.Path) -> Iterator[Weights]:
  config = peek_json(folder / CONFIG)
  if (folder / FOLDER).is_dir() and "model_type" not in config:
    newest = functools.partial(RunTensors, folder)
    yield Weights("a training run (checkpoints/)", "run", folder, newest)
  elif OURS in config:
    tree = functools.partial(OrbaxTree, folder / PARAMS)
    yield Weights("a converted checkpoint (params/)", "orbax", folder, tree)
  for name, open_one, format_ in (
    (SAFETENSORS, SafetensorsFile, "huggingface"),
    (BIN, TorchFile, "gemma_pytorch"),
  ):
    whole, index = folder / name, folder / (name + OF_INDEX)
    if whole.exists():
      opened = functools.partial(open_one, whole)
      yield Weights(f"weights ({name})", format_, folder, opened)
    elif index.exists():
      opened = functools.partial(open_indexed, index, open_one)
      yield Weights(f"weights ({index.name})", format_, folder, opened)
    else:
      continue
    if "model_type" in config and OURS not in config:
      break  # As transformers, which reads no other file then.
  for file in sorted(folder.glob("*.gguf")):
    yield _gguf(file)
  for file in sorted(folder.glob("*.ckpt")):
    yield _torch(file, folder)
  # A trainer's checkpoint has the tree in "default"; an archive of weights has
  # it in a folder beside the tokenizer.
  trees = [folder] if is_orbax_tree(folder) else []
  if not trees:
    trees = [f for f in sorted(folder.iterdir()) if is_orbax_tree(f)]
  for tree in trees:
    if not (OURS in config and tree == folder / PARAMS):
      opened = functools.partial(OrbaxTree, tree)
      yield Weights(f"an Orbax tree ({tree.name})", "google", folder, opened)


def _gguf(file: pathlib.Path) -> Weights:
  opened = functools.partial(gguf.GGUFTensors, file)
  return Weights(f"weights ({file.name})", "gguf", file.parent, opened, file)


def _torch(file: pathlib.Path, folder: pathlib.Path) -> Weights:
  opened = functools.partial(TorchFile, file)
  return Weights(f"weights ({file.name})", "gemma_pytorch", folder, opened)


def _describe(path: pathlib.Path) -> str:
  if not path.exists():
    return "there is nothing there"
  if not path.is_dir():
    return "it is a file of another kind"
  names = _names(path)
  return f"it holds {names}" if names else "it is empty"


def _names(folder: pathlib.Path, most: int = 10) -> str:
  names = sorted(entry.name for entry in folder.iterdir())
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"{names[:most]}{more}" if names else ""


def read_config(
  weights: Weights,
) -> tuple[TransformerConfig, tuple[FunnelConfig, ...]]:
  """The model, and the funnel it was trained with; () is none.

  From the configuration beside the weights; where there is none, the published
  model whose shapes they have.

  Raises:
    ValueError: no or a damaged configuration, one of another architecture, or
      one that contradicts the published model of its sizes.
  """
  if weights.format == "gguf":
    return gguf.read_config(weights.file), ()
  file = weights.folder / CONFIG
  if weights.format in ("run", "orbax"):
    return read_own_config(file)
  if "model_type" in peek_json(file) or weights.format == "huggingface":
    config = huggingface.read_config(file)
    stages = huggingface.read_funnel(file, config.num_layers)
  elif (weights.folder / SIDECAR).exists():
    file = weights.folder / SIDECAR
    config, stages = read_own_config(file)
  else:
    return _infer_config(weights), ()
  preset = published(config)
  if preset and preset.query_pre_attn_scalar != config.query_pre_attn_scalar:
    raise ValueError(
      f"{file}: query_pre_attn_scalar={config.query_pre_attn_scalar:g}, but "
      "the published model of these sizes was trained with "
      f"{preset.query_pre_attn_scalar:g}: expected that, or a configuration "
      "given by name"
    )
  return config, stages


def read_own_config(
  file: pathlib.Path,
) -> tuple[TransformerConfig, tuple[FunnelConfig, ...]]:
  """The model and the funnel of a configuration that we wrote.

  Raises:
    ValueError: it cannot be read, or is none.
  """
  raw = read_json(file)
  if not isinstance(raw.get("model"), dict) or "funnel" not in raw:
    raise ValueError(
      f"{file} is no configuration of ours: expected an object with model "
      f"and funnel, found {sorted(raw)}"
    )
  try:
    config = TransformerConfig.from_dict(raw["model"])
    return config, resolve_funnel(raw["funnel"], config.num_layers)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{file}: {error}") from error


def open_tensors(weights: Weights) -> tuple[str, TensorReader]:
  """Opens weights: (their format, a reader of that format's own names).

  Raises:
    ValueError: they are damaged, or no Gemma's.
  """
  reader = weights.open()
  names = reader.tensors
  if weights.format in ("run", "orbax"):
    return weights.format, reader
  if weights.format == "gguf":
    return "huggingface", reader
  if gemma_pytorch.EMBEDDING in names:
    return "gemma_pytorch", gemma_pytorch.Dequantized(reader)
  if weights.format != "google":
    own, left = huggingface.own_names(names)
    if left:
      kinds = sorted(
        {name.split(".weight")[0].split(".bias")[0] for name in left}
      )
      more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
      cli.say(
        f"{reader.where}: {len(left)} tensors beside the language model are "
        f"left: {', '.join(kinds[:3])}{more}"
      )
    return "huggingface", rename(reader, own)
  layout = google.layout_of(names)
  if layout is None:
    raise ValueError(
      f"{reader.where} is no tree of a Gemma: expected an embedder/"
      f"input_embedding, found {sorted(names)[:5]}"
    )
  if layout == "kauldron":
    kept = {name: name for name in names if name.startswith("params.")}
    return "google", rename(reader, kept)
  return "google", reader


def _infer_config(weights: Weights) -> TransformerConfig:
  format_, reader = open_tensors(weights)
  family = {"google": google, "gemma_pytorch": gemma_pytorch}.get(format_)
  if family is None:
    raise ValueError(f"{weights.folder} has no {CONFIG}")
  try:
    known = family.infer_sizes(reader.tensors)
  except ValueError as error:
    raise ValueError(f"{reader.where}: {error}") from error
  if preset := _find_preset(known):
    return preset
  if "head_dim" in known and not known["post_norms"]:
    # All else of a Gemma 1 follows from its shapes.
    return TransformerConfig.preset(
      "gemma1_2b", query_pre_attn_scalar=float(known["head_dim"]), **known
    )
  raise ValueError(
    f"{reader.where} has no configuration beside it, and its shapes are of no "
    f"published Gemma: {known}. Expected {SIDECAR} there, or a configuration "
    "given by name"
  )


def _find_preset(known: dict[str, int | bool]) -> TransformerConfig | None:
  """The published Gemma of these sizes."""
  for name in PRESETS:
    config = TransformerConfig.preset(name)
    sizes = dict(
      config.to_dict(),
      query_width=config.num_heads * config.head_dim,
      key_width=config.num_kv_heads * config.head_dim,
    )
    same = all(sizes[key] == value for key, value in known.items())
    if same and name.startswith(("gemma1_", "gemma2_")):
      return config
  return None


def published(config: TransformerConfig) -> TransformerConfig | None:
  """The published model of the same sizes, whatever its vocabulary."""
  names = ["num_layers", "embed_dim", "mlp_dim", "post_norms"]
  names += ["num_heads", "num_kv_heads", "head_dim"]
  return _find_preset({name: getattr(config, name) for name in names})


def find_companions(weights: Weights) -> dict[str, pathlib.Path]:
  """Files of the tokenizer and of generating, by their usual names.

  They lie beside the weights, in a folder `tokenizer`, or around a tree. A run
  of version 0.1 has no tokenizer that it was given, but says where it is.

  Raises:
    ValueError: the run does not say.
  """
  if weights.format == "gguf":
    return {}
  found = {}
  if weights.format == "run" and (given := find_tokenizer(weights.folder)):
    found[FILES[is_json(given)]] = given
  places = [weights.folder, weights.folder / "tokenizer"]
  if weights.format == "google" and is_orbax_tree(weights.folder):
    places.append(weights.folder.parent)
  for name in COMPANIONS:
    file = next((p / name for p in places if (p / name).is_file()), None)
    if file and name not in found:
      found[name] = file
  return found


def tokenizer_of(
  files: Mapping[str, pathlib.Path | epath.Path],
) -> pathlib.Path | epath.Path | None:
  """Which of a checkpoint's files is its tokenizer; None if it has none."""
  found = [files[name] for name in TOKENIZERS if name in files]
  return (
    tokenizer_lib.choose(*found) if len(found) == 2 else next(iter(found), None)
  )


def kept_keys(weights: Weights) -> dict[str, Any]:
  """What a configuration says beside the model, and conversions keep."""
  if weights.format == "gguf":
    ids = list(gguf.stop_ids(weights.file))
    return {"eos_token_id": ids} if ids else {}
  for name in (CONFIG, SIDECAR):
    raw = peek_json(weights.folder / name)
    is_gemma = str(raw.get("model_type")).startswith("gemma")
    raw = raw.get(OTHERS, raw)
    if isinstance(raw, dict) and any(key in raw for key in _KEPT):
      said = {key: raw[key] for key in _KEPT if key in raw}
      # Null is an id that there is not; what a Gemma always has is not said.
      usual = lambda key, v: v == _KEPT[key] and (is_gemma or v is None)
      return {k: v for k, v in said.items() if not usual(k, v)}
  return {}


def stop_ids(weights: Weights, vocab_size: int) -> tuple[int, ...]:
  """The ids that end a generated text; () is not said.

  Raises:
    ValueError: they are none.
  """
  if weights.format == "run":
    return ()
  if weights.format == "gguf":
    return tuple(i for i in gguf.stop_ids(weights.file) if i < vocab_size)
  file = weights.folder / "generation_config.json"
  said = peek_json(file).get("eos_token_id")
  if said is None:
    file, said = weights.folder / CONFIG, kept_keys(weights).get("eos_token_id")
  ids = said if isinstance(said, list) else [said] if said is not None else []
  require(
    all(type(i) is int and 0 <= i < vocab_size for i in ids),
    f"{file}: eos_token_id={said!r}: expected ids of 0 to {vocab_size - 1}",
  )
  return tuple(ids)


def fingerprints(weights: Weights) -> dict[str, str]:
  """What tells the weights from others; a run's are those of a step."""
  folder = weights.folder
  if weights.format == "run":
    step, _ = find_intact(folder)
    return {"sums": inputs.fingerprint(folder / FOLDER / str(step) / SUMS)}
  if weights.format == "gguf":
    return {weights.file.name: inputs.fingerprint(weights.file)}
  files = [p for p in sums.files_in(folder) if p.name not in COMPANIONS]
  names = [path.relative_to(folder).as_posix() for path in files]
  values = inputs.fingerprint_all(files).values()
  return dict(zip(names, values, strict=True))
