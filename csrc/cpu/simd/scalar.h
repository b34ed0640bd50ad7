// Vectors in plain C++: 16 lanes as arrays, for CPUs without AVX2. The compiler maps them to the baseline's SSE2.
// No registers to keep sums in: the GEMM kernels serve every M.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kVecLanes = 16;
constexpr int kTileVecs = 1;
constexpr int kTileRows = 4;
constexpr int kPanelRows = 2;
constexpr int kPanelVecs = 1;
struct F {
  float v[kVecLanes];
};
struct I {
  uint32_t v[kVecLanes];
};

template <class R, class Fn>
inline R each(Fn fn) {
  R r;
  for (int i = 0; i < kVecLanes; ++i) r.v[i] = fn(i);
  return r;
}

inline F set1(float s) {
  return each<F>([&](int) { return s; });
}
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
  return each<F>([&](int i) { return p[i]; });
}
inline void store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
inline F add(F a, F b) {
  return each<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return each<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return each<F>([&](int i) { return a.v[i] * b.v[i]; });
}
// Two roundings: a fused one would be a library call for every lane.
inline F fma(F a, F b, F c) {
  return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F div(F a, F b) {
  return each<F>([&](int i) { return a.v[i] / b.v[i]; });
}
// b where either is NaN.
inline F min(F a, F b) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline float sum_lanes(F v) {
  float s = 0;
  for (int i = 0; i < kVecLanes; ++i) s += v.v[i];
  return s;
}

inline I load_i(const void* p) {
  I r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline I set1_i(uint32_t s) {
  return each<I>([&](int) { return s; });
}
template <int N>
inline I shift_right(I a) {
  return each<I>([&](int i) { return a.v[i] >> N; });
}
template <int N>
inline I shift_left(I a) {
  return each<I>([&](int i) { return a.v[i] << N; });
}
inline I bit_and(I a, I b) {
  return each<I>([&](int i) { return a.v[i] & b.v[i]; });
}
// mask ? a : b, bit by bit.
inline I select_bits(I mask, I a, I b) {
  return each<I>([&](int i) { return (mask.v[i] & a.v[i]) | (~mask.v[i] & b.v[i]); });
}
inline I add_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F as_float(I bits) {
  F r;
  std::memcpy(r.v, bits.v, sizeof r.v);
  return r;
}
inline F to_float(I a) {
  return each<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}

inline I max_i(I a, I b) {
  return each<I>([&](int i) { return static_cast<int32_t>(a.v[i]) > static_cast<int32_t>(b.v[i]) ? a.v[i] : b.v[i]; });
}
inline void store_i(void* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
// The larger; v if that is NaN.
inline F max_or_nan(F bound, F a) {
  return each<F>([&](int i) { return a.v[i] < bound.v[i] ? bound.v[i] : a.v[i]; });
}
inline I bits_of(F a) {
  I r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 31) return from_bits(sign | 0x7F800000u | m << 13);
  if (e > 0) return from_bits(sign | (e + 112) << 23 | m << 13);
  const float subnormal = static_cast<float>(m) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
// Round to nearest even.
inline uint16_t float_to_half(float f) {
  const uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 leaves the value, in units of 2^-24, in the low mantissa bits.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) & 0x7FFu));
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
inline F load_bf16(const uint16_t* p) {
  return each<F>([&](int i) { return from_bits(uint32_t{p[i]} << 16); });
}
inline F load_f16(const uint16_t* p) {
  return each<F>([&](int i) { return half_to_float(p[i]); });
}
inline F load_i8(const int8_t* p) {
  return each<F>([&](int i) { return static_cast<float>(p[i]); });
}
inline I load_u8_lanes(const uint8_t* p) {
  return each<I>([&](int i) { return p[i]; });
}
// kVecLanes integers of a bit stream, B bits each, from number i on, a multiple of kVecLanes.
template <int B, bool kSigned>
inline I load_packed(const uint8_t* p, uint64_t i) {
  return each<I>([&](int lane) {
    const uint64_t bit = (i + static_cast<uint64_t>(lane)) * B;
    const int shift = static_cast<int>(bit % 8);
    const uint32_t high = shift + B > 8 ? uint32_t{p[bit / 8 + 1]} << 8 : 0;
    const uint32_t code = (p[bit / 8] | high) >> shift & ((1u << B) - 1);
    return kSigned ? (code ^ (1u << (B - 1))) - (1u << (B - 1)) : code;
  });
}
inline void store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < kVecLanes; ++i) {
    const uint32_t b = to_bits(a.v[i]);
    const bool nan = (b & 0x7FFFFFFFu) > 0x7F800000u;
    p[i] = static_cast<uint16_t>((nan ? b | 0x400000u : b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
  }
}
inline void store_f16(uint16_t* p, F a) {
  for (int i = 0; i < kVecLanes; ++i) p[i] = float_to_half(a.v[i]);
}
// Round to nearest even, saturating; NaN gives 0.
inline void store_i8(int8_t* p, F a) {
  for (int i = 0; i < kVecLanes; ++i) {
    const float v = a.v[i] < -128.0f ? -128.0f : a.v[i] > 127.0f ? 127.0f : a.v[i];
    // Adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
    p[i] = v == v ? static_cast<int8_t>(to_bits(v + 12582912.0f)) : int8_t{0};
  }
}

inline F load_indexed(const float* table, I index) {
  return each<F>([&](int i) { return table[index.v[i]]; });
}

// Looks up the low B bits of each lane; higher bits are ignored.
template <int B>
struct Table {
  const float* t;
  explicit Table(const float* values) : t(values) {}
  F operator()(I code) const {
    return each<F>([&](int i) { return t[code.v[i] & ((1u << B) - 1)]; });
  }
};

// Lane i of the result is table[code[i] * stride + i].
inline F gather_column(const float* table, I code, int stride) {
  return each<F>([&](int i) { return table[code.v[i] * static_cast<uint32_t>(stride) + i]; });
}

inline void prefetch(const void*) {}

// FP8 codes, one in a lane.
inline I sub_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I mul_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] * b.v[i]; });
}
inline I xor_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline I or_i(I a, I b) {
  return each<I>([&](int i) { return a.v[i] | b.v[i]; });
}
inline bool less(uint32_t a, uint32_t b) { return static_cast<int32_t>(a) < static_cast<int32_t>(b); }
inline I min_i(I a, I b) {
  return each<I>([&](int i) { return less(b.v[i], a.v[i]) ? b.v[i] : a.v[i]; });
}
// a < b ? yes : no, signed.
inline I if_less(I a, I b, I yes, I no) {
  return each<I>([&](int i) { return less(a.v[i], b.v[i]) ? yes.v[i] : no.v[i]; });
}
// 0 for what no int32 holds.
inline I truncate_to_int(F f) {
  return each<I>([&](int i) {
    const bool fits = f.v[i] > -2147483648.0f && f.v[i] < 2147483648.0f;
    return static_cast<uint32_t>(fits ? static_cast<int32_t>(f.v[i]) : 0);
  });
}

