"""The pickle within a file of torch.save, read and written without torch.

A pickle is a program, and a stranger's: it is run here instruction by
instruction on stand-ins. What torch writes for tensors is known by name, all
else is refused before anything is done, and every number is checked against
the sizes of the storages, so that nothing is made of a size that is not there.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
import pickle
import reprlib
import struct
from typing import Any

import numpy as np

from gemma_funnel.convert.store import BFLOAT16, Header, Index

# Far above what models need, far below what would take for ever.
_MAX_INSTRUCTIONS = 2**20
_MAX_AXES = 32

_WRAPS = ("model_state_dict", "state_dict")

_STORAGES = {
  f"torch.{kind}Storage": np.dtype(dtype)
  for kind, dtype in dict(
    Float=np.float32,
    Double=np.float64,
    Half=np.float16,
    BFloat16=BFLOAT16,
    Char=np.int8,
    Byte=np.uint8,
    Short=np.int16,
    Int=np.int32,
    Long=np.int64,
    Bool=np.bool_,
    ComplexFloat=np.complex64,
    ComplexDouble=np.complex128,
  ).items()
}
_GLOBALS = {
  *_STORAGES,
  "collections.OrderedDict",
  "torch._utils._rebuild_tensor_v2",
  "torch._utils._rebuild_parameter",
  "torch._utils._rebuild_parameter_with_state",
  # Of configurations that lie beside a state dict.
  "torch.Size",
  "torch.device",
  "torch.bfloat16",
  "torch.float16",
  "torch.float32",
  "torch.float64",
}

# The instructions that are understood: what torch emits in protocols 2 to 5.
_CONSTANTS = {
  pickle.NONE: None,
  pickle.NEWTRUE: True,
  pickle.NEWFALSE: False,
  pickle.EMPTY_TUPLE: (),
}
_NUMBERS = {
  pickle.BININT: "<i",
  pickle.BININT1: "<B",
  pickle.BININT2: "<H",
  pickle.BINFLOAT: ">d",
}
_TEXTS = {pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "<B"}
_PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
# Of a tuple the hash can take for ever: one that holds another twice, and so
# on. torch has strings, and the numbers that optimizers give to parameters.
_KEYS = (str, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class _Global:
  name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  size: int


@dataclasses.dataclass(frozen=True)
class View:
  """Elements of a storage by strides.

  Attributes:
    key: of the storage.
    dtype: of the elements.
    offset: of the first one, in elements.
    shape: its axes.
    strides: of each axis, in elements.
  """

  key: str
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def contiguous(self) -> bool:
    """Whether the elements lie in C order without gaps."""
    return all(
      size == 1 or stride == expected
      for size, stride, expected in zip(
        self.shape, self.strides, c_strides(self.shape), strict=True
      )
    )

  def span(self) -> tuple[int, int]:
    """The elements of the storage from the first to past the last of ours."""
    if not math.prod(self.shape):
      return self.offset, self.offset
    ends = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
    first = self.offset + sum(min(end, 0) for end in ends)
    return first, self.offset + sum(max(end, 0) for end in ends) + 1

  def at(self, index: Index) -> "View":
    """The view's view at `index`: it is strided too."""
    offset, shape, strides = self.offset, [], []
    if len(index) > len(self.shape):
      raise IndexError(f"{index} has more axes than {self.shape}")
    for i, item in enumerate(index):
      chosen = range(self.shape[i])[item]
      if isinstance(chosen, range):
        offset += chosen.start * self.strides[i] if chosen else 0
        shape.append(len(chosen))
        strides.append(chosen.step * self.strides[i])
      else:
        offset += chosen * self.strides[i]
    shape = (*shape, *self.shape[len(index) :])
    strides = (*strides, *self.strides[len(index) :])
    return View(self.key, self.dtype, offset, shape, strides)


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
  """In elements, and those of torch where a size is 0."""
  sizes = [max(size, 1) for size in shape[:0:-1]]
  if not shape:
    return ()
  return tuple(itertools.accumulate(sizes, int.__mul__, initial=1))[::-1]


def read_pickle(code: bytes, storages: Mapping[str, int]) -> dict[str, View]:
  """The tensors of a state dict, by name.

  Args:
    code: the pickle.
    storages: the bytes of each, by key.

  Raises:
    ValueError: it is damaged, holds other things than named tensors, or one
      that does not lie within its storage.
  """
  return _find_views(_Machine(code, storages).run())


