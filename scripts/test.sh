#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: scripts/test.sh -m slow runs the slow tier.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
[ $# -gt 0 ] || set -- -m "not slow"
exec .venv/bin/python -m pytest "$@"
