#include "core/crowd.h"

#include <dirent.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <string>

namespace lowbit {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kLongWait = kMillisecond;
// How often the system is asked at most: it takes some 10 us for each thread of the process.
constexpr int64_t kAsked = 10 * kMillisecond;
// Two long waits so near to each other are compared.
constexpr int64_t kCompared = 500 * kMillisecond;
// How long a core is left to others: at first, and at most if they still want it then. A failed attempt takes some 20
// ms.
constexpr int64_t kFirstRest = 200 * kMillisecond, kLongestRest = 4000 * kMillisecond;
// After so long without crowding the next rest is the first one again.
constexpr int64_t kForgotten = 2000 * kMillisecond;

struct Crowd {
  // Threads that regions do without, until when.
  std::atomic<int> missing{0};
  std::atomic<int64_t> until{0};
  // Of the last long wait, and of the last rest.
  std::mutex mutex;
  int64_t seen_at = 0, seen_waited = 0, rest = kFirstRest, rested_until = 0;
};
Crowd crowd;

}  // namespace

int64_t clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t waited_for_cores_ns() {
  DIR* tasks = opendir("/proc/self/task");
  if (!tasks) return -1;
  int64_t total = 0, known = 0;
  while (const dirent* entry = readdir(tasks)) {
    if (entry->d_name[0] == '.') continue;
    // Nanoseconds on a core, and in the queue for one.
    FILE* file = std::fopen((std::string("/proc/self/task/") + entry->d_name + "/schedstat").c_str(), "r");
    if (!file) continue;
    long long ran, waited;
    if (std::fscanf(file, "%lld %lld", &ran, &waited) == 2) {
      total += waited;
      ++known;
    }
    std::fclose(file);
  }
  closedir(tasks);
  return known ? total : -1;
}

int uncrowded_threads(int threads) {
  const int missing = crowd.missing.load(std::memory_order_relaxed);
  if (missing == 0) return threads;
  if (clock_ns() >= crowd.until.load(std::memory_order_relaxed)) {
    crowd.missing.store(0, std::memory_order_relaxed);
    return threads;
  }
  return std::max(1, threads - missing);
}

void note_wait(int64_t waited_ns, int64_t worked_ns) {
  // Work that cannot be split evenly takes up to as long again.
  if (waited_ns < kLongWait || waited_ns < worked_ns / 2) return;
  const std::unique_lock lock(crowd.mutex, std::try_to_lock);
  if (!lock) return;
  const int64_t now = clock_ns();
  if (now - crowd.seen_at < kAsked) return;
  const int64_t waited = waited_for_cores_ns();
  if (waited < 0) return;
  const int64_t since = now - crowd.seen_at, queued = waited - crowd.seen_waited;
  crowd.seen_at = now;
  crowd.seen_waited = waited;
  if (since > kCompared || queued < kLongWait) return;
  // A rest that follows an attempt at once is longer than the one before.
  crowd.rest = now - crowd.rested_until > kForgotten ? kFirstRest : std::min(2 * crowd.rest, kLongestRest);
  crowd.rested_until = now + crowd.rest;
  crowd.until.store(crowd.rested_until, std::memory_order_relaxed);
  crowd.missing.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace lowbit
