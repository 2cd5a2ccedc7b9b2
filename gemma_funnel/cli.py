"""The command line, for train.py and eval.py: --config=FILE --config.key=X."""

from collections.abc import Callable, Sequence
import pathlib
import re
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

_PACKAGE = pathlib.Path(__file__).parent
# What the package raises of a mistake that it has named.
_NAMED = (ValueError, FloatingPointError)


def main(run: Callable[[ml_collections.ConfigDict], object]) -> None:
  """Parses `--config` and calls `run` with it.

  A mistake in the flags, or one that the package names, is one line on stderr
  and exit status 2; anything else is a traceback.
  """
  config = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(); --config.key=value overrides."
  )
  flags.mark_flag_as_required("config")

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _fail(f"unexpected arguments {list(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    try:
      run(config.value)
    except _NAMED as error:
      raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
      if not pathlib.Path(raised_in).is_relative_to(_PACKAGE):
        raise
      _fail(str(error))

  app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    # A file that cannot be loaded is told of when it is first used.
    flags.FLAGS.config.to_dict()
    return rest
  except Exception as error:  # Whatever config_flags raises, it is the user's.
    _fail(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
  if isinstance(error, SyntaxError):
    return f"{error.filename}, line {error.lineno}: {error.msg}"
  text = str(error)
  if isinstance(error, (AttributeError, KeyError)):
    unknown = re.search(r"'(\w+)\\?'", text)
    known = re.search(r'Did you mean "(\w+)"', text)
    if unknown:
      hint = f"; did you mean {known[1]!r}?" if known else ""
      return f"the configuration has no key {unknown[1]!r}{hint}"
  # A traceback, or a list of what was tried, ends in what matters.
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  last = lines[-1] if lines else type(error).__name__
  return re.sub(r"^(\[Errno \d+\]|ValueError:) ", "", last)


def _fail(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)
