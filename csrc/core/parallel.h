// Static split of tasks over OpenMP threads. Only translation units compiled for the baseline include it.
#pragma once

#include <omp.h>

#include <cstdint>

#include "core/crowd.h"

namespace lowbit {

// Whether this process is the child of a fork. libgomp's threads do not survive it, and a parallel region in the child
// would wait for them forever, so everything runs on one thread there.
bool after_fork();
// How many of `threads` a parallel region gets at most: one after a fork.
inline int usable_threads(int threads) { return after_fork() ? 1 : threads; }
// How many it gets now.
inline int region_threads(int threads) { return after_fork() ? 1 : uncrowded_threads(threads); }

// Calls fn(index, count) once on each of up to `threads` threads; count is how many there are.
template <class Fn>
void parallel_threads(int threads, const Fn& fn) {
  if (threads > 1) threads = region_threads(threads);
  if (threads <= 1) {
    fn(int64_t{0}, int64_t{1});
    return;
  }
  const int64_t begin = clock_ns();
  int64_t end = begin;
#pragma omp parallel num_threads(threads)
  {
    fn(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
    if (omp_get_thread_num() == 0) end = clock_ns();
  }
  note_wait(clock_ns() - end, end - begin);
}

// Calls fn(begin, end) for disjoint ranges that cover [0, tasks), each thread's range contiguous.
template <class Fn>
void parallel(int64_t tasks, int threads, const Fn& fn) {
  parallel_threads(tasks <= 1 ? 1 : threads,
                   [&](int64_t index, int64_t count) { fn(tasks * index / count, tasks * (index + 1) / count); });
}

}  // namespace lowbit
