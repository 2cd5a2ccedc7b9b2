"""Bytes that devices send each other in a compiled program, from its text.

XLA's text names the computations that a loop, a fusion or a call runs, and a
loop's trip count where it is known; each collective operation has its result's
shape, and its groups of partitions.
"""

import collections
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

_BITS = {
  name: bits
  for bits, names in {
    4: "s4 u4",
    8: "pred s8 u8 f8e4m3fn f8e5m2",
    16: "s16 u16 f16 bf16",
    32: "s32 u32 f32",
    64: "s64 u64 f64",
  }.items()
  for name in names.split()
}
# Bytes sent by a device for each byte of the result, by ring algorithms, in a
# group of n.
_SENT = {
  "all-gather": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
}
KINDS = tuple(_SENT)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# A kernel's own data may go on over lines, which may begin with a brace too.
_END = re.compile(r"^\}(, |$)")
_OPERATION = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\((.*)$")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_LESS = "direction=LT"
_ELEMENT = re.compile(r"= [su]32\[\].* get-tuple-element\(.*index=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
_IOTA = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
# Newer text: a mesh of its own, the order of its devices, and the axes along
# which groups lie.
_MESH = re.compile(
  r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(?"
  r"\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)? \{(.*?)\}"
)
# Of an operation, wherever it is named.
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation, and what each device sends for it in a step."""

  kind: str  # One of KINDS.
  axes: tuple[str, ...]  # Of the mesh, that its groups lie along.
  bytes: float  # In all the times that it runs.
  times: int  # At least, where a loop's count is not known.


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
  """The collective operations of a compiled program's text.

  Partitions are the mesh's devices in order.
  """
  computations = dict(_computations(text))
  times = _times(computations)
  found: dict[Any, Collective] = {}
  for name, lines in computations.items():
    for number, line in enumerate(lines):
      match = _OPERATION.search(line)
      if not match or not times[name]:
        continue
      result, kind, is_start, _ = match.groups()
      groups = _groups(line, mesh.size)
      axes = () if groups is None else _axes(groups, mesh)
      if not axes:
        continue
      size = _bytes(kind, result, bool(is_start))
      sent = size * _SENT[kind](groups.shape[1])
      one = Collective(kind, axes, sent * times[name], times[name])
      # TPU's text has an operation that goes on beside others in each fusion
      # that it goes on in: it starts as often as the one that runs least.
      channel = _CHANNEL.search(line)
      key = channel[1] if channel else (name, number)
      if key not in found or one.times < found[key].times:
        found[key] = one
  return list(found.values())


def bytes_by_axis(found: list[Collective]) -> dict[str, float]:
  """Bytes that a device sends in a step, by axes such as "fsdp" or "data+fsdp"."""
  sums = collections.Counter()
  for one in found:
    sums["+".join(one.axes)] += one.bytes
  return dict(sums)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  name, lines = None, []
  for line in text.splitlines():
    if name is None:
      match = _COMPUTATION.match(line)
      if match and not line.startswith("HloModule"):
        name, lines = match[1], []
        if line.startswith("ENTRY"):
          lines.append("ENTRY")
    elif _END.match(line):
      yield name, lines
      name = None
    else:
      lines.append(line)


def _times(computations: dict[str, list[str]]):
  """How often each computation runs in one call of the program."""
  calls = collections.defaultdict(list)
  entry = next(n for n, lines in computations.items() if lines[:1] == ["ENTRY"])
  for name, lines in computations.items():
    for line in lines:
      often = _trips(line, computations) if " while(" in line else 1
      called = _CALLED.findall(line)
      for names in _BRANCHES.findall(line):
        called += [n.strip().lstrip("%") for n in names.split(",")]
      calls[name] += [(callee, often) for callee in called]
  times = collections.Counter({entry: 1})
  # Callees are written before their callers.
  for name in reversed(list(computations)):
    for callee, often in calls[name]:
      if callee in computations:
        times[callee] += times[name] * often
  return times


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
  """How often a loop runs; TPU's text says it in the condition alone."""
  if known := _TRIPS.search(loop):
    return int(known[1])
  condition = "\n".join(computations.get(_CONDITION.search(loop)[1], ()))
  bounds, counters = _CONSTANT.findall(condition), _ELEMENT.findall(condition)
  if len(bounds) != 1 or len(counters) != 1 or _LESS not in condition:
    return 1
  body = computations[_BODY.search(loop)[1]]
  # It counts from 0.
  return math.ceil(int(bounds[0]) / _stride(body, int(counters[0])))


def _stride(body: list[str], counter: int) -> int:
  """What a loop's body adds to an element of its tuple; 1 if not known."""
  named = ((_NAME.search(line), line) for line in body if " = " in line)
  lines = {name[1]: line for name, line in named if name}
  root = next(line for line in body if line.lstrip().startswith("ROOT"))
  operands = _NAME.findall(root.partition(" tuple(")[2])
  name = operands[counter] if counter < len(operands) else None
  line = lines.get(name, "")
  while " copy(" in line:
    line = lines.get(_NAME.search(line.partition(" copy(")[2])[1], "")
  added = _NAME.findall(line.partition(" add(")[2].partition(")")[0])
  found = [_CONSTANT.search(lines.get(name, "")) for name in added]
  return next((int(one[1]) for one in found if one), 1)


def _bytes(kind: str, result: str, is_start: bool) -> float:
  """Of an operation's results; a start's shape has the operands before them."""
  sizes = [
    math.prod(int(d) for d in dims.split(",") if d) * _BITS[dtype] / 8
    for dtype, dims in _SHAPE.findall(result)
    if dtype in _BITS and (dims or not is_start)  # Else context.
  ]
  if is_start and kind != "all-reduce":
    sizes = sizes[len(sizes) // 2 :]
  return sum(sizes)


def _groups(line: str, size: int) -> np.ndarray | None:
  """Partitions that take part together, [groups, members]; None is none."""
  pairs = _PAIRS.search(line)
  if pairs:
    rows = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
    moved = [(int(a), int(b)) for a, b in rows if a != b]
    return np.asarray(moved) if moved else None
  named = _MESH.search(line)
  if named:
    return _groups_of_mesh(*named.groups())
  if listed := _LISTED.search(line):
    rows = re.findall(r"\{([\d,]+)\}", listed[1])
    return np.asarray([_numbers(row) for row in rows])
  if iota := _IOTA.search(line):
    shape, dims, order = iota.groups()
    count = _numbers(shape)[0] if "," in shape else 1
    return _device_ids(dims, order).reshape(count, -1)
  return np.arange(size)[None]  # All of them.


def _numbers(text: str) -> list[int]:
  return [int(x) for x in text.split(",")]


def _device_ids(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _groups_of_mesh(axes, dims, order, along) -> np.ndarray:
  """Groups along axes, or parts of axes such as 'a':(2)4, of a mesh."""
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  dims = dims or ",".join(map(str, sizes.values()))
  ids = _device_ids(dims, order).reshape(list(sizes.values()))
  shape, member = [], []
  wanted = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
  }
  for name, size in sizes.items():
    before, part = wanted.get(name, (size, 1))
    shape += [before, part, size // (before * part)]
    member += [False, name in wanted, False]
  ids = ids.reshape(shape)
  inner = [i for i, is_member in enumerate(member) if is_member]
  ids = np.moveaxis(ids, inner, range(ids.ndim - len(inner), ids.ndim))
  return ids.reshape(-1, math.prod(shape[i] for i in inner))


def _axes(groups: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """The axes along which the members of a group differ."""
  sizes = tuple(mesh.shape.values())
  places = np.stack(np.unravel_index(groups, sizes), axis=-1)
  differ = (places != places[:, :1]).any(axis=(0, 1))
  return tuple(
    axis for axis, along in zip(mesh.axis_names, differ, strict=True) if along
  )
