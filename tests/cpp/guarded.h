// Operands and results for the tests of kernels: arrays of the exact size that end at a page which nobody may touch.
// Reading or writing beyond the end stops the process; before the first element lies 0xFF, which must stay. And calls
// that meet poison in the kernels' own memory and on the stack in place of what earlier ones left there.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/scratch.h"

namespace lowbit {

struct MemoryChecks {
  long guarded = 0, poisoned = 0;
};
// By family and instruction set; `now` is the entry that counts.
inline std::map<std::string, MemoryChecks> memory_checks;
inline MemoryChecks* now = &memory_checks["?"];
inline void count_for(const std::string& label) { now = &memory_checks[label]; }
inline void print_memory_checks() {
  for (const auto& [label, c] : memory_checks) {
    if (c.guarded + c.poisoned == 0) continue;
    std::printf("  %s: %ld guarded operands, %ld runs with poisoned memory\n", label.c_str(), c.guarded, c.poisoned);
  }
}

template <class T>
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(size_t size, T value = T{}) : Guarded(std::vector<T>(size, value)) {}
  explicit Guarded(const std::vector<T>& values) { take(values.data(), values.size()); }
  Guarded(const Guarded& other) { take(other.data_, other.size_); }
  Guarded& operator=(const Guarded& other) {
    Guarded copy(other);
    swap(copy);
    return *this;
  }
  ~Guarded() {
    for (char* at = pages_ + (pages_ ? page() : 0); at != reinterpret_cast<char*>(data_); ++at) {
      if (*at == '\xFF') continue;
      std::printf("FAIL: written before the first element of an array of %zu\n", size_);
      std::abort();
    }
    if (pages_) munmap(pages_, mapped_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  // Bit for bit.
  bool operator==(const Guarded& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data_, other.data_, size_ * sizeof(T)) == 0);
  }
  void poison() {
    if (size_) std::memset(static_cast<void*>(data_), 0xFF, size_ * sizeof(T));
  }

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  // The pages before and behind those of the elements are closed.
  void take(const T* values, size_t size) {
    const size_t bytes = size * sizeof(T), usable = (bytes + page() - 1) / page() * page();
    mapped_ = usable + 2 * page();
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    pages_ = static_cast<char*>(memory);
    char* end = pages_ + page() + usable;
    std::memset(pages_ + page(), 0xFF, usable);
    if (mprotect(pages_, page(), PROT_NONE) != 0 || mprotect(end, page(), PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(end - bytes);
    size_ = size;
    if (size) std::memcpy(static_cast<void*>(data_), values, bytes);
    ++now->guarded;
  }
  void swap(Guarded& other) {
    std::swap(pages_, other.pages_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  char* pages_ = nullptr;
  size_t mapped_ = 0, size_ = 0;
  T* data_ = nullptr;
};

// What a function without initial values for its arrays would find in them.
__attribute__((noinline)) inline void poison_stack() {
  char waste[256 * 1024];
  std::memset(waste, 0xFF, sizeof waste);
  asm volatile("" ::"r"(waste) : "memory");
}

// Calls fn, which must write all of `out`, with what earlier calls left and then with poison there. Whether both wrote
// the same.
template <class T, class Fn>
[[nodiscard]] bool same_when_poisoned(Guarded<T>& out, const Fn& fn) {
  fn();
  const std::vector<T> first(out.begin(), out.end());
  out.poison();
  poison_scratch(true);
  poison_stack();
  fn();
  poison_scratch(false);
  ++now->poisoned;
  return std::memcmp(out.data(), first.data(), first.size() * sizeof(T)) == 0;
}

}  // namespace lowbit
