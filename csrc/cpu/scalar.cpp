#define LOWBIT_ISA scalar
#define LOWBIT_ISA_BIT kScalar
#define LOWBIT_NO_GEMV
#include "cpu/vec_scalar.h"
#include "kernel.h"

// Measured on 4096 x 4096 weights rotated over 80 MiB and more, one thread of Zen 5.
namespace lowbit::scalar {
namespace {
[[maybe_unused]] constexpr Cost gemv_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{}; }
constexpr Cost gemm_cost([[maybe_unused]] int bits, [[maybe_unused]] Codec codec) { return Cost{1700, 1300, 700, 2}; }
}  // namespace
}  // namespace lowbit::scalar

#include "cpu/attention-inl.h"
#include "cpu/embedding-inl.h"
#include "cpu/table-inl.h"
LOWBIT_EXPORT_TABLE(kF32Kernels)
LOWBIT_EXPORT_DECODER_OPS

namespace lowbit {
void embed_rows(const Launch& l, int bits, Scope scope, const int64_t* indices, int64_t begin, int64_t end,
                uint8_t* codes) {
  scalar::embed_rows(l, bits, scope, indices, begin, end, codes);
}
}  // namespace lowbit
