"""A configuration from the command line: its file, and what flags change.

Mistakes are `ValueError`s that name the flag or the file and its line, what
was found, what was expected, and what was likely meant.
"""

import ast
from collections.abc import Iterator
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from typing import Any

import ml_collections

from gemma_funnel import paths
from gemma_funnel.checks import near, require
from gemma_funnel.config import PRESETS, RUNTIME, TransformerConfig

_FOLDER = "configs"
_CHECKOUT = pathlib.Path(__file__).parents[1]
_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")
_EXPECTED = {
  bool: "true or false",
  int: "an integer",
  float: "a number",
  tuple: "a tuple such as '(1, 2)'",
  list: "a list such as '[1, 2]'",
}


def known_files() -> dict[str, pathlib.Path]:
  """Files of configs/, here or else beside the package, by name."""
  files = {}
  for folder in (_CHECKOUT / _FOLDER, pathlib.Path(_FOLDER)):
    files |= {path.stem: path for path in sorted(folder.glob("*.py"))}
  return files


def _find(given: str) -> tuple[pathlib.Path, list[str]]:
  """The file, and the argument of its get_config()."""
  name, colon, argument = given.partition(":")
  if os.path.isfile(given):
    name, colon = given, ""
  path, known = pathlib.Path(name), known_files()
  candidates = [path, pathlib.Path(f"{name}.py")]
  if path.parent in (pathlib.Path(), pathlib.Path(_FOLDER)):
    candidates += [known[x] for x in (path.stem, name) if x in known]
  for file in candidates:
    if os.path.isfile(file):
      require(
        file.suffix == ".py",
        f"--config={given}: expected a Python file with get_config()",
      )
      return file, [argument] if colon else []
  meant = near(path.stem, list(known))
  hint = f"did you mean --config={known[meant]}? E" if meant else "e"
  raise ValueError(
    f"--config={given}: there is no such file; {hint}xpected a file, or a name "
    f"of {_FOLDER}/: {', '.join(sorted(known))}"
  )


