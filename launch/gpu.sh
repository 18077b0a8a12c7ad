#!/usr/bin/env bash
# One machine, all its NVIDIA GPUs: installs, then runs a command of larp-jax, one process for all GPUs.
#   bash launch/gpu.sh [--dry-run] train --config configs/larp_l_long.py --workdir runs/larp_l_long
# Fewer of them: CUDA_VISIBLE_DEVICES=0,1 bash launch/gpu.sh ...   --dry-run prints the commands and runs none.
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
  echo "usage: bash launch/gpu.sh [--dry-run] COMMAND... (as larp-jax takes it: train --config ... --workdir ...)" >&2
  exit 2
fi

# Shows the command as one would type it, then runs it, unless this is a dry run.
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  [[ -n "$dry_run" ]] || "$@"
}

run nvidia-smi --list-gpus || { echo "no NVIDIA GPU: nvidia-smi fails, see above" >&2; exit 2; }
run install_into_venv '.[cuda]'
# XLA takes three quarters of a GPU's memory unless told otherwise
run env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.94}" larp-jax "$@"
