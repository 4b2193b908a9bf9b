# shellcheck shell=bash
# Sourced by the launchers: the checks of their variables, and --dry-run.
#
# A launcher's first argument may be --dry-run: then `run` prints each command instead of running
# it, and nothing outside this machine is asked or changed.

# shellcheck disable=SC2034  # the launchers read these
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
missing=()

# The comment at the head of the launcher is its help.
usage() {
  sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
  exit 2
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# need NAME DESCRIPTION [PATTERN]: the variable must be set, and match the whole pattern.
need() {
  local value=${!1:-}
  if [[ -z $value ]]; then
    missing+=("  $1: $2")
  elif [[ -n ${3:-} && ! $value =~ ^($3)$ ]]; then
    missing+=("  $1: $2; it is now '$value'")
  fi
}

# All that is missing is said at once.
checked() {
  ((${#missing[@]} == 0)) && return
  echo "error: set these variables:" >&2
  printf '%s\n' "${missing[@]}" >&2
  exit 2
}

quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

run() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Of variables that several launchers share.
# shellcheck disable=SC2034
NAME_PATTERN='[a-z]([-a-z0-9]{0,48}[a-z0-9])?'
# shellcheck disable=SC2034
NUMBER_PATTERN='[1-9][0-9]*'
