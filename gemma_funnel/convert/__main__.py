"""Converts a checkpoint: python -m gemma_funnel.convert SRC DST --to=FORMAT

SRC is whatever `gemma_funnel.load` reads: a Hugging Face folder, a tree of
Google's, a .ckpt file or .bin folder of gemma_pytorch, a converted checkpoint
or a training run. DST is a folder that does not exist yet, and does not exist
before it is complete. No more than a few layers' matrices are in memory.
"""

import argparse
from collections.abc import Sequence
import sys
import time

from gemma_funnel import cli
from gemma_funnel.checks import require
from gemma_funnel.config import DTYPES, PRESETS, TransformerConfig
from gemma_funnel.convert import (
  conversion,
  detect,
  google,
  huggingface,
  verify,
  writer,
)
from gemma_funnel.convert.reader import CheckpointReader, open_checkpoint
from gemma_funnel.convert.tensor_io import read_json, to_path

_FLAGS = {
  "to": dict(
    required=True,
    choices=writer.FORMATS,
    help="orbax is our own format, google that of its Flax models",
  ),
  "dtype": dict(
    choices=DTYPES, help="of the tensors there (default: the source's)"
  ),
  "vocab_size": dict(
    type=int,
    metavar="N",
    help="rows of the embedding there: rows of "
    "zeros are added, or the last ones left out (default: the source's "
    "tokens; 256,000 tokens have 256,128 rows with --to=google)",
  ),
  "layout": dict(
    choices=[name for name in google.LAYOUTS if name != "kauldron"],
    help="of --to=google (default: flat, as Google's releases are)",
  ),
  "config": dict(
    metavar="NAME|FILE",
    help="what to take the source for: a preset such "
    "as gemma2_2b, a config.json of Hugging Face's or a "
    f"{detect.SIDECAR} (default: what lies beside it)",
  ),
  "verify": dict(
    action="store_true",
    help="reads both back: compares all values, and "
    "the logits of a fixed prompt; status 1 where they differ",
  ),
  "dry_run": dict(
    action="store_true",
    help="checks the source, and prints what would be written",
  ),
}


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m gemma_funnel.convert", description=__doc__
  )
  parser.add_argument("source", metavar="SRC")
  parser.add_argument("destination", metavar="DST")
  for name, options in _FLAGS.items():
    parser.add_argument(f"--{name}", **options)
  return parser


def _read_config(given: str | None) -> TransformerConfig | None:
  if given is None:
    return None
  if given in PRESETS:
    return TransformerConfig.preset(given)
  file = to_path(given)
  require(
    file.exists(),
    f"--config={given}: expected a file, or a preset, one of {list(PRESETS)}",
  )
  if "model_type" in read_json(file):
    return huggingface.read_config(file)
  return detect.read_own_config(file)[0]


def _tell(source: CheckpointReader, spec: writer.CheckpointSpec) -> None:
  rows, largest = source.dropped_rows()
  if largest and spec.sizes["V"] < source.rows:
    cli.say(
      f"the last {rows} rows of the embedding are left out: they are of no "
      f"token, but not zero (largest {largest:.3g})"
    )
  for file in spec.files:
    headers = spec.headers(file)
    size = sum(header.nbytes for header in headers.values())
    name = file.name or "the tree"
    cli.say(f"{name}: {len(headers)} tensors, {size / 1e9:.2f} GB")


def _run(argv: Sequence[str] | None) -> int:
  args = _parser().parse_args(argv)
  if args.layout and args.to != "google":
    raise ValueError(f"--layout={args.layout}: expected --to=google with it")
  source = open_checkpoint(args.source, _read_config(args.config))
  spec = conversion.spec_for(
    source, args.to, args.dtype, args.vocab_size, args.layout or "flat"
  )
  conversion.check_destination(source, spec, args.destination)
  cli.say(
    f"{args.source} ({source.format}, {source.dtype.name}) to {args.to}, "
    f"{spec.dtype.name}, {spec.nbytes / 1e9:.2f} GB"
  )
  _tell(source, spec)
  if args.dry_run:
    return 0
  start = time.perf_counter()
  with cli.Progress("converting", spec.nbytes) as progress:
    conversion.write(source, spec, args.destination, progress.add)
  seconds = time.perf_counter() - start
  cli.say(
    f"{args.destination} written in {seconds:.1f} s, "
    f"{spec.nbytes / 1e9 / seconds:.2f} GB/s"
  )
  return _verify(source, args.destination, spec) if args.verify else 0


def _verify(
  source: CheckpointReader, destination: str, spec: writer.CheckpointSpec
) -> int:

  # By its own configuration, as whoever loads it will.
  written = open_checkpoint(destination)
  with cli.Progress("verifying", spec.nbytes) as progress:
    difference = verify.compare(source, written, progress.add)
  cli.say(str(difference))
  for name in difference.unequal:
    cli.say(f"differs: {name}")
  return 1 if difference else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return cli.guard(lambda: _run(argv))


if __name__ == "__main__":
  sys.exit(main())
