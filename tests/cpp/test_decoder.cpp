// What a decoder computes between its linears (ops.h), against plain loops in double, without Python: for
// sanitizers and for emulated CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/n16.h"
#include "decoder/decoder.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

void expect_near(const char* what, int64_t i, double got, double want, double tolerance) {
  ++checks;
  if (std::abs(got - want) <= tolerance) return;
  if (++failures <= 20) std::printf("FAIL %s at %lld: %.9g, expected %.9g\n", what, (long long)i, got, want);
}

int64_t padded(int64_t n) { return ceil_div(n, kRowAlign) * kRowAlign; }
int size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : has_scales(dtype) ? 1 : 2; }
double epsilon(Dtype dtype) { return dtype == Dtype::kF32 ? 1e-6 : dtype == Dtype::kBf16 ? 1.0 / 128 : 1.0 / 1024; }

// Numbers of an activation's dtype.
struct Values {
  Dtype dtype;
  Guarded<char> bytes;

  Values(Dtype dtype_, int64_t size) : dtype(dtype_), bytes(static_cast<size_t>(size * size_of(dtype_))) {}
  void set(int64_t i, float v) {
    char* at = bytes.data() + i * size_of(dtype);
    if (dtype == Dtype::kF32) std::memcpy(at, &v, 4);
    if (dtype == Dtype::kBf16) std::memcpy(at, reinterpret_cast<char*>(&v) + 2, 2);
    if (dtype == Dtype::kF16) {
      const _Float16 half = static_cast<_Float16>(v);
      std::memcpy(at, &half, 2);
    }
  }
  double get(int64_t i) const {
    const char* at = bytes.data() + i * size_of(dtype);
    float v = 0;
    if (dtype == Dtype::kF32) std::memcpy(&v, at, 4);
    if (dtype == Dtype::kBf16) std::memcpy(reinterpret_cast<char*>(&v) + 2, at, 2);
    if (dtype == Dtype::kF16) {
      _Float16 half;
      std::memcpy(&half, at, 2);
      v = static_cast<float>(half);
    }
    return v;
  }
  void* data() { return bytes.data(); }
};

// Multiples of 1/16, which every dtype holds.
struct Random {
  std::mt19937 rng{1};
  float operator()() { return static_cast<float>(std::uniform_int_distribution<int>(-40, 40)(rng)) / 16; }
  Values values(Dtype dtype, int64_t n, int64_t size) {
    Values made(dtype, size);
    for (int64_t i = 0; i < n; ++i) made.set(i, (*this)());
    return made;
  }
  Guarded<float> floats(int64_t n, int64_t size) {
    Guarded<float> made(static_cast<size_t>(size));
    for (int64_t i = 0; i < n; ++i) made[i] = (*this)();
    return made;
  }
};

double scale_of(const std::vector<double>& x, double eps) {
  double squares = 0;
  for (const double v : x) squares += v * v;
  return 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
}

void check_norms(const DecoderOps& ops, Dtype dtype, int64_t n, bool y_normed, Random& random) {
  Values x = random.values(dtype, n, padded(n)), y = random.values(dtype, n, padded(n)), out(dtype, padded(n));
  const Guarded<float> weight = random.floats(n, padded(n)), y_norm = random.floats(n, padded(n));
  std::vector<double> added(n), own(n);
  for (int64_t i = 0; i < n; ++i) own[i] = y.get(i);
  const double y_scale = scale_of(own, 1e-3);
  for (int64_t i = 0; i < n; ++i) added[i] = x.get(i) + 0.5 * own[i] * (y_normed ? y_scale * y_norm[i] : 1);
  ops.add_norm({{dtype, 1e-3f, y_normed},
                n,
                0.5f,
                x.data(),
                y.data(),
                y_normed ? y_norm.data() : nullptr,
                weight.data(),
                out.data()});
  const double scale = scale_of(added, 1e-3);
  for (int64_t i = 0; i < n; ++i) {
    expect_near("sum", i, x.get(i), added[i], 10 * epsilon(dtype));
    expect_near("norm", i, out.get(i), added[i] * scale * weight[i], 40 * epsilon(dtype));
  }
  for (int64_t i = n; i < padded(n); ++i) expect_near("padding", i, x.get(i), 0, 0);
}

