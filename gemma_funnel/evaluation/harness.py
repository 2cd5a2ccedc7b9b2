r"""lm-evaluation-harness on our model: any of its tasks, with any funnel.

  python -m gemma_funnel.evaluation.harness --tasks=lambada_openai \
    --model_args=checkpoint=DIR,funnel=off,batch_size=8

All flags but --model are lm_eval's own, of its command `run`. Needs the extra
"lm-eval". Or import this module and name the model "gemma_funnel".

Keys of --model_args: checkpoint, funnel (with "/" for its commas, such as
start=2/stride=2), tokenizer, dtype, batch_size, max_length, max_gen_toks, seed.
"""

from collections.abc import Sequence
import sys

from gemma_funnel import cli
from gemma_funnel.checks import require

if __name__ != "__main__":  # It registers the model.
  from gemma_funnel.evaluation import lm_eval_model  # noqa: F401


def _run(argv: Sequence[str]) -> int:
  try:
    from lm_eval.__main__ import cli_evaluate

    from gemma_funnel.evaluation.lm_eval_model import NAME
  except ImportError as error:
    if {"-h", "--help"} & {*argv}:
      print(__doc__)
      return 0
    raise ValueError(
      "lm_eval is missing: expected pip install 'gemma-funnel[lm-eval]'"
    ) from error
  require(
    all(flag.split("=")[0] not in ("--model", "-M") for flag in argv),
    f"--model: expected none, it is {NAME}",
  )
  before = sys.argv
  # lm_eval's own default is 1; what --model_args say counts more than both.
  sys.argv = ["lm-eval", "run", f"--model={NAME}", "--batch_size=8", *argv]
  try:
    cli_evaluate()
  except ValueError as error:  # An unknown task, or few-shot setting.
    raise ValueError(str(error)) from error
  finally:
    sys.argv = before
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs lm_eval's command with this model; returns its exit status."""
  given = sys.argv[1:] if argv is None else list(argv)
  return cli.guard(lambda: _run(given))


if __name__ == "__main__":
  sys.exit(main())
