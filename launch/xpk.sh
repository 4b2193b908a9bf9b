#!/usr/bin/env bash
# A job on a GKE cluster that xpk made (pip install xpk), queued beside those of others.
#
#   launch/xpk.sh [--dry-run] run internvl-jax train --config=stage1_contrastive --workdir=/bucket/stage1
#   launch/xpk.sh [--dry-run] status | logs | delete
#
# NAME: of the job. CLUSTER, ZONE: of the cluster. PROJECT: default that of gcloud.
# run: TYPE of a slice, as v5litepod-256; IMAGE, made from launch/Dockerfile; STORAGE, a bucket that
#   `xpk storage attach` has mounted in the cluster; SLICES, default 1; RESTARTS, default 50.
#
# Every restart counts, after a preemption too. A pod that is taken away has GRACE seconds (default
# 600) to save. Exit code 2 (a name that does not exist) ends the job.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || usage
action=$1
shift
slices=${SLICES:-1} restarts=${RESTARTS:-50} grace=${GRACE:-600}

need NAME "a name for the job: lower-case letters, digits, hyphens" "$NAME_PATTERN"
need CLUSTER "the GKE cluster" "$NAME_PATTERN"
need ZONE "its zone, as us-east5-b" '[a-z]+-[a-z]+[0-9]+-[a-z]'
need slices "SLICES is a number" "$NUMBER_PATTERN"
need restarts "RESTARTS is a number" "$NUMBER_PATTERN"
need grace "GRACE is a number of seconds" "$NUMBER_PATTERN"
case $action in
  run)
    need TYPE "the type of a slice, as v5litepod-256" 'v[0-9a-z]+-[1-9][0-9]*'
    need IMAGE "the image made from launch/Dockerfile" '[^ ]+'
    need STORAGE "the attached storage that holds the work directory" '[-a-z0-9]+'
    (($#)) || fail "run needs a command, as: run internvl-jax train --config=… --workdir=…"
    ;;
  status | logs | delete) ;;
  *) usage ;;
esac
checked
where=("--cluster=$CLUSTER" "--zone=$ZONE")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")

case $action in
  run)
    # `exec`: the signal reaches the command, not a shell around it.
    run xpk workload create "--workload=$NAME" "${where[@]}" "--tpu-type=$TYPE" \
      "--num-slices=$slices" "--docker-image=$IMAGE" "--storage=$STORAGE" \
      "--max-restarts=$restarts" --restart-on-exit-codes=1 \
      "--termination-grace-period-seconds=$grace" \
      "--command=exec $(quoted "$@")"
    ;;
  status) run xpk workload list "${where[@]}" "--filter-by-job=$NAME" ;;
  logs)
    run kubectl logs --follow --tail=100 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run xpk workload delete "--workload=$NAME" "${where[@]}" --force ;;
esac
