#!/usr/bin/env bash
# One Cloud TPU VM, or one slice that exists: for trying things, and for jobs of a day.
#
#   launch/tpu_vm.sh [--dry-run] create
#   launch/tpu_vm.sh [--dry-run] run internvl-jax train --config=stage1_contrastive:tiny --workdir=runs/try
#   launch/tpu_vm.sh [--dry-run] status | logs | stop | delete
#
# NAME: of the TPU VM. ZONE: as us-east5-b. PROJECT: default that of gcloud.
# create: TYPE, as v6e-1 or v5litepod-8; RUNTIME, the software of the VM, as v2-alpha-tpuv6e;
#   SPOT=yes for one that may be taken away, at a lower price.
# run: BUCKET, mounted on every host as the folder in which the command runs, so that relative paths
#   (work directory, data, checkpoints) are on it. The command goes on when this script ends. The
#   same call continues the run later, also on another VM.
# stop saves the current step. delete ends the costs.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || usage
action=$1
shift
spot=${SPOT:-no}

need NAME "a name for the TPU VM: lower-case letters, digits, hyphens" "$NAME_PATTERN"
need ZONE "where it is, as us-east5-b" '[a-z]+-[a-z]+[0-9]+-[a-z]'
case $action in
  create)
    need TYPE "its type, as v6e-1, v5litepod-8 or v5p-8" 'v[0-9a-z]+-[1-9][0-9]*'
    need spot "SPOT is yes or no" 'yes|no'
    need RUNTIME "the software of the VM, as v2-alpha-tpuv6e" '[-a-z0-9.]+'
    ;;
  run)
    need BUCKET "a bucket for the work directory, without gs://" '[-a-z0-9_.]{3,222}'
    (($#)) || fail "run needs a command, as: run internvl-jax train --config=… --workdir=…"
    ;;
  status | logs | stop | delete) ;;
  *) usage ;;
esac
checked
# shellcheck disable=SC2034  # read by cloud_tpu.sh
nodes=("$NAME")
# shellcheck source=launch/cloud_tpu.sh
source "$repository/launch/cloud_tpu.sh"

case $action in
  create)
    options=("--accelerator-type=$TYPE" "--version=$RUNTIME")
    [[ $spot != yes ]] || options+=(--spot)
    run gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" "${options[@]}"
    ;;
  run)
    start_on_hosts "$@"
    echo "started; look: NAME=$NAME ZONE=$ZONE launch/tpu_vm.sh logs" >&2
    ;;
  status) on_hosts all "internvl_jax/launch/host.sh status" ;;
  logs) show_log ;;
  stop) on_hosts all "internvl_jax/launch/host.sh stop" ;;
  delete) run gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet ;;
esac
