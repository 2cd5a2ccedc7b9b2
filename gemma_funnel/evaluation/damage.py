"""What an untrained funnel does to a model, beside leaving out whole layers.

Bits per byte of texts, and the time of a pass to the hidden states, of the plain
model, with each funnel, and without as many consecutive layers as save about the
same FLOPs. Which those are is told by how little they turn the states (the block
influence of ShortGPT, arXiv 2403.03853, of a span as in arXiv 2403.17887).

Bits are of all tokens, or of the `continuation` at each window's end: the rest
is then a prompt, which is what FLOPs and times are of, and the continuation is
read token by token against the caches, as it would be generated. A funnel may
leave `start` and `threshold` open ("?"): the start that saves about so much as
each of `savings` is found, and the threshold that as many slots pass as one in
`stride`.
"""

from collections.abc import Mapping
import dataclasses
import functools
import inspect
import math
import os
import pathlib
import pkgutil
import re
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from gemma_funnel import cli, flops, weights
from gemma_funnel.checks import require, require_between, require_int
from gemma_funnel.config import OFF, FunnelConfig, check_recovers, parse_funnel
from gemma_funnel.data.packing import windows
from gemma_funnel.decode.decoder import Decoder, unstacked
from gemma_funnel.evaluation import funnels as funnels_lib
from gemma_funnel.evaluation import load_for_eval, report, timing
from gemma_funnel.evaluation.scoring import Scorer, bucket_lengths
from gemma_funnel.model import Transformer
from gemma_funnel.reducers import Boundary
from gemma_funnel.study import layer_similarity
from gemma_funnel.tasks import tables

