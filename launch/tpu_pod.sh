#!/usr/bin/env bash
# Runs a larp-jax command on a Cloud TPU slice with any number of hosts: creates the slice if it does not exist,
# installs this working tree on all hosts, starts the command on all of them, and follows the log of the first host.
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a --type v5litepod-256 --bucket gs://BUCKET \
#     train --config configs/larp_l_long.py --workdir gs://BUCKET/runs/larp_l_long \
#     --config.data.train=folder:/mnt/bucket/k600_ucf101/train --config.data.eval=folder:/mnt/bucket/ucf101/test
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a logs      (follow the log again)
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a stop      (SIGTERM: saves a checkpoint first)
#   bash launch/tpu_pod.sh --name larp --zone us-west4-a delete
# Options:
#   --bucket gs://B[/PATH]  mount it at /mnt/bucket on every host (gcsfuse), for data; workdirs are given as gs://
#   --keep-alive            watch the run until it ends: if the slice is preempted or a host fails, create the slice
#                           again and continue from the newest checkpoint. Keep this terminal open (tmux)
#   --slices N              N slices as one run (multislice): the batch is split over the slices too
#   --spot                  preemptible, at a lower price; use it with --keep-alive
#   --project P, --runtime VERSION (default: by type), --setup COMMAND (run on every host first), --dry-run (only print)
# shellcheck disable=SC2016 # text in single quotes is expanded on the hosts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "$1; see the head of launch/tpu_pod.sh" >&2
  exit 2
}

