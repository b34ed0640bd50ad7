// Every kernel of the kernel table against plain loops, without Python: for sanitizers and for emulated CPUs.
// Packs random codes, checks that unpacking returns them, that x = identity gives scale * (T - zero) bit for bit, and
// that random x agrees with a sum in double. Operands end at pages that nobody may touch (guarded.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/int8_table.h"
#include "cpu/activations/quantize.h"
#include "kernel_problem.h"

using namespace lowbit;

namespace {

// With `--sample`, long rows meet this many rows of the identity: where each product takes a hundred times longer.
// `--sample 4` takes a fourth of the cases for each kernel, others for the next one.
constexpr int64_t kSampledRows = 100;
bool sampled = false;

// Whether got is want, off by `bound` and by one rounding to dtype; infinite where fp16 ends.
bool rounded_to(Dtype dtype, double got, double want, double bound) {
  if (dtype == Dtype::kF16 && std::isinf(got)) return got * want > 0 && std::abs(want) + bound >= 65504;
  const double unit = dtype == Dtype::kF32 ? 0x1p-24 : dtype == Dtype::kF16 ? 0x1p-11 : 0x1p-8;
  return std::abs(got - want) <= bound + unit * std::abs(want) + (dtype == Dtype::kF32 ? 0 : 0x1p-25);
}

// The rows of x that a product reads lie `x_stride` numbers apart; the last one ends at the closed page.
std::vector<float> spread(const std::vector<float>& x, int64_t m, int64_t k, int64_t stride) {
  std::vector<float> wide((m - 1) * stride + k, 1e30f);
  for (int64_t i = 0; i < m * k; ++i) wide[i / k * stride + i % k] = x[i];
  return wide;
}

// Rows of the identity: all of them, or some that differ from kernel to kernel.
std::vector<int64_t> identity_rows(int64_t k, std::mt19937& rng) {
  std::vector<int64_t> rows(k);
  std::iota(rows.begin(), rows.end(), 0);
  if (sampled && k > kSampledRows) {
    std::shuffle(rows.begin(), rows.end(), rng);
    rows.resize(kSampledRows);
  }
  return rows;
}

void check_identity(const Kernel& kernel, Problem& p, Dtype dtype, std::mt19937& rng) {
  const Case& c = p.c;
  const std::vector<int64_t> rows = identity_rows(c.k, rng);
  const int64_t count = static_cast<int64_t>(rows.size());
  std::vector<float> identity(count * c.k, 0.0f);
  for (int64_t i = 0; i < count; ++i) identity[i * c.k + rows[i]] = 1.0f;
  Numbers x(dtype, identity);
  Guarded<float> w(count * c.n, std::nanf(""));
  Launch l = p.launch();
  l.m = count;
  l.x_stride = c.k;
  l.x = x.data();
  l.x_dtype = dtype;
  l.out = w.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = c.n;
  run_twice(kernel, l, 2, w);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t at = n * c.k + rows[i];
      expect(w[i * c.n + n] == p.value[at], kernel.name, "identity", at, w[i * c.n + n], p.value[at]);
    }
  }
}

