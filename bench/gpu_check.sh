#!/usr/bin/env bash
# Everything about the GPU in one command: builds, tests, measures; leaves gpu_check.json. No network; under nine minutes.
# Needs torch with CUDA, NumPy, safetensors, pytest, pybind11, cmake and nvcc 12 or later, as a bare machine has them.
# usage: bench/gpu_check.sh [directory for the results, default .]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-.}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage() { printf '\n=== %s (%s s)\n' "$1" "$SECONDS"; }

stage "build"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device" >&2; exit 1; }
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
pybind=$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')
cmake -S . -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DSPARSEPRUNE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
    -Dpybind11_DIR="$pybind" -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
cmake --build "$work/build" --parallel "$(nproc)" >"$work/build.log" 2>&1 || { tail -50 "$work/build.log"; exit 1; }
"$python" csrc/cuda/resources.py <"$work/build.log"
mkdir "$work/package" && cp -r sparseprune "$work/package/" && rm -f "$work"/package/sparseprune/_native*.so "$work"/package/sparseprune/_cuda*.so
cp "$work"/build/_native*.so "$work"/build/_cuda*.so "$work/package/sparseprune/"
export PYTHONPATH="$work/package"

stage "tests"
failures=0
timeout 200 "$python" -m pytest -q -p no:cacheprovider --rootdir=. tests/test_cuda_layers.py || failures=$?

stage "layers"
timeout 200 "$python" bench/cuda_layers.py --json "$out/gpu_check.json" || failures=$?
printf '\n%s s, results in %s\n' "$SECONDS" "$out/gpu_check.json"
exit "$failures"
