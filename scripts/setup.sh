#!/usr/bin/env bash
# Makes .venv and installs into it what the code needs. Run it again after a failure, or after it
# was interrupted: it continues there, and installs only what is missing or too old.
#
#   scripts/setup.sh [-q] [--cpu] [EXTRA…]
#
# EXTRA   app (the web page), data (HEIC pictures), dev (the tests)
# -q      say only what went wrong
# --cpu   PyTorch without CUDA, from PyTorch's own index: 1 GB instead of 6 (not tried yet)
# PYTHON  in the environment: the Python to use. uv, if it is there, installs faster than pip.
set -euo pipefail
cd "$(dirname "$0")/.."

steps=4
step=0
quiet=
cpu=
extras=("") # "" stands for requirements.txt
log=.venv/setup.log
not_ours="nothing can be written into .venv, perhaps since root made it. Type sudo rm -rf .venv, \
and run this again"
torch_index=https://download.pytorch.org/whl/cpu

say() { [ -n "$quiet" ] || printf '%s\n' "$*"; }

begin() {
  step=$1
  say "[$1/$steps] $2"
}

fail() {
  printf 'setup.sh: step %s of %s failed: %s\n' "$step" "$steps" "$*" >&2
  exit 2
}

refuse() {
  printf 'setup.sh: %s\n' "$*" >&2
  exit 2
}

has() { command -v "$1" >/dev/null 2>&1; }

read_arguments() {
  local word
  for word in "$@"; do
    case $word in
      -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' scripts/setup.sh
        exit 0
        ;;
      -q) quiet=1 ;;
      --cpu) cpu=1 ;;
      app | data) extras+=("$word") ;;
      dev) extras+=(app dev) ;;
      *) refuse "$word is unknown: expected -q, --cpu, app, data or dev" ;;
    esac
  done
}

# ---- 1: Python ----

# The version of a Python, such as 3.11; nothing if it does not run.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_new_enough() {
  case $1 in
    3.1[0-9] | 3.[2-9][0-9]) return 0 ;;
    *) return 1 ;;
  esac
}

# Sets `python` to the first Python that is new enough.
find_python() {
  local candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
  local candidate version seen=""
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version=$(version_of "$candidate")
    if is_new_enough "$version"; then
      python=$candidate
      say "      $candidate is Python $version"
      return
    fi
    [ -z "$version" ] || [ -n "$seen" ] || seen="$candidate is Python $version"
  done
  if [ -z "${PYTHON:-}" ] && has uv; then
    python=3.12
    say "      uv finds or downloads Python $python"
    return
  fi
  fail "Python 3.10 or newer is needed, and ${seen:-${candidates[0]} does not run}. Install one," \
    "or name it: PYTHON=/path/to/python3 bash scripts/setup.sh"
}

# ---- 2: .venv ----

# Whether the .venv that is here works, and packages can be installed into it.
is_venv_usable() {
  .venv/bin/python -c '' 2>/dev/null || return 1
  has uv || .venv/bin/python -m pip --version >/dev/null 2>&1 ||
    .venv/bin/python -m ensurepip >/dev/null 2>&1
}

make_venv() {
  local output
  if has uv; then
    output=$(uv venv --quiet --seed --python "$python" .venv 2>&1) && return
    rm -rf .venv
    has "$python" || fail "uv cannot get Python $python: ${output##*$'\n'}"
  fi
  output=$("$python" -m venv .venv 2>&1) && return
  rm -rf .venv
  case $output in
    *"No space left"*) fail "the disk is full: make room, and run this again" ;;
    *"ermission denied"* | *"ead-only"*) fail "nothing can be written into $PWD" ;;
    *ensurepip* | *"No module named venv"*)
      fail "$python has no module venv. On Debian and Ubuntu: sudo apt install python3-venv"
      ;;
    *) fail "$python -m venv .venv says: ${output##*$'\n'}" ;;
  esac
}

# ---- 3: packages ----

is_torch_there() { compgen -G '.venv/lib/python*/site-packages/torch-*.dist-info/RECORD' >/dev/null; }

check_disk() {
  local needed=$1 free
  free=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print int($4 / 1000000) }') || true
  [ "${free:-$needed}" -ge "$needed" ] ||
    fail "$needed GB are needed here, and $free GB are free: make room${2:-}"
}

# A package that pip had not finished would count as installed.
remove_unfinished() {
  local info
  for info in .venv/lib/python*/site-packages/*.dist-info; do
    [ -f "$info/RECORD" ] || rm -rf "$info"
  done
  rm -rf .venv/lib/python*/site-packages/~* .venv/tmp
}

# A line for each file of requirements, which .venv/set-up keeps once they are installed.
list_files() {
  local extra file
  for extra in "${extras[@]}"; do
    file=requirements${extra:+-$extra}.txt
    printf '%s %s\n' "$file" "$(cksum <"$file")"
  done
}

find_problems='import sys; from system.requirements import find_problems
sys.exit(any(find_problems(extra or None) for extra in sys.argv[1:]))'

# Whether an earlier run installed all this, and it is still there.
was_done() {
  [ -f .venv/set-up ] && [ -z "$(list_files | grep -vxFf .venv/set-up || true)" ] &&
    .venv/bin/python -c "$find_problems" "${extras[@]}" 2>/dev/null
}

quietly() {
  if [ -n "$silent" ]; then "$@" >/dev/null 2>&1; else "$@"; fi
}

