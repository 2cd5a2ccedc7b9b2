#!/usr/bin/env bash
# On a host of a pod: installs, starts, watches and stops the run. The launchers
# call it; it can be called by hand, from anywhere.
#
#   host.sh setup EXTRA        a virtual environment; pip install -e '.[EXTRA]'
#   host.sh check CHIPS        all hosts at once: do they see each other?
#   host.sh start [NAME=VALUE ...] -- FLAGS_OF_TRAIN
#   host.sh status
#   host.sh stop SECONDS       SIGTERM, and waits for the save
#   host.sh log [--name]       follows the log
#   host.sh pod -- FLAGS_OF_TRAIN    in the foreground of a container
#
# An answer is one line, "gf HOST STATE DETAIL of HOSTS", where HOSTS is what the
# last check counted, or "?". States: none (nothing was started), running,
# finished, stopped (by `stop`; DETAIL is the exit status), saved (by another
# SIGTERM), ended (status 0 and no word of either, as hosts that print nothing
# end), failed (DETAIL is the exit status, or "lost" if the host went down), other
# (a run with other flags than those that GEMMA_FUNNEL_RUN is the sum of is going
# on; one that has ended counts as none).

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${GEMMA_FUNNEL_STATE:-$HOME/gemma-funnel-run}
VENV=$HOME/gemma-funnel-venv
PYTHON=${GEMMA_FUNNEL_PYTHON:-$VENV/bin/python}
LOG=$STATE/train.log
# What a run says when it has taken its last step, and when SIGTERM saved it.
FINISHED='^finished .* at step [0-9]+$'
SAVED='SIGTERM: saved'

# sum WORD...: tells the flags of a run from those of another.
sum() { printf '%s\0' "$@" | cksum | tr ' ' -; }

answer() {
  local hosts='?'
  [[ ! -s $STATE/hosts ]] || hosts=$(<"$STATE/hosts")
  printf 'gf %s %s %s of %s\n' "$(hostname)" "$1" "$2" "$hosts"
}

