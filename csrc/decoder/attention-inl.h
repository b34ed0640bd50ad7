// Attention over a decoder's cache (decoder_ops.h): online softmax in fp32 over blocks of 64 positions, as in
// FlashAttention (Dao et al. 2022), for four queries at a time. Scores have positions in the lanes and results
// dimensions, so both are multiply-adds of a broadcast with a vector and no sum crosses lanes.
#pragma once

#include "cpu/fp8/fp8-inl.h"
#include "decoder/rows-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// How two neighbours along the sum meet their two weights. T: an element of the cache, Weight: what q and the
// probabilities are multiplied as.
template <Dtype kType, class Element>
struct Pairs {
  using T = Element;
  using Weight = float;
  struct Pair {
    F even, odd;
  };
  static constexpr int64_t kPerT = 1;  // neighbours in a T
  static constexpr bool kScaled = has_scales(kType);
  LOWBIT_INLINE static F load_one(const T* p) {
    if constexpr (kType == Dtype::kE4m3) {
      return load_e4m3_256th(p);
    } else {
      return load_as(p, kType, 0);
    }
  }
  LOWBIT_INLINE static Pair load_pair(const T* p, int64_t pair, int64_t stride) {
    return {load_one(p + 2 * pair * stride), load_one(p + (2 * pair + 1) * stride)};
  }
  LOWBIT_INLINE static Pair broadcast(const float* w) { return {set1(w[0]), set1(w[1])}; }
  LOWBIT_INLINE static F dot(F acc, Pair w, Pair v) { return fma(w.odd, v.odd, fma(w.even, v.even, acc)); }
  static const float* weights(const float* values, int64_t, float*) { return values; }
};

using PairsF32 = Pairs<Dtype::kF32, float>;
using PairsF16 = Pairs<Dtype::kF16, uint16_t>;
using PairsI8 = Pairs<Dtype::kI8, int8_t>;
using PairsE4m3 = Pairs<Dtype::kE4m3, uint8_t>;

struct PairsBf16 : PairsF32 {
  using T = uint32_t;
  static constexpr int64_t kPerT = 2;
  LOWBIT_INLINE static Pair load_pair(const uint32_t* p, int64_t pair, int64_t stride) {
    const I both = load_i(p + pair * stride);
    return {as_float(shift_left<16>(both)), as_float(bit_and(both, set1_i(static_cast<int32_t>(0xFFFF0000u))))};
  }
};

#ifdef __AVX512BF16__
// The probabilities are rounded to bf16, as a product of bf16 tensors has them; q is bf16 already.
struct PairsBf16Dot {
  using T = uint32_t;
  using Weight = uint16_t;
  using Pair = I;
  static constexpr int64_t kPerT = 2;
  static constexpr bool kScaled = false;
  LOWBIT_INLINE static I load_pair(const uint32_t* p, int64_t pair, int64_t stride) {
    return load_i(p + pair * stride);
  }
  LOWBIT_INLINE static I broadcast(const uint16_t* w) {
    int32_t pair;
    __builtin_memcpy(&pair, w, 4);
    return _mm512_set1_epi32(pair);
  }
  LOWBIT_INLINE static F dot(F acc, I w, I v) { return _mm512_dpbf16_ps(acc, (__m512bh)v, (__m512bh)w); }
  static const uint16_t* weights(const float* values, int64_t n, float* scratch) {
    uint16_t* out = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t i = 0; i < n; i += kVecLanes) store_bf16(out + i, load(values + i));
    return out;
  }
};
using PairsOfBf16 = PairsBf16Dot;
#else
using PairsOfBf16 = PairsBf16;
#endif

// acc[r][v] += the sum over pairs of weight r times vector v, which starts at base[v].
template <class P, int kRows, int kVecs>
LOWBIT_INLINE inline void multiply_pairs(const typename P::T* const (&base)[kVecs], int64_t stride, int64_t pairs,
                                         const typename P::Weight* w, int64_t w_stride, F (&acc)[kRows][kVecs]) {
  for (int64_t p = 0; p < pairs; ++p) {
    typename P::Pair kv[kVecs];
    unroll<kVecs>([&](auto v) LOWBIT_INLINE { kv[v] = P::load_pair(base[v], p, stride); });
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      const auto x = P::broadcast(w + r * w_stride + 2 * p);
      unroll<kVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = P::dot(acc[r][v], x, kv[v]); });
    });
  }
}

