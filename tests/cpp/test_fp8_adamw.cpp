// The AdamW step with FP8 states of every instruction set against double, without Python: for sanitizers and for
// emulated CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "core/dispatch.h"
#include "cpu/optim/fp8_adamw.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

void expect(double got, double want, double bound, const char* what, int64_t i) {
  ++checks;
  if (std::fabs(got - want) <= bound) return;
  if (++failures <= 20) std::printf("FAIL %s at %lld: %.9g, expected %.9g\n", what, (long long)i, got, want);
}

constexpr double kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-8, kRate = 1e-2, kDecay = 0.1;

struct Type {
  Float8 type;
  int mantissa, bias;
};
constexpr Type kTypes[] = {{Float8::kE4m3, 3, 7}, {Float8::kE5m2, 2, 15}};

double magnitude(Type t, int code) {
  const int e = (code & 0x7F) >> t.mantissa, m = code & ((1 << t.mantissa) - 1);
  return e ? std::ldexp((1 << t.mantissa) + m, e - t.bias - t.mantissa) : std::ldexp(m, 1 - t.bias - t.mantissa);
}

struct State {
  Type type;
  Guarded<uint8_t> codes;
  Guarded<float> terms;

  State(Type t, int64_t numel, bool expand)
      : type(t), codes(numel), terms((numel + kStateGroup - 1) / kStateGroup * (expand ? 3 : 1), 1.0f) {}
  int64_t groups() const { return (static_cast<int64_t>(codes.size()) + kStateGroup - 1) / kStateGroup; }
  bool expands() const { return static_cast<int64_t>(terms.size()) == 3 * groups(); }
  double term(int which, int64_t i) const {
    return which && !expands() ? 1.0 : terms[which * groups() + i / kStateGroup];
  }
  double value(int64_t i) const {
    const double z = magnitude(type, codes[i]) * term(0, i), x = std::pow(z, 1 / term(1, i)) * term(2, i);
    return codes[i] & 0x80 ? -x : x;
  }
  // That code i is of the number nearest to what stands for x.
  void check(int64_t i, double x) const {
    const double exact = std::pow(std::fabs(x) / term(2, i), term(1, i)) / term(0, i);
    const double got = magnitude(type, codes[i]);
    const int exponent = exact > 0 ? std::max(std::ilogb(exact), 1 - type.bias) : 1 - type.bias;
    const double step = std::ldexp(1.0, exponent - type.mantissa);
    expect(got, exact, step * 0.501 + exact * 2e-3, "code", i);
    if (got > 0) expect((codes[i] & 0x80) != 0, x < 0, 0, "sign", i);
  }
  // That the largest of a group's values has the largest code, and where the middle is.
  void check_range(int64_t group, const std::vector<double>& values) const {
    const int64_t begin = group * kStateGroup, end = std::min<int64_t>(begin + kStateGroup, codes.size());
    double most = 0, least = INFINITY, code = 0;
    for (int64_t i = begin; i < end; ++i) {
      const double x = std::fabs(values[i]);
      most = std::max(most, x);
      if (x > 0) least = std::min(least, x);
      code = std::max(code, magnitude(type, codes[i]));
    }
    if (most == 0) return;
    const double top = magnitude(type, type.type == Float8::kE4m3 ? 0x7E : 0x7B), middle = std::sqrt(most * least);
    expect(code, top, 0, "largest code", group);
    if (expands()) expect(term(2, begin), middle, middle * 1e-5, "middle", group);
  }
  Fp8State view() { return {codes.data(), type.type, terms.data()}; }
};

Fp8AdamW request(void* param, const void* grad, Dtype dtype, int64_t numel, State& m, State& v, int step) {
  Fp8AdamW z{};
  z.param = param;
  z.grad = grad;
  z.dtype = dtype;
  z.numel = numel;
  z.exp_avg = m.view();
  z.exp_avg_sq = v.view();
  z.expand = m.expands();
  z.beta1 = kBeta1;
  z.rest1 = 1 - kBeta1;
  z.beta2 = kBeta2;
  z.rest2 = 1 - kBeta2;
  z.eps = kEps;
  z.decay = 1 - kRate * kDecay;
  z.step_size = kRate / (1 - std::pow(kBeta1, step));
  z.root_correction = 1 / std::sqrt(1 - std::pow(kBeta2, step));
  return z;
}

