"""Sizes and checksums of files, kept beside them: what is read was written so.

Formats of others, and Orbax, read some damaged files without a word.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import json
import os
import pathlib
import zlib

from etils import epath

from gemma_funnel import buckets, inputs
from gemma_funnel.convert.tensor_io import read_json

SUMS = "sums.json"
_THREADS = 8
_BLOCK_BYTES = 1 << 22


def files_in(folder: epath.Path) -> list[epath.Path]:
  """All files of a folder and of those below it, in order."""
  if (found := buckets.files_in(folder)) is not None:
    return found
  found = []
  for child in sorted(folder.iterdir()):
    found += files_in(child) if child.is_dir() else [child]
  return found


def write(folder: epath.Path, files: Sequence[epath.Path]) -> None:
  """Writes those of files in a folder, all of which are complete."""
  (folder / SUMS).write_text(json.dumps(of(folder, files), indent=1))


def of(
  folder: epath.Path, files: Sequence[epath.Path]
) -> dict[str, list[int | str]]:
  """Size and CRC-32 of each file, by its name from the folder on.

  On a bucket that keeps checksums it is those, such as "crc32c:yZRlqg==", and
  no file is read.
  """
  known = buckets.checksums_in(folder)

  def look(path: epath.Path) -> list[int | str]:
    return known.get(os.fspath(path)) or _size_and_crc32(path)

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(look, files))
  names = [path.relative_to(folder).as_posix() for path in files]
  return dict(zip(names, found, strict=True))


def _size_and_crc32(path: epath.Path) -> list[int | str]:
  size = crc = 0
  with inputs.open_file(path) as f:
    while block := f.read(_BLOCK_BYTES):
      crc, size = zlib.crc32(block, crc), size + len(block)
  return [size, crc]


def difference(
  expected: Mapping[str, object], found: Mapping[str, list[int | str]]
) -> str | None:
  """What is not as expected, in words; None if all is.

  Of files that were copied from or to a bucket, whose checksums are of another
  kind, sizes alone are compared.
  """
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f"{name} is missing"
    wanted, is_other = expected.get(name), False
    if isinstance(wanted, list) and len(wanted) == 2:
      is_other = _kind(wanted[1]) != _kind(found[name][1])
      is_other = is_other and wanted[0] == found[name][0]
    if found[name] != wanted and not is_other:
      return f"{name} has size and checksum {found[name]}, expected {wanted}"
  return None


def _kind(checksum: object) -> str | None:
  """None is CRC-32, a number."""
  return checksum.partition(":")[0] if isinstance(checksum, str) else None


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
