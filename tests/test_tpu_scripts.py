"""The launchers of tpu/: dry runs, queued resources, mistakes, the guide."""

import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
from tpu_fakes import (
  EVERY_HOST,
  FAKED,
  GKE,
  NASTY,
  NOT_FOUND,
  QUEUED,
  ROOT,
  SLICE,
  SLURM,
  TPU,
  TRAIN,
  gcloud,
  host,
  queued,
  ssh,
)

# --- dry runs


RUN = ("--", *TRAIN, *NASTY)
PLAIN = {
  "queued.sh create": (*SLICE, "--poll=0"),
  "queued.sh status": QUEUED,
  "queued.sh install": SLICE,
  "queued.sh install --repo": (*SLICE, "--repo=https://x/y z.git", "--ref=v1"),
  "queued.sh launch": (*QUEUED, "--env=A=b c", *RUN),
  "queued.sh watch": (*SLICE, "--poll=0", "--slices=2", *RUN),
  "queued.sh logs": (*QUEUED, "--ssh-flag=--tunnel-through-iap"),
  "queued.sh logs --all": (*QUEUED, "--all"),
  "queued.sh stop": QUEUED,
  "queued.sh delete": QUEUED,
  "gke.sh cluster": (*GKE[1:], "--topology=v6e:8x8", "--spot"),
  "gke.sh build": ("--image=i n",),
  "gke.sh launch": (*GKE, "--topology=v5e:4x4", "--image=i", *RUN),
  "gke.sh watch": GKE,
  "gke.sh status": GKE,
  "gke.sh logs": GKE,
  "gke.sh logs --all": (*GKE, "--all"),
  "gke.sh delete": GKE,
  "gke.sh delete-cluster": GKE[1:],
  "slurm.sh submit": (
    *SLURM,
    *("--gpus-per-node=8", "--time=1:00:00", "--python=/bin/sh"),
    *("--dir=jobs", "--sbatch-flag=--partition=gpu"),
    *RUN,
  ),
  "slurm.sh status": SLURM,
  "slurm.sh stop": (*SLURM, "--dir=jobs", "--poll=0"),
}
# The plain course of events, where it is not what the fakes say anyway.
COURSE = {
  "queued.sh create": dict(describe=[NOT_FOUND, "echo ACTIVE"]),
  "queued.sh watch": dict(
    describe=[NOT_FOUND, "echo ACTIVE"],
    status=[host("bare", "-", of="?"), host("finished")],
  ),
  "slurm.sh stop": dict(squeue=["echo 1 RUNNING", "true"]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_dry_run_prints_what_a_call_does_and_calls_nothing(case, fakes):
  script, subcommand, *_ = case.split()
  (fakes.folder / "jobs").mkdir()
  fakes.play(**COURSE.get(case, {}))
  fakes.script(script, subcommand, *PLAIN[case])
  calls, files = fakes.calls(), read_files(fakes.folder / "jobs")
  assert calls
  shutil.rmtree(fakes.folder / "jobs")
  (fakes.folder / "jobs").mkdir()

  dry = fakes.script(script, subcommand, "--dry-run", *PLAIN[case])
  assert (dry.stderr, fakes.calls()) == ("", [])
  assert read_files(fakes.folder / "jobs") == {}
  fakes.run("bash", "-c", dry.stdout)
  assert fakes.calls() == calls
  assert read_files(fakes.folder / "jobs") == files


def read_files(folder: pathlib.Path) -> dict[str, str]:
  return {path.name: path.read_text() for path in folder.iterdir()}


def test_each_subcommand_is_tried_dry():
  tried = {" ".join(case.split()[:2]) for case in PLAIN}
  for script in ("queued.sh", "gke.sh", "slurm.sh"):
    said = re.search(r"SUBCOMMANDS='(.*)'", (TPU / script).read_text())[1]
    for subcommand in said.split():
      # To follow a local file ends with the user alone.
      if (script, subcommand) != ("slurm.sh", "logs"):
        assert f"{script} {subcommand}" in tried


def test_a_dry_run_needs_no_tools(fakes):
  fakes.env["PATH"] = os.environ["PATH"]
  dry = fakes.script("slurm.sh", "status", "--name=run1", "--dry-run")
  assert dry.stdout == "squeue --me --name=run1 '--format=%i %T %M %l %R'\n"


# --- queued.sh


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (
      "--topology=v5p:4x4x4",
      "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5"
      " --node-id=run1",
    ),
    (
      "--topology=v5e:16x16 --spot",
      "--accelerator-type=v5litepod-256"
      " --runtime-version=v2-alpha-tpuv5-lite --node-id=run1 --spot",
    ),
    (
      "--topology=v6e:2x4 --slices=3 --reserved --service-account=a@b"
      " --create-flag=--internal-ips",
      "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e"
      " --node-count=3 --node-prefix=run1 --reserved --service-account=a@b"
      " --internal-ips",
    ),
    (
      "--accelerator-type=v4-32 --runtime-version=new",
      "--accelerator-type=v4-32 --runtime-version=new --node-id=run1",
    ),
  ],
)
def test_create_asks_for_the_slice(flags, expected, fakes):
  fakes.play(describe=[NOT_FOUND, "echo ACTIVE"])
  queued(fakes, "create", *QUEUED, *flags.split())
  assert fakes.calls()[1] == gcloud("create", *expected.split(), "--quiet")


