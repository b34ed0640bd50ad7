// fp16 activations with AVX-512 BF16, for tables that are exact in bf16: an fp16 number, 11 bits of mantissa, is the
// sum of two bf16 numbers of 8 and 3 bits, so two vdpbf16ps make the products exactly. The exponents of fp16, subnormal
// numbers too, lie well within those of bf16.
// A pair of weights takes 4 instructions for one row of x, where widening to fp32 takes 6: the table is looked up once
// for two weights.
#pragma once

#include "cpu/weights/bf16-inl.h"

#define LOWBIT_KERNELS(B) \
  gemv_f16<B>(LOWBIT_NAME("gemv", "f16", "lut" #B)), gemm_f16<B>(LOWBIT_NAME("gemm", "f16", "lut" #B)),

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kHalfTerms = 2;

// 32 elements of x: [pair][term][2].
inline void split_chunk(const uint16_t* x, uint16_t* out) {
  __m512i terms[kHalfTerms];
  __m256i words[kHalfTerms][2];
  unroll<2>([&](auto half) LOWBIT_INLINE {
    const F v = load_f16(x + half * kUnitLanes);
    // The upper 16 bits: of an infinity or a NaN they are all of it, and the rest must not be a NaN.
    const F high = as_float(bit_and(bits_of(v), set1_i(static_cast<int32_t>(0xFFFF0000))));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(v), set1(65504.0f), _CMP_LE_OQ);
    const F low = _mm512_maskz_sub_ps(finite, v, high);
    words[0][half] = _mm512_cvtepi32_epi16(shift_right<16>(bits_of(high)));
    words[1][half] = _mm512_cvtepi32_epi16(shift_right<16>(bits_of(low)));
  });
  unroll<kHalfTerms>([&](auto t) LOWBIT_INLINE {
    terms[t] = _mm512_inserti64x4(_mm512_castsi256_si512(words[t][0]), words[t][1], 1);
  });
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store_i(out, _mm512_permutex2var_epi32(terms[0], first, terms[1]));
  const __m512i second = add_i(first, set1_i(8));
  store_i(out + kChunkK, _mm512_permutex2var_epi32(terms[0], second, terms[1]));
}

// Splits row m of x; chunk c goes to out + c * stride. Zero beyond k.
inline void split_row(const Launch& l, int64_t m, uint16_t* out, int64_t stride) {
  const int64_t chunks = num_chunks(l.k);
  const uint16_t* x = static_cast<const uint16_t*>(l.x) + m * l.x_stride;
  alignas(64) uint16_t last[kChunkK] = {};
  __builtin_memcpy(last, x + (chunks - 1) * kChunkK, (l.k - (chunks - 1) * kChunkK) * 2);
  for (int64_t c = 0; c < chunks; ++c) split_chunk(c + 1 < chunks ? x + c * kChunkK : last, out + c * stride);
}

inline void prepare_f16(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * l.prepared_stride;
    split_row(l, m, out, kChunkK * kHalfTerms);
    if (l.x_sums) sum_groups<Dtype::kBf16, kHalfTerms>(l, out, l.x_sums + m * l.num_groups);
  }
}

// As the panels meet them: [k / 32][row][pair][term][2].
inline void prepare_f16_chunks(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * kChunkK * kHalfTerms;
    split_row(l, m, out, l.m * kChunkK * kHalfTerms);
    if (l.x_sums) sum_chunks<kHalfTerms>(l, m, out, l.m * kChunkK * kHalfTerms);
  }
}

constexpr Kernel half_kernel(Kernel kernel) {
  kernel.exact_x = {.f16 = true};
  kernel.terms = kHalfTerms;
  kernel.bf16_table = true;
  return kernel;
}
template <int B>
constexpr Kernel gemv_f16(const char* name) {
  Kernel kernel = half_kernel(gemv_bf16<B>(name));
  kernel.prepare = prepare_f16;
  kernel.run = gemv_words_run<B, kHalfTerms>;
  return kernel;
}
template <int B>
constexpr Kernel gemm_f16(const char* name) {
  Kernel kernel = half_kernel(gemm_bf16<B>(name));
  kernel.prepare = prepare_f16_chunks;
  kernel.run = gemm_words_run<WordLut<B>, kHalfTerms>;
  return kernel;
}

constexpr Kernel kF16Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_KERNELS)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