class _Machine:
  """Runs a pickle that makes dicts, lists, tuples, constants and views."""

  def __init__(self, code: bytes, storages: Mapping[str, int]):
    self._code = code
    self._storages = storages
    self._next = 0
    self._memo: dict[int, Any] = {}
    self._stack: list[Any] = []
    self._marked: list[list[Any]] = []

  def run(self) -> Any:
    """What the pickle makes.

    Raises:
      ValueError: it is damaged, or wants what is not known here.
    """
    try:
      for _ in range(_MAX_INSTRUCTIONS):
        op = self._take(1)
        if op == pickle.STOP:
          return self._stack.pop()
        self._step(op)
    except (IndexError, KeyError) as error:
      # Of the stack and the memo.
      raise ValueError(
        f"its data.pkl is damaged before byte {self._next}"
      ) from error
    raise ValueError(f"its data.pkl has more than {_MAX_INSTRUCTIONS} steps")

  def _step(self, op: bytes) -> None:
    stack = self._stack
    if op in _CONSTANTS:
      stack.append(_CONSTANTS[op])
    elif op in _NUMBERS:
      stack.append(self._number(_NUMBERS[op]))
    elif op in _TEXTS:
      stack.append(self._take(self._number(_TEXTS[op])).decode())
    elif op in _PUTS:
      self._memo[self._number(_PUTS[op])] = stack[-1]
    elif op in _GETS:
      stack.append(self._memo[self._number(_GETS[op])])
    elif op in _TUPLES:
      items = [stack.pop() for _ in range(_TUPLES[op])]
      stack.append(tuple(items[::-1]))
    elif op == pickle.MEMOIZE:
      self._memo[len(self._memo)] = stack[-1]
    elif op == pickle.MARK:
      self._marked.append(stack)
      self._stack = []
    elif op == pickle.TUPLE:
      self._stack = self._marked.pop()
      self._stack.append(tuple(stack))
    elif op == pickle.LONG1:
      number = self._take(self._number("<B"))
      stack.append(int.from_bytes(number, "little", signed=True))
    elif op == pickle.GLOBAL:
      stack.append(_find_global(self._line(), self._line()))
    elif op == pickle.STACK_GLOBAL:
      name = stack.pop()
      stack.append(_find_global(stack.pop(), name))
    elif op == pickle.REDUCE:
      arguments = stack.pop()
      stack.append(_call(stack.pop(), arguments))
    elif op == pickle.BINPERSID:
      stack.append(self._find_storage(stack.pop()))
    elif op in (pickle.PROTO, pickle.FRAME):
      # What they say is of no use to a reader that holds the whole.
      self._take(1 if op == pickle.PROTO else 8)
    else:
      self._fill_container(op)

  def _fill_container(self, op: bytes) -> None:
    """The instructions that make or change a dict or a list."""
    items = self._stack
    if op == pickle.EMPTY_DICT:
      return items.append({})
    if op == pickle.EMPTY_LIST:
      return items.append([])
    if op in (pickle.SETITEMS, pickle.APPENDS):
      self._stack = self._marked.pop()
    elif op in (pickle.SETITEM, pickle.APPEND, pickle.BUILD):
      count = 2 if op == pickle.SETITEM else 1
      items = [items.pop() for _ in range(count)][::-1]
    else:
      raise ValueError(
        f"its data.pkl has the instruction {op!r}, which torch does not "
        "write for tensors"
      )
    target = self._stack[-1]
    if op in (pickle.APPEND, pickle.APPENDS):
      if type(target) is not list:
        raise ValueError("its data.pkl appends to what is no list")
      return target.extend(items)
    if type(target) is not dict:
      raise ValueError("its data.pkl sets items or state of what is no dict")
    # The state of a dict is the `_metadata` of modules, of no use here.
    if op != pickle.BUILD:
      if len(items) % 2 or not all(type(k) in _KEYS for k in items[::2]):
        raise ValueError("its data.pkl has a dict with keys that are no names")
      target.update(zip(items[::2], items[1::2], strict=True))

  def _take(self, size: int) -> bytes:
    taken = self._code[self._next : self._next + size]
    if len(taken) < size:
      raise ValueError("its data.pkl ends early")
    self._next += size
    return taken

  def _number(self, layout: str) -> Any:
    return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

  def _line(self) -> str:
    end = self._code.find(b"\n", self._next) + 1
    # Without an end, all that is left and one more: too much.
    return self._take((end or len(self._code) + 1) - self._next)[:-1].decode()

  def _find_storage(self, key: Any) -> _Storage:
    match key:
      case ("storage", _Global(kind), str(key), str(), int(size)):
        pass
      case _:
        raise ValueError("its data.pkl refers to what is no storage")
    nbytes, dtype = self._storages.get(key), _STORAGES.get(kind)
    if nbytes is None or dtype is None:
      raise ValueError(f"it has no {kind[:99]} of key {reprlib.repr(key)}")
    if not 0 <= size <= nbytes // dtype.itemsize:
      raise ValueError(
        f"its storage {key} is of {nbytes} bytes: expected "
        f"{reprlib.repr(size)} of {dtype}"
      )
    return _Storage(key, dtype, size)


def _find_global(module: Any, name: Any) -> _Global:
  found = f"{module}.{name}" if type(module) is type(name) is str else None
  if found not in _GLOBALS:
    what = "what has no name" if found is None else found[:200]
    raise ValueError(
      f"its data.pkl asks for {what}: expected tensors and nothing else, "
      "so that no code of a stranger is run"
    )
  return _Global(found)


