// Vectors of AVX-512 (f, bw, vl, dq, vbmi): 16 fp32 lanes. Cost on Zen 5 / Sapphire Rapids, latency@throughput:
// vpermps 4@1 / 3@1, vpermt2ps 4@1 / 3@1, vpsrld 1@.5 / 1@.5, vpternlogd 1@.25 / 1@.5, vfmadd 4@.5 / 4@.5.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/n16.h"
#include "cpu/simd/inline.h"
#include "cpu/simd/six_bits.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

using F = __m512;
using I = __m512i;
constexpr int kVecLanes = 16;
constexpr int kTileVecs = 4;  // vectors of columns that a GEMV keeps in registers
constexpr int kTileRows = 8;  // rows of x that a GEMV takes at a time
constexpr int kPanelRows = 6;
constexpr int kPanelVecs = 4;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
// b where either is NaN.
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline float sum_lanes(F v) { return _mm512_reduce_add_ps(v); }

inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
inline I set1_i(int32_t v) { return _mm512_set1_epi32(v); }
template <int N>
inline I shift_right(I v) {
  return _mm512_srli_epi32(v, N);
}
template <int N>
inline I shift_left(I v) {
  return _mm512_slli_epi32(v, N);
}
inline I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
// mask ? a : b, bit by bit.
inline I select_bits(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I bits_of(F v) { return _mm512_castps_si512(v); }
inline I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
inline void store_i(void* p, I v) { _mm512_storeu_si512(p, v); }
// The larger; v if that is NaN.
inline F max_or_nan(F bound, F v) { return _mm512_max_ps(bound, v); }
inline F as_float(I bits) { return _mm512_castsi512_ps(bits); }

inline F load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline I load_u8_lanes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
alignas(64) constexpr SixBitBytes<kVecLanes> kSixBitBytes;
// kVecLanes integers of a bit stream, B bits each, from number i on, a multiple of kVecLanes.
template <int B, bool kSigned>
inline I load_packed(const uint8_t* p, uint64_t i) {
  if constexpr (B == 4) {
    int64_t all;
    __builtin_memcpy(&all, p + i / 2, 8);
    // The low byte of dword j is the eight bits from bit 4 j on.
    constexpr int64_t kFirst = int64_t{4} << 32, kNext = (int64_t{8} << 32) + 8;
    const I shifts = _mm512_setr_epi64(kFirst, kFirst + kNext, kFirst + 2 * kNext, kFirst + 3 * kNext,
                                       kFirst + 4 * kNext, kFirst + 5 * kNext, kFirst + 6 * kNext, kFirst + 7 * kNext);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(all)), _mm512_set1_epi32(15));
  } else {
    const uint64_t second = i / kVecLanes % 2;
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(p + i / (2 * kVecLanes) * 24 + second * 8));
    const I fours = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), load_i(kSixBitBytes.at[second]));
    const I top = _mm512_sllv_epi32(fours, _mm512_set4_epi32(8, 14, 20, 26));
    return kSigned ? _mm512_srai_epi32(top, 26) : _mm512_srli_epi32(top, 26);
  }
}
// Round to nearest even; NaN stays NaN. vcvtneps2bf16 would flush subnormals.
inline void store_bf16(uint16_t* p, F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_f16(uint16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Round to nearest even, saturating; NaN gives 0.
inline void store_i8(int8_t* p, F v) {
  const F low = _mm512_max_ps(v, _mm512_set1_ps(-128.0f));
  const __m512i i = _mm512_cvtps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127.0f)));
  const __m512i kept = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), i);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(kept));
}

// Looks up the low B bits of each lane; higher bits are ignored.
template <int B>
struct Table {
  static constexpr int kVecs = B <= 4 ? 1 : 1 << (B - 4);
  F t[kVecs];
  explicit Table(const float* values) {
    for (int v = 0; v < kVecs; ++v) {
      float lanes[16];
      for (int i = 0; i < 16; ++i) lanes[i] = values[(v * 16 + i) & ((1 << B) - 1)];
      t[v] = load(lanes);
    }
  }
  LOWBIT_INLINE F operator()(I code) const {
    if constexpr (B <= 4) {
      return _mm512_permutexvar_ps(code, t[0]);
    } else {
      constexpr int kPairs = kVecs / 2;
      F r[kPairs];
      for (int i = 0; i < kPairs; ++i) {
        r[i] = _mm512_permutex2var_ps(t[2 * i], code, t[2 * i + 1]);
      }
      for (int bit = 5, width = kPairs / 2; width > 0; ++bit, width /= 2) {
        const __mmask16 high = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < width; ++i) r[i] = _mm512_mask_blend_ps(high, r[2 * i], r[2 * i + 1]);
      }
      return r[0];
    }
  }
};

inline F load_indexed(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }

// Lane i of the result is table[code[i] * stride + i].
inline F gather_column(const float* table, I code, int stride) {
  const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I index = _mm512_add_epi32(_mm512_mullo_epi32(code, _mm512_set1_epi32(stride)), lane);
  return load_indexed(table, index);
}

