"""queued.sh watch: preemptions, errors and ends, against a fake gcloud."""

import subprocess

import pytest
from tpu_fakes import NOT_FOUND, SLICE, TRAIN, host, queued, ssh


def watch(fakes, *flags: str, code: int = 0):
  return queued(fakes, "watch", *SLICE, *flags, "--", *TRAIN, code=code)


ROUND = "describe status"
INSTALL = "tar scp ssh setup check start"


def test_watch_makes_a_new_slice_after_a_preemption(fakes):
  states = ["echo ACTIVE"] * 2 + ["echo SUSPENDING", "echo SUSPENDED"]
  states += [NOT_FOUND, "echo WAITING_FOR_RESOURCES", "echo ACTIVE"]
  bare = host("bare", "-", of="?")
  fakes.play(
    describe=states,
    status=[host("running"), host("running"), bare, host("finished", "step=9")],
  )
  done = watch(fakes, "--spot")
  new = "describe describe delete describe create describe"
  want = f"{ROUND} {ROUND} {new} {ROUND} {INSTALL} {ROUND}"
  assert " ".join(fakes.verbs()) == want
  assert "preempted" in done.stderr
  assert "--spot" in fakes.calls()[8]
  start = "bash gemma-funnel/tpu/host.sh start -- " + " ".join(TRAIN)
  assert fakes.calls()[-3] == ssh(start)


def test_watch_sees_a_preempted_node_of_an_active_request(fakes):
  fakes.play(
    describe=["echo ACTIVE", "echo ACTIVE", NOT_FOUND, "echo ACTIVE"],
    status=["exit 1", "exit 1", host("none", "-"), host("finished")],
    nodes=["printf 'READY\\nREADY\\n'", "printf 'READY\\nPREEMPTED\\n'"],
  )
  watch(fakes)
  new = "delete describe create"
  want = f"{ROUND} nodes {ROUND} nodes {new} {ROUND} start {ROUND}"
  assert " ".join(fakes.verbs()) == want
  assert (
    fakes.calls()[2]
    == (
      "gcloud compute tpus tpu-vm list --project=p --zone=us-east5-a"
      ' --filter=queuedResource~"/run1$" --format=value(state)'
    ).split()
  )


def test_watch_ends_where_another_run_goes_on(fakes):
  fakes.play(status=[host("other")])
  done = watch(fakes, code=1)
  assert "a run with other flags is going on on run1" in done.stderr
  assert " ".join(fakes.verbs()) == ROUND


def test_watch_asks_for_its_own_run(fakes):
  fakes.play(status=[host("finished")])
  watch(fakes)
  asked = [call[-1] for call in fakes.calls() if "status;" in call[-1]]
  other = "".join(f"{flag}\0" for flag in TRAIN)
  done = subprocess.run(["cksum"], input=other, capture_output=True, text=True)
  name = "-".join(done.stdout.split())
  assert asked and f"GEMMA_FUNNEL_RUN={name}; " in asked[0]


@pytest.mark.parametrize("code", [1, 75, "lost"])
def test_watch_starts_again_after_errors(code, fakes):
  failed = host("failed", code)
  fakes.play(status=[failed, failed, host("running"), host("finished")])
  done = watch(fakes, "--restarts=2")
  want = f"{ROUND} start {ROUND} start {ROUND} {ROUND}"
  assert " ".join(fakes.verbs()) == want
  assert f"status {code}; again (2 of 2)" in done.stderr


def test_watch_gives_up_after_so_many_errors(fakes):
  fakes.play(status=[host("failed", 75)])
  done = watch(fakes, "--restarts=2", code=1)
  assert fakes.verbs().count("start") == 2
  assert "that was error 3, --restarts=2" in done.stderr


@pytest.mark.parametrize(
  ("status", "code", "said"),
  [
    # One host's mistake, whatever the others ended with.
    (f"{host('failed', 2)}; {host('failed', 1, name='i')}", 1, "a mistake"),
    (f"{host('failed', 1)}; {host('failed', 2, name='i')}", 1, "a mistake"),
    (host("ended"), 1, "none says it finished"),
    (f"{host('stopped')}; {host('ended')}", 0, "stopped by hand"),
    (f"{host('failed', 1)}; {host('stopped', 1)}", 0, "stopped by hand"),
    # Host 0 is done; how another shut down does not matter.
    (f"{host('finished')}; {host('failed', 1)}", 0, "finished; delete"),
    (f"{host('finished')}; {host('ended')}", 0, "finished"),
  ],
)
def test_watch_ends(status, code, said, fakes):
  fakes.play(status=[status.replace("of 1", "of ?")])
  done = watch(fakes, code=code)
  assert said in done.stderr
  assert "start" not in fakes.verbs()


def test_watch_goes_on_after_a_save_that_nobody_asked_for(fakes):
  saved = f"{host('saved', of='?')}; {host('ended', of='?')}"
  fakes.play(status=[saved, host("finished")])
  watch(fakes, "--restarts=0")
  assert fakes.verbs() == f"{ROUND} start {ROUND}".split()


def test_watch_waits_for_hosts_that_still_run(fakes):
  mixed = f"{host('failed', 1, of='?')}; {host('running', of='?')}"
  fakes.play(status=[mixed, host("finished")])
  watch(fakes)
  assert "start" not in fakes.verbs()


def test_watch_outlives_gcloud_and_a_failed_install(fakes):
  bare = host("bare", "-", of="?")
  fakes.play(
    describe=["echo 503 >&2; exit 1", "echo ACTIVE"],
    status=[bare, bare, host("finished")],
    scp=["exit 1", "true"],
  )
  done = watch(fakes)
  assert "install failed; again (1 of 10)" in done.stderr
  want = f"describe {ROUND} tar scp {ROUND} {INSTALL} {ROUND}"
  assert " ".join(fakes.verbs()) == want


def test_watch_does_not_ask_for_ever(fakes):
  fakes.play(describe=[NOT_FOUND, "echo FAILED"] * 9)
  done = watch(fakes, "--restarts=3", code=1)
  assert fakes.verbs().count("create") == 4
  assert "run1 is FAILED; that was error 4" in done.stderr
