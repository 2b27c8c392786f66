#!/bin/sh
# The peer of `python -m adytum.benchmarks channel` from PyPI, in an environment of its own: never a dependency of ours.
# nginx comes from Debian: apt-get install nginx-light.
set -eu
folder=${1:-var/bench-peers}
"${PYTHON:-python3}" -m venv "$folder"
# Pinned: a figure names the version it was measured with.
"$folder/bin/pip" install --quiet --disable-pip-version-check 'litellm[proxy]==1.106.2'
