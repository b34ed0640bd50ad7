// FP8 decoded to fp32: exact products, fused multiply-add.
#pragma once

#include "cpu/fp8/fp8_matmul-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <Float8 T>
struct Fp8F32 {
  using Element = float;
  using Pairs = F;
  static constexpr int kStep = kVecLanes;
  static constexpr int kChains = 1;
  static constexpr bool kShortTiles = false;
  LOWBIT_INLINE static void fetch(const uint8_t*) {}
  static constexpr int kPair = 1;
  static constexpr int kVecs = kPanelVecs;
  static constexpr int kRows = kPanelRows;
  static constexpr int kColumns = kVecs * kVecLanes;

  LOWBIT_INLINE static F decode(const uint8_t* codes) { return LOWBIT_ISA::decode<T>(load_u8(codes)); }
  template <int>
  LOWBIT_INLINE static void dot(F* acc, const float* x, F w) {
    *acc = fma(load(x), w, *acc);
  }
  LOWBIT_INLINE static F scales(const Fp8Scales& s, int64_t row, int64_t k, int64_t) {
    return set1(scale_of(s, row, k));
  }

  LOWBIT_INLINE static F load_pairs(const float* p) { return load(p); }
  LOWBIT_INLINE static F broadcast(const float* x) { return set1(*x); }
  LOWBIT_INLINE static F dot_columns(F acc, F x, F w) { return fma(x, w, acc); }

  // panel[k][column], zero beyond n and k.
  static void decode_panel(const Fp8Matmul& q, int64_t n0, int64_t k0, int64_t k_size, float* panel) {
    const int64_t left = q.out.k - k0, count = left < k_size ? left : k_size;
    for (int64_t j = 0; j < kColumns; ++j) {
      alignas(64) uint8_t codes[kFp8LongSlab] = {};
      if (n0 + j < q.out.n) __builtin_memcpy(codes, q.b.codes + (n0 + j) * q.b.stride + k0, count);
      for (int64_t k = 0; k < k_size; k += kVecLanes) {
        float values[kVecLanes];
        store(values, decode(codes + k));
        for (int i = 0; i < kVecLanes; ++i) panel[(k + i) * kColumns + j] = values[i];
      }
    }
  }

  static void prepare_lanes(const Fp8Matmul&, const uint8_t* codes, float* out) {
    for (int64_t k = 0; k < kFp8PadK; k += kVecLanes) store(out + k, decode(codes + k));
  }
  static void prepare_chunks(const uint8_t* codes, float* first, float* second) {
    for (int64_t k = 0; k < kChunkK; k += kVecLanes) {
      store(first + k, decode(codes + k));
      store(second + k, decode(codes + kChunkK + k));
    }
  }
};

// Policies that are classes of the type.
template <template <Float8> class P>
struct Fp8TypedFamily : P<Float8::kE4m3> {
  template <class Fn>
  static void with(Float8 type, const Fn& fn) {
    if (type == Float8::kE4m3) {
      fn(P<Float8::kE4m3>());
    } else {
      fn(P<Float8::kE5m2>());
    }
  }
};
using Fp8F32Family = Fp8TypedFamily<Fp8F32>;

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
