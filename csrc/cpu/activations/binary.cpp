#include "cpu/activations/binary.h"

#include "core/dispatch.h"
#include "core/parallel.h"

namespace lowbit {

void quantize_binary_scalar(const QuantizeBinary& z, uint8_t* bits, int64_t begin, int64_t end);
void quantize_binary_avx2(const QuantizeBinary& z, uint8_t* bits, int64_t begin, int64_t end);
void quantize_binary_avx512vpopcntdq(const QuantizeBinary& z, uint8_t* bits, int64_t begin, int64_t end);

void quantize_binary(const QuantizeBinary& request, int64_t m, uint8_t* bits, int threads) {
  const uint32_t isa = active_isa();
  const auto rows = isa & kAvx512Vpopcntdq ? quantize_binary_avx512vpopcntdq
                    : isa & kAvx2          ? quantize_binary_avx2
                                           : quantize_binary_scalar;
  // Below this many elements a second thread costs more than it saves.
  const int useful = m * request.k < 64 * 1024 ? 1 : threads;
  parallel(m, useful, [&](int64_t begin, int64_t end) { rows(request, bits, begin, end); });
}

}  // namespace lowbit
