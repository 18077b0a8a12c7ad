#!/usr/bin/env bash
# Installs with the test extras into .venv, lints, checks types and runs the tests. --quick leaves out the tests marked
# slow. Other arguments are passed to pytest:
#   bash launch/test.sh --quick
#   bash launch/test.sh -k metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

install_into_venv '.[dev]'
ruff check .
mypy
if [[ "${1:-}" == --quick ]]; then
  shift
  set -- -m 'not slow' "$@"
fi
# Compilation uses one core per test. All tests of a file run in one process, because they share fixtures; files with
# slow tests come first, so that no process is left alone with one at the end. tests/conftest.py says how many processes.
pytest -q --numprocesses=auto --dist=loadfile --no-loadscope-reorder "$@"
