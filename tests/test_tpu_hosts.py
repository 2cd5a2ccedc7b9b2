"""What runs on the hosts of a pod: tpu/host.sh, alone and under queued.sh."""

import os
import signal
import subprocess

import pytest
from tpu_fakes import FAKE, NASTY, QUEUED, SLICE, TPU, TRAIN, Host, queued

# --- host.sh


@pytest.fixture
def pod_host(tmp_path):
  return Host(tmp_path)


# Until SIGTERM; `sleep` in pieces, for a trap waits for what is running.
LOOP = "while :; do /bin/sleep 0.02; done"
SAVES = f"trap 'echo SIGTERM: saved W at step 3; exit 0' TERM; {LOOP}"


def test_a_host_runs_what_it_is_told_once(pod_host):
  assert pod_host("status").stdout.split()[2:] == ["none", "-", "of", "?"]
  pod_host.trains(f"echo env=$X; {SAVES}")
  pod_host("start", "X=a b", "--", *TRAIN, *NASTY)
  assert pod_host("status").stdout.split()[2] == "running"
  again = pod_host("start", "--", *TRAIN, code=1)
  assert "a run is going on here" in again.stderr
  assert pod_host("stop", "90").stdout.split()[2] == "stopped"
  assert pod_host.argv() == ["-u", "train.py", *TRAIN, *NASTY]
  assert "env=a b" in (pod_host.state / "train.log").read_text()


@pytest.mark.parametrize(
  ("train", "expected"),
  [
    ("echo finished gs://b/run 1 at step 12", ("finished", "step=12")),
    ("echo all is well", ("ended", "0")),
    ("echo finished W at step 12; exit 75", ("failed", "75")),
    ("echo error: bad >&2; exit 2", ("failed", "2")),
    ("kill -KILL $$", ("failed", "137")),
    ("echo SIGTERM: saved W at step 3", ("saved", "0")),
  ],
)
def test_a_host_says_how_its_run_ended(train, expected, pod_host):
  pod_host.trains(train)
  pod_host("start", "--", "x")
  assert pod_host.said() == expected


def test_what_an_earlier_attempt_said_does_not_count(pod_host):
  pod_host.trains("echo finished W at step 12")
  pod_host("start", "--", "x")
  assert pod_host.said()[0] == "finished"
  pod_host.trains("exit 0")
  pod_host("start", "--", "x")
  assert pod_host.said() == ("ended", "0")
  log = (pod_host.state / "train.log").read_text()
  assert log.count(": train.py x") == 2 and "finished W" in log


def test_a_run_of_other_flags_is_another_run(pod_host):
  pod_host.trains("echo finished W at step 12")
  pod_host("start", "--", "--config=a b", "x")
  assert pod_host.said()[0] == "finished"
  own = (pod_host.state / "run").read_text().strip()
  for name, said in ((own, "finished"), ("1-2", "none"), ("", "finished")):
    pod_host.env["GEMMA_FUNNEL_RUN"] = name
    assert pod_host.said()[0] == said
  pod_host.trains(LOOP)
  pod_host("start", "--", "--config=a b", "x")
  for name, said in ((own, "running"), ("1-2", "other")):
    pod_host.env["GEMMA_FUNNEL_RUN"] = name
    assert pod_host("status").stdout.split()[2] == said
  del pod_host.env["GEMMA_FUNNEL_RUN"]
  pod_host("stop", "90")


def test_a_host_that_went_down_lost_its_run(pod_host):
  pod_host.state.mkdir()
  (pod_host.state / "pid").write_text("1\n")
  (pod_host.state / "lock").touch()
  assert pod_host.said() == ("failed", "lost")


def test_stop_tells_of_a_save_that_takes_too_long(pod_host):
  pod_host.trains(f"trap '' TERM; {LOOP}")
  pod_host("start", "--", "x")
  late = pod_host("stop", "3", code=1)
  os.kill(int((pod_host.state / "pid").read_text()), signal.SIGKILL)
  assert "still saving after 3 s" in late.stderr
  # It was asked to stop: nobody should start it again.
  assert pod_host.said() == ("stopped", "137")


def test_stop_of_nothing_leaves_what_was(pod_host):
  pod_host.trains("echo finished W at step 12")
  pod_host("start", "--", "x")
  pod_host.said()
  assert pod_host("stop", "1").stdout.split()[2] == "finished"


def test_setup_makes_an_environment_with_a_python_of_its_own(pod_host):
  home = pod_host.folder
  del pod_host.env["GEMMA_FUNNEL_PYTHON"]
  pod_host.program("uv", FAKE)
  pod_host.program("python3", FAKE)
  venv = home / "gemma-funnel-venv"
  pod_host.play(
    uv=[f"mkdir -p {venv}/bin; cp {home}/bin/uv {venv}/bin/python"],
    python3=["true", f"echo {home}"],  # pip install; site --user-base
  )
  assert pod_host("setup", "tpu").stdout.split()[2] == "installed"
  assert pod_host.calls() == [
    ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
    ["python3", "-m", "site", "--user-base"],
    ["uv", "venv", "--python", ">=3.11,<3.14", "--seed", str(venv)],
    ["python", "-m", "pip", "install", "--quiet", "-e", ".[tpu]"],
  ]