// Random x with a bias; and with what may follow, all of it in the dtype of x: gate * (x W^T + bias) + residual.
void check_random(const Kernel& kernel, Problem& p, Dtype dtype, bool epilogue, std::mt19937& rng) {
  const Case& c = p.c;
  const int64_t stride = c.k + (epilogue ? 3 : 0);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t count, int range) {
    std::vector<float> values(count);
    for (float& v : values) v = static_cast<float>(static_cast<int>(rng() % (2 * range + 1)) - range) / 8;
    return values;
  };
  std::vector<float> x(c.m * c.k);
  // All 11 bits of an fp16, or the 8 of a bf16.
  for (float& v : x) {
    v = dtype == Dtype::kF16 ? static_cast<float>(static_cast<int>(rng() % 4095) - 2047) / 512
                             : round_bf16(normal(rng));
  }
  const std::vector<float> bias = draw(c.n, 16), gate = draw(c.m * c.n, 16), residual = draw(c.m * c.n, 64);
  Numbers given(dtype, spread(x, c.m, c.k, stride)), given_bias(dtype, bias), given_gate(dtype, gate),
      given_residual(dtype, residual), y(epilogue ? dtype : Dtype::kF32, std::vector<float>(c.m * c.n));
  const Epilogue follows{Activation::kNone, given_gate.data(), c.n, given_residual.data(), c.n, dtype};
  Launch l = p.launch();
  l.m = c.m;
  l.x = given.data();
  l.x_dtype = l.bias_dtype = dtype;
  l.x_stride = stride;
  l.bias = given_bias.data();
  l.out = y.data();
  l.out_dtype = y.dtype;
  l.out_stride = c.n;
  l.epilogue = epilogue ? &follows : nullptr;
  run_twice(kernel, l, 1, y);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = bias[n], magnitude = std::abs(sum);
      for (int64_t k = 0; k < c.k; ++k) {
        const double product = double{x[m * c.k + k]} * p.value[n * c.k + k];
        sum += product;
        magnitude += std::abs(product);
      }
      // k additions, each off by half an ulp of a partial sum; integers before their zero is taken away are larger
      // than their products by at most their largest code.
      double bound = static_cast<double>(c.k + 4) * 0x1p-23 * (magnitude + 1) * 8;
      const int64_t at = m * c.n + n;
      if (epilogue) {
        sum = gate[at] * sum + residual[at];
        bound = bound * std::abs(gate[at]) + 0x1p-22 * std::abs(residual[at]);
      }
      expect(rounded_to(y.dtype, y[at], sum, bound), kernel.name, epilogue ? "epilogue" : "random x", at, y[at], sum);
    }
  }
}

void check_linear(const Kernel& kernel, Problem& p, std::mt19937& rng) {
  bool first = true;
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16, Dtype::kF16}) {
    if (!kernel.exact_x[dtype]) continue;
    if (first) {
      check_identity(kernel, p, dtype, rng);
      check_random(kernel, p, dtype, false, rng);
    }
    first = false;
    check_random(kernel, p, dtype, true, rng);
  }
}

// A product of a quantized x: the launch but for x, the bias, and what is expected of each result.
struct Quantized {
  Guarded<float> x_scales, bias, y;
  Launch l;

  Quantized(Problem& p, float scale, std::mt19937& rng)
      : x_scales(p.c.m, scale), bias(p.c.n), y(p.c.m * p.c.n, std::nanf("")), l(p.launch()) {
    for (float& b : bias) b = static_cast<float>(rng() % 9) - 4;
    l.m = p.c.m;
    l.x_scales = x_scales.data();
    l.bias = bias.data();
    l.bias_dtype = l.out_dtype = Dtype::kF32;
    l.out = y.data();
    l.out_stride = p.c.n;
  }
};

// Compares the sums of int8 x, scaled by row or by block, and returns the largest.
double expect_int8(const Kernel& kernel, const Problem& p, const Quantized& z, const Guarded<int8_t>& x) {
  const Case& c = p.c;
  const int64_t block = z.l.x_group > 0 ? z.l.x_group : c.k, blocks = ceil_div(c.k, block);
  double largest = 0;
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const int64_t m = i / c.n, n = i % c.n;
    double sum = z.bias[n], magnitude = 4;
    for (int64_t k = 0; k < c.k; ++k) {
      const double v = p.value[n * c.k + k], s = z.l.x_scales[m * blocks + k / block];
      sum += v * x[m * c.k + k] * s;
      magnitude += (std::abs(v) + 300) * 128 * s;
    }
    // The int32 sums are exact; four fp32 operations a segment follow.
    expect(std::abs(z.y[i] - sum) <= 4 * 0x1p-23 * magnitude, kernel.name, "int8 x", i, z.y[i], sum);
    largest = std::max(largest, std::abs(sum));
  }
  return largest;
}

// x of more numbers meets two ways of `blocks_of` alone, to save time.
constexpr int64_t kMostForBlocks = 4096;

