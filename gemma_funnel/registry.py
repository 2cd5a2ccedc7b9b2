"""Reducers and recoveries by name: what a funnel's configuration may ask for.

`reducers.py` and `funnel.py` fill the tables, and so may any other module:

  @REDUCERS.register("loudest")
  class Loudest(Reducer): ...
"""

from collections.abc import Callable
import importlib

from gemma_funnel.checks import require, require_choice


class Registry(dict[str, type]):
  """Classes by name.

  Attributes:
    key: of the configuration, that the names are values of.
    module: where ours are; it imports jax, and so only when they are needed.
  """

  def __init__(self, key: str, module: str):
    super().__init__()
    self.key, self.module = key, module

  def register(self, name: str) -> Callable[[type], type]:
    """A decorator that enters a class under a name.

    Raises:
      ValueError: the name is taken.
    """

    def enter(cls: type) -> type:
      require(name not in self, f"{self.key}={name!r} is registered already")
      self[name] = cls
      return cls

    return enter

  def find(self, name: str) -> type:
    """The class of a name.

    Raises:
      ValueError: no such name; it lists all.
    """
    importlib.import_module(self.module)
    require_choice(self.key, name, self)
    return self[name]

  def describe(self) -> str:
    """A line for each name: the first paragraph of its class's docstring."""
    importlib.import_module(self.module)
    first = lambda cls: " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return "\n".join(f"{name}: {first(cls)}" for name, cls in self.items())


REDUCERS = Registry("funnel.reduce", "gemma_funnel.reducers")
RECOVERIES = Registry("funnel.recover", "gemma_funnel.funnel")
