# shellcheck shell=bash
# Sourced by the other scripts in this folder, from the repository root.
#
# install_into_venv WHAT: creates .venv with $PYTHON (default: python3) if it does not exist, installs WHAT ('.' or
# '.[extras]') into it unless the same requirements are installed already, and puts its commands first on PATH.

install_into_venv() {
  local what="$1" python="${PYTHON:-python3}" stamp fingerprint
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "larp_jax needs Python 3.11 to 3.13, but $python is $("$python" -V 2>&1 || true): set PYTHON to another." >&2
    return 2
  fi

  # pip is missing if an earlier attempt failed halfway, as on Debian without python3-venv.
  if [[ ! -x .venv/bin/pip || "$(.venv/bin/python -VV 2>/dev/null)" != "$("$python" -VV)" ]]; then
    echo "Creating .venv with $("$python" -V)"
    "$python" -m venv --clear .venv
  fi

  stamp=".venv/installed-${what//[^a-z]/}"
  fingerprint="$(cat requirements.txt setup.py pyproject.toml larp_jax/version.py | cksum) $PWD"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]]; then
    echo "Installing larp_jax into .venv (the first time, this takes a minute or two)"
    # Python compiles what is imported; pip would compile every module of every package, which takes half a minute.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable "$what"
    echo "$fingerprint" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
