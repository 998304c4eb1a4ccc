#!/usr/bin/env bash
# Kernels for one instruction set must not leak into another: each object defines one global symbol, its table's getter,
# has no weak symbol (the linker would keep any one of several copies), and calls nothing but the C library's memory functions.
# usage: check_symbols.sh BUILD_DIR; NM names another nm, for objects of another processor
set -euo pipefail
status=0 found=0
while IFS= read -r object; do
    found=1
    name=$(basename "$object" .cpp.o)
    symbols=$("${NM:-nm}" -P "$object") # lines of: name, type, value, size
    bad=$(awk -v getter="_ZN11sparseprune${#name}${name}Ev" '
        $2 == "T" && $1 == getter { seen = 1; next }
        $2 == "U" && $1 ~ /^(memcpy|memset|memmove|memcmp|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail)$/ { next }
        $2 == "U" { print "calls " $1; next }
        $2 ~ /^[VvWwu]$/ { print "has the weak symbol " $1; next }
        $2 ~ /^[A-Zi]$/ { print "exports " $1 }
        END { if (!seen) print "does not define " getter }' <<<"$symbols" | c++filt)
    if [ -n "$bad" ]; then
        printf '%s:\n%s\n' "$object" "$bad"
        status=1
    fi
done < <(find "$1" -name 'kernels_*.cpp.o')
if [ "$found" = 0 ]; then
    echo "no kernels_*.cpp.o below $1"
    exit 1
fi
exit "$status"
