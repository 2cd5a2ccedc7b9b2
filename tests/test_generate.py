"""The command that generates: text, JSON lines, mistakes, interruptions."""

import functools
import io
import json
import os
import random
import re
import signal
import subprocess
import sys

from flax import nnx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
import tiny_run

from gemma_funnel import convert, generate
from gemma_funnel.config import TransformerConfig
from gemma_funnel.data import pipeline
from gemma_funnel.data.tokenizer import BOS_ID, Tokenizer
from gemma_funnel.decode.decoder import Decoder, Generation
from gemma_funnel.decode.sampling import GREEDY, Sampling
from gemma_funnel.model import Transformer
from gemma_funnel.training import checkpoint as checkpoint_lib
from gemma_funnel.training import workdir

VOCAB = 320
TRAINED = "start=1,stride=2"
LENGTH = 1 << 15
CACHE = 48
OTHER = "start=0,stop=1,stride=3"
CONFIG = TransformerConfig.preset(
  "tiny", num_layers=2, vocab_size=VOCAB, max_length=LENGTH
)
EMOJI = "🎉"


def _loud(model: Transformer) -> Transformer:
  """The model with layers that matter: fresh ones repeat the last token."""
  for norm in (model.layers.post_attn_norm, model.layers.post_mlp_norm):
    norm.scale[...] = norm.scale[...] + 6
  return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder of a run that has not learned anything."""
  folder = tmp_path_factory.mktemp("run")
  data = pipeline.default_config()
  data.source = tiny_run.write_corpus(folder)
  config = tiny_run.make_config(
    folder, data.source, funnel=TRAINED, model__vocab_size=VOCAB
  )
  config.model.update(CONFIG.to_dict())
  workdir.init_workdir(config)
  corpus = pipeline.load_corpus(data, VOCAB, folder)
  sizes = dict(batch_size=4, length=32, segment_alignment=2, seed=0)
  batches = pipeline.train_iterator(corpus.train, corpus.tokenizer, **sizes)
  next(batches)
  model = _loud(Transformer(CONFIG, TRAINED, rngs=nnx.Rngs(0)))
  with checkpoint_lib.Checkpoints(folder) as checkpoints:
    params = nnx.to_pure_dict(nnx.state(model))
    state = {"params": params, "opt_state": {"x": np.zeros(1)}}
    checkpoints.save(7, state, {"data": batches.get_state()}, config)
    checkpoints.wait()
  return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
  return Tokenizer.load(folder / "tokenizer.model")


@functools.cache
def _decoder(path, funnel, cache_length):
  return Decoder(convert.load(path, funnel), cache_length)


@pytest.fixture
def decoder(folder):
  return _decoder(str(folder), None, CACHE)


@pytest.fixture
def command(folder, monkeypatch, capsys):
  """main() of a run in this process: (status, stdout, stderr).

  Weights are read and programs compiled once for all tests.
  """

  def load(request):
    return _decoder(request.checkpoint, request.funnel, request.cache_length)

  def call(*flags, checkpoint=folder, quick=True):
    if quick:
      monkeypatch.setattr(generate, "load", load)
      flags = (f"--cache_length={CACHE}", *flags)
    capsys.readouterr()
    status = generate.main([f"--checkpoint={checkpoint}", *flags])
    said = capsys.readouterr()
    return status, said.out, said.err

  return call


def _lines(out: str) -> list[dict]:
  return [json.loads(line) for line in out.splitlines()]


def _write_prompts(folder, *texts):
  path = folder / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
  return path


# --- Text as it comes -----------------------------------------------------


def test_text_streams(command, decoder, tokenizer, monkeypatch):
  pieces, write = [], generate._write
  monkeypatch.setattr(
    generate, "_write", lambda text: (pieces.append(text), write(text))
  )
  flags = ("--prompt=abc de", "--temperature=1", "--seed=5", "--chunk=3")
  status, out, err = command(*flags, "--max_new_tokens=30", "--stop_id=0")
  options = dict(max_new_tokens=30, sampling=Sampling(1.0), stop_ids=[0])
  prompt = [BOS_ID, *tokenizer.encode("abc de")]
  (whole,) = decoder.generate([prompt], seed=5, **options)
  assert len(whole.tokens) == 30
  assert status == 0
  assert out == tokenizer.decode(whole.tokens) + "\n" == "".join(pieces)
  assert len([piece for piece in pieces if piece]) > 5
  assert re.fullmatch(
    r"30 tokens in .* s; the first after .* s, compiling included; "
    r"then .* tokens/s\n",
    err,
  )


def test_a_character_comes_when_it_is_whole(tokenizer):
  ids = tokenizer.encode(f"a{EMOJI}é")
  assert len(ids) == 1 + 4 + 2
  text = generate.Detokenizer(tokenizer)
  given = [text.feed(ids[: n + 1]) for n in range(len(ids))]
  assert given == ["a", "", "", "", EMOJI, "", "é"]
  assert text.finish() == ""
  # One that is cut off comes at the end.
  text = generate.Detokenizer(tokenizer)
  assert [text.feed(ids[:4]), text.feed(ids[:4])] == ["a", ""]
  assert "a" + text.finish() == tokenizer.decode(ids[:4])
  # Bytes that are no text do not hold up the rest.
  text, given = generate.Detokenizer(tokenizer), 0
  for n in range(1, 20):
    given += len(text.feed([ids[1]] * n))
    assert given == max(0, n - 3)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_up_the_whole(seed, tokenizer):
  draw = random.Random(seed)
  if seed % 2:
    ids = draw.choices(range(VOCAB), k=60)
  else:
    letters = f"ab {EMOJI}é\u2581漢\ufffd\n"
    ids = tokenizer.encode("".join(draw.choices(letters, k=30)))
  text, pieces, end = generate.Detokenizer(tokenizer), [], 0
  while end < len(ids):
    end = min(len(ids), end + draw.randrange(5))
    pieces.append(text.feed(ids[:end]))
  pieces.append(text.finish())
  assert "".join(pieces) == tokenizer.decode(ids)


def test_ids_without_a_piece_have_no_text(tokenizer):
  ids = [VOCAB, *tokenizer.encode("ab"), VOCAB + 7]
  assert generate.Detokenizer(tokenizer).feed(ids) == "ab"


# --- What is generated ----------------------------------------------------


def _greedy(model, prompt, count):
  """Token after token by the one-pass forward."""
  tokens = list(prompt)
  for _ in range(count):
    padded = tokens + [0] * (CACHE - len(tokens))
    segment = (np.arange(CACHE) < len(tokens)).astype(np.int32)
    logits_BTV = model(jnp.asarray([padded]), segment[None])
    tokens.append(int(jnp.argmax(logits_BTV[0, len(tokens) - 1])))
  return tokens[len(prompt) :]


@pytest.mark.parametrize("funnel", [None, "off", OTHER])
def test_greedy_is_the_one_pass_forward(funnel, command, folder, tokenizer):
  texts = ["abc", f"bcd{EMOJI} lm", "m"]
  flags = [f"--prompt={text}" for text in texts]
  if funnel:
    flags.append(f"--funnel={funnel}")
  flags += "--max_new_tokens=6 --batch_size=2 --stop_id=0".split()
  status, out, err = command(*flags)
  assert status == 0
  assert re.match(r"2 of 3 prompts, 12 tokens, \d+ s; about \d+ s left\n", err)
  assert "\n18 tokens in" in err
  lines, model = _lines(out), convert.load(folder, funnel)
  for text, line in zip(texts, lines, strict=True):
    tokens = _greedy(model, [BOS_ID, *tokenizer.encode(text)], 6)
    expected = dict(prompt=text, sample=0, tokens=tokens, stopped=False)
    assert line == expected | {"text": tokenizer.decode(tokens)}
  assert len({tuple(line["tokens"]) for line in lines}) == 3


def test_funnels_differ(command):
  flags = ("--prompt=abc", "--prompt=m", "--max_new_tokens=8", "--stop_id=0")
  outs = {
    command(*flags, *funnel)[1]
    for funnel in ([], ["--funnel=off"], [f"--funnel={OTHER}"])
  }
  assert len(outs) == 3


def test_a_stop_id_ends_a_continuation(command):
  flags = ("--prompt=abc", "--prompt=m", "--max_new_tokens=8")
  _, out, _ = command(*flags, "--stop_id=0")
  tokens = _lines(out)[0]["tokens"]
  stop = tokens[4]
  at = tokens.index(stop)
  assert at > 0
  _, out, err = command(*flags, f"--stop_id={stop}")
  first, _ = _lines(out)
  assert first["tokens"] == tokens[:at]
  assert first["stopped"] is True
  count = sum(len(r["tokens"]) + r["stopped"] for r in _lines(out))
  assert f"{count} tokens in" in err


def test_prompts_of_a_file(command, tmp_path):
  path = _write_prompts(tmp_path, "abc", EMOJI)
  path.write_text(path.read_text() + "\n")
  status, out, _ = command(f"--prompts={path}", "--max_new_tokens=2")
  assert status == 0
  assert [line["prompt"] for line in _lines(out)] == ["abc", EMOJI]
  # One prompt of a file is a line as well: a program reads it.
  path = _write_prompts(tmp_path, "abc")
  assert len(_lines(command(f"--prompts={path}", "--max_new_tokens=2")[1])) == 1


def test_prompts_of_stdin_keep_what_else_they_have(
  command, monkeypatch, tmp_path
):
  line = json.dumps({"id": 7, "prompt": "abc", "text": "gone", "a": {"b": 1}})
  _set_stdin(monkeypatch, b"\xef\xbb\xbf" + line.encode() + b"\n")
  (found,) = _lines(command("--prompts=-", "--max_new_tokens=2")[1])
  path = _write_prompts(tmp_path, "abc")
  (plain,) = _lines(command(f"--prompts={path}", "--max_new_tokens=2")[1])
  assert found == plain | {"id": 7, "a": {"b": 1}}


def _set_stdin(monkeypatch, content: bytes):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_stdin_is_one_prompt(command, monkeypatch):
  text = "ab\ncd é\r\n"
  flags = ("--max_new_tokens=9", "--stop_id=0")
  expected = command(f"--prompt={text}", *flags)[1]
  _set_stdin(monkeypatch, text.encode())
  assert command(*flags)[1] == expected


def test_samples_and_seeds(command):
  flags = "--temperature=1 --num_samples=2 --max_new_tokens=8 --stop_id=0"

  def tokens(*more):
    status, out, _ = command(
      *["--prompt=abc"] * 3, *flags.split(), "--batch_size=2", *more
    )
    lines = _lines(out)
    assert status == 0
    assert [line["sample"] for line in lines] == [0, 1] * 3
    return [tuple(line["tokens"]) for line in lines]

  first = tokens()
  assert first == tokens("--seed=0")
  # Samples, rows, batches and seeds all draw apart.
  assert len({*first, *tokens("--seed=1")}) == 12


def test_flags_reach_the_decoder(command, monkeypatch):
  seen = {}

  def stream(self, prompts, **options):
    seen.update(options)
    return iter([[Generation(0, 0, [], True)]])

  monkeypatch.setattr(Decoder, "stream", stream)
  command(
    *"--prompt=a --temperature=0.5 --top_k=7 --top_p=0.25 --min_p=0.125".split(),
    *"--repetition_penalty=2 --seed=9 --max_new_tokens=3 --chunk=2".split(),
    *"--stop_id=4 --stop_id=6".split(),
  )
  assert seen == dict(
    max_new_tokens=3,
    sampling=Sampling(0.5, 7, 0.25, 0.125, 2.0),
    chunk=2,
    stop_ids=[4, 6],
    seed=9,
    first_row=0,
    num_samples=1,
    context_lengths=None,
  )
  command("--prompt=a")
  assert (seen["sampling"], seen["stop_ids"]) == (GREEDY, [1])


def _request(folder, *flags):
  parsed = generate._parser().parse_args([f"--checkpoint={folder}", *flags])
  return generate.prepare(parsed)


@pytest.mark.parametrize(
  "flags, expected",
  [
    ([], (128, 132)),
    (["--max_new_tokens=7"], (7, 11)),
    (["--cache_length=20"], (16, 20)),
    (["--cache_length=20", "--max_new_tokens=7"], (7, 20)),
  ],
)
def test_lengths(flags, expected, folder):
  # A piece a letter, and BOS.
  request = _request(folder, "--prompt=XYZ", "--prompt=X", *flags)
  assert (request.max_new_tokens, request.cache_length) == expected


def test_what_loading_tells_is_no_output(folder, capsys):
  decoder = generate.load(
    _request(folder, "--prompt=abc", "--funnel=start=1,recover=gate")
  )
  assert decoder.stages[0].recover == "gate"
  out, err = capsys.readouterr()
  assert (out, "initialised" in err) == ("", True)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("funnel", ["start=1,reduce=context", "off", TRAINED])
def test_a_context_comes_before_each_prompt(
  funnel, count, command, folder, tokenizer, tmp_path
):
  path = tmp_path / "context.txt"
  path.write_text(f"XYZ {EMOJI}\n")
  context = tokenizer.encode(path.read_text())
  texts = ["abc", "m", "ab"][:count]
  prompts = [[BOS_ID, *context, *tokenizer.encode(text)] for text in texts]
  flags = [f"--prompt={text}" for text in texts]
  flags += ["--stop_id=0", "--max_new_tokens=6", f"--funnel={funnel}"]
  status, out, _ = command(*flags, f"--context={path}", quick=False)
  lengths = [len(context)] * count if "context" in funnel else None
  expected = Decoder(convert.load(folder, funnel), CACHE).generate(
    prompts, max_new_tokens=6, context_lengths=lengths
  )
  assert status == 0
  if count == 1:
    assert out == tokenizer.decode(expected[0].tokens) + "\n"
    return
  lines = _lines(out)
  assert [line["prompt"] for line in lines] == texts
  assert [line["tokens"] for line in lines] == [r.tokens for r in expected]


# --- Hugging Face folders -------------------------------------------------


@pytest.fixture
def plain(tmp_path, folder):
  """A Hugging Face folder of Gemma 1, whose vocabulary is the larger one."""
  raw = tiny_checkpoints.GEMMA1 | {"vocab_size": VOCAB + 30}
  tensors = tiny_checkpoints.random_tensors(raw, ml_dtypes.bfloat16)
  shape = VOCAB + 30, tiny_checkpoints.D
  embedding = np.random.default_rng(1).normal(size=shape)
  tensors["model.embed_tokens.weight"] = embedding.astype(ml_dtypes.bfloat16)
  tiny_checkpoints.write(tmp_path, raw, tensors)
  model = (folder / "tokenizer.model").read_bytes()
  (tmp_path / "tokenizer.model").write_bytes(model)
  return tmp_path


def test_a_hugging_face_folder(plain, command, tokenizer):
  flags = "--prompt=abc --prompt=m --max_new_tokens=6 --stop_id=0".split()
  status, out, err = command(*flags, checkpoint=plain, quick=False)
  assert status == 0
  assert f"{VOCAB} pieces, the model {VOCAB + 30} ids" in err
  model = convert.load(plain)
  assert model.stages == ()
  for line in _lines(out):
    prompt = [BOS_ID, *tokenizer.encode(line["prompt"])]
    assert line["tokens"] == _greedy(model, prompt, 6)


def test_dtype_and_funnel_are_as_trained_or_as_asked_for(plain, folder):
  other = "--dtype=bfloat16", "--funnel=start=1"
  for checkpoint, flags, dtype, stages in (
    (plain, (), "float32", 0),
    (folder, (), "float32", 1),
    (plain, other, "bfloat16", 1),
    (folder, (*other[:1], "--funnel=off"), "bfloat16", 0),
  ):
    decoder = generate.load(_request(checkpoint, "--prompt=a", *flags))
    assert decoder.config.dtype == decoder.config.param_dtype == dtype
    assert len(decoder.stages) == stages


# --- Mistakes -------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch, capsys, folder):
  """Asserts that flags are a mistake of one line, told before weights."""

  read = generate.load

  def call(text, *flags, checkpoint=folder, loads=False):
    def load(request):
      assert loads
      return read(request)

    monkeypatch.setattr(generate, "load", load)
    status = generate.main([f"--checkpoint={checkpoint}", *flags])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: .*{text}.*\n", err), err

  return call


@pytest.mark.parametrize(
  "flags, text",
  [
    (["--prompt="], "--prompt is empty: expected a text"),
    (["--prompt=a", "--prompt="], "--prompt number 2 is empty"),
    (["--prompt=\udc80"], "--prompt: .* is not Unicode text"),
    (["--prompt=a", "--prompts=x"], "--prompt and --prompts are both given"),
    (["--prompts=/nowhere.jsonl"], "/nowhere.jsonl: cannot be read: No such"),
    (["--context=/nowhere.txt"], "/nowhere.txt: cannot be read: No such"),
    (["--funnel=start=1,reduce=context"], "expected --context=FILE"),
    (["--top_p=0", "--temperature=1"], r"top_p=0.0: expected .* > 0 and <= 1"),
    (["--top_p=1.5", "--temperature=1"], "top_p=1.5"),
    (["--top_p=0.5"], "top_p=0.5 has no effect with temperature=0"),
    (["--top_k=0", "--temperature=1"], "top_k=0"),
    (["--min_p=1", "--temperature=1"], "min_p=1.0"),
    (["--temperature=-1"], "temperature=-1.0"),
    (["--temperature=nan"], "temperature=nan"),
    (["--repetition_penalty=0"], "repetition_penalty=0.0"),
    (["--num_samples=2"], "--num_samples=2 with --temperature=0"),
    (["--num_samples=0"], "--num_samples=0: expected .* >= 1"),
    (["--max_new_tokens=0"], "--max_new_tokens=0: expected .* >= 1"),
    (["--batch_size=0"], "--batch_size=0: expected .* >= 1"),
    (["--chunk=-2"], "--chunk=-2: expected .* >= 1"),
    (["--seed=-1"], "--seed=-1: .* 0 to 4294967295"),
    (["--seed=4294967296"], "--seed=4294967296"),
    (["--stop_id=320"], "--stop_id=320: .* 0 to 319"),
    (["--stop_id=-1"], "--stop_id=-1: .* 0 to 319"),
    (["--cache_length=1"], "--cache_length=1: expected 2 to model.max_length"),
    (["--cache_length=32769"], "expected 2 to model.max_length=32768"),
    (["--max_new_tokens=32767"], "max_length=32768 has room for 1 beside"),
    (["--prompt=XYZ", "--cache_length=4"], "has 4 tokens.*has room for 3"),
    (["--cache_length=9", "--max_new_tokens=9"], "has 2 .* room for 0 beside"),
    (["--funnel=start=4"], "start=4 must be below .* 2 layers"),
    (["--funnel=deep"], "'deep' is not key=value"),
    (["--funnel=start=1,recover=none"], "recover='none' .* generation needs"),
    (["--dtype=int8"], "--dtype: invalid choice: 'int8'"),
    (["--tokenizer=/nowhere"], "/nowhere: cannot be read"),
    (["--top_k=many"], "--top_k='many': expected an integer"),
    (["--temp=1"], "unknown flag --temp; did you mean --temperature"),
    (["more"], "unrecognized arguments: more"),
    (["--checkpoint=/nowhere"], "/nowhere is no checkpoint .* nothing there"),
    (["--checkpoint=tests/conftest.py"], "conftest.py is no checkpoint"),
  ],
)
def test_a_mistake_is_one_line(flags, text, refuse):
  prompted = any(flag.startswith("--prompt") for flag in flags)
  refuse(text, *([] if prompted else ["--prompt=a"]), *flags)


def test_no_checkpoint_is_named(capsys):
  assert generate.main([]) == 2
  assert capsys.readouterr().err == (
    "error: the following arguments are required: --checkpoint\n"
  )


@pytest.mark.parametrize(
  "line, text",
  [
    (b'{"prompt": "a"', "malformed JSON: "),
    (b'"a"', "found a JSON str; expected an object"),
    (b'{"text": "a"}', "no key 'prompt'"),
    (b'{"prompt": 3}', "the value of 'prompt' is a int"),
    (b'{"prompt": ""}', "is empty"),
    (b'{"prompt": "\\ud800"}', "'prompt' is not Unicode text"),
    (b'{"prompt": "%s"}' % (b"X" * LENGTH), f"has {LENGTH + 1} tokens"),
  ],
)
def test_a_bad_line_is_named(line, text, refuse, tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
  refuse(f"{path}, line 3:? {text}", f"--prompts={path}")


def test_files_without_prompts(refuse, tmp_path, monkeypatch):
  path = tmp_path / "prompts.jsonl"
  path.write_text("\n")
  refuse(f"{path} has no prompts", f"--prompts={path}")
  refuse(f"{tmp_path} is a folder: expected a file", f"--prompts={tmp_path}")
  for content, text in ((b"", "is empty"), (b"\xff", "not UTF-8")):
    _set_stdin(monkeypatch, content)
    refuse(f"stdin .*{text.removeprefix('is ')}")
    path.write_bytes(content)
    refuse(f"{path}:? {text}", "--prompt=a", f"--context={path}")
  refuse(f"{path}: not UTF-8", f"--prompts={path}")
  path.write_text("X" * CACHE)
  flags = f"--context={path}", f"--cache_length={CACHE}", "--prompt=a"
  refuse(f"--prompt has {CACHE + 2} tokens, BOS and context included", *flags)


def test_tokenizers_that_do_not_do(plain, refuse, folder, tmp_path):
  prompt, model = "--prompt=a", plain / "tokenizer.model"
  config = json.loads((plain / "config.json").read_text())
  small = plain / "small"
  small.mkdir()
  (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
  (small / "model.safetensors").touch()
  given = f"--tokenizer={folder / 'tokenizer.model'}"
  refuse("320 pieces.* vocab_size=300", prompt, given, checkpoint=small)
  model.unlink()
  refuse(f"no file {model}. Expected --tokenizer", prompt, checkpoint=plain)
  model.write_bytes(b"text")
  refuse("not a SentencePiece model", prompt, checkpoint=plain)
  model.write_bytes(b"{")
  refuse("not a Hugging Face tokenizer.json", prompt, checkpoint=plain)


def test_runs_that_do_not_do(refuse, folder, tmp_path):
  prompt = "--prompt=a"
  (tmp_path / "checkpoints").mkdir()
  refuse("config.json: cannot be read", prompt, checkpoint=tmp_path)
  config = json.loads((folder / "config.json").read_text())
  file = tmp_path / "config.json"
  write = lambda config: file.write_text(json.dumps(config))
  write(config | {"data": None})
  refuse("config.json is no configuration", prompt, checkpoint=tmp_path)
  write(config | {"funnel": "start=1,recover=none"})
  refuse("recover='none'", prompt, checkpoint=tmp_path)
  write(config)
  refuse("has no tokenizer: there is no file", prompt, checkpoint=tmp_path)
  # What can only be told of weights is told as a line too.
  given = f"--tokenizer={folder / 'tokenizer.model'}"
  keys = dict(checkpoint=tmp_path, loads=True)
  refuse("can be read: it is empty", prompt, given, **keys)


# --- Interruptions --------------------------------------------------------


def _interrupt(monkeypatch, after: int):
  """Ctrl-C after as many looks at the first batch."""
  stream = Decoder.stream

  def interrupted(*args, **options):
    for look, results in enumerate(stream(*args, **options)):
      if look == after:
        raise KeyboardInterrupt
      yield results

  monkeypatch.setattr(Decoder, "stream", interrupted)


def test_interrupted_text_is_what_there_was(command, monkeypatch):
  flags = ("--prompt=abc", "--stop_id=0", "--max_new_tokens=20", "--chunk=2")
  whole = command(*flags)[1]
  _interrupt(monkeypatch, 3)
  status, out, err = command(*flags)
  assert status == 130
  assert out.endswith("\n") and whole.startswith(out[:-1])
  assert len(out) > 1
  assert re.match("interrupted: [56] tokens in", err)


def test_interrupted_lines_are_marked(command, monkeypatch):
  flags = "--prompt=abc --prompt=m --prompt=k --max_new_tokens=8".split()
  flags += ["--batch_size=2", "--chunk=2"]
  whole = _lines(command(*flags, "--stop_id=0")[1])
  stop = next(t for t in whole[0]["tokens"] if t not in whole[1]["tokens"])
  assert whole[0]["tokens"].index(stop) < 5
  _interrupt(monkeypatch, 3)
  status, out, err = command(*flags, f"--stop_id={stop}")
  assert status == 130
  first, second = _lines(out)
  assert first["stopped"] is True and "interrupted" not in first
  assert second["stopped"] is False and second["interrupted"] is True
  assert 0 < len(second["tokens"]) < 8
  assert second["tokens"] == whole[1]["tokens"][: len(second["tokens"])]
  assert "interrupted: " in err


def test_interrupted_while_loading(monkeypatch, folder, capsys):
  def load(request):
    raise KeyboardInterrupt

  monkeypatch.setattr(generate, "load", load)
  assert generate.main([f"--checkpoint={folder}", "--prompt=a"]) == 130
  assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_ends_quietly(command, monkeypatch):
  command("--prompt=abc", "--max_new_tokens=2")
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as pipe:
    monkeypatch.setattr(sys, "stdout", pipe)
    status, _, err = command("--prompt=abc", "--max_new_tokens=20")
  assert (status, err) == (141, "")


def test_ctrl_c_of_the_command(folder):
  args = [sys.executable, "-m", "gemma_funnel.generate"]
  args += [f"--checkpoint={folder}", f"--prompt={EMOJI}", "--chunk=1"]
  # With two to draw from, it goes on to the end, half a minute later.
  args += "--temperature=1 --top_k=2 --stop_id=0".split()
  args += [f"--max_new_tokens={LENGTH - 10}"]
  # Text is UTF-8 whatever the terminal says.
  env = tiny_run.environment() | {"PYTHONIOENCODING": "ascii"}
  # Tests in the background of a shell would pass on that they ignore Ctrl-C.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  with subprocess.Popen(args, cwd=tiny_run.ROOT, env=env, **pipes) as process:
    signal.signal(signal.SIGINT, before)
    begun = os.read(process.stdout.fileno(), 1)  # What comes after stays.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130
  text = (begun + out).decode("utf-8")
  assert len(text) > 1 and text.endswith("\n")
  assert re.fullmatch(r"interrupted: \d+ tokens in .*\n", err.decode())


# --- Times ----------------------------------------------------------------


def test_times_leave_compiling_out(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
  throughput = generate._Throughput()

  def look(seconds, count):
    now[0] += seconds
    throughput.look([Generation(0, 0, [5] * count, False)])

  look(2, 0)  # The end of a prompt is still to be fed.
  look(1, 4)
  assert str(throughput) == (
    "4 tokens in 3.00 s; the first after 3.00 s, compiling included; "
    "1.3 tokens/s, compiling included"
  )
  look(2, 12)
  throughput.next_batch()
  look(3, 1)
  look(1, 5)
  look(2, 13)
  assert str(throughput) == (
    "25 tokens in 11.00 s; the first after 3.00 s, compiling included; "
    "then 4.0 tokens/s"
  )
