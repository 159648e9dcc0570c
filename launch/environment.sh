# Sourced by quickstart.sh and test.sh: one virtual environment for this checkout, ./.venv or $LWO_VENV.
#
# pip's own configuration is respected. Without any, PyPI's torch for Linux brings CUDA (some 5 GB); where there is no
# GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu brings the CPU build instead.

set -euo pipefail
unset PYTHONPATH PYTHONHOME

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${LWO_VENV:-$root/.venv}
python=$venv/bin/python

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

_find_python() {
  local name path
  for name in python3 python3.{14,13,12,11}; do
    path=$(command -v "$name") || continue
    if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$path"
      return
    fi
  done
  fail "no Python 3.11 or newer found; install python3 (3.11 or newer) with its venv module"
}

# _among LINE WORD...: whether each WORD is one of LINE.
_among() {
  local word
  for word in "${@:2}"; do
    [[ " $1 " == *" $word "* ]] || return 1
  done
}

# install EXTRA...: make the environment and install the checkout with these extras into it, unless that was done with
# these requirements and at least these extras.
install() {
  local base done_for extras stamp=$venv/.lwo-dist wanted
  wanted=$(cat -- "$root/pyproject.toml" "$root/launch/constraints.txt"; echo "$root")
  done_for=$(cat -- "$stamp" 2>/dev/null || true)
  if [[ -x $python && ${done_for#*$'\n'} == "$wanted" ]] && _among "${done_for%%$'\n'*}" "$@"; then
    return
  fi
  command -v cc gcc clang >/dev/null || fail "no C compiler found; install one, such as gcc"
  if [[ ! -x $python ]]; then
    base=$(_find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$base has no venv module; install it (Debian and Ubuntu: apt install python3-venv)"
    "$base" -m venv -- "$venv" || fail "$venv could not be made; set LWO_VENV to a folder that can be written"
  fi
  echo "installing into $venv (some minutes the first time)"
  extras=$(IFS=,; echo "$*")
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/launch/constraints.txt" --editable "${root}[$extras]" ||
    fail "pip could not install the packages; its message is above"
  printf '%s\n%s\n' "$*" "$wanted" >"$stamp"
}