void check_steps(uint32_t isa, Type first, Type second, bool expand, int64_t numel, std::mt19937& rng) {
  std::normal_distribution<double> normal;
  State m(first, numel, expand), v(second, numel, expand);
  Guarded<float> param(numel), grad(numel);
  std::vector<float> sign(numel);
  for (int64_t i = 0; i < numel; ++i) {
    param[i] = normal(rng);
    sign[i] = i % 17 == 5 ? 0.0f : normal(rng) < 0 ? -1.0f : 1.0f;
  }
  for (int step = 1; step <= 3; ++step) {
    // Signs stay, so that nothing cancels.
    for (int64_t i = 0; i < numel; ++i) grad[i] = sign[i] * std::exp(3 * normal(rng));
    const State old_m = m, old_v = v;
    const Guarded<float> old = param;
    // In place, so each of both runs begins with what was there.
    const bool same = same_when_poisoned(param, [&] {
      for (auto [to, from] : {std::pair{&m, &old_m}, std::pair{&v, &old_v}}) {
        std::copy(from->codes.begin(), from->codes.end(), to->codes.begin());
        std::copy(from->terms.begin(), from->terms.end(), to->terms.begin());
      }
      std::copy(old.begin(), old.end(), param.begin());
      fp8_adamw(request(param.data(), grad.data(), Dtype::kF32, numel, m, v, step), isa, 2);
    });
    expect(same, true, 0, "step again", step);
    std::vector<double> exact_ms(numel), exact_vs(numel);
    for (int64_t i = 0; i < numel; ++i) {
      const double g = grad[i];
      const double exact_m = kBeta1 * old_m.value(i) + (1 - kBeta1) * g;
      const double exact_v = kBeta2 * old_v.value(i) + (1 - kBeta2) * g * g;
      const double update = kRate / (1 - std::pow(kBeta1, step)) * exact_m /
                            (std::sqrt(exact_v) / std::sqrt(1 - std::pow(kBeta2, step)) + kEps);
      const double exact = old[i] * (1 - kRate * kDecay) - update;
      expect(param[i], exact, 3 * 0x1p-24 * std::fabs(old[i]) + 0x1p-15 * std::fabs(update), "parameter", i);
      m.check(i, exact_m);
      v.check(i, exact_v);
      exact_ms[i] = exact_m;
      exact_vs[i] = exact_v;
    }
    for (int64_t g = 0; g < m.groups(); ++g) {
      m.check_range(g, exact_ms);
      v.check_range(g, exact_vs);
    }
  }
  // A group with a NaN is NaN by its scale alone.
  grad[0] = NAN;
  fp8_adamw(request(param.data(), grad.data(), Dtype::kF32, numel, m, v, 4), isa, 2);
  for (const State* s : {&m, &v}) {
    expect(std::isnan(s->terms[0]), true, 0, "scale of NaN", 0);
    for (int64_t i = 0; i < std::min<int64_t>(numel, kStateGroup); ++i) expect(s->codes[i], 0, 0, "code beside NaN", i);
  }
  // In two bytes: zeros stay zeros, and nothing is written beyond them.
  for (Dtype dtype : {Dtype::kBf16, Dtype::kF16}) {
    Guarded<uint16_t> zeros(numel), still(numel);
    State a(first, numel, expand), b(second, numel, expand);
    fp8_adamw(request(zeros.data(), still.data(), dtype, numel, a, b, 1), isa, 2);
    for (int64_t i = 0; i < numel; ++i) expect(zeros[i] & 0x7FFF, 0, 0, "zero", i);
  }
}

}  // namespace

int main() {
  int ran = 0;
  for (uint32_t isa : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & isa)) continue;
    ++ran;
    count_for(std::string("adamw, ") + isa_name(static_cast<Isa>(isa)));
    std::mt19937 rng(1);
    for (Type first : kTypes) {
      for (Type second : kTypes) {
        for (bool expand : {true, false}) {
          for (int64_t numel : {1, 7, 127, 128, 129, 300}) check_steps(isa, first, second, expand, numel, rng);
        }
      }
    }
  }
  std::printf("isa mask %u: AdamW of %d instruction sets ran, %d checks, %d failures\n", active_isa(), ran, checks,
              failures);
  print_memory_checks();
  return failures != 0;
}
