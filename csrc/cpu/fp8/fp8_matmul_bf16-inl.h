// FP8 decoded to bf16, which holds every value of both types, and multiplied by vdpbf16ps. Decoding 64 codes takes two
// vpermi2b, one vpternlogd and two more for the order of words: bf16 subnormals would be read as zero, so no shift of
// the bits will do. Zen 4: a shuffle a cycle, vdpbf16ps one a cycle with latency 6.
//
// With K in the lanes, words of 64 values stand in the order that vpunpck[lh]bw gives them, in a as in b.
#pragma once

#include "cpu/fp8/fp8_matmul-inl.h"
#include "cpu/weights/symmetric-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// vpunpcklbw takes bytes 16 i .. 16 i + 7 and vpunpckhbw those after them: with its bytes in this order the first gives
// values 0 .. 31 and the second 32 .. 63.
struct ChunkOrder {
  alignas(64) uint8_t of[64] = {};
  constexpr ChunkOrder() {
    for (int i = 0; i < 32; ++i) {
      of[i / 8 * 16 + i % 8] = static_cast<uint8_t>(i);
      of[i / 8 * 16 + 8 + i % 8] = static_cast<uint8_t>(32 + i);
    }
  }
};
constexpr ChunkOrder kChunkOrder;

struct Fp8Bf16 {
  using Element = uint16_t;
  using Pairs = __m512i;
  static constexpr int kStep = 64;
  static constexpr int kChains = 1;
  static constexpr bool kShortTiles = false;
  LOWBIT_INLINE static void fetch(const uint8_t*) {}
  static constexpr int kPair = 2;
  static constexpr int kVecs = 4;
  static constexpr int kRows = 6;
  static constexpr int kColumns = kVecs * kVecLanes;
  SymmetricTable table;
  explicit Fp8Bf16(Float8 type) : table(Values(type).of) {}
  template <class Fn>
  static void with(Float8 type, const Fn& fn) {
    fn(Fp8Bf16(type));
  }

  struct Values {
    float of[128];
    explicit Values(Float8 type) {
      for (int i = 0; i < 128; i += kVecLanes) {
        const I code = add_i(load_i(kLanes), set1_i(i));
        store(of + i, type == Float8::kE4m3 ? LOWBIT_ISA::decode<Float8::kE4m3>(code)
                                            : LOWBIT_ISA::decode<Float8::kE5m2>(code));
      }
    }
  };

