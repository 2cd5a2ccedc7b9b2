"""The model of lm-evaluation-harness: any of its tasks, with any funnel.

  python -m gemma_funnel.evaluation.harness --tasks=lambada_openai \
    --model_args=checkpoint=DIR,funnel=off,batch_size=8

All flags but --model are lm_eval's own, of its command `run`. Needs the extra
"lm-eval". Or import this module and name the model "gemma_funnel".

Keys of --model_args: checkpoint, funnel (with "/" for its commas, such as
start=2/stride=2), tokenizer, dtype, batch_size, max_length, max_gen_toks, seed.
"""

from collections.abc import Sequence
import sys
from typing import Any

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
except ImportError as error:
  _MISSING = "lm_eval is missing: expected pip install 'gemma-funnel[lm-eval]'"
  if __name__ == "__main__":
    sys.exit(f"error: {_MISSING}")
  raise ImportError(_MISSING) from error
from ml_collections import config_dict

from gemma_funnel import cli
from gemma_funnel.config import check_recovers
from gemma_funnel.data import tokenizer as tokenizer_lib
from gemma_funnel.data.tokenizer import BOS_ID, EOS_ID
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.evaluation import generative, scoring
from gemma_funnel.evaluation import subject as subject_lib

_NAME = "gemma_funnel"
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")


