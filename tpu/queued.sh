#!/usr/bin/env bash
# Cloud TPU queued resources: from a request for a slice to a finished run.

# shellcheck disable=SC2034  # Read by common.sh.
PROGRAM=queued.sh
SUBCOMMANDS='create status install launch watch logs stop delete'
ABOUT='Runs train.py on Cloud TPU queued resources, by gcloud.

  tpu/queued.sh SUBCOMMAND [--flag=value ...] [-- FLAGS_OF_TRAIN]

  create    requests the slice and waits until it is ACTIVE
  status    what the request and the run on each host are doing
  install   copies this repository to all hosts (or clones --repo), installs it
            into a virtual environment, checks that the hosts see each other
  launch    starts train.py on all hosts; refuses where a run is going on
  watch     all of the above as needed, again after each preemption, until the
            run has finished; it must itself stay up (tmux, or a small VM)
  logs      follows the log of host 0, or of all
  stop      SIGTERM, and waits for the save; the same launch goes on from there
  delete    gives the slice back, which ends what it costs

  tpu/queued.sh watch --name=run1 --topology=v5p:4x4x4 --spot -- \
    --config=configs/pretrain_gemma2_2b.py --config.workdir=gs://B/run1 \
    --distributed=auto

--dry-run prints the commands of the plain course of events, and runs none.'
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting name POD_NAME '' '*' 'the queued resource, and its nodes'
setting project POD_PROJECT '' '*' 'Google Cloud project'
setting zone POD_ZONE '' '*' 'zone, such as us-east5-a'
setting topology POD_TOPOLOGY '' 'create install watch' \
  'the slice: v5e:SHAPE, v5p:SHAPE or v6e:SHAPE, such as v5p:4x4x4'
setting accelerator-type POD_ACCELERATOR_TYPE '' 'create install watch' \
  'instead of --topology, as gcloud names it, such as v4-32'
setting runtime-version POD_RUNTIME_VERSION '' 'create watch' \
  'software of the VMs; unset is what Google documents for the generation'
setting slices POD_SLICES 1 'create install watch' 'slices (multislice)'
switch spot POD_SPOT 'create watch' 'Spot capacity: cheaper, can be preempted'
switch reserved POD_RESERVED 'create watch' 'capacity of your reservation'
setting service-account POD_SERVICE_ACCOUNT '' 'create watch' \
  'of the VMs; it needs access to the bucket. Unset is the default one'
setting timeout POD_TIMEOUT 86400 create \
  'seconds to wait for ACTIVE; the request stays in the queue after that'
setting repo POD_REPO '' 'install watch' \
  'a URL to git clone on each host; unset copies this folder'
setting ref POD_REF '' 'install watch' 'branch or tag of --repo'
setting restarts POD_RESTARTS 10 watch \
  'how often a run that ended with an error is started again'
setting grace POD_GRACE 600 stop 'seconds for the save'
setting poll POD_POLL 30 'create watch' 'seconds between two looks'
switch all POD_LOGS_ALL logs 'the logs of all hosts, each line with its host'
switch now POD_DELETE_NOW delete 'even while a run is going on'
switch dry-run POD_DRY_RUN '*' 'print the commands, run none'
env=() create_flag=() ssh_flag=()
repeated env 'launch watch' 'NAME=VALUE for train.py, such as XLA flags'
repeated create-flag 'create watch' \
  'one more flag for gcloud ... create, such as --internal-ips'
repeated ssh-flag '*' \
  'one more flag for gcloud ... ssh and scp, such as --tunnel-through-iap'

REPOSITORY=gemma-funnel
HOST="bash $REPOSITORY/tpu/host.sh"
HOST_STATUS="if [ -e $REPOSITORY/tpu/host.sh ]; then $HOST status; \
else echo \"gf \$(hostname) bare - of ?\"; fi"
# What is not copied: what .gitignore names, and git's own files.
NOT_COPIED=(.git .venv runs __pycache__ '*.egg-info' .pytest_cache .ruff_cache
  build dist)

# What a dry run takes the answers to be.
ASSUMED_STATE=ACTIVE
ASSUMED_HOSTS=none
TOLD=''

# --- the request

resources() {
  local verb=$1
  shift
  gcloud_command=(gcloud compute tpus queued-resources "$verb" "${opt[name]}"
    --project="${opt[project]}" --zone="${opt[zone]}" "$@")
}

