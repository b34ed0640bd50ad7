// Vectors of AVX-512 (f, bw, vl, dq, vbmi): 16 fp32 lanes. Cost on Zen 5 / Sapphire Rapids, latency@throughput:
// vpermps 4@1 / 3@1, vpermt2ps 4@1 / 3@1, vpsrld 1@.5 / 1@.5, vpternlogd 1@.25 / 1@.5, vfmadd 4@.5 / 4@.5.
#pragma once

#include <immintrin.h>

#include <cstdint>

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
inline float sum(F v) { return _mm512_reduce_add_ps(v); }

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
// Of 6 bits: a dword of four codes takes the three bytes of all four. A vector's bytes are loaded with some of the
// vector beside it, so that nothing beyond a pair of vectors is read: those of the first of a pair start at byte 0 of
// what is loaded, those of the second at kVecLanes / 4.
struct SixBitBytes {
  int8_t at[2][4 * kVecLanes] = {};
  constexpr SixBitBytes() {
    for (int i = 0; i < 8 * kVecLanes; ++i) {
      const int second = i / (4 * kVecLanes), byte = i % 4, four = i % (4 * kVecLanes) / 16;
      at[second][i % (4 * kVecLanes)] = static_cast<int8_t>(byte == 3 ? -1 : second * kVecLanes / 4 + 3 * four + byte);
    }
  }
};
alignas(64) constexpr SixBitBytes kSixBitBytes;
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
  F operator()(I code) const {
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

// Lane i of the result is table[code[i] * stride + i].
inline F gather_column(const float* table, I code, int stride) {
  const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I index = _mm512_add_epi32(_mm512_mullo_epi32(code, _mm512_set1_epi32(stride)), lane);
  return _mm512_i32gather_ps(index, table, 4);
}

// GCC 12 takes a function that only prefetches for one without effect and drops calls that it has not inlined.
__attribute__((always_inline)) inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
