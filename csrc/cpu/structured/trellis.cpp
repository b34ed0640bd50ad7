#include "cpu/structured/trellis.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "core/parallel.h"
#include "core/registry.h"
#include "units.h"

namespace lowbit {

LOWBIT_REGISTRY(trellis)

namespace {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

void encode_trellis(TrellisEncode t, uint32_t isa, int threads, Stop* stop) {
  if (t.rows == 0 || t.count == 0) return;
  const TrellisKernel& kernel = *newest(units::trellis::kAll, isa).given;
  double square = 0;
  for (int64_t s = 0; s < kTrellisStates; ++s) square += double{t.values[s]} * t.values[s];
  // 4 standard deviations fill 15 bits.
  t.factor = static_cast<float>(8192 / std::sqrt(square / kTrellisStates));
  std::vector<uint16_t> fixed(kTrellisStates);
  for (int64_t s = 0; s < kTrellisStates; ++s) fixed[s] = trellis_fixed(t.values[s], t.factor);
  t.fixed = fixed.data();
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(usable_threads(threads), t.rows));
  const auto bytes = static_cast<size_t>(kernel.scratch_bytes(t));
  std::vector<std::unique_ptr<void, FreeAligned>> scratch;
  for (int64_t i = 0; i < tasks; ++i) scratch.emplace_back(::operator new(bytes, std::align_val_t{64}));
  parallel(tasks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t row = task; row < t.rows; row += tasks) {
        if (begin == 0 ? stop->asked() : stop->stopped()) return;
        kernel.encode_row(t, row, scratch[static_cast<size_t>(task)].get());
      }
    }
  });
}

}  // namespace lowbit
