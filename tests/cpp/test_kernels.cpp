// Every row of the kernel table against plain loops, without Python: for sanitizers and for emulated CPUs.
// Packs random codes, checks that unpacking returns them, that x = identity gives scale * (T - zero) bit for bit, and
// that random x agrees with a sum in double. Buffers have the exact sizes, so any overrun meets a red zone.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "layout.h"
#include "pack.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

void expect(bool ok, const char* kernel, const char* what, int64_t i, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20)
    std::printf("FAIL %s: %s at %lld: %.9g, expected %.9g\n", kernel, what, (long long)i, got, want);
}

float round_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Of a number that fp16 holds and that is not subnormal.
uint16_t half_of(float v) {
  int exponent;
  const float fraction = std::frexp(std::abs(v), &exponent);  // in [0.5, 1)
  const int sign = std::signbit(v) ? 0x8000 : 0;
  return static_cast<uint16_t>(v == 0 ? sign : sign + ((exponent + 13) << 10) + static_cast<int>(fraction * 2048));
}

// The value of a code of E4M3 or E5M2, by the formats' definition; infinite where the code is that or NaN.
float float8_value(Codec codec, int code) {
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
};

// One weight in n16 layout with fp32 scales and zeros, and its dequantized values.
struct Problem {
  Case c;
  int bits;
  Scope scope;
  std::vector<uint8_t> codes, packed, n16;
  std::vector<float> scales, zeros, table, value;

  Problem(const Case& c_, const Kernel& kernel, std::mt19937& rng) : c(c_), bits(kernel.bits), scope(kernel.scope) {
    const bool signs = kernel.compute == Dtype::kB1;
    const bool bf16_table = kernel.compute == Dtype::kBf16 || kernel.bf16_table;
    const bool integer = kernel.codec == Codec::kInt || kernel.compute == Dtype::kI8;
    const int64_t groups = ceil_div(c.k, c.group), blocks = num_blocks(c.n);
    const int entries = 1 << bits;
    const CanonicalCodes shape{c.n, c.k, ceil_div(c.k * bits, 8), bits, false};
    codes.resize(c.n * c.k);
    const bool float8 = kernel.codec == Codec::kE4m3 || kernel.codec == Codec::kE5m2;
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(rng() % entries);
      if (float8 && !std::isfinite(float8_value(kernel.codec, code))) code = 0;
    }
    packed.resize(c.n * shape.row_bytes);
    pack_rows(codes.data(), shape, packed.data(), 1);
    std::vector<uint8_t> again(codes.size());
    unpack_rows(packed.data(), shape, again.data(), 1);
    expect(again == codes, "pack_rows", "round trip", bits, 0, 0);
    n16.resize(packed_bytes(c.n, c.k, bits));
    prepack(packed.data(), shape, n16.data(), 2);
    std::vector<uint8_t> back(packed.size());
    unprepack(n16.data(), shape, back.data(), 2);
    expect(back == packed, "prepack", "round trip", bits, 0, 0);

    std::normal_distribution<float> normal;
    const int64_t tables = scope == Scope::kShared ? 1 : blocks * groups * kBlockN;
    table.resize(tables * entries);
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
    scales.resize(blocks * groups * kBlockN);
    zeros.resize(scales.size());
    for (float& s : scales) s = 0.5f + std::abs(normal(rng));
    for (float& z : zeros) z = normal(rng);
    value.resize(c.n * c.k);
    for (int64_t n = 0; n < c.n; ++n) {
      for (int64_t k = 0; k < c.k; ++k) {
        const int64_t group = k / c.group, term = (n / kBlockN * groups + group) * kBlockN + n % kBlockN;
        const int code = codes[n * c.k + k];
        const int64_t column = ((n / kBlockN * groups + group) * entries + code) * kBlockN + n % kBlockN;
        const float t = scope == Scope::kShared ? table[code] : table[column];
        // volatile: one rounding an operation, whatever the compiler would fuse.
        volatile float inner = c.zero == ZeroMode::kAdd ? scales[term] * t : t;
        if (c.zero == ZeroMode::kSubtract) inner = inner - zeros[term];
        value[n * c.k + k] = c.zero == ZeroMode::kAdd ? inner + zeros[term] : scales[term] * inner;
      }
    }
  }

  Launch launch() {
    Launch l{};
    l.n = c.n;
    l.k = c.k;
    l.group = c.group;
    l.num_groups = ceil_div(c.k, c.group);
    l.codes = n16.data();
    l.scales = scales.data();
    l.zeros = c.zero == ZeroMode::kNone ? nullptr : zeros.data();
    l.zero = c.zero;
    l.table = table.data();
    l.table_groups = scope == Scope::kShared ? 1 : l.num_groups;
    return l;
  }
};

