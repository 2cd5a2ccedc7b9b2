"""lm-evaluation-harness with our model: its numbers against our own."""

import dataclasses
import json
import os
import sys

import pytest

# Before lm_eval is imported: nothing here is on a hub.
for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
  os.environ[name] = "1"
lm_eval = pytest.importorskip("lm_eval")

from flax import nnx  # noqa: E402
from lm_eval import utils  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gemma_funnel.config import TransformerConfig  # noqa: E402
from gemma_funnel.data import sources  # noqa: E402
from gemma_funnel.data import tokenizer as tokenizer_lib  # noqa: E402
from gemma_funnel.data.tokenizer import BOS_ID  # noqa: E402
from gemma_funnel.decode.sampling import GREEDY, Sampling  # noqa: E402
from gemma_funnel.evaluation import generative, harness, scoring  # noqa: E402
from gemma_funnel.evaluation import subject as subject_lib  # noqa: E402
from gemma_funnel.model import Transformer  # noqa: E402
from gemma_funnel.tasks.task import (  # noqa: E402
  ChoiceExample,
  Document,
  GenerationExample,
  Task,
)

# What lm_eval and its dependencies warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")
VOCAB = 300
FUNNEL = "start=1,stride=2"
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=2, vocab_size=VOCAB, max_length=64
)
CHOICES = [
  dict(q="one two", choices=["three", "four five six", "ü"], answer=0),
  dict(q="a cat", choices=["sat", "satsatsat"], answer=1),
  dict(q="red green ", choices=["blue", "grey"], answer=0),
  dict(q="", choices=["blue cat", "grey"], answer=1),
  dict(q="one two three " * 30, choices=["red", "a cat"], answer=1),
]
TEXTS = ["one two", "red grün blue " + "cat sat " * 60 + "six", "six"]
PROMPTS = ["one two", "a cat sat on", "red"]
NEW = 12
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
{rest}
"""


@pytest.fixture(scope="module")
def model():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for norm in (model.layers.post_attn_norm, model.layers.post_mlp_norm):
    norm.scale[...] = norm.scale[...] + 6
  return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "t.model"
  words = "one two three four five six a cat sat red green blue grey"
  lines = [f"{w} {v}" for w in words.split() for v in words.split()]
  documents = [sources.Document(str(n), x) for n, x in enumerate(lines)]
  return tokenizer_lib.train(documents, VOCAB, path)


@pytest.fixture
def load(model, tokenizer, tmp_path, monkeypatch):
  """Makes an adapter; the checkpoint is the model here."""
  subject = subject_lib.Subject(model, tokenizer.name)
  monkeypatch.setattr(subject_lib, "load", lambda *a: subject)
  return lambda **args: harness.GemmaFunnel("x", **args)


def write_task(folder, name, rows, kind, rest):
  path = folder / f"{name}.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  text = YAML.format(name=name, path=path, kind=kind, rest=rest)
  (folder / f"{name}.yaml").write_text(text)


CHOICE_YAML = """
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""
GENERATION_YAML = f"""
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: {NEW}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TEXT_YAML = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def test_numbers_of_lm_eval_are_those_of_our_own(
  load, model, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  lm = load(funnel=FUNNEL.replace(",", "/"), batch_size=3)
  model = model.with_funnel(FUNNEL)
  texts = generative.continuations(
    model,
    tokenizer,
    [[BOS_ID, *tokenizer.encode(p)] for p in PROMPTS],
    stop=(),
    max_new_tokens=NEW,
    batch_size=3,
    longest=64,
  )
  answers = [texts[0], "no", texts[2]]
  rows = [dict(q=p, answer=a) for p, a in zip(PROMPTS, answers, strict=True)]
  write_task(tmp_path, "gf_choice", CHOICES, "multiple_choice", CHOICE_YAML)
  write_task(tmp_path, "gf_answer", rows, "generate_until", GENERATION_YAML)
  documents = [dict(text=text) for text in TEXTS]
  write_task(tmp_path, "gf_text", documents, "loglikelihood_rolling", TEXT_YAML)
  found = lm_eval.simple_evaluate(
    lm,
    tasks=["gf_choice", "gf_answer", "gf_text"],
    bootstrap_iters=0,
    task_manager=TaskManager(
      include_path=str(tmp_path), include_defaults=False
    ),
  )
  results, samples = found["results"], found["samples"]
  options = generative.Settings(
    batch_size=2, max_new_tokens=NEW, prompt_format="{prompt} "
  )

  def evaluate(kind, examples, **changes):
    task = Task("t", kind, (), (), {"test": tuple(examples)})
    settings = dataclasses.replace(options, **changes)
    records = generative.predict(task, model, tokenizer, settings)
    return generative.summarize(kind, records), records

  ours, records = evaluate(
    "choice",
    [ChoiceExample(r["q"], tuple(r["choices"]), r["answer"]) for r in CHOICES],
  )
  assert results["gf_choice"]["acc,none"] == ours["accuracy"]
  assert results["gf_choice"]["acc_bytes,none"] == ours["accuracy_norm"]
  assert 0 < ours["accuracy"] < 1
  for sample, record in zip(samples["gf_choice"], records, strict=True):
    scores = [score for score, _ in sample["filtered_resps"]]
    assert scores == pytest.approx(record["log_likelihoods"], rel=1e-5)
  ours, _ = evaluate("perplexity", map(Document, TEXTS))
  theirs = results["gf_text"]
  for key in ("word_perplexity", "bits_per_byte"):
    assert theirs[f"{key},none"] == pytest.approx(ours[key], rel=1e-5)
  examples = [
    GenerationExample(p, (a,)) for p, a in zip(PROMPTS, answers, strict=True)
  ]
  ours, records = evaluate("generation", examples, prompt_format="{prompt}")
  assert results["gf_answer"]["exact_match,none"] == pytest.approx(2 / 3)
  assert ours["exact_match"] == pytest.approx(2 / 3)
  for sample, record in zip(samples["gf_answer"], records, strict=True):
    assert sample["filtered_resps"] == [record["text"]]


def test_the_pairs_and_windows_are_lm_eval_s(load, tokenizer):
  lm = load()
  for context, text in [("one two", " three"), ("a cat  ", "sat"), ("é", "x")]:
    theirs = harness.TemplateLM._encode_pair(lm, context, text)
    assert lm._encode_pair(context, text) == theirs
  for length in (2, 5, 9):
    for count in range(1, 30):
      ids = list(range(10, 10 + count))
      windows = utils.get_rolling_token_windows(ids, BOS_ID, length - 1, 1)
      for number, (window, mine) in enumerate(
        zip(windows, scoring.windows(ids, length), strict=True)
      ):
        context, rest = utils.make_disjoint_window(window)
        assert mine == ([BOS_ID] * (number > 0) + context, rest)


def request(kind, *args):
  return Instance(kind, {}, args, 0)


def test_generation_takes_the_task_s_arguments(load):
  lm = load(batch_size="2")
  whole, short, cut = lm.generate_until(
    [
      request("generate_until", "one two", dict(max_gen_toks=10)),
      request("generate_until", "one two", dict(max_gen_toks=2, until=None)),
      request(
        "generate_until", "one two", dict(max_gen_toks=10, until=["q", "w"])
      ),
    ]
  )
  assert whole.startswith(short) and len(short) < len(whole)
  assert cut == whole.split("q")[0].split("w")[0]
  draw = dict(max_gen_toks=10, do_sample=True, temperature=5.0)
  one, two = lm.generate_until([request("generate_until", "one", draw)] * 2)
  assert one != two
  with pytest.raises(ValueError, match=r"\['num_beams'\] are not known"):
    lm.generate_until([request("generate_until", "one", dict(num_beams=2))])


@pytest.mark.parametrize(
  "given, stop, count, sampling",
  [
    ({}, (), 9, GREEDY),
    (dict(until="a", max_new_tokens=3), ("a",), 3, GREEDY),
    (dict(do_sample=False, temperature=0.7, top_p=0.9), (), 9, GREEDY),
    (dict(temperature=0.7, top_p=0.9), (), 9, Sampling(0.7, top_p=0.9)),
    (dict(do_sample=True), (), 9, Sampling(1.0)),
    (dict(do_sample=True, top_k=0), (), 9, Sampling(1.0)),
    (dict(do_sample=True, temperature=0.0), (), 9, GREEDY),
  ],
)
def test_arguments_of_generation(given, stop, count, sampling):
  assert harness._options(given, 9) == (stop, count, sampling)


@pytest.mark.parametrize(
  "args, message",
  [
    (dict(batch_size="auto"), "batch_size='auto': expected an integer >= 1"),
    (dict(max_length=65), "max_length=65: expected 2 to .*max_length=64"),
    (dict(max_batch_size=64), "max_batch_size=64: expected none"),
    (dict(funnel="start=1/recover=none"), "recover='none'.*lm_eval"),
    (dict(funnel="half"), "half"),
  ],
)
def test_mistakes_are_named(load, args, message):
  with pytest.raises(ValueError, match=message):
    load(**args)


def test_the_command(model, tokenizer, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  assert harness.main(["--model=hf", "--tasks=x"]) == 2
  assert "--model: expected none" in capsys.readouterr().err
  seen = []

  def read(config, needs, dtype):
    seen.append((config.checkpoint, dtype))
    return subject_lib.Subject(model, tokenizer.name)

  monkeypatch.setattr(subject_lib, "load", read)
  write_task(tmp_path, "gf_choice", CHOICES, "multiple_choice", CHOICE_YAML)
  before = list(sys.argv)
  status = harness.main(
    [
      "--model_args=checkpoint=DIR,funnel=start=1/stride=2,dtype=float32",
      "--tasks=gf_choice",
      f"--include_path={tmp_path}",
      "--batch_size=4",
    ]
  )
  assert status == 0 and sys.argv == before
  assert seen == [("DIR", "float32")]
  out = capsys.readouterr().out
  assert "gf_choice" in out and "acc_bytes" in out


def test_a_checkpoint_that_is_not_there(tmp_path):
  with pytest.raises(ValueError, match="checkpoint=.*nowhere' is not there"):
    harness.GemmaFunnel(str(tmp_path / "nowhere"))
