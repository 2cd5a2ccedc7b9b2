"""Corpora: what is read, how it is split, and what errors say."""

import json
import os
import pathlib
import pickle
import sys

from array_record.python import array_record_module
from etils.epath import backend, gpath
import numpy as np
import pytest

from gemma_funnel.data import documents, files, sources, tokenizer


def _is_heldout(key, fraction):
  return documents.digest(key) < fraction * 2**64


@pytest.mark.parametrize(
  ("key", "fraction", "expected"),
  [
    ("asyncio/events.py", 0.1, False),
    ("calendar.py", 0.1, True),
    ("enum.py", 0.1, True),
    ("html/parser.py", 0.1, True),
    ("json/decoder.py", 0.1, False),
    ("json/decoder.py", 0.5, True),
    ("json/encoder.py", 0.1, True),
    ("os.py", 0.5, False),
    ("notes.txt:1", 0.1, True),
    ("notes.txt:3", 0.1, False),
    ("notes.txt:3", 0.5, True),
  ],
)
def test_hash_split_is_the_same_everywhere(key, fraction, expected):
  assert _is_heldout(key, fraction) is expected


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_hash_split_has_its_share(fraction):
  made = [documents.Document(f"file{i}.py", "") for i in range(4000)]
  _, held = documents.split(made, fraction)
  assert abs(len(held) / 4000 - fraction) < 0.03