def test_create_waits_and_says_for_what(fakes):
  waiting = ["WAITING_FOR_RESOURCES"] * 2 + ["PROVISIONING", "ACTIVE"]
  fakes.play(describe=[NOT_FOUND, *(f"echo {state}" for state in waiting)])
  done = queued(fakes, "create", *SLICE)
  assert fakes.verbs() == ["describe", "create", *["describe"] * 4]
  lines = done.stderr.splitlines()
  assert [line.split("; ")[0] for line in lines] == [
    "queued.sh: run1 is WAITING_FOR_RESOURCES",
    "queued.sh: run1 is PROVISIONING",
    "queued.sh: run1 is ACTIVE",
  ]


@pytest.mark.parametrize(
  ("states", "flags", "error"),
  [
    ([NOT_FOUND, "echo PROVISIONING", "echo FAILED"], [], "run1 is FAILED"),
    (["echo SUSPENDED"], [], "run1 is SUSPENDED; delete it"),
    (["echo PROVISIONING"], ["--timeout=0"], "still PROVISIONING after 0 s"),
    (["echo no permission >&2; exit 1"], [], "cannot describe run1"),
  ],
)
def test_create_ends_where_no_slice_can_come(states, flags, error, fakes):
  fakes.play(describe=states)
  done = queued(fakes, "create", *SLICE, *flags, code=1)
  assert error in done.stderr


def test_install_copies_installs_and_checks_all_chips(fakes):
  queued(fakes, "install", *SLICE, "--slices=2")
  calls = fakes.calls()
  assert fakes.verbs() == ["status", "tar", "scp", "ssh", "setup", "check"]
  archive = f"{fakes.folder}/gemma-funnel-run1.tar.gz"
  assert calls[2] == [
    *gcloud("scp")[:5],
    archive,
    "run1:gemma-funnel.tar.gz",
    *QUEUED[1:],
    *EVERY_HOST,
  ]
  assert calls[3] == ssh(
    "rm -rf gemma-funnel && mkdir gemma-funnel &&"
    " tar -xzf gemma-funnel.tar.gz -C gemma-funnel"
  )
  assert calls[4:] == [
    ssh("bash gemma-funnel/tpu/host.sh setup tpu"),
    ssh("bash gemma-funnel/tpu/host.sh check 128"),
  ]


def test_what_is_copied(fakes):
  (fakes.path / "tar").unlink()
  kept = fakes.folder / "kept.tar.gz"
  fakes.play(scp=[f'cp "$5" {kept}'])
  queued(fakes, "install", *SLICE)
  with tarfile.open(kept) as archive:
    names = archive.getnames()
  assert {"./train.py", "./tpu/host.sh", "./setup.cfg"} <= set(names)
  parts = {part for name in names for part in name.split("/")}
  assert not parts & {".git", "runs", ".venv", "__pycache__"}
  assert not (fakes.folder / "gemma-funnel-run1.tar.gz").exists()


def test_what_git_ignores_is_copied_nowhere():
  ignored = (ROOT / ".gitignore").read_text().replace("/\n", "\n").split()
  script = (TPU / "queued.sh").read_text()
  not_copied = re.search(r"NOT_COPIED=\(([^)]*)\)", script)[1]
  docker = (TPU / "Dockerfile.dockerignore").read_text().replace("**/", "")
  assert set(shlex.split(not_copied)) == {".git", *ignored}
  assert set(docker.split()) == {".git", *ignored}


def test_launch_hands_over_every_argument_as_it_is(fakes):
  generator = random.Random(0)
  characters = "ab =,.'\"\\$`!*?[]{}()<>|&;#~\n\té\u2003"
  for _ in range(5):
    words = [
      "".join(generator.choices(characters, k=generator.randrange(12)))
      for _ in range(6)
    ]
    queued(fakes, "launch", *QUEUED, "--env=X=1 '2'", "--", *words)
    command = fakes.calls()[-1][-1].removeprefix("--command=")
    # As the shell of a host reads it.
    start = ["gemma-funnel/tpu/host.sh", "start", "X=1 '2'", "--"]
    assert fakes.words(command, "bash") == [*start, *words]


