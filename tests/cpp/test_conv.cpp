// Convolutions without Python: tiles of patches against the same kernel on patches that were gathered before, bit for
// bit, and those with groups of channels against plain loops. Operands end at pages that nobody may touch (guarded.h).
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "cpu/conv/conv.h"
#include "kernel_problem.h"

using namespace lowbit;

namespace {

struct Window {
  int64_t size[3], kernel[3], stride[3], before[3], dilation[3];
};
const Window kWindows[] = {
    {{1, 7, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},  {{1, 9, 15}, {1, 2, 3}, {1, 2, 1}, {0, 0, 2}, {1, 1, 2}},
    {{1, 1, 20}, {1, 1, 5}, {1, 1, 3}, {0, 0, 4}, {1, 1, 1}}, {{1, 8, 9}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {{1, 8, 9}, {1, 1, 1}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}},  {{4, 5, 6}, {3, 2, 2}, {1, 1, 2}, {1, 0, 1}, {1, 2, 1}},
    {{1, 3, 2}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {1, 1, 1}},  {{1, 4, 29}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
};

ConvShape shape_of(const Window& w, int64_t batch, int64_t channels, int64_t groups) {
  ConvShape s{.batch = batch, .channels = channels, .groups = groups};
  for (int i = 0; i < 3; ++i) {
    s.size[i] = w.size[i];
    s.kernel[i] = w.kernel[i];
    s.stride[i] = w.stride[i];
    s.before[i] = w.before[i];
    s.dilation[i] = w.dilation[i];
    // As many zeros behind as before.
    s.out[i] = (w.size[i] + 2 * w.before[i] - w.dilation[i] * (w.kernel[i] - 1) - 1) / w.stride[i] + 1;
  }
  return s;
}

// Calls each(row, tap, pixel or -1), by plain loops.
template <class Fn>
void each_tap(const ConvShape& s, const Fn& each) {
  int64_t row = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t o = 0; o < s.out[0] * s.out[1] * s.out[2]; ++o, ++row) {
      const int64_t at[3] = {o / s.out[2] / s.out[1], o / s.out[2] % s.out[1], o % s.out[2]};
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t t[3] = {tap / s.kernel[2] / s.kernel[1], tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
        int64_t pixel = b;
        for (int i = 0; i < 3; ++i) {
          const int64_t x = at[i] * s.stride[i] - s.before[i] + t[i] * s.dilation[i];
          pixel = pixel < 0 || x < 0 || x >= s.size[i] ? -1 : pixel * s.size[i] + x;
        }
        each(row, tap, pixel);
      }
    }
  }
}

void check_tiles(const Kernel& kernel, const Window& window, Dtype dtype, std::mt19937& rng) {
  const int64_t channels = 1 + static_cast<int64_t>(rng() % 40), n = 1 + static_cast<int64_t>(rng() % 140);
  const ConvShape s = shape_of(window, 3, channels, 1);
  const int64_t m = s.rows(), k = s.taps() * channels;
  Problem p({m, n, k, kernel.chunk_groups ? k : int64_t{16}, ZeroMode::kNone}, kernel, rng);
  std::normal_distribution<float> normal;
  std::vector<float> x(s.pixels() * channels), patches(m * k, 0.0f);
  for (float& v : x) v = round_bf16(normal(rng));
  each_tap(s, [&](int64_t row, int64_t tap, int64_t pixel) {
    for (int64_t c = 0; pixel >= 0 && c < channels; ++c) {
      patches[row * k + tap * channels + c] = x[pixel * channels + c];
    }
  });
  Numbers given(dtype, x), gathered(dtype, patches);
  Guarded<float> y(m * n, std::nanf("")), want(m * n, std::nanf(""));
  Launch l = p.launch();
  l.m = m;
  l.x_dtype = dtype;
  l.out_stride = n;
  Launch rows = l;
  rows.x = gathered.data();
  rows.x_stride = k;
  rows.out = want.data();
  run(kernel, rows, 2);
  l.x = given.data();
  l.out = y.data();
  const bool same = same_when_poisoned(y, [&] { run_conv(kernel, l, s, 2); });
  expect(same, kernel.name, "poisoned memory", m, 0, 0);
  for (int64_t i = 0; i < m * n; ++i) expect(y[i] == want[i], kernel.name, "tile", i, y[i], want[i]);
}

// Integers: every sum is exact in fp32.
void check_groups(uint32_t isa, const char* name, const Window& window, int64_t groups, int64_t depth, int64_t filters,
                  Dtype dtype, std::mt19937& rng) {
  const ConvShape s = shape_of(window, 2, groups * depth, groups);
  const int64_t n = groups * filters, k = s.taps() * depth, m = s.rows();
  const Kernel* decode = nullptr;
  for (const Kernel* each : kernels()) {
    const bool lut = each->op == Op::kDequantize && each->codec == Codec::kLut && each->scope == Scope::kShared;
    if (lut && each->bits == 4 && (active_isa() & each->isa)) decode = each;
  }
  Problem p({1, n, k, k, ZeroMode::kNone}, *decode, rng);
  for (size_t i = 0; i < p.table.size(); ++i) p.table[i] = static_cast<float>(i) - 8;
  for (float& v : p.scales) v = 1;
  std::vector<float> x(s.pixels() * s.channels), start(n);
  for (float& v : x) v = static_cast<float>(rng() % 17) - 8;
  for (float& v : start) v = static_cast<float>(rng() % 17) - 8;
  std::vector<double> want(m * n);
  for (int64_t i = 0; i < m * n; ++i) want[i] = start[i % n];
  each_tap(s, [&](int64_t row, int64_t tap, int64_t pixel) {
    for (int64_t i = 0; pixel >= 0 && i < n * depth; ++i) {
      const int64_t f = i / depth, c = i % depth;
      const double w = static_cast<double>(p.codes[f * k + tap * depth + c]) - 8;
      want[row * n + f] += w * x[pixel * s.channels + f / filters * depth + c];
    }
  });
  Numbers given(dtype, x);
  Guarded<float> y(m * n), bias(start);
  const GroupedConv c{.shape = s,
                      .x = given.data(),
                      .x_dtype = dtype,
                      .n = n,
                      .bias = bias.data(),
                      .bias_dtype = Dtype::kF32,
                      .activation = Activation::kRelu,
                      .out = y.data(),
                      .out_dtype = Dtype::kF32};
  const bool same = same_when_poisoned(y, [&] { run_grouped_conv(c, *decode, p.launch(), isa, 2); });
  expect(same, name, "poisoned memory", m, 0, 0);
  for (int64_t i = 0; i < m * n; ++i) {
    const double positive = want[i] > 0 ? want[i] : 0;
    expect(y[i] == positive, name, "groups", i, y[i], positive);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  int ran = 0;
  for (const Kernel* kernel : kernels()) {
    const bool served = kernel->op == Op::kLinear && kernel->codec == Codec::kLut && kernel->bits == 4 &&
                        kernel->scope == Scope::kShared && kernel->compute != Dtype::kI8;
    if (!served || kernel->bf16_table || !(active_isa() & kernel->isa)) continue;
    count_for(std::string("tiles, ") + isa_name(kernel->isa));
    const Dtype dtype = kernel->exact_x[Dtype::kF32] ? Dtype::kF32 : Dtype::kBf16;
    if (!kernel->exact_x[dtype]) continue;
    ++ran;
    for (const Window& window : kWindows) check_tiles(*kernel, window, dtype, rng);
  }
  for (uint32_t set : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & set)) continue;
    ++ran;
    const char* name = isa_name(static_cast<Isa>(set));
    const uint32_t isa = cap_isa(active_isa(), name);
    count_for(std::string("groups, ") + name);
    for (const Window& window : kWindows) {
      for (int64_t channels : {1, 8, 16, 35}) {
        for (Dtype dtype : {Dtype::kF32, Dtype::kBf16, Dtype::kF16}) {
          check_groups(isa, name, window, channels, 1, 1, dtype, rng);
        }
      }
      check_groups(isa, name, window, 3, 2, 16, Dtype::kF32, rng);  // filters of one group in a vector
      check_groups(isa, name, window, 5, 3, 4, Dtype::kF32, rng);   // of several
      check_groups(isa, name, window, 7, 1, 3, Dtype::kF32, rng);
    }
  }
  std::printf("isa mask %u: convolutions of %d kernels and instruction sets ran, %d checks, %d failures\n",
              active_isa(), ran, checks, failures);
  print_memory_checks();
  return failures != 0;
}
