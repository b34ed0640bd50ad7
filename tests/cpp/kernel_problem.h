// A weight in n16 layout for the tests of kernels, its values by plain loops, and how results are compared. Operands
// end at pages that nobody may touch (guarded.h).
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/dispatch.h"
#include "core/n16.h"
#include "cpu/offline/pack.h"
#include "guarded.h"

namespace lowbit {

inline int failures = 0;
inline int checks = 0;

inline void expect(bool ok, const char* kernel, const char* what, int64_t i, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20)
    std::printf("FAIL %s: %s at %lld: %.9g, expected %.9g\n", kernel, what, (long long)i, got, want);
}

inline float round_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Of a number that fp16 holds and that is not subnormal.
inline uint16_t half_of(float v) {
  int exponent;
  const float fraction = std::frexp(std::abs(v), &exponent);  // in [0.5, 1)
  const int sign = std::signbit(v) ? 0x8000 : 0;
  return static_cast<uint16_t>(v == 0 ? sign : sign + ((exponent + 13) << 10) + static_cast<int>(fraction * 2048));
}

inline float of_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 0x3FF;
  if (exponent == 31) return fraction ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
  const float v = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  return h & 0x8000 ? -v : v;
}

// Numbers of a dtype that holds them all, or in which a kernel writes them.
struct Numbers {
  Dtype dtype;
  Guarded<float> floats;
  Guarded<uint16_t> words;

  Numbers(Dtype dtype_, const std::vector<float>& values)
      : dtype(dtype_),
        floats(dtype == Dtype::kF32 ? values.size() : 0),
        words(dtype == Dtype::kF32 ? 0 : values.size()) {
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      if (dtype == Dtype::kF32) floats[i] = values[i];
      if (dtype == Dtype::kBf16) words[i] = static_cast<uint16_t>(bits >> 16);
      if (dtype == Dtype::kF16) words[i] = half_of(values[i]);
    }
  }
  void* data() { return dtype == Dtype::kF32 ? static_cast<void*>(floats.data()) : words.data(); }
  float operator[](size_t i) const {
    if (dtype == Dtype::kF32) return floats[i];
    if (dtype == Dtype::kF16) return of_half(words[i]);
    const uint32_t bits = uint32_t{words[i]} << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
};

// Runs a kernel as it is and with poisoned memory.
template <class T>
void run_twice(const Kernel& kernel, const Launch& l, int threads, Guarded<T>& out) {
  expect(same_when_poisoned(out, [&] { run(kernel, l, threads); }), kernel.name, "poisoned memory", l.m, 0, 0);
}
inline void run_twice(const Kernel& kernel, const Launch& l, int threads, Numbers& out) {
  if (out.dtype == Dtype::kF32) {
    run_twice(kernel, l, threads, out.floats);
  } else {
    run_twice(kernel, l, threads, out.words);
  }
}

// The value of a code of E4M3 or E5M2, by the formats' definition; infinite where the code is that or NaN.
inline float float8_value(Codec codec, int code) {
  const int mantissa = codec == Codec::kE4m3 ? 3 : 2, bias = codec == Codec::kE4m3 ? 7 : 15;
  const int magnitude = code & 0x7F, exponent = magnitude >> mantissa, fraction = magnitude & ((1 << mantissa) - 1);
  if (codec == Codec::kE4m3 ? magnitude == 0x7F : magnitude >= 0x7C) return INFINITY;
  const int significand = exponent ? fraction + (1 << mantissa) : fraction;
  return std::ldexp(static_cast<float>(code & 0x80 ? -significand : significand),
                    (exponent ? exponent : 1) - bias - mantissa);
}

struct Case {
  int64_t m, n, k, group;
  ZeroMode zero;
  Dtype scale = Dtype::kF32;   // that of the codes with which scales, and zeros of kAdd, are stored
  Dtype second = Dtype::kF32;  // and of what these are multiplied by,
  int64_t super_groups = 0;    // for so many groups; 0: one fp32 for the weight, if scales are integers or E4M3, and
                               // factors and an offset with kDq8
  bool trits = false;          // codes below 3, which lie as core/trits.h says
};

// What a code of scales stands for, by the formats' definition.
inline float scale_value(Dtype dtype, uint8_t code) {
  if (const int bits = packed_scale_bits(dtype)) {
    const bool negative = dtype == Dtype::kI6 && code >> (bits - 1);
    return static_cast<float>(code - (negative ? 1 << bits : 0));
  }
  if (dtype == Dtype::kI7) return static_cast<float>(code / 2 - (code >= 128 ? 128 : 0));
  return dtype == Dtype::kI8     ? static_cast<float>(static_cast<int8_t>(code))
         : dtype == Dtype::kE4m3 ? float8_value(Codec::kE4m3, code)
                                 : std::ldexp(1.0f, code - 127);
}

