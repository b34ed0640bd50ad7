// A plain read of memory, with or without prefetches: the ceiling of any kernel that must read its weight once.
#include <cstddef>
#include <cstdint>

extern "C" uint64_t read_bytes(const uint64_t* data, size_t bytes, int threads, bool prefetches) {
  const size_t words = bytes / 8;
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : all)
  for (size_t block = 0; block < words / 512; ++block) {
    const uint64_t* p = data + block * 512;
    uint64_t some = 0;
    for (size_t line = 0; prefetches && line < 512; line += 8) __builtin_prefetch(p + 512 + line);
#pragma omp simd reduction(| : some)
    for (size_t i = 0; i < 512; ++i) some |= p[i];
    all |= some;
  }
  return all;
}
