#!/usr/bin/env bash
# Print the path of a Chromium or Chrome. Where there is none, Debian's is installed if apt-get can be used as root;
# else one sentence says how to get it.
set -euo pipefail

find_chromium() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name"; then return 0; fi
    done
    return 1
}

if find_chromium; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core; } >&2
    find_chromium
else
    echo "find_chromium.sh: no Chromium on PATH; install it with your system's packages (Debian: sudo apt-get install chromium)" >&2
    exit 1
fi
