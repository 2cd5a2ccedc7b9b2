"""lm-evaluation-harness with our model: its numbers against our own.

Without lm_eval, which is an extra, a stub of what the adapter imports stands in
for it, and tests that need all of it are skipped.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
from tiny_language_model import make_model, train_tokenizer

from gemma_funnel.data.tokenizer import BOS_ID
from gemma_funnel.decode.sampling import GREEDY, Sampling
from gemma_funnel.evaluation import generative, load_for_eval, scoring
from gemma_funnel.evaluation.scoring import Limits, Scorer
from gemma_funnel.tasks.task import (
  ChoiceExample,
  Document,
  GenerationExample,
  Task,
)

REAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not REAL, reason="lm_eval is not installed")
# What lm_eval and its dependencies warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")
STUB = {
  "__init__": "",
  "__main__": """
import sys
from lm_eval.api import registry
def cli_evaluate():
  print(*sys.argv, *registry.MODELS)
""",
  "utils": "",
  "api/__init__": "",
  "api/model": """
class LM:
  def __init__(self):
    self.cache_hook = self
    self.cached = []
  def add_partial(self, *entry):
    self.cached.append(entry)
""",
  "api/registry": """
MODELS = {}
def register_model(name):
  assert name not in MODELS, f"{name} is registered twice"
  return lambda cls: MODELS.setdefault(name, cls)
