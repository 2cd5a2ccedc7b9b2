"""Results as three files: JSON for machines, a Markdown table, and a plot."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import io
import json
import os
import platform
import re
import subprocess
import tempfile
from typing import Any
import uuid
import warnings

from etils import epath
import jax

from gemma_funnel import atomic, buckets, cli
from gemma_funnel.checks import require
from gemma_funnel.convert import tensor_io

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
    return str(value)


def percent(key: str, header: str, format: str = ".1f") -> Column:
  """A column of shares, in percent."""
  return Column(key, f"{header} %", format, 100)


# What several tables have.
_COLUMNS = {
  column.key: column
  for column in (
    Column("batch", "batch", "d"),
    Column("length", "length", "d"),
    Column("head", "vocabulary head"),
    Column("funnel", "funnel"),
    Column("resolved", "stages"),
    Column("latency_s", "latency ms", ".3f", 1e3),
    percent("spread", "spread"),
    percent("reduction", "latency reduction, measured"),
    percent("ideal_reduction", "FLOPs saved"),
    Column("measured_over_ideal", "measured / ideal", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("flops_per_s", "TFLOP/s", ".3f", 1e-12),
    Column("peak_bytes", "memory MiB", ",.1f", 2**-20),
    Column("loss", "loss (nats/token)", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("error", "error"),
  )
}


def columns(*columns: str | Column) -> tuple[Column, ...]:
  """Columns of a table: those that several have by their keys, and others."""
  return tuple(_COLUMNS[c] if isinstance(c, str) else c for c in columns)


# What every table of times ends with.
TIMES = columns(
  "latency_s",
  "spread",
  "reduction",
  percent("ideal_reduction", "latency reduction, ideal"),
  "measured_over_ideal",
  "tokens_per_s",
  "flops_per_s",
  "peak_bytes",
  "error",
)


def environment() -> dict[str, Any]:
  """Where a result was measured, as JSON values: devices and versions.

  `device_peak_bytes` is the process's most memory on the first device so far.
  """
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  return {
    "platform": device.platform,
    "device_kind": device.device_kind,
    "num_devices": jax.device_count(),
    "num_host_cores": os.cpu_count(),
    "device_peak_bytes": memory.get("peak_bytes_in_use"),
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
  command = "git describe --always --dirty --abbrev=10".split()
  folder = os.path.dirname(os.path.abspath(__file__))
  options = dict(stderr=subprocess.DEVNULL, text=True, timeout=10)
  try:
    return subprocess.check_output(command, cwd=folder, **options).strip()
  except (OSError, subprocess.SubprocessError):
    return None


def markdown(text: str) -> str:
  """A line of Markdown that shows `text`, whatever file or user it is of."""
  return re.sub(r"[\\`*<\[|]", r"\\\g<0>", cli.clean(text, len(text)))


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
  """A Markdown table, padded so that it reads well unrendered too.

  Columns with a format hold numbers and are set flush right. A column that no
  row has a value for is left out.
  """
  columns = [c for c in columns if any(r.get(c.key) is not None for r in rows)]
  cells = [[markdown(c.header) for c in columns]]
  cells += [[markdown(c.text(row)) for c in columns] for row in rows]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

  shapes = [(">" if c.format else "<") for c in columns]
  shapes = [f"{side}{n}" for side, n in zip(shapes, widths, strict=True)]
  lines = ["| " + " | ".join(map(format, row, shapes)) + " |" for row in cells]
  ends = zip(widths, columns, strict=True)
  rule = ["-" * (n + 1) + (":" if c.format else "-") for n, c in ends]
  return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def claim(
  out_dir: str | os.PathLike, name: str, of: Mapping[str, Any] | None = None
) -> None:
  """Tries, before the work, whether `write` will be able to.

  Args:
    out_dir, name: as of `write`.
    of: settings of the result, or some of theirs; one that is there already
      must have the same, or it would be lost.

  Raises:
    ValueError: the folder cannot be written to, or there is another result.
  """
  try:
    if buckets.is_remote(out_dir):
      tried = epath.Path(out_dir) / f".tried.{uuid.uuid4().hex}"
      tried.write_bytes(b"")
      tried.unlink()
    else:
      os.makedirs(out_dir, exist_ok=True)
      with tempfile.TemporaryFile(dir=out_dir):
        pass
  except Exception as error:  # Clients of buckets raise of every kind.
    if not (buckets.is_remote(out_dir) or isinstance(error, OSError)):
      raise
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    raise ValueError(
      f"results cannot be written to {out_dir}: {text}; expected another "
      "folder by --config.out=FOLDER"
    ) from error
  path = os.path.join(out_dir, f"{name}.json")
  there = tensor_io.peek_json(path).get("settings")
  there = there if isinstance(there, dict) else {}
  for key, value in json.loads(json.dumps(of or {})).items():
    require(
      key not in there or _has(there[key], value),
      f"{path} is a result of another {key}: it would be lost. Expected another "
      "--config.out=FOLDER, or that you move it",
    )


def _has(found: Any, wanted: Any) -> bool:
  """Whether it is the same, or has the same by every key that is wanted."""
  if isinstance(wanted, dict) and isinstance(found, dict):
    return all(key in found and _has(found[key], wanted[key]) for key in wanted)
  return found == wanted


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
    rows: what JSON can hold, finite.
    columns: of the table.
    title: a line above the table.
    plot_fn: draws the rows, as a matplotlib Figure; None draws nothing.
    settings: what the result depends on, for the JSON.
    notes: lines below the table.

  Returns:
    The path of each file written, by its extension.

  Raises:
    ValueError: a value that JSON cannot hold.
  """
  if not buckets.is_remote(out_dir):  # Which has no folders.
    os.makedirs(out_dir, exist_ok=True)
  place = environment()
  where = (
    f"{place['num_devices']} x {place['device_kind']} ({place['platform']}, "
    f"{place['num_host_cores']} host cores), jax {place['jax']}"
  )
  text = "\n\n".join(
    [
      f"# {markdown(title)}",
      table(rows, columns),
      "\n".join([*map(markdown, notes), where]),
    ]
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
  for line in (*text.split("\n"), "", f"written: {', '.join(paths.values())}"):
    cli.tell(line)
  print(flush=True)
  return paths


def file_name(name: str) -> str:
  """The name, with "_" for what a file name should not have."""
  return re.sub(r"[^\w.-]", "_", name)


def new_figure(width: float, height: float) -> Any:
  """An empty matplotlib Figure of that many inches; needs no display."""
  import matplotlib

  matplotlib.use("Agg")
  # A name with dollars is no formula.
  matplotlib.rcParams["text.parse_math"] = False
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure: Any) -> bytes:
  """The PNG of a matplotlib Figure."""
  buffer = io.BytesIO()
  with warnings.catch_warnings():
    # A name of another script is boxes in a plot; tables have it whole.
    warnings.filterwarnings("ignore", "Glyph")
    figure.savefig(buffer, format="png")
  return buffer.getvalue()
