#include "core/int8_table.h"

#include <cmath>

namespace lowbit {

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

}  // namespace lowbit
