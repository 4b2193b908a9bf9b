#!/usr/bin/env bash
# The JobSet of gke_jobset.yaml on a GKE cluster with TPU node pools, through kubectl.
#
#   launch/gke.sh [--dry-run] run internvl-jax train --config=stage1_contrastive --workdir=/bucket/stage1
#   launch/gke.sh [--dry-run] status | logs | delete
#
# NAME: of the job. The cluster is that of kubectl's current context, with JobSet 0.6 or newer and
# the Cloud Storage FUSE driver.
# run: ACCELERATOR and TOPOLOGY of a node pool, as tpu-v5-lite-podslice and 16x16; HOSTS and
#   CHIPS_PER_HOST of a slice, as 64 and 4; IMAGE, made from launch/Dockerfile; BUCKET, mounted as
#   /bucket; ACCOUNT, the Kubernetes service account that may write it; SLICES, default 1; RESTARTS
#   after crashes, default 10 (those after preemptions do not count); GRACE, seconds that a pod has
#   to save when it is taken away, default 600.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || usage
action=$1
shift
export SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-10} GRACE=${GRACE:-600}

need NAME "a name for the job: lower-case letters, digits, hyphens" "$NAME_PATTERN"
case $action in
  run)
    need ACCELERATOR "of the node pool, as tpu-v5-lite-podslice" '[-a-z0-9]+'
    need TOPOLOGY "of the node pool, as 16x16 or 4x4x8" '[0-9]+x[0-9]+(x[0-9]+)?'
    need HOSTS "number of hosts of a slice, as 64" "$NUMBER_PATTERN"
    need CHIPS_PER_HOST "as 4" "$NUMBER_PATTERN"
    need IMAGE "the image made from launch/Dockerfile" '[^ "]+'
    need BUCKET "a bucket for the work directory, without gs://" '[-a-z0-9_.]{3,222}'
    need ACCOUNT "the Kubernetes service account that may write the bucket" '[-a-z0-9.]+'
    need SLICES "a number" "$NUMBER_PATTERN"
    need RESTARTS "a number" "$NUMBER_PATTERN"
    need GRACE "a number of seconds" "$NUMBER_PATTERN"
    (($#)) || fail "run needs a command, as: run internvl-jax train --config=… --workdir=/bucket/…"
    ;;
  status | logs | delete) ;;
  *) usage ;;
esac
checked

# The file with each ${NAME} replaced by its variable, and the command as a list of YAML strings.
manifest() {
  local text argument list='' name
  text=$(<"$repository/launch/gke_jobset.yaml")
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    list+="\"${argument//\"/\\\"}\", "
  done
  # shellcheck disable=SC2034  # read below, by its name
  local COMMAND="[${list%, }]"
  for name in NAME ACCELERATOR TOPOLOGY HOSTS CHIPS_PER_HOST IMAGE BUCKET ACCOUNT SLICES RESTARTS \
    GRACE COMMAND; do
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

# shellcheck disable=SC2153  # NAME is no misspelt name
case $action in
  run)
    if [[ -n $dry_run ]]; then
      echo "kubectl apply --filename=- <<'END'"
      manifest "$@"
      echo "END"
    else
      manifest "$@" | kubectl apply --filename=-
    fi
    ;;
  status) run kubectl get jobset,pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  logs)
    run kubectl logs --follow --tail=100 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run kubectl delete jobset "$NAME" ;;
esac
