// One buffer per calling thread, kept between calls so that decoding allocates nothing.
#pragma once

#include <cstddef>

namespace lowbit {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }
  // At least `bytes` bytes, aligned to 64; what was there is lost.
  void* get(size_t bytes);
  // Returns a large buffer to the system. Called at the end of a call.
  void trim();

 private:
  void release();
  void* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;  // bytes of the mapping that a guarded buffer lies in
};

// For tests: from now on every buffer is new, full of 0xFF, ends up to its alignment at a page that nobody may touch,
// and is gone after the call. What a kernel reads and nobody wrote is NaN; reading beyond the end stops the process.
void poison_scratch(bool on);

}  // namespace lowbit
