#!/usr/bin/env bash
# make_venv.sh FOLDER EXTRAS: a virtual environment in FOLDER that holds hilbertcell[EXTRAS], editable, at the
# versions of constraints.txt. uv is used when it is there (it also fetches a Python), else venv and pip.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
folder=$1 extras=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if uv --version >/dev/null 2>&1; then has_uv=yes; else has_uv=no; fi
if [ ! -x "$folder/bin/python" ]; then
    python=${PYTHON:-$(scripts/find_python.sh || true)}
    if [ "$has_uv" = yes ]; then
        uv venv --quiet --allow-existing --python "${python:-3.12}" "$folder"
    elif [ -n "$python" ]; then
        "$python" -m venv "$folder" || {
            echo "make_venv.sh: '$python -m venv' failed; install its venv package (Debian: python3-venv) or uv" >&2
            exit 1
        }
    else
        echo "make_venv.sh: no Python >= 3.12 on PATH or under pyenv, and no uv to fetch one; install either" >&2
        exit 1
    fi
fi
if [ "$has_uv" = yes ]; then
    uv pip install --quiet --python "$folder/bin/python" -e ".[$extras]" -c constraints.txt
else
    "$folder/bin/python" -m pip install --quiet -e ".[$extras]" -c constraints.txt
fi
"$folder/bin/python" -c 'import sys; print("hilbertcell installed in", sys.prefix, "with Python", sys.version.split()[0])'
