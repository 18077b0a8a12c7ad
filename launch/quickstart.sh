#!/usr/bin/env bash
# From nothing to a trained tokenizer: installs, trains a small LARP on the embedded moving shapes, evaluates it,
# writes reconstructions of held-out clips and exports the codebook. A few minutes on two CPU cores.
#   bash launch/quickstart.sh [WORKDIR]        (default: runs/quickstart; run again, training resumes)
set -euo pipefail
workdir="${1:-runs/quickstart}"
[[ "$workdir" = /* ]] || workdir="$PWD/$workdir"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="${workdir#"$PWD"/}"
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

# Shows the command as one would type it, then runs it.
run() {
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

install_into_venv .
run larp-jax train --config configs/quickstart.py --workdir "$workdir" --config.steps=200
run larp-jax evaluate --checkpoint "$workdir" --data moving_shapes:test --output "$workdir/evaluation.json"
run larp-jax reconstruct --checkpoint "$workdir" --input moving_shapes:test --max-clips 8 --output "$workdir/reconstructions"
run larp-jax export --checkpoint "$workdir" --format codebook-npz --output "$workdir/codebook.npz"

cat <<EOF

Everything is in $workdir:
  checkpoints/       the trained tokenizer: larp_jax.load_tokenizer("$workdir")
  metrics.jsonl      losses and metrics by step
  media/             reconstructions while training
  evaluation.json    metrics on held-out clips
  reconstructions/   held-out clips, original beside reconstruction
  codebook.npz       the codebook, for any framework
The commands above run by themselves once .venv is active: source .venv/bin/activate
EOF
