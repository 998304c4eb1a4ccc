#!/usr/bin/env bash
# Everything about the GPU in one command: builds, tests, measures. No network; under nine minutes. Leaves
#   gpu_check.json            the layers of issue 6, every kernel against everything torch has
#   gpu_check_networks.json   ResNet-50, batch 64, 95 %, float32 without TF32
#   gpu_check_table.json      ResNet-50's layers after convert, batch 64, 80 and 95 %: how often dense is faster
# The whole tables: bench/layers.py --device cuda, bench/networks.py --device cuda.
# Needs torch with CUDA, NumPy, safetensors, pytest, pybind11, cmake and nvcc 12 or later, as a bare machine has them.
# usage: bench/gpu_check.sh [directory for the results, default .]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-.}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
stage() { printf '\n=== %s (%s s)\n' "$1" "$SECONDS"; }
# limited SECONDS COMMAND: no longer than that, nor than what is left of nine minutes; each result is kept as it comes
limited() {
    local most=$1 left=$((530 - SECONDS))
    shift
    if ((left < 5)); then echo "no time is left for: $*" >&2; failures=124; return; fi
    timeout "$((most < left ? most : left))" "$@" || failures=$?
}

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
limited 160 "$python" -m pytest -q -p no:cacheprovider --rootdir=. tests/test_cuda_layers.py

stage "layers of issue 6"
limited 120 "$python" bench/layers.py --device cuda --only cases --json "$out/gpu_check.json"

stage "network"
limited 120 "$python" bench/networks.py --device cuda resnet50 --sparsity 0.95 --batch 64 --tf32 off --json "$out/gpu_check_networks.json"

stage "table"
limited 120 "$python" bench/layers.py --device cuda --only table --shapes resnet50 --batch 64 --sparsity 0.8,0.95 --patterns 1x1 --tf32 off --rounds 7 --json "$out/gpu_check_table.json"
printf '\n%s s, results in %s/gpu_check*.json\n' "$SECONDS" "$out"
exit "$failures"
