#!/usr/bin/env bash
# A pod, or several slices, from the queue of Cloud TPU: for the real jobs, spot ones included.
#
#   launch/queued_resource.sh [--dry-run] create
#   launch/queued_resource.sh [--dry-run] run internvl-jax train --config=stage1_contrastive --workdir=runs/stage1
#   launch/queued_resource.sh [--dry-run] watch internvl-jax train … (the same)
#   launch/queued_resource.sh [--dry-run] status | logs | stop | delete
#
# NAME: of the request. ZONE: as us-east5-b. PROJECT: default that of gcloud.
# SLICES: number of slices, default 1; several are trained as one, data parallel between them.
# create: TYPE of a slice, as v5litepod-256 or v5p-512; RUNTIME, the software of its hosts, as
#   v2-alpha-tpuv5; TIER: spot (may be taken away), reserved, or on-demand (default).
# run: BUCKET, mounted on every host as the folder in which the command runs, so that relative paths
#   (work directory, data, checkpoints) are shared. The command goes on when this script ends.
# watch: needs all of these. Creates the request, runs the command, and does both again whenever the
#   slices were taken away or restarted, until the command is done: leave it running on a small
#   machine, or in tmux. INTERVAL: seconds between looks, default 60.
# stop saves the current step (end a watch first). delete ends the costs.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || usage
action=$1
shift
slices=${SLICES:-1}
tier=${TIER:-on-demand}

need NAME "a name for the request: lower-case letters, digits, hyphens" "$NAME_PATTERN"
need ZONE "where it is, as us-east5-b" '[a-z]+-[a-z]+[0-9]+-[a-z]'
need slices "SLICES is a number" "$NUMBER_PATTERN"
need tier "TIER is spot, reserved or on-demand" 'spot|reserved|on-demand'
case $action in create | watch)
  need TYPE "the type of a slice, as v5litepod-256 or v5p-512" 'v[0-9a-z]+-[1-9][0-9]*'
  need RUNTIME "the software of the hosts, as v2-alpha-tpuv5" '[-a-z0-9.]+'
  ;;
esac
case $action in run | watch)
  need BUCKET "a bucket for the work directory, without gs://" '[-a-z0-9_.]{3,222}'
  (($#)) || fail "$action needs a command, as: $action internvl-jax train --config=… --workdir=…"
  ;;
esac
checked

nodes=("$NAME")
if ((slices > 1)); then
  # As the service names them.
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$NAME-$i"); done
fi
# shellcheck source=launch/cloud_tpu.sh
source "$repository/launch/cloud_tpu.sh"

request=(gcloud compute tpus queued-resources)

create() {
  local options=("--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
  if ((slices > 1)); then
    options+=("--node-count=$slices" "--node-prefix=$NAME")
  else
    options+=("--node-id=$NAME")
  fi
  case $tier in
    spot) options+=(--spot) ;;
    reserved) options+=(--reserved) ;;
  esac
  run "${request[@]}" create "$NAME" "${where[@]}" "${options[@]}"
}

delete() {
  run "${request[@]}" delete "$NAME" "${where[@]}" --force --quiet
}

state() {
  run "${request[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)"
}

say() {
  echo "$(date -u +%FT%TZ) $NAME: $*" >&2
}

watch() {
  local now before='' status
  if [[ -n $dry_run ]]; then
    state
    create
    start_on_hosts "$@"
    on_hosts all "internvl_jax/launch/host.sh status"
    delete
    return
  fi
  while :; do
    now=$(state 2>/dev/null) || now=ABSENT
    [[ $now == "$before" ]] || say "$now"
    before=$now
    case $now in
      ABSENT) create ;;
      SUSPENDED | FAILED)
        # Taken away. A request does not come back; it makes room for the next.
        say "deleting it and asking again"
        delete || say "deleting failed; trying again"
        ;;
      ACTIVE)
        status=$(status_of_hosts)
        case $status in
          done)
            say "the command is done; to end the costs: delete"
            return 0
            ;;
          failed)
            say "the command failed on some host; see: logs"
            return 1
            ;;
          unknown) say "a host did not answer; asking again" ;;
          absent)
            say "starting the command"
            start_on_hosts "$@" || say "starting failed; trying again"
            ;;
        esac
        ;;
    esac
    sleep "${INTERVAL:-60}"
  done
}

case $action in
  create) create ;;
  run)
    start_on_hosts "$@"
    echo "started; look: NAME=$NAME ZONE=$ZONE SLICES=$slices launch/queued_resource.sh logs" >&2
    ;;
  watch) watch "$@" ;;
  status)
    state
    on_hosts all "internvl_jax/launch/host.sh status"
    ;;
  logs) show_log ;;
  stop) on_hosts all "internvl_jax/launch/host.sh stop" ;;
  delete) delete ;;
  *) usage ;;
esac
