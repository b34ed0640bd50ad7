#include "cpu/activations/int8.h"

#include "core/dispatch.h"
#include "core/parallel.h"

namespace lowbit {

void quantize_int8_scalar(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);
void quantize_int8_avx2(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);
void quantize_int8_avx512vnni(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);

void quantize_int8_rows(const QuantizeInt8& request, int8_t* q, int64_t begin, int64_t end) {
  const uint32_t isa = active_isa();
  const auto rows = isa & kAvx512Vnni ? quantize_int8_avx512vnni
                    : isa & kAvx2     ? quantize_int8_avx2
                                      : quantize_int8_scalar;
  rows(request, q, begin, end);
}

void quantize_int8(const QuantizeInt8& request, int64_t m, int8_t* q, int threads) {
  // Below this many elements a second thread costs more than it saves.
  const int useful = m * request.k < 64 * 1024 ? 1 : threads;
  parallel(m, useful, [&](int64_t begin, int64_t end) { quantize_int8_rows(request, q, begin, end); });
}

}  // namespace lowbit
