#!/usr/bin/env bash
# Fuzzes under address and undefined-behaviour sanitizers (clang with libFuzzer; Debian: clang, libclang-rt-dev).
#   tests/native/fuzz.sh reader  [seconds]     files: read, checked, planned, run once
#   tests/native/fuzz.sh kernels [seconds]     kernels of every instruction set against the oracle
#   tests/native/fuzz.sh merge                 what the last run of `reader` found goes into the committed corpus, least first
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?reader, kernels or merge} seconds=${2:-60} build=build/fuzz
if [ "$target" = merge ]; then
    exec "$build/fuzz_reader" -merge=1 -max_len=4096 tests/native/corpus "$build/corpus_reader"
fi
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER="${CXX:-clang++}" -DSPARSEPRUNE_PYTHON=OFF -DSPARSEPRUNE_FUZZ=ON \
    -DSPARSEPRUNE_SANITIZE=fuzzer-no-link,address,undefined -DCMAKE_CXX_FLAGS=-fno-sanitize-coverage=trace-cmp >/dev/null
cmake --build "$build" --target "fuzz_$target" --parallel "${JOBS:-2}"
mkdir -p "$build/corpus_$target"
# What a small case costs is the tools' own work: comparisons traced (no value is in the text as it is in memory), every input weighed
# anew after each execution, deep stacks of allocations.
options=(-max_total_time="$seconds" -print_final_stats=1 -rss_limit_mb=2048 -timeout=60 -entropic=0 -artifact_prefix="$build/")
[ "$target" = reader ] && options+=(-dict=tests/native/fuzz.dict -max_len=4096 "$build/corpus_reader" tests/native/corpus)
[ "$target" = kernels ] && options+=(-max_len=256 "$build/corpus_kernels")
ASAN_OPTIONS=malloc_context_size=2:quarantine_size_mb=16 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 exec "$build/fuzz_$target" "${options[@]}"
