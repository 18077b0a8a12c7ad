#!/usr/bin/env bash
# Installs with the test extras into .venv, lints, checks types and runs the tests. Arguments are passed to pytest:
#   bash launch/test.sh -k metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

install_into_venv '.[dev]'
ruff check .
mypy
# Compilation uses one core per test. All tests of a file run in one process, because they share fixtures.
pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
