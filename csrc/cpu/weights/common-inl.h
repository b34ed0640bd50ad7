// What every family of kernels shares: scales, zeros, preparing x, and storing results.
#pragma once

#include "cpu/weights/activation-inl.h"
#include "cpu/weights/codecs-inl.h"

// A kernel's name in the kernel table.
#define LOWBIT_STR_(x) #x
#define LOWBIT_STR(x) LOWBIT_STR_(x)
#define LOWBIT_NAME(op, act, codec) op "_" act "_" codec "_n16_" LOWBIT_STR(LOWBIT_ISA)
#define LOWBIT_FOREACH_BITS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(8)
#define LOWBIT_FOREACH_PAIR_BITS(X) X(2) X(3) X(4)

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

inline F load_as(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kF32:
      return load(static_cast<const float*>(p) + i);
    case Dtype::kBf16:
      return load_bf16(static_cast<const uint16_t*>(p) + i);
    case Dtype::kF16:
      return load_f16(static_cast<const uint16_t*>(p) + i);
    case Dtype::kI8:
      return load_i8(static_cast<const int8_t*>(p) + i);
    default:
      __builtin_unreachable();
  }
}

constexpr int size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kI8 ? 1 : 2; }

// The first `count` (at most kVecLanes) values at p; the rest is zero. Reads nothing beyond them.
inline F load_tail(const void* p, Dtype dtype, int64_t i, int64_t count) {
  alignas(64) char bytes[kVecLanes * 4] = {};
  const int size = size_of(dtype);
  __builtin_memcpy(bytes, static_cast<const char*>(p) + i * size, count * size);
  return load_as(bytes, dtype, 0);
}

inline void store_vector(void* p, Dtype dtype, F v) {
  if (dtype == Dtype::kF32) {
    store(static_cast<float*>(p), v);
  } else if (dtype == Dtype::kBf16) {
    store_bf16(static_cast<uint16_t*>(p), v);
  } else if (dtype == Dtype::kI8) {
    store_i8(static_cast<int8_t*>(p), v);
  } else {
    store_f16(static_cast<uint16_t*>(p), v);
  }
}

// Converts `count` fp32 values to `dtype` at element i of p; values must have room for whole vectors.
inline void store_as(void* p, Dtype dtype, int64_t i, const float* values, int64_t count) {
  const int size = size_of(dtype);
  char* to = static_cast<char*>(p) + i * size;
  for (int64_t j = 0; j < count; j += kVecLanes) {
    if (count - j >= kVecLanes) {
      store_vector(to + j * size, dtype, load(values + j));
    } else {
      alignas(64) char bytes[kVecLanes * 4];
      store_vector(bytes, dtype, load(values + j));
      __builtin_memcpy(to + j * size, bytes, (count - j) * size);
    }
  }
}

// 2^(byte - 127): the byte is an exponent, but 0 is subnormal, and 255 is NaN.
inline F from_e8m0(I byte) {
  const I ends = shift_right<31>(add_i(bit_and(add_i(byte, set1_i(1)), set1_i(255)), set1_i(-2)));
  return as_float(add_i(shift_left<23>(byte), shift_left<22>(ends)));
}
// The exponent and the mantissa lie as those of an fp32 that is 2^120 times smaller; 127 and 255 are NaN.
inline F from_e4m3(I byte) {
  const I magnitude = bit_and(byte, set1_i(127)), sign = bit_and(byte, set1_i(128));
  const I number = add_i(shift_right<7>(add_i(magnitude, set1_i(1))), set1_i(-1));
  const I bits = add_i(shift_left<20>(magnitude), shift_left<24>(sign));
  return mul(as_float(select_bits(number, bits, set1_i(0x7FC00000))), set1(0x1p120f));
}

// Scales and zeros that have a second level, before it.
LOWBIT_INLINE inline F first_level(const void* terms, Dtype dtype, int64_t i) {
  const uint8_t* bytes = static_cast<const uint8_t*>(terms);
  const uint64_t at = static_cast<uint64_t>(i);  // unsigned: divisions are shifts
  if (dtype == Dtype::kI8) return load_i8(static_cast<const int8_t*>(terms) + i);
  if (dtype == Dtype::kI7) {
    const F table = to_float(bit_and(load_u8_lanes(bytes + i), set1_i(1)));
    return mul(sub(load_i8(static_cast<const int8_t*>(terms) + i), table), set1(0.5f));  // exact
  }
  if (dtype == Dtype::kU4) return to_float(load_packed<4, false>(bytes, at));
  if (dtype == Dtype::kU6) return to_float(load_packed<6, false>(bytes, at));
  if (dtype == Dtype::kI6) return to_float(load_packed<6, true>(bytes, at));
  return dtype == Dtype::kE4m3 ? from_e4m3(load_u8_lanes(bytes + i)) : load_as(terms, dtype, i);
}

alignas(64) constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// Scale and zero of kVecLanes columns of one group.
struct GroupTerms {
  F scale, zero;
};