KEYS = tuple(
  "checkpoint tokenizer dtype funnels text length max_bytes prompt new_tokens "
  "repeats warmup seed out continuation savings".split()
)
_TEXT = pathlib.Path(__file__).with_name("texts") / "middlemarch.txt"
_RECOVERS = "bits per byte"
# Prompts that are run at a time.
_ROWS = 8
# Points of a picture that are named each.
_LABELLED = 12

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A model that is measured, and what sets it apart."""

  name: str
  kind: str  # "plain", "funnel" or "skip".
  model: Transformer


def default_texts() -> dict[str, str]:
  """Docstrings of the standard library, and a chapter of Middlemarch (1871)."""
  names = ("argparse", "collections", "decimal", "email", "json", "logging")
  docs = []
  for name in names:
    module = pkgutil.resolve_name(name)
    docs += [inspect.getdoc(value) for value in vars(module).values()]
  docs = list(dict.fromkeys(text for text in docs if text and len(text) > 200))
  return {"docs": "\n\n".join(docs), "novel": _TEXT.read_text("utf-8")}


def least_influence(model: Transformer, tokens_BT, count: int) -> int:
  """Where `count` consecutive layers begin that turn the states least.

  By the mean cosine of the states before and after them; never the first layer,
  whose input is the embedding.
  """
  depth = model.config.num_layers
  segment_BT = np.ones(tokens_BT.shape, np.int32)
  found = layer_similarity.states(
    model.with_funnel(OFF), jnp.asarray(tokens_BT), segment_BT, True
  )
  after = [x for (_, _, at, _), x in sorted(found.items()) if at == "layer"]
  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in after]
  cosines = [
    float(jnp.mean(jnp.sum(unit[i - 1] * unit[i + count - 1], axis=-1)))
    for i in range(1, depth - count + 1)
  ]
  return 1 + int(np.argmax(cosines))


def _opened(plain: Transformer, funnel: str, saving, length, tokens_BT):
  """The funnel with what it leaves open filled in; None if it cannot save so.

  Of all starts the one whose saving is nearest, by at most 4 points.
  """
  config = plain.config
  saved = lambda text: flops.ideal_reduction(
    config, text, 1, length, head=False
  )
  if "start=?" in funnel:
    found = {}
    for start in range(1, config.num_layers):
      text = funnel.replace("start=?", f"start={start}")
      try:
        found[text] = saved(text.replace("threshold=?", "threshold=0"))
      except ValueError:  # Past its stop.
        continue
    funnel = min(found, key=lambda text: abs(found[text] - saving))
    if abs(found[funnel] - saving) > 0.04:
      return None
  if "threshold=?" in funnel:
    (stage,) = parse_funnel(funnel.replace("threshold=?", "threshold=0"))
    states = layer_similarity.states(
      plain, jnp.asarray(tokens_BT), np.ones(tokens_BT.shape, np.int32), True
    )
    entering = next(x for key, x in states.items() if key[1] == stage.start - 1)
    p_BT = Boundary(stage).probability(entering[:, :-1], entering[:, 1:])
    threshold = float(np.quantile(np.asarray(p_BT), 1 - 1 / stage.stride))
    funnel = funnel.replace("threshold=?", f"threshold={threshold:.5f}")
  return funnel


def _variants(model, funnels, savings, length: int, tokens_BT):
  """The plain model, and of each funnel it and layers left out in its stead."""
  config, plain = model.config, model.with_funnel(OFF)
  found = [Variant(OFF, "plain", plain)]
  kinds = {}
  for funnel in funnels:
    for saving in savings if "start=?" in funnel else (None,):
      opened = _opened(plain, funnel, saving, length, tokens_BT)
      if opened is None:
        cli.tell(f"{funnel}: no start saves about {saving:.0%}")
      else:
        kinds[opened] = re.sub(r"(start|threshold)=\?,?", "", funnel)
  named = funnels_lib.resolve_for(model, tuple(kinds), recovers=_RECOVERS)
  skips = {}
  for name, stages in named.items():
    if not stages:
      continue
    kind = kinds[name] if savings else "funnel"
    found.append(Variant(name, kind, model.with_funnel(stages)))
    saved = flops.ideal_reduction(config, stages, 1, length, head=False)
    count = max(1, round(saved * config.num_layers))
    if count < config.num_layers and count not in skips:
      skips[count] = least_influence(plain, tokens_BT, count)
  for count, start in sorted(skips.items()):
    kept = [*range(start), *range(start + count, config.num_layers)]
    skip = FunnelConfig(0, reduce="all", layers=tuple(kept))
    name = f"skip {start}:{start + count}"
    found.append(Variant(name, "skip", model.with_funnel(skip)))
  return found


def _encode(graphdef, params, tokens_BT):
  return nnx.merge(graphdef, params).encode(tokens_BT, causal=True)


def _nats(model, tokenizer, ids, length: int, continuation: int):
  """(log-likelihood, the tokens that it is of) of a text."""
  if not continuation:
    scorer = Scorer(model, tokenizer, 4, bucket_lengths(length))
    (log_likelihood,) = scorer.rolling([ids])
    return log_likelihood, ids
  tokens_BT = windows(tokenizer.bos_id, ids, length)
  decoder = Decoder(model, length)
  total = 0.0
  for n in range(0, len(tokens_BT), _ROWS):
    parts = np.split(tokens_BT[n : n + _ROWS], [-continuation], axis=1)
    total += float(decoder.log_likelihoods(*parts).sum())
  return total, tokens_BT[:, -continuation:].reshape(-1).tolist()


def measure(
  variants: list[Variant],
  tokenizer,
  texts: Mapping[str, str],
  length: int,
  protocol: timing.Protocol,
  continuation: int = 0,
) -> list[Row]:
  """A row for each variant; the first is what all are compared with."""
  ids = {name: tokenizer.encode(text) for name, text in texts.items()}
  rng = np.random.default_rng(protocol.seed)
  vocab_size = variants[0].model.config.vocab_size
  length_run = length - continuation
  tokens_BT = jnp.asarray(
    rng.integers(0, vocab_size, (1, length_run)), jnp.int32
  )
  shared = unstacked(variants[0].model) if continuation else None
  builders, rows = {}, []
  base = None
  for number, variant in enumerate(variants, 1):
    protocol.log(f"[{number}/{len(variants)}] {variant.name}")
    model = variant.model
    row: Row = {"variant": variant.name, "kind": variant.kind}
    for name, text in texts.items():
      scores = shared.with_funnel(model.stages) if continuation else model
      log_likelihood, scored = _nats(
        scores, tokenizer, ids[name], length, continuation
      )
      size = len(tokenizer.decode(scored).encode())
      size = size if continuation else len(text.encode())
      row[f"bits_{name}"] = -log_likelihood / math.log(2) / size
    cost = flops.forward(model.config, model.stages, 1, length_run, head=False)
    base = base or cost
    row["flops_saved"] = 1 - cost / base
    row["flops_saved_with_head"] = _saved_with_head(
      variants[0], model, length_run
    )
    rows.append(row)
    graphdef, params = nnx.split(model)
    builders[variant.name] = functools.partial(
      timing.compile_program,
      functools.partial(_encode, graphdef),
      params,
      tokens_BT,
    )
  protocol.log("times of a pass, interleaved")
  first = variants[0].name
  times = timing.measure_together(
    builders, dict.fromkeys(builders, first), protocol
  )
  for row in rows:
    row |= times[row["variant"]]
    for name in texts:
      plain = rows[0][f"bits_{name}"]
      row[f"damage_{name}"] = row[f"bits_{name}"] - plain
      row[f"loss_{name}"] = row[f"bits_{name}"] / plain - 1
  return rows


def _saved_with_head(plain: Variant, model: Transformer, length: int) -> float:
  cost = lambda m: flops.forward(m.config, m.stages, 1, length, head=True)
  return 1 - cost(model) / cost(plain.model)


def _columns(texts) -> tuple[report.Column, ...]:
  bits = [
    report.Column(f"bits_{name}", f"bits/byte, {name}", ".4f") for name in texts
  ]
  damages = [
    report.Column(f"damage_{name}", f"over plain, {name}", "+.4f")
    for name in texts
  ] + [report.percent(f"loss_{name}", f"loss, {name}") for name in texts]
  return report.columns(
    report.Column("variant", "variant"),
    *bits,
    *damages,
    report.percent("flops_saved", "layers' FLOPs saved"),
    report.percent("flops_saved_with_head", "with the head"),
    "latency_s",
    "spread",
    report.percent("reduction", "latency saved"),
    "error",
  )


def plot(rows) -> Any:
  """A figure: bits per byte lost against the time that is saved."""
  names = [key for key in rows[0] if key.startswith("damage_")]
  figure = report.new_figure(5.2 * len(names), 4.4)
  kinds = dict.fromkeys(row["kind"] for row in rows)
  marks = {
    kind: f"C{n % 10}{'osv^D'[n // 10 % 5]}"
    for n, kind in enumerate(k for k in kinds if k not in ("plain", "skip"))
  } | {"plain": "k*", "skip": "kx"}
  for axes, key in zip(
    figure.subplots(1, len(names), squeeze=False)[0], names, strict=True
  ):
    for kind, mark in ((kind, marks[kind]) for kind in kinds):
      own = [r for r in rows if r["kind"] == kind and r.get("latency_s")]
      x = [100 * (r["reduction"] or 0) for r in own]
      y = [r[key] for r in own]
      axes.plot(x, y, mark, label=kind)
      for row, at in zip(own, zip(x, y, strict=True), strict=True):
        # Of a funnel, its layers are enough.
        label = re.sub(r"start=(\d+),stop=(\d+).*", r"\1:\2", row["variant"])
        label = label if len(rows) <= _LABELLED else ""
        style = dict(textcoords="offset points", fontsize=8)
        axes.annotate(label, at, (5, 4), **style)
    axes.set_xlabel("latency saved, % (hidden states)")
    axes.set_ylabel("bits per byte lost")
    axes.set_title(key.removeprefix("damage_"))
    axes.margins(x=0.25, y=0.12)
  figure.axes[0].legend(fontsize=8)
  return figure


def _texts(config: Any) -> dict[str, str]:
  found = default_texts()
  if config.text is not None:
    found = {"text": tables.read_text(config.text)}
  cut = {}
  for name, text in found.items():
    kept = text.encode()[: config.max_bytes].decode(errors="ignore")
    require(bool(kept.strip()), f"text {name} is empty: expected some")
    cut[name] = kept
  return cut


def run(config: Any) -> list[Row]:
  """Measures, prints a continuation, and writes damage.json, .md and .png.

  Raises:
    ValueError: a key that is missing or out of range, no checkpoint, a funnel
      that does not fit.
  """
  for key, least in (("length", 2), ("max_bytes", 1), ("new_tokens", 0)):
    require_int(key, config[key], least)
  require_int("continuation", config.continuation, 0, config.length - 2)
  for saving in config.savings:
    require_between("savings", saving, 0, 1, open=True)
  protocol = timing.Protocol(config.repeats, config.warmup, config.seed)
  tried = [f.replace("start=?", "start=1") for f in config.funnels]
  tried = [f.replace("threshold=?", "threshold=0") for f in tried]
  funnels_lib.resolve(
    tried, own=(), recovers=_RECOVERS, trains=not config.continuation
  )
  require(
    bool(config.savings) or "?" not in "".join(config.funnels),
    "savings=(): expected such as (0.25, 0.45) for funnels with start=?",
  )
  texts = _texts(config)
  out = config.out or os.path.join("runs", f"damage_{config.checkpoint}")
  report.claim(out, "damage")
  name = config.checkpoint
  with config.unlocked():
    config.checkpoint = weights.find(config.checkpoint)
  loaded = load_for_eval.load(config, dtype=config.dtype)
  model, tokenizer = loaded.model, loaded.load_tokenizer()
  longest = model.config.max_length
  require_int("length", config.length, 2, longest)
  check_recovers(model.stages, _RECOVERS)
  if config.new_tokens:
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    decoder = Decoder(model.with_funnel(OFF), len(prompt) + config.new_tokens)
    (found,) = decoder.generate([prompt], max_new_tokens=config.new_tokens)
    cli.tell(f"{config.prompt}|{tokenizer.decode(found.tokens)}")
  ids = tokenizer.encode(next(iter(texts.values())))[: config.length - 1]
  tokens_BT = np.asarray([[tokenizer.bos_id, *ids]], np.int32)
  prompt = config.length - config.continuation
  variants = _variants(model, config.funnels, config.savings, prompt, tokens_BT)
  rows = measure(
    variants, tokenizer, texts, config.length, protocol, config.continuation
  )
  ends = f", the last {config.continuation} tokens of each"
  sizes = ", ".join(f"{len(t.encode()):,} of {n}" for n, t in texts.items())
  report.write(
    out,
    "damage",
    rows,
    _columns(texts),
    f"Untrained funnels, and layers left out: {name}",
    plot,
    settings={**loaded.settings(), "checkpoint": name, "texts": sorted(texts)},
    notes=[
      f"Bytes: {sizes}, in windows of {config.length} tokens"
      f"{ends if config.continuation else ''}. Nothing was trained with a "
      f"funnel. FLOPs and times: hidden states of one row of {prompt} tokens; "
      f"times are medians of {config.repeats} interleaved rounds."
    ],
  )
  return rows
