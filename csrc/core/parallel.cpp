#include "core/parallel.h"

#include <pthread.h>

#include <atomic>

namespace lowbit {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool after_fork() { return forked.load(std::memory_order_relaxed); }

}  // namespace lowbit
