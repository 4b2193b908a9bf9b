#!/usr/bin/env bash
# Install this checkout on every host of a TPU slice and start a command there, or resume it.
#
#   TPU=my-slice ZONE=us-east5-b BUCKET=my-bucket \
#     launch/tpu_pod.sh internvl-jax train --config=stage1_contrastive --workdir=runs/stage1
#
# TPU, ZONE: of a TPU VM slice that exists. BUCKET: mounted on every host as the folder in which the
# command runs, so that relative paths (work directory, data, checkpoints) are shared by all hosts.
# PROJECT: the Google Cloud project; default: that of gcloud.
#
# The command goes on when this script ends; its output is in ~/internvl_jax.log of each host. The
# same call after a preemption continues the run. On the hosts: Ubuntu 22.04 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."

if (($# == 0)) || [[ -z ${TPU:-} || -z ${ZONE:-} || -z ${BUCKET:-} ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
where=("--zone=$ZONE" "--worker=all")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:internvl_jax.tar.gz" "${where[@]}"

read -r -d '' install <<'END' || true
set -euo pipefail
if ! command -v python3.11 >/dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -y -qq python3.11 python3.11-venv
fi
if ! command -v gcsfuse >/dev/null; then
  list=gcsfuse-$(lsb_release -c -s)
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $list main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq gcsfuse
fi
rm -rf internvl_jax
mkdir -p internvl_jax bucket
tar -xzf internvl_jax.tar.gz -C internvl_jax
[ -d venv ] || python3.11 -m venv venv
venv/bin/pip install --quiet --constraint=internvl_jax/constraints.txt './internvl_jax[tpu]'
END
printf -v command '%q ' "$@"
printf -v mount 'mountpoint -q bucket || gcsfuse --implicit-dirs %q bucket' "$BUCKET"
start="cd bucket; PATH=\$HOME/venv/bin:\$PATH nohup $command>>\$HOME/internvl_jax.log 2>&1 </dev/null &"
gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$install
$mount
$start"
echo "started on all hosts of $TPU: $command"
echo "look: gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=0 --command='tail -f internvl_jax.log'"
