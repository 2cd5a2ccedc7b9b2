"""The model class of lm-evaluation-harness: any of its tasks, with any funnel.

To import this module registers the model "gemma_funnel". Needs the extra
"lm-eval".
"""

from collections.abc import Sequence
import inspect
from typing import Any

try:
  from lm_eval import utils
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise ImportError(
    "lm_eval is missing: expected pip install 'gemma-funnel[lm-eval]'"
  ) from error
from ml_collections import config_dict

from gemma_funnel.checks import require, require_int
from gemma_funnel.decode.sampling import Sampling
from gemma_funnel.evaluation import load_for_eval
from gemma_funnel.evaluation.scoring import (
  Limits,
  Scorer,
  bucket_lengths,
  encode_pair,
)

NAME = "gemma_funnel"
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model(NAME)
class GemmaFunnel(LM):
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
    """Loads a model; raises ValueError where an argument cannot be.

    Args:
      checkpoint: a training run, or whatever `gemma_funnel.load` reads.
      funnel: None is as trained, "off" is none; "/" may stand for ",", which
        ends an argument of lm_eval's.
      tokenizer: a file, where the checkpoint has none.
      dtype: None is as trained for a run, and float32 for other checkpoints.
      batch_size: rows of a pass.
      max_length: tokens of a pass at most; None is the model's max_length.
      max_gen_toks: tokens to generate where a task does not say.
      seed: of what is drawn where a task wants samples.
      max_batch_size, device: lm_eval's; the first must be None, the second,
        which its command always gives, is unused.
    """
    super().__init__()
    del device
    require(
      max_batch_size is None,
      f"max_batch_size={max_batch_size!r}: expected none",
    )
    batch_size = _int("batch_size", batch_size)
    self.max_gen_toks = _int("max_gen_toks", max_gen_toks)
    loaded = load_for_eval.load(
      config_dict.create(checkpoint=checkpoint, tokenizer=tokenizer), (), dtype
    )
    model = load_for_eval.on_this_device(loaded.model)
    if funnel is not None:
      model = model.with_funnel(str(funnel).replace("/", ","))
    longest = model.config.max_length
    if max_length is not None:
      max_length = _int("max_length", max_length)
      require_int("max_length", max_length, 2, longest)
    lengths = bucket_lengths(max_length or longest)
    tokenizer = loaded.load_tokenizer()
    self.scorer = Scorer(model, tokenizer, batch_size, lengths, seed)

  @classmethod
  def create_from_arg_obj(
    cls,
    arg_dict: dict[str, Any],
    additional_config: dict[str, Any] | None = None,
  ) -> "GemmaFunnel":
    """From --model_args, which say more than the defaults of other flags."""
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(arg_dict) - set(known))
    require(
      not unknown, f"--model_args has {unknown}: expected some of {known}"
    )
    others = {k: v for k, v in (additional_config or {}).items() if v}
    return cls(**others | arg_dict)

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict[str, Any] | None = None
  ) -> "GemmaFunnel":
    """As `create_from_arg_obj`, from "key=value,key=value"."""
    given = utils.simple_parse_args_string(arg_string)
    return cls.create_from_arg_obj(given, additional_config)

  @property
  def tokenizer_name(self) -> str:
    """Tells caches of requests apart."""
    return self.scorer.tokenizer.name

  def _cache(self, kind: str, requests: Sequence[Any], found: list[Any]):
    """The answers, after lm_eval's cache has got them."""
    for request, answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial(kind, request.args, answer)
    return found

  def loglikelihood(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Log-likelihoods of continuations, in nats, and whether they are greedy."""
    scores = self.scorer.loglikelihood(
      [encode_pair(self.scorer.tokenizer, *r.args) for r in requests]
    )
    found = [(s.log_likelihood, s.is_greedy) for s in scores]
    return self._cache("loglikelihood", requests, found)

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-likelihoods of whole texts, in nats, by windows."""
    texts = [self.scorer.tokenizer.encode(r.args[0]) for r in requests]
    found = self.scorer.rolling(texts)
    return self._cache("loglikelihood_rolling", requests, found)

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations up to EOS or a stop string."""
    tokenizer = self.scorer.tokenizer
    bos, encode = tokenizer.bos_id, tokenizer.encode
    given = [_limits(r.args[1], self.max_gen_toks) for r in requests]
    texts = [""] * len(requests)
    for limits in dict.fromkeys(given):
      numbers = [n for n, other in enumerate(given) if other == limits]
      same = [requests[n] for n in numbers]
      prompts = [[bos, *encode(r.args[0])] for r in same]
      found = self.scorer.generate_until(prompts, limits)
      if limits.sampling.temperature == 0:
        self._cache("generate_until", same, found)
      for number, text in zip(numbers, found, strict=True):
        texts[number] = text
    return texts


def _int(name: str, value: Any) -> int:
  """An integer of at least 1, which lm_eval may give as a text."""
  if isinstance(value, str) and value.isdecimal():
    value = int(value)
  require_int(name, value, 1)
  return value


def _limits(given: dict[str, Any], default: int) -> Limits:
  """Of a request's arguments, with `default` new tokens unless they say.

  As lm_eval's `normalize_gen_kwargs`: greedy unless `do_sample`, or a
  temperature above 0 without it.
  """
  given = dict(given)
  until = given.pop("until", None) or ()
  stop = (until,) if isinstance(until, str) else tuple(until)
  counts = [given.pop(name, None) for name in _COUNTS]
  count = next((n for n in counts if n is not None), default)
  do_sample = given.pop("do_sample", None)
  temperature = given.pop("temperature", None)
  if do_sample is None:
    do_sample = bool(temperature)
  filters = {name: given.pop(name) for name in _FILTERS if name in given}
  require(
    not given,
    f"generation_kwargs {sorted(given)} are not known: expected until, "
    "max_gen_toks, do_sample, temperature, top_k, top_p, min_p or "
    "repetition_penalty",
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
  count = _int("max_gen_toks", count)
  return Limits(count, tuple(s for s in stop if s), sampling)
