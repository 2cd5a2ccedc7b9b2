"""Models of the Hub by name, from a server on this machine that answers as it."""

import hashlib
import http.server
import json
import threading
import urllib.parse

from flax import nnx
import jax
import numpy as np
import pytest
from tiny_checkpoints import GEMMA2, random_tensors, write

import gemma_funnel
from gemma_funnel import convert
from gemma_funnel.convert import hub
from gemma_funnel.data import sources
from gemma_funnel.evaluation import load_for_eval

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "c" * 40


class Server(http.server.BaseHTTPRequestHandler):
  """Of one model, "google/tiny"; "google/gated" has terms."""

  folder, asked = None, []

  def log_message(self, *args):
    pass

  def _answer(self, status, body=b"", **headers):
    self.send_response(status)
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def do_GET(self):
    self.asked.append(self.path)
    if "gated" in self.path:
      return self._answer(403, X_Error_Code="GatedRepo")
    if "datasets/google/words" in self.path:
      return self._answer_data()
    if "google/tiny" not in self.path:
      return self._answer(404, X_Error_Code="RepoNotFound")
    if "revision/old" in self.path:
      return self._answer(404, X_Error_Code="RevisionNotFound")
    if "/tree/" in self.path:
      files = [
        dict(type="file", path=f.name, size=f.stat().st_size, oid="0" * 40)
        for f in self.folder.iterdir()
      ]
      body = json.dumps(files).encode()
      return self._answer(200, body, Content_Type="application/json")
    if self.path.startswith("/api/models/"):
      files = [{"rfilename": f.name} for f in self.folder.iterdir()]
      about = {"id": "google/tiny", "sha": COMMIT, "siblings": files}
      return self._answer(
        200, json.dumps(about).encode(), Content_Type="application/json"
      )
    data = (self.folder / self.path.rpartition("/")[2]).read_bytes()
    tag = hashlib.sha256(data).hexdigest()
    return self._answer(200, data, X_Repo_Commit=COMMIT, ETag=f'"{tag}"')

  def _answer_data(self):
    """Of a data set, "google/words", in a folder "data"."""
    folder = self.folder / "data"
    entries = [
      dict(type="file", path=f"data/{f.name}", size=f.stat().st_size, oid="0")
      for f in sorted(folder.iterdir())
    ]
    path = self.path.partition("?")[0]
    if "/resolve/" in path:
      data = (folder / path.rpartition("/")[2]).read_bytes()
      said = dict(X_Repo_Commit=COMMIT, ETag='"data"', Accept_Ranges="bytes")
      if part := self.headers.get("Range"):
        first, _, last = part.removeprefix("bytes=").partition("-")
        data = data[int(first) : int(last) + 1 if last else None]
        return self._answer(206, data, **said)
      return self._answer(200, data, **said)
    found = {"id": "google/words", "sha": COMMIT, "siblings": []}
    if "/paths-info/" in path:
      length = int(self.headers["Content-Length"])
      asked = urllib.parse.parse_qs(self.rfile.read(length).decode())["paths"]
      found = [e for e in entries if e["path"] in asked]
      if "data" in asked:
        found.append(dict(type="directory", path="data", oid="1"))
    elif "/tree/" in path:
      top = [dict(type="directory", path="data", oid="1")]
      found = entries if path.endswith("/data") else top
    body = json.dumps(found).encode()
    return self._answer(200, body, Content_Type="application/json")

  do_HEAD = do_POST = do_GET


@pytest.fixture
def served(tmp_path, monkeypatch):
  folder = tmp_path / "served"
  folder.mkdir()
  write(folder, GEMMA2, random_tensors(GEMMA2))
  (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
  for name in ("consolidated.pth", "README.md", "pytorch_model.bin"):
    (folder / name).write_text("not to be read")
  Server.folder, Server.asked = folder, []
  server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  where = f"http://localhost:{server.server_port}"
  monkeypatch.setenv("HF_ENDPOINT", where)
  monkeypatch.setattr(constants, "ENDPOINT", where)
  template = where + "/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.chdir(tmp_path)
  hub._fetch.cache_clear()
  yield folder, server
  server.shutdown()
  server.server_close()
  hub._fetch.cache_clear()


pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
  "name", ["hf://google/tiny", "google/tiny", f"google/tiny@{COMMIT}"]
)
def test_a_model_by_name(served, name, monkeypatch):
  folder, _ = served
  loaded = gemma_funnel.load(name)
  expected = gemma_funnel.load(folder)
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(loaded), nnx.state(expected)
  )
  assert convert.describe(name).stop_ids == (1, 7)
  read = {path.rpartition("/")[2] for path in Server.asked if "resolve" in path}
  assert read == {"config.json", "model.safetensors", "generation_config.json"}
  if "@" in name:
    # And once more from the cache, without a connection.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._fetch.cache_clear()
    gemma_funnel.load(name)


def test_it_is_converted(served, tmp_path):
  convert.convert("google/tiny", tmp_path / "own", "orbax")
  gemma_funnel.load(tmp_path / "own")


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("hf://google/gated", "terms have to be accepted at http.*/google/gated"),
    ("google/tinny", "no folder google/tinny, and .* does not exist, or needs"),
    ("google/tiny@old", "has no branch, tag or commit 'old'"),
    ("hf://google", "expected hf://OWNER/NAME"),
  ],
)
def test_what_is_not_there(served, name, said):
  with pytest.raises(ValueError, match=said) as caught:
    gemma_funnel.load(name)
  assert "\n" not in str(caught.value)


def test_offline_is_one_line(served, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="cannot be reached, nor is it in the"):
    gemma_funnel.load("google/tiny")


def test_paths_are_no_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").mkdir()
  assert not hub.is_name("runs/quickstart")
  assert not hub.is_name("a/b/c") and not hub.is_name("gs://a/b")
  assert hub.is_name("google/gemma-2-2b")
  with pytest.raises(ValueError, match="there is nothing there"):
    gemma_funnel.load("runs/quickstart")
  from ml_collections import config_dict

  given = config_dict.create(checkpoint="runs/quickstart", tokenizer=None)
  with pytest.raises(ValueError, match="is not there"):
    load_for_eval.load(given)


def test_data_of_the_hub(served):
  folder, _ = served
  hf_file_system = pytest.importorskip("huggingface_hub.hf_file_system")
  (folder / "data").mkdir()
  texts = [f"text {i}" * 9 for i in range(60)]
  lines = [json.dumps({"text": text}) for text in texts]
  (folder / "data" / "a.jsonl").write_text("\n".join(lines[:40]))
  (folder / "data" / "b.jsonl").write_text("\n".join(lines[40:]))
  (folder / "data" / "README.md").write_text("no text")
  hf_file_system.HfFileSystem.clear_instance_cache()
  found = sources.load("hf://datasets/google/words/data/*.jsonl")
  assert [document.text for document in found] == texts
  one = sources.load("hf://datasets/google/words/data/b.jsonl")
  assert [document.text for document in one] == texts[40:]
  with pytest.raises(ValueError, match="google/words/data/.*no file matches"):
    sources.load("hf://datasets/google/words/data/*.parquet")
  with pytest.raises(ValueError, match="hf://datasets/google/nothing"):
    sources.load("hf://datasets/google/nothing/data/*.jsonl")