// One tile: rows [r0, r0 + kRows) and the positions [b0, b0 + kKeyBlock), those below the rows' limits.
template <class P, int kRows>
void attend_tile(const Attend& a, const typename P::Weight* q, int64_t r0, int64_t b0) {
  using T = typename P::T;
  const HeadCache& c = a.cache;
  alignas(64) float p[kRows][kKeyBlock];
  constexpr int kSpan = kTileVecs * kVecLanes;
  for (int64_t at = 0; at < kKeyBlock; at += kSpan) {
    const T* base[kTileVecs];
    F acc[kRows][kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t position = b0 + at + v * kVecLanes;
      base[v] = static_cast<const T*>(c.keys) + position / 16 * (c.dim / P::kPerT) * 16 + position % 16;
      for (int r = 0; r < kRows; ++r) acc[r][v] = zero();
    }
    const typename P::Weight* queries = q + r0 * c.padded_dim;
    if constexpr (P::kScaled) {
      const int64_t group = key_group(c.dtype, c.dim);
      for (int64_t d = 0; d < c.dim; d += group) {
        const int64_t dims = c.dim - d < group ? c.dim - d : group;
        const float* scales = c.key_scales + d / group * c.length + b0 + at;
        F part[kRows][kTileVecs];
        for (auto& row : part) {
          for (F& v : row) v = zero();
        }
        multiply_pairs<P, kRows, kTileVecs>(base, 16, dims / 2, queries + d, c.padded_dim, part);
        for (int v = 0; v < kTileVecs; ++v) {
          base[v] += dims * 16;
          for (int r = 0; r < kRows; ++r) acc[r][v] = fma(part[r][v], load(scales + v * kVecLanes), acc[r][v]);
        }
      }
    } else {
      multiply_pairs<P, kRows, kTileVecs>(base, 16, c.dim / 2, queries, c.padded_dim, acc);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVecs; ++v) store(p[r] + at + v * kVecLanes, acc[r][v]);
    }
  }
  int64_t unseen = kKeyBlock, seen = 0;  // the first position of the block that some row sees, and behind the last
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = r0 + r, limit = a.first_limit + row / a.group;
    int64_t count = (limit < a.end ? limit : a.end) - b0, first = limit - a.window - b0;
    count = count < 0 ? 0 : count < kKeyBlock ? count : kKeyBlock;
    first = first < 0 ? 0 : first;
    if (first >= count) {
      for (float& v : p[r]) v = 0.0f;
      continue;
    }
    seen = count > seen ? count : seen;
    unseen = first < unseen ? first : unseen;
    const auto fill_unseen = [&](float value) {
      for (int64_t i = 0; i < first; ++i) p[r][i] = value;
      for (int64_t i = count; i < kKeyBlock; ++i) p[r][i] = value;
    };
    fill_unseen(-__builtin_inff());
    F most = set1(a.max[row]);
    for (int i = 0; i < kKeyBlock; i += kVecLanes) {
      F scaled = mul(load(p[r] + i), set1(a.scale));
      if (a.cap != 0.0f) scaled = mul(tanh(div(scaled, set1(a.cap))), set1(a.cap));
      store(p[r] + i, scaled);
      most = max_or_nan(most, scaled);
    }
    const float new_max = max_lane(most), rescale = exp(a.max[row] - new_max);
    F total = zero();
    for (int i = 0; i < kKeyBlock; i += kVecLanes) store(p[r] + i, exp(sub(load(p[r] + i), set1(new_max))));
    fill_unseen(0.0f);
    for (int i = 0; i < kKeyBlock; i += kVecLanes) total = add(total, load(p[r] + i));
    a.sum[row] = a.sum[row] * rescale + sum(total);
    if (a.max[row] != new_max) {
      float* acc = a.acc + row * c.padded_dim;
      for (int64_t i = 0; i < c.padded_dim; i += kVecLanes) store(acc + i, mul(load(acc + i), set1(rescale)));
      a.max[row] = new_max;
    }
    if constexpr (P::kScaled) {
      for (int i = 0; i < kKeyBlock; i += kVecLanes) {
        store(p[r] + i, mul(load(p[r] + i), load(c.value_scales + b0 + i)));
      }
    }
  }
  alignas(64) float scratch[kRows * kKeyBlock];
  const typename P::Weight* w = P::weights(&p[0][0], kRows * kKeyBlock, scratch);
  const int64_t pair = unseen / 2;
  const T* values = static_cast<const T*>(c.values) + (b0 + 2 * pair) / P::kPerT * c.padded_dim;
  const auto columns = [&](auto vecs, int64_t at) LOWBIT_INLINE {
    constexpr int kVecs = decltype(vecs)::value;
    const T* base[kVecs];
    F acc[kRows][kVecs];
    float* out = a.acc + r0 * c.padded_dim + at;
    for (int v = 0; v < kVecs; ++v) {
      base[v] = values + at + v * kVecLanes;
      for (int r = 0; r < kRows; ++r) acc[r][v] = load(out + r * c.padded_dim + v * kVecLanes);
    }
    multiply_pairs<P, kRows, kVecs>(base, c.padded_dim, (seen + 1) / 2 - pair, w + 2 * pair, kKeyBlock, acc);
    for (int v = 0; v < kVecs; ++v) {
      for (int r = 0; r < kRows; ++r) store(out + r * c.padded_dim + v * kVecLanes, acc[r][v]);
    }
  };
  int64_t at = 0;
  for (; at + kSpan <= c.padded_dim; at += kSpan) columns(std::integral_constant<int, kTileVecs>{}, at);
  for (; at < c.padded_dim; at += kVecLanes) columns(std::integral_constant<int, 1>{}, at);
}