# Installs with uv, or where it is absent or fails with pip. /tmp is often too small for torch.
install() {
  local room=$PWD/.venv/tmp
  mkdir -p "$room" 2>/dev/null || fail "$not_ours"
  if has uv; then
    TMPDIR=$room quietly uv pip install --python .venv/bin/python "$@" && return
    say "      uv failed: trying pip"
  fi
  rm -f "$log"
  TMPDIR=$room quietly .venv/bin/python -m pip --disable-pip-version-check --no-input \
    --log "$log" install "$@" || fail "$(explain_pip $?)"
}

says() { grep -qE "$1" "$log" 2>/dev/null; }

# Why pip ended with the exit code $1, and what to do.
explain_pip() {
  local again="run this again: it goes on where it was"
  local proxy=${https_proxy:-${HTTPS_PROXY:-not set}}
  if says 'No space left on device|Disk quota exceeded'; then
    echo "the disk is full. Make room, and $again"
  elif says 'ProxyError|Tunnel connection failed|407 Proxy'; then
    proxy=$(printf '%s' "$proxy" | sed 's|//[^@/]*@|//…@|')
    echo "the proxy does not answer or refuses; https_proxy is $proxy. Correct it, and $again"
  elif says 'CERTIFICATE_VERIFY_FAILED|SSLError'; then
    echo "the server's certificate is not trusted, most often because of a proxy. Set PIP_CERT to" \
      "the proxy's certificate, and $again"
  elif says 'NewConnectionError|NameResolutionError|Network is unreachable|ConnectTimeout'; then
    echo "the packages' server cannot be reached. Check the network (behind a proxy, set" \
      "https_proxy), and $again"
  elif says 'ReadTimeout|IncompleteRead|Connection broken|ConnectionReset|incomplete-download'; then
    echo "the download broke off: $again"
  elif says 'DO NOT MATCH THE HASHES'; then
    echo "a download is damaged. Type .venv/bin/python -m pip cache purge, and $again"
  elif says 'Permission denied'; then
    echo "$not_ours"
  elif says 'No matching distribution'; then
    echo "$(find_unmatched) does not exist for Python $(version_of .venv/bin/python) on this" \
      "system. Type rm -rf .venv, then PYTHON=python3.12 bash scripts/setup.sh"
  elif [ "$1" -ge 128 ]; then
    echo "pip was ended from outside, most often for lack of memory: $again"
  else
    echo "pip says: $(grep -E '(ERROR|error):' "$log" 2>/dev/null | tail -n 1 | cut -c 1-300)" \
      "(more in $log)"
  fi
}

find_unmatched() {
  sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' "$log" | tail -n 1
}

# The CUDA build is what pip gets on Linux.
is_cuda_build() { [ "$(uname -s)" = Linux ] && [ -z "$cpu" ]; }

install_torch_for_cpu() {
  local line lines=()
  while read -r line; do lines+=("$line"); done < <(grep '^torch' requirements.txt)
  install --index-url "$torch_index" "${lines[@]}"
}

install_packages() {
  local silent=$quiet extra words=()
  [ -w .venv ] || fail "$not_ours"
  remove_unfinished 2>/dev/null || fail "$not_ours"
  if ! is_torch_there; then
    if is_cuda_build; then
      say "      up to 3 GB to download and 6 GB on the disk, so it takes some minutes"
      check_disk 8 ", or take --cpu, which needs 3 GB"
    else
      say "      up to 1 GB to download and 2 GB on the disk"
      check_disk 3
    fi
  fi
  [ -z "$cpu" ] || is_torch_there || install_torch_for_cpu
  for extra in "${extras[@]}"; do words+=(-r "requirements${extra:+-$extra}.txt"); done
  install "${words[@]}"
  # A .venv that is a link belongs to another checkout.
  silent=1
  [ -x .venv/bin/clip4idc ] || [ -L .venv ] || install --no-deps --editable .
  rm -rf .venv/tmp
}

# ---- 4: the first caption ----

try_it() {
  local output
  if [ -n "$quiet" ]; then
    output=$(.venv/bin/python -m clip4idc doctor 2>&1) || fail "$output"
  else
    .venv/bin/python -m clip4idc doctor || fail "the lines with ✘ say why"
  fi
  list_files >>.venv/set-up
}

read_arguments "$@"
case $(uname -s) in
  MINGW* | MSYS* | CYGWIN*)
    refuse "on Windows use WSL, or type py -m venv .venv, then .venv\\Scripts\\activate, then" \
      "pip install -e ."
    ;;
esac
trap 'printf "\nsetup.sh: interrupted in step $step of $steps: run it again to continue\n" >&2; exit 130' INT

[ -d .venv ] || [ -L .venv ] || [ ! -e .venv ] || refuse ".venv is a file: move it away"
if [ -n "$cpu" ] && compgen -G '.venv/lib/python*/site-packages/nvidia' >/dev/null; then
  refuse "PyTorch with CUDA is there already: rm -rf .venv, and run this again"
fi
if was_done; then
  say "All is set up. To use it: source .venv/bin/activate"
  exit 0
fi
begin 1 "Python"
if [ -d .venv ] && is_venv_usable; then
  version=$(version_of .venv/bin/python)
  is_new_enough "$version" ||
    fail ".venv has Python $version, and 3.10 or newer is needed: rm -rf .venv, and run this again"
  begin 2 ".venv is there, with Python $version"
else
  find_python
  if [ -d .venv ] || [ -L .venv ]; then
    [ -w .venv ] || [ -L .venv ] || fail "$not_ours"
    say "      the .venv that is here does not work: it is made anew"
    rm -rf .venv 2>/dev/null || fail "$not_ours"
  fi
  begin 2 "Making .venv"
  make_venv
fi
begin 3 "Packages"
install_packages
begin 4 "The first caption"
try_it
say "
Next, type:
  source .venv/bin/activate
  clip4idc predict docs/examples/removed_before.png docs/examples/removed_after.png
  clip4idc --help"