void check_heads(const DecoderOps& ops, Dtype dtype, int64_t dim, int64_t rotary, bool normed, Random& random) {
  Values x = random.values(dtype, dim, dim);
  const Guarded<float> weight = random.floats(dim, padded(dim));
  Guarded<float> cos(padded(rotary), 1.0f), sin(padded(rotary), 0.0f), scratch(padded(dim), NAN), out(padded(dim));
  for (int64_t i = 0; i < rotary; ++i) {
    cos[i] = random();
    sin[i] = random();
  }
  std::vector<double> v(dim);
  for (int64_t i = 0; i < dim; ++i) v[i] = x.get(i);
  const double scale = scale_of(v, 1e-3);
  for (int64_t i = 0; normed && i < dim; ++i) v[i] *= scale * weight[i];
  ops.ready({{dtype, 1e-3f, true},
             dim,
             rotary,
             x.data(),
             normed ? weight.data() : nullptr,
             cos.data(),
             sin.data(),
             scratch.data(),
             out.data()});
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < dim; ++i) {
    const double turned = i < rotary ? v[i] * cos[i] + v[i < half ? i + half : i - half] * sin[i] : v[i];
    expect_near("head", i, out[i], turned, 80 * epsilon(dtype));
  }
}

void check_elementwise(const DecoderOps& ops, Dtype dtype, int64_t n, Random& random) {
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    Values gate = random.values(dtype, n, padded(n)), up = random.values(dtype, n, padded(n)), before = gate;
    ops.gate_mul(activation, dtype, gate.data(), up.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const double g = before.get(i), u = std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
      const double active = activation == Activation::kSilu ? g / (1 + std::exp(-g)) : 0.5 * g * (1 + std::tanh(u));
      expect_near("gate", i, gate.get(i), active * up.get(i), 10 * epsilon(dtype));
    }
  }
  Values x = random.values(dtype, n, padded(n)), before = x;
  ops.scale(dtype, x.data(), 1.5f, n);
  for (int64_t i = 0; i < n; ++i) expect_near("scale", i, x.get(i), 1.5 * before.get(i), 4 * epsilon(dtype));

  // Not padded.
  Values logits = random.values(dtype, n, n), kept = logits;
  const int64_t begin = n > kRowAlign ? kRowAlign : 0;
  ops.cap_logits(dtype, logits.data(), 0.5f, 3.0f, begin, n);
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double capped = i < begin ? kept.get(i) : 3 * std::tanh(kept.get(i) / 0.5 / 3);
    expect_near("logit", i, logits.get(i), capped, 8 * epsilon(dtype));
    if (logits.get(i) > logits.get(first)) first = i;
  }
  expect_near("argmax", n, static_cast<double>(ops.argmax(dtype, logits.data(), n)), static_cast<double>(first), 0);

  const int64_t k = 37;
  Values weight = random.values(dtype, n * k, n * k), input = random.values(dtype, k, padded(k)), bias = kept,
         y(dtype, n);
  ops.dense(dtype, weight.data(), bias.data(), input.data(), k, 0, n, y.data());
  for (int64_t i = 0; i < n; ++i) {
    double sum = bias.get(i);
    for (int64_t j = 0; j < k; ++j) sum += weight.get(i * k + j) * input.get(j);
    expect_near("dense", i, y.get(i), sum, 100 * epsilon(dtype));
  }
}

// The number of a cache's scaled codes that is nearest, even where two are: 3 mantissa bits and exponents from -6 on
// are E4M3.
double nearest_code(Dtype cache, float x) {
  if (cache == Dtype::kI8) return std::nearbyint(x);
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - 1, -6) - 3);
  return std::nearbyint(x / step) * step;
}

struct Case {
  int64_t dim, positions, rows, group, window;
  float cap;
};

