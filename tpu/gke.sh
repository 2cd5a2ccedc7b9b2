#!/usr/bin/env bash
# GKE, by XPK: the same run as a workload that Kubernetes restarts.

# shellcheck disable=SC2034  # Read by common.sh.
PROGRAM=gke.sh
SUBCOMMANDS='cluster build launch watch status logs delete delete-cluster'
ABOUT='Runs train.py on a GKE cluster with TPUs, by XPK.

  tpu/gke.sh SUBCOMMAND [--flag=value ...] [-- FLAGS_OF_TRAIN]

  cluster         makes the cluster, with node pools for the slices
  build           builds tpu/Dockerfile as --image, and pushes it
  launch          makes the workload; after a failure or a preemption Kubernetes
                  starts it again, at most --restarts times in all
  watch           waits until the workload has ended
  status          what XPK says of it
  logs            follows the log of host 0, or of all
  delete          ends the workload: SIGTERM, and --grace seconds for the save
  delete-cluster  gives all of it back, which ends what it costs

  tpu/gke.sh launch --cluster=c1 --name=run1 --topology=v5p:4x4x4 \
    --image=us-docker.pkg.dev/P/R/gemma-funnel -- \
    --config=configs/pretrain_gemma2_2b.py --config.workdir=gs://B/run1 \
    --distributed=auto

--dry-run prints the commands of the plain course of events, and runs none.'
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OF_WORKLOADS='launch watch status logs delete'
setting name POD_NAME '' "$OF_WORKLOADS" 'the workload'
setting cluster POD_CLUSTER '' "cluster delete-cluster $OF_WORKLOADS" \
  'the cluster'
setting project POD_PROJECT '' "cluster delete-cluster $OF_WORKLOADS" \
  'Google Cloud project'
setting zone POD_ZONE '' "cluster delete-cluster $OF_WORKLOADS" \
  'zone, such as us-east5-a'
setting topology POD_TOPOLOGY '' 'cluster launch' \
  'a slice: v5e:SHAPE, v5p:SHAPE or v6e:SHAPE, such as v5p:4x4x4'
setting slices POD_SLICES 1 'cluster launch' 'slices (multislice)'
switch spot POD_SPOT cluster 'Spot capacity: cheaper, can be preempted'
setting reservation POD_RESERVATION '' cluster 'a reservation to take it from'
setting image POD_IMAGE '' 'build launch' \
  'the image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/gemma-funnel:TAG'
setting restarts POD_RESTARTS 50 launch 'how often it is started again'
setting grace POD_GRACE 600 launch \
  'seconds for the save after SIGTERM (GKE gives Spot nodes less)'
setting timeout POD_TIMEOUT '' watch 'seconds to wait; unset is a week'
switch all POD_LOGS_ALL logs 'the logs of all hosts, each line with its pod'
switch dry-run POD_DRY_RUN '*' 'print the commands, run none'

# xpk COMMAND KIND...: sets command.
xpk_command() {
  command=(xpk "$@" --cluster="${opt[cluster]}" --project="${opt[project]}"
    --zone="${opt[zone]}")
}

choose_slice() {
  required topology
  slice "${opt[topology]}"
  whole slices
  ((opt[slices] > 0)) || die "--slices=0: at least one"
  command+=(--tpu-type="$ACCELERATOR" --num-slices="${opt[slices]}")
}

make_cluster() {
  xpk_command cluster create
  choose_slice
  [[ ${opt[spot]} == 0 || -z ${opt[reservation]} ]] ||
    die "--spot or --reservation, not both"
  if [[ ${opt[spot]} == 1 ]]; then
    command+=(--spot)
  elif [[ -n ${opt[reservation]} ]]; then
    command+=(--reservation="${opt[reservation]}")
  else
    command+=(--on-demand)
  fi
  run "${command[@]}" || fail "xpk could not create ${opt[cluster]}"
}

