"""Checkpoints with bytes changed at random are read or refused, no more."""

import collections
import contextlib
import functools
import json
import pathlib
import re
import resource

from made_checkpoints import bounded_time, contents, parameters
import numpy as np
import pytest
from tiny_checkpoints import damage

import gemma_funnel
from gemma_funnel import cli, convert
from gemma_funnel.convert import param_mapping, reader

_TOKENS = re.compile(r'"[^"]*"|-?[\d.]+(e-?\d+)?|true|false|null|[\[\]{},]')
_ODD = (
  "null",
  "true",
  "-1",
  "0",
  "7",
  "3.0",
  "1e999",
  "NaN",
  "2147483648",
  "1e9",
  "4611686018427387904",
  "9" * 400,
  '""',
  '"x"',
  '"../x"',
  "[]",
  "{}",
  "[[]]",
  '"\\ud800"',
  '"\\u0000"',
  "1000000",
  '"F64"',
  "[1e3]",
  "[[1],{}]",
)


def damage_json(rng, data):
  """One token is another one: what is still JSON gets further."""
  text = data.decode()
  tokens = list(_TOKENS.finditer(text))
  token = tokens[int(rng.integers(len(tokens)))]
  odd = _ODD[int(rng.integers(len(_ODD)))]
  return (text[: token.start()] + odd + text[token.end() :]).encode()


def damage_file(rng, file, data):
  if file.suffix == ".json" or file.name in ("_METADATA", ".zarray"):
    return damage_json(rng, data) if rng.integers(2) else damage(rng, data)
  if file.suffix == ".safetensors":
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.integers(2):
      return damage(rng, data[:end]) + data[end:]
    header = damage_json(rng, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]
  return damage(rng, data)


@contextlib.contextmanager
def bounded_memory(most):
  """None beyond that is asked for, or is ever used."""
  status = lambda key: (
    int(
      re.search(
        rf"{key}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text()
      )[1]
    )
    << 10
  )
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  # Begins the count of the largest use anew.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = status("VmRSS")
  resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 4 * most, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  assert status("VmHWM") - before < most


CASES = {
  "hf": 300,
  "hf shards": 350,
  "learned": 250,
  "ckpt": 250,
  "bin": 250,
  "flat": 150,
  "ours": 150,
  "ocdbt": 150,
  "plain": 150,
}


def test_there_are_two_thousand_cases():
  assert sum(CASES.values()) == 2000


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint_is_read_or_refused(copy, monkeypatch, name):
  """Nothing else: no other exception, no hang, no large allocation."""
  # Abstract models of the same few configurations are most of the work.
  cached = functools.cache(param_mapping.own_parameters)
  monkeypatch.setattr(param_mapping, "own_parameters", cached)
  folder = copy(name)
  files = contents(folder)
  files = {file: data for file, data in files.items() if data}
  rng = np.random.default_rng(list(CASES).index(name))
  counts = collections.Counter()
  with bounded_memory(256 << 20):
    for case in range(CASES[name]):
      # As often a small file of text as one of the many others.
      text = [f for f in files if f.suffix in (".json", ".safetensors")]
      among = text if text and case % 2 else list(files)
      file = among[int(rng.integers(len(among)))]
      data = damage_file(rng, file, files[file])
      file.write_bytes(data)
      what = f"case {case}: {file.name}: {data[:200]}"
      try:
        with bounded_time(2):
          if case % 8 == 0:
            convert.describe(folder)
          if case % 8 == 4:
            gemma_funnel.load(folder)
          values = dict(parameters(reader.open_checkpoint(folder)))
        assert all(np.isfinite(v).all() for v in values.values()), what
        counts["read"] += 1
      except ValueError as error:
        # Named, and one line at the command.
        assert "src" in str(error) and cli.is_named(error), (what, error)
        counts["refused"] += 1
      except Exception as error:
        raise AssertionError(what) from error
      file.write_bytes(files[file])
  # Both happen often, or the damage would show nothing.
  assert min(counts["read"], counts["refused"]) >= 5, counts


@pytest.mark.parametrize(
  "name, file",
  [
    ("learned", "config.json"),
    ("ckpt", "gemma_funnel.json"),
    ("ours", "config.json"),
  ],
)
def test_any_value_of_a_configuration(copy, name, file):
  """Each key with each odd value: nothing but a ValueError that names it."""
  file = copy(name) / file
  raw = json.loads(file.read_text())
  inner = raw.get("model", raw)
  refused = 0
  for values in [raw] if inner is raw else [raw, inner]:
    for key, value in list(values.items()):
      for odd in _ODD:
        values[key] = json.loads(odd)
        file.write_text(json.dumps(raw))
        try:
          with bounded_time(2):
            convert.describe(file.parent)
        except ValueError as error:
          assert "src" in str(error) and cli.is_named(error), (key, odd)
          refused += 1
        except Exception as error:
          raise AssertionError(f"{key}={odd}") from error
      values[key] = value
  assert refused > 100