// Keys and values go into a cache of poison, one by one as they are decoded; then the last rows attend, over two
// ranges.
void check_attention(const DecoderOps& ops, Dtype dtype, Dtype cache_dtype, const Case& c, Random& random) {
  const int64_t length = ceil_div(c.positions, kKeyBlock) * kKeyBlock, wide = padded(c.dim);
  Guarded<char> keys(static_cast<size_t>(length * c.dim * size_of(cache_dtype)));
  Guarded<char> values(static_cast<size_t>(length * wide * size_of(cache_dtype)));
  Guarded<float> key_scales(ceil_div(c.dim, kKeyGroup) * length), value_scales(length), scratch(2 * wide);
  keys.poison();
  key_scales.poison();
  value_scales.poison();
  const HeadCache cache{keys.data(), values.data(), key_scales.data(), value_scales.data(), length, cache_dtype,
                        c.dim,       wide};
  std::vector<std::vector<double>> k(c.positions), v(c.positions);
  for (int64_t p = 0; p < c.positions; ++p) {
    const Guarded<float> key = random.floats(c.dim, wide);
    Values value = random.values(dtype, c.dim, c.dim);
    const int64_t key_group = cache_dtype == Dtype::kI8 ? kKeyGroup : c.dim;
    const float largest = cache_dtype == Dtype::kI8 ? 127 : 448;
    std::vector<float> key_steps(ceil_div(c.dim, key_group));
    float value_step = 0;
    for (int64_t d = 0; d < c.dim; ++d) {
      float& step = key_steps[d / key_group];
      step = std::max(step, std::abs(key[d]) / largest);
      value_step = std::max(value_step, std::abs(static_cast<float>(value.get(d))) / largest);
    }
    // In float, as codes in the middle of two depend on it.
    const auto kept = [&](float x, float step) {
      return has_scales(cache_dtype) && step > 0 ? nearest_code(cache_dtype, x / step) * step : x;
    };
    for (int64_t d = 0; d < c.dim; ++d) {
      k[p].push_back(kept(key[d], key_steps[d / key_group]));
      v[p].push_back(kept(static_cast<float>(value.get(d)), value_step));
    }
    ops.store_position(cache, p, true, key.data(), dtype, value.data(), scratch.data());
  }
  const int64_t tokens = ceil_div(c.rows, c.group), first_limit = c.positions - tokens + 1;
  Guarded<float> q = random.floats(c.rows * wide, c.rows * wide);
  for (int64_t i = 0; i < c.rows * wide; ++i) q[i] = i % wide < c.dim ? q[i] : 0.0f;
  const int64_t seen = std::max<int64_t>(first_limit - c.window, 0) / kKeyBlock * kKeyBlock;
  // A range is for rows that all see some of it.
  const int64_t middle = tokens == 1 ? (seen + c.positions) / 2 / kKeyBlock * kKeyBlock : seen;
  Guarded<float> acc[2], most[2], sums[2];
  for (int part = 0; part < 2; ++part) {
    acc[part] = Guarded<float>(c.rows * wide, NAN);
    most[part] = sums[part] = Guarded<float>(c.rows, NAN);
    Guarded<float> work(c.rows * wide);
    Attend a{};
    a.cache = cache;
    a.q = q.data();
    a.q_dtype = dtype;
    a.rows = c.rows;
    a.group = c.group;
    a.first_limit = first_limit;
    a.window = c.window;
    a.begin = part ? middle : seen;
    a.end = part ? c.positions : middle;
    a.scale = 0.25f;
    a.cap = c.cap;
    a.scratch = work.data();
    a.acc = acc[part].data();
    a.max = most[part].data();
    a.sum = sums[part].data();
    poison_stack();
    ops.attend(a);
  }
  const bool narrow = dtype == Dtype::kBf16 && cache_dtype == Dtype::kBf16;  // probabilities, too
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<Partial> parts;
    for (int part = middle > seen ? 0 : 1; part < 2; ++part) {
      parts.push_back({acc[part].data() + r * wide, most[part][r], sums[part][r]});
    }
    Values out(dtype, c.dim);
    ops.finish(parts.data(), static_cast<int>(parts.size()), c.dim, dtype, out.data());
    const int64_t limit = first_limit + r / c.group;
    std::vector<double> want(c.dim);
    double total = 0;
    for (int64_t p = std::max<int64_t>(limit - c.window, 0); p < limit; ++p) {
      double score = 0;
      for (int64_t d = 0; d < c.dim; ++d) score += q[r * wide + d] * k[p][d];
      score *= 0.25;
      const double weight = std::exp(c.cap > 0 ? c.cap * std::tanh(score / c.cap) : score);
      total += weight;
      for (int64_t d = 0; d < c.dim; ++d) want[d] += weight * v[p][d];
    }
    for (int64_t d = 0; d < c.dim; ++d) {
      expect_near("attention", d, out.get(d), want[d] / total, 4 * epsilon(narrow ? Dtype::kBf16 : dtype) + 2e-5);
    }
  }
}

