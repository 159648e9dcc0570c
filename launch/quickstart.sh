#!/usr/bin/env bash
# The main job, whole: tune tiny-code on a source tree with LWO, on two Ray workers, and print before and after.
#
#   ./launch/quickstart.sh [--source DIR] [key=value ...]
#
# DIR: your own code, a folder or a git repository (also a URL). Without it the sources of an installed package
# stand in for a private repository.

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

install run ray mlflow
if [[ -z $source ]]; then
  # 150 files of an application-like library, none of which tiny-code was trained on.
  source=$("$python" -c 'import importlib.util as u; print(u.find_spec("datasets").submodule_search_locations[0])')
  set -- 'data.extensions=[.py]' "$@"
fi
exec "$venv/bin/lwo-dist" train --config "$root/launch/configs/quickstart.yaml" \
  "storage=$root/runs" "data.source=$source" "$@"
