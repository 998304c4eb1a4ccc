#!/usr/bin/env bash
# compute-sanitizer over the GPU tests: odd sizes, empty rows, every kernel, graph capture. Needs a device.
# usage: bench/sanitize_cuda.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing: it comes with the CUDA toolkit" >&2; exit 1; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no CUDA device" >&2; exit 1; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own, so that its ends are known
for tool in memcheck racecheck initcheck; do
    echo "=== $tool"
    # only our kernels; a library's own findings are not ours to judge
    compute-sanitizer --tool "$tool" --kernel-name kernel_substring=sparseprune --error-exitcode 1 --target-processes all \
        "$python" -m pytest -q tests/test_cuda_layers.py -k 'every_kernel or empty_rows or graph_capture'
done