name='' zone='' type='' project='' runtime='' setup='' bucket='' slices=1 spot='' keep_alive='' dry_run=''
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --spot) spot=1 ;;
    --keep-alive) keep_alive=1 ;;
    --dry-run) dry_run=1 ;;
    --name | --zone | --type | --project | --runtime | --setup | --bucket | --slices)
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
[[ -z "$bucket" || "$bucket" =~ ^gs://[^/]+ ]] || usage "--bucket $bucket must be gs://BUCKET or gs://BUCKET/PATH"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || usage "--slices $slices must be a number"

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")
nodes=("$name")
if [[ "$slices" -gt 1 ]]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Prints the command as you would type it, then runs it, unless this is a dry run.
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  [[ -n "$dry_run" ]] || "$@"
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$2" "${where[@]}" "${@:3}"; }
queued() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# on HOSTS COMMAND: runs a command on `all` hosts of all slices at the same time, or on host 0 of the first slice.
on() {
  local node
  if [[ "$1" != all || ${#nodes[@]} -eq 1 ]]; then
    tpu ssh "${nodes[0]}" --worker="$1" --command="$2"
    return
  fi
  local jobs=()
  for node in "${nodes[@]}"; do
    tpu ssh "$node" --worker=all --command="$2" &
    jobs+=($!)
    [[ -z "$dry_run" ]] || wait "$!" # in order
  done
  local job
  for job in "${jobs[@]}"; do wait "$job"; done
}

logs() { on 0 'tail -n 100 -F --pid="$(cat larp_jax/run.pid)" larp_jax/run.log'; }
remove() { if [[ "$slices" -gt 1 ]]; then queued delete --force --quiet; else tpu delete "$name" --quiet; fi; }

case "$1" in
  logs) logs; exit ;;
  stop) on all 'touch larp_jax/run.stopped; pkill -TERM --parent "$(cat larp_jax/run.pid)"'; exit ;;
  delete) remove; exit ;;
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
more=()
[[ -z "$spot" ]] || more=(--spot)

create() {
  if [[ "$slices" -eq 1 ]]; then
    tpu create "$name" --accelerator-type="$type" --version="$runtime" "${more[@]}"
    return
  fi
  queued create --node-count="$slices" --node-prefix="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${more[@]}"
  [[ -n "$dry_run" ]] || until [[ "$(state)" == READY ]]; do sleep 30; done
}

# READY if all slices are there.
state() {
  local node found
  for node in "${nodes[@]}"; do
    found="$(gcloud compute tpus tpu-vm describe "$node" "${where[@]}" --format='value(state)' 2>/dev/null || true)"
    [[ "$found" == READY ]] || { echo "${found:-MISSING}"; return; }
  done
  echo READY
}

mount_bucket() {
  local path="${bucket#gs://}" only=''
  [[ "$path" != */* || -z "${path#*/}" ]] || printf -v only ' --only-dir=%q' "${path#*/}"
  on all 'set -e
if ! command -v gcsfuse >/dev/null; then
  curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
fi
sudo mkdir -p /mnt/bucket && sudo chown "$USER" /mnt/bucket
mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs'"$only ${path%%/*}"' /mnt/bucket'
  echo "$bucket is at /mnt/bucket on every host"
}

printf -v command ' %q' "$@"

start() {
  # A dry run cannot know whether the slice exists, so it prints both commands.
  if ! tpu describe "${nodes[0]}" --format='value(state)' || [[ -n "$dry_run" ]]; then
    create
  fi
  run tar --create --gzip --file "$archive" --exclude=.git --exclude=.venv --exclude=runs .
  local node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:larp_jax.tar.gz" "${where[@]}" --worker=all
  done
  [[ -z "$setup" ]] || on all "$setup"
  [[ -z "$bucket" ]] || mount_bucket

  # The Python of the hosts is older than 3.11; uv installs a newer one.
  on all 'set -e
mkdir -p larp_jax && tar --extract --gzip --file larp_jax.tar.gz --directory larp_jax && cd larp_jax
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv python install --quiet 3.12
export PYTHON="$(~/.local/bin/uv python find 3.12)"
source launch/venv.sh && install_into_venv ".[tpu,gcs]"'

  on all "cd larp_jax && rm -f run.exit run.stopped && cat >run.sh <<'EOF'
.venv/bin/larp-jax$command
code=\$?
[ ! -e run.stopped ] || code=stopped
echo \$code >run.exit
EOF
{ nohup setsid bash run.sh >run.log 2>&1 </dev/null & echo \$! >run.pid; }"
  logs
}

archive="$(mktemp -d)/larp_jax.tar.gz"
trap 'rm -rf "$(dirname "$archive")"' EXIT
if [[ -z "$keep_alive" || -n "$dry_run" ]]; then
  start
fi
if [[ -z "$keep_alive" ]]; then
  exit
fi
if [[ -n "$dry_run" ]]; then
  on 0 'cat larp_jax/run.exit'
  echo "# if this fails, or is 1 (a host failed): starts all hosts again; if the slice is not READY, after:"
  remove
  exit
fi

# The exit code of the run: 0 when it is done, 2 if the command is wrong, 1 if it failed; empty if the first host cannot
# be asked, because it is gone.
while true; do
  began=$SECONDS
  start & # in a subshell, which ends at the first command that fails
  wait "$!" || echo "the connection ended"
  while code="$(gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 \
    --command='cat larp_jax/run.exit 2>/dev/null || { [ ! -e larp_jax/run.pid ] || echo running; }' 2>/dev/null)" &&
    [[ "$code" == running && "$(state)" == READY ]]; do
    logs || sleep 30
  done
  case "$code" in
    0) echo "the run is done"; exit ;;
    stopped) echo "the run was stopped; the same command continues it"; exit ;;
    2) echo "the command is wrong, see its message above" >&2; exit 2 ;;
  esac
  now="$(state)"
  echo "the run ended early (exit code ${code:-unknown}, slice $now): starting again"
  if [[ "$now" == READY ]]; then
    on all 'kill -KILL -- "-$(cat larp_jax/run.pid)" 2>/dev/null || true' # hosts that still wait for the others
  else
    remove || true
  fi
  # a run that ends at once would otherwise start again and again without a pause
  [[ $((SECONDS - began)) -gt 300 ]] || sleep 60
done
