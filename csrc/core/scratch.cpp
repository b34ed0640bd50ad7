#include "core/scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace lowbit {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = size_t{16} << 20;
std::atomic<bool> poisoned{false};

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void poison_scratch(bool on) { poisoned.store(on, std::memory_order_relaxed); }

void* Scratch::get(size_t bytes) {
  if (poisoned.load(std::memory_order_relaxed)) {
    release();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), usable = rounded(bytes, page);
    void* memory = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = memory;
    mapped_ = usable + page;
    char* end = static_cast<char*>(memory) + usable;
    if (mprotect(end, page, PROT_NONE) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, usable);
    return end - rounded(bytes, kAlignment);
  }
  if (mapped_ || bytes > size_) {
    release();
    size_ = rounded(bytes, 4096);
    data_ = std::aligned_alloc(kAlignment, size_);
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  return data_;
}

void Scratch::trim() {
  if (mapped_ || size_ > kKept) release();
}

void Scratch::release() {
  if (mapped_) {
    munmap(data_, mapped_);
  } else {
    std::free(data_);
  }
  data_ = nullptr;
  size_ = mapped_ = 0;
}

}  // namespace lowbit