@pytest.mark.parametrize("subcommand", ["launch", "install", "delete"])
def test_a_run_that_goes_on_is_in_the_way(subcommand, fakes):
  mixed = f"{host('ended', of='?')}; {host('running', of='?')}"
  fakes.play(status=[mixed])
  flags = {"launch": (*QUEUED, "--", "x"), "install": SLICE, "delete": QUEUED}
  done = queued(fakes, subcommand, *flags[subcommand], code=1)
  assert "a run is going on" in done.stderr
  assert fakes.verbs()[-1] == "status"


def test_delete_now_does_not_ask(fakes):
  fakes.play(status=[host("running")])
  queued(fakes, "delete", *QUEUED, "--now")
  assert fakes.calls()[1:] == [gcloud("delete", "--force", "--quiet")]


@pytest.mark.parametrize(
  ("reply", "error"),
  [
    (host("started", 1, count=2, of=3), "2 of 3 hosts answered"),
    ("true", "no host answered"),
    (f"{host('started', 1)}; exit 1", "not started everywhere"),
  ],
)
def test_launch_wants_every_host(reply, error, fakes):
  fakes.play(start=[reply])
  done = queued(fakes, "launch", *QUEUED, "--", "x", code=1)
  assert error in done.stderr


def test_status_shows_each_host_in_order(fakes):
  fakes.play(status=[host("running", 5, count=11, of=11)])
  done = queued(fakes, "status", *QUEUED)
  assert [line.split()[1] for line in done.stdout.splitlines()] == [
    f"host-{i}" for i in range(11)
  ]


# --- mistakes


@pytest.mark.parametrize(
  ("call", "error"),
  [
    ("queued.sh", "no subcommand; one of: create status"),
    ("queued.sh make", "unknown subcommand 'make'; one of: create status"),
    ("queued.sh status --project=p --zone=z", "no --name (nor POD_NAME"),
    ("queued.sh status --name=a --zone=z", "no --project (nor POD_PROJECT"),
    ("queued.sh status --name=a --project=p", "no --zone (nor POD_ZONE"),
    ("queued.sh status --name=A_b", "--name=A_b: at most 40 of a-z"),
    ("queued.sh create {q}", "no --topology (nor POD_TOPOLOGY"),
    ("queued.sh create {q} --topology=v5p", "GENERATION:SHAPE is needed"),
    ("queued.sh create {q} --topology=v9:2x2", "are v5e, v5p and v6e"),
    ("queued.sh create {q} --topology=v5e:3x3", "v5e has 1x1 2x2 2x4"),
    (
      "queued.sh create {q} --topology=v5e:2x2 --accelerator-type=v4-8",
      "not both",
    ),
    ("queued.sh create {q} --accelerator-type=h100", "v4-N, v5p-N"),
    ("queued.sh create {q} --topology=v5e:2x2 --slices=0", "at least one"),
    ("queued.sh create {q} --topology=v5e:2x2 --slices=x", "a whole number"),
    ("queued.sh create {q} --topology=v5e:2x2 --slices=08", "a whole number"),
    ("queued.sh create {q} --topology=v5e:2x2 --poll=1m", "a number of sec"),
    ("queued.sh create {q} --topology=v5e:2x2 --spot --reserved", "not both"),
    ("queued.sh create {q} --spot=yes", "--spot takes no value, 'yes' found"),
    ("queued.sh create {q} --poll", "--poll needs a value"),
    ("queued.sh status {q} --spot", "--spot is for create, watch, not for"),
    ("queued.sh status {q} --sptt", "unknown flag --sptt"),
    ("queued.sh status {q} more", "unexpected 'more'"),
    ("queued.sh status {q} -- x", "status takes nothing after --"),
    ("queued.sh launch {q}", "launch needs the flags of train.py after a --"),
    ("queued.sh launch {q} --env=1x -- x", "--env=1x: NAME=VALUE"),
    ("queued.sh install {q} --topology=v5e:2x2 --ref=v1", "--ref=v1 is of"),
    ("gke.sh cluster --cluster=c --project=p --zone=z", "no --topology"),
    ("gke.sh status {q}", "no --cluster (nor POD_CLUSTER"),
    ("gke.sh build", "no --image"),
    ("slurm.sh submit --name=a -- x", "no --gpus-per-node"),
    ("slurm.sh submit --name=a --gpus-per-node=8 -- x", "no --time"),
    ("slurm.sh submit --name=a --gpus-per-node=0 --time=1 -- x", "at least 1"),
    (
      "slurm.sh submit --name=a --gpus-per-node=8 --time=1 --python=/no -- x",
      "--python=/no: no such program",
    ),
    (
      "slurm.sh submit --name=a --gpus-per-node=8 --time=1 --python=/bin/sh"
      " --sbatch-flag='--comment=a b' -- x",
      "without spaces, quotes",
    ),
  ],
)
def test_mistakes_are_one_line(call, error, fakes):
  script, *words = shlex.split(call.format(q=" ".join(QUEUED)))
  done = fakes.script(script, *words, code=2)
  assert done.stdout == ""
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith(f"{script}: error: ")
  assert error in done.stderr
  assert all("describe" in call or "ssh" in call for call in fakes.calls())


