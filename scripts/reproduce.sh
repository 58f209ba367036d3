#!/usr/bin/env bash
# Reproduces the paper's table on one dataset: sets up .venv, then runs scripts/reproduce.py.
# scripts/reproduce.sh {spot,clevr} [--small] [--plan] [further options; --help lists them]
set -euo pipefail
root=$(dirname "$0")/..
# Said before set-up, which takes minutes.
case " $* " in
  *" spot "* | *" clevr "*) ;;
  *)
    echo "reproduce.sh: name the dataset: scripts/reproduce.sh spot, or clevr" >&2
    exit 2
    ;;
esac
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/reproduce.py" "$@"