  struct Words {
    __m512i low, high;
  };
  LOWBIT_INLINE Words words(__m512i codes) const {
    const __m512i l = table.low_bytes(codes), h = table.high_bytes(codes);
    return {_mm512_unpacklo_epi8(l, h), _mm512_unpackhi_epi8(l, h)};
  }
  LOWBIT_INLINE Words decode(const uint8_t* codes) const { return words(load_i(codes)); }
  LOWBIT_INLINE static F dot_columns(F acc, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
  }
  template <int>
  LOWBIT_INLINE static void dot(F* acc, const uint16_t* x, Words w) {
    *acc = dot_columns(*acc, load_i(x), w.low);
    *acc = dot_columns(*acc, load_i(x + 32), w.high);
  }
  // Lanes 4 i .. 4 i + 3 of a sum hold products of values 16 i .. 16 i + 15.
  LOWBIT_INLINE F scales(const Fp8Scales& s, int64_t row, int64_t k, int64_t k_size) const {
    if (s.k_shift >= 6) return set1(scale_of(s, row, k));
    const int64_t group = k >> s.k_shift, left = ((k_size - 1) >> s.k_shift) - group + 1;
    const __m128i four = load_scales(s, (row >> s.row_shift) * s.stride + group, left);
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i index = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(s.k_shift - 4));
    return as_float(_mm512_permutexvar_epi32(index, _mm512_castsi128_si512(four)));
  }
  // Bits in fp32 of the scales of 64 values from number i on, of which `left` are there.
  LOWBIT_INLINE static __m128i load_scales(const Fp8Scales& s, int64_t i, int64_t left) {
    const __mmask8 mask = left >= 4 ? 15 : static_cast<__mmask8>((1 << left) - 1);
    if (s.type == ScaleType::kF32) return _mm_maskz_loadu_epi32(mask, static_cast<const float*>(s.values) + i);
    if (s.type == ScaleType::kBf16) {
      const __m128i words = _mm_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(s.values) + i);
      return _mm_slli_epi32(_mm_cvtepu16_epi32(words), 16);
    }
    // Groups of 32, so two. 0 is 2^-127, a subnormal, and 255 is NaN.
    const uint8_t* at = static_cast<const uint8_t*>(s.values) + i;
    const __m128i codes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(left >= 2 ? at[0] | at[1] << 8 : at[0]));
    const __mmask8 ends =
        _mm_cmpeq_epi32_mask(codes, _mm_setzero_si128()) | _mm_cmpeq_epi32_mask(codes, _mm_set1_epi32(255));
    const __m128i bits = _mm_slli_epi32(codes, 23);
    return _mm_mask_or_epi32(bits, ends, bits, _mm_set1_epi32(1 << 22));
  }

  LOWBIT_INLINE static __m512i load_pairs(const uint16_t* p) { return load_i(p); }
  LOWBIT_INLINE static __m512i broadcast(const uint16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
  }

  // 64 codes of row i of a panel, zero where `left` of them or `rows` rows do not reach.
  LOWBIT_INLINE static __m512i load_codes(const uint8_t* p, int64_t i, int64_t rows, int64_t left) {
    if (i >= rows || left <= 0) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi8(left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1, p);
  }

  // panel[pair][column][2], zero beyond n and k.
  void decode_panel(const Fp8Matmul& q, int64_t n0, int64_t k0, int64_t k_size, uint16_t* panel) const {
    for (int64_t k = 0; k < k_size; k += 64) {
      const int64_t left = q.out.k - k0 - k, count = k_size - k < 64 ? k_size - k : 64;
      for (int v = 0; v < kVecs; ++v) {
        const int64_t n = n0 + v * kVecLanes;
        const uint8_t* codes = q.b.codes + n * q.b.stride + k0 + k;
        __m512i row[16];
        if (n + 16 <= q.out.n && left >= 64) {
          unroll<16>([&](auto i) LOWBIT_INLINE { row[i] = load_i(codes + i * q.b.stride); });
        } else {
          for (int64_t i = 0; i < 16; ++i) row[i] = load_codes(codes + i * q.b.stride, i, q.out.n - n, left);
        }
        decode_columns(row, count, panel + k * kColumns + v * 2 * kVecLanes);
      }
    }
  }

  // Transposes `count` (32 or 64) codes of 16 rows and decodes them. In each 128-bit part words of four rows are
  // brought together, a pair of k in the lower and the next pair in the upper half; then parts of all rows.
  LOWBIT_INLINE void decode_columns(const __m512i* row, int64_t count, uint16_t* panel) const {
    __m512i parts[4][4];
    unroll<4>([&](auto i) LOWBIT_INLINE {
      const __m512i* r = row + 4 * i;
      const __m512i low02 = _mm512_unpacklo_epi16(r[0], r[2]), low13 = _mm512_unpacklo_epi16(r[1], r[3]);
      const __m512i high02 = _mm512_unpackhi_epi16(r[0], r[2]), high13 = _mm512_unpackhi_epi16(r[1], r[3]);
      parts[0][i] = _mm512_unpacklo_epi16(low02, low13);
      parts[1][i] = _mm512_unpackhi_epi16(low02, low13);
      parts[2][i] = _mm512_unpacklo_epi16(high02, high13);
      parts[3][i] = _mm512_unpackhi_epi16(high02, high13);
    });
    const auto put = [&](int k, __m512i c) LOWBIT_INLINE {
      if (k >= count) return;
      const Words w = words(c);
      _mm512_store_si512(panel + k * kColumns, w.low);
      _mm512_store_si512(panel + (k + 2) * kColumns, w.high);
    };
    unroll<4>([&](auto t) LOWBIT_INLINE {
      const __m512i even0 = _mm512_shuffle_i32x4(parts[t][0], parts[t][1], 0x88);
      const __m512i odd0 = _mm512_shuffle_i32x4(parts[t][0], parts[t][1], 0xDD);
      const __m512i even1 = _mm512_shuffle_i32x4(parts[t][2], parts[t][3], 0x88);
      const __m512i odd1 = _mm512_shuffle_i32x4(parts[t][2], parts[t][3], 0xDD);
      put(4 * t, _mm512_shuffle_i32x4(even0, even1, 0x88));
      put(16 + 4 * t, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
      put(32 + 4 * t, _mm512_shuffle_i32x4(even0, even1, 0xDD));
      put(48 + 4 * t, _mm512_shuffle_i32x4(odd0, odd1, 0xDD));
    });
  }

  void prepare_lanes(const Fp8Matmul&, const uint8_t* codes, uint16_t* out) const {
    const Words w = decode(codes);
    _mm512_storeu_si512(out, w.low);
    _mm512_storeu_si512(out + 32, w.high);
  }
  void prepare_chunks(const uint8_t* codes, uint16_t* first, uint16_t* second) const {
    const Words w = words(_mm512_permutexvar_epi8(load_i(kChunkOrder.of), load_i(codes)));
    _mm512_storeu_si512(first, w.low);
    _mm512_storeu_si512(second, w.high);
  }
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