class TestStdlib:
  def test_the_interpreters_own(self):
    documents = sources.stdlib_documents()
    keys = [d.key for d in documents]
    assert keys == sorted(set(keys))
    assert {"asyncio/events.py", "os.py", "json/decoder.py"} <= set(keys)
    assert not [k for k in keys if {"test", "tests"} & set(k.split("/"))]
    assert not [k for k in keys if "site-packages" in k or "idle_test" in k]
    text = next(d.text for d in documents if d.key == "os.py")
    assert text.encode() == pathlib.Path(os.__file__).read_bytes()

  def test_split_is_a_partition(self):
    train, held = sources.load_split()
    everything = sources.stdlib_documents()
    assert sorted([*train, *held], key=lambda d: d.key) == everything
    assert 0.05 < len(held) / len(everything) < 0.15

  def test_what_is_left_out(self, tmp_path):
    for path in [
      "a.py",
      "pkg/b.py",
      "pkg/test/c.py",
      "tests/d.py",
      "idlelib/idle_test/e.py",
      "lib2to3/tests/f.py",
      "lib2to3/main.py",
      "site-packages/g.py",
      "dist-packages/h.py",
      "__pycache__/i.py",
      "notes.txt",
    ]:
      (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / path).write_bytes(b"x = 1\r\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    documents = sources.stdlib_documents(tmp_path)
    assert [d.key for d in documents] == ["a.py", "lib2to3/main.py", "pkg/b.py"]
    assert documents[0].text == "x = 1\r\n"

  def test_no_sources(self, tmp_path):
    with pytest.raises(ValueError, match="'stdlib': no .py file below"):
      sources.stdlib_documents(tmp_path)


class TestFiles:
  @pytest.mark.parametrize("end", ["", "\n", "\n\n", "x" * 50_000])
  def test_text_is_cut_at_line_ends(self, tmp_path, end):
    text = "".join(f"line {i} \x0c\x85é\u2028\r\n" for i in range(5000)) + end
    path = tmp_path / "big.txt"
    path.write_bytes(text.encode())
    documents = sources.file_documents([str(path)], "text")
    assert "".join(d.text for d in documents) == text
    assert [d.key for d in documents] == [
      f"big.txt:{i}" for i in range(len(documents))
    ]
    for document in documents[:-1]:
      assert document.text.endswith("\n")
      size = len(document.text.encode())
      assert 0 <= size - files.TEXT_DOCUMENT_BYTES < 40

  def test_one_big_file_has_both_splits(self, tmp_path):
    path = tmp_path / "big.txt"
    path.write_text("some words to split\n" * 50_000)
    train, held = sources.load_split(str(path), heldout_fraction=0.2)
    assert len(train) > len(held) > 0
    assert len(train) + len(held) == pytest.approx(61, abs=1)

  @pytest.mark.parametrize("text_key", ["text", "body"])
  def test_jsonl(self, tmp_path, text_key):
    path = tmp_path / "a.jsonl"
    texts = ["first\nline", "", "漢 \u2028 third"]
    lines = [json.dumps({text_key: t, "id": 1}) for t in texts]
    path.write_text(lines[0] + "\n\n" + lines[1] + "\n" + lines[2] + "\n")
    documents = sources.file_documents([str(path)], text_key)
    assert [d.text for d in documents] == [texts[0], texts[2]]

  def test_globs(self, tmp_path):
    for name in ["a.txt", "b.txt", "c.md", "sub/d.txt"]:
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_text(name)
    globs = f"{tmp_path}/*.txt, {tmp_path}/**/*.txt,{tmp_path}/c.*"
    train, held = sources.load_split(globs, heldout_fraction=0.5)
    texts = sorted(d.text for d in [*train, *held])
    assert texts == ["a.txt", "b.txt", "c.md", "sub/d.txt"]

  def test_explicit_heldout(self, tmp_path):
    (tmp_path / "train.txt").write_text("to train on")
    (tmp_path / "valid.txt").write_text("held out")
    train, held = sources.load_split(
      f"{tmp_path}/train*", heldout=f"{tmp_path}/valid*"
    )
    assert [d.text for d in train] == ["to train on"]
    assert [d.text for d in held] == ["held out"]
    train, held = sources.load_split(heldout=f"{tmp_path}/valid.txt")
    assert train == sources.stdlib_documents() and len(held) == 1
    with pytest.raises(ValueError, match="share 1 files, such as .*valid.txt"):
      sources.load_split(f"{tmp_path}/*", heldout=f"{tmp_path}/valid.txt")


class TestErrors:
  def test_what_is_no_text(self, tmp_path):
    for globs in ("", " , "):
      with pytest.raises(ValueError, match="expected 'stdlib' or globs"):
        sources.load_split(globs)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.txt: not UTF-8: .* 0xe9"):
      sources.load_split(f"{tmp_path}/latin.txt")

  @pytest.mark.parametrize("globs", ["{}/none*.txt", "{}/a.txt,{}/none*.txt"])
  def test_no_file_matches(self, tmp_path, globs):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"none\*.txt': no file matches"):
      sources.load_split(globs.replace("{}", str(tmp_path)))

  @pytest.mark.parametrize(
    ("line", "message"),
    [
      (b'{"text": "a"', "malformed JSON: Expecting ',' delimiter"),
      (b"text", "malformed JSON: Expecting value"),
      (b'{"txt": "a", "id": 3}', r"no key 'text'; found .*'id', 'txt'"),
      (b'{"text": 3}', "value of 'text' is a int; expected a string"),
      (b'{"text": null}', "is a NoneType; expected a string"),
      (b'["text"]', "found a JSON list; expected an object"),
      (b'{"text": "\xe9"}', "not UTF-8"),
      (b'{"text": "\\ud800"}', "not Unicode text"),
    ],
  )
  def test_jsonl_line(self, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 3: .*{message}"):
      sources.load(str(path), on_bad="error")
    # Whatever is to be done with bad rows, not all may be.
    path.write_bytes(b"\n" + line)
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: .*{message}"):
      sources.load_split(str(path))

  def test_bad_rows_are_left_out_and_told(self, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [
      b'{"text": "one"}',
      b'{"text": null}',
      b'{"text": "two"}',
      b"{",
      b"3",
    ]
    path.write_bytes(b"\n".join([*rows, b'{"text": "\\ud800"}']))
    found = sources.load(str(path))
    texts = {d.key: d.text for d in found for _ in range(2)}
    assert texts == {f"a.jsonl:{i}": "" for i in range(6)} | {
      "a.jsonl:0": "one",
      "a.jsonl:2": "two",
    }
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and "line 2: " in said[0]
    path.write_bytes(rows[0] + b"\n" + b"{\n" * 300)
    with pytest.raises(ValueError, match="101 of the 301 rows of .* such as"):
      list(sources.load(str(path)))

  @pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
      ("UP.JSONL", b'{"text": "a"}\n', ["a"]),
      ("plain.json", b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
      ("lines.txt", b'{"text": "a"}\n', ["a"]),
      ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
      ("bom.txt", b"\xef\xbb\xbftext", ["text"]),
      ("nested.jsonl", b'{"a": {"text": "x"}}\n', ["x"]),
      ("a[1],b.txt", b"text", ["text"]),
      ("list.json", b'[{"text": "a"}]', "is a JSON document: expected JSON"),
      ("a.csv", b"text\na\n", r"is a table .CSV.: expected text"),
      ("a.jsonl.gz", b"\x1f\x8b\x08", "compressed by gzip: expected"),
      ("hidden.txt", b"BZh91AY", "compressed by bzip2: expected"),
      ("utf16.txt", "text".encode("utf-16"), "not UTF-8"),
    ],
  )
  def test_formats_by_name_and_content(self, tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    key = "a.text" if name == "nested.jsonl" else "text"
    if isinstance(expected, list):
      assert [d.text for d in sources.load(str(path), key)] == expected
      return
    with pytest.raises(ValueError, match=f"{name}.*{expected}"):
      sources.load(str(path), key)

  def test_what_is_no_file(self, tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    for name, kind in (("a", "a FIFO"), ("b", "a device")):
      with pytest.raises(ValueError, match=f"{name}.txt is {kind}"):
        sources.load(str(tmp_path / f"{name}.txt"))

  @pytest.mark.parametrize(
    ("fraction", "message"),
    [
      (1e-9, "held-out split is empty; of 5 .* name heldout files"),
      (1 - 1e-9, "train split is empty; of 5 .* lower the fraction"),
    ],
  )
  def test_empty_split(self, tmp_path, fraction, message):
    for i in range(5):
      (tmp_path / f"{i}.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
      sources.load_split(f"{tmp_path}/*.txt", heldout_fraction=fraction)

  @pytest.mark.parametrize("split", ["train", "held-out"])
  def test_empty_explicit_split(self, tmp_path, split):
    (tmp_path / "full").write_text("text")
    (tmp_path / "empty").write_text("")
    names = ["full", "empty"] if split == "held-out" else ["empty", "full"]
    train, held = [str(tmp_path / name) for name in names]
    with pytest.raises(ValueError, match=f"{split} split is empty"):
      sources.load_split(train, heldout=held)

  @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, "0.1", float("nan")])
  def test_fraction(self, fraction):
    with pytest.raises(ValueError, match="heldout_fraction=.* between 0 and 1"):
      sources.load_split(heldout_fraction=fraction)


def _write_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def _json_records(texts, key="text"):
  return [json.dumps({key: text}).encode() for text in texts]


TEXTS = [f"document {i} é\n" * (i % 5) for i in range(40)]


class TestReadOnDemand:
  def test_by_index(self, tmp_path):
    for name in "ab":
      path = tmp_path / f"{name}.jsonl"
      path.write_bytes(b"\n".join(_json_records(TEXTS)))
    (tmp_path / "c.txt").write_text("text\n" * 9000)
    found = sources.file_documents(sources.paths_of(f"{tmp_path}/*"), "text")
    assert len(found) == 32 + 32 + 3
    everything = list(found)
    # Texts that are empty keep their number.
    assert [d.key for d in everything[30:34]] == [
      "a.jsonl:38",
      "a.jsonl:39",
      "b.jsonl:1",
      "b.jsonl:2",
    ]
    assert [d.text for d in everything[:32]] == [t for t in TEXTS if t]
    for i in (-1, -67, 66, np.int64(31), 32):
      assert found[i] == everything[i]
    assert list(found[60:2:-7]) == everything[60:2:-7]
    for i in (67, -68):
      with pytest.raises(IndexError):
        found[i]
    assert found.digests().tolist() == [
      documents.digest(d.key) for d in everything
    ]
    assert list(pickle.loads(pickle.dumps(found))) == everything

  @pytest.mark.parametrize("fraction", [0.1, 0.5, 1 / 3])
  def test_split_is_that_of_keys(self, tmp_path, fraction):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(_json_records(TEXTS)))
    train, held = sources.load_split(
      f"{tmp_path}/a.jsonl", heldout_fraction=fraction
    )
    everything = sources.load(f"{tmp_path}/a.jsonl")
    for part, is_held in ((train, False), (held, True)):
      assert list(part) == [
        d for d in everything if _is_heldout(d.key, fraction) is is_held
      ]

  def test_texts_are_not_kept(self, tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(b"\n".join(_json_records(["x" * 100_000] * 50)))
    assert len(pickle.dumps(sources.load(str(path)))) < 5000

  def test_a_file_that_has_changed(self, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(_json_records(TEXTS)))
    found = sources.load(str(path))
    path.write_bytes(b'{"text": ""}')
    with pytest.raises(ValueError, match="a.jsonl: .* not what it was"):
      found[30]
    path.unlink()
    with pytest.raises(ValueError, match="a.jsonl: cannot be read: No such"):
      found[30]


class TestRecords:
  @pytest.mark.parametrize("end", ["array_record", "arrayrecord"])
  def test_json(self, tmp_path, end):
    path = tmp_path / f"a.{end}"
    _write_records(path, _json_records(TEXTS, "body"))
    found = sources.load(str(path), "body")
    assert [d.text for d in found] == TEXTS
    assert found[7].key == f"a.{end}:7"
    assert found.digests()[7] == documents.digest(found[7].key)
    assert list(pickle.loads(pickle.dumps(found))) == list(found)

  def test_a_bad_record(self, tmp_path):
    path = tmp_path / "a.array_record"
    _write_records(path, [b'{"text": "a"}', b'{"text": 3}'])
    with pytest.raises(ValueError, match="record 1: the value of 'text' is"):
      list(sources.load(str(path), on_bad="error"))
    _write_records(path, [b"text"])
    with pytest.raises(ValueError, match="a.array_record, record 0: malformed"):
      sources.load(str(path))

  @pytest.mark.parametrize("content", [b"", b"no records" * 9])
  def test_no_records(self, tmp_path, content):
    path = tmp_path / "a.array_record"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.array_record: |split is empty"):
      sources.load_split(str(path))


class TestParquet:
  def test_rows(self, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": list(range(40)), "body": TEXTS})
    parquet.write_table(table, path, row_group_size=7)
    found = sources.load(str(path), "body")
    assert [d.text for d in found] == TEXTS
    assert [found[i].text for i in (39, 0, 20, 6, 7)] == [
      TEXTS[i] for i in (39, 0, 20, 6, 7)
    ]
    assert found[8].key == "a.parquet:8"
    with pytest.raises(ValueError, match=r"no column 'text'; found .*'body'"):
      sources.load(str(path))
    with pytest.raises(ValueError, match="column 'id' is of int64; expected s"):
      sources.load(str(path), "id")

  def test_faults(self, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "null.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 1: .* NoneType; expected a str"):
      list(sources.load(str(path), on_bad="error"))
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 is not all of it")
    with pytest.raises(ValueError, match="bad.parquet: not a Parquet file"):
      sources.load(str(path))

  def test_without_the_package(self, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"gemma-funnel\[parquet\]"):
      sources.load(f"{tmp_path}/a.parquet")


class _Bucket(type(backend.os_backend)):
  """gs://bucket as a folder, which counts what it is asked for."""

  def __init__(self, folder, secret=()):
    self.folder, self.secret, self.opened = folder, secret, 0

  def _local(self, path):
    return str(path).replace("gs://bucket", str(self.folder), 1)

  def open(self, path, mode):
    self.opened += 1
    if os.path.basename(path) in self.secret:
      raise PermissionError(f"403 no storage.objects.get access to {path}")
    return super().open(self._local(path), mode)

  def exists(self, path):
    return super().exists(self._local(path))

  def isdir(self, path):
    return super().isdir(self._local(path))

  def replace(self, path, target):
    super().replace(self._local(path), self._local(target))

  def glob(self, path):
    found = super().glob(self._local(path))
    return [p.replace(str(self.folder), "gs://bucket", 1) for p in found]


class TestBucket:
  @pytest.fixture
  def bucket(self, tmp_path, monkeypatch):
    made = _Bucket(tmp_path)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", made)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(b"\n".join(_json_records(TEXTS)))
    (tmp_path / "b.txt").write_text("text\n" * 9000)
    return made

  def test_is_read_as_a_folder_is(self, bucket, tmp_path):
    remote = sources.load_split("gs://bucket/*/*.jsonl, gs://bucket/*.txt")
    local = sources.load_split(f"{tmp_path}/*/*.jsonl,{tmp_path}/*.txt")
    by_key = lambda part: {d.key: d.text for d in part}
    assert [by_key(p) for p in remote] == [by_key(p) for p in local]
    assert bucket.opened > 30

  def test_a_tokenizer(self, bucket, tmp_path):
    path = "gs://bucket/sub/tokenizer.model"
    assert tokenizer.find_tokenizer(None, path, 300) is None
    made = tokenizer.train(sources.load("gs://bucket/b.txt"), 265, path)
    for given in ((path, "unused"), (None, path)):
      found = tokenizer.find_tokenizer(*given, 265)
      assert found.encode("text\n") == made.encode("text\n")

  def test_parquet(self, bucket, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert [d.text for d in sources.load("gs://bucket/a.parquet")] == TEXTS

  def test_what_may_not_be_read(self, bucket):
    bucket.secret = ("b.txt",)
    message = "gs://bucket/b.txt: cannot be read: 403 no storage.objects.get"
    with pytest.raises(ValueError, match=message):
      sources.load("gs://bucket/b.txt")
    found = sources.load("gs://bucket/sub/a.jsonl")
    bucket.secret = ("a.jsonl",)
    with pytest.raises(ValueError, match="gs://bucket/sub/a.jsonl: cannot be"):
      found[3]

  def test_what_may_not_be_listed(self, bucket, monkeypatch):
    def glob(path):
      raise RuntimeError("no credentials\nwere found")

    monkeypatch.setattr(bucket, "glob", glob)
    message = "bucket/x.*: cannot be read: RuntimeError: no credentials were"
    with pytest.raises(ValueError, match=message):
      sources.load("gs://bucket/x*")

  def test_nothing_there(self, bucket):
    with pytest.raises(ValueError, match=r"gs://bucket/x\*': no file matches"):
      sources.load("gs://bucket/x*")
    with pytest.raises(ValueError, match=r"'\*\*' would list a whole bucket"):
      sources.load("gs://bucket/**/x*")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  tfds = pytest.importorskip("tensorflow_datasets")
  root = tmp_path_factory.mktemp("tfds")
  features = tfds.features.FeaturesDict(
    {"body": tfds.features.Text(), "id": np.int64}
  )
  rows = [{"body": text, "id": i} for i, text in enumerate(TEXTS)]

  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
      return {"train": enumerate(rows), "validation": enumerate(rows[:5])}

    def _generate_examples(self):
      raise NotImplementedError

  Made.name = "made"
  Made(data_dir=str(root), file_format="array_record").download_and_prepare()
  return str(root)


class TestTfds:
  def test_splits(self, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    train, held = sources.load_split(
      "tfds:made", heldout="tfds:made:validation", text_key="body"
    )
    # TFDS shuffles what it writes.
    assert sorted(d.text for d in train) == sorted(TEXTS)
    assert len(held) == 5
    assert train[3].key == "made/train:3" and held[1].key == "made/validation:1"
    assert list(pickle.loads(pickle.dumps(train))) == list(train)
    named = sources.load("tfds:made:1.0.0:validation", "body")
    assert list(named) == list(held)

  @pytest.mark.parametrize(
    ("source", "message"),
    [
      ("tfds:none", "dataset='none': cannot be read from data_dir"),
      ("tfds:made:2.0.0", r"it has the versions \['1.0.0'\]"),
      ("tfds:made:dev", "source='dev': dataset 'made' .* Unknown split"),
      ("tfds:made", r"text_key='text': 'tfds:made' has no such .* \['body'"),
      ("tfds:made:train:x", r"expected 'tfds:NAME\[:VERSION\]\[:SPLIT\]'"),
      ("tfds:", "expected 'tfds:NAME"),
    ],
  )
  def test_errors(self, data_dir, monkeypatch, source, message):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    with pytest.raises(ValueError, match=message):
      sources.load(source)

  def test_what_is_no_text(self, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    with pytest.raises(ValueError, match="example 0: the value of 'id' is a"):
      sources.load("tfds:made", "id")
    with pytest.raises(ValueError, match="share 1 files, such as tfds:made"):
      sources.load_split("tfds:made", heldout="tfds:made", text_key="body")
