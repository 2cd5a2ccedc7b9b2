"""Buckets by their real clients, against a server on this machine."""

import json
import os
import pathlib
import signal
import time

import fake_gcs
from made_checkpoints import parameters
import numpy as np
import pytest
from test_gguf import write as write_gguf
import tiny_run

from gemma_funnel import generate, paths
from gemma_funnel.convert import reader
from gemma_funnel.convert.__main__ import main as convert_main
from gemma_funnel.convert.run import find_intact
from gemma_funnel.data.tokenizer import Tokenizer
from gemma_funnel.evaluation import accuracy

gcsfs = pytest.importorskip("gcsfs")
RUN = "gs://bucket/run"


@pytest.fixture(scope="module")
def server():
  with fake_gcs.FakeGCS() as made, pytest.MonkeyPatch.context() as patch:
    for key, value in made.environment().items():
      patch.setenv(key, value)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield made
    gcsfs.GCSFileSystem.clear_instance_cache()


def _values(path):
  return dict(parameters(reader.open_checkpoint(path)))


def _same(a, b):
  assert a.keys() == b.keys()
  for path, values in a.items():
    np.testing.assert_array_equal(values, b[path], err_msg=str(path))


def _assert_converts_alike(here, there, tmp_path):
  for name, source in (("here", here), ("there", there)):
    assert not convert_main([str(source), str(tmp_path / name), "--to=hf"])
  files = sorted(file.name for file in (tmp_path / "here").iterdir())
  for name in files:
    found = (tmp_path / "there" / name).read_bytes()
    assert found == (tmp_path / "here" / name).read_bytes()
  assert files == sorted(file.name for file in (tmp_path / "there").iterdir())


@pytest.mark.parametrize(
  "name",
  ["hf", "hf shards", "learned", "flat", "nested", "stacked", "ckpt", "bin"]
  + ["ours", "ocdbt", "plain"],
)
def test_every_format_is_read_as_here(name, made, server, tmp_path):
  url = f"gs://bucket/made/{name.replace(' ', '_')}"
  server.put_folder(made / name, url)
  _same(_values(url), _values(made / name))
  _assert_converts_alike(made / name, url, tmp_path)


@pytest.mark.parametrize("model", ["gemma3", "llama"])
def test_a_gguf_file(model, server, tmp_path, monkeypatch):
  from gemma_funnel import gguf_head

  monkeypatch.setattr(gguf_head, "_FIRST_BYTES", 100)
  file, _ = write_gguf(tmp_path, model)
  server.put("bucket", "x.gguf", file.read_bytes())
  _same(_values("gs://bucket/x.gguf"), _values(file))
  text = "some w7 text \u00e9"
  found = Tokenizer.load("gs://bucket/x.gguf").encode(text)
  assert found == Tokenizer.load(file).encode(text)
  _assert_converts_alike(file, "gs://bucket/x.gguf", tmp_path)


def test_what_is_cut_off_or_not_there(made, server, tmp_path):
  data = (made / "hf" / "model.safetensors").read_bytes()
  server.put_folder(made / "hf", "gs://bucket/cut")
  for size in (4, 100, len(data) - 1):
    server.put("bucket", "cut/model.safetensors", data[:size])
    with pytest.raises(ValueError, match="gs://bucket/cut/model.safetensors"):
      _values("gs://bucket/cut")
  server.put("bucket", "cut/x.gguf", b"GGUF" + bytes(100))
  with pytest.raises(ValueError, match="gs://bucket/cut/x.gguf"):
    _values("gs://bucket/cut/x.gguf")
  with pytest.raises(ValueError, match="gs://bucket/none.*nothing there"):
    _values("gs://bucket/none")


