#!/usr/bin/env bash
# Makes .venv with everything in requirements.txt; with the argument "dev", in requirements-dev.txt.
# Running it again only checks.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements${1:+-$1}.txt
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