error() {
  printf '%s: error: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

setup() {
  local uv
  ! running || error "a run is going on here; stop it first"
  # The image's own Python may be older than the package needs (3.10 on Ubuntu
  # 22.04): uv then brings one. The variable is for images whose pip refuses to
  # install beside the system's packages; older ones do not know it.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv ||
    error "python3 -m pip install uv failed: is PyPI reachable from here?"
  uv=$(python3 -m site --user-base)/bin/uv
  [[ -x $PYTHON ]] ||
    "$uv" venv --python '>=3.11,<3.14' --seed "$VENV" ||
    error "uv venv failed: is GitHub, where uv has Python from, reachable?"
  (cd "$ROOT" && "$PYTHON" -m pip install --quiet -e ".[$1]")
  answer installed -
}

check() {
  local found index count devices
  mkdir -p "$STATE"
  found=$(cd "$ROOT" && "$PYTHON" -c '
import jax
jax.distributed.initialize()
print("gf", jax.process_index(), jax.process_count(), jax.device_count())
' | grep '^gf ') || error "jax.distributed.initialize failed"
  read -r _ index count devices <<<"$found"
  printf '%s\n' "$count" >"$STATE/hosts"
  answer checked "process=$index,devices=$devices"
  [[ $devices == "$1" ]] ||
    error "jax.device_count() is $devices, the slices have $1 chips"
}

# A lock, unlike a process id, cannot outlive its holder or pass to another.
running() {
  [[ -e $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true
}

start() {
  local -a variables=()
  local tries
  while [[ ${1---} != -- ]]; do
    variables+=("$1")
    shift
  done
  [[ ${1-} == -- ]] || error "start: no -- before the flags of train.py"
  shift
  [[ -x $PYTHON ]] || error "no $PYTHON: install first"
  mkdir -p "$STATE"
  exec 9>>"$STATE/lock"
  if ! flock --nonblock 9; then
    answer running "$(cat "$STATE/pid")"
    error "a run is going on here; stop it first"
  fi
  rm -f "$STATE"/{pid,exit,stop}
  sum "$@" >"$STATE/run"
  touch "$LOG"
  # What earlier attempts said is not this one's.
  wc -c <"$LOG" >"$STATE/offset"
  setsid nohup env "${variables[@]}" bash "${BASH_SOURCE[0]}" supervise "$@" \
    >>"$LOG" 2>&1 </dev/null &
  for ((tries = 0; tries < 100; tries++)); do
    [[ ! -s $STATE/pid ]] || break
    sleep 0.1
  done
  answer started "$(cat "$STATE/pid")"
}

# Holds the lock that it inherited until the run has ended.
supervise() {
  local code=0
  cd "$ROOT"
  printf -- '--- %s %s: train.py %s\n' \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(hostname)" "$*"
  "$PYTHON" -u train.py "$@" 9>&- &
  echo "$!" >"$STATE/pid"
  wait "$!" || code=$?
  echo "$code" >"$STATE/exit"
}

status() {
  local code said state=running
  if [[ -n ${GEMMA_FUNNEL_RUN-} && -s $STATE/run &&
    $GEMMA_FUNNEL_RUN != "$(<"$STATE/run")" ]]; then
    state=other
  fi
  if running; then
    answer "$state" "$(cat "$STATE/pid" 2>/dev/null || echo -)"
  elif [[ $state == other ]]; then
    answer none -
  elif [[ ! -e $STATE/exit ]]; then
    if [[ -e $STATE/pid ]]; then answer failed lost; else answer none -; fi
  else
    code=$(<"$STATE/exit")
    said=$(tail -c "+$(($(<"$STATE/offset") + 1))" "$LOG" |
      grep -aE "$FINISHED|$SAVED" | tail -n 1) || true
    if [[ $code == 0 && $said =~ $FINISHED ]]; then
      answer finished "step=${said##* }"
    elif [[ -e $STATE/stop ]]; then
      answer stopped "$code"
    elif [[ $code != 0 ]]; then
      answer failed "$code"
    elif [[ -n $said ]]; then
      answer saved 0
    else
      answer ended 0
    fi
  fi
}

stop() {
  local left=$1
  if running; then
    touch "$STATE/stop"
    kill -TERM "$(<"$STATE/pid")"
    while running && ((left-- > 0)); do
      # Also keeps the connection from looking idle.
      ((left % 10)) || echo "$(hostname): waiting for the save" >&2
      sleep 1
    done
    if running; then
      answer running "$(<"$STATE/pid")"
      error "still saving after $1 s"
    fi
  fi
  status
}

log() {
  [[ -e $LOG ]] || error "no $LOG: nothing was started"
  if [[ ${1-} == --name ]]; then
    tail -n 200 -F "$LOG" | sed -u "s/^/$(hostname): /"
  else
    tail -n 200 -F "$LOG"
  fi
}

# Kubernetes takes status 0 for the end of the work; a run that SIGTERM saved is
# not at its end, so that becomes the status of one that SIGTERM killed.
pod() {
  local code=0 caught pid relay relaying saved
  saved=$(mktemp)
  exec {relay}> >(_relay "$saved")
  relaying=$!
  cd "$ROOT"
  "$PYTHON" -u train.py "$@" >&"$relay" 2>&1 &
  pid=$!
  trap 'caught=1; kill -TERM "$pid" 2>/dev/null || true' TERM
  while caught=; code=0; wait "$pid" || code=$?; [[ -n $caught ]]; do :; done
  exec {relay}>&-
  wait "$relaying" || true
  [[ $code != 0 || ! -s $saved ]] || code=143
  rm -f "$saved"
  exit "$code"
}

_relay() {
  local line
  trap '' TERM
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line"
    [[ $line != *"$SAVED"* ]] || echo 1 >"$1"
  done
}

command=${1-}
(($#)) && shift
case $command in
  setup | check | stop)
    (($# == 1)) || error "$command takes one argument, $# found"
    "$command" "$1"
    ;;
  start | supervise | log) "$command" "$@" ;;
  status) status ;;
  pod)
    [[ ${1-} == -- ]] || error "pod: no -- before the flags of train.py"
    shift
    pod "$@"
    ;;
  *) error "unknown command '$command'; see the top of ${BASH_SOURCE[0]}" ;;
esac
