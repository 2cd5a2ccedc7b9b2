"""results.jsonl of a study: a line a result, on disk as soon as it is there."""

from collections.abc import Callable, Mapping
import json
import os
import pathlib
from typing import Any

from gemma_funnel import atomic, checks, cli, inputs
from gemma_funnel.study import analysis

RESULTS = "results.jsonl"
_MOST = 1 << 30


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _or_none(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: value is None or is_kind(value)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  # Sums of squares must be finite.
  return checks.is_number(value) and abs(value) < 1e100


def _are_layers(value: Any) -> bool:
  kinds = dict(layer=_is_count, cosine=_is_number, at=_is_text)
  return isinstance(value, list) and all(
    isinstance(row, dict) and all(is_(row.get(k)) for k, is_ in kinds.items())
    for row in value
  )


_NEEDED = {
  **analysis.NEEDED,
  # The study's tokenizer, and the fingerprints of what results depend on.
  "tokenizer": ("fingerprint",),
  "inputs": ("fingerprints",),
}
# What a key holds in a line that has it.
_HOLDS = {
  **dict.fromkeys(
    ("kind", "hash", "metric", "error", "model", "pretraining", "inference"),
    _is_text,
  ),
  **dict.fromkeys(
    ("reduce", "recover", "finetuning", "task", "task_kind", "git", "device"),
    _or_none(_is_text),
  ),
  **dict.fromkeys(
    ("num_test", "steps", "start", "stop", "stride"), _or_none(_is_count)
  ),
  **dict.fromkeys(
    ("ideal_reduction", "reduction", "latency_s", "flops", "train_s"),
    _or_none(_is_number),
  ),
  "funnel": _is_text,
  "seed": _is_count,
  "value": _is_number,
  "higher_is_better": lambda value: isinstance(value, bool),
  "layers": _are_layers,
  "base": _is_text,
  "fingerprint": _is_text,
  "fingerprints": lambda value: isinstance(value, dict),
}


class Results:
  """The lines that are there, and more.

  A line that is no result is named on stderr and left out: its cell is measured
  again. The file is replaced by one without it before a line is added.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self._path = pathlib.Path(workdir) / RESULTS
    content = b""
    if os.path.lexists(self._path):
      content = inputs.read_bytes(self._path, _MOST)
    # A last line without its end would be joined to the next one.
    self._damaged = bool(content) and not content.endswith(b"\n")
    self.lines = inputs.parse_json_lines(content, self._tell, _fault)

  def _tell(self, number: int, fault: str) -> None:
    self._damaged = True
    cli.say(
      f"warning: {self._path}, line {number}: {fault}; left out, and what it "
      "was of is measured again"
    )

  def add(self, line: Mapping[str, Any]) -> None:
    """Writes a line; it is on disk when this returns.

    Raises:
      ValueError: a value that JSON cannot hold.
      OSError: it cannot be written; the lines before are as they were.
    """
    encoded = [json.dumps(line, allow_nan=False)]
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._damaged:
      encoded = [*map(json.dumps, self.lines), *encoded]
      text = "".join(f"{line}\n" for line in encoded)
      atomic.write_bytes(self._path, text.encode())
      self._damaged = False
    else:
      self._append(f"{encoded[0]}\n".encode())
    self.lines.append(dict(line))

  def _append(self, data: bytes) -> None:
    with open(self._path, "ab", buffering=0) as file:
      size = file.tell()
      try:
        while data:
          data = data[file.write(data) :]
        os.fsync(file.fileno())
      except OSError:
        file.truncate(size)  # Part of a line, on a disk that is full.
        raise

  def hashes(self, *kinds: str) -> set[str]:
    """Hashes of the lines of these kinds."""
    return {line["hash"] for line in self.lines if line["kind"] in kinds}


def _fault(line: Mapping[str, Any]) -> str | None:
  """Why a line is no result; None of one that is."""
  needed = "kind", "hash", *_NEEDED.get(str(line.get("kind")), ())
  if missing := [key for key in needed if key not in line]:
    return f"it has no {', '.join(missing)}"
  for key in _HOLDS.keys() & line.keys():
    if not _HOLDS[key](line[key]):
      return f"it has {key}={str(line[key])[:40]!r}"
  return None
