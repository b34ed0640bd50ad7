// Bits to values on the device: every codec is a table of 16-bit floats in shared memory (m16.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "m16.h"

namespace lowbit::cuda {

// A value and a pair of values of the type that tensor cores multiply.
template <class T>
struct Half;
template <>
struct Half<__half> {
  using Pair = __half2;
  static constexpr Type kType = Type::kF16;
  static __device__ __half from(float v) { return __float2half_rn(v); }
};
template <>
struct Half<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr Type kType = Type::kBf16;
  static __device__ __nv_bfloat16 from(float v) { return __float2bfloat16_rn(v); }
};

template <class T>
__device__ __forceinline__ uint32_t pair_bits(T low, T high) {
  const typename Half<T>::Pair pair{low, high};
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// Both values of a less both values of b. Integers of up to 8 bits: exact.
template <class T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  using Pair = typename Half<T>::Pair;
  const Pair d = __hsub2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

__device__ __forceinline__ float load_float(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::kF32:
      return static_cast<const float*>(p)[i];
    case Type::kBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case Type::kF16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case Type::kI8:
      return static_cast<const int8_t*>(p)[i];
  }
  return 0;
}
__device__ __forceinline__ void store_float(void* p, Type type, int64_t i, float v) {
  if (type == Type::kF32)
    static_cast<float*>(p)[i] = v;
  else if (type == Type::kBf16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
  else
    static_cast<__half*>(p)[i] = __float2half_rn(v);
}

// Two that lie side by side, at an even place.
__device__ __forceinline__ void store_floats(void* p, Type type, int64_t i, float v0, float v1) {
  if (type == Type::kF32)
    *reinterpret_cast<float2*>(static_cast<float*>(p) + i) = make_float2(v0, v1);
  else if (type == Type::kBf16)
    *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p) + i) = __floats2bfloat162_rn(v0, v1);
  else
    *reinterpret_cast<__half2*>(static_cast<__half*>(p) + i) = __floats2half2_rn(v0, v1);
}

// A value that stays in its register: without this the compiler computes it anew in every step of a loop.
template <class T>
__device__ __forceinline__ T kept(T value) {
  static_assert(sizeof(T) == 4);
  asm volatile("" : "+r"(value));
  return value;
}

// Where the scales of a lane's rows l / 4 and l / 4 + 8 stand among 16, and how to read them without a branch: a word,
// whose bytes are put in the place of those of a float, or of fp16 to be converted.
struct ScaleReader {
  int offset, step;
  uint32_t bytes;
  bool is_half;

  __device__ ScaleReader(Type type, int lane) {
    const int row = lane / 4, size = type_bytes(type), odd = type == Type::kF32 ? 0 : row % 2;
    is_half = type == Type::kF16;
    offset = kept(row * size - 2 * odd), step = kept(8 * size);
    bytes = kept(type == Type::kF32 ? 0x3210 : (is_half ? 0x4410 : 0x1044) + odd * (is_half ? 0x0022 : 0x2200));
  }
  // Of row l / 4 + 8 * h.
  __device__ float operator()(const uint8_t* at, int h) const {
    const uint32_t bits = __byte_perm(*reinterpret_cast<const uint32_t*>(at + offset + h * step), 0, bytes);
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    return is_half ? half : __uint_as_float(bits);
  }
};

// An integer zero of rows `row` and `row` + 8, twice each.
template <class T>
__device__ __forceinline__ void load_zeros(const void* zeros, int64_t row, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T v = Half<T>::from(static_cast<const int8_t*>(zeros)[row + 8 * h]);
    pairs[h] = pair_bits<T>(v, v);
  }
}

// What float zeros add to y[m, n]: -scale * zero or zero, times the sum of x, of every group.
__device__ __forceinline__ float float_zero_term(const Linear& p, int64_t n, int64_t m) {
  if (p.zero != Zero::kSubtract && p.zero != Zero::kAdd) return 0;
  float sum = 0;
#pragma unroll 1
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const int64_t at = scale_at(n / kTileN, g, p.num_groups) + n % kTileN;
    float term = load_float(p.zeros, p.zero_type, at);
    if (p.zero == Zero::kSubtract) term *= p.scales ? -load_float(p.scales, p.scale_type, at) : -1.0f;
    sum += term * __ldg(p.x_sums + g * p.m + m);
  }
  return sum;
}

// `threads` threads, of which this is number `thread`, write the table of entries. The 16-byte pieces of an entry's row
// are all alike; threads begin at different ones, so that they do not meet in a bank.
template <class T, int kBits>
__device__ __forceinline__ void fill_table(uint8_t* shared, const float* table, int thread, int threads) {
  constexpr int kPieces = kEntryPitch / 16;
#pragma unroll 1
  for (int entry = thread; entry < table_bytes(kBits) / kEntryPitch; entry += threads) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w)
      words[w] = pair_bits<T>(Half<T>::from(__ldg(table + entry_code(kBits, entry, 4 * w))),
                              Half<T>::from(__ldg(table + entry_code(kBits, entry, 4 * w + 2))));
    const uint4 piece = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      reinterpret_cast<uint4*>(shared)[entry * kPieces + (i + thread) % kPieces] = piece;
  }
}

// The words of a lane of a tile in shared memory.
template <int kBits>
__device__ __forceinline__ void load_words(const uint8_t* tile, int lane, uint32_t (&words)[kBits]) {
  constexpr int kGroup = word_group(kBits);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(tile);
#pragma unroll
  for (int w = 0; w < kBits; w += kGroup) {
    const uint32_t* at = from + word_at(kBits, lane, w);
    if constexpr (kGroup == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
    } else if constexpr (kGroup == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      words[w] = v.x, words[w + 1] = v.y;
    } else {
      words[w] = *at;
    }
  }
}

// The A operand of step s (0..3): rows l / 4 and l / 4 + 8 in turn, k 0-7 and then 8-15. `copy` is the table plus the
// lane's copy_offset.
template <int kBits>
__device__ __forceinline__ void decode(const uint32_t (&words)[kBits], int s, const uint8_t* copy, uint32_t (&a)[4]) {
  constexpr int kCodes = field_codes(kBits);
  if constexpr (kCodes == 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(copy + entry_offset<kBits>(words, s));
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  } else if constexpr (kCodes == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 v = *reinterpret_cast<const uint2*>(copy + entry_offset<kBits>(words, 2 * s + i));
      a[2 * i] = v.x, a[2 * i + 1] = v.y;
    }
  } else if constexpr (kCodes == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(copy + entry_offset<kBits>(words, 4 * s + i));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = *reinterpret_cast<const uint32_t*>(copy + entry_offset<kBits>(words, 8 * s + 2 * i));
      const uint32_t high = *reinterpret_cast<const uint32_t*>(copy + entry_offset<kBits>(words, 8 * s + 2 * i + 1));
      a[i] = __byte_perm(low, high, 0x7610);
    }
  }
}

}  // namespace lowbit::cuda
