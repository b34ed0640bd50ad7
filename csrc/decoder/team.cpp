#include "decoder/team.h"

#include "core/crowd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

constexpr int kSpins = 2000;  // a pause takes 10 to 40 ns

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

constexpr uint64_t pack(uint16_t step, int64_t begin, int64_t end) {
  return uint64_t{step} << 48 | static_cast<uint64_t>(begin) << 24 | static_cast<uint64_t>(end);
}

}  // namespace

void Team::wait() {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  const int64_t begin = clock_ns();
  generation_.wait(generation, std::memory_order_acquire);
  note_wait(clock_ns() - begin, 0);
}

bool Team::take(uint16_t step, int slot, int64_t tasks, bool from_the_end, int64_t* begin, int64_t* end) {
  std::atomic<uint64_t>& range = slots_[static_cast<size_t>(slot)].range;
  const uint64_t fresh = pack(step, tasks * slot / threads_, tasks * (slot + 1) / threads_);
  constexpr uint64_t kMask = (uint64_t{1} << 24) - 1;
  uint64_t seen = range.load(std::memory_order_relaxed);
  while (true) {
    // Whoever comes first brings the slot to this step.
    const uint64_t current = seen >> 48 == step ? seen : fresh;
    const int64_t first = static_cast<int64_t>(current >> 24 & kMask), last = static_cast<int64_t>(current & kMask);
    if (first == last) return false;
    // Large pieces first; the last ones are small, so that all threads end together.
    const int64_t count = (last - first + 3) / 4;
    const uint64_t rest = from_the_end ? pack(step, first, last - count) : pack(step, first + count, last);
    if (range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) {
      *begin = from_the_end ? last - count : first;
      *end = *begin + count;
      return true;
    }
  }
}

}  // namespace lowbit
