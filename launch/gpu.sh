#!/usr/bin/env bash
# Installs larp_jax and runs a larp-jax command on all NVIDIA GPUs of this machine, in one process.
#   bash launch/gpu.sh [--dry-run] train --config configs/larp_l_long.py --workdir runs/larp_l_long
# For fewer GPUs: CUDA_VISIBLE_DEVICES=0,1 bash launch/gpu.sh ...   --dry-run only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

dry_run=
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
if [[ $# -eq 0 ]]; then
  echo "usage: bash launch/gpu.sh [--dry-run] COMMAND... (a larp-jax command: train --config ... --workdir ...)" >&2
  exit 2
fi

# Prints the command as you would type it, then runs it, unless this is a dry run.
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  [[ -n "$dry_run" ]] || "$@"
}

run nvidia-smi --list-gpus || { echo "no NVIDIA GPU found: nvidia-smi failed, see above" >&2; exit 2; }
run install_into_venv '.[cuda]'
# by default, XLA reserves only three quarters of a GPU's memory
run env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}" larp-jax "$@"