def _call(function: Any, arguments: Any) -> Any:
  """A stand-in for what torch would do: only these calls are known."""
  name = function.name if isinstance(function, _Global) else "what is no name"
  match name.rpartition(".")[2], arguments:
    case "OrderedDict", ():
      return {}
    case "Size", (tuple(sizes),):
      return sizes
    case "device", (str(), *_):
      return None
    case "_rebuild_tensor_v2", (_Storage() as storage, *what):
      return _make_view(storage, *what)
    case "_rebuild_parameter" | "_rebuild_parameter_with_state", (
      View() as view,
      *_,
    ):
      return view
  raise ValueError(f"its data.pkl calls {name} with arguments not known here")


def _make_view(
  storage: _Storage,
  offset: Any = None,
  shape: Any = None,
  strides: Any = None,
  requires_grad: Any = None,
  hooks: Any = None,
  flags: Any = None,
  *more: Any,
) -> View:
  """`_rebuild_tensor_v2`: the view, if all of it lies within its storage."""
  del requires_grad, hooks
  if flags or more:
    raise ValueError("it has a tensor stored as a conjugate or a negative")
  numbers_fit = (
    type(shape) is type(strides) is tuple
    and len(shape) == len(strides) <= _MAX_AXES
    and all(
      type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides)
    )
    and math.prod(max(n, 1) for n in shape) < 2**59
  )
  if not numbers_fit:
    raise ValueError("it has a tensor of impossible offset, sizes or strides")
  view = View(storage.key, storage.dtype, offset, shape, strides)
  # The second: strides of 0 would let a small file ask for any memory.
  if max(view.span()[1], math.prod(shape)) > storage.size:
    raise ValueError(
      f"it has a tensor of shape {shape} and strides {strides} from "
      f"{offset}: expected one within the {storage.size} of its storage"
    )
  return view


def _kind(value: Any) -> str:
  """What errors call it: never its repr, which may have no end."""
  names = {View: "tensor", _Storage: "storage", _Global: "global"}
  return names.get(type(value), type(value).__name__)


def _find_views(root: Any) -> dict[str, View]:
  """The state dict: the root, or what it holds under a name for it."""
  if type(root) is dict:
    for key in _WRAPS:
      if type(root.get(key)) is dict:
        root = root[key]
        break
  if type(root) is not dict:
    raise ValueError(f"it holds a {_kind(root)}: expected a state dict")
  others = [
    f"{reprlib.repr(name)}, a {_kind(value)}"
    for name, value in root.items()
    if not (type(name) is str and isinstance(value, View))
  ]
  if others:
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    raise ValueError(
      f"its state dict holds {'; '.join(others[:5])}{more}: expected named "
      "tensors"
    )
  return root


def make_pickle(tensors: Mapping[str, Header], wrap: str | None) -> bytes:
  """{name: tensor, ...}, of protocol 2, or {wrap: it}."""
  kinds = {dtype: name.split(".") for name, dtype in _STORAGES.items()}
  code = [pickle.EMPTY_DICT, pickle.MARK]
  for key, (name, header) in enumerate(tensors.items()):
    if header.dtype not in kinds:
      raise ValueError(
        f"{name} is of {header.dtype}: expected one of "
        f"{[str(dtype) for dtype in kinds]}"
      )
    storage = _emit_tuple(
      _emit_text("storage"),
      _emit_global(*kinds[header.dtype]),
      _emit_text(str(key)),
      _emit_text("cpu"),
      _emit_int(math.prod(header.shape)),
    )
    code += [
      _emit_text(name),
      _emit_global("torch._utils", "_rebuild_tensor_v2"),
      _emit_tuple(
        storage + pickle.BINPERSID,
        _emit_int(0),
        _emit_tuple(*map(_emit_int, header.shape)),
        _emit_tuple(*map(_emit_int, c_strides(header.shape))),
        pickle.NEWFALSE,
        _emit_global("collections", "OrderedDict"),
        pickle.EMPTY_TUPLE + pickle.REDUCE,
      ),
      pickle.REDUCE,
    ]
  code.append(pickle.SETITEMS)
  if wrap is not None:
    code = [pickle.EMPTY_DICT, _emit_text(wrap), *code, pickle.SETITEM]
  return b"".join([pickle.PROTO, b"\2", *code, pickle.STOP])


def _emit_text(text: str) -> bytes:
  encoded = text.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _emit_int(value: int) -> bytes:
  if value < 2**31:
    return pickle.BININT + struct.pack("<i", value)
  return pickle.LONG1 + struct.pack("<Bq", 8, value)


def _emit_tuple(*items: bytes) -> bytes:
  return b"".join([pickle.MARK, *items, pickle.TUPLE])


def _emit_global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()
