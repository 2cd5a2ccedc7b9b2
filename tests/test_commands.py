"""Every command of README and docs runs as it stands there, made small.

In a folder that has what they name: files called RUN, CHECKPOINT or TEXTS are
what stands there for a reader's own.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import fake_gcs
import pytest
import tiny_run
import tiny_study

PAGES = ("README.md", *(f"docs/{n}.md" for n in ("study", "pods", "plans")))
# What begins with other words is of the system's, or has tests of its own
# (tpu/), or needs a TPU's compiler.
OTHERS = """make python3 pip gcloud tensorboard export tpu/queued.sh tpu/gke.sh
tpu/slurm.sh""".split()
NOT_HERE = ("python tpu/plan.py",)
MODEL = """num_layers=7 embed_dim=32 mlp_dim=64 num_heads=2 num_kv_heads=1
head_dim=16 vocab_size=512 window=16 max_length=1024 query_pre_attn_scalar=16.0
""".split()
PRETRAIN = """steps=4 batch_size=2 length=64 optimizer.warmup_steps=2
heldout_documents=2 eval_documents=1 loss_chunk=16 latency.repeats=1
latency.length=64 data.heldout_fraction=0.5""".split()
FINETUNE = """epochs=1.0 batch_size=2 optimizer.warmup_steps=1 length=32 seeds=(0,)
""".split()
CODE = "task.max_train=16 task.max_dev=8 task.max_test=8".split()
STUDY = """axes.pretraining=('standard',) axes.finetuning=('on',) axes.start=(1,)
axes.recover=('average',) axes.task=('code_packages',) axes.seed=(0,)
models.small.num_layers=6 models.small.embed_dim=16 models.small.mlp_dim=32
tasks.code_packages.task.max_train=20 tasks.code_packages.task.max_test=20
tasks.code_packages.task.max_dev=10
pretrain.steps=3 pretrain.batch_size=2 pretrain.length=64 latency.repeats=0
pretrain.optimizer.warmup_steps=1 finetune.epochs=1.0 finetune.batch_size=2
similarity.rows=0
""".split()
# What makes a command small, by what is in it.
SMALL = {
  "quickstart.py": [*(f"model.{key}" for key in MODEL), *PRETRAIN],
  "finetune.py": FINETUNE,
  "finetune.py --": CODE,
  "configs/ablation_quick.py": STUDY,
}


def _blocks(page, language=""):
  """The lines of a page's blocks, of which each is a command or its like."""
  text = (tiny_run.ROOT / page).read_text()
  for found, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
    if found == language:
      yield re.sub(r" *\\\n +", " ", block)


def _commands(page):
  """The commands of a page's blocks that begin with "python "."""
  for block in _blocks(page):
    for line in block.splitlines():
      for command in re.sub(r"\s+#.*", "", line).split(" && "):
        if command.startswith("python "):
          yield command


COMMANDS = [c for page in PAGES for c in dict.fromkeys(_commands(page))]


# What the others need.
FIRST = [
  next(c for c in COMMANDS if c.endswith("configs/quickstart.py")),
  next(c for c in COMMANDS if "exported/hf" in c),
]


def _small(command):
  if "--config=" not in command:
    return command.replace(" > ", " --max_new_tokens=4 > ")
  keys = [
    key for word, keys in SMALL.items() if word in command for key in keys
  ]
  given = [f"--config.{key}".split("=", 1) for key in keys]
  added = [f'{key}="{value}"' for key, value in given]
  return " ".join([command, *added])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("commands")
  for name in ("train.py", "eval.py", "configs", "tpu"):
    (folder / name).symlink_to(tiny_run.ROOT / name)
  # "python" is this one.
  (folder / "bin").mkdir()
  python = folder / "bin" / "python"
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  for command in FIRST:
    _run(folder, command)
  (folder / "path" / "to").mkdir(parents=True)
  for name in ("gemma2-2b", "hf-gemma-2-2b"):
    shutil.copytree(folder / "exported" / "hf", folder / "path" / "to" / name)
  shutil.rmtree(folder / "exported")
  run = folder / "runs" / "quickstart"
  (folder / "CHECKPOINT").symlink_to(run)
  shutil.copytree(run, folder / "runs/ablation/pretrain/standard-HASH")
  shutil.copy(run / "tokenizer.model", folder)
  _write_texts(folder)
  with fake_gcs.FakeGCS() as bucket:
    bucket.put_folder(run, "gs://my-bucket/run1")
    with pytest.MonkeyPatch.context() as patch:
      for key, value in bucket.environment().items():
        patch.setenv(key, value)
      yield folder


def _write_texts(folder):
  tiny_study.write_tasks(folder)
  for name in ("amazon", "yelp", "imdb"):
    lines = [
      f"{word} thing\t{n % 2}\n" for n, word in enumerate(tiny_study.WORDS)
    ]
    (folder / f"{name}.tsv").write_text("".join(lines))
  (folder / "labels.txt").write_text("no\nyes\n")
  text = (tiny_run.ROOT / "README.md").read_text()
  (folder / "TEXTS").write_text(text * 10)
  (folder / "texts").mkdir()
  lines = [json.dumps({"text": f"text number {n}"}) for n in range(50)]
  (folder / "texts" / "some.jsonl").write_text("\n".join(lines) + "\n")
  prompts = [json.dumps({"prompt": word}) for word in ("one", "two")]
  (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
  (folder / "FOLDER").mkdir()
  (folder / "FOLDER" / "TASK.jsonl").write_text('{"q": "a", "a": 0}\n' * 3)
  (folder / "FOLDER" / "TASK.yaml").write_text(TASK)


TASK = """
task: TASK
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/TASK.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""


def _run(folder, command, stdin=""):
  env = os.environ | {
    "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(tiny_run.ROOT),
    "XLA_FLAGS": tiny_run.FAST_COMPILE,
    "HF_HOME": str(folder / "hf"),
    "HF_HUB_OFFLINE": "1",
  }
  done = subprocess.run(
    ["bash", "-c", _small(command)],
    cwd=folder,
    env=env,
    input=stdin,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
  return done.stdout


def test_no_other_commands_stand_there():
  for page in PAGES:
    for block in _blocks(page):
      line = block.split("\n")[0]
      # A drawing, and the tree of files.
      if not re.match(r" |train.py  ", line):
        assert line.split()[0] in ("python", *OTHERS), line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, folder):
  if command in FIRST:
    return  # The fixture ran it.
  if command.startswith(NOT_HERE):
    pytest.skip("needs a TPU's compiler")
  if "gs://" in command and not importlib.util.find_spec("gcsfs"):
    pytest.skip("needs gcsfs")
  if "harness" in command and not importlib.util.find_spec("lm_eval"):
    pytest.skip("needs lm_eval")
  if "=TFDS" in command:
    pytest.importorskip("tensorflow_datasets")
    from made_tfds import prepare_sst2

    prepare_sst2(folder / "TFDS")
  _run(folder, command)


def test_readme_s_python(folder):
  (block,) = _blocks("README.md", "python")
  given = (
    "import numpy as np\nprompts = [[2, 5]]\ntokens_BT = np.ones((1, 8), int)"
  )
  (folder / "block.py").write_text(
    f"{given}\n{block}\nprint(outputs[0].tokens, logits_BTV.shape)"
  )
  assert ", 512)" in _run(folder, "python block.py")
