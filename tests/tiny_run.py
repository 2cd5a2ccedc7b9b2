"""A run small enough for tests: its text, configuration and command."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
VOCAB = 512
# Tests spend their time compiling: a quarter of it with these flags. From 0.11
# on there is no second one, and libtpu has it not: an unknown flag ends the
# process.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith(
  "0.10."
) and not importlib.util.find_spec("libtpu"):
  FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
# What configs/quickstart.py is changed by; sizes that 8 devices divide.
CHANGES = {
  "steps": 12,
  "batch_size": 8,
  "length": 32,
  "model.vocab_size": VOCAB,
  "model.num_layers": 2,
  "model.embed_dim": 32,
  "model.mlp_dim": 64,
  "model.num_heads": 4,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.window": 8,
  "model.max_length": 64,
  "model.kernel": "reference",
  "funnel": "start=1,stride=2",
  "optimizer.warmup_steps": 2,
  "loss_chunk": 16,
  "log_every": 1,
  "eval_every": 1000,
  "eval_documents": 1,
  "heldout_documents": 2,
  "checkpoint_every": 4,
  "keep": 3,
  "tensorboard": False,
  "latency.repeats": 0,
}


def use_one_device(patch) -> None:
  """Makes meshes of the first of this process's devices, whatever their size.

  Programs for eight take twice as long to compile.
  """
  import jax

  from gemma_funnel.parallel import sharding

  make = sharding.make_mesh
  patch.setattr(
    sharding, "make_mesh", lambda config, *_: make(config, jax.devices()[:1])
  )


def load_config(name: str = "quickstart", *args):
  """get_config() of a file of configs/."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


def write_corpus(folder: pathlib.Path, documents: int = 100) -> str:
  """Some text in which words follow words; returns its path."""
  draw = random.Random(0)
  words = [
    "".join(draw.choices("abcdefghijklm", k=draw.randint(2, 7)))
    for _ in range(200)
  ]
  path = folder / "corpus.jsonl"
  with path.open("w") as f:
    for _ in range(documents):
      at, text = draw.randrange(200), []
      for _ in range(80):
        at = (7 * at + draw.randrange(3)) % 200
        text.append(words[at])
      f.write(json.dumps({"text": " ".join(text)}) + "\n")
  return str(path)


def make_config(workdir, source, **changes):
  """The configuration of a tiny run; a "." in a key is written "__"."""
  config = load_config()
  changes = {k.replace("__", "."): v for k, v in changes.items()}
  config.update_from_flattened_dict(
    {**CHANGES, "workdir": str(workdir), "data.source": str(source), **changes}
  )
  return config


def train(config, make_evaluate=None):
  """Trains a model on text; evaluates nothing unless told to."""
  from gemma_funnel.training import pretrain, trainer

  return trainer.train(pretrain.resolve(config), make_evaluate)


def command(workdir, source, *flags: str) -> list[str]:
  """The command of the same run; `flags` come last and so prevail."""
  changes = {**CHANGES, "workdir": workdir, "data.source": source}
  return [
    sys.executable,
    str(ROOT / "train.py"),
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    *(f"--config.{key}={value}" for key, value in changes.items()),
    *flags,
  ]


def environment(devices: int = 1) -> dict[str, str]:
  """Of a process with as many host devices, whatever this one has."""
  flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(args: list[str], devices: int = 1, more=None) -> subprocess.Popen:
  """Starts a process of so many devices, in a group of its own.

  `more` is of its environment.
  """
  # Files, not pipes: workers of a killed process would hold those open.
  files = [tempfile.TemporaryFile("w+") for _ in range(2)]
  process = subprocess.Popen(
    args,
    stdout=files[0],
    stderr=files[1],
    env={**environment(devices), **(more or {})},
    cwd=ROOT,
    start_new_session=True,
  )
  process.files = files
  return process


def start_all(
  args: list[str], count: int, devices: int = 1, flags=(), environments=None
) -> list:
  """Starts the processes of one run; `flags` are of the last of them."""
  if count == 1:
    return [start([*args, *flags], devices)]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  joint = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
  own = [[f"--process_id={i}"] for i in range(count)]
  own[-1] += flags
  environments = environments or [{}] * count
  return [
    start([*args, *joint, *more], devices, env)
    for more, env in zip(own, environments, strict=True)
  ]


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
  """Waits; returns (stdout, stderr) of a process that ends with `status`."""
  try:
    process.wait(timeout=300)
  finally:
    try:
      os.killpg(process.pid, signal.SIGKILL)  # Workers of a killed process.
    except ProcessLookupError:
      pass
    process.wait()
    said = []
    for file in process.files:
      with file:
        file.seek(0)
        said.append(file.read())
  assert process.returncode == status, "\n".join(map(str, said))
  return said[0], said[1]


def metrics(workdir) -> str:
  """metrics.jsonl, but for how fast the run was."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return "\n".join(x for x in lines if json.loads(x)["kind"] != "speed")


def train_losses(workdir) -> dict[int, float]:
  """Losses by step in metrics.jsonl, in which each step is once."""
  losses = {}
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  for line in text.splitlines():
    entry = json.loads(line)
    if entry["kind"] == "train":
      assert entry["step"] not in losses
      losses[entry["step"]] = entry["loss"]
  return losses
