// Structured weights of every instruction set against plain loops, without Python: for sanitizers and for emulated
// CPUs. Operands end at pages that nobody may touch (guarded.h). All values are such that every sum is exact in fp32.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "core/dispatch.h"
#include "cpu/structured/structured.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

// A weight whose codes are random; what it reads lies here.
struct Problem {
  StructuredWeight w{};
  Guarded<uint8_t> codes;
  Guarded<float> table, signs, scales;
  Guarded<uint32_t> grid;

  bool blocks() const { return w.codec >= StructuredCodec::kIq1S; }

  Problem(StructuredCodec codec, int bits, int dim, int64_t n, int64_t k, int64_t group, std::mt19937& rng) {
    const int64_t row_bytes = ((k + dim - 1) / dim * bits + 7) / 8, size = group ? group : k;
    codes = Guarded<uint8_t>(static_cast<size_t>(n * row_bytes));
    for (uint8_t& c : codes) c = static_cast<uint8_t>(rng());
    const size_t entries = codec == StructuredCodec::kVector ? size_t{1} << bits : bits == 24 ? 512 : 256;
    table = Guarded<float>(codec == StructuredCodec::kTrellis ? 0 : entries * dim);
    for (float& v : table) v = static_cast<float>(rng() % 9) / 2;
    signs = Guarded<float>(codec == StructuredCodec::kE8p ? 128 * 8 : 0);
    for (float& v : signs) v = rng() % 2 ? 1.0f : -1.0f;
    w.groups = (k + size - 1) / size;
    scales = Guarded<float>(static_cast<size_t>(n * w.groups));
    for (float& v : scales) v = static_cast<float>(rng() % 3) - 1;
    w.codec = codec;
    w.bits = bits;
    w.dim = dim;
    w.n = n;
    w.k = k;
    w.row_bytes = row_bytes;
    w.codes = codes.data();
    w.table = table.data();
    w.signs = signs.data();
    w.second = 0.5f;
    w.scales = scales.data();
    w.scale_dtype = Dtype::kF32;
    w.group = size;
    w.codec = codec;
    if (blocks()) fill_blocks(rng);
  }

  // Levels and fp16 numbers with which every sum is exact in fp32.
  void fill_blocks(std::mt19937& rng) {
    const bool of_four = w.codec == StructuredCodec::kIq3Xxs || w.codec == StructuredCodec::kIq3S;
    static const size_t kEntries[] = {2048, 2048, 256, 512, 1024, 256, 512};
    grid = Guarded<uint32_t>(kEntries[static_cast<int>(w.codec) - static_cast<int>(StructuredCodec::kIq1S)]);
    for (uint32_t& word : grid) word = static_cast<uint32_t>(rng()) & (of_four ? 0x7777 : 0x77777777);
    table = Guarded<float>(16);
    for (float& v : table) v = static_cast<float>(rng() % 15) / 2 - 3.5f;
    scales = Guarded<float>(0);
    const uint16_t halves[] = {0x3C00, 0x4000, 0xBC00, 0x3800};  // 1, 2, -1, 1/2
    const int64_t size = w.bits / 8;
    for (int64_t at = 0; at < static_cast<int64_t>(codes.size()); at += size) {
      const uint16_t half = halves[rng() % 4];
      uint8_t* block = codes.data() + at;
      if (w.codec != StructuredCodec::kIq1M) std::memcpy(block, &half, 2);
      for (int i = 0; i < 4 && w.codec == StructuredCodec::kIq1M; ++i) {
        block[49 + 2 * i] = static_cast<uint8_t>((block[49 + 2 * i] & 15) | (half >> (4 * i) & 15) << 4);
      }
    }
    w.table = table.data();
    w.grid = grid.data();
    w.scales = nullptr;
  }

  static double half(uint64_t bits) {
    const double size = std::ldexp(1024 + static_cast<double>(bits & 1023), static_cast<int>(bits >> 10 & 31) - 25);
    return bits >> 15 ? -size : size;
  }

