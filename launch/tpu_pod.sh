#!/usr/bin/env bash
# Runs a larp-jax command on a Cloud TPU slice with any number of hosts: creates the slice if it does not exist,
# installs this working tree on all hosts, starts the command on all of them, and follows the log of the first host.
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a --type v5litepod-256 \
#     train --config configs/larp_l_long.py --workdir /mnt/runs/larp_l_long
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a logs      (follow the log again)
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a stop      (SIGTERM: saves a checkpoint first)
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a delete
# Options: --project P, --runtime VERSION (default: by type), --spot, --setup COMMAND (run on every host first, for
# example to mount the storage that all hosts need for --workdir and the data), --dry-run (only print the commands).
# shellcheck disable=SC2016 # text in single quotes is expanded on the hosts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "$1; see the head of launch/tpu_pod.sh" >&2
  exit 2
}

name='' zone='' type='' project='' runtime='' setup='' spot='' dry_run=''
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --name | --zone | --type | --project | --runtime | --setup)
      [[ $# -ge 2 ]] || usage "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    *) usage "$1 is no option" ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || usage "--name and --zone are needed"
[[ $# -gt 0 ]] || usage "say what to run: a larp-jax command, or logs, stop, delete"

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")

# Prints the command as you would type it, then runs it, unless this is a dry run.
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  [[ -n "$dry_run" ]] || "$@"
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="$2"; }

logs() { on 0 'tail -n 100 -F --pid="$(cat larp_jax/run.pid)" larp_jax/run.log'; }

case "$1" in
  logs) logs; exit ;;
  stop) on all 'kill -TERM "$(cat larp_jax/run.pid)"'; exit ;;
  delete) tpu delete --quiet; exit ;;
esac

[[ -n "$type" ]] || usage "--type is needed, such as v5litepod-16, v5p-128 or v6e-64"
if [[ -z "$runtime" ]]; then
  case "$type" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi

# A dry run cannot know whether the slice exists, so it prints both commands.
if ! tpu describe --format='value(state)' || [[ -n "$dry_run" ]]; then
  create=(--accelerator-type="$type" --version="$runtime")
  [[ -z "$spot" ]] || create+=(--spot)
  tpu create "${create[@]}"
fi

archive="$(mktemp -d)/larp_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
run tar --create --gzip --file "$archive" --exclude=.git --exclude=.venv --exclude=runs .
run gcloud compute tpus tpu-vm scp "$archive" "$name:larp_jax.tar.gz" "${where[@]}" --worker=all
[[ -z "$setup" ]] || on all "$setup"

# The Python of the hosts is older than 3.11; uv installs a newer one.
on all 'set -e
mkdir -p larp_jax && tar --extract --gzip --file larp_jax.tar.gz --directory larp_jax && cd larp_jax
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv python install --quiet 3.12
export PYTHON="$(~/.local/bin/uv python find 3.12)"
source launch/venv.sh && install_into_venv ".[tpu]"'

printf -v command ' %q' "$@"
on all "cd larp_jax && { nohup setsid .venv/bin/larp-jax$command >run.log 2>&1 </dev/null & echo \$! >run.pid; }"
logs
