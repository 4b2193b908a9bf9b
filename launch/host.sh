#!/usr/bin/env bash
# What the launchers do on each host of a TPU slice (Ubuntu 22.04 or newer), from the home folder.
#
#   internvl_jax/launch/host.sh install BUCKET    Python, the package, the bucket as ~/bucket
#   internvl_jax/launch/host.sh start COMMAND…    in ~/bucket, as a service; stops what ran before
#   internvl_jax/launch/host.sh status            "status running", "done", "failed CODE", "absent"
#   internvl_jax/launch/host.sh stop              SIGTERM: saves the current step
#
# The command and the bucket are services of systemd. When the machine is taken away, systemd ends
# the command first (SIGTERM, then as long as the platform allows), and the bucket after it, so that
# the last checkpoint still finds its bucket. The output is appended to ~/internvl_jax.log.
set -euo pipefail
cd "$HOME"

install() {
  if ! command -v python3.11 >/dev/null; then
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11 python3.11-venv
  fi
  if ! command -v gcsfuse >/dev/null; then
    local list key=/usr/share/keyrings/cloud.google.asc
    list=gcsfuse-$(lsb_release -c -s)
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $list main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  [[ -d venv ]] || python3.11 -m venv venv
  venv/bin/pip install --quiet --constraint=internvl_jax/constraints.txt './internvl_jax[tpu]'
  mkdir -p bucket
  if ! mountpoint -q bucket; then
    sudo systemd-run --quiet --unit=internvl-bucket "--uid=$(id -u)" --collect \
      "$(command -v gcsfuse)" --foreground --implicit-dirs "$1" "$HOME/bucket"
    for _ in $(seq 60); do
      mountpoint -q bucket && return
      sleep 1
    done
    echo "error: the bucket $1 could not be mounted: journalctl -u internvl-bucket" >&2
    exit 1
  fi
}

start() {
  stop
  rm -f internvl_jax.exit
  sudo systemd-run --quiet --unit=internvl-jax "--uid=$(id -u)" --collect \
    --property=After=internvl-bucket.service --property=KillMode=mixed \
    --property=TimeoutStopSec=900 "--property=WorkingDirectory=$HOME/bucket" \
    "--property=StandardOutput=append:$HOME/internvl_jax.log" --property=StandardError=inherit \
    "--setenv=PATH=$HOME/venv/bin:$PATH" "--setenv=HOME=$HOME" \
    "--setenv=EXIT_FILE=$HOME/internvl_jax.exit" \
    "$HOME/internvl_jax/launch/supervise.sh" "$@"
}

stop() {
  if systemctl is-active --quiet internvl-jax; then
    sudo systemctl stop internvl-jax
  fi
}

status() {
  local code
  if systemctl is-active --quiet internvl-jax; then
    echo "status running"
    return
  fi
  code=$(cat internvl_jax.exit 2>/dev/null || echo none)
  case $code in
    0) echo "status done" ;;
    # Nothing ran, or it was ended from outside and has saved.
    none | 130 | 143) echo "status absent" ;;
    *) echo "status failed $code" ;;
  esac
}

case ${1:-} in
  install | start | status | stop) "$@" ;;
  *)
    sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
    exit 2
    ;;
esac
