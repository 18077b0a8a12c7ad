#!/usr/bin/env bash
# Installs with the test extras into .venv, lints, checks types, runs the tests. Arguments go to pytest:
#   bash launch/test.sh -k metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh

install_into_venv '.[dev]'
ruff check .
mypy
# Compiling keeps a test busy on one core; a file stays on one process, which has its fixtures.
pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
