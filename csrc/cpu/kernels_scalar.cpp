// The kernels for scalar. Everything but the table's getter has internal linkage, so that no code of this file can be merged elsewhere.
#include "kernels.h"

namespace sparseprune {
namespace {
#include "vec_scalar.h"
#include "spmm.h"
#include "packers.h"
#include "pooling.h"
#include "activations.h"
#include "tensor.h"
#include "table.h"
}  // namespace
const Kernels* kernels_scalar() { return &kTable; }
}  // namespace sparseprune
