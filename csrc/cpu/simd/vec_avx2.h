// Vectors of AVX2 with FMA and F16C: 8 fp32 lanes. Cost on Zen 5 / Alder Lake, latency@throughput:
// vpermps 4@.5 / 3@1, vblendvps 1@.5 / 3@1, vpsrld 1@.5 / 1@.5, vfmadd 4@.5 / 4@.5.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

using F = __m256;
using I = __m256i;
constexpr int kVecLanes = 8;
constexpr int kTileVecs = 2;
constexpr int kTileRows = 4;  // rows of x that a GEMV takes at a time
constexpr int kPanelRows = 6;
constexpr int kPanelVecs = 2;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
// b where either is NaN.
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline I load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline I set1_i(int32_t v) { return _mm256_set1_epi32(v); }
template <int N>
inline I shift_right(I v) {
  return _mm256_srli_epi32(v, N);
}
template <int N>
inline I shift_left(I v) {
  return _mm256_slli_epi32(v, N);
}
inline I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
// mask ? a : b, bit by bit.
inline I select_bits(I mask, I a, I b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
inline I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I bits_of(F v) { return _mm256_castps_si256(v); }
inline I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
inline void store_i(void* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
// The larger; v if that is NaN.
inline F max_or_nan(F bound, F v) { return _mm256_max_ps(bound, v); }
inline F as_float(I bits) { return _mm256_castsi256_ps(bits); }

inline F load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline F load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline I load_u8_lanes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
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
    int32_t eight;
    __builtin_memcpy(&eight, p + i / 2, 4);
    const I codes = _mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_and_si256(codes, _mm256_set1_epi32(15));
  } else {
    const uint64_t second = i / kVecLanes % 2;
    int64_t bytes;
    __builtin_memcpy(&bytes, p + i / (2 * kVecLanes) * 12 + second * 4, 8);
    const I fours = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), load_i(kSixBitBytes.at[second]));
    const I top = _mm256_sllv_epi32(fours, _mm256_setr_epi32(26, 20, 14, 8, 26, 20, 14, 8));
    return kSigned ? _mm256_srai_epi32(top, 26) : _mm256_srli_epi32(top, 26);
  }
}
// Round to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store_f16(uint16_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Round to nearest even, saturating; NaN gives 0.
inline void store_i8(int8_t* p, F v) {
  const F low = _mm256_max_ps(v, _mm256_set1_ps(-128.0f));
  const F clamped = _mm256_min_ps(low, _mm256_set1_ps(127.0f));
  const __m256i i = _mm256_cvtps_epi32(_mm256_and_ps(clamped, _mm256_cmp_ps(v, v, _CMP_ORD_Q)));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

// Eight loads: as fast as vgatherdps (slow on AMD, slower since the Downfall fix on Intel), and QEMU 7 has it wrong.
inline F load_indexed(const float* table, I index) {
  alignas(32) int32_t i[8];
  _mm256_store_si256((__m256i*)i, index);
  return _mm256_setr_ps(table[i[0]], table[i[1]], table[i[2]], table[i[3]], table[i[4]], table[i[5]], table[i[6]],
                        table[i[7]]);
}

// Looks up the low B bits of each lane; higher bits are ignored.
template <int B>
struct Table {
  static constexpr bool kInRegisters = B <= 5;
  static constexpr int kVecs = !kInRegisters ? 1 : B <= 3 ? 1 : 1 << (B - 3);
  F t[kVecs];
  const float* values;
  explicit Table(const float* v) : values(v) {
    for (int i = 0; i < kVecs; ++i) {
      float lanes[8];
      for (int j = 0; j < 8; ++j) lanes[j] = v[(i * 8 + j) & ((1 << B) - 1)];
      t[i] = load(lanes);
    }
  }
  F operator()(I code) const {
    if constexpr (!kInRegisters) {
      return load_indexed(values, bit_and(code, set1_i((1 << B) - 1)));
    } else {
      F r[kVecs];
      for (int i = 0; i < kVecs; ++i) r[i] = _mm256_permutevar8x32_ps(t[i], code);
      if constexpr (kVecs > 1) {
        const F bit3 = _mm256_castsi256_ps(shift_left<28>(code));
        for (int i = 0; i < kVecs / 2; ++i) r[i] = _mm256_blendv_ps(r[2 * i], r[2 * i + 1], bit3);
      }
      if constexpr (kVecs > 2) {
        r[0] = _mm256_blendv_ps(r[0], r[1], _mm256_castsi256_ps(shift_left<27>(code)));
      }
      return r[0];
    }
  }
};

// Lane i of the result is table[code[i] * stride + i].
inline F gather_column(const float* table, I code, int stride) {
  const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const I index = _mm256_add_epi32(_mm256_mullo_epi32(code, _mm256_set1_epi32(stride)), lane);
  return load_indexed(table, index);
}

// GCC 12 takes a function that only prefetches for one without effect and drops calls that it has not inlined.
__attribute__((always_inline)) inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
