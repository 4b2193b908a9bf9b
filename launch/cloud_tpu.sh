# shellcheck shell=bash
# Sourced by tpu_vm.sh and queued_resource.sh: what is done on the hosts of Cloud TPU nodes.
#
# `nodes` holds the names of the nodes: one per slice. A call acts on all hosts of all nodes at the
# same time, since the processes of a job must find one another within a minute.
# shellcheck disable=SC2154  # dry_run, repository: of common.sh

where=("--zone=${ZONE:-}")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")

# on_hosts WORKER COMMAND: run a shell command on a host (number) or on all, of every node.
on_hosts() {
  local node failed=0 waiting=()
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" "--worker=$1" "--command=$2" &
    waiting+=("$!")
    [[ -z $dry_run ]] || wait "$!"
  done
  for node in "${waiting[@]}"; do
    wait "$node" || failed=1
  done
  return "$failed"
}

# Copy this checkout (its last commit) to every host, install it there, and start the command.
start_on_hosts() {
  local archive node
  archive=internvl_jax.tar.gz
  [[ -n $dry_run ]] || archive=$(mktemp --suffix=.tar.gz)
  cd "$repository" || return
  run git archive --format=tar.gz "--output=$archive" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:internvl_jax.tar.gz" "${where[@]}" \
      --worker=all
  done
  [[ -n $dry_run ]] || rm -f "$archive"
  on_hosts all "rm -rf internvl_jax && mkdir internvl_jax && \
tar -xzf internvl_jax.tar.gz -C internvl_jax && \
internvl_jax/launch/host.sh install $(quoted "$BUCKET") && \
internvl_jax/launch/host.sh start $(quoted "$@")"
}

# One word for the job: running, done, absent (to be started again), failed, or unknown (a host did
# not answer, which is no reason to stop the others).
status_of_hosts() {
  local words word
  if ! words=$(on_hosts all 'internvl_jax/launch/host.sh status 2>/dev/null || echo status absent')
  then
    echo unknown
    return
  fi
  for word in failed absent running; do
    if grep -q "status $word" <<<"$words"; then
      echo "$word"
      return
    fi
  done
  echo "done"
}

show_log() {
  # All processes write a log; that of the first host of the first slice has the metrics too.
  local first=${nodes[0]}
  run gcloud compute tpus tpu-vm ssh "$first" "${where[@]}" --worker=0 \
    "--command=tail -n 100 -f internvl_jax.log"
}
