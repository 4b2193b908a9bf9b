#!/usr/bin/env bash
# Run a command until it is done: after a preemption or a crash it is started again.
#
#   launch/supervise.sh internvl-jax train --config=stage1_contrastive --workdir=runs/stage1
#
# SIGTERM is passed on once, so that the command saves; then this script ends with its exit code.
# Otherwise, by the exit code of the command:
#   0         done
#   2         a name that does not exist, which no repetition mends: ends with 2
#   130       Ctrl-C: ends with 130
#   143       a preemption notice reached the command alone: it has saved, and is started again
#   others    a crash, a lost peer, a full disk: started again, until ATTEMPTS (default 10) in a row
#             have each failed within HEALTHY seconds (default 300)
# PAUSE: seconds before a repetition (default 10). EXIT_FILE: gets the exit code at the end.
set -uo pipefail
(($#)) || {
  sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
  exit 2
}

child='' stopping='' interrupted=''
forward() {
  interrupted=yes
  # A second signal would end the command without saving.
  if [[ -z $stopping && -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
  stopping=yes
}
trap forward TERM
# The terminal sends Ctrl-C to the command itself.
trap 'interrupted=yes stopping=yes' INT

finish() {
  [[ -z ${EXIT_FILE:-} ]] || echo "$1" >"$EXIT_FILE"
  exit "$1"
}

say() {
  echo "supervise: $*" >&2
}

failures=0
while :; do
  began=$SECONDS
  "$@" &
  child=$!
  while :; do
    interrupted=''
    wait "$child"
    code=$?
    [[ -n $interrupted ]] || break
  done
  child=''
  case $code in
    0 | 2 | 130) finish "$code" ;;
  esac
  [[ -z $stopping ]] || finish "$code"
  if ((code == 143)); then
    say "the command was asked to end and has saved; starting it again in ${PAUSE:-10} s"
  else
    ((SECONDS - began < ${HEALTHY:-300})) || failures=0
    failures=$((failures + 1))
    if ((failures >= ${ATTEMPTS:-10})); then
      say "exit code $code; $failures failures in a row, each soon after the start: giving up"
      finish "$code"
    fi
    say "exit code $code (failure $failures of ${ATTEMPTS:-10}); again in ${PAUSE:-10} s"
  fi
  sleep "${PAUSE:-10}" &
  wait "$!"
  [[ -z $stopping ]] || finish "$code"
done