// One weight in n16 layout, its scales and zeros in fp32, and, of some cases, as they are stored, and its dequantized
// values.
struct Problem {
  Case c;
  int bits;
  Scope scope;
  Guarded<uint8_t> codes, packed, n16, scale_codes, zero_codes;
  Guarded<float> scales, zeros, table, scale_map{256};
  Numbers scales2{Dtype::kF32, {}}, zeros2{Dtype::kF32, {}};
  std::vector<float> value;

  Problem(const Case& c_, const Kernel& kernel, std::mt19937& rng) : c(c_), bits(kernel.bits), scope(kernel.scope) {
    const bool signs = kernel.compute == Dtype::kB1;
    const bool bf16_table = kernel.compute == Dtype::kBf16 || kernel.bf16_table;
    const bool integer = kernel.codec == Codec::kInt || kernel.compute == Dtype::kI8;
    const int64_t groups = ceil_div(c.k, c.group), blocks = num_blocks(c.n);
    const int entries = 1 << bits;
    const int64_t row_bytes = c.trits ? ceil_div(c.k, digits_per_byte(kTritBase)) : ceil_div(c.k * bits, 8);
    const CanonicalCodes shape{c.n, c.k, row_bytes, bits, c.trits ? kTritBase : 0};
    codes = Guarded<uint8_t>(c.n * c.k);
    const bool float8 = kernel.codec == Codec::kE4m3 || kernel.codec == Codec::kE5m2;
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(rng() % (c.trits ? kTritBase : entries));
      if (float8 && !std::isfinite(float8_value(kernel.codec, code))) code = 0;
    }
    packed = Guarded<uint8_t>(c.n * shape.row_bytes);
    pack_rows(codes.data(), shape, packed.data(), 1);
    Guarded<uint8_t> again(codes.size());
    unpack_rows(packed.data(), shape, again.data(), 1);
    expect(again == codes, "pack_rows", "round trip", bits, 0, 0);
    n16 = Guarded<uint8_t>(shape.n16_bytes());
    prepack(packed.data(), shape, n16.data(), 2);
    Guarded<uint8_t> back(packed.size());
    unprepack(n16.data(), shape, back.data(), 2);
    expect(back == packed, "prepack", "round trip", bits, 0, 0);

