#!/usr/bin/env bash
# SLURM: the same run on GPUs, requeued until it has finished.

# shellcheck disable=SC2034  # Read by common.sh.
PROGRAM=slurm.sh
SUBCOMMANDS='submit status logs stop'
ABOUT='Runs train.py on the GPUs of a SLURM cluster.

  tpu/slurm.sh SUBCOMMAND [--flag=value ...] [-- FLAGS_OF_TRAIN]

  submit  writes DIR/NAME.sbatch and submits it. The time limit saves the run and
          requeues the job, a node that fails requeues it, and so on until the
          run says that it has finished
  status  what the queue says of it
  logs    follows DIR/NAME.log, to which all attempts are added
  stop    SIGTERM, waits for the save, and does not requeue; the same submit goes
          on from there

  tpu/slurm.sh submit --name=run1 --nodes=4 --gpus-per-node=8 --time=24:00:00 \
    -- --config=configs/pretrain_gemma2_2b.py \
    --config.workdir=/scratch/run1 --distributed=auto

Install first, on a file system that all nodes see: python3 -m venv .venv, then
.venv/bin/pip install -e ".[cuda]".
--dry-run prints the commands of the plain course of events, and runs none.'
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setting name JOB_NAME '' '*' 'the job'
setting dir JOB_DIR "$ROOT/runs" 'submit logs stop' \
  'folder of the script and the log; all nodes must see it'
setting nodes JOB_NODES 1 submit 'nodes'
setting gpus-per-node JOB_GPUS_PER_NODE '' submit \
  'GPUs of each node, and tasks: one a GPU'
setting cpus-per-task JOB_CPUS_PER_TASK '' submit \
  'cores of each task; unset is what the cluster gives'
setting time JOB_TIME '' submit \
  'limit of one attempt, as sbatch takes it, such as 24:00:00'
setting save-seconds JOB_SAVE_SECONDS 120 submit \
  'how long before the limit SIGTERM comes: the time for the save'
setting restarts JOB_RESTARTS 10 submit \
  'how often a run that ended with an error is started again'
setting python JOB_PYTHON "$ROOT/.venv/bin/python" submit \
  'the Python that has the package'
setting grace JOB_GRACE 600 stop 'seconds to wait for the save'
setting poll JOB_POLL 10 stop 'seconds between two looks'
switch dry-run JOB_DRY_RUN '*' 'print the commands, run none'
sbatch_flag=()
repeated sbatch-flag submit \
  'one more flag for sbatch, such as --partition=gpu or --account=me'

# --- the batch script

