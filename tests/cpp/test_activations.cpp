// Activations as int8 and as signs, k-means, and the search of scales, against plain loops, without Python: for
// sanitizers and for emulated CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/int8_table.h"
#include "cpu/activations/quantize.h"
#include "cpu/offline/kmeans.h"
#include "cpu/offline/scale_search.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

void expect(bool ok, const char* what, int64_t i, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s at %lld: %.9g, expected %.9g\n", what, (long long)i, got, want);
}

// Numbers of fp32 or, with the lower half of their bits cut off, bf16: rows `stride` apart, the last of them k long.
struct Rows {
  int64_t m, k, stride;
  Dtype dtype;
  Guarded<float> floats;
  Guarded<uint16_t> words;
  std::vector<float> values;  // (m, k)

  Rows(int64_t m_, int64_t k_, Dtype dtype_, std::mt19937& rng)
      : m(m_), k(k_), stride(k + 5), dtype(dtype_), values(m * k) {
    const size_t size = static_cast<size_t>((m - 1) * stride + k);
    if (dtype == Dtype::kF32) floats = Guarded<float>(size, NAN);
    if (dtype == Dtype::kBf16) words = Guarded<uint16_t>(size, 0x7FFF);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < m * k; ++i) {
      const int64_t at = i / k * stride + i % k;
      float v = normal(rng);
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      bits &= 0xFFFF0000u;
      std::memcpy(&v, &bits, 4);
      values[i] = v;
      if (dtype == Dtype::kF32) {
        floats[at] = v;
      } else {
        words[at] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
  const void* data() const { return dtype == Dtype::kF32 ? static_cast<const void*>(floats.data()) : words.data(); }
};

using QuantizeInt8Rows = void (*)(const QuantizeInt8&, int8_t*, int64_t, int64_t);
void check_int8(QuantizeInt8Rows rows, const Rows& x, int64_t group, bool given) {
  const int64_t groups = given ? 1 : (x.k + group - 1) / group;
  Guarded<float> scales(x.m * groups, given ? 0.03f : NAN);
  Guarded<int8_t> q(x.m * x.k);
  const QuantizeInt8 z{x.data(), x.dtype, x.stride, x.k, group, scales.data(), given};
  expect(same_when_poisoned(q, [&] { rows(z, q.data(), 0, x.m); }), "int8 with poisoned memory", x.k, 0, 0);
  for (int64_t i = 0; i < x.m * x.k; ++i) {
    const int64_t row = i / x.k, g = given ? 0 : i % x.k / group;
    const int64_t begin = g * group, end = std::min(begin + group, x.k);
    float largest = 0;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, std::fabs(x.values[row * x.k + k]));
    const float scale = scales[row * groups + g];
    if (!given) expect(scale == largest / 127.0f, "int8 scale", i, scale, largest / 127.0f);
    const float inverse = given ? 1.0f / scale : 127.0f / largest;
    const float want = std::clamp(std::nearbyint(x.values[i] * inverse), -127.0f, 127.0f);
    expect(q[i] == want, "int8", i, q[i], want);
  }
}

using QuantizeBinaryRows = void (*)(const QuantizeBinary&, uint8_t*, int64_t, int64_t);
void check_binary(QuantizeBinaryRows rows, const Rows& x) {
  const int64_t bytes = (x.k + 7) / 8;
  Guarded<float> scales(x.m, NAN);
  Guarded<uint8_t> bits(x.m * bytes);
  const QuantizeBinary z{x.data(), x.dtype, x.stride, x.k, scales.data()};
  expect(same_when_poisoned(bits, [&] { rows(z, bits.data(), 0, x.m); }), "signs with poisoned memory", x.k, 0, 0);
  for (int64_t row = 0; row < x.m; ++row) {
    double sum = 0;
    for (int64_t k = 0; k < x.k; ++k) {
      const float v = x.values[row * x.k + k];
      sum += std::fabs(v);
      const int bit = bits[row * bytes + k / 8] >> k % 8 & 1;
      expect(bit == (v >= 0), "sign", k, bit, v);
    }
    const double mean = sum / static_cast<double>(x.k);
    expect(std::fabs(scales[row] - mean) <= static_cast<double>(x.k + 2) * 0x1p-24 * mean, "mean of |x|", row,
           scales[row], mean);
  }
}

// Distinct values, as many as centers: each is its own center.
void check_kmeans() {
  Stop never([] { return false; });
  for (int k : {1, 2, 7, 256}) {
    Guarded<float> values(k), centers(k), rows(3 * k), row_centers(3 * k);
    Guarded<double> weights(k, 1.0), row_weights(3 * k, 1.0);
    for (int i = 0; i < k; ++i) values[i] = static_cast<float>(i) / 3;
    for (int i = 0; i < 3 * k; ++i) rows[i] = values[i % k];
    for (bool weighted : {false, true}) {
      const auto one = [&] {
        kmeans_rows(values.data(), weighted ? weights.data() : nullptr, 1, k, k, centers.data(), 1, &never);
      };
      const auto many = [&] {
        kmeans_rows(rows.data(), weighted ? row_weights.data() : nullptr, 3, k, k, row_centers.data(), 2, &never);
      };
      expect(same_when_poisoned(centers, one) && same_when_poisoned(row_centers, many), "k-means again", k, 0, 0);
      for (int i = 0; i < 3 * k; ++i) {
        expect(centers[i % k] == values[i % k] && row_centers[i] == values[i % k], "center", i, row_centers[i],
               values[i % k]);
      }
    }
    // Fewer centers than values: the mean of all of them.
    kmeans_rows(values.data(), nullptr, 1, k, 1, centers.data(), 1, &never);
    const float mean = static_cast<float>(k - 1) / 6;
    expect(std::fabs(centers[0] - mean) <= 1e-5f * mean, "mean", k, centers[0], mean);
  }
}

// Weights that are the table's entries times a scale: that scale is found, in short groups too, and nothing else is
// read or written.
// Each group is -3 times the entries of a table, every other one of the second if there are two.
void check_scale_search(uint32_t isa) {
  Stop never([] { return false; });
  const int entries = 4;
  for (int64_t k : {1, 7, 8, 33, 50}) {
    for (int64_t group : {1, 8, 16, 40}) {
      for (int tables : {1, 2}) {
        const int64_t rows = 3, groups = (k + group - 1) / group;
        Guarded<float> weights(rows * k), importance(rows * k, 0.5f), table(tables * entries), ratios(2);
        Guarded<float> scales(rows * groups);
        Guarded<uint8_t> chosen(rows * groups);
        Guarded<double> errors(rows);
        for (int e = 0; e < entries; ++e) {
          table[e] = static_cast<float>(e - 1) / 2;
          if (tables == 2) table[entries + e] = e == 2 ? 0.25f : table[e];
        }
        for (int64_t i = 0; i < rows * k; ++i) {
          const int64_t own = i % k / group % tables;
          weights[i] = table[own * entries + entries - 1 - i % k % group % entries] * -3;
        }
        ratios[0] = 1;
        ratios[1] = -1;
        for (bool weighted : {false, true}) {
          const ScaleSearch search{.weights = weights.data(),
                                   .importance = weighted ? importance.data() : nullptr,
                                   .rows = rows,
                                   .k = k,
                                   .group = group,
                                   .steps = nullptr,
                                   .top = 0,
                                   .digits = 24,
                                   .least = -149,
                                   .most = 1e38f,
                                   .table = table.data(),
                                   .tables = tables,
                                   .entries = entries,
                                   .ratios = ratios.data(),
                                   .num_ratios = 2,
                                   .scales = scales.data(),
                                   .chosen = chosen.data(),
                                   .errors = errors.data()};
          for (int64_t i = 0; i < rows * groups; ++i) scales[i] = chosen[i] = 0;
          search_scales(search, isa, weighted ? 2 : 1, &never);
          for (int64_t i = 0; i < rows * groups; ++i) {
            // Groups without all of the entries may have another scale, or table, that leaves no error.
            const int64_t size = std::min(group, k - i % groups * group);
            if (size < entries) continue;
            expect(scales[i] == -3, "scale", i, scales[i], -3);
            expect(chosen[i] == i % groups % tables, "table", i, chosen[i], static_cast<double>(i % groups % tables));
          }
          for (int64_t r = 0; r < rows; ++r) expect(errors[r] == 0, "error", r, errors[r], 0);
        }
      }
    }
  }
}

}  // namespace

int main() {
  int ran = 0;
  for (const Isa isa : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & isa)) continue;
    const QuantizeOps& ops = quantize_ops(kScalar | isa);
    ++ran;
    count_for(std::string("search of scales, ") + isa_name(isa));
    check_scale_search(kScalar | isa);
    std::mt19937 rng(1);
    for (int64_t m : {1, 3}) {
      for (int64_t k : {1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 257}) {
        for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
          count_for(std::string("activations, ") + isa_name(isa));
          const Rows x(m, k, dtype, rng);
          count_for(std::string("int8 quantization, ") + isa_name(isa));
          for (int64_t group : {int64_t{1}, int64_t{16}, int64_t{33}, k}) check_int8(ops.int8, x, group, false);
          check_int8(ops.int8, x, k, true);
          count_for(std::string("signs of x, ") + isa_name(isa));
          check_binary(ops.binary, x);
        }
      }
    }
  }
  count_for("k-means");
  check_kmeans();
  std::printf("isa mask %u: activations of %d instruction sets ran, %d checks, %d failures\n", active_isa(), ran,
              checks, failures);
  print_memory_checks();
  return failures != 0;
}
