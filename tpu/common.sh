# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153  # Some names are of the sourcing script.
# What the launchers share: settings, dry runs, errors, slices of TPUs.
#
# Sourced by queued.sh, gke.sh and slurm.sh, which set PROGRAM, ABOUT (text of
# --help) and SUBCOMMANDS first. Commands of a dry run go to standard output,
# progress and errors to standard error. Exit status 2 is a mistake in the call,
# 1 is something that went wrong outside.

set -euo pipefail
LC_ALL=C
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash ${BASH_VERSION} found, 4.4 or later is needed" >&2
  exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where a dry run prints, even from within $(...).
exec 3>&1

declare -a FLAGS=() ARGUMENTS=()
declare -A opt=() kind_of=() environment_of=() used_by=() help_of=()
SUBCOMMAND=

say() { printf '%s\n' "$PROGRAM: $*" >&2; }
# Of what happened; in a dry run nothing does.
note() { dry || say "$*"; }
die() { say "error: $*"; exit 2; }
fail() { say "error: $*"; exit 1; }

# --- settings: a flag, else an environment variable, else a default

# setting FLAG ENVIRONMENT DEFAULT SUBCOMMANDS HELP; SUBCOMMANDS "*" is all.
setting() {
  FLAGS+=("$1")
  kind_of[$1]=value environment_of[$1]=$2 used_by[$1]=$4 help_of[$1]=$5
  opt[$1]=${!2-$3}
}

# switch FLAG ENVIRONMENT SUBCOMMANDS HELP: 1 or 0.
switch() {
  setting "$1" "$2" 0 "$3" "$4"
  kind_of[$1]=switch
  [[ ${opt[$1]} == [01] ]] || die "$2=${opt[$1]} in the environment: 0 or 1"
}

# repeated FLAG SUBCOMMANDS HELP: adds to the array named FLAG, with _ for -.
repeated() {
  FLAGS+=("$1")
  kind_of[$1]=repeated environment_of[$1]='' used_by[$1]=$2 help_of[$1]=$3
}

usage() {
  local flag value
  printf '%s\n\n' "$ABOUT"
  printf 'Settings, as --flag=value or from the environment:\n\n'
  for flag in "${FLAGS[@]}"; do
    value=
    [[ ${kind_of[$flag]} == switch ]] || value='=...'
    printf '  --%s%s' "$flag" "$value"
    [[ -z ${environment_of[$flag]} ]] || printf '  (%s)' "${environment_of[$flag]}"
    [[ ${kind_of[$flag]} != value || -z ${opt[$flag]} ]] ||
      printf '  [%s]' "${opt[$flag]}"
    printf '\n      %s\n' "${help_of[$flag]}"
    [[ ${used_by[$flag]} == '*' ]] ||
      printf '      for: %s\n' "${used_by[$flag]}"
  done
}