void check_linear(const Kernel& kernel, Problem& p, std::mt19937& rng) {
  const Case& c = p.c;
  const bool bf16 = kernel.exact_x[static_cast<int>(Dtype::kBf16)] && kernel.compute == Dtype::kBf16;
  const bool f16 = kernel.terms == 2;
  const auto multiply = [&](const std::vector<float>& x, int64_t m, int threads) {
    std::vector<uint16_t> words(bf16 || f16 ? x.size() : 0);
    for (size_t i = 0; i < words.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      words[i] = f16 ? half_of(x[i]) : static_cast<uint16_t>(bits >> 16);
    }
    std::vector<float> y(m * c.n, std::nanf(""));
    Launch l = p.launch();
    l.m = m;
    l.x = bf16 || f16 ? static_cast<const void*>(words.data()) : x.data();
    l.x_dtype = f16 ? Dtype::kF16 : bf16 ? Dtype::kBf16 : Dtype::kF32;
    l.x_stride = c.k;
    l.out = y.data();
    l.out_dtype = Dtype::kF32;
    l.out_stride = c.n;
    run(kernel, l, threads);
    return y;
  };
  std::vector<float> identity(c.k * c.k, 0.0f);
  for (int64_t k = 0; k < c.k; ++k) identity[k * c.k + k] = 1.0f;
  const std::vector<float> w = multiply(identity, c.k, 2);
  for (int64_t k = 0; k < c.k; ++k) {
    for (int64_t n = 0; n < c.n; ++n) {
      expect(w[k * c.n + n] == p.value[n * c.k + k], kernel.name, "identity", n * c.k + k, w[k * c.n + n],
             p.value[n * c.k + k]);
    }
  }
  std::normal_distribution<float> normal;
  std::vector<float> x(c.m * c.k);
  // All 11 bits of an fp16, or the 8 of a bf16.
  for (float& v : x)
    v = f16 ? static_cast<float>(static_cast<int>(rng() % 4095) - 2047) / 512 : round_bf16(normal(rng));
  const std::vector<float> y = multiply(x, c.m, 1);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const double product = double{x[m * c.k + k]} * p.value[n * c.k + k];
        sum += product;
        magnitude += std::abs(product);
      }
      // k additions, each off by half an ulp of a partial sum; integers before their zero is taken away are larger
      // than their products by at most their largest code.
      const double bound = static_cast<double>(c.k + 4) * 0x1p-23 * (magnitude + 1) * 8;
      expect(std::abs(y[m * c.n + n] - sum) <= bound, kernel.name, "random x", m * c.n + n, y[m * c.n + n], sum);
    }
  }
}

void check_int8(const Kernel& kernel, Problem& p, std::mt19937& rng) {
  const Case& c = p.c;
  std::vector<int8_t> x(c.m * c.k);
  for (int8_t& v : x) v = static_cast<int8_t>(rng() % 256 - 128);
  std::vector<float> x_scales(c.m), y(c.m * c.n, std::nanf(""));
  for (float& s : x_scales) s = 0.25f + static_cast<float>(rng() % 8);
  Launch l = p.launch();
  l.m = c.m;
  l.x = x.data();
  l.x_dtype = Dtype::kI8;
  l.x_scales = x_scales.data();
  l.table_step = 1;
  l.x_stride = c.k;
  l.out = y.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = c.n;
  run(kernel, l, 2);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        sum += double{p.value[n * c.k + k]} * x[m * c.k + k] * x_scales[m];
        magnitude += (std::abs(p.value[n * c.k + k]) + 300) * 128 * x_scales[m];
      }
      // The int32 sums are exact; four fp32 operations a group follow.
      expect(std::abs(y[m * c.n + n] - sum) <= 4 * 0x1p-23 * magnitude, kernel.name, "int8 x", m * c.n + n,
             y[m * c.n + n], sum);
    }
  }
}

