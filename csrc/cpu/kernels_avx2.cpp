// The kernels for avx2. Everything but the table's getter has internal linkage, so that no code of this file can be merged elsewhere.
#include <immintrin.h>
#include "kernels.h"

namespace sparseprune {
namespace {
#include "vec_avx2.h"
#include "spmm.h"
#include "packers.h"
#include "pooling.h"
#include "activations.h"
#include "tensor.h"
#include "table.h"
}  // namespace
const Kernels* kernels_avx2() { return &kTable; }
}  // namespace sparseprune