# Sets STATE, NOT_FOUND where there is no such request.
look() {
  local errors status=0
  errors=$(mktemp)
  resources describe '--format=value(state.state)'
  STATE=$(ask "$ASSUMED_STATE" "${gcloud_command[@]}" 2>"$errors") || status=$?
  if ((status)); then
    if grep -qE 'NOT_FOUND|was not found' "$errors"; then
      STATE=NOT_FOUND status=0
    else
      cat "$errors" >&2
    fi
  fi
  rm -f "$errors"
  return "$status"
}

look_or_fail() { look || fail "gcloud cannot describe ${opt[name]}"; }

choose_slice() {
  if [[ -n ${opt[topology]} ]]; then
    [[ -z ${opt[accelerator-type]} ]] ||
      die "--topology or --accelerator-type, not both"
    slice "${opt[topology]}"
  else
    [[ -n ${opt[accelerator-type]} ]] || required topology
    ACCELERATOR=${opt[accelerator-type]} RUNTIME=''
    [[ $ACCELERATOR =~ ^(v4|v5p|v5litepod|v6e)-([1-9][0-9]*)$ ]] ||
      die "--accelerator-type=$ACCELERATOR: v4-N, v5p-N, v5litepod-N or v6e-N"
    CHIPS=${BASH_REMATCH[2]}
    case ${BASH_REMATCH[1]} in
      v4) RUNTIME=tpu-ubuntu2204-base CHIPS=$((CHIPS / 2)) ;;
      v5p) RUNTIME=v2-alpha-tpuv5 CHIPS=$((CHIPS / 2)) ;;
      v5litepod) RUNTIME=v2-alpha-tpuv5-lite ;;
      v6e) RUNTIME=v2-alpha-tpuv6e ;;
    esac
  fi
  whole slices
  ((opt[slices] > 0)) || die "--slices=0: at least one"
  RUNTIME=${opt[runtime-version]:-$RUNTIME}
}

request() {
  local -a flags=(--accelerator-type="$ACCELERATOR"
    --runtime-version="$RUNTIME")
  if ((opt[slices] > 1)); then
    flags+=(--node-count="${opt[slices]}" --node-prefix="${opt[name]}")
  else
    flags+=(--node-id="${opt[name]}")
  fi
  [[ ${opt[spot]} == 0 ]] || flags+=(--spot)
  [[ ${opt[reserved]} == 0 ]] || flags+=(--reserved)
  [[ -z ${opt[service-account]} ]] ||
    flags+=(--service-account="${opt[service-account]}")
  resources create "${flags[@]}" "${create_flag[@]}" --quiet
  run "${gcloud_command[@]}" || fail "gcloud could not request ${opt[name]}"
}

# Says what is waited for, once a state.
waiting() {
  [[ $TOLD == "$STATE" ]] ||
    note "${opt[name]} is $STATE; waiting for ACTIVE, a look every" \
      "${opt[poll]} s"
  TOLD=$STATE
}

create() {
  local begin=$SECONDS
  choose_slice
  ASSUMED_STATE=NOT_FOUND
  look_or_fail
  case $STATE in
    NOT_FOUND) request ;;
    *) note "${opt[name]} is there already" ;;
  esac
  ASSUMED_STATE=ACTIVE
  while look_or_fail; do
    case $STATE in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED | NOT_FOUND)
        fail "${opt[name]} is $STATE; delete it and create it again" ;;
    esac
    waiting
    ((SECONDS - begin < opt[timeout])) ||
      fail "${opt[name]} is still $STATE after ${opt[timeout]} s; it stays in" \
        "the queue: create waits again, delete gives it up"
    nap
  done
  note "${opt[name]} is ACTIVE"
}

remove() {
  # --force deletes the nodes too; a SUSPENDED request still counts as quota.
  resources delete --force --quiet
  run "${gcloud_command[@]}" || fail "gcloud could not delete ${opt[name]}"
}

# --- the hosts

# on WORKER NODE COMMAND: sets gcloud_command. All hosts run at once: by batches,
# the first would wait for the others in jax.distributed.initialize.
on() {
  resources ssh --worker="$1" --node="$2"
  [[ $1 != all ]] || gcloud_command+=(--batch-size=all)
  gcloud_command+=("${ssh_flag[@]}" --command="$3")
}