# parse "$@": sets SUBCOMMAND, opt, the repeated arrays and ARGUMENTS.
parse() {
  local flag
  case ${1-} in
    '') die "no subcommand; one of: $SUBCOMMANDS (--help explains)" ;;
    -h | --help | help) usage; exit 0 ;;
  esac
  [[ " $SUBCOMMANDS " == *" $1 "* ]] ||
    die "unknown subcommand '$1'; one of: $SUBCOMMANDS"
  SUBCOMMAND=$1
  shift
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --) shift; ARGUMENTS=("$@"); return ;;
      --*) ;;
      *) die "unexpected '$1'; what train.py gets stands after a --" ;;
    esac
    flag=${1%%=*}
    flag=${flag#--}
    [[ -n ${kind_of[$flag]-} ]] || die "unknown flag --$flag; --help lists them"
    [[ ${used_by[$flag]} == '*' || " ${used_by[$flag]} " == *" $SUBCOMMAND "* ]] ||
      die "--$flag is for ${used_by[$flag]// /, }, not for $SUBCOMMAND"
    if [[ ${kind_of[$flag]} == switch ]]; then
      [[ $1 != *=* ]] || die "--$flag takes no value, '${1#*=}' found"
      opt[$flag]=1
    elif [[ $1 == *=* ]]; then
      _put "$flag" "${1#*=}"
    else
      (($# > 1)) || die "--$flag needs a value"
      _put "$flag" "$2"
      shift
    fi
    shift
  done
}

_put() {
  if [[ ${kind_of[$1]} == repeated ]]; then
    local -n into=${1//-/_}
    into+=("$2")
  else
    opt[$1]=$2
  fi
}

# required FLAG...: dies unless each has a value.
required() {
  local flag
  for flag; do
    [[ -n ${opt[$flag]} ]] ||
      die "no --$flag (nor ${environment_of[$flag]} in the environment)"
  done
}

# whole FLAG...: dies unless each is a whole number.
whole() {
  local flag
  for flag; do
    [[ ${opt[$flag]} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
      die "--$flag=${opt[$flag]}: a whole number is needed"
  done
}

# seconds FLAG: dies unless it is a time that sleep takes.
seconds() {
  [[ ${opt[$1]} =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
    die "--$1=${opt[$1]}: a number of seconds is needed"
}

# named FLAG...: dies unless each is a name that Google Cloud takes.
named() {
  local flag
  required "$@"
  for flag; do
    [[ ${opt[$flag]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
      die "--$flag=${opt[$flag]}: at most 40 of a-z, 0-9 and -," \
        "a letter first, no - last"
  done
}

# What train.py gets; a script that can run it without a config is of no use.
arguments_required() {
  ((${#ARGUMENTS[@]})) || die "$SUBCOMMAND needs the flags of train.py after" \
    "a --, such as -- --config=configs/quickstart.py --distributed=auto"
}

no_arguments() {
  ((${#ARGUMENTS[@]} == 0)) ||
    die "$SUBCOMMAND takes nothing after --, '${ARGUMENTS[0]}' found"
}

# --- running

dry() { [[ ${opt[dry-run]} == 1 ]]; }

# need TOOL WHERE_FROM; a dry run needs none.
need() {
  dry || command -v "$1" >/dev/null || die "no $1 on the PATH: $2"
}

# quote WORD...: as any shell reads them back.
quote() {
  local word out='' end="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/"$end"}'" ;;
    esac
    out+=" $word"
  done
  printf '%s' "${out:1}"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if dry; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@"
  fi
}

# ask ASSUMED COMMAND...: its output; in a dry run, prints it and says ASSUMED.
ask() {
  local assumed=$1
  shift
  run "$@" || return
  ! dry || printf '%s\n' "$assumed"
}

# write FILE: standard input to a file, or in a dry run the command that would.
write() {
  if dry; then
    printf "cat >%s <<'END_OF_FILE'\n%s\nEND_OF_FILE\n" \
      "$(quote "$1")" "$(cat)" >&3
  else
    cat >"$1"
  fi
}

# A poll; a dry run has nothing to wait for.
nap() { dry || sleep "${opt[poll]}"; }

# --- slices of TPUs

# Topologies as Google documents them for each generation; one chip count is one
# topology here, so the accelerator type, which counts chips (v5e, v6e) or cores
# (v5p, two a chip), names the same slice.
declare -A TOPOLOGIES=(
  [v5e]="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  [v6e]="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
  [v5p]="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 \
16x16x16 16x16x24"
)

# slice GENERATION:TOPOLOGY: sets ACCELERATOR, RUNTIME and CHIPS (of one slice).
slice() {
  local generation=${1%%:*} shape=${1#*:}
  [[ -n ${TOPOLOGIES[$generation]-} && $1 == *:* ]] ||
    die "--topology=$1: GENERATION:SHAPE is needed, such as v5p:4x4x4;" \
      "generations are v5e, v5p and v6e"
  [[ " ${TOPOLOGIES[$generation]} " == *" $shape "* ]] ||
    die "--topology=$1: $generation has ${TOPOLOGIES[$generation]}"
  CHIPS=$((${shape//x/*}))
  case $generation in
    v5e) ACCELERATOR=v5litepod-$CHIPS RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p) ACCELERATOR=v5p-$((2 * CHIPS)) RUNTIME=v2-alpha-tpuv5 ;;
    v6e) ACCELERATOR=v6e-$CHIPS RUNTIME=v2-alpha-tpuv6e ;;
  esac
}
