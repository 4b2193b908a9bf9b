#!/usr/bin/env bash
# The first hour on a real TPU: see launch/smoke.py. Run it on every host of the slice.
#
#   launch/tpu_smoke.sh --topology=v5e:4x4 [--config=stage1_contrastive]
#
# PYTHON: an interpreter that has the package with the extras [tpu] and [eval]; default: that of
# .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
"$python" -c 'import internvl_jax' 2>/dev/null || {
  echo "error: $python has no internvl_jax; run: pip install -e '.[tpu,eval]'" >&2
  exit 1
}
exec "$python" launch/smoke.py "$@"
