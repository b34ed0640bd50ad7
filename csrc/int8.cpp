#include "int8.h"

#include <cmath>

#include "dispatch.h"
#include "parallel.h"

namespace lowbit {

void quantize_int8_scalar(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);
void quantize_int8_avx2(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);
void quantize_int8_avx512vnni(const QuantizeInt8& z, int8_t* q, int64_t begin, int64_t end);

float round_table(const float* table, int entries, float step, int8_t* out) {
  if (step == 0) {
    for (int i = 0; i < entries; ++i) {
      const float magnitude = std::fabs(table[i]);
      if (std::isfinite(magnitude) && magnitude > step) step = magnitude;
    }
    step = step > 0 ? step / 127.0f : 1.0f;
  }
  for (int i = 0; i < entries; ++i) {
    const float ratio = table[i] / step;
    const float t = ratio < -128.0f ? -128.0f : ratio > 127.0f ? 127.0f : ratio;
    // Adding 1.5 * 2^23 and taking it away rounds to nearest even.
    out[i] = std::isfinite(table[i]) ? static_cast<int8_t>((t + 12582912.0f) - 12582912.0f) : int8_t{0};
  }
  return step;
}

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
