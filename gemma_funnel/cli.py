"""What the commands share: flags, errors in one line, progress.

train.py and eval.py take --config=FILE --config.key=X (`main`); the others have
flags of their own (`Parser`, `guard`).
"""

import argparse
from collections.abc import Callable, Sequence
import errno
import os
import pathlib
import re
import sys
import textwrap
import time
import traceback

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from gemma_funnel.checks import require
from gemma_funnel.registry import RECOVERIES, REDUCERS

flags.disclaim_key_flags()  # They are train.py's, whose --help tells of them.
_PACKAGE = pathlib.Path(__file__).parent
# A full disk, a full quota, one for reading alone, a broken one.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Between two lines of progress where there is no terminal.
_PROGRESS_SECONDS = 10.0


class Parser(argparse.ArgumentParser):
  """Mistakes are raised, to be told of as all others are."""

  def error(self, message):
    raise ValueError(message)


def guard(run: Callable[[], int]) -> int:
  """Calls `run`; returns the exit status.

  A mistake that the package names is one line on stderr and status 2, a disk
  that is full or cannot be written to one and status 1; any other error is a
  traceback.
  """
  try:
    return run()
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # Or Python, ending, would flush what is left and tell of it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # As of a command that SIGPIPE ends.
  except Exception as error:
    named = isinstance(error, (ValueError, FloatingPointError))
    named = named and is_named(error)
    found = disk_error(error)
    if os.environ.get("GEMMA_FUNNEL_TRACEBACK") or not (named or found):
      raise
    if found is None:
      say(f"error: {error}")
      return 2
    where = f"{found.filename}: " if found.filename else ""
    say(
      f"error: {error if named else where + found.strerror}. What was written "
      "before is there: the same command goes on when it can write "
      "(GEMMA_FUNNEL_TRACEBACK=1 shows where it ended)"
    )
    return 1


def disk_error(error: BaseException | None) -> OSError | None:
  """The error of a disk that `error` is, or comes from; None if it is not."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
      return error
    # What Orbax raises has the text of the system's error alone.
    for number in _DISK_ERRORS:
      if os.strerror(number) in str(error):
        return OSError(number, os.strerror(number))
    error = error.__cause__ or error.__context__
  return None


def is_named(error: Exception) -> bool:
  """Whether the package itself raised it, so that its text is the user's."""
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  return pathlib.Path(raised_in).is_relative_to(_PACKAGE)


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


def main(run: Callable[[ml_collections.ConfigDict], object]) -> None:
  """Parses the flags and calls `run` with the configuration; see `guard`."""
  config = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file with get_config(); --config.key=value overrides.\n"
    + describe_funnels(),
  )
  flags.mark_flag_as_required("config")
  own = dict(flag_values=flags.FLAGS)
  flags.DEFINE_string(
    "distributed",
    "off",
    "Whether this is one of several processes: 'off', or 'auto' for those that "
    "jax finds of the cluster (Cloud TPU, GKE, SLURM, Open MPI).",
    **own,
  )
  where = "HOST:PORT of process 0, where jax cannot find it."
  flags.DEFINE_string("coordinator", None, where, **own)
  for name in ("num_processes", "process_id"):
    flags.DEFINE_integer(name, None, "With --coordinator.", **own)

  def guarded(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    if status := guard(lambda: _join_and_run(run, config, argv[1:])):
      sys.exit(status)

  app.run(guarded, flags_parser=_parse)


def _join_and_run(run, config, rest: Sequence[str]) -> int:
  require(not rest, f"unexpected arguments {list(rest)}")
  names = ("coordinator", "num_processes", "process_id")
  options = {name: flags.FLAGS[name].value for name in names}
  how = flags.FLAGS["distributed"].value
  if how != "off" or set(options.values()) != {None}:
    from gemma_funnel.parallel import processes  # It imports jax.

    processes.join(how, **options)
  run(config.value)
  return 0


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    # A file that cannot be loaded is told of when it is first used.
    flags.FLAGS.config.to_dict()
    return rest
  except SystemExit:  # absl's of --help, which is no mistake.
    sys.exit(0)
  except Exception as error:  # Whatever config_flags raises, it is the user's.
    say(f"error: {_in_one_line(error)}")
    sys.exit(2)


def _in_one_line(error: Exception) -> str:
  if isinstance(error, SyntaxError):
    return f"{error.filename}, line {error.lineno}: {error.msg}"
  text = str(error)
  if isinstance(error, (AttributeError, KeyError)):
    unknown = re.search(r"'(\w+)\\?'", text)
    known = re.search(r'Did you mean "(\w+)"', text)
    hint = f"; did you mean {known[1]!r}?" if known else ""
    if unknown:
      return f"the configuration has no key {unknown[1]!r}{hint}"
  # A traceback, or a list of what was tried, ends in what matters.
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  last = lines[-1] if lines else type(error).__name__
  return re.sub(r"^(\[Errno \d+\]|ValueError:) ", "", last)