  // By the first bits of the fields of a block.
  double block_value(int64_t row, int64_t at) const {
    using enum StructuredCodec;
    const int64_t first = at / 256 * w.bits, k = at % 256, g = k / 8, run = k / 32;
    const auto bits = [&](int64_t from, int count) { return bits_of(row, first + from, count, 8 * w.row_bytes); };
    const auto sign = [&](int64_t from) {
      const uint64_t seven = bits(from, 7);
      return k % 8 < 7 ? seven >> (k % 8) & 1 : static_cast<uint64_t>(std::popcount(seven) % 2);
    };
    uint64_t number = 0, flip = 0;
    double scale = half(bits(0, 16));
    bool of_four = false;
    switch (w.codec) {
      case kIq2Xxs:
        number = bits(16 + 64 * run + 8 * (g % 4), 8);
        flip = sign(48 + 64 * run + 7 * (g % 4));
        scale *= (static_cast<double>(bits(76 + 64 * run, 4)) + 0.5) / 4;
        break;
      case kIq2Xs:
        number = bits(16 + 16 * g, 9);
        flip = sign(25 + 16 * g);
        scale *= (static_cast<double>(bits(528 + 4 * (k / 16), 4)) + 0.5) / 4;
        break;
      case kIq2S:
        number = bits(16 + 8 * g, 8) | bits(528 + 2 * g, 2) << 8;
        flip = bits(272 + k, 1);
        scale *= (static_cast<double>(bits(592 + 4 * (k / 16), 4)) + 0.5) / 4;
        break;
      case kIq3Xxs:
        of_four = true;
        number = bits(16 + 8 * (k / 4), 8);
        flip = sign(528 + 32 * run + 7 * (g % 4));
        scale *= (static_cast<double>(bits(556 + 32 * run, 4)) + 0.5) / 2;
        break;
      case kIq3S:
        of_four = true;
        number = bits(16 + 8 * (k / 4), 8) | bits(528 + k / 4, 1) << 8;
        flip = bits(592 + k, 1);
        scale *= static_cast<double>(2 * bits(848 + 4 * run, 4) + 1);
        break;
      case kIq1S:
        number = bits(16 + 8 * g, 8) | bits(272 + 16 * run + 3 * (g % 4), 3) << 8;
        flip = bits(287 + 16 * run, 1);
        scale *= static_cast<double>(2 * bits(284 + 16 * run, 3) + 1);
        break;
      default:
        number = bits(8 * g, 8) | bits(256 + 4 * g, 3) << 8;
        flip = bits(259 + 4 * g, 1);
        scale = half(bits(396, 4) | bits(412, 4) << 4 | bits(428, 4) << 8 | bits(444, 4) << 12);
        scale *= static_cast<double>(2 * bits(384 + 16 * (k / 64) + 3 * (k / 16 % 4), 3) + 1);
    }
    return scale * table[flip * 8 + (grid[number] >> (4 * (of_four ? k % 4 : k % 8)) & 15)];
  }

  // `count` bits of a row from bit `at` on; the first follow the last of `length`.
  uint64_t bits_of(int64_t row, int64_t at, int count, int64_t length) const {
    uint64_t found = 0;
    for (int b = 0; b < count; ++b) {
      const int64_t bit = (at + b) % length;
      found |= uint64_t{codes[row * w.row_bytes + bit / 8] >> (bit % 8) & 1u} << b;
    }
    return found;
  }

  double point(uint64_t code, int j) const {
    return table[(code & 255) * 8 + j] * signs[(code >> 8 & 127) * 8 + j] + (code >> 15 & 1 ? 0.25 : -0.25);
  }

  double value(int64_t row, int64_t k) const {
    if (blocks()) return block_value(row, k);
    const double scale = scales[row * w.groups + k / w.group];
    if (w.codec == StructuredCodec::kTrellis) {
      const uint64_t state = bits_of(row, k * w.bits, 16, w.k * w.bits);
      const auto word = static_cast<uint32_t>(state * kTrellisFactor + kTrellisAddend);
      const int sum = static_cast<int>((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24));
      return scale * (sum - 510) / 128;
    }
    const int64_t at = k / w.dim * w.bits;
    const int j = static_cast<int>(k % w.dim);
    const uint64_t code = bits_of(row, at, w.bits, 8 * w.row_bytes);
    if (w.codec == StructuredCodec::kVector) return scale * table[code * w.dim + j];
    double v = point(code & 0xFFFF, j);
    if (w.bits == 32) v += point(code >> 16, j) * w.second;
    if (w.bits == 24) v += table[(256 + (code >> 16)) * 8 + j] * double{w.second};
    return scale * v;
  }
};

