"""Generates text: python -m gemma_funnel.generate --checkpoint=DIR --prompt=TEXT

Prompts are --prompt (as often as wanted), the "prompt" of each object of
--prompts=FILE.jsonl ("-" is stdin), or else stdin, whole. One prompt and one sample stream
their text to stdout, and a newline at the end. Several, and --prompts always,
are JSON lines, one a continuation:

  {"prompt": str, "sample": int, "text": str, "tokens": [int], "stopped": bool}

with what else the prompt's object has.

--context=FILE stands between BOS and each prompt; a funnel of reduce=context
drops it from its layer on, others read it as the start of the prompt.

Mistakes are one line and exit status 2; Ctrl-C prints what there is, status 130
(JSON lines of what was not finished then have "interrupted": true).
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import sys
import time
from typing import Any

from flax import nnx

from gemma_funnel import cli, convert
from gemma_funnel import config as config_lib
from gemma_funnel.checks import require, require_int
from gemma_funnel.convert.tensor_io import to_path
from gemma_funnel.data import files
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.decode.decoder import Decoder, Generation
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.model import Transformer
from gemma_funnel.tasks import tables

_MAX_NEW_TOKENS = 128
_PROGRESS_SECONDS = 10.0
_REPLACEMENT = "\ufffd"
# Bytes that a character cut off can have.
_MOST_CUT = 3


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
  """Checked arguments of the command."""

  checkpoint: str
  funnel: str | None  # Instead of the checkpoint's own.
  dtype: str | None  # Of parameters and compute; None is as trained.
  tokenizer: Tokenizer
  texts: list[str]
  others: list[dict[str, Any]]  # What else the objects of --prompts have.
  prompts: list[list[int]]  # BOS, the context's token ids, the text's.
  context_length: int | None  # Tokens that the funnel drops; None: it does not.
  cache_length: int
  batch_size: int
  max_new_tokens: int
  num_samples: int
  options: dict[str, Any]  # Others of `Decoder.stream`.
  as_text: bool  # The one continuation is text, not JSON.

  def stream(
    self, decoder: Decoder, prompts: Sequence[list[int]], first_row: int = 0
  ) -> Iterator[list[Generation]]:
    """What the decoder has so far of some prompts, at each look."""
    length = self.context_length
    return decoder.stream(
      prompts,
      max_new_tokens=self.max_new_tokens,
      num_samples=self.num_samples,
      first_row=first_row,
      context_lengths=None if length is None else [length] * len(prompts),
      **self.options,
    )

  def is_finished(self, result: Generation) -> bool:
    return result.stopped or len(result.tokens) == self.max_new_tokens


class Detokenizer:
  """Text of tokens as they come; what was given out never changes."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._taken = 0
    self._waiting: list[int] = []
    self._given = 0

  def feed(self, tokens: Sequence[int]) -> str:
    """What is new and certain; `tokens` are all there are so far.

    A character whose bytes are not all there yet is held back.
    """
    self._waiting += tokens[self._taken :]
    self._taken = len(tokens)
    text = decode(self._tokenizer, self._waiting)
    certain = max(len(text.rstrip(_REPLACEMENT)), len(text) - _MOST_CUT)
    new, self._given = text[self._given : certain], certain
    if certain == len(text):
      self._waiting, self._given = [], 0
    return new

  def finish(self) -> str:
    """What was held back."""
    return decode(self._tokenizer, self._waiting)[self._given :]


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
  """Text of token ids; those beyond the tokenizer's vocabulary have none."""
  return tokenizer.decode(t for t in tokens if t < tokenizer.vocab_size)


