// Counts of bits in vectors of AVX-512 with VPOPCNTDQ: one instruction a dword, latency 3, one (Zen 4, Ice Lake) a
// cycle.
#pragma once

// clang-format off: the vectors come first
#include "cpu/simd/vec_avx512.h"
#include "cpu/weights/codecs-inl.h"
// clang-format on

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kSignRows = 4;
constexpr int kSignVecs = 4;
constexpr int64_t kCountChunks = INT64_MAX;  // dwords that `count` may add up before `total`

inline I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
inline I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I count(I sums, I bits) { return add_i(sums, _mm512_popcnt_epi32(bits)); }
inline I total(I sums) { return sums; }
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_GE_OQ); }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
