"""What the commands share: flags, errors in one line, progress.

train.py and eval.py take --config=FILE --config.key=X (`main`); the others have
flags of their own (`Parser`, `guard`). jax is not imported here: a mistake in a
flag is told at once.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import logging as python_logging
import os
import pathlib
import re
import sys
import textwrap
import time
import traceback
from typing import Any

from absl import logging
from ml_collections.config_dict import config_dict

from gemma_funnel import atomic, config_file
from gemma_funnel.checks import near, require
from gemma_funnel.registry import RECOVERIES, REDUCERS

_PACKAGE = pathlib.Path(__file__).parent
# Between two lines of progress where there is no terminal.
_PROGRESS_SECONDS = 10.0
# Commands of configurations: a key that no other's have, and how the names of
# theirs begin.
_COMMANDS = {
  "train.py": ("optimizer", ("quickstart", "finetune", "pretrain")),
  "eval.py": ("evaluator", ("eval_",)),
  "-m gemma_funnel.study": ("axes", ("ablation_quick", "ablation")),
  "-m gemma_funnel.data.tokenize": ("shards", ("tokenize",)),
  "tpu/plan.py": ("objective", ("quickstart", "pretrain")),
}
_JOIN = {
  "coordinator": dict(
    metavar="HOST:PORT", help="of process 0, where jax cannot find it"
  ),
  "num_processes": dict(type=int, metavar="N", help="with --coordinator"),
  "process_id": dict(type=int, metavar="N", help="with --coordinator"),
}
_FLAGS = {
  "config": dict(
    action="append",
    metavar="FILE",
    help="a file with get_config(), or a name of configs/; :ARGUMENT after it "
    "is given to get_config",
  ),
  "config.KEY": dict(metavar="VALUE", help="overrides a key; see below"),
  "distributed": dict(
    default="off",
    metavar="HOW",
    help="whether this is one of several processes: 'off', or 'auto' for "
    "those that jax finds of the cluster (Cloud TPU, GKE, SLURM, Open MPI) "
    "(default: off)",
  ),
  **_JOIN,
}


class Parser(argparse.ArgumentParser):
  """Mistakes are raised, to be told of as all others are.

  Dashes and underscores of a flag are the same.
  """

  def __init__(self, **options):
    super().__init__(
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      **options,
    )

  def parse_known_args(self, args=None, namespace=None):
    args = list(sys.argv[1:] if args is None else args)
    for number, word in enumerate(args):
      if word == "--":
        break
      if found := re.fullmatch(r"(--?[A-Za-z][\w.-]*)(=.*)?", word, re.DOTALL):
        args[number] = self._find_flag(found[1]) + (found[2] or "")
    return super().parse_known_args(args, namespace)

  def _find_flag(self, given: str) -> str:
    name = given.lstrip("-").replace("-", "_")
    for flag in (given, f"--{name}"):
      if flag in self._option_string_actions:
        return flag
    meant = self.suggest(name)
    hint = f"; did you mean --{meant}?" if meant else "; --help lists all"
    raise ValueError(f"unknown flag {given}{hint}")

  def suggest(self, name: str) -> str | None:
    """The flag that was likely meant."""
    known = [flag.lstrip("-") for flag in self._option_string_actions]
    return near(name, known)

  def _print_message(self, message, file=None):
    print(message, end="", file=file, flush=True)  # argparse's drops errors.

  def error(self, message):
    kinds = {"int": "an integer", "float": "a number"}
    wrong = r"argument (\S+): invalid (int|float) value: (.*)"
    if found := re.fullmatch(wrong, message, re.DOTALL):
      message = f"{found[1]}={found[3]}: expected {kinds[found[2]]}"
    if found := re.fullmatch(r"argument (\S+): expected one argument", message):
      message = f"{found[1]} has no value: expected {found[1]}=..."
    raise ValueError(message)


def guard(run: Callable[[], int]) -> int:
  """Calls `run`; returns the exit status.

  A mistake that the package names is one line on stderr and status 2, a disk
  that is full or cannot be written to one and status 1; any other error is a
  traceback.
  """
  sys.excepthook = _show_unless_told
  sys.unraisablehook = _show_ignored_unless_told
  for name in ("absl", "asyncio"):
    python_logging.getLogger(name).addFilter(_is_not_told)
  if sys.stdout is None:
    say("error: stdout is closed")
    return 1
  try:
    status = run()
    sys.stdout.flush()
    return status
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    _end_stdout()
    return 141  # As of a command that SIGPIPE ends.
  except Exception as error:
    named = _text_of(error)
    found, full = disk_error(error), is_memory_error(error)
    if os.environ.get("GEMMA_FUNNEL_TRACEBACK") or not (named or found or full):
      sys.excepthook = _show_stack
      raise
    if found is None:
      say(f"error: {named or f'not enough memory: {error}'}")
      return 1 if full else 2
    where = f"{found.filename}: " if found.filename else ""
    say(
      f"error: {named if named else where + found.strerror}. What was written "
      "before is there: the same command goes on when it can write "
      "(GEMMA_FUNNEL_TRACEBACK=1 shows where it ended)"
    )
    _end_stdout()
    return 1


def _is_told(error: BaseException | None) -> bool:
  """Whether an error of another thread is one that `guard` tells of.

  Orbax and tensorstore show what ends their threads, and raise it besides.
  """
  if os.environ.get("GEMMA_FUNNEL_TRACEBACK"):
    return False
  closed = isinstance(error, RuntimeError) and "loop is closed" in str(error)
  return closed or disk_error(error) is not None


def _show_unless_told(kind, error, stack) -> None:
  if not _is_told(error):
    _show_stack(kind, error, stack)


def _show_ignored_unless_told(ignored) -> None:
  if not _is_told(ignored.exc_value):
    sys.__unraisablehook__(ignored)


def _is_not_told(record: python_logging.LogRecord) -> bool:
  return not (record.exc_info and _is_told(record.exc_info[1]))


def _show_stack(kind, error, stack) -> None:
  """As Python does, but for what a message has of files."""
  shown = traceback.TracebackException(kind, error, stack)
  frames = "".join(shown.stack.format())
  print(
    f"Traceback (most recent call last):\n{frames}", end="", file=sys.stderr
  )
  say("\n".join(shown.format_exception_only()))


def _end_stdout() -> None:
  """Drops what stdout does not take, or Python, ending, would try again."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def disk_error(error: BaseException | None) -> OSError | None:
  """The error of a disk that `error` is, or comes from; None if it is not."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in atomic.DISK_ERRORS:
      return error
    # What Orbax raises has the text of the system's error alone.
    for number in atomic.DISK_ERRORS:
      if os.strerror(number) in str(error):
        place = re.search(r"""['"](/[^'"]+)""", str(error))
        return OSError(number, os.strerror(number), place and place[1])
    error = error.__cause__ or error.__context__
  return None


