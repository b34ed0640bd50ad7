// How a long loop finds out that it is no longer wanted.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>

namespace lowbit {

// Asks `wanted` at most ten times a second whether to stop. Only the thread that made it may call `asked`, which asks;
// all may read `stopped`.
class Stop {
 public:
  explicit Stop(std::function<bool()> wanted) : wanted_(std::move(wanted)), next_(Clock::now() + kEvery) {}

  bool asked() {
    if (!stopped() && Clock::now() >= next_) {
      if (wanted_()) stopped_.store(true, std::memory_order_relaxed);
      next_ = Clock::now() + kEvery;
    }
    return stopped();
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kEvery{100};
  std::function<bool()> wanted_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
};

}  // namespace lowbit