""",
}
FUNNEL = "start=1,stride=2"
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
def stub(tmp_path_factory):
  """The folder of a package lm_eval that only says what it is asked."""
  folder = tmp_path_factory.mktemp("stub")
  for name, text in STUB.items():
    path = folder / "lm_eval" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


@pytest.fixture(scope="module")
def adapter(stub):
  """The module of the adapter, on lm_eval or the stub."""
  name = "gemma_funnel.evaluation.lm_eval_model"
  before = set(sys.modules)
  with pytest.MonkeyPatch.context() as patch:
    for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
      patch.setenv(key, "1")  # Nothing here is on a hub.
    if not REAL:
      patch.syspath_prepend(str(stub))
    yield importlib.import_module(name)
  if not REAL:
    for module in set(sys.modules) - before:
      if module.startswith("lm_eval") or "gemma_funnel.evaluation" in module:
        del sys.modules[module]


@pytest.fixture(scope="module")
def model():
  return make_model(64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def load(adapter, model, tokenizer, monkeypatch):
  """Makes an adapter; the checkpoint is the model here."""
  loaded = load_for_eval.EvalModel("x", model, tokenizer.name)
  monkeypatch.setattr(load_for_eval, "load", lambda *a: loaded)
  return lambda **args: adapter.GemmaFunnel("x", **args)


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


@needs_lm_eval
def test_numbers_of_lm_eval_are_those_of_our_own(
  load, model, tokenizer, tmp_path, monkeypatch
):
  import lm_eval
  from lm_eval.tasks import TaskManager

  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  lm = load(funnel=FUNNEL.replace(",", "/"), batch_size=3)
  model = model.with_funnel(FUNNEL)
  texts = Scorer(model, tokenizer, 3).generate_until(
    [[BOS_ID, *tokenizer.encode(p)] for p in PROMPTS], Limits(NEW)
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


@needs_lm_eval
def test_the_pairs_and_windows_are_lm_eval_s(tokenizer):
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM

  def tok_encode(text, **_):
    return [BOS_ID, *tokenizer.encode(text)]

  plain = types.SimpleNamespace(tok_encode=tok_encode, backend="causal")
  for context, text in [("one two", " three"), ("a cat  ", "sat"), ("é", "x")]:
    theirs = TemplateLM._encode_pair(plain, context, text)
    assert scoring.encode_pair(tokenizer, context, text) == theirs
  for length in (2, 5, 9):
    for count in range(1, 30):
      ids = list(range(10, 10 + count))
      windows = utils.get_rolling_token_windows(ids, BOS_ID, length - 1, 1)
      for number, (window, mine) in enumerate(
        zip(windows, scoring.windows(ids, length), strict=True)
      ):
        context, rest = utils.make_disjoint_window(window)
        assert mine == ([BOS_ID] * (number > 0) + context, rest)


def request(*args):
  return types.SimpleNamespace(args=args)


def test_it_answers_as_our_own_tasks_do(load, model, tokenizer):
  lm = load(funnel=FUNNEL.replace(",", "/"), batch_size="3")
  model = model.with_funnel(FUNNEL)
  settings = generative.Settings(batch_size=3, prompt_format="{prompt} ")
  task = Task(
    "t",
    "choice",
    (),
    (),
    {
      "test": tuple(
        ChoiceExample(r["q"], tuple(r["choices"]), r["answer"]) for r in CHOICES
      )
    },
  )
  for row, record in zip(
    CHOICES, generative.predict(task, model, tokenizer, settings), strict=True
  ):
    asked = [request(f"{row['q']} ", choice) for choice in row["choices"]]
    found = lm.loglikelihood(asked)
    likelihoods = [likelihood for likelihood, _ in found]
    assert likelihoods == pytest.approx(record["log_likelihoods"], rel=1e-5)
  asked = [request(text) for text in TEXTS]
  assert lm.loglikelihood_rolling(asked) == Scorer(model, None, 3).rolling(
    [tokenizer.encode(text) for text in TEXTS]
  )
  if not REAL:
    kinds = ["loglikelihood"] * 11 + ["loglikelihood_rolling"] * 3
    assert [kind for kind, *_ in lm.cached] == kinds
    assert lm.cached[0][1] == ("one two ", "three")


def test_generation_takes_the_task_s_arguments(load):
  lm = load(batch_size="2")
  generate = lambda *options: lm.generate_until(
    [request("one two", given) for given in options]
  )
  whole, short, cut = generate(
    dict(max_gen_toks=10),
    dict(max_gen_toks=2, until=None),
    dict(max_gen_toks=10, until=["q", "w"]),
  )
  assert whole.startswith(short) and len(short) < len(whole)
  assert cut == whole.split("q")[0].split("w")[0]
  draw = dict(max_gen_toks=10, do_sample=True, temperature=5.0)
  one, two = generate(draw, draw)
  assert one != two
  if not REAL:
    assert [answer for *_, answer in lm.cached] == [whole, short, cut]
  with pytest.raises(ValueError, match=r"\['num_beams'\] are not known"):
    generate(dict(num_beams=2))


@pytest.mark.parametrize(
  "given, limits",
  [
    ({}, Limits(9)),
    (dict(until="a", max_new_tokens=3), Limits(3, ("a",))),
    (dict(do_sample=False, temperature=0.7, top_p=0.9), Limits(9)),
    (
      dict(temperature=0.7, top_p=0.9),
      Limits(9, sampling=Sampling(0.7, top_p=0.9)),
    ),
    (dict(do_sample=True), Limits(9, sampling=Sampling(1.0))),
    (dict(do_sample=True, top_k=0), Limits(9, sampling=Sampling(1.0))),
    (dict(do_sample=True, temperature=0.0), Limits(9, (), GREEDY)),
  ],
)
def test_arguments_of_generation(adapter, given, limits):
  assert adapter._limits(given, 9) == limits


@pytest.mark.parametrize(
  "args, message",
  [
    (dict(batch_size="auto"), "batch_size='auto': expected an integer >= 1"),
    (dict(max_length=65), "max_length=65: expected an integer from 2 to 64"),
    (dict(max_batch_size=64), "max_batch_size=64: expected none"),
    (dict(funnel="start=1/recover=none"), "recover='none'.*log-likelihoods"),
    (dict(funnel="half"), "half"),
  ],
)
def test_mistakes_are_named(load, args, message):
  with pytest.raises(ValueError, match=message):
    load(**args)


@needs_lm_eval
def test_the_command(adapter, model, tokenizer, tmp_path, monkeypatch, capsys):
  from gemma_funnel.evaluation import harness

  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  seen = []

  def read(config, needs, dtype):
    seen.append((config.checkpoint, dtype))
    return load_for_eval.EvalModel("x", model, tokenizer.name)

  monkeypatch.setattr(load_for_eval, "load", read)
  write_task(tmp_path, "gf_choice", CHOICES, "multiple_choice", CHOICE_YAML)
  before = list(sys.argv)
  status = harness.main(
    [
      "--model_args=checkpoint=DIR,funnel=start=1/stride=2,dtype=float32,"
      "batch_size=3",
      "--tasks=gf_choice",
      f"--include_path={tmp_path}",
      "--batch_size=4",
    ]
  )
  assert status == 0 and sys.argv == before
  assert seen == [("DIR", "float32")]
  out = capsys.readouterr().out
  assert "gf_choice" in out and "acc_bytes" in out
  for flag, said in (
    ("--tasks=nowhere", "Tasks not found: nowhere"),
    (
      "--model_args=checkpoint=DIR,funnels=off",
      r"--model_args has ['funnels']",
    ),
  ):
    flags = ["--tasks=gf_choice", f"--include_path={tmp_path}", flag]
    assert harness.main(flags) == 2
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv, status, said",
  [
    (
      ["--tasks=x"],
      0,
      "run --model=gemma_funnel --batch_size=8 --tasks=x gemma_funnel",
    ),
    (["--model=hf"], 2, "error: --model: expected none, it is gemma_funnel"),
  ],
)
def test_the_command_registers_the_model_once(stub, argv, status, said):
  # The stub refuses a second registration, as lm_eval does.
  path = os.pathsep.join([str(stub), os.environ.get("PYTHONPATH", "")])
  done = subprocess.run(
    [sys.executable, "-m", "gemma_funnel.evaluation.harness", *argv],
    env={**os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, said in done.stdout + done.stderr) == (status, True)


@pytest.mark.parametrize(
  ("flag", "status", "said"),
  [
    ("--tasks=x", 2, "error: lm_eval is missing"),
    ("--help", 0, "--model_args"),
  ],
)
def test_the_command_without_lm_eval(flag, status, said, tmp_path):
  (tmp_path / "lm_eval.py").write_text("raise ImportError")
  path = os.pathsep.join([str(tmp_path), *sys.path])
  done = subprocess.run(
    [sys.executable, "-m", "gemma_funnel.evaluation.harness", flag],
    env={**os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == status and done.stderr.count("\n") == (status == 2)
  assert said in done.stdout + done.stderr


def test_a_checkpoint_that_is_not_there(adapter, tmp_path):
  with pytest.raises(ValueError, match="checkpoint=.*nowhere' is not there"):
    adapter.GemmaFunnel(str(tmp_path / "nowhere"))
