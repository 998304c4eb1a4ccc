// The kernels for neon. Everything but the table's getter has internal linkage, so that no code of this file can be merged elsewhere.
#include <arm_neon.h>
#include "kernels.h"

namespace sparseprune {
namespace {
#include "vec_neon.h"
#include "spmm.h"
#include "packers.h"
#include "pooling.h"
#include "activations.h"
#include "tensor.h"
#include "table.h"
}  // namespace
const Kernels* kernels_neon() { return &kTable; }
}  // namespace sparseprune