class _Throughput:
  """Counts and times tokens; a batch's first looks include compiling."""

  _WARM = 2

  def __init__(self):
    self.start = self._last = time.perf_counter()
    self.tokens = self._batch = self._looks = 0
    self._first = None
    self._warm_tokens, self._warm_seconds = 0, 0.0

  @property
  def seconds(self) -> float:
    return time.perf_counter() - self.start

  def next_batch(self) -> None:
    self._batch = self._looks = 0

  def look(self, results: Sequence[Generation]) -> None:
    """Takes note of what a batch has so far."""
    count = sum(len(r.tokens) + r.stopped for r in results)
    new, now = count - self._batch, time.perf_counter()
    self._looks += 1
    if self._looks > self._WARM:
      self._warm_tokens += new
      self._warm_seconds += now - self._last
    if count and self._first is None:
      self._first = now - self.start
    self.tokens += new
    self._batch, self._last = count, now

  def __str__(self) -> str:
    text = f"{self.tokens} tokens in {self.seconds:.2f} s"
    if self._first is not None:
      text += f"; the first after {self._first:.2f} s, compiling included"
    if self._warm_tokens:
      rate = self._warm_tokens / self._warm_seconds
      return f"{text}; then {rate:.1f} tokens/s"
    rate = self.tokens / self.seconds
    return f"{text}; {rate:.1f} tokens/s, compiling included"


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m gemma_funnel.generate",
    description=__doc__,
    usage="%(prog)s --checkpoint=DIR [--FLAG=VALUE ...]",
    epilog=cli.describe_funnels(),
  )

  def add(name: str, metavar: str, text: str, default=None, **options) -> None:
    text += "" if default is None else " (default: %(default)s)"
    options |= dict(type={"N": int, "X": float}.get(metavar), default=default)
    parser.add_argument(f"--{name}", metavar=metavar, help=text, **options)

  run = "a training run, or whatever gemma_funnel.load reads"
  add("checkpoint", "DIR", run, required=True)
  add("prompt", "TEXT", "may be repeated", action="append")
  add("prompts", "FILE", 'JSON lines with a "prompt" each')
  add("context", "FILE", "a text before each prompt, such as demonstrations")
  stages = "'off', or such as start=6,stride=2 (default: as trained, or off)"
  add("funnel", "STAGES", stages)
  dtype = "(default: as trained; float32 if that is not known)"
  add("dtype", None, dtype, choices=config_lib.DTYPES)
  model = "SentencePiece model or tokenizer.json (default: the checkpoint's)"
  add("tokenizer", "FILE", model)
  new = f"stop id included (default: {_MAX_NEW_TOKENS}, or what fits)"
  add("max_new_tokens", "N", new)
  add("temperature", "X", "0 is greedy", 0.0)
  add("top_k", "N", "draws from the N likeliest tokens")
  add("top_p", "X", "draws from a nucleus of probability X", 1.0)
  add(
    "min_p", "X", "draws from what is X times as likely as the likeliest", 0.0
  )
  add("repetition_penalty", "X", "1 is none", 1.0)
  stop = "may be repeated (default: what the checkpoint says, or EOS)"
  add("stop_id", "N", stop, action="append")
  add("num_samples", "N", "of each prompt", 1)
  add("seed", "N", "of what is drawn", 0)
  length = "tokens of a prompt and its continuation (default: what is needed)"
  add("cache_length", "N", length)
  add("batch_size", "N", "prompts that run together, with all samples", 8)
  add("chunk", "N", "tokens between looks at the device", 8)
  return parser


