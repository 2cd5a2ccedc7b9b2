"""Fits what tokens that bypass a stage get: recover=affine.

  python -m gemma_funnel.study.calibrate SRC DST --text=FILE \\
    --funnel=start=8,reduce=last_queries,keep=0.2,recover=affine

The plain model reads the text. For each such stage, ridge regression from the
states that enter it to those that leave its layers gives A and c (arXiv
2303.09435). DST is SRC in our own format, with them and the funnel.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import sys

import jax.numpy as jnp
import numpy as np

from gemma_funnel import cli, convert
from gemma_funnel.checks import require, require_int, require_positive
from gemma_funnel.config import OFF, FunnelConfig, resolve_funnel
from gemma_funnel.convert import conversion
from gemma_funnel.convert.reader import open_checkpoint
from gemma_funnel.data.packing import windows
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.model import Transformer
from gemma_funnel.registry import RECOVERIES, REDUCERS
from gemma_funnel.study import layer_similarity
from gemma_funnel.tasks import tables

_RECOVER = "affine"
# Of the text's windows, one in so many is not fitted on.
_HELD_OUT = 8


@dataclasses.dataclass(frozen=True)
class Fit:
  """An affine map of states, and how well it does on states not fitted on.

  Attributes:
    map: float32 [D, D], A - 1 transposed.
    shift: float32 [D].
    before, after: |h - y| / |y| and |A h + c - y| / |y|, root-mean-square.
  """

  map: np.ndarray
  shift: np.ndarray
  before: float
  after: float


def fit_affine(
  h_ND: np.ndarray, y_ND: np.ndarray, ridge: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
  """The affine map from h to y of least squares, drawn towards the identity.

  Args:
    h_ND, y_ND: N states each.
    ridge: of the mean variance of h's channels, added to all of them.

  Returns:
    (map, shift), float32: y is about h + h @ map + shift.
  """
  h_ND, change_ND = h_ND.astype(np.float64), (y_ND - h_ND).astype(np.float64)
  mean_D, by_D = h_ND.mean(axis=0), change_ND.mean(axis=0)
  x_ND = h_ND - mean_D
  square_DD = x_ND.T @ x_ND
  extra = ridge * np.trace(square_DD) / len(square_DD)
  square_DD[np.diag_indices_from(square_DD)] += extra
  map_DD = np.linalg.solve(square_DD, x_ND.T @ (change_ND - by_D))
  return map_DD.astype(np.float32), (by_D - mean_D @ map_DD).astype(np.float32)


def calibrate(
  model: Transformer,
  stages: Sequence[FunnelConfig],
  tokens_BT: np.ndarray,
  ridge: float = 1e-3,
) -> dict[int, Fit]:
  """Fits the affine recoveries of a funnel to the plain model's states.

  Args:
    model: its funnel is not used.
    stages: of the funnel, resolved.
    tokens_BT: windows of a text that begin with BOS, which is not fitted.
    ridge: see `fit_affine`.

  Returns:
    The fit of each such stage, by its number.
  """
  plain = model.with_funnel(OFF)
  wanted = {n: s for n, s in enumerate(stages) if s.recover == _RECOVER}
  inputs = {number: [] for number in wanted}
  for row_1T in tokens_BT[:, None]:
    ones_1T = np.ones(row_1T.shape, np.int32)
    found = layer_similarity.states(plain, jnp.asarray(row_1T), ones_1T, True)
    after = [np.asarray(x[0, 1:], np.float32) for x in found.values()]
    for number, stage in wanted.items():
      first = np.asarray(plain.embed(row_1T)[0, 1:], np.float32)
      entering = after[stage.start - 1] if stage.start else first
      inputs[number].append((entering, after[stage.stop - 1]))
  fits = {}
  for number, pairs in inputs.items():
    kept = [p for n, p in enumerate(pairs) if (n + 1) % _HELD_OUT]
    others = pairs[_HELD_OUT - 1 :: _HELD_OUT] or pairs
    map_DD, shift_D = fit_affine(
      *map(np.concatenate, zip(*kept, strict=True)), ridge
    )
    h_ND, y_ND = map(np.concatenate, zip(*others, strict=True))
    error = lambda x, y: float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))
    fits[number] = Fit(
      map_DD,
      shift_D,
      error(h_ND, y_ND),
      error(h_ND + h_ND @ map_DD + shift_D, y_ND),
    )
  return fits


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m gemma_funnel.study.calibrate", description=__doc__
  )
  parser.add_argument("source", metavar="SRC")
  parser.add_argument("destination", metavar="DST")
  parser.add_argument("--funnel", required=True, metavar="STAGES")
  parser.add_argument("--text", required=True, metavar="FILE")
  for name, default, what in (
    ("length", 512, "tokens of a window"),
    ("windows", 32, "windows of the text, at most"),
  ):
    parser.add_argument(
      f"--{name}",
      type=int,
      default=default,
      metavar="N",
      help=f"{what} (default: %(default)s)",
    )
  parser.add_argument(
    "--ridge",
    type=float,
    default=1e-3,
    metavar="X",
    help="of the mean variance of a channel (default: %(default)s)",
  )
  return parser


def _check(stages: Sequence[FunnelConfig]) -> None:
  for stage in stages:
    learns = [
      *REDUCERS[stage.reduce].rows,
      *(RECOVERIES[stage.recover].rows if stage.recover != _RECOVER else ()),
    ]
    require(
      not learns,
      f"--funnel: the stage {stage} learns {[r.path for r in learns]}, which "
      "no regression finds: expected other stages, or recover=affine",
    )
  require(
    any(stage.recover == _RECOVER for stage in stages),
    "--funnel: expected a stage with recover=affine",
  )


def _run(argv: Sequence[str] | None) -> int:
  args = _parser().parse_args(argv)
  require_int("--length", args.length, 2)
  require_int("--windows", args.windows, 1)
  require_positive("--ridge", args.ridge)
  text = tables.read_text(args.text)
  found = convert.describe(args.source)
  stages = resolve_funnel(args.funnel, found.config.num_layers)
  _check(stages)
  require_int("--length", args.length, 2, found.config.max_length)
  tokenizer = Tokenizer.load(found.tokenizer_path)
  source = open_checkpoint(args.source, learned=False)
  source = dataclasses.replace(source, stages=stages)
  spec = conversion.spec_for(source, "orbax")
  conversion.check_destination(source, spec, args.destination)
  ids = tokenizer.encode(text)
  tokens_BT = windows(tokenizer.bos_id, ids, args.length)[: args.windows]
  model = convert.load(args.source, OFF)
  cli.say(f"{tokens_BT.size} tokens in {len(tokens_BT)} windows")
  learned = {}
  for number, fit in calibrate(model, stages, tokens_BT, args.ridge).items():
    cli.say(
      f"stage {stages[number]}: relative error of states that bypass it "
      f"{fit.before:.3f} as they are, {fit.after:.3f} mapped"
    )
    for name in ("map", "shift"):
      path = "funnel", str(number), "recovery", name
      learned[path] = getattr(fit, name)
  source = dataclasses.replace(source, learned=learned)
  conversion.write(source, spec, args.destination)
  cli.say(f"{args.destination} written")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return cli.guard(lambda: _run(argv))


if __name__ == "__main__":
  sys.exit(main())