build() {
  required image
  run docker build --platform=linux/amd64 --file="$ROOT/tpu/Dockerfile" \
    --tag="${opt[image]}" "$ROOT" || fail "docker could not build the image"
  run docker push "${opt[image]}" ||
    fail "docker could not push ${opt[image]}; gcloud auth configure-docker?"
}

launch() {
  local argument
  required image
  whole restarts grace
  for argument in "${ARGUMENTS[@]}"; do
    # XPK writes the command into YAML, in which Kubernetes expands $(...).
    [[ $argument != *$'\n'* && $argument != *"\$("* ]] ||
      die "${argument@Q}: XPK cannot carry a line break or \$("
  done
  xpk_command workload create --workload="${opt[name]}"
  choose_slice
  # exec: XPK sends SIGTERM to what it started, which must not be a shell that
  # waits. Besides what kills (127 and more), 1 is a lost coordinator and 75 the
  # watchdog; 2, a mistake in the configuration, is not worth a second try.
  command+=(--docker-image="${opt[image]}" --max-restarts="${opt[restarts]}"
    '--restart-on-exit-codes=1,75'
    --termination-grace-period-seconds="${opt[grace]}"
    --command="exec bash tpu/host.sh pod -- $(quote "${ARGUMENTS[@]}")")
  run "${command[@]}" || fail "xpk could not create ${opt[name]}"
}

watch() {
  local status=0
  xpk_command workload list --wait-for-job-completion="${opt[name]}"
  if [[ -n ${opt[timeout]} ]]; then
    whole timeout
    command+=(--timeout="${opt[timeout]}")
  fi
  run "${command[@]}" || status=$?
  case $status in
    0) note "${opt[name]} has finished; delete-cluster gives it all back" ;;
    124) fail "${opt[name]} is still going on after ${opt[timeout]} s" ;;
    125) fail "${opt[name]} ended with an error; see logs" ;;
    *) fail "xpk could not wait for ${opt[name]} (status $status)" ;;
  esac
}

logs() {
  # The labels are JobSet's, the container's name XPK's.
  local selector="jobset.sigs.k8s.io/jobset-name=${opt[name]}"
  local -a flags=(--follow --tail=200 --container=jax-tpu)
  if [[ ${opt[all]} == 1 ]]; then
    flags+=(--prefix --max-log-requests=10000)
  else
    selector+=,jobset.sigs.k8s.io/job-index=0
    selector+=,batch.kubernetes.io/job-completion-index=0
  fi
  run gcloud container clusters get-credentials "${opt[cluster]}" \
    --location="${opt[zone]%-*}" --project="${opt[project]}" ||
    fail "no access to ${opt[cluster]}"
  run kubectl logs "${flags[@]}" --selector="$selector"
}

check_settings() {
  case $SUBCOMMAND in
    build) ;;
    cluster | delete-cluster) named cluster; required project zone ;;
    *) named name cluster; required project zone ;;
  esac
  if [[ $SUBCOMMAND == launch ]]; then arguments_required; else no_arguments; fi
  case $SUBCOMMAND in
    build) need docker 'https://docs.docker.com/engine/install' ;;
    logs)
      need gcloud 'install the Google Cloud CLI, then gcloud auth login'
      need kubectl 'gcloud components install kubectl'
      ;;
    *) need xpk 'pip install xpk' ;;
  esac
}

main() {
  parse "$@"
  check_settings
  case $SUBCOMMAND in
    cluster) make_cluster ;;
    build | launch | watch | logs) "$SUBCOMMAND" ;;
    status)
      xpk_command workload list --filter-by-job="${opt[name]}"
      run "${command[@]}"
      ;;
    delete)
      xpk_command workload delete --workload="${opt[name]}" --force
      run "${command[@]}" || fail "xpk could not delete ${opt[name]}"
      ;;
    delete-cluster)
      xpk_command cluster delete --force
      run "${command[@]}" || fail "xpk could not delete ${opt[cluster]}"
      ;;
  esac
}

main "$@"