def load(given: str) -> ml_collections.ConfigDict:
  """The configuration of FILE, NAME (of configs/), or either with :ARGUMENT.

  Raises:
    ValueError: no such file, or one that raises or returns something else.
  """
  path, arguments = _find(given)
  name = f"gemma_funnel_config_{path.stem}"
  loader = importlib.machinery.SourceFileLoader(name, str(path))
  spec = importlib.util.spec_from_loader(name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  # It may import its neighbours, but tokenize.py is Python's.
  sys.path.append(str(path.parent.absolute()))
  try:
    loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if callable(get_config):
      _check_arguments(given, path, get_config, arguments)
      config = get_config(*arguments)
  except Exception as error:  # Whatever a file raises, it is its author's.
    raise ValueError(_in_one_line(path, error)) from error
  finally:
    sys.path.pop()
  require(callable(get_config), f"{path} has no function get_config()")
  require(
    isinstance(config, ml_collections.ConfigDict),
    f"{path}: get_config() returned a {type(config).__name__}: expected a "
    "ml_collections.ConfigDict",
  )
  return config.lock()


def _check_arguments(given, path, get_config, arguments) -> None:
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError:
    takes, form = ("no", "") if arguments else ("an", ":ARGUMENT")
    raise ValueError(
      f"get_config() takes {takes} argument, found --config={given}; expected "
      f"--config={path}{form}"
    ) from None


def _in_one_line(path: pathlib.Path, error: Exception) -> str:
  if isinstance(error, SyntaxError) and error.lineno:
    return f"{error.filename}, line {error.lineno}: {error.msg}"
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  where = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return f"{where}{kind}{error}"


def set_key(
  config: ml_collections.ConfigDict, key: str, text: str | None
) -> None:
  """Sets a key as `--config.KEY=TEXT` says; None is a flag without a value.

  Raises:
    ValueError: no such key, or a text that is no value of its type.
  """
  flag, holder = f"--config.{key}", config
  *groups, last = names = key.split(".")
  for depth, name in enumerate(names):
    if name not in holder:  # Dashes do for underscores.
      names[depth] = name = name.replace("-", "_")
    if name not in holder:
      raise ValueError(_no_key(config, holder, flag, names, depth))
    value = holder[name]
    if depth < len(groups):
      holder = value
      require(
        isinstance(holder, ml_collections.ConfigDict),
        f"{flag}: {'.'.join(names[: depth + 1])}={value!r} has no keys",
      )
  last = names[-1]
  if isinstance(value, ml_collections.ConfigDict):
    _set_group(value, flag, text)
    return
  kind = holder.get_type(last)
  require(
    text is not None or kind is bool,
    f"{flag} has no value: expected {flag}=...",
  )
  try:
    parsed = _parse("true" if text is None else text, kind, value)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    expected = _EXPECTED.get(kind, "a value that Python reads")
    none = ", or None" if kind is float or value is None else ""
    raise ValueError(f"{flag}={text}: expected {expected}{none}") from None
  if kind in (tuple, list) and value:
    # None may stand for any: the depth, of stops.
    kinds = {type(None), *map(type, value)}
    kinds |= {int} if float in kinds else set()
    require(
      all(type(x) in kinds for x in parsed),
      f"{flag}={text}: expected values as in {value!r}",
    )
  try:
    holder[last] = parsed
  except (TypeError, ValueError):
    raise ValueError(
      f"{flag}={text}: expected a {kind.__name__}, as {value!r} is"
    ) from None


def _set_group(group, flag: str, text: str | None) -> None:
  """Sets the sizes of a model to those of a preset."""
  some = next(iter(group), "KEY")
  if "num_layers" not in group:
    raise ValueError(
      f"{flag} is a group of keys: set one of them, such as {flag}.{some}=..."
    )
  require(
    text in PRESETS,
    f"{flag}={text}: expected a preset, one of {list(PRESETS)}, or a key of "
    f"its own, such as {flag}.num_layers=...",
  )
  sizes = TransformerConfig.preset(text).to_dict()
  for key in sizes.keys() - set(RUNTIME):
    group[key] = sizes[key]


def _parse(text: str, kind: type, value: Any) -> Any:
  if text == "None" and (kind is float or value is None):
    return None
  if kind is bool:
    require(text.lower() in (*_TRUE, *_FALSE), "")
    return text.lower() in _TRUE
  if kind in (int, float, str):
    return kind(text)
  try:
    found = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    # A word, where words are expected, needs no quotes.
    if text[:1] in tuple("([{'\"") or not all(
      isinstance(x, str) for x in value or ()
    ):
      raise
    found = text
  if kind in (tuple, list):
    many = isinstance(found, (tuple, list))
    return kind(found if many else (found,))
  return found


def leaves(
  config: ml_collections.ConfigDict, prefix: str = ""
) -> Iterator[tuple[str, ml_collections.ConfigDict, str]]:
  """Each dotted key, the group it is of and its name there."""
  for name in config:
    if isinstance(config[name], ml_collections.ConfigDict):
      yield from leaves(config[name], f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", config, name


def find_key(config: ml_collections.ConfigDict, name: str) -> str | None:
  """The key that `name`, perhaps without its groups, was likely meant to be."""
  ends = {}
  for key, _, end in leaves(config):
    ends.setdefault(end, key)
  return ends.get(near(name.rpartition(".")[2], list(ends)))


def _no_key(config, holder, flag: str, names: list[str], depth: int) -> str:
  where = ".".join(names[:depth]) or "the configuration"
  keys = {key: end for key, _, end in leaves(config)}
  meant = [key for key, end in keys.items() if end == names[-1]]
  if close := near(names[depth], list(holder)):
    close = ".".join([*names[:depth], close, *names[depth + 1 :]])
    # A group's name was meant, if what follows is in it.
    meant = [close] if close in keys or not meant else meant
  meant += filter(None, [find_key(config, names[-1])])
  hint = f"did you mean --config.{meant[0]}? It" if meant else "it"
  return (
    f"{flag}: {where} has no key {names[depth]!r}; {hint} has: "
    + ", ".join(holder)
  )


def check_paths(config: ml_collections.ConfigDict) -> None:
  """Checks paths of other places than this machine, whatever key has them.

  Raises:
    ValueError: see `paths.check`.
  """
  for key, group, name in leaves(config):
    models = name in paths.OF_MODELS and str(group[name]).startswith("hf://")
    if isinstance(value := group[name], str) and not models:
      try:
        found = ",".join(map(paths.check, value.split(",")))
      except ValueError as error:
        raise ValueError(f"{key}={error}") from None
      if found != value:
        group[name] = found


def describe(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Of each key its value, or the type of what is unset."""
  found = {}
  for key, group, name in leaves(config):
    kind = group.get_type(name)
    unset = "None" if kind is type(None) else f"(unset, {kind.__name__})"
    found[key] = unset if group[name] is None else str(group[name])
  return found
