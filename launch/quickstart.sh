#!/usr/bin/env bash
# Installs larp_jax, trains a small tokenizer on the built-in moving shapes, evaluates it, writes reconstructions of
# held-out clips and exports the codebook. Takes a few minutes on two CPU cores.
#   bash launch/quickstart.sh [WORKDIR]        (default: runs/quickstart; if run again, training resumes)
set -euo pipefail
workdir="${1:-runs/quickstart}"
[[ "$workdir" = /* ]] || workdir="$PWD/$workdir"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="${workdir#"$PWD"/}"
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

# Prints the command as you would type it, then runs it.
run() {
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

install_into_venv .
run larp-jax train --config configs/quickstart.py --workdir "$workdir"
run larp-jax evaluate --checkpoint "$workdir" --data moving_shapes/plain:test --output "$workdir/evaluation.json"
run larp-jax reconstruct --checkpoint "$workdir" --input moving_shapes/plain:test --max-clips 8 --output "$workdir/reconstructions"
run larp-jax export --checkpoint "$workdir" --format codebook-npz --output "$workdir/codebook.npz"

cat <<EOF

Everything is in $workdir:
  checkpoints/       the trained tokenizer: larp_jax.load_tokenizer("$workdir")
  metrics.jsonl      losses and metrics by step
  media/             reconstructions during training
  evaluation.json    metrics on held-out clips
  reconstructions/   held-out clips, original next to reconstruction
  codebook.npz       the codebook, for any framework
To run the commands above yourself, activate .venv first: source .venv/bin/activate
EOF