def is_memory_error(error: Exception) -> bool:
  """Whether memory is full, here or on a device."""
  full = str(error).startswith("RESOURCE_EXHAUSTED")
  return isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and full
  )


def is_named(error: Exception) -> bool:
  """Whether the package itself raised it, so that its text is the user's."""
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  return pathlib.Path(raised_in).is_relative_to(_PACKAGE)


def _text_of(error: Exception) -> str | None:
  """What the user is told of a mistake; None if it is no one's but ours."""
  if isinstance(error, (ValueError, FloatingPointError)):
    return str(error) if is_named(error) else None
  if isinstance(error, OSError) and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  if isinstance(error, (AttributeError, KeyError)):
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if raised_in == config_dict.__file__:
      return f"the configuration lacks the key {error}".replace('"', "")
  return None


def describe_funnels() -> str:
  """Help on what a funnel may ask for: a line a reducer and a recovery."""
  tables = {"reduce": REDUCERS, "recover": RECOVERIES}
  return "\n\n".join(
    f"funnel, {key}=\n" + textwrap.indent(table.describe(), "  ")
    for key, table in tables.items()
  )


def say(text: str) -> None:
  """Writes a line to stderr, cleaned."""
  print(clean(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
  """Writes a line to stdout, cleaned."""
  print(clean(text), flush=True)


def clean(text: str, most: int = 2000) -> str:
  """One line of at most `most` characters that moves no cursor.

  Names and values of files come in messages: their line ends become spaces,
  and other control characters, those of direction too, are spelled out.
  """
  if len(text) > most:
    text = f"{text[: most * 3 // 4]} [...] {text[-most // 4 :]}"
  return re.sub(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
    lambda match: " " if match[0].isspace() else ascii(match[0])[1:-1],
    text,
  )


class Progress:
  """Bytes done of a known total: a bar on a terminal, else a line at times."""

  def __init__(self, what: str, total: int):
    self._what, self._total, self._done = what, total, 0
    self._start = self._said = time.perf_counter()
    self._bar = None

  def __enter__(self) -> "Progress":
    if sys.stderr.isatty():
      from rich import console, progress

      self._bar = progress.Progress(
        *progress.Progress.get_default_columns(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        console=console.Console(stderr=True),
      )
      self._bar.start()
      self._task = self._bar.add_task(self._what, total=self._total)
    return self

  def __exit__(self, *_) -> None:
    if self._bar:
      self._bar.stop()

  def add(self, name: str, nbytes: int) -> None:
    """Counts bytes of the tensor `name`."""
    self._done += nbytes
    if self._bar:
      self._bar.update(self._task, advance=nbytes)
      return
    now = time.perf_counter()
    if now - self._said > _PROGRESS_SECONDS:
      self._said = now
      share = min(1.0, self._done / max(1, self._total))
      left = (now - self._start) * (1 / share - 1) if share else 0.0
      say(f"{self._what} {name}: {share:.0%}, about {left:.0f} s left")


class _ConfigParser(Parser):
  """Of a command of configurations: an unknown flag may be a key."""

  def __init__(self, command: str, **options):
    super().__init__(
      prog=f"python {command}",
      usage="%(prog)s --config=FILE[:ARGUMENT] [--config.KEY=VALUE ...]",
      **options,
    )
    self.file = _files_of(command)[0]  # Whose keys are meant.

  def suggest(self, name):
    group, dot, rest = name.partition(".")
    if dot and near(group, ["config"]):
      return f"config.{rest}"
    if flag := super().suggest(name):
      return flag
    key = config_file.find_key(config_file.load(self.file), name)
    return key and f"config.{key}"


def main(
  run: Callable[..., object],
  command: str,
  flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Runs a command whose flags are --config=FILE and --config.KEY=VALUE.

  Args:
    run: called with the configuration; and with the values of `flags`, by
      their names, if there are any.
    command: one of _COMMANDS.
    flags: options of `add_argument` of further ones, by name.
  """
  if status := guard(lambda: _main(run, command, flags or {})):
    sys.exit(status)


def _main(run, command: str, more: Mapping[str, Mapping[str, Any]]) -> int:
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
  doc = sys.modules["__main__"].__doc__
  parser = _ConfigParser(command, description=doc)
  for name, options in (_FLAGS | dict(more)).items():
    parser.add_argument(f"--{name}", **options)
  parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
  keys, rest = _split(sys.argv[1:])
  files = [x.removeprefix("--config=") for x in rest if "--config=" in x[:9]]
  if files:
    parser.file = files[0]
  if {"-h", "--help"} & set(rest):
    parser.epilog = _describe_keys(files or _files_of(command))
  given = parser.parse_args(rest)
  for word in given.words:
    raise ValueError(_of_word(word))
  files = given.config or []
  require(
    bool(files) and files[0] != "",
    "--config is missing: expected --config=FILE, or --config=NAME of configs/: "
    + ", ".join(_files_of(command)),
  )
  require(len(files) == 1, f"--config is given twice: {files}")
  config = config_file.load(files[0])
  _check_command(files[0], config, command)
  # Groups before what is in them, whatever their order.
  for key, text in sorted(keys, key=lambda pair: pair[0].count(".")):
    config_file.set_key(config, key, text)
  config_file.check_paths(config)
  options = {name: getattr(given, name) for name in _JOIN}
  if given.distributed != "off" or set(options.values()) != {None}:
    from gemma_funnel.parallel import processes  # It imports jax.

    processes.join(given.distributed, **options)
  run(config, **{name: getattr(given, name) for name in more})
  return 0


def _split(
  argv: Sequence[str],
) -> tuple[list[tuple[str, str | None]], list[str]]:
  """The keys that are set, with their texts, and all other arguments."""
  keys, rest, argv = [], [], list(argv)
  while argv:
    word = argv.pop(0)
    found = re.fullmatch(r"--(no)?config\.([^=]*)(=.*)?", word, re.DOTALL)
    if not found:
      rest.append(word)
      continue
    no, key, text = found.groups()
    if not (no or text or argv[:1] == [] or argv[0].startswith("--")):
      text = f"={argv.pop(0)}"
    keys.append((key, "false" if no else text and text[1:]))
  return keys, rest


def _files_of(command: str) -> list[str]:
  """Names of the configurations of a command, the usual one first."""
  known, starts = config_file.known_files(), _COMMANDS[command][1]
  return [x for start in starts for x in known if x.startswith(start)]


def _describe_keys(files: Sequence[str]) -> str:
  lines, seen = [], set()
  for file in files:
    found = config_file.describe(config_file.load(file))
    lines += ["", f"keys of --config={file}" + (", the others" * bool(seen))]
    lines += [f"  --config.{k}={v}" for k, v in found.items() if k not in seen]
    seen |= found.keys()
  return "\n".join([*lines, "", describe_funnels()])


def _of_word(word: str) -> str:
  name = pathlib.Path(word.partition(":")[0])
  if name.suffix == ".py" or name.stem in config_file.known_files():
    hint = f"did you mean --config={word}?"
  elif re.match(r"[\w.]+=", word):
    hint = f"did you mean --config.{word}?"
  else:
    hint = "expected --config=FILE and --config.KEY=VALUE"
  return f"unexpected argument {word!r}: {hint}"


def _check_command(file: str, config, command: str) -> None:
  key = _COMMANDS[command][0]
  others = (x for x, (other, _) in _COMMANDS.items() if other in config)
  of = next(others, None)
  hint = f"it is of another command: python {of} --config={file}"
  require(
    key in config,
    f"--config={file} has no key {key!r}, as those of {command} have; "
    + (hint if of else f"such as {', '.join(_files_of(command))}"),
  )
