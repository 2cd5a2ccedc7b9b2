"""GKE and SLURM: tpu/gke.sh and tpu/slurm.sh, against fakes."""

import time

import pytest
from tpu_fakes import GKE, NASTY, TRAIN, Slurm

# --- gke.sh


def test_the_workload_of_gke(fakes):
  flags = "--topology=v5p:2x2x2 --slices=2 --image=i --restarts=7 --grace=90"
  fakes.script("gke.sh", "launch", *GKE, *flags.split(), "--", *NASTY)
  (call,) = fakes.calls()
  command = call.pop().removeprefix("--command=")
  assert (
    call
    == (
      "xpk workload create --workload=run1 --cluster=c1 --project=p"
      " --zone=us-east5-a --tpu-type=v5p-16 --num-slices=2 --docker-image=i"
      " --max-restarts=7 --restart-on-exit-codes=1,75"
      " --termination-grace-period-seconds=90"
    ).split()
  )
  got = fakes.words(command, "exec")
  assert got == ["bash", "tpu/host.sh", "pod", "--", *NASTY]


@pytest.mark.parametrize("argument", ["a\nb", "a$(b)"])
def test_what_a_workload_cannot_carry(argument, fakes):
  flags = ("--topology=v5e:2x4", "--image=i", "--", argument)
  done = fakes.script("gke.sh", "launch", *GKE, *flags, code=2)
  assert "XPK cannot carry a line break or $(" in done.stderr


@pytest.mark.parametrize(
  ("status", "code", "said"),
  [
    (0, 0, "has finished"),
    (124, 1, "still going on after 5 s"),
    (125, 1, "ended with an error"),
    (1, 1, "could not wait for run1 (status 1)"),
  ],
)
def test_watch_of_gke(status, code, said, fakes):
  fakes.play(xpk=[f"exit {status}"])
  done = fakes.script("gke.sh", "watch", *GKE, "--timeout=5", code=code)
  assert said in done.stderr
  assert fakes.calls()[0][-1] == "--timeout=5"


# --- slurm.sh


@pytest.fixture
def slurm(tmp_path):
  return Slurm(tmp_path)


FINISH = "echo '3: finished /scratch/a b at step 12'"


def test_the_batch_script_asks_for_a_task_a_gpu(slurm):
  script = slurm.submit("--cpus-per-task=16", "--sbatch-flag=--partition=gpu")
  flags = [x for x in script.splitlines() if x.startswith("#SBATCH ")]
  assert [flag.removeprefix("#SBATCH ") for flag in flags] == (
    "--job-name=run1 --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 --time=60"
    " --signal=B:TERM@120 --requeue --open-mode=append"
    f" --output={slurm.log} --cpus-per-task=16 --partition=gpu"
  ).split()
  assert slurm.attempt(FINISH) == (0, False)
  (srun,) = slurm.calls()
  call = "srun --kill-on-bad-exit=1 --label --cpus-per-task=16"
  python = ["/bin/sh", "-u", "train.py"]
  assert srun == [*call.split(), *python, *TRAIN, *NASTY]


def test_a_folder_with_a_percent_is_no_pattern(slurm):
  flags = "--name=run1 --gpus-per-node=4 --time=60 --dir=/x/100%j --dry-run"
  done = slurm.script("slurm.sh", "submit", *flags.split(), "--", *TRAIN)
  assert "#SBATCH --output=/x/100%%j/run1.log\n" in done.stdout
  assert "base=/x/100%j/run1 " in done.stdout


def test_the_time_limit_saves_and_requeues(slurm):
  slurm.submit("--restarts=0")
  up, down = slurm.folder / "up", slurm.folder / "down"
  slurm.play(
    # srun ends when its tasks have, which is after scancel told them.
    srun=[f"touch {up}; until [[ -e {down} ]]; do sleep 0.02; done"],
    scancel=[f"(sleep 0.2; echo '0: SIGTERM: saved W'; touch {down}) &"],
  )
  for _ in range(2):
    process = slurm.batch()
    while not up.exists():
      time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=20) == 0
    calls = slurm.calls()
    assert calls[1:] == [
      ["scancel", "--signal=TERM", "17"],
      ["scontrol", "requeue", "17"],
    ]
    up.unlink()
    down.unlink()
  # What an earlier attempt printed is not taken for this one's.
  assert slurm.attempt(FINISH) == (0, False)
  assert slurm.attempt("true") == (0, True)


def test_errors_are_requeued_so_many_times(slurm):
  slurm.submit("--restarts=2")
  assert slurm.attempt("exit 75") == (0, True)
  assert slurm.attempt("exit 1") == (0, True)
  assert slurm.attempt("exit 75") == (75, False)
  # A mistake is not tried twice; a new submit counts afresh.
  slurm.submit("--restarts=2")
  assert slurm.attempt("exit 2") == (2, False)
  assert slurm.attempt("exit 1") == (0, True)
  assert slurm.attempt(f"{FINISH}; exit 1") == (0, True)
  assert slurm.attempt(FINISH) == (0, False)


def test_stop_does_not_requeue_until_the_next_submit(slurm):
  slurm.submit()
  slurm.play(squeue=["echo 17 RUNNING", "echo 17 COMPLETING", "true"])
  slurm("stop", "--poll=0")
  assert slurm.calls()[1] == ["scancel", "--signal=TERM", "--batch", "17"]
  assert slurm.attempt("true") == (0, False)
  slurm.submit()
  assert slurm.attempt("true") == (0, True)


def test_stop_of_a_job_that_waits(slurm):
  slurm.play(squeue=["echo 17 PENDING", "echo 17 COMPLETING"])
  done = slurm("stop", "--poll=0", "--grace=0", code=1)
  assert slurm.calls()[1] == ["scancel", "17"]
  assert "still in the queue after 0 s: 17 COMPLETING" in done.stderr


def test_submit_refuses_a_second_job_of_the_name(slurm):
  slurm.play(squeue=["echo 17 PENDING"])
  flags = ("--gpus-per-node=1", "--time=1", "--python=/bin/sh", "--", "x")
  done = slurm("submit", *flags, code=1)
  assert "run1 is in the queue: 17 PENDING" in done.stderr
  assert not (slurm.folder / "run1.sbatch").exists()