@pytest.mark.parametrize(
  ("call", "tool"),
  [
    ("queued.sh status {q}", "gcloud"),
    ("gke.sh status {q} --cluster=c", "xpk"),
    ("gke.sh build --image=i", "docker"),
    ("slurm.sh status --name=a", "squeue"),
  ],
)
def test_a_missing_tool_is_named(call, tool, fakes):
  for name in FAKED:
    (fakes.path / name).unlink()
  for name in ("bash", "dirname"):
    (fakes.path / name).symlink_to(shutil.which(name))
  fakes.env["PATH"] = str(fakes.path)
  done = fakes.script(*call.format(q=" ".join(QUEUED)).split(), code=2)
  assert f"no {tool} on the PATH: " in done.stderr


def test_settings_from_the_environment(fakes):
  env = dict(
    POD_NAME="a", POD_PROJECT="b", POD_ZONE="c", POD_TOPOLOGY="v5e:2x4"
  )
  fakes.play(describe=[NOT_FOUND, "echo ACTIVE"])
  queued(fakes, "create", "--name", "b", POD_SPOT="1", **env)
  call = fakes.calls()[1]
  assert call[5:8] == ["b", "--project=b", "--zone=c"]
  assert "--accelerator-type=v5litepod-8" in call and "--spot" in call
  done = queued(fakes, "create", POD_SPOT="yes", code=2, **env)
  assert "POD_SPOT=yes in the environment: 0 or 1" in done.stderr


@pytest.mark.parametrize("script", ["queued.sh", "gke.sh", "slurm.sh"])
def test_help_has_all_there_is(script, fakes):
  done = fakes.script(script, "--help")
  text = (TPU / script).read_text()
  for subcommand in re.search(r"SUBCOMMANDS='(.*)'", text)[1].split():
    assert re.search(rf"^  {subcommand}  ", done.stdout, re.M)
  flags = re.findall(r"^(?:setting|switch|repeated) (\S+)", text, re.M)
  for flag in flags:
    assert re.search(rf"^  --{flag}\b", done.stdout, re.M)
    # None is declared and never read.
    reads = rf"opt\[{flag}\]|\${{{flag.replace('-', '_')}\[@\]}}"
    shared = "|whole|dry-run|required"
    assert re.search(reads + shared.split("|required")[0], text)
    if flag not in ("dry-run", "poll"):
      assert re.search(reads, text), flag


def test_shellcheck_finds_nothing():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  found = shutil.which("shellcheck") or (beside.exists() and str(beside))
  if not found:
    pytest.skip("no shellcheck")
  scripts = sorted(str(path) for path in TPU.glob("*.sh"))
  done = subprocess.run(
    [found, "-x", *scripts], capture_output=True, text=True, cwd=TPU
  )
  assert done.stdout == ""


# --- docs/pods.md


def test_the_commands_of_the_guide_and_of_help_are_ones_that_there_are(fakes):
  guide = (ROOT / "docs" / "pods.md").read_text()
  exported = dict(re.findall(r"^export (\w+)=(\S+)", guide, re.M))
  texts = re.findall(r"^```\w*\n(.*?)^```", guide, re.M | re.S)
  texts += [
    re.search(r"\n\n  tpu/\S+ [a-z].*?\n\n", path.read_text(), re.S)[0]
    for path in (TPU / "queued.sh", TPU / "gke.sh", TPU / "slurm.sh")
  ]
  commands = [
    line.strip()
    for text in texts
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip().startswith("tpu/")
  ]
  assert len(commands) > 20
  for command in commands:
    script, subcommand, *words = shlex.split(command, comments=True)
    dry = (script.removeprefix("tpu/"), subcommand, "--dry-run")
    fakes.script(*dry, *words, **exported)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--config=configs/ablation_quick.py"], "python -m gemma_funnel.study"),
    (["--config=configs/quickstart.py", "--slices=0"], "slices=0: expected"),
  ],
)
def test_a_plan_of_wrong_inputs(flags, said):
  command = [sys.executable, TPU / "plan.py", "--topology=v5p:2x2x1", *flags]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    command, env=env, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and said in line
