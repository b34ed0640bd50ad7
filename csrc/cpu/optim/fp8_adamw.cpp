#include "cpu/optim/fp8_adamw.h"

#include "core/costs.h"
#include "core/n16.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(fp8_adamw)

void fp8_adamw(const Fp8AdamW& request, uint32_t isa, int threads) {
  const Fp8AdamWGroups groups = *newest(units::fp8_adamw::kAll, isa).given;
  parallel(ceil_div(request.numel, kStateGroup), request.numel < kLeastFp8AdamWParameters ? 1 : threads,
           [&](int64_t begin, int64_t end) { groups(request, begin, end); });
}

}  // namespace lowbit