template <class P>
void attend_with(const Attend& a) {
  const int64_t size = a.rows * a.cache.padded_dim;
  for (int64_t i = 0; i < size; i += kVecLanes) store(a.acc + i, zero());
  for (int64_t r = 0; r < a.rows; ++r) {
    a.max[r] = -__builtin_inff();
    a.sum[r] = 0.0f;
  }
  const typename P::Weight* q = P::weights(a.q, size, a.scratch);
  for (int64_t b0 = a.begin; b0 < a.end; b0 += kKeyBlock) {
    for (int64_t r = 0; r < a.rows; r += 4) {
      const int64_t left = a.rows - r, last = r + (left < 4 ? left : 4) - 1;
      if (a.first_limit + last / a.group <= b0 || a.first_limit + r / a.group - a.window >= b0 + kKeyBlock) continue;
      if (left >= 4) {
        attend_tile<P, 4>(a, q, r, b0);
      } else if (left == 3) {
        attend_tile<P, 3>(a, q, r, b0);
      } else if (left == 2) {
        attend_tile<P, 2>(a, q, r, b0);
      } else {
        attend_tile<P, 1>(a, q, r, b0);
      }
    }
  }
}

void attend(const Attend& a) {
  switch (a.cache.dtype) {
    case Dtype::kF32:
      return attend_with<PairsF32>(a);
    case Dtype::kF16:
      return attend_with<PairsF16>(a);
    case Dtype::kI8:
      return attend_with<PairsI8>(a);
    case Dtype::kE4m3:
      return attend_with<PairsE4m3>(a);
    default:
      return a.q_dtype == Dtype::kBf16 ? attend_with<PairsOfBf16>(a) : attend_with<PairsBf16>(a);
  }
}

void finish(const Partial* parts, int count, int64_t n, Dtype dtype, void* out) {
  float most = -__builtin_inff(), total = 0.0f;
  for (int i = 0; i < count; ++i) most = parts[i].max > most ? parts[i].max : most;
  for (int i = 0; i < count; ++i) total += parts[i].sum * exp(parts[i].max - most);
  for (int64_t at = 0; at < n; at += kVecLanes) {
    F y = zero();
    for (int i = 0; i < count; ++i) y = fma(set1(exp(parts[i].max - most)), load(parts[i].acc + at), y);
    alignas(64) float values[kVecLanes];
    store(values, div(y, set1(total)));
    store_as(out, dtype, at, values, n - at < kVecLanes ? n - at : kVecLanes);
  }
}

