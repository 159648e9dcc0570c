#!/usr/bin/env bash
# Write the image's lock files anew, with hashes, for linux on x86_64: after a change of pyproject.toml, of
# launch/constraints.txt or of build.in. Needs uv: pip install uv
#
#   ./launch/image/lock.sh [option of uv pip compile]...
#
# TORCH_LINKS: where the CPU build of torch is listed, a page or a folder.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

torch_links=${TORCH_LINKS:-https://download.pytorch.org/whl/cpu/torch/}
torch=$(grep '^torch==' launch/constraints.txt)
extras=(--extra run --extra ray --extra mlflow --extra deepspeed --extra lora --extra code --extra server)

lock() {
  uv pip compile --quiet --no-config --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
    --custom-compile-command ./launch/image/lock.sh --constraint launch/constraints.txt "$@"
}

lock "$@" -o launch/image/requirements-build.txt launch/image/build.in
lock "$@" -o launch/image/requirements-cuda.txt "${extras[@]}" pyproject.toml
lock "$@" -o launch/image/requirements-cpu.txt "${extras[@]}" --find-links "$torch_links" pyproject.toml - \
  <<<"$torch+cpu"
# Where pip finds that build; uv would write the folder that it was given.
sed -i '3i --find-links https://download.pytorch.org/whl/cpu/torch/' launch/image/requirements-cpu.txt
