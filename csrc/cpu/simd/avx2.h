// Vectors of AVX2 with FMA and F16C: 8 fp32 lanes. Cost on Zen 5 / Alder Lake, latency@throughput:
// vpermps 4@.5 / 3@1, vblendvps 1@.5 / 3@1, vpsrld 1@.5 / 1@.5, vfmadd 4@.5 / 4@.5.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/n16.h"
#include "cpu/simd/inline.h"
#include "cpu/simd/six_bits.h"

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
inline float sum_lanes(F v) {
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
alignas(64) constexpr SixBitBytes<kVecLanes> kSixBitBytes;
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

// FP8 codes, one in a lane.
inline I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
inline I or_i(I a, I b) { return _mm256_or_si256(a, b); }
inline I min_i(I a, I b) { return _mm256_min_epi32(a, b); }
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a)); }
inline I truncate_to_int(F v) { return _mm256_cvttps_epi32(v); }

// The low byte of every lane.
inline void store_u8(uint8_t* p, I v) {
  const I first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1,
                                   -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const I bytes = _mm256_shuffle_epi8(v, first);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}

// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
inline F load_e4m3_256th(const uint8_t* p) {
  const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(static_cast<int16_t>(0xBFFF))));
}

// Lane i is the largest lane of v[i]: pairs of vectors fold into one, their lanes side by side.
inline I max_of_each(const I* v) {
  I pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const I a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const I a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  return _mm256_max_epi32(_mm256_permute2x128_si256(fours[0], fours[1], 0x20),
                          _mm256_permute2x128_si256(fours[0], fours[1], 0x31));
}

// FP8 states of optimizers. vdivps and vsqrtps of 8 lanes: one in 5 and 8 cycles on Zen 4.
inline F square_root(F v) { return _mm256_sqrt_ps(v); }
inline I min_u(I a, I b) { return _mm256_min_epu32(a, b); }
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return _mm256_blendv_ps(other, v, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
}
inline F round_down(F v) { return _mm256_floor_ps(v); }
// To nearest even.
inline I round_to_int(F v) { return _mm256_cvtps_epi32(v); }
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F times_power_of_two(F v, F n) {
  const I exponent = round_to_int(_mm256_max_ps(n, set1(-126.0f)));
  return mul(v, as_float(shift_left<23>(add_i(exponent, set1_i(127)))));
}
inline uint32_t largest_lane(I v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1))));
}
inline uint32_t smallest_lane(I v) {
  __m128i m = _mm_min_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_min_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_min_epu32(m, _mm_shuffle_epi32(m, 0xB1))));
}

// Counts of bits: a nibble looks its count up with vpshufb (Mula, Kurz, Lemire, arXiv 1611.07612).
// Counts stay in bytes until they might overflow.
constexpr int kSignRows = 4;
constexpr int kSignVecs = 2;
constexpr int64_t kCountChunks = 31;  // 31 * 8 < 256

// Counts of each byte.
inline I add_popcounts(I sums, I bits) {
  const I counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const I nibble = _mm256_set1_epi8(15);
  const I low = _mm256_shuffle_epi8(counts, bit_and(bits, nibble));
  const I high = _mm256_shuffle_epi8(counts, bit_and(shift_right<4>(bits), nibble));
  return _mm256_add_epi8(sums, _mm256_add_epi8(low, high));
}
// The sum of the bytes of each dword.
inline I sum_popcounts(I sums) {
  const I pairs = _mm256_maddubs_epi16(sums, _mm256_set1_epi8(1));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_GE_OQ)));
}

// Bytes. vpmaddubsw saturates at 16 bits: two products of 255 and 127 do not fit, so bytes above 127
// are multiplied in two parts. vpmaddubsw, vpmaddwd: latency 3 to 5, two a cycle.
constexpr int kGemmRows = 4;
constexpr int kGemmVecs = 2;
constexpr int kSkinnyRows = 4;
constexpr int kSkinnyVecs = 2;

inline I set1_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
inline I load_i8_lanes(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Every lane of acc + the four products of unsigned bytes of w, below 128 unless kWide, and signed bytes of x.
template <bool kWide>
LOWBIT_INLINE inline I dot4(I acc, I w, I x) {
  const I ones = _mm256_set1_epi16(1);
  if constexpr (!kWide) {
    return add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));  // 2 * 127 * 128 < 2^15
  } else {
    // w = low + top with top 0 or 128: 2 * 128 * -128 = -2^15 still fits.
    const I top = bit_and(w, set1_bytes(-128)), low = bit_and(w, set1_bytes(127));
    acc = add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
    return add_i(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), ones));
  }
}

// Brings bits `first` .. `first` + width of each word to bit P of its low byte, and those at `second` to bit P of its
// high byte.
template <int P>
LOWBIT_INLINE inline I gather_bits(I v, int first, int second, int width) {
  const auto shifted = [&](int by) { return by >= 0 ? _mm256_srli_epi16(v, by) : _mm256_slli_epi16(v, -by); };
  const int field = ((1 << width) - 1) << P;
  return _mm256_or_si256(bit_and(shifted(first - P), _mm256_set1_epi16(static_cast<int16_t>(field))),
                         bit_and(shifted(second - 8 - P), _mm256_set1_epi16(static_cast<int16_t>(field << 8))));
}

// Looks up the low B bits of each byte.
template <int B>
struct ByteTable {
  static constexpr int kVecs = B <= 4 ? 1 : 1 << (B - 4);
  I t[kVecs];
  explicit ByteTable(const uint8_t* values) {
    for (int v = 0; v < kVecs; ++v) {
      alignas(32) uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) bytes[i] = values[(v * 16 + i % 16) & ((1 << B) - 1)];
      t[v] = load_i(bytes);
    }
  }
  LOWBIT_INLINE I operator()(I code) const {
    const I index = bit_and(code, set1_bytes(15));
    I r[kVecs];
    for (int v = 0; v < kVecs; ++v) r[v] = _mm256_shuffle_epi8(t[v], index);
    // A blend looks at the top bit of each byte.
    for (int bit = 4, width = kVecs / 2; width > 0; ++bit, width /= 2) {
      const I choose = _mm256_slli_epi16(code, 7 - bit);
      for (int i = 0; i < width; ++i) r[i] = _mm256_blendv_epi8(r[2 * i], r[2 * i + 1], choose);
    }
    return r[0];
  }
};

// Reorders the bytes of each chunk in place: byte i takes byte order[i].
inline void permute_chunks(int8_t* row, int64_t bytes, const uint8_t* order) {
  for (int64_t k = 0; k < bytes; k += kChunkK) {
    int8_t chunk[kChunkK];
    __builtin_memcpy(chunk, row + k, kChunkK);
    for (int i = 0; i < kChunkK; ++i) row[k + i] = chunk[order[i]];
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
