// Picoseconds per weight of the kernels, by family. Measured on 4096 x 4096 weights rotated over 80 MiB and more, on
// one thread: of Zen 4 if nothing else is said. `consteval`, so that no unit holds a copy.
#pragma once

#include "core/kernel.h"

namespace lowbit {

consteval Cost f32_gemv_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx512) {
    return bits == 8 && lut ? Cost{227, 0, 332, 4} : bits == 8 ? Cost{85, 0, 100, 4} : Cost{38, 0, 83, 4};
  }
  return bits >= 6 && lut ? Cost{424, 0, 479, 4} : bits == 8 ? Cost{94, 0, 190, 4} : Cost{80, 0, 163, 4};
}
// Plain C++: Zen 5.
consteval Cost f32_gemm_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kScalar) return {1700, 1300, 700, 2};
  if (isa == kAvx512) {
    return bits == 8 && lut ? Cost{450, 415, 110, 6} : bits == 8 ? Cost{226, 195, 109, 6} : Cost{158, 128, 109, 6};
  }
  return bits >= 6 && lut ? Cost{600, 530, 118, 6} : bits == 8 ? Cost{285, 220, 115, 6} : Cost{236, 175, 115, 6};
}

consteval Cost bf16_gemv_cost(int bits, Codec codec) {
  return codec == Codec::kInt ? Cost{25, 0, 76, 4} : bits == 8 ? Cost{44, 38, 39, 4} : Cost{17, 0, 39, 4};
}
consteval Cost bf16_gemm_cost(int bits) { return bits == 8 ? Cost{80, 20, 56, 6} : Cost{55, 12, 56, 6}; }
consteval Cost bf16_columns_cost(int bits) { return bits == 8 ? Cost{190, 150, 75, 4} : Cost{40, 20, 42, 4}; }

consteval Cost f16_gemv_cost(int bits) { return bits == 8 ? Cost{83, 0, 105, 4} : Cost{31, 0, 80, 4}; }
consteval Cost f16_gemm_cost(int bits) { return bits == 8 ? Cost{80, 68, 122, 6} : Cost{51, 28, 113, 6}; }

// With AVX2, wide products take two instructions for one.
consteval Cost i8_skinny_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx2) {
    const float pass = lut ? 108.0f : bits == 8 ? 97.0f : 50.0f;
    return lut && bits >= 6                      ? Cost{185, 60, 236, 4}
           : bits == 3 || bits == 5 || bits == 6 ? Cost{42, 15, pass + 16, 4}
           : bits == 8                           ? Cost{120, 20, pass, 4}
                                                 : Cost{44, 5, pass, 4};
  }
  return bits == 8   ? Cost{75, 20, lut ? 52.0f : 44.0f, 8}
         : bits == 6 ? Cost{60, 5, 52, 8}
         : bits == 5 ? Cost{40, 10, 50, 8}
         : bits == 3 ? Cost{18, 27, 49, 8}
         : bits == 4 ? Cost{21, 2, lut ? 45.0f : 40.0f, 8}
                     : Cost{10, 2, 40, 8};
}
consteval Cost i8_gemm_cost(Isa isa, int bits, Codec codec) {
  const bool lut = codec == Codec::kLut;
  if (isa == kAvx2) {
    const float pass = lut ? 93.0f : bits == 8 ? 83.0f : 46.0f;
    return lut && bits >= 6         ? Cost{190, 160, pass, 4}
           : bits == 4 || bits <= 2 ? Cost{46, 35, pass, 4}
                                    : Cost{89, 70, pass, 4};
  }
  const float pass = lut && bits >= 4 ? 34.0f : 32.0f;
  return bits >= 6   ? Cost{67, bits == 8 ? 55.0f : 41.0f, pass, 6}
         : bits >= 3 ? Cost{28, 22, pass, 6}
                     : Cost{18, 5, pass, 6};
}

consteval Cost nibbles_cost(bool bf16_table) { return bf16_table ? Cost{52, 0, 76, 2} : Cost{58, 0, 75, 2}; }

// Measured on Zen 3 beside the 4-bit kernels, and scaled to their costs on Zen 4.
consteval Cost float8_gemv_cost() { return {85, 0, 105, 2}; }
consteval Cost float8_gemm_cost() { return {290, 202, 115, 6}; }

// Estimated from counted instructions, not measured: it decides the number of threads alone, as these kernels have no
// rivals.
consteval Cost xnor_cost(Isa isa) {
  return isa == kScalar ? Cost{80, 20, 260, 4} : isa == kAvx2 ? Cost{8, 4, 14, 4} : Cost{5, 2, 4, 4};
}

}  // namespace lowbit