// absmax of x (n), zero up to whole vectors. NaN or infinity in x makes it NaN.
float largest_of(const float* x, int64_t n) {
  F most = zero(), poison = zero();
  for (int64_t i = 0; i < n; i += kVecLanes) {
    const F v = load(x + i);
    most = max_or_nan(most, max_or_nan(v, sub(zero(), v)));
    poison = fma(v, zero(), poison);
  }
  return max_lane(most) + sum(poison);
}

// x (n), zero up to whole vectors, in a cache's dtype; what its codes are to be multiplied by if that has scales.
float narrow(Dtype dtype, const float* x, int64_t n, char* out) {
  if (dtype == Dtype::kE4m3) {
    const float scale = largest_of(x, n) / Fp8<Float8::kE4m3>::kMax;
    const F divisor = set1(scale == 0.0f ? 1.0f : scale);
    for (int64_t i = 0; i < n; i += kVecLanes) {
      const F v = div(load(x + i), divisor);
      store_u8(reinterpret_cast<uint8_t*>(out) + i, encode<Float8::kE4m3>(v, Fp8<Float8::kE4m3>::kMaxCode, true));
    }
    return scale * 256.0f;
  }
  const float scale = dtype == Dtype::kI8 ? largest_of(x, n) / 127.0f : 1.0f;
  for (int64_t i = 0; i < n; i += kVecLanes) {
    const F v = load(x + i);
    store_vector(out + i * size_of(dtype), dtype, dtype == Dtype::kI8 ? div(v, set1(scale)) : v);
  }
  return scale;
}

template <class T>
void store_position_as(const HeadCache& c, int64_t position, bool last, const char* key, const char* value) {
  const int64_t per = c.dtype == Dtype::kBf16 ? 2 : 1;  // neighbours beside each other
  T* keys = static_cast<T*>(c.keys) + position / 16 * c.dim * 16 + position % 16 * per;
  for (int64_t d = 0; d < c.dim; ++d) {
    __builtin_memcpy(keys + (d / per * 16 * per + d % per), key + d * sizeof(T), sizeof(T));
  }
  T* values = static_cast<T*>(c.values) + position / per * c.padded_dim * per + position % per;
  const bool clears = last && position % 2 == 0;
  T* next = values + (per == 2 ? 1 : c.padded_dim);
  for (int64_t d = 0; d < c.dim; ++d) {
    __builtin_memcpy(values + d * per, value + d * sizeof(T), sizeof(T));
    if (clears) next[d * per] = 0;
  }
}

void store_position(const HeadCache& c, int64_t position, bool last, const float* key, Dtype dtype, const void* value,
                    float* scratch) {
  char* narrowed = reinterpret_cast<char*>(scratch + c.padded_dim);
  char* narrowed_value = narrowed + c.padded_dim * 2;
  if (c.dtype == Dtype::kF32) {
    widen(dtype, value, c.dim, scratch);
    return store_position_as<uint32_t>(c, position, last, reinterpret_cast<const char*>(key),
                                       reinterpret_cast<const char*>(scratch));
  }
  widen(dtype, value, c.dim, scratch);
  const float value_scale = narrow(c.dtype, scratch, c.dim, narrowed_value);
  if (!has_scales(c.dtype)) {
    narrow(c.dtype, key, c.dim, narrowed);
    return store_position_as<uint16_t>(c, position, last, narrowed, narrowed_value);
  }
  const int64_t group = key_group(c.dtype, c.dim);
  for (int64_t d = 0; d < c.dim; d += group) {
    const int64_t dims = c.dim - d < group ? c.dim - d : group;
    c.key_scales[d / group * c.length + position] = narrow(c.dtype, key + d, dims, narrowed + d);
  }
  store_position_as<uint8_t>(c, position, last, narrowed, narrowed_value);
  c.value_scales[position] = value_scale;
  if (last && position % 2 == 0) c.value_scales[position + 1] = 0.0f;
}

const DecoderOps kDecoderOps = {add_norm, ready, store_position, attend, finish,
                                gate_mul, scale, cap_logits,     dense,  argmax};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit

#define LOWBIT_EXPORT_DECODER_OPS                                                               \
  namespace lowbit {                                                                            \
  const DecoderOps* LOWBIT_CAT(decoder_ops_, LOWBIT_ISA)() { return &LOWBIT_ISA::kDecoderOps; } \
  }