// A number that is none, or infinite, at any place spoils the scale of its codes: they cannot hold it.
void check_nonfinite(const DecoderOps& ops, Dtype cache_dtype) {
  const int64_t dim = 72, wide = padded(dim), groups = ceil_div(dim, kKeyGroup);
  Guarded<char> keys(static_cast<size_t>(kKeyBlock * dim)), values(static_cast<size_t>(kKeyBlock * wide));
  Guarded<float> key_scales(groups * kKeyBlock), value_scales(kKeyBlock), scratch(2 * wide), zeros(wide, 0.0f);
  const HeadCache cache{keys.data(), values.data(), key_scales.data(), value_scales.data(), kKeyBlock, cache_dtype,
                        dim,         wide};
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (int64_t d = 0; d < dim; ++d) {
      Guarded<float> x(wide, 0.0f);
      x[d] = bad;
      ops.store_position(cache, 0, true, x.data(), Dtype::kF32, zeros.data(), scratch.data());
      const int64_t group = cache_dtype == Dtype::kI8 ? d / kKeyGroup : 0;
      expect_near("scale of a key", d, std::isnan(key_scales[group * kKeyBlock]), 1, 0);
      expect_near("scale of a value", d, value_scales[0], 0, 0);
      ops.store_position(cache, 0, true, zeros.data(), Dtype::kF32, x.data(), scratch.data());
      expect_near("scale of a value", d, std::isnan(value_scales[0]), 1, 0);
      expect_near("scale of a key", d, key_scales[group * kKeyBlock], 0, 0);
    }
  }
}

}  // namespace

int main() {
  int ran = 0;
  for (const Isa isa : {kScalar, kAvx2, kAvx512, kAvx512Bf16}) {
    if (!(active_isa() & isa)) continue;
    const DecoderOps& ops = decoder_ops(kScalar | isa);
    ++ran;
    count_for(std::string("decoder, ") + isa_name(isa));
    Random random;
    for (const Dtype cache : {Dtype::kI8, Dtype::kE4m3}) check_nonfinite(ops, cache);
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16, Dtype::kF16}) {
      for (const int64_t n : {1, 7, 8, 16, 17, 65, 100}) {
        for (const bool normed : {false, true}) check_norms(ops, dtype, n, normed, random);
        check_elementwise(ops, dtype, n, random);
      }
      for (const int64_t dim : {2, 20, 32, 80}) {
        for (const int64_t rotary : {int64_t{0}, dim / 4 * 2, dim}) {
          for (const bool normed : {false, true}) check_heads(ops, dtype, dim, rotary, normed, random);
        }
      }
      for (const Dtype cache : {Dtype::kF32, Dtype::kBf16, Dtype::kF16, Dtype::kI8, Dtype::kE4m3}) {
        for (const Case& c : {Case{2, 1, 1, 1, 1, 0}, Case{20, 63, 3, 3, 1000, 0}, Case{26, 65, 5, 5, 64, 2},
                              Case{64, 129, 2, 2, 7, 0}, Case{80, 200, 12, 3, 130, 5}, Case{32, 150, 32, 2, 20, 0}}) {
          check_attention(ops, dtype, cache, c, random);
        }
      }
    }
  }
  std::printf("decoder: %d instruction sets, %d checks, %d failures\n", ran, checks, failures);
  print_memory_checks();
  return failures != 0;
}