// Weights that share a scale of x, for each way in which that can be: the row (0), a part of a group of the weight, a
// group, several, and more than the row.
std::vector<int64_t> blocks_of(const Kernel& kernel, Request request, const Launch& launch) {
  std::vector<int64_t> blocks;
  const int64_t group = launch.group;
  for (int64_t block :
       {int64_t{0}, group % 2 ? group : group / 2, group, 3 * group, group % 3 ? group : group / 3, launch.k + group}) {
    Launch l = launch;
    l.x_group = block;
    request.group = segments_of(l).size;
    if (!rejection(kernel, request, active_isa())) blocks.push_back(block);
    if (launch.m * launch.k > kMostForBlocks && blocks.size() == 2) break;
  }
  return blocks;
}

// Of floats that the kernel quantizes itself: as of what is quantized before.
void check_float_x(const Kernel& kernel, Quantized& z, int64_t block, std::mt19937& rng) {
  Launch l = z.l;
  l.x_group = block;
  Guarded<float> floats(l.m * l.k), scales(l.m * segments_of(l).blocks);
  Guarded<int8_t> x(l.m * l.k);
  std::normal_distribution<float> normal;
  for (float& v : floats) v = normal(rng);
  quantize_int8({.x = floats.data(), .x_stride = l.k, .k = l.k, .group = block ? block : l.k, .scales = scales.data()},
                l.m, x.data(), 1);
  l.x = x.data();
  l.x_scales = scales.data();
  run_twice(kernel, l, 2, z.y);
  const Guarded<float> want = z.y;
  l.x = floats.data();
  l.x_dtype = Dtype::kF32;
  run_twice(kernel, l, 2, z.y);
  expect(z.y == want, kernel.name, "float x", block, 0, 0);
}

void check_int8(const Kernel& kernel, const Request& request, Problem& p, std::mt19937& rng) {
  const Case& c = p.c;
  Guarded<int8_t> x(c.m * c.k);
  for (int8_t& v : x) v = static_cast<int8_t>(rng() % 256 - 128);
  Quantized z(p, 0, rng);
  Launch& l = z.l;
  l.x = x.data();
  l.x_dtype = Dtype::kI8;
  l.table_step = 1;
  l.x_stride = c.k;
  const auto draw = [&](Guarded<float>* scales) {
    for (float& s : *scales) s = 0.25f + static_cast<float>(rng() % 8);
  };
  const std::vector<int64_t> blocks = blocks_of(kernel, request, l);
  for (int64_t block : blocks) {
    if (block == 0) continue;
    l.x_group = block;
    Guarded<float> scales(c.m * segments_of(l).blocks);
    draw(&scales);
    l.x_scales = scales.data();
    run_twice(kernel, l, 2, z.y);
    expect_int8(kernel, p, z, x);
  }
  draw(&z.x_scales);
  l.x_scales = z.x_scales.data();
  l.x_group = 0;
  run_twice(kernel, l, 2, z.y);
  const double largest = expect_int8(kernel, p, z, x);
  Guarded<int8_t> zeros(p.zeros.size());
  if (c.zero == ZeroMode::kSubtract) {
    const Guarded<float> floats = z.y;
    for (size_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<int8_t>(p.zeros[i]);
    l.zeros = zeros.data();
    l.zero_dtype = Dtype::kI8;
    run_twice(kernel, l, 2, z.y);
    expect(z.y == floats, kernel.name, "int8 zeros", 0, 0, 0);
  }
  // As int8: the fp32 result times 127 / largest, rounded.
  Guarded<int8_t> bytes(c.m * c.n);
  l.out = bytes.data();
  l.out_dtype = Dtype::kI8;
  l.out_inverse = static_cast<float>(127 / largest);
  run_twice(kernel, l, 2, bytes);
  for (int64_t i = 0; i < c.m * c.n; ++i) {
    const float want = std::nearbyint(z.y[i] * l.out_inverse);
    expect(bytes[i] == want, kernel.name, "int8 out", i, bytes[i], want);
  }
  l.out = z.y.data();
  l.out_dtype = Dtype::kF32;
  for (int64_t block : blocks) check_float_x(kernel, z, block, rng);
}

void check_binary(const Kernel& kernel, Problem& p, std::mt19937& rng) {
  const Case& c = p.c;
  const int64_t bytes = ceil_div(c.k, 8);
  Guarded<uint8_t> x(c.m * bytes);
  for (uint8_t& v : x) v = static_cast<uint8_t>(rng());  // also beyond k
  Quantized z(p, 0.5f, rng);
  z.l.x = x.data();
  z.l.x_dtype = Dtype::kB1;
  z.l.x_stride = bytes;
  run_twice(kernel, z.l, 2, z.y);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = z.bias[n], magnitude = 4;
      for (int64_t k = 0; k < c.k; ++k) {
        const double product = 0.5 * p.value[n * c.k + k] * (x[m * bytes + k / 8] >> k % 8 & 1 ? 1 : -1);
        sum += product;
        magnitude += std::abs(product);
      }
      // The int32 sums are exact; two fp32 operations a group follow.
      expect(std::abs(z.y[m * c.n + n] - sum) <= 4 * 0x1p-23 * magnitude, kernel.name, "signs", m * c.n + n,
             z.y[m * c.n + n], sum);
    }
  }
}