# ask_hosts ASSUMED COMMAND: sets REPLIES; fails if gcloud did or hosts lack.
ask_hosts() {
  local output status=0 expected
  on all all "$2"
  output=$(ask "gf host $1 - of 1" "${gcloud_command[@]}") || status=$?
  mapfile -t REPLIES < <(grep -a '^gf ' <<<"$output" | sort -V)
  if ((${#REPLIES[@]} == 0)); then
    say "no host answered"
    return 1
  fi
  # gcloud passes over a slice that it cannot reach, and still returns 0.
  expected=${REPLIES[-1]##* of }
  if [[ $expected != '?' && $expected != "${#REPLIES[@]}" ]]; then
    say "${#REPLIES[@]} of $expected hosts answered"
    return 1
  fi
  return "$status"
}

# Sets HOSTS to what is to be said of all REPLIES, and CODE if that is failed.
summarise() {
  local reply state detail kind
  local -A seen=()
  CODE=
  for reply in "${REPLIES[@]}"; do
    read -r _ _ state detail _ <<<"$reply"
    seen[$state]=1
    # A mistake on one host ends the others with statuses that say less.
    [[ $state != failed || $CODE == 2 ]] || CODE=$detail
  done
  # Who is waited for first; then what a host knows of the whole run.
  for kind in other running finished stopped bare failed saved ended none; do
    [[ -z ${seen[$kind]-} ]] || break
  done
  HOSTS=$kind
}

look_at_hosts() {
  ask_hosts "$ASSUMED_HOSTS" "$HOST_STATUS" && summarise
}

refuse_running() {
  look_at_hosts || fail "the hosts of ${opt[name]} do not answer"
  [[ $HOSTS != running ]] ||
    fail "a run is going on on ${opt[name]}; $1"
}

everywhere() {
  on all all "$1"
  run "${gcloud_command[@]}" || fail "failed on a host of ${opt[name]}: $1"
}

install() {
  local archive="${TMPDIR:-/tmp}/$REPOSITORY-${opt[name]}.tar.gz" clone
  if [[ -n ${opt[repo]} ]]; then
    clone=(git clone --quiet)
    [[ -z ${opt[ref]} ]] || clone+=(--branch "${opt[ref]}")
    clone+=("${opt[repo]}" "$REPOSITORY")
    everywhere "rm -rf $REPOSITORY && $(quote "${clone[@]}")"
  else
    [[ -z ${opt[ref]} ]] || die "--ref=${opt[ref]} is of --repo, which is unset"
    run tar -czf "$archive" "${NOT_COPIED[@]/#/--exclude=}" -C "$ROOT" . ||
      fail "tar could not pack $ROOT"
    gcloud_command=(gcloud compute tpus queued-resources scp "$archive"
      "${opt[name]}:$REPOSITORY.tar.gz" --project="${opt[project]}"
      --zone="${opt[zone]}" --worker=all --node=all --batch-size=all
      "${ssh_flag[@]}")
    run "${gcloud_command[@]}" || fail "gcloud could not copy $archive"
    run rm -f "$archive"
    everywhere "rm -rf $REPOSITORY && mkdir $REPOSITORY &&\
 tar -xzf $REPOSITORY.tar.gz -C $REPOSITORY"
  fi
  everywhere "$HOST setup tpu"
  ask_hosts checked "$HOST check $((CHIPS * opt[slices]))" ||
    fail "the hosts do not see each other, or not all chips"
  note "installed on ${#REPLIES[@]} hosts, $((CHIPS * opt[slices])) chips"
}

launch() {
  local variable
  for variable in "${env[@]}"; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      die "--env=$variable: NAME=VALUE is needed"
  done
  ask_hosts started \
    "$HOST start $(quote "${env[@]}" -- "${ARGUMENTS[@]}")" ||
    fail "not started everywhere; stop, then launch again"
  note "started on ${#REPLIES[@]} hosts; logs follows it"
}

# --- watching

# Whether the service took nodes away and the request does not say so yet.
preempted() {
  local states
  states=$(ask READY gcloud compute tpus tpu-vm list \
    --project="${opt[project]}" --zone="${opt[zone]}" \
    --filter="queuedResource~\"/${opt[name]}\$\"" '--format=value(state)') || return 1
  [[ $states == *PREEMPTED* || $states == *TERMINATED* ]]
}

# again WHY: counts an error; ends the watch at one too many.
again() {
  ((++ERRORS <= opt[restarts])) ||
    fail "$1; that was error $ERRORS, --restarts=${opt[restarts]}"
  note "$1; again ($ERRORS of ${opt[restarts]})"
  nap
}

# attempt STEP...: what ends a subcommand is, in a watch, tried again.
attempt() {
  local step
  for step; do
    if ! ("$step"); then
      again "$step failed"
      return
    fi
  done
}

watch_request() {
  case $STATE in
    NOT_FOUND)
      note "requesting ${opt[name]}"
      attempt request
      ASSUMED_STATE=ACTIVE
      ;;
    SUSPENDED)
      note "${opt[name]} is $STATE: preempted; deleting it for a new one"
      attempt remove
      ;;
    FAILED)
      again "${opt[name]} is FAILED"
      attempt remove
      ;;
    *)
      waiting
      nap
      ;;
  esac
}

