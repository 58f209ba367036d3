#!/usr/bin/env bash
# Sets up .venv and runs the tests, except for the slow ones. Arguments are passed on to pytest
# (-k name, a file). --slow runs only the slow tests, and -m MARKS those with these marks.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
chosen=(-m "not slow")
words=()
for word in "$@"; do
  case $word in
    --slow) chosen=(-m slow) ;;
    -m) chosen=() words+=("$word") ;;
    *) words+=("$word") ;;
  esac
done
exec .venv/bin/python -m pytest ${chosen[@]+"${chosen[@]}"} ${words[@]+"${words[@]}"}
