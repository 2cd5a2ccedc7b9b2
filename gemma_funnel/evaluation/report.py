"""Results as three files: JSON for machines, a Markdown table, and a plot."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import json
import os
import platform
import re
import subprocess
from typing import Any

import jax

from gemma_funnel import atomic

Row = Mapping[str, Any]

MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table."""

  key: str  # Of the value in a row.
  header: str  # Unit included.
  format: str = ""  # A format specification, such as ".2f"; "" is `str`.
  scale: float | None = None  # Of numbers, such as 1e3 from s to ms.

  def text(self, row: Row) -> str:
    """The cell of `row`; what is absent or None is a dash."""
    value = row.get(self.key)
    if value is None:
      return MISSING
    if isinstance(value, bool):
      return "yes" if value else "no"
    if self.scale is not None:
      value = value * self.scale
    if self.format:
      return format(value, self.format)
    # A bar would end the cell.
    return str(value).replace("|", "\\|")


def environment() -> dict[str, Any]:
  """Where a result was measured, as JSON values: devices and versions.

  `device_peak_bytes` is the process's most memory on the first device so far.
  """
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  return {
    "platform": device.platform,
    "device_kind": device.device_kind,
    "num_devices": jax.device_count(),
    "num_host_cores": os.cpu_count(),
    "device_peak_bytes": stats.get("peak_bytes_in_use"),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "xla_flags": os.environ.get("XLA_FLAGS"),
  }


def device() -> str:
  """The devices of this process, such as "1 x NVIDIA H100"."""
  kind = jax.devices()[0].device_kind
  return f"{jax.device_count()} x {kind} ({os.cpu_count()} host cores)"


def revision() -> str | None:
  """The git commit of this package's files; None where there is none."""
  folder = os.path.dirname(os.path.abspath(__file__))
  try:
    described = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=10"],
      cwd=folder,
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return described.stdout.strip() or None


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
  """A Markdown table, padded so that it reads well unrendered too.

  Columns with a format hold numbers and are set flush right. A column that no
  row has a value for is left out.
  """
  columns = [c for c in columns if any(r.get(c.key) is not None for r in rows)]
  cells = [[c.header for c in columns]]
  cells += [[c.text(row) for c in columns] for row in rows]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

  def line(texts):
    padded = [
      text.rjust(width) if column.format else text.ljust(width)
      for text, width, column in zip(texts, widths, columns, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"

  rule = [
    "-" * (width + 1) + (":" if column.format else "-")
    for width, column in zip(widths, columns, strict=True)
  ]
  return "\n".join(
    [line(cells[0]), "|" + "|".join(rule) + "|", *map(line, cells[1:])]
  )


def write(
  out_dir: str | os.PathLike,
  name: str,
  rows: Sequence[Row],
  columns: Sequence[Column],
  title: str,
  plot_fn: Callable[[Sequence[Row]], Any] | None = None,
  *,
  settings: Mapping[str, Any] | None = None,
  notes: Sequence[str] = (),
) -> dict[str, str]:
  """Writes a result and prints its table.

  Each file is whole or not there. JSON holds every value of a row, whether or
  not the table has a column for it.

  Args:
    out_dir: the folder; it is made if need be.
    name: files are called `name`.json, `name`.md and `name`.png.
    rows: the result; values are what JSON can hold, and finite.
    columns: what the table shows.
    title: a line above the table.
    plot_fn: draws the rows, as a matplotlib Figure; None draws nothing.
    settings: what the result depends on, kept in the JSON.
    notes: lines below the table.

  Returns:
    The path of each file written, by its extension.

  Raises:
    ValueError: a value that JSON cannot hold.
  """
  os.makedirs(out_dir, exist_ok=True)
  place = environment()
  where = (
    f"{place['num_devices']} x {place['device_kind']} ({place['platform']}, "
    f"{place['num_host_cores']} host cores), jax {place['jax']}"
  )
  text = "\n\n".join(
    [f"# {title}", table(rows, columns), "\n".join([*notes, where])]
  )
  content = {
    "title": title,
    "environment": place,
    "settings": dict(settings or {}),
    "notes": list(notes),
    "rows": [dict(row) for row in rows],
  }
  encoded = json.dumps(content, indent=1, allow_nan=False)
  extensions = ("json", "md", "png")[: 3 if plot_fn else 2]
  paths = {e: os.path.join(out_dir, f"{name}.{e}") for e in extensions}
  atomic.write_text(paths["json"], f"{encoded}\n")
  atomic.write_text(paths["md"], f"{text}\n")
  if plot_fn:  # Last: a plot that fails costs no result.
    atomic.write_bytes(paths["png"], png(plot_fn(rows)))
  print(text, flush=True)
  print(f"\nwritten: {', '.join(paths.values())}\n", flush=True)
  return paths


def file_name(name: str) -> str:
  """The name, with "_" for what a file name should not have."""
  return re.sub(r"[^\w.-]", "_", name)


def new_figure(width: float, height: float) -> Any:
  """An empty matplotlib Figure of that many inches; needs no display."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure: Any) -> bytes:
  """The PNG of a matplotlib Figure."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()