def test_check_compares_chips_and_counts_hosts(pod_host):
  pod_host.trains("echo noise; echo gf 3 16 64")
  said = pod_host("check", "64").stdout.split()[2:]
  assert said == "checked process=3,devices=64 of 16".split()
  # From now on a host knows how many there are.
  assert pod_host("status").stdout.split()[-1] == "16"
  wrong = pod_host("check", "128", code=1)
  assert "jax.device_count() is 64, the slices have 128" in wrong.stderr
  pod_host.trains("exit 1")
  assert "initialize failed" in pod_host("check", "64", code=1).stderr


@pytest.mark.parametrize(
  ("train", "code"),
  [
    ("echo finished W at step 12", 0),
    # Kubernetes takes 0 for the end of the work.
    ("echo SIGTERM: saved W at step 3", 143),
    ("echo SIGTERM: saved W at step 3; exit 75", 75),
    ("exit 2", 2),
  ],
)
def test_the_status_of_a_container(train, code, pod_host):
  pod_host.trains(train)
  done = pod_host("pod", "--", *NASTY, code=code)
  assert pod_host.argv() == ["-u", "train.py", *NASTY]
  said = train.removeprefix("echo ").split(";")[0] + "\n"
  assert done.stdout == (said if train.startswith("echo") else "")


def test_a_container_passes_sigterm_on(pod_host):
  pod_host.trains(f"echo up; {SAVES}")
  # The shell that XPK writes around the command.
  xpk = (
    "_sigterm() (kill -SIGTERM $! 2>/dev/null;); trap _sigterm SIGTERM;"
    f"(exec bash {TPU}/host.sh pod -- x) & PID=$!;"
    "while kill -0 $PID 2>/dev/null; do sleep 5; done; wait $PID"
  )
  process = subprocess.Popen(
    ["bash", "-c", xpk], env=pod_host.env, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "up\n"
  process.terminate()
  out, _ = process.communicate(timeout=20)
  assert out == "SIGTERM: saved W at step 3\n"
  assert process.returncode == 143


# --- queued.sh and host.sh together


# What gcloud does with a command for all hosts, for hosts that are folders.
ON_HOSTS = r"""#!/usr/bin/env bash
status=0
for i in 0 1; do
  cd "$FAKES/host-$i"
  HOME=$PWD HOST_NUMBER=$i bash -c "${!##--command=}" || status=$?
done
exit "$status"
"""
# Python on a host: the check, pip, and a run that fails at first.
HOST_PYTHON = r"""#!/usr/bin/env bash
case $1 in
  -c) echo "gf $HOST_NUMBER 2 64"; exit ;;
  -m) exit ;;
esac
printf '%s\0' "$@" >>"$HOME/argv"
[[ -e $HOME/again ]] || { touch "$HOME/again"; exit $((HOST_NUMBER ? 75 : 1)); }
((HOST_NUMBER)) || echo "finished gs://b/run1 at step 9"
"""


def test_the_launcher_and_the_hosts_understand_each_other(fakes):
  folder = fakes.folder
  (fakes.path / "tar").unlink()
  fakes.program("on_hosts", ON_HOSTS)
  fakes.program("hostname", '#!/bin/sh\necho "host-$HOST_NUMBER"\n')
  fakes.program("host_python", HOST_PYTHON)
  fakes.program(
    "uv",
    '#!/bin/sh\nmkdir -p "$5/bin"\n'
    'cp "$FAKES/bin/host_python" "$5/bin/python"\n',
  )
  fakes.program("python3", '#!/bin/sh\n[ "$2" != site ] || echo "$FAKES"\n')
  on_hosts = ['on_hosts "$@"']
  fakes.play(
    **{kind: on_hosts for kind in ("status", "check", "start", "stop")},
    host=on_hosts,
    ssh=on_hosts,
    scp=[
      f'for i in 0 1; do cp "$5" {folder}/host-$i/gemma-funnel.tar.gz; done'
    ],
  )
  for i in range(2):
    (folder / f"host-{i}").mkdir()
  done = queued(
    fakes, "watch", *SLICE, "--poll=0.2", "--restarts=1", "--", *TRAIN, *NASTY
  )
  assert "installed on 2 hosts, 64 chips" in done.stderr
  assert "the run ended with status 75; again (1 of 1)" in done.stderr
  verbs = fakes.verbs()
  assert verbs.count("start") == 2 and verbs.count("setup") == 1
  status = queued(fakes, "status", *QUEUED)
  assert status.stdout == (
    "gf host-0 finished step=9 of 2\ngf host-1 ended 0 of 2\n"
  )
  for i in range(2):
    argv = (folder / f"host-{i}" / "argv").read_text().split("\0")[:-1]
    assert argv == ["-u", "train.py", *TRAIN, *NASTY] * 2
