#!/usr/bin/env bash
# What only a GPU tells, with the packages that are there: nothing is installed but the wheels of a folder, for this run
# alone, and no network is needed. At most 20 minutes. test.sh --gpu is this.
#
#   ./launch/test.sh --gpu [--wheels FOLDER] [--json FOLDER]
#
# --wheels: a folder of wheels of what is missing, such as pydantic's; or $LWO_WHEELS.
# --json: the folder that the figures are written to.

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

wheels=${LWO_WHEELS-}
figures=
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?"--wheels needs a folder"} ;;
    --json) figures=${2:?"--json needs a folder"} ;;
    -h | --help)
      sed -n '2,/^$/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) fail "$1: --gpu takes --wheels FOLDER and --json FOLDER" ;;
  esac
  shift 2
done

[[ -x $python ]] || python=$(command -v python3) || fail "no python3 found"
made=$(mktemp -d)
trap 'rm -rf -- "$made"' EXIT
figures=${figures:-$made}
mkdir -p -- "$figures"
export PYTHONPATH=$root
if [[ $wheels ]]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$made/site" \
    -- "$wheels"/*.whl || fail "the wheels in $wheels could not be installed; pip's message is above"
  export PYTHONPATH=$root:$made/site
fi
"$python" -c 'import pydantic, torch, transformers' ||
  fail "$python needs torch, pydantic and transformers; give what is missing as wheels (--wheels FOLDER)"

cd -- "$root"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
deadline=$((SECONDS + 1200))
failed=0
timeout 600 "$python" -m tests.gpu --json "$figures/gpu.json" || failed=1
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "skipped  speed.py: no GPU"
elif [[ ! -f tests/benchmarks/speed.py ]]; then
  echo "skipped  speed.py: this checkout has none"
else
  timeout "$((deadline - SECONDS))" "$python" tests/benchmarks/speed.py --device cuda --steps 2 --checkpointing off \
    --models Qwen2.5-Coder-0.5B Qwen2.5-Coder-1.5B Qwen2.5-Coder-7B --json "$figures/speed.json" || failed=1
fi
((failed == 0)) || echo "${0##*/}: --gpu failed; see above" >&2
exit "$failed"
