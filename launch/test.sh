#!/usr/bin/env bash
# Install what the tests need and pass them: format, lint, types, tests.
#
#   ./launch/test.sh [--all] [pytest arguments]
#   ./launch/test.sh --gpu [--wheels FOLDER] [--json FOLDER]
#
# --all: also the tests that take minutes each.
# --gpu: only what a GPU tells, see gpu.sh; without one it says what it skips.
#
# Without pytest arguments there are two parts, each with pytest's own closing line: first the tests
# that do without Ray, two at a time, then those with it, one at a time. With
# arguments, such as files or -k, there is one part, one test at a time.

. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

marked=(-m "not long")
case ${1-} in
  --all)
    marked=()
    shift
    ;;
  --gpu)
    shift
    exec "$root/launch/gpu.sh" "$@"
    ;;
  -h | --help)
    sed -n '2,/^$/{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

install run ray mlflow deepspeed lora gguf code test
cd -- "$root"
"$python" -m ruff format --check --quiet . || fail "the files above are not formatted; run $venv/bin/ruff format"
"$python" -m ruff check .
"$python" -m mypy
if (($#)); then
  exec "$python" -m pytest ${marked[@]+"${marked[@]}"} "$@"
fi
alone=(tests/cluster)
failed=()
two_at_a_time=(--numprocesses=2 --dist=loadfile "${alone[@]/#/--ignore=}")
"$python" -m pytest ${marked[@]+"${marked[@]}"} "${two_at_a_time[@]}" || failed+=(first)
"$python" -m pytest ${marked[@]+"${marked[@]}"} "${alone[@]}" || failed+=(second)
for part in ${failed[@]+"${failed[@]}"}; do
  echo "${0##*/}: the $part part failed; see above" >&2
done
exit $((${#failed[@]} > 0))
