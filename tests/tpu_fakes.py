"""Fakes of gcloud, xpk, SLURM and a pod's Python, for the tests of tpu/.

A fake notes its arguments and says what the test's scenario has next for a call
of its kind. No cloud is involved.
"""

import os
import pathlib
import re
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[1]
TPU = ROOT / "tpu"
FAKED = (
  "gcloud xpk docker kubectl tar sbatch squeue scancel scontrol srun".split()
)
# {calls}: arguments end in NUL, calls in RS. {replies}/KIND: a line of shell
# for each call of the kind; the last one serves all further calls.
FAKE = r"""#!/usr/bin/env bash
{ printf '%s\0' "${0##*/}" "$@"; printf '\036'; } >>"$FAKES/calls"
case " ${0##*/} $* " in
  *" describe "*) kind=describe ;;
  *" tpu-vm list "*) kind=nodes ;;
  *"host.sh status;"*) kind=status ;;
  *"host.sh start "*) kind=start ;;
  *"host.sh stop "*) kind=stop ;;
  *"host.sh check "*) kind=check ;;
  *"host.sh "*) kind=host ;;
  *" queued-resources "*) kind=$4 ;;
  *) kind=${0##*/} ;;
esac
replies=$FAKES/replies/$kind
[[ -e $replies ]] || exit 0
number=$(($(cat "$replies.count" 2>/dev/null || echo 0) + 1))
echo "$number" >"$replies.count"
(($(wc -l <"$replies") >= number)) || number=$(wc -l <"$replies")
eval "$(sed -n "${number}p" "$replies")"
"""
NOT_FOUND = "echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1"
NASTY = (
  "--config.funnel=start=2,stop=8",
  "--config.name=two words",
  "it's",
  'a "b" $HOME `id` \\ !x *',
  "",
  "é~{}[]",
  "#;&|<>()",
)
TRAIN = ("--config=configs/quickstart.py", "--distributed=auto")


def host(
  state: str,
  detail: object = 0,
  count: int = 1,
  of: int | str = 1,
  name: str = "host",
) -> str:
  """Shell that says what `count` hosts say of themselves."""
  return "; ".join(
    f"echo 'gf {name}-{i} {state} {detail} of {of}'" for i in range(count)
  )