void check_dequantize(const Kernel& kernel, Problem& p) {
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16, Dtype::kF16}) {
    if (!kernel.exact_x[dtype]) continue;
    Numbers w(dtype, std::vector<float>(p.c.n * p.c.k));
    Launch l = p.launch();
    l.m = 1;
    l.out = w.data();
    l.out_dtype = dtype;
    l.out_stride = p.c.k;
    run_twice(kernel, l, 2, w);
    for (size_t i = 0; i < p.value.size(); ++i) {
      const float want = p.value[i];
      expect(dtype == Dtype::kF32 ? w[i] == want : rounded_to(dtype, w[i], want, 0), kernel.name, "dequantize", i, w[i],
             want);
    }
  }
}

void check_embedding(Problem& p) {
  const Guarded<int64_t> indices(std::vector<int64_t>{p.c.n - 1, 0, p.c.n / 2});
  Guarded<float> rows(indices.size() * p.c.k, std::nanf(""));
  Launch l = p.launch();
  l.out = rows.data();
  l.out_dtype = Dtype::kF32;
  l.out_stride = p.c.k;
  const auto call = [&] { embed(l, p.bits, p.scope, indices.data(), static_cast<int64_t>(indices.size()), 2); };
  expect(same_when_poisoned(rows, call), "embedding", "poisoned memory", 0, 0, 0);
  for (size_t i = 0; i < indices.size(); ++i) {
    for (int64_t k = 0; k < p.c.k; ++k) {
      const float want = p.value[indices[i] * p.c.k + k];
      expect(rows[i * p.c.k + k] == want, "embedding", "row", k, rows[i * p.c.k + k], want);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  sampled = argc > 1 && std::strcmp(argv[1], "--sample") == 0;
  const size_t every = sampled && argc > 2 ? std::stoul(argv[2]) : 1;
  const Case cases[] = {
      {1, 64, 64, 32, ZeroMode::kNone},
      {3, 70, 96, 96, ZeroMode::kSubtract},
      {9, 1, 33, 32, ZeroMode::kAdd},
      {2, 130, 100, 64, ZeroMode::kNone},
      {5, 17, 1, 1, ZeroMode::kSubtract},
      {4, 65, 77, 20, ZeroMode::kAdd},
      {7, 63, 40, 7, ZeroMode::kSubtract},
      {200, 66, 31, 31, ZeroMode::kNone},
      {98, 64, 288, 32, ZeroMode::kSubtract},
      {1, 128, 320, 320, ZeroMode::kNone},
      {3, 17, 520, 512, ZeroMode::kNone},
      // Groups of half a chunk, an odd number of them too, and scales in all the ways in which they are stored.
      {1, 65, 272, 16, ZeroMode::kAdd, Dtype::kU4, Dtype::kF16, 16},
      {2, 64, 512, 16, ZeroMode::kNone, Dtype::kI6, Dtype::kF16, 16},
      {1, 130, 256, 16, ZeroMode::kAdd, Dtype::kI8, Dtype::kF16, 16},
      {5, 64, 128, 32, ZeroMode::kAdd, Dtype::kU6, Dtype::kF16, 8},
      {7, 70, 80, 16, ZeroMode::kSubtract},
      {98, 66, 144, 16, ZeroMode::kAdd, Dtype::kI6, Dtype::kBf16, 3},
      {4, 65, 200, 16, ZeroMode::kNone, Dtype::kE4m3},
      {13, 130, 352, 32, ZeroMode::kAdd, Dtype::kU6, Dtype::kF16, 8},
      {3, 64, 1100, 512, ZeroMode::kSubtract, Dtype::kI8, Dtype::kF32, 3},
      {5, 33, 96, 32, ZeroMode::kNone, Dtype::kE8m0},
      {1, 130, 272, 16, ZeroMode::kNone, Dtype::kDq8},
      {6, 65, 352, 32, ZeroMode::kSubtract, Dtype::kDq8},
      {2, 67, 50, 20, ZeroMode::kAdd, Dtype::kI8, Dtype::kF32, 2},
      {3, 65, 50, 20, ZeroMode::kNone, Dtype::kU4, Dtype::kF32, 2},
      // A pair of tables: of groups of all kinds.
      {1, 65, 272, 16, ZeroMode::kNone, Dtype::kI7, Dtype::kBf16, 17},
      {2, 130, 200, 32, ZeroMode::kNone, Dtype::kI7, Dtype::kBf16, 7},
      {9, 64, 320, 64, ZeroMode::kNone, Dtype::kI7, Dtype::kF16, 4},
      {98, 66, 528, 16, ZeroMode::kNone, Dtype::kI7, Dtype::kBf16, 33},
      {4, 63, 50, 20, ZeroMode::kNone, Dtype::kI7, Dtype::kF32, 3},
  };
  // A group longer than an int32 sum allows, and more of them than are summed in one chain: of int8 products alone.
  const Case long_cases[] = {{3, 2, 65536 + 40, 65536 + 40, ZeroMode::kAdd}, {2, 3, 4160, 32, ZeroMode::kAdd}};
  int ran = 0, skipped = 0;
  for (const Kernel* kernel : kernels()) {
    if (!(active_isa() & kernel->isa)) {
      ++skipped;
      continue;
    }
    ++ran;
    const char* family = kernel->compute == Dtype::kI8   ? "int8 products, "
                         : kernel->compute == Dtype::kB1 ? "binary products, "
                         : kernel->op == Op::kLinear     ? "products, "
                                                         : "dequantize and embedding, ";
    count_for(std::string(family) + isa_name(kernel->isa));
    std::mt19937 rng(1);
    std::vector<Case> chosen(std::begin(cases), std::end(cases));
    if (kernel->compute == Dtype::kI8) chosen.insert(chosen.end(), std::begin(long_cases), std::end(long_cases));
    if (kernel->bits == kTritBits && kernel->compute != Dtype::kB1) {
      for (Case c : cases) {
        c.trits = true;
        // A span and more, of groups of all lengths; how scales are stored has no part in it.
        if (c.k >= kTritChunks * kChunkK && (c.scale == Dtype::kF32 || c.scale == Dtype::kI8)) chosen.push_back(c);
      }
    }
    for (size_t i = ran % every; i < chosen.size(); i += every) {
      const Case& c = chosen[i];
      Request request{.op = kernel->op,
                      .x = kernel->compute,
                      .codec = kernel->codec,
                      .bits = kernel->bits,
                      .scope = kernel->scope,
                      .zero = c.zero,
                      .m = c.m,
                      .n = c.n,
                      .k = c.k,
                      .group = c.group,
                      .bf16_table = true};
      if (kernel->terms == 2) request.x = Dtype::kF16;
      const bool pair = kernel->scope == Scope::kPair;
      if (rejection(*kernel, request, active_isa()) || pair != (c.scale == Dtype::kI7)) continue;
      Problem p(c, *kernel, rng);
      if (kernel->compute == Dtype::kI8) {
        check_int8(*kernel, request, p, rng);
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
  std::printf("isa mask %u: %d kernels ran, %d skipped (instruction set not available), %d checks, %d failures\n",
              active_isa(), ran, skipped, checks, failures);
  print_memory_checks();
  return failures != 0;
}