@register_model(_NAME)
class GemmaFunnel(TemplateLM):
  """A Gemma, with BOS before every text."""

  def __init__(
    self,
    checkpoint: str | None = None,
    funnel: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    seed: int = 0,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """Loads a model.

    Args:
      checkpoint: a training run, or whatever `gemma_funnel.load` reads.
      funnel: None is as trained, "off" is none; "/" may stand for ",", which
        ends an argument of lm_eval's.
      tokenizer: a file, where the checkpoint has none.
      dtype: None is as trained, and float32 for what is no training run.
      batch_size: rows of a pass; lm_eval may give it as a text.
      max_length: tokens of a pass at most; None is the model's max_length.
      max_gen_toks: tokens to generate where a task does not say.
      seed: of what is drawn where a task wants samples.
      max_batch_size: lm_eval's; only unset is possible.
      device: PyTorch's, which lm_eval's command names asked or not; JAX runs on
        its default device.

    Raises:
      ValueError: an argument out of range, or a checkpoint or funnel that
        cannot be used.
    """
    super().__init__()
    del device
    if max_batch_size is not None:
      raise ValueError(f"max_batch_size={max_batch_size!r}: expected none")
    self.batch_size = _count("batch_size", batch_size)
    self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
    self.seed = seed
    subject = subject_lib.load(
      config_dict.create(checkpoint=checkpoint, tokenizer=tokenizer), (), dtype
    )
    self.model = subject_lib.on_this_device(subject.model)
    if funnel is not None:
      self.model = self.model.with_funnel(funnel.replace("/", ","))
    check_recovers(self.model.stages, "lm_eval")
    longest, path = self.model.config.max_length, subject.tokenizer_path
    self.max_length = longest
    if max_length is not None:
      self.max_length = _count("max_length", max_length)
    if not 2 <= self.max_length <= longest:
      raise ValueError(
        f"max_length={max_length}: expected 2 to model.max_length={longest}"
      )
    self._tokenizer = tokenizer_lib.find_tokenizer(
      path, path, self.model.config.vocab_size
    )

  @property
  def eot_token_id(self) -> int:
    return EOS_ID

  @property
  def prefix_token_id(self) -> int:
    return BOS_ID

  @property
  def tokenizer_name(self) -> str:
    """What caches of requests are told apart by."""
    return self._tokenizer.name

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Token ids, BOS first unless `add_special_tokens` is False."""
    del kwargs
    ids = self._tokenizer.encode(string)
    return ids if add_special_tokens is False else [BOS_ID, *ids]

  def _encode_pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    """As lm_eval's own, but never an empty continuation."""
    return scoring.encode_pair(self._tokenizer, context, continuation)

  @property
  def _passes(self) -> dict[str, Any]:
    return dict(
      batch_size=self.batch_size,
      lengths=scoring.bucket_lengths(self.max_length),
    )

  def _loglikelihood_tokens(
    self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del disable_tqdm, kwargs
    pairs = [(context, continuation) for _, context, continuation in requests]
    scores = scoring.log_likelihoods(self.model, pairs, **self._passes)
    found = [(s.log_likelihood, s.is_greedy) for s in scores]
    for (texts, *_), answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return found

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-likelihoods of whole texts, in nats, by windows."""
    del disable_tqdm
    texts = [
      self.tok_encode(r.args[0], add_special_tokens=False) for r in requests
    ]
    totals = scoring.rolling(self.model, texts, **self._passes)
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations up to EOS or a stop string.

    Raises:
      ValueError: an argument of generation that is not known.
    """
    del disable_tqdm
    groups = {}
    for number, request in enumerate(requests):
      groups.setdefault(
        _options(request.args[1], self.max_gen_toks), []
      ).append(number)
    texts = [""] * len(requests)
    for (stop, max_new_tokens, sampling), numbers in groups.items():
      prompts = [self.tok_encode(requests[n].args[0]) for n in numbers]
      found = generative.continuations(
        self.model,
        self._tokenizer,
        prompts,
        stop=stop,
        max_new_tokens=max_new_tokens,
        batch_size=self.batch_size,
        longest=self.max_length,
        sampling=sampling,
        seed=self.seed,
      )
      for number, text in zip(numbers, found, strict=True):
        texts[number] = text
        if sampling.temperature == 0:
          args = requests[number].args
          self.cache_hook.add_partial("generate_until", args, text)
    return texts


def _count(name: str, value: Any) -> int:
  try:
    count = int(value)
  except (TypeError, ValueError):
    count = 0
  if count < 1 or isinstance(value, bool):
    raise ValueError(f"{name}={value!r}: expected an integer >= 1")
  return count


def _options(
  given: dict[str, Any], default: int
) -> tuple[tuple[str, ...], int, Sampling]:
  """(stop strings, max_new_tokens, sampling) of a request's arguments.

  As lm_eval's `normalize_gen_kwargs`: greedy unless `do_sample`, or a
  temperature above 0 without it.
  """
  given = dict(given)
  until = given.pop("until", None) or ()
  stop = (until,) if isinstance(until, str) else tuple(until)
  limits = [given.pop(name, None) for name in _LIMITS]
  limit = next((n for n in limits if n is not None), default)
  do_sample, temperature = (
    given.pop("do_sample", None),
    given.pop("temperature", None),
  )
  if do_sample is None:
    do_sample = bool(temperature)
  filters = {
    name: given.pop(name)
    for name in ("top_k", "top_p", "min_p", "repetition_penalty")
    if name in given
  }
  if given:
    raise ValueError(
      f"generation_kwargs {sorted(given)} are not known: expected until, "
      "max_gen_toks, do_sample, temperature, top_k, top_p, min_p or "
      "repetition_penalty"
    )
  if not do_sample:
    # Tasks often leave filters beside do_sample=false; greedy has none.
    penalty = filters.get("repetition_penalty", 1.0)
    sampling = Sampling(repetition_penalty=penalty)
  else:
    warmth = 1.0 if temperature is None else temperature
    if not filters.get("top_k", 1):
      filters["top_k"] = None  # 0 is all, as for transformers.
    sampling = Sampling(warmth, **filters) if warmth else Sampling()
  return tuple(s for s in stop if s), _count("max_gen_toks", limit), sampling


def _run(argv: Sequence[str]) -> int:
  from lm_eval.__main__ import cli_evaluate

  if any(flag.split("=")[0] in ("--model", "-M") for flag in argv):
    raise ValueError(f"--model: expected none, it is {_NAME}")
  before = sys.argv
  sys.argv = ["lm-eval", "run", f"--model={_NAME}", *argv]
  try:
    cli_evaluate()
  finally:
    sys.argv = before
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs lm_eval's command with this model; returns its exit status."""
  given = sys.argv[1:] if argv is None else list(argv)
  return cli.guard(lambda: _run(given))


if __name__ == "__main__":
  # Not as __main__: the class is registered once, under its own module.
  from gemma_funnel.evaluation import harness

  sys.exit(harness.main())
