#!/usr/bin/env bash
# Creates .venv and installs requirements.txt, or requirements-dev.txt with the argument "dev".
# Running it again installs only what is missing or has another version.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements${1:+-$1}.txt
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