@pytest.mark.parametrize("name", ["hf", "ckpt", "ours"])
def test_a_slice_is_all_that_is_read(name, made, server):
  """Half of the rows of each matrix that a mesh cuts; and all of the rest."""
  url = f"gs://bucket/slices/{name}"
  server.put_folder(made / name, url)
  opened = reader.open_checkpoint(url)
  path = ("layers", "mlp", "down")
  shape = opened.read_slice(path, [slice(None)] * 3, np.float32).shape
  server.sent.clear()
  half = [slice(None), slice(0, shape[1] // 2), slice(None)]
  found = opened.read_slice(path, half, np.dtype(np.float32))
  np.testing.assert_array_equal(
    found,
    reader.open_checkpoint(made / name).read_slice(path, half, np.float32),
  )
  whole = 4 * int(np.prod(shape))
  assert sum(server.sent.values()) <= 1.3 * whole


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
  """A run trained into a bucket, from data there; its configuration."""
  text = pathlib.Path(tiny_run.write_corpus(tmp_path_factory.mktemp("text")))
  server.put("bucket", "corpus.jsonl", text.read_bytes())
  with pytest.MonkeyPatch.context() as patch:
    tiny_run.use_one_device(patch)
    config = tiny_run.make_config(RUN, "gs://bucket/corpus.jsonl")
    tiny_run.train(config)
  return config


def _fetch(server, name, folder):
  """A copy here of a run, as `gcloud storage cp` makes it."""
  for key in server.names("bucket"):
    if key.startswith(f"{name}/"):
      file = folder / key
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(server.objects["bucket"][key].data)
  return folder / name


def test_a_run_is_converted_and_generated_from(run, server, tmp_path, capsys):
  local = _fetch(server, "run", tmp_path)
  server.sent.clear()
  _same(_values(RUN), _values(local))
  # The sums are the store's own: of the optimizer nothing is read.
  assert not [key for _, key in server.sent if "opt_state" in key]
  _assert_converts_alike(local, RUN, tmp_path)
  capsys.readouterr()
  said = []
  for where in (RUN, str(local)):
    flags = [f"--checkpoint={where}", "--prompt=abc", "--max_new_tokens=4"]
    assert not generate.main(flags)
    said.append(capsys.readouterr().out)
  assert said[0] == said[1]


def test_a_run_is_evaluated(run, server):
  config = tiny_run.load_config("eval_accuracy")
  config.update(checkpoint=RUN, max_documents=3, length=32)
  config.data.source = "gs://bucket/corpus.jsonl"
  rows = accuracy.run(config)
  assert not os.path.exists("gs:")  # As a folder here.
  assert {"run/eval/accuracy.json", "run/eval/accuracy.png"} <= {
    *server.names("bucket")
  }
  data = server.objects["bucket"]["run/eval/accuracy.json"].data
  assert len(json.loads(data)["rows"]) == len(rows)


def test_a_run_is_begun_from_it_and_goes_on(run, server, tmp_path, monkeypatch):
  """What is trained from it is what a local copy of it gives."""
  tiny_run.use_one_device(monkeypatch)
  local, losses = _fetch(server, "run", tmp_path), []
  for origin, out in ((RUN, "gs://bucket/next"), (local, tmp_path / "next")):
    config = tiny_run.make_config(
      out, "gs://bucket/corpus.jsonl", init_from=str(origin), steps=5
    )
    tiny_run.train(config)
    with config.unlocked():
      config.checkpoint_every = 3
    tiny_run.train(config)  # It is complete: nothing happens.
    next_ = _fetch(server, "next", tmp_path / "copy") if origin == RUN else out
    losses.append(tiny_run.train_losses(next_))
  assert losses[0] == losses[1]


def test_a_run_is_fine_tuned_from(run, server, tmp_path, monkeypatch):
  from gemma_funnel.evaluation import finetuned

  rows = [
    "text,label",
    *(f"{'good' if i % 2 else 'bad'} {i},{i % 2}" for i in range(24)),
  ]
  table = "\n".join(rows).encode()
  server.put("bucket", "table.csv", table)
  tiny_run.use_one_device(monkeypatch)
  config = tiny_run.load_config("finetune")
  out = "gs://bucket/tuned"
  config.update(
    workdir=out,
    init_from=RUN,
    tensorboard=False,
    steps=4,
    batch_size=4,
    length=16,
  )
  config.update_from_flattened_dict(
    {
      "task.format": "table",
      "task.kind": "classification",
      "task.text": "text",
      "task.label": "label",
      "task.train": "gs://bucket/table.csv",
      "task.test": "gs://bucket/table.csv",
    }
  )
  finetuned.run(config)
  assert any(x.startswith("tuned/") for x in server.names("bucket"))


def test_an_object_that_changed_is_told_of(run, server, capsys):
  """A step whose files are not as they were written is passed over."""
  newest, newer = find_intact(RUN)
  assert not newer
  names = server.names("bucket")
  damaged = next(
    x for x in names if f"checkpoints/{newest}/params/ocdbt" in x and "/d/" in x
  )
  kept = server.objects["bucket"][damaged]
  spoilt = bytes([kept.data[0] ^ 1]) + kept.data[1:]
  server.put("bucket", damaged, spoilt)
  try:
    step, newer = find_intact(RUN)
  finally:
    server.objects["bucket"][damaged] = kept
  assert step < newest and newer == [newest]
  assert "size and checksum" in "".join(capsys.readouterr())


@pytest.mark.parametrize("verb", ["create", "list", "get"])
def test_what_may_not_be_done(verb, server, monkeypatch, capsys):
  from gemma_funnel import cli

  monkeypatch.setattr(server, "forbidden", {("closed", verb)})
  server.put("closed", "corpus.jsonl", b'{"text": "some text"}\n' * 40)
  config = tiny_run.make_config("gs://closed/run", "gs://closed/corpus.jsonl")
  monkeypatch.setattr("sys.excepthook", None)

  def train():
    tiny_run.train(config)
    return 0

  begun = time.monotonic()
  assert cli.guard(train) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and f"storage.objects.{verb}" in line, line
  assert "gs://closed" in line
  assert time.monotonic() - begun < 30


def test_a_client_that_is_not_there(monkeypatch):
  monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"install 'gemma-funnel\[gcs\]'"):
    paths.check("gs://bucket/run")


@pytest.mark.slow
def test_processes_read_their_slices_and_survive_kills(run, server, tmp_path):
  """Two, of a mesh that cuts parameters, begun from a checkpoint there.

  Most are cut along the axis that files have first; the others are read whole.
  """
  assert not convert_main([RUN, str(tmp_path / "hf"), "--to=hf"])
  server.put_folder(tmp_path / "hf", "gs://bucket/hf")
  weights = "bucket/hf/model.safetensors"
  flags = ["--config.init_from=gs://bucket/hf", "--config.data.lanes=2"]
  flags += ["--config.steps=24", "--config.funnel=off"]
  here = tiny_run.command(str(tmp_path / "alone"), "gs://bucket/corpus.jsonl")
  tiny_run.finish(tiny_run.start([*here, *flags]))
  server.sent.clear()

  def start():
    args = tiny_run.command("gs://bucket/two", "gs://bucket/corpus.jsonl")
    args += [*flags, "--config.mesh.tensor=2", "--config.mesh.data=1"]
    who = [server.environment(f"process{i}") for i in range(2)]
    return tiny_run.start_all(args, 2, environments=who)

  started, deadline = start(), time.monotonic() + 200
  while not any(
    "two/checkpoints/12/commit_success" in x for x in server.names("bucket")
  ):
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in started)
    time.sleep(0.02)
  for process in started[::-1]:
    process.kill()
  for process in started:
    tiny_run.finish(process, -signal.SIGKILL)
  size = len(server.objects["bucket"]["hf/model.safetensors"].data)
  read = [server.sent[f"process{i}", weights] / size for i in range(2)]
  assert max(read) < 0.75 and sum(read) > 1, read
  server.sent.clear()
  said = [tiny_run.finish(process) for process in start()]
  assert "resuming gs://bucket/two at step" in said[0][0]
  found = tiny_run.train_losses(_fetch(server, "two", tmp_path))
  expected = tiny_run.train_losses(tmp_path / "alone")
  assert found.keys() == expected.keys()
  for step, loss in expected.items():
    assert abs(found[step] - loss) < 1e-4 * loss, step