class Fakes:
  """A folder of fakes first on the PATH, and what was called."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / "bin").mkdir()
    (folder / "replies").mkdir()
    for name in FAKED:
      self.program(name, FAKE)
    self.path = folder / "bin"
    self.env = {
      "PATH": f"{self.path}:{os.environ['PATH']}",
      "FAKES": str(folder),
      "HOME": str(folder),
      "TMPDIR": str(folder),
    }
    # What any real pod would say, if nothing else is played.
    self.play(
      describe=["echo ACTIVE"],
      status=[host("none", "-")],
      start=[host("started", 1)],
      check=[host("checked", "-")],
      stop=[host("stopped")],
      sbatch=["echo 17"],
    )

  def program(self, name: str, text: str) -> pathlib.Path:
    path = self.folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)
    return path

  def play(self, **kinds: list[str]) -> None:
    for kind, replies in kinds.items():
      path = self.folder / "replies" / kind
      path.write_text("".join(reply + "\n" for reply in replies))
      path.with_name(f"{kind}.count").unlink(missing_ok=True)

  def run(
    self, *command: object, code: int = 0, **env: str
  ) -> subprocess.CompletedProcess:
    """Runs a command in `env`; `code` is the status that it has to end with."""
    (self.folder / "calls").write_bytes(b"")
    done = subprocess.run(
      [str(word) for word in command],
      env={**self.env, **env},
      text=True,
      capture_output=True,
      timeout=300,
      cwd=self.folder,
      stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    return done

  def script(self, name: str, *args: object, **options):
    return self.run("bash", TPU / name, *args, **options)

  def words(self, command: str, function: str) -> list[str]:
    """The arguments of `function` where a shell runs `command`."""
    shell = f"{function}() {{ printf '%s\\0' \"$@\"; }}; {command}"
    return self.run("bash", "-c", shell).stdout.split("\0")[:-1]

  def calls(self) -> list[list[str]]:
    calls = (self.folder / "calls").read_bytes().decode().split("\036")
    return [call.split("\0")[:-1] for call in calls[:-1]]

  def verbs(self) -> list[str]:
    """What the calls were, in a word each."""
    verbs = []
    for call in self.calls():
      text = " ".join(call)
      found = re.search(r"host\.sh (\w+)(?! \])", text.split("then ")[-1])
      verbs.append(found[1] if found else call[4 if "tpus" in call else 0])
      if "tpu-vm" in call:
        verbs[-1] = "nodes"
    return verbs


QUEUED = ("--name=run1", "--project=p", "--zone=us-east5-a")
SLICE = (*QUEUED, "--topology=v5p:4x4x4")
GKE = (*QUEUED, "--cluster=c1")
SLURM = ("--name=run1",)


EVERY_HOST = ("--worker=all", "--node=all", "--batch-size=all")


def queued(fakes, subcommand: str, *flags: str, **options):
  poll = ("--poll=0",) if subcommand in ("create", "watch") else ()
  return fakes.script("queued.sh", subcommand, *poll, *flags, **options)


def gcloud(verb: str, *flags: str) -> list[str]:
  call = f"gcloud compute tpus queued-resources {verb} run1 "
  return [*(call + "--project=p --zone=us-east5-a").split(), *flags]


def ssh(command: str) -> list[str]:
  return gcloud("ssh", *EVERY_HOST, f"--command={command}")


class Host(Fakes):
  """A host of a pod, whose Python is a shell script."""

  def __init__(self, folder: pathlib.Path):
    super().__init__(folder)
    self.state = folder / "state"
    self.env["GEMMA_FUNNEL_STATE"] = str(self.state)
    python = self.program("train", "")
    self.env["GEMMA_FUNNEL_PYTHON"] = str(python)
    self.program("sleep", "#!/bin/sh\nexec /bin/sleep 0.02\n")
    self.trains("exit 0")

  def trains(self, text: str) -> None:
    note = 'printf "%s\\0" "$@" >"$FAKES/argv"\n'
    self.program("train", f"#!/usr/bin/env bash\n{note}{text}\n")

  def __call__(self, *args: object, code: int = 0):
    return self.script("host.sh", *args, code=code)

  def argv(self) -> list[str]:
    return (self.folder / "argv").read_text().split("\0")[:-1]

  def said(self) -> tuple[str, str]:
    """State and detail, once the run has ended."""
    for _ in range(200):
      _, _, state, detail, _, _ = self("status").stdout.split()
      if state != "running":
        break
      time.sleep(0.02)
    return state, detail


class Slurm(Fakes):
  """A queue of one job, whose batch script is run here."""

  def __call__(self, subcommand: str, *flags: str, code: int = 0):
    named = (subcommand, "--name=run1", f"--dir={self.folder}")
    return self.script("slurm.sh", *named, *flags, code=code)

  def submit(self, *flags: str):
    machines = ("--nodes=2", "--gpus-per-node=4", "--time=60")
    words = (*machines, "--python=/bin/sh", *flags, "--", *TRAIN, *NASTY)
    self("submit", *words)
    self.log.touch()
    return (self.folder / "run1.sbatch").read_text()

  @property
  def log(self) -> pathlib.Path:
    return self.folder / "run1.log"

  def batch(self) -> subprocess.Popen:
    """As SLURM starts it: what it prints is added to the log."""
    (self.folder / "calls").write_bytes(b"")
    with open(self.log, "ab") as log:
      return subprocess.Popen(
        ["bash", str(self.folder / "run1.sbatch")],
        env={**self.env, "SLURM_JOB_ID": "17"},
        stdout=log,
        stderr=log,
      )

  def attempt(self, srun: str) -> tuple[int, bool]:
    """Status of one attempt, and whether it was requeued."""
    self.play(srun=[srun])
    code = self.batch().wait(timeout=20)
    return code, ["scontrol", "requeue", "17"] in self.calls()