    std::normal_distribution<float> normal;
    const int64_t tables = scope == Scope::kColumn ? blocks * groups * kBlockN : scope == Scope::kPair ? 2 : 1;
    table = Guarded<float>(tables * entries);
    // Tables of 8 bits whose upper half is the lower one negated, as that of e4m3, are looked up in another way.
    const bool symmetric = kernel.bits == 8 && scope == Scope::kShared && !integer && c.zero == ZeroMode::kNone;
    for (size_t i = 0; i < table.size(); ++i) {
      const float v = signs                   ? static_cast<float>(2 * static_cast<int>(i) - 1)
                      : integer               ? static_cast<float>(static_cast<int>(i) - entries / 2)
                      : symmetric && i >= 128 ? -table[i - 128]
                      : symmetric             ? std::abs(normal(rng))
                                              : normal(rng);
      table[i] = float8 ? float8_value(kernel.codec, static_cast<int>(i)) : bf16_table ? round_bf16(v) : v;
    }
    scales = Guarded<float>(blocks * groups * kBlockN);
    zeros = Guarded<float>(scales.size());
    for (float& s : scales) s = 0.5f + std::abs(normal(rng));
    // Of int8 products, integers: so they may be int8 as well.
    for (float& z : zeros) z = kernel.compute == Dtype::kI8 ? std::nearbyint(4 * normal(rng)) : normal(rng);
    if (c.scale == Dtype::kDq8) {
      store_dq8(rng);
    } else if (coded()) {
      store(scale_codes, scales2, scales, rng);
      if (c.zero == ZeroMode::kAdd) store(zero_codes, zeros2, zeros, rng);
    }
    value.resize(c.n * c.k);
    for (int64_t n = 0; n < c.n; ++n) {
      for (int64_t k = 0; k < c.k; ++k) {
        const int64_t group = k / c.group, term = (n / kBlockN * groups + group) * kBlockN + n % kBlockN;
        const int code = codes[n * c.k + k];
        const int64_t column = ((n / kBlockN * groups + group) * entries + code) * kBlockN + n % kBlockN;
        const int chosen = scope == Scope::kPair ? scale_codes[term] % 2 : 0;
        const float t = scope == Scope::kColumn ? table[column] : table[chosen * entries + code];
        // volatile: one rounding an operation, whatever the compiler would fuse.
        volatile float inner = c.zero == ZeroMode::kAdd ? scales[term] * t : t;
        if (c.zero == ZeroMode::kSubtract) inner = inner - zeros[term];
        value[n * c.k + k] = c.zero == ZeroMode::kAdd ? inner + zeros[term] : scales[term] * inner;
      }
    }
  }

  bool coded() const { return c.scale != Dtype::kF32; }
  bool second_level() const { return coded() && c.scale != Dtype::kE8m0; }
  int64_t supers() const { return c.super_groups ? ceil_div(ceil_div(c.k, c.group), c.super_groups) : 0; }

  // Draws codes and what they are multiplied by; `terms` become what these stand for.
  void store(Guarded<uint8_t>& stored, Numbers& second, Guarded<float>& terms, std::mt19937& rng) {
    const int64_t groups = ceil_div(c.k, c.group);
    std::vector<float> factors(supers() ? num_blocks(c.n) * supers() * kBlockN : 1);
    // No more bits than any dtype of them has.
    for (float& f : factors) f = static_cast<float>(64 + rng() % 64) / 4096;
    second = Numbers(c.second, factors);
    const int bits = packed_scale_bits(c.scale);
    stored = Guarded<uint8_t>(bits ? terms.size() * bits / 8 : terms.size());
    for (size_t i = 0; i < terms.size(); ++i) {
      const int64_t group = static_cast<int64_t>(i) / kBlockN % groups,
                    block = static_cast<int64_t>(i) / kBlockN / groups;
      uint8_t code = static_cast<uint8_t>(c.scale == Dtype::kE8m0 ? 120 + rng() % 8 : rng());
      if (c.scale == Dtype::kE4m3) code &= 0xBF;  // below 2
      if (bits) {
        // Bit by bit into a little-endian stream.
        code &= static_cast<uint8_t>((1 << bits) - 1);
        for (int b = 0; b < bits; ++b) {
          const size_t at = i * bits + b;
          stored[at / 8] = static_cast<uint8_t>(stored[at / 8] | (code >> b & 1) << at % 8);
        }
      } else {
        stored[i] = code;
      }
      const int64_t super = supers() ? (block * supers() + group / c.super_groups) * kBlockN + i % kBlockN : 0;
      terms[i] = scale_value(c.scale, code) * (second_level() ? factors[super] : 1.0f);
    }
  }

  // Draws codes, a map, factors and an offset; `scales` become what these stand for.
  void store_dq8(std::mt19937& rng) {
    const int64_t groups = ceil_div(c.k, c.group);
    for (size_t i = 0; i < scale_map.size(); ++i) scale_map[i] = static_cast<float>(rng() % 4096) / 4095;
    std::vector<float> factors(ceil_div(c.n * groups, int64_t{1} << kFactorBits) + 1);
    for (float& f : factors) f = 0.25f + static_cast<float>(rng() % 4096) / 4097;
    scales2 = Numbers(Dtype::kF32, factors);
    scale_codes = Guarded<uint8_t>(scales.size());
    for (uint8_t& code : scale_codes) code = static_cast<uint8_t>(rng());
    for (int64_t n = 0; n < c.n; ++n) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t term = (n / kBlockN * groups + group) * kBlockN + n % kBlockN;
        volatile float product = scale_map[scale_codes[term]] * factors[(n * groups + group) >> kFactorBits];
        scales[term] = product + factors.back();
      }
    }
  }

  Launch launch() {
    Launch l{};
    if (coded()) {
      l.scale_dtype = c.scale;
      l.second_dtype = c.second;
      l.super_groups = c.super_groups;
      l.num_supers = supers();
    }
    if (c.scale == Dtype::kDq8) {
      l.num_supers = static_cast<int64_t>(scales2.floats.size()) - 1;
      l.scale_map = scale_map.data();
    }
    l.n = c.n;
    l.k = c.k;
    l.group = c.group;
    l.num_groups = ceil_div(c.k, c.group);
    l.codes = n16.data();
    l.trits = c.trits;
    l.scales = coded() ? static_cast<const void*>(scale_codes.data()) : scales.data();
    l.scales2 = second_level() ? scales2.data() : nullptr;
    l.zeros = c.zero == ZeroMode::kNone ? nullptr : zeros.data();
    if (coded() && c.zero == ZeroMode::kAdd) {
      l.zeros = zero_codes.data();
      l.zero_dtype = c.scale;
      l.zeros2 = zeros2.data();
    }
    l.zero = c.zero;
    l.table = table.data();
    l.table_groups = scope == Scope::kColumn ? l.num_groups : 1;
    return l;
  }
};

}  // namespace lowbit