watch_hosts() {
  case $HOSTS in
    other)
      fail "a run with other flags is going on on ${opt[name]}; stop it first," \
        "or watch it with its own"
      ;;
    running) nap ;;
    bare) attempt install launch ;;
    none) attempt launch ;;
    saved)
      note "SIGTERM saved the run, not by stop; going on"
      attempt launch
      ;;
    finished)
      note "finished; delete gives ${opt[name]} back"
      exit 0
      ;;
    stopped)
      note "stopped by hand; launch or watch goes on from there"
      exit 0
      ;;
    ended) fail "all ended with status 0, none says it finished; see logs" ;;
    failed)
      [[ $CODE != 2 ]] ||
        fail "the run ended with status 2, a mistake that the next start would" \
          "make again; see logs"
      again "the run ended with status $CODE"
      attempt launch
      ;;
  esac
  ASSUMED_HOSTS=finished
}

watch() {
  choose_slice
  whole restarts
  ERRORS=0
  # Of a run with other flags it does not matter how it ended.
  HOST_STATUS="export GEMMA_FUNNEL_RUN=$(printf '%s\0' "${ARGUMENTS[@]}" |
    cksum | tr ' ' -); $HOST_STATUS"
  ASSUMED_STATE=NOT_FOUND ASSUMED_HOSTS=bare
  while :; do
    if ! look; then
      note "gcloud cannot describe ${opt[name]}; trying again"
      nap
    elif [[ $STATE != ACTIVE ]]; then
      watch_request
    elif look_at_hosts; then
      watch_hosts
    elif preempted; then
      note "a node of ${opt[name]} was preempted; deleting it for a new one"
      attempt remove
    else
      nap
    fi
  done
}

# --- the subcommands

report() {
  look_or_fail
  note "${opt[name]} is $STATE"
  [[ $STATE == ACTIVE ]] || return 0
  ask_hosts none "$HOST_STATUS" || fail "not all hosts answered"
  dry || printf '%s\n' "${REPLIES[@]}"
}

follow() {
  if [[ ${opt[all]} == 1 ]]; then
    on all all "$HOST log --name"
  else
    on 0 0 "$HOST log"
  fi
  run "${gcloud_command[@]}"
}

stop() {
  whole grace
  ask_hosts stopped "$HOST stop ${opt[grace]}" || fail "not all hosts stopped"
  dry || printf '%s\n' "${REPLIES[@]}"
}

delete() {
  look_or_fail
  if [[ $STATE == NOT_FOUND ]]; then
    note "there is no ${opt[name]}"
    return
  fi
  if [[ $STATE == ACTIVE && ${opt[now]} == 0 ]]; then
    refuse_running "stop it first, or delete --now"
  fi
  remove
}

main() {
  parse "$@"
  named name
  required project zone
  whole timeout
  seconds poll
  [[ ${opt[spot]}${opt[reserved]} != 11 ]] || die "--spot or --reserved, not both"
  case $SUBCOMMAND in
    launch | watch) arguments_required ;;
    *) no_arguments ;;
  esac
  need gcloud 'install the Google Cloud CLI, then gcloud auth login'
  case $SUBCOMMAND in
    create | watch | stop | delete) "$SUBCOMMAND" ;;
    install)
      choose_slice
      refuse_running "stop it first"
      install
      ;;
    launch)
      refuse_running "stop it first"
      launch
      ;;
    status) report ;;
    logs) follow ;;
  esac
}

main "$@"
