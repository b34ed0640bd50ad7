#include "cpu/optim/fp8_adamw.h"

#include "core/n16.h"
#include "core/parallel.h"

namespace lowbit {

void fp8_adamw_scalar(const Fp8AdamW& z, int64_t begin, int64_t end);
void fp8_adamw_avx2(const Fp8AdamW& z, int64_t begin, int64_t end);
void fp8_adamw_avx512(const Fp8AdamW& z, int64_t begin, int64_t end);

void fp8_adamw(const Fp8AdamW& request, uint32_t isa, int threads) {
  const auto groups = isa & kAvx512 ? fp8_adamw_avx512 : isa & kAvx2 ? fp8_adamw_avx2 : fp8_adamw_scalar;
  // Below this many parameters a second thread costs more than it saves.
  const int useful = request.numel < 8 * 1024 ? 1 : threads;
  parallel(ceil_div(request.numel, kStateGroup), useful,
           [&](int64_t begin, int64_t end) { groups(request, begin, end); });
}

}  // namespace lowbit
