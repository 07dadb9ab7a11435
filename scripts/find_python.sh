#!/usr/bin/env bash
# Print the path of a Python >= 3.12, or fail. A named version comes before whatever `python3` is, and 3.12 before
# newer ones: constraints.txt is resolved for it. pyenv's interpreters are asked by path, because the shim of a
# version that is installed but not selected exists and fails.
set -euo pipefail

works() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12) or sys.version_info.releaselevel != "final")' \
        >/dev/null 2>&1
}

if command -v pyenv >/dev/null 2>&1; then pyenv_root=$(pyenv root); else pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}; fi

for version in 3.12 3.13 3.14 3.15; do
    candidates=$(command -v "python$version" || true)
    candidates+=$'\n'$(ls -d "$pyenv_root"/versions/"$version".*/bin/"python$version" 2>/dev/null | sort -rV || true)
    while read -r candidate; do
        if [ -n "$candidate" ] && works "$candidate"; then echo "$candidate"; exit 0; fi
    done <<<"$candidates"
done
for candidate in python3 python; do
    if works "$candidate"; then command -v "$candidate"; exit 0; fi
done
exit 1
