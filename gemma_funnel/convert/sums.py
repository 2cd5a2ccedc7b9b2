"""Sizes and CRC-32 of files, kept beside them: what is read is what was written.

Formats of others, and Orbax, read some damaged files without a word.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import json
import pathlib
import zlib

from etils import epath

from gemma_funnel import inputs
from gemma_funnel.convert.tensor_io import read_json

SUMS = "sums.json"
_THREADS = 8
_BLOCK_BYTES = 1 << 22


def files_in(folder: epath.Path) -> list[epath.Path]:
  """All files of a folder and of those below it, in order."""
  found = []
  for child in sorted(folder.iterdir()):
    found += files_in(child) if child.is_dir() else [child]
  return found


def write(folder: epath.Path, files: Sequence[epath.Path]) -> None:
  """Writes those of files in a folder, all of which are complete."""
  (folder / SUMS).write_text(json.dumps(of(folder, files), indent=1))


def of(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, list[int]]:
  """Size and CRC-32 of each file, by its name from the folder on."""
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(_size_and_crc32, files))
  names = [path.relative_to(folder).as_posix() for path in files]
  return dict(zip(names, found, strict=True))


def _size_and_crc32(path: epath.Path) -> list[int]:
  size = crc = 0
  with inputs.open_file(path) as f:
    while block := f.read(_BLOCK_BYTES):
      crc, size = zlib.crc32(block, crc), size + len(block)
  return [size, crc]


def difference(
  expected: Mapping[str, object], found: Mapping[str, list[int]]
) -> str | None:
  """What is not as expected, in words; None if all is."""
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f"{name} is missing"
    if found[name] != expected.get(name):
      return (
        f"{name} has size and CRC-32 {found[name]}, expected "
        f"{expected.get(name)}"
      )
  return None


def check(
  folder: pathlib.Path | epath.Path, may_lack: Sequence[str] = ()
) -> None:
  """Raises a ValueError where a converted checkpoint is not as it was written.

  One without sums, of others or of version 0.1, is not checked. Some files may
  be missing, by name.
  """
  path = folder / SUMS
  if not path.exists():
    return
  expected = read_json(path)
  outside = [
    name
    for name in expected
    if {"..", "/"} & {*pathlib.PurePosixPath(name).parts}
  ]
  if outside:
    raise ValueError(f"{path} names a file out of its folder: {outside[0]!r}")
  lacks = [name for name in may_lack if not (folder / name).exists()]
  expected = {k: v for k, v in expected.items() if k not in lacks}
  files = [folder / name for name in expected]
  found = of(folder, [file for file in files if file.exists()])
  if damage := difference(expected, found):
    raise ValueError(
      f"{folder} is damaged, or was written to after the conversion: {damage}. "
      f"If that is meant, remove {SUMS}"
    )
