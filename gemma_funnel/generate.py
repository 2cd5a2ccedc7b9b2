"""Generates text: python -m gemma_funnel.generate --checkpoint=DIR --prompt=TEXT

Prompts are --prompt (as often as wanted), the "prompt" of each object of
--prompts=FILE.jsonl, or else stdin, whole. One prompt and one sample stream
their text to stdout, and a newline at the end. Several, and --prompts always,
are JSON lines, one a continuation:

  {"prompt": str, "sample": int, "text": str, "tokens": [int], "stopped": bool}

Mistakes are one line and exit status 2; Ctrl-C prints what there is, status 130
(JSON lines of what was not finished then have "interrupted": true).
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import sys
import time

from flax import nnx

from gemma_funnel import cli, convert
from gemma_funnel import config as config_lib
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID, Tokenizer
from gemma_funnel.decode.decoder import Decoder, Generation
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.model import Transformer

_MAX_NEW_TOKENS = 128
_PROGRESS_SECONDS = 10.0
_REPLACEMENT = "\ufffd"
# Bytes that a character cut off can have.
_MOST_CUT = 3


@dataclasses.dataclass(frozen=True)
class Job:
  """A checked command.

  Attributes:
    args: the flags.
    found: what the checkpoint is.
    tokenizer: of the checkpoint, or the one that was named.
    texts: the prompts.
    prompts: their token ids, BOS first.
    sampling: how tokens are drawn.
    stop_ids: what ends a continuation.
    max_new_tokens: tokens of a continuation at most.
    cache_length: tokens of a prompt and its continuation at most.
  """

  args: argparse.Namespace
  found: convert.Description
  tokenizer: Tokenizer
  texts: list[str]
  prompts: list[list[int]]
  sampling: Sampling
  stop_ids: list[int]
  max_new_tokens: int
  cache_length: int


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
    certain = len(text)
    while text[:certain].endswith(_REPLACEMENT) and (
      len(text) - certain < _MOST_CUT
    ):
      certain -= 1
    new = text[self._given : certain]
    self._given = certain
    if certain == len(text):
      self._waiting, self._given = [], 0
    return new

  def finish(self) -> str:
    """What was held back."""
    return decode(self._tokenizer, self._waiting)[self._given :]


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
  """Text of what a model gave, whose vocabulary may be the larger one."""
  return tokenizer.decode(t for t in tokens if t < tokenizer.vocab_size)


class _Meter:
  """Counts tokens, and times them; compiling is in the first looks."""

  _WARM = 2  # Looks at a batch until prefill and step are compiled.

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
      return (
        f"{text}; then {self._warm_tokens / self._warm_seconds:.1f} tokens/s"
      )
    text += f"; {self.tokens / self.seconds:.1f} tokens/s"
    return text + ", compiling included"


_FLAGS = {
  "checkpoint": dict(
    required=True,
    metavar="DIR",
    help="a training run, or whatever gemma_funnel.load reads",
  ),
  "prompt": dict(action="append", metavar="TEXT", help="may be repeated"),
  "prompts": dict(metavar="FILE", help='JSON lines with a "prompt" each'),
  "funnel": dict(
    metavar="STAGES",
    help="'off', or such as start=6,stride=2 (default: "
    "as trained; off for checkpoints that say none)",
  ),
  "dtype": dict(
    choices=config_lib.DTYPES,
    help="(default: as trained; float32 for what is no training run)",
  ),
  "tokenizer": dict(
    metavar="FILE",
    help="a SentencePiece model or a tokenizer.json (default: the "
    "checkpoint's own)",
  ),
  "max_new_tokens": dict(
    type=int,
    help="a stop id included (default: "
    f"{_MAX_NEW_TOKENS}, or what there is room for)",
  ),
  "temperature": dict(type=float, default=0.0, help="0 (default) is greedy"),
  "top_k": dict(type=int, help="draws from the N likeliest tokens"),
  "top_p": dict(
    type=float, default=1.0, help="draws from a nucleus of probability X"
  ),
  "min_p": dict(
    type=float,
    default=0.0,
    help="draws from what is X times as likely as the likeliest token",
  ),
  "repetition_penalty": dict(type=float, default=1.0, help="1 is none"),
  "stop_id": dict(
    type=int,
    action="append",
    help="ends a continuation; may be repeated "
    f"(default: {EOS_ID}, EOS, alone)",
  ),
  "num_samples": dict(type=int, default=1, help="of each prompt (default: 1)"),
  "seed": dict(type=int, default=0, help="of what is drawn (default: 0)"),
  "cache_length": dict(
    type=int,
    help="tokens of a prompt and its continuation (default: the "
    "most that is needed)",
  ),
  "batch_size": dict(
    type=int,
    default=8,
    help="prompts that run together, with all their samples (default: 8)",
  ),
  "chunk": dict(
    type=int, default=8, help="tokens between looks at the device (default: 8)"
  ),
}


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python -m gemma_funnel.generate",
    allow_abbrev=False,
    description=__doc__,
    usage="%(prog)s --checkpoint=DIR [--FLAG=VALUE ...]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  for name, options in _FLAGS.items():
    metavar = {int: "N", float: "X"}.get(options.get("type"))
    parser.add_argument(f"--{name}", **{"metavar": metavar, **options})
  return parser


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ValueError(message)


def _check_numbers(args: argparse.Namespace) -> None:
  for name in ("max_new_tokens", "num_samples", "batch_size", "chunk"):
    value = getattr(args, name)
    ok = value is None or value >= 1
    _require(ok, f"--{name}={value}: expected 1 or more")
  ok, most = 0 <= args.seed < 2**32, 2**32 - 1
  _require(ok, f"--seed={args.seed}: expected 0 to {most}")
  _require(
    args.num_samples == 1 or args.temperature != 0,
    f"--num_samples={args.num_samples} with --temperature=0 (greedy) would all "
    "be the same: expected --temperature above 0",
  )


def prepare(args: argparse.Namespace) -> Job:
  """Checks all there is to check before weights are read.

  Raises:
    ValueError: a mistake, named.
  """
  _require(
    args.prompt is None or args.prompts is None,
    "--prompt and --prompts are both given: expected one of them",
  )
  _check_numbers(args)
  sampling = Sampling(
    args.temperature,
    args.top_k,
    args.top_p,
    args.min_p,
    args.repetition_penalty,
  )
  found = convert.describe(args.checkpoint)
  stages, vocab_size = found.stages, found.config.vocab_size
  if args.funnel is not None:
    stages = config_lib.resolve_funnel(args.funnel, found.config.num_layers)
  config_lib.check_recovers(stages, "generation")
  tokenizer = _find_tokenizer(args, found)
  stop_ids = [EOS_ID] if args.stop_id is None else args.stop_id
  for stop_id in stop_ids:
    _require(
      0 <= stop_id < vocab_size,
      f"--stop_id={stop_id}: expected 0 to {vocab_size - 1}",
    )
  places, texts = zip(*_read_prompts(args), strict=True)
  prompts = [
    _encode(tokenizer, *one) for one in zip(places, texts, strict=True)
  ]
  new, cache_length = _lengths(args, found.config.max_length, places, prompts)
  return Job(
    args=args,
    found=found,
    tokenizer=tokenizer,
    texts=list(texts),
    prompts=prompts,
    sampling=sampling,
    stop_ids=stop_ids,
    max_new_tokens=new,
    cache_length=cache_length,
  )


def _find_tokenizer(args, found: convert.Description) -> Tokenizer:
  vocab_size = found.config.vocab_size
  path = args.tokenizer or found.tokenizer_path
  _require(
    args.tokenizer is not None or os.path.isfile(path),
    f"{args.checkpoint} has no tokenizer: there is no file {path}. Expected "
    "--tokenizer=FILE, a SentencePiece model or a tokenizer.json",
  )
  tokenizer = tokenizer_lib.find_tokenizer(path, path, vocab_size)
  pieces = tokenizer.vocab_size
  if pieces < vocab_size:
    cli.say(
      f"tokenizer {path} has {pieces} pieces, the model {vocab_size} ids: "
      f"those from {pieces} on have no text"
    )
  return tokenizer


def _read_prompts(args) -> Iterator[tuple[str, str]]:
  """(what an error calls it, the text) of each prompt."""
  if args.prompts is not None:
    yield from _read_lines(args.prompts)
  elif args.prompt is not None:
    many = len(args.prompt) > 1
    for number, text in enumerate(args.prompt, start=1):
      yield f"--prompt number {number}" if many else "--prompt", text
  else:
    if sys.stdin.isatty():
      cli.say("the prompt is read from stdin, to its end (Ctrl-D)")
    try:
      yield "stdin", sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"stdin is not UTF-8: {error}") from error


def _read_lines(path: str) -> Iterator[tuple[str, str]]:
  found = False
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          found, place = True, f"{path}, line {number}"
          yield place, _prompt_of(line, place)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  _require(found, f"{path} has no prompts: expected JSON lines with a 'prompt'")


def _prompt_of(line: bytes, place: str) -> str:
  try:
    record = json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{place}: not JSON: {error}") from error
  text = record.get("prompt") if isinstance(record, dict) else None
  what = "an object with a text 'prompt'"
  _require(isinstance(text, str), f"{place}: expected {what}")
  return text


def _encode(tokenizer: Tokenizer, place: str, text: str) -> list[int]:
  _require(text != "", f"{place} is empty: expected a text to go on from")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{place} is not Unicode text: {error}") from error
  return [BOS_ID, *tokenizer.encode(text)]


def _lengths(args, most: int, places, prompts) -> tuple[int, int]:
  """(max_new_tokens, cache_length), which have room for all prompts."""
  name = "model.max_length"
  if args.cache_length is not None:
    _require(
      2 <= args.cache_length <= most,
      f"--cache_length={args.cache_length}: expected 2 to {name}={most}",
    )
    most, name = args.cache_length, "--cache_length"
  longest, place = max(zip(map(len, prompts), places, strict=True))
  new = args.max_new_tokens or max(1, min(_MAX_NEW_TOKENS, most - longest))
  _require(
    longest + new <= most,
    f"{place} has {longest} tokens, BOS included: {name}={most} has room for "
    f"{max(0, most - new)} beside --max_new_tokens={new}",
  )
  return new, args.cache_length or longest + new


def load(job: Job) -> Decoder:
  """Reads the weights.

  Raises:
    ValueError: see `convert.load`.
  """
  args = job.args
  # A run is read as it was trained.
  dtype = args.dtype or (None if job.found.is_run else "float32")
  # What loading has to tell is no part of the result.
  with contextlib.redirect_stdout(sys.stderr):
    model = convert.load(args.checkpoint, args.funnel, dtype)
  # The kernel of a run is that of the devices it was trained on.
  config = dataclasses.replace(model.config, kernel="auto")
  graphdef = nnx.graphdef(Transformer.abstract(config, model.stages))
  return Decoder(nnx.merge(graphdef, nnx.state(model)), job.cache_length)


def _stream(job: Job, decoder: Decoder, prompts, **options):
  return decoder.stream(
    prompts,
    max_new_tokens=job.max_new_tokens,
    sampling=job.sampling,
    stop_ids=job.stop_ids,
    chunk=job.args.chunk,
    **options,
  )


def stream_text(job: Job, decoder: Decoder, meter: _Meter) -> bool:
  """Writes one continuation as it comes; whether it was interrupted."""
  text, interrupted = Detokenizer(job.tokenizer), False
  try:
    for results in _stream(job, decoder, job.prompts, seed=job.args.seed):
      meter.look(results)
      _write(text.feed(results[0].tokens))
  except KeyboardInterrupt:
    interrupted = True
  _write(text.finish() + "\n")
  return interrupted


def write_lines(job: Job, decoder: Decoder, meter: _Meter) -> bool:
  """Writes a JSON line a continuation; whether it was interrupted."""
  size, said = min(job.args.batch_size, len(job.prompts)), meter.start
  for start in range(0, len(job.prompts), size):
    rows = job.prompts[start : start + size]
    # A batch that is not full would be compiled for anew.
    full = rows + rows[-1:] * (size - len(rows))
    count, results, interrupted = len(rows) * job.args.num_samples, [], False
    meter.next_batch()
    try:
      for some in _stream(
        job,
        decoder,
        full,
        seed=job.args.seed,
        first_row=start,
        num_samples=job.args.num_samples,
      ):
        results = some[:count]
        meter.look(results)
        if all(_is_finished(job, result) for result in results):
          break
        if time.perf_counter() - said > _PROGRESS_SECONDS:
          _say_progress(job, start, results, meter)
          said = time.perf_counter()
    except KeyboardInterrupt:
      interrupted = True
    _write("".join(_line(job, start, result) for result in results))
    if interrupted:
      return True
    if start + size < len(job.prompts):
      _say_progress(job, start, results, meter)
      said = time.perf_counter()
  return False


def _is_finished(job: Job, result: Generation) -> bool:
  return result.stopped or len(result.tokens) == job.max_new_tokens


def _line(job: Job, start: int, result: Generation) -> str:
  values = {
    "prompt": job.texts[start + result.prompt],
    "sample": result.sample,
    "text": decode(job.tokenizer, result.tokens),
    "tokens": result.tokens,
    "stopped": result.stopped,
  }
  if not _is_finished(job, result):
    values["interrupted"] = True
  return json.dumps(values, ensure_ascii=False) + "\n"


def _say_progress(job: Job, start: int, results, meter: _Meter) -> None:
  samples, total = job.args.num_samples, len(job.prompts)
  most = job.max_new_tokens
  shares = [1.0 if r.stopped else len(r.tokens) / most for r in results]
  done = start + sum(_is_finished(job, r) for r in results) // samples
  share = (start + sum(shares) / samples) / total
  seconds = meter.seconds
  text = f"{done} of {total} prompts, {meter.tokens} tokens, {seconds:.0f} s"
  if share:
    text += f"; about {seconds * (1 / share - 1):.0f} s left"
  cli.say(text)


def _write(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


def _run(argv: Sequence[str] | None) -> int:
  job = prepare(_parser().parse_args(argv))
  decoder, meter = load(job), _Meter()
  one = len(job.prompts) == job.args.num_samples == 1
  streams = one and job.args.prompts is None
  interrupted = (stream_text if streams else write_lines)(job, decoder, meter)
  cli.say(f"interrupted: {meter}" if interrupted else str(meter))
  return 130 if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return cli.guard(lambda: _run(argv))


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")
  sys.exit(main())