void check(uint32_t isa, const char* name, const Problem& p, int64_t m, Dtype x_dtype, std::mt19937& rng) {
  const StructuredWeight& w = p.w;
  const int64_t stride = w.k + 3;
  const auto fail = [&](const char* what, int64_t i) {
    std::printf("FAIL %s: codec %d bits %d dim %d n %lld k %lld group %lld m %lld: %s at %lld\n", name,
                static_cast<int>(w.codec), w.bits, w.dim, (long long)w.n, (long long)w.k, (long long)w.group,
                (long long)m, what, (long long)i);
    ++failures;
  };
  Guarded<float> rows(w.n * w.k), x((m - 1) * stride + w.k), bias(w.n), y(m * w.n);
  for (float& v : x) v = static_cast<float>(rng() % 9) - 4;
  for (float& v : bias) v = static_cast<float>(rng() % 9) - 4;
  StructuredRows r{};
  r.w = w;
  r.count = w.n;
  r.out = rows.data();
  r.out_dtype = Dtype::kF32;
  StructuredLinear l{};
  l.w = w;
  l.x = x.data();
  l.x_dtype = x_dtype;
  l.bias_dtype = l.out_dtype = Dtype::kF32;
  Guarded<uint16_t> narrow(x_dtype == Dtype::kBf16 ? x.size() : 0);
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(x[i]) >> 16);
  if (x_dtype == Dtype::kBf16) l.x = narrow.data();
  l.m = m;
  l.x_stride = stride;
  l.bias = bias.data();
  l.out = y.data();
  ++checks;
  if (!same_when_poisoned(rows, [&] { structured_rows(r, isa, 2); })) fail("poisoned memory reaches a row", 0);
  if (!same_when_poisoned(y, [&] { structured_linear(l, isa, 2); })) fail("poisoned memory reaches a product", 0);
  std::vector<double> weight(static_cast<size_t>(w.n * w.k));
  for (int64_t i = 0; i < w.n * w.k; ++i) {
    weight[i] = p.value(i / w.k, i % w.k);
    if (rows[i] != weight[i]) return fail("another weight", i);
  }
  for (int64_t i = 0; i < m * w.n; ++i) {
    double exact = bias[i % w.n];
    for (int64_t k = 0; k < w.k; ++k) exact += weight[i % w.n * w.k + k] * x[i / w.n * stride + k];
    if (y[i] != exact) return fail("another sum", i);
  }
}

struct Kind {
  StructuredCodec codec;
  int bits, dim;
};
constexpr Kind kKinds[] = {
    {StructuredCodec::kVector, 1, 2},  {StructuredCodec::kVector, 5, 4},  {StructuredCodec::kVector, 12, 8},
    {StructuredCodec::kE8p, 16, 8},    {StructuredCodec::kE8p, 24, 8},    {StructuredCodec::kE8p, 32, 8},
    {StructuredCodec::kTrellis, 2, 1}, {StructuredCodec::kTrellis, 3, 1}, {StructuredCodec::kTrellis, 4, 1},
};
constexpr Kind kBlocks[] = {
    {StructuredCodec::kIq1S, 400, 256},  {StructuredCodec::kIq1M, 448, 256}, {StructuredCodec::kIq2Xxs, 528, 256},
    {StructuredCodec::kIq2Xs, 592, 256}, {StructuredCodec::kIq2S, 656, 256}, {StructuredCodec::kIq3Xxs, 784, 256},
    {StructuredCodec::kIq3S, 880, 256},
};

}  // namespace

int main() {
  std::mt19937 rng(1);
  int ran = 0;
  for (uint32_t set : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & set)) continue;
    ++ran;
    const char* name = isa_name(static_cast<Isa>(set));
    const uint32_t isa = cap_isa(active_isa(), name);
    count_for(std::string("structured, ") + name);
    for (const Kind& kind : kKinds) {
      for (int64_t n : {1, 19}) {
        for (int64_t k : {1, 37, 256, 600}) {
          for (int64_t group : {0, 24}) {
            const Problem p(kind.codec, kind.bits, kind.dim, n, k, group, rng);
            for (int64_t m : {1, 2, 5, 8}) check(isa, name, p, m, Dtype::kF32, rng);
          }
        }
      }
    }
    for (const Kind& kind : kBlocks) {
      for (int64_t n : {1, 19}) {
        for (int64_t k : {37, 256, 600}) {
          const Problem p(kind.codec, kind.bits, kind.dim, n, k, 0, rng);
          for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
            for (int64_t m : {1, 2, 5, 8}) check(isa, name, p, m, dtype, rng);
          }
        }
      }
    }
  }
  std::printf("isa mask %u: structured weights of %d instruction sets ran, %d checks, %d failures\n", active_isa(), ran,
              checks, failures);
  print_memory_checks();
  return failures != 0;
}