// Terms with a second level, which they are multiplied by; the zero only if it is wanted.
template <bool kZero>
LOWBIT_INLINE inline GroupTerms two_levels(const Launch& l, int64_t block, int64_t group, int lane) {
  const int64_t i = (block * l.num_groups + group) * kBlockN + lane;
  GroupTerms t{zero(), zero()};
  t.scale = first_level(l.scales, l.scale_dtype, i);
  if constexpr (kZero) t.zero = first_level(l.zeros, l.zero_dtype, i);
  if (l.num_supers == 0) {
    t.scale = mul(t.scale, set1(*static_cast<const float*>(l.scales2)));
    if constexpr (kZero) t.zero = mul(t.zero, set1(*static_cast<const float*>(l.zeros2)));
    return t;
  }
  const int64_t super = static_cast<uint32_t>(group) / static_cast<uint32_t>(l.super_groups);
  const int64_t second = (block * l.num_supers + super) * kBlockN + lane;
  t.scale = mul(t.scale, load_as(l.scales2, l.second_dtype, second));
  if constexpr (kZero) t.zero = mul(t.zero, load_as(l.zeros2, l.second_dtype, second));
  return t;
}
// Scales of kDq8. n * num_groups is an int32.
LOWBIT_INLINE inline F double_quantized(const Launch& l, int64_t block, int64_t group, int lane) {
  const uint8_t* codes = static_cast<const uint8_t*>(l.scales) + (block * l.num_groups + group) * kBlockN + lane;
  const float* factors = static_cast<const float*>(l.scales2);
  // Columns beyond n have the factor of the last one.
  const I column = add_i(set1_i(static_cast<int32_t>(block * kBlockN + lane)), load_i(kLaneNumbers));
  const I row = min_i(column, set1_i(static_cast<int32_t>(l.n - 1)));
  const I first = mul_i(row, set1_i(static_cast<int32_t>(l.num_groups)));
  const I factor = shift_right<kFactorBits>(add_i(first, set1_i(static_cast<int32_t>(group))));
  const F scale = mul(load_indexed(l.scale_map, load_u8_lanes(codes)), load_indexed(factors, factor));
  return add(scale, set1(factors[l.num_supers]));
}
// Functions of their own: calls without such terms pay one test.
__attribute__((noinline)) F two_level_scale(const Launch& l, int64_t block, int64_t group, int lane) {
  if (l.scale_dtype == Dtype::kDq8) return double_quantized(l, block, group, lane);
  return two_levels<false>(l, block, group, lane).scale;
}
__attribute__((noinline)) GroupTerms two_level_terms(const Launch& l, int64_t block, int64_t group, int lane) {
  return two_levels<true>(l, block, group, lane);
}

// Whether scales and zeros are numbers of one level, and no codes.
inline bool plain_terms(const Launch& l) {
  const Dtype d = l.scale_dtype;
  return !l.scales2 && !l.zeros2 && (!l.scales || d == Dtype::kF32 || d == Dtype::kBf16 || d == Dtype::kF16);
}

LOWBIT_INLINE inline F group_scale(const Launch& l, int64_t block, int64_t group, int lane) {
  if (!l.scales) return set1(1.0f);
  if (l.scales2) return two_level_scale(l, block, group, lane);
  const int64_t i = (block * l.num_groups + group) * kBlockN + lane;
  if (l.scale_dtype == Dtype::kE8m0) return from_e8m0(load_u8_lanes(static_cast<const uint8_t*>(l.scales) + i));
  return load_as(l.scales, l.scale_dtype, i);
}
LOWBIT_INLINE inline GroupTerms group_terms(const Launch& l, int64_t block, int64_t group, int lane) {
  if (l.zeros2) return two_level_terms(l, block, group, lane);
  const int64_t i = (block * l.num_groups + group) * kBlockN + lane;
  return {group_scale(l, block, group, lane), l.zero != ZeroMode::kNone ? load_as(l.zeros, l.zero_dtype, i) : zero()};
}

// y + scale * (acc - zero * x_sum), or y + (scale * acc + zero * x_sum). With one x equal to 1 and the rest 0 this is
// the dequantized weight, rounded as the reference rounds it.
template <ZeroMode kZero>
inline F finish_group(GroupTerms t, F y, F acc, float x_sum) {
  if constexpr (kZero == ZeroMode::kNone) return fma(t.scale, acc, y);
  if constexpr (kZero == ZeroMode::kSubtract) return fma(t.scale, sub(acc, mul(t.zero, set1(x_sum))), y);
  return add(add(mul(t.scale, acc), mul(t.zero, set1(x_sum))), y);
}
inline F finish_group(const Launch& l, GroupTerms t, F y, F acc, float x_sum) {
  if (l.zero == ZeroMode::kNone) return finish_group<ZeroMode::kNone>(t, y, acc, x_sum);
  if (l.zero == ZeroMode::kSubtract) return finish_group<ZeroMode::kSubtract>(t, y, acc, x_sum);
  return finish_group<ZeroMode::kAdd>(t, y, acc, x_sum);
}

