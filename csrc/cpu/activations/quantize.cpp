#include "cpu/activations/quantize.h"

#include "core/costs.h"
#include "core/parallel.h"
#include "core/registry.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(quantize)

const QuantizeOps& quantize_ops(uint32_t isa_mask) { return *newest(units::quantize::kAll, isa_mask).given; }

void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads) {
  const QuantizeOps& ops = quantize_ops(active_isa());
  parallel(m, m * request.k < kLeastConversions ? 1 : threads,
           [&](int64_t begin, int64_t end) { ops.int8(request, q, begin, end); });
}

void quantize_binary(const QuantizeBinary& request, int64_t m, uint8_t* bits, int threads) {
  const QuantizeOps& ops = quantize_ops(active_isa());
  parallel(m, m * request.k < kLeastConversions ? 1 : threads,
           [&](int64_t begin, int64_t end) { ops.binary(request, bits, begin, end); });
}

}  // namespace lowbit
