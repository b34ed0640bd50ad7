// The threads of one parallel region that go through a sequence of steps together. Only translation units compiled for
// the baseline include it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace lowbit {

class Team {
 public:
  // Every thread calls wait() and share() in the same order with the same numbers.
  explicit Team(int threads) : threads_(threads), slots_(new Slot[static_cast<size_t>(threads)]) {}

  int threads() const { return threads_; }

  // Returns when all threads have called it. Spins for some 20 us, then sleeps: a core whose thread sleeps can take
  // over the thread that it waits for from a core with other work.
  void wait();

  // Calls fn(begin, end) for ranges that, over all threads, cover [0, tasks) once. Thread i starts on the i-th equal
  // part and takes from what the others have left when it is done. `step` counts the calls of share, from 1 on.
  // At most 2^24 - 1 tasks.
  template <class Fn>
  void share(uint16_t step, int index, int64_t tasks, const Fn& fn) {
    if (threads_ == 1) {
      if (tasks > 0) fn(int64_t{0}, tasks);
      return;
    }
    for (int i = 0; i < threads_; ++i) {
      const int victim = (index + i) % threads_;
      int64_t begin, end;
      while (take(step, victim, tasks, i != 0, &begin, &end)) fn(begin, end);
    }
  }

 private:
  struct alignas(64) Slot {
    std::atomic<uint64_t> range{0};  // step, 16 bits; begin and end, 24 bits each
  };

  bool take(uint16_t step, int slot, int64_t tasks, bool from_the_end, int64_t* begin, int64_t* end);

  int threads_;
  std::unique_ptr<Slot[]> slots_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

}  // namespace lowbit
