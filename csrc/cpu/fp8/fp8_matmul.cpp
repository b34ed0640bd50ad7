#include "cpu/fp8/fp8_matmul.h"

#include "core/n16.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace lowbit {

const Fp8MatmulKernel& fp8_matmul_scalar();
const Fp8MatmulKernel& fp8_matmul_avx2();
const Fp8MatmulKernel& fp8_matmul_avx512();
const Fp8MatmulKernel& fp8_matmul_avx512bf16();

namespace {

// Below this many products, and this many elements of a to convert, a second thread costs more than it saves.
constexpr double kLeastProducts = 256 * 1024;
constexpr int64_t kLeastElements = 64 * 1024;
constexpr int kLeastGroup = 4;  // logarithm of it

}  // namespace

std::span<const Fp8MatmulKernel* const> fp8_matmul_kernels() {
  static const Fp8MatmulKernel* const all[] = {&fp8_matmul_avx512bf16(), &fp8_matmul_avx512(), &fp8_matmul_avx2(),
                                               &fp8_matmul_scalar()};
  return all;
}

const Fp8MatmulKernel& fp8_matmul_kernel(uint32_t isa_mask) {
  for (const Fp8MatmulKernel* kernel : fp8_matmul_kernels()) {
    if (kernel->isa & isa_mask) return *kernel;
  }
  return fp8_matmul_scalar();
}

void fp8_matmul(const Fp8MatmulKernel& kernel, Fp8Matmul request, int threads) {
  const int64_t m = request.out.m, n = request.out.n, k = request.out.k;
  if (m == 0 || n == 0) return;
  const int k_shift = request.a.scales.k_shift;
  const bool few = m <= kFp8FewRows;
  const int64_t codes_bytes = m * ceil_div(k, kFp8PadK) * kFp8PadK * kernel.element_bytes;
  // Of few rows, a zero ends them.
  const int64_t groups = few ? ((k - 1) >> kLeastGroup) + 2 : k_shift != kWholeRow ? ((k - 1) >> k_shift) + 1 : 0;
  thread_local Scratch scratch;
  char* memory = static_cast<char*>(scratch.get(static_cast<size_t>(codes_bytes + groups * m * 4)));
  request.prepared = memory;
  request.a_scales = groups ? reinterpret_cast<float*>(memory + codes_bytes) : nullptr;

  parallel(m, m * k < kLeastElements ? 1 : threads, [&](int64_t b, int64_t e) { kernel.prepare(request, b, e); });
  const int64_t tasks =
      few ? ceil_div(n, kFp8FewRowsColumns) : ceil_div(n, kernel.columns) * ceil_div(m, kFp8RowsPerTask);
  const double products = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  parallel(tasks, products < kLeastProducts ? 1 : threads, [&](int64_t b, int64_t e) { kernel.run(request, b, e); });
  scratch.trim();
}

}  // namespace lowbit
