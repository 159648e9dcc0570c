#!/usr/bin/env bash
# Install what the tests need and pass them: format, lint, types, tests.
#
#   ./launch/test.sh [--all] [pytest arguments]
#
# --all: also the tests that take minutes each.

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

marked=(-m "not long")
case ${1-} in
  --all)
    marked=()
    shift
    ;;
  -h | --help)
    sed -n '2,/^$/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

install run ray mlflow deepspeed test
cd -- "$root"
"$python" -m ruff format --check --quiet . || fail "the files above are not formatted; run $venv/bin/ruff format"
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest ${marked[@]+"${marked[@]}"} "$@"