def prepare(args: argparse.Namespace) -> GenerationRequest:
  """Checks all that can be checked before weights are read."""
  require(
    args.prompt is None or args.prompts is None,
    "--prompt and --prompts are both given: expected one of them",
  )
  for name in ("max_new_tokens", "num_samples", "batch_size", "chunk"):
    if getattr(args, name) is not None:
      require_int(f"--{name}", getattr(args, name), 1)
  require_int("--seed", args.seed, 0, 2**32 - 1)
  require(
    args.num_samples == 1 or args.temperature != 0,
    f"--num_samples={args.num_samples} with --temperature=0 (greedy) would all "
    "be the same: expected --temperature above 0",
  )
  fields = (field.name for field in dataclasses.fields(Sampling))
  sampling = Sampling(**{name: getattr(args, name) for name in fields})
  found = convert.describe(args.checkpoint)
  stages, vocab_size = found.stages, found.config.vocab_size
  if args.funnel is not None:
    stages = config_lib.resolve_funnel(args.funnel, found.config.num_layers)
  config_lib.check_recovers(stages, "generation")
  drops = any(stage.reduce == "context" for stage in stages)
  require(
    not drops or args.context is not None,
    "the funnel drops a context (reduce=context): expected --context=FILE",
  )
  tokenizer = _find_tokenizer(args, found)
  stop_ids = args.stop_id
  if stop_ids is None:
    stop_ids = list(found.stop_ids) or [tokenizer.eos_id]
  for stop_id in stop_ids:
    require_int("--stop_id", stop_id, 0, vocab_size - 1)
  start = [tokenizer.bos_id]
  if args.context is not None:
    text = tables.read_text(args.context)
    start += _encode(tokenizer, args.context, text)
  places, texts, others = zip(*_read_prompts(args), strict=True)
  prompts = [
    start + _encode(tokenizer, place, text)
    for place, text in zip(places, texts, strict=True)
  ]
  new, cache_length = _lengths(args, found.config.max_length, places, prompts)
  return GenerationRequest(
    checkpoint=args.checkpoint,
    funnel=args.funnel,
    dtype=args.dtype or (None if found.is_run else "float32"),
    tokenizer=tokenizer,
    texts=list(texts),
    others=list(others),
    prompts=prompts,
    context_length=len(start) - 1 if drops else None,
    cache_length=cache_length,
    batch_size=args.batch_size,
    max_new_tokens=new,
    num_samples=args.num_samples,
    options=dict(
      sampling=sampling, stop_ids=stop_ids, chunk=args.chunk, seed=args.seed
    ),
    as_text=args.prompts is None and len(prompts) == args.num_samples == 1,
  )


def _find_tokenizer(args, found: convert.Description) -> Tokenizer:
  vocab_size = found.config.vocab_size
  path = args.tokenizer or found.tokenizer_path
  require(
    args.tokenizer is not None or to_path(path).is_file(),
    f"{args.checkpoint} has no tokenizer: there is no file {path}. Expected "
    "--tokenizer=FILE, a SentencePiece model or a tokenizer.json",
  )
  tokenizer = tokenizer_lib.find_tokenizer(path, path, vocab_size)
  if (pieces := tokenizer.vocab_size) < vocab_size:
    cli.say(
      f"tokenizer {path} has {pieces} pieces, the model {vocab_size} ids: "
      f"those from {pieces} on have no text"
    )
  return tokenizer


def _read_prompts(args) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """(what an error calls it, the text, the rest) of each prompt."""
  if args.prompts is not None:
    path, text = args.prompts, None
    if path == "-":
      path, text = "stdin", _read_stdin()
    rows = tables.json_rows(path, ("prompt",), text)
    require(bool(rows), f"{path} has no prompts: expected JSON lines")
    for row in rows:
      require(not row.fault, f"{row.place}: {row.fault}")
      others = dict(row.values)
      yield row.place, others.pop("prompt"), others
  elif args.prompt is not None:
    many = len(args.prompt) > 1
    for number, text in enumerate(args.prompt, start=1):
      yield f"--prompt number {number}" if many else "--prompt", text, {}
  else:
    yield "stdin", _read_stdin(), {}


def _read_stdin() -> str:
  if sys.stdin.isatty():
    cli.say("the prompt is read from stdin, to its end (Ctrl-D)")
  try:
    return sys.stdin.buffer.read().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"stdin is not UTF-8: {error}") from error


def _encode(tokenizer: Tokenizer, place: str, text: str) -> list[int]:
  require(text != "", f"{place} is empty: expected a text")
  text = files.check_text(text, place, "prompt")
  # A chat template's text begins with BOS, which is there already.
  return tokenizer.encode(text.removeprefix(tokenizer.piece(tokenizer.bos_id)))