void check_binary(const Kernel& kernel, Problem& p, std::mt19937& rng) {
  const Case& c = p.c;
  const int64_t bytes = ceil_div(c.k, 8);
  std::vector<uint8_t> x(c.m * bytes);
  for (uint8_t& v : x) v = static_cast<uint8_t>(rng());  // also beyond k
  std::vector<float> x_scales(c.m, 0.5f), y(c.m * c.n, std::nanf(""));
  Launch l = p.launch();
  l.m = c.m;
  l.x = x.data();
  l.x_dtype = Dtype::kB1;
  l.x_scales = x_scales.data();
  l.x_stride = bytes;
  l.out = y.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = c.n;
  run(kernel, l, 2);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const double product = 0.5 * p.value[n * c.k + k] * (x[m * bytes + k / 8] >> k % 8 & 1 ? 1 : -1);
        sum += product;
        magnitude += std::abs(product);
      }
      // The int32 sums are exact; two fp32 operations a group follow.
      expect(std::abs(y[m * c.n + n] - sum) <= 4 * 0x1p-23 * magnitude, kernel.name, "signs", m * c.n + n,
             y[m * c.n + n], sum);
    }
  }
}

void check_dequantize(const Kernel& kernel, Problem& p) {
  std::vector<float> w(p.c.n * p.c.k, std::nanf(""));
  Launch l = p.launch();
  l.m = 1;
  l.out = w.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = p.c.k;
  run(kernel, l, 2);
  for (size_t i = 0; i < w.size(); ++i) expect(w[i] == p.value[i], kernel.name, "dequantize", i, w[i], p.value[i]);
}

void check_embedding(Problem& p) {
  const std::vector<int64_t> indices = {p.c.n - 1, 0, p.c.n / 2};
  std::vector<float> rows(indices.size() * p.c.k, std::nanf(""));
  Launch l = p.launch();
  l.out = rows.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = p.c.k;
  embed(l, p.bits, p.scope, indices.data(), static_cast<int64_t>(indices.size()), 2);
  for (size_t i = 0; i < indices.size(); ++i) {
    for (int64_t k = 0; k < p.c.k; ++k) {
      const float want = p.value[indices[i] * p.c.k + k];
      expect(rows[i * p.c.k + k] == want, "embedding", "row", k, rows[i * p.c.k + k], want);
    }
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 64, 64, 32, ZeroMode::kNone},    {3, 70, 96, 96, ZeroMode::kSubtract}, {9, 1, 33, 32, ZeroMode::kAdd},
      {2, 130, 100, 64, ZeroMode::kNone},  {5, 17, 1, 1, ZeroMode::kSubtract},   {4, 65, 77, 20, ZeroMode::kAdd},
      {7, 63, 40, 7, ZeroMode::kSubtract}, {200, 66, 31, 31, ZeroMode::kNone},   {98, 64, 288, 32, ZeroMode::kSubtract},
      {1, 128, 320, 320, ZeroMode::kNone},
  };
  int ran = 0, skipped = 0;
  for (const Kernel* kernel : kernels()) {
    if (!(active_isa() & kernel->isa)) {
      ++skipped;
      continue;
    }
    ++ran;
    std::mt19937 rng(1);
    for (const Case& c : cases) {
      Desc desc{kernel->op, kernel->compute, kernel->codec, kernel->bits, kernel->scope, c.zero, c.m, c.n,
                c.k,        c.group};
      desc.bf16_table = true;
      if (kernel->terms == 2) desc.x = Dtype::kF16;
      if (rejection(*kernel, desc, active_isa())) continue;
      Problem p(c, *kernel, rng);
      if (kernel->compute == Dtype::kI8) {
        check_int8(*kernel, p, rng);
      } else if (kernel->compute == Dtype::kB1) {
        check_binary(*kernel, p, rng);
      } else if (kernel->op == Op::kLinear) {
        check_linear(*kernel, p, rng);
      } else {
        check_dequantize(*kernel, p);
        check_embedding(p);
      }
    }
  }
  std::printf("isa mask %u: %d rows ran, %d skipped (instruction set not available), %d checks, %d failures\n",
              active_isa(), ran, skipped, checks, failures);
  return failures != 0;
}
