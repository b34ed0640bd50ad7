// One buffer per calling thread, kept between calls so that decoding allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace lowbit {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // At least `bytes` bytes, aligned to 64; what was there is lost.
  void* get(size_t bytes) {
    if (bytes > size_) {
      release();
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, rounded);
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }
  // Returns a large buffer to the system. Called at the end of a call.
  void trim() {
    constexpr size_t kKept = size_t{16} << 20;
    if (size_ > kKept) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lowbit