def _lengths(args, most: int, places, prompts) -> tuple[int, int]:
  """(max_new_tokens, cache_length), which have room for all prompts."""
  name = "model.max_length"
  if args.cache_length is not None:
    require(
      2 <= args.cache_length <= most,
      f"--cache_length={args.cache_length}: expected 2 to {name}={most}",
    )
    most, name = args.cache_length, "--cache_length"
  longest, place = max(zip(map(len, prompts), places, strict=True))
  new = args.max_new_tokens or max(1, min(_MAX_NEW_TOKENS, most - longest))
  what = "BOS included" if args.context is None else "BOS and context included"
  require(
    longest + new <= most,
    f"{place} has {longest} tokens, {what}: {name}={most} has room for "
    f"{max(0, most - new)} beside --max_new_tokens={new}",
  )
  return new, args.cache_length or longest + new


def load(request: GenerationRequest) -> Decoder:
  """Reads the weights; what that tells goes to stderr."""
  with contextlib.redirect_stdout(sys.stderr):
    model = convert.load(request.checkpoint, request.funnel, request.dtype)
  # The kernel of a run is that of the devices it was trained on.
  config = dataclasses.replace(model.config, kernel="auto")
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return Decoder(nnx.merge(graphdef, nnx.state(model)), request.cache_length)


def stream_text(
  request: GenerationRequest, decoder: Decoder, throughput: _Throughput
) -> bool:
  """Writes one continuation as it comes; whether it was interrupted."""
  text, interrupted = Detokenizer(request.tokenizer), False
  try:
    for results in request.stream(decoder, request.prompts):
      throughput.look(results)
      _write(text.feed(results[0].tokens))
  except KeyboardInterrupt:
    interrupted = True
  _write(text.finish() + "\n")
  return interrupted


def write_lines(
  request: GenerationRequest, decoder: Decoder, throughput: _Throughput
) -> bool:
  """Writes a JSON line a continuation; whether it was interrupted."""
  prompts, said = request.prompts, throughput.start
  size = min(request.batch_size, len(prompts))
  for start in range(0, len(prompts), size):
    rows = prompts[start : start + size]
    # A batch that is not full would be compiled for anew.
    full = rows + rows[-1:] * (size - len(rows))
    results, interrupted = [], False
    throughput.next_batch()
    try:
      for some in request.stream(decoder, full, first_row=start):
        results = some[: len(rows) * request.num_samples]
        throughput.look(results)
        if all(map(request.is_finished, results)):
          break
        if time.perf_counter() - said > _PROGRESS_SECONDS:
          _say_progress(request, start, results, throughput)
          said = time.perf_counter()
    except KeyboardInterrupt:
      interrupted = True
    for result in results:
      values = request.others[start + result.prompt] | {
        "prompt": request.texts[start + result.prompt],
        "sample": result.sample,
        "text": decode(request.tokenizer, result.tokens),
        "tokens": result.tokens,
        "stopped": result.stopped,
      }
      if not request.is_finished(result):
        values["interrupted"] = True
      _write(json.dumps(values, ensure_ascii=False) + "\n")
    if interrupted:
      return True
    if start + size < len(prompts):
      _say_progress(request, start, results, throughput)
      said = time.perf_counter()
  return False


def _say_progress(
  request: GenerationRequest, start: int, results, throughput: _Throughput
) -> None:
  samples, total = request.num_samples, len(request.prompts)
  most, seconds = request.max_new_tokens, throughput.seconds
  done = start + sum(map(request.is_finished, results)) // samples
  shares = sum(1 if r.stopped else len(r.tokens) / most for r in results)
  share = (start + shares / samples) / total
  left = f"; about {seconds * (1 / share - 1):.0f} s left" if share else ""
  cli.say(
    f"{done} of {total} prompts, {throughput.tokens} tokens, {seconds:.0f} s"
    + left
  )


def _write(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""

  def run() -> int:
    request = prepare(_parser().parse_args(argv))
    write = stream_text if request.as_text else write_lines
    decoder, throughput = load(request), _Throughput()
    interrupted = write(request, decoder, throughput)
    cli.say(f"interrupted: {throughput}" if interrupted else str(throughput))
    return 130 if interrupted else 0

  return cli.guard(run)


if __name__ == "__main__":
  if sys.stdout:
    sys.stdout.reconfigure(encoding="utf-8")
  sys.exit(main())
