// The kernels for avx512. Everything but the table's getter has internal linkage, so that no code of this file can be merged elsewhere.
#include <immintrin.h>
#include "kernels.h"

namespace sparseprune {
namespace {
#include "vec_avx512.h"
#include "spmm.h"
#include "packers.h"
#include "pooling.h"
#include "activations.h"
#include "tensor.h"
#include "table.h"
}  // namespace
const Kernels* kernels_avx512() { return &kTable; }
}  // namespace sparseprune
