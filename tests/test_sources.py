"""Corpora: what is read, how it is split, and what errors say."""

import json
import os
import pathlib

import pytest

from gemma_funnel.data import sources


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
  assert sources.is_heldout(key, fraction) is expected


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_hash_split_has_its_share(fraction):
  held = sum(sources.is_heldout(f"file{i}.py", fraction) for i in range(4000))
  assert abs(held / 4000 - fraction) < 0.03


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
        "a.py", "pkg/b.py", "pkg/test/c.py", "tests/d.py",
        "idlelib/idle_test/e.py", "lib2to3/tests/f.py", "lib2to3/main.py",
        "site-packages/g.py", "dist-packages/h.py", "__pycache__/i.py",
        "notes.txt",
    ]:  # fmt: skip
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
  @pytest.mark.parametrize("end", ["", "\n", "\n\n", "no line end"])
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
      assert 0 <= size - sources.TEXT_DOCUMENT_BYTES < 40

  def test_one_long_line_is_one_document(self, tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("x" * 50_000)
    (document,) = sources.file_documents([str(path)], "text")
    assert document.text == "x" * 50_000

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

  def test_stdlib_with_explicit_heldout(self, tmp_path):
    (tmp_path / "valid.txt").write_text("held out")
    train, held = sources.load_split(heldout=f"{tmp_path}/valid.txt")
    assert train == sources.stdlib_documents()
    assert len(held) == 1


class TestErrors:
  @pytest.mark.parametrize("globs", ["{}/none*.txt", "{}/a.txt,{}/none*.txt"])
  def test_no_file_matches(self, tmp_path, globs):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"none\*.txt': no file matches"):
      sources.load_split(globs.replace("{}", str(tmp_path)))

  @pytest.mark.parametrize("globs", ["", " , "])
  def test_no_glob(self, globs):
    with pytest.raises(ValueError, match="expected 'stdlib' or globs"):
      sources.load_split(globs)

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
      sources.load_split(str(path))

  def test_text_is_not_utf8(self, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="latin.txt: not UTF-8: .* 0xe9"):
      sources.load_split(str(path))

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

  def test_file_in_both_splits(self, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match="share 1 files, such as .*b.txt"):
      sources.load_split(f"{tmp_path}/*.txt", heldout=f"{tmp_path}/b.txt")

  @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, "0.1", float("nan")])
  def test_fraction(self, fraction):
    with pytest.raises(ValueError, match="heldout_fraction=.* between 0 and 1"):
      sources.load_split(heldout_fraction=fraction)