// A function of its own: calls without an epilogue pay one test.
__attribute__((noinline)) void apply_epilogue(const Launch& l, int64_t row, int64_t n0, int64_t count, float* y) {
  const Epilogue& e = *l.epilogue;
  alignas(64) float gate[kBlockN];
  if (e.gate) {
    for (int64_t j = 0; j < count; j += kVecLanes) {
      const int64_t left = count - j < kVecLanes ? count - j : kVecLanes;
      store(gate + j, load_tail(e.gate, e.dtype, row * e.gate_stride + n0 + j, left));
    }
  }
  activate(e.activation, e.gate ? gate : y, count);
  for (int64_t j = 0; j < count; j += kVecLanes) {
    const int64_t left = count - j < kVecLanes ? count - j : kVecLanes;
    F v = load(y + j);
    if (e.gate) v = mul(load(gate + j), v);
    if (e.residual) v = add(v, load_tail(e.residual, e.dtype, row * e.residual_stride + n0 + j, left));
    store(y + j, v);
  }
}

// Adds the bias to `count` columns of one row of y, from column n0, applies the epilogue, and stores those below n;
// int8 results are scaled first. `y` holds whole vectors.
inline void store_columns(const Launch& l, int64_t row, int64_t n0, int64_t count, float* y) {
  if (l.n - n0 < count) count = l.n - n0;
  if (l.bias) {
    for (int64_t j = 0; j < count; j += kVecLanes) {
      const int64_t left = count - j < kVecLanes ? count - j : kVecLanes;
      store(y + j, add(load(y + j), load_tail(l.bias, l.bias_dtype, n0 + j, left)));
    }
  }
  if (l.epilogue) apply_epilogue(l, row, n0, count, y);
  if (l.out_dtype == Dtype::kI8) {
    for (int64_t j = 0; j < count; j += kVecLanes) store(y + j, mul(load(y + j), set1(l.out_inverse)));
  }
  store_as(l.out, l.out_dtype, row * l.out_stride + n0, y, count);
}

// Sums of a prepared row, kTerms numbers for an element, over each group; groups start at multiples of kChunkK.
template <Dtype kType, int kTerms = 1>
inline void sum_groups(const Launch& l, const void* row, float* sums) {
  for (int64_t g = 0; g < l.num_groups; ++g) {
    const int64_t begin = g * l.group * kTerms;
    const int64_t end = g + 1 == l.num_groups ? l.prepared_stride : begin + l.group * kTerms;
    F total = zero();
    for (int64_t i = begin; i < end; i += kVecLanes) total = add(total, load_as(row, kType, i));
    sums[g] = sum_lanes(total);
  }
}

// Rows [begin, end) of x as fp32, zero beyond k.
inline void prepare_f32(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    float* out = static_cast<float*>(l.prepared) + m * l.prepared_stride;
    const int64_t x0 = m * l.x_stride;
    int64_t i = 0;
    for (; i + kVecLanes <= l.k; i += kVecLanes) store(out + i, load_as(l.x, l.x_dtype, x0 + i));
    for (; i < l.prepared_stride; i += kVecLanes) {
      const int64_t left = i < l.k ? l.k - i : 0;
      store(out + i, load_tail(l.x, l.x_dtype, x0 + i, left));
    }
    if (l.x_sums) sum_groups<Dtype::kF32>(l, out, l.x_sums + m * l.num_groups);
  }
}

// The tiles of a block pass over its codes one after the other. The first fetches them all, ahead of their use by 4 to
// 8 KiB; the others then find them in L2, unless they do not fit. One row alone reads one stream as fast as memory
// gives it: fetching ahead of the hardware took a tenth to a fourth longer.
inline bool fetches_codes(int64_t block_bytes, int64_t m0, int lane0) {
  return (m0 == 0 && lane0 == 0) || block_bytes > (512 << 10);
}
template <int B>
LOWBIT_INLINE inline void prefetch_chunk(const uint8_t* codes) {
  unroll<chunk_bytes(B) / kUnitBytes>([&](auto i) LOWBIT_INLINE { prefetch(codes + 6144 + i * kUnitBytes); });
}

// How a family multiplies: kSteps steps of kStepK weights cover a chunk. An element of x is the sum of kTerms numbers;
// those of a step stand term by term.
template <class C>
struct ComputeF32 {
  using Codec = C;
  using X = float;
  using Broadcast = F;
  static constexpr Dtype kType = Dtype::kF32;
  static constexpr int kStepK = 1;
  static constexpr int kTerms = 1;
  template <int S, class OfGroup>
  LOWBIT_INLINE static F value(const C& codec, const uint8_t* block, OfGroup of_group) {
    return codec.template value<S>(block, of_group);
  }
  LOWBIT_INLINE static F broadcast(const float* x) { return set1(*x); }
  LOWBIT_INLINE static F dot(F acc, F x, F value) { return fma(x, value, acc); }
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