// GCC 12 takes a function that only prefetches for one without effect and drops calls that it has not inlined.
__attribute__((always_inline)) inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// FP8 codes, one in a lane.
inline I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
inline I or_i(I a, I b) { return _mm512_or_si512(a, b); }
inline I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) { return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(a, b), no, yes); }
inline I truncate_to_int(F v) { return _mm512_cvttps_epi32(v); }

// The low byte of every lane.
inline void store_u8(uint8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }

// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
inline F load_e4m3_256th(const uint8_t* p) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF))));
}

// Lane i is the largest lane of v[i]: pairs of vectors fold into one, their lanes side by side.
inline I max_of_each(const I* v) {
  I pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {
    const I a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const I a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  // 128-bit lanes: of two vectors, then of four.
  const I low =
      _mm512_max_epi32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x44), _mm512_shuffle_i32x4(fours[0], fours[1], 0xEE));
  const I high =
      _mm512_max_epi32(_mm512_shuffle_i32x4(fours[2], fours[3], 0x44), _mm512_shuffle_i32x4(fours[2], fours[3], 0xEE));
  return _mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
}

// FP8 states of optimizers. vdivps and vsqrtps of 16 lanes: one in 10 and 15 cycles on Zen 4.
inline F square_root(F v) { return _mm512_sqrt_ps(v); }
inline I min_u(I a, I b) { return _mm512_min_epu32(a, b); }
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), other, v);
}
inline F round_down(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// To nearest even.
inline I round_to_int(F v) { return _mm512_cvtps_epi32(v); }
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F times_power_of_two(F v, F n) { return _mm512_scalef_ps(v, n); }
inline uint32_t largest_lane(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
inline uint32_t smallest_lane(I v) { return _mm512_reduce_min_epu32(v); }

// Counts of bits with VPOPCNTDQ: one instruction a dword, latency 3, one (Zen 4, Ice Lake) a cycle.
constexpr int kSignRows = 4;
constexpr int kSignVecs = 4;
constexpr int64_t kCountChunks = INT64_MAX;  // dwords that `add_popcounts` may add up before `sum_popcounts`

#ifdef __AVX512VPOPCNTDQ__
inline I add_popcounts(I sums, I bits) { return add_i(sums, _mm512_popcnt_epi32(bits)); }
inline I sum_popcounts(I sums) { return sums; }
#endif
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_GE_OQ); }

// Bytes, with VNNI where they are multiplied. vpdpbusd: latency 4, one a cycle on Zen 4, two on Zen 5 and Sapphire
// Rapids; vpermb and vpmultishiftqb one a cycle.
constexpr int kGemmRows = 6;  // 6 x 4 sums, 4 vectors of weights and a broadcast fill the 32 registers
constexpr int kGemmVecs = 4;
constexpr int kSkinnyRows = 8;  // rows of x that share a decoded vector: 8 x 2 sums
constexpr int kSkinnyVecs = 2;

#ifdef __AVX512VNNI__
// Every lane of acc + the four products of unsigned bytes of w and signed bytes of x.
template <bool kWide>
LOWBIT_INLINE inline I dot4(I acc, I w, I x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}
#endif
inline I set1_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
inline I load_i8_lanes(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }

// Brings bit `first` of each word to bit P of its low byte, and bit `second` to bit P of its high byte.
template <int P>
LOWBIT_INLINE inline I gather_bits(I v, int first, int second, int) {
  const auto control = [&](int half) {
    uint64_t c = 0;
    for (int i = 0; i < 4; ++i) {
      c |= static_cast<uint64_t>((64 + 32 * half + 16 * (i / 2) + (i % 2 ? second : first) - P) % 64) << (8 * i);
    }
    return c;
  };
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(control(0) | control(1) << 32)), v);
}

// Looks up the low B bits of each byte; higher bits are ignored.
template <int B>
struct ByteTable {
  static constexpr int kVecs = B <= 6 ? 1 : 4;
  I t[kVecs];
  explicit ByteTable(const uint8_t* values) {
    alignas(64) uint8_t bytes[kVecs * 64];
    for (int i = 0; i < kVecs * 64; ++i) bytes[i] = values[i & ((1 << B) - 1)];
    for (int v = 0; v < kVecs; ++v) t[v] = load_i(bytes + v * 64);
  }
  LOWBIT_INLINE I operator()(I code) const {
    if constexpr (kVecs == 1) {
      return _mm512_permutexvar_epi8(code, t[0]);
    } else {
      const I low = _mm512_permutex2var_epi8(t[0], code, t[1]), high = _mm512_permutex2var_epi8(t[2], code, t[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
    }
  }
};

// Reorders the bytes of each chunk in place: byte i takes byte order[i].
inline void permute_chunks(int8_t* row, int64_t bytes, const uint8_t* order) {
  alignas(64) uint8_t index[64];
  for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i / 32 * 32 + order[i % 32]);
  const I index_vector = load_i(index);
  for (int64_t i = 0; i < bytes; i += 64) store_i(row + i, _mm512_permutexvar_epi8(index_vector, load_i(row + i)));
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