// The low byte of every lane.
inline void store_u8(uint8_t* p, I a) {
  for (int i = 0; i < kVecLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}

// Codes of E4M3, but NaN is +-480, as fp16 that are 2^-8 of them: sign, a 0, exponent, mantissa.
struct E4m3Values {
  float of[256] = {};
  constexpr E4m3Values() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15;
      float v = static_cast<float>(code % 8 + (exponent ? 8 : 0)) * 0x1p-17f;
      for (int e = 1; e < exponent; ++e) v *= 2;
      of[code] = code & 128 ? -v : v;
    }
  }
};
constexpr E4m3Values kE4m3Values;
inline F load_e4m3_256th(const uint8_t* p) {
  return each<F>([&](int i) { return kE4m3Values.of[p[i]]; });
}

// Lane i is the largest lane of v[i].
inline I max_of_each(const I* v) {
  return each<I>([&](int i) {
    uint32_t largest = v[i].v[0];
    for (uint32_t lane : v[i].v) largest = less(largest, lane) ? lane : largest;
    return largest;
  });
}

// FP8 states of optimizers.
inline F square_root(F v) {
  return each<F>([&](int i) { return __builtin_sqrtf(v.v[i]); });
}
inline I min_u(I a, I b) {
  return each<I>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// v where x is at least `bound`, `other` elsewhere.
inline F keep_from(F bound, F x, F v, F other) {
  return each<F>([&](int i) { return x.v[i] >= bound.v[i] ? v.v[i] : other.v[i]; });
}
// Of values below 2^22, as the two that follow.
inline F round_down(F v) {
  return each<F>([&](int i) {
    const float near = (v.v[i] + 12582912.0f) - 12582912.0f;
    return near > v.v[i] ? near - 1.0f : near;
  });
}
// To nearest even.
inline I round_to_int(F v) {
  return each<I>([&](int i) { return to_bits(v.v[i] + 12582912.0f) - 0x4B400000u; });
}
// v 2^n for integers n <= 0; below 2^-126 v it may be anything smaller.
inline F times_power_of_two(F v, F n) {
  return each<F>([&](int i) {
    const float e = n.v[i] < -126.0f ? -126.0f : n.v[i];
    return v.v[i] * from_bits(static_cast<uint32_t>(static_cast<int32_t>(e) + 127) << 23);
  });
}
// The largest lane, each below 2^31.
inline uint32_t largest_lane(I v) {
  uint32_t m = 0;
  for (uint32_t lane : v.v) m = lane > m ? lane : m;
  return m;
}
inline uint32_t smallest_lane(I v) {
  uint32_t m = UINT32_MAX;
  for (uint32_t lane : v.v) m = lane < m ? lane : m;
  return m;
}

// Counts of bits.
constexpr int kSignRows = 4;
constexpr int kSignVecs = 1;
constexpr int64_t kCountChunks = INT64_MAX;  // dwords that `add_popcounts` may add up before `sum_popcounts`

inline I add_popcounts(I sums, I bits) {
  return each<I>([&](int i) { return sums.v[i] + static_cast<uint32_t>(std::popcount(bits.v[i])); });
}
inline I sum_popcounts(I sums) { return sums; }
// Bit i says whether lane i is 0 or more; NaN is not.
inline uint32_t nonnegative(F v) {
  uint32_t mask = 0;
  for (int i = 0; i < kVecLanes; ++i) mask |= (v.v[i] >= 0 ? 1u : 0u) << i;
  return mask;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