# One task a GPU: jax.distributed.initialize gives each task of SLURM the one
# device whose number is the task's on its node. For the same reason all tasks
# of a node must see all its GPUs, so no --gpus-per-task.
header() {
  local flag
  local -a flags=(--job-name="${opt[name]}" --nodes="${opt[nodes]}"
    --gpus-per-node="${opt[gpus-per-node]}"
    --ntasks-per-node="${opt[gpus-per-node]}" --time="${opt[time]}"
    --signal="B:TERM@${opt[save-seconds]}" --requeue --open-mode=append
    --output="${opt[dir]//%/%%}/${opt[name]}.log")
  [[ -z ${opt[cpus-per-task]} ]] ||
    flags+=(--cpus-per-task="${opt[cpus-per-task]}")
  flags+=("${sbatch_flag[@]}")
  echo '#!/usr/bin/env bash'
  for flag in "${flags[@]}"; do
    [[ $flag == --* && $flag != *[[:space:]\"\'\\]* ]] ||
      die "${flag@Q}: an #SBATCH line takes --flag=value without spaces, quotes"
    printf '#SBATCH %s\n' "$flag"
  done
}

body() {
  # srun no longer takes --cpus-per-task from the job (Slurm 22.05 on).
  local -a step=(srun --kill-on-bad-exit=1 --label)
  [[ -z ${opt[cpus-per-task]} ]] ||
    step+=(--cpus-per-task="${opt[cpus-per-task]}")
  step+=("${opt[python]}" -u train.py "${ARGUMENTS[@]}")
  printf 'cd %s\n' "$(quote "$ROOT")"
  printf 'base=%s restarts=%s\n' \
    "$(quote "${opt[dir]}/${opt[name]}")" "${opt[restarts]}"
  printf 'run() { exec %s; }\n' "$(quote "${step[@]}")"
  cat <<'END_OF_SCRIPT'
set -uo pipefail
begin=$(wc -c <"$base.log")
run &
step=$!
# SIGTERM makes srun kill its tasks, so they get it from scancel, which leaves
# out this shell.
trap 'caught=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
while caught=; code=0; wait "$step" || code=$?; [[ -n $caught ]]; do :; done
trap '' TERM
finished='^( *[0-9]+: )?finished .* at step [0-9]+$'
if ((code == 0)) &&
  tail -c "+$((begin + 1))" "$base.log" | grep -aqE "$finished"; then
  echo "finished: not requeued"
elif [[ -e $base.stop ]]; then
  echo "stopped by hand (status $code): not requeued"
elif ((code == 2)); then
  echo "status 2, a mistake that the next start would make again: not requeued"
  exit 2
else
  ((code == 0)) || echo "$code" >>"$base.errors"
  if [[ -e $base.errors ]] && (($(wc -l <"$base.errors") > restarts)); then
    echo "status $code, after $restarts restarts: not requeued"
    exit "$code"
  fi
  echo "status $code, not finished: requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
END_OF_SCRIPT
}

# --- the subcommands

# jobs ASSUMED: sets JOBS to lines "ID STATE".
jobs() {
  JOBS=$(ask "$1" squeue --me --noheader --name="${opt[name]}" \
    '--format=%i %T') || fail "squeue failed"
}

submit() {
  local base="${opt[dir]}/${opt[name]}" id script
  required gpus-per-node time dir
  whole nodes gpus-per-node save-seconds restarts
  [[ -z ${opt[cpus-per-task]} ]] || whole cpus-per-task
  ((opt[nodes] && opt[gpus-per-node])) ||
    die "--nodes and --gpus-per-node: at least 1 each"
  dry || [[ -x ${opt[python]} ]] ||
    die "--python=${opt[python]}: no such program; install first (--help)"
  [[ ${opt[dir]} == /* ]] || opt[dir]=$PWD/${opt[dir]} base=$PWD/$base
  script=$(header && body) || exit
  jobs ''
  [[ -z $JOBS ]] || fail "${opt[name]} is in the queue: $JOBS; stop it first"
  run mkdir -p "${opt[dir]}"
  run rm -f "$base.stop" "$base.errors"
  write "$base.sbatch" <<<"$script"
  id=$(ask 1 sbatch --parsable "$base.sbatch") || fail "sbatch failed"
  note "job ${id%%;*}; logs follows it"
}

stop() {
  local id state begin=$SECONDS
  whole grace
  seconds poll
  jobs '1 RUNNING'
  if [[ -z $JOBS ]]; then
    note "no job ${opt[name]} in the queue"
    return
  fi
  read -r id state <<<"$JOBS"
  run touch "${opt[dir]}/${opt[name]}.stop"
  if [[ $state == RUNNING ]]; then
    run scancel --signal=TERM --batch "$id"
  else
    run scancel "$id"
  fi || fail "scancel failed"
  while jobs ''; [[ -n $JOBS ]]; do
    ((SECONDS - begin < opt[grace])) ||
      fail "still in the queue after ${opt[grace]} s: $JOBS"
    nap
  done
  note "stopped; the same submit goes on from there"
}

main() {
  parse "$@"
  named name
  if [[ $SUBCOMMAND == submit ]]; then
    arguments_required
    need sbatch 'call this on a login node of the cluster'
  else
    no_arguments
  fi
  case $SUBCOMMAND in
    submit | status | stop)
      need squeue 'call this on a login node of the cluster' ;;
  esac
  case $SUBCOMMAND in
    submit | stop) "$SUBCOMMAND" ;;
    status)
      run squeue --me --name="${opt[name]}" '--format=%i %T %M %l %R' ;;
    logs) run tail -n 200 -F "${opt[dir]}/${opt[name]}.log" ;;
  esac
}

main "$@"
